"""Checks of other programs' rules: what they do with packets that are ours, found by walking such packets through them (walk.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf
from typing import NamedTuple

import msgspec

from tproxyd.config.wording import printable
from tproxyd.daemon.doctor.model import Check, Crossing, Evidence, Finding, of_tproxy_mode
from tproxyd.daemon.doctor.walk import Packet, Walk, marks_of, walk_hook
from tproxyd.kernel import ChainRule, ForeignChain
from tproxyd.kernel.foreign_listing import is_name

__all__ = ["CHECKS", "input_drops"]

_RAW = -300  # the priority of our chains, NF_IP_PRI_RAW
_CONNTRACK = -200  # NF_IP_PRI_CONNTRACK
_NAT = -100  # NF_IP_PRI_NAT_DST: where all nat chains run; their own priorities are an order among them
_NAT_BACK = 100  # NF_IP_PRI_NAT_SRC: where an answer gets the address and the port back that NAT has replaced
_CLIENT_PORT = (
    50505  # one of those that clients get by chance (RFC 6335, and Linux): what is for single ports is not for answers
)
_DIVERT, _UNMARK = -105, -98  # redirect mode's: dstnat - 5 among nat chains, dstnat + 2


@of_tproxy_mode
def rule_before_ours(e: Evidence) -> Iterator[Finding]:
    steering, own = e.marks.steering, e.config.routing
    for rule in e.rules:
        if not 0 < rule.priority <= own.priority + 1 or rule.family not in e.families:
            continue
        if rule.suppressing or rule.iif == "lo" or not rule.can_take_tcp_that_arrives:
            continue
        if rule.mask and (steering.value & rule.mask == rule.mark) == rule.inverted:
            continue
        if rule.iif is not None and rule.iif not in [link.name for link in e.captured_links]:
            continue
        ends_it = rule.ends
        leads_away = (rule.family, rule.table) in e.rule_tables and rule.table != own.table
        if (ends_it or leads_away) and rule.narrowed:
            yield Finding(
                seen=f"an ip rule of another program comes before ours: `{rule.line}`",
                why="connections to other hosts' addresses that it takes are not delivered here",
                remedy=f"# choose a routing.priority below {rule.priority - 2} in {e.configuration}\n{e.restart()}",
                warning=True,
            )
        elif ends_it or leads_away:
            mark = f" fwmark {rule.mark:#x}/{rule.mask:#x}" if rule.mask else ""
            yield Finding(
                seen=f"an ip rule of another program comes before ours and takes steered packets, too: `{rule.line}`",
                why="they are routed by it instead of being delivered to the listener: connections to foreign addresses hang",
                remedy=f"ip -{rule.family} rule del priority {rule.priority}{mark}"
                if rule.mask
                else f"# choose a routing.priority below {rule.priority} in {e.configuration}, or remove the rule:\n"
                f"ip -{rule.family} rule del priority {rule.priority}",
            )


def mark_in_use(e: Evidence) -> Iterator[Finding]:
    marks = e.marks
    for chain in e.chains or ():
        if e.config.redirects and chain.hook is not None and (chain.hook != "prerouting" or chain.priority >= _UNMARK):
            continue  # NAT, which alone asks for it, comes before
        for rule in chain.rules:
            for value in marks_of(rule):
                if any(value & mark.mask == mark.value for mark in (marks.steering, marks.upstream)):
                    yield Finding(
                        seen=f"a rule of another program sets our mark: {_rule(chain, rule)}",
                        why="new connections that bear it are brought to the listener, wherever they were going"
                        if e.config.redirects
                        else "packets that bear it are delivered to this host, wherever they were going",
                        remedy=_delete(chain, rule)
                        + f"\n# or choose another routing.mark in {e.configuration}, e.g. one outside {value:#x}",
                    )


def mark_overwritten(e: Evidence) -> Iterator[Finding]:
    steering = e.marks.steering
    for packet in _captured(e):
        for stage, walk in _prerouting(e, packet):
            taken = stage.packet.mark & steering.mask == steering.value and not stage.packet.status
            if taken and walk.marker is not None and walk.mark & steering.mask != steering.value:
                yield Finding(
                    seen=f"a rule of another program overwrites our mark on {packet.interface}: {_rule(*walk.marker)}",
                    why="NAT then does not know the packet any more: connections are not captured, whatever `when_down` says"
                    if e.config.redirects
                    else "the packet is then no longer steered: captured connections to foreign addresses hang",
                    remedy=f"# keep the bits {steering.mask:#x}: meta mark set meta mark & {0xFFFFFFFF ^ steering.mask:#x} | ...\n"
                    + _delete(*walk.marker),
                )
                return


def prerouting_drops(e: Evidence) -> Iterator[Finding]:
    walks = []
    for packet in _captured(e):
        *_, (stage, walk) = _prerouting(e, packet)
        walks.append((stage.packet, walk))
    yield from _dropped(e, walks, "before they reach the listener")


def input_drops(e: Crossing) -> Iterator[Finding]:
    packets = [_stages(e, packet)[-1].packet for packet in _captured(e)]
    walks = [(packet, walk_hook(e.chains or (), "input", packet)) for packet in packets]
    yield from _dropped(e, walks, "although the listener waits for them")


def output_drops(e: Evidence) -> Iterator[Finding]:
    """What the listener answers to clients, in the hooks output and postrouting."""
    walks = []
    for packet in _captured(e):
        for hook, stage in _answer_stages(e, packet):
            kinds = ("filter", "route")
            walk = walk_hook(_between(e.chains or (), stage), hook, stage.packet, kinds=kinds)
            walks.append((stage.packet, walk))
            if walk.verdict == "drop":
                break
    yield from _dropped(e, walks, "which are the answers to captured clients")


@of_tproxy_mode
def answers_dropped(e: Evidence) -> Iterator[Finding]:
    """What a remote server answers to a socket that bears the client's address. Its port is the client's: any."""
    local_only = set(e.config.capture.destinations) == {"local"}
    if not e.forwards or local_only or any(input_drops(e)):
        return
    answers = [
        msgspec.structs.replace(packet, port=None, flags=frozenset({"syn", "ack"}), interface=link.name)
        for packet in _captured(e)[:1]
        for link in e.links
        if link.name != "lo" and link.up
    ]
    walks = [(packet, walk_hook(e.chains or (), "input", packet)) for packet in answers]
    yield from _dropped(e, walks, "which are answers of servers to the client's own address")


def loopback_drops(e: Evidence) -> Iterator[Finding]:
    """The way from the proxy to an app of this host, and back."""
    for packet in _captured(e)[:1]:
        own = msgspec.structs.replace(packet, interface="lo", mark=0)
        answer = msgspec.structs.replace(own, port=None, flags=frozenset({"syn", "ack"}))
        if e.config.redirects:
            own = msgspec.structs.replace(own, states=frozenset({"new"}))
            answer = msgspec.structs.replace(answer, states=frozenset({"established"}))
        walks = [walk_hook(e.chains or (), "input", one) for one in (own, answer)]
        walk = next((one for one in walks if one.verdict == "drop" and not one.perhaps), None)
        if walk is not None and walk.chain is not None:
            yield Finding(
                seen=f"what this host sends to itself is dropped: {_where(walk)}",
                why="the proxy reaches apps of this host over lo: captured connections to them time out",
                remedy=_insert(walk.chain, 'iifname "lo"', "-i lo"),
                warning=set(e.config.capture.destinations).isdisjoint({"local"})
                and bool(e.config.capture.destinations),
            )


def foreign_tproxy(e: Evidence) -> Iterator[Finding]:
    for chain, rule in _met(e, ("filter",), ("tproxy",)):
        yield Finding(
            seen=f"another transparent proxy takes connections to captured ports: {_rule(chain, rule)}",
            why="where NAT brings a connection does not matter once a tproxy statement has given it to a socket: while somebody listens there, "
            "such connections do not come here, or are reset"
            if e.config.redirects
            else "the last tproxy statement wins: such connections go there and not here, or to nobody",
            remedy=_delete(chain, rule),
        )


def foreign_nat(e: Evidence) -> Iterator[Finding]:
    for chain, rule in _met(e, ("nat",), ("redirect", "dnat")):
        first = e.config.redirects and chain.priority < _DIVERT
        yield Finding(
            seen=f"a NAT rule of another program is for captured ports: {_rule(chain, rule)}",
            why=(
                "it comes before ours, and a connection is given a destination once: such connections are reset"
                if e.config.capture.when_down == "refuse"
                else "it comes before ours, and a connection is given a destination once: such connections go where it says"
            )
            if first
            else "captured connections are taken before it"
            + ("" if e.config.redirects else " and without conntrack")
            + ", so it does not apply to them any more",
            remedy=f"{_delete(chain, rule)}\n# or exclude its ports in {e.configuration}: capture.exclude_ports",
            warning=not first,
        )


def foreign_notrack(e: Evidence) -> Iterator[Finding]:
    for chain, rule in _met(e, ("filter",), ("notrack",)) if e.config.redirects else ():
        if chain.priority < _CONNTRACK:
            yield Finding(
                seen=f"a rule of another program keeps connections to captured ports out of conntrack: {_rule(chain, rule)}",
                why="there is no NAT without it: such connections are "
                + ("reset" if e.config.capture.when_down == "refuse" else "not captured"),
                remedy=_delete(chain, rule),
            )


@of_tproxy_mode
def masquerade(e: Evidence) -> Iterator[Finding]:
    local_only = set(e.config.capture.destinations) == {"local"}
    source = e.config.upstream.source
    if source not in ("auto", "client") or not e.forwards or local_only or not e.config.captures:
        return
    for chain in e.chains or ():
        for rule in chain.rules:
            if any(kind in statement for statement in rule.statements for kind in ("masquerade", "snat")):
                yield Finding(
                    seen=f'this gateway hides its clients\' addresses: {_rule(chain, rule)}, while upstream.source is "{source}"',
                    why="captured connections bear the client's own address and are untracked, so this rule does not change it: servers "
                    "that cannot answer to it are not reached, and connections time out",
                    remedy=f'# in {e.configuration}, under [upstream]: source = "proxy"\n{e.restart()}',
                    warning=True,
                )


class _Stage(NamedTuple):
    """What a captured packet is to chains of the prerouting hook from one priority on, before the next stage's."""

    first: float
    end: float
    packet: Packet


