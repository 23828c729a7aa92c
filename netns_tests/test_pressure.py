"""While much is asked of a daemon, its thread makes do with what is left of the CPU, and nothing else of it does."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from contextlib import AsyncExitStack, suppress

import pytest
import trio

from netns_tests.asking import CONFIG, abused, ask, auto, serving
from netns_tests.generations import open_generations
from netns_tests.seccomp import WITHOUT_POLICIES
from netns_tests.watch import relay_processes, until, workers, works
from netns_tests.way import GATEWAY_V4, SIDECAR_V4, Way
from tproxyd import kernel
from tproxyd.testing import serve_echo
from tproxyd.testing.daemon import LabDaemon, open_daemon

WITHOUT = ("setpriv", "--bounding-set=-sys_nice,-sys_resource", "--inh-caps=-sys_nice,-sys_resource")


def policies(daemon: LabDaemon) -> dict[int, int]:
    """Of each thread that is not its first one, and of each relay process."""
    threads = map(int, os.listdir(f"/proc/{daemon.process.pid}/task"))
    others = {*threads, *workers(daemon)} - {daemon.process.pid}
    return {thread: os.sched_getscheduler(thread) for thread in others}


async def seen(daemon: LabDaemon, seconds: float = 1.0) -> Counter[int]:
    """How often its first thread was seen with each policy."""
    found: Counter[int] = Counter()
    ends = trio.current_time() + seconds
    while trio.current_time() < ends:
        found[os.sched_getscheduler(daemon.process.pid)] += 1
        await trio.sleep(0.002)
    return found


@GATEWAY_V4
async def test_57_the_daemon_steps_back_while_much_is_asked_and_no_longer(way: Way, nursery: trio.Nursery) -> None:
    """Its relay processes never do, those that are started then neither."""
    async with open_daemon(way.proxy, CONFIG) as daemon:
        for _ in range(10):  # so much is answered at once
            assert (await ask(auto(way.proxy), "/v1/status")).status == 200
        assert os.sched_getscheduler(daemon.process.pid) == os.SCHED_OTHER
        async with abused(way.proxy, "storm"):
            await until(lambda: os.sched_getscheduler(daemon.process.pid) == os.SCHED_IDLE)
            assert (await seen(daemon))[os.SCHED_IDLE] > 100
            (before,) = workers(daemon)
            os.kill(before, signal.SIGKILL)
            await until(lambda: workers(daemon) not in ([], [before]))
            (relay,) = workers(daemon)
            await until(lambda: os.sched_getscheduler(relay) == os.SCHED_OTHER)
        with trio.fail_after(5):
            await until(lambda: os.sched_getscheduler(daemon.process.pid) == os.SCHED_OTHER)
        await until(lambda: set(policies(daemon).values()) == {os.SCHED_OTHER})
        await nursery.start(serve_echo, way.app, 8080)
        async with await way.client.connect(way.address, 8080) as stream:
            await works(stream)


@SIDECAR_V4
async def test_57_whoever_asks_much_does_not_hold_a_drain_up(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with (
        open_daemon(way.proxy, f"{CONFIG}\n[drain]\ntimeout = '2s'\n") as daemon,
        await way.client.connect(way.address, 8080) as stream,
    ):
        await works(stream)
        async with abused(way.proxy, "storm"):
            await until(lambda: os.sched_getscheduler(daemon.process.pid) == os.SCHED_IDLE)
            daemon.process.send_signal(signal.SIGTERM)
            await until(lambda: os.sched_getscheduler(daemon.process.pid) == os.SCHED_OTHER)
            assert [*await seen(daemon)] == [os.SCHED_OTHER]
            await works(stream)
            assert await daemon.process.wait() == 0


@SIDECAR_V4
async def test_57_a_generation_that_comes_while_much_is_asked_has_not_stepped_back_for_good(way: Way) -> None:
    async with open_generations(way, CONFIG) as daemon:
        async with abused(way.proxy, "storm"):
            await until(lambda: os.sched_getscheduler(daemon.serving) == os.SCHED_IDLE)
            old = daemon.serving
            new = await daemon.hand_over()
            await until(lambda: os.sched_getscheduler(new) == os.SCHED_IDLE)
            with suppress(ProcessLookupError):  # it had no connections
                assert os.sched_getscheduler(old) == os.SCHED_OTHER
        await until(lambda: os.sched_getscheduler(new) == os.SCHED_OTHER)
        assert {os.sched_getscheduler(pid) for pid in relay_processes(new)} == {os.SCHED_OTHER}


@SIDECAR_V4
async def test_57_where_a_thread_relays_the_daemon_does_not_step_back(way: Way) -> None:
    """It would wait for the daemon's, which has Python's lock."""
    async with open_daemon(way.proxy, f"{CONFIG}\n[relay]\nworkers = 0\n") as daemon, abused(way.proxy, "storm"):
        assert [*await seen(daemon)] == [os.SCHED_OTHER]


@SIDECAR_V4
@pytest.mark.parametrize(
    "wrapper",
    [
        WITHOUT,
        ("unshare", "-Urn"),
        (sys.executable, "-c", WITHOUT_POLICIES),
        ("env", "--ignore-signal=CHLD"),
        ("chrt", "--batch", "0"),
        ("nice", "-n", "5"),
    ],
    ids=["without capabilities", "in a user namespace", "by a filter", "SIGCHLD ignored", "batch", "nice"],
)
async def test_57_who_steps_back_can_come_back(way: Way, wrapper: tuple[str, ...]) -> None:
    """Whatever policy and nice value a daemon is started with, those it has again."""
    command = (*wrapper, sys.executable, "-c", STEP_BACK)
    done = await way.proxy.run(*command)
    policy, before, found, inside, after = done.stdout.split()
    assert policy == before == after
    may = wrapper[0] in ("chrt", "nice")
    assert (found, inside) == (str(may), str(os.SCHED_IDLE) if may else policy)


STEP_BACK = """
import os
from tproxyd.net.scheduling import find_background
policy = os.sched_getscheduler(0)
how = find_background()
before = os.sched_getscheduler(0)
if how:
    how.wanted = True
    how.enter()
