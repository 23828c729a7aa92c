"""Pure: what other people's nft rules do with one of our packets. Three answers a match: yes, no, and it depends.

A rule that depends on what is not known here (the client's address, an element of a named set) is not taken for decided: who
asks gets to know that it may decide otherwise. Two facts make most firewalls decidable: a captured packet bears our mark, and it is
untracked, so `ct state new` and `ct state established` do not match it, and every other `ct` look-up breaks off its rule. In redirect mode
it is new to conntrack, and its destination has been changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from tproxyd.kernel import ChainRule, ForeignChain

__all__ = ["Packet", "Walk", "marks_of", "walk_hook"]

_Statement = dict[str, Any]
_MARK, _CONNECTION_MARK = {"meta": {"key": "mark"}}, {"ct": {"key": "mark"}}
_DEEPEST = 16  # jumps; the kernel's own limit (NFT_JUMP_STACK_SIZE)


class Packet(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a TCP packet. It arrives on `interface` and leaves by another, "": on none. `port` and `source_port` None: any.
    `states` are its conntrack states, None: not known yet; `status` is what conntrack has done with its connection."""

    family: int
    interface: str
    leaves_by: str = ""
    port: int | None
    source_port: int | None = None
    mark: int
    flags: frozenset[str] = frozenset({"syn"})
    states: frozenset[str] | None = frozenset({"untracked"})
    status: frozenset[str] = frozenset()


class Walk(msgspec.Struct):
    """How it ends. `verdict` is "accept" or "drop", by `rule` (None: the chain's policy) in `chain`; `perhaps`: a rule before that may have
    accepted it. `mark` is what it bears at the end. `met` has the rules with one of the statements that were asked for."""

    verdict: str
    chain: ForeignChain | None
    rule: ChainRule | None
    perhaps: bool
    mark: int
    marker: tuple[ForeignChain, ChainRule] | None
    met: list[tuple[ForeignChain, ChainRule]]


def walk_hook(
    chains: Sequence[ForeignChain],
    hook: str,
    packet: Packet,
    *,
    kinds: Sequence[str] = ("filter",),
    asked: Sequence[str] = (),
) -> Walk:
    """Takes the packet through the base chains of a hook, in their order."""
    walk = Walk("accept", None, None, False, packet.mark, None, [])
    families = ("inet", "ip" if packet.family == 4 else "ip6")
    bases = [
        chain
        for chain in chains
        if chain.hook == hook and chain.family in families and (chain.kind or "filter") in kinds
    ]
    for base in sorted(bases, key=lambda chain: chain.priority):
        walk.perhaps = False
        verdict = _walk_chain(chains, base, packet, walk, asked, certain=True, depth=0)
        if verdict is None:
            verdict = base.policy
            walk.rule, walk.chain = None, base
        if verdict == "drop":
            walk.verdict = "drop"
            return walk
    return walk


def _walk_chain(
    chains: Sequence[ForeignChain],
    chain: ForeignChain,
    packet: Packet,
    walk: Walk,
    asked: Sequence[str],
    *,
    certain: bool,
    depth: int,
) -> str | None:
    for rule in chain.rules:
        sure = certain
        for statement in rule.statements:
            kind, content = next(iter(statement.items()))
            answer: bool | None = True
            if kind == "match":
                answer = _matches(content, msgspec.structs.replace(packet, mark=walk.mark))
            elif kind in (
                "xt",
                "unknown",
                "limit",
                "quota",
            ):  # of iptables, without words for it; or it depends on the rate
                answer = None
            elif kind == "mangle":
                _mangle(content, walk, packet, chain, rule)
            elif kind in asked:
                walk.met.append((chain, rule))
                answer = kind not in ("redirect", "dnat")  # with it the rule has done its work
            if answer is False:
                break
            sure = sure and answer is True
            for verdict, target, decided in _verdicts(kind, content, packet):
                decided_here = sure and decided
                if verdict in ("jump", "goto"):
                    if depth >= _DEEPEST:
                        continue
                    inner = next(
                        (c for c in chains if (c.family, c.table, c.name) == (chain.family, chain.table, target)), None
                    )
                    result = (
                        _walk_chain(chains, inner, packet, walk, asked, certain=decided_here, depth=depth + 1)
                        if inner
                        else None
                    )
                    if result is not None:
                        return result
                    if verdict == "goto" and decided_here:
                        return None
                elif verdict == "return":
                    if decided_here:
                        return None
                elif decided_here:
                    walk.chain, walk.rule = chain, rule
                    return verdict
                elif verdict == "accept":
                    walk.perhaps = True
    return None


