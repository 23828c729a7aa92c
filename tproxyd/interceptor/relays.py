"""The relay loops of one namespace: started, listened to, replaced when one dies, and ended, from trio.

A loop lives in a process of its own or in a thread of this one; either way it is known here only as the other end of a
socket (datapath/report.py). What a loop tells costs this side a wake-up every 50 ms, however many connections it serves.
"""

from __future__ import annotations

import logging
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import trio

from tproxyd.datapath import Counters, LogLine, Record, Setup, report, worker
from tproxyd.datapath.loop import serve_loop
from tproxyd.errors import KernelError

__all__ = ["Relays", "merge_counters"]

_log = logging.getLogger(__name__)

_START = 10.0  # seconds for a loop to answer; it takes some hundredths
_STOP = 3.0  # seconds for a loop to end when it has been told to; then it is killed
_COUNT = 1.0  # seconds for a loop to tell its counters
_YOUNG = 5.0  # seconds; a loop that dies younger than that has something against it ...
_TRIES = 5  # ... and after so many of them in a row the interception ends: better no daemon than one that steers clients nowhere
_CHANNEL_BYTES = 1 << 20  # of messages that wait; the kernel gives what net.core.wmem_max allows

OnLines = Callable[[bytes], None]


class Relays:
    """`count` loops in processes, or one in a thread if `count` is 0, on listeners that stay the caller's.

    `on_lines` gets the records of ended connections, as whole lines of JSON, several at a time; it must not block.
    """

    def __init__(
        self, setups: Sequence[Setup], listeners: Sequence[Sequence[socket.socket]], on_lines: OnLines
    ) -> None:
        self._relays = [_Relay(setup, own, on_lines) for setup, own in zip(setups, listeners, strict=True)]
        self._ended = trio.Event()

    @property
    def active(self) -> int:
        """Connections that live, as far as has been told: some hundredths of a second ago."""
        return sum(relay.counters.active for relay in self._relays)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Starts the loops, tells when each has answered, and keeps them running until cancelled; then ends them, which resets
        their connections. Raises KernelError when they cannot be started, or die again and again."""
        try:
            async with trio.open_nursery() as nursery:
                async with trio.open_nursery() as starting:
                    for relay in self._relays:
                        starting.start_soon(nursery.start, relay.serve)
                task_status.started()
        finally:
            self._ended.set()

    async def ended(self) -> None:
        """Returns when `serve` has."""
        await self._ended.wait()

    async def wait_idle(self) -> None:
        """Returns when no loop has a connection left; what waits to be accepted is accepted first."""
        async with trio.open_nursery() as nursery:
            for relay in self._relays:
                nursery.start_soon(relay.wait_idle)

    async def count(self) -> Counters:
        """The counters of all loops together, with what living connections have moved so far."""
        async with trio.open_nursery() as nursery:
            for relay in self._relays:
                nursery.start_soon(relay.count)
        return merge_counters([relay.total for relay in self._relays])


def merge_counters(many: Sequence[Counters]) -> Counters:
    """The sum."""
    total = Counters()
    for one in many:
        total.accepted += one.accepted
        total.active += one.active
        for outcome, number in one.outcomes.items():
            total.outcomes[outcome] = total.outcomes.get(outcome, 0) + number
        total.bytes_from_client += one.bytes_from_client
        total.bytes_from_upstream += one.bytes_from_upstream
        total.connect_seconds = [a + b for a, b in zip(total.connect_seconds, one.connect_seconds, strict=True)]
        total.connect_seconds_sum += one.connect_seconds_sum
        total.records_dropped += one.records_dropped
    return total


class _Relay:
    """One place for a loop, and whoever fills it at the moment."""

    def __init__(self, setup: Setup, listeners: Sequence[socket.socket], on_lines: OnLines) -> None:
        self._setup = setup
        self._listeners = listeners
        self._on_lines = on_lines
        self._channel: trio.socket.SocketType | None = None
        self._before = Counters()  # of those that died
        self.counters = Counters()
        self._living: dict[str, Record] = {}
        self._ready = trio.Event()
        self._idle: trio.Event | None = None
        self._counted: trio.Event | None = None

    @property
    def total(self) -> Counters:
        return merge_counters([self._before, self.counters])

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        tries = 0
        while True:
            began = trio.current_time()
            reason = await self._live(task_status if tries == 0 and not self._ready.is_set() else None)
            self._bury(reason)
            tries = tries + 1 if trio.current_time() - began < _YOUNG else 1
            if tries >= _TRIES:
                raise KernelError(
                    f"relay loops die as soon as they are started ({reason}), so connections cannot be served"
                )
            await trio.sleep(0.05 * 2**tries)

    async def wait_idle(self) -> None:
        self._idle = trio.Event()
        await self._tell(report.TELL_IDLE)
        await self._idle.wait()

    async def count(self) -> None:
        if self._counted is None:
            self._counted = trio.Event()
            await self._tell(report.TELL_COUNTERS)
        with trio.move_on_after(_COUNT):
            await self._counted.wait()

    async def _tell(self, order: bytes) -> None:
        if self._channel is not None:
            with suppress(OSError):  # it has died, which is noticed elsewhere
                await self._channel.send(order)

    async def _live(self, task_status: trio.TaskStatus[None] | None) -> str:
        """One loop's life. Gives why it ended; when this is cancelled, the loop is ended in order."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            for sock in (ours, theirs):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CHANNEL_BYTES)
            with theirs:
                home: _Home = _Thread() if not self._setup.alone else _Process()
                await home.start(theirs, self._listeners)
            ours.setblocking(False)
            channel = self._channel = trio.socket.from_stdlib_socket(ours)
            self._ready = trio.Event()
            try:
                await channel.send(pickle.dumps(self._setup))
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._require_ready)
                    if self._idle is not None:
                        nursery.start_soon(self._tell, report.TELL_IDLE)
                    async for message in _messages(channel):
                        self._take(message)
                        if task_status is not None and self._ready.is_set():
                            task_status.started()
                            task_status = None
                    nursery.cancel_scope.cancel()
                return await home.ended()
            except BaseException:
                with trio.CancelScope(shield=True), trio.move_on_after(_STOP):
                    await self._tell(report.STOP)
                    async for message in _messages(channel):
                        self._take(message)
                raise
            finally:
                self._channel = None
                ours.close()
                with trio.CancelScope(shield=True):
                    await home.end()

    async def _require_ready(self) -> None:
        with trio.move_on_after(_START) as scope:
            await self._ready.wait()
        if scope.cancelled_caught:
            raise KernelError(f"a relay loop did not answer within {_START:g} s; is this machine overloaded?")

    def _take(self, message: bytes) -> None:
        kind, content = message[:1], message[1:]
        match kind:
            case report.RECORDS:
                if self._living:
                    for line in content.splitlines():
                        self._living.pop(_identity(line), None)
                self._on_lines(content)
            case report.LIVING:
                for line in content.splitlines():
                    self._living[_identity(line)] = msgspec.json.decode(line, type=Record)
            case report.COUNTERS | report.COUNTED:
                self.counters = msgspec.msgpack.decode(content, type=Counters)
                if kind == report.COUNTED and self._counted is not None:
                    self._counted.set()
                    self._counted = None
            case report.LOG:
                said = msgspec.msgpack.decode(content, type=LogLine)
                _log.log(getattr(logging, said.level.upper()), "%s", said.text)
                if said.trace:
                    _log.error("%s", said.trace)
            case report.IDLE:
                if self._idle is not None:
                    self._idle.set()
                    self._idle = None
            case report.READY:
                self._ready.set()

    def _bury(self, reason: str) -> None:
        """What a loop leaves behind that died: its connections are lost, and every one that was known gets its record."""
        lost = self.counters.active
        _log.error(
            "a relay loop ended unexpectedly (%s) and took %d connections with it; another one takes its place",
            reason,
            lost,
        )
        if self._living:
            now = msgspec.structs.replace
            records = [now(record, outcome="worker_lost") for record in self._living.values()]
            self._on_lines(msgspec.json.Encoder().encode_lines(records))
        self._living = {}
        self._before = self.total
        self._before.active = 0
        if lost:
            self._before.outcomes["worker_lost"] = self._before.outcomes.get("worker_lost", 0) + lost
        self.counters = Counters()


