"""`tproxyd explain` where others decide, against real connections: their ip rules, their listener, and bridges."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import trio

from netns_tests.labs import BRIDGE, open_bridged_lab, until_it_forwards
from tproxyd.config import load_config
from tproxyd.daemon.explain import Account, explain_connection, read_request
from tproxyd.net.sockets import open_listener
from tproxyd.testing import Lab, Node, serve_identity
from tproxyd.testing.daemon import TPROXYD, open_daemon

CONFIG = '[capture]\nports = ["8080"]\n'
REFUSE = 'when_down = "refuse"\n'


def explained(node: Node, file: Path, source: str, destination: str) -> Account:
    request = read_request(source, destination, protocol="tcp", interface=None)
    return node.call(explain_connection, load_config(file), request)


@pytest.mark.parametrize(
    ("rule", "takes"),
    [
        ("from 192.0.2.0/24", True),
        ("to 203.0.113.0/24 iif eth0", True),
        ("not fwmark 0x80000/0xff0000", True),
        ("ipproto tcp dport 8000-8100", True),
        ("from 192.0.2.64/26", False),
        ("to 203.0.113.64/26", False),
        ("sport 1-1023", False),
    ],
)
async def test_the_ip_rule_of_others_that_takes_a_packet_is_named(
    gateway_lab: Lab, tmp_path: Path, nursery: trio.Nursery, rule: str, takes: bool
) -> None:
    gateway, client = gateway_lab["gateway"], gateway_lab["client"]
    file = tmp_path / "tproxyd.toml"
    file.write_text(CONFIG, encoding="utf-8")
    await nursery.start(serve_identity, gateway_lab["server"], 8080)
    async with open_daemon(gateway, CONFIG):
        await gateway.run("ip", "route", "add", "default", "via", "198.51.100.2", "table", "77")
        await gateway.run("ip", "rule", "add", "priority", "90", "from", "198.51.100.77", "lookup", "77")
        await gateway.run("ip", "rule", "add", "priority", "100", *rule.split(), "lookup", "77")
        explanation = explained(gateway, file, "192.0.2.2:40000", "203.0.113.9:8080").explanation
        assert (explanation.outcome == "dropped") == takes
        if takes:
            assert explanation.kernel_rule.where == "ip rule"
            assert explanation.kernel_rule.rule.startswith("100: ")
            assert "stray" not in str(explanation.stages)
            with pytest.raises(trio.TooSlowError):
                await client.connect("203.0.113.9", 8080, timeout=0.4)
            # Nor does the packet come to that chain.
            stray = (await gateway.run("nft", "list", "chain", "inet", "tproxyd", "stray")).stdout
            assert "counter packets 0 " in stray
        else:
            async with await client.connect("203.0.113.9", 8080, source_port=40000) as stream:
                assert await stream.receive_some()


async def test_who_listens_to_an_applied_state_is_named(gateway_lab: Lab, tmp_path: Path) -> None:
    gateway, file = gateway_lab["gateway"], tmp_path / "tproxyd.toml"
    file.write_text(CONFIG, encoding="utf-8")
    await gateway.run(*TPROXYD, "apply", "-c", str(file))
    assert explained(gateway, file, "192.0.2.2", "203.0.113.9:8080").explanation.outcome == "bypassed"
    with gateway.call(partial(open_listener, "127.0.0.1", 15006, backlog=10)):
        explanation = explained(gateway, file, "192.0.2.2", "203.0.113.9:8080").explanation
        assert explanation.outcome == "given_to_another"
        assert f"(pid {os.getpid()}); what it does is its own policy" in explanation.what
        assert explanation.rule is None
    async with open_daemon(gateway, CONFIG):
        assert explained(gateway, file, "192.0.2.2", "203.0.113.9:8080").explanation.outcome == "forwarded"
    await gateway.run(*TPROXYD, "revert")


async def test_what_the_guard_refuses_of_what_arrives_on_bridges(tmp_path: Path, nursery: trio.Nursery) -> None:
    """While br_netfilter is on: what is for this host, and what leaves by another interface than a bridge."""
    file = tmp_path / "tproxyd.toml"
    file.write_text(CONFIG + REFUSE, encoding="utf-8")
    async with open_bridged_lab("1") as lab:
        gateway, client, server = lab["gateway"], lab["client"], lab["server"]
        if not gateway.call(BRIDGE.exists):
            pytest.fail("this kernel has no br_netfilter: load it with `modprobe br_netfilter`")
        await nursery.start(serve_identity, gateway, 8080)
        await nursery.start(serve_identity, server, 8080)
        for bridge in (False, True):
            if bridge:  # between the gateway and the server, too
                for command in (
                    "address flush dev eth1",
                    "link add br1 type bridge",
                    "link set eth1 master br1",
                    "link set br1 up",
                    "address add 198.51.100.1/24 dev br1",
                    "address add 2001:db8:2::1/64 dev br1 nodad",
                ):
                    await gateway.run("ip", *command.split())
            await until_it_forwards(client, server)
            async with open_daemon(gateway, CONFIG + REFUSE):
                for address, outcome in (
                    ("192.0.2.1", "refused_when_down"),
                    ("198.51.100.2", "bypassed" if bridge else "refused_when_down"),
                ):
                    account = explained(gateway, file, "192.0.2.2", f"{address}:8080")
                    assert account.kernel == "as planned"
                    assert account.explanation.outcome == outcome, (address, bridge)
                    if outcome == "bypassed":
                        async with await client.connect(address, 8080):
                            pass
                    else:
                        with pytest.raises(ConnectionRefusedError):
                            await client.connect(address, 8080)
