"""A drain of workloads that look for handshakes under way, while other things happen to them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio

from netns_tests.pods import CONFIG, Pod, Slow, listen_to_events, open_pods
from netns_tests.watch import until, works
from tproxyd import KernelError, open_interceptor
from tproxyd.interceptor import capture
from tproxyd.net import namespaces
from tproxyd.net.proc_net import half_open_connections
from tproxyd.testing import serve_echo
from tproxyd.testing.plugin import OpenLab

NO_ACK = "table inet lossy { chain out { type filter hook output priority 0; tcp flags & (syn | ack) == ack drop; }; }"


@asynccontextmanager
async def handshake_under_way(pod: Pod) -> AsyncIterator[None]:
    """The client's last packet of it is lost, again and again: a drain looks for it until it has stopped for three seconds."""
    await pod.client.run("nft", NO_ACK)
    async with await pod.connect():
        await until(lambda: pod.node.call(partial(half_open_connections, lambda port: port == 8080)))
        yield
    await pod.client.run("nft", "delete table inet lossy")


class Looks:
    """Counts those into a namespace."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        look = namespaces.call_in_namespace

        def counting(*args: Any) -> Any:
            self.count += 1
            return look(*args)

        monkeypatch.setattr(capture, "call_in_namespace", counting)


@pytest.mark.parametrize("how", ["removed", "ended"])
async def test_a_drain_does_not_look_at_a_namespace_that_is_given_up_meanwhile(
    open_lab: OpenLab,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    """The descriptor's number may be another namespace's by then. And nobody is waited for who is gone."""
    async with open_pods(open_lab, 1) as (pod,):
        await nursery.start(serve_echo, pod.node, 8080)
        drained = trio.Event()

        async with trio.open_nursery() as others:

            async def drain() -> None:
                await interceptor.drain()
                drained.set()

            async with open_interceptor(CONFIG) as interceptor:
                await interceptor.add_workload(pod.name, netns=pod.netns)
                async with handshake_under_way(pod):
                    looks = Looks(monkeypatch)
                    others.start_soon(drain)
                    await until(lambda: looks.count)
                    if how == "removed":
                        await interceptor.remove_workload(pod.name)
                        with trio.fail_after(0.5):
                            await drained.wait()
            with trio.fail_after(0.5):
                await drained.wait()
        assert "cannot look" not in caplog.text


async def test_nothing_begins_to_be_captured_while_all_others_are_drained(
    open_lab: OpenLab, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what is tried again, nor what is being added, nor what comes: its clients would be reset at the end of the block."""
    async with (
        open_pods(open_lab, 4) as (live, late, again, new),
        open_interceptor(CONFIG) as interceptor,
        listen_to_events(interceptor) as seen,
    ):
        await nursery.start(serve_echo, live.node, 8080)
        await interceptor.add_workload(live.name, netns=live.netns)
        capturing = interceptor.plan(live.name)
        with again.node.listen("127.0.0.1", 15006).socket:
            await interceptor.sync_workloads({live.name: live.netns, again.name: again.netns})
        slow = Slow(monkeypatch)
        async with trio.open_nursery() as others, await live.connect() as stream:
            await works(stream)
            others.start_soon(partial(interceptor.add_workload, late.name, netns=late.netns))
            await until(slow.begun.is_set)
            others.start_soon(interceptor.drain)
            await seen.until("removed", again.name)
            slow.may_go_on.set()
            await seen.until("added", late.name)
            await until(lambda: interceptor.plan(late.name) != capturing)
            with pytest.raises(KernelError, match="the interceptor is draining"):
                await interceptor.add_workload(new.name, netns=new.netns)
            await works(stream)
        assert {late.name, live.name} == set(interceptor.workloads)
        await interceptor.add_workload(new.name, netns=new.netns)  # it is over


async def test_a_drain_looks_seldom_while_nothing_moves(
    open_lab: OpenLab, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look is two threads and a table of all sockets, and there may be hundreds of workloads."""
    async with open_pods(open_lab, 2) as pods, open_interceptor(CONFIG) as interceptor:
        for pod in pods:
            await nursery.start(serve_echo, pod.node, 8080)
            await interceptor.add_workload(pod.name, netns=pod.netns)
        async with handshake_under_way(pods[0]), handshake_under_way(pods[1]):
            looks = Looks(monkeypatch)
            with trio.fail_after(6):
                await interceptor.drain()
        assert looks.count < 2 * 20  # of 2 * 150, every 20 ms
