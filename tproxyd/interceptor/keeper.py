"""The kernel's state of one interception: put there, watched, repaired, taken away.

What should be there is computed anew at every look, because it depends on the namespace: IPv6 is switched off and on, interfaces
come and go. A look costs some ten milliseconds, and happens when the kernel has news of what is ours, and once a minute besides.

The namespace is the caller's own, or another one, a workload's. There every step is a throwaway thread, and the tables are nobody's in
particular: to own them takes an open libnftables context (0.7 MiB) for as long as they live. A flush by somebody else is repaired there, not impossible.
"""

from __future__ import annotations

import logging
import math
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Literal, TypeVar

import msgspec
import trio

from tproxyd import kernel
from tproxyd.config import Config, is_interface
from tproxyd.config.wording import few
from tproxyd.errors import KernelError, MissingError, TproxydError
from tproxyd.interceptor.heritage import Heritage, make_heritage, require_same
from tproxyd.interceptor.pace import FewLines, RepairPace
from tproxyd.interceptor.plan_book import PlanBook
from tproxyd.interceptor.threads import in_thread
from tproxyd.net.namespaces import call_in_namespace
from tproxyd.net.ownership import hold_namespace
from tproxyd.plan import (
    DEFAULT_NAME,
    Marks,
    Plan,
    Surroundings,
    free_generation,
    make_marks,
    next_generation,
    remove_tables,
    table_names,
    waiting_table,
)

