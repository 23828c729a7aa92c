"""How fast repairs are made: an accident is mended at once, a fight is not fought as fast as it can be."""

from __future__ import annotations

import pytest

from tproxyd.interceptor.pace import RepairPace


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def repair(pace: RepairPace, clock: Clock) -> float:
    """One repair of a rule, as soon as it is ready; how long that took."""
    began = clock.now
    while not (ready := pace.ready(["rule"], clock.now)):
        wait = pace.wait(clock.now)
        assert wait
        clock.now += wait
    pace.note(ready)
    pace.done(ready)
    return round(clock.now - began, 3)


def test_the_pause_grows_with_the_repairs_of_the_last_minute_and_is_forgotten_with_them() -> None:
    pace = RepairPace(clock := Clock())
    assert [repair(pace, clock) for _ in range(6)] == [0] * 6
    assert [repair(pace, clock) for _ in range(3)] == [0.02, 0.04, 0.06]
    assert max(repair(pace, clock) for _ in range(100)) == 0.4
    assert [repair(pace, clock) for _ in range(3)] == [0.4, 5.0, 5.0]
    clock.now += 61
    assert repair(pace, clock) == 0


def test_kinds_wait_by_themselves_and_what_is_not_needed_any_more_is_not_waited_for() -> None:
    pace = RepairPace(clock := Clock())
    for _ in range(10):
        repair(pace, clock)
    assert pace.ready(["rule", "route"], clock.now) == ["route"]
    assert pace.wait(clock.now) == 0
    pace.done(["route"])
    assert pace.wait(clock.now) == pytest.approx(0.1)
    assert pace.ready([], clock.now + 1) == []
    assert pace.wait(clock.now + 1) is None
