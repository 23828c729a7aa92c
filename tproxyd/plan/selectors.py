"""Which packets are captured: one list of rules, from which nft gets its text and `tproxyd explain` its answer.

A Selector is one nft rule, and beside it the question that the rule asks of a packet, as a function. Neither can be changed without
the other being in sight, and netns_tests/test_explain.py holds both against real packets. What this module does not know: which
table and hook the rules stand in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from tproxyd.config import Config
from tproxyd.plan.model import Family, Surroundings
from tproxyd.plan.sets import (
    Address,
    NamedSet,
    capture_sets,
    element_of,
    has_all_ports,
    relayed_sets,
    special_sets,
)
from tproxyd.plan.ssh import SPARED, nft_ports, spared_ports

__all__ = [
    "BRIDGE",
    "CAPTURE_CHAIN",
    "GUARD_TAKE",
    "LOOPBACK",
    "OPENS",
    "SYN",
    "AddressType",
    "Finding",
    "Packet",
    "Selector",
    "arrival_rules",
    "capture_rules",
    "foreign_ports",
    "of_family",
    "special_rules",
]

CAPTURE_CHAIN = "capture"

AddressType = Literal["unicast", "local", "broadcast", "anycast", "multicast"]
"""What the kernel's `fib` calls a destination; unicast is whatever is none of the others."""

_IP: dict[Family, str] = {4: "ip", 6: "ip6"}
"""nft's word for a family's header."""

SYN = "tcp flags syn / fin,syn,rst,ack"


class Packet(msgspec.Struct, frozen=True, kw_only=True):
    """The first packet of a connection as it arrives. Source and destination are of one family.

    `source_port` None: any that is not captured itself. `interface` None: it does not arrive, this host sends it to another one.
    """

    source: Address
    destination: Address
    port: int
    source_port: int | None = None
    protocol: Literal["tcp", "udp"] = "tcp"
    interface: str | None
    on_bridge: bool = False
    destination_type: AddressType = "unicast"

    @property
    def family(self) -> Family:
        return 6 if self.destination.version == 6 else 4


class Finding(NamedTuple):
    """Whether a rule matches a packet, and what was compared; "" where the rule is not about such packets at all."""

    matches: bool
    because: str


_NOT_ASKED = Finding(False, "")


class Selector(NamedTuple):
    """An nft rule: what it matches, what it does then, and why it is there. `test` is what it matches, as a function."""

    match: str
    verdict: str
    why: str
    test: Callable[[Packet], Finding]

    def __str__(self) -> str:
        return f'{self.match} {self.verdict} comment "{self.why}"'.lstrip()  # no match: every packet


# The rules, in the order in which a packet meets them.

LOOPBACK = Selector(
    'iif "lo"',
    "accept",
    "what this host sends to itself is never captured",
    lambda packet: Finding(packet.interface == "lo", f"arrives on {packet.interface}"),
)

OPENS = Selector(
    SYN,
    f"goto {CAPTURE_CHAIN}",
    "opens a connection; before any socket match, which would find TIME_WAIT sockets",
    lambda packet: Finding(packet.protocol == "tcp", "the first packet of a TCP connection"),
)

GUARD_TAKE = Selector(
    "meta l4proto tcp",
    "counter reject with tcp reset",
    "selected, but no daemon took it: refused at once (when_down)",
    lambda packet: Finding(packet.protocol == "tcp", "selected, and nobody has taken it"),
)

BRIDGE = Selector(
    'meta iifkind "bridge"',
    "accept",
    "br_netfilter shows this too early and then loses the socket: not captured while net.bridge.bridge-nf-call-* is 1",
    lambda packet: Finding(
        packet.on_bridge, f"{packet.interface} is {'a' if packet.on_bridge else 'no'} bridge, and br_netfilter is on"
    ),
)

_UDP = Selector(
    # By name: without /etc/protocols (package netbase) nft knows this one, but not ipv6-icmp.
    "meta l4proto udp",
    "accept",
    "only TCP is captured, and ICMP errors about it",
    lambda packet: Finding(packet.protocol == "udp", f"is {packet.protocol.upper()}"),
)


def arrival_rules(config: Config, surroundings: Surroundings, living: Sequence[Config] = ()) -> list[Selector]:
    """What every packet meets first, up to the jump with which what opens a connection goes to `capture_rules`. `living`: see `make_plan`."""
    if config.redirects:
        # Nothing but what opens a connection: conntrack knows the rest. And NAT on bridges is what br_netfilter is for.
        return [LOOPBACK, OPENS._replace(why="opens a connection: those that exist go on")]
    bridge = [BRIDGE] if surroundings.bridge_netfilter else []
    return [LOOPBACK, *bridge, _UDP, *foreign_ports(config, living), OPENS]


def foreign_ports(config: Config, living: Sequence[Config] = ()) -> list[Selector]:
    """Matches packets with no captured port on either side, nor one of the `living` (see `make_plan`); nothing if every port is captured.

    What keeps other programs' transparent sockets (squid, HAProxy) out of it: a packet of ours has the captured port on one side,
    or the one that a policy rule or `upstream.target` says.
    """
    if any(has_all_ports(one.capture.ports) for one in (config, *living)):
        return []
    (ports,) = relayed_sets(config, living) or capture_sets(config)[:1]  # of which the ports are the first

    def test(packet: Packet) -> Finding:
        for side, port in (("destination", packet.port), ("source", packet.source_port)):
            if port is not None and (element := element_of(ports.elements, port)):
                return Finding(False, f"{side} port {port} is in @{ports.name}: {element}")
        return Finding(True, f"port {packet.port} is not in @{ports.name}")

    return [
        Selector(
            f"tcp dport != @{ports.name} tcp sport != @{ports.name}",
            "accept",
            "no captured port on either side: no connection of ours",
            test,
        )
    ]


