"""Other people's traffic: their NAT, firewalls, transparent sockets and bridges on the host where the daemon runs.

Whatever is not captured must work as if there were no tproxyd, while it runs and after its death; what is captured must not come
back round.
"""

from __future__ import annotations

import json
import signal
import socket
import struct
from pathlib import Path

import pytest
import trio

from netns_tests.labs import BRIDGE, open_bridged_lab, until_it_forwards
from netns_tests.watch import reset
from netns_tests.way import BOTH_LAYOUTS, Way
from tproxyd.config import config_from_mapping
from tproxyd.daemon.explain import explain_connection, read_request
from tproxyd.net.sockets import format_address, open_listener
from tproxyd.testing import (
    GATEWAY,
    SIDECAR,
    Lab,
    Node,
    Topology,
    activate_conntrack,
    conntrack_count,
    open_lab,
    serve_echo,
    serve_identity,
)
from tproxyd.testing.daemon import TPROXYD, open_daemon

CONFIG = '[capture]\nports = ["8080"]\n'
ALL_PORTS = '[capture]\nports = "all"\n'
FOREIGN = {"v4": "203.0.113.9", "v6": "2001:db8:f::9"}


async def echoes(stream: trio.SocketStream) -> None:
    with trio.fail_after(3):
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"


async def load(node: Node, hook: str, *rules: str) -> None:
    """A foreign table with one base chain."""
    await node.run("nft", "-f", "-", input="\n".join(["table inet foreign {", "chain c {", hook, *rules, "}", "}", ""]))


@pytest.mark.parametrize(
    ("what", "rule", "app"),
    [
        ("dnat", "iifname eth0 tcp dport 8080 dnat ip to 198.51.100.2:9999", "server"),
        ("redirect", "iifname eth0 tcp dport 8080 redirect to :9999", "gateway"),
    ],
)
async def test_a_connection_that_was_dnated_before_the_start_goes_on(
    gateway_lab: Lab, nursery: trio.Nursery, what: str, rule: str, app: str
) -> None:
    """Before NAT its packets are addressed to a captured port of the gateway itself."""
    gateway = gateway_lab["gateway"]
    await load(gateway, "type nat hook prerouting priority dstnat;", rule)
    await nursery.start(serve_echo, gateway_lab[app], 9999)
    async with await gateway_lab["client"].connect("192.0.2.1", 8080) as stream:
        await echoes(stream)
        async with open_daemon(gateway, CONFIG) as daemon:
            for _ in range(3):
                await echoes(stream)
            assert await daemon.stop() == 0
        await echoes(stream)
        assert daemon.records() == []


@pytest.mark.parametrize("family", ["v4", "v6"])
async def test_masqueraded_connections_pass_old_and_new(gateway_lab: Lab, nursery: trio.Nursery, family: str) -> None:
    """Every port is captured; ssh is excluded. The server's answers come to a port of the gateway itself."""
    gateway, client, server = gateway_lab["gateway"], gateway_lab["client"], gateway_lab["server"]
    await load(gateway, "type nat hook postrouting priority srcnat;", "oifname eth1 masquerade")
    await nursery.start(serve_echo, server, 22)
    async with await client.connect(getattr(server, family), 22) as old:
        await echoes(old)
        async with open_daemon(gateway, ALL_PORTS + '[upstream]\nsource = "proxy"\n') as daemon:
            await echoes(old)
            async with await client.connect(getattr(server, family), 22) as new:
                await echoes(new)
            await echoes(old)
            assert await daemon.stop() == 0
    assert daemon.records() == []