__all__ = ["KINDS", "Keeper"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

KINDS = ("route", "rule", "ruleset", "ipv6")
"""What is repaired, as counted: ipv6 is what was adapted because IPv6 had been switched off or on."""

# A look is followed by a rest of so many times its own length, or every change of somebody else's rules could cost a core.
# Where there may be hundreds of namespaces, and in each a program that never stops, one of them gets less.
_REST, _REST_OF_MANY, _LONGEST_REST = 4, 19, 5.0
_QUIET, _LONGEST_BURST = 0.02, 0.2  # seconds without news after which a look is worth it, and at the latest
# What is heard is followed by a rest, too: in a namespace of somebody else's, which may make as much news as he likes, and most is none of ours.
_HEARD_REST, _SHORTEST_HEARD_REST = 20, 0.005
_GLANCE = 1.0  # seconds between two looks at what there is no news of: two files
# Seconds between two looks without news: somebody may have changed what the kernel has no news of. Of hundreds of namespaces not all at once, and
# together for less than half a percent of a core.
_LOOK, _LOOKS_OF_MANY = 60.0, (90.0, 150.0)
_RETRY = 1.0  # after a repair that failed
_LINES = 60  # about interfaces, in a minute: a host of containers has hundreds come and go


class Keeper:
    """Looks first whether the config can work, which blocks for some milliseconds: raises MissingError, CapabilityError, or KernelError if
    another program is in the way, and warns of what is half in the way. `put` first, then `watch` as a task, `leave` at the end, and `close`.

    Without `netns` it keeps the namespace of the calling thread, which the caller has taken (net/ownership.py). With a descriptor it keeps that
    one, from whichever thread, and takes it until `close`: KernelError that names who has it already. The caller closes the descriptor, after that.
    `name` is that of the tables, `workload` what the log calls the namespace, `book` what several keepers have in common, and `threads` in how many of them at a time the kernel is spoken to.

    `repairs` counts what others have changed and this has put right, by kind (KINDS); `trouble` says what cannot be put right, if anything.
    `on_event` is told of each, in the task of `watch`; it must not block. `others` is set, and another one takes its place, when somebody else's ruleset has changed.
    `ssh_ports` are known to the caller, besides those that are found here: in a namespace that is not the caller's own, where none of this
    host's administrators comes in, port 22 alone is looked at.
    `before` is what a predecessor leaves that lives and still has its table (heritage.py): ConfigError where they do not fit together.
    """

    def __init__(
        self,
        config: Config,
        *,
        netns: int | None = None,
        name: str = DEFAULT_NAME,
        workload: str = "",
        book: PlanBook | None = None,
        threads: trio.CapacityLimiter | None = None,
        ssh_ports: Iterable[int] = (),
        before: Heritage | None = None,
        on_event: Callable[[Literal["drift", "trouble"], str], None] = lambda kind, what: None,
    ) -> None:
        table_names(name)  # raises ConfigError
        self.repairs: Counter[str] = Counter()
        self._netns = netns
        self._name = name
        self._book = book or PlanBook(0 if netns is None else 1)
        self._own_book = book is None
        self._threads = threads
        self._config = self._book.same(config)
        self._living: tuple[Config, ...] = ()
        self._warned: set[str] = set()
        self._log = _OfWorkload(_log, {"workload": workload}) if workload else _log
        self._ssh_ports = (*ssh_ports,)
        self._on_event = on_event
        self._repaired_now = ""  # what the last look has put right
        self._held: socket.socket | None = None
        self._nft: kernel.Nft | None = None  # of another namespace: opened for each step
        self._listed: tuple[int, dict[str, str]] | None = None
        self._before = before
        # Which name is free is looked for when the table is put there.
        self._steering = table_names(name).steering if before is None else next_generation(before.steering, name)
        self._stays = False
        self._capturing = True
        self._left = True  # nothing to keep
        self._still = self._retired = False
        self._moving = trio.Event()  # again, after it kept still
        self._is_guest = before is not None
        try:
            if netns is None:
                self._begin()
                self._nft = _own_tables(config)
            else:
                call_in_namespace(netns, self._take)
        except BaseException:
            self.close()
            raise
        self._owned = isinstance(self._nft, kernel.Library)
        if before is not None:
            try:
                require_same(before, config, self.plan())
            except BaseException:
                self.close()
                raise
        self._lock = trio.Lock()
        self._pace = RepairPace(time.monotonic)
        self._rested = -math.inf  # when the next look may begin, on time.monotonic()
        self._heard_rest = 0.0
        self._few_lines = FewLines(_LINES, 60.0, time.monotonic)
        self.trouble = ""
        self.others = trio.Event()

    def close(self) -> None:
        """What this process owns in the kernel goes with it, and a namespace that was taken is free for others. Harmless when repeated."""
        if isinstance(self._nft, kernel.Library):
            self._nft.close()
        if self._held is not None:
            self._held.close()
        if self._own_book:
            self._book.close()

    @property
    def surroundings(self) -> Surroundings:
        return self._surroundings

    @property
    def capturing(self) -> bool:
        return self._capturing and not self._left

    @property
    def marks(self) -> Marks:
        return make_marks(self._config, self._surroundings.taken_marks)

    def plan(self) -> Plan:
        """What the kernel is to hold; not to be changed."""
        return self._wanted(self._surroundings)

    async def differences(self) -> list[kernel.Change]:
        """What is otherwise than planned, now. Raises TproxydError."""
        async with self._lock:
            return await self._step(self._compare)

    async def put(self) -> None:
        """Makes the kernel hold the plan, capture last; takes over what `tproxyd apply` or a predecessor has left. Raises
        TproxydError, with nothing changed."""
        async with self._lock:
            changes = await self._step(self._put)
            self._left = False
        if self._stays:
            self._log.info("the kernel state of `tproxyd apply` is taken over, and stays at the end")
        for change in changes:
            self._log.info("%s", change)

    async def check(self, config: Config) -> None:
        """Whether this config can take the place of the present one, which has the same mode and marks: what `Keeper` itself looks at, and what the
        kernel says of its ruleset. Warns, and raises, as that does."""
        if not self.capturing:
            raise KernelError(
                "capture is off here for good, after `tproxyd revert` or because this ends; restart it instead"
            )

        def step(nft: kernel.Nft) -> None:
            if self._netns is None and not self._owned and config.redirects and config.capture.when_down == "bypass":
                _own_tables(config)  # raises
            self._warn(self._look_ahead(config).warnings)
            kernel.check(self._plan(config, (self._config, *self._living), self._surroundings), nft)

        async with self._lock:
            await self._step(step)

    async def change(self, config: Config, living: Sequence[Config]) -> None:
        """Makes the kernel hold the plan of this config from now on, and with it what connections need that live under the `living` ones. What is
        equal is not touched. Raises TproxydError, with the old plan in force. While this keeps still it waits, and once this has retired nothing is done: what
        is there is the successor's."""
        while self._still:
            await self._moving.wait()
        async with self._lock:
            if self._left or self._retired:
                return  # for good
            before = self._config, self._living
            self._config = self._book.same(config)
            self._living = tuple(dict.fromkeys(one for one in living if one != config))
            try:
                changes = await self._step(self._change)
            except BaseException:
                self._config, self._living = before
                raise
            for change in changes:
                self._log.info("%s", change)
        if changes:
            # Who looks at what others' rules do to captured connections has another question now.
            self.others.set()
            self.others = trio.Event()

    def plans_otherwise(self, config: Config, living: Sequence[Config]) -> bool:
        """Whether `change` would change anything that is planned."""
        plan = self._plan(config, tuple(dict.fromkeys(one for one in living if one != config)), self._surroundings)
        return plan != self.plan()

    async def watch(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Repairs what others change, until cancelled."""
        with self._here(self._open_events) as events:
            task_status.started()
            due = trio.current_time()  # what came between `put` and here was no news yet
            while True:
                with trio.move_on_at(min(due, trio.current_time() + (_GLANCE if self._glances else math.inf))):
                    await trio.lowlevel.wait_readable(events.fileno())
                if self._hear(events) or trio.current_time() >= due or self._sees_bridges_otherwise():
                    await self._until_quiet(events)
                    await trio.sleep(max(0.0, self._rested - time.monotonic()))
                    due = await self._look_and_repair()
                else:
                    await trio.sleep(self._heard_rest)

    async def stop_capture(self) -> None:
        """No new connection is taken from here on. Raises TproxydError, with capture still on. Harmless when repeated."""
        async with self._lock:
            if self._capturing and not self._left:
                await self._step(self._stop_capture)
            self._capturing = False

    @property
    def heritage(self) -> Heritage:
        """What a successor has to know. Raises KernelError where there can be none."""
        if not self._owned:
            raise KernelError(
                "the steering table is nobody's without libnftables.so.1, so there cannot be one for each of two generations; install it (on Debian "
                "libnftables1), and restart the daemon"
            )
        if not self.capturing:
            raise KernelError("nothing is captured here any more, so there is nothing to hand over; restart the daemon")
        return make_heritage(self._config, self.plan(), self._surroundings.taken_marks)

    def settle(self) -> None:
        """From now on the kernel's state is this one's to take away. Until then a predecessor may go on with it, and has it put right then."""
        self._is_guest = False

    @asynccontextmanager
    async def keeping_still(self) -> AsyncIterator[None]:
        """For the length of the block nothing is repaired: a successor puts its own state there, which is otherwise. At the end, unless this has
        retired, it is looked at once."""
        async with self._lock:
            self._still, self._moving = True, trio.Event()
        try:
            yield
        finally:
            self._still = False
            self._moving.set()
            if not self._retired:
                with trio.CancelScope(shield=True):
                    await self._look_and_repair()

    async def retire(self) -> None:
        """A successor has it all: nothing is taken and nothing repaired any more, and `leave` takes the own steering table alone."""
        async with self._lock:
            self._retired = True
            try:
                if not self._left:
                    await self._step(self._stop_capture)
            except TproxydError as error:
                self._log.error("capture cannot be switched off beside the successor, which does the same: %s", error)
            self._capturing = False

    async def revert(self) -> list[kernel.Change]:
        """Takes everything away, now and for good, for `tproxyd revert`. What was removed. Raises TproxydError; then what is missing is put
        there again."""
        async with self._lock:
            removed = await self._step(self._remove)
            self._capturing, self._left = False, True
            return removed

    async def leave(self) -> None:
        """The end: nothing is left, or what `tproxyd apply` is for. Raises TproxydError. Harmless when repeated."""
        async with self._lock:
            if self._left:
                return
            if self._retired or self._is_guest:
                await self._step(partial(kernel.remove_steering, self._wanted(self._surroundings)))
            elif self._stays:
                plan = self._book.plan(
                    self._config, self._surroundings, stays=True, owned=False, capturing=True, name=self._name
                )
                await self._step(partial(kernel.apply, plan))
            else:
                await self._step(self._remove)
            self._left = True

    async def leave_to_successor(self) -> None:
        """The end in place of `leave`: what steers stays, and is nobody's, until a successor takes it over. Raises
        TproxydError; then `leave` has everything to remove."""
        async with self._lock:
            await self._step(self._disown)
            self._left = True

    async def _step(self, step: Callable[[kernel.Nft], T]) -> T:
        """Takes a step in a thread of the namespace, to its end whatever is cancelled."""
        return await in_thread(partial(self._here, partial(self._with_nft, step)), limiter=self._threads)

    def _here(self, function: Callable[[], T]) -> T:
        """Runs a function that blocks in the namespace that is kept."""
        return function() if self._netns is None else call_in_namespace(self._netns, function)

    def _with_nft(self, step: Callable[[kernel.Nft], T]) -> T:
        if self._nft is not None:
            return step(self._nft)
        with self._book.open_nft(self._listed, self._wanted(self._surroundings)) as nft:
            try:
                return step(nft)
            finally:
                self._listed = self._book.shared_texts(nft.listed, self._wanted(self._surroundings))

    def _open_events(self) -> kernel.Events:
        return kernel.Events(self._config.routing.table, self._name, of_many=self._netns is not None)

    def _take(self) -> None:
        """The first step in another's namespace."""
        self._held = hold_namespace("capture here")
        kernel.require_nf_tables()  # the others look for themselves
        self._book.require_nft()
        self._begin()
        if self._config.redirects and self._config.capture.when_down == "bypass":
            self._log.warning(
                'when_down = "bypass" holds for a stop, not for a death of this program: NAT does not look for a listener, and while none '
                "is there clients are refused"
            )

    def _begin(self) -> None:
        another = self._netns is not None
        self._ssh_ports = tuple(sorted({*kernel.find_ssh_ports(usual_alone=another), *self._ssh_ports}))
        found = self._look_ahead(self._config)
        self._warn(found.warnings)
        surroundings = found.surroundings
        if self._before is not None:  # its marks are chosen, and living connections have them
            surroundings = msgspec.structs.replace(surroundings, taken_marks=self._before.taken_marks)
        self._surroundings = self._book.same(surroundings)
        self._links: dict[int, str] = dict(socket.if_nameindex())
        self._look_at_bridges()

    def _look_ahead(self, config: Config) -> kernel.Preflight:
        another = self._netns is not None
        return kernel.preflight(config, ssh_ports=self._ssh_ports, name=self._name, nft_known=another)

    def _warn(self, warnings: Iterable[str]) -> None:
        """Of the same thing once."""
        for warning in warnings:
            if warning not in self._warned:
                self._warned.add(warning)
                self._log.warning("%s", warning)

    def _change(self, nft: kernel.Nft) -> list[kernel.Change]:
        return self._book.apply(self._wanted(self._surroundings), nft)

    def _put(self, nft: kernel.Nft) -> list[kernel.Change]:
        self._stays = kernel.is_applied(self._name)
        if self._netns is None and self._before is None:
            self._steering = free_generation(kernel.observe(nft, self._name).tables, self._name)
        return self._book.apply(self._wanted(self._surroundings), nft)

    def _stop_capture(self, nft: kernel.Nft) -> None:
        kernel.stop_capture(self._wanted(self._surroundings), self._wanted(self._surroundings, capturing=False), nft)

    def _disown(self, nft: kernel.Nft) -> None:
        if not self._owned:
            return  # it outlives this process as it is
        plan = self._wanted(self._surroundings)
        waiting = waiting_table(self._name)
        # Both are there for a moment. Exchanged for one another, a packet can see the old one gone and the new one not there yet.
        left = self._book.plan(self._config, self._surroundings, stays=False, owned=False, capturing=True, name=waiting)
        nft.run(remove_tables({waiting: ""}) + left.tables[waiting])
        if self._stays:
            applied = self._book.plan(
                self._config, self._surroundings, stays=True, owned=False, capturing=True, name=self._name
            )
            kernel.apply(applied, nft)
        else:
            nft.run(remove_tables({plan.steering: plan.tables[plan.steering]}))

    def _remove(self, nft: kernel.Nft) -> list[kernel.Change]:
        own = self._steering if self._netns is None else None
        return kernel.revert(nft, self._name, checked=self._netns is not None, steering=own)

    def _wanted(self, surroundings: Surroundings, *, capturing: bool = True) -> Plan:
        return self._plan(self._config, self._living, surroundings, capturing=capturing)

    def _plan(
        self, config: Config, living: tuple[Config, ...], surroundings: Surroundings, *, capturing: bool = True
    ) -> Plan:
        return self._book.plan(
            config,
            surroundings,
            living=living,
            stays=self._stays,
            owned=self._owned,
            capturing=capturing and self._capturing,
            name=self._name,
            steering=self._steering,
        )

    def _look_around(self) -> Surroundings:
        # The marks stay as they were chosen at the start: connections have them.
        found = kernel.look_around(ssh_ports=self._ssh_ports, taken_marks=self._surroundings.taken_marks)
        return self._book.same(found)

    def _look_at_bridges(self) -> None:
        self._bridge_sysctl = kernel.bridge_sysctl()
        # In another namespace a glance is a thread; where there is no bridge, and a new one is news, nothing is missed without.
        self._glances = self._netns is None or (any(self._bridge_sysctl) and kernel.has_bridges())

    def _hear(self, events: kernel.Events) -> bool:
        """Takes in what news there is; whether it may be of what is ours."""
        began = time.monotonic()
        news = events.read()
        self._tell_links(news.links)
        if news.others:
            self.others.set()
            self.others = trio.Event()
        self._heard_rest = max(_SHORTEST_HEARD_REST, _HEARD_REST * (time.monotonic() - began))
        return news.state

    async def _until_quiet(self, events: kernel.Events) -> None:
        """What one command does comes in pieces, and is one event."""
        with trio.move_on_after(_LONGEST_BURST):
            while True:
                await trio.sleep(self._heard_rest)
                with trio.move_on_after(_QUIET) as quiet:
                    await trio.lowlevel.wait_readable(events.fileno())
                if quiet.cancelled_caught:
                    return
                self._hear(events)

    def _sees_bridges_otherwise(self) -> bool:
        """br_netfilter is switched without any news."""
        try:
            return self._glances and self._here(kernel.bridge_sysctl) != self._bridge_sysctl
        except (OSError, RuntimeError, TproxydError):
            return False  # no file left, or no thread: the next look tells

    async def _look_and_repair(self) -> float:
        """Puts right what is otherwise and due to be; when to look again without news, on trio.current_time()."""
        failed: Exception | None
        try:
            async with self._lock:
                waiting, failed = await self._step(self._repair)
        except Exception as error:  # whatever it is, connections that live are worth more than this one look
            waiting, failed = None, error
        if self._repaired_now:
            self._on_event("drift", self._repaired_now)
            self._repaired_now = ""
        if failed is None:
            self.trouble = ""
        elif str(failed) != self.trouble:
            self.trouble = str(failed)
            self._on_event("trouble", self.trouble)
            known = isinstance(failed, (TproxydError, OSError))
            self._log.error(
                "cannot repair the kernel's state, and will try again: %s",
                failed if known else f"this is a bug, please report it: {failed!r}",
                exc_info=None if known else failed,
            )
        look = _LOOK if self._netns is None else random.uniform(*_LOOKS_OF_MANY)  # noqa: S311  # no secret
        wait = look if failed is None else _RETRY
        return trio.current_time() + (wait if waiting is None else min(wait, waiting))

    def _repair(self, nft: kernel.Nft) -> tuple[float | None, TproxydError | None]:
        """Looks, and puts right what is due. Seconds until the rest of it is (None: nothing is left), and what went wrong.

        While lo is down nothing is looked at: what needs lo is mended when it is up again, and that is news, too.
        """
        began = time.monotonic()
        self._look_at_bridges()
        if self._left or self._still or self._retired or not kernel.is_loopback_up():
            return None, None
        surroundings = self._look_around()
        plan = self._wanted(surroundings)
        different = {change.kind for change in kernel.differences(plan, kernel.observe(nft, self._name), nft)}
        # What has one cause is one repair.
        adapts = surroundings.families != self._surroundings.families
        kinds: set[str] = {"ipv6"} if adapts and different else {*different}
        now = time.monotonic()
        rest = _REST if self._netns is None else _REST_OF_MANY
        self._rested = now + min(rest * (now - began), _LONGEST_REST)
        ready = self._pace.ready(kinds, now)
        failed = None
        if ready:
            changes, failed = kernel.repair(plan, different if adapts else ready, nft)
            before, self._surroundings = self._surroundings, surroundings
            if changes:
                self._tell(changes, before)
            self._pace.done(ready)
        return self._pace.wait(now), failed

    def _compare(self, nft: kernel.Nft) -> list[kernel.Change]:
        plan = self._wanted(self._look_around())
        return kernel.differences(plan, kernel.observe(nft, self._name), nft)

    def _tell(self, changes: list[kernel.Change], before: Surroundings) -> None:
        """One event, in one line of the log."""
        what = few([change.what for change in changes])
        kinds: list[str] = sorted({change.kind for change in changes})
        if before.families != self._surroundings.families:
            kinds = ["ipv6"]
            on = 6 in self._surroundings.families
            self._log.warning(
                "IPv6 %s: %s", "is on again, and captured" if on else "is off, and no more captured", what
            )
        elif before.bridge_netfilter != self._surroundings.bridge_netfilter:
            on = self._surroundings.bridge_netfilter
            what_of = (
                "on, so what arrives on bridges is no more captured" if on else "off, and bridges are captured again"
            )
            self._log.warning("br_netfilter is %s: %s", what_of, what)
        else:
            self._log.warning(
                "another program has changed the kernel's state (%s), repaired: %s", ", ".join(kinds), what
            )
        self._repaired_now = f"{', '.join(kinds)}: {what}"
        self.repairs.update(kinds)
        self._pace.note(kinds)

    def _tell_links(self, links: dict[int, str | None]) -> None:
        """Capture goes by names: what bears one now is captured, without anything to be changed, but not without a word."""
        if untold := self._few_lines.left_out():
            self._log.warning("%d more interfaces that capture names have come, gone or been renamed", untold)
        for index, name in links.items():
            before = self._links.pop(index, None)
            if name is not None:
                self._links[index] = name
            if before != name and any(one is not None and self._is_named(one) for one in (before, name)):
                if not self._few_lines.admit():
                    continue
                if name is None:
                    what = f"interface {before} is gone"
                elif before is None:
                    what = f"interface {name} has come"
                else:
                    what = f"interface {before} is now called {name}"
                self._log.warning("%s: what capture says of interfaces goes by the names that they have now", what)

    def _is_named(self, name: str) -> bool:
        capture = self._config.capture
        return any(is_interface(name, pattern) for pattern in (*capture.interfaces, *capture.exclude_interfaces))


class _OfWorkload(logging.LoggerAdapter[logging.Logger]):
    """Says of which workload it speaks."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        workload = str((self.extra or {})["workload"]).replace("%", "%%")
        return f"workload {workload}: {msg}", kwargs


def _own_tables(config: Config) -> kernel.Nft:
    """A library that owns the steering table, or the program where there is none. MissingError without the program, which `tproxyd
    revert` will need, and where only ownership will do."""
    kernel.find_program()
    try:
        return kernel.Library()
    except MissingError as error:
        if config.redirects and config.capture.when_down == "bypass":
            raise MissingError(
                f'{error}; without it the rules of capture.mode = "redirect" would outlive the daemon, and clients be refused: else set '
                'when_down = "refuse"'
            ) from error
        _log.warning(
            "%s; without it another program's `nft flush ruleset` interrupts connections until it is repaired", error
        )
        return kernel.Program()
