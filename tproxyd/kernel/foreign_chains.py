"""The nft chains that are not ours, whole: for who follows a packet through them. What matters to a start is in foreign_ruleset."""

from __future__ import annotations

from typing import Any

import msgspec

from tproxyd.kernel.foreign_listing import list_foreign, rule_lines

__all__ = ["ChainRule", "ForeignChain", "list_chains"]


class ChainRule(msgspec.Struct, frozen=True):
    """One rule: its statements as nft's JSON has them (libnftables-json(5)), its words, its handle."""

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
    rules: dict[tuple[str, str, str], list[ChainRule]] = {}
    for item in content:
        if "rule" in item:
            rule = item["rule"]
            key = (rule["family"], rule["table"], rule["chain"])
            # A statement may be null where nft has no JSON for it.
            statements = [one if isinstance(one, dict) else {"unknown": one} for one in rule.get("expr", [])]
            rules.setdefault(key, []).append(
                ChainRule(statements, words.get((*key, rule["handle"]), ""), rule["handle"])
            )
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
