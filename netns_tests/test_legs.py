"""What the ruleset remembers of connections to local apps that bear a client's address: as long as one lives, the app's words come back to us,
also the first one after a long silence; and soon after the end nothing is left.

The daemon here forgets sooner than the real one, which takes minutes: one second instead of ten after an end, three instead of 150 without a
sign of life. Signs of life are asked for after two seconds instead of sixty.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from netns_tests.drift import events
from netns_tests.labs import BRIDGE
from netns_tests.watch import reset, until
from netns_tests.way import Way, open_way
from tproxyd.net.sockets import format_address
from tproxyd.testing import Node, activate_conntrack, conntrack_count
from tproxyd.testing.daemon import LabDaemon, open_daemon
from tproxyd.testing.plugin import OpenLab

LEAVING, KEPT = 1.0, 3.0
HASTY = f"""
from tproxyd.plan import ruleset
from tproxyd.net import sockets
from tproxyd.datapath import loop
ruleset._LEAVING, ruleset._KEPT = "{LEAVING:.0f}s", "{KEPT:.0f}s"
sockets.KEEPALIVE_IDLE, sockets.KEEPALIVE_INTERVAL = 2, 1
loop._SETTLE = 0.2
from tproxyd.daemon.cli import entry
entry()
"""
PORTS = {"original": 8080, "another port": 9090}
WAYS = {"sidecar v4": "original", "sidecar v6": "another port"}
Pair = tuple[trio.SocketStream, trio.SocketStream]


class Legs:
    """A hasty daemon. `pair` gives the client's and the app's end of a connection through it."""

    def __init__(self, way: Way, daemon: LabDaemon, listener: trio.SocketListener) -> None:
        self.way, self.daemon, self._listener = way, daemon, listener
        self._order = trio.Lock()

    async def pair(self, source_port: int = 0) -> Pair:
        async with self._order:
            with trio.fail_after(5):
                client = await self.way.client.connect(self.way.address, 8080, source_port=source_port)
                app = await self._listener.accept()
        host = self.way.client.v6 if ":" in self.way.address else self.way.client.v4
        assert app.socket.getpeername()[0] == host
        return client, app


@asynccontextmanager
async def open_legs(way: Way, target: str) -> AsyncIterator[Legs]:
    port = PORTS[target]
    where = "" if target == "original" else f'target = "{format_address((way.address, port))}"\n'
    config = f'[capture]\nports = ["8080"]\n[relay]\nworkers = 0\n[upstream]\nsource = "client"\n{where}'
    if way.proxy.call(BRIDGE.exists):
        for name in ("iptables", "ip6tables"):
            way.proxy.set_sysctl(f"net.bridge.bridge-nf-call-{name}", 0)
    listener = way.app.listen(way.bind, port)
    command = (sys.executable, "-c", HASTY, "run", "-c", str(way.file(config)))
    async with listener, way.proxy.process(*command, collect=True) as process:
        daemon = LabDaemon(process, await process.wait_for_output("tproxyd: ready "))
        assert f"timeout {LEAVING:.0f}s" in (await way.proxy.run("nft", "list", "table", "inet", "tproxyd")).stdout
        yield Legs(way, daemon, listener)
        assert await daemon.stop() == 0


async def say(sender: trio.SocketStream, receiver: trio.SocketStream, word: bytes) -> None:
    with trio.fail_after(2):
        await sender.send_all(word)
        assert await receiver.receive_some() == word


async def end(sender: trio.SocketStream, receiver: trio.SocketStream) -> None:
    with trio.fail_after(2):
        await sender.send_eof()
        assert await receiver.receive_some() == b""


async def the_client_ends_and_the_app_talks_on(legs: Legs) -> None:
    client, app = await legs.pair()
    async with client, app:
        await end(client, app)
        for pause in (0.0, 2 * LEAVING, 0.5, 1.5 * KEPT, 0.0):
            await trio.sleep(pause)
            await say(app, client, b"on")
        await end(app, client)


async def the_app_ends_and_the_client_talks_on(legs: Legs) -> None:
    client, app = await legs.pair()
    async with client, app:
        await end(app, client)
        for pause in (0.0, 2 * LEAVING, 0.5, 1.5 * KEPT, 0.0):
            await trio.sleep(pause)
            await say(client, app, b"on")
        await end(client, app)


async def the_app_ends_and_is_the_first_to_speak_again(legs: Legs) -> None:
    """Its kernel is: it asks for a sign of life before we do, and would be answered by the client's reset."""
    client, app = await legs.pair()
    async with client, app:
        await end(app, client)
        for name, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1)):
            app.socket.setsockopt(socket.IPPROTO_TCP, name, value)
        app.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        await trio.sleep(1.5 * KEPT)
        await say(client, app, b"on")
        await end(client, app)


async def nobody_speaks_for_long_and_then_the_app_does(legs: Legs) -> None:
    client, app = await legs.pair()
    async with client, app:
        await say(client, app, b"hello")
        await trio.sleep(1.5 * KEPT)
        await say(app, client, b"late")


async def the_same_ports_again_at_once(legs: Legs) -> None:
    """The one before is still remembered as ended by the app, and forgotten while this one lives and is silent."""
    client, app = await legs.pair(46000)
    async with client, app:
        await end(app, client)
        await end(client, app)
    await trio.sleep(LEAVING / 2)
    client, app = await legs.pair(46000)
    async with client, app:
        await trio.sleep(0.75 * LEAVING)  # before anybody asks for a sign of life
        await say(app, client, b"late")
        await trio.sleep(1.5 * KEPT)
        await say(app, client, b"later")


