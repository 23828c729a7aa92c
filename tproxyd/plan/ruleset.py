"""The nft ruleset as text, in the spelling in which `nft -s list table` of version 1.0.6 usually prints it back.

One text for all uses: shown by `tproxyd plan`, checked by `nft -c`, loaded by `nft -f`, compared with what the kernel
lists (where nft spells it otherwise, it is asked how: kernel.nft.spelled). Every rule says in its comment why it is there. What
this module does not know: whether a kernel takes it.

How a packet goes through the steering table, before conntrack and NAT, at priority raw, so that a packet which is ours is never
tracked and a packet which is not ours keeps its tracking, also after the daemon died:

  intercept   opens a connection -> capture; belongs to one of ours (socket look-up; TIME_WAIT and half-made ones included) ->
              mark, notrack, done; neither -> goes on
  capture     does the config select it? no -> return;  yes -> take
  take        tproxy + mark + notrack; for a special address tproxy + reset. With no listener behind it the tproxy statement
              breaks off its rule: no mark, no notrack, no reset, and the packet goes on as if we were not there.

Only a SYN is captured there, so connections that existed before, through the host or to it, are never touched. What else can
begin a connection is the answer to a SYN cookie, an ACK that belongs to no socket. It is looked for after NAT (`cookie`), because
before NAT a packet of somebody's masqueraded connection looks the same. Forwarded traffic cannot be told apart at all (its
sockets are elsewhere), therefore a captured connection to a foreign address cannot be made by a SYN cookie.

In redirect mode `take` only marks a SYN; then comes conntrack, NAT (`divert`) and the end of the mark (`unmark`). See `redirecting_table`.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses

from tproxyd.config import Config, Mark, Network, PortRange
from tproxyd.plan.model import Family, Marks, Surroundings
from tproxyd.policy import SPECIAL_NETWORKS

__all__ = [
    "CAPTURE_CHAIN",
    "GUARD",
    "LISTEN_ADDRESS",
    "LISTEN_EVERYWHERE",
    "STATE",
    "STEERING",
    "guard_table",
    "is_owned",
    "redirecting_table",
    "remove_tables",
    "state_table",
    "steering_table",
    "transaction",
]

STEERING = "tproxyd"
GUARD = "tproxyd_guard"
STATE = "tproxyd_state"
CAPTURE_CHAIN = "capture"

LISTEN_ADDRESS: dict[Family, str] = {4: "127.0.0.1", 6: "::1"}
"""Loopback, so that the network cannot reach the listener's port (but for IPv4 where route_localnet is on); the statement names
the very address."""

LISTEN_EVERYWHERE: dict[Family, str] = {4: "0.0.0.0", 6: "::"}  # noqa: S104  # what arrives there directly is closed
"""For redirect mode: NAT gives a connection an address of the interface that it came in on."""

_TPROXY: dict[Family, str] = {
    4: f"meta nfproto ipv4 meta l4proto tcp tproxy ip to {LISTEN_ADDRESS[4]}",
    6: f"meta nfproto ipv6 meta l4proto tcp tproxy ip6 to [{LISTEN_ADDRESS[6]}]",
}

_IP: dict[Family, str] = {4: "ip", 6: "ip6"}
"""nft's word for a family's header."""

_OWNED = "\tflags owner\n"
_OPENS = "tcp flags syn / fin,syn,rst,ack"
_ACK_ONLY = "tcp flags ack / fin,syn,rst,ack"
_SPECIAL = "loopback, link-local, metadata, multicast or mapped: never relayed (policy.allow_special)"


def transaction(tables: Mapping[str, str]) -> str:
    """One file for `nft -f`: replaces all tables at once, and removes those that are no longer wanted."""
    return remove_tables(dict.fromkeys((STEERING, GUARD, STATE), "")) + "\n" + "\n".join(tables.values())


def remove_tables(tables: Mapping[str, str]) -> str:
    """What removes these tables, which are listed so, or not there (empty).

    `table` comes first, because `delete table` fails where there is none; and `table` fails where there is one with an owner but does
    not say so.
    """
    return "".join(
        f"table inet {name} {{\n{_OWNED}}}\ndelete table inet {name}\n"
        if is_owned(listing)
        else f"table inet {name}\ndelete table inet {name}\n"
        for name, listing in tables.items()
    )


def is_owned(listing: str) -> bool:
    """Whether this table lives as long as its owner, and nobody else can change it."""
    return _OWNED in listing


def steering_table(
    config: Config, marks: Marks, surroundings: Surroundings, *, owned: bool = False, capturing: bool = True
) -> str:
    """The table that captures, delivers and keeps conntrack away. Not `capturing`, it does the last two."""
    families = surroundings.families
    set_mark = f"meta mark set {_set_mark(marks.steering)}"
    tproxy = {family: f"{_TPROXY[family]}:{config.listen.port}" for family in families}
    special = _special_sets(config, families)
    bridge = [
        'meta iifkind "bridge" accept comment "br_netfilter shows this too early and then loses the socket: '
        'not captured while net.bridge.bridge-nf-call-* is 1"'
    ]
    foreign_ports = _foreign_ports(config)
    ours = [
        'socket transparent 1 notrack accept comment "sent by a socket of ours: no conntrack entry"',
        f"{_match_mark(marks.upstream)} notrack accept"
        ' comment "a connection to a local app as somebody else, and its answers: no conntrack entry"',
    ]
    chains = [
        _chain(
            "intercept",
            "type filter hook prerouting priority raw; policy accept;",
            'iif "lo" accept comment "what this host sends to itself is never captured"',
            *(bridge if surroundings.bridge_netfilter else []),
            # By name: without /etc/protocols (package netbase) nft knows this one, but not ipv6-icmp.
            'meta l4proto udp accept comment "only TCP is captured, and ICMP errors about it"',
            *(
                f'{ports} accept comment "no captured port on either side: no connection of ours"'
                for ports in foreign_ports
            ),
            f'{_OPENS} goto {CAPTURE_CHAIN} comment "opens a connection; before any socket match, which would find '
            'TIME_WAIT sockets"',
            'socket transparent 1 goto relayed comment "a socket of ours, unless it is a listener on every address"',
        ),
        _chain(
            "relayed",
            None,
            'socket wildcard 1 accept comment "a listener on every address is not a connection of ours"',
            f"{set_mark} notrack accept"
            ' comment "connection of ours, either side, or an ICMP error about one: deliver here, whatever its destination"',
        ),
        _chain(
            "cookie",
            "type filter hook prerouting priority dstnat + 5; policy accept;",
            'iif "lo" accept comment "what this host sends to itself is never captured"',
            f'{_match_mark(marks.steering)} accept comment "belongs to a connection of ours"',
            f"{_ACK_ONLY} fib daddr type local goto {CAPTURE_CHAIN}"
            ' comment "may answer a SYN cookie of our listener; established connections of others pass tproxy"',
        ),
        _capture_chain(config) if capturing else _chain(CAPTURE_CHAIN, None),
        _chain(
            "take",
            None,
            *(
                f'{_OPENS} {match} {tproxy[family]} counter reject with tcp reset comment "{_SPECIAL}"'
                for family, match in _special_matches(config).items()
                if family in families
            ),
            *(
                f"{tproxy[family]} {set_mark} counter notrack accept"
                ' comment "new connection: to our listener; no listener: this rule breaks off here"'
                for family in families
            ),
        ),
        _chain(
            "stray",
            "type filter hook forward priority raw; policy accept;",
            f'{_match_mark(marks.steering)} counter drop comment "steered, but our ip rule or route is missing: not to its destination, '
            'which would reset it"',
        ),
        _chain(
            "untrack",
            "type filter hook output priority raw; policy accept;",
            'meta l4proto != tcp accept comment "only TCP is captured"',
            *(
                f'{ports} accept comment "no captured port on either side: no connection of ours"'
                for ports in foreign_ports
            ),
            'oif "lo" goto loopback comment "to a local app, and its answers"',
            *ours,
        ),
        _chain(
            "loopback",
            None,
            *_legs_rules(),
            *ours,
            *(
                f"{_leg(ip, 'daddr', 'saddr')} @legs{family} notrack accept"
                ' comment "answer of a local app to our connection: no conntrack entry"'
                for family, ip in _IP.items()
            ),
        ),
    ]
    legs = [_legs_set(family) for family in _IP]
    return _table(STEERING, [*_sets(config), *_relayed_set(config), *special, *legs], chains, owned=owned)


def redirecting_table(
    config: Config, marks: Marks, surroundings: Surroundings, *, owned: bool = False, capturing: bool = True
) -> str:
    """The steering table of redirect mode: what the config selects is marked at priority raw, as in tproxy mode and seen by the same
    guard, and NAT brings what is marked to the listener. No mark leaves prerouting. Not `capturing`, it does nothing: what lives needs
    conntrack alone, and that there is a nat chain."""
    families = surroundings.families
    steered = _match_mark(marks.steering)
    chains = [
        _chain(
            "intercept",
            "type filter hook prerouting priority raw; policy accept;",
            'iif "lo" accept comment "what this host sends to itself is never captured"',
            f'{_OPENS} goto {CAPTURE_CHAIN} comment "opens a connection: those that exist go on"',
        ),
        _capture_chain(config) if capturing else _chain(CAPTURE_CHAIN, None),
        _chain(
            "take",
            None,
            *(
                f'meta l4proto tcp {match} counter reject with tcp reset comment "{_SPECIAL}"'
                for family, match in _special_matches(config).items()
                if family in families
            ),
            *(
                f"meta nfproto ipv{family} meta mark set {_set_mark(marks.steering)} counter accept"
                ' comment "new connection: taken by the chain divert"'
                for family in families
            ),
        ),
        _chain(
            "divert",
            "type nat hook prerouting priority dstnat - 5; policy accept;",
            f"{steered} meta l4proto tcp redirect to :{config.listen.port}"
            ' comment "to our listener; before the NAT of others, which would change where it was going"',
        ),
        _chain(
            "unmark",
            "type filter hook prerouting priority dstnat + 2; policy accept;",
            f"{steered} meta mark set meta mark & 0x{0xFFFFFFFF & ~marks.steering.mask:08x}"
            ' comment "the mark has done its work: nobody else is to see it"',
        ),
    ]
    return _table(STEERING, [*_sets(config), *_special_sets(config, families)], chains, owned=owned)


def guard_table(config: Config, marks: Marks) -> str | None:
    """The table that a dead daemon leaves behind; None if there need not be one.

    It makes `when_down = "refuse"` true: it resets what the config selects and nobody steered. In redirect mode it also keeps NAT at work,
    without which the last words of the daemon's sockets would not reach its clients.
    """
    refuses = config.capture.when_down == "refuse"
    if config.redirects:
        chains = [*(_refusing_chains(config, marks) if refuses else []), *_nat_chains(config, marks, refuses=refuses)]
    elif refuses:
        chains = [*_refusing_chains(config, marks), _defragment_chain(config)]
    else:
        return None
    return _table(GUARD, _sets(config) if refuses else [], chains)


def _refusing_chains(config: Config, marks: Marks) -> list[str]:
    return [
        _chain(
            "guard",
            "type filter hook prerouting priority raw + 1; policy accept;",
            'iif "lo" accept comment "what this host sends to itself is never captured"',
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


def _defragment_chain(config: Config) -> str:
    return _chain(
        "defragment",
        None,
        *(
            f'{statement}:{config.listen.port} comment "never reached; that it is there makes the kernel put fragments '
            'together first, so that a SYN in two pieces is seen"'
            for statement in _TPROXY.values()
        ),
    )


def _nat_chains(config: Config, marks: Marks, *, refuses: bool) -> list[str]:
    steered = _match_mark(marks.steering)
    missed = _chain(
        "missed",
        "type filter hook prerouting priority dstnat + 1; policy accept;",
        f'{steered} tcp dport {config.listen.port} fib daddr type local accept comment "with the daemon\'s listener"',
        f"{steered} meta l4proto tcp counter reject with tcp reset"
        ' comment "taken, but not brought to the listener: the NAT of others came first"',
    )
    # `ct`, because a nat chain alone does not switch conntrack on. Which also puts fragments together.
    keep = _chain(
        "keep",
        "type nat hook prerouting priority dstnat; policy accept;",
        'ct state new accept comment "changes nothing; that it is there keeps NAT at work for what a dead daemon still has to say"',
    )
    return [missed, keep] if refuses else [keep]


def state_table() -> str:
    """The table that makes `tproxyd apply` last: it holds no rule, only the word that a daemon's stop is not its end."""
    return f'table inet {STATE} {{\n\tcomment "put there by tproxyd apply: stays when a daemon stops, until tproxyd revert"\n}}\n'


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
    for name, side, networks, negated, why in (
        ("sources", "saddr", capture.sources, True, "not a captured source"),
        ("exclude_sources", "saddr", capture.exclude_sources, False, "excluded source"),
        ("exclude_destinations", "daddr", capture.exclude_destinations, False, "excluded destination"),
    ):
        if not networks:
            continue
        if "local" in networks:
            leave("fib daddr type local", f"{why}: an address of this namespace")
        listed = {network.version for network in networks if network != "local"}
        for family, ip in _IP.items():
            if family in listed:
                leave(f"{ip} {side} {'!= ' if negated else ''}@{name}{family}", why)
            elif negated:
                leave(f"meta nfproto ipv{family}", f"{why} (none of this family is listed)")
    if not capture.destinations:
        rules.append('goto take comment "selected"')
    else:
        listed = {network.version for network in capture.destinations if network != "local"}
        for family, ip in _IP.items():
            if family in listed:
                rules.append(f'{ip} daddr @destinations{family} goto take comment "captured destination"')
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


