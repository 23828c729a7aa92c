"""Workloads of an embedding program: added, replaced, removed, failed, tried again, vanished, drained; and what is told of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from netns_tests.pods import CONFIG, Pod, ask, listen_to_events, open_pods, path_of, served_right
from netns_tests.watch import files_of, resets_within, until, works
from tproxyd import (
    ConfigError,
    Handle,
    Interceptor,
    KernelError,
    MissingError,
    Workload,
    kernel,
    open_interceptor,
)
from tproxyd.proxy import Connection, ConnectionStream, Forward
from tproxyd.testing import Node, serve_echo, serve_identity
from tproxyd.testing.daemon import open_daemon
from tproxyd.testing.plugin import OpenLab

OTHER_PORT: dict[str, Any] = {"capture": {"ports": ["8081"]}}


def captured(node: Node) -> bool:
    return bool(node.call(kernel.observe).tables)


async def add(interceptor: Interceptor, *pods: Pod) -> None:
    for pod in pods:
        await interceptor.add_workload(pod.name, netns=pod.netns)


async def test_added_twice_is_harmless_by_whichever_name_its_namespace_has(
    open_lab: OpenLab, nursery: trio.Nursery
) -> None:
    async with open_pods(open_lab, 1) as (pod,), open_interceptor(CONFIG) as interceptor:
        await nursery.start(serve_echo, pod.node, 8080)
        await add(interceptor, pod)
        async with listen_to_events(interceptor) as seen, await pod.connect() as live:
            await works(live)
            held = await pod.node.dump()
            for where in (pod.netns, path_of(pod.node), Path(path_of(pod.node))):
                await interceptor.add_workload(pod.name, netns=where)
                await interceptor.sync_workloads({pod.name: where})
            await works(live)
            assert interceptor.workloads == (pod.name,)
            assert await pod.node.dump() == held
            assert seen.events == []


async def test_what_is_added_again_by_another_path_outlives_the_first_one(
    open_lab: OpenLab, nursery: trio.Nursery
) -> None:
    """A pod's first container ends, and the agent knows the namespace by the second one's process already."""
    async with open_pods(open_lab, 1) as (pod,), open_interceptor(CONFIG) as interceptor:
        await nursery.start(serve_echo, pod.node, 8080)
        async with pod.node.process("sleep", "60") as first, pod.node.process("sleep", "60") as second:
            await interceptor.add_workload(pod.name, netns=first.pid)
            async with listen_to_events(interceptor) as seen, await pod.connect() as live:
                await works(live)
                await interceptor.add_workload(pod.name, netns=second.pid)
                first.send_signal(signal.SIGKILL)
                await first.wait()
                await trio.sleep(1.2)  # more than a glance, at which nothing is to happen: there is no event for that
                await works(live)
                assert seen.events == []
                second.send_signal(signal.SIGKILL)
                await seen.until("vanished", pod.name)


async def test_the_same_name_with_another_namespace_replaces(open_lab: OpenLab, nursery: trio.Nursery) -> None:
    async with open_pods(open_lab, 2) as (one, other), open_interceptor(CONFIG) as interceptor:
        before = await one.node.dump()
        for pod in (one, other):
            await nursery.start(serve_echo, pod.node, 8080)
        await interceptor.add_workload("web", netns=one.netns)
        async with await one.connect() as live, listen_to_events(interceptor) as seen:
            await works(live)
            await interceptor.add_workload("web", netns=other.netns)
            assert await resets_within(live, 3)
            assert await one.node.dump() == before
            assert [event.kind for event in seen.events] == ["removed", "added"]
        async with await other.connect() as live:
            await works(live)
            await until(lambda: interceptor.connections == 1)
        assert interceptor.workloads == ("web",)


async def test_other_overrides_replace(open_lab: OpenLab, nursery: trio.Nursery) -> None:
    async with open_pods(open_lab, 1) as (pod,), open_interceptor(CONFIG) as interceptor:
        for port in (8080, 8081):
            await nursery.start(serve_identity, pod.node, port)
        await add(interceptor, pod)
        await served_right(pod)
        await interceptor.add_workload(pod.name, netns=pod.netns, overrides=OTHER_PORT)
        for port, intercepted in ((8080, False), (8081, True)):
            own, seen, _ = await ask(pod, port)
            assert (seen != own) == intercepted, port
        assert "8081" in interceptor.plan(pod.name).ruleset
        await interceptor.sync_workloads({pod.name: pod.netns})  # as it was
        await served_right(pod)


async def test_19_20_what_cannot_be_added_says_why_and_leaves_nothing(open_lab: OpenLab, tmp_path: Path) -> None:
    async with open_pods(open_lab, 2) as (pod, other), open_interceptor(CONFIG) as interceptor:
        before, files = await pod.node.dump(), files_of(os.getpid())

        async def fails(error: type[Exception], match: str, **options: Any) -> Exception:
            with pytest.raises(error, match=match) as caught:
                await interceptor.add_workload("web", **{"netns": pod.netns} | options)
            assert interceptor.workloads == ()
            assert interceptor.troubles == {}
            assert files_of(os.getpid()) == files
            return caught.value

        async with open_interceptor(CONFIG, name="mesh") as neighbour:
            files = files_of(os.getpid())
            await neighbour.add_workload("theirs", netns=pod.netns)
            files = files_of(os.getpid())
            await fails(KernelError, rf"an embedding program, .* \(pid {os.getpid()}, this very process\)")
        files = files_of(os.getpid())
        assert await pod.node.dump() == before
        async with open_daemon(pod.node, '[capture]\nports = ["8080"]\n') as daemon:
            files = files_of(os.getpid())
            await fails(KernelError, rf"\(pid {daemon.process.pid}\) serves this network namespace")
            assert await daemon.stop() == 0
        files = files_of(os.getpid())
        with pod.node.listen("127.0.0.1", 15006).socket:
            files = files_of(os.getpid())
            await fails(KernelError, rf"cannot listen on 127.0.0.1:15006: .*, by .*{os.getpid()}")
        files = files_of(os.getpid())
        (tmp_path / "stale").touch()
        await fails(MissingError, "there is no network namespace at", netns=tmp_path / "none")
        await fails(MissingError, "a stale /run/netns name is an empty file", netns=tmp_path / "stale")
        await fails(MissingError, "there is no process", netns=2**22 + 1)
        bad = {"capture": {"prots": ["1"], "mode": "tproxi"}, "upstream": {"source": "nobody"}}
        error = await fails(ConfigError, "workload 'web'", overrides=bad)
        assert isinstance(error, ConfigError)
        assert len(error.problems) == 3, error.problems
        assert all("workload 'web'" in problem for problem in error.problems), error.problems
        await fails(ConfigError, "`relay` is the same for all workloads", overrides={"relay": {"workers": 1}})
        await fails(ConfigError, "dial = 'nobody' is none of its values", dial="nobody")
        assert await pod.node.dump() == before
        await add(interceptor, pod, other)  # what was in the way is gone


async def test_overrides_that_capture_nothing_name_their_workload(open_lab: OpenLab) -> None:
    async with open_pods(open_lab, 1) as (pod,), open_interceptor({}) as interceptor:
        with pytest.raises(ConfigError, match=r"workload 'web': nothing to capture"):
            await interceptor.add_workload("web", netns=pod.netns)


async def test_sync_makes_a_snapshot_true(open_lab: OpenLab, nursery: trio.Nursery) -> None:
    """Adds, replaces, removes; what is the same keeps its connections."""
    async with open_pods(open_lab, 4) as pods, open_interceptor(CONFIG) as interceptor:
        stays, goes, changes, comes = pods
        before = await goes.node.dump()
        await interceptor.sync_workloads({pod.name: pod.netns for pod in (stays, goes, changes)})
        for pod in pods:
            await nursery.start(serve_echo, pod.node, 8080)
        async with await stays.connect() as live, await goes.connect() as ends, listen_to_events(interceptor) as seen:
            await works(live)
            await works(ends)
            await interceptor.sync_workloads(
                {
                    stays.name: stays.netns,
                    changes.name: Workload(netns=changes.netns, overrides=OTHER_PORT),
                    comes.name: path_of(comes.node),
                }
            )
            assert sorted((event.kind, event.workload) for event in seen.events) == sorted(
                [
                    ("removed", goes.name),
                    ("removed", changes.name),
                    ("added", changes.name),
                    ("added", comes.name),
                ]
            )
            await works(live)
            assert await resets_within(ends, 3)
        assert set(interceptor.workloads) == {stays.name, changes.name, comes.name}
        assert "8081" in interceptor.plan(changes.name).ruleset
        assert await goes.node.dump() == before


async def test_a_snapshot_with_a_bad_one_changes_nothing_and_names_every_problem(open_lab: OpenLab) -> None:
    async with open_pods(open_lab, 2) as (one, other), open_interceptor(CONFIG) as interceptor:
        await add(interceptor, one)
        bad: dict[str, Any] = {
            "a": Workload(netns=other.netns, overrides={"capture": {"prots": []}}),
            "b": Workload(netns=other.netns, dial="agent", overrides={"upstream": {"source": "client"}}),
            "": other.netns,
        }
        with pytest.raises(ConfigError) as caught:
            await interceptor.sync_workloads(bad | {other.name: other.netns})
        assert len(caught.value.problems) == 3
        assert interceptor.workloads == (one.name,)
        assert not captured(other.node)


async def test_what_cannot_be_captured_yet_is_tried_again_and_keeps_nobody(
    open_lab: OpenLab, nursery: trio.Nursery
) -> None:
    async with open_pods(open_lab, 2) as (busy, free), open_interceptor(CONFIG) as interceptor:
        await nursery.start(serve_identity, free.node, 8080)
        async with listen_to_events(interceptor) as seen:
            with busy.node.listen("127.0.0.1", 15006).socket:
                with trio.fail_after(5):
                    await interceptor.sync_workloads({pod.name: pod.netns for pod in (busy, free)})
                await served_right(free)
                failed = await seen.until("failed", busy.name)
                assert failed.retry == 1.0
                assert "cannot listen on 127.0.0.1:15006" in failed.detail
                assert interceptor.troubles == {busy.name: failed.detail}
                assert set(interceptor.workloads) == {busy.name, free.name}
                with pytest.raises(KernelError, match="is not captured at the moment"):
                    interceptor.plan(busy.name)
                assert not captured(busy.node)
                assert (await seen.until("failed", busy.name)).retry == 2.0
            await seen.until("added", busy.name)
            assert interceptor.troubles == {}
            await nursery.start(serve_identity, busy.node, 8080)
            await served_right(busy)
            await served_right(free)


async def test_what_is_tried_again_is_not_once_it_is_wanted_no_more(open_lab: OpenLab) -> None:
    async with open_pods(open_lab, 2) as (busy, other), open_interceptor(CONFIG) as interceptor:
        with busy.node.listen("127.0.0.1", 15006).socket:
            await interceptor.sync_workloads({busy.name: busy.netns})
            async with listen_to_events(interceptor) as seen:
                await interceptor.sync_workloads({other.name: other.netns})
                assert sorted((event.kind, event.workload) for event in seen.events) == [
                    ("added", other.name),
                    ("removed", busy.name),
                ]
        assert interceptor.workloads == (other.name,)
        assert interceptor.troubles == {}


async def test_a_snapshot_with_a_namespace_that_is_not_there_ends_what_had_the_name(
    open_lab: OpenLab, tmp_path: Path
) -> None:
    """It is told, and costs no other; nothing of the snapshot says that the old namespace is still wanted."""
    async with open_pods(open_lab, 2) as (one, other), open_interceptor(CONFIG) as interceptor:
        await interceptor.sync_workloads({"web": one.netns})
        async with listen_to_events(interceptor) as seen:
            await interceptor.sync_workloads({"web": tmp_path / "gone", other.name: other.netns})
            failed = await seen.until("failed", "web")
            assert failed.retry == 1.0
            assert "there is no network namespace at" in failed.detail
        assert set(interceptor.workloads) == {"web", other.name}
        assert not captured(one.node)


@contextmanager
def bound(node: Node, directory: Path) -> Iterator[Path]:
    """A name for its namespace, as `ip netns add` and CNI make it: a file on which it is mounted."""
    name = directory / "pod"
    name.touch()
    subprocess.run(["mount", "--bind", path_of(node), str(name)], check=True)
    try:
        yield name
    finally:
        if name.exists():
            subprocess.run(["umount", "--lazy", str(name)], check=True)


def unbind(name: Path) -> None:
    """Not lazily, as some do: then nobody may be in the way who has opened the name."""
    subprocess.run(["umount", str(name)], check=True)
    name.unlink()


@pytest.mark.parametrize("number", [0, 1], ids=["thread", "process"])
async def test_52_a_deleted_namespace_ends_its_workload_and_no_other(
    open_lab: OpenLab, nursery: trio.Nursery, tmp_path: Path, number: int
) -> None:
    config = CONFIG | {"relay": {"workers": number}}
    async with (
        open_pods(open_lab, 2) as (gone, stays),
        open_interceptor(config) as interceptor,
        listen_to_events(interceptor) as seen,
    ):
        for pod in (gone, stays):
            await nursery.start(serve_echo, pod.node, 8080)
        with bound(gone.node, tmp_path) as name:
            await interceptor.sync_workloads({gone.name: name, stays.name: stays.netns})
            async with await gone.connect() as ends, await stays.connect() as live:
                await works(ends)
                await works(live)
                unbind(name)
                await seen.until("vanished", gone.name)
                assert await resets_within(ends, 3)
                await works(live)
        assert interceptor.workloads == (stays.name,)
        assert not captured(gone.node)  # the lab's descriptor keeps it, so what would have been left is seen
        await interceptor.add_workload(gone.name, netns=gone.netns)


async def test_52_the_end_of_the_process_that_had_the_namespace_ends_its_workload(open_lab: OpenLab) -> None:
    async with (
        open_pods(open_lab, 2) as (one, other),
        open_interceptor(CONFIG) as interceptor,
        listen_to_events(interceptor) as seen,
        one.node.process("sleep", "60") as first,
        other.node.process("sleep", "60") as second,
    ):
        await interceptor.add_workload(one.name, netns=first.pid)
        await interceptor.add_workload(other.name, netns=f"/proc/{second.pid}/ns/net")
        for pod, process in ((one, first), (other, second)):
            process.send_signal(signal.SIGKILL)
            await process.wait()
            await seen.until("vanished", pod.name)
            assert not captured(pod.node)
        assert interceptor.workloads == ()


async def test_53_after_an_overrun_of_netlink_all_is_looked_at(open_lab: OpenLab, tmp_path: Path) -> None:
    """More news than fits, of what is none of ours, while the program does not take any; that of our rule, at the end, is lost."""
    flood = tmp_path / "flood"
    addresses = [f"address {verb} 203.0.113.{one}/32 dev eth0" for one in range(1, 250) for verb in ("add", "del")]
    flood.write_text("\n".join([*addresses * 10, "rule del priority 5234\n"]))
    async with (
        open_pods(open_lab, 1) as (pod,),
        open_interceptor(CONFIG) as interceptor,
        listen_to_events(interceptor) as seen,
    ):
        await add(interceptor, pod)
        held = await pod.node.dump()
        # Blocks this program, which is what makes it miss the news.
        pod.node.call(lambda: subprocess.run(["ip", "-batch", str(flood)], check=True))
        drift = await seen.until("drift", pod.name)
        assert "5234" in drift.detail
        await until(lambda: not interceptor.troubles)
        assert await pod.node.dump() == held


async def test_drift_in_a_workload_is_mended_and_told(open_lab: OpenLab, nursery: trio.Nursery) -> None:
    async with (
        open_pods(open_lab, 2) as (pod, other),
        open_interceptor(CONFIG) as interceptor,
        listen_to_events(interceptor) as seen,
    ):
        await add(interceptor, pod, other)
        await nursery.start(serve_echo, pod.node, 8080)
        held, theirs = await pod.node.dump(), await other.node.dump()
        async with await pod.connect() as live:
            await works(live)
            await pod.node.run("nft", "flush", "ruleset")
            drift = await seen.until("drift", pod.name, within=1.0)
            assert drift.detail.startswith("ruleset: ")
            assert await pod.node.dump() == held
            await works(live)
        assert await other.node.dump() == theirs
        assert seen.events == []


async def test_what_cannot_be_mended_yet_is_told_as_trouble(open_lab: OpenLab) -> None:
    """Somebody takes the name of our table for one that nobody else may change."""
    code = (
        "import sys\nfrom tproxyd.kernel import Library\n"
        "with open('/dev/null'):\n    nft = Library()\n"
        "nft.run('delete table inet tproxyd')\n"
        "nft.run('table inet tproxyd { flags owner; }')\n"
        "print('taken', flush=True)\nsys.stdin.read()\n"
    )
    async with (
        open_pods(open_lab, 1) as (pod,),
        open_interceptor(CONFIG) as interceptor,
        listen_to_events(interceptor) as seen,
    ):
        await add(interceptor, pod)
        held = await pod.node.dump()
        async with pod.node.process(sys.executable, "-c", code, collect=True, stdin=subprocess.PIPE) as squatter:
            await squatter.wait_for_output("taken")
            trouble = await seen.until("trouble", pod.name)
            assert trouble.detail
            assert interceptor.troubles == {pod.name: trouble.detail}
        await seen.until("drift", pod.name, within=10)
        assert interceptor.troubles == {}
        assert await pod.node.dump() == held


async def test_events_that_nobody_takes_are_dropped_and_counted(open_lab: OpenLab) -> None:
    off = {"capture": {"mode": "off"}}
    async with (
        open_pods(open_lab, 1) as (pod,),
        open_interceptor({}) as interceptor,
        interceptor.events() as events,
    ):
        for _ in range(600):
            await interceptor.add_workload(pod.name, netns=pod.netns, overrides=off)
            await interceptor.remove_workload(pod.name)
        first = await anext(events)
        assert first.missed == 1200 - 1024
        assert (await anext(events)).missed == 0


async def test_of_one_name_one_at_a_time_whoever_asks(open_lab: OpenLab) -> None:
    """Ten tasks add and remove two namespaces under one name: each is done, and at the end nothing is left."""
    async with open_pods(open_lab, 2) as pods, open_interceptor(CONFIG) as interceptor:

        async def churn(number: int) -> None:
            for turn in range(4):
                await interceptor.add_workload("web", netns=pods[(number + turn) % 2].netns)
                await interceptor.remove_workload("web")

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(churn, number)
        assert interceptor.workloads == ()
        assert not any(captured(pod.node) for pod in pods)


async def test_an_add_that_is_cancelled_is_not_what_the_next_one_finds(open_lab: OpenLab) -> None:
    """The next one must not take for its own what is being taken away."""
    async with open_pods(open_lab, 1) as (pod,), open_interceptor(CONFIG) as interceptor:
        for _ in range(5):
            with trio.move_on_after(0.001):
                await add(interceptor, pod)
            await add(interceptor, pod)
            await trio.sleep(0.05)  # what was cancelled has ended meanwhile
            assert interceptor.workloads == (pod.name,)
            assert captured(pod.node)
            await interceptor.remove_workload(pod.name)


async def test_removing_what_is_not_there_is_harmless() -> None:
    async with open_interceptor(CONFIG) as interceptor:
        await interceptor.remove_workload("nobody")
        await interceptor.remove_workload("nobody", drain=5)
        await interceptor.sync_workloads({})
        with pytest.raises(KeyError):
            interceptor.plan("nobody")


# Drain.


@pytest.mark.parametrize("number", [0, 2], ids=["thread", "processes"])
async def test_08_a_workload_is_drained_while_the_others_are_served(
    open_lab: OpenLab, nursery: trio.Nursery, number: int
) -> None:
    config = {"capture": {"ports": ["8080", "8081"]}, "relay": {"workers": number}}
    async with open_pods(open_lab, 2) as (one, other), open_interceptor(config) as interceptor:
        await add(interceptor, one, other)
        await nursery.start(serve_identity, one.node, 8081)
        for pod in (one, other):
            await nursery.start(serve_echo, pod.node, 8080)
        async with await one.connect() as ends, await other.connect() as live:
            await works(ends)
            await works(live)
            removed, capturing = trio.Event(), interceptor.plan(one.name)

            async def remove() -> None:
                await interceptor.remove_workload(one.name, drain=10)
                removed.set()

            nursery.start_soon(remove)
            await until(lambda: interceptor.plan(one.name) != capturing)
            own, seen, _ = await ask(one, 8081)
            assert seen == own  # new clients go directly
            await works(ends)
            assert not removed.is_set()
            await ends.send_eof()
            assert await ends.receive_some() == b""
            with trio.fail_after(2):
                await removed.wait()
            await works(live)
            async with await other.connect() as new:
                await works(new)


async def test_08_at_the_end_of_its_time_a_drained_workload_s_connections_are_reset(
    open_lab: OpenLab, nursery: trio.Nursery
) -> None:
    async with open_pods(open_lab, 1) as (pod,), open_interceptor(CONFIG) as interceptor:
        await add(interceptor, pod)
        await nursery.start(serve_echo, pod.node, 8080)
        async with await pod.connect() as stream:
            await works(stream)
            began = trio.current_time()
            await interceptor.remove_workload(pod.name, drain=0.5)
            assert 0.5 <= trio.current_time() - began < 2
            assert await resets_within(stream, 1)


async def test_08_all_workloads_are_drained_together(open_lab: OpenLab, nursery: trio.Nursery) -> None:
    async with open_pods(open_lab, 3) as pods, open_interceptor(CONFIG) as interceptor:
        await add(interceptor, *pods)
        drained = trio.Event()

        async def drain() -> None:
            await interceptor.drain()
            drained.set()

        async with AsyncExitStack() as stack:
            streams = []
            for pod in pods:
                await nursery.start(serve_echo, pod.node, 8080)
                streams.append(await stack.enter_async_context(await pod.connect()))
                await works(streams[-1])
            capturing = interceptor.plan(pods[0].name)
            nursery.start_soon(drain)
            await until(lambda: all(interceptor.plan(pod.name) != capturing for pod in pods))
            for stream in streams:
                assert not drained.is_set()
                await works(stream)
                await stream.send_eof()
                assert await stream.receive_some() == b""
            with trio.fail_after(2):
                await drained.wait()


# Handlers.


@asynccontextmanager
async def open_handling(handler: Callable[[ConnectionStream], Any], number: int = 0) -> AsyncIterator[Interceptor]:
    async def policy(connection: Connection) -> Handle:
        return Handle(handler)

    async with open_interceptor(CONFIG | {"relay": {"workers": number}}, policy=policy) as interceptor:
        yield interceptor


async def echo_back(stream: ConnectionStream) -> None:
    while chunk := await stream.receive_some():
        await stream.send_all(chunk)


@pytest.mark.parametrize("number", [0, 1], ids=["thread", "process"])
async def test_a_removed_workload_s_handlers_end_with_it_and_no_other_s(open_lab: OpenLab, number: int) -> None:
    """The client is reset as promised, and the record says what was moved."""
    async with open_pods(open_lab, 2) as (one, other), open_handling(echo_back, number) as interceptor:
        await add(interceptor, one, other)
        async with await one.connect() as ends, await other.connect() as live:
            await works(ends)
            await works(live)
            with trio.fail_after(2):
                await interceptor.remove_workload(one.name)
            assert await resets_within(ends, 1)
            await works(live)


async def test_draining_a_workload_waits_for_no_other_s_handlers(open_lab: OpenLab) -> None:
    async with open_pods(open_lab, 2) as (one, other), open_handling(echo_back) as interceptor:
        await add(interceptor, one, other)
        async with await one.connect() as ends, await other.connect() as live:
            await works(ends)
            await works(live)
            await ends.send_eof()
            assert await ends.receive_some() == b""
            with trio.fail_after(2):
                await interceptor.remove_workload(one.name, drain=30)
            await works(live)


@pytest.mark.parametrize("number", [0, 1], ids=["thread", "process"])
async def test_what_the_policy_forwards_after_its_workload_is_gone_is_dialled_nowhere(
    open_lab: OpenLab, nursery: trio.Nursery, number: int
) -> None:
    """Least of all from the namespace that has the descriptor's number now."""
    asked, answer = trio.Event(), trio.Event()

    async def policy(connection: Connection) -> Forward:
        if connection.workload == "pod-0":
            with trio.CancelScope(shield=True):
                asked.set()
                await answer.wait()
        return Forward()

    config = CONFIG | {"relay": {"workers": number}}
    async with (
        open_pods(open_lab, 3) as (gone, one, other),
        open_interceptor(config, policy=policy, policy_timeout=30) as interceptor,
    ):
        for pod in (gone, one, other):
            await nursery.start(serve_identity, pod.node, 8080)
        await add(interceptor, gone, one)
        async with await gone.connect() as stream:
            await asked.wait()
            with trio.fail_after(3):
                await interceptor.remove_workload(gone.name)
            await add(interceptor, other)
            answer.set()
            assert await resets_within(stream, 3)
        await served_right(one)
        await served_right(other)
        counted = await interceptor.stats()
        assert {name: counters.accepted for name, counters in counted.items()} == {one.name: 2, other.name: 2}