@pytest.mark.parametrize(("config", "port"), [(CONFIG, 8080), (ALL_PORTS, 7000)])
async def test_the_hosts_own_nat_works_while_the_daemon_runs_and_after_its_death(
    sidecar_lab: Lab, nursery: trio.Nursery, config: str, port: int
) -> None:
    """Of what the host sends to itself nothing is captured, and nothing untracked: a published port, as Docker makes them."""
    host = sidecar_lab["host"]
    await nursery.start(serve_echo, host, 9090)
    await load(host, "type nat hook output priority -100;", f"fib daddr type local tcp dport {port} redirect to :9090")
    async with await host.connect(host.v4, port) as before:
        await echoes(before)
        async with open_daemon(host, config) as daemon:
            await echoes(before)
            for address in (host.v4, host.v6):
                async with await host.connect(address, port) as during:
                    await echoes(during)
            assert daemon.records() == []
            daemon.process.send_signal(signal.SIGKILL)
            await daemon.process.wait()
        await echoes(before)
        async with await host.connect(host.v4, port) as after:
            await echoes(after)


async def test_what_is_remembered_of_connections_to_local_apps_is_forgotten(
    sidecar_lab: Lab, nursery: trio.Nursery
) -> None:
    """Whoever ends it, and however: the sets that keep the app's answers from conntrack do not grow. And while a connection
    lives it stays in, so that the app's first word after a long silence is no stranger to a strict firewall."""
    host, client = sidecar_lab["host"], sidecar_lab["client"]
    host.set_sysctl("net.netfilter.nf_conntrack_tcp_loose", 0)
    await nursery.start(serve_echo, host, 8080)
    await load(host, "type filter hook output priority filter;", "ct state invalid drop")
    say = trio.Event()

    async def app(stream: trio.SocketStream) -> None:
        if (await stream.receive_some()) == b"reset":
            return await reset(stream)
        await say.wait()
        await stream.send_all(b"late")
        return await stream.aclose()

    async def every_end(address: str) -> None:
        for _ in range(5):
            async with await client.connect(address, 8080) as stream:
                await echoes(stream)  # the client ends it
            async with await client.connect(address, 8080) as stream:
                await stream.send_eof()
                assert await stream.receive_some() == b""  # the app ends it, and then the client
            async with await client.connect(address, 8081) as stream:
                await stream.send_all(b"reset")
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
            with pytest.raises((trio.BrokenResourceError, ConnectionResetError, ConnectionRefusedError)):
                async with await client.connect(address, 8082) as stream:  # nobody listens there
                    await stream.receive_some()

    nursery.start_soon(trio.serve_listeners, app, [host.listen("0.0.0.0", 8081), host.listen("::", 8081)])
    async with open_daemon(host, '[capture]\nports = ["8080-8082"]\n'):
        for address in (host.v4, host.v6):
            await every_end(address)
        async with await client.connect(host.v4, 8081) as silent4, await client.connect(host.v6, 8081) as silent6:
            for silent in (silent4, silent6):
                await silent.send_all(b"wait")
            with trio.fail_after(15):
                while await remembered(host) != [1, 1]:
                    await trio.sleep(0.1)
            say.set()
            for silent in (silent4, silent6):
                with trio.fail_after(3):
                    assert await silent.receive_some() == b"late"
        with trio.fail_after(15):
            while await remembered(host) != [0, 0]:
                await trio.sleep(0.1)


async def remembered(host: Node) -> list[int]:
    """How many connections the sets of our legs hold, of IPv4 and of IPv6."""
    listed = json.loads((await host.run("nft", "-j", "list", "table", "inet", "tproxyd")).stdout)["nftables"]
    sets = {part["set"]["name"]: len(part["set"].get("elem", ())) for part in listed if "set" in part}
    return [sets["legs4"], sets["legs6"]]


