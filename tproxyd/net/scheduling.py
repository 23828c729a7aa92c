"""A thread that makes do with what is left of the CPU: SCHED_IDLE (sched(7)), for as long as it wants.

The kernel takes such a thread off its core as soon as another one of its cgroup wants it, which neither nice nor SCHED_BATCH does: with those, who has the
core keeps it for some milliseconds. Measured in docs/performance.md, "Beside abuse".
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import NamedTuple

from tproxyd.net.capabilities import missing_capabilities

__all__ = [
    "Background",
    "Waits",
    "background",
    "came_back",
    "count_running",
    "count_waits",
    "find_background",
    "may_wait",
]


class Background:
    """How the threads of this process step back, and come back. `usual` is the policy that they have otherwise, `needs` the capability that coming back
    takes, if any; `wanted`: whether to step back now."""

    def __init__(self, usual: int, needs: tuple[str, ...] = ()) -> None:
        self.usual = usual
        self.needs = needs
        self.wanted = False
        self._nice = os.getpriority(os.PRIO_PROCESS, 0)

    def may_return(self) -> bool:
        """Whether the calling thread could: not since somebody has given it a smaller nice value than RLIMIT_NICE allows, or a smaller limit."""
        return bool(self.needs) or _limit_is_enough()

    def enter(self) -> None:
        """For the calling thread, while that is wanted. What it holds meanwhile, others wait for; threads and processes that it starts have stepped back, too."""
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        os.sched_yield()  # who waits for this core already would wait for the next tick
        if not self.wanted:  # `end` may have come before that
            self.leave()

    def leave(self, thread: int = 0) -> None:
        """For the calling thread, or another one of this process, whether it has entered or has been started by one that had."""
        try:
            os.sched_setscheduler(thread, self.usual, os.sched_param(0))
        except PermissionError:  # `may_return` does not hold any more: better that nice value than SCHED_IDLE for good
            os.setpriority(os.PRIO_PROCESS, thread, self._nice)
            os.sched_setscheduler(thread, self.usual, os.sched_param(0))

    def end(self) -> None:
        """For all threads of this process, and for programs that they have started: one that is in the middle of something holds what others wait for now, and
        does not get on where nothing is left of the CPU."""
        self.wanted = False
        for thread in threading.enumerate():
            if thread.native_id is not None:
                with suppress(ProcessLookupError):  # it has just ended
                    self._bring_back(thread.native_id)
                for child in _children(thread.native_id):
                    with suppress(OSError):  # as above, or has more capabilities than this process
                        self._bring_back(child)

    def _bring_back(self, thread: int) -> None:
        if os.sched_getscheduler(thread) == os.SCHED_IDLE:
            self.leave(thread)


def _children(thread: int) -> list[int]:
    try:
        with open(f"/proc/self/task/{thread}/children", "rb") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:  # it has just ended, there is no file left, or the kernel is without CONFIG_PROC_CHILDREN
        return []


background: ContextVar[Background | None] = ContextVar("background", default=None)
"""In the context of all work of a process whose threads may step back."""

may_wait: ContextVar[bool] = ContextVar("may_wait", default=False)
"""In the context of work that a thread of its own may do so."""


@contextmanager
def came_back() -> Iterator[None]:
    """The calling thread has not stepped back for the length of the block, so what it starts has not either."""
    how = background.get()
    if how is not None and how.wanted:
        how.leave()
    try:
        yield
    finally:
        if how is not None and how.wanted:
            how.enter()


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
        failed = how.wanted = True
        try:
            how.enter()
            how.leave()
            failed = os.sched_getscheduler(0) != how.usual
        finally:
            os._exit(failed)
    try:
        return os.waitpid(child, 0)[1] == 0
    except ChildProcessError:
        return False  # whoever has started this process has let SIGCHLD be ignored, and nobody is told how a child has ended


def _limit_is_enough() -> bool:
    soft, _ = resource.getrlimit(resource.RLIMIT_NICE)
    return soft == resource.RLIM_INFINITY or soft >= _needed_limit()


def _needed_limit() -> int:
    return 20 - os.getpriority(os.PRIO_PROCESS, 0)  # setrlimit(2): RLIMIT_NICE of that nice value


def _raise_limit() -> None:
    """As far as this process may: the hard limit takes CAP_SYS_RESOURCE."""
    if not _limit_is_enough():
        needed, (_, hard) = _needed_limit(), resource.getrlimit(resource.RLIMIT_NICE)
        most = hard if hard == resource.RLIM_INFINITY else max(hard, needed)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NICE, (needed, most))


class Waits(NamedTuple):
    """How often the calling thread has been given a core, and for how many seconds it had been ready before, in all."""

    times: int
    seconds: float


def count_waits() -> Waits:
    """Raises OSError where the kernel does not tell."""
    with open("/proc/thread-self/schedstat", "rb") as file:
        _, waited, times = file.read().split()
    if times == b"0":  # it runs, so it has been given one: a kernel without CONFIG_SCHEDSTATS
        raise OSError(errno.ENODATA, "the kernel does not count how long a thread waits for a core")
    return Waits(int(times), int(waited) / 1e9)


def count_running() -> float:
    """How many threads of this machine run, or would, for each of its cores. Raises OSError."""
    with open("/proc/loadavg", "rb") as file:
        running, _, _ = file.read().split()[3].partition(b"/")
    return int(running) / (os.cpu_count() or 1)