def _verdicts(kind: str, content: Any, packet: Packet) -> Iterator[tuple[str, str, bool]]:
    """Verdict, target of a jump, and whether it is certain."""
    if kind in ("accept", "drop"):
        yield kind, "", True
    elif kind == "reject":
        yield "drop", "", True
    elif kind == "return":
        yield "return", "", True
    elif kind in ("jump", "goto"):
        yield kind, content["target"], True
    elif kind == "queue":
        yield "accept", "", False
    elif kind == "vmap" and isinstance(content.get("data"), dict):
        for value, verdict in content["data"].get("set", []):
            answer = _matches({"op": "==", "left": content["key"], "right": value}, packet)
            if answer is not False:
                inner, detail = next(iter(verdict.items()))
                for name, target, _ in _verdicts(inner, detail, packet):
                    yield name, target, answer is True


def _mangle(content: _Statement, walk: Walk, packet: Packet, chain: ForeignChain, rule: ChainRule) -> None:
    if content.get("key") == _MARK:
        value = _value(content.get("value"), walk.mark, connection_mark=_connection_mark(packet))
        if value is not None and value != walk.mark:
            walk.mark, walk.marker = value, (chain, rule)


def marks_of(rule: ChainRule) -> Iterator[int]:
    """What the rule makes of the mark of a packet that has none."""
    for statement in rule.statements:
        content = statement.get("mangle")
        if content and content.get("key") == _MARK:
            value = _value(content.get("value"), 0)
            if value is not None:
                yield value


def _connection_mark(packet: Packet) -> int | None:
    """A new connection has none yet, an untracked packet no place for one; of others it is not known."""
    return 0 if packet.states == frozenset({"new"}) else None


def _value(expression: Any, mark: int, *, connection_mark: int | None = None) -> int | None:
    """A mark's new value. An untracked packet's ct mark is none: the rule breaks off, so its mark stays."""
    if isinstance(expression, int):
        return expression
    if isinstance(expression, dict):
        if expression == _MARK:
            return mark
        if expression == _CONNECTION_MARK:
            return connection_mark
        for operator, operands in expression.items():
            if operator in ("&", "|", "^") and isinstance(operands, list) and len(operands) == 2:
                left, right = (_value(one, mark, connection_mark=connection_mark) for one in operands)
                if left is None or right is None:
                    return None
                return left & right if operator == "&" else left | right if operator == "|" else left ^ right
    return None


def _matches(content: _Statement, packet: Packet) -> bool | None:
    operator, left, right = content.get("op"), content.get("left"), content.get("right")
    if operator != "in" and left == {"ct": {"key": "status"}}:
        return None  # compared as a whole, with bits that have no name
    answer = _compare(left, right, packet)
    if answer is None or operator not in ("==", "in", "!="):
        return _order(operator, left, right, packet)
    if operator == "!=" and answer != _NEVER:
        return not answer
    return answer == _ALWAYS


_ALWAYS, _NOT, _NEVER = 1, 0, -1
"""Matches; does not; breaks off the rule whatever is compared (no such header, no such conntrack entry)."""


def _order(operator: Any, left: Any, right: Any, packet: Packet) -> bool | None:
    port = _port(left, packet)
    if operator in ("<", ">", "<=", ">=") and isinstance(right, int) and port is not None:
        return {"<": port < right, ">": port > right, "<=": port <= right, ">=": port >= right}[operator]
    return None