async def test_another_programs_transparent_sockets_stay_tracked(sidecar_lab: Lab, nursery: trio.Nursery) -> None:
    """On a port that is not captured, behind a firewall that lets only tracked connections in."""
    host = sidecar_lab["host"]
    await load(
        host,
        "type filter hook input priority 0; policy drop;",
        'iifname "lo" accept',
        "meta l4proto icmpv6 accept",  # by the name that nft knows without /etc/protocols
        "ct state established accept",
        "ct state new tcp dport 3128 accept",
    )
    proxy = host.call(lambda: open_listener("192.0.2.1", 3128, backlog=10))

    async def echo(stream: trio.SocketStream) -> None:
        async for chunk in stream:
            await stream.send_all(chunk)

    listener = trio.SocketListener(trio.socket.from_stdlib_socket(proxy))
    nursery.start_soon(trio.serve_listeners, echo, [listener])
    async with open_daemon(host, CONFIG), await sidecar_lab["client"].connect("192.0.2.1", 3128) as stream:
        await echoes(stream)


@BOTH_LAYOUTS
async def test_10_a_default_drop_input_chain_with_the_rule_of_the_readme(way: Way, nursery: trio.Nursery) -> None:
    """Without it clients hang; with it they are served, and nothing else is let in."""
    await nursery.start(serve_echo, way.app, 8080)
    await nursery.start(serve_echo, way.proxy, 9999)
    hook = "type filter hook input priority 0; policy drop;"
    common = ('iifname "lo" accept', "meta l4proto icmpv6 accept")
    async with open_daemon(way.proxy, CONFIG):
        await load(way.proxy, hook, *common)
        with pytest.raises(trio.TooSlowError):
            await way.client.connect(way.address, 8080, timeout=0.3)
        await way.proxy.run("nft", "delete table inet foreign")
        await load(way.proxy, hook, *common, "meta mark & 0x3000000 == 0x1000000 accept")
        async with await way.client.connect(way.address, 8080) as stream:
            await echoes(stream)
        with pytest.raises(trio.TooSlowError):
            await way.client.connect(way.proxy.v6 if ":" in way.address else way.proxy.v4, 9999, timeout=0.3)


async def test_38_a_conntrack_table_that_takes_no_more_hurts_no_intercepted_connection(
    way: Way, nursery: trio.Nursery
) -> None:
    """A stand-in, for the limit is the host's: a foreign firewall drops whatever conntrack would make an entry of, as a full
    table does."""
    await nursery.start(serve_echo, way.app, 8080)
    await nursery.start(serve_echo, way.app, 8081)
    full = "table inet full {\n" + "".join(
        f"chain {hook} {{\ntype filter hook {hook} priority filter;\nct state new,invalid drop\n}}\n"
        for hook in ("input", "forward", "output")
    )
    async with open_daemon(way.proxy, CONFIG):
        await way.proxy.run("nft", "-f", "-", input=full + "}\n")
        # Proof that it works: what is not intercepted does not get through.
        with pytest.raises(trio.TooSlowError):
            await way.client.connect(way.address, 8081, timeout=0.3)
        for _ in range(3):
            async with await way.client.connect(way.address, 8080) as stream:
                await echoes(stream)


@pytest.mark.parametrize("when_down", ["bypass", "refuse"])
@pytest.mark.parametrize("bridge_netfilter", ["0", "1"])
async def test_clients_behind_a_bridge_never_hang(nursery: trio.Nursery, bridge_netfilter: str, when_down: str) -> None:
    """As containers are. With br_netfilter on they cannot be captured: then they are told, and so is the administrator."""
    async with open_bridged_lab(bridge_netfilter) as lab, trio.open_nursery() as serving:
        gateway, client, server = lab["gateway"], lab["client"], lab["server"]
        captured = not (gateway.call(BRIDGE.exists) and bridge_netfilter == "1")
        await serving.start(serve_identity, server, 8080)
        await until_it_forwards(client, server)
        async with open_daemon(gateway, f'{CONFIG}when_down = "{when_down}"\n') as daemon:
            assert ("br_netfilter is on" in daemon.process.stderr_text) is not captured
            foretold = "forwarded" if captured else "refused_when_down" if when_down == "refuse" else "bypassed"
            config = config_from_mapping({"capture": {"ports": ["8080"], "when_down": when_down}})
            for source, address in ((client.v4, server.v4), (client.v6, server.v6)):
                request = read_request(source, format_address((address, 8080)), protocol="tcp", interface=None)
                account = gateway.call(explain_connection, config, request)
                assert (account.packet.interface, account.explanation.outcome) == ("br0", foretold)
            for address in (server.v4, server.v6):
                if not captured and when_down == "refuse":
                    with pytest.raises(ConnectionRefusedError):
                        await client.connect(address, 8080, timeout=2)
                    continue
                async with await client.connect(address, 8080, timeout=2) as stream:
                    own = format_address(stream.socket.getsockname())
                    assert json.loads(await stream.receive_some())["peer"] == own
            assert await daemon.stop() == 0
        assert len(daemon.records()) == (2 if captured else 0)
        serving.cancel_scope.cancel()


