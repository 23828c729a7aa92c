"""The daemon's look at the kernel: what it sees, what it costs, and what goes wrong around it without harm."""

from __future__ import annotations

import resource
import signal
import socket
import struct

import pytest
import trio

from netns_tests.drift import echo, events
from netns_tests.labs import BRIDGE
from netns_tests.watch import METRICS, get, until
from tproxyd import kernel
from tproxyd.errors import KernelError
from tproxyd.kernel.dumps import dump_all
from tproxyd.testing import Lab, Link, Node, Topology, open_lab, serve_echo
from tproxyd.testing.daemon import TPROXYD, cpu_seconds, open_daemon

CONFIG = '[capture]\nports = ["8080"]\nwhen_down = "refuse"\n' + METRICS
RULE = "5234:\tfrom all fwmark 0x1000000/0x3000000 lookup 133 proto 133\n"


async def has_rule(node: Node) -> bool:
    return RULE in (await node.run("ip", "-4", "rule")).stdout


async def until_it_has_the_rule(node: Node, *, within: float) -> None:
    with trio.fail_after(within):
        while not await has_rule(node):
            await trio.sleep(0.01)


@pytest.mark.timed
async def test_11_12_beside_a_full_routing_table(sidecar_lab: Lab) -> None:
    """A hundred thousand routes of others, in both families: what is ours is found, repaired and removed as if they were not there."""
    host = sidecar_lab["host"]
    four = "".join(f"route add 198.{18 + n // 65536}.{n // 256 % 256}.{n % 256}/32 dev eth0\n" for n in range(50_000))
    six = "".join(f"-6 route add 2001:db8:{n:x}::/48 dev eth0\n" for n in range(16, 50_016))
    await host.run("ip", "-batch", "-", input=four)
    await host.run("ip", "-6", "-batch", "-", input=six.replace("-6 ", ""))
    with trio.fail_after(5):
        async with open_daemon(host, CONFIG) as daemon:
            for command in ("ip rule del priority 5234", "ip route flush table 133"):
                before = len(events(daemon))
                await host.run(*command.split())
                await until(lambda before=before: len(events(daemon)) > before, within=1)  # type: ignore[misc]
            assert (await host.run(*TPROXYD, "status")).returncode == 0
            assert await daemon.stop() == 0


# Names that nft itself could not give, made as any program with CAP_NET_ADMIN may.
ODD_NAMES = ["a b", 'tproxyd_x;include"/dev/null"', "tproxyd_x;flush", "tproxyd_\n", "tproxyd\t"]


def make_table(name: str) -> None:
    def message(kind: int, flags: int, body: bytes, *, subsystem: int = 0) -> bytes:
        content = struct.pack(">BBH", 1, 0, subsystem) + body  # struct nfgenmsg, NFPROTO_INET
        return struct.pack("=IHHII", 16 + len(content), kind, flags, 0, 0) + content

    text = name.encode() + b"\0"
    attribute = struct.pack("=HH", 4 + len(text), 1) + text + bytes(-len(text) % 4)
    begin, end = message(16, 1, b"", subsystem=10), message(17, 1, b"", subsystem=10)  # NFNL_MSG_BATCH_
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as sock:
        sock.send(begin + message(10 << 8, 0x405, attribute) + end)  # NFT_MSG_NEWTABLE; create, acknowledge
        assert struct.unpack_from("=i", sock.recv(8192), 16) == (0,)


async def test_tables_with_odd_names_are_nobodys_and_harm_nobody(sidecar_lab: Lab) -> None:
    host = sidecar_lab["host"]
    async with open_daemon(host, CONFIG) as daemon:
        for name in ODD_NAMES:
            host.call(make_table, name)
        await host.run("ip", "rule", "del", "priority", "5234")
        await until(lambda: events(daemon), within=2)
        assert await has_rule(host)
        assert (await host.run(*TPROXYD, "status")).returncode == 0
        daemon.process.send_signal(signal.SIGKILL)
        await daemon.process.wait()
    assert (await host.run(*TPROXYD, "revert")).returncode == 0
    found = [body[8:].split(b"\0")[0].decode() for body in host.call(dump_all, 12, 10 << 8 | 1, b"\1\0\0\0")]
    assert sorted(found) == sorted(ODD_NAMES)


