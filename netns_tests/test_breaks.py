"""What breaks, and what does not come: refusals, resets, silence, peers that stop reading. Each is passed on, and told."""

from __future__ import annotations

import hashlib
import socket
from functools import partial
from pathlib import Path

import pytest
import trio

from netns_tests.watch import all_cpu_seconds, attempt, memory_kib, reset, resets_within
from netns_tests.way import BOTH_LAYOUTS, GATEWAY_V4, SIDECAR_V4, Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import (
    ROUTED,
    Lab,
    digest_of,
    open_lab,
    payload,
    serve_echo,
)
from tproxyd.testing.daemon import open_daemon

CONFIG = '[capture]\nports = ["8080"]\n'


@BOTH_LAYOUTS
async def test_27_upstream_refuses_the_client_is_reset_at_once(way: Way) -> None:
    async with open_daemon(way.proxy, CONFIG) as daemon:
        own = await attempt(way.client, way.address, source_port=45001)
        record = await daemon.record(own)
    assert record["outcome"] == "upstream_refused"
    assert (
        record["duration_ms"] < 100
    )  # the contract says 20 ms after it is learned; this one has room for a busy machine


async def test_27_unreachable_by_icmp_from_a_router(nursery: trio.Nursery) -> None:
    """The router's ICMP is addressed to the client, whose address our socket bears: it must be delivered at the gateway."""
    async with open_lab(ROUTED) as lab:
        gateway, router = lab["gateway"], lab["router"]
        await router.run("nft", "-f", "-", input=(
            "table inet wall { chain forward { type filter hook forward priority 0;\n"
            "ip daddr 203.0.113.0/24 tcp dport 8080 reject with icmp host-unreachable\n"
            "ip6 daddr 2001:db8:f::/48 tcp dport 8080 reject with icmpv6 addr-unreachable\n}\n}\n"
        ))  # fmt: skip
        async with open_daemon(gateway, CONFIG) as daemon:
            for destination in ("203.0.113.9", "2001:db8:f::9"):
                own = await attempt(lab["client"], destination, source_port=45002)
                record = await daemon.record(own)
                assert record["outcome"] == "upstream_unreachable"
                # Cables without any delay: the ICMP for the first SYN may arrive while connect() still holds the socket,
                # which the kernel then only notes. The one for the second SYN, a second later, ends it; the time-out is at 5 s.
                assert record["duration_ms"] < 1900


async def test_28_black_hole_resets_at_connect_timeout(gateway_lab: Lab) -> None:
    gateway = gateway_lab["gateway"]
    await gateway_lab["server"].run("nft", "-f", "-", input=(
        "table inet hole { chain in { type filter hook prerouting priority raw;\ntcp dport 8080 drop\n}\n}\n"
    ))  # fmt: skip
    async with open_daemon(gateway, CONFIG + '[upstream]\nconnect_timeout = "300ms"\n') as daemon:
        own = await attempt(gateway_lab["client"], "203.0.113.9", source_port=45003)
        record = await daemon.record(own)
    assert record["outcome"] == "upstream_timeout"
    assert 300 <= record["duration_ms"] < 2000


async def test_28_silence_towards_clients_addresses_is_told(gateway_lab: Lab) -> None:
    """Of another host alone, which may live: its answers to clients go another way, or are masqueraded. Once in five seconds."""
    gateway = gateway_lab["gateway"]
    hole = (
        "table inet hole { chain in { type filter hook prerouting priority -301;\ntcp dport { 8081, 9090 } drop\n}\n}\n"
    )
    await gateway_lab["server"].run("nft", "-f", "-", input=hole)
    await gateway.run("nft", "-f", "-", input=hole.replace("tcp dport", 'iif "lo" tcp dport'))
    rules = (
        f'[[policy.rule]]\nname = "app"\nports = ["8082"]\naction = {{ forward = "{gateway.v4}:9090" }}\n'
        '[[policy.rule]]\nname = "server"\nports = ["8080"]\naction = { forward = "203.0.113.9:9090" }\n'
    )
    client = gateway_lab["client"]
    for source in ("auto", "proxy"):
        config = (
            f'[capture]\nports = ["8080-8082"]\n[upstream]\nconnect_timeout = "200ms"\nsource = "{source}"\n{rules}'
        )
        async with open_daemon(gateway, config) as daemon:
            for port in (8082, 8080, 8081, 8081):  # to a local app; to the server
                own = await attempt(client, "203.0.113.9", port)
                assert (await daemon.record(own))["outcome"] == "upstream_timeout"
            assert await daemon.stop() == 0
        lines = [line for line in daemon.process.stderr_text.splitlines() if "no answer from" in line]
        assert len(lines) == (source == "auto")
        if lines:
            assert (
                f"no answer from 203.0.113.9:9090 to a connection that bears its client's address, {client.v4}; "
                in lines[0]
            )
            assert lines[0].endswith('set upstream.source = "proxy"')