@pytest.mark.parametrize("source", ["auto", "proxy"])
@pytest.mark.parametrize("family", ["v4", "v6"])
async def test_39_a_router_that_sends_everything_back_makes_no_loop(gateway_lab: Lab, family: str, source: str) -> None:
    """The next hop routes the destination to the gateway again, where it would be captured again, and again."""
    gateway, router = gateway_lab["gateway"], gateway_lab["server"]
    router.set_sysctl("net.ipv4.ip_forward", 1)
    router.set_sysctl("net.ipv6.conf.all.forwarding", 1)
    await router.run("ip", "route", "del", "local", "203.0.113.0/24", "dev", "lo", "table", "local")
    await router.run("ip", "-6", "route", "del", "local", "2001:db8:f::/48", "dev", "lo", "table", "local")
    config = f'{CONFIG}[upstream]\nsource = "{source}"\nconnect_timeout = "1s"\n'
    async with open_daemon(gateway, config) as daemon:
        with pytest.raises((trio.BrokenResourceError, ConnectionResetError, ConnectionRefusedError)):
            async with await gateway_lab["client"].connect(FOREIGN[family], 8080) as stream:
                with trio.fail_after(5):
                    await stream.receive_some()
        assert await daemon.stop() == 0
    assert 1 <= len(daemon.records()) <= 3


async def test_a_client_on_a_wildcard_listeners_port_keeps_its_address(way: Way, nursery: trio.Nursery) -> None:
    """Some program on the gateway has that port; the client comes from the same number."""
    await nursery.start(serve_identity, way.app, 8080)
    async with (
        way.proxy.listen("0.0.0.0", 45010),
        way.proxy.listen("::", 45010),
        open_daemon(way.proxy, CONFIG) as daemon,
    ):
        async with await way.client.connect(way.address, 8080, source_port=45010) as stream:
            own = format_address(stream.socket.getsockname())
            peer = json.loads(await stream.receive_some())["peer"]
        record = await daemon.record(own)
    assert record["upstream_source"] == peer
    if way.app is not way.proxy:
        assert peer.rpartition(":")[0] == own.rpartition(":")[0]
        assert peer != own


async def test_dead_and_bypassing_it_refuses_nothing_special(sidecar_lab: Lab, nursery: trio.Nursery) -> None:
    """An app on a link-local address: refused while the daemon lives, reached when it is dead."""
    host, client = sidecar_lab["host"], sidecar_lab["client"]
    address = next(
        line.split()[1].partition("/")[0]
        for line in (await host.run("ip", "-6", "-o", "address", "show", "dev", "eth0", "scope", "link")).stdout.split(
            "inet6"
        )[1:]
        for line in [f"inet6 {line}"]
    )
    listener = host.open_socket(socket.AF_INET6)
    listener.bind(("::", 8080))
    listener.listen()
    scope = client.call(socket.if_nametoindex, "eth0")

    def dial() -> int:
        with socket.socket(socket.AF_INET6) as sock:
            sock.settimeout(2)
            return sock.connect_ex((address, 8080, 0, scope))

    try:
        assert client.call(dial) == 0
        async with open_daemon(host, CONFIG) as daemon:
            assert client.call(dial) == 111  # ECONNREFUSED
            daemon.process.send_signal(signal.SIGKILL)
            await daemon.process.wait()
            assert client.call(dial) == 0
    finally:
        listener.close()


