"""How many packets the rules of ours have met that count, as the kernel tells: those that it steers, refuses and drops without a word to us."""

from __future__ import annotations

from collections.abc import Iterator

from tproxyd.kernel.dumps import attribute, attributes, dump_all, each_attribute
from tproxyd.kernel.nft import list_names
from tproxyd.plan import DEFAULT_NAME

__all__ = ["packet_counts"]

_NETLINK_NETFILTER = 12  # linux/netlink.h
_GETRULE = 0x0A07  # NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETRULE
_INET = 1  # NFPROTO_INET
_TABLE, _CHAIN, _EXPRESSIONS, _USERDATA = 1, 2, 4, 7  # NFTA_RULE_
_NAME, _DATA = 1, 2  # NFTA_EXPR_
_PACKETS = 2  # NFTA_COUNTER_PACKETS
_COMMENT = 0  # NFTNL_UDATA_RULE_COMMENT of libnftnl


def packet_counts(name: str = DEFAULT_NAME) -> dict[tuple[str, str, str], int]:
    """By table, chain and comment; rules that differ in their family alone are one. Of the calling thread's namespace. A millisecond, however much
    stands in the sets. Raises OSError, CapabilityError, KernelError."""
    counts: dict[tuple[str, str, str], int] = {}
    for table in list_names(name):
        of_table = bytes([_INET, 0, 0, 0]) + attribute(_TABLE, table.encode() + b"\0")
        for body in dump_all(_NETLINK_NETFILTER, _GETRULE, of_table):
            rule = attributes(body[4:])
            if _text(rule[_TABLE]) != table:
                continue  # a kernel that does not choose
            for packets in _counters(rule.get(_EXPRESSIONS, b"")):
                key = (table, _text(rule[_CHAIN]), _comment(rule.get(_USERDATA, b"")))
                counts[key] = counts.get(key, 0) + packets
    return counts


def _counters(expressions: bytes) -> Iterator[int]:
    for _, content in each_attribute(expressions):
        expression = attributes(content)
        if _text(expression.get(_NAME, b"")) == "counter":
            yield int.from_bytes(attributes(expression[_DATA])[_PACKETS], "big")


def _comment(userdata: bytes) -> str:
    while len(userdata) >= 2:
        kind, length = userdata[0], userdata[1]
        if kind == _COMMENT:
            return _text(userdata[2 : 2 + length])
        userdata = userdata[2 + length :]
    return ""


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode(errors="replace")
