"""A thread that makes do with what is left of the CPU: SCHED_IDLE (sched(7)), for as long as it wants.

The kernel takes such a thread off its core as soon as another one of its cgroup wants it, which neither nice nor SCHED_BATCH does: with those, who has the
core keeps it for some milliseconds. Measured in docs/performance.md, "Beside abuse".
"""

from __future__ import annotations

import os
import resource
from contextvars import ContextVar
from typing import NamedTuple

from tproxyd.net.capabilities import missing_capabilities

__all__ = ["Background", "Waits", "background", "count_waits", "find_background", "may_wait"]


class Background:
    """How the threads of this process step back, and come back. `usual` is the policy that they have otherwise, `capability` what coming back takes, if
    anything; `wanted`: whether to step back now."""

    def __init__(self, usual: int, capability: str | None) -> None:
        self.usual = usual
        self.capability = capability
        self.wanted = False

    def enter(self) -> None:
        """For the calling thread. What it holds meanwhile, others wait for; threads and processes that it starts have stepped back, too."""
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        os.sched_yield()  # who waits for this core already would wait for the next tick

    def leave(self) -> None:
        """For the calling thread, whether it has entered or has been started by one that had."""
        os.sched_setscheduler(0, self.usual, os.sched_param(0))


background: ContextVar[Background | None] = ContextVar("background", default=None)
"""In the context of all work of a process whose threads may step back."""

may_wait: ContextVar[bool] = ContextVar("may_wait", default=False)
"""In the context of work that a thread of its own may do so."""


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
    capability = None if _raise_limit() else "CAP_SYS_NICE"
    if capability is not None and missing_capabilities([capability]):
        return None
    found = Background(usual, capability)
    return found if _comes_back(found) else None


def _comes_back(how: Background) -> bool:
    """Tried in a process that may be lost: root of a user namespace seems to have the capability."""
    child = os.fork()
    if not child:
        try:
            how.enter()
            how.leave()
        finally:
            os._exit(os.sched_getscheduler(0) != how.usual)
    return os.waitpid(child, 0)[1] == 0


def _raise_limit() -> bool:
    """Whether it is enough then."""
    needed = 20 - os.getpriority(os.PRIO_PROCESS, 0)  # setrlimit(2): RLIMIT_NICE of that nice value
    soft, hard = resource.getrlimit(resource.RLIMIT_NICE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return True
    try:
        enough = hard == resource.RLIM_INFINITY or hard >= needed
        resource.setrlimit(resource.RLIMIT_NICE, (needed, hard if enough else needed))
    except (OSError, ValueError):
        return False
    return True


class Waits(NamedTuple):
    """How often the calling thread has been given a core, and for how many seconds it had been ready before, in all."""

    times: int
    seconds: float


def count_waits() -> Waits:
    """Raises OSError where the kernel does not tell."""
    with open("/proc/thread-self/schedstat", "rb") as file:
        _, waited, times = file.read().split()
    return Waits(int(times), int(waited) / 1e9)
