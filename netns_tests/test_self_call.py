"""Faults 39 to 41: whoever asks for the proxy itself, or for what only the proxy's own position could reach, gets nothing."""

from __future__ import annotations

import pytest
import trio

from netns_tests.labs import SPECIAL, open_special_lab
from netns_tests.watch import attempt
from netns_tests.way import BOTH_LAYOUTS, Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import Lab, Node, serve_identity
from tproxyd.testing.daemon import LabDaemon, open_daemon

ALL_PORTS = '[capture]\nports = "all"\n'
ONE_PORT = '[capture]\nports = ["8080"]\n'


@pytest.mark.parametrize("config", [ONE_PORT, ALL_PORTS], ids=["one port", "all ports"])
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_39_a_direct_hit_on_the_listener_costs_one_connection(
    sidecar_lab: Lab, address: str, config: str
) -> None:
    host = sidecar_lab["host"]
    async with open_daemon(host, config) as daemon:
        own = await attempt(host, address, 15006)
        assert await daemon.stop() == 0
    (record,) = daemon.records()
    assert record["outcome"] == "self_call"
    assert record["original_destination"] == format_address((address, 15006))
    assert record["upstream"] is None
    if own:
        assert record["source"] == own


@BOTH_LAYOUTS
async def test_39_the_listener_cannot_be_reached_from_the_network(way: Way) -> None:
    """Without the port captured there is nobody to connect to: the listeners are on loopback."""
    async with open_daemon(way.proxy, ONE_PORT) as daemon:
        for address in (way.proxy.v4, way.proxy.v6):
            with pytest.raises(ConnectionRefusedError):
                await attempt(way.client, address, 15006)
        assert await daemon.stop() == 0
    assert daemon.records() == []


@BOTH_LAYOUTS
async def test_40_the_listeners_port_at_another_address_of_the_proxy(way: Way) -> None:
    """Captured with every port: the destination is the proxy's own, the port the listener's. One connection each, closed."""
    async with open_daemon(way.proxy, ALL_PORTS) as daemon:
        addresses = [*way.proxy.v4_on.values(), *way.proxy.v6_on.values()]
        for address in addresses:
            await attempt(way.client, address, 15006)
        assert await daemon.stop() == 0
    assert [record["outcome"] for record in daemon.records()] == ["self_call"] * len(addresses)
    assert {record["original_destination"] for record in daemon.records()} == {
        format_address((address, 15006)) for address in addresses
    }


async def test_40_the_same_port_at_a_foreign_destination_is_served(gateway_lab: Lab, nursery: trio.Nursery) -> None:
    """Another host's port 15006 is nobody's but that host's."""
    await nursery.start(serve_identity, gateway_lab["server"], 15006)
    async with open_daemon(gateway_lab["gateway"], ALL_PORTS) as daemon:
        for address in ("203.0.113.9", "2001:db8:f::9"):
            async with await gateway_lab["client"].connect(address, 15006) as stream:
                own = format_address(stream.socket.getsockname())
                await stream.send_eof()
                while await stream.receive_some():
                    pass
            assert (await daemon.record(own))["outcome"] == "closed"


async def test_18_40_the_guard_knows_addresses_that_come_later(sidecar_lab: Lab) -> None:
    """An address added, and a whole network made local by a route, while the daemon runs."""
    host, client = sidecar_lab["host"], sidecar_lab["client"]
    later = ("192.0.2.99", "2001:db8:1::99", "203.0.113.7", "2001:db8:f::7")
    async with open_daemon(host, ALL_PORTS) as daemon:
        await host.run("ip", "address", "add", "192.0.2.99/24", "dev", "eth0")
        await host.run("ip", "address", "add", "2001:db8:1::99/64", "dev", "eth0", "nodad")
        await host.run("ip", "route", "add", "local", "203.0.113.0/24", "dev", "lo")
        await host.run("ip", "-6", "route", "add", "local", "2001:db8:f::/48", "dev", "lo")
        for address in later:
            await attempt(client, address, 15006)
        assert await daemon.stop() == 0
    assert [record["outcome"] for record in daemon.records()] == ["self_call"] * len(later)


async def test_41_special_destinations_are_refused_by_the_kernel() -> None:
    async with open_special_lab(router="192.0.2.1") as (client, host), open_daemon(host, ONE_PORT) as daemon:
        for address in SPECIAL:
            with pytest.raises(ConnectionRefusedError):
                await attempt(client, address, 8080)
        assert await daemon.stop() == 0
    assert daemon.records() == []


async def test_41_special_destinations_that_are_allowed_are_taken() -> None:
    allow = '[policy]\nallow_special = ["169.254.0.0/16", "100.100.100.200", "fd00:ec2::254", "64:ff9b::/96"]\n'
    async with open_special_lab(router="192.0.2.1") as (client, host), open_daemon(host, ONE_PORT + allow) as daemon:
        for address in SPECIAL:
            await attempt(client, address, 8080)
        assert await daemon.stop() == 0
    # Taken, and told that there is no way to them from here: the host has no route.
    assert [record["original_destination"] for record in daemon.records()] == [
        format_address((address, 8080)) for address in SPECIAL
    ]


async def test_41_loopback_destinations_from_outside_reach_nobody(sidecar_lab: Lab) -> None:
    """Even where route_localnet lets them in: what listens on the host's loopback is for the host."""
    host, client = sidecar_lab["host"], sidecar_lab["client"]
    host.set_sysctl("net.ipv4.conf.all.route_localnet", 1)
    # The client cannot be brought to send such a packet, so it is forged where it comes in: before prerouting sees it.
    await host.run("nft", "-f", "-", input=(
        "table netdev forge {\n"
        "chain in {\ntype filter hook ingress device eth0 priority 0;\nip daddr 198.51.100.1 ip daddr set 127.0.0.1\n}\n"
        "chain out {\ntype filter hook egress device eth0 priority 0;\nip saddr 127.0.0.1 ip saddr set 198.51.100.1\n}\n}\n"
    ))  # fmt: skip
    async with host.listen("127.0.0.1", 8080) as app, open_daemon(host, ONE_PORT) as daemon:
        # Proof that the way is open: an uncaptured port is answered by the host's loopback (refused: nobody listens).
        with pytest.raises(ConnectionRefusedError):
            await client.connect("198.51.100.1", 8081, timeout=2)
        with pytest.raises(ConnectionRefusedError):
            await attempt(client, "198.51.100.1", 8080)
        with trio.move_on_after(0.2) as nobody:
            await app.accept()
        assert nobody.cancelled_caught
        assert await daemon.stop() == 0
    assert daemon.records() == []


async def test_hairpin_is_served_like_any_other_port(sidecar_lab: Lab, nursery: trio.Nursery) -> None:
    """The proxy's own dial to a captured port of its own host must reach the app, not the proxy again."""
    host = sidecar_lab["host"]
    await nursery.start(serve_identity, host, 8080)
    async with open_daemon(host, ALL_PORTS) as daemon:
        own = await _one(daemon, sidecar_lab["client"], host.v4)
        assert await daemon.stop() == 0
    assert [record["source"] for record in daemon.records()] == [own]


async def _one(daemon: LabDaemon, client: Node, address: str) -> str:
    async with await client.connect(address, 8080) as stream:
        own = format_address(stream.socket.getsockname())
        await stream.send_eof()
        while await stream.receive_some():
            pass
    await daemon.record(own)
    return own
