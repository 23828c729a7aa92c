"""Relay processes that die, stop or get signals: what their connections get, and that others are served as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pytest
import trio

from netns_tests.watch import METRICS, alive, ends_within, many, metrics, outcomes, resets_within, until, workers, works
from netns_tests.way import GATEWAY_V4, Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import Lab, serve_echo, serve_identity
from tproxyd.testing.daemon import open_daemon

CONFIG = '[capture]\nports = ["8080"]\n'
PER_SOURCE = "[limits]\nmax_connections_per_source = 1000\n"  # spreads clients by their address


def count(number: int) -> str:
    return f"{CONFIG}[relay]\nworkers = {number}\n"


@pytest.mark.parametrize("number", [1, 2])
@GATEWAY_V4
@pytest.mark.timed
async def test_a_killed_worker_costs_its_own_connections_and_nothing_else(
    way: Way, nursery: trio.Nursery, number: int
) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    refused: list[str] = []
    served = 0

    async def keep_dialling() -> None:
        nonlocal served
        while True:
            try:
                async with await way.client.connect(way.address, 8080) as stream:
                    await stream.send_all(b"hello")
                    if await stream.receive_some():
                        served += 1
                    else:
                        refused.append("end")
            except ConnectionRefusedError:
                refused.append("refused")
            except (ConnectionResetError, trio.BrokenResourceError):
                refused.append("reset")

    async with open_daemon(way.proxy, count(number) + METRICS) as daemon, many(way.client, way.address, 20) as streams:
        for stream in streams:
            await works(stream)
        await trio.sleep(0.2)  # what a worker has not told yet, nobody can know after its death
        victim = workers(daemon)[0]
        async with trio.open_nursery() as dialling:
            dialling.start_soon(keep_dialling)
            await until(lambda: served >= 3)
            os.kill(victim, signal.SIGKILL)
            killed, before = time.perf_counter(), served
            await until(lambda: served >= before + 5)
            took = time.perf_counter() - killed
            dialling.cancel_scope.cancel()
        lost = [stream for stream in streams if await ends_within(stream, 0.1)]
        for stream in streams:
            if stream not in lost:
                await works(stream)  # those of the other worker go on
        assert len(lost) == 20 if number == 1 else 0 < len(lost) < 20
        lines = {record["source"]: record for record in daemon.records() if record["outcome"] == "worker_lost"}
        for stream in lost:
            assert format_address(stream.socket.getsockname()) in lines
        counted = await metrics(way.proxy)
        assert counted['tproxyd_connections_total{outcome="worker_lost"}'] >= len(lost)
        assert counted["tproxyd_connections_active"] == 20 - len(lost)
        for stream in streams:
            await stream.aclose()
        assert await daemon.stop() == 0
    print(f"{number} workers: {len(lost)} of 20 lost, others served again after {took * 1000:.0f} ms; {refused}")
    assert daemon.process.stderr_text.count("a relay loop ended unexpectedly") == 1
    assert "SIGKILL" in daemon.process.stderr_text
    assert took < 2  # a second, with room for a busy machine
    # The one that was served at that moment, and no other: the rest wait in the queue.
    assert refused.count("refused") == 0
    assert len(refused) <= 1
    assert len(lines) <= len(lost) + 1


@GATEWAY_V4
async def test_workers_have_the_usual_share_of_the_cpu(way: Way) -> None:
    async with open_daemon(way.proxy, count(2)) as daemon:
        assert [os.sched_getscheduler(pid) for pid in workers(daemon)] == [os.SCHED_OTHER] * 2


@GATEWAY_V4
async def test_clients_wait_in_the_queue_of_a_dead_worker(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, count(1)) as daemon:
        (victim,) = workers(daemon)
        os.kill(victim, signal.SIGSTOP)
        async with many(way.client, way.address, 50) as streams:  # the kernel shakes hands
            os.kill(victim, signal.SIGKILL)
            for stream in streams:
                await works(stream)
        assert await daemon.stop() == 0
    assert outcomes(daemon) == {"closed": 50}


@GATEWAY_V4
async def test_the_record_of_a_lost_connection_tells_when_it_ended(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, count(1)) as daemon, await way.client.connect(way.address, 8080) as stream:
        own = format_address(stream.socket.getsockname())
        await works(stream)
        await trio.sleep(1)
        os.kill(workers(daemon)[0], signal.SIGKILL)
        record = await daemon.record(own)
    assert record["outcome"] == "worker_lost"
    assert record["original_destination"] == format_address((way.address, 8080))
    assert record["duration_ms"] > 900


@GATEWAY_V4
async def test_counters_do_not_fall_when_a_worker_dies(way: Way, nursery: trio.Nursery) -> None:
    """Prometheus would take that for a restart, and count everything once more."""
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, count(1) + METRICS) as daemon:
        async with await way.client.connect(way.address, 8080) as stream:
            for _ in range(10):
                await works(stream)
            await trio.sleep(0.2)
            before = await metrics(way.proxy)
            os.kill(workers(daemon)[0], signal.SIGKILL)
            await daemon.process.wait_for_output("ended unexpectedly")
            after = await metrics(way.proxy)
        fell = {name for name in before if after[name] < before[name] and not name.endswith("active")}
        assert before['tproxyd_bytes_total{from="client"}'] == 50
        assert not fell


@GATEWAY_V4
async def test_a_scrape_between_two_workers_does_not_spoil_those_after_it(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, count(1) + METRICS) as daemon:
        os.kill(workers(daemon)[0], signal.SIGSTOP)
        async with trio.open_nursery() as scraping:
            scraping.start_soon(metrics, way.proxy)  # asks, and is not answered
            await trio.sleep(0.2)
            os.kill(workers(daemon)[0], signal.SIGKILL)
        async with await way.client.connect(way.address, 8080) as stream:
            await works(stream)
            began = time.perf_counter()
            counted = await metrics(way.proxy)
            took = time.perf_counter() - began
    assert counted['tproxyd_bytes_total{from="client"}'] == 5
    assert took < 0.7  # the time-out for a loop that does not answer is one second


@GATEWAY_V4
async def test_a_worker_that_dies_again_and_again_ends_the_daemon_which_leaves_nothing(
    way: Way, nursery: trio.Nursery
) -> None:
    before = await way.proxy.dump()
    await nursery.start(serve_identity, way.app, 8080)
    async with open_daemon(way.proxy, CONFIG) as daemon:
        killed: set[int] = set()
        with trio.fail_after(20):
            while daemon.process.returncode is None:
                try:
                    fresh = set(workers(daemon)) - killed
                except FileNotFoundError:
                    break
                for pid in fresh:
                    os.kill(pid, signal.SIGKILL)
                killed |= fresh
                await trio.sleep(0.02)
            assert await daemon.process.wait() == 71, daemon.process.stderr_text
        assert await way.proxy.dump() == before
        async with await way.client.connect(way.address, 8080) as stream:  # and clients get the app itself
            own = format_address(stream.socket.getsockname())
            assert json.loads(await stream.receive_some())["peer"] == own
    last = daemon.process.stderr_text.splitlines()[-1]
    assert "relay loops die as soon as they are started" in last
    assert "Traceback" not in daemon.process.stderr_text
    assert len(killed) == 5


# Starts an interception whose first relay process dies before it has said a word. Tells when it is ready.
STILLBORN = """
import trio
from tproxyd import config_from_mapping
from tproxyd.interceptor import homes, open_interceptor

