"""Capture: both layouts, both families, foreign destinations, the client's own address, no conntrack, exact selectors."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable

import pytest
import trio

from netns_tests.drift import events
from tproxyd.net.sockets import format_address, open_upstream
from tproxyd.testing import Lab, activate_conntrack, conntrack_count, serve_identity
from tproxyd.testing.daemon import LabDaemon, open_daemon
from tproxyd.testing.node import Node

CONFIG = '[capture]\nports = ["8080"]\n'
FOREIGN = ("203.0.113.77", "2001:db8:f::77")


async def ask(node: Node, address: str, port: int = 8080, *, source: str | None = None) -> tuple[str, dict[str, str]]:
    """Connects and gives the own address and what the server says about the connection."""
    async with await node.connect(address, port, source=source) as stream:
        own = format_address(stream.socket.getsockname())
        await stream.send_eof()
        answer = b""
        async for chunk in stream:
            answer += chunk
    return own, json.loads(answer)


@pytest.mark.parametrize("destination", FOREIGN)
async def test_gateway_foreign_destination_keeps_client_address_and_port(
    gateway_lab: Lab, nursery: trio.Nursery, destination: str
) -> None:
    await nursery.start(serve_identity, gateway_lab["server"], 8080)
    async with open_daemon(gateway_lab["gateway"], CONFIG) as daemon:
        own, seen = await ask(gateway_lab["client"], destination)
        record = await daemon.record(own)
    wanted = format_address((destination, 8080))
    assert seen == {"peer": own, "local": wanted}
    assert record["original_destination"] == record["upstream"] == wanted
    assert record["source"] == record["upstream_source"] == own
    assert record["outcome"] == "closed"
    assert record["direction"] == "inbound"
    assert record["protocol"] == "tcp"
    assert record["workload"] == "host"
    assert record["rule"] is None


@pytest.mark.parametrize("family", ["v4", "v6"])
async def test_gateway_server_address_keeps_client_address_and_port(
    gateway_lab: Lab, nursery: trio.Nursery, family: str
) -> None:
    await nursery.start(serve_identity, gateway_lab["server"], 8080)
    destination = getattr(gateway_lab["server"], family)
    async with open_daemon(gateway_lab["gateway"], CONFIG) as daemon:
        own, seen = await ask(gateway_lab["client"], destination)
        record = await daemon.record(own)
    assert seen == {"peer": own, "local": format_address((destination, 8080))}
    assert record["original_destination"] == format_address((destination, 8080))


@pytest.mark.parametrize("family", ["v4", "v6"])
async def test_sidecar_relays_to_the_local_app(sidecar_lab: Lab, nursery: trio.Nursery, family: str) -> None:
    host = sidecar_lab["host"]
    await nursery.start(serve_identity, host, 8080)
    destination = getattr(host, family)
    async with open_daemon(host, CONFIG) as daemon:
        own, seen = await ask(sidecar_lab["client"], destination)
        record = await daemon.record(own)
    assert record["original_destination"] == seen["local"] == format_address((destination, 8080))
    # As the proxy: with the client's own address the 4-tuple would be the intercepted one.
    assert record["upstream_source"] == seen["peer"]
    assert seen["peer"] != own
    assert record["outcome"] == "closed"


@pytest.mark.parametrize("family", ["v4", "v6"])
async def test_an_app_on_loopback_where_only_the_hosts_own_address_has_a_way_to_the_client(
    sidecar_lab: Lab, nursery: trio.Nursery, family: str
) -> None:
    """As on a host with several providers, each of which takes its own addresses alone. From ::1 nothing would reach the client either."""
    host, client = sidecar_lab["host"], sidecar_lab["client"]
    await nursery.start(serve_identity, host, 8080)
    address, network = (host.v4, "192.0.2.0/24") if family == "v4" else (host.v6, "2001:db8:1::/64")
    for command in (
        f"route add {network} dev eth0 table 100",
        f"route del {network} dev eth0",
        f"rule add from {address} lookup 100",
    ):
        await host.run("ip", "-4" if family == "v4" else "-6", *command.split())
    config = '[capture]\nports = ["8080"]\n[upstream]\ntarget = "loopback"\nsource = "client"\n'
    before = await host.dump()
    async with open_daemon(host, config) as daemon:
        with trio.fail_after(5):
            own, seen = await ask(client, address)
        assert seen["peer"] == own
        assert await daemon.stop() == 0
        assert not events(daemon)
    assert await host.dump() == before


@pytest.mark.parametrize("destination", FOREIGN)
async def test_sidecar_intercepts_a_destination_that_no_interface_has(sidecar_lab: Lab, destination: str) -> None:
    client = sidecar_lab["client"]
    own = format_address((client.v6 if ":" in destination else client.v4, 45000))
    async with open_daemon(sidecar_lab["host"], CONFIG) as daemon:
        # The host has no route there: accepted by the proxy, then reset, never closed in an orderly way. On a wire as short as
        # this the reset may come before connect() has returned.
        with pytest.raises((trio.BrokenResourceError, ConnectionResetError)):
            async with await client.connect(destination, 8080, source_port=45000) as stream:
                await stream.receive_some()
        record = await daemon.record(own)
    assert record["original_destination"] == format_address((destination, 8080))
    assert record["outcome"] == "upstream_unreachable"


@pytest.mark.parametrize("source", ["auto", "proxy"])
async def test_no_conntrack_entry_gateway(
    gateway_lab: Lab, nursery: trio.Nursery, counted: Callable[[int], int], source: str
) -> None:
    gateway = gateway_lab["gateway"]
    await nursery.start(serve_identity, gateway_lab["server"], 8080)
    gateway.call(activate_conntrack)
    # Proof that tracking is active: a connection that is not captured has an entry.
    await nursery.start(serve_identity, gateway_lab["server"], 8081)
    await ask(gateway_lab["client"], gateway_lab["server"].v4, 8081)
    before = gateway.call(conntrack_count)
    assert before > 0
    async with open_daemon(gateway, CONFIG + f'[upstream]\nsource = "{source}"\n') as daemon:
        await ask_many(gateway_lab["client"], [*FOREIGN, gateway_lab["server"].v4], counted(1000))
        assert gateway.call(conntrack_count) <= before
        assert await daemon.stop() == 0
    assert [record["outcome"] for record in daemon.records()] == ["closed"] * counted(1000)


async def test_no_conntrack_entry_sidecar(
    sidecar_lab: Lab, nursery: trio.Nursery, counted: Callable[[int], int]
) -> None:
    host = sidecar_lab["host"]
    await nursery.start(serve_identity, host, 8080)
    host.call(activate_conntrack)
    async with open_daemon(host, CONFIG) as daemon:
        await ask_many(sidecar_lab["client"], [host.v4, host.v6], counted(1000))
        assert host.call(conntrack_count) == 0
        assert await daemon.stop() == 0
    assert [record["outcome"] for record in daemon.records()] == ["closed"] * counted(1000)


async def ask_many(client: Node, destinations: list[str], number: int) -> None:
    """`number` connections, ten at a time, round robin over the destinations; each one answered."""
    limiter = trio.CapacityLimiter(10)

    async def one(destination: str) -> None:
        async with limiter:
            await ask(client, destination)

    async with trio.open_nursery() as nursery:
        for index in range(number):
            nursery.start_soon(one, destinations[index % len(destinations)])


async def test_without_capture_conntrack_sees_the_same_traffic(gateway_lab: Lab, nursery: trio.Nursery) -> None:
    """The counterpart of the tests above: the same connections without tproxyd do leave entries."""
    await nursery.start(serve_identity, gateway_lab["server"], 8080)
    gateway_lab["gateway"].call(activate_conntrack)
    await ask_many(gateway_lab["client"], [FOREIGN[0]], 10)
    assert gateway_lab["gateway"].call(conntrack_count) >= 10


async def test_port_edges_are_exact(gateway_lab: Lab, nursery: trio.Nursery) -> None:
    captured, others = (8080, 9000, 9050, 9099), (8079, 8999, 9005, 9100)
    for port in captured + others:
        await nursery.start(serve_identity, gateway_lab["server"], port)
    config = '[capture]\nports = ["8080", "9000-9099"]\nexclude_ports = ["22", "9005"]\n'
    async with open_daemon(gateway_lab["gateway"], config) as daemon:
        expected = {}
        for port in captured + others:
            for destination in FOREIGN:
                own, _ = await ask(gateway_lab["client"], destination, port)
                expected[own, format_address((destination, port))] = port in captured
        assert await daemon.stop() == 0
    seen = {(record["source"], record["original_destination"]) for record in daemon.records()}
    assert {one: one in seen for one in expected} == expected


async def assert_intercepted(daemon: LabDaemon, expected: dict[str, bool]) -> None:
    """Which of the client addresses went through the daemon. Its clean end proves that no record is late."""
    assert await daemon.stop() == 0
    seen = {record["source"] for record in daemon.records()}
    assert {own: own in seen for own in expected} == expected


@pytest.mark.parametrize(
    ("name", "selector", "v4", "v6"),
    [
        ("excluded source", 'exclude_sources = ["192.0.2.2", "2001:db8:1::2"]', False, False),
        ("other source excluded", 'exclude_sources = ["192.0.2.3", "2001:db8:1::/127"]', True, True),
        ("captured source", 'sources = ["192.0.2.0/24", "2001:db8:1::/64"]', True, True),
        ("other source captured", 'sources = ["192.0.2.3"]', False, False),
        ("only one family is a source", 'sources = ["192.0.2.0/24"]', True, False),
        ("captured interface", 'interfaces = ["eth0"]', True, True),
        ("wildcard interface", 'interfaces = ["et*"]', True, True),
        ("other interface", 'interfaces = ["eth1", "veth*"]', False, False),
        ("excluded interface", 'exclude_interfaces = ["eth0"]', False, False),
        ("excluded wildcard", 'exclude_interfaces = ["eth*"]', False, False),
        ("captured destination", 'destinations = ["203.0.113.64/26", "2001:db8:f::/64"]', True, True),
        ("other destination", 'destinations = ["203.0.113.0/26", "2001:db8:f:1::/64"]', False, False),
        ("local destinations only", 'destinations = ["local"]', False, False),
        ("excluded destination", 'exclude_destinations = ["203.0.113.77"]', False, True),
        ("local destinations excluded", 'exclude_destinations = ["local"]', True, True),
        ("all ports", 'ports = "all"', True, True),
    ],
)
async def test_selectors(gateway_lab: Lab, nursery: trio.Nursery, name: str, selector: str, v4: bool, v6: bool) -> None:
    await nursery.start(serve_identity, gateway_lab["server"], 8080)
    ports = "" if selector.startswith("ports") else 'ports = ["8080"]\n'
    async with open_daemon(gateway_lab["gateway"], f"[capture]\n{ports}{selector}\n") as daemon:
        own, seen = await ask(gateway_lab["client"], FOREIGN[0])
        own6, seen6 = await ask(gateway_lab["client"], FOREIGN[1])
        # Captured or not, the server sees the client itself.
        assert (seen["peer"], seen6["peer"]) == (own, own6)
        await assert_intercepted(daemon, {own: v4, own6: v6})


async def test_what_the_host_sends_to_itself_is_not_captured(sidecar_lab: Lab, nursery: trio.Nursery) -> None:
    host = sidecar_lab["host"]
    await nursery.start(serve_identity, host, 8080)
    async with open_daemon(host, CONFIG) as daemon:
        calls = [await ask(host, destination) for destination in (host.v4, host.v6)]
        own, _ = await ask(sidecar_lab["client"], host.v4)
        await daemon.record(own)
        assert [record["source"] for record in daemon.records()] == [own]
    assert all(seen["peer"] == own for own, seen in calls)


@pytest.mark.parametrize("cookies", ["1", "2"])
async def test_syn_cookies_to_a_local_address(sidecar_lab: Lab, nursery: trio.Nursery, cookies: str) -> None:
    """With a cookie there is no socket yet when the client's ACK arrives; the app listens on the same port, too."""
    host = sidecar_lab["host"]
    host.set_sysctl("net.ipv4.tcp_syncookies", cookies)
    await nursery.start(serve_identity, host, 8080)
    async with open_daemon(host, CONFIG) as daemon:
        for destination in (host.v4, host.v6):
            own, _ = await ask(sidecar_lab["client"], destination)
            assert (await daemon.record(own))["outcome"] == "closed"


