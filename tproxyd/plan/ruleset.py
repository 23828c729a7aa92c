"""The nft ruleset as text, in the spelling in which `nft -s list table` prints it back.

One spelling for all uses: shown by `tproxyd plan`, checked by `nft -c`, loaded by `nft -f`, compared with what the kernel
lists. Every rule says in its comment why it is there. What this module does not know: whether a kernel takes it.

How a packet goes through the steering table (all of it before conntrack, at priority raw, so that a packet which is ours
is never tracked and a packet which is not ours keeps its tracking, also after the daemon died):

  intercept   a packet of one of our connections -> mark, notrack, done     (socket look-up; TIME_WAIT and half-made
              anything else, if it opens a connection -> capture            connections included, SYN excluded)
  capture     does the config select it? no -> return;  yes -> take
  take        special address -> reset;  else tproxy + mark + notrack. With no listener behind it the tproxy statement
              breaks off its rule: no mark, no notrack, and the packet goes on as if we were not there.

Only a SYN can be captured, so connections that existed before, through the host or to it, are never touched. The exception
is an ACK to a local address without a connection: it may be the answer to a SYN cookie, and the tproxy statement
leaves established connections of others alone. Forwarded traffic has no such test (the connection lives elsewhere),
therefore a captured connection to a foreign address cannot be made by a SYN cookie.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses

from tproxyd.config import Config, Mark, Network, PortRange
from tproxyd.plan.model import Family, Marks
from tproxyd.policy import SPECIAL_NETWORKS

__all__ = [
    "CAPTURE_CHAIN",
    "GUARD",
    "LISTEN_ADDRESS",
    "STEERING",
    "guard_table",
    "remove_tables",
    "steering_table",
    "transaction",
]

STEERING = "tproxyd"
GUARD = "tproxyd_guard"
CAPTURE_CHAIN = "capture"

LISTEN_ADDRESS: dict[Family, str] = {4: "127.0.0.1", 6: "::1"}
"""Loopback, so that the listener's port cannot be reached from the network; the statement names the very address."""

_TPROXY: dict[Family, str] = {
    4: f"meta nfproto ipv4 meta l4proto tcp tproxy ip to {LISTEN_ADDRESS[4]}",
    6: f"meta nfproto ipv6 meta l4proto tcp tproxy ip6 to [{LISTEN_ADDRESS[6]}]",
}

_OPENS = "tcp flags syn / fin,syn,rst,ack"
_ACK_ONLY = "tcp flags ack / fin,syn,rst,ack"


def transaction(tables: Mapping[str, str]) -> str:
    """One file for `nft -f`: replaces all tables at once, and removes a guard that is no longer wanted."""
    return remove_tables((STEERING, GUARD)) + "\n" + "\n".join(tables.values())


def remove_tables(names: Iterable[str]) -> str:
    """What removes these tables, there or not: `table` first, because `delete table` fails where there is none."""
    return "".join(f"table inet {name}\ndelete table inet {name}\n" for name in names)


