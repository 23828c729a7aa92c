"""The nft tables that are not ours, as nft lists them: what their rules mean (JSON), and how they read (text).

Tables that are switched off (`flags dormant`) are not in force, and left out. Sets with names stay unread.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from tproxyd.errors import KernelError
from tproxyd.kernel.dumps import attributes, dump_all, each_attribute
from tproxyd.kernel.nft import find_program, has_foreign_tables, is_ours, run_program
from tproxyd.plan import DEFAULT_NAME

__all__ = ["Key", "is_name", "list_extensions", "list_foreign", "rule_lines"]

_NETLINK_NETFILTER = 12  # linux/netlink.h
_GETRULE = 10 << 8 | 7  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETRULE
_RULE_TABLE, _RULE_CHAIN, _RULE_HANDLE, _RULE_EXPRESSIONS = 1, 2, 3, 4  # NFTA_RULE_
_EXPR_NAME, _EXPR_DATA = 1, 2  # NFTA_EXPR_
_XT_NAME, _XT_INFO = 1, 3  # NFTA_TARGET_, NFTA_MATCH_
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}  # NFPROTO_

_TABLE_LINE = re.compile(r"table (\S+) (\S+) \{")
_FLAGS_LINE = re.compile(r"\tflags (.+)")
_CHAIN_LINE = re.compile(r"\tchain (\S+) \{")
_RULE_LINE = re.compile(r"\t\t(.*) # handle (\d+)$")
_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9_./-]*")
_TRIES = 3  # tables come and go between two programs

Key = tuple[str, str, str, int]
"""A rule: family, table, chain, handle."""

Part = dict[str, Any]


def is_name(text: str) -> bool:
    """Whether nft takes it for a name and nothing more. It reads its arguments as one text, and netlink lets a table or chain be called
    anything, such as `x;include"/etc/shadow"`: that must not be given to it. No shell sees more in a name either."""
    return _NAME.fullmatch(text) is not None


def list_foreign(name: str = DEFAULT_NAME) -> tuple[list[Part], str]:
    """Chains, rules and sets of others, as libnftables-json(5) has them, and the text of the whole ruleset with handles. `name` is that
    of our tables.

    Raises MissingError, CapabilityError, KernelError.
    """
    find_program()
    if not has_foreign_tables(name):
        return [], ""  # nft takes 12 ms to say so
    for _ in range(_TRIES):
        text = run_program("-a", "-s", "-t", "list", "ruleset")
        tables = [table for table in _tables(text) if not is_ours(*table[:2], name)]
        dormant = {(family, table) for family, table, flags in tables if "dormant" in flags}
        try:
            if len(tables) == len(dormant):
                return [], text
            parts = _list_whole()
            if parts is None:
                parts = [part for table in tables for part in _list_table(text, *table)]
        except KernelError as error:
            failed = error  # a table that has gone, perhaps
            continue
        return [part for part in parts if _is_wanted(part, name, dormant)], text
    raise failed


def _list_whole() -> list[Part] | None:
    """All that there is; None where nft cannot tell: version 1.0.6 prints flags of tables from memory that it has freed, and
    since a daemon's table has a flag (its owner), that is often the end of the JSON, or of nft."""
    try:
        return _parts(run_program("-j", "-t", "list", "ruleset"))
    except (KernelError, ValueError):
        return None


def _list_table(text: str, family: str, table: str, flags: str) -> list[Part]:
    """One table. Of one with flags each chain by itself: then nft does not tell of the table."""
    chains = [*_chains(text, family, table)] if flags else []
    if not all(map(is_name, (table, *chains))):
        raise KernelError(
            f"cannot list the nft table {family} {table}: nft takes no such name, of it or of a chain in it"
        )
    listings = (
        [run_program("-j", "-t", "list", "chain", family, table, chain) for chain in chains]
        if flags
        else [run_program("-j", "-t", "list", "table", family, table)]
    )
    try:
        return [part for listing in listings for part in _parts(listing)]
    except ValueError as error:
        raise KernelError(f"`nft -j list table {family} {table}` gives no JSON ({error})") from error


def _parts(listing: str) -> list[Part]:
    """Raises ValueError if it is no JSON of nft's."""
    try:
        parts: list[Part] = json.loads(listing)["nftables"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"no `nftables` in it: {listing[:80]!r}") from error
    return parts


def _is_wanted(part: Part, name: str, dormant: set[tuple[str, str]]) -> bool:
    ((_, content),) = part.items()
    family, table = content.get("family"), content.get("table")
    return table is not None and not is_ours(family, table, name) and (family, table) not in dormant


def _tables(text: str) -> Iterator[tuple[str, str, str]]:
    """Family, name and flags of each table in a listing."""
    for line, after in pairwise([*text.splitlines(), ""]):
        if match := _TABLE_LINE.match(line):
            flags = _FLAGS_LINE.match(after)
            yield match[1], match[2], flags[1] if flags else ""


def _chains(text: str, family: str, table: str) -> Iterator[str]:
    here = False
    for line in text.splitlines():
        if match := _TABLE_LINE.match(line):
            here = match.groups() == (family, table)
        elif here and (match := _CHAIN_LINE.match(line)):
            yield match[1]


def rule_lines(text: str) -> dict[Key, str]:
    """How nft shows each rule, without its handle."""
    lines: dict[Key, str] = {}
    family = table = chain = ""
    for line in text.splitlines():
        if match := _RULE_LINE.match(line):
            lines[family, table, chain, int(match[2])] = " ".join(match[1].split())
        elif match := _TABLE_LINE.match(line):
            family, table = match[1], match[2]
        elif match := _CHAIN_LINE.match(line):
            chain = match[1]
    return lines


def list_extensions() -> dict[Key, list[tuple[str, bytes]]]:
    """Name and data of the iptables extensions in each rule that has any, of which nft's JSON has the name alone. Raises KernelError."""
    found: dict[Key, list[tuple[str, bytes]]] = {}
    try:
        for body in dump_all(_NETLINK_NETFILTER, _GETRULE, bytes(4)):  # struct nfgenmsg: every family
            has = attributes(body[4:])
            extensions = list(_extensions(has.get(_RULE_EXPRESSIONS, b"")))
            if extensions:
                table, chain = (has[kind].rstrip(b"\0").decode(errors="replace") for kind in (_RULE_TABLE, _RULE_CHAIN))
                key = (_FAMILIES.get(body[0], ""), table, chain, struct.unpack(">Q", has[_RULE_HANDLE])[0])
                found[key] = extensions
    except OSError as error:
        raise KernelError(f"cannot list the rules of iptables: {error.strerror}") from error
    return found


def _extensions(expressions: bytes) -> Iterator[tuple[str, bytes]]:
    for _, element in each_attribute(expressions):
        expression = attributes(element)
        if expression.get(_EXPR_NAME, b"").rstrip(b"\0") in (b"target", b"match"):
            data = attributes(expression.get(_EXPR_DATA, b""))
            yield data.get(_XT_NAME, b"").rstrip(b"\0").decode(errors="replace"), data.get(_XT_INFO, b"")
