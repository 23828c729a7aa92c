"""Stepping back where it goes wrong: whoever could not come back stays, and what cannot be looked at changes nothing."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

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


def test_where_the_limit_has_been_lowered_since_nobody_could_come_back() -> None:
    with soft_limit(resource.RLIMIT_NICE, 0):
        assert not Background(os.SCHED_OTHER).may_return()


async def test_where_it_would_be_of_no_use_nothing_changes() -> None:
    usual = os.sched_getscheduler(0)
    pressure = Pressure(None)
    pressure.begin()
    pressure.press()
    assert os.sched_getscheduler(0) == usual
    pressure.stop()
