"""What a workload does that is root in its own network namespace, or whoever dials it: that is nobody else's trouble."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

import tproxyd
from netns_tests.watch import until
from tproxyd import kernel
from tproxyd.testing import Lab, Link, Node, Topology, serve_identity
from tproxyd.testing.plugin import OpenLab

PODS = Topology(
    links=tuple(
        Link(f"pod-{name}:eth0", f"client-{name}:eth0", v4="192.0.2.0/24", v6="2001:db8:1::/64") for name in "ab"
    )
)


@pytest.fixture
async def pods(open_lab: OpenLab, nursery: trio.Nursery) -> AsyncIterator[Lab]:
    """Two namespaces with an app each, and a client of each."""
    async with open_lab(PODS) as lab:
        for name in "ab":
            await nursery.start(serve_identity, lab[f"pod-{name}"], 8080)
        yield lab
        nursery.cancel_scope.cancel()


def wanted(pods: Lab) -> dict[str, str]:
    return {name: f"/proc/self/fd/{pods[f'pod-{name}'].netns}" for name in "ab"}


async def dial(pods: Lab, name: str, open_until: AsyncExitStack) -> trio.SocketStream:
    """A connection of a pod's client, accepted by the kernel, and perhaps by nobody else yet."""
    stream = await pods[f"client-{name}"].connect(pods[f"pod-{name}"].v4, 8080)
    return await open_until.enter_async_context(stream)


async def is_served(stream: trio.SocketStream, within: float) -> bool:
    """Whether the app has said something to it."""
    with trio.move_on_after(within):
        return await stream.receive_some() != b""
    return False


@pytest.mark.parametrize("workers", [0, 1], ids=["a thread", "a process"])
async def test_23_one_workload_cannot_take_the_room_of_all(pods: Lab, workers: int) -> None:
    """Of sixteen, four are kept for who has less than his share of them: two for each of two."""
    config = {
        "capture": {"ports": ["8080"]},
        "relay": {"workers": workers},
        "limits": {"max_connections": 16},
    }
    async with tproxyd.open_interceptor(config) as interceptor, AsyncExitStack() as live:
        await interceptor.sync_workloads(wanted(pods))
        greedy = [await dial(pods, "a", live) for _ in range(24)]
        for stream in greedy[:12]:
            assert await is_served(stream, 3)
        assert not await is_served(greedy[12], 0.2)
        modest = [await dial(pods, "b", live) for _ in range(3)]
        assert [await is_served(stream, 3) for stream in modest[:2]] == [True, True]
        assert not await is_served(modest[2], 0.2)
        # Who leaves makes room: first for who has less than his share, then for all.
        await modest[0].aclose()
        assert await is_served(modest[2], 3)
        for stream in greedy[:4]:
            await stream.aclose()
        await modest[1].aclose()
        for stream in greedy[12:15]:
            assert await is_served(stream, 3)
        # Alone, it may have all of it.
        await interceptor.remove_workload("b")
        for stream in greedy[15:20]:
            assert await is_served(stream, 3)
        assert not await is_served(greedy[20], 0.2)
        counted = (await interceptor.stats())["a"]
        assert (counted.accepted, counted.active) == (20, 16)


# As much as one process can: a route of tproxyd's own table, an address, or a chain in tproxyd's own table comes and goes.
FLOODS = {
    "routes": """
import socket, struct
route = struct.pack("=8BI", 2, 32, 0, 0, 133, 133, 0, 1, 0) + struct.pack("=HH4sHHi", 8, 1, bytes([203, 0, 113, 1]), 8, 4, 1)
def say(kind, flags): return struct.pack("=IHHII", 16 + len(route), kind, flags, 1, 0) + route
news = (say(24, 0x501) + say(25, 1)) * 50
sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
print("floods", flush=True)
while True: sock.send(news)
""",
    "addresses": """
import socket, struct
body = struct.pack("=4BI", 2, 32, 0, 0, 1) + struct.pack("=HH4s", 8, 2, bytes([203, 0, 113, 1]))
def say(kind, flags): return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body
news = (say(20, 0x501) + say(21, 1)) * 50
sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
print("floods", flush=True)
while True: sock.send(news)
""",
}


@pytest.mark.parametrize("flood", [*FLOODS])
async def test_53_a_flood_of_news_in_one_namespace_costs_the_program_little(pods: Lab, flood: str) -> None:
    """Loop and keeper hear it in this very process: that took it 40 to 60 % of a core, and takes 5."""

    async def look() -> None:
        async with await pods["client-b"].connect(pods["pod-b"].v4, 8080) as stream:
            assert await is_served(stream, 5)

    config = {"capture": {"ports": ["8080"]}, "relay": {"workers": 0}}
    async with tproxyd.open_interceptor(config) as interceptor:
        await interceptor.sync_workloads(wanted(pods))
        async with pods["pod-a"].process(sys.executable, "-c", FLOODS[flood], collect=True) as flooder:
            await flooder.wait_for_output("floods")
            used, began = time.process_time(), time.monotonic()
            for _ in range(20):
                await look()
                await trio.sleep(0.1)
            share = (time.process_time() - used) / (time.monotonic() - began)
            print(f"{share:.0%} of a core, of which the connections are a part")
            assert share < 0.25
        # And what is news of ours is news again.
        await pods["pod-a"].run("ip", "rule", "del", "priority", "5234")
        await until(lambda: interceptor.troubles == {} and "5234" in rules(pods["pod-a"]))


