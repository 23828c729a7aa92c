"""The administrator's API and the verbs that ask it, with a daemon that is none: what it says when it reloads, and when it is too slow."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from tproxyd.daemon import client, http
from tproxyd.daemon.admin import serve_admin
from tproxyd.daemon.http import Shared
from tproxyd.daemon.pressure import Pressure
from tproxyd.daemon.service import Service
from tproxyd.errors import ConfigError, KernelError, MissingError, TproxydError


@asynccontextmanager
async def answering(tmp_path: Path, reload: Callable[[], Awaitable[str]] | None) -> AsyncIterator[Path]:
    """A configuration file whose daemon reloads so."""
    path = str(tmp_path / "x.sock")
    file = tmp_path / "tproxyd.toml"
    file.write_text(f'[capture]\nports = ["80"]\n[admin]\nsocket = "{path}"\n')
    nothing: Any = None
    interceptor = SimpleNamespace(differences=nothing, connections=0)
    service = SimpleNamespace(interceptor=interceptor, status=nothing, unready="")
    if reload is not None:
        service.reload = reload
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen()
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_admin, listener, cast(Service, service), Pressure(None))
        yield file
        nursery.cancel_scope.cancel()


async def reload(file: Path) -> int:
    return await trio.to_thread.run_sync(client.reload, file)


async def test_a_reload_says_what_has_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def changes() -> str:
        return "capture.ports: 80 is new\n\x1b[2Jand a terminal is left alone"

    async with answering(tmp_path, changes) as file:
        assert await reload(file) == 0
    assert capsys.readouterr().out == "capture.ports: 80 is new\n\\x1b[2Jand a terminal is left alone\n"


@pytest.mark.parametrize(
    "error",
    [
        ConfigError(
            "`capture.prots` is not a key; did you mean `ports`?", "`log.level` = 1 is an integer; write a word"
        ),
        KernelError("a port is taken; choose another"),
        MissingError("nft is missing; install it"),
    ],
)
async def test_a_reload_that_is_refused_has_every_reason(tmp_path: Path, error: TproxydError) -> None:
    async def refuse() -> str:
        raise error

    async with answering(tmp_path, refuse) as file:
        with pytest.raises(ConfigError) as caught:
            await reload(file)
    assert caught.value.exit_code == 1
    problems = error.problems if isinstance(error, ConfigError) else (str(error),)
    assert caught.value.problems == tuple(f"cannot reload: {problem}" for problem in problems)


async def test_a_version_without_reload_says_so(tmp_path: Path) -> None:
    async with answering(tmp_path, None) as file:
        with pytest.raises(ConfigError, match="reload is not in this version of tproxyd; restart it"):
            await reload(file)


async def test_a_surprise_and_what_takes_too_long_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> str:
        raise ZeroDivisionError("a mistake")

    async with answering(tmp_path, fail) as file:
        with caplog.at_level(logging.CRITICAL), pytest.raises(ConfigError, match="this is a bug"):
            await reload(file)
    (tmp_path / "x.sock").unlink()

    async def hang() -> str:
        await trio.sleep_forever()

    monkeypatch.setattr(http, "_WORK", 0.1)
    monkeypatch.setattr("tproxyd.daemon.admin._RELOAD", 0.2)
    async with answering(tmp_path, hang) as file:
        with pytest.raises(ConfigError, match="it could not be done in time"):
            await reload(file)


async def test_where_nobody_is_that_is_said_with_the_path(tmp_path: Path) -> None:
    file = tmp_path / "tproxyd.toml"
    file.write_text(f'[admin]\nsocket = "{tmp_path}/x.sock"\n')
    with pytest.raises(MissingError, match=rf"no daemon is asked at {tmp_path}/x\.sock \(No such file or directory\)"):
        client.drain(file)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(f"{tmp_path}/x.sock")
        with pytest.raises(MissingError, match=r"\(Connection refused\)"):
            client.drain(file)


# What is made for all who ask.


async def test_what_is_dear_is_made_once_for_all_who_wait_and_is_never_older_than_the_question(
    autojump_clock: trio.testing.MockClock,
) -> None:
    made: list[float] = []

    async def make() -> int:
        made.append(trio.current_time())
        await trio.sleep(0.01)
        return len(made)

    shared, got = Shared(make), list[tuple[float, int]]()

    async def ask(after: float) -> None:
        await trio.sleep(after)
        asked = trio.current_time()
        number = await shared()
        assert made[number - 1] >= asked
        got.append((asked, number))

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(ask, number / 1000)
    assert len(got) == 100
    assert len(made) == 2  # the first at once, the second for the 99 that came in its time and in the rest behind it
    assert trio.current_time() - began == pytest.approx(0.21)


async def test_who_was_to_make_it_for_the_others_may_be_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    count = 0

    async def make() -> int:
        nonlocal count
        count += 1
        await trio.sleep(1)
        return count

    shared, got = Shared(make), list[int]()

    async def ask() -> None:
        got.append(await shared())

    async with trio.open_nursery() as nursery:
        with trio.move_on_after(0.5):
            async with trio.open_nursery() as first:
                first.start_soon(ask)
                await trio.sleep(0.1)
                for _ in range(3):
                    nursery.start_soon(ask)
    assert got == [2, 2, 2]