def _special_sets(config: Config, families: Sequence[Family]) -> list[str]:
    def of_families(networks: Sequence[Network]) -> list[Network]:
        return [network for network in networks if network.version in families]

    return [
        *_network_sets("special", of_families(SPECIAL_NETWORKS)),
        *_network_sets("allow_special", of_families(config.policy.allow_special)),
    ]


def _special_matches(config: Config) -> dict[Family, str]:
    allowed = {network.version for network in config.policy.allow_special}
    return {
        family: f"{ip} daddr @special{family}" + (f" {ip} daddr != @allow_special{family}" if family in allowed else "")
        for family, ip in _IP.items()
    }


def _foreign_ports(config: Config) -> list[str]:
    """Matches packets with no captured port on either side; nothing if every port is captured.

    What keeps other programs' transparent sockets (squid, HAProxy) out of it: a packet of ours has the captured port on one side,
    or the one that a policy rule forwards to.
    """
    if _all_ports(config.capture.ports):
        return []
    ports = "@relayed_ports" if _relayed_set(config) else "@ports"
    return [f"tcp dport != {ports} tcp sport != {ports}"]


def _relayed_set(config: Config) -> list[str]:
    """The captured ports and those that policy rules forward to; nothing if the former have all of the latter."""
    captured = config.capture.ports
    targets = {rule.action.port for rule in config.policy.rule if not isinstance(rule.action, str)}
    others = [PortRange(port, port) for port in targets if not any(one.first <= port <= one.last for one in captured)]
    return [_port_set("relayed_ports", [*captured, *others])] if others else []


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


