"""Both ends of a connection through the real daemon: this process's own sockets, one on each side, so that a test sees both at once.

`open_bench` ends with the daemon's files: those that connections had are given back, and the pipes that are kept are empty. Refuses to know
what is said over a connection; `payload` is what most say.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any, Literal

import trio

from netns_tests.watch import files_of, full_pipes, processes
from tproxyd.net.sockets import format_address
from tproxyd.testing import GATEWAY, SIDECAR, LabDaemon, Node, digest_of, payload
from tproxyd.testing.daemon import open_daemon
from tproxyd.testing.plugin import OpenLab

__all__ = [
    "FIRST_PORT",
    "Bench",
    "Conversation",
    "Seen",
    "all_at_once",
    "assert_begins_payload",
    "assert_is_payload",
    "expected_digest",
    "open_bench",
    "read",
    "read_exactly",
    "send",
]

SLOTS = 12  # connections at once; each has a port of its own, so that both ends of each are known
FIRST_PORT = 8080
SPARE_PIPES = 64  # that a relay keeps for the next transfer

End = Literal["orderly", "reset", "own"]
"""How a connection ended for one side: the peer's FIN, a reset, or that it was this side that reset it before anything else."""


class Bench:
    """A daemon, and whoever talks through it. `pair` gives both ends of one connection.

    With `unix`, where the daemon connects to, the app has that Unix socket, too: one for all, so it is known only one after the other
    which connection is whose.
    """

    def __init__(
        self, daemon: LabDaemon, client: Node, app: Node, address: str, unix: socket.socket | None = None
    ) -> None:
        self.daemon, self.client, self.app, self.address = daemon, client, app, address
        self.unix = trio.SocketListener(trio.socket.from_stdlib_socket(unix)) if unix is not None else None
        self._turn = trio.Lock()
        self.bind = "::" if ":" in address else "0.0.0.0"
        self.listeners = [app.listen(self.bind, FIRST_PORT + slot) for slot in range(SLOTS)]
        self._free = list(range(SLOTS))
        self._slots = trio.Semaphore(SLOTS)

    async def pair(self, slot: int, *, port: int = 0) -> tuple[trio.SocketStream, trio.SocketStream]:
        """The client's and the app's end of a new connection through the daemon; with `port` through what listens there."""
        if self.unix is not None and not port:
            async with self._turn:
                stream, accepted = await self._connect(FIRST_PORT + slot, self.unix)
        else:
            stream, accepted = await self._connect(port or FIRST_PORT + slot, self.listeners[slot])
        for end in (stream, accepted):
            if end.socket.family == socket.AF_UNIX:
                continue
            # What the peers do to themselves is not the relay's.
            end.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.socket.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        return stream, accepted

    async def _connect(self, port: int, listener: trio.SocketListener) -> tuple[trio.SocketStream, trio.SocketStream]:
        stream = await self.client.connect(self.address, port)
        try:
            with trio.fail_after(5):
                return stream, await listener.accept()
        except BaseException:
            stream.socket.close()
            raise

    async def each(self, name: object, function: Callable[[Conversation], Awaitable[None]], within: float) -> None:
        """Calls `function` with a connection, as soon as a slot is free. A failure tells `name`."""
        async with self._slots:
            slot = self._free.pop()
            try:
                client, app = await self.pair(slot)
                async with client, app:
                    try:
                        with trio.fail_after(within):
                            await function(Conversation(self, client, app, *addresses_of(client)))
                    except BaseException as error:
                        error.add_note(f"in {name}")
                        raise
            finally:
                self._free.append(slot)

    async def aclose(self) -> None:
        for listener in (*self.listeners, *([self.unix] if self.unix is not None else [])):
            await listener.aclose()


@dataclass
class Conversation:
    """Both ends of one connection through the daemon."""

    bench: Bench
    client: trio.SocketStream
    app: trio.SocketStream
    source: str
    destination: str

    async def record(self) -> dict[str, Any]:
        """Its line of the access log. The client's address alone could be that of an earlier one, to another port."""
        line = await self.bench.daemon.process.wait_for_output(
            f'"source":"{self.source}","original_destination":"{self.destination}"'
        )
        content: dict[str, Any] = json.loads(line)
        return content

    def ends(self, first: str) -> tuple[trio.SocketStream, trio.SocketStream]:
        """The named one ("client" or "app"), and the other."""
        return (self.client, self.app) if first == "client" else (self.app, self.client)


