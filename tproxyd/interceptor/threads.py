"""Blocking steps of trio tasks that must not be left half done."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

from tproxyd.net.scheduling import background, came_back, may_wait

__all__ = ["in_thread"]

T = TypeVar("T")


async def in_thread(step: Callable[[], T], *, limiter: trio.CapacityLimiter | None = None) -> T:
    """Runs a step that blocks, to its end whatever is cancelled. Where the system has no thread left, it blocks us instead: rules
    that stay behind would be worse. `limiter`: of how many such steps may be taken at a time."""
    begun = False

    def begin() -> T:
        nonlocal begun
        begun = True
        how = background.get()
        if how is None:
            return step()
        # Whoever has started this thread may have stepped back.
        if not (how.wanted and may_wait.get()):
            how.leave()
            return step()
        how.enter()
        try:
            return step()
        finally:
            how.leave()  # the thread is used again

    # Shielded, because trio's own protection begins with the thread; before, a step that is promised to be done may be left out.
    with trio.CancelScope(shield=True):
        try:
            # A limiter of its own: the program around may have taken all tokens of the usual one.
            return await trio.to_thread.run_sync(begin, limiter=limiter or trio.CapacityLimiter(1))
        except RuntimeError:
            if begun:
                raise
    # "can't start new thread". As one would: a program that is started here, perhaps a new generation, must not be left behind.
    with came_back():
        return step()
