"""Many workloads, and workloads that come and go all day: how fast, what each costs, and that nothing of them is left."""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest
import trio

from netns_tests.pods import CONFIG, Pod, ask, open_pods, path_of, served_right
from netns_tests.watch import files_of, pss_kib, relay_processes, until
from tproxyd import Interceptor, Record, open_interceptor
from tproxyd.testing import serve_identity
from tproxyd.testing.plugin import OpenLab

SECONDS = 10.0  # for 200
KIB = 300  # of each
HEAPS = 16 * 1024  # KiB that the heaps of threads and what all of them share take, however many there are
THREADS = 16  # more than that would be one for each of them


@contextmanager
def cheap_collections() -> Iterator[None]:
    """The objects of a lab of hundreds of nodes are not gone through again and again."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def test_200_workloads_at_once_and_each_is_served_as_if_it_were_alone(
    open_lab: OpenLab, nursery: trio.Nursery, counted: Callable[[int], int]
) -> None:
    """Added in time, little memory each, right in both families, counted apart; then gone without a trace (`open_pods` looks)."""
    count = counted(200)
    records: list[Record] = []
    async with open_pods(open_lab, count) as pods, open_interceptor(CONFIG, on_record=records.append) as interceptor:
        for pod in pods:
            await nursery.start(serve_identity, pod.node, 8080)
        wanted = {pod.name: path_of(pod.node) for pod in pods}
        with cheap_collections():
            files, memory, began = len(os.listdir("/proc/self/fd")), own_kib(), time.monotonic()
            await interceptor.sync_workloads(wanted)
            took, grown = time.monotonic() - began, own_kib() - memory
        files_each = (len(os.listdir("/proc/self/fd")) - files) / count
        print(f"{count} workloads added in {took:.2f} s; {grown / count:.0f} KiB and {files_each:.1f} files each")
        assert interceptor.troubles == {}
        assert set(interceptor.workloads) == wanted.keys()
        for pod in pods:
            await served_right(pod)
        await until(lambda: len(records) == 2 * count)
        assert Counter(record.workload for record in records) == dict.fromkeys(wanted, 2)
        assert {name: counters.accepted for name, counters in (await interceptor.stats()).items()} == dict.fromkeys(
            wanted, 2
        )
        threads, began = len(os.listdir("/proc/self/task")), time.monotonic()
        await interceptor.sync_workloads({})
        print(f"removed in {time.monotonic() - began:.2f} s")
        assert await interceptor.stats() == {}
        await until(lambda: len(os.listdir("/proc/self/fd")) == files)  # the servers' connections have ended, too
        assert len(os.listdir("/proc/self/task")) <= threads + THREADS  # idle ones are kept for some seconds
    assert took < SECONDS * count / 200 + 1
    assert grown < KIB * count + (HEAPS if count < 200 else 0)


def own_kib() -> int:
    return pss_kib([os.getpid()], anonymous=True)


@asynccontextmanager
async def clients(*pods: Pod) -> AsyncIterator[list[int]]:
    """Four clients that connect, ask and leave in a loop, of which none fails; how many times so far is in the list."""
    times = [0, 0, 0, 0]

    async def ask_again_and_again(number: int) -> None:
        pod, family = pods[number % len(pods)], ("v4", "v6")[number // 2]
        while True:
            own, seen, _ = await ask(pod, family=family)
            assert seen[0] == own[0]
            assert seen[1] != own[1]
            times[number] += 1

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(ask_again_and_again, number)
        yield times
        nursery.cancel_scope.cancel()


class Held:
    """What the program and its relay processes hold at a moment."""

    def __init__(self) -> None:
        gc.collect()
        pids = [os.getpid(), *relay_processes(os.getpid())]
        self.memory = pss_kib(pids, anonymous=True)
        self.threads = sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids)
        self.files = [files_of(pid) for pid in pids]

    def __str__(self) -> str:
        files = [sum(found.values()) for found in self.files]
        return f"{self.memory} KiB, {self.threads} threads, files {files}"


@pytest.mark.parametrize("number", [0, 2], ids=["thread", "processes"])
async def test_workloads_that_come_and_go_leave_nothing_and_fail_nobody(
    open_lab: OpenLab, nursery: trio.Nursery, counted: Callable[[int], int], number: int
) -> None:
    total = counted(1000)
    config = CONFIG | {"relay": {"workers": number}}
    async with open_pods(open_lab, 6) as (one, other, *coming), open_interceptor(config) as interceptor:
        for pod in (one, other):
            await nursery.start(serve_identity, pod.node, 8080)
            await interceptor.add_workload(pod.name, netns=pod.netns)
        before = [await pod.node.dump() for pod in coming]
        for pod in coming:
            await nursery.start(serve_identity, pod.node, 8080)
        early = await churn_beside_clients(interceptor, (one, other), coming, range(total // 10))
        late = await churn_beside_clients(interceptor, (one, other), coming, range(total // 10, total))
        assert interceptor.workloads == (one.name, other.name)
        assert set(await interceptor.stats()) == {one.name, other.name}
        for pod, state in zip(coming, before, strict=True):
            assert await pod.node.dump() == state
        await until(lambda: Held().files == early.files)
        assert (
            late.threads <= early.threads + 4
        )  # those of trio's are kept for some seconds, as many as were needed at once
        # The heaps of threads grow for some hundred turns; after that, 1 KiB a turn would be a leak.
        assert late.memory - early.memory < 6 * 1024 + total
        for pod in (one, other):
            await served_right(pod)


async def churn_beside_clients(interceptor: Interceptor, stay: tuple[Pod, ...], come: list[Pod], turns: range) -> Held:
    """What is held when all is quiet again."""
    began = time.monotonic()
    async with clients(*stay) as times:
        await churn(interceptor, come, turns)
        took = time.monotonic() - began
        assert min(times) > 3
    await until(lambda: interceptor.connections == 0)
    held = Held()
    print(f"{len(turns)} came and went in {took:.1f} s beside {sum(times)} connections of others; held: {held}")
    return held


async def churn(interceptor: Interceptor, pods: list[Pod], turns: range) -> None:
    """Each of them comes under a name that never was, four at a time, serves a client, and goes."""

    async def one(pod: Pod, own: range) -> None:
        for turn in own:
            name = f"pod-{turn:08}"
            await interceptor.add_workload(name, netns=pod.netns)
            await served_right(pod, ["v4"])
            await interceptor.remove_workload(name)

    async with trio.open_nursery() as nursery:
        for number, pod in enumerate(pods):
            nursery.start_soon(one, pod, turns[number :: len(pods)])
