"""Reloads that are asked for: one is made at a time, and one waits. Knows who waits for which; refuses to know what a reload is, and who asks.

Whoever asks while one is made wants what the files say by then, so there is to be another one; whoever asks while one waits gets that one's answer.
So a storm of requests is two reloads, and the last of them has seen the last change.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from tproxyd.errors import KernelError, TproxydError

__all__ = ["Asked", "Reloads"]


class Asked:
    """One reload, and what came of it. Several may wait for it."""

    def __init__(self) -> None:
        self._done = trio.Event()
        self._answer: str | TproxydError = ""

    async def wait(self) -> str:
        """The lines of what was changed. Raises the TproxydError for which nothing was."""
        await self._done.wait()
        if isinstance(self._answer, TproxydError):
            raise self._answer
        return self._answer

    def settle(self, answer: str | TproxydError) -> None:
        self._answer = answer
        self._done.set()


class Reloads:
    """`ask` from wherever; `serve` is the task that makes them."""

    def __init__(self) -> None:
        self._waiting: Asked | None = None
        self._more = trio.Event()
        self._idle = trio.Event()
        self._idle.set()

    def ask(self) -> Asked:
        """Never waits. Before `serve` runs, the reload waits for it."""
        if self._waiting is None:
            self._waiting = Asked()
            self._more.set()
        return self._waiting

    async def until_idle(self) -> None:
        """Returns when none is being made."""
        await self._idle.wait()

    async def serve(self, reload: Callable[[], Awaitable[str]]) -> None:
        """Makes one after the other, until cancelled. What `reload` raises on purpose is the answer, and has been told in the log by it."""
        while True:
            await self._more.wait()
            asked, self._waiting, self._more = self._waiting, None, trio.Event()
            assert asked is not None
            self._idle = trio.Event()
            answer: str | TproxydError = KernelError("the daemon ends, and reloads nothing any more")
            try:
                answer = await reload()
            except TproxydError as error:
                answer = error
            finally:
                self._idle.set()
                asked.settle(answer)
