"""What `tproxyd explain` foretells where no lab can bring a packet to, and what it says of its command line.

That it foretells what happens is tested in netns_tests/test_explain.py, with real packets.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from tproxyd.config import Config, config_from_mapping
from tproxyd.daemon.explain import Request, read_request
from tproxyd.errors import UsageError
from tproxyd.plan import Surroundings, make_plan
from tproxyd.plan.explain import Explanation, Machine, Route, explain
from tproxyd.plan.selectors import AddressType, Packet

OURS = {"192.0.2.1", "2001:db8:1::1", "127.0.0.1", "::1"}


def config_of(**capture: Any) -> Config:
    return config_from_mapping({"capture": {"ports": ["8080"]} | capture})


def packet_to(destination: str = "203.0.113.9", **more: Any) -> Packet:
    source = "192.0.2.2" if "." in destination else "2001:db8:1::2"
    local: AddressType = "local" if destination in OURS else "unicast"
    fields: dict[str, Any] = {"source": source, "port": 8080, "interface": "eth0", "destination_type": local} | more
    fields["source"] = ip_address(fields["source"])
    return Packet(destination=ip_address(destination), **fields)


def machine(**more: Any) -> Machine:
    """One on which all is as it should be."""

    def arrives(mark: int) -> Route:
        return Route("local") if mark else Route("unicast", "eth1")

    def leaves(host: str, _: int) -> Route:
        return Route("local" if host in OURS else "unicast", "eth1")

    return Machine(**({"arrives": arrives, "leaves": leaves} | more))


def explained(
    config: Config, packet: Packet, surroundings: Surroundings | None = None, **more: Any
) -> tuple[str, str, Explanation]:
    """The outcome, the rule that decided in the kernel, and all of it."""
    account = explain(config, surroundings or Surroundings(), packet, machine(**more))
    return account.outcome, f"{account.kernel_rule.where}: {account.kernel_rule.rule}", account


NONE: frozenset[str] = frozenset()


@pytest.mark.parametrize(
    ("capture", "packet", "outcome", "rule"),
    [
        ({}, {}, "forwarded", "inet tproxyd take: meta nfproto ipv4"),
        ({}, {"destination": "2001:db8:f::9"}, "forwarded", "inet tproxyd take: meta nfproto ipv6"),
        ({}, {"protocol": "udp"}, "bypassed", "inet tproxyd intercept: meta l4proto udp accept"),
        ({}, {"interface": "lo"}, "bypassed", 'inet tproxyd intercept: iif "lo" accept'),
        ({}, {"interface": None}, "bypassed", "prerouting"),
        ({}, {"port": 80}, "bypassed", "inet tproxyd intercept: tcp dport != @ports tcp sport != @ports accept"),
        ({}, {"port": 80, "source_port": 8080}, "bypassed", "inet tproxyd capture: tcp dport != @ports return"),
        ({}, {"destination_type": "broadcast"}, "bypassed", "inet tproxyd capture: fib daddr type { broadcast, "),
        ({}, {"destination_type": "multicast"}, "bypassed", "inet tproxyd capture: fib daddr type { broadcast, "),
        ({}, {"destination": "169.254.169.254"}, "refused_special", "inet tproxyd take: tcp flags syn"),
        ({}, {"destination": "::ffff:192.0.2.1"}, "refused_special", "inet tproxyd take: tcp flags syn"),
        ({"ports": []}, {}, "bypassed", "configuration: capture"),
        ({"mode": "off"}, {}, "bypassed", "configuration: capture"),
        ({"ports": "all"}, {"port": 65535}, "forwarded", "inet tproxyd take"),
        ({"ports": "all"}, {"port": 22}, "bypassed", "inet tproxyd capture: tcp dport @exclude_ports return"),
        ({"interfaces": ["eth*"]}, {}, "forwarded", "inet tproxyd take"),
        ({"interfaces": ["eth*"]}, {"interface": "eth"}, "forwarded", "inet tproxyd take"),
        ({"interfaces": ["eth1"]}, {}, "bypassed", "inet tproxyd capture: iifname != @interfaces return"),
        ({"interfaces": ["eth"]}, {}, "bypassed", "inet tproxyd capture: iifname != @interfaces return"),
        ({"exclude_interfaces": ["e*"]}, {}, "bypassed", "inet tproxyd capture: iifname @exclude_interfaces return"),
        ({"sources": ["192.0.2.0/24"]}, {}, "forwarded", "inet tproxyd take"),
        ({"sources": ["192.0.2.3"]}, {}, "bypassed", "inet tproxyd capture: ip saddr != @sources4 return"),
        ({"sources": ["2001:db8::/32"]}, {}, "bypassed", "inet tproxyd capture: meta nfproto ipv4 return"),
        ({"exclude_sources": ["192.0.2.2"]}, {}, "bypassed", "inet tproxyd capture: ip saddr @exclude_sources4"),
        ({"destinations": ["203.0.113.0/25"]}, {}, "forwarded", "inet tproxyd take"),
        ({"destinations": ["203.0.113.128/25"]}, {}, "bypassed", "inet tproxyd capture: (end of the chain)"),
        ({"destinations": ["local"]}, {}, "bypassed", "inet tproxyd capture: (end of the chain)"),
        ({"destinations": ["local"]}, {"destination": "192.0.2.1"}, "forwarded", "inet tproxyd take"),
        (
            {"exclude_destinations": ["local"]},
            {"destination": "192.0.2.1"},
            "bypassed",
            "inet tproxyd capture: fib daddr type local return",
        ),
        (
            {"exclude_destinations": ["203.0.113.9"], "destinations": ["203.0.113.0/24"]},
            {},
            "bypassed",
            "inet tproxyd capture: ip daddr @exclude_destinations4 return",
        ),
    ],
)
def test_every_selector(capture: dict[str, Any], packet: dict[str, Any], outcome: str, rule: str) -> None:
    found, decides, _ = explained(config_of(**capture), packet_to(**packet))
    assert found == outcome
    assert decides.startswith(rule)


@pytest.mark.parametrize("when_down", ["bypass", "refuse"])
@pytest.mark.parametrize(
    ("packet", "surroundings", "more", "guarded"),
    [
        ({}, {}, {"listening": False}, True),
        ({}, {}, {"listening": False, "tables": {"tproxyd", "tproxyd_guard"}}, True),
        ({}, {}, {"tables": {"tproxyd_guard"}}, True),
        ({}, {}, {"capturing": False}, True),
        ({}, {}, {"tables": NONE}, False),
        ({"destination": "169.254.169.254"}, {}, {"listening": False}, True),
        ({"destination": "2001:db8:f::9"}, {"families": (4,)}, {}, True),
        ({"on_bridge": True}, {"bridge_netfilter": True}, {}, True),
        ({"on_bridge": True}, {"bridge_netfilter": True}, {"arrives": lambda _: Route("local")}, True),
        (
            {"on_bridge": True},
            {"bridge_netfilter": True},
            {"arrives": lambda _: Route("unicast", "br0", to_bridge=True)},
            False,
        ),
        ({"on_bridge": True}, {"bridge_netfilter": True}, {"arrives": lambda _: Route("", error="martian")}, False),
        ({"port": 80}, {}, {"listening": False}, False),
        ({"protocol": "udp"}, {}, {"listening": False}, False),
        ({"interface": "lo"}, {}, {"listening": False}, False),
        ({"destination_type": "broadcast"}, {}, {"listening": False}, False),
    ],
)
def test_what_nobody_takes_is_refused_where_there_is_a_guard(
    packet: dict[str, Any], surroundings: dict[str, Any], more: dict[str, Any], guarded: bool, when_down: str
) -> None:
    around = Surroundings(**surroundings)
    found, decides, _ = explained(config_of(when_down=when_down), packet_to(**packet), around, **more)
    refused = guarded and when_down == "refuse"
    assert found == ("refused_when_down" if refused else "bypassed")
    assert decides.startswith("inet tproxyd_guard take: meta l4proto tcp") or not refused


def test_a_bridge_is_taken_note_of_only_while_br_netfilter_is_on() -> None:
    packet = packet_to(on_bridge=True)
    assert explained(config_of(), packet)[0] == "forwarded"
    _, decides, _ = explained(config_of(), packet, Surroundings(bridge_netfilter=True))
    assert decides == 'inet tproxyd intercept: meta iifkind "bridge" accept'


def test_routing_that_does_not_deliver_what_was_steered() -> None:
    missing, decides, account = explained(config_of(), packet_to(), arrives=lambda _: Route("unicast", "eth1"))
    assert (missing, decides) == ("dropped", "routing: from 192.0.2.2 on eth0")
    assert "our ip rule or route is missing" in account.what
    assert "stray" not in str(account.stages)  # which it does not reach: it has a socket
    assert "it would leave by eth1" in account.what
    martian, decides, account = explained(config_of(), packet_to(), arrives=lambda _: Route("", error="martian"))
    assert (martian, decides) == ("dropped", "routing: from 192.0.2.2 on eth0")
    assert account.what.endswith("martian")
    taken = Route("unicast", "eth1", rule="100: from 192.0.2.0/24 lookup 77")
    found, decides, _ = explained(config_of(), packet_to(), arrives=lambda _: taken)
    assert (found, decides) == ("dropped", "ip rule: 100: from 192.0.2.0/24 lookup 77")


@pytest.mark.parametrize("mode", ["tproxy", "redirect"])
def test_what_another_program_is_given_is_its_own(mode: str) -> None:
    found, _, account = explained(config_of(mode=mode), packet_to(), listener="squid (pid 7)")
    assert (found, account.rule, account.upstream) == ("given_to_another", None, None)
    assert account.what == "given to squid (pid 7); what it does is its own policy"
    assert account.stages[-1].where == "listener"


def test_a_client_with_an_address_of_this_host_is_a_connection_of_ours() -> None:
    found, _, account = explained(config_of(), packet_to("2001:db8:f::9", source="2001:db8:1::1"))
    assert found == "self_call"
    assert account.stages[-1].decides


@pytest.mark.parametrize("source", ["auto", "proxy"])
def test_the_account_says_as_whom_the_server_sees_the_client(source: str) -> None:
    rule = {"name": "six", "destinations": ["203.0.113.6"], "action": {"forward": "[2001:db8:f::6]:80"}}
    config = config_from_mapping(
        {"capture": {"ports": ["8080"]}, "upstream": {"source": source}, "policy": {"rule": [rule]}}
    )
    away = explained(config, packet_to())[2]
    assert (away.upstream, away.upstream_source) == ("203.0.113.9:8080", "client" if source == "auto" else "proxy")
    here = explained(config, packet_to("192.0.2.1"))[2]
    assert (here.upstream, here.upstream_source) == ("192.0.2.1:8080", "client_ip" if source == "auto" else "proxy")
    other = explained(config, packet_to("203.0.113.6"))[2]
    assert (other.rule, other.upstream, other.upstream_source) == ("six", "[2001:db8:f::6]:80", "proxy")


@pytest.mark.parametrize("destination", ["192.0.2.1", "2001:db8:1::1"])
@pytest.mark.parametrize("default", ["forward", "refuse"])
@pytest.mark.parametrize("trusted", [("192.0.2.0/29", "2001:db8:1::/126"), ("192.0.2.3", "2001:db8:1::3")])
def test_what_depends_on_a_proxy_header_is_said(destination: str, default: str, trusted: tuple[str, str]) -> None:
    """The account goes on with the addresses that the packet has, which are those of a header without any."""
    config = config_from_mapping(
        {
            "capture": {"ports": ["8080"]},
            "listen": {"proxy_protocol_from": list(trusted)},
            "policy": {"default": default},
        }
    )
    found, _, account = explained(config, packet_to(destination))
    assert found == ("forwarded" if default == "forward" else "refused_by_policy")
    steps = [stage.where for stage in account.stages]
    at = steps.index("self-call") + 1
    if "/" not in trusted[0]:
        assert steps[at] == "policy"
        assert "PROXY" not in account.what + str(account.stages)
        return
    assert steps[at : at + 2] == ["PROXY header", "policy"]
    assert account.stages[at].rule == f"listen.proxy_protocol_from has {trusted[':' in destination]}"
    assert not account.stages[at].decides
    assert account.what.endswith(
        "(with a PROXY header without addresses; one with addresses is decided about by these)"
    )


@pytest.mark.parametrize("packet", [{"port": 80}, {"source": "192.0.2.1"}])
def test_no_header_is_waited_for_of_what_is_not_taken_or_is_a_self_call(packet: dict[str, Any]) -> None:
    config = config_from_mapping({"capture": {"ports": ["8080"]}, "listen": {"proxy_protocol_from": ["192.0.2.0/24"]}})
    found, _, account = explained(config, packet_to(**packet))
    assert found == ("bypassed" if "port" in packet else "self_call")
    assert "PROXY" not in account.what + str(account.stages)


def test_every_rule_that_is_named_stands_in_the_ruleset() -> None:
    """What the account calls a rule of a chain is one, word for word."""
    config = config_of(
        when_down="refuse",
        exclude_ports=["22"],
        interfaces=["eth0"],
        exclude_interfaces=["wg*"],
        sources=["192.0.2.0/24"],
        exclude_sources=["192.0.2.3"],
        destinations=["203.0.113.0/24", "local"],
        exclude_destinations=["203.0.113.7"],
    )
    ruleset = make_plan(config).ruleset
    for listening in (True, False):
        for stage in explained(config, packet_to(), listening=listening)[2].stages:
            if stage.where.startswith("inet "):
                assert f"\t{stage.rule} " in ruleset


# The command line


@pytest.mark.parametrize(
    ("source", "destination", "request_"),
    [
        ("192.0.2.2", "203.0.113.9:80", Request(ip_address("192.0.2.2"), None, ip_address("203.0.113.9"), 80)),
        ("192.0.2.2:5", "203.0.113.9:80", Request(ip_address("192.0.2.2"), 5, ip_address("203.0.113.9"), 80)),
        ("2001:db8::2", "[2001:db8::1]:80", Request(ip_address("2001:db8::2"), None, ip_address("2001:db8::1"), 80)),
        ("[2001:db8::2]", "[2001:db8::1]:80", Request(ip_address("2001:db8::2"), None, ip_address("2001:db8::1"), 80)),
        ("[2001:db8::2]:7", "[2001:db8::1]:80", Request(ip_address("2001:db8::2"), 7, ip_address("2001:db8::1"), 80)),
    ],
)
def test_addresses_that_are_understood(source: str, destination: str, request_: Request) -> None:
    assert read_request(source, destination, protocol="tcp", interface=None) == request_


def test_a_scope_names_the_interface() -> None:
    assert read_request("fe80::2%eth7", "[2001:db8::1]:80", protocol="tcp", interface=None).interface == "eth7"


@pytest.mark.parametrize(
    ("source", "destination", "interface", "sentence"),
    [
        ("192.0.2.2", "203.0.113.9", None, 'DST:PORT "203.0.113.9" has no port'),
        ("192.0.2.2", "[2001:db8::1]:80", None, "192.0.2.2 is IPv4 and 2001:db8::1 is IPv6"),
        ("a.example", "203.0.113.9:80", None, 'SRC "a.example" is no address (names are not looked up'),
        ("192.0.2.2", "203.0.113.9:80000", None, "has a port out of range; ports are 1 to 65535"),
        ("192.0.2.2", "203.0.113.9:0", None, "has a port out of range"),
        ("192.0.2.2", f"203.0.113.9:{'9' * 5000}", None, "has a port out of range"),
        ("192.0.2.2", "203.0.113.9:\u0663", None, "is no address"),
        ("192.0.2.2:", "203.0.113.9:80", None, 'SRC "192.0.2.2:" is no address'),
        ("", "203.0.113.9:80", None, 'SRC "" is no address'),
        ("\x1b[2J\n", "203.0.113.9:80", None, r'SRC "\x1b[2J\n" is no address'),
        ("[192.0.2.2]:1", "203.0.113.9:80", None, "has IPv4 in brackets"),
        ("2001:db8::2", "2001:db8::1:80", None, "has no port; write an address and a port"),
        ("0.0.0.0", "203.0.113.9:80", None, "is no client's address"),
        ("224.0.0.1", "203.0.113.9:80", None, "is no client's address"),
        ("fe80::2%eth0", "[fe80::1%eth0]:80", None, "has a scope; name the interface with --in"),
        ("fe80::2%eth0", "[2001:db8::1]:80", "eth1", "name two interfaces"),
    ],
)
def test_addresses_that_are_not(source: str, destination: str, interface: str | None, sentence: str) -> None:
    with pytest.raises(UsageError) as raised:
        read_request(source, destination, protocol="tcp", interface=interface)
    assert sentence in str(raised.value)
    assert str(raised.value).isprintable()
