"""Very many connections from one client to one app, as whomever they are made: no port is missed, and nobody waits for one."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio

from netns_tests import connector
from netns_tests.way import Way
from tproxyd.testing import Node, activate_conntrack, conntrack_count
from tproxyd.testing.daemon import open_daemon

CONNECTOR = (sys.executable, "-I", "-S", str(Path(connector.__file__)))
CAPTURE = '[capture]\nports = ["8080"]\n'
RANGE = "net.ipv4.ip_local_port_range"

EVEN = 32_000
"""Connections to one destination that a client can have in TIME_WAIT before it begins with odd ports, of the range 1024 to 65535 (32,256)."""


class As(NamedTuple):
    """As whom: the lines of [upstream], the port at which the app listens, and what the log then says of a connection's source."""

    upstream: str
    port: int
    keeps: str


WAYS = {
    "a chosen port": As("", 8080, "address"),
    "the client's port, to loopback": As('target = "loopback"', 8080, "both"),
    "the client's port, to another port": As('target = "{address}:9090"', 9090, "both"),
    "behind a gateway": As("", 8080, "both"),
    "one address": As('source = "127.0.0.6"', 8080, "neither"),
}


@asynccontextmanager
async def serving(node: Node, address: str, port: int) -> AsyncIterator[None]:
    async with node.process(*CONNECTOR, "serve", address, str(port), collect=True) as process:
        await process.wait_for_output("serving")
        yield


async def connect_many(way: Way, how: str, count: int, first: str) -> dict[str, Any]:
    """What the client said; meanwhile nothing is tracked where the daemon is."""
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, way.proxy.call(conntrack_count))
            await trio.sleep(0.1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        finished = await way.client.run(*CONNECTOR, how, way.address, "8080", str(count), first, timeout=240)
        nursery.cancel_scope.cancel()
    done: dict[str, Any] = json.loads(finished.stdout)
    print(
        f"{way}, {how}, {first} closes first: {count} connections, {count / done['seconds']:.0f}/s, "
        f"slowest {done['slowest'] * 1000:.1f} ms, very slow: {done['slow'][:10]}, conntrack: {most}"
    )
    assert most == 0
    assert not done["wrong"]
    return done


@pytest.mark.parametrize(
    ("way", "name"),
    [
        ("sidecar v4", "a chosen port"),
        ("sidecar v6", "a chosen port"),
        ("sidecar v4", "the client's port, to loopback"),
        ("sidecar v4", "the client's port, to another port"),
        ("gateway v4", "behind a gateway"),
        ("gateway v6", "behind a gateway"),
        ("sidecar v4", "one address"),
    ],
    indirect=["way"],
)
async def test_no_port_is_missed(way: Way, name: str, counted: Callable[[int], int]) -> None:
    """2,000 at once, then 40,000 one by one that the server closes first, then 40,000 that the client does, which leaves each port in TIME_WAIT."""
    upstream, port, keeps = WAYS[name]
    for node in (way.client, way.proxy):
        node.set_sysctl(RANGE, "1024 65535")
    way.proxy.call(activate_conntrack)
    config = f"{CAPTURE}[upstream]\n{upstream.format(address=way.address)}\n"
    async with serving(way.app, way.bind, port), open_daemon(way.proxy, config) as daemon:
        at_once = await connect_many(way, "at-once", counted(2_000), "server")
        assert not at_once["slow"]
        server = await connect_many(way, "one-by-one", counted(40_000), "server")
        assert not server["slow"]
        client = await connect_many(way, "one-by-one", counted(40_000), "client")
        assert not [number for number, _ in client["slow"] if number < EVEN]
        assert len(client["slow"]) <= 4  # with odd ports a client may meet a connection in its name
        assert await daemon.stop() == 0
    records = daemon.records()
    assert Counter(record["outcome"] for record in records) == {"closed": counted(2_000) + 2 * counted(40_000)}
    kept = Counter(keeping(record) for record in records)
    print(kept, [(r["source"], r["upstream_source"]) for r in records if keeping(r) != keeps][:5])
    assert kept[keeps] >= 0.999 * len(records)
    assert not kept["neither"] or keeps == "neither"


def keeping(record: dict[str, Any]) -> str:
    """What of the client's address the upstream has seen."""
    if record["source"] == record["upstream_source"]:
        return "both"
    ends = [record[key].rpartition(":")[0] for key in ("source", "upstream_source")]
    return "address" if ends[0] == ends[1] else "neither"
