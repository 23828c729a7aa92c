"""Workloads of other network namespaces: they come and go, and none of them is another's trouble.

Each is a task of its own, which captures in its namespace until it is removed, until the namespace is gone, or until the interceptor ends.
What is wanted (`sync`) is tried again and again; what is asked for by name (`add`) is done, or raised.
"""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import Any, Literal

import msgspec
import trio

from tproxyd.config import Config, override
from tproxyd.errors import ConfigError, KernelError, MissingError, TproxydError
from tproxyd.interceptor.capture import Capture
from tproxyd.interceptor.keeper import Keeper
from tproxyd.interceptor.listeners import open_listeners
from tproxyd.interceptor.plan_book import PlanBook
from tproxyd.interceptor.relays import Relays
from tproxyd.interceptor.threads import in_thread
from tproxyd.net.namespaces import NamespaceLike, NamespaceWatch
from tproxyd.plan import Plan

__all__ = ["Event", "Workload", "Workloads"]

_log = logging.getLogger(__name__)

_GLANCE = 1.0  # seconds between two looks whether namespaces are still what they were given by
_FIRST_PAUSE, _LONGEST_PAUSE = (
    1.0,
    60.0,
)  # seconds before a workload that failed is tried again, twice as long each time
_AT_ONCE = 8  # workloads that are being added: more would only wait for the kernel's locks
_THREADS = 16  # of steps in the kernel: what ends all at once would else be a thread each
_MOST_EVENTS = 1024  # that wait for one who listens

EventKind = Literal["added", "removed", "vanished", "failed", "drift", "trouble"]


class Event(msgspec.Struct, frozen=True):
    """What has happened to a workload. `added`: it is captured. `removed`: as asked for. `vanished`: its namespace is gone. `failed`: it cannot be
    captured, and why; `retry` is in how many seconds it is tried again, None if it is not. `drift`: somebody else has changed its kernel
    state, which has been put right. `trouble`: that could not be put right yet. `missed`: so many events before this one were not
    kept, because nobody took them."""

    kind: EventKind
    workload: str
    detail: str = ""
    retry: float | None = None
    missed: int = 0


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What `sync_workloads` takes: the same as `add_workload`."""

    netns: Any
    overrides: Mapping[str, Any] | None = None
    dial: Literal["workload", "agent"] = "workload"


class _Wanted:
    """A workload that is there, or is to be. `watch` is None while its namespace could not be opened; `tried` is set when it has been tried to capture
    it, and `hurry` is to be where that is worth another try at once. `ended` is set when nothing of it is left."""

    def __init__(self, name: str, config: Config, spec: Workload) -> None:
        self.name, self.config, self.spec, self.dial = name, config, spec, spec.dial
        self.where = os.path.abspath(spec.netns) if isinstance(spec.netns, str | os.PathLike) else spec.netns
        self.watch: NamespaceWatch | None = None
        self.scope = trio.CancelScope()
        self.attempt = trio.CancelScope()
        self.tried = trio.Event()
        self.hurry = trio.Event()
        self.ended = trio.Event()
        self.error: TproxydError | None = None
        self.capture: Capture | None = None
        self.why: EventKind = "removed"
        self.changes = False
        """The kernel's state has come to be changed."""

    def open(self) -> NamespaceWatch:
        """The namespace, from now on open. Raises TproxydError."""
        if self.watch is None:
            try:
                self.watch = NamespaceWatch(self.where)
            except (OSError, RuntimeError) as error:  # RuntimeError: no thread left
                why = (error.strerror if isinstance(error, OSError) else None) or error
                raise KernelError(f"cannot open the network namespace of workload {self.name!r}: {why}") from error
        return self.watch

    def close(self) -> None:
        if self.watch is not None:
            self.watch.close()

    @property
    def may_come(self) -> bool:
        """Whether what is not there yet may be there later, and be what was meant. A number, of a process or file, may be another's by then."""
        return isinstance(self.where, str) and not self.where.startswith("/proc/")

    def same(self, other: _Wanted) -> bool:
        if (self.config, self.dial) != (other.config, other.dial):
            return False
        if self.watch is None or other.watch is None:
            # That no file is left to open it with does not make it another one.
            return self.where == other.where and not (self.watch is not None and self.watch.gone())
        return self.watch.identity == other.watch.identity

    def has_namespace_of(self, other: _Wanted) -> bool:
        return self.watch is not None and other.watch is not None and self.watch.identity == other.watch.identity

    @property
    def ends(self) -> bool:
        """Whether it is being taken away, by whoever."""
        return self.scope.cancel_called