def rules(node: Node) -> str:
    return str(node.call(kernel.observe).rules)


FILL = """
table inet tproxyd {
  set more { type ipv4_addr . inet_service; elements = { %s } }
}
"""


async def test_a_huge_table_of_our_name_keeps_nobody_else_waiting(pods: Lab) -> None:
    """It was listed to its end, within the lock that all calls of libnftables share: 2.5 s and 230 MB for these 200,000 elements."""
    async with tproxyd.open_interceptor({"capture": {"ports": ["8080"]}}) as interceptor:
        await interceptor.sync_workloads({"a": wanted(pods)["a"]})
        before = await pods["pod-a"].dump()
        elements = (f"10.{n >> 16}.{n >> 8 & 255}.{n & 255} . 80" for n in range(200_000))
        memory = peak_kib(reset=True)
        slowest = 0.0

        async def come_and_go() -> None:
            nonlocal slowest
            while True:
                began = time.monotonic()
                await interceptor.add_workload("b", netns=wanted(pods)["b"])
                await interceptor.remove_workload("b")
                slowest = max(slowest, time.monotonic() - began)

        async with trio.open_nursery() as nursery, interceptor.events() as events:
            nursery.start_soon(come_and_go)
            await pods["pod-a"].run("nft", "-f", "-", input=FILL % ", ".join(elements), timeout=60)
            with trio.fail_after(20):
                while (await anext(events)).kind != "drift":
                    pass
            nursery.cancel_scope.cancel()
        memory = peak_kib() - memory
        print(f"the slowest took {slowest * 1000:.0f} ms; {memory} KiB more")
        assert slowest < 1.5
        assert memory < 100_000
        assert await pods["pod-a"].dump() == before


async def test_a_workload_with_very_many_rules_is_added_without_a_look_at_each(
    pods: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    """It would take seconds, in which the event loop and a loop in a thread stand still; who adds has one of eight places."""
    rules = "".join(f"tcp dport {port} meta mark set meta mark | 0x1 counter\n" for port in range(1, 10_000))
    await pods["pod-a"].run("nft", "-f", "-", input=f"table inet filter {{\nchain many {{\n{rules}}}\n}}\n")
    async with tproxyd.open_interceptor({"capture": {"ports": ["8080"]}}) as interceptor:
        await interceptor.sync_workloads(wanted(pods))
        assert interceptor.troubles == {}
        async with AsyncExitStack() as live:
            assert await is_served(await dial(pods, "a", live), 3)
    (told,) = [record.getMessage() for record in caplog.records if "too many nft rules" in record.getMessage()]
    assert told.startswith("workload a:")


def peak_kib(*, reset: bool = False) -> int:
    """The most memory that this process had, since it was last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])


# Of a dozen workloads some find no file left, each at another step; then there are files again.
SHORT_OF_FILES = """
import logging, os, resource, subprocess, trio
import tproxyd
from tproxyd import kernel
from tproxyd.net.namespaces import call_in_namespace, new_namespace

def switch_lo_on():
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)

async def main():
    logging.disable(logging.CRITICAL)
    namespaces = [new_namespace() for _ in range(12)]
    for namespace in namespaces:
        call_in_namespace(namespace, switch_lo_on)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with tproxyd.open_interceptor({"capture": {"ports": ["8080"]}}) as interceptor:
        for room in (4, 10, 30, 46, 52):
            wanted = {f"w{index}": namespace for index, namespace in enumerate(namespaces)}
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + room, hard))
            await interceptor.sync_workloads(wanted)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            print("failed", len(interceptor.troubles), "of", len(interceptor.workloads), flush=True)
            await interceptor.sync_workloads(wanted)
            with trio.fail_after(20):
                while interceptor.troubles:
                    await trio.sleep(0.05)
            assert len(interceptor.workloads) == 12
            await interceptor.sync_workloads({})
            for namespace in namespaces:
                left = call_in_namespace(namespace, kernel.observe)
                assert not (left.rules or left.routes or left.tables), left
        print("ends well", flush=True)

trio.run(main)
"""


async def test_21_without_files_a_workload_fails_alone_and_is_tried_again(sidecar_lab: Lab) -> None:
    """Neither an error of the system that nobody foresaw ends the interceptor, nor libnftables the process."""
    done = await sidecar_lab["host"].run(sys.executable, "-c", SHORT_OF_FILES, timeout=120, check=False)
    assert done.stdout.endswith("ends well\n"), done.stdout + done.stderr
    assert not done.stdout.startswith("failed 0")
