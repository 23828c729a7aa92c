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

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tproxyd.config import Config, Mark
from tproxyd.errors import ConfigError
from tproxyd.plan.model import Family, Marks, Surroundings
from tproxyd.plan.selectors import (
    BRIDGE,
    CAPTURE_CHAIN,
    GUARD_TAKE,
    LOOPBACK,
    OPENS,
    SYN,
    Finding,
    Selector,
    arrival_rules,
    capture_rules,
    foreign_ports,
    of_family,
    special_rules,
)
from tproxyd.plan.sets import NamedSet, capture_sets, has_all_ports, relayed_sets, special_sets

__all__ = [
    "CAPTURE_CHAIN",
    "DEFAULT_NAME",
    "GUARD",
    "STATE",
    "STEERING",
    "TableNames",
    "exchange_tables",
    "guard_table",
    "is_owned",
    "listen_addresses",
    "match_mark",
    "redirecting_table",
    "remove_tables",
    "state_table",
    "steering_table",
    "table_names",
    "take_rules",
    "transaction",
    "waiting_table",
]


class TableNames(NamedTuple):
    """What our tables are called."""

    steering: str
    guard: str
    state: str


_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9_]{0,31}", re.ASCII)
_KEYWORDS = frozenset(
    re.findall(
        r"\w+",
        """
    accept add ah all arp bridge cgroup chain chains comment comp constant continue counter counters cpu create ct day dccp define delete
    describe destroy device devices dnat drop dst dup dynamic ecn element elements esp ether exists expires export exthdr fib flags flow
    flowtable flowtables flush frag fwd geneve get goto gre gretap handle hbh hook hooks hour ibriport ibrname icmp icmpv6 igmp iif iifgroup
    iifname iiftype import include index inet insert interval ip ip6 ipsec jhash jump last limit limits list log map maps mark masquerade meta
    meter meters mh missing monitor netdev nftrace notrack numgen obriport obrname offload oif oifgroup oifname oiftype osf pkttype policy
    position priority queue quota quotas random redefine redirect reject rename replace reset return rt rt0 rt2 rtclassid rule ruleset sctp
    secmark secmarks set sets size skgid skuid snat socket srh string symhash synproxy synproxys table tables tcp th time timeout tproxy tunnel
    type typeof udp udplite undefine update vlan vmap vxlan xt
    """,
    )
)
"""Words that nft takes for something else where a table is named, 1.0.6 and later ones; a test asks the nft that is there. It has no way to quote a name."""


