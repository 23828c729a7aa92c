"""Policy in the lab: what a rule does to a real connection, and that its name stands in the log."""

from __future__ import annotations

import json
from functools import partial

import pytest
import trio

from netns_tests.watch import attempt, outcomes, until
from netns_tests.way import GATEWAY_V4, Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import serve_echo, serve_identity
from tproxyd.testing.daemon import open_daemon

CAPTURE = '[capture]\nports = ["8080", "8081", "8082", "8083"]\n'


def rule(name: str, action: str, *conditions: str) -> str:
    shown = action if action.startswith("{") else f'"{action}"'
    return "\n".join(["[[policy.rule]]", f'name = "{name}"', f"action = {shown}", *conditions, ""])


async def who(way: Way, port: int) -> tuple[str, dict[str, str]]:
    """The client's own address, and what serve_identity tells of the upstream connection."""
    async with await way.client.connect(way.address, port) as stream:
        own = format_address(stream.socket.getsockname())
        return own, json.loads(await stream.receive_some())


@pytest.mark.parametrize("way", ["gateway v4", "gateway v6", "sidecar v4"], indirect=True)
async def test_the_first_rule_that_matches_decides_by_source_destination_and_port(
    way: Way, nursery: trio.Nursery
) -> None:
    for port in (8080, 8081, 8082, 8083):
        await nursery.start(partial(serve_identity, way.app, port, address=way.bind))
    source = way.client.v6 if ":" in way.address else way.client.v4
    other = "2001:db8:77::/64" if ":" in way.address else "203.0.113.77"
    rules = (
        rule("other-source", "refuse", f'sources = ["{other}"]'),
        rule("other-destination", "refuse", f'destinations = ["{other}"]'),
        rule("by-port", "refuse", 'ports = ["8081"]'),
        rule("later-than-by-port", "forward", 'ports = ["8081-8082"]'),
        rule("by-all", "refuse", f'sources = ["{source}"]', f'destinations = ["{way.address}"]', 'ports = ["8083"]'),
    )
    async with open_daemon(way.proxy, CAPTURE + "".join(rules)) as daemon:
        for port, name, served in (
            (8080, None, True),
            (8081, "by-port", False),
            (8082, "later-than-by-port", True),
            (8083, "by-all", False),
        ):
            if served:
                own, _ = await who(way, port)
            else:
                own = await attempt(way.client, way.address, port)
            await until(lambda: len(daemon.records()) == (port - 8079))  # noqa: B023  # at once
            record = daemon.records()[-1]
            assert record["source"] == own or not own
            assert record["rule"] == name
            assert record["outcome"] == ("closed" if served else "refused_by_policy")
            assert (record["upstream"] is not None) == served
            assert record["original_destination"] == format_address((way.address, port))


@GATEWAY_V4
async def test_default_refuse_lets_through_what_a_rule_names(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_identity, way.app, 8080)
    await nursery.start(serve_identity, way.app, 8081)
    config = CAPTURE + '[policy]\ndefault = "refuse"\n' + rule("web", "forward", 'ports = ["8080"]')
    async with open_daemon(way.proxy, config) as daemon:
        own, answer = await who(way, 8080)
        assert answer["peer"] == own
        assert (await daemon.record(own))["rule"] == "web"
        await attempt(way.client, way.address, 8081)
        await until(lambda: outcomes(daemon)["refused_by_policy"] == 1)
        assert daemon.records()[-1]["rule"] is None


@GATEWAY_V4
async def test_a_rule_forwards_to_another_address_of_either_family(way: Way, nursery: trio.Nursery) -> None:
    """IPv4 to IPv4 as the client itself; IPv4 to IPv6 as the proxy; and to an app on the gateway itself, as the client."""
    await nursery.start(serve_identity, way.app, 9001)
    await nursery.start(partial(serve_identity, way.proxy, 9002, address="127.0.0.1"))
    config = CAPTURE + "".join([
        rule("to-v4", '{ forward = "198.51.100.2:9001" }', 'ports = ["8080"]'),
        rule("to-v6", '{ forward = "[2001:db8:f::5]:9001" }', 'ports = ["8081"]'),
        rule("to-local", '{ forward = "127.0.0.1:9002" }', 'ports = ["8082"]'),
        rule("to-nobody", '{ forward = "198.51.100.2:9003" }', 'ports = ["8083"]'),
    ])  # fmt: skip
    async with open_daemon(way.proxy, config) as daemon:
        own, answer = await who(way, 8080)
        assert answer == {"peer": own, "local": "198.51.100.2:9001"}
        record = await daemon.record(own)
        assert (record["upstream"], record["rule"]) == ("198.51.100.2:9001", "to-v4")
        assert record["original_destination"] == "203.0.113.9:8080"
        own, answer = await who(way, 8081)
        assert answer["local"] == "[2001:db8:f::5]:9001"
        record = await daemon.record(own)
        assert record["upstream_source"] == answer["peer"]
        assert answer["peer"].startswith("[2001:db8:2::1]:")
        own, answer = await who(way, 8082)
        assert answer["local"] == "127.0.0.1:9002"
        assert answer["peer"] == own
        assert (await daemon.record(own))["outcome"] == "closed"
        await attempt(way.client, way.address, 8083)
        await until(lambda: outcomes(daemon)["upstream_refused"] == 1)
        assert daemon.records()[-1]["rule"] == "to-nobody"


@pytest.mark.parametrize("target", ["198.51.100.1:15006", "192.0.2.1:15006", "[2001:db8:1::1]:15006"])
@GATEWAY_V4
async def test_39_a_rule_that_forwards_to_the_listener_costs_one_connection(
    way: Way, nursery: trio.Nursery, target: str
) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    config = CAPTURE + rule("loop", f'{{ forward = "{target}" }}', 'ports = ["8081"]')
    async with open_daemon(way.proxy, config) as daemon:
        await attempt(way.client, way.address, 8081)
        assert await daemon.stop() == 0
    (record,) = daemon.records()
    assert (record["outcome"], record["rule"]) == ("self_call", "loop")
