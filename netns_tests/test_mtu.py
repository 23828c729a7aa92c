"""Fault 51 in the ways that bear somebody else's address: the errors that tell of a small MTU, or of a route that is gone for a moment, are
addressed to that, and have to be heard here. Transfers complete."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from functools import partial

import pytest
import trio

from netns_tests.foreign import transparent_listener
from netns_tests.wire import Wiretap
from tproxyd.net.sockets import format_address
from tproxyd.testing import ROUTED, Lab, Link, Node, Route, Topology, digest_of, payload, serve_sink, serve_source
from tproxyd.testing.daemon import LabDaemon, open_daemon
from tproxyd.testing.plugin import OpenLab

SIZE = 2_000_000
SINK, SOURCE = 8080, 8081

NARROW = Topology(
    links=(
        Link("near:eth0", "client:eth0", v4="192.0.2.0/25", v6="2001:db8:1::/64"),
        Link("near:eth1", "proxy:eth0", v4="192.0.2.128/25", v6="2001:db8:4::/64"),
        Link("far:eth0", "proxy:eth1", v4="198.51.100.0/25", v6="2001:db8:3::/64"),
        Link("far:eth1", "server:eth0", v4="198.51.100.128/25", v6="2001:db8:2::/64"),
    ),
    routes=(
        Route("client", "0.0.0.0/0", "192.0.2.1"),
        Route("client", "::/0", "2001:db8:1::1"),
        Route("near", "0.0.0.0/0", "192.0.2.130"),
        Route("near", "::/0", "2001:db8:4::2"),
        Route("proxy", "192.0.2.0/25", "192.0.2.129"),
        Route("proxy", "2001:db8:1::/64", "2001:db8:4::1"),
        Route("proxy", "203.0.113.0/24", "198.51.100.1"),
        Route("proxy", "2001:db8:f::/48", "2001:db8:3::1"),
        Route("far", "0.0.0.0/0", "198.51.100.2"),
        Route("far", "::/0", "2001:db8:3::2"),
        Route("server", "0.0.0.0/0", "198.51.100.129"),
        Route("server", "::/0", "2001:db8:2::1"),
    ),
    forwarding=("near", "proxy", "far"),
    anyip=(("server", "203.0.113.0/24"), ("server", "2001:db8:f::/48")),
)
"""client - near - proxy - far - server."""


@asynccontextmanager
async def open_narrow_lab(open_lab: OpenLab) -> AsyncIterator[Lab]:
    """The routers pass 1400 bytes on to client and server, who do not know it: a link with such an MTU would be told of in their SYNs,
    and nobody would need an error."""
    async with open_lab(NARROW) as lab:
        near, far = lab["near"], lab["far"]
        for node, route in (
            (near, "-4 route replace 192.0.2.0/25 dev eth0"),
            (near, "-6 route add 2001:db8:1::/64 dev eth0 metric 1"),
            (far, "-4 route add 203.0.113.0/24 via 198.51.100.130"),
            (far, "-6 route add 2001:db8:f::/48 via 2001:db8:2::2"),
        ):
            await node.run("ip", *route.split(), "mtu", "lock", "1400")
        yield lab


SHORT = Topology(
    links=(Link("proxy:eth0", "client:eth0", v4="192.0.2.0/24", v6="2001:db8:1::/64", mtu=1400),),
    routes=(Route("client", "0.0.0.0/0", "192.0.2.1"), Route("client", "::/0", "2001:db8:1::1")),
)
"""client - proxy, 1400 bytes at once; the way to the proxy's own apps takes 65536."""


async def too_big(node: Node, family: str) -> int:
    """How many errors the node has taken that tell of an MTU. IPv4 counts them with those that tell of something unreachable."""
    if family == "v6":
        table = (await node.run("cat", "/proc/net/snmp6")).stdout.split()
        return int(table[table.index("Icmp6InPktTooBigs") + 1])
    names, values = (
        line.split()
        for line in (await node.run("cat", "/proc/net/snmp")).stdout.splitlines()
        if line.startswith("Icmp: ")
    )
    return int(values[names.index("InDestUnreachs")])


async def transfer(client: Node, address: str, daemon: LabDaemon, *, source_port: int = 0) -> list[tuple[str, str]]:
    """Up to the sink and down from the source, every byte; for each the client's address, and as whom the daemon connected."""
    seen = []
    with trio.fail_after(10):
        async with await client.connect(address, SINK, source_port=source_port) as stream:
            own = format_address(stream.socket.getsockname())
            for chunk in payload(SIZE):
                await stream.send_all(chunk)
            await stream.send_eof()
            assert (await stream.receive_some()).decode() == f"{digest_of(SIZE)} {SIZE}\n"
        seen.append((own, (await daemon.record(own))["upstream_source"]))
        digest = hashlib.sha256()
        async with await client.connect(address, SOURCE, source_port=source_port and source_port + 1) as stream:
            own = format_address(stream.socket.getsockname())
            await stream.send_eof()
            while received := await stream.receive_some(65536):
                digest.update(received)
        assert digest.hexdigest() == digest_of(SIZE)
        seen.append((own, (await daemon.record(own))["upstream_source"]))
    return seen


