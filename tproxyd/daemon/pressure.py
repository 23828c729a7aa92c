"""When more is asked of the daemon than is answered at once, it makes do with what is left of the CPU: connections come first."""

from __future__ import annotations

import math

import trio
import trio.abc
import trio.lowlevel

from tproxyd.net.scheduling import Background, Waits, background, count_waits

__all__ = ["Pressure"]

_LASTS = 1.0  # seconds from the last sign of it
_LOOK = 0.5  # seconds at least from one look at how this thread gets on to the next
_TOO_LONG = 0.1  # seconds that it has waited for a core each time: nothing is left on this machine ...
_PAUSE = 10.0  # ... and for so many seconds it takes its share again: it has repairs to make, too


class Pressure(trio.abc.Instrument):
    """While there is some, the thread of the daemon's tasks steps back, and so do threads in which something is done for those who ask (`in_thread`). One
    object a process. `how` is None where they cannot, or are not to: then pressure changes nothing."""

    def __init__(self, how: Background | None) -> None:
        self._how = how
        self._until = self._not_before = self._looked = 0.0
        self._waits = Waits(0, 0.0)

    def begin(self) -> None:
        """In the task that starts all others."""
        background.set(self._how)

    def press(self) -> None:
        """More is asked than is answered at once."""
        now = trio.current_time()
        self._until = now + _LASTS
        if self._how is not None and not self._how.wanted and now >= self._not_before and self._how.enter():
            self._how.wanted = True
            self._looked, self._waits = now, self._count_waits()
            trio.lowlevel.add_instrument(self)

    def stop(self) -> None:
        """There is something else to be done, and not much time for it."""
        self._not_before = math.inf
        if self._how is not None and self._how.wanted:
            self._end(self._how)

    def before_io_wait(self, timeout: float) -> None:
        """Of trio, in each turn of its loop."""
        assert self._how is not None  # it has stepped back
        now = trio.current_time()
        if now > self._until:
            self._end(self._how)
        elif now > self._looked + _LOOK:
            waits = self._count_waits()
            if waits.seconds - self._waits.seconds > _TOO_LONG * (waits.times - self._waits.times):
                self._not_before = now + _PAUSE
                self._end(self._how)
            self._looked, self._waits = now, waits

    def _count_waits(self) -> Waits:
        try:
            return count_waits()
        except OSError:  # no file left: as if it had not waited
            return self._waits

    def _end(self, how: Background) -> None:
        trio.lowlevel.remove_instrument(self)
        how.wanted = False
        how.leave()
