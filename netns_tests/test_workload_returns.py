"""Workloads that a snapshot names before they are there, that go while they are added, and that change their names."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from netns_tests.pods import CONFIG, Slow, listen_to_events, open_pods, path_of, served_right
from netns_tests.watch import until, works
from tproxyd import KernelError, MissingError, Workload, open_interceptor
from tproxyd.net.namespaces import NamespaceLike
from tproxyd.testing import Node, serve_echo, serve_identity
from tproxyd.testing.plugin import OpenLab


def mount(node: Node, name: Path) -> None:
    """As `ip netns add` and CNI do it: a file first, and then the namespace over it."""
    name.touch()
    subprocess.run(["mount", "--bind", path_of(node), str(name)], check=True)


def unmount(name: Path) -> None:
    subprocess.run(["umount", str(name)], check=True)
    name.unlink()


async def test_a_namespace_that_is_mounted_after_the_snapshot_is_captured_without_another_one(
    open_lab: OpenLab, nursery: trio.Nursery, tmp_path: Path
) -> None:
    name = tmp_path / "web"
    async with (
        open_pods(open_lab, 2) as (pod, other),
        open_interceptor(CONFIG) as interceptor,
        listen_to_events(interceptor) as seen,
    ):
        for one in (pod, other):
            await nursery.start(serve_identity, one.node, 8080)
        with trio.fail_after(3):
            await interceptor.sync_workloads({"web": name, other.name: other.netns})
        failed = await seen.until("failed", "web")
        assert failed.retry == 1.0
        assert interceptor.troubles == {"web": failed.detail}
        assert set(interceptor.workloads) == {"web", other.name}
        await served_right(other)
        with pytest.raises(KernelError, match="is not there at the moment"):
            await interceptor.connect("web", "127.0.0.1", 8080)
        name.touch()  # and nothing is mounted yet
        again = await seen.until("failed", "web")
        assert again.retry == 2.0
        assert "a stale /run/netns name is an empty file" in again.detail
        mount(pod.node, name)
        try:
            await seen.until("added", "web")
            assert interceptor.troubles == {}
            await served_right(pod)
        finally:
            unmount(name)
        await seen.until("vanished", "web")


async def test_the_next_snapshot_does_not_wait_for_the_pause_of_the_last_one(open_lab: OpenLab, tmp_path: Path) -> None:
    """And it is no other workload: nothing is removed."""
    name = tmp_path / "web"
    async with (
        open_pods(open_lab, 1) as (pod,),
        open_interceptor(CONFIG) as interceptor,
        listen_to_events(interceptor) as seen,
    ):
        await interceptor.sync_workloads({"web": name})
        for retry in (1.0, 2.0, 4.0):
            assert (await seen.until("failed", "web")).retry == retry
        mount(pod.node, name)
        try:
            with trio.fail_after(2):  # of the four
                await interceptor.sync_workloads({"web": name})
            assert interceptor.troubles == {}
            assert interceptor.plan("web")
            await until(lambda: bool(seen.events))
            assert [event.kind for event in seen.events] == ["added"]
            await interceptor.sync_workloads({})
        finally:
            unmount(name)


async def test_what_is_not_there_is_tried_no_more_once_it_is_wanted_no_more(tmp_path: Path) -> None:
    async with open_interceptor(CONFIG) as interceptor, listen_to_events(interceptor) as seen:
        await interceptor.sync_workloads({"web": tmp_path / "web"})
        await interceptor.sync_workloads({})
        await until(lambda: len(seen.events) == 2)
        assert [event.kind for event in seen.events] == ["failed", "removed"]
        assert interceptor.workloads == ()


def ended_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


async def test_a_process_that_is_not_there_is_not_waited_for() -> None:
    """Its number may be another one's by then, and its namespace the host's."""
    pid = ended_process()
    async with open_interceptor(CONFIG) as interceptor, listen_to_events(interceptor) as seen:
        await interceptor.sync_workloads({"pid": pid, "path": f"/proc/{pid}/ns/net"})
        await until(lambda: len(seen.events) == 2)
        assert {(event.kind, event.workload, event.retry) for event in seen.events} == {
            ("failed", "pid", None),
            ("failed", "path", None),
        }
        assert interceptor.workloads == ()


@contextmanager
def no_file_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_snapshot_for_which_no_file_is_left_ends_nobody(
    open_lab: OpenLab, nursery: trio.Nursery, tmp_path: Path
) -> None:
    """What is captured is known by what it was given by; that it cannot be looked at does not make it go."""
    name = tmp_path / "web"
    async with (
        open_pods(open_lab, 2) as (pod, other),
        open_interceptor(CONFIG) as interceptor,
        other.node.process("sleep", "60") as resident,
    ):
        for one in (pod, other):
            await nursery.start(serve_echo, one.node, 8080)
        mount(pod.node, name)
        try:
            snapshot: dict[str, NamespaceLike | Workload] = {"web": name, "pid": resident.pid}
            await interceptor.sync_workloads(snapshot)
            async with (
                listen_to_events(interceptor) as seen,
                await pod.connect() as live,
                await other.connect() as alive,
            ):
                with no_file_left():
                    await interceptor.sync_workloads(snapshot)
                for stream in (live, alive):
                    await works(stream)
                assert seen.events == []
            await interceptor.sync_workloads({})
        finally:
            unmount(name)


async def test_a_workload_whose_namespace_goes_while_it_is_added_is_not_said_to_be_captured(
    open_lab: OpenLab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name, slow = tmp_path / "web", Slow(monkeypatch)
    async with open_pods(open_lab, 1) as (pod,), open_interceptor(CONFIG) as interceptor:
        mount(pod.node, name)

        async def add() -> None:
            with pytest.raises(MissingError, match="'web' has gone while it was being added"):
                await interceptor.add_workload("web", netns=name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(add)
            await until(slow.begun.is_set)
            unmount(name)
            await until(lambda: interceptor._workloads._there["web"].ends)
            slow.may_go_on.set()
        assert interceptor.workloads == ()


async def test_a_workload_that_is_added_while_the_interceptor_ends_is_not_said_to_be_captured(
    open_lab: OpenLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    async with open_pods(open_lab, 1) as (pod,), trio.open_nursery() as nursery:

        async def add() -> None:
            with pytest.raises(KernelError, match="the interceptor is closing"):
                await interceptor.add_workload("web", netns=pod.netns)

        async with open_interceptor(CONFIG) as interceptor:
            nursery.start_soon(add)
            await until(slow.begun.is_set)
            threading.Timer(0.1, slow.may_go_on.set).start()  # the end is under way by then


async def test_namespaces_that_change_their_names_in_one_snapshot_are_captured_at_once(open_lab: OpenLab) -> None:
    """They are free when those who had them have ended: nothing fails, and nothing waits for another try."""
    async with (
        open_pods(open_lab, 3) as (one, other, third),
        open_interceptor(CONFIG) as interceptor,
        listen_to_events(interceptor) as seen,
    ):
        await interceptor.sync_workloads({"a": one.netns, "b": other.netns, "c": third.netns})
        await until(lambda: len(seen.events) == 3)
        for last in ("d", "c") * 3:
            seen.events.clear()
            one, other = other, one
            await interceptor.sync_workloads({"a": one.netns, "b": other.netns, last: third.netns})
            assert interceptor.troubles == {}
            await until(lambda: len(seen.events) >= 6)
            assert sorted(event.kind for event in seen.events) == ["added"] * 3 + ["removed"] * 3, seen.events


async def test_what_is_given_up_before_anything_was_changed_leaves_nothing_and_says_nothing_of_the_kind(
    open_lab: OpenLab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It fails, and is wanted no more by then: "may be left" would have somebody look for what was never there."""
    async with open_pods(open_lab, 1) as (pod,), open_interceptor(CONFIG) as other, open_interceptor(CONFIG) as late:
        await other.add_workload(pod.name, netns=pod.netns)
        slow = Slow(monkeypatch)
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def add() -> None:
                with scope:
                    await late.add_workload(pod.name, netns=pod.netns)

            nursery.start_soon(add)
            await until(slow.begun.is_set)
            scope.cancel()
            await until(lambda: late._workloads._there[pod.name].ends)
            slow.may_go_on.set()
        assert late.workloads == ()
    assert "may be left" not in caplog.text