def table_names(name: str) -> TableNames:
    """The tables of who bears this name. Raises ConfigError for one that nft, or a reader, could take for something else."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"the name {name!r} cannot be that of tproxyd's tables: it has to begin with a letter, and to have letters, digits and _ "
            "alone, at most 32"
        )
    if name in _KEYWORDS:
        raise ConfigError(
            f"the name {name!r} cannot be that of tproxyd's tables: it is a word of nft's own language; add something to it, as in "
            f"{'my_' + name!r}"
        )
    return TableNames(name, f"{name}_guard", f"{name}_state")


def waiting_table(name: str) -> str:
    """What the steering table is called that a daemon leaves to its successor: a generation between theirs."""
    return f"{name}_0"


DEFAULT_NAME = "tproxyd"
STEERING, GUARD, STATE = table_names(DEFAULT_NAME)

_LISTEN_ADDRESS: dict[Family, str] = {4: "127.0.0.1", 6: "::1"}
"""Loopback, so that the network cannot reach the listener's port (but for IPv4 where route_localnet is on); the statement names
the very address."""

_LISTEN_EVERYWHERE: dict[Family, str] = {4: "0.0.0.0", 6: "::"}  # noqa: S104  # what arrives there directly is closed
"""For redirect mode: NAT gives a connection an address of the interface that it came in on."""

_TPROXY: dict[Family, str] = {
    4: f"meta nfproto ipv4 meta l4proto tcp tproxy ip to {_LISTEN_ADDRESS[4]}",
    6: f"meta nfproto ipv6 meta l4proto tcp tproxy ip6 to [{_LISTEN_ADDRESS[6]}]",
}

_IP: dict[Family, str] = {4: "ip", 6: "ip6"}
"""nft's word for a family's header."""

_DECLARED = re.compile(r"^\t(chain|set) (\S+) \{$(?:\n\t\t(?!flags)[^\n]*)*(\n\t\tflags dynamic)?", re.MULTILINE)
_OWNED = "\tflags owner\n"
_OWNED_HEADER = re.compile(rf"\Atable [^\n]*\n{_OWNED}")  # further down it may stand in a comment
_ACK_ONLY = "tcp flags ack / fin,syn,rst,ack"


def listen_addresses(config: Config) -> dict[Family, str]:
    """Where the listeners have to be, by family."""
    return _LISTEN_EVERYWHERE if config.redirects else _LISTEN_ADDRESS


def transaction(tables: Mapping[str, str], names: TableNames) -> str:
    """One file for `nft -f`: replaces all tables at once, and removes those that are no longer wanted."""
    return remove_tables(dict.fromkeys(names, "")) + "\n" + "\n".join(tables.values())


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


def exchange_tables(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """What puts the `new` tables in place of the `old` ones (listed so; an empty text is no table), in one transaction.

    A table that stays keeps the sets that packets fill: with them answers of local apps are sent back to connections that live.
    """
    staying = [
        name for name in old if old[name] and new.get(name) and _filled_sets(old[name]) & _filled_sets(new[name])
    ]
    staying = [name for name in staying if is_owned(old[name]) == is_owned(new[name])]
    emptied = "".join(_empty_table(name, old[name], _filled_sets(new[name])) for name in staying)
    removed = remove_tables({name: listing for name, listing in old.items() if name not in staying})
    return removed + emptied + "\n".join(new.values())


def _filled_sets(listing: str) -> set[str]:
    return {name for kind, name, dynamic in _DECLARED.findall(listing) if kind == "set" and dynamic}


def _empty_table(name: str, listing: str, kept: set[str]) -> str:
    declared = [(kind, one) for kind, one, _ in _DECLARED.findall(listing) if kind == "chain" or one not in kept]
    return f"flush table inet {name}\n" + "".join(f"delete {kind} inet {name} {one}\n" for kind, one in declared)


def is_owned(listing: str) -> bool:
    """Whether this table lives as long as its owner, and nobody else can change it."""
    return _OWNED_HEADER.match(listing) is not None


def steering_table(
    config: Config,
    marks: Marks,
    surroundings: Surroundings,
    *,
    name: str = STEERING,
    owned: bool = False,
    capturing: bool = True,
    living: Sequence[Config] = (),
) -> str:
    """The table that captures, delivers and keeps conntrack away. Not `capturing`, it does the last two. It does them for connections of the
    `living` configs, too."""
    families = surroundings.families
    spoofs = any(one.spoofs for one in (config, *living))
    set_mark = f"meta mark set {_set_mark(marks.steering)}"
    # First the cheapest question, because it is asked of every packet that passes by.
    to_captured = "" if has_all_ports(config.capture.ports) else "tcp dport @ports "
    chains = [
        _chain(
            "intercept",
            "type filter hook prerouting priority raw; policy accept;",
            *arrival_rules(config, surroundings, living),
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
            LOOPBACK,
            f'{match_mark(marks.steering)} accept comment "belongs to a connection of ours"',
            f"{_ACK_ONLY} {to_captured}fib daddr type local goto {CAPTURE_CHAIN}"
            ' comment "may answer a SYN cookie of our listener; established connections of others pass tproxy"',
        ),
        _capture_chain(config, surroundings) if capturing else _chain(CAPTURE_CHAIN, None),
        _chain("take", None, *take_rules(config, marks, families, spoofs=spoofs)),
        _chain(
            "stray",
            "type filter hook forward priority raw; policy accept;",
            f'{match_mark(marks.steering)} counter drop comment "steered, but our ip rule or route is missing: not to its destination, '
            'which would reset it"',
        ),
        _chain(
            "untrack",
            # A type `route` chain makes the kernel route a packet again whose mark it has changed.
            f"type {'route' if spoofs else 'filter'} hook output priority raw; policy accept;",
            _ERRORS if spoofs else 'meta l4proto != tcp accept comment "only TCP is captured"',
            *foreign_ports(config, living),
            'oif "lo" goto loopback comment "to a local app, and its answers"',
            'socket transparent 1 notrack accept comment "sent by a socket of ours: no conntrack entry"',
            *(_sending_back(marks, families) if spoofs else []),
        ),
        _chain(
            "loopback",
            None,
            *_ending(),
            'socket transparent 1 goto sent comment "our connection to a local app"',
            *(
                f"{_leg(ip, 'daddr', 'saddr')} @legs{family} notrack accept"
                ' comment "answer of a local app to our connection: no conntrack entry"'
                for family, ip in _IP.items()
            ),
        ),
        _chain("sent", None, *([_DIALLING] if spoofs else []), *_remembering(config, living)),
        *_ending_chains(),
        *([_chain("errors", None, *_errors_back(marks))] if spoofs else []),
    ]
    # Those that packets fill come first, and stay where they are when the rest of the table is exchanged.
    filled: list[str | NamedSet] = [_filled_set(one, family) for family in _IP for one in _FILLED]
    filled += [_DIALS] if spoofs else []
    sets = [*filled, *capture_sets(config), *relayed_sets(config, living), *special_sets(config, families)]
    return _table(name, sets, chains, owned=owned)


def redirecting_table(
    config: Config,
    marks: Marks,
    surroundings: Surroundings,
    *,
    name: str = STEERING,
    owned: bool = False,
    capturing: bool = True,
) -> str:
    """The steering table of redirect mode: what the config selects is marked at priority raw, as in tproxy mode and seen by the same
    guard, and NAT brings what is marked to the listener. No mark leaves prerouting. Not `capturing`, it does nothing: what lives needs
    conntrack alone, and that there is a nat chain."""
    steered = match_mark(marks.steering)
    chains = [
        _chain(
            "intercept",
            "type filter hook prerouting priority raw; policy accept;",
            *arrival_rules(config, surroundings),
        ),
        _capture_chain(config, surroundings) if capturing else _chain(CAPTURE_CHAIN, None),
        _chain("take", None, *take_rules(config, marks, surroundings.families)),
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
    return _table(name, [*capture_sets(config), *special_sets(config, surroundings.families)], chains, owned=owned)


def guard_table(config: Config, marks: Marks, surroundings: Surroundings, *, name: str = GUARD) -> str | None:
    """The table that a dead daemon leaves behind; None if there need not be one.

    It makes `when_down = "refuse"` true: it resets what the config selects and nobody steered. In redirect mode it also keeps NAT at work,
    without which the last words of the daemon's sockets would not reach its clients.
    """
    refuses = config.capture.when_down == "refuse"
    chains = _refusing_chains(config, marks, surroundings) if refuses else []
    if config.redirects:
        chains += _nat_chains(config, marks, refuses=refuses)
    elif refuses:
        chains.append(_defragment_chain(config))
    else:
        return None
    return _table(name, capture_sets(config) if refuses else [], chains)


def _refusing_chains(config: Config, marks: Marks, surroundings: Surroundings) -> list[str]:
    bridged = surroundings.bridge_netfilter and not config.redirects
    return [
        _chain(
            "guard",
            "type filter hook prerouting priority raw + 1; policy accept;",
            LOOPBACK,
            *([BRIDGE._replace(why="below, when it is known whether it stays on the bridge")] if bridged else []),
            f'{match_mark(marks.steering)} accept comment "the daemon has taken it"',
            OPENS._replace(why="connections that exist go on"),
        ),
        *(_guard_of_bridges() if bridged else []),
        _capture_chain(config, surroundings),
        _chain("take", None, GUARD_TAKE),
    ]


def _guard_of_bridges() -> list[str]:
    """While br_netfilter is on, what arrives on bridges cannot be captured. It is refused all the same, but for what other machines of a
    bridge send to one another: that is not for this host."""
    arrives = f'{BRIDGE.match} {OPENS.match} {OPENS.verdict} comment "{{}}"'
    return [
        _chain(
            "guard_local",
            "type filter hook input priority raw; policy accept;",
            arrives.format("arrives on a bridge for this host, and cannot be captured"),
        ),
        _chain(
            "guard_routed",
            "type filter hook forward priority raw; policy accept;",
            f'meta oifkind != "bridge" {arrives.format("arrives on a bridge, is routed elsewhere, and cannot be captured")}',
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
    steered = match_mark(marks.steering)
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


def state_table(name: str = STATE) -> str:
    """The table that makes `tproxyd apply` last: it holds no rule, only the word that a daemon's stop is not its end."""
    return f'table inet {name} {{\n\tcomment "put there by tproxyd apply: stays when a daemon stops, until tproxyd revert"\n}}\n'


