"""The relay loops of an interceptor: started, given workloads to serve, listened to, replaced when one dies, and ended, from trio.

A loop lives in a process of its own or in a thread of this one; either way it is known here only as the other end of a
socket (datapath/report.py). What a loop tells costs this side a wake-up every 50 ms, however many connections it serves.
"""

from __future__ import annotations

import logging
import math
import pickle
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import NamedTuple, TypeVar

import msgspec
import trio

from tproxyd.datapath import (
    Counters,
    EndedOrder,
    LivingConnection,
    LogLine,
    Outcome,
    Record,
    Setup,
    WorkloadSetup,
    report,
)
from tproxyd.datapath.listing import Answer, CloseOrder, Filter, ListOrder, Page
from tproxyd.errors import KernelError
from tproxyd.interceptor.homes import ProcessHome, ThreadHome
from tproxyd.net.sockets import abort, format_address
from tproxyd.proxy import Complaints, Connection, ConnectionStream, Policy, Receivers, Sides, serve_handed

__all__ = ["Relays", "first_of", "merge_counters"]

_log = logging.getLogger(__name__)

_START = 10.0  # seconds for a loop to answer; it takes some hundredths
_STOP = 3.0  # seconds for a loop to say its last words
_HANDLERS_STOP = 0.5  # seconds for handlers to end when they are cancelled, before the sockets are taken away from them
_COUNT = 1.0  # seconds for a loop to tell its counters, or what lives
_LOOKS = 3  # for a connection that is handed over, or back, at that moment
_YOUNG = 5.0  # seconds; a loop that dies younger than that has something against it ...
_TRIES = 5  # ... and after so many of them in a row the interception ends: better no daemon than one that steers clients nowhere
_REST = 9  # of a loop from pages of living connections, in units of the time that the last one took
_MESSAGES = 32  # of a loop that are taken before other tasks have their turn
_ONE_DESCRIPTOR = socket.CMSG_SPACE(4)
_CHANNEL_BYTES = 1 << 20  # of messages that wait; the kernel gives what net.core.wmem_max allows

OnLines = Callable[[bytes], None]
E = TypeVar("E", bound=BaseException)


