"""The kernel's state of one interception: put there, watched, repaired, taken away.

What should be there is computed anew at every look, because it depends on the namespace: IPv6 is switched off and on, interfaces
come and go. A look costs some ten milliseconds, and happens when the kernel has news of what is ours, and once a minute besides.
"""

from __future__ import annotations

import logging
import math
import socket
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from functools import partial

import trio

from tproxyd import kernel
from tproxyd.config import Config, is_interface
from tproxyd.config.wording import few
from tproxyd.errors import MissingError, TproxydError
from tproxyd.interceptor.threads import in_thread
from tproxyd.plan import Marks, Plan, Surroundings, make_marks, make_plan

__all__ = ["KINDS", "Keeper"]

_log = logging.getLogger(__name__)

KINDS = ("route", "rule", "ruleset", "ipv6")
"""What is repaired, as counted: ipv6 is what was adapted because IPv6 had been switched off or on."""

# A look is followed by a rest of so many times its own length, or every change of somebody else's rules could cost a core.
_REST, _LONGEST_REST = 4, 5.0
_QUIET, _LONGEST_BURST = 0.02, 0.2  # seconds without news after which a look is worth it, and at the latest
_GLANCE = 1.0  # seconds between two looks at what there is no news of: two files
_LOOK = 60.0  # seconds between two looks without news: somebody may have changed what the kernel has no news of
_RETRY = 1.0  # after a repair that failed
# Repairs of one kind in the last minute, and the pause before the next one: an accident is mended at once, a program that does it again and
# again is not answered as fast as it can, and one that never stops gets an answer every five seconds.
_MINUTE = 60.0
_FREE, _STEP, _USUAL_PAUSE = 5, 0.02, 0.4
_FIGHT, _LONG_PAUSE = 110, 5.0
_LINES = 60  # about interfaces, in a minute: a host of containers has hundreds come and go