@dataclass
class Seen:
    """What one end has received, and how it ended."""

    data: bytearray = field(default_factory=bytearray)
    end: End | None = None


def addresses_of(stream: trio.SocketStream) -> tuple[str, str]:
    """Its own and its peer's, as in the access log."""
    return format_address(stream.socket.getsockname()), format_address(stream.socket.getpeername())


async def read(
    stream: trio.SocketStream, seen: Seen, *, size: int = 65536, pause: float = 0.0, pauses: int = 1 << 30
) -> Seen:
    """To the end, whatever that is; `pause` before each of the first `pauses` reads."""
    try:
        for number in itertools.count():
            if pause and number < pauses:
                await trio.sleep(pause)
            chunk = await stream.receive_some(size)
            if not chunk:
                break
            seen.data += chunk
        seen.end = seen.end or "orderly"
    except trio.BrokenResourceError:
        seen.end = "reset"
    except trio.ClosedResourceError:  # by the other task of this side
        seen.end = seen.end or "own"
    return seen


async def read_exactly(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = await stream.receive_some(count - len(data))
        assert chunk, f"the connection ended after {len(data)} of {count} bytes"
        data += chunk
    return data


async def send(stream: trio.SocketStream, size: int) -> None:
    for chunk in payload(size):
        await stream.send_all(chunk)


expected_digest = cache(digest_of)


def assert_is_payload(data: bytes | bytearray, size: int) -> None:
    """All of it, and nothing else. Said in digests: a difference of 5 MB is nothing to look at."""
    assert len(data) == size
    assert hashlib.sha256(data).hexdigest() == expected_digest(size)


def assert_begins_payload(data: bytes | bytearray, size: int) -> None:
    assert len(data) <= size
    assert hashlib.sha256(data).hexdigest() == digest_of(len(data))


async def all_at_once(*functions: Callable[[], Awaitable[Any]]) -> None:
    async with trio.open_nursery() as nursery:
        for function in functions:
            nursery.start_soon(function)


@asynccontextmanager
async def open_bench(name: str, open_lab: OpenLab) -> AsyncIterator[Bench]:
    """By the relay's engine and home, layout and family, and where to if not as dialled: "auto process sidecar v4", "... unix"."""
    engine, home, layout, family, *others = name.split()
    target = others[0] if others else "original"
    with TemporaryDirectory(prefix="tproxyd-app-") as directory:
        path = f"{directory}/s"
        config = (
            f'[capture]\nports = ["{FIRST_PORT}-{FIRST_PORT + SLOTS - 1}"]\n'
            f'[upstream]\ntarget = "{f"unix:{path}" if target == "unix" else target}"\n'
            f'[relay]\nengine = "{engine}"\nworkers = {int(home == "process")}\n'
        )
        async with open_lab(SIDECAR if layout == "sidecar" else GATEWAY) as lab:
            if layout == "sidecar":
                proxy = app = lab["host"]
                address = getattr(app, family)
            else:
                proxy, app = lab["gateway"], lab["server"]
                address = {"v4": "203.0.113.9", "v6": "2001:db8:f::9"}[family]
            async with open_daemon(proxy, config) as daemon:
                before = _all_files(daemon)
                bench = Bench(daemon, lab["client"], app, address, _listen_unix(path) if target == "unix" else None)
                try:
                    yield bench
                finally:
                    await bench.aclose()
                await _assert_files_are_back(daemon, before)
                assert "this is a bug" not in daemon.process.stderr_text
                assert "Traceback" not in daemon.process.stderr_text
                assert await daemon.stop() == 0


def _listen_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen()
    return sock


def _all_files(daemon: LabDaemon) -> Counter[str]:
    return sum((files_of(pid) for pid in processes(daemon)), Counter())


async def _assert_files_are_back(daemon: LabDaemon, before: Counter[str]) -> None:
    """A connection's record may come a moment before its files are closed. Spare pipes stay, and nothing may be in them."""
    with trio.move_on_after(3):
        while True:
            more = _all_files(daemon) - before
            pipes = more.pop("pipe", 0)
            if not more and pipes <= 2 * SPARE_PIPES:
                break
            await trio.sleep(0.01)
    assert not more
    assert pipes <= 2 * SPARE_PIPES
    assert pipes % 2 == 0
    assert not [pipe for pid in processes(daemon) for pipe in full_pipes(pid)]