@BOTH_LAYOUTS
async def test_29_upstream_resets_after_its_bytes(way: Way, nursery: trio.Nursery) -> None:
    """The client gets every byte that came before the reset, then the reset, and not an orderly end."""
    size = 3_000_000
    client_has_all = trio.Event()

    async def answer(stream: trio.SocketStream) -> None:
        for chunk in payload(size):
            await stream.send_all(chunk)
        await client_has_all.wait()
        await reset(stream)

    nursery.start_soon(trio.serve_listeners, answer, [way.app.listen(way.bind, 8080)])
    async with open_daemon(way.proxy, CONFIG) as daemon:
        async with await way.client.connect(way.address, 8080) as stream:
            own = format_address(stream.socket.getsockname())
            digest, received = hashlib.sha256(), 0
            while received < size:
                chunk = await stream.receive_some(65536)
                digest.update(chunk)
                received += len(chunk)
            client_has_all.set()
            with trio.fail_after(1), pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        record = await daemon.record(own)
    assert digest.hexdigest() == digest_of(size)
    assert record["outcome"] == "upstream_reset"


@BOTH_LAYOUTS
async def test_29_a_reset_does_not_overtake_what_came_before(way: Way, nursery: trio.Nursery) -> None:
    """The app sends and resets at once; a slow client still gets what the proxy had received."""

    async def answer(stream: trio.SocketStream) -> None:
        await stream.send_all(b"x" * 50_000)
        await stream.receive_some()  # the client's word that the proxy has read everything by now
        await reset(stream)

    nursery.start_soon(trio.serve_listeners, answer, [way.app.listen(way.bind, 8080)])
    async with open_daemon(way.proxy, CONFIG) as daemon, await way.client.connect(way.address, 8080) as stream:
        own = format_address(stream.socket.getsockname())
        await trio.lowlevel.wait_readable(stream.socket)
        await stream.send_all(b"go")
        await daemon.record(own)
        got = 0
        with pytest.raises(trio.BrokenResourceError):
            while True:
                got += len(await stream.receive_some(10_000))
    assert got == 50_000


@BOTH_LAYOUTS
async def test_30_client_aborts_mid_transfer(way: Way, nursery: trio.Nursery) -> None:
    """Downloading: the app's side is closed within 100 ms (with room for a busy machine)."""
    ended = trio.Event()

    async def answer(stream: trio.SocketStream) -> None:
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await stream.send_all(b"x" * 65536)
        ended.set()
        await stream.aclose()

    nursery.start_soon(trio.serve_listeners, answer, [way.app.listen(way.bind, 8080)])
    async with open_daemon(way.proxy, CONFIG) as daemon:
        stream = await way.client.connect(way.address, 8080)
        own = format_address(stream.socket.getsockname())
        await stream.receive_some(1000)
        await reset(stream)
        with trio.fail_after(1):
            await ended.wait()
        assert (await daemon.record(own))["outcome"] == "client_reset"


@BOTH_LAYOUTS
async def test_30_client_aborts_while_the_app_does_not_read(way: Way, nursery: trio.Nursery) -> None:
    """Uploading into a full pipe: nobody reads the client's side then, and still its reset is seen and passed on."""
    accepted: list[trio.SocketStream] = []
    seen = trio.Event()

    async def answer(stream: trio.SocketStream) -> None:
        accepted.append(stream)
        await seen.wait()
        with trio.fail_after(1), pytest.raises(trio.BrokenResourceError):
            while await stream.receive_some(65536):
                pass

    nursery.start_soon(trio.serve_listeners, answer, [way.app.listen(way.bind, 8080)])
    async with open_daemon(way.proxy, CONFIG) as daemon:
        stream = await way.client.connect(way.address, 8080)
        own = format_address(stream.socket.getsockname())
        full = False
        while not full:
            with trio.move_on_after(0.2) as stuck:
                await stream.send_all(b"x" * 65536)
            full = stuck.cancelled_caught
        await reset(stream)
        with trio.fail_after(2):
            record = await daemon.record(own)
        seen.set()
        assert record["outcome"] == "client_reset"


