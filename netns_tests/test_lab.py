"""The lab itself: does it connect, keep to itself, show the kernel's state truly, and leave nothing behind?"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from netns_tests.way import median_ms
from tproxyd.net.namespaces import namespace_inode, open_namespace
from tproxyd.testing import (
    GATEWAY,
    ROUTED,
    SIDECAR,
    Lab,
    LabError,
    LabProcess,
    Link,
    Node,
    Route,
    Topology,
    Transfer,
    activate_conntrack,
    conntrack_count,
    digest_of,
    payload,
    read_state,
    serve_echo,
    serve_identity,
    serve_sink,
    serve_source,
)
from tproxyd.testing.plugin import OpenLab
from tproxyd.testing.process import open_process
from tproxyd.testing.reaper import identity, processes_in

# Announces itself, then daemonises: a session of its own, and a grandchild that init inherits. Prints that one's pid.
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print("daemon", os.getpid(), flush=True)
        time.sleep(1000)
    os._exit(0)
os.wait()
time.sleep(1000)
"""

LAB_TO_BE_KILLED = f"""
import json, trio
from tproxyd.testing import GATEWAY, open_lab
async def main():
    async with open_lab(GATEWAY) as lab, lab["server"].process("sleep", "1000") as sleep:
        async with lab["gateway"].process({sys.executable!r}, "-c", {DAEMON!r}, collect=True) as parent:
            daemon = (await parent.wait_for_output("daemon")).split()[1]
            pids = [sleep.pid, parent.pid, int(daemon)]
            print(json.dumps({{"pids": pids, "namespaces": [node.inode for node in lab]}}), flush=True)
            await trio.sleep_forever()
trio.run(main)
"""


async def identity_seen(client: Node, address: str, port: int) -> dict[str, str]:
    stream = await client.connect(address, port)
    async with stream:
        answer = b""
        while not answer.endswith(b"\n"):
            chunk = await stream.receive_some()
            assert chunk, "the server closed before its answer was whole"
            answer += chunk
    seen: dict[str, str] = json.loads(answer)
    return seen