async def test_many_tables_of_others_cost_no_memory(sidecar_lab: Lab) -> None:
    host = sidecar_lab["host"]
    async with open_daemon(host, CONFIG) as daemon:
        await host.run("nft", "-f", "-", input="".join(f"table ip other{n}\n" for n in range(1000)))

        def resident() -> int:
            with open(f"/proc/{daemon.process.pid}/statm") as file:
                return int(file.read().split()[1]) * resource.getpagesize()

        before = resident()
        await host.run("ip", "rule", "del", "priority", "5234")
        await until(lambda: events(daemon), within=3)
        assert resident() - before < 20_000_000  # half a megabyte a table, once


async def test_21_no_file_left_for_a_look_is_told_and_tried_again(sidecar_lab: Lab, nursery: trio.Nursery) -> None:
    host = sidecar_lab["host"]
    await nursery.start(serve_echo, host, 8080)
    async with open_daemon(host, CONFIG) as daemon:
        live = await sidecar_lab["client"].connect(host.v4, 8080)
        limit = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (3, limit[1]))
        await host.run("ip", "rule", "del", "priority", "5234")
        await daemon.process.wait_for_output("cannot repair the kernel's state")
        await trio.sleep(1.5)  # and once more
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, limit)
        await until_it_has_the_rule(host, within=3)
        assert "IPv6 is off" not in daemon.process.stderr_text
        await echo(live, b"still", within=3)
        await live.aclose()
        assert await daemon.stop() == 0


async def test_11_one_step_that_cannot_be_taken_does_not_keep_the_others(sidecar_lab: Lab) -> None:
    """A foreign route stands where ours was: an IPv4 rule comes back all the same, again and again."""
    host = sidecar_lab["host"]
    async with open_daemon(host, CONFIG) as daemon:
        foreign = ("local", "default", "dev", "lo", "table", "133", "proto", "static")
        await host.run("ip", "-6", "route", "replace", *foreign)
        await daemon.process.wait_for_output("cannot repair the kernel's state")
        for _ in range(3):
            await host.run("ip", "rule", "del", "priority", "5234")
            await until_it_has_the_rule(host, within=1)
        assert (await get(host, "/readyz")).status == 503
        await host.run("ip", "-6", "route", "del", *foreign)
        await until(lambda: len(events(daemon)) == 4, within=3)
        assert (await get(host, "/readyz")).status == 200
        assert await daemon.stop() == 0


@pytest.mark.timed
async def test_11_a_fight_over_one_thing_does_not_delay_the_repair_of_another(sidecar_lab: Lab) -> None:
    host = sidecar_lab["host"]
    async with open_daemon(host, CONFIG) as daemon:

        async def fight() -> None:
            while True:
                await host.run("nft", "delete", "table", "inet", "tproxyd_guard", check=False)

        async with trio.open_nursery() as other:
            other.start_soon(fight)
            await until(lambda: len(events(daemon)) >= 18, within=20)  # the pauses are long by now
            for _ in range(3):
                await host.run("ip", "rule", "del", "priority", "5234")
                await until_it_has_the_rule(host, within=1)
            other.cancel_scope.cancel()
        assert await daemon.stop() == 0


async def test_what_others_do_again_and_again_with_their_own_costs_little(sidecar_lab: Lab) -> None:
    """Rules of somebody else's come and go, some hundred times a second."""
    host = sidecar_lab["host"]
    batch = "rule add priority 30000 fwmark 0x10/0x10 lookup 99\nrule del priority 30000\n" * 20
    async with open_daemon(host, CONFIG) as daemon:
        began, used = trio.current_time(), cpu_seconds(daemon.process.pid)
        while trio.current_time() < began + 2:
            await host.run("ip", "-batch", "-", input=batch)
            await trio.sleep(0.1)
        share = (cpu_seconds(daemon.process.pid) - used) / (trio.current_time() - began)
        print(f"{share:.0%} of a core")
        assert share < 0.4
        assert await daemon.stop() == 0