def steering_table(config: Config, marks: Marks, families: Iterable[Family]) -> str:
    """The table that captures, delivers and keeps conntrack away."""
    set_mark = f"meta mark set {_set_mark(marks.steering)}"
    port = config.listen.port
    special = _special_sets(config)
    take = [
        *(
            f"{_OPENS} {match} counter reject with tcp reset"
            f' comment "loopback, link-local, metadata, multicast or mapped: never relayed (policy.allow_special)"'
            for match in _special_matches(special)
        ),
        *(
            f"{_TPROXY[family]}:{port} {set_mark} counter notrack accept"
            f' comment "new connection: to our listener; no listener: this rule breaks off here"'
            for family in families
        ),
    ]
    chains = [
        _chain(
            "intercept",
            "type filter hook prerouting priority raw; policy accept;",
            'iifname "lo" accept comment "what this host sends to itself is never captured"',
            f"meta l4proto {{ icmp, ipv6-icmp }} socket transparent 1 {set_mark} notrack accept"
            ' comment "ICMP error about a connection of ours (path MTU, unreachable): the kernel must see it here"',
            'meta l4proto != tcp accept comment "only TCP is captured"',
            f'{_OPENS} goto {CAPTURE_CHAIN} comment "opens a connection; before any socket match, which would find '
            'TIME_WAIT sockets"',
            'socket wildcard 1 goto stranger comment "a listener on every address is not a connection of ours"',
            f"socket transparent 1 {set_mark} notrack accept"
            ' comment "connection of ours, either side: deliver here, whatever its destination"',
            'goto stranger comment "no connection of ours"',
        ),
        _chain(
            "stranger",
            None,
            f"{_ACK_ONLY} fib daddr type local goto {CAPTURE_CHAIN}"
            ' comment "may answer a SYN cookie of our listener; established connections of others pass tproxy"',
        ),
        _capture_chain(config),
        _chain("take", None, *take),
        _chain(
            "untrack",
            "type filter hook output priority raw; policy accept;",
            'socket transparent 1 notrack accept comment "sent by a socket of ours: no conntrack entry"',
            f"{_match_mark(marks.upstream)} notrack accept"
            ' comment "a connection of ours to a local app, and its answers: no conntrack entry"',
            'oifname "lo" meta l4proto tcp goto app_leg comment "perhaps a local app that answers us"',
        ),
        _chain(
            "app_leg",
            None,
            'ip saddr 127.0.0.0/8 return comment "the app over loopback is not ours"',
            'ip daddr 127.0.0.0/8 return comment "the app over loopback is not ours"',
            'ip6 saddr ::1 return comment "the app over loopback is not ours"',
            'ip6 daddr ::1 return comment "the app over loopback is not ours"',
            *(
                f'{match} notrack comment "{why}"'
                for match, why in (
                    (
                        _captured_port(config, "dport"),
                        "to a captured port by a local address: as its answers, untracked",
                    ),
                    (
                        _captured_port(config, "sport"),
                        "answer of a captured port: no conntrack entry for our connection",
                    ),
                )
            ),
        ),
    ]
    return _table(STEERING, [*_sets(config), *special], chains)


def guard_table(config: Config, marks: Marks) -> str:
    """The table that makes `when_down = "refuse"` true: it resets what the config selects and nobody steered."""
    chains = [
        _chain(
            "guard",
            "type filter hook prerouting priority raw + 1; policy accept;",
            'iifname "lo" accept comment "what this host sends to itself is never captured"',
            f'{_match_mark(marks.steering)} accept comment "the daemon has taken it"',
            f'{_OPENS} goto {CAPTURE_CHAIN} comment "connections that exist go on"',
        ),
        _capture_chain(config),
        _chain(
            "take",
            None,
            'meta l4proto tcp counter reject with tcp reset comment "selected, but no daemon took it: refused at once (when_down)"',
        ),
    ]
    return _table(GUARD, _sets(config), chains)


def _capture_chain(config: Config) -> str:
    capture = config.capture
    rules: list[str] = []

    def leave(match: str, why: str) -> None:
        rules.append(f'{match} return comment "{why}"')

    if not _all_ports(capture.ports):
        leave("tcp dport != @ports", "not a captured port")
    if capture.exclude_ports:
        leave("tcp dport @exclude_ports", "excluded port")
    if capture.interfaces:
        leave("iifname != @interfaces", "not a captured interface")
    if capture.exclude_interfaces:
        leave("iifname @exclude_interfaces", "excluded interface")
    leave("fib daddr type { broadcast, anycast, multicast }", "not for a relay")
    for name, networks, negated, why in (
        ("sources", capture.sources, True, "not a captured source"),
        ("exclude_sources", capture.exclude_sources, False, "excluded source"),
        ("exclude_destinations", capture.exclude_destinations, False, "excluded destination"),
    ):
        if not networks:
            continue
        if "local" in networks:
            leave("fib daddr type local", f"{why}: an address of this namespace")
        v4, v6 = _families(networks)
        for nfproto, field, some, suffix in (("ipv4", "ip", v4, "4"), ("ipv6", "ip6", v6, "6")):
            side = "daddr" if "destinations" in name else "saddr"
            if some:
                leave(f"{field} {side} {'!= ' if negated else ''}@{name}{suffix}", why)
            elif negated:
                leave(f"meta nfproto {nfproto}", f"{why} (none of this family is listed)")
    if not capture.destinations:
        rules.append('goto take comment "selected"')
    else:
        v4, v6 = _families(capture.destinations)
        if v4:
            rules.append('ip daddr @destinations4 goto take comment "captured destination"')
        if v6:
            rules.append('ip6 daddr @destinations6 goto take comment "captured destination"')
        if "local" in capture.destinations:
            rules.append('fib daddr type local goto take comment "an address of this namespace"')
    return _chain(CAPTURE_CHAIN, None, *rules)


