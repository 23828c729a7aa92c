"""What a throwaway network looks like: nodes, links between them, routes. Pure data; opens nothing.

Knows the one rule of addresses: of a link's subnet the left end gets the first host (.1, ::1) and the right end the
second (.2, ::2). Write the router on the left and it has the .1 that people expect of a router. Refuses to know how a
topology comes into being (`build`) and what runs in it (`lab`).

Addresses come from the documentation ranges (RFC 5737, RFC 3849) only, so that nothing in a lab can mean a real host.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["GATEWAY", "ROUTED", "SIDECAR", "Link", "Route", "Topology"]


@dataclass(frozen=True)
class Link:
    """A virtual cable between two ends written "node:interface". `mtu` 0 leaves the kernel's 1500."""

    left: str
    right: str
    v4: str = ""
    v6: str = ""
    mtu: int = 0

    def ends(self) -> tuple[tuple[str, str, tuple[str, ...]], tuple[str, str, tuple[str, ...]]]:
        """Both ends, left first: node, interface, and its addresses as "address/prefix length", IPv4 first."""
        networks = [ipaddress.ip_network(subnet) for subnet in (self.v4, self.v6) if subnet]
        (left_node, left_name), (right_node, right_name) = split_end(self.left), split_end(self.right)
        return (
            (left_node, left_name, tuple(f"{network[1]}/{network.prefixlen}" for network in networks)),
            (right_node, right_name, tuple(f"{network[2]}/{network.prefixlen}" for network in networks)),
        )


@dataclass(frozen=True)
class Route:
    """`node` reaches `destination` (a network; 0.0.0.0/0 is the default route) through the router `via`."""

    node: str
    destination: str
    via: str


@dataclass(frozen=True)
class Topology:
    """A whole network. `anyip` are (node, network) pairs: the node answers for every address of the network, although no
    interface has it, through `local NETWORK dev lo`. `addresses` are further ("node:interface", "address/length") pairs;
    "node:lo" is an interface, too. `nodes` adds nodes that no link names.
    """

    links: tuple[Link, ...] = ()
    routes: tuple[Route, ...] = ()
    forwarding: tuple[str, ...] = ()
    anyip: tuple[tuple[str, str], ...] = ()
    addresses: tuple[tuple[str, str], ...] = ()
    nodes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = set(self.node_names())
        for named in (*(route.node for route in self.routes), *self.forwarding, *(node for node, _ in self.anyip)):
            if named not in known:
                raise ValueError(
                    f"node {named!r} is on no link of the topology and not in nodes; known: {sorted(known)}"
                )
        ends = {end for link in self.links for end in (link.left, link.right)} | {f"{node}:lo" for node in known}
        for end, address in self.addresses:
            if end not in ends:
                raise ValueError(f"address {address} is for {end!r}, which is no end of a link; known: {sorted(ends)}")

    def node_names(self) -> tuple[str, ...]:
        """Every node once, in the order in which the topology first names it."""
        names = [split_end(end)[0] for link in self.links for end in (link.left, link.right)]
        return tuple(dict.fromkeys([*names, *self.nodes]))

    def addresses_of(self, node: str) -> Iterator[tuple[str, str]]:
        """(interface, "address/length") of one node: from the links in their order, then from `addresses`."""
        for link in self.links:
            for name, interface, addresses in link.ends():
                if name == node:
                    for address in addresses:
                        yield interface, address
        for end, address in self.addresses:
            if split_end(end)[0] == node:
                yield split_end(end)[1], address


def split_end(end: str) -> tuple[str, str]:
    """("client", "eth0") of "client:eth0"."""
    node, _, interface = end.partition(":")
    if not node or not interface:
        raise ValueError(f"{end!r} is not of the form node:interface")
    return node, interface


GATEWAY = Topology(
    links=(
        Link("gateway:eth0", "client:eth0", v4="192.0.2.0/24", v6="2001:db8:1::/64"),
        Link("gateway:eth1", "server:eth0", v4="198.51.100.0/24", v6="2001:db8:2::/64"),
    ),
    routes=(
        Route("client", "0.0.0.0/0", "192.0.2.1"),
        Route("client", "::/0", "2001:db8:1::1"),
        Route("server", "0.0.0.0/0", "198.51.100.1"),
        Route("server", "::/0", "2001:db8:2::1"),
        Route("gateway", "203.0.113.0/24", "198.51.100.2"),
        Route("gateway", "2001:db8:f::/48", "2001:db8:2::2"),
    ),
    forwarding=("gateway",),
    anyip=(("server", "203.0.113.0/24"), ("server", "2001:db8:f::/48")),
)
"""client - gateway - server. 203.0.113.0/24 and 2001:db8:f::/48 are foreign destinations that the server answers for."""

SIDECAR = Topology(
    links=(Link("host:eth0", "client:eth0", v4="192.0.2.0/24", v6="2001:db8:1::/64"),),
    routes=(Route("client", "0.0.0.0/0", "192.0.2.1"), Route("client", "::/0", "2001:db8:1::1")),
)
"""client - host. The app lives on host; the client sends everything there, foreign destinations included."""

ROUTED = Topology(
    links=(
        Link("gateway:eth0", "client:eth0", v4="192.0.2.0/25", v6="2001:db8:1::/64"),
        Link("router:eth0", "gateway:eth1", v4="198.51.100.0/25", v6="2001:db8:3::/64"),
        Link("router:eth1", "server:eth0", v4="198.51.100.128/25", v6="2001:db8:2::/64", mtu=1400),
    ),
    routes=(
        Route("client", "0.0.0.0/0", "192.0.2.1"),
        Route("client", "::/0", "2001:db8:1::1"),
        Route("gateway", "0.0.0.0/0", "198.51.100.1"),
        Route("gateway", "::/0", "2001:db8:3::1"),
        Route("router", "192.0.2.0/25", "198.51.100.2"),
        Route("router", "2001:db8:1::/64", "2001:db8:3::2"),
        Route("router", "203.0.113.0/24", "198.51.100.130"),
        Route("router", "2001:db8:f::/48", "2001:db8:2::2"),
        Route("server", "0.0.0.0/0", "198.51.100.129"),
        Route("server", "::/0", "2001:db8:2::1"),
    ),
    forwarding=("gateway", "router"),
    anyip=(("server", "203.0.113.0/24"), ("server", "2001:db8:f::/48")),
)
"""client - gateway - router - server, the last hop with an MTU of 1400. The server knows that, and its SYNs tell it; where only ICMP is to tell,
a route of the router's has to have an MTU (`mtu lock`)."""