def _leg(ip: str, ours: str, theirs: str) -> str:
    return f"{ip} {ours} . tcp {ours[0]}port . {ip} {theirs} . tcp {theirs[0]}port"


def _legs_rules() -> list[str]:
    """What fills and empties the sets of our connections to local apps, all in the output hook, where both sides pass.

    A connection enters with our SYN. A FIN or RST, of either side, leaves it five seconds; what we still send in a half-closed one
    enters it again, and does not prolong those seconds while it is in (`add`, not `update`). The day is for what ends in silence.
    """
    rules = []
    for family, ip in _IP.items():
        ours, theirs = _leg(ip, "saddr", "daddr"), _leg(ip, "daddr", "saddr")
        rules += [
            f"tcp flags fin,rst {theirs} @legs{family} update @legs{family} {{ {theirs} timeout 5s }}"
            ' comment "the app ends our connection: soon forgotten"',
            f"tcp flags fin,rst socket transparent 1 update @legs{family} {{ {ours} timeout 5s }}"
            ' comment "we end our connection to a local app: soon forgotten"',
            f"tcp flags ! fin,rst socket transparent 1 add @legs{family} {{ {ours} timeout 1d }}"
            ' comment "our connection to a local app: remembered for the app\'s answers"',
        ]
    return rules


