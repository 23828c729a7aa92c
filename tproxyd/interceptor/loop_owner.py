"""The owner of one relay loop: starts it, gives it workloads to serve, says what is wanted of it, hears what it says, and starts another one when it dies.

A loop lives in a process of its own or in a thread of this one; either way it is known here only as the other end of a socket (datapath/report.py).
Those of its connections that the embedding program has are in `handed`; what is counted and recorded, in `tally`.
"""

from __future__ import annotations

import logging
import math
import pickle
import re
import socket
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import msgspec
import trio

from tproxyd.datapath import EndedOrder, LivingConnection, LogLine, Setup, WorkloadSetup, report
from tproxyd.datapath.listing import Answer, CloseOrder, Filter, ListOrder, Page
from tproxyd.errors import KernelError
from tproxyd.interceptor.handed import HandedConnections
from tproxyd.interceptor.homes import ProcessHome, ThreadHome
from tproxyd.interceptor.loop_channel import Orders, make_channel, messages
from tproxyd.interceptor.tally import OnLines, Tally
from tproxyd.net.sockets import abort
from tproxyd.proxy import Policy, Receivers

__all__ = ["LoopOwner", "Served"]

_log = logging.getLogger(__name__)

_START = 10.0  # seconds for a loop to answer; it takes some hundredths
_STOP = 3.0  # seconds for a loop to say its last words ...
_LAST_WORDS = 0.1  # ... and for one that has not answered before
_COUNT = 1.0  # seconds for a loop to tell its counters, or what lives
_LOOKS = 3  # for a connection that is handed over, or back, at that moment
_YOUNG = 5.0  # seconds; a loop that dies younger than that has something against it ...
_TRIES = 5  # ... and after so many of them in a row the interception ends: better no daemon than one that steers clients nowhere
_REST = 9  # of a loop from pages of living connections, in units of the time that the last one took


class Served(NamedTuple):
    """A workload as one loop serves it. `netns` is a descriptor of its namespace."""

    setup: WorkloadSetup
    listeners: tuple[socket.socket, ...]
    netns: int