@BOTH_LAYOUTS
async def test_33_slow_reader_does_not_grow_the_proxy(way: Way, nursery: trio.Nursery) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await stream.send_all(b"x" * 65536)
        await stream.aclose()

    nursery.start_soon(trio.serve_listeners, answer, [way.app.listen(way.bind, 8080)])
    async with open_daemon(way.proxy, CONFIG) as daemon:
        before = memory_kib(daemon)
        streams = [await way.client.connect(way.address, 8080) for _ in range(10)]
        with trio.move_on_after(1):
            async for _ in streams[0]:
                pass
        assert memory_kib(daemon) - before < 8 * 1024
        for stream in streams:
            await reset(stream)


@GATEWAY_V4
@pytest.mark.timed
async def test_33_stalled_connections_cost_no_time(way: Way, nursery: trio.Nursery) -> None:
    """Nothing is polled for them: 300 downloads that nobody reads."""

    async def answer(stream: trio.SocketStream) -> None:
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await stream.send_all(b"x" * 65536)
        await stream.aclose()

    for node in (way.client, way.proxy, way.app):  # small buffers, so that they are full soon
        node.set_sysctl("net.ipv4.tcp_wmem", "4096 16384 32768")
        node.set_sysctl("net.ipv4.tcp_rmem", "4096 16384 32768")
    nursery.start_soon(trio.serve_listeners, answer, [way.app.listen(way.bind, 8080)])
    async with open_daemon(way.proxy, CONFIG) as daemon:
        streams = [await way.client.connect(way.address, 8080) for _ in range(300)]
        await trio.sleep(1)
        used = all_cpu_seconds(daemon)
        await trio.sleep(1)
        share = all_cpu_seconds(daemon) - used
        print(f"CPU with 300 stalled connections: {share:.1%}")
        assert share < 0.1
        for stream in streams:
            await reset(stream)
        with trio.fail_after(5):  # and still every reset is heard
            while len(daemon.records()) < 300:
                await trio.sleep(0.01)  # the log's length is no event
    assert {record["outcome"] for record in daemon.records()} == {"client_reset"}


@BOTH_LAYOUTS
async def test_idle_timeout_resets_both_sides(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(partial(serve_echo, way.app, 8080, address=way.bind))
    async with open_daemon(way.proxy, CONFIG + '[relay]\nidle_timeout = "300ms"\n') as daemon:
        async with await way.client.connect(way.address, 8080) as stream:
            own = format_address(stream.socket.getsockname())
            for _ in range(5):  # bytes that move keep it alive beyond the time-out
                await stream.send_all(b"hello")
                assert await stream.receive_some() == b"hello"
                await trio.sleep(0.1)
            with trio.fail_after(2), pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        record = await daemon.record(own)
    assert record["outcome"] == "idle_timeout"
    assert record["bytes_from_client"] == record["bytes_from_upstream"] == 25


@SIDECAR_V4
async def test_idle_timeout_reaches_a_connection_to_a_unix_socket(way: Way, tmp_path: Path) -> None:
    """It is connected at once, and so has never waited where most connections begin to wait."""
    listener = trio.socket.socket(socket.AF_UNIX)
    await listener.bind(str(tmp_path / "app"))
    listener.listen()
    config = f'{CONFIG}[upstream]\ntarget = "unix:{tmp_path}/app"\nconnect_timeout = "100ms"\n[relay]\nidle_timeout = "300ms"\n'
    with listener:
        async with open_daemon(way.proxy, config) as daemon:
            async with await way.client.connect(way.address, 8080) as stream:
                own = format_address(stream.socket.getsockname())
                assert await resets_within(stream, 2)
            record = await daemon.record(own)
    assert record["outcome"] == "idle_timeout"


@BOTH_LAYOUTS
async def test_half_close_timeout(way: Way, nursery: trio.Nursery) -> None:
    async def silent(stream: trio.SocketStream) -> None:
        with pytest.raises(trio.BrokenResourceError):
            while True:
                if not await stream.receive_some():
                    await trio.sleep(0.05)

    nursery.start_soon(trio.serve_listeners, silent, [way.app.listen(way.bind, 8080)])
    async with open_daemon(way.proxy, CONFIG + '[relay]\nhalf_close_timeout = "300ms"\n') as daemon:
        async with await way.client.connect(way.address, 8080) as stream:
            own = format_address(stream.socket.getsockname())
            await stream.send_eof()
            with trio.fail_after(2), pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        assert (await daemon.record(own))["outcome"] == "half_close_timeout"
