"""An app behind a Unix socket, where that differs: one that cannot be had (faults 27 and 28), and ends that are none (29 and 30).

What holds for every upstream is tested with this one, too: in test_contract.py and test_schedules.py.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import trio

from netns_tests.both_ends import Bench, Conversation, Seen, all_at_once, assert_is_payload, read, read_exactly, send
from netns_tests.watch import all_cpu_seconds, many, reset
from netns_tests.way import AT_ONCE, BOTH_LAYOUTS, SIDECAR_V4, Way, median_ms
from netns_tests.wire import Wiretap, attempt, since_it_was_there
from tproxyd.net.sockets import format_address
from tproxyd.testing.daemon import TPROXYD, LabDaemon, open_daemon

CONNECT = 'connect_timeout = "500ms"\n'


@asynccontextmanager
async def unix_app() -> AsyncIterator[Path]:
    """Where an app's Unix socket is to be."""
    with TemporaryDirectory(
        prefix="tproxyd-app-"
    ) as directory:  # pytest's own are longer than a socket's address may be
        yield Path(directory) / "s"


def bound(path: Path, backlog: int | None = None) -> socket.socket:
    """A Unix socket, which listens if there is a backlog."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    if backlog is not None:
        sock.listen(backlog)
    return sock


def to_unix(path: Path) -> str:
    return f'[capture]\nports = ["8080"]\n[upstream]\ntarget = "unix:{path}"\n' + CONNECT


@BOTH_LAYOUTS
@pytest.mark.parametrize("what", ["no file", "stale file", "plain file", "no permission"])
@pytest.mark.timed
async def test_27_a_unix_socket_at_which_nobody_can_be_had(way: Way, what: str) -> None:
    """connect() says so itself. The permission is that of a daemon without CAP_DAC_OVERRIDE."""
    async with unix_app() as path, AsyncExitStack() as stack:
        outcome = "upstream_refused"
        if what == "stale file":
            bound(path).close()
        elif what == "plain file":
            path.touch()
        elif what == "no permission":
            stack.enter_context(bound(path, 1))
            path.chmod(0)
            outcome = "upstream_unreachable"
        process = await stack.enter_async_context(
            way.proxy.process(
                "setpriv",
                "--bounding-set=-dac_override",
                *TPROXYD,
                "run",
                "-c",
                str(way.file(to_unix(path))),
                collect=True,
            )
        )
        daemon = LabDaemon(process, await process.wait_for_output("tproxyd: ready "))
        tap = stack.enter_context(Wiretap(way.proxy))
        took = []
        for _ in range(5):
            one = await attempt(way.client, daemon, way.address)
            assert one.record["outcome"] == outcome
            took.append(since_it_was_there(tap.heard(), one))
        assert median_ms(f"{way}, {what}: reset after", took) < AT_ONCE
        assert await daemon.stop() == 0
    told = {"no file": "there is no such socket (ENOENT)", "no permission": "permission denied (EACCES)"}.get(what)
    lines = [line for line in daemon.process.stderr_text.splitlines() if "cannot connect" in line]
    assert len(lines) == (told is not None)  # of five within five seconds
    assert told is None or f"cannot connect to unix:{path}: {told}; " in lines[0]


@BOTH_LAYOUTS
@pytest.mark.timed
async def test_28_the_queue_of_a_unix_socket_is_full(way: Way) -> None:
    """Who waits for room gets in when there is some, in the order of arrival; is reset at connect_timeout if there is none; and may leave."""
    async with unix_app() as path, AsyncExitStack() as stack:
        app = stack.enter_context(bound(path, 0))
        app.setblocking(False)
        queue = stack.enter_context(full(path))
        daemon = await stack.enter_async_context(open_daemon(way.proxy, to_unix(path)))
        tap = stack.enter_context(Wiretap(way.proxy))
        clients = []
        for number in range(3):
            clients.append(await stack.enter_async_context(await way.client.connect(way.address, 8080)))
            await clients[-1].send_all(str(number).encode())
        for _ in queue.fillers:
            app.accept()[0].close()
        for number in range(3):
            with trio.fail_after(0.4):
                sock, _ = await trio.socket.from_stdlib_socket(app).accept()
                async with trio.SocketStream(sock) as served, clients[number]:
                    assert await served.receive_some() == str(number).encode()
        queue.fill()
        took = []
        for _ in range(3):
            one = await attempt(way.client, daemon, way.address)
            assert one.record["outcome"] == "upstream_timeout"
            took.append(since_it_was_there(tap.heard(), one))
        median_ms(f"{way}, queue full, connect_timeout 500 ms: reset after", took)
        assert all(0.5 <= one < 0.516 + 0.5 for one in took)
        stream = await way.client.connect(way.address, 8080)
        own = format_address(stream.socket.getsockname())
        await reset(stream)
        assert (await daemon.record(own))["outcome"] == "client_reset"
        assert await daemon.stop() == 0


class full:  # noqa: N801  # used as a function
    """Connections that fill the queue of a Unix socket."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self.fillers: list[socket.socket] = []
        self.fill()

    def fill(self) -> None:
        while True:
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            try:
                sock.connect(self._path)
            except BlockingIOError:
                sock.close()
                return
            self.fillers.append(sock)

    def __enter__(self) -> full:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self.fillers:
            sock.close()


