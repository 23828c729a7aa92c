"""Which bits of packet marks other programs' rules use, from what nft and the kernel tell of them."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from tproxyd.kernel.marks import Use, expression_use, extension_use

META, CT = {"meta": {"key": "mark"}}, {"ct": {"key": "mark"}}


def setting(value: Any, key: Any = META) -> dict[str, Any]:
    return {"mangle": {"key": key, "value": value}}


def comparing(left: Any, right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


@pytest.mark.parametrize(
    ("expression", "use"),
    [
        (setting(0x539), Use(0x539, overwrites=True)),
        (setting({"|": [META, 0x4000]}), Use(0x4000)),
        (setting({"|": [{"&": [META, 0xFF00FFFF]}, 0x10000]}), Use(0xFF0000)),
        (setting({"^": [META, 0x30]}), Use(0x30)),
        (setting({"^": [{"&": [META, 0xFFFFFF00]}, 0x12]}), Use(0xFF)),
        (setting(CT), Use()),
        (setting({"&": [CT, 0xFF00]}), Use(0xFF00)),
        (setting({"|": [{"&": [META, 0xFFFF00FF]}, {"&": [CT, 0xFF00]}]}), Use(0xFF00)),
        (setting({"<<": [{"&": [CT, 0xFF]}, 8]}), Use(0xFF00)),
        (setting({">>": [0xFF00, 8]}), Use(0xFF, overwrites=True)),
        (setting({"map": {"key": META, "data": {"set": [[1, 0x10], [2, 0x20]]}}}), Use(0x30, overwrites=True)),
        (setting({"map": {"key": META, "data": "@named"}}), Use(0, overwrites=True)),
        (setting({"jhash": {"mod": 4, "expr": META}}), Use(3, overwrites=True)),
        (setting({"numgen": {"mode": "inc", "mod": 2, "offset": 0x100}}), Use(0x101, overwrites=True)),
        (setting(0x1000000, CT), Use(0x1000000)),
        (setting(META, CT), Use()),
        (setting({"&": [META, 0xFF]}, CT), Use(0xFF)),
        (setting({"|": [CT, 0x10]}, CT), Use(0x10)),
        (setting(1, {"meta": {"key": "priority"}}), Use()),
        (comparing(META, 0x1), Use(1)),
        (comparing(META, 0x1, "!="), Use(1)),
        (comparing({"&": [META, 0xF00]}, 0x100), Use(0xF00)),
        (comparing({"&": [META, 0xF00]}, {"set": [0x100, 0x200]}), Use(0xF00)),
        (comparing(META, {"set": [1, {"range": [0x100, 0x1FF]}]}), Use(0x1FF)),
        (comparing(META, {"prefix": {"addr": 0x10000, "len": 16}}), Use(0xFFFF0000)),
        (comparing(META, {"set": [{"elem": {"val": 4, "comment": "x"}}]}), Use(4)),
        (comparing(META, "@named"), Use()),
        (comparing(CT, 1), Use()),
        (comparing({"payload": {"protocol": "tcp", "field": "dport"}}, 80), Use()),
        ({"vmap": {"key": META, "data": {"set": [[1, {"accept": None}], [8, {"drop": None}]]}}}, Use(9)),
        ({"vmap": {"key": {"&": [META, 0xF00]}, "data": {"set": [[256, {"accept": None}]]}}}, Use(0xF00)),
        ({"vmap": {"key": META, "data": "@named"}}, Use()),
        ({"counter": None}, Use()),
        ({"accept": None}, Use()),
    ],
)
def test_what_a_statement_of_nft_uses(expression: dict[str, Any], use: Use) -> None:
    assert expression_use(expression) == use


@pytest.mark.parametrize(
    ("expression", "use"),
    [
        (comparing({"&": [META, 0x3]}, 0x1), Use()),
        (comparing({"&": [META, 0x3]}, 0x1, "!="), Use()),
        (comparing({"&": [META, 0x3]}, 0x2), Use(0x3)),
        (comparing({"&": [META, 0x7]}, 0x1), Use(0x7)),
        (comparing({"&": [META, 0x3]}, {"set": [0x1, 0x2]}), Use(0x3)),
        (setting({"|": [META, 0x1]}), Use(0x1)),
    ],
)
def test_who_compares_with_our_very_mark_means_us(expression: dict[str, Any], use: Use) -> None:
    assert expression_use(expression, {(0x1, 0x3)}) == use


@pytest.mark.parametrize(
    ("name", "words", "use"),
    [
        ("MARK", (0x1, 0xFFFFFFFF), Use(1, overwrites=True)),
        ("MARK", (0x40000, 0xFF0000), Use(0xFF0000)),
        ("MARK", (0, 0xFF), Use(0xFF)),  # --and-mark
        ("MARK", (0x10, 0), Use(0x10)),  # --xor-mark
        ("mark", (0x1, 0xFFFFFFFF), Use(1)),
        ("mark", (0x1, 0xF), Use(0xF)),
        ("TPROXY", (0xFFFFFFFF, 1, 0), Use(1, overwrites=True)),
        ("TPROXY", (0x1, 0x1, 0), Use(1)),
        ("TPROXY", (0, 0, 0), Use()),
        ("CONNMARK", (0, 0xFFFFFFFF, 0xFFFFFFFF), Use()),
        ("CONNMARK", (0x8, 0xFFFFFFFF, 0xFFFFFFFF), Use(8)),
        ("CONNMARK", (0, 0xFF00, 0xFF00), Use(0xFF00)),
    ],
)
def test_what_an_extension_of_iptables_uses(name: str, words: tuple[int, ...], use: Use) -> None:
    found = extension_use(name, struct.pack(f"={len(words)}I", *words))
    assert found is not None
    assert found[0] == use


@pytest.mark.parametrize(("name", "info"), [("MARK", b""), ("CONNMARK", bytes(8)), ("comment", bytes(64))])
def test_an_extension_that_does_nothing_with_marks_or_has_no_data(name: str, info: bytes) -> None:
    assert extension_use(name, info) is None