def _compare(left: Any, right: Any, packet: Packet) -> int | None:
    if not isinstance(left, dict) or len(left) != 1:
        return None
    ((kind, content),) = left.items()
    if (
        kind == "&"
        and isinstance(content, list)
        and content[:1] in ([_MARK], [_CONNECTION_MARK])
        and isinstance(content[-1], int)
    ):
        if content[0] == _MARK:
            return _among(right, packet.mark & content[-1])
        return _conntrack("mark", right, packet)
    if not isinstance(content, dict):
        return None
    key = content.get("key")
    if kind == "meta":
        if key in ("iifname", "iif"):
            return _among(right, packet.interface)
        if key in ("oifname", "oif"):
            return _among(right, packet.leaves_by)
        known: dict[str, int | str] = {
            "mark": packet.mark,
            "l4proto": "tcp",
            "nfproto": f"ipv{packet.family}",
            "protocol": "ip" if packet.family == 4 else "ip6",
        }
        return _among(right, known[key]) if isinstance(key, str) and key in known else None
    if kind == "ct":
        return _conntrack(key, right, packet)
    if kind == "socket" and key in ("transparent", "wildcard"):
        return _among(right, int(key == "transparent"))
    if kind == "payload":
        return _payload(content, right, packet)
    return None


def _conntrack(key: Any, right: Any, packet: Packet) -> int | None:
    if packet.states is None:
        return None
    if key == "state":
        return _any_of(right, packet.states | packet.status)  # DNAT and SNAT are words there only for iptables
    if packet.states == {"untracked"}:
        return _NEVER
    if key == "status":
        return _any_of(right, packet.status)
    mark = _connection_mark(packet)
    return _among(right, mark) if key == "mark" and mark is not None else None


def _payload(content: _Statement, right: Any, packet: Packet) -> int | None:
    protocol, field = content.get("protocol"), content.get("field")
    if protocol in ("tcp", "th") and field in ("sport", "dport"):
        port = _port({"payload": content}, packet)
        return None if port is None else _among(right, port)
    if (protocol, field) == ("tcp", "flags"):
        return _any_of(right, packet.flags)
    if (protocol, field) in (("ip", "protocol"), ("ip6", "nexthdr")):
        return _among(right, "tcp") if packet.family == (4 if protocol == "ip" else 6) else _NEVER
    if protocol == ("ip6" if packet.family == 4 else "ip") or protocol in (
        "udp",
        "icmp",
        "icmpv6",
        "sctp",
        "dccp",
        "udplite",
        "esp",
        "ah",
    ):
        return _NEVER
    return None


def _port(left: Any, packet: Packet) -> int | None:
    """What the packet has there; None: any, or it is no port."""
    match left:
        case {"payload": {"protocol": "tcp" | "th", "field": "dport"}}:
            return packet.port
        case {"payload": {"protocol": "tcp" | "th", "field": "sport"}}:
            return packet.source_port
    return None


def _listed(right: Any) -> list[Any]:
    if isinstance(right, dict) and isinstance(right.get("set"), list):
        return list(right["set"])
    return right if isinstance(right, list) else [right]


def _any_of(right: Any, bits: frozenset[str]) -> int | None:
    """Whether one of the words on the right is among these; None if they are no words."""
    words = _listed(right)
    if not all(isinstance(word, str) and not word.startswith("@") for word in words):
        return None
    return _ALWAYS if bits & set(words) else _NOT


def _among(right: Any, value: int | str) -> int | None:
    """Whether a value is what stands on the right: itself, a range, a set. None: a named set, or something else."""
    for one in _listed(right):
        if isinstance(one, dict) and isinstance(one.get("range"), list) and len(one["range"]) == 2:
            first, last = one["range"]
            if isinstance(value, int) and isinstance(first, int) and first <= value <= last:
                return _ALWAYS
        elif (isinstance(one, str) and one.startswith("@")) or isinstance(one, dict):
            return None
        elif (
            one == value
            or (one == 6 and value == "tcp")
            or (isinstance(one, str) and isinstance(value, str) and one.endswith("*") and value.startswith(one[:-1]))
        ):
            return _ALWAYS
    return _NOT