def _identity(line: bytes) -> str:
    """The id in a record's line. It stands behind the time: `{"ts":"2026-11-24T08:00:00.000Z","id":"0123456789abcdef",`."""
    begin = line.index(b'"id":"') + 6
    return line[begin : begin + 16].decode()


async def _messages(channel: trio.socket.SocketType) -> AsyncIterator[bytes]:
    while True:
        try:
            message = await channel.recv(report.MESSAGE)
        except OSError:
            return
        if not message:
            return
        yield message


class _Process:
    """A loop in a process of its own."""

    def __init__(self) -> None:
        self._process: trio.Process | None = None

    async def start(self, channel: socket.socket, listeners: Sequence[socket.socket]) -> None:
        fds = [channel.fileno(), *(listener.fileno() for listener in listeners)]
        # -I -S: no environment and no search for site-packages; it gets the path that this process has. Shielded, because a process
        # that is being started when this is cancelled would be nobody's.
        command = [sys.executable, "-I", "-S", str(Path(worker.__file__)), ":".join(sys.path), *map(str, fds)]
        try:
            with trio.CancelScope(shield=True):
                self._process = await trio.lowlevel.open_process(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=fds
                )
        except OSError as error:
            raise KernelError(f"cannot start a relay process ({sys.executable}): {error.strerror}") from error
        await trio.lowlevel.checkpoint_if_cancelled()

    async def ended(self) -> str:
        assert self._process is not None
        code = await self._process.wait()
        what = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"pid {self._process.pid}, {what}"

    async def end(self) -> None:
        if self._process is not None:
            with trio.move_on_after(_STOP):
                await self._process.wait()
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()


class _Thread:
    """A loop in a thread of this process."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._reason = "returned"

    async def start(self, channel: socket.socket, listeners: Sequence[socket.socket]) -> None:
        own, copies = channel.dup(), [listener.dup() for listener in listeners]
        for copy in copies:
            copy.setblocking(False)

        def run() -> None:
            try:
                serve_loop(own, copies)
            except BaseException as error:
                self._reason = repr(error)

        self._thread = threading.Thread(target=run, name="tproxyd relay")
        self._thread.start()

    async def ended(self) -> str:
        await self.end()
        return self._reason

    async def end(self) -> None:
        if self._thread is not None:
            # It has been told to stop, or that its owner is gone: it ends within one turn of its loop.
            await trio.to_thread.run_sync(self._thread.join)


_Home = _Process | _Thread
