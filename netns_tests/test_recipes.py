"""The recipes of docs/recipes.md, as they stand there."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import trio

from netns_tests.watch import dial, resets_within, until
from netns_tests.way import BOTH_LAYOUTS, Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import Lab, serve_identity
from tproxyd.testing.daemon import TPROXYD, open_daemon
from tproxyd.testing.node import Node

_PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
RECIPES = dict(re.findall(r"^```toml\n# (\S+)\n(.*?)^```", _PAGE, re.DOTALL | re.MULTILINE))
(INPUT_CHAIN,) = re.findall(r"^```nft\n(.*?)^```", _PAGE, re.DOTALL | re.MULTILINE)

FAMILIES = pytest.mark.parametrize("family", ["v4", "v6"])


async def ask(client: Node, address: str, port: int = 8080) -> tuple[str, dict[str, str]]:
    """The client's own address, and what the server says of the connection."""
    async with await client.connect(address, port) as stream:
        own = format_address(stream.socket.getsockname())
        await stream.send_eof()
        answer = b""
        async for chunk in stream:
            answer += chunk
    return own, json.loads(answer)


async def test_gateway(gateway_lab: Lab, nursery: trio.Nursery) -> None:
    gateway, client, server = gateway_lab["gateway"], gateway_lab["client"], gateway_lab["server"]
    await nursery.start(serve_identity, server, 8080)
    await client.run("ip", "address", "add", "192.0.2.200/24", "dev", "eth0")
    async with open_daemon(gateway, RECIPES["gateway.toml"]) as daemon:
        for address in (server.v4, server.v6):
            own, seen = await ask(client, address)
            assert seen["peer"] == own
        refused = await dial(client, server.v4, source="192.0.2.200")
        assert await resets_within(refused, 3)
        if refused is not None:
            await refused.aclose()
        await until(lambda: [one for one in daemon.records() if one["rule"] == "not-from-the-lab"])
        assert await daemon.stop() == 0


@FAMILIES
async def test_sidecar(sidecar_lab: Lab, nursery: trio.Nursery, family: str) -> None:
    host, client = sidecar_lab["host"], sidecar_lab["client"]
    await nursery.start(serve_identity, host, 8080)
    async with open_daemon(host, RECIPES["sidecar.toml"]) as daemon:
        own, seen = await ask(client, getattr(host, family))
        assert seen["peer"].rpartition(":")[0] == own.rpartition(":")[0]
        assert (await daemon.record(own))["outcome"] == "closed"
        assert await daemon.stop() == 0


@FAMILIES
async def test_sidecar_with_an_app_on_loopback(sidecar_lab: Lab, nursery: trio.Nursery, family: str) -> None:
    host, client = sidecar_lab["host"], sidecar_lab["client"]
    await nursery.start(serve_identity, host, 8080)
    async with open_daemon(host, RECIPES["sidecar-loopback.toml"]) as daemon:
        own, seen = await ask(client, getattr(host, family))
        assert seen["peer"] == own
        assert seen["local"] == format_address(({"v4": "127.0.0.1", "v6": "::1"}[family], 8080))
        assert await daemon.stop() == 0


@BOTH_LAYOUTS
async def test_fail_closed_behind_an_input_chain_that_drops(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_identity, way.app, 8080)
    await way.proxy.run("nft", "-f", "-", input=INPUT_CHAIN)
    async with open_daemon(way.proxy, RECIPES["fail-closed.toml"]) as daemon:
        own, seen = await ask(way.client, way.address)
        assert seen["local"] == format_address((way.address, 8080))
        assert (await daemon.record(own))["rule"] == "customers"
        daemon.process.send_signal(signal.SIGKILL)
        await daemon.process.wait()
        with pytest.raises(ConnectionRefusedError):
            await way.client.connect(way.address, 8080)
    await way.proxy.run("nft", "delete", "table", "inet", "filter")
    await way.proxy.run(*TPROXYD, "revert")


@FAMILIES
async def test_istio_inbound(sidecar_lab: Lab, nursery: trio.Nursery, family: str) -> None:
    host, client = sidecar_lab["host"], sidecar_lab["client"]
    address = getattr(host, family)
    for port in (80, 8080, 15021):
        await nursery.start(serve_identity, host, port)
    async with open_daemon(host, RECIPES["istio-inbound.toml"]) as daemon:
        for port in (80, 8080):
            own, seen = await ask(client, address, port)
            assert seen["peer"].rpartition(":")[0] == own.rpartition(":")[0]
            assert (await daemon.record(own))["original_destination"] == format_address((address, port))
        own, seen = await ask(client, address, 15021)
        assert seen["peer"] == own  # not through the daemon
        assert await daemon.stop() == 0
        assert {one["original_destination"].rpartition(":")[2] for one in daemon.records()} == {"80", "8080"}
