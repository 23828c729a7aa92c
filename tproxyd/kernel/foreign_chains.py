"""The nft chains that are not ours, whole: for who follows a packet through them. What matters to a start is in foreign_ruleset."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import msgspec

from tproxyd.kernel.foreign_listing import list_extensions, list_foreign, rule_lines

__all__ = ["ChainRule", "ForeignChain", "list_chains"]

_CONNTRACK_FLAGS = struct.Struct(
    "=HHH"
)  # of struct xt_conntrack_mtinfo3: what is asked, what of it is turned round, states
_CONNTRACK_FLAGS_AT = 146
_ASKS_STATE, _WAS_STATE = 0x1, 0x2000  # XT_CONNTRACK_STATE; XT_CONNTRACK_STATE_ALIAS: written as `-m state`
_STATES = {
    0x1: "invalid",
    0x2: "established",
    0x4: "related",
    0x8: "new",
    0x40: "snat",
    0x80: "dnat",
    0x100: "untracked",
}


class ChainRule(msgspec.Struct, frozen=True):
    """One rule: its statements as nft's JSON has them (libnftables-json(5)), its words, its handle. `-m conntrack --ctstate` of iptables,
    of which nft tells the name alone, is there as `ct state`, in which DNAT and SNAT are words, too."""

    statements: list[dict[str, Any]]
    text: str
    handle: int


class ForeignChain(msgspec.Struct, frozen=True, kw_only=True):
    """One chain with its rules. `hook` None: only jumped to."""

    family: str
    table: str
    name: str
    hook: str | None
    kind: str | None
    priority: int
    policy: str
    rules: list[ChainRule]

    def __str__(self) -> str:
        return f"{self.family} {self.table} {self.name}"


def list_chains() -> tuple[ForeignChain, ...]:
    """All chains of nft (those of iptables-nft among them) but ours, and those that are switched off. CapabilityError without CAP_NET_ADMIN."""
    content, text = list_foreign()
    words = rule_lines(text)
    has_extensions = any(
        "xt" in one for item in content if "rule" in item for one in item["rule"].get("expr", []) if one
    )
    extensions = list_extensions() if has_extensions else {}
    rules: dict[tuple[str, str, str], list[ChainRule]] = {}
    for item in content:
        if "rule" in item:
            rule = item["rule"]
            key = (rule["family"], rule["table"], rule["chain"])
            # A statement may be null where nft has no JSON for it.
            statements = [one if isinstance(one, dict) else {"unknown": one} for one in rule.get("expr", [])]
            handle = rule["handle"]
            statements = _with_states(statements, extensions.get((*key, handle), ()))
            rules.setdefault(key, []).append(ChainRule(statements, words.get((*key, handle), ""), handle))
    return tuple(
        ForeignChain(
            family=chain["family"],
            table=chain["table"],
            name=chain["name"],
            hook=chain.get("hook"),
            kind=chain.get("type"),
            priority=chain.get("prio", 0),
            policy=chain.get("policy", "accept"),
            rules=rules.get((chain["family"], chain["table"], chain["name"]), []),
        )
        for chain in (item["chain"] for item in content if "chain" in item)
    )


def _with_states(statements: list[dict[str, Any]], extensions: Sequence[tuple[str, bytes]]) -> list[dict[str, Any]]:
    """The same, with nft's words for the extensions that ask for conntrack's state and nothing else."""
    places = [number for number, one in enumerate(statements) if "xt" in one]
    if len(places) != len(extensions):
        return statements
    told = [*statements]
    for number, (name, info) in zip(places, extensions, strict=True):
        if name == "conntrack" and len(info) >= _CONNTRACK_FLAGS_AT + _CONNTRACK_FLAGS.size:
            asked, inverted, states = _CONNTRACK_FLAGS.unpack_from(info, _CONNTRACK_FLAGS_AT)
            if asked & ~_WAS_STATE == _ASKS_STATE:
                words = [word for bit, word in _STATES.items() if states & bit]
                operator = "!=" if inverted & _ASKS_STATE else "in"
                told[number] = {"match": {"op": operator, "left": {"ct": {"key": "state"}}, "right": words}}
    return told
