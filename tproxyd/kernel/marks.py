"""Which bits of packet marks a rule of somebody else's uses. Pure: expressions as `nft -j` writes them, or an iptables extension's
data, become bits.

A mark of 32 bits is shared by all programs of a host, each with its own bits. So a rule that compares or sets bits through a mask
uses these bits, whatever their value; a rule that compares or sets the whole mark uses the bits of the value: who writes
`fwmark 1` leaves the others alone by being alone. A comparison with the very mark that tproxyd sets is meant for tproxyd (the rule that
lets steered packets through a firewall) and uses none.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Set
from functools import reduce
from typing import Any, NamedTuple

__all__ = ["ALL", "Use", "expression_use", "extension_use"]

ALL = 0xFFFFFFFF


class Use(NamedTuple):
    """`bits` are used. `overwrites`: all others are lost, those that other programs have set."""

    bits: int = 0
    overwrites: bool = False

    def __or__(self, other: Use) -> Use:
        return Use(self.bits | other.bits, self.overwrites or other.overwrites)


Values = Set[tuple[int, int]]
"""Values with their masks: the marks that tproxyd may set."""


class _Bits(NamedTuple):
    """What is known of a value: bits that are 0, that are 1, that are those of the mark before; the rest is anything."""

    zero: int = 0
    one: int = 0
    kept: int = 0

    @property
    def other(self) -> int:
        return ALL & ~(self.zero | self.one | self.kept)


def expression_use(expression: Any, ours: Values = frozenset()) -> Use:
    """What one statement of a rule does with the packet's mark or, since the one is restored from the other, the connection's."""
    kind, content = next(iter(expression.items()))
    if kind == "mangle":
        key = _mark_of(content["key"])
        return _set(content["value"], key) if key else Use()
    if kind == "match":
        return _compare(content["left"], [content["right"]], ours)
    if kind == "vmap" and isinstance(content["data"], dict):
        return _compare(content["key"], [pair[0] for pair in content["data"].get("set", ())], ours)
    return Use()


def _set(value: Any, key: str) -> Use:
    bits = _evaluate(value, key)
    used = bits.one | (bits.other if bits.other != ALL else 0)
    if key == "ct":
        return Use(used)
    # What has a connection's mark in it does nothing to a packet without conntrack, and ours have none.
    overwrites = not bits.kept and not _mentions(value, "ct")
    return Use(used | (bits.zero if bits.kept else 0), overwrites)


def _compare(left: Any, right: list[Any], ours: Values) -> Use:
    if not _mentions(left, "meta"):
        return Use()
    compared = _evaluate(left, "meta").kept
    if compared != ALL:
        return Use() if all(isinstance(one, int) and (one, compared) in ours for one in right) else Use(compared)
    return Use(reduce(int.__or__, (_values(one) for one in right), 0))


def _values(value: Any) -> int:
    """The bits that are 1 in one of these values; of named sets, which are not read, none."""
    match value:
        case int():
            return value & ALL
        case {"range": [int(first), int(last)]}:
            return (first | last | ((1 << (first ^ last).bit_length()) - 1)) & ALL
        case {"prefix": {"len": int(length)}}:  # nft writes `meta mark & 0xffff0000 == 0x10000` so
            return ALL & ~(ALL >> length)
        case {"set": [*many]} | [*many]:
            return reduce(int.__or__, map(_values, many), 0)
        case {"elem": {"val": one}}:
            return _values(one)
    return 0


def _evaluate(value: Any, key: str) -> _Bits:
    if isinstance(value, int):
        return _Bits(zero=ALL & ~value, one=value & ALL)
    if isinstance(value, dict):
        if _mark_of(value) == key:
            return _Bits(kept=ALL)
        kind, content = next(iter(value.items()))
        if kind in _OPERATIONS and isinstance(content, list):
            return reduce(_OPERATIONS[kind], (_evaluate(one, key) for one in content))
        if kind in ("<<", ">>") and isinstance(content[1], int):
            before, by = _evaluate(content[0], key), content[1]
            shift: Callable[[int], int] = (lambda bits: bits << by & ALL) if kind == "<<" else (lambda bits: bits >> by)
            return _Bits(zero=ALL & ~shift(ALL & ~before.zero), one=shift(before.one))
        if kind in ("numgen", "jhash", "symhash") and content.get("mod"):
            first = content.get("offset", 0)
            return _Bits(zero=ALL & ~_values({"range": [first, first + content["mod"] - 1]}))
        if kind == "map" and isinstance(content.get("data"), dict):
            some = _values([pair[1] for pair in content["data"].get("set", ())])
            return _Bits(zero=ALL & ~some)
    return _Bits()


def _and(a: _Bits, b: _Bits) -> _Bits:
    zero, one = a.zero | b.zero, a.one & b.one
    return _Bits(zero, one, (a.kept & (b.kept | b.one) | b.kept & a.one) & ~zero)


def _or(a: _Bits, b: _Bits) -> _Bits:
    zero, one = a.zero & b.zero, a.one | b.one
    return _Bits(zero, one, (a.kept & (b.kept | b.zero) | b.kept & a.zero) & ~one)


def _xor(a: _Bits, b: _Bits) -> _Bits:
    return _Bits(
        zero=a.zero & b.zero | a.one & b.one,
        one=a.zero & b.one | a.one & b.zero,
        kept=a.kept & b.zero | b.kept & a.zero,
    )


_OPERATIONS = {"&": _and, "|": _or, "^": _xor}


def _mark_of(value: Any) -> str | None:
    """ "meta" or "ct" if this is the packet's mark or the connection's."""
    match value:
        case {"meta": {"key": "mark"}}:
            return "meta"
        case {"ct": {"key": "mark"}}:
            return "ct"
    return None


def _mentions(value: Any, key: str) -> bool:
    return _mark_of(value) == key or any(_mentions(one, key) for one in _children(value))


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def extension_use(name: str, info: bytes, ours: Values = frozenset()) -> tuple[Use, str] | None:
    """What an iptables extension, of which nft shows the name alone, does with marks, and in words; None if nothing.

    The data are the structures of linux/netfilter/xt_*.h, two or three words at their beginning.
    """
    if len(info) < (12 if name == "CONNMARK" else 8):
        return None
    one, two = struct.unpack_from("=II", info)
    match name:
        case "mark" if (one, two) in ours:
            return None
        case "MARK" | "mark":  # value, mask
            return Use(_masked(one, two), name == "MARK" and two == ALL), f"{name} {one:#x}/{two:#x}"
        case "TPROXY":  # mask, value
            return Use(_masked(two, one), one == ALL), f"{name} mark {two:#x}/{one:#x}"
        case "CONNMARK":  # value, mask of the connection's mark, mask of the packet's
            three = struct.unpack_from("=I", info, 8)[0]
            bits = _masked(one, two) if two != ALL or one else 0
            return Use(bits | (three if three != ALL else 0)), f"{name} {one:#x} ctmask {two:#x} nfmask {three:#x}"
    return None


def _masked(value: int, mask: int) -> int:
    return value if mask == ALL else mask | value