class LoopOwner:
    """One place for a loop, and whoever fills it at the moment. What its methods do for one loop, those of Relays do for all, and say."""

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
        self._setup = setup
        self._served: dict[str, Served] = {}
        self._told: dict[str, Served] = {}  # of them, what the loop of the moment has been told
        self._adds = trio.Lock()
        self._adding: dict[str, trio.Event] = {}
        self._failed: dict[str, str] = {}
        self._removing: dict[str, trio.Event] = {}
        self._retiring: dict[tuple[str, int], trio.Event] = {}
        self._shedding: dict[str, trio.Event] = {}
        self.tally = Tally(on_lines)
        self._handed = HandedConnections(policy, policy_timeout, receivers, tally=self.tally, served=self._served)
        self._channel: Orders | None = None
        self._ready = trio.Event()
        self._started = False
        self._silent = False  # since it was asked for something
        self._idle: dict[str, trio.Event] = {}
        self._old: dict[str, trio.Event] = {}
        self._paused: set[str] = set()
        self._counted: trio.Event | None = None
        self._paging = trio.Lock()  # one page at a time, and a rest behind it: connections come first
        self._paged = -math.inf  # until when that rest lasts
        self._questions: dict[int, tuple[trio.Event, list[Page | Answer]]] = {}
        self._asked = 0
        self._answers = 0

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
        await self._handed.wait_orphans(name)

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
        await self._handed.end_all_of(name)
        if self._channel is not None:
            removed = self._removing.setdefault(name, trio.Event())
            async with self._adds:  # behind what is being told of it
                self._told.pop(name, None)
                await self._tell(report.REMOVE + name.encode())
            with trio.move_on_after(_STOP) as waiting:  # else it is dying, or stopped (SIGSTOP)
                await removed.wait()
            self._silent = waiting.cancelled_caught
            await self._handed.end_all_of(name)  # of what was accepted meanwhile
        if (idle := self._idle.pop(name, None)) is not None:
            idle.set()
        self.tally.forget(name)

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
                await self._handed.end_all()
                self._handed.lose_relayed()  # of a loop that has not said its last words
                self._on_end()

    async def wait_idle(self, name: str) -> None:
        if name not in self._served:
            return
        idle = self._idle.setdefault(name, trio.Event())
        # Who asks tells, also when another one has asked: that one may have been cancelled before the loop was told.
        await self._tell(report.TELL_IDLE + name.encode())
        await idle.wait()
        await self._handed.wait_given_up(name)  # what has outlived its loop

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
            self._handed.add_moved(page.connections)
            yield page.connections
            after = page.after
            if not after:
                break
        yield self._handed.orphans(which)

    async def close(self, identity: str) -> bool:
        if not re.fullmatch("[0-9a-f]{16}", identity):
            return False
        # It may be on its way to the program, or back, at the moment when it is looked for.
        for _ in range(_LOOKS):
            if self._handed.cancel(identity):
                await self._handed.take_away(identity)
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
        if self._channel is not None:
            with suppress(OSError, trio.ClosedResourceError):  # it has died, which is noticed elsewhere
                await self._channel.send(order, fds)

    async def _live(self, handed: trio.Nursery, task_status: trio.TaskStatus[None]) -> str:
        """One loop's life; tells when the first one has answered. Gives why it ended; when this is cancelled, the loop is ended in order."""
        ours, theirs = make_channel()
        home = ProcessHome(self._setup.keeps) if self._setup.alone else ThreadHome()
        channel = Orders(ours)
        try:
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
                    async for message, fd in messages(ours):
                        if fd is None:
                            self._take(message)
                        else:
                            self._handed.take(message[1:], fd, handed, channel)
                        if self._ready.is_set() and not self._started:
                            self._started = True
                            task_status.started()
                    nursery.cancel_scope.cancel()
                return await home.ended()
            except BaseException:
                # Those that are with the program are being cancelled, too, and each is still to say how it ended.
                await self._handed.end_all()
                if self._channel is None:
                    raise  # it has not heard its setup to the end: that there is nobody any more ends it
                with trio.CancelScope(shield=True), trio.move_on_after(_LAST_WORDS if self._silent else _STOP):
                    await self._tell(report.STOP)
                    async for message, fd in messages(ours):
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
        self._silent = False
        match kind:
            case report.RECORDS:
                self.tally.record(content)
            case report.LIVING:
                self.tally.note_living(content, self._handed)
            case report.COUNTERS | report.COUNTED:
                told = msgspec.msgpack.decode(content, type=report.Count)
                if told.records_dropped:
                    self.tally.drop_records(told.records_dropped)
                for name, counters in told.counters.items():
                    if name in self._served:
                        self.tally.count(name, counters)
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
                self._handed.end_relayed(msgspec.msgpack.decode(content, type=list[EndedOrder]))
            case report.LISTED:
                self._take_answer(msgspec.msgpack.decode(content, type=Page))
            case report.CLOSED:
                self._take_answer(msgspec.msgpack.decode(content, type=Answer))
            case report.RETIRED:
                key = msgspec.msgpack.decode(content, type=tuple[str, int])
                if (retired := self._retiring.pop(key, None)) is not None:
                    retired.set()
            case report.LISTENERS_CLOSED:
                if (shed := self._shedding.pop(content.decode(), None)) is not None:
                    shed.set()
            case report.END_HANDLER:
                if self._handed.cancel(ending := content.decode()):
                    self._handlers.start_soon(self._handed.take_away, ending)
            case report.READY:
                self._ready.set()
            case report.HAND_OVER:  # without its socket: the kernel had no descriptor for it here
                untold = msgspec.msgpack.decode(content, type=report.HandedOver)
                _log.error("no file left for connection %s, which is refused; raise LimitNOFILE (ulimit -n)", untold.id)
                order = report.ENDED + msgspec.msgpack.encode(EndedOrder(untold.id, "error", 0, 0))
                with suppress(OSError):
                    self._ours.send(order)

    def _take_answer(self, answer: Page | Answer) -> None:
        if (asked := self._questions.get(answer.number)) is not None:  # else nobody waits for it any more
            answered, answers = asked
            answers.append(answer)
            answered.set()

    def _bury(self, reason: str) -> None:
        """What a loop leaves behind that died: its connections are lost, but for those that are with the program."""
        alive = self._handed.alive()
        _log.error(
            "a relay loop ended unexpectedly (%s) and took %d connections with it; another one takes its place",
            reason,
            sum(self.tally.lost(alive).values()) + len(self._handed.relaying),
        )
        self.tally.bury(alive, self._served)
        if self._counted is not None:
            self._counted.set()  # nobody is left to answer
            self._counted = None
        for answered, _ in self._questions.values():
            answered.set()
        self._handed.orphan()
        for event in (*self._removing.values(), *self._old.values()):
            event.set()
        self._removing, self._old = {}, {}
        self._forget_generations()

    def _forget_generations(self) -> None:
        """Of older setups of workloads a new loop knows nothing."""
        for event in (*self._retiring.values(), *self._shedding.values()):
            event.set()
        self._retiring, self._shedding = {}, {}