def written(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@pytest.mark.parametrize(
    ("topology", "server_name", "foreign"),
    [
        pytest.param(GATEWAY, "server", ("203.0.113.9", "2001:db8:f::9"), id="gateway"),
        pytest.param(SIDECAR, "host", (), id="sidecar"),
        pytest.param(ROUTED, "server", ("203.0.113.9", "2001:db8:f::9"), id="routed"),
    ],
)
async def test_the_client_reaches_the_server_and_foreign_destinations_in_both_families(
    open_lab: OpenLab, nursery: trio.Nursery, topology: Topology, server_name: str, foreign: tuple[str, ...]
) -> None:
    async with open_lab(topology) as lab:
        client, server = lab["client"], lab[server_name]
        bound = await nursery.start(serve_identity, server)
        for address in (server.v4, server.v6, *foreign):
            seen = await identity_seen(client, address, bound.port)
            assert seen["local"] == written(address, bound.port)
            assert seen["peer"].startswith(f"[{client.v6}]:" if ":" in address else f"{client.v4}:")
        nursery.cancel_scope.cancel()


async def test_an_mtu_of_a_link_holds_on_both_ends(open_lab: OpenLab) -> None:
    async with open_lab(ROUTED) as lab:
        assert " mtu=1400 " in str(await lab["server"].dump())
        assert " mtu=1400 " in str(await lab["router"].dump())
        assert " mtu=1400 " not in str(await lab["client"].dump())


async def test_anyip_gives_a_client_many_sources(open_lab: OpenLab, nursery: trio.Nursery) -> None:
    many = Topology(
        links=SIDECAR.links,
        routes=(*SIDECAR.routes, Route("host", "203.0.113.0/24", "192.0.2.2")),
        anyip=(("client", "203.0.113.0/24"),),
    )
    async with open_lab(many) as lab:
        bound = await nursery.start(serve_identity, lab["host"])
        stream = await lab["client"].connect(lab["host"].v4, bound.port, source="203.0.113.77", source_port=4242)
        async with stream:
            assert json.loads(await stream.receive_some())["peer"] == "203.0.113.77:4242"
        nursery.cancel_scope.cancel()


async def test_addresses_are_told_by_interface(gateway_lab: Lab) -> None:
    gateway = gateway_lab["gateway"]
    assert (gateway.v4, gateway.v6) == ("192.0.2.1", "2001:db8:1::1")
    assert gateway.v4_on == {"eth0": "192.0.2.1", "eth1": "198.51.100.1"}
    assert gateway.v6_on == {"eth0": "2001:db8:1::1", "eth1": "2001:db8:2::1"}
    assert gateway.inode == namespace_inode(gateway.netns) == gateway.call(inode_of_this_thread)


def inode_of_this_thread() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


async def test_two_labs_with_the_same_addresses_do_not_see_each_other(open_lab: OpenLab) -> None:
    async with open_lab(GATEWAY) as one, open_lab(GATEWAY) as other, trio.open_nursery() as nursery:
        bound = await nursery.start(serve_identity, one["server"], 8080)
        await identity_seen(one["client"], one["server"].v4, bound.port)
        with pytest.raises(ConnectionRefusedError):
            await other["client"].connect(other["server"].v4, bound.port)
        nursery.cancel_scope.cancel()


async def test_the_namespace_of_the_test_process_stays_as_it_was(open_lab: OpenLab) -> None:
    inode, before = inode_of_this_thread(), read_state()
    async with open_lab(GATEWAY) as lab:
        await lab["gateway"].run("nft", "add table inet foreign")
        during = read_state()
    assert inode_of_this_thread() == inode
    assert during == before
    assert read_state() == before


def test_the_test_process_is_in_a_network_of_its_own() -> None:
    assert [line.split()[0] for line in read_state().links] == ["lo"]


async def test_a_lab_is_soon_there_again(open_lab: OpenLab) -> None:
    """Some tens of milliseconds; the first one of a process also imports pyroute2. Printed, because machines differ."""
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        async with open_lab(GATEWAY):
            seconds.append(time.perf_counter() - start)
    median_ms("a lab of three nodes", seconds[1:])


async def test_a_program_runs_inside_and_its_failure_is_told_with_its_output(gateway_lab: Lab) -> None:
    client = gateway_lab["client"]
    done = await client.run("readlink", "/proc/self/ns/net")
    assert done.stdout == f"net:[{client.inode}]\n"
    assert (await client.run("cat", input="words")).stdout == "words"
    assert (await client.run("sh", "-c", "echo $COLOUR", env={"COLOUR": "green"})).stdout == "green\n"
    assert (await client.run("false", check=False)).returncode == 1
    with pytest.raises(LabError, match=r"(?s)ended with 3.*the reason"):
        await client.run("sh", "-c", "echo the reason >&2; exit 3")
    with pytest.raises(LabError, match="no program 'no-such-program'"):
        await client.run("no-such-program")
    with pytest.raises(LabError, match=r"(?s)did not end within 0\.2 s.*so far"):
        await client.run("sh", "-c", "echo so far; exec sleep 1000", timeout=0.2)


async def test_a_program_is_killed_when_its_block_ends_or_is_cancelled(gateway_lab: Lab) -> None:
    client = gateway_lab["client"]
    async with client.process("sleep", "1000") as at_the_end:
        while_inside = at_the_end.returncode
    assert (while_inside, at_the_end.returncode) == (None, -signal.SIGKILL)
    with trio.CancelScope() as scope:
        async with client.process("sleep", "1000") as cancelled:
            scope.cancel()
            await trio.sleep_forever()
    assert cancelled.returncode == -signal.SIGKILL
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run, "sleep", "1000")
            await trio.testing.wait_all_tasks_blocked()
            running = processes_in({identity(client.netns)})
            scope.cancel()
    assert len(running) == 1
    assert processes_in({identity(client.netns)}) == []