@SIDECAR_V4
async def test_28_many_that_wait_for_a_unix_socket_cost_little(way: Way) -> None:
    """What is asked in vain for one need not be asked for the others."""
    async with unix_app() as path, AsyncExitStack() as stack:
        app = stack.enter_context(bound(path, 0))
        stack.enter_context(full(path))
        daemon = await stack.enter_async_context(open_daemon(way.proxy, to_unix(path).replace("500ms", "30s")))
        streams = await stack.enter_async_context(many(way.client, way.address, 400))
        used = all_cpu_seconds(daemon)
        await trio.sleep(1)
        share = all_cpu_seconds(daemon) - used
        print(f"CPU while 400 connections wait for a Unix socket: {share:.1%}")
        for stream in streams:
            await reset(stream)
        app.close()
        assert share < 0.05


ON_UNIX = pytest.mark.parametrize(
    "bench", ["auto process sidecar v4 unix", "copy thread sidecar v4 unix"], indirect=True
)


@ON_UNIX
async def test_30_the_client_resets_and_the_app_sees_the_end(bench: Bench) -> None:
    """All that had come, and then the end of the stream: the kernel can say no more over a Unix socket. Who sends is told, as ever."""

    async def abort(size: int, talk: Conversation) -> None:
        seen = Seen()

        async def receive() -> None:
            seen.data += await read_exactly(talk.app, size)

        await all_at_once(partial(send, talk.client, size), receive)
        await reset(talk.client)
        with trio.fail_after(1):  # 100 ms, with room for a busy machine
            await read(talk.app, seen)
        assert seen.end == "orderly"
        assert_is_payload(seen.data, size)
        with pytest.raises(trio.BrokenResourceError):
            await talk.app.send_all(b"to nobody")
        assert (await talk.record())["outcome"] == "client_reset"

    async def abort_a_download(talk: Conversation) -> None:
        async def say() -> None:
            with pytest.raises(trio.BrokenResourceError):
                while True:
                    await send(talk.app, 1_000_000)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(say)
            await talk.client.receive_some()
            await reset(talk.client)
            nursery.cancel_scope.deadline = trio.current_time() + 1
        assert not nursery.cancel_scope.cancelled_caught
        assert (await talk.record())["outcome"] == "client_reset"

    for size in (1, 1_000_000):
        await bench.each(f"after {size} bytes", partial(abort, size), 5)
    await bench.each("in a download", abort_a_download, 5)


@ON_UNIX
async def test_29_the_app_goes_and_leaves_something_unread(bench: Bench) -> None:
    """As TCP has it: that is a reset, after the bytes that came before. With nothing unread it is an end; what is said after it, a reset."""

    async def leave(talk: Conversation) -> None:
        await talk.client.send_all(b"question")
        await trio.lowlevel.wait_readable(talk.app.socket)
        await send(talk.app, 100_000)
        await talk.app.aclose()
        seen = await read(talk.client, Seen())
        assert seen.end == "reset"
        assert_is_payload(seen.data, 100_000)
        assert (await talk.record())["outcome"] == "upstream_reset"

    async def close(talk: Conversation) -> None:
        await send(talk.app, 100_000)
        await talk.app.aclose()
        seen = await read(talk.client, Seen())
        assert seen.end == "orderly"
        assert_is_payload(seen.data, 100_000)
        with trio.fail_after(1), pytest.raises(trio.BrokenResourceError):  # reading would tell of the end again
            while True:
                await talk.client.send_all(b"question")
                await trio.sleep(0.01)
        assert (await talk.record())["outcome"] == "upstream_reset"

    await bench.each("with a question unread", leave, 5)
    await bench.each("with nothing unread", close, 5)
