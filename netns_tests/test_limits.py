"""What runs out: files, connections, a source's share, ports, memory, the table of conntrack. Others go on being served."""

from __future__ import annotations

import json
import os
import resource
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path

import pytest
import trio

from netns_tests.watch import (
    METRICS,
    all_cpu_seconds,
    attempt,
    dial,
    many,
    memory_kib,
    metrics,
    outcomes,
    peers_of,
    reset,
    resets_within,
    until,
    workers,
    works,
)
from netns_tests.way import GATEWAY_V4, Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import LabError, activate_conntrack, conntrack_count, serve_echo, serve_identity
from tproxyd.testing.daemon import LabDaemon, open_daemon

CONFIG = '[capture]\nports = ["8080"]\n'


async def served_within(streams: list[trio.SocketStream], seconds: float) -> list[trio.SocketStream]:
    """Those that get an answer in that time; each has been asked once, with a byte."""
    answered: list[trio.SocketStream] = []

    async def wait(stream: trio.SocketStream) -> None:
        assert await stream.receive_some()
        answered.append(stream)

    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(wait, stream)
    return answered


async def share_of_cpu(daemon: LabDaemon, seconds: float) -> float:
    used = all_cpu_seconds(daemon)
    await trio.sleep(seconds)
    return (all_cpu_seconds(daemon) - used) / seconds


@pytest.mark.parametrize("number", [1])
@GATEWAY_V4
async def test_21_connections_beyond_the_files_wait_and_cost_nothing(
    way: Way, nursery: trio.Nursery, number: int
) -> None:
    """RLIMIT_NOFILE 120: some 40 connections live, the others wait in the queue and are served when those end."""
    await nursery.start(serve_echo, way.app, 8080)
    async with (
        open_daemon(way.proxy, CONFIG + f"[relay]\nworkers = {number}\n", files=120) as daemon,
        many(way.client, way.address, 60) as streams,
    ):
        for stream in streams:
            await stream.send_all(b"x")
        await daemon.process.wait_for_output("are all there are files for")
        served = await served_within(streams, 0.3)
        waiting = [stream for stream in streams if stream not in served]
        share = await share_of_cpu(daemon, 1)
        print(f"{number} workers: {len(served)} served, {len(waiting)} wait; CPU while full: {share:.1%}")
        assert 25 <= len(served) <= 45
        assert share < 0.1
        for stream in served:
            await works(stream)
            await stream.aclose()
        assert len(await served_within(waiting, 5)) == len(waiting)
        assert daemon.process.stderr_text.count("are all there are files for") == 1
        assert "Too many open files" not in daemon.process.stderr_text
        assert "Traceback" not in daemon.process.stderr_text
        for stream in waiting:
            await stream.aclose()
        assert await daemon.stop() == 0