def _legs_set(family: Family) -> str:
    # Filled and emptied by the rules themselves. The kernel takes memory for what is in it; full, it costs conntrack entries.
    address = f"ipv{family}_addr"
    return (
        f"\tset legs{family} {{\n\t\ttype {address} . inet_service . {address} . inet_service\n"
        "\t\tsize 262144\n\t\tflags dynamic,timeout\n\t}\n"
    )


def _chain(name: str, hook: str | None, *rules: str) -> str:
    lines = ([hook] if hook else []) + list(rules)
    return f"\tchain {name} {{\n" + "".join(f"\t\t{line}\n" for line in lines) + "\t}\n"


def _table(name: str, sets: Sequence[str], chains: Sequence[str], *, owned: bool = False) -> str:
    return f"table inet {name} {{\n" + (f"{_OWNED}\n" if owned else "") + "\n".join([*sets, *chains]) + "}\n"


def _set_mark(mark: Mark) -> str:
    # nft folds `& ~mask | value` into `& ~(mask ^ value) | value`.
    return f"meta mark & 0x{0xFFFFFFFF & ~(mark.mask ^ mark.value):08x} | 0x{mark.value:08x}"


def _match_mark(mark: Mark) -> str:
    return f"meta mark & 0x{mark.mask:08x} == 0x{mark.value:08x}"