def send_syn_in_two_fragments(source: str, destination: str, port: int) -> None:
    """One SYN to port 8080 as two IPv4 fragments, through a raw socket of the calling thread's namespace."""

    def checksum(data: bytes) -> int:
        total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
        total = (total >> 16) + (total & 0xFFFF)
        return ~(total + (total >> 16)) & 0xFFFF

    ends = socket.inet_aton(source) + socket.inet_aton(destination)
    tcp = struct.pack("!HHIIBBHHH", port, 8080, 1000, 0, 0x50, 2, 64240, 0, 0)
    tcp = tcp[:16] + struct.pack("!H", checksum(ends + struct.pack("!BBH", 0, 6, len(tcp)) + tcp)) + tcp[18:]
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        for offset, data, more in ((0, tcp[:8], 0x2000), (1, tcp[8:], 0)):
            header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(data), port, more | offset, 64, 6, 0)
            raw.sendto(header + ends + data, (destination, 0))


@pytest.mark.parametrize("mode", ["tproxy", "redirect"])
async def test_05_a_syn_in_two_fragments_does_not_slip_past_the_guard(
    gateway_lab: Lab, tmp_path: Path, mode: str
) -> None:
    """The guard alone, as it is once the steering table is gone."""
    gateway, client, server = gateway_lab["gateway"], gateway_lab["client"], gateway_lab["server"]
    file = tmp_path / "tproxyd.toml"
    file.write_text(f'{CONFIG}mode = "{mode}"\nwhen_down = "refuse"\n')
    await load(
        server,
        "type filter hook prerouting priority -500;",
        "tcp dport 8080 counter",
        "ip frag-off & 0x1fff != 0 counter",
    )

    async def seen() -> list[int]:
        listed = json.loads((await server.run("nft", "-j", "list", "table", "inet", "foreign")).stdout)["nftables"]
        counters = [
            part["counter"]["packets"]
            for rule in listed
            for part in rule.get("rule", {}).get("expr", ())
            if "counter" in part
        ]
        assert len(counters) == 2
        return counters

    # Without any rules it arrives: in its two pieces.
    client.call(send_syn_in_two_fragments, client.v4, FOREIGN["v4"], 45020)
    with trio.fail_after(5):
        while sum(await seen()) < 2:
            await trio.sleep(0.01)
    arrived = await seen()
    await gateway.run(*TPROXYD, "apply", "-c", str(file))
    await gateway.run("nft", "delete", "table", "inet", "tproxyd")
    client.call(send_syn_in_two_fragments, client.v4, FOREIGN["v4"], 45021)
    with pytest.raises(ConnectionRefusedError):  # sent after it and answered, so the other one has been dealt with
        await client.connect(FOREIGN["v4"], 8080)
    assert await seen() == arrived


@pytest.mark.parametrize("topology", [GATEWAY, SIDECAR], ids=["gateway", "sidecar"])
async def test_connections_made_by_syn_cookies_cost_little_conntrack(topology: Topology, nursery: trio.Nursery) -> None:
    """To a local address. One entry each at most, for the client's own side; described in the README."""
    async with open_lab(topology) as lab, trio.open_nursery() as serving:
        host = lab["gateway" if topology is GATEWAY else "host"]
        host.set_sysctl("net.ipv4.tcp_syncookies", 2)
        host.call(activate_conntrack)
        await serving.start(serve_echo, host, 8080)
        async with open_daemon(host, CONFIG) as daemon:
            for _ in range(5):
                async with await lab["client"].connect(host.v4, 8080) as stream:
                    await echoes(stream)
            assert await daemon.stop() == 0
        assert len(daemon.records()) == 5
        assert host.call(conntrack_count) <= 5
        serving.cancel_scope.cancel()