class Workloads:
    """Those of one interceptor. `serve` is its task; `config` is what all of them have, but for their overrides. Close it after that."""

    def __init__(self, config: Config, relays: Relays, loops: int, name: str) -> None:
        self._config, self._relays, self._loops, self._name = config, relays, loops, name
        self._book = PlanBook()
        self._there: dict[str, _Wanted] = {}
        self._turn: dict[str, trio.Lock] = {}
        self._adding = trio.CapacityLimiter(_AT_ONCE)
        self._threads = trio.CapacityLimiter(_THREADS)
        self._nursery: trio.Nursery | None = None
        self._drains = 0  # of all, that go on
        self._listeners: set[_Listener] = set()

    def __iter__(self) -> Iterator[str]:
        return iter(self._there)

    def close(self) -> None:
        """Gives up what its keepers have shared."""
        self._book.close()

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; then every workload is taken away."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                while True:
                    await trio.sleep(_GLANCE)
                    for wanted in list(self._there.values()):
                        if wanted.watch is not None and wanted.watch.gone():
                            wanted.why = "vanished"
                            wanted.scope.cancel()
        finally:
            self._nursery = None

    async def add(self, name: str, spec: Workload, *, tries_again: bool = False) -> None:
        """See Interceptor.add_workload."""
        wanted, started = _Wanted(name, self._config_of(name, spec), spec), False
        closed: TproxydError | None = None
        try:
            wanted.open()
        except TproxydError as error:
            if not tries_again:
                raise
            closed = error
        try:
            async with self._turn_of(name):
                before = self._there.get(name)
                if before is not None:
                    if before.same(wanted) and not before.ends:
                        if wanted.watch is not None:
                            self._renew(before, wanted.watch)
                        await before.tried.wait()
                        if tries_again or (before.error is None and not before.ends):
                            return
                    await self._end(before)
                if closed is not None and not wanted.may_come:
                    raise closed
                if self._nursery is None or self._drains:
                    does = "closing" if self._nursery is None else "draining"
                    raise KernelError(f"the interceptor is {does}: no workload can be added")
                self._there[name] = wanted
                self._nursery.start_soon(self._run, wanted, tries_again)
                started = True
                try:
                    await wanted.tried.wait()
                except trio.Cancelled:
                    if not tries_again:
                        with trio.CancelScope(shield=True):
                            await self._end(wanted)
                    raise
                if wanted.error is not None and not tries_again:
                    await wanted.ended.wait()
                    raise wanted.error
        finally:
            if not started:
                wanted.close()

    def _renew(self, there: _Wanted, watch: NamespaceWatch) -> None:
        """It is asked for again, and its namespace is there."""
        if there.watch is not None:
            there.watch.look_instead(watch)
        elif there.tried.is_set():  # else it is about to be tried
            there.tried = trio.Event()
            there.hurry.set()

    async def remove(self, name: str, *, drain: float = 0.0) -> None:
        """See Interceptor.remove_workload."""
        async with self._turn_of(name):
            wanted = self._there.get(name)
            if wanted is not None:
                try:
                    if drain > 0 and wanted.capture is not None:
                        with trio.move_on_after(drain):
                            await wanted.capture.drain()
                finally:
                    # Also when this is cancelled: one that is half drained would capture nothing any more, and stay.
                    wanted.scope.cancel()
                await wanted.ended.wait()

    async def sync(self, wanted: Mapping[str, NamespaceLike | Workload]) -> None:
        """See Interceptor.sync_workloads."""
        specs = {name: spec if isinstance(spec, Workload) else Workload(netns=spec) for name, spec in wanted.items()}
        problems: list[str] = []
        for name, spec in specs.items():
            try:
                self._config_of(name, spec)
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(*problems)
        async with trio.open_nursery() as nursery:
            for name in [name for name in self._there if name not in specs]:
                if name not in self._turn:  # at once: what is added below may have its namespace
                    self._there[name].scope.cancel()
                nursery.start_soon(self.remove, name)
            for name, spec in specs.items():
                nursery.start_soon(self._add_or_tell, name, spec)

    def check(self, config: Config) -> None:
        """Whether this can be what all of them have, but for their overrides. Raises ConfigError."""
        problems: list[str] = []
        for name, wanted in self._there.items():
            try:
                self._config_of(name, wanted.spec, config)
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(*problems)

    async def reload(self, config: Config) -> None:
        """That from now on. Their connections go on; one that cannot go over to it is the others' no trouble: it is told, and captured anew, as `sync` does
        it, which resets its connections."""
        self._config = config
        async with trio.open_nursery() as nursery:
            for name in list(self._there):
                nursery.start_soon(self._reload, name)

    async def _reload(self, name: str) -> None:
        async with self._turn_of(name):
            wanted = self._there.get(name)
            if wanted is None or wanted.ends:
                return
            config = self._config_of(name, wanted.spec)
            before, wanted.config = wanted.config, config
            if config == before or config.capture.mode == before.capture.mode == "off":
                return
            try:
                if wanted.capture is not None and config.capture.mode == before.capture.mode:
                    await wanted.capture.reload(config)
                    return
            except TproxydError as error:
                if wanted.scope.cancel_called:
                    return
                _log.error(
                    "workload %s is captured anew, as it cannot go over to the new configuration: %s", name, error
                )
                self._tell("failed", name, str(error), retry=0.0)
            wanted.attempt.cancel()

    async def drain(self) -> None:
        """All of them: see Interceptor.drain."""
        self._drains += 1
        try:
            async with trio.open_nursery() as nursery:
                for wanted in self._there.values():
                    nursery.start_soon(self._drain, wanted)
        finally:
            self._drains -= 1

    async def _drain(self, wanted: _Wanted) -> None:
        await wanted.tried.wait()
        if wanted.capture is not None:
            await wanted.capture.drain()
        elif wanted.error is not None:
            await self._end(wanted)  # it would begin when all others have stopped

    def namespace(self, name: str) -> int:
        """A descriptor of a workload's network namespace, which stays its. Raises KeyError, or KernelError while there is no such namespace."""
        watch = self._there[name].watch
        if watch is None:
            raise KernelError(f"the network namespace of workload {name!r} is not there at the moment")
        return watch.fd

    def plan(self, name: str) -> Plan:
        """What the kernel is to hold in this workload's namespace. Raises KeyError, or KernelError while it is not captured."""
        capture = self._there[name].capture
        if capture is None:
            raise KernelError(f"workload {name!r} is not captured at the moment")
        return capture.keeper.plan()

    def troubles(self) -> dict[str, str]:
        """By workload, what is wrong with its kernel state; those that cannot be captured have their error."""
        found = {}
        for name, wanted in self._there.items():
            trouble = (
                str(wanted.error) if wanted.error is not None else wanted.capture and wanted.capture.keeper.trouble
            )
            if trouble:
                found[name] = trouble
        return found

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[Event]]:
        """See Interceptor.events."""
        listener = _Listener()
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    def _config_of(self, name: str, spec: Workload, template: Config | None = None) -> Config:
        if not name or not isinstance(name, str):
            raise ConfigError(f"a workload's name is a text that is not empty, and not {name!r}")
        config = template or self._config
        if spec.overrides:
            config = override(config, spec.overrides, origin=f"workload {name!r}")
        if spec.dial == "agent":
            if config.upstream.source == "client" or config.upstream.target == "loopback":
                raise ConfigError(
                    f'workload {name!r}: with dial = "agent" upstream connections are made elsewhere than where the answers to a client\'s address '
                    'come by, or its loopback is: use upstream.source = "auto" or "proxy", and another target than "loopback"'
                )
            if config.upstream.source == "auto":
                config = msgspec.structs.replace(
                    config, upstream=msgspec.structs.replace(config.upstream, source="proxy")
                )
        elif spec.dial != "workload":
            raise ConfigError(
                f'workload {name!r}: dial = {spec.dial!r} is none of its values; use "workload" or "agent"'
            )
        if config.capture.mode != "off":
            try:
                config.require_captures()
            except ConfigError as error:
                raise ConfigError(*(f"workload {name!r}: {problem}" for problem in error.problems)) from None
        return self._book.same(config)

    async def _add_or_tell(self, name: str, spec: Workload) -> None:
        try:
            await self.add(name, spec, tries_again=True)
        except TproxydError as error:  # of this one alone: there is no such namespace
            await self.remove(name)  # of another one, which is wanted no more
            _log.error("workload %s is not captured: %s", name, error)
            self._tell("failed", name, str(error))

    @asynccontextmanager
    async def _turn_of(self, name: str) -> AsyncIterator[None]:
        """What is asked for of one name is done one after the other. Nothing is kept of names of which nothing is asked."""
        turn = self._turn.setdefault(name, trio.Lock())
        try:
            async with turn:
                yield
        finally:
            # A lock that is let go with somebody waiting for it is his by now.
            if not turn.locked() and self._turn.get(name) is turn:
                del self._turn[name]

    async def _end(self, wanted: _Wanted) -> None:
        wanted.scope.cancel()
        await wanted.ended.wait()

    async def _run(self, wanted: _Wanted, tries_again: bool) -> None:
        pause = _FIRST_PAUSE
        try:
            with wanted.scope:
                while True:
                    error: TproxydError | None = None
                    wanted.attempt = trio.CancelScope()
                    try:
                        with wanted.attempt:
                            await self._capture(wanted)
                    except BaseException as raised:
                        error = _error_of(raised)
                        if error is None:
                            raise
                        if trio.current_effective_deadline() == -math.inf:  # it was to end, and has
                            if wanted.changes:
                                _log.error("something of workload %s may be left: %s", wanted.name, error)
                            await trio.lowlevel.checkpoint()
                    if error is None:  # another configuration has come
                        tries_again = tries_again or wanted.tried.is_set()
                        continue
                    wanted.error = error
                    if not wanted.tried.is_set() and not tries_again:
                        self._tell("failed", wanted.name, str(error))
                        return
                    wanted.tried.set()
                    _log.error("workload %s is not captured, and tried again in %g s: %s", wanted.name, pause, error)
                    self._tell("failed", wanted.name, str(error), retry=pause)
                    with trio.move_on_after(pause) as wanted.attempt:
                        await wanted.hurry.wait()
                    wanted.hurry = trio.Event()
                    pause = min(2 * pause, _LONGEST_PAUSE)
            self._tell(wanted.why, wanted.name)
        finally:
            if self._there.get(wanted.name) is wanted:
                del self._there[wanted.name]
            wanted.capture = None
            if wanted.error is None and not wanted.tried.is_set():  # who waits for it is not to take it for captured
                wanted.error = (
                    MissingError(f"the network namespace of workload {wanted.name!r} has gone while it was being added")
                    if wanted.why == "vanished"
                    else KernelError(f"the interceptor is closing: workload {wanted.name!r} cannot be added")
                )
            wanted.close()
            wanted.tried.set()
            wanted.ended.set()

    async def _capture(self, wanted: _Wanted) -> None:
        """Captures until cancelled. Raises TproxydError, perhaps within a group, if that cannot be done (any more)."""
        wanted.changes = False
        watch = wanted.open()
        if wanted.config.capture.mode == "off":
            self._captured(wanted)
            await trio.sleep_forever()
        await self._until_free(wanted)
        await self._adding.acquire_on_behalf_of(wanted)
        turn = ExitStack()
        turn.callback(self._adding.release_on_behalf_of, wanted)
        with ExitStack() as stack, turn:
            keeper = await in_thread(
                partial(
                    Keeper,
                    wanted.config,
                    netns=watch.fd,
                    name=self._name,
                    workload=wanted.name,
                    book=self._book,
                    threads=self._threads,
                    on_event=lambda kind, what: self._tell(kind, wanted.name, what),
                )
            )
            stack.callback(keeper.close)
            # In a thread, because to find who has a port is a look at every process of the machine.
            opening = open_listeners(wanted.config, keeper.plan().listen, self._loops, watch.fd)
            listeners = await in_thread(partial(stack.enter_context, opening))
            capture = Capture(
                wanted.name,
                wanted.config,
                keeper=keeper,
                relays=self._relays,
                netns=watch.fd,
                another=True,
                dial=wanted.dial,
                threads=self._threads,
            )
            wanted.changes = True
            async with capture.open(listeners):
                turn.close()
                wanted.capture = capture
                self._captured(wanted)
                try:
                    await trio.sleep_forever()
                finally:
                    wanted.capture = None

    async def _until_free(self, wanted: _Wanted) -> None:
        """Who has this namespace under another name and is on his way out, has it no more: a snapshot may give it another name."""
        while leaving := [one for one in self._there.values() if one.ends and one.has_namespace_of(wanted)]:
            await leaving[0].ended.wait()

    def _captured(self, wanted: _Wanted) -> None:
        wanted.error = None
        wanted.tried.set()
        self._tell("added", wanted.name)

    def _tell(self, kind: EventKind, workload: str, detail: str = "", retry: float | None = None) -> None:
        if kind == "vanished":
            _log.warning("the network namespace of workload %s is gone, and so is its interception", workload)
        event = Event(kind, workload, detail, retry)
        for listener in self._listeners:
            listener.tell(event)


