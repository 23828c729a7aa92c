"""A thread that makes do with what is left of the CPU: SCHED_IDLE (sched(7)), for as long as it wants.

The kernel takes such a thread off its core as soon as another one of its cgroup wants it, which neither nice nor SCHED_BATCH does: with those, who has the
core keeps it for some milliseconds. Measured in docs/performance.md, "Beside abuse".
"""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from contextvars import ContextVar
from typing import NamedTuple

from tproxyd.net.capabilities import missing_capabilities

__all__ = ["Background", "Waits", "background", "count_waits", "find_background", "may_wait"]


class Background:
    """How the threads of this process step back, and come back. `usual` is the policy that they have otherwise, `needs` the capability that coming back
    takes, if any; `wanted`: whether to step back now."""

    def __init__(self, usual: int, needs: tuple[str, ...] = ()) -> None:
        self.usual = usual
        self.needs = needs
        self.wanted = False

    def enter(self) -> bool:
        """For the calling thread. What it holds meanwhile, others wait for; threads and processes that it starts have stepped back, too. Whether it has: not
        where it could not come back any more, because somebody has given it another nice value, or another limit."""
        if not self.needs and not _limit_is_enough():
            return False
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        os.sched_yield()  # who waits for this core already would wait for the next tick
        return True

    def leave(self) -> None:
        """For the calling thread, whether it has entered, or has been started by one that had, or neither."""
        with suppress(
            PermissionError
        ):  # it has been given a smaller nice value meanwhile: it goes on with what is left
            os.sched_setscheduler(0, self.usual, os.sched_param(0))


background: ContextVar[Background | None] = ContextVar("background", default=None)
"""Set for all tasks of a process whose threads may step back."""

may_wait: ContextVar[bool] = ContextVar("may_wait", default=False)
"""Set for tasks of which threads that do a step for them (`in_thread`) may step back as well: not for repairs, nor for orders."""


def find_background() -> Background | None:
    """None where a thread could not come back: that takes RLIMIT_NICE, which is raised if this process may (CAP_SYS_RESOURCE), or CAP_SYS_NICE; where an
    administrator has chosen another policy than the usual ones; and where a filter of system calls forbids it. While there is one thread."""
    try:
        usual = os.sched_getscheduler(0)
        count_waits()
    except OSError:
        return None
    if usual not in (os.SCHED_OTHER, os.SCHED_BATCH):
        return None
    _raise_limit()
    needs = () if _limit_is_enough() else ("CAP_SYS_NICE",)
    if missing_capabilities(needs):
        return None
    found = Background(usual, needs)
    return found if _comes_back(found) else None


def _comes_back(how: Background) -> bool:
    """Tried in a process that may be lost: a system call may be forbidden, and root of a user namespace seems to have the capability."""
    child = os.fork()
    if not child:
        came_back = False
        try:
            if how.enter():
                how.leave()
                came_back = os.sched_getscheduler(0) == how.usual
        finally:
            os._exit(not came_back)
    return os.waitpid(child, 0)[1] == 0


def _limit_is_enough() -> bool:
    soft, _ = resource.getrlimit(resource.RLIMIT_NICE)
    return soft == resource.RLIM_INFINITY or soft >= _needed_limit()


def _needed_limit() -> int:
    return 20 - os.getpriority(os.PRIO_PROCESS, 0)  # setrlimit(2): RLIMIT_NICE of that nice value


def _raise_limit() -> None:
    """As far as this process may: the hard limit takes CAP_SYS_RESOURCE."""
    if not _limit_is_enough():
        needed, (_, hard) = _needed_limit(), resource.getrlimit(resource.RLIMIT_NICE)
        with suppress(OSError, ValueError):
            resource.setrlimit(
                resource.RLIMIT_NICE, (needed, hard if hard == resource.RLIM_INFINITY else max(hard, needed))
            )


class Waits(NamedTuple):
    """How often the calling thread has been given a core, and for how many seconds it had been ready before, in all."""

    times: int
    seconds: float


def count_waits() -> Waits:
    """Raises OSError where the kernel does not tell."""
    with open("/proc/thread-self/schedstat", "rb") as file:
        _, waited, times = file.read().split()
    return Waits(int(times), int(waited) / 1e9)