def _stages(e: Crossing, packet: Packet) -> list[_Stage]:
    """The last one is what it is at the input hook, too."""

    def altered(**fields: object) -> Packet:
        return msgspec.structs.replace(packet, **fields)

    fresh = _Stage(-inf, _RAW, altered(mark=0, states=None))
    if not e.config.redirects:
        return [fresh, _Stage(_RAW, inf, packet)]
    new, dnat, port = frozenset({"new"}), frozenset({"dnat"}), e.config.listen.port
    return [
        fresh,
        _Stage(_RAW, _CONNTRACK, altered(states=None)),
        _Stage(_CONNTRACK, _NAT, altered(states=new)),
        _Stage(_NAT, _UNMARK, altered(states=new, port=port, status=dnat)),
        _Stage(_UNMARK, inf, altered(states=new, port=port, status=dnat, mark=0)),
    ]


def _answer_stages(e: Crossing, packet: Packet) -> Iterator[tuple[str, _Stage]]:
    """The answer to a captured SYN, on its way to the client: hook by hook, stage by stage."""

    def answer(states: frozenset[str] | None, port: int | None = packet.port) -> Packet:
        return Packet(
            family=packet.family,
            interface="",
            leaves_by=packet.interface,
            port=_CLIENT_PORT,
            source_port=port,
            mark=0,
            flags=frozenset({"syn", "ack"}),
            states=states,
            status=frozenset({"dnat"}) if e.config.redirects and states else frozenset(),
        )

    if not e.config.redirects:
        untracked = answer(frozenset({"untracked"}))
        yield "output", _Stage(-inf, _RAW, answer(None))
        yield "output", _Stage(_RAW, inf, untracked)
        yield "postrouting", _Stage(-inf, inf, untracked)
        return
    established, port = frozenset({"established"}), e.config.listen.port
    yield "output", _Stage(-inf, _CONNTRACK, answer(None, port))
    yield "output", _Stage(_CONNTRACK, inf, answer(established, port))
    yield "postrouting", _Stage(-inf, _NAT_BACK, answer(established, port))
    yield "postrouting", _Stage(_NAT_BACK, inf, answer(established))