inside = os.sched_getscheduler(0)
if how:
    how.leave()
print(policy, before, how is not None, inside, os.sched_getscheduler(0))
"""


IN_TRIO = """
import os, resource, subprocess, threading, trio
from tproxyd.daemon.pressure import Pressure
from tproxyd.interceptor.threads import in_thread
from tproxyd.net.scheduling import find_background, may_wait

pressure = Pressure(find_background())

def policy(of=0):
    return {os.SCHED_OTHER: "usual", os.SCHED_IDLE: "idle"}[os.sched_getscheduler(of)]

def limit(what, soft):
    resource.setrlimit(what, (soft, resource.getrlimit(what)[1]))

async def main():
    pressure.begin()
"""
WITHOUT_FILES = """
    pressure.press()
    print(policy())
    limit(resource.RLIMIT_NOFILE, 0)
    for _ in range(10):
        await trio.sleep(0.1)
        pressure.press()
    print(policy())
    limit(resource.RLIMIT_NOFILE, 1024)
    await trio.sleep(0.6)
    pressure.press()
    print(policy())

trio.run(main)
"""
IN_THE_MIDDLE = """
    pressure.press()
    may_wait.set(True)
    begun, over = trio.Event(), threading.Event()
    found = []

    def step():
        child = subprocess.Popen(["sleep", "60"])
        found.extend([threading.get_native_id(), child.pid])
        trio.from_thread.run_sync(begun.set)
        over.wait()
        child.kill()
        child.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(in_thread, step)
        await begun.wait()
        print(*map(policy, [0, *found]))
        pressure.stop()
        print(*map(policy, [0, *found]))
        over.set()

trio.run(main)
"""
WITHOUT_THREADS = """
    pressure.press()
    pages = int(open("/proc/self/statm").read().split()[0])
    limit(resource.RLIMIT_AS, pages * resource.getpagesize() + (4 << 20))  # a thread has a stack of 8 MiB
    print(policy(), *await in_thread(lambda: (policy(), threading.current_thread().name)), policy())

trio.run(main)
"""


@SIDECAR_V4
@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (WITHOUT_FILES, ["idle", "usual", "idle"]),
        (IN_THE_MIDDLE, ["idle", "idle", "idle", "usual", "usual", "usual"]),
        (WITHOUT_THREADS, ["idle", "usual", "MainThread", "idle"]),
    ],
    ids=["no file is left", "a thread and a program are in the middle", "no thread is left"],
)
async def test_57_who_steps_back_comes_back_whatever_is_missing(way: Way, program: str, expected: list[str]) -> None:
    done = await way.proxy.run(sys.executable, "-c", IN_TRIO + program)
    assert done.stdout.split() == expected


@pytest.mark.timed
@SIDECAR_V4
async def test_57_in_a_crowd_the_daemon_does_not_step_back(way: Way) -> None:
    """Of ten that never sleep for each core: it would wait for ten seconds, a watchdog too."""
    spin = "import sys\nwhile True: pass"
    async with open_daemon(way.proxy, CONFIG) as daemon, AsyncExitStack() as stack:
        assert (await ask(auto(way.proxy), "/v1/status")).status == 200
        busy = [
            await stack.enter_async_context(way.proxy.process(sys.executable, "-c", spin))
            for _ in range(10 * len(os.sched_getaffinity(0)))
        ]
        async with abused(way.proxy, "storm"):
            found = await seen(daemon, 5)
        for program in busy:
            program.send_signal(signal.SIGKILL)
    print(found)
    assert [*found] == [os.SCHED_OTHER]


@pytest.mark.timed
@GATEWAY_V4
async def test_57_where_nothing_is_left_of_the_cpu_the_daemon_takes_its_share(way: Way, nursery: trio.Nursery) -> None:
    """A storm, and twice as many programs as there are cores that never sleep: it answers and repairs all the same."""
    spin = "import sys\nwhile True: pass"
    async with serving(way, nursery) as (daemon, stream), AsyncExitStack() as stack, abused(way.proxy, "storm"):
        there = rules(way)
        await until(lambda: os.sched_getscheduler(daemon.process.pid) == os.SCHED_IDLE)
        busy = [
            await stack.enter_async_context(way.proxy.process(sys.executable, "-c", spin))
            for _ in range(2 * len(os.sched_getaffinity(0)))
        ]
        for _ in range(3):
            await way.proxy.run("ip", "rule", "del", "priority", "5234")
            began = trio.current_time()
            await until(lambda: rules(way) == there, within=10)
            print(f"repaired after {trio.current_time() - began:.2f} s")
            began = trio.current_time()
            assert (await ask(auto(way.proxy), "/v1/status", within=15)).status == 200
            print(f"answered after {trio.current_time() - began:.2f} s, {await seen(daemon, 0.5)}")
            await works(stream)
        for program in busy:
            program.send_signal(signal.SIGKILL)


def rules(way: Way) -> int:
    return len(way.proxy.call(kernel.observe).rules)