@asynccontextmanager
async def apps(*nodes: Node) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for node in nodes:
            await nursery.start(serve_sink, node, SINK)
            await nursery.start(partial(serve_source, node, SOURCE, size=SIZE))
        yield
        nursery.cancel_scope.cancel()


def config(target: str) -> str:
    return f'[capture]\nports = ["{SINK}-{SOURCE}"]\n[upstream]\nsource = "client"\ntarget = "{target}"\n'


@pytest.mark.parametrize("family", ["v4", "v6"])
@pytest.mark.parametrize("target", ["original", "loopback"])
async def test_51_a_small_mtu_behind_routers_on_either_side(open_lab: OpenLab, target: str, family: str) -> None:
    async with open_narrow_lab(open_lab) as lab:
        client, proxy = lab["client"], lab["proxy"]
        foreign, own = ("203.0.113.9", proxy.v4) if family == "v4" else ("2001:db8:f::9", proxy.v6)
        async with apps(lab["server"], proxy), open_daemon(proxy, config(target)) as daemon:
            for address in (foreign, own):  # what is learnt of the client's side is known from then on
                told = await too_big(proxy, family)
                seen = await transfer(client, address, daemon)
                more = await too_big(proxy, family) - told
                print(f"{address}, target {target}: {more} errors; {seen}")
                assert more >= (address == foreign) * (2 if target == "original" else 1)
                as_client = target == "loopback" or address == foreign
                assert all((upstream == client_) == as_client for client_, upstream in seen)
            assert await daemon.stop() == 0


@pytest.mark.parametrize("family", ["v4", "v6"])
async def test_51_a_small_mtu_where_the_client_s_port_is_taken(open_lab: OpenLab, family: str) -> None:
    """The client's address with another port: the gateway's fallback."""
    async with open_narrow_lab(open_lab) as lab:
        client, proxy = lab["client"], lab["proxy"]
        foreign, host = ("203.0.113.9", client.v4) if family == "v4" else ("2001:db8:f::9", client.v6)
        with (
            closing(proxy.call(transparent_listener, (host, 30001))),
            closing(proxy.call(transparent_listener, (host, 30002))),
        ):
            async with apps(lab["server"]), open_daemon(proxy, config("original")) as daemon:
                seen = await transfer(client, foreign, daemon, source_port=30001)
                assert await too_big(proxy, family) >= 2
                assert await daemon.stop() == 0
        for own, upstream in seen:
            assert upstream != own
            assert upstream.rpartition(":")[0] == own.rpartition(":")[0]


@pytest.mark.parametrize("family", ["v4", "v6"])
@pytest.mark.parametrize("target", ["original", "loopback"])
async def test_51_a_small_mtu_here_and_a_large_one_to_the_app(open_lab: OpenLab, target: str, family: str) -> None:
    async with open_lab(SHORT) as lab:
        proxy = lab["proxy"]
        async with apps(proxy), open_daemon(proxy, config(target)) as daemon:
            seen = await transfer(lab["client"], getattr(proxy, family), daemon)
            assert all((upstream == client) == (target == "loopback") for client, upstream in seen)
            assert await daemon.stop() == 0


@pytest.mark.parametrize("family", ["v4", "v6"])
async def test_51_errors_about_a_connection_that_lives_do_not_end_it(open_lab: OpenLab, family: str) -> None:
    """A router says "unreachable" for a while: TCP goes on trying, and everything arrives."""
    async with open_lab(ROUTED) as lab:
        client, gateway, router = lab["client"], lab["gateway"], lab["router"]
        foreign = "203.0.113.9" if family == "v4" else "2001:db8:f::9"
        wall = (
            "table inet wall {\nchain c {\ntype filter hook forward priority 0;\n"
            f"tcp dport {SINK} counter reject with icmpx host-unreachable\n}}\n}}\n"
        )
        async with apps(lab["server"]), open_daemon(gateway, config("original")) as daemon:
            async with await client.connect(foreign, SINK) as stream:
                own = format_address(stream.socket.getsockname())
                sent = 0
                with Wiretap(gateway) as tap:
                    for chunk in payload(SIZE):
                        if sent < SIZE // 2 <= sent + len(chunk):
                            await router.run("nft", "-f", "-", input=wall)
                        await stream.send_all(chunk)
                        sent += len(chunk)
                    with trio.fail_after(5):
                        while not [one for one in tap.heard() if one.flags == 0 and one.target == (foreign, SINK)]:
                            await trio.sleep(0.01)
                await router.run("nft", "delete", "table", "inet", "wall")
                with trio.fail_after(10):
                    await stream.send_eof()
                    assert (await stream.receive_some()).decode() == f"{digest_of(SIZE)} {SIZE}\n"
            record = await daemon.record(own)
            assert (record["outcome"], record["upstream_source"]) == ("closed", own)
            assert await daemon.stop() == 0