def _prerouting(e: Crossing, packet: Packet) -> Iterator[tuple[_Stage, Walk]]:
    """Through the prerouting hook, stage by stage, to its end or to where the packet is dropped."""
    others = 0  # bits of the mark
    for stage in _stages(e, packet):
        walked = msgspec.structs.replace(stage.packet, mark=stage.packet.mark | others)
        walk = walk_hook(_between(e.chains or (), stage), "prerouting", walked)
        yield stage, walk
        if walk.verdict == "drop":
            return
        others = walk.mark & ~e.marks.steering.mask


def _captured(e: Crossing) -> list[Packet]:
    """A SYN of each family, captured interface and captured range, as it is once it has been taken; in redirect mode `_stages` knows the
    rest."""
    if not e.config.captures or e.chains is None:
        return []
    return [
        Packet(family=family, interface=link.name, port=port, mark=e.marks.steering.value)
        for family in e.families
        for link in e.captured_links
        if link.up
        for port in e.captured_ports
    ]


def _dropped(e: Crossing, walks: Sequence[tuple[Packet, Walk]], which: str) -> Iterator[Finding]:
    """One finding a rule. A failure where it is certain, and every captured interface is concerned for some port and family."""
    found: dict[tuple[str, int | None, bool], list[tuple[Packet, Walk]]] = {}
    for packet, walk in walks:
        if walk.verdict == "drop":
            key = (str(walk.chain), walk.rule.handle if walk.rule else None, walk.perhaps)
            found.setdefault(key, []).append((packet, walk))
    everywhere = {_link(packet) for packet, _ in walks}
    for (_, _, perhaps), those in found.items():
        concerned = {_link(packet) for packet, _ in those}
        first, walk = those[0]
        assert walk.chain is not None
        name, words, what = _admission(e, first)
        ports = sorted({one for packet, _ in those if (one := packet.source_port or packet.port) is not None})
        there, back = ("from", "to") if first.leaves_by else ("to", "from")
        port = f" {there} port {', '.join(map(str, ports))}" if ports else ""
        families = sorted({packet.family for packet, _ in those})
        family = f"IPv{families[0]}" if len(families) == 1 else name
        yield Finding(
            seen=f"{family} packets{port} {back} {', '.join(sorted(concerned))} are {'perhaps ' if perhaps else ''}dropped, {which}: "
            + _where(walk),
            why=f"clients get no answer: {'the answers' if first.leaves_by else 'captured packets'} {what}"
            + (" (a rule before it may admit some of them; which, cannot be told)" if perhaps else ""),
            remedy=_insert(walk.chain, *words),
            warning=perhaps or concerned != everywhere,
        )


