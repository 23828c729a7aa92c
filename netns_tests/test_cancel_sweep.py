"""An interceptor of other namespaces, cancelled and broken wherever that can happen: nothing of it is left anywhere, soon and always.

The sweep cancels a program at its n-th step, for one n after the other until it ends before it is cancelled. A step is what trio runs of
a task of this program between two waits, so every checkpoint that the program has gets its cancellation, those of the interceptor's own tasks included.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
import trio

import tproxyd
from tproxyd import kernel
from tproxyd.interceptor import Interceptor
from tproxyd.interceptor.relays import first_of
from tproxyd.interceptor.workloads import Event
from tproxyd.testing import Lab, Link, Topology, serve_identity
from tproxyd.testing.isolation import Holdings
from tproxyd.testing.plugin import OpenLab

PODS = Topology(
    links=tuple(
        Link(f"pod-{name}:eth0", f"client-{name}:eth0", v4="192.0.2.0/24", v6="2001:db8:1::/64") for name in "ab"
    )
)
NOTHING = kernel.Observed((), (), {})
# Seen on two shared cores: 0.2 s for the slowest. The bound is for machines that have other things to do.
SOON, EVER = 3.0, 30.0

pytestmark = pytest.mark.parametrize("workers", [0, 1], ids=["a thread", "a process"])


class CancelAt(trio.abc.Instrument):
    """Cancels at the n-th step of the task that makes it, and of those that come from it. `seen` are the steps so far, `at` is when it was done."""

    def __init__(self, step: int, scope: trio.CancelScope) -> None:
        self.step, self.scope, self.seen, self.at = step, scope, 0, 0.0
        self._tasks = {trio.lowlevel.current_task()}

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        nursery = task.parent_nursery
        if nursery is not None and nursery.parent_task in self._tasks:
            self._tasks.add(task)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task in self._tasks:
            self.seen += 1
            if self.seen == self.step:
                self.at = time.monotonic()
                self.scope.cancel()


@asynccontextmanager
async def cancelled_at(step: int) -> AsyncIterator[CancelAt]:
    """The block is cancelled at this step; then it ends, and nothing is raised."""
    with trio.CancelScope() as scope:
        instrument = CancelAt(step, scope)
        trio.lowlevel.add_instrument(instrument)
        try:
            yield instrument
        finally:
            trio.lowlevel.remove_instrument(instrument)


@pytest.fixture
async def pods(open_lab: OpenLab, nursery: trio.Nursery) -> AsyncIterator[Lab]:
    """Two namespaces with an app each, and a client of each."""
    async with open_lab(PODS) as lab:
        for name in "ab":
            await nursery.start(serve_identity, lab[f"pod-{name}"], 8080)
        yield lab
        nursery.cancel_scope.cancel()


def config(workers: int, **tables: Any) -> dict[str, Any]:
    return {"capture": {"ports": ["8080"]}, "relay": {"workers": workers}, **tables}


def open_interceptor(workers: int, **options: Any) -> AbstractAsyncContextManager[Interceptor]:
    return tproxyd.open_interceptor(config(workers), **options)


def where(pods: Lab, name: str) -> str:
    return f"/proc/self/fd/{pods[f'pod-{name}'].netns}"


async def passes(pods: Lab, name: str) -> str:
    """How the app of a pod sees a client of it: by an address and port."""
    async with await pods[f"client-{name}"].connect(pods[f"pod-{name}"].v4, 8080) as stream:
        await stream.send_all(b"x")
        peer: str = json.loads(await stream.receive_some())["peer"]
        own = stream.socket.getsockname()
        return "direct" if peer == f"{own[0]}:{own[1]}" else "captured"


async def is_as_before(pods: Lab, held: Holdings) -> list[str]:
    """What is otherwise, in words."""
    left = held.left_since(seconds=1)
    for node in (pods["pod-a"], pods["pod-b"]):
        if (state := await node.call_async(kernel.observe)) != NOTHING:
            left.append(f"{node}: {state}")
    if (state := await trio.to_thread.run_sync(kernel.observe)) != NOTHING:
        left.append(f"the program's own: {state}")
    return left


async def whole_life(pods: Lab, workers: int) -> None:
    """All that a program does with an interceptor."""
    async with open_interceptor(workers, on_record=lambda record: None) as interceptor:
        await interceptor.add_workload("a", netns=where(pods, "a"))
        await interceptor.sync_workloads({"a": where(pods, "a"), "b": where(pods, "b")})
        for name in "ab":
            assert await passes(pods, name) == "captured"
        await interceptor.reload(config(workers, listen={"port": 15007}, upstream={"source": "proxy"}))
        assert await passes(pods, "b") == "captured"
        await interceptor.remove_workload("a")
        assert await passes(pods, "a") == "direct"
        await interceptor.drain()


@pytest.mark.timed
async def test_61_cancelled_at_any_step_nothing_of_it_is_left(
    pods: Lab, workers: int, counted: Callable[[int], int]
) -> None:
    nodes = list(pods)
    before = [await node.dump() for node in nodes]
    await whole_life(pods, workers)  # what Python loads once it keeps
    stride, step, slowest = 10 // counted(10), 1, (0.0, 0)
    while True:
        held = Holdings.now()
        with trio.fail_after(EVER):
            async with cancelled_at(step) as instrument:
                await whole_life(pods, workers)
        if not instrument.at:
            break
        slowest = max(slowest, (time.monotonic() - instrument.at, step))
        assert await is_as_before(pods, held) == [], f"step {step}"
        step += stride
    print(
        f"{step} steps, one in {stride} cancelled; the slowest took {slowest[0] * 1000:.0f} ms, from step {slowest[1]}"
    )
    assert step > 60
    assert slowest[0] < SOON
    assert [await node.dump() for node in nodes] == before


async def add_a(interceptor: Interceptor, pods: Lab) -> None:
    await interceptor.add_workload("a", netns=where(pods, "a"))


async def remove_a(interceptor: Interceptor, pods: Lab) -> None:
    await interceptor.remove_workload("a", drain=1)


async def sync_b(interceptor: Interceptor, pods: Lab) -> None:
    await interceptor.sync_workloads({"b": where(pods, "b")})


async def drain_all(interceptor: Interceptor, pods: Lab) -> None:
    await interceptor.drain()


async def count_all(interceptor: Interceptor, pods: Lab) -> None:
    await interceptor.stats()


CALLS: Mapping[str, tuple[Callable[[Interceptor, Lab], Awaitable[None]], ...]] = {
    "add": (add_a,),
    "remove": (remove_a, add_a),  # the second prepares
    "sync": (sync_b, add_a),
    "drain": (drain_all, add_a),
    "stats": (count_all, add_a),
}


@pytest.mark.parametrize("call", [*CALLS])
async def test_61_a_call_that_is_cancelled_leaves_the_interceptor_usable(
    pods: Lab, workers: int, call: str, counted: Callable[[int], int]
) -> None:
    """What was asked for is done, is not done, or is asked for again at once: then it holds, and what is taken away is gone."""
    stride, step = 3 // counted(3), 1
    do, *prepare = CALLS[call]
    before, held = [await node.dump() for node in pods], Holdings.now()
    async with open_interceptor(workers) as interceptor:
        while True:
            for one in prepare:
                await one(interceptor, pods)
            with trio.fail_after(EVER):
                async with cancelled_at(step) as instrument:
                    await do(interceptor, pods)
                # With nothing in between.
                if call == "drain":  # which is the end of capture
                    await interceptor.remove_workload("a")
                await interceptor.add_workload("a", netns=where(pods, "a"))
            assert await passes(pods, "a") == "captured", f"step {step}"
            with trio.fail_after(EVER):
                await interceptor.sync_workloads({})
            assert interceptor.workloads == ()
            assert await passes(pods, "a") == "direct", f"step {step}"
            assert await pods["pod-a"].call_async(kernel.observe) == NOTHING, f"step {step}"
            assert interceptor.troubles == {}
            if not instrument.at:
                break
            step += stride
    assert step > 1
    assert await is_as_before(pods, held) == []
    assert [await node.dump() for node in pods] == before


async def test_61_events_go_on_after_a_wait_that_was_cancelled(pods: Lab, workers: int) -> None:
    held = Holdings.now()
    async with open_interceptor(workers) as interceptor, interceptor.events() as events:
        for _ in range(2):
            with trio.move_on_after(0) as scope:
                await anext(events)
            assert scope.cancelled_caught
        await interceptor.add_workload("a", netns=where(pods, "a"))
        with trio.fail_after(EVER):
            assert await anext(events) == Event("added", "a")
        await interceptor.remove_workload("a")
        await interceptor.add_workload("a", netns=where(pods, "a"))
        with trio.fail_after(EVER):
            for kind in ("removed", "added"):
                async for event in events:  # broken off: what comes after it is for who goes on
                    assert event == Event(kind, "a")
                    break
    assert await is_as_before(pods, held) == []


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
async def test_61_whatever_the_block_raises_everything_is_taken_away(
    pods: Lab, workers: int, raised: type[BaseException]
) -> None:
    before, held = [await node.dump() for node in pods], Holdings.now()
    with trio.fail_after(EVER), pytest.raises(BaseExceptionGroup) as caught:
        async with open_interceptor(workers) as interceptor:
            await interceptor.sync_workloads({name: where(pods, name) for name in "ab"})
            assert await passes(pods, "b") == "captured"
            raise raised("of the program")
    assert first_of(caught.value, raised) is not None
    assert await is_as_before(pods, held) == []
    assert [await node.dump() for node in pods] == before