def take_rules(
    config: Config, marks: Marks, families: Sequence[Family], *, spoofs: bool | None = None
) -> list[Selector]:
    """The steering table's last chain: what becomes of a packet that is selected, as long as somebody listens. `spoofs`: whether connections
    live, or come, that bear a client's address; by default as the config says."""
    spoofs = config.spoofs if spoofs is None else spoofs
    if config.redirects:
        return [
            *(
                special._replace(match=f"meta l4proto tcp {special.match}", verdict=f"counter {special.verdict}")
                for special in special_rules(config, families).values()
            ),
            *(
                Selector(
                    f"meta nfproto ipv{family}",
                    f"meta mark set {_set_mark(marks.steering)} counter accept",
                    "new connection: taken by the chain divert",
                    of_family(family, f"selected, and IPv{family}"),
                )
                for family in families
            ),
        ]
    tproxy = {family: f"{_TPROXY[family]}:{config.listen.port}" for family in families}
    return [
        *(
            Selector(f"{SYN} {special.match} {tproxy[family]}", f"counter {special.verdict}", special.why, special.test)
            for family, special in special_rules(config, families).items()
        ),
        *(
            Selector(
                tproxy[family],
                f"meta mark set {_set_mark(marks.steering)} counter notrack accept",
                "new connection: to our listener; no listener: this rule breaks off here",
                of_family(family, f"selected, and IPv{family}"),
            )
            for family in families
        ),
        *(
            Selector(
                f"{SYN} {_leg(_IP[family], 'saddr', 'daddr')} @legs{family}",
                "counter drop",
                "the client's new port is the one of a connection of ours to the app, in its name: it tries again in a second",
                lambda _: Finding(False, ""),  # of first packets nobody foretells that
            )
            for family in (families if spoofs else ())
        ),
    ]