def _link(packet: Packet) -> str:
    """The captured interface on its way."""
    return packet.leaves_by or packet.interface


def _admission(e: Crossing, packet: Packet) -> tuple[str, tuple[str, str], str]:
    """What such packets are called, what admits them and no others, for nft and for iptables, and why that is so."""
    steering, port = e.marks.steering, e.config.listen.port
    if packet.leaves_by:
        return _admission_of_answers(e, packet)
    if packet.mark & steering.mask == steering.value:
        words = f"meta mark and {steering.mask:#x} == {steering.value:#x}", f"-m mark --mark {steering}"
        if packet.status:
            return "captured", words, f"bear our mark, and NAT has brought them to port {port}"
        if e.config.redirects:
            return "captured", words, "bear our mark, and still have their original port"
        return "steered", words, "bear our mark, are untracked, and still have their original port"
    if packet.status:
        words = f"ct status dnat tcp dport {port}", f"-p tcp --dport {port} -m conntrack --ctstate DNAT"
        return (
            "captured",
            words,
            f"have been brought to port {port} by NAT, which tells them from those of who dials it",
        )
    ports = [str(one) for one in e.config.capture.ports]
    words = (
        f"tcp dport {{ {', '.join(ports)} }}",
        f"-p tcp -m multiport --dports {','.join(ports).replace('-', ':')}",
    )
    return "captured", words, "come there before they are marked"