start, born = homes.ProcessHome.start, []

async def start_and_kill_the_first(self, channel):
    await start(self, channel)
    born.append(self)
    if len(born) == 1:
        self._process.kill()

homes.ProcessHome.start = start_and_kill_the_first

async def main():
    with trio.fail_after(8):
        async with open_interceptor(config_from_mapping({"capture": {"ports": ["8080"]}}), own_namespace=True):
            print("ready", len(born), flush=True)

trio.run(main)
"""


async def test_a_worker_that_dies_before_it_is_ready_is_replaced_and_the_start_goes_on(gateway_lab: Lab) -> None:
    done = await gateway_lab["gateway"].run(sys.executable, "-c", STILLBORN, check=False)
    assert done.stdout == "ready 2\n", done.stderr


@pytest.mark.parametrize("number", [2])
@GATEWAY_V4
async def test_a_stopped_worker_does_not_keep_the_daemon_from_ending(
    way: Way, nursery: trio.Nursery, number: int
) -> None:
    before = await way.proxy.dump()
    await nursery.start(serve_echo, way.app, 8080)
    async with (
        open_daemon(way.proxy, count(number) + '[drain]\ntimeout = "500ms"\n') as daemon,
        await way.client.connect(way.address, 8080) as stream,
    ):
        await works(stream)
        pids = workers(daemon)
        os.kill(pids[0], signal.SIGSTOP)
        began = time.perf_counter()
        with trio.fail_after(15):
            assert await daemon.stop() == 0
        took = time.perf_counter() - began
        assert await ends_within(stream, 1)
    print(f"{number} workers, one stopped: ended after {took:.1f} s")
    assert took < 10
    assert not [pid for pid in pids if alive(pid)]
    assert await way.proxy.dump() == before


@pytest.mark.parametrize("number", [1, 2])
@GATEWAY_V4
@pytest.mark.timed
async def test_04_sigkill_of_the_daemon_ends_its_workers_at_once(way: Way, nursery: trio.Nursery, number: int) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, count(number)) as daemon, many(way.client, way.address, 10) as streams:
        for stream in streams:
            await works(stream)
        pids = workers(daemon)
        assert len(pids) == number
        daemon.process.send_signal(signal.SIGKILL)
        for stream in streams:
            assert await resets_within(stream, 1)
        await until(lambda: not [pid for pid in pids if alive(pid)], within=1)
        async with await way.client.connect(way.address, 8080, timeout=1) as stream:
            await works(stream)


@pytest.mark.parametrize("number", [0, 1, 2])
@GATEWAY_V4
async def test_08_sigterm_to_every_process_drains_as_to_the_daemon_alone(
    way: Way, nursery: trio.Nursery, number: int
) -> None:
    """As systemd's KillMode=control-group does it, and Ctrl-C in a terminal."""
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, count(number)) as daemon, await way.client.connect(way.address, 8080) as stream:
        await works(stream)
        for pid in workers(daemon):
            for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(pid, each)
        await works(stream)
        for pid in [*workers(daemon), daemon.process.pid]:
            os.kill(pid, signal.SIGTERM)
        await daemon.process.wait_for_output("stopping")
        for _ in range(5):
            await works(stream)
            await trio.sleep(0.05)
        await stream.send_eof()
        with trio.fail_after(5):
            assert await stream.receive_some() == b""
            assert await daemon.process.wait() == 0
    assert outcomes(daemon) == {"closed": 1}
    assert "unexpectedly" not in daemon.process.stderr_text