def _capture_chain(config: Config, surroundings: Surroundings) -> str:
    return _chain(CAPTURE_CHAIN, None, *capture_rules(config, surroundings))


def _leg(ip: str, ours: str, theirs: str) -> str:
    return f"{ip} {ours} . tcp {ours[0]}port . {ip} {theirs} . tcp {theirs[0]}port"


# Our connections to local apps ("legs"). The app's answers are known by their addresses alone: to an app, such a connection is any
# client's. So a set remembers them, which is filled and emptied in the output hook, where both sides pass, and by which answers to a
# client's address are sent back to us, and not to the client. It has to have what lives, and should not have much else:
#
# - A leg enters with our SYN, for as long as an answer is waited for: a dial that is given up, or whose client goes, ends without a packet, and
#   with an app that accepts nothing any client can have as many of these as it likes.
# - What we send then keeps it in for _KEPT. Who lives sends: keepalive probes after a minute of silence, probes of a closed window every
#   two minutes.
# - A reset of either side leaves it _LEAVING, and so does the second FIN of the two. The first one does not: who has ended its direction still
#   has keepalive probes and a window to speak of, also in a long silence of ours. That there was one is in @ended under the leg's numbers
#   the other way round, until the second comes.
# - What we send after the end (@ended) enters it if it has left, but does not keep it in: our last ACK is not a sign of life.
# - A SYN of ours begins a new connection with these ports, whatever was before. A SYN of an app's that has ended ours answers the client's
#   own connection, which has gone past us: from then on its answers are the client's.
#
# The kernel's own way would be net.ipv4.tcp_fwmark_accept and fwmark_reflect, which let an app's socket inherit a mark of our SYN. But
# these are switches for all sockets of the namespace: with the marks of other programs (Tailscale, kube-proxy) on it, every accepted
# connection would be routed by them.
_KEPT, _LEAVING = "2m30s", "10s"
_LATE = 2  # seconds for which a loop that has much to do may give up a dial too late


