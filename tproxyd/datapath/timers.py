"""Coarse timers: a wheel for each kind of deadline, in which ten thousand waiting connections cost nothing per second.

A connection that lives is in one slot of one wheel. Activity does not move it: it only notes the time, and when the slot is due,
whoever was active meanwhile is put into the slot of its real deadline. So a connection is looked at about once in its time-out, and
entering and leaving are one set operation each. The price is precision: a deadline is met up to 1/32 of its length late.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

__all__ = ["Timed", "Wheel"]

_SLOTS = 32  # in one time-out: how late a deadline may be, against how many sets there are


class Timed:
    """What can wait in a wheel: `active` is when its time began to run, in seconds (monotonic), and `slot` where it is."""

    __slots__ = ("active", "slot")

    def __init__(self, active: float) -> None:
        self.active = active
        self.slot: set[Any] | None = None

    def leave_wheel(self) -> None:
        """Waits no more. Harmless when it did not wait."""
        if self.slot is not None:
            self.slot.discard(self)
            self.slot = None


T = TypeVar("T", bound=Timed)


class Wheel(Generic[T]):
    """Members whose time is up `seconds` after their `active`. `due` is when to call `expire` next; infinite without members."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._width = seconds / _SLOTS
        self._slots: dict[int, set[T]] = {}
        self.due = math.inf

    def add(self, member: T) -> None:
        """Lets the time of `member` run here; it leaves the wheel in which it was."""
        if member.slot is not None:
            member.slot.discard(member)
        number = int((member.active + self.seconds) / self._width) + 1
        slot = self._slots.get(number)
        if slot is None:
            slot = self._slots[number] = set()
            self.due = min(self.due, number * self._width)
        slot.add(member)
        member.slot = slot

    def change(self, seconds: float) -> None:
        """Another time-out, also for those who wait."""
        members = [member for slot in self._slots.values() for member in slot]
        self.seconds, self._width, self._slots, self.due = seconds, seconds / _SLOTS, {}, math.inf
        for member in members:
            member.slot = None
            self.add(member)

    def expire(self, now: float, *, also_active: bool = False) -> Iterator[T]:
        """Takes out and gives the members whose time is up. Those that were active meanwhile stay, unless `also_active`."""
        for number in sorted(number for number in self._slots if number * self._width <= now):
            slot = self._slots.pop(number)
            while slot:
                member = slot.pop()
                member.slot = None
                if also_active or member.active + self.seconds <= now:
                    yield member
                else:
                    self.add(member)
        self.due = min(self._slots, default=math.inf) * self._width
