"""What others have in the kernel: their ip rules, their routes in our table, their nft rules, and the links. Only looked at.

Foreign is what does not bear our protocol and does not stand in a table `inet tproxyd*`.
"""

from __future__ import annotations

import json
import re
import socket
from typing import Any

import msgspec

from tproxyd.kernel.nft import is_ours, list_ruleset
from tproxyd.kernel.routing import dump_messages, open_netlink
from tproxyd.plan import PROTOCOL

__all__ = [
    "ForeignChain",
    "ForeignNftRule",
    "ForeignRoute",
    "ForeignRule",
    "Link",
    "list_chains",
    "list_links",
    "list_routes",
    "list_rules",
]

_AF = {4: socket.AF_INET, 6: socket.AF_INET6}
_ACTIONS = {1: "lookup", 2: "goto", 3: "nop", 6: "blackhole", 7: "unreachable", 8: "prohibit"}  # linux/fib_rules.h
_TYPES = {1: "unicast", 2: "local", 6: "blackhole", 7: "unreachable", 8: "prohibit", 9: "throw"}  # linux/rtnetlink.h
_IFF_UP = 1
_HANDLE = re.compile(r"^(?P<text>.*?) # handle (?P<handle>\d+)$")


class Link(msgspec.Struct, frozen=True):
    """A network interface. `kind` is "" for hardware and lo; `master` is the name of the bridge, VRF or bond that has it."""

    name: str
    kind: str
    mtu: int
    up: bool
    master: str | None
    master_kind: str
    addresses: tuple[str, ...] = ()


class ForeignRule(msgspec.Struct, frozen=True, kw_only=True):
    """An ip rule of somebody else. `narrowed`: it has a selector besides mark and iif (addresses, ports, users, ...)."""

    family: int
    priority: int
    mark: int
    mask: int
    iif: str | None
    action: str
    table: int | None
    suppressing: bool
    narrowed: bool
    protocol: int

    def __str__(self) -> str:
        words = [f"-{self.family} rule priority {self.priority}"]
        if self.mask:
            words.append(f"fwmark {self.mark:#x}/{self.mask:#x}")
        if self.iif:
            words.append(f"iif {self.iif}")
        words.append(f"lookup {self.table}" if self.action == "lookup" else self.action)
        return " ".join(words)


class ForeignRoute(msgspec.Struct, frozen=True, kw_only=True):
    """A route of somebody else in a table. `destination` is "default" or a network."""

    family: int
    kind: str
    destination: str
    table: int
    protocol: int

    def __str__(self) -> str:
        kind = "" if self.kind == "unicast" else f"{self.kind} "
        return f"{kind}{self.destination} table {self.table}"


class ForeignNftRule(msgspec.Struct, frozen=True):
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
    rules: list[ForeignNftRule]

    def __str__(self) -> str:
        return f"{self.family} {self.table} {self.name}"


def list_links() -> tuple[Link, ...]:
    """Every interface of this namespace."""
    with open_netlink("list interfaces") as netlink:
        messages = list(netlink.get_links())
        addresses: dict[int, list[str]] = {}
        for message in netlink.get_addr():
            addresses.setdefault(message["index"], []).append(
                message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
            )
    names = {message["index"]: message.get_attr("IFLA_IFNAME") for message in messages}
    kinds = {message["index"]: message.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") or "" for message in messages}
    return tuple(
        Link(
            names[message["index"]],
            kinds[message["index"]],
            message.get_attr("IFLA_MTU") or 0,
            bool(message["flags"] & _IFF_UP),
            names.get(message.get_attr("IFLA_MASTER")),
            kinds.get(message.get_attr("IFLA_MASTER"), ""),
            tuple(addresses.get(message["index"], ())),
        )
        for message in messages
    )


def list_rules() -> tuple[ForeignRule, ...]:
    """All ip rules but ours, in the kernel's order."""
    found = []
    with open_netlink("list ip rules") as netlink:
        for family, af in _AF.items():
            for message in dump_messages(netlink.rule, af):
                get = message.get_attr
                if get("FRA_PROTOCOL") == PROTOCOL:
                    continue
                other = (
                    "FRA_OIFNAME",
                    "FRA_IP_PROTO",
                    "FRA_SPORT_RANGE",
                    "FRA_DPORT_RANGE",
                    "FRA_UID_RANGE",
                    "FRA_TUN_ID",
                )
                every_user = get("FRA_UID_RANGE") in (None, {"start": 0, "end": 0xFFFFFFFF})
                narrowed = bool(message["src_len"] or message["dst_len"] or message["tos"]) or any(
                    get(name) for name in other if name != "FRA_UID_RANGE" or not every_user
                )
                found.append(
                    ForeignRule(
                        family=family,
                        priority=get("FRA_PRIORITY") or 0,
                        mark=get("FRA_FWMARK") or 0,
                        mask=get("FRA_FWMASK") or 0,
                        iif=get("FRA_IIFNAME"),
                        action="l3mdev" if get("FRA_L3MDEV") else _ACTIONS.get(message["action"], "nop"),
                        table=get("FRA_TABLE"),
                        suppressing=get("FRA_SUPPRESS_PREFIXLEN") not in (None, 0xFFFFFFFF, -1),
                        narrowed=narrowed or bool(message["flags"] & 0x2),  # FIB_RULE_INVERT: "not"
                        protocol=get("FRA_PROTOCOL") or 0,
                    )
                )
    return tuple(found)


def list_routes(table: int) -> tuple[ForeignRoute, ...]:
    """The routes of one table but ours. The kernel filters by table."""
    found = []
    with open_netlink(f"list the routes of table {table}") as netlink:
        for family, af in _AF.items():
            for message in dump_messages(netlink.route, af, table=table):
                ours = message["proto"] == PROTOCOL and message["type"] == 2 and not message["dst_len"]
                if ours or (message.get_attr("RTA_TABLE") or message["table"]) != table:
                    continue
                network = f"{message.get_attr('RTA_DST')}/{message['dst_len']}" if message["dst_len"] else "default"
                found.append(
                    ForeignRoute(
                        family=family,
                        kind=_TYPES.get(message["type"], "other"),
                        destination=network,
                        table=table,
                        protocol=message["proto"],
                    )
                )
    return tuple(found)


def list_chains() -> tuple[ForeignChain, ...]:
    """All chains of nft (those of iptables-nft among them) but ours. CapabilityError without CAP_NET_ADMIN."""
    words = _words(list_ruleset(form="text"))
    content = json.loads(list_ruleset(form="json"))["nftables"]
    rules: dict[tuple[str, str, str], list[ForeignNftRule]] = {}
    for item in content:
        if "rule" in item:
            rule = item["rule"]
            key = (rule["family"], rule["table"], rule["chain"])
            text = words.get((*key, rule["handle"]), "")
            # A statement may be null where nft has no JSON for it.
            statements = [one if isinstance(one, dict) else {"unknown": one} for one in rule.get("expr", [])]
            rules.setdefault(key, []).append(ForeignNftRule(statements, text, rule["handle"]))
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
        if not is_ours(chain["family"], chain["table"])
    )


def _words(listing: str) -> dict[tuple[str, str, str, int], str]:
    """Each rule's own words by family, table, chain and handle."""
    found, family, table, chain = {}, "", "", ""
    for line in listing.splitlines():
        words = line.split()
        if words[:1] == ["table"]:
            family, table, chain = words[1], words[2], ""
        elif words[:1] == ["chain"] and line.startswith("\tchain"):
            chain = words[1]
        elif chain and (match := _HANDLE.match(line.strip())):
            found[family, table, chain, int(match["handle"])] = match["text"]
    return found