class Keeper:
    """Made in a thread of the namespace that it keeps, where it looks first whether the config can work: raises MissingError,
    CapabilityError, or KernelError if another program is in the way, and warns of what is half in the way. `put` first, then `watch` as a task, `leave` at the end, and `close`.

    `repairs` counts what others have changed and this has put right, by kind (KINDS); `trouble` says what cannot be put right, if anything.
    `others` is set, and another one takes its place, when somebody else's ruleset has changed.
    `ssh_ports` are known to the caller, besides those that are found here.
    """

    def __init__(self, config: Config, *, ssh_ports: Iterable[int] = ()) -> None:
        self.repairs: Counter[str] = Counter()
        self._config = config
        self._ssh_ports = {*kernel.find_ssh_ports(), *ssh_ports}
        found = kernel.preflight(config, ssh_ports=self._ssh_ports)
        for warning in found.warnings:
            _log.warning("%s", warning)
        self._surroundings = found.surroundings
        self._nft = _own_tables(config)
        self._owned = isinstance(self._nft, kernel.Library)
        self._stays = False
        self._capturing = True
        self._left = True  # nothing to keep
        self._lock = trio.Lock()
        self._repaired: defaultdict[str, deque[float]] = defaultdict(deque)
        self._rested = -math.inf  # when the next look may begin, and of which kind a repair is due, on time.monotonic()
        self._due: dict[str, float] = {}
        self._bridge_sysctl = kernel.bridge_sysctl()
        self._links: dict[int, str] = dict(socket.if_nameindex())
        self._few_lines = FewLines(_LINES, _MINUTE, time.monotonic)
        self.trouble = ""
        self.others = trio.Event()

    def close(self) -> None:
        """What this process owns in the kernel goes with it."""
        if isinstance(self._nft, kernel.Library):
            self._nft.close()

    @property
    def surroundings(self) -> Surroundings:
        return self._surroundings

    @property
    def capturing(self) -> bool:
        return self._capturing and not self._left

    @property
    def marks(self) -> Marks:
        return make_marks(self._config, self._surroundings.taken_marks)

    async def differences(self) -> list[kernel.Change]:
        """What is otherwise than planned, now. Raises TproxydError."""
        async with self._lock:
            return await in_thread(self._compare)

    async def put(self) -> None:
        """Makes the kernel hold the plan, capture last; takes over what `tproxyd apply` or a predecessor has left. Raises
        TproxydError, with nothing changed."""
        async with self._lock:
            self._stays = await in_thread(kernel.is_applied)
            changes = await in_thread(partial(kernel.apply, self._wanted(self._surroundings), self._nft))
            self._left = False
        if self._stays:
            _log.info("the kernel state of `tproxyd apply` is taken over, and stays at the end")
        for change in changes:
            _log.info("%s", change)

    async def watch(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Repairs what others change, until cancelled."""
        with kernel.Events(self._config.routing.table) as events:
            task_status.started()
            due = trio.current_time()  # what came between `put` and here was no news yet
            while True:
                with trio.move_on_at(min(due, trio.current_time() + _GLANCE)):
                    await trio.lowlevel.wait_readable(events.fileno())
                if self._hear(events) or trio.current_time() >= due or self._sees_bridges_otherwise():
                    await self._until_quiet(events)
                    await trio.sleep(max(0.0, self._rested - time.monotonic()))
                    due = await self._look_and_repair()

    async def stop_capture(self) -> None:
        """No new connection is taken from here on. Raises TproxydError, with capture still on. Harmless when repeated."""
        async with self._lock:
            if self._capturing and not self._left:
                await in_thread(partial(kernel.stop_capture, self._wanted(self._surroundings), self._nft))
            self._capturing = False

    async def revert(self) -> list[kernel.Change]:
        """Takes everything away, now and for good, for `tproxyd revert`. What was removed. Raises TproxydError; then what is missing is put
        there again."""
        async with self._lock:
            removed = await in_thread(partial(kernel.revert, self._nft))
            self._capturing, self._left = False, True
            return removed

    async def leave(self) -> None:
        """The end: nothing is left, or what `tproxyd apply` is for. Raises TproxydError. Harmless when repeated."""
        async with self._lock:
            if self._left:
                return
            if self._stays:
                plan = make_plan(self._config, surroundings=self._surroundings)
                await in_thread(partial(kernel.apply, plan, self._nft))
            else:
                await in_thread(partial(kernel.revert, self._nft))
            self._left = True

    def _wanted(self, surroundings: Surroundings) -> Plan:
        return make_plan(
            self._config,
            surroundings=surroundings,
            stays=self._stays,
            owned=self._owned,
            capturing=self._capturing,
        )

    def _look_around(self) -> Surroundings:
        # The marks stay as they were chosen at the start: connections have them.
        return kernel.look_around(ssh_ports=self._ssh_ports, taken_marks=self._surroundings.taken_marks)

    def _hear(self, events: kernel.Events) -> bool:
        """Takes in what news there is; whether it may be of what is ours."""
        news = events.read()
        self._tell_links(news.links)
        if news.others:
            self.others.set()
            self.others = trio.Event()
        return news.state

    async def _until_quiet(self, events: kernel.Events) -> None:
        """What one command does comes in pieces, and is one event."""
        with trio.move_on_after(_LONGEST_BURST):
            while True:
                with trio.move_on_after(_QUIET) as quiet:
                    await trio.lowlevel.wait_readable(events.fileno())
                if quiet.cancelled_caught:
                    return
                self._hear(events)

    def _sees_bridges_otherwise(self) -> bool:
        """br_netfilter is switched without any news."""
        try:
            return kernel.bridge_sysctl() != self._bridge_sysctl
        except OSError:
            return False  # no file left: the next look tells

    async def _look_and_repair(self) -> float:
        """Puts right what is otherwise and due to be; when to look again without news, on trio.current_time()."""
        failed: Exception | None
        try:
            async with self._lock:
                waiting, failed = await in_thread(self._repair)
        except Exception as error:  # whatever it is, connections that live are worth more than this one look
            waiting, failed = None, error
        if failed is None:
            self.trouble = ""
        elif str(failed) != self.trouble:
            self.trouble = str(failed)
            known = isinstance(failed, (TproxydError, OSError))
            _log.error(
                "cannot repair the kernel's state, and will try again: %s",
                failed if known else f"this is a bug, please report it: {failed!r}",
                exc_info=None if known else failed,
            )
        wait = _LOOK if failed is None else _RETRY
        return trio.current_time() + (wait if waiting is None else min(wait, waiting))

    def _repair(self) -> tuple[float | None, TproxydError | None]:
        """Looks, and puts right what is due. Seconds until the rest of it is (None: nothing is left), and what went wrong.

        While lo is down nothing is looked at: what needs lo is mended when it is up again, and that is news, too.
        """
        began = time.monotonic()
        self._bridge_sysctl = kernel.bridge_sysctl()
        if self._left or not kernel.is_loopback_up():
            return None, None
        surroundings = self._look_around()
        plan = self._wanted(surroundings)
        different = {change.kind for change in kernel.differences(plan, kernel.observe(self._nft), self._nft)}
        # What has one cause is one repair.
        adapts = surroundings.families != self._surroundings.families
        kinds: set[str] = {"ipv6"} if adapts and different else {*different}
        now = time.monotonic()
        self._rested = now + min(_REST * (now - began), _LONGEST_REST)
        self._due = {kind: self._due.get(kind, now + self._pause(kind)) for kind in kinds}
        ready = [kind for kind, due in self._due.items() if due <= now]
        failed = None
        if ready:
            changes, failed = kernel.repair(plan, different if adapts else ready, self._nft)
            before, self._surroundings = self._surroundings, surroundings
            if changes:
                self._tell(changes, before)
            for kind in ready:
                del self._due[kind]
        return min((due - now for due in self._due.values()), default=None), failed

    def _compare(self) -> list[kernel.Change]:
        plan = self._wanted(self._look_around())
        return kernel.differences(plan, kernel.observe(self._nft), self._nft)

    def _tell(self, changes: list[kernel.Change], before: Surroundings) -> None:
        """One event, in one line of the log."""
        what = few([change.what for change in changes])
        kinds: list[str] = sorted({change.kind for change in changes})
        if before.families != self._surroundings.families:
            kinds = ["ipv6"]
            on = 6 in self._surroundings.families
            _log.warning("IPv6 %s: %s", "is on again, and captured" if on else "is off, and no more captured", what)
        elif before.bridge_netfilter != self._surroundings.bridge_netfilter:
            on = self._surroundings.bridge_netfilter
            what_of = (
                "on, so what arrives on bridges is no more captured" if on else "off, and bridges are captured again"
            )
            _log.warning("br_netfilter is %s: %s", what_of, what)
        else:
            _log.warning("another program has changed the kernel's state (%s), repaired: %s", ", ".join(kinds), what)
        self.repairs.update(kinds)
        for kind in kinds:
            self._repaired[kind].append(time.monotonic())

    def _pause(self, kind: str) -> float:
        """Seconds before a repair of this kind."""
        times = self._repaired[kind]
        while times and times[0] < time.monotonic() - _MINUTE:
            times.popleft()
        if len(times) >= _FIGHT:
            return _LONG_PAUSE
        return min(max(0, len(times) - _FREE) * _STEP, _USUAL_PAUSE)

    def _tell_links(self, links: dict[int, str | None]) -> None:
        """Capture goes by names: what bears one now is captured, without anything to be changed, but not without a word."""
        if untold := self._few_lines.left_out():
            _log.warning("%d more interfaces that capture names have come, gone or been renamed", untold)
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
                _log.warning("%s: what capture says of interfaces goes by the names that they have now", what)

    def _is_named(self, name: str) -> bool:
        capture = self._config.capture
        return any(is_interface(name, pattern) for pattern in (*capture.interfaces, *capture.exclude_interfaces))


class FewLines:
    """Lets `most` lines in `seconds` through, and counts the others until there is room for saying so."""

    def __init__(self, most: int, seconds: float, clock: Callable[[], float]) -> None:
        self._most, self._seconds, self._clock = most, seconds, clock
        self._told: deque[float] = deque()
        self._left_out = 0

    def admit(self) -> bool:
        """Whether a line may be told; else it counts as left out."""
        if not self._has_room():
            self._left_out += 1
            return False
        self._told.append(self._clock())
        return True

    def left_out(self) -> int:
        """How many have been since this was last asked; 0 while there is no room for saying so."""
        if not self._left_out or not self._has_room():
            return 0
        self._told.append(self._clock())
        count, self._left_out = self._left_out, 0
        return count

    def _has_room(self) -> bool:
        while self._told and self._told[0] <= self._clock() - self._seconds:
            self._told.popleft()
        return len(self._told) < self._most


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
