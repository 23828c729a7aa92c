"""The relay loops of an interceptor, from trio: started, given workloads to serve, asked, and ended, all of them together. What one of them is told and
tells is `loop_owner`'s. What loops tell costs this side a wake-up every 50 ms, however many connections they serve.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

import trio

from tproxyd.datapath import Counters, LivingConnection, Setup, WorkloadSetup
from tproxyd.datapath.listing import Filter
from tproxyd.errors import KernelError
from tproxyd.interceptor.loop_owner import LoopOwner, Served
from tproxyd.interceptor.tally import OnLines, merge_counters
from tproxyd.proxy import Policy, Receivers

__all__ = ["Relays", "first_of"]

E = TypeVar("E", bound=BaseException)


class Relays:
    """One loop a setup, in a process if `setup.alone` and else in a thread. Each serves every workload, on listeners of its own.

    `on_lines` gets the records of ended connections, as whole lines of JSON, several at a time; it must not block. `policy` is asked
    about every connection that the configuration does not refuse, if the setups say so, and has `policy_timeout` seconds.
    """

    def __init__(
        self,
        setups: Sequence[Setup],
        on_lines: OnLines,
        *,
        policy: Policy | None = None,
        policy_timeout: float = 1.0,
    ) -> None:
        self._receivers = Receivers()
        self._relays = [
            LoopOwner(setup, on_lines, policy, policy_timeout, self._receivers, self._count_ended) for setup in setups
        ]
        self._ended = trio.Event()
        self._ended_loops = 0

    @property
    def active(self) -> int:
        """Connections that live, as far as has been told: some hundredths of a second ago."""
        return sum(counters.active for relay in self._relays for counters in relay.tally.counters.values())

    async def add(
        self, setup: WorkloadSetup, listeners: Sequence[Sequence[socket.socket]], netns: int, *, paused: bool = False
    ) -> None:
        """Lets each loop serve one more workload, on as many listeners each; `netns` is a descriptor of its namespace. All of them stay the caller's,
        who closes them after `remove`. `paused`: clients wait in the queues until `resume`. Raises KernelError when a loop cannot serve it; then none does."""
        try:
            async with trio.open_nursery() as nursery:
                for relay, own in zip(self._relays, listeners, strict=True):
                    nursery.start_soon(relay.add, Served(setup, tuple(own), netns), paused)
        except BaseException as error:
            with trio.CancelScope(shield=True):
                await self.remove(setup.name)
            known = first_of(error, KernelError)
            if known is not None:
                raise known from None
            raise

    async def replace(self, setup: WorkloadSetup, listeners: Sequence[Sequence[socket.socket]], netns: int) -> None:
        """Lets each loop serve a workload that it serves already under another setup, of another generation. Who lives stays under the one to which it
        came. Raises KernelError when a loop cannot; the caller then puts the old setup back in the same way, under one more generation."""
        try:
            async with trio.open_nursery() as nursery:
                for relay, own in zip(self._relays, listeners, strict=True):
                    nursery.start_soon(relay.replace, Served(setup, tuple(own), netns))
        except BaseException as error:
            known = first_of(error, KernelError)
            if known is not None:
                raise known from None
            raise

    async def put_back(self, setup: WorkloadSetup, listeners: Sequence[Sequence[socket.socket]], netns: int) -> None:
        """The same, without a wait for the loops' answers: they take what is said to them in its order."""
        for relay, own in zip(self._relays, listeners, strict=True):
            await relay.put_back(Served(setup, tuple(own), netns))

    async def let_go(self, name: str, seconds: float) -> None:
        """Gives the connections that came under older setups, and that the present one would not capture, so many seconds."""
        for relay in self._relays:
            await relay.let_go(name, seconds)

    async def shed(self, setup: WorkloadSetup, listeners: Sequence[Sequence[socket.socket]]) -> None:
        """Returns when nobody waits any more at listeners other than these, and the loops have closed theirs; cancelled, that is left to them."""
        try:
            async with trio.open_nursery() as nursery:
                for relay, own in zip(self._relays, listeners, strict=True):
                    nursery.start_soon(relay.shed, setup, tuple(own))
        finally:
            for relay, own in zip(self._relays, listeners, strict=True):
                relay.forget_listeners(setup, tuple(own))

    async def tune(self, setups: Sequence[Setup]) -> None:
        """Limits and time-outs of these setups from now on, one of each loop; for who lives, too."""
        for relay, setup in zip(self._relays, setups, strict=True):
            await relay.tune(setup)

    async def wait_retired(self, name: str, generation: int) -> None:
        """Returns when no connection lives any more that came under this generation of a workload's setup, or the workload is removed."""
        async with trio.open_nursery() as nursery:
            for relay in self._relays:
                nursery.start_soon(relay.wait_retired, name, generation)

    async def remove(self, name: str) -> None:
        """Resets what lives of a workload, and serves it no more. Harmless where there is none of this name."""
        async with trio.open_nursery() as nursery:
            for relay in self._relays:
                nursery.start_soon(relay.remove, name)

    async def retire(self, name: str) -> None:
        """Accepts nothing of a workload any more, whose listeners somebody else serves; what lives goes on."""
        for relay in self._relays:
            await relay.retire(name)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Starts the loops, tells when each has answered, and keeps them running until cancelled; then ends them, which resets
        their connections. Raises KernelError when they cannot be started, or die again and again."""
        try:
            async with trio.open_nursery() as nursery:
                async with trio.open_nursery() as starting:
                    for relay in self._relays:
                        starting.start_soon(nursery.start, relay.serve)
                task_status.started()
        finally:
            self._receivers.close()
            self._ended.set()

    async def ended(self) -> None:
        """Returns when no loop and no connection is left. So has `serve` then, unless a handler of the program goes on although it was cancelled."""
        await self._ended.wait()

    def _count_ended(self) -> None:
        self._ended_loops += 1
        if self._ended_loops == len(self._relays):
            self._ended.set()

    async def wait_idle(self, name: str) -> None:
        """Returns when no loop has a connection of this workload left; what waits to be accepted is accepted first."""
        async with trio.open_nursery() as nursery:
            for relay in self._relays:
                nursery.start_soon(relay.wait_idle, name)

    async def wait_old(self, name: str) -> None:
        """Returns when the connections of this workload that live now have ended; others are accepted meanwhile."""
        async with trio.open_nursery() as nursery:
            for relay in self._relays:
                nursery.start_soon(relay.wait_old, name)

    async def pause(self, name: str) -> None:
        """Accepts no more for this workload: clients wait in the listeners' queues."""
        for relay in self._relays:
            await relay.pause(name)

    async def resume(self, name: str) -> None:
        """Accepts those who wait, and all others from now on."""
        for relay in self._relays:
            await relay.resume(name)

    async def answer(self) -> None:
        """Returns when every loop has answered a question that is asked now. For as long as one does not, or is not there, it waits."""
        async with trio.open_nursery() as nursery:
            for relay in self._relays:
                nursery.start_soon(relay.answer)

    async def count(self) -> dict[str, Counters]:
        """By workload, the counters of all loops together, with what living connections have moved so far."""
        async with trio.open_nursery() as nursery:
            for relay in self._relays:
                nursery.start_soon(relay.count)
        totals = [relay.tally.total for relay in self._relays]
        names = dict.fromkeys(name for total in totals for name in total)
        return {name: merge_counters([total[name] for total in totals if name in total]) for name in names}

    async def pages(self, which: Filter) -> AsyncGenerator[list[LivingConnection], None]:
        """Living connections, page by page, those of one loop after the other's. Raises KernelError when a loop does not answer."""
        for relay in self._relays:
            async with aclosing(relay.pages(which)) as pages:
                async for page in pages:
                    yield page

    async def close(self, identity: str) -> bool:
        """Resets a connection on both sides, outcome `drained`; whether there was one of this identity. Raises KernelError as above."""
        for relay in self._relays:
            if await relay.close(identity):
                return True
        return False

    @property
    def records_dropped(self) -> int:
        """Lines of the access log for which nobody had room."""
        return sum(relay.tally.records_dropped for relay in self._relays)


def first_of(error: BaseException, kind: type[E]) -> E | None:
    """The first exception of this kind in what a nursery has raised."""
    if isinstance(error, kind):
        return error
    for one in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        if (found := first_of(one, kind)) is not None:
            return found
    return None
