"""`capture.mode = "redirect"`, for kernels without tproxy, and "off": NAT brings connections here, and conntrack tells where they were going.

The same as in tproxy mode but for what `tproxyd plan` says that this mode loses: what is captured, what clients get when the daemon dies,
stops or cannot connect, and that nothing stays in the kernel.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from netns_tests.drift import echo, open_live, under_load, until_mended
from netns_tests.labs import BRIDGE, SPECIAL, open_bridged_lab, open_special_lab, until_it_forwards
from netns_tests.watch import METRICS, attempt, dial, ends_within, metrics, outcomes, resets_within, until
from netns_tests.way import Way, median_ms
from tproxyd.net.sockets import format_address
from tproxyd.testing import (
    Lab,
    Node,
    activate_conntrack,
    conntrack_count,
    payload,
    serve_echo,
    serve_identity,
    serve_sink,
)
from tproxyd.testing.daemon import TPROXYD, LabDaemon, open_daemon

Counted = Callable[[int], int]
REDIRECT = '[capture]\nmode = "redirect"\nports = ["8080"]\n'
ALL_PORTS = '[capture]\nmode = "redirect"\nports = "all"\n'
CLOSED = 'when_down = "refuse"\n'
OPEN = 'when_down = "bypass"\n'
FOREIGN = ("203.0.113.77", "2001:db8:f::77")
ONE_WAY = pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
BOTH_LAYOUTS = pytest.mark.parametrize("way", ["gateway v6", "sidecar v4"], indirect=True)


async def ask(node: Node, address: str, port: int = 8080) -> tuple[str, str]:
    """Connects and gives the own address and the one that the app sees."""
    async with await node.connect(address, port, timeout=2) as stream:
        own = format_address(stream.socket.getsockname())
        await stream.send_eof()
        return own, json.loads(b"".join([chunk async for chunk in stream]))["peer"]


async def assert_served(way: Way, daemon: LabDaemon) -> None:
    own, _ = await ask(way.client, way.address)
    record = await daemon.record(own)
    assert record["original_destination"] == format_address((way.address, 8080))
    assert record["outcome"] == "closed"


async def assert_when_down(way: Way, when_down: str) -> None:
    """Ten new clients get the app itself, or a refusal."""
    for _ in range(10):
        if when_down == OPEN:
            own, peer = await ask(way.client, way.address)
            assert peer == own
        else:
            with pytest.raises(ConnectionRefusedError):
                await way.client.connect(way.address, 8080, timeout=2)


async def foreign(node: Node, *chains: str) -> None:
    """A table of somebody else's."""
    text = "".join(f"chain c{number} {{\n{chain}\n}}\n" for number, chain in enumerate(chains))
    await node.run("nft", "-f", "-", input=f"table inet foreign {{\n{text}}}\n")


# Served


async def test_a_connection_is_relayed_to_where_it_was_going(way: Way, nursery: trio.Nursery) -> None:
    """As the proxy, which the record says; with two conntrack entries and nothing in the policy routing."""
    await nursery.start(serve_identity, way.app, 8080)
    way.proxy.call(activate_conntrack)
    before = await way.proxy.dump()
    async with open_daemon(way.proxy, REDIRECT + METRICS) as daemon:
        assert daemon.ready.endswith("listen=0.0.0.0:15006,[::]:15006")
        during = await way.proxy.dump()
        assert (during.rules, during.routes, during.sysctls) == (before.rules, before.routes, before.sysctls)
        own, peer = await ask(way.client, way.address)
        record = await daemon.record(own)
        assert way.proxy.call(conntrack_count) == 2
        seen = await metrics(way.proxy)
        assert await daemon.stop() == 0
    wanted = format_address((way.address, 8080))
    assert record["original_destination"] == record["upstream"] == wanted
    assert record["source"] == own
    assert record["upstream_source"] == peer != own
    assert (record["direction"], record["rule"], record["outcome"]) == ("inbound", None, "closed")
    assert seen["tproxyd_accepted_total"] == seen['tproxyd_connections_total{outcome="closed"}'] == 1
    assert seen['tproxyd_bytes_total{from="upstream"}'] == record["bytes_from_upstream"] > 0
    assert await way.proxy.dump() == before