class Relays:
    """One loop a setup, in a process if `setup.alone` and else in a thread. Each serves every workload, on listeners of its own.

    `on_lines` gets the records of ended connections, as whole lines of JSON, several at a time; it must not block. `policy` is asked
    about every connection that the configuration does not refuse, if the setups say so, and has `policy_timeout` seconds.
    """

    def __init__(
        self,
        setups: Sequence[Setup],
        on_lines: OnLines,
        *,
        policy: Policy | None = None,
        policy_timeout: float = 1.0,
    ) -> None:
        self._receivers = Receivers()
        self._relays = [
            _Relay(setup, on_lines, policy, policy_timeout, self._receivers, self._count_ended) for setup in setups
        ]
        self._ended = trio.Event()
        self._ended_loops = 0

    @property
    def active(self) -> int:
        """Connections that live, as far as has been told: some hundredths of a second ago."""
        return sum(counters.active for relay in self._relays for counters in relay.counters.values())

    async def add(
        self, setup: WorkloadSetup, listeners: Sequence[Sequence[socket.socket]], netns: int, *, paused: bool = False
    ) -> None:
        """Lets each loop serve one more workload, on as many listeners each; `netns` is a descriptor of its namespace. All of them stay the caller's,
        who closes them after `remove`. `paused`: clients wait in the queues until `resume`. Raises KernelError when a loop cannot serve it; then none does."""
        try:
            async with trio.open_nursery() as nursery:
                for relay, own in zip(self._relays, listeners, strict=True):
                    nursery.start_soon(relay.add, Served(setup, tuple(own), netns), paused)
        except BaseException as error:
            with trio.CancelScope(shield=True):
                await self.remove(setup.name)
            known = first_of(error, KernelError)
            if known is not None:
                raise known from None
            raise

    async def replace(self, setup: WorkloadSetup, listeners: Sequence[Sequence[socket.socket]], netns: int) -> None:
        """Lets each loop serve a workload that it serves already under another setup, of another generation. Who lives stays under the one to which it
        came. Raises KernelError when a loop cannot; the caller then puts the old setup back in the same way, under one more generation."""
        try:
            async with trio.open_nursery() as nursery:
                for relay, own in zip(self._relays, listeners, strict=True):
                    nursery.start_soon(relay.replace, Served(setup, tuple(own), netns))
        except BaseException as error:
            known = first_of(error, KernelError)
            if known is not None:
                raise known from None
            raise

    async def put_back(self, setup: WorkloadSetup, listeners: Sequence[Sequence[socket.socket]], netns: int) -> None:
        """The same, without a wait for the loops' answers: they take what is said to them in its order."""
        for relay, own in zip(self._relays, listeners, strict=True):
            await relay.put_back(Served(setup, tuple(own), netns))

    async def let_go(self, name: str, seconds: float) -> None:
        """Gives the connections that came under older setups, and that the present one would not capture, so many seconds."""
        for relay in self._relays:
            await relay.let_go(name, seconds)

    async def shed(self, setup: WorkloadSetup, listeners: Sequence[Sequence[socket.socket]]) -> None:
        """Returns when nobody waits any more at listeners other than these, and the loops have closed theirs; cancelled, that is left to them."""
        try:
            async with trio.open_nursery() as nursery:
                for relay, own in zip(self._relays, listeners, strict=True):
                    nursery.start_soon(relay.shed, setup, tuple(own))
        finally:
            for relay, own in zip(self._relays, listeners, strict=True):
                relay.forget_listeners(setup, tuple(own))

    async def tune(self, setups: Sequence[Setup]) -> None:
        """Limits and time-outs of these setups from now on, one of each loop; for who lives, too."""
        for relay, setup in zip(self._relays, setups, strict=True):
            await relay.tune(setup)

    async def wait_retired(self, name: str, generation: int) -> None:
        """Returns when no connection lives any more that came under this generation of a workload's setup, or the workload is removed."""
        async with trio.open_nursery() as nursery:
            for relay in self._relays:
                nursery.start_soon(relay.wait_retired, name, generation)

    async def remove(self, name: str) -> None:
        """Resets what lives of a workload, and serves it no more. Harmless where there is none of this name."""
        async with trio.open_nursery() as nursery:
            for relay in self._relays:
                nursery.start_soon(relay.remove, name)

    async def retire(self, name: str) -> None:
        """Accepts nothing of a workload any more, whose listeners somebody else serves; what lives goes on."""
        for relay in self._relays:
            await relay.retire(name)

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
            self._receivers.close()
            self._ended.set()

    async def ended(self) -> None:
        """Returns when no loop and no connection is left. So has `serve` then, unless a handler of the program goes on although it was cancelled."""
        await self._ended.wait()

    def _count_ended(self) -> None:
        self._ended_loops += 1
        if self._ended_loops == len(self._relays):
            self._ended.set()

    async def wait_idle(self, name: str) -> None:
        """Returns when no loop has a connection of this workload left; what waits to be accepted is accepted first."""
        async with trio.open_nursery() as nursery:
            for relay in self._relays:
                nursery.start_soon(relay.wait_idle, name)

    async def wait_old(self, name: str) -> None:
        """Returns when the connections of this workload that live now have ended; others are accepted meanwhile."""
        async with trio.open_nursery() as nursery:
            for relay in self._relays:
                nursery.start_soon(relay.wait_old, name)

    async def pause(self, name: str) -> None:
        """Accepts no more for this workload: clients wait in the listeners' queues."""
        for relay in self._relays:
            await relay.pause(name)

    async def resume(self, name: str) -> None:
        """Accepts those who wait, and all others from now on."""
        for relay in self._relays:
            await relay.resume(name)

    async def answer(self) -> None:
        """Returns when every loop has answered a question that is asked now. For as long as one does not, or is not there, it waits."""
        async with trio.open_nursery() as nursery:
            for relay in self._relays:
                nursery.start_soon(relay.answer)

    async def count(self) -> dict[str, Counters]:
        """By workload, the counters of all loops together, with what living connections have moved so far."""
        async with trio.open_nursery() as nursery:
            for relay in self._relays:
                nursery.start_soon(relay.count)
        names = dict.fromkeys(name for relay in self._relays for name in relay.total)
        return {
            name: merge_counters([relay.total[name] for relay in self._relays if name in relay.total]) for name in names
        }

    async def pages(self, which: Filter) -> AsyncGenerator[list[LivingConnection], None]:
        """Living connections, page by page, those of one loop after the other's. Raises KernelError when a loop does not answer."""
        for relay in self._relays:
            async with aclosing(relay.pages(which)) as pages:
                async for page in pages:
                    yield page

    async def close(self, identity: str) -> bool:
        """Resets a connection on both sides, outcome `drained`; whether there was one of this identity. Raises KernelError as above."""
        for relay in self._relays:
            if await relay.close(identity):
                return True
        return False

    @property
    def records_dropped(self) -> int:
        """Lines of the access log for which nobody had room."""
        return sum(relay.records_dropped for relay in self._relays)


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
    return total


def first_of(error: BaseException, kind: type[E]) -> E | None:
    """The first exception of this kind in what a nursery has raised."""
    if isinstance(error, kind):
        return error
    for one in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        if (found := first_of(one, kind)) is not None:
            return found
    return None


class Handed(NamedTuple):
    """A connection that is with the embedding program: its socket, since when, and what ends whoever has it there. `stream` is its handler's."""

    connection: Connection
    sock: socket.socket
    scope: trio.CancelScope
    since: float
    stream: ConnectionStream | None = None

    @property
    def workload(self) -> str:
        """Whose it is."""
        return self.connection.workload


Concerns = Callable[[Handed], bool]


class Served(NamedTuple):
    """A workload as one loop serves it. `netns` is a descriptor of its namespace."""

    setup: WorkloadSetup
    listeners: tuple[socket.socket, ...]
    netns: int


