"""Start and sudden death: what clients get, what stays in the kernel, and what the next start makes of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import trio

from netns_tests.foreign import plant_foreign
from netns_tests.way import Way, median_ms
from tproxyd.daemon.lock import LOCK_PORT
from tproxyd.net.sockets import format_address
from tproxyd.testing import LabError, serve_echo, serve_identity
from tproxyd.testing.daemon import TPROXYD, LabDaemon, open_daemon

OPEN = '[capture]\nports = ["8080"]\nwhen_down = "bypass"\n'
CLOSED = '[capture]\nports = ["8080"]\nwhen_down = "refuse"\n'
ROUNDS = 3

# Runs in the proxy's node. For every number of steps, of apply and of revert: a process that dies by SIGKILL after so many of
# them. It tells each death, and waits for a line before it cleans up and goes on.
DEATHS = """
import os, signal, sys
from pathlib import Path
from tproxyd import kernel, load_config, make_plan

plan = make_plan(load_config(Path(sys.argv[1])))

def say(line):
    os.write(1, line.encode() + b"\\n")  # in one piece

def in_child(function):
    pid = os.fork()
    if not pid:
        function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def die_after(count, steps):
    for step in steps[:count]:
        step.do()
    say(f"died {count} of {len(steps)}")
    os.kill(os.getpid(), signal.SIGKILL)

def dying_apply():
    die_after(count, kernel.make_steps(plan, kernel.observe()))

def dying_start():
    with kernel.Library() as nft:
        owned = make_plan(load_config(Path(sys.argv[1])), stays=False, owned=True)
        die_after(count, kernel.make_steps(owned, kernel.observe(nft), nft))

def dying_revert():
    kernel.apply(plan)
    die_after(count, kernel.revert_steps(kernel.observe()))

for death in map(globals().get, sys.argv[3:]):
    for count in map(int, sys.argv[2].split(',')):
        assert in_child(death) == -signal.SIGKILL
        sys.stdin.readline()
        assert in_child(kernel.revert) == 0
        say("reverted")
        sys.stdin.readline()
"""
KERNEL_STEPS = 13  # two routes, eight rules, the tables (put there in one step, removed one by one)


async def peer_seen(way: Way) -> tuple[str, str]:
    """The client's own address and the one that the app sees, over one connection."""
    async with await way.client.connect(way.address, 8080, timeout=2) as stream:
        own = format_address(stream.socket.getsockname())
        await stream.send_eof()
        return own, json.loads(b"".join([chunk async for chunk in stream]))["peer"]


async def kill(daemon: LabDaemon) -> float:
    """SIGKILL; the time at which it was sent."""
    sent = time.perf_counter()
    daemon.process.send_signal(signal.SIGKILL)
    assert await daemon.process.wait() == -signal.SIGKILL
    return sent


@pytest.mark.timed
async def test_04_sigkill_bypass_reaches_the_app_within_100_ms(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_identity, way.app, 8080)
    took = []
    for _ in range(ROUNDS):
        async with open_daemon(way.proxy, OPEN) as daemon:
            own, _ = await peer_seen(way)
            await daemon.record(own)
            killed = await kill(daemon)
            own, peer = await peer_seen(way)
            took.append(time.perf_counter() - killed)
            assert peer == own  # directly, not through anybody
    assert median_ms(f"bypass after SIGKILL, {way}", took) < 100


@pytest.mark.timed
async def test_05_sigkill_refuse_is_refused_within_100_ms_until_restart(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_identity, way.app, 8080)
    took = []
    for _ in range(ROUNDS):
        async with open_daemon(way.proxy, CLOSED) as daemon:
            own, _ = await peer_seen(way)
            await daemon.record(own)
            killed = await kill(daemon)
            with pytest.raises(ConnectionRefusedError):
                await way.client.connect(way.address, 8080)
            took.append(time.perf_counter() - killed)
            for _ in range(20):
                with pytest.raises(ConnectionRefusedError):
                    await way.client.connect(way.address, 8080)
    assert median_ms(f"refused after SIGKILL, {way}", took) < 100
    # The next start takes over what is left, and serves.
    async with open_daemon(way.proxy, CLOSED) as daemon:
        own, _ = await peer_seen(way)
        assert (await daemon.record(own))["outcome"] == "closed"
        assert await daemon.stop() == 0


@pytest.mark.parametrize("config", [OPEN, CLOSED], ids=["open", "closed"])
async def test_06_sigkill_during_drain(way: Way, nursery: trio.Nursery, config: str) -> None:
    await nursery.start(serve_identity, way.app, 8080)
    async with open_daemon(way.proxy, config) as daemon, await way.client.connect(way.address, 8080) as stream:
        await stream.receive_some()
        daemon.process.send_signal(signal.SIGTERM)
        await daemon.process.wait_for_output("stopping")
        await kill(daemon)
        await expect_when_down(way, config)