@pytest.mark.parametrize("number", [1, 2])
@GATEWAY_V4
async def test_06_a_worker_killed_while_the_daemon_drains(way: Way, nursery: trio.Nursery, number: int) -> None:
    """Its connections are lost, and the stop does not wait for them."""
    before = await way.proxy.dump()
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, count(number)) as daemon, many(way.client, way.address, 10) as streams:
        for stream in streams:
            await works(stream)
        await trio.sleep(0.2)
        daemon.process.send_signal(signal.SIGTERM)
        await daemon.process.wait_for_output("stopping")
        await trio.sleep(0.3)
        for pid in workers(daemon):
            os.kill(pid, signal.SIGKILL)
        with trio.fail_after(10):
            assert await daemon.process.wait() == 0
    assert outcomes(daemon) == {"worker_lost": 10}
    assert await way.proxy.dump() == before


@GATEWAY_V4
async def test_as_many_rules_as_there_may_be_reach_the_workers(way: Way, nursery: trio.Nursery) -> None:
    """10,000, some 1.5 MB: more than one message takes."""
    await nursery.start(serve_echo, way.app, 8080)
    rules = "".join(
        f'[[policy.rule]]\nname = "rule-{n}"\nsources = ["10.{n >> 8}.{n & 255}.0/24"]\n'
        'destinations = ["198.18.0.0/15", "2001:db8::/32"]\nports = ["80", "8000-9000"]\naction = "refuse"\n'
        for n in range(9_999)
    )
    last = '[[policy.rule]]\nname = "last"\nports = ["8080"]\naction = "forward"\n'
    async with open_daemon(way.proxy, CONFIG + rules + last) as daemon:
        async with await way.client.connect(way.address, 8080) as stream:
            own = format_address(stream.socket.getsockname())
            await works(stream)
        assert (await daemon.record(own))["rule"] == "last"
