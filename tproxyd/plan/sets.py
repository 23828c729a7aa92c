"""The named sets of the ruleset: what stands in the configuration's lists, as nft holds it, and whether it takes something in."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, collapse_addresses
from typing import NamedTuple

from tproxyd.config import Config, Network, PortRange, is_interface
from tproxyd.plan.model import Family
from tproxyd.policy import SPECIAL_NETWORKS

__all__ = [
    "Address",
    "Element",
    "NamedSet",
    "capture_sets",
    "element_of",
    "has_all_ports",
    "relayed_sets",
    "special_sets",
]

_FEW = 32  # ports that are listed one by one

Address = IPv4Address | IPv6Address
Element = PortRange | Network | str
"""Ports, a network, or an interface's name, perhaps with an asterisk at its end."""


class NamedSet(NamedTuple):
    """An nft set of ports, networks or interface names, with its elements in nft's order."""

    name: str
    kind: str
    elements: tuple[Element, ...]

    def __str__(self) -> str:
        listed = ",\n\t\t\t     ".join(map(_spelled, self.elements))
        singles = all(isinstance(element, PortRange) and element.first == element.last for element in self.elements)
        flags = "" if singles else "\t\tflags interval\n"
        return f"\tset {self.name} {{\n\t\ttype {self.kind}\n{flags}\t\telements = {{ {listed} }}\n\t}}\n"


def element_of(elements: Iterable[Element], value: int | Address | str) -> str | None:
    """The element, as nft spells it, that takes in this port, address or interface name."""
    return next((_spelled(element) for element in elements if _takes_in(element, value)), None)


def capture_sets(config: Config) -> list[NamedSet]:
    """Those of the configuration's selectors; a list that is empty, or that takes in everything, has none."""
    capture = config.capture
    sets: list[NamedSet] = []
    if not has_all_ports(capture.ports):
        sets.append(_port_set("ports", capture.ports))
    if capture.exclude_ports:
        sets.append(_port_set("exclude_ports", capture.exclude_ports))
    for name, interfaces in (("interfaces", capture.interfaces), ("exclude_interfaces", capture.exclude_interfaces)):
        if interfaces:
            sets.append(NamedSet(name, "ifname", tuple(sorted(interfaces))))
    for name, networks in (
        ("sources", capture.sources),
        ("exclude_sources", capture.exclude_sources),
        ("destinations", capture.destinations),
        ("exclude_destinations", capture.exclude_destinations),
    ):
        sets += _network_sets(name, networks)
    return sets


def relayed_sets(config: Config, living: Sequence[Config] = ()) -> list[NamedSet]:
    """The captured ports, and those of policy rules' targets and `upstream.target`, also of those configs of which connections live; nothing if
    the captured ones are all of them."""
    captured = config.capture.ports
    others = {PortRange(port, port) for one in (config, *living) for port in one.target_ports}
    others.update(ports for one in living for ports in one.capture.ports)
    others = {
        ports for ports in others if not any(one.first <= ports.first and ports.last <= one.last for one in captured)
    }
    return [_port_set("relayed_ports", _without_overlap([*captured, *others]))] if others else []


def special_sets(config: Config, families: Sequence[Family]) -> list[NamedSet]:
    """Special destinations, and those of them that policy.allow_special lists."""

    def of_families(networks: Sequence[Network]) -> list[Network]:
        return [network for network in networks if network.version in families]

    return [
        *_network_sets("special", of_families(SPECIAL_NETWORKS)),
        *_network_sets("allow_special", of_families(config.policy.allow_special)),
    ]


def _port_set(name: str, ports: Iterable[PortRange]) -> NamedSet:
    # A look-up among single ports costs a fraction of one among intervals, and every packet that passes by makes some.
    ranges = sorted(ports)
    singles = [
        PortRange(port, port) for one in ranges for port in range(one.first, min(one.last, one.first + _FEW) + 1)
    ]
    return NamedSet(name, "inet_service", tuple(singles if len(singles) <= _FEW else ranges))


def _without_overlap(ports: Iterable[PortRange]) -> list[PortRange]:
    """nft refuses intervals that overlap."""
    merged: list[PortRange] = []
    for one in sorted(ports):
        if merged and one.first <= merged[-1].last:
            merged[-1] = PortRange(merged[-1].first, max(merged[-1].last, one.last))
        else:
            merged.append(one)
    return merged


def _network_sets(name: str, networks: Sequence[Network | str]) -> list[NamedSet]:
    # Collapsed and sorted, because nft refuses overlapping elements and lists them sorted.
    v4 = sorted(collapse_addresses(network for network in networks if isinstance(network, IPv4Network)))
    v6 = sorted(collapse_addresses(network for network in networks if isinstance(network, IPv6Network)))
    sets = []
    if v4:
        sets.append(NamedSet(f"{name}4", "ipv4_addr", tuple(v4)))
    if v6:
        sets.append(NamedSet(f"{name}6", "ipv6_addr", tuple(v6)))
    return sets


def has_all_ports(ports: Sequence[PortRange]) -> bool:
    """Whether there is no port that is not among them."""
    return any(port.first == 1 and port.last == 65535 for port in ports)


def _spelled(element: Element) -> str:
    if isinstance(element, str):
        return f'"{element}"'
    if isinstance(element, PortRange):
        return str(element)
    # inet_ntop, as nft: it writes ::ffff:0.0.0.0 where ipaddress writes ::ffff:0:0.
    family = socket.AF_INET if element.version == 4 else socket.AF_INET6
    address = socket.inet_ntop(family, element.network_address.packed)
    return address if element.prefixlen == element.max_prefixlen else f"{address}/{element.prefixlen}"


def _takes_in(element: Element, value: int | Address | str) -> bool:
    if isinstance(element, PortRange):
        return isinstance(value, int) and element.first <= value <= element.last
    if isinstance(element, str):
        return is_interface(str(value), element)
    return value in element