@ONE_WAY
async def test_megabytes_and_a_half_close_get_through(way: Way, nursery: trio.Nursery) -> None:
    size = 8_000_000
    await nursery.start(serve_sink, way.app, 8080)
    config = REDIRECT + "[relay]\nworkers = 0\n"
    async with open_daemon(way.proxy, config), await way.client.connect(way.address, 8080) as stream:
        for chunk in payload(size):
            await stream.send_all(chunk)
        await stream.send_eof()
        answer = b"".join([chunk async for chunk in stream])
    assert int(answer.split()[1]) == size


@ONE_WAY
async def test_a_limit_a_source_is_exact_with_two_workers(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    limits = "[relay]\nworkers = 2\n[limits]\nmax_connections_per_source = 3\n"
    async with open_daemon(way.proxy, REDIRECT + limits) as daemon:
        streams = [await dial(way.client, way.address) for _ in range(6)]
        await until(lambda: outcomes(daemon)["limit"] == 3)
        for stream in filter(None, streams):
            await stream.aclose()
        assert await daemon.stop() == 0
    assert outcomes(daemon) == {"limit": 3, "closed": 3}


async def test_rules_of_the_policy_see_the_original_destination(gateway_lab: Lab, nursery: trio.Nursery) -> None:
    await nursery.start(serve_identity, gateway_lab["server"], 8080)
    rule = '[[policy.rule]]\nname = "no-77"\ndestinations = ["203.0.113.77", "2001:db8:f::77"]\naction = "refuse"\n'
    async with open_daemon(gateway_lab["gateway"], REDIRECT + rule) as daemon:
        for address in FOREIGN:
            await attempt(gateway_lab["client"], address, 8080)
        for address in ("203.0.113.78", "2001:db8:f::78"):
            await ask(gateway_lab["client"], address)
        assert await daemon.stop() == 0
    assert outcomes(daemon) == {"refused_by_policy": 2, "closed": 2}


async def test_syn_cookies_even_to_foreign_destinations(gateway_lab: Lab, nursery: trio.Nursery) -> None:
    gateway = gateway_lab["gateway"]
    gateway.set_sysctl("net.ipv4.tcp_syncookies", 2)
    await nursery.start(serve_identity, gateway_lab["server"], 8080)
    async with open_daemon(gateway, REDIRECT) as daemon:
        for address in FOREIGN:
            own, _ = await ask(gateway_lab["client"], address)
            assert (await daemon.record(own))["outcome"] == "closed"


@pytest.mark.parametrize("way", ["gateway v4", "sidecar v6"], indirect=True)
async def test_no_mark_leaves_prerouting(way: Way, nursery: trio.Nursery) -> None:
    """With tcp_fwmark_accept=1 the listener's own answers would bear it, and it would choose their route."""
    way.proxy.set_sysctl("net.ipv4.tcp_fwmark_accept", 1)
    await nursery.start(serve_identity, way.app, 8080)
    count = "meta l4proto tcp meta mark != 0 counter"
    await foreign(
        way.proxy, *(f"type filter hook {hook} priority -300;\n{count}" for hook in ("input", "forward", "output"))
    )
    async with open_daemon(way.proxy, REDIRECT + CLOSED) as daemon:
        for _ in range(3):
            await assert_served(way, daemon)
    assert (await way.proxy.run("nft", "list", "table", "inet", "foreign")).stdout.count("packets 0 bytes 0") == 3


# Selectors


@pytest.mark.parametrize(
    ("selector", "v4", "v6"),
    [
        ('sources = ["192.0.2.0/24"]', True, False),
        ('interfaces = ["et*"]\nexclude_destinations = ["local"]', True, True),
        ('exclude_interfaces = ["eth0"]', False, False),
        ('destinations = ["203.0.113.64/26", "2001:db8:f:1::/64"]', True, False),
        ('destinations = ["local"]', False, False),
        ('exclude_destinations = ["203.0.113.77"]', False, True),
        ('exclude_ports = ["8080"]\nports = "all"', False, False),
        ('ports = "all"', True, True),
    ],
)
async def test_selectors(gateway_lab: Lab, nursery: trio.Nursery, selector: str, v4: bool, v6: bool) -> None:
    """Of foreign destinations; the guard refuses nothing of what is not captured."""
    await nursery.start(serve_identity, gateway_lab["server"], 8080)
    ports = "" if "\nports" in f"\n{selector}" else 'ports = ["8080"]\n'
    async with open_daemon(
        gateway_lab["gateway"], f'[capture]\nmode = "redirect"\n{CLOSED}{ports}{selector}\n'
    ) as daemon:
        answers = [await ask(gateway_lab["client"], address) for address in FOREIGN]
        assert await daemon.stop() == 0
    seen = {record["source"] for record in daemon.records()}
    assert [own in seen for own, _ in answers] == [v4, v6]
    assert [own != peer for own, peer in answers] == [v4, v6]


@pytest.mark.parametrize("way", ["sidecar v4", "sidecar v6"], indirect=True)
async def test_local_destinations_alone(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_identity, way.app, 8080)
    async with open_daemon(way.proxy, REDIRECT + CLOSED + 'destinations = ["local"]\n') as daemon:
        await assert_served(way, daemon)
        # What the host sends to itself is never captured.
        own, peer = await ask(way.proxy, way.address)
        assert own == peer
        assert await daemon.stop() == 0
    assert len(daemon.records()) == 1


# Self-calls and special destinations


@pytest.mark.parametrize("config", [REDIRECT, ALL_PORTS + CLOSED], ids=["one port", "all ports"])
@BOTH_LAYOUTS
async def test_39_40_who_dials_the_listener_is_closed(way: Way, config: str) -> None:
    """It is on every address; from the network and from the host itself it costs one connection."""
    async with open_daemon(way.proxy, config) as daemon:
        addresses = [*way.proxy.v4_on.values(), *way.proxy.v6_on.values()]
        for address in addresses:
            await attempt(way.client, address, 15006)
        for address in ("127.0.0.1", "::1", *addresses):
            await attempt(way.proxy, address, 15006)
        assert await daemon.stop() == 0
    assert {record["outcome"] for record in daemon.records()} == {"self_call"}
    assert all(record["upstream"] is None for record in daemon.records())
    assert [record["original_destination"] for record in daemon.records()] == [
        format_address((address, 15006)) for address in (*addresses, "127.0.0.1", "::1", *addresses)
    ]


async def test_40_the_listeners_port_at_a_foreign_destination_is_served(
    gateway_lab: Lab, nursery: trio.Nursery
) -> None:
    await nursery.start(serve_identity, gateway_lab["server"], 15006)
    async with open_daemon(gateway_lab["gateway"], ALL_PORTS) as daemon:
        for address in FOREIGN:
            own, _ = await ask(gateway_lab["client"], address, 15006)
            assert (await daemon.record(own))["original_destination"] == format_address((address, 15006))


async def test_41_special_destinations() -> None:
    """Refused by the kernel; where they are allowed, they are taken."""
    allow = '[policy]\nallow_special = ["169.254.0.0/16", "100.100.100.200", "fd00:ec2::254", "64:ff9b::/96"]\n'
    async with open_special_lab(router="192.0.2.1") as (client, host):
        async with open_daemon(host, REDIRECT) as daemon:
            for address in SPECIAL:
                with pytest.raises(ConnectionRefusedError):
                    await attempt(client, address, 8080)
            assert await daemon.stop() == 0
        assert daemon.records() == []
        async with open_daemon(host, REDIRECT + allow) as daemon:
            for address in SPECIAL:
                await attempt(client, address, 8080)
            assert await daemon.stop() == 0
    assert [record["original_destination"] for record in daemon.records()] == [
        format_address((address, 8080)) for address in SPECIAL
    ]


async def test_39_a_connection_that_conntrack_has_forgotten_is_closed(gateway_lab: Lab, nursery: trio.Nursery) -> None:
    """Without its entry nobody can tell where it was going: it must not be taken for one to the listener's address."""
    gateway, client = gateway_lab["gateway"], gateway_lab["client"]
    await nursery.start(serve_identity, gateway_lab["server"], 8080)
    await foreign(gateway, "type filter hook prerouting priority -400;\ntcp dport 15006 notrack")
    async with open_daemon(gateway, REDIRECT) as daemon:
        for address in (gateway.v4, gateway.v6):
            await attempt(client, address, 15006)
        assert await daemon.stop() == 0
    assert outcomes(daemon) == {"self_call": 2}


# Death, stop, restart


@pytest.mark.timed
async def test_04_05_sigkill_and_restart(way: Way, nursery: trio.Nursery) -> None:
    before = await way.proxy.dump()
    await nursery.start(serve_identity, way.app, 8080)
    for when_down in (OPEN, CLOSED):
        async with open_daemon(way.proxy, REDIRECT + when_down) as daemon:
            await assert_served(way, daemon)
            async with await way.client.connect(way.address, 8080) as living:
                await living.receive_some()
                began = trio.current_time()
                daemon.process.send_signal(signal.SIGKILL)
                await daemon.process.wait()
                assert await ends_within(living, 1)  # NAT is still there to carry the reset
                await assert_when_down(way, when_down)
                took = trio.current_time() - began
        median_ms(f"death and ten connections, {way}, {when_down.strip()}", [took])
        assert took < 1  # 100 ms each
    async with open_daemon(way.proxy, REDIRECT + OPEN) as daemon:
        await assert_served(way, daemon)
        assert await daemon.stop() == 0
    assert await way.proxy.dump() == before


@ONE_WAY
async def test_what_a_killed_daemon_left_is_reverted_without_its_config(way: Way) -> None:
    before = await way.proxy.dump()
    async with open_daemon(way.proxy, REDIRECT + CLOSED) as daemon:
        daemon.process.send_signal(signal.SIGKILL)
        await daemon.process.wait()
    assert await way.proxy.dump() != before
    await way.proxy.run(*TPROXYD, "revert")
    assert await way.proxy.dump() == before


@pytest.mark.parametrize("when_down", [OPEN, CLOSED], ids=["open", "closed"])
@BOTH_LAYOUTS
async def test_08_while_it_drains_connections_live_and_new_ones_get_what_when_down_says(
    way: Way, nursery: trio.Nursery, when_down: str
) -> None:
    """What lives needs its conntrack entry and not the rule."""
    before = await way.proxy.dump()
    await nursery.start(serve_identity, way.app, 8080)
    await nursery.start(serve_echo, way.app, 8081)
    ports = REDIRECT.replace('"8080"', '"8080", "8081"')
    async with open_daemon(way.proxy, ports + when_down) as daemon:
        async with await way.client.connect(way.address, 8081) as stream:
            await echo(stream, b"before", within=3)
            daemon.process.send_signal(signal.SIGTERM)
            await daemon.process.wait_for_output("stopping")
            await until_off(way.proxy)
            await assert_when_down(way, when_down)
            await echo(stream, b"during", within=3)
            await stream.send_eof()
            assert await stream.receive_some() == b""
        with trio.fail_after(5):
            assert await daemon.process.wait() == 0
    assert outcomes(daemon) == {"closed": 1}
    assert await way.proxy.dump() == before


async def until_off(node: Node) -> None:
    with trio.fail_after(3):
        while "goto take" in (await node.run("nft", "list", "table", "inet", "tproxyd")).stdout:
            await trio.sleep(0.01)


@BOTH_LAYOUTS
async def test_08_what_the_relay_has_taken_is_delivered_before_nat_goes(way: Way) -> None:
    """The app has sent all and closed; the client reads late. Without NAT its ACKs would not reach the proxy's socket any more."""
    size = 400_000

    async def app(listener: trio.SocketListener) -> None:
        async with listener, await listener.accept() as stream:
            for chunk in payload(size):
                await stream.send_all(chunk)

    async with trio.open_nursery() as serving, open_daemon(way.proxy, REDIRECT) as daemon:
        serving.start_soon(app, way.app.listen(way.bind, 8080))
        async with await way.client.connect(way.address, 8080) as stream:
            await stream.send_eof()
            own = format_address(stream.socket.getsockname())
            await trio.sleep(0.3)
            daemon.process.send_signal(signal.SIGTERM)
            await daemon.process.wait_for_output("stopping")
            got = sum([len(chunk) async for chunk in stream])
        assert await daemon.process.wait() == 0
    assert got == size
    assert [(record["source"], record["outcome"]) for record in daemon.records()] == [(own, "closed")]


@pytest.mark.parametrize(
    ("way", "tracked", "end"),
    [
        ("gateway v4", False, signal.SIGTERM),
        ("gateway v6", True, signal.SIGKILL),
        ("sidecar v4", True, signal.SIGTERM),
        ("sidecar v6", False, signal.SIGKILL),
    ],
    indirect=["way"],
)
async def test_connections_from_before_survive_capture_going_on_and_off(
    way: Way, nursery: trio.Nursery, tracked: bool, end: signal.Signals
) -> None:
    """Also those that conntrack, which capture switches on, takes for new ones in the middle."""
    await nursery.start(serve_echo, way.app, 8080)
    if tracked:
        way.proxy.call(activate_conntrack)
    async with await way.client.connect(way.address, 8080) as stream:
        await echo(stream, b"before", within=3)
        async with open_daemon(way.proxy, REDIRECT + CLOSED) as daemon:
            for _ in range(3):
                await echo(stream, b"during", within=3)
            daemon.process.send_signal(end)
            await daemon.process.wait()
            await echo(stream, b"after", within=3)
        await way.proxy.run(*TPROXYD, "revert")
        await echo(stream, b"after", within=3)
    assert daemon.records() == []


@BOTH_LAYOUTS
async def test_08_at_the_deadline_of_the_drain_clients_are_reset(way: Way, nursery: trio.Nursery) -> None:
    """While NAT can still carry the reset to them."""
    await nursery.start(serve_echo, way.app, 8080)
    async with (
        open_daemon(way.proxy, REDIRECT + '[drain]\ntimeout = "200ms"\n') as daemon,
        await way.client.connect(way.address, 8080) as stream,
    ):
        await echo(stream, b"before", within=3)
        assert await daemon.stop() == 0
        assert await resets_within(stream, 1)
    assert outcomes(daemon) == {"drained": 1}


@ONE_WAY
async def test_05_nothing_passes_between_two_deaths(way: Way, nursery: trio.Nursery) -> None:
    """Clients in a loop over three lives and deaths: served or refused, reset at worst; never the app itself, and nobody waits."""
    await nursery.start(serve_identity, way.app, 8080)
    ends: Counter[str] = Counter()

    async def client() -> None:
        while True:
            try:
                own, peer = await ask(way.client, way.address)
                ends["passed" if own == peer else "served"] += 1
            except trio.TooSlowError:
                ends["waits"] += 1
            except ConnectionRefusedError:
                ends["refused"] += 1
            except (OSError, trio.BrokenResourceError):
                ends["reset"] += 1

    async with trio.open_nursery() as clients:
        for life in range(3):
            async with open_daemon(way.proxy, REDIRECT + CLOSED) as daemon:
                if life == 0:
                    for _ in range(4):
                        clients.start_soon(client)
                served = ends["served"]
                await until(lambda served=served: ends["served"] > served + 20)  # type: ignore[misc]
                daemon.process.send_signal(signal.SIGKILL)
                await daemon.process.wait()
        clients.cancel_scope.cancel()
    print(dict(ends))
    assert ends["served"] > 60
    assert ends["refused"]
    assert not ends["passed"] + ends["waits"]


# Upstream


@BOTH_LAYOUTS
async def test_27_an_upstream_that_refuses_resets_the_client(way: Way) -> None:
    async with open_daemon(way.proxy, REDIRECT + CLOSED) as daemon:
        await attempt(way.client, way.address, 8080)  # accepted, and then reset
        assert await daemon.stop() == 0
    (record,) = daemon.records()
    assert (record["outcome"], record["upstream"]) == ("upstream_refused", format_address((way.address, 8080)))


async def test_27_an_upstream_that_is_unreachable_resets_the_client(sidecar_lab: Lab) -> None:
    async with open_daemon(sidecar_lab["host"], REDIRECT) as daemon:
        for address in FOREIGN:
            stream = await dial(sidecar_lab["client"], address)
            assert await resets_within(stream, 3)
            if stream is not None:
                await stream.aclose()
        assert await daemon.stop() == 0
    assert [(record["original_destination"], record["outcome"]) for record in daemon.records()] == [
        (format_address((address, 8080)), "upstream_unreachable") for address in FOREIGN
    ]


# State


@BOTH_LAYOUTS
async def test_apply_and_revert(way: Way, nursery: trio.Nursery) -> None:
    """Any listener will do; while there is none, clients are refused; a daemon takes the place over and leaves it as it was."""
    before = await way.proxy.dump()
    file = str(way.file(REDIRECT + CLOSED))
    applied = await way.proxy.run(*TPROXYD, "apply", "-c", file)
    assert applied.stderr == ""
    state = await way.proxy.dump()
    await assert_when_down(way, CLOSED)
    async with trio.open_nursery() as serving:
        await serving.start(serve_identity, way.proxy, 15006)
        own, _ = await ask(way.client, way.address)
        assert own
        serving.cancel_scope.cancel()
    assert (await way.proxy.run(*TPROXYD, "apply", "-c", file)).stdout == (
        "nothing to change: the kernel holds the plan\n"
    )
    await nursery.start(serve_identity, way.app, 8080)
    async with open_daemon(way.proxy, REDIRECT + CLOSED) as daemon:
        await assert_served(way, daemon)
        assert await daemon.stop() == 0
    assert await way.proxy.dump() == state
    await assert_when_down(way, CLOSED)
    await way.proxy.run(*TPROXYD, "revert")
    assert await way.proxy.dump() == before


@ONE_WAY
async def test_apply_says_that_it_cannot_bypass(way: Way) -> None:
    applied = await way.proxy.run(*TPROXYD, "apply", "-c", str(way.file(REDIRECT)))
    assert applied.stderr.startswith('tproxyd: warning: when_down = "bypass" with `tproxyd apply`: ')
    assert applied.stderr.count("\n") == 1
    await assert_when_down(way, CLOSED)
    await way.proxy.run(*TPROXYD, "revert")


@ONE_WAY
async def test_the_modes_replace_one_another(way: Way, nursery: trio.Nursery) -> None:
    """What tproxy mode has left, rules and routes too, goes when redirect mode comes, and the other way round."""
    await nursery.start(serve_identity, way.app, 8080)
    before = await way.proxy.dump()
    tproxy = REDIRECT.replace('"redirect"', '"tproxy"')
    for config in (tproxy, REDIRECT, tproxy):
        async with open_daemon(way.proxy, config + CLOSED) as daemon:
            await assert_served(way, daemon)
            daemon.process.send_signal(signal.SIGKILL)
            await daemon.process.wait()
            await assert_when_down(way, CLOSED)
    await way.proxy.run(*TPROXYD, "revert")
    assert await way.proxy.dump() == before


@pytest.mark.parametrize(
    ("way", "command"),
    [("gateway v6", "nft flush ruleset"), ("sidecar v4", "nft delete table inet tproxyd_guard")],
    indirect=["way"],
)
@pytest.mark.timed
async def test_09_what_others_remove_is_back_within_a_second(
    way: Way, nursery: trio.Nursery, counted: Counted, command: str
) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    before = await way.proxy.dump()
    took, times = [], counted(50)
    async with open_daemon(way.proxy, REDIRECT + CLOSED + METRICS) as daemon:
        planned = await way.proxy.dump()
        for table in ("tproxyd", "tproxyd divert", "tproxyd capture"):
            kind = "chain" if " " in table else "table"
            done = await way.proxy.run("nft", "flush", kind, "inet", *table.split(), check=False)
            assert "Operation not permitted" in done.stderr
        async with open_live(way.client, way.address) as live, under_load(way.client, way.address):
            for number in range(1, times + 1):
                began = trio.current_time()
                await way.proxy.run(*command.split())
                took.append(await until_mended(daemon, way.proxy, planned, live, number=number, began=began))
        assert (await metrics(way.proxy))['tproxyd_drift_repairs_total{kind="ruleset"}'] == times
        assert await daemon.stop() == 0
    assert set(outcomes(daemon)) <= {"closed", "client_reset"}
    assert await way.proxy.dump() == before
    median_ms(f"{command}, {way}", took)
    assert max(took) < 1


@ONE_WAY
async def test_54_without_libnftables_it_does_not_promise_a_bypass(way: Way) -> None:
    """What nobody owns outlives the daemon, and NAT does not look for a listener."""
    before = await way.proxy.dump()
    done = await way.proxy.run(sys.executable, "-c", WITHOUT_LIBRARY, str(way.file(REDIRECT)), check=False)
    assert done.returncode == os.EX_UNAVAILABLE
    assert "libnftables.so.1" in done.stderr
    assert 'when_down = "refuse"' in done.stderr
    assert await way.proxy.dump() == before


# Where the program has what it needs built in, there need be no library.
WITHOUT_LIBRARY = """
import sys
from tproxyd.errors import MissingError
from tproxyd.kernel import nft
def missing():
    raise MissingError("the library libnftables.so.1 is missing")
nft._load_library = missing
from tproxyd.daemon.cli import main
sys.exit(main(["run", "-c", sys.argv[1]]))
"""


# Neighbours


@pytest.mark.parametrize("when_down", [OPEN, CLOSED], ids=["open", "closed"])
@pytest.mark.parametrize("priority", ["dstnat - 10", "dstnat"])
async def test_the_nat_of_others(gateway_lab: Lab, nursery: trio.Nursery, priority: str, when_down: str) -> None:
    """A port published as Docker does it comes after us; what comes before us is bypassed or refused, and never half of both."""
    gateway, client = gateway_lab["gateway"], gateway_lab["client"]
    await nursery.start(serve_identity, gateway_lab["server"], 8080)
    await nursery.start(serve_identity, gateway_lab["server"], 9999)
    await foreign(
        gateway,
        f"type nat hook prerouting priority {priority};\niifname eth0 tcp dport 8080 dnat ip to 198.51.100.2:9999",
    )
    async with open_daemon(gateway, REDIRECT + when_down) as daemon:
        if priority == "dstnat - 10" and when_down == CLOSED:
            with pytest.raises(ConnectionRefusedError):
                await client.connect(FOREIGN[0], 8080, timeout=2)
        else:
            own, peer = await ask(client, FOREIGN[0])
            assert (own != peer) is (priority != "dstnat - 10")
        assert await daemon.stop() == 0
    assert len(daemon.records()) == (priority != "dstnat - 10")


@ONE_WAY
async def test_10_a_default_drop_input_chain_with_the_rule_of_the_readme(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_identity, way.app, 8080)
    hook = 'type filter hook input priority 0; policy drop;\niifname "lo" accept\nmeta l4proto icmpv6 accept\n'
    hook += "ct state established accept\n"
    async with open_daemon(way.proxy, REDIRECT) as daemon:
        await foreign(way.proxy, hook)
        with pytest.raises(trio.TooSlowError):
            await way.client.connect(way.address, 8080, timeout=0.3)
        await way.proxy.run("nft", "delete table inet foreign")
        await foreign(way.proxy, f"{hook}tcp dport 15006 ct status dnat accept")
        await assert_served(way, daemon)
        with pytest.raises(trio.TooSlowError):  # nobody dials it directly
            await way.client.connect(way.proxy.v6 if ":" in way.address else way.proxy.v4, 15006, timeout=0.3)


@pytest.mark.parametrize("bridge_netfilter", ["0", "1"])
async def test_clients_behind_a_bridge_are_captured(nursery: trio.Nursery, bridge_netfilter: str) -> None:
    """Also while br_netfilter is on, which keeps tproxy from it; with a word, since it shows what stays on the bridge, too."""
    async with open_bridged_lab(bridge_netfilter) as lab, trio.open_nursery() as serving:
        gateway, client, server = lab["gateway"], lab["client"], lab["server"]
        await serving.start(serve_identity, server, 8080)
        await until_it_forwards(client, server)
        async with open_daemon(gateway, REDIRECT + CLOSED) as daemon:
            for address in (server.v4, server.v6):
                own, peer = await ask(client, address)
                assert own != peer
            assert await daemon.stop() == 0
        shown = gateway.call(BRIDGE.exists) and bridge_netfilter == "1"
        assert ("machines of one bridge send to one another is captured" in daemon.process.stderr_text) is shown
        assert len(daemon.records()) == 2
        serving.cancel_scope.cancel()


# Off


async def test_mode_off_captures_nothing(sidecar_lab: Lab, tmp_path: Path) -> None:
    host, file = sidecar_lab["host"], tmp_path / "off.toml"
    file.write_text('[capture]\nmode = "off"\nports = ["8080"]\n')
    before = await host.dump()
    for verb in ("run", "apply"):
        done = await host.run(*TPROXYD, verb, "-c", str(file), check=False)
        assert (done.returncode, done.stdout) == (os.EX_CONFIG, "")
        assert done.stderr.startswith("tproxyd: nothing to capture: ")
        assert done.stderr.count("\n") == 1
    assert (await host.run(*TPROXYD, "check", "-c", str(file))).stdout == (
        "the configuration is good, but captures nothing\n"
    )
    planned = await host.run(*TPROXYD, "plan", "-c", str(file))
    assert planned.stdout == "Nothing would be captured: no table, rule or route.\n"
    assert await host.dump() == before