async def test_a_program_is_talked_to_through_pipes_or_collected_output(gateway_lab: Lab) -> None:
    client = gateway_lab["client"]
    async with client.process("cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as cat:
        assert cat.stdin is not None
        assert cat.stdout is not None
        await cat.stdin.send_all(b"there and back")
        assert await cat.stdout.receive_some() == b"there and back"
        cat.stdin.close()
        assert await cat.wait() == 0
    script = "echo ready; echo also >&2; read line; echo got $line"
    async with client.process("sh", "-c", script, stdin=subprocess.PIPE, collect=True) as shell:
        assert await shell.wait_for_output("ready") == "ready"
        assert shell.stdin is not None
        await shell.stdin.send_all(b"it\n")
        assert await shell.wait() == 0
        assert (shell.stdout_text, shell.stderr_text) == ("ready\ngot it\n", "also\n")
        with pytest.raises(LabError, match=r"(?s)did not print 'never'.*ended with 0.*got it"):
            await shell.wait_for_output("never")


async def test_a_cancelled_lab_takes_its_processes_with_it(open_lab: OpenLab) -> None:
    with trio.CancelScope() as scope:
        async with open_lab(SIDECAR) as lab:
            namespaces = {identity(node.netns) for node in lab}
            async with lab["host"].process(sys.executable, "-c", DAEMON, collect=True) as parent:
                daemon = int((await parent.wait_for_output("daemon")).split()[1])
                pidfd = os.pidfd_open(daemon)
                scope.cancel()
                await trio.sleep_forever()
    try:
        assert select.select([pidfd], [], [], 0)[0], "the daemonised process outlived its lab"
    finally:
        os.close(pidfd)
    assert processes_in(namespaces) == []


async def test_closing_a_lab_kills_nobody_outside_of_it(open_lab: OpenLab) -> None:
    async with (
        outside("sleep", "1000") as stranger,
        open_lab(SIDECAR) as other,
        other["host"].process("sleep", "1000") as neighbour,
    ):
        async with open_lab(SIDECAR) as lab, lab["host"].process("sleep", "1000") as inside:
            pass
        assert (stranger.returncode, neighbour.returncode) == (None, None)
        assert inside.returncode == -signal.SIGKILL


async def test_nothing_is_left_when_the_test_run_is_killed(no_leaks: None) -> None:
    async with outside(sys.executable, "-c", LAB_TO_BE_KILLED) as run:
        told = json.loads(await run.wait_for_output("namespaces"))
        inodes = set(told["namespaces"])
        holders = holders_of(inodes)  # the run itself, its reaper, and whoever is inside
        assert {run.pid, *told["pids"]} < holders
        pidfds = [os.pidfd_open(pid) for pid in holders]
        try:
            run.send_signal(signal.SIGKILL)
            with trio.fail_after(2):
                for pidfd in pidfds:
                    await trio.lowlevel.wait_readable(pidfd)
        finally:
            for pidfd in pidfds:
                os.close(pidfd)
        # Nobody is in them and nobody holds them: so they are gone.
        assert holders_of(inodes) == set()


@asynccontextmanager
async def outside(*argv: str) -> AsyncIterator[LabProcess]:
    """A process of no lab, in the namespace of the test run."""
    own = open_namespace(os.getpid())
    try:
        search = os.pathsep.join(path for path in sys.path if path)
        async with open_process(own, argv, collect=True, env={"PYTHONPATH": search}) as process:
            yield process
    finally:
        os.close(own)


def holders_of(inodes: set[int]) -> set[int]:
    """Processes inside the namespaces, and those that have a descriptor of one."""
    names = {f"net:[{inode}]" for inode in inodes}
    found = set()
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                links = [process / "ns/net", *(process / "fd").iterdir()]
                if any(os.readlink(link) in names for link in links):
                    found.add(int(process.name))
            except OSError:
                continue  # it ended, or closed that descriptor, while we looked
    return found


async def test_a_dump_is_equal_until_something_changes_and_the_difference_is_readable(gateway_lab: Lab) -> None:
    gateway = gateway_lab["gateway"]
    before = await gateway.dump()
    assert await gateway.dump() == before
    await gateway.run("nft", "-f", "-", input="table inet x { set s { type inet_service; elements = { 80 }; }; }")
    await gateway.run("ip", "-6", "rule", "add", "pref", "5233", "fwmark", "0x1/0x1", "lookup", "133")
    await gateway.run("ip", "route", "add", "local", "default", "dev", "lo", "table", "133")
    gateway.set_sysctl("net.ipv4.tcp_fwmark_accept", 1)
    changed = before.diff(await gateway.dump()).splitlines()
    assert "+ nft table inet x {" in changed
    assert any(re.match(r"\+ rules v6 .*fwmark=1 .*priority=5233.* table=133", line) for line in changed)
    assert any(re.match(r"\+ routes v4 table=133 dev=lo ", line) for line in changed)
    assert "- sysctls net.ipv4.tcp_fwmark_accept = 0" in changed
    assert "+ sysctls net.ipv4.tcp_fwmark_accept = 1" in changed
    await gateway.run("nft", "delete table inet x")
    await gateway.run("ip", "-6", "rule", "del", "pref", "5233")
    await gateway.run("ip", "route", "del", "local", "default", "dev", "lo", "table", "133")
    gateway.set_sysctl("net.ipv4.tcp_fwmark_accept", 0)
    assert before.diff(await gateway.dump()) == ""


async def test_traffic_and_counters_do_not_change_a_dump(gateway_lab: Lab, nursery: trio.Nursery) -> None:
    gateway = gateway_lab["gateway"]
    gateway.call(activate_conntrack)
    remembers = (
        "table inet remembers {\n  set s { type ipv4_addr; size 100; flags dynamic,timeout; timeout 1h; }\n"
        "  chain c {\n    type filter hook prerouting priority 0;\n    add @s { ip saddr }\n  }\n}\n"
    )
    await gateway.run("nft", "-f", "-", input=remembers)
    bound = await nursery.start(serve_echo, gateway_lab["server"])
    before = [await node.dump() for node in gateway_lab]
    for address in (gateway_lab["server"].v4, gateway_lab["server"].v6):
        async with await gateway_lab["client"].connect(address, bound.port) as stream:
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
    assert gateway.call(conntrack_count) == 2
    assert [await node.dump() for node in gateway_lab] == before
    nursery.cancel_scope.cancel()


async def test_an_untouched_node_tracks_no_connection(sidecar_lab: Lab, nursery: trio.Nursery) -> None:
    bound = await nursery.start(serve_identity, sidecar_lab["host"])
    await identity_seen(sidecar_lab["client"], sidecar_lab["host"].v4, bound.port)
    assert sidecar_lab["host"].call(conntrack_count) == 0
    nursery.cancel_scope.cancel()


async def test_sink_and_source_count_every_byte_over_half_closed_connections(
    gateway_lab: Lab, nursery: trio.Nursery
) -> None:
    client, server = gateway_lab["client"], gateway_lab["server"]
    size = 1_000_003
    reports: list[Transfer] = []
    sink = await nursery.start(serve_sink, server)
    async with await client.connect(server.v6, sink.port) as stream:
        for chunk in payload(size):
            await stream.send_all(chunk)
        await stream.send_eof()
        assert b"".join([chunk async for chunk in stream]).decode() == f"{digest_of(size)} {size}\n"

    source = await nursery.start(partial(serve_source, server, size=size, report=reports.append))
    async with await client.connect(server.v4, source.port) as stream:
        received = b"".join([chunk async for chunk in stream])
        assert received == b"".join(payload(size))
        await stream.send_all(b"after your end")
        await stream.send_eof()
        with trio.fail_after(5):
            while not reports:
                await trio.testing.wait_all_tasks_blocked()
    assert (reports[0].received, reports[0].complete) == (len(b"after your end"), True)
    nursery.cancel_scope.cancel()


async def test_listeners_of_both_families_share_a_port(sidecar_lab: Lab) -> None:
    host = sidecar_lab["host"]
    four = host.listen("0.0.0.0", 8080)
    six = host.listen("::", 8080)
    async with four, six:
        with pytest.raises(OSError, match="in use"):
            host.listen(host.v4, 8080)
        assert four.socket.family == socket.AF_INET


async def test_a_connection_that_nobody_answers_ends_in_time(sidecar_lab: Lab) -> None:
    await sidecar_lab["host"].run(
        "nft", "add table inet x; add chain inet x in { type filter hook input priority 0; policy drop; }"
    )
    with pytest.raises(trio.TooSlowError):
        await sidecar_lab["client"].connect(sidecar_lab["host"].v4, 8080, timeout=0.05)


def test_a_topology_that_names_an_unknown_node_is_refused() -> None:
    link = Link("a:eth0", "b:eth0", v4="192.0.2.0/24")
    with pytest.raises(ValueError, match="node 'c' is on no link"):
        Topology(links=(link,), routes=(Route("c", "0.0.0.0/0", "192.0.2.1"),))
    with pytest.raises(ValueError, match="not of the form node:interface"):
        Topology(links=(Link("a", "b:eth0"),))


def test_counted_divides_but_never_to_nothing(counted: Callable[[int], int], request: pytest.FixtureRequest) -> None:
    divisor: int = request.config.option.count_divisor
    assert counted(1000) == 1000 // divisor
    assert counted(1) == 1