async def test_26_a_client_that_uses_its_port_again(gateway_lab: Lab, nursery: trio.Nursery) -> None:
    """The spoofed 4-tuple is in TIME_WAIT at the gateway when the client comes again from the same port."""
    await nursery.start(serve_identity, gateway_lab["server"], 8080)
    client = gateway_lab["client"]
    client.set_sysctl("net.ipv4.tcp_tw_reuse", "1")
    async with open_daemon(gateway_lab["gateway"], CONFIG) as daemon:
        for _ in range(5):
            with trio.fail_after(1):  # a stall would be one SYN retransmission: a second
                async with await client.connect(FOREIGN[0], 8080, source=client.v4, source_port=45000) as stream:
                    # The server closes first, so the gateway's upstream side closes second and its downstream side first.
                    answer = await stream.receive_some()
                    assert json.loads(answer)["peer"] == f"{client.v4}:45000"
                    await stream.send_eof()
                    assert await stream.receive_some() == b""
                    stream.socket.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )  # free the client's own port
        assert await daemon.stop() == 0
    outcomes = [record["outcome"] for record in daemon.records()]
    assert len(outcomes) == 5
    assert set(outcomes) <= {"closed", "client_reset"}


async def test_upstream_mark_brings_the_apps_answers_back(sidecar_lab: Lab, nursery: trio.Nursery) -> None:
    """What `tproxyd apply` offers to any proxy: a socket with the upstream mark may bear the client's address towards the app."""
    host = sidecar_lab["host"]
    await nursery.start(serve_identity, host, 8080)
    host.call(activate_conntrack)
    host.set_sysctl("net.ipv4.tcp_fwmark_accept", "1")
    async with open_daemon(host, CONFIG):
        for source, destination in (("192.0.2.200", host.v4), ("2001:db8:1::200", host.v6)):
            with trio.socket.from_stdlib_socket(host.call(_marked_socket, source)) as sock:
                with trio.fail_after(2):
                    await sock.connect((destination, 8080))
                    answer = json.loads(await sock.recv(4096))
            assert answer["peer"].startswith(format_address((source, 0))[:-1])
        assert host.call(conntrack_count) == 0


def _marked_socket(source: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    sock = socket.socket(fileno=open_upstream(family, source=(source, 0)).detach())
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x2000000)
    return sock