@GATEWAY_V4
async def test_21_emfile_in_a_worker(way: Way, nursery: trio.Nursery) -> None:
    """Somebody lowers the limit of the running process, so that accept and socket fail, whatever was planned."""
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, CONFIG) as daemon:
        (worker,) = workers(daemon)
        async with many(way.client, way.address, 10) as streams:
            for stream in streams:
                await works(stream)
            used = len(os.listdir(f"/proc/{worker}/fd"))
            resource.prlimit(worker, resource.RLIMIT_NOFILE, (used, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            async with many(way.client, way.address, 20) as more:
                for stream in more:
                    await stream.send_all(b"x")
                share = await share_of_cpu(daemon, 1)
                print(f"CPU while full: {share:.1%}")
                assert share < 0.1
                for stream in streams:
                    await works(stream)  # those that live go on
                lines = [line for line in daemon.process.stderr_text.splitlines() if "Too many open files" in line]
                assert len(lines) == 1, lines
                assert "cannot accept connections, and will try again" in lines[0]
                assert not await served_within(more, 0.1)
                for stream in streams:  # frees 20 files: ten connections
                    await stream.aclose()
                with trio.fail_after(5):
                    for stream in more[:5]:
                        assert await stream.receive_some() == b"x"
        await until(lambda: outcomes(daemon).total() == 30)
    print(outcomes(daemon))


@pytest.mark.parametrize("number", [0, 1, 2])
@GATEWAY_V4
async def test_22_too_few_files_for_max_connections_are_refused_at_start(way: Way, number: int) -> None:
    before = await way.proxy.dump()
    config = CONFIG + f"[relay]\nworkers = {number}\n[limits]\nmax_connections = 1000\n"
    with pytest.raises(LabError, match=r"ended with 78") as failed:
        async with open_daemon(way.proxy, config, files=256):
            pass
    (line,) = [line for line in str(failed.value).splitlines() if line.startswith("tproxyd: ") and "br_net" not in line]
    assert "`limits.max_connections` = 1000 does not fit: 256 open files" in line
    assert await way.proxy.dump() == before
    # What it names is enough, and no more than that by much.
    enough = int(line.partition("LimitNOFILE, ulimit -n) to ")[2].split()[0])
    async with open_daemon(way.proxy, config, files=enough):
        pass
    assert enough < 1.2 * (2 * 1000 / max(number, 1)) + 200


@pytest.mark.parametrize("number", [1, 2])
@GATEWAY_V4
async def test_23_max_connections_holds_exactly_and_the_others_wait(
    way: Way, nursery: trio.Nursery, number: int
) -> None:
    live, most = 0, 0
    let_go = trio.Event()

    async def app(stream: trio.SocketStream) -> None:
        nonlocal live, most
        live += 1
        most = max(most, live)
        async with stream:
            await stream.send_all(b"served")
            await let_go.wait()
            while await stream.receive_some():
                pass
            live -= 1

    nursery.start_soon(trio.serve_listeners, app, [way.app.listen(way.bind, 8080)])
    config = CONFIG + f"[relay]\nworkers = {number}\n[limits]\nmax_connections = 10\n" + METRICS
    async with open_daemon(way.proxy, config) as daemon, many(way.client, way.address, 40) as streams:
        await until(lambda: live == 10)
        await trio.sleep(0.3)
        assert live == 10
        assert (await metrics(way.proxy))["tproxyd_connections_active"] == 10
        let_go.set()
        async with trio.open_nursery() as clients:

            async def client(stream: trio.SocketStream) -> None:
                with trio.fail_after(10):
                    assert await stream.receive_some() == b"served"
                    await stream.send_eof()
                    assert await stream.receive_some() == b""

            for stream in streams:
                clients.start_soon(client, stream)
        await until(lambda: outcomes(daemon).total() == 40)
        # A line a loop.
        assert 1 <= daemon.process.stderr_text.count("connections live, as many as limits.max_connections") <= number
        assert not [peer for pid in workers(daemon) for peer in peers_of(pid)]
    assert most == 10
    assert outcomes(daemon) == {"closed": 40}


@GATEWAY_V4
async def test_08_23_a_stop_serves_those_who_wait_for_room(way: Way, nursery: trio.Nursery) -> None:
    """Their handshake is complete: they are captured, and nobody else would serve them."""
    await nursery.start(serve_echo, way.app, 8080)
    config = CONFIG + "[limits]\nmax_connections = 1\n"
    async with open_daemon(way.proxy, config) as daemon, many(way.client, way.address, 3) as streams:
        await works(streams[0])
        await daemon.process.wait_for_output("1 connections live")
        daemon.process.send_signal(15)
        await daemon.process.wait_for_output("stopping")
        await trio.sleep(0.3)
        for stream in streams:
            await works(stream)
            await trio.sleep(0.3)
            await works(stream)
            await stream.send_eof()
            assert await stream.receive_some() == b""
        assert await daemon.process.wait() == 0
    assert outcomes(daemon) == {"closed": 3}


async def many_addresses(way: Way) -> list[str]:
    """40 more addresses that the client has, besides its own."""
    if ":" in way.address:
        way.client.set_sysctl("net.ipv6.ip_nonlocal_bind", 1)
        await way.client.run("ip", "route", "add", "local", "2001:db8:a::/64", "dev", "lo")
        await way.proxy.run("ip", "route", "add", "2001:db8:a::/64", "via", way.client.v6)
        return [f"2001:db8:a::{number:x}" for number in range(1, 41)]
    await way.client.run("ip", "route", "add", "local", "192.0.2.128/25", "dev", "lo")
    return [f"192.0.2.{number}" for number in range(130, 170)]


@GATEWAY_V4
async def test_08_23_a_stop_at_the_limit_resets_and_tells(way: Way, nursery: trio.Nursery) -> None:
    """Also while no more are accepted: whoever lives is reset and recorded, and whoever waits is reset."""
    await nursery.start(serve_echo, way.app, 8080)
    config = CONFIG + '[limits]\nmax_connections = 2\n[drain]\ntimeout = "200ms"\n'
    async with open_daemon(way.proxy, config) as daemon, many(way.client, way.address, 3) as streams:
        for stream in streams[:2]:
            await works(stream)
        await daemon.process.wait_for_output("2 connections live")
        assert await daemon.stop() == 0
        for stream in streams:
            assert await resets_within(stream, 1)
    assert outcomes(daemon) == {"drained": 2}
    assert "bug" not in daemon.process.stderr_text


@pytest.mark.parametrize(
    ("way", "number"), [("gateway v4", 0), ("gateway v4", 1), ("gateway v4", 2), ("gateway v6", 2)], indirect=["way"]
)
async def test_24_a_source_has_its_share_and_no_more(way: Way, nursery: trio.Nursery, number: int) -> None:
    """Of 20 connections of one client exactly 5 live; another client has its own 5, and each gets them back."""
    await nursery.start(serve_echo, way.app, 8080)
    other = (await many_addresses(way))[0]
    config = CONFIG + f"[relay]\nworkers = {number}\n[limits]\nmax_connections_per_source = 5\n"
    async with open_daemon(way.proxy, config) as daemon:
        for round_ in range(2):
            async with AsyncExitStack() as stack:
                living: list[trio.SocketStream] = []
                dead = 0
                for _ in range(20):
                    stream = await dial(way.client, way.address)
                    if stream is not None:
                        await stack.enter_async_context(stream)
                    try:
                        if stream is None:
                            raise trio.BrokenResourceError
                        await works(stream)
                        living.append(stream)
                    except trio.BrokenResourceError:
                        dead += 1
                assert (len(living), dead) == (5, 15)
                for stream in living:
                    await works(stream)
                async with many(way.client, way.address, 5, source=other) as theirs:
                    for stream in theirs:
                        await works(stream)
            await until(lambda: outcomes(daemon) == {"limit": 15 * (round_ + 1), "closed": 10 * (round_ + 1)})  # noqa: B023  # at once


@pytest.mark.parametrize("way", ["gateway v4", "gateway v6"], indirect=True)
async def test_24_many_sources_come_to_both_workers_and_each_to_one(way: Way, nursery: trio.Nursery) -> None:
    """With a limit a source the kernel chooses the worker by the client's address."""
    await nursery.start(serve_echo, way.app, 8080)
    sources = await many_addresses(way)
    config = CONFIG + "[relay]\nworkers = 2\n[limits]\nmax_connections_per_source = 5\n"
    async with open_daemon(way.proxy, config) as daemon, AsyncExitStack() as stack:
        for source in sources:
            for stream in await stack.enter_async_context(many(way.client, way.address, 2, source=source)):
                await works(stream)
        # The server's address is a peer, too, as often as all clients together.
        homes = [Counter(peers_of(pid)).most_common()[1:] for pid in workers(daemon)]
    print(f"40 sources by worker: {[len(home) for home in homes]}")
    assert all(count == 2 for home in homes for _, count in home)
    assert sum(map(len, homes)) == 40
    assert min(map(len, homes)) >= 10


@pytest.mark.parametrize("way", ["sidecar v4", "sidecar v6"], indirect=True)
async def test_25_without_a_free_port_the_client_is_reset_and_it_is_counted(way: Way, nursery: trio.Nursery) -> None:
    """Ten ports to choose from: ten connections live that bear the client's address, and ten more the proxy's."""
    await nursery.start(partial(serve_echo, way.app, 8080, address=way.bind))
    way.proxy.set_sysctl("net.ipv4.ip_local_port_range", "50000 50009")
    async with open_daemon(way.proxy, CONFIG + METRICS) as daemon, many(way.client, way.address, 20) as streams:
        for stream in streams:
            await works(stream)
        # Of no port that the kernel chooses from: one of the twenty may have it.
        owns = [await attempt(way.client, way.address, source_port=20000 + number) for number in range(20)]
        for own in filter(None, owns):
            assert (await daemon.record(own))["outcome"] == "no_ports"
        await until(lambda: outcomes(daemon) == {"no_ports": 20})
        share = await share_of_cpu(daemon, 0.5)
        assert share < 0.1
        way.proxy.set_sysctl("net.ipv4.ip_local_port_range", "40000 60000")  # for the scrape, too
        counted = await metrics(way.proxy)
        assert counted['tproxyd_connections_total{outcome="no_ports"}'] == 20
        assert daemon.process.stderr_text.count("no free port for a connection to") == 1
        async with many(way.client, way.address, 1) as (stream,):
            await works(stream)


@pytest.mark.parametrize("closes_first", ["client", "server", "both"])
@pytest.mark.parametrize("way", ["gateway v4", "gateway v6"], indirect=True)
async def test_26_the_same_client_port_again_while_the_last_one_is_in_time_wait(
    way: Way, nursery: trio.Nursery, closes_first: str
) -> None:
    """The upstream socket bears the client's address and port, whoever closed first the time before."""

    async def app(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(format_address(stream.socket.getpeername()).encode())
            if closes_first in ("server", "both"):
                await stream.send_eof()
            if closes_first != "both":
                while await stream.receive_some():
                    pass

    nursery.start_soon(trio.serve_listeners, app, [way.app.listen(way.bind, 8080)])
    seen: list[tuple[int, str]] = []

    async def client(port: int) -> None:
        with trio.fail_after(10):
            while True:
                try:
                    stream = await way.client.connect(way.address, 8080, source_port=port)
                    break
                except OSError:
                    # The client's own kernel has it in TIME_WAIT, for which it needs a second before it takes it again.
                    await trio.sleep(0.05)
            async with stream:
                seen.append((port, (await stream.receive_some()).decode()))
                if closes_first == "server":
                    assert await stream.receive_some() == b""
                await stream.send_eof()
                if closes_first != "server":
                    assert await stream.receive_some() == b""

    async with open_daemon(way.proxy, CONFIG) as daemon:
        for round_ in range(1, 4):  # five ports at once, and each of them again twice: a round may take a second
            async with trio.open_nursery() as clients:
                for port in range(47001, 47006):
                    clients.start_soon(client, port)
            await until(lambda: len(daemon.records()) == 5 * round_)  # noqa: B023  # at once
    assert outcomes(daemon) == {"closed": 15}
    host = way.client.v6 if ":" in way.address else way.client.v4
    kept = sum(peer == format_address((host, port)) for port, peer in seen)
    print(f"{closes_first} first: {kept} of 15 with the client's own port")
    assert all(peer.rpartition(":")[0] == format_address((host, 0)).rpartition(":")[0] for _, peer in seen)


@pytest.mark.parametrize("number", [1])
@GATEWAY_V4
async def test_36_idle_connections_fit_the_budget(
    way: Way, nursery: trio.Nursery, counted: Callable[[int], int], number: int
) -> None:
    """8,000 that have said something and are silent now: memory of all processes, and no time at all."""
    count = counted(8000)
    nursery.start_soon(trio.serve_listeners, hold, [way.app.listen(way.bind, 8080, backlog=1024)])
    async with open_daemon(way.proxy, CONFIG + f"[relay]\nworkers = {number}\n") as daemon:
        async with many(way.client, way.address, 50) as warm:
            for stream in warm:
                await works(stream)
        await trio.sleep(0.3)
        before = memory_kib(daemon)
        async with many(way.client, way.address, count) as streams:
            for stream in streams:
                await works(stream)
            await trio.sleep(5.3)  # beyond settling
            each = (memory_kib(daemon) - before) / count
            share = await share_of_cpu(daemon, 2)
            print(f"{number} workers, {count} idle: {each:.2f} KiB PSS each, CPU {share:.2%}")
            assert each < 8
            assert share < 0.02
            for stream in streams:
                await reset(stream)
        await until(lambda: outcomes(daemon)["client_reset"] == count, within=30)


async def hold(stream: trio.SocketStream) -> None:
    try:
        while chunk := await stream.receive_some(65536):
            await stream.send_all(chunk)
        await stream.aclose()
    except trio.BrokenResourceError:
        await stream.aclose()


def address_space(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


@GATEWAY_V4
async def test_37_without_memory_a_worker_sheds_and_comes_back(way: Way, nursery: trio.Nursery) -> None:
    """RLIMIT_AS on the running worker stands in for a memory cgroup: allocations fail instead of an OOM kill."""
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, CONFIG) as daemon:
        (worker,) = workers(daemon)
        async with many(way.client, way.address, 10) as old:
            for stream in old:
                await works(stream)
            await trio.sleep(0.2)
            now = address_space(worker)
            hard = resource.prlimit(worker, resource.RLIMIT_AS)[1]
            resource.prlimit(worker, resource.RLIMIT_AS, (now + (2 << 20), hard))
            streams = [await dial(way.client, way.address) for _ in range(300)]
            for maybe in streams:
                if maybe is not None:
                    with suppress(trio.BrokenResourceError):
                        await maybe.send_all(b"x" * 200_000)
            await trio.sleep(1)
            for maybe in streams:
                if maybe is not None:
                    await reset(maybe)
            deaths = daemon.process.stderr_text.count("ended unexpectedly")
            for pid in workers(daemon):
                resource.prlimit(pid, resource.RLIMIT_AS, (hard, hard))
            with trio.fail_after(10):
                async with many(way.client, way.address, 5) as fresh:
                    for stream in fresh:
                        await works(stream)
        print(f"worker died {deaths} times; {daemon.process.stderr_text[-1500:]}")
        assert deaths <= 1
        assert daemon.process.returncode is None


@GATEWAY_V4
async def test_38_a_full_table_of_conntrack_does_not_touch_what_is_intercepted(way: Way, nursery: trio.Nursery) -> None:
    """The limit is the host's and is not changed. What a full table does, which is to drop packets of untracked-not connections
    that are new, a rule in the gateway does instead: after the kernel has tried to track them, and in both directions."""
    await nursery.start(serve_identity, way.app, 8080)
    await nursery.start(serve_identity, way.app, 9090)
    way.proxy.call(activate_conntrack)
    full = "table inet full {{\nchain {0} {{\ntype filter hook {0} priority -190;\nct state new counter drop\n}}\n}}\n"
    async with open_daemon(way.proxy, CONFIG) as daemon:
        for hook in ("prerouting", "output"):
            await way.proxy.run("nft", "-f", "-", input=full.format(hook))
        before = way.proxy.call(conntrack_count)
        with pytest.raises(trio.TooSlowError):
            await way.client.connect(way.address, 9090, timeout=0.3)  # not intercepted: as with a full table
        for _ in range(20):
            async with await way.client.connect(way.address, 8080) as stream:
                own = format_address(stream.socket.getsockname())
                assert json.loads(await stream.receive_some())["peer"] == own
        await until(lambda: outcomes(daemon) == {"closed": 20})
        assert way.proxy.call(conntrack_count) <= before + 1