async def test_rules_and_routes_that_have_something_else_besides_are_seen_and_removed(sidecar_lab: Lab) -> None:
    """Ours by their protocol, but no plan's: everything that is unmarked, or a network alone, or through another interface."""
    host = sidecar_lab["host"]
    before = await host.dump()
    async with open_daemon(host, CONFIG) as daemon:
        planned = await host.dump()
        # One process for all: rules that were put right in between would be in the way of the next.
        commands = (
            "rule del priority 5234",
            "rule add priority 5234 not fwmark 0x1000000/0x3000000 lookup 133 protocol 133",
            "rule add priority 5235 from 203.0.113.0/24 fwmark 0x2000000/0x3000000 iif lo lookup 133 protocol 133",
            "route add local default dev eth0 table 133 metric 7 proto 133",
        )
        await host.run("ip", "-batch", "-", input="\n".join(commands) + "\n")
        for command in (
            "-6 rule add priority 9 ipproto tcp dport 80 lookup 133 protocol 133",
            "-6 route add local default dev eth0 table 200 proto 133",
        ):
            await host.run("ip", *command.split())
        with trio.fail_after(3):
            while await host.dump() != planned:
                await trio.sleep(0.05)
        assert await daemon.stop() == 0
    assert await host.dump() == before


async def test_revert_leaves_alone_what_a_program_that_lives_owns(sidecar_lab: Lab) -> None:
    """One that embeds tproxyd takes no orders: nothing is half removed."""
    host = sidecar_lab["host"]
    async with open_daemon(host, CONFIG):
        planned = await host.dump()
        with pytest.raises(KernelError, match="another process owns this table"):
            host.call(kernel.revert)
        assert await host.dump() == planned


async def test_a_library_that_is_closed_says_so(sidecar_lab: Lab) -> None:
    def use() -> None:
        library = kernel.Library()
        library.close()
        for method in (library.run, library.check):
            with pytest.raises(KernelError, match="closed"):
                method("list tables\n")

    sidecar_lab["host"].call(use)


# Bridges

BRIDGED = Topology(
    links=(Link("host:port1", "one:eth0"), Link("host:port2", "two:eth0")),
    addresses=(("one:eth0", "192.0.2.2/24"), ("two:eth0", "192.0.2.3/24")),
)


async def make_bridge(host: Node) -> None:
    for command in (
        "link add br0 type bridge",
        "link set port1 master br0",
        "link set port2 master br0",
        "link set br0 up",
        "address add 192.0.2.1/24 dev br0",
    ):
        await host.run("ip", *command.split())


async def until_connected(client: Node, address: str, port: int) -> None:
    """A bridge's port begins to forward when it has learned enough."""
    with trio.fail_after(20):
        while True:
            try:
                async with await client.connect(address, port, timeout=1):
                    return
            except (trio.TooSlowError, OSError):
                await trio.sleep(0.05)


async def test_br_netfilter_of_single_bridges_and_when_it_is_switched_later(nursery: trio.Nursery) -> None:
    """What arrives on bridges is captured, and refused while it cannot be; what passes between other machines of a bridge goes on."""
    async with open_lab(BRIDGED) as lab, trio.open_nursery() as serving:
        host, one, two = lab["host"], lab["one"], lab["two"]
        if not host.call(BRIDGE.exists):
            pytest.fail("this kernel has no br_netfilter: load it with `modprobe br_netfilter`")
        for tables in ("iptables", "ip6tables"):
            host.set_sysctl(f"net/bridge/bridge-nf-call-{tables}", 0)
        await make_bridge(host)
        for node in (host, two):
            await serving.start(serve_echo, node, 8080)
            await serving.start(serve_echo, node, 8081)
        for address in ("192.0.2.1", "192.0.2.3"):
            await until_connected(one, address, 8081)
        async with open_daemon(host, CONFIG) as daemon:
            for on, off in (
                ("ip link set br0 type bridge nf_call_iptables 1", "ip link set br0 type bridge nf_call_iptables 0"),
                ("sysctl -w net.bridge.bridge-nf-call-iptables=1", "sysctl -w net.bridge.bridge-nf-call-iptables=0"),
            ):
                number = len(daemon.records())
                await until_connected(one, "192.0.2.1", 8080)
                await until(lambda number=number: len(daemon.records()) == number + 1)  # type: ignore[misc]
                heard = len(events(daemon))
                await host.run(*on.split())
                await until(lambda heard=heard: len(events(daemon)) == heard + 1, within=3)  # type: ignore[misc]
                with pytest.raises(ConnectionRefusedError):
                    await one.connect("192.0.2.1", 8080, timeout=2)
                await until_connected(one, "192.0.2.3", 8080)
                await host.run(*off.split())
                await until(lambda heard=heard: len(events(daemon)) == heard + 2, within=3)  # type: ignore[misc]
            assert await daemon.stop() == 0
        serving.cancel_scope.cancel()