def _sets(config: Config) -> list[str]:
    capture = config.capture
    sets: list[str] = []
    if not _all_ports(capture.ports):
        sets.append(_port_set("ports", capture.ports))
    if capture.exclude_ports:
        sets.append(_port_set("exclude_ports", capture.exclude_ports))
    for name, interfaces in (("interfaces", capture.interfaces), ("exclude_interfaces", capture.exclude_interfaces)):
        if interfaces:
            sets.append(_set(name, "ifname", [f'"{interface}"' for interface in sorted(interfaces)]))
    for name, networks in (
        ("sources", capture.sources),
        ("exclude_sources", capture.exclude_sources),
        ("destinations", capture.destinations),
        ("exclude_destinations", capture.exclude_destinations),
    ):
        sets += _network_sets(name, networks)
    return sets


def _special_sets(config: Config) -> list[str]:
    return [
        *_network_sets("special", SPECIAL_NETWORKS),
        *_network_sets("allow_special", config.policy.allow_special),
    ]


def _special_matches(sets: Sequence[str]) -> Iterable[str]:
    for field, suffix in (("ip", "4"), ("ip6", "6")):
        allowed = any(f"set allow_special{suffix} " in text for text in sets)
        yield f"{field} daddr @special{suffix}" + (f" {field} daddr != @allow_special{suffix}" if allowed else "")


def _captured_port(config: Config, side: str) -> str:
    words = []
    if not _all_ports(config.capture.ports):
        words.append(f"tcp {side} @ports")
    if config.capture.exclude_ports:
        words.append(f"tcp {side} != @exclude_ports")
    return " ".join(words) or "meta l4proto tcp"


def _all_ports(ports: Sequence[PortRange]) -> bool:
    return any(port.first == 1 and port.last == 65535 for port in ports)


def _families(networks: Iterable[Network | str]) -> tuple[list[IPv4Network], list[IPv6Network]]:
    v4 = [network for network in networks if isinstance(network, IPv4Network)]
    v6 = [network for network in networks if isinstance(network, IPv6Network)]
    # Collapsed and sorted here, because nft refuses overlapping elements and lists them sorted.
    return sorted(collapse_addresses(v4)), sorted(collapse_addresses(v6))


def _network_sets(name: str, networks: Sequence[Network | str]) -> list[str]:
    v4, v6 = _families(networks)
    sets = []
    for suffix, kind, some in (("4", "ipv4_addr", v4), ("6", "ipv6_addr", v6)):
        if some:
            sets.append(_set(name + suffix, kind, [_network(network) for network in some]))
    return sets


def _network(network: Network) -> str:
    # inet_ntop, as nft: it writes ::ffff:0.0.0.0 where ipaddress writes ::ffff:0:0.
    family = socket.AF_INET if network.version == 4 else socket.AF_INET6
    address = socket.inet_ntop(family, network.network_address.packed)
    return address if network.prefixlen == network.max_prefixlen else f"{address}/{network.prefixlen}"


def _port_set(name: str, ports: Iterable[PortRange]) -> str:
    return _set(name, "inet_service", [str(port) for port in sorted(ports, key=lambda port: port.first)])


def _set(name: str, kind: str, elements: Sequence[str]) -> str:
    listed = ",\n\t\t\t     ".join(elements)
    return f"\tset {name} {{\n\t\ttype {kind}\n\t\tflags interval\n\t\telements = {{ {listed} }}\n\t}}\n"


def _chain(name: str, hook: str | None, *rules: str) -> str:
    lines = ([hook] if hook else []) + list(rules)
    return f"\tchain {name} {{\n" + "".join(f"\t\t{line}\n" for line in lines) + "\t}\n"


def _table(name: str, sets: Sequence[str], chains: Sequence[str]) -> str:
    return f"table inet {name} {{\n" + "\n".join([*sets, *chains]) + "}\n"


def _set_mark(mark: Mark) -> str:
    # As the kernel prints it: nft folds `& ~mask | value` into `& ~(mask ^ value) | value`.
    return f"meta mark & 0x{0xFFFFFFFF & ~(mark.mask ^ mark.value):08x} | 0x{mark.value:08x}"


def _match_mark(mark: Mark) -> str:
    return f"meta mark & 0x{mark.mask:08x} == 0x{mark.value:08x}"