def _ending() -> list[str]:
    return [
        f'tcp flags fin,rst {_leg(ip, "daddr", "saddr")} @legs{family} jump ending{family} comment "the app ends our connection, or its direction"'
        for family, ip in _IP.items()
    ]


def _ending_chains() -> list[str]:
    chains = []
    for family, ip in _IP.items():
        theirs, half = _leg(ip, "daddr", "saddr"), _leg(ip, "saddr", "daddr")
        over = (
            f"delete @ended{family} {{ {half} }} update @legs{family} {{ {theirs} timeout {_LEAVING} }} "
            f"update @ended{family} {{ {theirs} timeout {_LEAVING} }}"
        )
        chains.append(
            _chain(
                f"ending{family}",
                None,
                f'tcp flags rst {over} return comment "the app breaks it off: soon forgotten"',
                f'{half} @ended{family} {over} return comment "we have ended before: soon forgotten"',
                f'add @ended{family} {{ {half} timeout {_KEPT} }} comment "the first to end: its other direction lives"',
            )
        )
    return chains


def _sending_back(marks: Marks, families: Sequence[Family]) -> list[str]:
    back = (
        f"meta mark set {_set_mark(marks.upstream)} notrack accept"
        ' comment "answer of a local app to a client whose address our connection bears: back to us, no conntrack entry"'
    )
    others = 'accept comment "the client has this connection itself, past us: ours with its ports has ended"'
    held = 'counter drop comment "the same, while lo has no IPv6: not to the client, which would reset it; it is sent again"'
    rules = _ending()
    for family, ip in _IP.items():
        theirs = _leg(ip, "daddr", "saddr")
        rules += [
            f"tcp flags syn {theirs} @ended{family} delete @legs{family} {{ {theirs} }} {others}",
            f"{theirs} @legs{family} {back if family in families else held}",
        ]
    return rules


def _remembering(config: Config, living: Sequence[Config]) -> list[str]:
    rules = []
    longest = max(one.upstream.connect_timeout for one in (config, *living))
    dialling = _duration(math.ceil(longest) + _LATE)
    for why, match, statement in (
        (
            "begins; a connection that had these ports before is over",
            "tcp flags syn",
            "delete @{ended} {{ {ours} }} delete @{ended} {{ {half} }} update @{legs} {{ {ours} timeout {dialling} }}",
        ),
        ("we break it off: soon forgotten", "tcp flags rst", "delete @{ended} {{ {half} }} {over}"),
        (
            "the app has ended before: soon forgotten",
            "tcp flags fin {half} @{ended}",
            "delete @{ended} {{ {half} }} {over}",
        ),
        (
            "the first to end: the app talks on",
            "tcp flags fin {ours} != @{ended}",
            "add @{ended} {{ {half} timeout {KEPT} }} {kept}",
        ),
        (
            "it has ended: entered again where it has left",
            "{ours} @{ended}",
            "add @{legs} {{ {ours} timeout {KEPT} }}",
        ),
        ("remembered for the app's answers", "", "{kept}"),
    ):
        for family, ip in _IP.items():
            words = {
                "ours": _leg(ip, "saddr", "daddr"),
                "half": _leg(ip, "daddr", "saddr"),
                "legs": f"legs{family}",
                "ended": f"ended{family}",
                "KEPT": _KEPT,
                "dialling": dialling,
            }
            words["kept"] = "update @{legs} {{ {ours} timeout {KEPT} }}".format(**words)
            words["over"] = (
                f"update @ended{family} {{ {words['ours']} timeout {_LEAVING} }} "
                f"update @legs{family} {{ {words['ours']} timeout {_LEAVING} }}"
            )
            rule = f"{match} {statement}".strip().format(**words)
            rules.append(f'{rule} notrack accept comment "{why}"')
    return [*rules, 'notrack accept comment "a set is full: not remembered"']


