"""Who calls himself: what has the same host at both ends is never captured, and goes where it went without us."""

from __future__ import annotations

import json

import pytest
import trio

from netns_tests.watch import attempt
from netns_tests.way import BOTH_LAYOUTS, Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import Node, activate_conntrack, conntrack_count, serve_identity
from tproxyd.testing.daemon import open_daemon

CONFIG = '[capture]\nports = ["8080"]\n'
UPSTREAMS = ('source = "auto"', 'source = "client"', 'target = "loopback"')


async def ask(node: Node, address: str, *, source: str | None = None) -> tuple[str, str]:
    """Its own address, and the one that the server sees."""
    async with await node.connect(address, 8080, source=source) as stream:
        answer = json.loads(await stream.receive_some())
        return format_address(stream.socket.getsockname()), answer["peer"]


@BOTH_LAYOUTS
@pytest.mark.parametrize("upstream", UPSTREAMS)
async def test_what_a_host_sends_to_itself_goes_past(way: Way, nursery: trio.Nursery, upstream: str) -> None:
    """Where the daemon runs: to each of its own addresses from each of them, loopback included; and at a server behind the gateway."""
    await nursery.start(serve_identity, way.proxy, 8080)
    if way.app is not way.proxy:
        await nursery.start(serve_identity, way.app, 8080)
    six = ":" in way.address
    own = [*(way.proxy.v6_on if six else way.proxy.v4_on).values(), "::1" if six else "127.0.0.1"]
    async with open_daemon(way.proxy, f"{CONFIG}[upstream]\n{upstream}\n") as daemon:
        for address in own:
            mine, seen = await ask(way.proxy, address)
            assert mine == seen
            assert mine.rpartition(":")[0].strip("[]") == address
            for other in own:
                mine, seen = await ask(way.proxy, address, source=other)
                assert mine == seen
                assert mine.rpartition(":")[0].strip("[]") == other
        if way.app is not way.proxy:
            # To another host, from the gateway itself: what it sends is never captured.
            mine, seen = await ask(way.proxy, way.address)
            assert mine == seen
        mine, _ = await ask(way.client, way.address)
        assert (await daemon.record(mine))["outcome"] == "closed"
        assert [record["source"] for record in daemon.records()] == [mine]


@BOTH_LAYOUTS
async def test_the_hosts_own_connections_to_itself_stay_tracked(way: Way, nursery: trio.Nursery) -> None:
    """Its firewall knows them as before, also while a client's is relayed to the same app."""
    await nursery.start(serve_identity, way.proxy, 8080)
    way.proxy.call(activate_conntrack)
    address = way.proxy.v6 if ":" in way.address else way.proxy.v4
    async with (
        open_daemon(way.proxy, CONFIG) as daemon,
        await way.client.connect(address, 8080) as stream,
    ):
        assert await stream.receive_some()
        assert way.proxy.call(conntrack_count) == 0
        async with await way.proxy.connect(address, 8080) as own:
            assert await own.receive_some()
            assert way.proxy.call(conntrack_count) == 1
        assert not daemon.records()


@pytest.mark.parametrize(("way", "source"), [("gateway v4", "auto"), ("gateway v6", "client")], indirect=["way"])
async def test_a_client_that_is_its_own_server(way: Way, nursery: trio.Nursery, source: str) -> None:
    """One of several backends calls the address that they share, and is the one that it is forwarded to. With its own address it would not take
    the connection: nothing that comes from there can come from outside."""
    await nursery.start(serve_identity, way.client, 8080)
    itself = way.client.v6 if ":" in way.address else way.client.v4
    config = f'{CONFIG}[upstream]\ntarget = "{format_address((itself, 8080))}"\nsource = "{source}"\n'
    async with open_daemon(way.proxy, config) as daemon:
        if source == "client":
            mine = await attempt(way.client, way.address, source_port=50000)
            assert (await daemon.record(mine))["outcome"] == "refused_by_policy"
            assert "the server is the client itself" in daemon.process.stderr_text
        else:
            with trio.fail_after(2):
                mine, seen = await ask(way.client, way.address)
            assert seen.rpartition(":")[0].strip("[]") == (way.proxy.v6 if ":" in itself else way.proxy.v4)
            assert (await daemon.record(mine))["outcome"] == "closed"
