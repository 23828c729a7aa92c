"""The topologies that only some files here need: clients behind a bridge, and a router that knows special addresses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tproxyd.testing import SIDECAR, Lab, Link, Node, Route, Topology, open_lab

__all__ = ["BRIDGE", "SPECIAL", "open_bridged_lab", "open_special_lab", "until_it_forwards"]


BRIDGE = Path("/proc/sys/net/bridge")


@asynccontextmanager
async def open_bridged_lab(bridge_netfilter: str) -> AsyncIterator[Lab]:
    """A gateway whose clients are behind a bridge, with br_netfilter (where the kernel has it) on, "1", or off."""
    bridged = Topology(
        links=(
            Link("gateway:port", "client:eth0"),
            Link("gateway:eth1", "server:eth0", v4="198.51.100.0/24", v6="2001:db8:2::/64"),
        ),
        addresses=(("client:eth0", "192.0.2.2/24"), ("client:eth0", "2001:db8:1::2/64")),
        routes=(Route("server", "0.0.0.0/0", "198.51.100.1"), Route("server", "::/0", "2001:db8:2::1")),
        forwarding=("gateway",),
    )
    async with open_lab(bridged) as lab:
        gateway, client = lab["gateway"], lab["client"]
        for command in (
            "link add br0 type bridge",
            "link set port master br0",
            "link set br0 up",
            "address add 192.0.2.1/24 dev br0",
            "address add 2001:db8:1::1/64 dev br0 nodad",
        ):
            await gateway.run("ip", *command.split())
        await client.run("ip", "route", "add", "default", "via", "192.0.2.1")
        await client.run("ip", "-6", "route", "add", "default", "via", "2001:db8:1::1")
        if gateway.call(BRIDGE.exists):
            for tables in ("iptables", "ip6tables"):
                gateway.set_sysctl(f"net/bridge/bridge-nf-call-{tables}", bridge_netfilter)
        yield lab


async def until_it_forwards(client: Node, server: Node) -> None:
    """A bridge's port begins to forward when it has learned enough; a connection is the event."""
    with trio.fail_after(20):
        for address in (server.v4, server.v6):
            while True:
                try:
                    async with await client.connect(address, 8080, timeout=1):
                        break
                except (trio.TooSlowError, OSError):
                    await trio.sleep(0.05)


@asynccontextmanager
async def open_special_lab(*, router: str) -> AsyncIterator[tuple[Node, Node]]:
    """(client, host): special destinations are routed to the host, as an attacker on the link would send them."""
    special = Topology(
        links=(Link("host:eth0", "client:eth0", v4="192.0.2.0/24", v6="2001:db8:1::/64"),),
        routes=(
            *SIDECAR.routes,
            Route("client", "169.254.0.0/16", router),
            Route("client", "100.100.100.200/32", router),
            Route("client", "fd00:ec2::254/128", "2001:db8:1::1"),
            Route("client", "64:ff9b::/96", "2001:db8:1::1"),
        ),
    )
    async with open_lab(special) as lab:
        yield lab["client"], lab["host"]


SPECIAL = ("169.254.169.254", "169.254.1.1", "100.100.100.200", "fd00:ec2::254", "64:ff9b::6464:64c8")