# An ICMP error about our SYN (a firewall of this host rejects what arrives on lo) is for the client's address, too. The four addresses inside
# it cannot be looked up among the legs: nft 1.0.6 takes raw bytes for numbers and nothing else. So a second set has the two ports of each
# SYN as one number. That a client is told something about the same two ports in these two seconds, which it then misses, has to happen by
# chance; the error to the second SYN, after one second, is in time.
_DIALS = "\tset dials {\n\t\ttypeof @th,0,32\n\t\tsize 32768\n\t\tflags dynamic,timeout\n\t}\n"
_DIALLING = f'{SYN} update @dials {{ @th,0,32 timeout 2s }} comment "its ports: an ICMP error about it is for us, too"'
_ERRORS = 'meta l4proto != tcp goto errors comment "only TCP is captured, and ICMP errors about it"'
_QUOTED = (
    ("icmp", 136, 224),
    ("icmpv6", 112, 384),
)  # bits from the error's begin to the protocol and the ports of what it quotes


def _errors_back(marks: Marks) -> list[str]:
    return [
        f"{kind} type destination-unreachable @th,{protocol},8 6 @th,{ports},32 @dials meta mark set {_set_mark(marks.upstream)} notrack"
        ' comment "about a SYN of ours to a local app, which bears another address: back to us"'
        for kind, protocol, ports in _QUOTED
    ]


# How much of each there may be; full, new connections to local apps fail that bear a client's address. A second brings what it brings
# for _LEAVING, besides what lives. The kernel takes 16 bytes a place at once, and some hundred for what is in it.
_FILLED = {"legs": 262144, "ended": 131072}


def _filled_set(name: str, family: Family) -> str:
    address = f"ipv{family}_addr"
    return (
        f"\tset {name}{family} {{\n\t\ttype {address} . inet_service . {address} . inet_service\n"
        f"\t\tsize {_FILLED[name]}\n\t\tflags dynamic,timeout\n\t}}\n"
    )


def _duration(seconds: int) -> str:
    """As nft spells it."""
    parts = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, seconds = divmod(seconds, length)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)


def _chain(name: str, hook: str | None, *rules: str | Selector) -> str:
    lines = ([hook] if hook else []) + [str(rule) for rule in rules]
    return f"\tchain {name} {{\n" + "".join(f"\t\t{line}\n" for line in lines) + "\t}\n"


def _table(name: str, sets: Sequence[str | NamedSet], chains: Sequence[str], *, owned: bool = False) -> str:
    return f"table inet {name} {{\n" + (f"{_OWNED}\n" if owned else "") + "\n".join([*map(str, sets), *chains]) + "}\n"


def _set_mark(mark: Mark) -> str:
    # nft folds `& ~mask | value` into `& ~(mask ^ value) | value`.
    return f"meta mark & 0x{0xFFFFFFFF & ~(mark.mask ^ mark.value):08x} | 0x{mark.value:08x}"


def match_mark(mark: Mark) -> str:
    """Matches what bears this mark."""
    return f"meta mark & 0x{mark.mask:08x} == 0x{mark.value:08x}"
