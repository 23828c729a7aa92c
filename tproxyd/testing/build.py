"""Makes a topology real: namespaces, cables, addresses, routes, with pyroute2. Blocking, trio-free.

Knows that every netlink call is made in a throwaway thread inside the node's namespace, with IPRoute opened, used and
closed there (never IPRoute(netns=), which forks a helper and makes a namespace that is missing). Refuses to touch the namespace of the caller: a cable is
made inside one node with its other end put straight into the other node by descriptor.

When `build` returns, TCP works at once over IPv4 and IPv6: no duplicate address detection, no router solicitation, and
carrier and addresses were waited for.
"""

from __future__ import annotations

import ipaddress
import select
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tproxyd.net.namespaces import call_in_namespace
from tproxyd.testing.topology import Link, Route, Topology

if TYPE_CHECKING:
    from pyroute2 import IPRoute

__all__ = ["LabError", "build", "read_sysctl", "write_sysctl"]

_SYSCTL = Path("/proc/sys")
_READY_SECONDS = 5.0  # measured: 0 to 2 ms; a loaded machine may take longer

# A fresh namespace copies net.ipv4.conf of the initial one (net.core.devconf_inherit_init_net=0), so a lab would differ
# from host to host (Docker: forwarding on; systemd: rp_filter=2). These are the kernel's own defaults...
_DEFAULTS = {
    "net.ipv4.ip_forward": "0",
    "net.ipv6.conf.all.forwarding": "0",
    **{
        f"net.ipv4.conf.{scope}.{name}": value
        for scope in ("all", "default")
        for name, value in (("rp_filter", "0"), ("src_valid_mark", "0"), ("accept_local", "0"), ("route_localnet", "0"))
    },
    # ... and these make IPv6 addresses usable at once and the link quiet.
    **{
        f"net.ipv6.conf.{scope}.{name}": "0"
        for scope in ("all", "default")
        for name in ("accept_dad", "dad_transmits", "router_solicitations", "accept_ra", "autoconf", "disable_ipv6")
    },
}

_BRIDGE = tuple(f"net.bridge.bridge-nf-call-{tables}" for tables in ("arptables", "iptables", "ip6tables"))

_FIRST_LEFT_INDEX = 100
"""Left ends get 100, 101, ... and right ends the kernel's 2, 3, ...: the two ends of a cable must not have the same index.

If they have, the kernel takes the change of carrier for one that is not urgent (linkwatch_urgent_event) and reports it up to
a second later; until then IPv6 has no route on the link.
"""

_IFA_F_NODAD = 0x02  # linux/if_addr.h
_IFA_F_TENTATIVE = 0x40
_LOOPBACK_INDEX = 1
_RTN_LOCAL = 2
_SCOPE_HOST = 254
_TABLE_LOCAL = 255
_RTMGRP_LINK, _RTMGRP_IPV4_IFADDR, _RTMGRP_IPV6_IFADDR = 0x1, 0x10, 0x100  # linux/rtnetlink.h


class LabError(Exception):
    """The lab cannot do what was asked for; one sentence that says why."""


def build(topology: Topology, netns: Mapping[str, int]) -> None:
    """Fills the empty namespaces of `netns` (node: descriptor). Takes some ms a node; the first call also imports pyroute2."""
    import pyroute2  # noqa: F401  # here, not in the node's thread: the import is slow and must happen only once

    for name in netns:
        call_in_namespace(netns[name], _prepare, name in topology.forwarding)
    for position, link in enumerate(topology.links):
        (left, _, _), (right, _, _) = link.ends()
        call_in_namespace(netns[left], _with_netlink, _add_link, link, _FIRST_LEFT_INDEX + position, netns[right])
    for name in netns:
        call_in_namespace(netns[name], _with_netlink, _add_addresses, topology, name)
    for name in netns:  # a second pass: a route needs its link's carrier, so both ends must be up
        call_in_namespace(netns[name], _with_netlink, _finish, topology, name)


def read_sysctl(name: str) -> str:
    """Of the calling thread's namespace. `name` with dots, or with slashes where an interface's name has a dot."""
    return _sysctl_path(name).read_text(encoding="utf-8").strip()


