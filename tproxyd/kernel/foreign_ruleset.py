"""The nft tables that are not ours, as far as their rules can meet what is: marks, transparent proxies, redirections.

Sets with names stay unread. Rules that iptables has made stand there, too; what nft does not show of their extensions is asked of the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from tproxyd.kernel.foreign_listing import Key, list_extensions, list_foreign, rule_lines
from tproxyd.kernel.marks import Use, Values, expression_use, extension_use
from tproxyd.plan import DEFAULT_NAME

__all__ = ["ForeignNftRule", "list_foreign_nft_rules"]

_PREROUTING_RAW = -300
_TCP = ("tcp", 6)


class ForeignNftRule(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody else's rule that uses marks, or takes connections. `line` is how nft shows it.

    `bits`: those of the packet's mark that it uses. `overwrites`: it sets the whole mark of what it meets behind our chains.
    `takes`: how it takes connections that arrive, and `ports` which, as far as the rule says; empty: any.
    """

    table: str
    chain: str
    line: str
    bits: int = 0
    overwrites: bool = False
    takes: Literal["tproxy", "redirect"] | None = None
    ports: tuple[tuple[int, int], ...] = ()


def list_foreign_nft_rules(ours: Values, name: str = DEFAULT_NAME) -> list[ForeignNftRule]:
    """Those rules that use marks, but for comparisons with `ours`, or take connections. `name` is that of our tables. Raises MissingError, CapabilityError, KernelError."""
    parts, text = list_foreign(name)
    chains: dict[tuple[str, str, str], dict[str, Any]] = {}
    rules: list[dict[str, Any]] = []
    for part in parts:
        if "chain" in part:
            chain = part["chain"]
            chains[chain["family"], chain["table"], chain["name"]] = chain
        elif "rule" in part:
            rules.append(part["rule"])
    extensions = list_extensions() if any("xt" in one for rule in rules for one in rule["expr"]) else {}
    lines: dict[Key, str] = {}
    found = []
    for rule in rules:
        key = (rule["family"], rule["table"], rule["chain"], rule["handle"])
        one = _read(rule["expr"], chains.get(key[:3], {}), extensions.get(key, ()), ours)
        if one is not None:
            lines = lines or rule_lines(text)
            shown = lines.get(key, f"handle {key[3]}")
            if one.words:
                shown = f"{shown} (iptables: {' '.join(one.words)})".strip()
            found.append(
                ForeignNftRule(
                    table=f"{key[0]} {key[1]}",
                    chain=key[2],
                    line=shown,
                    bits=one.use.bits,
                    overwrites=one.use.overwrites,
                    takes=one.takes,
                    ports=one.ports,
                )
            )
    return found


class _Read(msgspec.Struct):
    use: Use
    takes: Literal["tproxy", "redirect"] | None
    ports: tuple[tuple[int, int], ...]
    words: list[str]


def _read(
    expressions: list[dict[str, Any]], chain: dict[str, Any], extensions: Sequence[tuple[str, bytes]], ours: Values
) -> _Read | None:
    use, words = Use(), []
    takes: Literal["tproxy", "redirect"] | None = None
    for expression in expressions:
        use |= expression_use(expression, ours)
        if "tproxy" in expression or "redirect" in expression:
            takes = "tproxy" if "tproxy" in expression else "redirect"
    for name, info in extensions:
        found = extension_use(name, info, ours)
        if found is not None:
            use |= found[0]
            words.append(found[1])
        if name in ("TPROXY", "REDIRECT"):
            takes = "tproxy" if name == "TPROXY" else "redirect"
            words += [name] * (found is None)
    ports = _tcp_ports(expressions)
    if ports is None or chain.get("hook", "prerouting") != "prerouting":
        takes = None
    # A base chain of another hook sees packets when their way is decided.
    behind = chain.get("hook", "prerouting") == "prerouting" and chain.get("prio", 0) > _PREROUTING_RAW
    use = Use(use.bits, use.overwrites and behind and ports is not None)
    return _Read(use, takes, ports or (), words) if any(use) or takes else None


def _tcp_ports(expressions: list[dict[str, Any]]) -> tuple[tuple[int, int], ...] | None:
    """The TCP ports that a rule is limited to; empty: none that it says; None: it is for no TCP at all."""
    ports: tuple[tuple[int, int], ...] = ()
    for expression in expressions:
        match expression:
            case {"match": {"op": "==", "left": {"payload": {"protocol": protocol, "field": "dport"}}, "right": right}}:
                if protocol not in ("tcp", "th"):
                    return None
                ports = tuple(_ranges(right))
            case {
                "match": {
                    "op": "==",
                    "left": {"meta": {"key": "l4proto"}}
                    | {"payload": {"protocol": "ip", "field": "protocol"}}
                    | {"payload": {"protocol": "ip6", "field": "nexthdr"}},
                    "right": str() | int() | {"set": list()} as right,
                }
            }:
                if not any(one in _TCP for one in (right["set"] if isinstance(right, dict) else [right])):
                    return None
    return ports


def _ranges(value: Any) -> Iterator[tuple[int, int]]:
    match value:
        case int():
            yield value, value
        case {"range": [int(first), int(last)]}:
            yield first, last
        case {"set": [*many]}:
            for one in many:
                yield from _ranges(one)
