"""When more is asked of the daemon than is answered at once, it makes do with what is left of the CPU: connections come first."""

from __future__ import annotations

import math

import trio
import trio.abc
import trio.lowlevel

from tproxyd.net.scheduling import Background, Waits, background, count_running, count_waits

__all__ = ["Pressure"]

_LASTS = 1.0  # seconds from the last sign of it
_LOOK = 0.5  # seconds at least from one look at how this thread gets on to the next
_TOO_LONG = 0.1  # seconds that it has waited for a core each time, or twice that look in all: nothing is left on this machine ...
_PAUSE = 10.0  # ... and for so many seconds it takes its share again: it has repairs to make, too
_CROWD = 6.0  # threads that want each core: it would not even look for so many seconds (ten were 10.3), and be late for a watchdog


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
        how = self._how
        if how is None or how.wanted or now < self._not_before or not how.may_return() or self._has_to_wait(now, None):
            return
        how.wanted = True
        how.enter()
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
        if now > self._until or (now > self._looked + _LOOK and self._has_to_wait(now, self._waits)):
            self._end(self._how)

    def _has_to_wait(self, now: float, before: Waits | None) -> bool:
        """Whether a thread that steps back would not get on, and for how long it is not to; `before`: how it had when that was seen last."""
        self._looked, self._not_before = now, now + _LOOK
        try:
            self._waits = count_waits()
            if count_running() > _CROWD:
                return True
        except OSError:  # no file left, so nobody could see it
            return True
        if before is not None:
            waited = self._waits.seconds - before.seconds
            if waited > min(_TOO_LONG * (self._waits.times - before.times), 2 * _LOOK):
                self._not_before = now + _PAUSE
                return True
        return False

    def _end(self, how: Background) -> None:
        trio.lowlevel.remove_instrument(self)
        how.end()
