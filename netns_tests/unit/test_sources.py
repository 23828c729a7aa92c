"""As whom a connection is made: every case of policy.sources, against a table that is written by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tproxyd.config import config_from_mapping
from tproxyd.plan import make_plan
from tproxyd.policy import compile_source

CLIENT, CLIENT6 = "192.0.2.2", "2001:db8:1::2"
DIALLED, DIALLED6 = ("203.0.113.9", 8080), ("2001:db8:f::9", 8080)
LOOPBACK, OTHER = ("127.0.0.1", 8080), ("198.51.100.7", 9090)

# source, target, client, dialled, target of the connection (None: what was dialled), is that here?, was the dialled one?, the ways
CASES: list[tuple[str, str, str, tuple[str, int], tuple[str, int] | None, bool, bool, tuple[str, ...]]] = [
    ("auto", "original", CLIENT, DIALLED, None, False, False, ("client", "client_ip", "proxy")),
    ("client", "original", CLIENT, DIALLED, None, False, False, ("client", "client_ip")),
    ("proxy", "original", CLIENT, DIALLED, None, False, False, ("proxy",)),
    ("auto", "original", CLIENT, DIALLED, None, True, True, ("chosen_port", "proxy")),
    ("client", "original", CLIENT6, DIALLED6, None, True, True, ("chosen_port",)),
    ("auto", "loopback", CLIENT, DIALLED, LOOPBACK, True, True, ("client", "chosen_port", "proxy")),
    ("client", "loopback", CLIENT6, DIALLED6, ("::1", 8080), True, False, ("client", "chosen_port")),
    # No key names a loopback address, so there is no rule for its answers (an embedding program's policy has named this one).
    ("auto", "original", CLIENT, DIALLED, LOOPBACK, True, True, ("proxy",)),
    ("client", "original", CLIENT, DIALLED, LOOPBACK, True, True, ()),
    ("auto", "198.51.100.7:9090", CLIENT, DIALLED, OTHER, True, True, ("client", "chosen_port", "proxy")),
    ("auto", "198.51.100.7:9090", CLIENT, DIALLED, OTHER, False, False, ("client", "client_ip", "proxy")),
    # The client has dialled this host; the other one's answers to it would not come by here.
    ("auto", "198.51.100.7:9090", CLIENT, DIALLED, OTHER, False, True, ("proxy",)),
    ("client", "198.51.100.7:9090", CLIENT, DIALLED, OTHER, False, True, ("client", "client_ip")),
    # The port is one that the ruleset does not know.
    ("auto", "original", CLIENT, DIALLED, OTHER, True, True, ("proxy",)),
    ("client", "original", CLIENT, DIALLED, OTHER, False, False, ()),
    # What was dialled, in other words.
    ("auto", "original", CLIENT, DIALLED, ("203.0.113.9", 8080), True, True, ("chosen_port", "proxy")),
    # Families, and addresses of one link.
    ("auto", "198.51.100.7:9090", CLIENT6, DIALLED6, OTHER, False, False, ("proxy",)),
    ("client", "198.51.100.7:9090", CLIENT6, DIALLED6, OTHER, False, False, ()),
    ("auto", "original", "fe80::2", DIALLED6, None, False, False, ("proxy",)),
    ("client", "original", "feb0::2", DIALLED6, None, False, False, ()),
    ("auto", "original", "fec0::2", DIALLED6, None, False, False, ("client", "client_ip", "proxy")),
]


def config(source: Any, target: str = "original", **capture: Any) -> Any:
    return config_from_mapping(
        {"capture": {"ports": ["8080"], **capture}, "upstream": {"source": source, "target": target}}
    )


@pytest.mark.parametrize(("source", "target", "client", "dialled", "to", "here", "dialled_here", "ways"), CASES)
def test_as_whom(
    source: str,
    target: str,
    client: str,
    dialled: tuple[str, int],
    to: tuple[str, int] | None,
    here: bool,
    dialled_here: bool,
    ways: tuple[str, ...],
) -> None:
    choice = compile_source(config(source, target))(client, dialled, to or dialled, here, dialled_here)
    assert choice.ways == ways
    assert ("client's own" in choice.why) == any(way in ways for way in ("client", "client_ip", "chosen_port"))


def test_redirect_mode_has_no_way_back_to_a_clients_address() -> None:
    choose = compile_source(config("auto", mode="redirect"))
    assert choose(CLIENT, DIALLED, DIALLED, False, False).ways == ("proxy",)


def test_of_a_list_those_count_that_fit() -> None:
    choose = compile_source(config(["127.0.0.6", "198.51.100.5", "::1"]))
    assert choose(CLIENT, DIALLED, DIALLED, True, True)[::2] == (("pool",), ("127.0.0.6", "198.51.100.5"))
    # A loopback address leads to no other host.
    assert choose(CLIENT, DIALLED, DIALLED, False, False)[::2] == (("pool",), ("198.51.100.5",))
    assert choose(CLIENT6, DIALLED6, DIALLED6, True, True)[::2] == (("pool",), ("::1",))
    assert choose(CLIENT6, DIALLED6, DIALLED6, False, False).ways == ("proxy",)


LOOPBACK_RULES = [
    "priority 5233 from 127.0.0.0/8 iif lo lookup 133",
    "priority 5233 from ::1/128 iif lo ipproto tcp lookup 133",
]


@pytest.mark.parametrize(
    ("text", "there"),
    [
        ({"upstream": {"target": "loopback"}}, True),
        ({"upstream": {"target": "127.0.0.1:80"}}, True),
        ({"policy": {"rule": [{"name": "x", "action": {"forward": "[::1]:80"}}]}}, True),
        ({"upstream": {"target": "loopback", "source": "proxy"}}, False),
        ({"upstream": {"target": "loopback"}, "capture": {"ports": ["8080"], "mode": "redirect"}}, False),
        ({"upstream": {"target": "192.0.2.1:80"}}, False),
    ],
)
def test_answers_from_loopback_need_a_rule_where_clients_addresses_are_there(text: dict[str, Any], there: bool) -> None:
    plan = make_plan(config_from_mapping({"capture": {"ports": ["8080"]}} | text))
    assert [rule.selector() for rule in plan.rules if rule.source] == (LOOPBACK_RULES if there else [])


@pytest.mark.parametrize("source", ["proxy", "auto"])
def test_only_who_bears_clients_addresses_has_packets_routed_again(source: str) -> None:
    table = make_plan(config(source)).tables["tproxyd"]
    assert (
        ("type route hook output" in table)
        == ("meta mark set meta mark & 0xfeffffff | 0x02000000" in table)
        == (source == "auto")
    )


@pytest.mark.parametrize(
    ("upstream", "words"),
    [
        ({}, ["an app of this host", "another host"]),
        ({"target": "loopback"}, ["127.0.0.1 or ::1"]),
        ({"target": "[::1]:80"}, ["[::1]:80"]),
        (
            {"target": "198.51.100.7:80"},
            ["198.51.100.7:80, if", "that is another host", "the client has dialled this one"],
        ),
        ({"target": "unix:/run/x", "source": "proxy"}, ["unix:/run/x", 'proxy_protocol = "v2"']),
        ({"target": "unix:/run/x", "source": "proxy", "proxy_protocol": "v1"}, ["unix:/run/x", "its first bytes say"]),
    ],
)
def test_the_plan_says_what_is_seen_as_the_client(upstream: dict[str, Any], words: list[str]) -> None:
    plan = make_plan(config_from_mapping({"capture": {"ports": ["8080"]}, "upstream": upstream}))
    told = json.dumps(plan.sources, ensure_ascii=False)
    for word in words:
        assert word in told.replace('\\"', '"')
