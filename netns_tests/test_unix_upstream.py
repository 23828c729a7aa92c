"""An app behind a Unix socket that cannot be had (faults 27 and 28): what the kernel says at once, and a queue in which there is no room."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import trio

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
async def test_fault_27_a_unix_socket_at_which_nobody_can_be_had(way: Way, what: str) -> None:
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


@BOTH_LAYOUTS
async def test_fault_28_the_queue_of_a_unix_socket_is_full(way: Way) -> None:
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
async def test_fault_28_many_that_wait_for_a_unix_socket_cost_little(way: Way) -> None:
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