async def expect_when_down(way: Way, config: str) -> None:
    """A new client gets what `when_down` says: the app itself, or a refusal."""
    if config == OPEN:
        own, peer = await peer_seen(way)
        assert peer == own
    else:
        with pytest.raises(ConnectionRefusedError):
            await way.client.connect(way.address, 8080, timeout=2)


@pytest.mark.parametrize("way", ["gateway v4", "sidecar v6"], indirect=True)
@pytest.mark.parametrize("config", [OPEN, CLOSED], ids=["open", "closed"])
async def test_01_to_03_sigkill_between_any_two_kernel_steps(way: Way, nursery: trio.Nursery, config: str) -> None:
    """Of `apply` and of `revert`: no client ever hangs, and `revert` leaves the kernel as it was."""
    before = await way.proxy.dump()
    await nursery.start(serve_identity, way.app, 8080)
    file = str(way.file(config))
    async with way.proxy.process(
        *(
            sys.executable,
            "-c",
            DEATHS,
            file,
            ",".join(map(str, range(KERNEL_STEPS + 1))),
            "dying_apply",
            "dying_revert",
        ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as deaths:
        assert deaths.stdin is not None
        assert deaths.stdout is not None
        for _ in range(2 * (KERNEL_STEPS + 1)):
            died, _, of = (await deaths.stdout.receive_some()).decode().rpartition(" of ")
            assert died.startswith("died ")
            assert 11 <= int(of) <= KERNEL_STEPS
            await expect_open_or_refused(way, allowed={OPEN: {"open"}, CLOSED: {"open", "refused"}}[config])
            await deaths.stdin.send_all(b"go on\n")
            assert await deaths.stdout.receive_some() == b"reverted\n"
            assert await way.proxy.dump() == before
            await deaths.stdin.send_all(b"go on\n")
        assert await deaths.wait() == 0


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
@pytest.mark.parametrize("death", ["dying_apply", "dying_start", "dying_revert"])
async def test_01_to_03_a_start_after_a_kill_at_every_single_kernel_step(
    way: Way, nursery: trio.Nursery, counted: Callable[[int], int], death: str
) -> None:
    """Among foreign state: what is planned is there in the end, clients are served, and nothing foreign is touched.

    After every step in the full run, after every third one in the short one.
    """
    steps = range(0, KERNEL_STEPS + 1, 1 if counted(10) == 10 else 4)
    await plant_foreign(way.proxy)
    before = await way.proxy.dump()
    await nursery.start(serve_identity, way.app, 8080)
    file = str(way.file(CLOSED))
    async with open_daemon(way.proxy, CLOSED):
        planned = await way.proxy.dump()
    await way.proxy.run(*TPROXYD, "revert")
    async with way.proxy.process(
        *(sys.executable, "-c", DEATHS, file, ",".join(map(str, steps)), death),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as deaths:
        assert deaths.stdin is not None
        assert deaths.stdout is not None
        for _ in steps:
            died = (await deaths.stdout.receive_some()).decode()
            assert died.startswith("died ")
            async with open_daemon(way.proxy, CLOSED) as daemon:
                own, _ = await peer_seen(way)
                assert (await daemon.record(own))["outcome"] == "closed"
                applied = "table inet tproxyd_state" in (await way.proxy.run("nft", "list", "tables")).stdout
                assert applied or await way.proxy.dump() == planned, died
                assert await daemon.stop() == 0
            assert applied or await way.proxy.dump() == before, died
            await deaths.stdin.send_all(b"go on\n")
            assert await deaths.stdout.receive_some() == b"reverted\n"
            assert await way.proxy.dump() == before, died
            await deaths.stdin.send_all(b"go on\n")
        assert await deaths.wait() == 0


@pytest.mark.parametrize("way", ["gateway v4", "sidecar v6"], indirect=True)
async def test_03_what_a_death_between_kernel_steps_leaves_is_adopted(way: Way, nursery: trio.Nursery) -> None:
    before = await way.proxy.dump()
    await nursery.start(serve_identity, way.app, 8080)
    async with open_daemon(way.proxy, CLOSED) as daemon:
        await kill(daemon)
    await way.proxy.run("ip", "-6", "rule", "del", "priority", "5234")
    await way.proxy.run("ip", "route", "del", "local", "default", "dev", "lo", "table", "133")
    async with open_daemon(way.proxy, OPEN) as daemon:
        own, _ = await peer_seen(way)
        assert (await daemon.record(own))["outcome"] == "closed"
        assert await daemon.stop() == 0
    assert await way.proxy.dump() == before


async def expect_open_or_refused(way: Way, *, allowed: set[str]) -> None:
    try:
        own, peer = await peer_seen(way)
    except ConnectionRefusedError:
        assert "refused" in allowed
    else:
        assert peer == own
        assert "open" in allowed


@pytest.mark.parametrize("way", ["sidecar v4"], indirect=True)
async def test_02_killed_while_starting_it_leaves_nothing_harmful(way: Way, nursery: trio.Nursery) -> None:
    """At a few moments of the start, of which some fall before bind, some after it and some into the kernel's steps."""
    await nursery.start(serve_identity, way.app, 8080)
    for milliseconds in (0, 100, 200, 250, 300, 350, 400, 500):
        async with way.proxy.process(*TPROXYD, "run", "--port", "8080", collect=True) as process:
            await trio.sleep(milliseconds / 1000)
            process.send_signal(signal.SIGKILL)
            await process.wait()
            own, peer = await peer_seen(way)
            assert peer == own
    async with open_daemon(way.proxy, OPEN) as daemon:
        own, _ = await peer_seen(way)
        await daemon.record(own)


@pytest.mark.parametrize("end", ["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("config", [OPEN, CLOSED], ids=["open", "closed"])
async def test_connections_from_before_survive_capture_going_on_and_off(
    way: Way, nursery: trio.Nursery, config: str, end: str
) -> None:
    await nursery.start(serve_echo, way.app, 8080)

    async def works() -> None:
        with trio.fail_after(5):
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"

    async with await way.client.connect(way.address, 8080) as stream:
        await works()
        async with open_daemon(way.proxy, config) as daemon:
            for _ in range(5):
                await works()
            daemon.process.send_signal(getattr(signal, end))
            await daemon.process.wait()
            for _ in range(5):
                await works()
        await way.proxy.run(*TPROXYD, "revert")
        await works()
        assert daemon.records() == []


@pytest.mark.parametrize("way", ["sidecar v4"], indirect=True)
async def test_20_a_second_daemon_is_refused_with_the_pid_of_the_first(way: Way) -> None:
    async with open_daemon(way.proxy, OPEN) as daemon:
        serving = await way.proxy.dump()
        second = await way.proxy.run(*TPROXYD, "run", "--port", "9090", check=False)
        assert second.returncode == 71
        assert f"(pid {daemon.process.pid})" in second.stderr
        applied = await way.proxy.run(*TPROXYD, "apply", "-c", str(way.file(CLOSED)), check=False)
        assert applied.returncode == 1
        assert f"(pid {daemon.process.pid})" in applied.stderr
        for refused in (second, applied):
            assert refused.stderr.count("\n") == 1
        assert await way.proxy.dump() == serving


@pytest.mark.parametrize("way", ["sidecar v4"], indirect=True)
async def test_19_the_holder_of_the_port_is_named_and_nothing_is_left(way: Way) -> None:
    before = await way.proxy.dump()
    for address in ("127.0.0.1", "::1", "0.0.0.0"):
        async with way.proxy.listen(address, 15006):
            with pytest.raises(LabError, match=r"ended with 71") as failed:
                async with open_daemon(way.proxy, OPEN):
                    pass
        (line,) = [line for line in str(failed.value).splitlines() if line.startswith("tproxyd: ")]
        assert (
            ":15006: Address already in use, by python" in line or ":15006: Address already in use, by pytest" in line
        )
        assert "choose another listen.port" in line
        assert await way.proxy.dump() == before


async def test_05_a_start_that_fails_leaves_the_guard_of_the_one_before(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_identity, way.app, 8080)
    async with open_daemon(way.proxy, CLOSED) as daemon:
        await kill(daemon)
    left = await way.proxy.dump()
    await way.proxy.run("ip", "route", "add", "local", "default", "dev", "lo", "table", "134")
    failed = await way.proxy.run(*TPROXYD, "run", "-c", str(way.file(CLOSED + "[routing]\ntable = 134\n")), check=False)
    assert failed.returncode == 71
    await way.proxy.run("ip", "route", "del", "local", "default", "dev", "lo", "table", "134")
    with pytest.raises(ConnectionRefusedError):
        await way.client.connect(way.address, 8080)
    assert await way.proxy.dump() == left


@pytest.mark.parametrize("way", ["sidecar v4"], indirect=True)
async def test_20_whoever_holds_the_lock_is_named_even_if_it_is_no_daemon(way: Way) -> None:
    """Going on without the lock would let two daemons undo each other's work."""
    with way.proxy.open_socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as lock:
        lock.bind((LOCK_PORT, 0))
        for _ in range(3):
            refused = await way.proxy.run(*TPROXYD, "run", "--port", "8080", check=False)
            assert refused.returncode == 71
            assert f"(pid {os.getpid()})" in refused.stderr
            assert refused.stderr.count("\n") == 1
    async with open_daemon(way.proxy, OPEN) as daemon:
        assert await daemon.stop() == 0


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
@pytest.mark.timed
async def test_ready_is_said_within_the_goal(way: Way, counted: Callable[[int], int]) -> None:
    """Cold start to READY; docs/performance.md has 600 ms. Printed, and checked with room for a busy machine."""
    took = []
    for _ in range(counted(50)):
        began = time.perf_counter()
        async with open_daemon(way.proxy, OPEN):
            took.append(time.perf_counter() - began)
    assert median_ms(f"start to ready, {way}", took) < 2000