def capture_rules(config: Config, surroundings: Surroundings) -> list[Selector]:
    """Whether the configuration selects a packet that opens a connection: `goto take` is yes; `return`, or the list's end, is no."""
    capture = config.capture
    sets = {one.name: one for one in capture_sets(config)}
    spared = spared_ports(config, surroundings)
    rules = [_spare(spared)] if spared else []

    def leave(match: str, why: str, test: Callable[[Packet], Finding]) -> None:
        rules.append(Selector(match, "return", why, test))

    if "ports" in sets:
        leave("tcp dport != @ports", "not a captured port", _in(sets["ports"], _port, negated=True))
    if "exclude_ports" in sets:
        leave("tcp dport @exclude_ports", "excluded port", _in(sets["exclude_ports"], _port))
    if "interfaces" in sets:
        leave(
            "iifname != @interfaces",
            "not a captured interface",
            _in(sets["interfaces"], _interface, negated=True),
        )
    if "exclude_interfaces" in sets:
        leave("iifname @exclude_interfaces", "excluded interface", _in(sets["exclude_interfaces"], _interface))
    leave(
        "fib daddr type { broadcast, anycast, multicast }",
        "not for a relay",
        _of_type("broadcast", "anycast", "multicast"),
    )
    for name, side, value, networks, negated, why in (
        ("sources", "saddr", _source, capture.sources, True, "not a captured source"),
        ("exclude_sources", "saddr", _source, capture.exclude_sources, False, "excluded source"),
        ("exclude_destinations", "daddr", _destination, capture.exclude_destinations, False, "excluded destination"),
    ):
        if not networks:
            continue
        if "local" in networks:
            leave("fib daddr type local", f"{why}: an address of this namespace", _of_type("local"))
        for family, ip in _IP.items():
            listed = sets.get(f"{name}{family}")
            if listed is not None:
                leave(
                    f"{ip} {side} {'!= ' if negated else ''}@{listed.name}",
                    why,
                    _in(listed, value, family=family, negated=negated),
                )
            elif negated:
                leave(
                    f"meta nfproto ipv{family}",
                    f"{why} (none of this family is listed)",
                    of_family(family, f"capture.{name} lists no IPv{family} network"),
                )
    if not capture.destinations:
        rules.append(Selector("", "goto take", "selected", lambda _: Finding(True, "no selector has let it off")))
    else:
        for family, ip in _IP.items():
            listed = sets.get(f"destinations{family}")
            if listed is not None:
                rules.append(
                    Selector(
                        f"{ip} daddr @{listed.name}",
                        "goto take",
                        "captured destination",
                        _in(listed, _destination, family=family),
                    )
                )
        if "local" in capture.destinations:
            rules.append(
                Selector("fib daddr type local", "goto take", "an address of this namespace", _of_type("local"))
            )
    return rules


def _spare(ports: Sequence[int]) -> Selector:
    def test(packet: Packet) -> Finding:
        if packet.port not in ports:
            return _NOT_ASKED
        return Finding(packet.destination_type == "local", f"port {packet.port} is where SSH is served")

    return Selector(f"tcp dport {nft_ports(ports)} fib daddr type local", "return", SPARED, test)


def special_rules(config: Config, families: Sequence[Family]) -> dict[Family, Selector]:
    """By family, what matches destinations that are never relayed; verdict and tproxy statement are the table's."""
    sets = {one.name: one for one in special_sets(config, families)}

    def rule(family: Family) -> Selector:
        special, allowed = sets[f"special{family}"], sets.get(f"allow_special{family}")
        ip = _IP[family]

        def test(packet: Packet) -> Finding:
            if packet.family != family:
                return _NOT_ASKED
            element = element_of(special.elements, packet.destination)
            if element is None:
                return Finding(False, f"{packet.destination} is not in @{special.name}")
            if allowed is not None and (allows := element_of(allowed.elements, packet.destination)):
                return Finding(False, f"{packet.destination} is in @{special.name}, and in @{allowed.name}: {allows}")
            return Finding(True, f"{packet.destination} is in @{special.name}: {element}")

        match = f"{ip} daddr @{special.name}" + (f" {ip} daddr != @{allowed.name}" if allowed is not None else "")
        why = "loopback, link-local, metadata, multicast or mapped: never relayed (policy.allow_special)"
        return Selector(match, "reject with tcp reset", why, test)

    return {family: rule(family) for family in families}


# What rules ask of a packet.


def _port(packet: Packet) -> int:
    return packet.port


def _interface(packet: Packet) -> str:
    return str(packet.interface)


def _source(packet: Packet) -> Address:
    return packet.source


def _destination(packet: Packet) -> Address:
    return packet.destination


def _in(
    one: NamedSet, value: Callable[[Packet], Any], *, family: Family | None = None, negated: bool = False
) -> Callable[[Packet], Finding]:
    def test(packet: Packet) -> Finding:
        if family is not None and packet.family != family:
            return _NOT_ASKED
        asked = value(packet)
        element = element_of(one.elements, asked)
        found = f"is not in @{one.name}" if element is None else f"is in @{one.name}: {element}"
        return Finding((element is None) == negated, f"{asked} {found}")

    return test


def _of_type(*types: AddressType) -> Callable[[Packet], Finding]:
    def test(packet: Packet) -> Finding:
        what = "an address of this host" if packet.destination_type == "local" else packet.destination_type
        return Finding(packet.destination_type in types, f"{packet.destination} is {what}")

    return test


def of_family(family: Family, because: str) -> Callable[[Packet], Finding]:
    """The test of a rule that takes every packet of one family."""
    return lambda packet: Finding(True, because) if packet.family == family else _NOT_ASKED
