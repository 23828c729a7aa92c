"""How fast what others do is answered: repairs of the kernel's state, and lines about it in the log. Knows a clock; refuses to know what is repaired."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable

__all__ = ["FewLines", "RepairPace"]

# Repairs of one kind in the last minute, and the pause before the next one: an accident is mended at once, a program that does it again and
# again is not answered as fast as it can, and one that never stops gets an answer every five seconds.
_MINUTE = 60.0
_FREE, _STEP, _USUAL_PAUSE = 5, 0.02, 0.4
_FIGHT, _LONG_PAUSE = 110, 5.0


class RepairPace:
    """Of each kind of repair by itself. All times are on `clock`, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._repaired: defaultdict[str, deque[float]] = defaultdict(deque)
        self._due: dict[str, float] = {}

    def ready(self, kinds: Iterable[str], now: float) -> list[str]:
        """Of those that are needed now, and no others any more: which may be made now."""
        self._due = {kind: self._due.get(kind, now + self._pause(kind)) for kind in kinds}
        return [kind for kind, due in self._due.items() if due <= now]

    def done(self, kinds: Iterable[str]) -> None:
        """They have been tried."""
        for kind in kinds:
            del self._due[kind]

    def note(self, kinds: Iterable[str]) -> None:
        """They have changed something, and count."""
        for kind in kinds:
            self._repaired[kind].append(self._clock())

    def wait(self, now: float) -> float | None:
        """Seconds until the next one of those that are needed is ready; None if there is none."""
        return min((due - now for due in self._due.values()), default=None)

    def _pause(self, kind: str) -> float:
        """Seconds before a repair of this kind."""
        times = self._repaired[kind]
        while times and times[0] < self._clock() - _MINUTE:
            times.popleft()
        if len(times) >= _FIGHT:
            return _LONG_PAUSE
        return min(max(0, len(times) - _FREE) * _STEP, _USUAL_PAUSE)


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