async def test_counters_and_plans_are_each_workload_s_own(open_lab: OpenLab, nursery: trio.Nursery) -> None:
    async with open_pods(open_lab, 2) as (one, other), open_interceptor(CONFIG) as interceptor:
        await add(interceptor, one, other)
        for pod, times in ((one, 1), (other, 3)):
            await nursery.start(serve_identity, pod.node, 8080)
            for _ in range(times):
                await served_right(pod, ["v4"])
        async with await one.connect() as living:
            await living.receive_some()
            await until(lambda: interceptor.connections == 1)
            counted = await interceptor.stats()
            assert {name: (counters.accepted, counters.active) for name, counters in counted.items()} == {
                one.name: (2, 1),
                other.name: (3, 0),
            }
            assert counted[other.name].outcomes == {"closed": 3}
            assert counted[one.name].bytes_from_upstream > counted[one.name].outcomes["closed"]
        assert interceptor.plan(one.name) == interceptor.plan(other.name)
        await interceptor.remove_workload(other.name)
        await add(interceptor, other)
        await served_right(other, ["v4"])
        assert (await interceptor.stats())[other.name].accepted == 1


async def test_a_handler_reaches_an_app_inside_its_workload(open_lab: OpenLab, nursery: trio.Nursery) -> None:
    """At a loopback address, which all of them have; `host` is the program itself."""

    async def to_the_app(stream: ConnectionStream) -> None:
        async with await interceptor.connect(stream.connection.workload, "127.0.0.1", 9000) as upstream:
            await stream.relay_to(upstream)

    async with open_pods(open_lab, 2) as pods, open_handling(to_the_app) as interceptor:
        for pod in pods:
            await nursery.start(partial(serve_identity, pod.node, 9000, address="127.0.0.1"))
        await add(interceptor, *pods)
        for pod in pods:
            _, (host, _), local = await ask(pod)
            assert (host, local) == ("127.0.0.1", "127.0.0.1:9000")
        with pytest.raises(OSError, match="refused"):
            await interceptor.connect("host", "127.0.0.1", 9000)
        with pytest.raises(KeyError):
            await interceptor.connect("nobody", "127.0.0.1", 9000)
