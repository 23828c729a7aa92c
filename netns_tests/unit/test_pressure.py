"""Stepping back where it goes wrong: whoever could not come back stays, and what cannot be looked at changes nothing."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import trio
import trio.testing

from tproxyd.daemon.pressure import Pressure
from tproxyd.net.scheduling import Background


@contextmanager
def soft_limit(which: int, value: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (soft, hard))


class Steps(Background):
    """Nobody steps back, but `wanted` tells."""

    def enter(self) -> bool:
        return True

    def leave(self) -> None:
        pass


def test_where_the_limit_has_been_lowered_since_a_thread_stays_as_it_is() -> None:
    usual = os.sched_getscheduler(0)
    with soft_limit(resource.RLIMIT_NICE, 0):
        assert not Background(usual).enter()
    assert os.sched_getscheduler(0) == usual


async def test_it_begins_lasts_and_ends_where_no_file_can_be_opened(autojump_clock: trio.testing.MockClock) -> None:
    how = Steps(os.SCHED_OTHER)
    pressure = Pressure(how)
    with soft_limit(resource.RLIMIT_NOFILE, 0):
        pressure.press()
        assert how.wanted
        await trio.sleep(0.7)  # it has been looked how the thread gets on
        assert how.wanted
        await trio.sleep(0.7)
        assert not how.wanted


async def test_where_it_would_be_of_no_use_nothing_changes() -> None:
    usual = os.sched_getscheduler(0)
    pressure = Pressure(None)
    pressure.begin()
    pressure.press()
    assert os.sched_getscheduler(0) == usual
    pressure.stop()