def write_sysctl(name: str, value: str) -> None:
    """Of the calling thread's namespace."""
    _sysctl_path(name).write_text(f"{value}\n", encoding="utf-8")


def _sysctl_path(name: str) -> Path:
    return _SYSCTL / (name if "/" in name else name.replace(".", "/"))


def _prepare(forwarding: bool) -> None:
    for name, value in _DEFAULTS.items():
        write_sysctl(name, value)
    for name in _BRIDGE:
        if _sysctl_path(name).exists():  # a host that has br_netfilter gives every new namespace a 1 here
            write_sysctl(name, "0")
    if forwarding:
        # Last: changing a forwarding switch resets other settings of the namespace to those of a router or host.
        write_sysctl("net.ipv4.ip_forward", "1")
        write_sysctl("net.ipv6.conf.all.forwarding", "1")


def _with_netlink(function: Callable[..., None], *args: Any) -> None:
    from pyroute2 import IPRoute

    with IPRoute() as netlink:
        function(netlink, *args)


def _add_link(netlink: IPRoute, link: Link, index: int, right_netns: int) -> None:
    (_, left_name, _), (_, right_name, _) = link.ends()
    mtu = {"mtu": link.mtu} if link.mtu else {}
    peer = {"ifname": right_name, "net_ns_fd": right_netns, **mtu}
    netlink.link("add", kind="veth", ifname=left_name, index=index, peer=peer, **mtu)


def _add_addresses(netlink: IPRoute, topology: Topology, node: str) -> None:
    indexes = {link.get_attr("IFLA_IFNAME"): link["index"] for link in netlink.get_links()}
    for index in indexes.values():
        netlink.link("set", index=index, state="up")
    for interface, text in topology.addresses_of(node):
        address = ipaddress.ip_interface(text)
        flags = {"flags": _IFA_F_NODAD} if address.version == 6 else {}
        netlink.addr(
            "add", index=indexes[interface], address=str(address.ip), prefixlen=address.network.prefixlen, **flags
        )


def _finish(netlink: IPRoute, topology: Topology, node: str) -> None:
    _wait_until_ready(netlink, node)
    for route in topology.routes:
        if route.node == node:
            _add_route(netlink, route)
    for name, network in topology.anyip:
        if name == node:
            # The v4 local route needs its scope spelled out, on add and on delete.
            version = ipaddress.ip_network(network).version
            scope = {"scope": _SCOPE_HOST} if version == 4 else {}
            netlink.route(
                "add",
                dst=network,
                family=_family(version),
                oif=_LOOPBACK_INDEX,
                type=_RTN_LOCAL,
                table=_TABLE_LOCAL,
                **scope,
            )


def _add_route(netlink: IPRoute, route: Route) -> None:
    version = ipaddress.ip_network(route.destination).version
    try:
        netlink.route("add", dst=route.destination, gateway=route.via, family=_family(version))
    except Exception as error:  # whatever the kernel or pyroute2 says, it is told with the route that it is about
        raise LabError(f"{route.node}: route {route.destination} via {route.via} was refused: {error}") from error


def _family(version: int) -> socket.AddressFamily:
    return socket.AF_INET if version == 4 else socket.AF_INET6


def _wait_until_ready(netlink: IPRoute, node: str) -> None:
    # Subscribed before looking, so no change between a look and the wait is missed; every event means: look again.
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE) as events:
        events.bind((0, _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR))
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            waiting = _not_ready(netlink)
            if not waiting:
                return
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([events], [], [], left)[0]:
                raise LabError(f"{node}: after {_READY_SECONDS:.0f} s still not ready: {', '.join(waiting)}")
            events.recv(65536)


def _not_ready(netlink: IPRoute) -> list[str]:
    links = [
        f"{link.get_attr('IFLA_IFNAME')} is {link.get_attr('IFLA_OPERSTATE')}"
        for link in netlink.get_links()
        if link["index"] != _LOOPBACK_INDEX and link.get_attr("IFLA_OPERSTATE") != "UP"
    ]
    addresses = [
        f"{address.get_attr('IFA_ADDRESS')} is tentative"
        for address in netlink.get_addr()
        if (address.get_attr("IFA_FLAGS") or 0) & _IFA_F_TENTATIVE
    ]
    return links + addresses