def _admission_of_answers(e: Crossing, packet: Packet) -> tuple[str, tuple[str, str], str]:
    port = e.config.listen.port
    ports = [str(one) for one in ([port] if packet.source_port == port else e.config.capture.ports)]
    nft = f"tcp sport {{ {', '.join(ports)} }}"
    iptables = f"-p tcp -m multiport --sports {','.join(ports).replace('-', ':')}"
    if packet.status:
        words = f"{nft} ct status dnat", f"{iptables} -m conntrack --ctstate DNAT"
        return (
            "answering",
            words,
            f"come from port {ports[0]}" if packet.source_port == port else "bear the original port",
        )
    if packet.states:
        words = f"{nft} ct state untracked", f"{iptables} -m conntrack --ctstate UNTRACKED"
        return "untracked", words, "match no `ct state` but untracked"
    return "answering", (nft, iptables), "pass there before conntrack knows them"


def _met(e: Crossing, kinds: Sequence[str], asked: Sequence[str]) -> list[tuple[ForeignChain, ChainRule]]:
    """The rules with such a statement that a captured connection meets, or would meet."""
    met: dict[tuple[str, int], tuple[ForeignChain, ChainRule]] = {}
    for packet in _captured(e):
        fresh = msgspec.structs.replace(packet, mark=0, states=None)
        for stage in _stages(e, packet) if e.config.redirects else [_Stage(-inf, inf, fresh)]:
            # NAT that comes after ours: it would meet the packet as it was.
            walked = fresh if "nat" in kinds and stage.first >= _NAT else stage.packet
            chains = _between(e.chains or (), stage)
            for chain, rule in walk_hook(chains, "prerouting", walked, kinds=kinds, asked=asked).met:
                met[str(chain), rule.handle] = (chain, rule)
    return list(met.values())


def _between(chains: Sequence[ForeignChain], stage: _Stage) -> list[ForeignChain]:
    return [chain for chain in chains if chain.hook is None or stage.first <= chain.priority < stage.end]


def _where(walk: Walk) -> str:
    assert walk.chain is not None
    if walk.rule is not None:
        return _rule(walk.chain, walk.rule)
    return f"policy drop of chain {walk.chain}"


def _rule(chain: ForeignChain, rule: ChainRule) -> str:
    return f"`{rule.text}` in chain {chain}"


def _delete(chain: ForeignChain, rule: ChainRule) -> str:
    return _nft("delete", chain, f"handle {rule.handle}")


def _insert(chain: ForeignChain, nft: str, iptables: str) -> str:
    """Admits packets in front of everything else in a chain; in the words of iptables where the chain is one of its."""
    if chain.family in ("ip", "ip6") and (chain.table, chain.name) in (
        ("filter", "INPUT"),
        ("filter", "OUTPUT"),
        ("mangle", "OUTPUT"),
        ("raw", "OUTPUT"),
        ("mangle", "POSTROUTING"),
        ("mangle", "PREROUTING"),
        ("raw", "PREROUTING"),
    ):
        program = "iptables" if chain.family == "ip" else "ip6tables"
        return f"{program} -t {chain.table} -I {chain.name} {iptables} -j ACCEPT"
    return _nft("insert", chain, f"'{nft} accept'")


def _nft(verb: str, chain: ForeignChain, rest: str) -> str:
    if all(is_name(name) for name in (chain.table, chain.name)):
        return f"nft {verb} rule {chain} {rest}"
    return f"# nft takes no such name: {printable(str(chain))}\nnft -a list ruleset"


CHECKS: tuple[Check, ...] = (
    rule_before_ours,
    mark_in_use,
    mark_overwritten,
    prerouting_drops,
    input_drops,
    output_drops,
    answers_dropped,
    loopback_drops,
    foreign_tproxy,
    foreign_nat,
    foreign_notrack,
    masquerade,
)
