"""The compiled policy: what a connection gets, by table; and against a reading of the rules one by one, by hypothesis."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tproxyd.config import Endpoint, Network, Policy, PolicyRule, PortRange, config_from_mapping
from tproxyd.policy import SPECIAL_NETWORKS, Verdict, compile_policy

CLIENT, CLIENT6 = "192.0.2.1", "2001:db8::1"
DEFAULT = Verdict("forward")
REFUSED = Verdict("refuse")


def policy_of(text: str) -> Policy:
    return config_from_mapping(tomllib.loads(text)).policy


def table(rows: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """Rows of (name, ...) as arguments of parametrize; the name becomes the id."""
    return {"argvalues": [row[1:] for row in rows], "ids": [row[0] for row in rows]}


# Special destinations, without rules

SPECIAL = [
    ("this network", "0.0.0.0"),
    ("loopback", "127.0.0.1"),
    ("end of loopback", "127.255.255.255"),
    ("metadata", "169.254.169.254"),
    ("metadata of Alibaba", "100.100.100.200"),
    ("multicast", "224.0.0.0"),
    ("broadcast", "255.255.255.255"),
    ("unspecified", "::"),
    ("loopback IPv6", "::1"),
    ("mapped", "::ffff:192.0.2.1"),
    ("mapped, in hexadecimal", "::ffff:c000:201"),
    ("link-local with its scope", "fe80::1%eth0"),
    ("link-local with a number", "febf::1%3"),
    ("IPv4-compatible", "::192.0.2.1"),
    ("loopback by NAT64", "64:ff9b::127.0.0.1"),
    ("metadata of Alibaba by NAT64", "64:ff9b::100.100.100.200"),
    ("metadata of Azure by NAT64", "64:ff9b::168.63.129.16"),
    ("metadata of Oracle by NAT64", "64:ff9b::192.0.0.192"),
    ("multicast by NAT64", "64:ff9b::224.0.0.1"),
    ("broadcast by NAT64", "64:ff9b::255.255.255.255"),
    ("by NAT64 of one's own network", "64:ff9b:1:a9fe:a9:fe00::"),
    ("metadata by 6to4", "2002:a9fe:a9fe::1"),
    ("metadata of Alibaba by 6to4", "2002:6464:64c8:1::1"),
    ("last of all", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
]
ORDINARY = [
    ("before loopback", "126.255.255.255"),
    ("after loopback", "128.0.0.0"),
    ("before Alibaba's", "100.100.100.199"),
    ("after Alibaba's", "100.100.100.201"),
    ("before multicast", "223.255.255.255"),
    ("private", "10.0.0.1"),
    ("after IPv4-compatible", "::1:0:0"),
    ("before mapped", "::fffe:ffff:ffff"),
    ("after mapped", "::1:0:0:0"),
    ("NAT64 of a public address", "64:ff9b::203.0.113.9"),
    ("NAT64 of a private address", "64:ff9b::10.0.0.1"),
    ("before NAT64 of Alibaba's", "64:ff9b::100.100.100.199"),
    ("after NAT64 of Alibaba's", "64:ff9b::100.100.100.201"),
    ("after NAT64 of one's own network", "64:ff9b:2::"),
    ("6to4 of a public address", "2002:cb00:7109::1"),
    ("after 6to4 of Alibaba's", "2002:6464:64c9::1"),
    ("before link-local", "fe7f:ffff::1"),
    ("unique local", "fd00::1"),
]


@pytest.mark.parametrize(("host",), **table(SPECIAL))
@pytest.mark.parametrize("default", ["forward", "refuse"])
def test_special_destinations_are_refused_before_any_rule(host: str, default: str) -> None:
    rule = 'rule = [{ name = "all", action = "forward" }, { name = "x", action = { forward = "192.0.2.1:80" } }]'
    for text in ("", rule):
        decide = compile_policy(policy_of(f'[policy]\ndefault = "{default}"\n{text}'))
        assert decide(CLIENT, host, 80) == REFUSED


@pytest.mark.parametrize(("host",), **table(ORDINARY))
def test_other_destinations_get_the_default(host: str) -> None:
    assert compile_policy(Policy())(CLIENT, host, 80) == DEFAULT
    assert compile_policy(Policy(default="refuse"))(CLIENT, host, 80) == REFUSED


ALLOWED = [
    ("one address", ["127.0.0.2"], {"127.0.0.1": False, "127.0.0.2": True, "127.0.0.3": False}),
    ("more than a special network", ["168.0.0.0/6"], {"169.254.169.254": True, "168.63.129.16": True, "127.0.0.1": False}),
    ("every one of IPv4", ["0.0.0.0/0"], {"0.0.0.0": True, "255.255.255.255": True, "::1": False, "::ffff:127.0.0.1": False}),
    ("two that overlap", ["127.0.0.0/9", "127.0.0.0/30"], {"127.127.0.1": True, "127.128.0.1": False}),
    ("link-local", ["fe80::/64"], {"fe80::1%eth0": True, "fe80:0:0:1::1%eth0": False}),
    ("the same by NAT64", ["127.0.0.1"], {"127.0.0.1": True, "64:ff9b::127.0.0.1": False}),
    ("NAT64 of one's own network", ["64:ff9b:1::/48"], {"64:ff9b:1::1": True, "64:ff9b::127.0.0.1": False}),
    ("a part of what is mapped", ["::ffff:192.0.2.0/120"], {"::ffff:192.0.2.1": True, "::ffff:192.0.3.1": False}),
]  # fmt: skip


@pytest.mark.parametrize(("allowed", "expected"), **table(ALLOWED))
def test_special_destinations_that_are_allowed(allowed: list[str], expected: dict[str, bool]) -> None:
    networks = tuple(ip_network(one) for one in allowed)
    decide = compile_policy(Policy(allow_special=networks))
    assert {host: decide(CLIENT, host, 80) == DEFAULT for host in expected} == expected


# Rules

RULES = """
[[policy.rule]]
name = "by source"
sources = ["192.0.2.0/24", "2001:db8::/64"]
destinations = ["198.51.100.0/24"]
action = "refuse"
[[policy.rule]]
name = "by port"
ports = ["25", "6000-6063"]
action = "refuse"
[[policy.rule]]
name = "an address within"
destinations = ["203.0.113.9", "2001:db8:1::9"]
action = { forward = "127.0.0.1:8080" }
[[policy.rule]]
name = "around it"
destinations = ["203.0.113.0/24", "203.0.0.0/16", "2001:db8:1::/48"]
action = "forward"
[[policy.rule]]
name = "hidden"
destinations = ["203.0.113.10"]
action = "refuse"
[[policy.rule]]
name = "IPv6 alone"
destinations = ["::/0"]
ports = [443]
action = { forward = "[2001:db8:2::2]:8443" }
[[policy.rule]]
name = "all three"
sources = ["10.0.0.0/8"]
destinations = ["10.0.0.0/8"]
ports = ["1-1023"]
action = "refuse"
"""
BY_SOURCE = Verdict("refuse", "by source")
BY_PORT = Verdict("refuse", "by port")
WITHIN = Verdict("forward", "an address within", ("127.0.0.1", 8080))
AROUND = Verdict("forward", "around it")
DECIDED = [
    ("first address of a source", ("192.0.2.0", "198.51.100.0", 80), BY_SOURCE),
    ("last address of a source", ("192.0.2.255", "198.51.100.255", 65535), BY_SOURCE),
    ("beside the source", ("192.0.3.0", "198.51.100.0", 80), DEFAULT),
    ("beside the destination", ("192.0.2.0", "198.51.101.0", 80), DEFAULT),
    ("source of the other family", ("2001:db8::1", "198.51.100.1", 80), BY_SOURCE),
    ("the first rule of two", ("192.0.2.1", "198.51.100.1", 25), BY_SOURCE),
    ("a port", ("192.0.2.1", "198.51.101.1", 25), BY_PORT),
    ("first of a range", ("192.0.2.1", "198.51.101.1", 6000), BY_PORT),
    ("last of a range", ("2001:db8::1", "2001:db8:1::9", 6063), BY_PORT),
    ("behind a range", ("192.0.2.1", "198.51.101.1", 6064), DEFAULT),
    ("before a port", ("192.0.2.1", "198.51.101.1", 24), DEFAULT),
    ("a narrow rule before a wide one", ("192.0.2.1", "203.0.113.9", 80), WITHIN),
    ("the wide one", ("192.0.2.1", "203.0.113.10", 80), AROUND),
    ("its other network", ("192.0.2.1", "203.0.0.0", 80), AROUND),
    ("behind its last network", ("192.0.2.1", "203.1.0.0", 80), DEFAULT),
    ("IPv6, narrow", ("2001:db8::1", "2001:db8:1::9", 443), WITHIN),
    ("IPv6, wide", ("2001:db8::1", "2001:db8:1::8", 443), AROUND),
    ("IPv6, every address", ("::9", "2001:db8:2::8", 443), Verdict("forward", "IPv6 alone", ("2001:db8:2::2", 8443))),
    ("not IPv4", ("192.0.2.1", "192.0.2.2", 443), DEFAULT),
    ("IPv6, other port", ("2001:db8::1", "2001:db8:2::8", 80), DEFAULT),
    ("scope of a source", ("fe80::1%eth0", "2001:db8:1::8", 80), AROUND),
    ("source, destination and port", ("10.1.1.1", "10.2.2.2", 1023), Verdict("refuse", "all three")),
    ("source and destination", ("10.1.1.1", "10.2.2.2", 1024), DEFAULT),
    ("special, whatever a rule says", ("192.0.2.1", "::ffff:203.0.113.9", 80), REFUSED),
    ("special, whatever the port", ("192.0.2.1", "127.0.0.1", 25), REFUSED),
]


@pytest.mark.parametrize(("connection", "expected"), **table(DECIDED))
def test_the_first_rule_that_matches_decides(connection: tuple[str, str, int], expected: Verdict) -> None:
    policy = policy_of(RULES)
    assert compile_policy(policy)(*connection) == expected == naive(policy, *connection)


def test_a_rule_without_lists_takes_everything_that_is_left() -> None:
    decide = compile_policy(policy_of(RULES + '[[policy.rule]]\nname = "rest"\naction = "refuse"\n'))
    assert decide(CLIENT, "192.0.2.2", 80) == decide(CLIENT6, "2001:db8::2", 1) == Verdict("refuse", "rest")
    assert decide(CLIENT, "203.0.113.9", 80) == WITHIN


def test_verdicts_are_made_before_the_first_call() -> None:
    decide = compile_policy(policy_of(RULES))
    assert decide(CLIENT, "203.0.113.9", 80) is decide(CLIENT6, "2001:db8:1::9", 8080)
    assert decide(CLIENT, "192.0.2.2", 80) is decide(CLIENT6, "2001:db8::2", 1)


def test_an_ipv4_rule_is_not_slipped_past_by_mapping() -> None:
    """Allowed, a mapped address reaches the very host that it maps."""
    text = '[policy]\nallow_special = ["::ffff:203.0.0.0/112"]\n' + RULES
    decide = compile_policy(policy_of(text))
    assert decide(CLIENT6, "::ffff:203.0.113.9", 80) == decide(CLIENT6, "::ffff:cb00:7109", 80) == WITHIN
    assert decide(CLIENT6, "::ffff:203.0.1.1", 80) == AROUND
    assert decide(CLIENT6, "::ffff:198.51.100.1", 80) == REFUSED


def test_many_rules_and_many_networks() -> None:
    many = tuple(
        PolicyRule(name=str(index), destinations=(ip_network((index << 12, 22)),), action="refuse")
        for index in range(1 << 12, 1 << 13)
    )
    wide = PolicyRule(
        name="wide",
        destinations=tuple(ip_network((0xC8000000 + (index << 9), 24)) for index in range(10_000)),
        action=Endpoint("192.0.2.80", 80),
    )
    decide = compile_policy(Policy(rule=(*many, wide)))
    assert decide(CLIENT, "1.0.3.255", 80) == Verdict("refuse", "4096")
    assert decide(CLIENT, "1.0.4.0", 80) == DEFAULT
    assert decide(CLIENT, "1.255.240.0", 80) == Verdict("refuse", str((1 << 13) - 1))
    assert decide(CLIENT, "200.78.30.7", 80) == Verdict("forward", "wide", ("192.0.2.80", 80))
    assert decide(CLIENT, "200.78.31.7", 80) == DEFAULT


# Against the rules read one by one


def naive(policy: Policy, source: str, destination: str, port: int) -> Verdict:
    """What the documents say, in their order."""

    def among(host: str, networks: Sequence[Network]) -> bool:
        return any(ip_address(host.partition("%")[0]) in network for network in networks)

    if among(destination, SPECIAL_NETWORKS) and not among(destination, policy.allow_special):
        return REFUSED
    address = ip_address(destination.partition("%")[0])
    reached = [destination]
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        reached.append(str(address.ipv4_mapped))
    for rule in policy.rule:
        if (
            (not rule.sources or among(source, rule.sources))
            and (not rule.destinations or any(among(host, rule.destinations) for host in reached))
            and any(one.first <= port <= one.last for one in rule.ports)
        ):
            if isinstance(rule.action, Endpoint):
                return Verdict("forward", rule.name, (rule.action.host, rule.action.port))
            return Verdict(rule.action, rule.name)
    return Verdict(policy.default)


# Few addresses, close to one another and to the special ones, so that rules meet, touch and hide each other.
NEAR4 = [
    0,
    1,
    0x7EFFFFFC,
    0x7F000000,
    0x7FFFFFFC,
    0x80000000,
    0xA9FEA9FC,
    0xC0000200,
    0xC0000240,
    0xDFFFFFFC,
    2**32 - 4,
]
NEAR6 = [0, 0xFFFF_C000_0200, 0xFFFF_0000_0000, 0x1_0000_0000_0000, 0x20010DB8 << 96, 0xFE80 << 112, 2**128 - 4]
ADDRESSES4 = st.builds(lambda near, more: IPv4Address(near + more), st.sampled_from(NEAR4), st.integers(0, 3))
ADDRESSES6 = st.builds(lambda near, more: IPv6Address(near + more), st.sampled_from(NEAR6), st.integers(0, 3))
HOSTS = st.one_of(ADDRESSES4, ADDRESSES6, st.ip_addresses()).map(str)
SCOPED = st.one_of(HOSTS, st.integers(0, 2**64).map(lambda low: f"{IPv6Address((0xFE80 << 112) + low)}%eth0"))
NETWORKS4 = st.builds(lambda one, bits: IPv4Network((one, bits), strict=False), ADDRESSES4, st.integers(0, 32))
NETWORKS6 = st.builds(lambda one, bits: IPv6Network((one, bits), strict=False), ADDRESSES6, st.integers(0, 128))
LISTS = st.lists(st.one_of(NETWORKS4, NETWORKS6), max_size=4).map(tuple)
PORTS = st.sampled_from([1, 2, 79, 80, 81, 443, 65534, 65535])
RANGES = st.tuples(PORTS, PORTS).map(lambda ends: PortRange(min(ends), max(ends)))
ACTIONS = st.sampled_from(["forward", "refuse", Endpoint("127.0.0.1", 80), Endpoint("2001:db8::1", 443)])
MATCHES = st.builds(
    lambda sources, destinations, ports, action: (sources, destinations, ports, action),
    LISTS,
    LISTS,
    st.lists(RANGES, min_size=1, max_size=3).map(tuple) | st.just((PortRange(1, 65535),)),
    ACTIONS,
)
POLICIES = st.builds(
    lambda default, allowed, rules: Policy(
        default=default,
        allow_special=allowed,
        rule=tuple(
            PolicyRule(name=str(index), sources=sources, destinations=destinations, ports=ports, action=action)
            for index, (sources, destinations, ports, action) in enumerate(rules)
        ),
    ),
    st.sampled_from(["forward", "refuse"]),
    LISTS,
    st.lists(MATCHES, max_size=6),
)


@settings(max_examples=300, derandomize=True)
@given(POLICIES, st.lists(st.tuples(SCOPED, SCOPED, PORTS), min_size=1, max_size=30))
def test_the_compiled_policy_is_the_rules_read_one_by_one(
    policy: Policy, connections: list[tuple[str, str, int]]
) -> None:
    decide = compile_policy(policy)
    assert [decide(*one) for one in connections] == [naive(policy, *one) for one in connections]
