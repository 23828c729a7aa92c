"""Connections for which `upstream.source` cannot be had, which is seen when they come: "client" refuses them, "auto" makes them as this host."""

from __future__ import annotations

import errno
import json
import re
import socket
import sys

import pytest
import trio

from netns_tests.watch import attempt as resets
from netns_tests.watch import until
from netns_tests.way import BOTH_LAYOUTS, Way
from netns_tests.wire import attempt
from tproxyd.net.sockets import format_address
from tproxyd.testing import Node, serve_identity
from tproxyd.testing.daemon import LabDaemon, open_daemon


async def who(stream: trio.SocketStream) -> str:
    """Whom the app takes its peer for, of `serve_identity`."""
    answer = b""
    with trio.fail_after(5):
        while not answer.endswith(b"\n"):
            chunk = await stream.receive_some()
            assert chunk
            answer += chunk
    return str(json.loads(answer)["peer"])


def remarks(daemon: LabDaemon) -> list[str]:
    return [line for line in daemon.process.stderr_text.splitlines() if "a connection is refused" in line]


@BOTH_LAYOUTS
@pytest.mark.parametrize("source", ["client", "auto"])
async def test_a_client_of_the_other_family_than_the_target(way: Way, nursery: trio.Nursery, source: str) -> None:
    """Only the rule's target is of the other one: connections to elsewhere bear the client's address as ever."""
    other = way.in_family("v4" if ":" in way.address else "v6")
    target = format_address((getattr(way.app, "v4" if other.bind == "0.0.0.0" else "v6"), 9090))
    await nursery.start(serve_identity, way.app, 8080)
    await nursery.start(serve_identity, way.app, 9090)
    rule = f'[[policy.rule]]\nname = "across"\nports = ["8081"]\naction = {{ forward = "{target}" }}\n'
    config = f'[capture]\nports = ["8080-8081"]\n[upstream]\nsource = "{source}"\n' + rule
    async with open_daemon(way.proxy, config) as daemon:
        if source == "client":
            for _ in range(3):
                one = await attempt(way.client, daemon, way.address, 8081)
                assert one.record["outcome"] == "refused_by_policy"
                assert one.record["rule"] == "across"
            await until(lambda: remarks(daemon))
            (line,) = remarks(daemon)  # of three within five seconds
            assert line.endswith(
                f'upstream.source = "client", and {target} would see this host as the client: the client is of the other family'
            )
        else:
            async with await way.client.connect(way.address, 8081) as stream:
                peer = await who(stream)
                assert peer.rpartition(":")[0].strip("[]") in (*way.proxy.v4_on.values(), *way.proxy.v6_on.values())
        for same in (way, other):
            async with await way.client.connect(same.address, 8080) as stream:
                assert (await who(stream)).rpartition(":")[0].strip("[]") == stream.socket.getsockname()[0]
        assert await daemon.stop() == 0


async def link_local(node: Node) -> tuple[str, int]:
    """The node's address of its link, and that link's index."""
    with trio.fail_after(10):
        while True:  # it comes some time after the link
            listed = (await node.run("ip", "-6", "-oneline", "address", "show", "dev", "eth0", "scope", "link")).stdout
            found = re.search(r"inet6 (\S+)/", listed)
            if found and "tentative" not in listed:
                return found[1], node.call(socket.if_nametoindex, "eth0")
            await trio.sleep(0.05)
    raise AssertionError("unreachable")


@pytest.mark.parametrize("way", ["sidecar v6"], indirect=True)
@pytest.mark.parametrize("source", ["client", "auto"])
async def test_a_client_with_a_link_local_address(way: Way, nursery: trio.Nursery, source: str) -> None:
    """It says nothing without its link, so no connection can bear it."""
    await nursery.start(serve_identity, way.app, 8080)
    host, scope = await link_local(way.client)
    async with open_daemon(way.proxy, f'[capture]\nports = ["8080"]\n[upstream]\nsource = "{source}"\n') as daemon:
        sock = trio.socket.from_stdlib_socket(way.client.open_socket(socket.AF_INET6))
        with sock:
            await sock.bind((host, 0, 0, scope))
            number: int | None = 0
            try:
                with trio.fail_after(5):
                    await sock.connect((way.address, 8080))
                    if source == "auto":
                        peer = await who(trio.SocketStream(sock))
                        assert peer.startswith(f"[{way.proxy.v6}]:")
                    else:
                        await sock.recv(1)
            except ConnectionResetError as error:
                number = error.errno
        record = json.loads(await daemon.process.wait_for_output('"source":'))
        assert host in record["source"]
        if source == "client":
            assert number == errno.ECONNRESET
            assert record["outcome"] == "refused_by_policy"
            await until(lambda: remarks(daemon))
            (line,) = remarks(daemon)
            assert line.endswith("would see this host as the client: the client's address is of one link alone")
        else:
            assert record["outcome"] == "closed"
            assert record["upstream_source"].startswith(f"[{way.proxy.v6}]:")
        assert await daemon.stop() == 0


# An embedding program whose policy sends connections to a port that its configuration does not name.
PROGRAM = """
import logging, sys, trio
from tproxyd import Connection, Forward, config_from_mapping, open_interceptor

async def policy(connection: Connection):
    return Forward(target=(sys.argv[2], 9090))

def on_record(record):
    print(record.source, record.outcome, record.upstream_source, flush=True)

async def main():
    config = {"capture": {"ports": ["8080"]}, "upstream": {"source": sys.argv[1]}}
    async with open_interceptor(config_from_mapping(config), policy=policy, on_record=on_record, own_namespace=True):
        print("open", flush=True)
        await trio.sleep_forever()
logging.basicConfig(level="INFO")
trio.run(main)
"""


@BOTH_LAYOUTS
@pytest.mark.parametrize("source", ["client", "auto"])
async def test_a_policy_s_target_has_a_port_that_no_key_names(way: Way, nursery: trio.Nursery, source: str) -> None:
    """The ruleset does not know its packets, so its answers would not come back to us."""
    await nursery.start(serve_identity, way.app, 9090)
    async with way.proxy.process(sys.executable, "-c", PROGRAM, source, way.address, collect=True) as process:
        await process.wait_for_output("open")
        if source == "auto":
            async with await way.client.connect(way.address, 8080) as stream:
                own, peer = format_address(stream.socket.getsockname()), await who(stream)
            assert peer.rpartition(":")[0].strip("[]") in (*way.proxy.v4_on.values(), *way.proxy.v6_on.values())
            assert await process.wait_for_output(own) == f"{own} closed {peer}"
        else:
            for number in (1, 2):
                own = await resets(way.client, way.address, source_port=20000 + number)
                assert await process.wait_for_output(own) == f"{own} refused_by_policy None"
            (line,) = [line for line in process.stderr_text.splitlines() if "a connection is refused" in line]
            assert line.endswith(
                "would see this host as the client: the ruleset does not know this port, which no key names"
            )