def _error_of(raised: BaseException) -> TproxydError | None:
    """Why one workload cannot be captured, whatever was raised: it is none of the others' trouble. None where it was only cancelled, or the
    program is to end."""
    leaves = [*_leaves(raised)]
    if not all(isinstance(one, Exception | trio.Cancelled) for one in leaves):
        return None
    errors = [one for one in leaves if isinstance(one, Exception)]
    for error in errors:
        if isinstance(error, TproxydError):
            return error
    for error in errors:
        if isinstance(error, OSError):
            return KernelError(f"{error.strerror or error}; is the machine out of files or memory?")
    for error in errors:
        _log.error("a workload cannot be captured because of a bug, please report it", exc_info=error)
        return KernelError(f"this is a bug, please report it: {error!r}")
    return None


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _leaves(one)
    else:
        yield error


class _Listener(AsyncIterator[Event]):
    """Events on their way to one who listens: the oldest are dropped, and counted, where nobody takes them. No generator: one that is left
    halfway would have to be closed by who listens."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._missed = 0
        self._more = trio.Event()

    def tell(self, event: Event) -> None:
        if len(self._events) >= _MOST_EVENTS:
            self._events.popleft()
            self._missed += 1
        self._events.append(event)
        self._more.set()

    def __aiter__(self) -> _Listener:
        return self

    async def __anext__(self) -> Event:
        await trio.lowlevel.checkpoint()
        while not self._events:
            await self._more.wait()
        event = self._events.popleft()
        if not self._events:
            self._more = trio.Event()
        missed, self._missed = self._missed, 0
        return msgspec.structs.replace(event, missed=missed) if missed else event
