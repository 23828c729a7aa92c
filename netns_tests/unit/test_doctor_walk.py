"""What a captured packet meets in other programs' rules, in the words of nft's JSON. Real rulesets: netns_tests/test_doctor.py."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tproxyd.daemon.doctor.walk import Packet, marks_of, walk_hook
from tproxyd.kernel import ChainRule, ForeignChain

REDIRECTED = Packet(
    family=4, interface="eth0", port=15006, mark=0, states=frozenset({"new"}), status=frozenset({"dnat"})
)
"""At the input hook in redirect mode."""
PACKET = Packet(family=4, interface="eth0", port=8080, mark=0x1000000)
"""In tproxy mode."""
MARK = {"meta": {"key": "mark"}}
DPORT = {"payload": {"protocol": "tcp", "field": "dport"}}


def match(left: Any, right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


def meta(key: str, right: Any, op: str = "==") -> dict[str, Any]:
    return match({"meta": {"key": key}}, right, op)


def state(*words: str) -> dict[str, Any]:
    return match({"ct": {"key": "state"}}, list(words), "in")


def chain(
    *rules: list[dict[str, Any]], policy: str = "drop", name: str = "c", hook: str | None = "input"
) -> ForeignChain:
    return ForeignChain(
        family="inet",
        table="t",
        name=name,
        hook=hook,
        kind="filter" if hook else None,
        priority=0,
        policy=policy,
        rules=[ChainRule(rule, "", number) for number, rule in enumerate(rules)],
    )


ACCEPT, DROP = {"accept": None}, {"drop": None}

# Matches of one rule that accepts, in a chain that drops: whether the packet gets through; None: perhaps.
ADMITTED = [
    ("everything", [], True),
    ("the port", [match(DPORT, 8080)], True),
    ("another port", [match(DPORT, 80)], False),
    ("ports", [match(DPORT, {"set": [22, {"range": [8000, 8999]}]})], True),
    ("all ports but", [match(DPORT, 8080, "!=")], False),
    ("high ports", [match(DPORT, 1024, ">=")], True),
    ("low ports", [match(DPORT, 1024, "<")], False),
    ("a named set", [match(DPORT, "@ports")], None),
    ("TCP", [meta("l4proto", {"set": ["tcp", "udp"]})], True),
    ("TCP by number", [meta("l4proto", 6)], True),
    ("UDP", [match({"payload": {"protocol": "udp", "field": "dport"}}, 8080)], False),
    ("IPv6", [meta("nfproto", "ipv6")], False),
    ("an IPv6 address", [match({"payload": {"protocol": "ip6", "field": "saddr"}}, "2001:db8::1", "!=")], False),
    ("a client", [match({"payload": {"protocol": "ip", "field": "saddr"}}, "192.0.2.1")], None),
    ("the interface", [meta("iifname", "eth0")], True),
    ("interfaces by a wildcard", [meta("iifname", {"set": ["lo", "eth*"]})], True),
    ("lo", [meta("iifname", "lo")], False),
    ("our mark", [match({"&": [MARK, 0x3000000]}, 0x1000000)], True),
    ("no mark", [match(MARK, 0)], False),
    ("new", [state("new")], False),
    ("established", [state("established", "related")], False),
    ("untracked", [state("established", "untracked")], True),
    ("not invalid", [match({"ct": {"key": "state"}}, "invalid", "!=")], True),
    ("a ct mark, which it has not", [match({"ct": {"key": "mark"}}, 5, "!=")], False),
    ("SYN", [match({"payload": {"protocol": "tcp", "field": "flags"}}, "syn", "in")], True),
    (
        "flags spelled otherwise",
        [match({"payload": {"protocol": "tcp", "field": "flags"}}, {"|": ["syn"]}, "in")],
        None,
    ),
    ("our listener", [match({"socket": {"key": "transparent"}}, 1)], True),
    ("something of iptables", [{"xt": {"type": "match", "name": "recent"}}], None),
    ("a rate", [{"limit": {"rate": 1, "per": "second"}}], None),
]


@pytest.mark.parametrize(("name", "matches", "admitted"), ADMITTED, ids=[name for name, _, _ in ADMITTED])
def test_a_rule_that_accepts(name: str, matches: list[dict[str, Any]], admitted: bool | None) -> None:
    walk = walk_hook([chain([*matches, ACCEPT])], "input", PACKET)
    assert (walk.verdict == "accept", walk.perhaps) == (admitted is True, admitted is None)


ANSWER = Packet(
    family=4, interface="", leaves_by="eth0", port=50505, source_port=8080, mark=0, flags=frozenset({"syn", "ack"})
)
SPORT = {"payload": {"protocol": "tcp", "field": "sport"}}
ADMITTED_ANSWERS = [
    ("the port that it comes from", [match(SPORT, {"set": [22, 8080]})], True),
    ("another one", [match(SPORT, 443)], False),
    ("high ones", [match(SPORT, 1024, ">=")], True),
    ("the port as a destination", [match(DPORT, 8080)], False),
    ("where it leaves", [meta("oifname", "eth*")], True),
    ("lo", [meta("oifname", "lo")], False),
    ("what arrives anywhere", [meta("iifname", "eth0")], False),
    ("established", [state("established", "related")], False),
    ("untracked", [state("untracked")], True),
]


@pytest.mark.parametrize(
    ("name", "matches", "admitted"), ADMITTED_ANSWERS, ids=[name for name, _, _ in ADMITTED_ANSWERS]
)
def test_a_rule_that_accepts_answers(name: str, matches: list[dict[str, Any]], admitted: bool) -> None:
    walk = walk_hook([chain([*matches, ACCEPT], hook="output")], "output", ANSWER)
    assert (walk.verdict == "accept", walk.perhaps) == (admitted, False)


CT_MARK = {"ct": {"key": "mark"}}
ADMITTED_REDIRECTED = [
    ("what NAT has changed", [match({"ct": {"key": "status"}}, "dnat", "in")], True),
    ("what has been changed either way", [match({"ct": {"key": "status"}}, ["snat", "dnat"], "in")], True),
    ("what NAT has changed at its other end", [match({"ct": {"key": "status"}}, "snat", "in")], False),
    ("the status as a whole", [match({"ct": {"key": "status"}}, "dnat", "==")], None),
    ("not that status as a whole", [match({"ct": {"key": "status"}}, "dnat", "!=")], None),
    ("DNAT of iptables", [state("dnat")], True),
    ("DNAT of iptables, turned round", [match({"ct": {"key": "state"}}, ["dnat"], "!=")], False),
    ("new", [state("new")], True),
    ("established", [state("established", "related")], False),
    ("untracked", [state("untracked")], False),
    ("the listener's port", [match(DPORT, 15006)], True),
    ("the original port", [match(DPORT, 8080)], False),
    ("our mark", [match({"&": [MARK, 0x3000000]}, 0x1000000)], False),
    ("a connection's mark", [match(CT_MARK, 5)], False),
    ("none of its bits", [match({"&": [CT_MARK, 0xFF]}, 0)], True),
    ("a direction", [match({"ct": {"key": "direction"}}, "original")], None),
]


@pytest.mark.parametrize(
    ("name", "matches", "admitted"), ADMITTED_REDIRECTED, ids=[name for name, _, _ in ADMITTED_REDIRECTED]
)
def test_a_rule_that_accepts_in_redirect_mode(name: str, matches: list[dict[str, Any]], admitted: bool | None) -> None:
    walk = walk_hook([chain([*matches, ACCEPT])], "input", REDIRECTED)
    assert (walk.verdict == "accept", walk.perhaps) == (admitted is True, admitted is None)


@pytest.mark.parametrize(
    ("matches", "admitted"),
    [([match({"ct": {"key": "status"}}, "dnat", "in")], False), ([match({"&": [CT_MARK, 0xFF]}, 0)], False)],
)
def test_an_untracked_packet_has_no_status_and_no_mark_of_conntrack(
    matches: list[dict[str, Any]], admitted: bool
) -> None:
    walk = walk_hook([chain([*matches, ACCEPT])], "input", PACKET)
    assert (walk.verdict == "accept", walk.perhaps) == (admitted, False)


def test_jumps_returns_and_maps() -> None:
    inner = chain([match(DPORT, 80), ACCEPT], [match(DPORT, 8080), {"return": None}], [ACCEPT], name="inner", hook=None)
    jump = {"jump": {"target": "inner"}}
    vmap = {"vmap": {"key": DPORT, "data": {"set": [[80, DROP], [8080, {"goto": {"target": "inner"}}]]}}}
    assert walk_hook([inner, chain([jump])], "input", PACKET).verdict == "drop"
    assert walk_hook([inner, chain([jump], [ACCEPT])], "input", PACKET).verdict == "accept"
    assert walk_hook([inner, chain([vmap], [ACCEPT])], "input", PACKET).verdict == "drop"  # goto does not come back
    loop = chain([{"jump": {"target": "loop"}}], name="loop", hook=None)
    assert walk_hook([loop, chain([{"jump": {"target": "loop"}}])], "input", PACKET).verdict == "drop"


def test_marks() -> None:
    def set_mark(value: Any) -> dict[str, Any]:
        return {"mangle": {"key": MARK, "value": value}}

    walk = walk_hook([chain([set_mark({"|": [{"&": [MARK, 0xFF00FFFF]}, 0x40000]})], policy="accept")], "input", PACKET)
    assert walk.mark == 0x1040000
    walk = walk_hook([chain([set_mark({"ct": {"key": "mark"}})], policy="accept")], "input", PACKET)
    assert walk.mark == PACKET.mark  # an untracked packet has none: the rule breaks off
    marked = msgspec.structs.replace(REDIRECTED, mark=0x1000000)
    assert walk_hook([chain([set_mark(CT_MARK)], policy="accept")], "input", marked).mark == 0  # a new one has none yet
    assert list(marks_of(ChainRule([set_mark(7)], "", 1))) == [7]


JSON = st.recursive(
    st.none() | st.integers() | st.sampled_from(["tcp", "@s", "eth*", "accept", "mark", "state", "dport"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["meta", "ct", "payload", "&", "|", "set", "range", "key", "field", "protocol", "socket"]),
            inner,
            max_size=2,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=600, deadline=None)
@example(left={"meta": {"key": []}}, right=0, op="==")
@given(left=JSON, right=JSON, op=st.sampled_from(["==", "!=", "in", "<", "??"]))
def test_what_another_nft_may_print_breaks_nothing(left: Any, right: Any, op: str) -> None:
    walk_hook([chain([match(left, right, op), ACCEPT], [{"mangle": {"key": left, "value": right}}])], "input", PACKET)