async def the_app_resets_after_a_silence(legs: Legs) -> None:
    client, app = await legs.pair()
    async with client, app:
        await trio.sleep(1.5 * KEPT)
        await reset(app)
        with trio.fail_after(2), pytest.raises(trio.BrokenResourceError):
            await client.receive_some()


STORIES: list[Callable[[Legs], Awaitable[None]]] = [
    the_client_ends_and_the_app_talks_on,
    the_app_ends_and_the_client_talks_on,
    the_app_ends_and_is_the_first_to_speak_again,
    nobody_speaks_for_long_and_then_the_app_does,
    the_same_ports_again_at_once,
    the_app_resets_after_a_silence,
]


async def on_each(test: Callable[[Way, Legs], Awaitable[None]], open_lab: OpenLab, directory: Path) -> None:
    """At the same time, each with a lab and a daemon of its own: it is mostly waiting."""

    async def run(name: str, target: str) -> None:
        own = directory / target
        own.mkdir()
        async with open_way(name, open_lab, own) as way, open_legs(way, target) as legs:
            await test(way, legs)

    async with trio.open_nursery() as nursery:
        for name, target in WAYS.items():
            nursery.start_soon(run, name, target)


async def test_who_lives_is_remembered_and_nobody_else(open_lab: OpenLab, tmp_path: Path) -> None:
    """Each story at the same time as the others. Nothing is tracked, and a few seconds after the last end the sets are empty."""

    async def tell(legs: Legs, story: Callable[[Legs], Awaitable[None]]) -> None:
        try:
            await story(legs)
        except BaseException as error:
            error.add_note(f"in {story.__name__}, {legs.way}")
            raise

    async def all_stories(way: Way, legs: Legs) -> None:
        way.proxy.call(activate_conntrack)
        async with trio.open_nursery() as stories:
            for story in STORIES:
                stories.start_soon(tell, legs, story)
        assert way.proxy.call(conntrack_count) == 0
        ended = trio.current_time()
        with trio.fail_after(10):
            while any((await remembered(way.proxy)).values()):
                await trio.sleep(0.1)
        print(f"{way}: empty after {trio.current_time() - ended:.1f} s")
        assert all(record["outcome"] in ("closed", "upstream_reset") for record in legs.daemon.records())

    await on_each(all_stories, open_lab, tmp_path)


async def test_15_who_lives_is_remembered_when_the_table_is_exchanged(open_lab: OpenLab, tmp_path: Path) -> None:
    """IPv6 off on lo and on again, br_netfilter on and off: after each the app speaks first, and a word of the client's comes later."""

    async def exchange(way: Way, legs: Legs) -> None:
        changes = [("net.ipv6.conf.lo.disable_ipv6", 1), ("net.ipv6.conf.lo.disable_ipv6", 0)]
        if way.proxy.call(BRIDGE.exists):
            changes += [("net.bridge.bridge-nf-call-iptables", value) for value in (1, 0)]
        client, app = await legs.pair()
        half, half_app = await legs.pair()
        async with client, app, half, half_app:
            await say(client, app, b"hello")
            await end(half, half_app)
            for number, (name, value) in enumerate(changes, 1):
                way.proxy.set_sysctl(name, value)
                await until(lambda number=number: len(events(legs.daemon)) >= number)  # type: ignore[misc]
                if ":" in way.address and name.endswith("lo.disable_ipv6") and value:
                    continue  # nothing can be delivered over lo then
                await say(app, client, b"%d" % number)
                await say(half_app, half, b"%d" % number)
                await say(client, app, b"%d" % number)
            assert len(events(legs.daemon)) == len(changes)

    await on_each(exchange, open_lab, tmp_path)


async def remembered(node: Node) -> dict[str, int]:
    """How much the sets hold that packets fill."""
    listed = json.loads((await node.run("nft", "-j", "list", "table", "inet", "tproxyd")).stdout)["nftables"]
    return {
        part["set"]["name"]: len(part["set"].get("elem", ()))
        for part in listed
        if "set" in part and part["set"]["name"][:-1] in ("legs", "ended")
    }


@pytest.mark.parametrize("way", ["sidecar v4", "sidecar v6"], indirect=True)
async def test_dials_of_clients_that_go_fill_no_set(way: Way) -> None:
    """The app accepts nothing, so each SYN goes unanswered, and a dial that its client breaks off ends without a packet of ours."""
    config = '[capture]\nports = ["8080"]\n[upstream]\nsource = "client"\nconnect_timeout = "1s"\n'
    legs = f"legs{4 if way.name.endswith('v4') else 6}"
    async with way.app.listen(way.bind, 8080, backlog=0), open_daemon(way.proxy, config) as daemon:
        for _ in range(100):
            await reset(await way.client.connect(way.address, 8080))
        await until(lambda: len(daemon.records()) == 100)
        seen = (await remembered(way.proxy))[legs]
        assert seen > 50
        began = trio.current_time()
        while (await remembered(way.proxy))[legs] > 5:  # a few have been answered, and live or leave for longer
            await trio.sleep(0.1)
            assert (
                trio.current_time() - began < 30
            )  # who was answered leaves after ten seconds; nobody stays for minutes
