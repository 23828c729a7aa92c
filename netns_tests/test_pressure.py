"""While much is asked of a daemon, its thread makes do with what is left of the CPU, and nothing else of it does."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from contextlib import AsyncExitStack

import pytest
import trio

from netns_tests.asking import CONFIG, abused, ask, auto, serving
from netns_tests.generations import open_generations
from netns_tests.seccomp import WITHOUT_SCHED_SETSCHEDULER
from netns_tests.watch import relay_processes, until, workers, works
from netns_tests.way import GATEWAY_V4, SIDECAR_V4, Way
from tproxyd import kernel
from tproxyd.testing import serve_echo
from tproxyd.testing.daemon import LabDaemon, open_daemon

STARTS = {
    "without capabilities": (
        ("setpriv", "--bounding-set=-sys_nice,-sys_resource", "--inh-caps=-sys_nice,-sys_resource"),
        False,
    ),
    "in a user namespace": (("unshare", "-Urn"), False),
    "the call is forbidden": ((sys.executable, "-c", WITHOUT_SCHED_SETSCHEDULER), False),
    "SIGCHLD is ignored": (("env", "--ignore-signal=CHLD"), False),
    "SCHED_BATCH": (("chrt", "--batch", "0"), True),
    "nice": (("nice", "-n", "5"), True),
}
"""Commands that a daemon may be started by, and whether it steps back then."""


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
        found[policy(daemon)] += 1
        await trio.sleep(0.002)
    return found


def policy(daemon: LabDaemon) -> int:
    """Of its first thread."""
    return os.sched_getscheduler(daemon.process.pid)


@pytest.mark.timed
@GATEWAY_V4
async def test_57_the_daemon_steps_back_while_much_is_asked_and_no_longer(way: Way, nursery: trio.Nursery) -> None:
    """Its relay processes never do, those that are started then neither."""
    async with open_daemon(way.proxy, CONFIG) as daemon:
        for _ in range(10):  # so much is answered at once
            assert (await ask(auto(way.proxy), "/v1/status")).status == 200
        assert policy(daemon) == os.SCHED_OTHER
        async with abused(way.proxy, "storm"):
            await until(lambda: policy(daemon) == os.SCHED_IDLE)
            assert (await seen(daemon)).most_common(1)[0][0] == os.SCHED_IDLE
            (before,) = workers(daemon)
            os.kill(before, signal.SIGKILL)
            await until(lambda: workers(daemon) not in ([], [before]))
            (relay,) = workers(daemon)
            await until(lambda: os.sched_getscheduler(relay) == os.SCHED_OTHER)
        await until(lambda: policy(daemon) == os.SCHED_OTHER)
        await until(lambda: set(policies(daemon).values()) == {os.SCHED_OTHER})
        await nursery.start(serve_echo, way.app, 8080)
        async with await way.client.connect(way.address, 8080) as stream:
            await works(stream)


@SIDECAR_V4
async def test_57_whoever_asks_much_does_not_hold_a_drain_up(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with (
        open_daemon(way.proxy, f"{CONFIG}\n[drain]\ntimeout = '20s'\n") as daemon,
        await way.client.connect(way.address, 8080) as stream,
    ):
        await works(stream)
        async with abused(way.proxy, "storm"):
            await until(lambda: policy(daemon) == os.SCHED_IDLE)
            daemon.process.send_signal(signal.SIGTERM)
            await until(lambda: policy(daemon) == os.SCHED_OTHER)
            assert [*await seen(daemon)] == [os.SCHED_OTHER]
            await works(stream)
            await stream.aclose()
            assert await daemon.process.wait() == 0


@SIDECAR_V4
async def test_57_a_new_generation_that_is_started_meanwhile_is_like_any_other(way: Way) -> None:
    """Its processes do not inherit that the old one has stepped back; it does so itself, and comes back."""
    async with open_generations(way, CONFIG) as generations:
        old = generations.serving
        async with abused(way.proxy, "storm"):
            await until(lambda: os.sched_getscheduler(old) == os.SCHED_IDLE)
            new = await generations.hand_over()
            assert [os.sched_getscheduler(relay) for relay in relay_processes(new)] == [os.SCHED_OTHER]
            await until(lambda: os.sched_getscheduler(new) == os.SCHED_IDLE)
        await until(lambda: os.sched_getscheduler(new) == os.SCHED_OTHER)
        await generations.ended(old)
        await generations.stop()


@SIDECAR_V4
async def test_57_where_a_thread_relays_the_daemon_does_not_step_back(way: Way) -> None:
    """It would wait for the daemon's, which has Python's lock."""
    async with open_daemon(way.proxy, f"{CONFIG}\n[relay]\nworkers = 0\n") as daemon, abused(way.proxy, "storm"):
        assert [*await seen(daemon)] == [os.SCHED_OTHER]


@SIDECAR_V4
@pytest.mark.parametrize("start", STARTS)
async def test_57_who_steps_back_can_come_back(way: Way, start: str) -> None:
    """Whatever policy and nice value a daemon is started with, those it has again; and it does not step back where it could not have them."""
    wrapper, may = STARTS[start]
    done = await way.proxy.run(*wrapper, sys.executable, "-c", STEP_BACK)
    usual, before, found, inside, after = done.stdout.split()
    assert usual == before == after
    assert (found, inside) == (str(may), str(os.SCHED_IDLE) if may else usual)


STEP_BACK = """
import os
from tproxyd.net.scheduling import find_background
usual = os.sched_getscheduler(0)
how = find_background()
before = os.sched_getscheduler(0)
if how:
    how.wanted = True
    how.enter()
inside = os.sched_getscheduler(0)
if how:
    how.leave()
print(usual, before, how is not None, inside, os.sched_getscheduler(0))
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
    spin = "while True: pass"
    async with open_daemon(way.proxy, CONFIG) as daemon, AsyncExitStack() as stack:
        assert (await ask(auto(way.proxy), "/v1/status")).status == 200
        busy = [
            await stack.enter_async_context(way.proxy.process(sys.executable, "-c", spin))
            for _ in range(10 * len(os.sched_getaffinity(0)))
        ]
        async with abused(way.proxy, "storm"):
            found = await seen(daemon, 3)
        for program in busy:
            program.send_signal(signal.SIGKILL)
    print(found)
    assert [*found] == [os.SCHED_OTHER]


@pytest.mark.timed
@GATEWAY_V4
async def test_57_where_nothing_is_left_of_the_cpu_the_daemon_takes_its_share(way: Way, nursery: trio.Nursery) -> None:
    """A storm, and twice as many programs as there are cores that never sleep: it answers and repairs all the same."""
    spin = "while True: pass"
    async with serving(way, nursery) as (daemon, stream), AsyncExitStack() as stack, abused(way.proxy, "storm"):
        there = rules(way)
        await until(lambda: policy(daemon) == os.SCHED_IDLE)
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
