"""The kernel's state of one interception: put there, watched, repaired, taken away.

What should be there is computed anew at every look, because it depends on the namespace: IPv6 is switched off and on, interfaces
come and go. A look costs some ten milliseconds, and happens when the kernel has news of what is ours, and once a minute besides.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import partial

import trio

from tproxyd import kernel
from tproxyd.config import Config
from tproxyd.errors import MissingError, TproxydError
from tproxyd.interceptor.threads import in_thread
from tproxyd.plan import Marks, Plan, Surroundings, make_plan

__all__ = ["KINDS", "Keeper"]

_log = logging.getLogger(__name__)

KINDS = ("route", "rule", "ruleset", "ipv6")
"""What is repaired, as counted: ipv6 is what was adapted because IPv6 had been switched off or on."""

_LOOK = 60.0  # seconds between two looks without news: somebody may have changed what the kernel has no news of
_RETRY = 1.0  # after a repair that failed
# Repairs of one kind in the last minute, and the pause before the next one: an accident is mended at once, a program that does it again and
# again is not answered as fast as it can, and one that never stops gets an answer every five seconds.
_MINUTE = 60.0
_FREE, _STEP, _USUAL_PAUSE = 5, 0.02, 0.4
_FIGHT, _LONG_PAUSE = 110, 5.0


class Keeper:
    """Made in a thread of the namespace that it keeps, where it looks first whether the config can work: raises MissingError,
    CapabilityError, or KernelError if another program is in the way, and warns of what is half in the way. `put` first, then `watch` as a task, `leave` at the end, and `close`.

    `repairs` counts what others have changed and this has put right, by kind (KINDS); `trouble` says what cannot be put right, if anything.
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
        self._links: dict[int, str] = dict(socket.if_nameindex())
        self.trouble = ""

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
        return self._wanted(self._surroundings).marks

    async def differences(self) -> list[kernel.Change]:
        """What is otherwise than planned, now. Raises TproxydError."""
        async with self._lock:
            return await in_thread(self._compare)

    async def put(self) -> None:
        """Makes the kernel hold the plan, capture last; takes over what `tproxyd apply` or a predecessor has left. Raises
        TproxydError, with nothing changed."""
        async with self._lock:
            self._stays = await in_thread(partial(kernel.is_applied, self._nft))
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
                with trio.move_on_at(due):
                    await trio.lowlevel.wait_readable(events.fileno())
                news = events.read()
                self._tell_links(news.links)
                if news.state or trio.current_time() >= due:
                    due = trio.current_time() + (_LOOK if await self._repair() else _RETRY)

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

    async def _repair(self) -> bool:
        """Looks, and puts right what is otherwise; False if that has to be tried again."""
        try:
            async with self._lock:
                kinds = await in_thread(self._look)
            if kinds:
                await trio.sleep(max(self._pause(kind) for kind in kinds))
                async with self._lock:
                    await in_thread(self._apply)
        except TproxydError as error:
            if str(error) != self.trouble:
                self.trouble = str(error)
                _log.error("cannot repair the kernel's state, and will try again: %s", error)
            return False
        self.trouble = ""
        return True

    def _look(self) -> set[str]:
        """What kinds of state are otherwise than planned. While lo is down, that is not looked at: what needs lo is mended when it
        is up again, and that is news, too."""
        if self._left or not kernel.is_loopback_up():
            return set()
        return {change.kind for change in self._compare()}

    def _compare(self) -> list[kernel.Change]:
        plan = self._wanted(self._look_around())
        return kernel.differences(plan, kernel.observe(self._nft), self._nft)

    def _apply(self) -> None:
        if self._left or not kernel.is_loopback_up():
            return
        surroundings = self._look_around()
        changes = kernel.apply(self._wanted(surroundings), self._nft)
        before, self._surroundings = self._surroundings, surroundings
        if changes:
            self._tell(changes, before)

    def _tell(self, changes: list[kernel.Change], before: Surroundings) -> None:
        """One event, in one line of the log."""
        what = "; ".join(change.what for change in changes)
        kinds: list[str] = sorted({change.kind for change in changes})
        now = time.monotonic()
        for kind in kinds:
            self._repaired[kind].append(now)
        if before.families != self._surroundings.families:
            kinds = ["ipv6"]
            on = 6 in self._surroundings.families
            _log.warning("IPv6 %s: %s", "is on again, and captured" if on else "is off, and no more captured", what)
        else:
            _log.warning("another program has changed the kernel's state (%s), repaired: %s", ", ".join(kinds), what)
        self.repairs.update(kinds)

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
        for index, name in links.items():
            before = self._links.pop(index, None)
            if name is not None:
                self._links[index] = name
            if before != name and any(one is not None and self._is_named(one) for one in (before, name)):
                if name is None:
                    what = f"interface {before} is gone"
                elif before is None:
                    what = f"interface {name} has come"
                else:
                    what = f"interface {before} is now called {name}"
                _log.warning("%s: what capture says of interfaces goes by the names that they have now", what)

    def _is_named(self, name: str) -> bool:
        capture = self._config.capture
        return any(fnmatchcase(name, pattern) for pattern in (*capture.interfaces, *capture.exclude_interfaces))


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
