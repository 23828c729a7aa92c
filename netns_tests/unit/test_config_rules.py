"""[[policy.rule]]: its keys, and how a problem in one is told. How rules of several files merge: test_config_files.py."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from ipaddress import ip_network
from typing import Any

import pytest

from tproxyd.config import Endpoint, PolicyRule, PortRange, config_from_mapping
from tproxyd.errors import ConfigError


def problems_in(text: str) -> list[str]:
    """The problems of a configuration, without its name; each held to the contract's shape."""
    with pytest.raises(ConfigError) as caught:
        config_from_mapping(tomllib.loads(text))
    for problem in caught.value.problems:
        assert problem.isprintable()
        assert "; " in problem, "no way out"
        assert problem.startswith("config: ")
    return [problem.removeprefix("config: ") for problem in caught.value.problems]


def table(rows: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """Rows of (name, ...) as arguments of parametrize; the name becomes the id."""
    return {"argvalues": [row[1:] for row in rows], "ids": [row[0] for row in rows]}


def rule_of(text: str) -> PolicyRule:
    (rule,) = config_from_mapping(tomllib.loads(f'[[policy.rule]]\nname = "x"\naction = "refuse"\n{text}')).policy.rule
    return rule


def test_what_a_rule_says_and_what_it_leaves_out() -> None:
    text = """
    [[policy.rule]]
    name = "no-metadata"
    sources = ["192.0.2.0/24", "2001:db8::/32"]
    destinations = ["169.254.169.254/32"]
    ports = ["80", "8000-8999", 9]
    protocols = ["tcp"]
    action = "refuse"
    [[policy.rule]]
    name = "the rest, ünd möre"
    action = { forward = "[2001:db8:0::1]:80" }
    """
    full, bare = config_from_mapping(tomllib.loads(text)).policy.rule
    assert full == PolicyRule(
        name="no-metadata",
        sources=(ip_network("192.0.2.0/24"), ip_network("2001:db8::/32")),
        destinations=(ip_network("169.254.169.254"),),
        ports=(PortRange(80, 80), PortRange(8000, 8999), PortRange(9, 9)),
        action="refuse",
    )
    assert bare == PolicyRule(name="the rest, ünd möre", action=Endpoint("2001:db8::1", 80))
    assert (bare.sources, bare.destinations, bare.ports, bare.protocols) == ((), (), (PortRange(1, 65535),), ("tcp",))
    assert str(bare.action) == "[2001:db8::1]:80"


GOOD = [
    ("every source", "sources = []", "sources", ()),
    ("every destination", "destinations = []", "destinations", ()),
    ("every port", 'ports = "all"', "ports", (PortRange(1, 65535),)),
]


@pytest.mark.parametrize(("text", "key", "expected"), **table(GOOD))
def test_good_value(text: str, key: str, expected: object) -> None:
    assert getattr(rule_of(text), key) == expected


@pytest.mark.parametrize("name", ["a", "x" * 64, "no metadata (of AWS): 1/2", "日本"])
def test_good_name(name: str) -> None:
    (rule,) = config_from_mapping({"policy": {"rule": [{"name": name, "action": "forward"}]}}).policy.rule
    assert rule.name == name


@pytest.mark.parametrize("target", ["127.0.0.1:80", "169.254.169.254:80", "[::1]:65535"])
def test_a_special_address_may_be_forwarded_to(target: str) -> None:
    (rule,) = config_from_mapping({"policy": {"rule": [{"name": "x", "action": {"forward": target}}]}}).policy.rule
    assert str(rule.action) == target


BAD = [
    ("source", 'sources = ["::/0", "x"]', 'sources[1]` (rule "x") = "x" is no network; write an address with its'),
    ("source with host bits", 'sources = ["192.0.2.1/24"]', 'bits set behind its prefix; write "192.0.2.0/24"'),
    ("source twice", 'sources = ["::1", "::1"]', 'sources[1]` (rule "x") = "::1" stands in the list twice; remove one'),
    (
        "mapped",
        'destinations = ["::ffff:192.0.2.1"]',
        "mapped into IPv6, which no packet bears; write the IPv4 network",
    ),
    ("local", 'destinations = ["local"]', 'destinations[0]` (rule "x") = "local" is no network;'),
    (
        "a network alone",
        'destinations = "::/0"',
        'destinations` (rule "x") = "::/0" is a string; write an array of net',
    ),
    ("port 0", "ports = [80, 0]", 'ports[1]` (rule "x") = 0 is out of range; ports are 1 to 65535'),
    ("overlapping ports", 'ports = ["1-9", 5]', 'ports[1]` (rule "x") = 5 overlaps "1-9" in the same list; merge the'),
    ("no port", "ports = []", 'ports` (rule "x") = [] is empty; name ports, or leave the key out for every port'),
    (
        "protocol",
        'protocols = ["udp"]',
        'protocols[0]` (rule "x") = "udp" is not in this version of tproxyd; use "tcp"',
    ),
    ("no protocol", "protocols = []", 'protocols` (rule "x") = [] is empty; write ["tcp"]'),
    *(
        (key, f"{key} = []", f'{key}` (rule "x") is not in this version of tproxyd; remove it')
        for key in ("interfaces", "workloads", "sni", "alpn", "http_host")
    ),
    (
        "unknown",
        "source = []",
        'source` (rule "x") is not a key of the configuration; did you mean `policy.rule[0].sources`?',
    ),
    ("near", "dst_ports = []", "did you mean `policy.rule[0].ports`?"),
    ("far off", "xyzzy = 1", 'xyzzy` (rule "x") is not a key of the configuration; remove it'),
    ("control characters", '"\\u001b" = 1', 'rule[0].\\x1b` (rule "x") is not a key of the configuration;'),
]


@pytest.mark.parametrize(("text", "expected"), **table(BAD))
def test_malformed_value(text: str, expected: str) -> None:
    (problem,) = problems_in(f'[[policy.rule]]\nname = "x"\naction = "refuse"\n{text}')
    assert problem.startswith("`policy.rule[0].")
    assert expected in problem


BAD_ACTIONS = [
    (
        "a word",
        '"drop"',
        '` (rule "x") = "drop" is no action; write "forward", "refuse" or { forward = "192.0.2.1:80" }',
    ),
    ("a number", "1", '` (rule "x") = 1 is an integer; write "forward", "refuse" or {'),
    ("a list", '["forward"]', "is an array; write"),
    ("no key", "{}", '` (rule "x") = a table has no key; write "forward"'),
    (
        "misspelt",
        '{ froward = "::1:80" }',
        '= a table has the unknown key "froward"; write { forward = "192.0.2.1:80" }',
    ),
    ("one key more", '{ forward = "192.0.2.1:80", log = true }', 'has the unknown key "log"; write {'),
    ("no port", '{ forward = "192.0.2.1" }', '.forward` (rule "x") = "192.0.2.1" is no address and port; write an'),
    ("port 0", '{ forward = "192.0.2.1:0" }', '.forward` (rule "x") = "192.0.2.1:0" has a port out of range;'),
    (
        "no brackets",
        '{ forward = "2001:db8::1:80" }',
        "is an IPv6 address, or one whose port cannot be told from it; write",
    ),
    ("a name", '{ forward = "example.org:80" }', "has no address before its port (names are not looked up); write"),
    (
        "a number in it",
        "{ forward = 80 }",
        '.forward` (rule "x") = 80 is an integer; write an address and a port, such',
    ),
    ("empty", '{ forward = "" }', '.forward` (rule "x") = "" is no address and port;'),
    ("a file", '{ forward = "unix:/run/app" }', "is no address and port;"),
    ("scope", '{ forward = "[fe80::1%eth0]:80" }', "has a scope, which cannot be given here;"),
    ("link-local", '{ forward = "[fe80::1]:80" }', "is link-local, which says nothing without an interface;"),
    ("mapped", '{ forward = "[::ffff:192.0.2.1]:80" }', 'is IPv4 mapped into IPv6; write "192.0.2.1:80"'),
    ("nobody", '{ forward = "0.0.0.0:80" }', 'is nobody\'s address; if this host is meant, write "127.0.0.1:80"'),
    ("nobody's IPv6", '{ forward = "[::]:80" }', 'is nobody\'s address; if this host is meant, write "[::1]:80"'),
    ("multicast", '{ forward = "[ff02::1]:80" }', "has an address to which no TCP connection can be made; write one"),
    ("broadcast", '{ forward = "255.255.255.255:80" }', "has an address to which no TCP connection can be made;"),
]


@pytest.mark.parametrize(("value", "expected"), **table(BAD_ACTIONS))
def test_malformed_action(value: str, expected: str) -> None:
    (problem,) = problems_in(f'[[policy.rule]]\nname = "x"\naction = {value}')
    assert problem.startswith("`policy.rule[0].action")
    assert expected in problem


BAD_NAMES = [
    ("empty", '""', '= "" is no name of a rule: those have 1 to 64 printable characters, none of them a quote; write'),
    ("long", f'"{"x" * 65}"', "is no name of a rule:"),
    ("quote", "'a\"b'", 'a\\"b" is no name of a rule:'),
    ("apostrophe", '"it\'s"', "is no name of a rule:"),
    ("backtick", '"`"', "is no name of a rule:"),
    ("newline", '"a\\nb"', "is no name of a rule:"),
    ("escape", '"\\u001b[2J"', "is no name of a rule:"),
    ("right-to-left", '"\\u202e"', "is no name of a rule:"),
    ("a number", "7", '= 7 is an integer; write a name, such as "no-metadata", in quotes'),
]


@pytest.mark.parametrize(("value", "expected"), **table(BAD_NAMES))
def test_malformed_name(value: str, expected: str) -> None:
    (problem,) = problems_in(f'[[policy.rule]]\nname = {value}\naction = "refuse"')
    assert problem.startswith("`policy.rule[0].name` = ")
    assert expected in problem


SHAPES = [
    (
        "one table",
        '[policy.rule]\nname = "x"',
        ["`policy.rule` = a table is a table; write [[policy.rule]], in double"],
    ),
    ("no table", "policy.rule = [1]", ["`policy.rule[0]` = 1 is an integer; write [[policy.rule]] and its keys below"]),
    (
        "nothing in it",
        "[[policy.rule]]",
        ["`policy.rule[0]` has no `name` and `action`; write `name` and `action` into"],
    ),
    ("no action", 'policy.rule = [{ name = "x" }]', ['`policy.rule[0]` (rule "x") has no `action`; write']),
    ("no name", 'policy.rule = [{ action = "refuse" }]', ["`policy.rule[0]` has no `name`; write"]),
    (
        "too many",
        f"policy.rule = [{'1, ' * 10_001}]",
        ["`policy.rule` has 10001 tables, 10000 at most; put what has the same action into lists of one"],
    ),
    (
        "equal names",
        'policy.rule = [{ name = "x", action = "refuse" }, { name = "y", action = "drop" }, { name = "x", ports = [0] }]',
        [
            '`policy.rule[1].action` (rule "y") = "drop"',
            '`policy.rule[2].ports[0]` (rule "x") = 0',
            '`policy.rule[2]` (rule "x") has no `action`;',
            '`policy.rule[2].name` = "x" is the name of `policy.rule[0]`, too; give each its own',
        ],
    ),
    (
        "everything in one rule",
        'policy.rule = [{ name = "\'", sources = ["x", "y"], actoin = 1, action = { forward = "y" } }]',
        ["`policy.rule[0].name`", "rule[0].sources[0]`", "rule[0].sources[1]`", ".actoin`", ".action.forward`"],
    ),
    (
        "beside another table",
        'policy.rule = [{ name = "x", action = "?" }]\nlisten.port = 0\npolicy.default = 1',
        ["`policy.rule[0].action`", "`policy.default`", "`listen.port`"],
    ),
]


@pytest.mark.parametrize(("text", "expected"), **table(SHAPES))
def test_every_problem_of_the_rules_is_told(text: str, expected: list[str]) -> None:
    problems = problems_in(text)
    assert [part for part in expected if not any(part in problem for problem in problems)] == []
    assert len(problems) == len(expected)


def test_a_key_in_front_of_its_table_is_told_where_it_belongs() -> None:
    (problem,) = problems_in('[[rule]]\nname = "x"')
    assert problem == "`rule` is not a key of the configuration; did you mean `policy.rule`?"