class _Relay:
    """One place for a loop, and whoever fills it at the moment."""

    _ours: socket.socket
    _handlers: trio.Nursery

    def __init__(
        self,
        setup: Setup,
        on_lines: OnLines,
        policy: Policy | None,
        policy_timeout: float,
        receivers: Receivers,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_end = on_end
        self._policy = policy
        self._policy_timeout = policy_timeout
        self._receivers = receivers
        self._setup = setup
        self._served: dict[str, Served] = {}
        self._told: dict[str, Served] = {}  # of them, what the loop of the moment has been told
        self._adds = trio.Lock()
        self._adding: dict[str, trio.Event] = {}
        self._failed: dict[str, str] = {}
        self._removing: dict[str, trio.Event] = {}
        self._retiring: dict[tuple[str, int], trio.Event] = {}
        self._shedding: dict[str, trio.Event] = {}
        self.records_dropped = 0
        self.on_lines = on_lines
        self._channel: _Orders | None = None
        self._before: dict[str, Counters] = {}  # of loops that died
        self.counters: dict[str, Counters] = {}
        self._living: dict[str, tuple[float, Record]] = {}  # and when they were told
        self.handed: dict[str, Handed] = {}
        """Connections that are with the embedding program."""
        self.abandoned: set[str] = set()
        """Those of them that it did not give up in time; the loop has recorded their end."""
        self.relaying: dict[str, _Relaying] = {}
        """Those of them that the loop relays for a handler, which waits."""
        self.recorded: set[str] = set()
        """Those of them that it has relayed to their end, while the handler goes on."""
        self._handlers_ended = False
        self._complaints = Complaints()
        self._orphans: set[str] = set()  # those of them whose loop has died
        self._given_up = trio.lowlevel.ParkingLot()  # where the end of one of them is waited for
        self._ready = trio.Event()
        self._started = False
        self._idle: dict[str, trio.Event] = {}
        self._old: dict[str, trio.Event] = {}
        self._paused: set[str] = set()
        self._counted: trio.Event | None = None
        self._paging = trio.Lock()  # one page at a time, and a rest behind it: connections come first
        self._paged = -math.inf  # until when that rest lasts
        self._questions: dict[int, tuple[trio.Event, list[Page | Answer]]] = {}
        self._asked = 0
        self._answers = 0

    @property
    def total(self) -> dict[str, Counters]:
        both = (self._before, self.counters)
        return {
            name: merge_counters([one[name] for one in both if name in one])
            for name in dict.fromkeys([*self._before, *self.counters])
        }

    async def add(self, served: Served, paused: bool) -> None:
        name = served.setup.name
        self._served[name] = served
        if paused:
            self._paused.add(name)
        added = self._adding[name] = trio.Event()
        self._failed.pop(name, None)
        await self._tell_served(served)
        await added.wait()
        if why := self._failed.pop(name, ""):
            raise KernelError(f"a relay loop cannot serve workload {name!r}: {why}")

    async def replace(self, served: Served) -> None:
        name = served.setup.name
        before = self._served.get(name)
        if before is None:
            raise KernelError(f"workload {name!r} is being taken away")
        key = name, before.setup.generation
        self._retiring.setdefault(key, trio.Event())
        with trio.move_on_after(_START) as scope:
            try:
                await self.add(served, name in self._paused)
            except KernelError:  # the loop goes on as before
                self._served[name] = before
                self._retiring.pop(key, None)
                raise
        if scope.cancelled_caught:
            raise KernelError(f"a relay loop did not answer within {_START:g} s; is this machine overloaded?")

    async def put_back(self, served: Served) -> None:
        name = served.setup.name
        before = self._served.get(name)
        if before is None:
            return
        self._retiring.setdefault((name, before.setup.generation), trio.Event())
        self._served[name] = served
        await self._tell_served(served)

    async def let_go(self, name: str, seconds: float) -> None:
        await self._tell(report.LET_GO + msgspec.msgpack.encode((name, seconds)))

    async def shed(self, setup: WorkloadSetup, listeners: tuple[socket.socket, ...]) -> None:
        name = setup.name
        if name not in self._served:
            return
        old = [one.getsockname()[:2] for one in self._served[name].listeners if one not in listeners]
        shed = self._shedding.setdefault(name, trio.Event())
        await self._tell(report.SHED + msgspec.msgpack.encode((name, old)))
        await shed.wait()

    def forget_listeners(self, setup: WorkloadSetup, listeners: tuple[socket.socket, ...]) -> None:
        """A loop that takes the place of another one is not told of more than these."""
        self._shedding.pop(setup.name, None)
        if setup.name in self._served:
            self._served[setup.name] = self._served[setup.name]._replace(setup=setup, listeners=listeners)

    async def tune(self, setup: Setup) -> None:
        self._setup = setup
        async with self._adds:
            for part in report.split_setup(setup):
                await self._tell(part)

    async def wait_retired(self, name: str, generation: int) -> None:
        retired = self._retiring.get((name, generation))
        if retired is not None:
            await retired.wait()
        while any(one in self._orphans and self.handed[one].workload == name for one in self.handed):
            await self._given_up.park()

    async def remove(self, name: str) -> None:
        if self._served.pop(name, None) is None:
            return
        if (added := self._adding.pop(name, None)) is not None:
            added.set()
        self._paused.discard(name)
        if (ended := self._old.pop(name, None)) is not None:
            ended.set()
        for key in [key for key in self._retiring if key[0] == name]:
            self._retiring.pop(key).set()
        if (shed := self._shedding.pop(name, None)) is not None:
            shed.set()
        await self._end_handlers_of(name)
        if self._channel is not None:
            removed = self._removing.setdefault(name, trio.Event())
            async with self._adds:  # behind what is being told of it
                self._told.pop(name, None)
                await self._tell(report.REMOVE + name.encode())
            with trio.move_on_after(_STOP):  # else it is dying
                await removed.wait()
            await self._end_handlers_of(name)  # of what was accepted meanwhile
        if (idle := self._idle.pop(name, None)) is not None:
            idle.set()
        self.counters.pop(name, None)
        self._before.pop(name, None)

    async def retire(self, name: str) -> None:
        if name in self._served:
            # Nor does a loop get them that takes the place of this one.
            self._served[name] = self._served[name]._replace(listeners=())
            await self._tell(report.RETIRE + name.encode())

    async def _tell_served(self, served: Served) -> None:
        """Unless the loop has been told, or it is served no more: a loop that has just been started is told of all by one task, while others add and
        remove. What it is told twice, or of what is gone, it would hold for good."""
        name = served.setup.name
        async with self._adds:  # parts of two must not mix
            if self._channel is None or self._served.get(name) is not served or self._told.get(name) is served:
                return
            self._told[name] = served
            setup = msgspec.structs.replace(served.setup, paused=name in self._paused, listeners=len(served.listeners))
            data = pickle.dumps(setup)
            size = report.MESSAGE - 1
            fds = [served.netns, *(listener.fileno() for listener in served.listeners)]
            with trio.CancelScope(shield=True):  # a part without the rest would be the beginning of the next one's
                while len(data) > size:
                    await self._tell(report.ADD_PART + data[:size])
                    data = data[size:]
                await self._tell(report.ADD + data, fds)

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        tries = 0
        # What the program has in its hands outlives the loop that it came from.
        async with trio.open_nursery() as handed:
            self._handlers = handed
            try:
                while True:
                    began = trio.current_time()
                    reason = await self._live(handed, task_status)
                    self._bury(reason)
                    tries = tries + 1 if trio.current_time() - began < _YOUNG else 1
                    if tries >= _TRIES:
                        raise KernelError(
                            f"relay loops die as soon as they are started ({reason}), so connections cannot be served"
                        )
                    await trio.sleep(0.05 * 2**tries)
            finally:
                handed.cancel_scope.cancel()
                await self._end_handlers()
                self._lose_relayed()  # of a loop that has not said its last words
                self._on_end()

    async def wait_idle(self, name: str) -> None:
        if name not in self._served:
            return
        idle = self._idle.setdefault(name, trio.Event())
        # Who asks tells, also when another one has asked: that one may have been cancelled before the loop was told.
        await self._tell(report.TELL_IDLE + name.encode())
        await idle.wait()
        await self._until_given_up(lambda one: one.workload == name)  # what has outlived its loop

    async def wait_old(self, name: str) -> None:
        if name not in self._served:
            return
        if self._channel is None:
            return  # what lived has gone with its loop
        ended = self._old.setdefault(name, trio.Event())
        await self._tell(report.TELL_OLD + name.encode())
        await ended.wait()

    async def pause(self, name: str) -> None:
        if name in self._served:
            self._paused.add(name)
            await self._tell(report.PAUSE + name.encode())

    async def resume(self, name: str) -> None:
        if name in self._served:
            self._paused.discard(name)
            await self._tell(report.RESUME + name.encode())

    async def answer(self) -> None:
        before = self._answers
        while self._answers == before:
            await self.count()

    async def count(self) -> None:
        counted = self._counted
        if counted is None:
            counted = self._counted = trio.Event()
        await self._tell(report.TELL_COUNTERS)  # as above
        with trio.move_on_after(_COUNT) as scope:
            await counted.wait()
        if scope.cancelled_caught and self._counted is counted:
            self._counted = None  # who asks next asks anew

    async def pages(self, which: Filter) -> AsyncGenerator[list[LivingConnection], None]:
        after = ""
        while True:
            async with self._paging:
                await trio.sleep_until(self._paged)
                page = await self._ask(report.LIST, lambda number: ListOrder(number, which, after))  # noqa: B023  # called at once
                if not isinstance(page, Page):
                    break  # it has died, and its connections with it
                self._paged = trio.current_time() + _REST * page.seconds
            for one in page.connections:
                handed = self.handed.get(one.id)
                if handed is not None and handed.stream is not None:
                    one.bytes_from_client, one.bytes_from_upstream = handed.stream.received, handed.stream.sent
            yield page.connections
            after = page.after
            if not after:
                break
        matches = which.compile()
        orphans = [self.handed[identity] for identity in sorted(self._orphans & self.handed.keys())]
        yield [
            _orphan(orphan)
            for orphan in orphans
            if matches(orphan.workload, orphan.connection.source, orphan.connection.original_destination)
        ]

    async def close(self, identity: str) -> bool:
        if not re.fullmatch("[0-9a-f]{16}", identity):
            return False
        # It may be on its way to the program, or back, at the moment when it is looked for.
        for _ in range(_LOOKS):
            if (handed := self.handed.get(identity)) is not None:
                handed.scope.cancel()
                await self._take_away(lambda one: one.connection.id == identity)
                return True
            answer = await self._ask(report.CLOSE, lambda number: CloseOrder(number, identity))
            if not isinstance(answer, Answer) or answer.result != "handed":
                return isinstance(answer, Answer) and answer.result == "closed"
        return False

    async def _ask(self, kind: bytes, question: Callable[[int], msgspec.Struct]) -> Page | Answer | None:
        """The loop's answer; None if it dies instead, or has just been started. Raises KernelError if it has none in time."""
        if self._channel is None or not self._ready.is_set():
            return None
        self._asked += 1
        number, answered, answers = self._asked, trio.Event(), list[Page | Answer]()
        self._questions[number] = answered, answers
        try:
            with trio.fail_after(_COUNT):
                await self._tell(kind + msgspec.msgpack.encode(question(number)))
                await answered.wait()
        except trio.TooSlowError:
            raise KernelError(
                f"a relay loop has not answered within {_COUNT:g} s: it is stopped (SIGSTOP), or this machine is overloaded; try again"
            ) from None
        finally:
            del self._questions[number]
        return answers[0] if answers else None

    async def _tell(self, order: bytes, fds: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
        if self._channel is not None:
            with suppress(OSError, trio.ClosedResourceError):  # it has died, which is noticed elsewhere
                await self._channel.send(order, rights)

    async def _live(self, handed: trio.Nursery, task_status: trio.TaskStatus[None]) -> str:
        """One loop's life; tells when the first one has answered. Gives why it ended; when this is cancelled, the loop is ended in order."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        home = ProcessHome(self._setup.keeps) if self._setup.alone else ThreadHome()
        channel = _Orders(ours)
        try:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CHANNEL_BYTES)
            with theirs:
                await home.start(theirs)
            ours.setblocking(False)
            self._ours = ours
            self._ready = trio.Event()
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._require_ready)
                    with suppress(OSError):  # it has died, which is noticed below
                        for part in report.split_setup(self._setup):
                            await channel.send(part)
                    # Not before: an order in the middle of its setup would be a part of it to the loop.
                    self._channel, self._told = channel, {}
                    self._forget_generations()
                    for one in list(self._served):
                        if (served := self._served.get(one)) is not None:  # as it is now
                            await self._tell_served(served)
                    for name in list(self._idle):
                        await self._tell(report.TELL_IDLE + name.encode())
                    if self._counted is not None:
                        await self._tell(report.TELL_COUNTERS)
                    async for message, fd in _messages(ours):
                        if fd is None:
                            self._take(message)
                        else:
                            self._take_socket(message, fd, handed, channel)
                        if self._ready.is_set() and not self._started:
                            self._started = True
                            task_status.started()
                    nursery.cancel_scope.cancel()
                return await home.ended()
            except BaseException:
                # Those that are with the program are being cancelled, too, and each is still to say how it ended.
                await self._end_handlers()
                if self._channel is None:
                    raise  # it has not heard its setup to the end: that there is nobody any more ends it
                with trio.CancelScope(shield=True), trio.move_on_after(_STOP):
                    await self._tell(report.STOP)
                    async for message, fd in _messages(ours):
                        if fd is None:
                            self._take(message)
                        else:
                            abort(socket.socket(fileno=fd))  # too late for anybody to decide
                raise
        finally:
            self._channel = None
            channel.close()
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
                self.on_lines(content)
            case report.LIVING:
                now = trio.current_time()
                for line in content.splitlines():
                    if (identity := _identity(line)) not in self.handed:
                        self._living[identity] = now, msgspec.json.decode(line, type=Record)
            case report.COUNTERS | report.COUNTED:
                told = msgspec.msgpack.decode(content, type=report.Count)
                if told.records_dropped:
                    self.records_dropped += told.records_dropped
                    self._living.clear()  # who of them has ended is not known any more
                for name, counters in told.counters.items():
                    if name in self._served:
                        self._count(name, counters)
                if kind == report.COUNTED:
                    self._answers += 1
                    if self._counted is not None:
                        self._counted.set()
                        self._counted = None
            case report.LOG:
                said = msgspec.msgpack.decode(content, type=LogLine)
                _log.log(getattr(logging, said.level.upper()), "%s", said.text)
                for traced in (said.trace or "").splitlines():
                    _log.error("%s", traced)
            case report.IDLE:
                if (idle := self._idle.pop(content.decode(), None)) is not None:
                    idle.set()
            case report.OLD_ENDED:
                if (over := self._old.pop(content.decode(), None)) is not None:
                    over.set()
            case report.ADDED:
                name, why = msgspec.msgpack.decode(content, type=tuple[str, str])
                if (added := self._adding.pop(name, None)) is not None:
                    if why:
                        self._failed[name] = why
                    added.set()
                elif why:
                    _log.error(
                        "workload %s is not served by the loop that has taken the place of another: %s", name, why
                    )
            case report.REMOVED:
                if (removed := self._removing.pop(content.decode(), None)) is not None:
                    removed.set()
            case report.RELAYED:
                for ended in msgspec.msgpack.decode(content, type=list[EndedOrder]):
                    if ended.id in self.handed:
                        self.recorded.add(ended.id)
                    if (relaying := self.relaying.pop(ended.id, None)) is not None:
                        relaying.end(ended)
            case report.LISTED:
                self._take_answer(msgspec.msgpack.decode(content, type=Page))
            case report.CLOSED:
                self._take_answer(msgspec.msgpack.decode(content, type=Answer))
            case report.RETIRED:
                key = msgspec.msgpack.decode(content, type=tuple[str, int])
                if (retired := self._retiring.pop(key, None)) is not None:
                    retired.set()
            case report.SHEDDED:
                if (shed := self._shedding.pop(content.decode(), None)) is not None:
                    shed.set()
            case report.END_HANDLER:
                if (ending := self.handed.get(content.decode())) is not None:
                    ending.scope.cancel()
                    self._handlers.start_soon(self._take_away, lambda one: one is ending)
            case report.READY:
                self._ready.set()
            case report.HAND_OVER:  # without its socket: the kernel had no descriptor for it here
                untold = msgspec.msgpack.decode(content, type=report.HandedOver)
                _log.error("no file left for connection %s, which is refused; raise LimitNOFILE (ulimit -n)", untold.id)
                order = report.ENDED + msgspec.msgpack.encode(report.EndedOrder(untold.id, "error", 0, 0))
                with suppress(OSError):
                    self._ours.send(order)

    def _take_answer(self, answer: Page | Answer) -> None:
        if (asked := self._questions.get(answer.number)) is not None:  # else nobody waits for it any more
            answered, answers = asked
            answers.append(answer)
            answered.set()

    def _count(self, name: str, counters: Counters) -> None:
        before = self.counters.get(name, Counters())
        # Only COUNTED has what living connections have moved, and a counter must not fall.
        counters.bytes_from_client = max(counters.bytes_from_client, before.bytes_from_client)
        counters.bytes_from_upstream = max(counters.bytes_from_upstream, before.bytes_from_upstream)
        self.counters[name] = counters

    def _take_socket(self, message: bytes, fd: int, handed: trio.Nursery, channel: _Orders) -> None:
        """A connection that the embedding program is to decide about."""
        assert self._policy is not None
        told = msgspec.msgpack.decode(message[1:], type=report.HandedOver)
        family = socket.AF_INET6 if ":" in told.source[0] else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM, 0, fd)  # told all that, it does not ask the kernel
        scope = trio.CancelScope()
        connection = Connection(
            id=told.id,
            workload=told.workload,
            source=told.source,
            original_destination=told.original_destination,
            target=told.target,
            rule=told.rule,
        )
        self.handed[told.id] = Handed(connection, sock, scope, trio.current_time())
        books = _Books(self, channel)
        serve = partial(
            serve_handed,
            policy=self._policy,
            timeout=self._policy_timeout,
            loop=books,
            receivers=self._receivers,
            complaints=self._complaints,
        )
        handed.start_soon(_within, scope, partial(serve, connection, sock, told.data))

    def forget(self, identity: str) -> None:
        """A connection is not with the program any more."""
        gone = self.handed.pop(identity, None)
        if identity in self._orphans:
            self._orphans.discard(identity)
            if gone is not None and gone.workload in self._before:
                self._before[gone.workload].active -= 1
        self.abandoned.discard(identity)
        self.recorded.discard(identity)
        if (relaying := self.relaying.pop(identity, None)) is not None:
            relaying.end(None)  # some other task of the program's waits for it
        self._given_up.unpark_all()

    async def _until_given_up(self, concerns: Concerns = lambda _: True) -> None:
        """Returns when the program has no connection any more, of those that are meant."""
        while any(concerns(one) for key, one in self.handed.items() if key not in self.abandoned):
            await self._given_up.park()

    async def _end_handlers(self) -> None:
        """Waits a moment for handlers that have been cancelled, and takes the sockets away from those that go on: neither their clients nor
        all that comes after is to wait for them."""
        if self.handed and not self._handlers_ended:
            self._handlers_ended = True
            await self._take_away()

    async def _end_handlers_of(self, name: str) -> None:
        """Cancels them, of this workload alone, and does the same."""
        for handed in self.handed.values():
            if handed.workload == name:
                handed.scope.cancel()
        await self._take_away(lambda one: one.workload == name)

    async def _take_away(self, concerns: Concerns = lambda _: True) -> None:
        with trio.CancelScope(shield=True), trio.move_on_after(_HANDLERS_STOP):
            await self._until_given_up(concerns)
        for key, handed in self.handed.items():
            if not concerns(handed) or key in self.abandoned:
                continue
            sock = handed.sock
            _log.error("the handler of connection %s goes on although it was cancelled; its client is reset", key)
            if sock.fileno() >= 0:
                trio.lowlevel.notify_closing(sock)
                abort(sock)
            if key not in self._orphans:
                self.abandoned.add(key)

    def count_orphan(self, workload: str, outcome: Outcome) -> None:
        """A connection has ended whose loop had died before."""
        if workload not in self._served:
            return  # nor is it counted any more
        outcomes = self._before.setdefault(workload, Counters()).outcomes
        outcomes[outcome] = outcomes.get(outcome, 0) + 1

    def _bury(self, reason: str) -> None:
        """What a loop leaves behind that died: its connections are lost, and every one that was known gets its record."""
        # Those live on; what it relayed for them does not, but is counted when its handler has ended.
        living = Counter(handed.workload for identity, handed in self.handed.items() if identity not in self.recorded)
        # The loop tells its counters less often than it gives a connection away, and may have told of fewer.
        lost = {name: max(0, counters.active - living[name]) for name, counters in self.counters.items()}
        _log.error(
            "a relay loop ended unexpectedly (%s) and took %d connections with it; another one takes its place",
            reason,
            sum(lost.values()) + len(self.relaying),
        )
        if self._living:
            ts, now = _wall_clock(time.time()), trio.current_time()
            records = [
                msgspec.structs.replace(
                    record,
                    ts=ts,
                    duration_ms=round(record.duration_ms + (now - told) * 1000, 3),
                    outcome="worker_lost",
                )
                for told, record in self._living.values()
            ]
            self.on_lines(msgspec.json.Encoder().encode_lines(records))
        self._living = {}
        if self._counted is not None:
            self._counted.set()  # nobody is left to answer
            self._counted = None
        for answered, _ in self._questions.values():
            answered.set()
        self._before, self.counters = self.total, {}
        for name in living.keys() & self._served.keys():
            self._before.setdefault(name, Counters())
        for name, counters in self._before.items():
            counters.active = living[name]
            if lost.get(name):
                counters.outcomes["worker_lost"] = counters.outcomes.get("worker_lost", 0) + lost[name]
        self._orphans |= self.handed.keys() - self.recorded
        self._lose_relayed()
        for event in (*self._removing.values(), *self._old.values()):
            event.set()
        self._removing, self._old = {}, {}
        self._forget_generations()

    def _lose_relayed(self) -> None:
        """Nobody relays them any more."""
        relaying, self.relaying = self.relaying, {}
        for one in relaying.values():
            one.end(EndedOrder(one.identity, "worker_lost", 0, 0))

    def _forget_generations(self) -> None:
        """Of older setups of workloads a new loop knows nothing."""
        for event in (*self._retiring.values(), *self._shedding.values()):
            event.set()
        self._retiring, self._shedding = {}, {}


async def _within(scope: trio.CancelScope, function: Callable[[], Awaitable[None]]) -> None:
    with scope:
        await function()


class _Books:
    """Where account is kept of a connection that is with the embedding program: in the loop that it came from, if it lives."""

    def __init__(self, relay: _Relay, channel: _Orders) -> None:
        self._relay = relay
        self._channel = channel
        self._began = trio.current_time()

    def handles(self, connection: Connection, stream: ConnectionStream) -> None:
        """A handler of the program has it."""
        handed = self._relay.handed.get(connection.id)
        if handed is not None:
            self._relay.handed[connection.id] = handed._replace(stream=stream)

    async def forward(self, connection: Connection, sock: socket.socket, target: tuple[str, int] | None) -> None:
        """Gives the connection back to the loop, which relays it; the caller closes its own copy of the socket."""
        order = report.FORWARD + msgspec.msgpack.encode(report.ForwardOrder(connection.id, target))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", sock.fileno()))]
        try:
            await self._channel.send(order, rights)
        except (OSError, trio.ClosedResourceError):
            abort(sock)
            self._record(connection, "worker_lost", 0, 0)
        finally:
            self._relay.forget(connection.id)

    async def relay(self, connection: Connection, sides: Sides) -> _Relaying | None:
        """Gives copies of both sockets to the loop; None if it has died."""
        sock = sides.upstream
        order = report.RelayOrder(connection.id, sock.family, sides.received, sides.sent, sides.already)
        fds = struct.pack("2i", sides.client.fileno(), sock.fileno())
        relaying = self._relay.relaying[connection.id] = _Relaying(self._relay, self._channel, connection.id)
        try:
            await self._channel.send(
                report.RELAY + msgspec.msgpack.encode(order), [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
            )
        except (OSError, trio.ClosedResourceError):
            self._relay.relaying.pop(connection.id, None)  # unless it is lost already
            return None
        except BaseException:
            self._relay.relaying.pop(connection.id, None)
            raise
        return relaying

    async def end(self, connection: Connection, outcome: Outcome, received: int, sent: int) -> None:
        """The connection has ended here, if not in the loop that relayed it."""
        if connection.id in self._relay.recorded:
            return self._relay.forget(connection.id)
        order = report.EndedOrder(connection.id, outcome, received, sent)
        try:
            await self._channel.send(report.ENDED + msgspec.msgpack.encode(order))
        except (OSError, trio.ClosedResourceError):
            self._record(connection, outcome, received, sent)
        finally:
            self._relay.forget(connection.id)
        return None

    def _record(self, connection: Connection, outcome: Outcome, received: int, sent: int) -> None:
        if connection.id in self._relay.abandoned:
            return
        record = Record(
            ts=_wall_clock(time.time()),
            id=connection.id,
            workload=connection.workload,
            source=format_address(connection.source),
            original_destination=format_address(connection.original_destination),
            rule=connection.rule,
            bytes_from_client=received,
            bytes_from_upstream=sent,
            duration_ms=round((trio.current_time() - self._began) * 1000, 3),
            outcome=outcome,
        )
        self._relay.count_orphan(connection.workload, outcome)
        self._relay.on_lines(msgspec.json.encode(record) + b"\n")


class _Relaying:
    """A connection that a loop relays for a handler."""

    def __init__(self, relay: _Relay, channel: _Orders, identity: str) -> None:
        self.identity = identity
        self._relay = relay
        self._channel = channel
        self._ended = trio.Event()
        self._how: EndedOrder | None = None

    def end(self, how: EndedOrder | None) -> None:
        """None: the handler has ended before."""
        self._how = how
        self._ended.set()

    async def ended(self) -> EndedOrder:
        """Waits for its end. Cancelled, it has the loop reset both sides; how the connection ended is the handler's to say then."""
        try:
            await self._ended.wait()
        except BaseException:
            self._relay.relaying.pop(self.identity, None)
            with trio.CancelScope(shield=True), suppress(OSError, trio.ClosedResourceError):
                await self._channel.send(report.RESET + self.identity.encode())
            raise
        if self._how is None:
            raise trio.ClosedResourceError("this stream is closed: its handler has ended")
        return self._how


def _orphan(handed: Handed) -> LivingConnection:
    """What is known of a connection with the program whose loop has died."""
    one, stream = handed.connection, handed.stream
    return LivingConnection(
        id=one.id,
        workload=one.workload,
        state="handed",
        age_s=round(trio.current_time() - handed.since, 3),
        source=format_address(one.source),
        original_destination=format_address(one.original_destination),
        rule=one.rule,
        bytes_from_client=stream.received if stream is not None else 0,
        bytes_from_upstream=stream.sent if stream is not None else 0,
    )


def _wall_clock(now: float) -> str:
    """RFC 3339 in UTC with milliseconds, as in the records of the loops."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"


def _identity(line: bytes) -> str:
    """The id in a record's line. It stands behind the time: `{"ts":"2026-11-24T08:00:00.000Z","id":"0123456789abcdef",`."""
    begin = line.index(b'"id":"') + 6
    return line[begin : begin + 16].decode()


class _Orders:
    """What is said to a loop, by as many tasks as there are connections: trio lets only one at a time wait for a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._turn = trio.Lock()

    async def send(self, order: bytes, rights: Sequence[tuple[int, int, bytes]] = ()) -> None:
        """At once if there is room, and else in the order of those who wait; cancelled, it was not sent. Raises OSError or ClosedResourceError
        when the loop is gone."""
        if not self._turn.locked():
            with suppress(BlockingIOError):
                self._sock.sendmsg([order], rights)
                return
        async with self._turn:
            while True:
                if (
                    self._sock.fileno() < 0
                ):  # closed while others had their turn: what trio says to that number is no answer
                    raise trio.ClosedResourceError("the loop is gone")
                await trio.lowlevel.wait_writable(self._sock)
                with suppress(BlockingIOError):
                    self._sock.sendmsg([order], rights)
                    return

    def close(self) -> None:
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()


async def _messages(channel: socket.socket) -> AsyncIterator[tuple[bytes, int | None]]:
    """Messages, each with the descriptor that came with it, until the other end is gone."""
    turns = _MESSAGES
    while True:
        try:
            message, rights, _, _ = channel.recvmsg(report.MESSAGE, _ONE_DESCRIPTOR)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(channel)
            turns = _MESSAGES
            continue
        except OSError:
            return
        if not message:
            return
        yield message, struct.unpack("i", rights[0][2])[0] if rights else None
        turns -= 1
        if not turns:
            turns = _MESSAGES
            await trio.lowlevel.checkpoint()
