"""Traffic of workloads: each by its own configuration, counted and limited apart, whoever relays it and whichever worker dies."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from netns_tests.pods import CONFIG, ask, open_pods, path_of, served_right
from netns_tests.watch import attempt, dial, relay_processes, reset, resets_within, until, works
from tproxyd import (
    ConfigError,
    Connection,
    ConnectionStream,
    Forward,
    Handle,
    HandOff,
    Record,
    Refuse,
    open_interceptor,
    receive_connections,
)
from tproxyd.net.sockets import format_address
from tproxyd.testing import Link, Route, Topology, serve_echo, serve_identity
from tproxyd.testing.plugin import OpenLab

IN_EACH_HOME = pytest.mark.parametrize("number", [0, 2], ids=["thread", "processes"])


def with_workers(number: int, **tables: Any) -> dict[str, Any]:
    return CONFIG | {"relay": {"workers": number}} | tables


@IN_EACH_HOME
async def test_each_workload_has_its_own_mode(open_lab: OpenLab, nursery: trio.Nursery, number: int) -> None:
    async with open_pods(open_lab, 3) as pods, open_interceptor(with_workers(number)) as interceptor:
        for pod, mode in zip(pods, ("tproxy", "redirect", "off"), strict=True):
            await nursery.start(serve_identity, pod.node, 8080)
            await interceptor.add_workload(pod.name, netns=pod.netns, overrides={"capture": {"mode": mode}})
        for family in ("v4", "v6"):
            seen = []
            for pod in pods:
                own, peer, local = await ask(pod, family=family)
                assert local == format_address((getattr(pod.node, family), 8080))
                seen.append("client" if peer == own else "its address" if peer[0] == own[0] else "proxy")
            assert seen == ["its address", "proxy", "client"]  # and off is off: not relayed at all
        assert {name: counters.accepted for name, counters in (await interceptor.stats()).items()} == {
            pods[0].name: 2,
            pods[1].name: 2,
        }


@IN_EACH_HOME
async def test_each_workload_has_its_own_rules_and_upstreams(
    open_lab: OpenLab, nursery: trio.Nursery, number: int
) -> None:
    records: list[Record] = []
    rule = {"name": "nobody here", "ports": ["8080"], "action": "refuse"}
    async with (
        open_pods(open_lab, 4) as (refuses, loopback, as_itself, usual),
        open_interceptor(with_workers(number), on_record=records.append) as interceptor,
    ):
        overrides: dict[str, dict[str, Any]] = {
            refuses.name: {"policy": {"rule": [rule]}},
            loopback.name: {"upstream": {"target": "loopback"}},
            as_itself.name: {"upstream": {"source": "proxy"}},
            usual.name: {},
        }
        for pod in (refuses, loopback, as_itself, usual):
            await nursery.start(serve_identity, pod.node, 8080)
            await interceptor.add_workload(pod.name, netns=pod.netns, overrides=overrides[pod.name])
        await attempt(refuses.client, refuses.node.v4)
        own, seen, local = await ask(loopback)
        assert (seen[0], local) == (own[0], "127.0.0.1:8080")
        own, seen, local = await ask(as_itself)
        assert (seen[0], local) == (as_itself.node.v4, format_address((as_itself.node.v4, 8080)))
        await served_right(usual)
        await until(lambda: len(records) == 5)
        assert [(one.rule, one.outcome) for one in records if one.workload == refuses.name] == [
            ("nobody here", "refused_by_policy")
        ]
        assert {one.rule for one in records if one.workload != refuses.name} == {None}


@IN_EACH_HOME
async def test_the_same_client_in_two_workloads_is_two_clients(
    open_lab: OpenLab, nursery: trio.Nursery, number: int
) -> None:
    """The same addresses and ports at both ends, at the same time."""
    async with (
        open_pods(open_lab, 2) as pods,
        open_interceptor(with_workers(number)) as interceptor,
        AsyncExitStack() as stack,
    ):
        streams = []
        for pod in pods:
            await interceptor.add_workload(pod.name, netns=pod.netns)
            await nursery.start(serve_echo, pod.node, 8080)
            streams.append(
                await stack.enter_async_context(await pod.client.connect(pod.node.v4, 8080, source_port=40000))
            )
        one, other = streams
        assert one.socket.getsockname() == other.socket.getsockname()
        assert one.socket.getpeername() == other.socket.getpeername()
        await works(one)
        await works(other)
        await reset(one)
        await works(other)
        counted = await interceptor.stats()
        assert [counted[pod.name].accepted for pod in pods] == [1, 1]


@IN_EACH_HOME
async def test_24_what_one_source_may_have_it_may_have_in_each_workload(
    open_lab: OpenLab, nursery: trio.Nursery, number: int
) -> None:
    config = with_workers(number, limits={"max_connections_per_source": 2})
    async with open_pods(open_lab, 2) as pods, open_interceptor(config) as interceptor, AsyncExitStack() as stack:
        living = []
        for pod in pods:
            await interceptor.add_workload(pod.name, netns=pod.netns)
            await nursery.start(serve_echo, pod.node, 8080)
            for _ in range(2):
                living.append(await stack.enter_async_context(await pod.connect()))
                await works(living[-1])
            for _ in range(3):
                refused = await dial(pod.client, pod.node.v4)
                assert await resets_within(refused, 3)
                if refused is not None:
                    await refused.aclose()
        for stream in living:
            await works(stream)
        counted = await interceptor.stats()
        assert [counted[pod.name].outcomes for pod in pods] == [{"limit": 3}, {"limit": 3}]


async def test_06_a_worker_that_is_killed_is_replaced_for_every_workload(
    open_lab: OpenLab, nursery: trio.Nursery
) -> None:
    """One of two, then both; also for what is added and removed at that moment."""
    records: list[Record] = []
    async with (
        open_pods(open_lab, 4) as (one, two, comes, goes),
        open_interceptor(with_workers(2), on_record=records.append) as interceptor,
    ):
        for pod in (one, two, comes, goes):
            await nursery.start(serve_identity, pod.node, 8080)
        await interceptor.sync_workloads({pod.name: pod.netns for pod in (one, two, goes)})
        for pod in (one, two):
            for _ in range(4):
                await served_right(pod)
        first, second = relay_processes(os.getpid())
        for victims, ended in (([first], 16), ([], 40)):
            victims = victims or relay_processes(os.getpid())
            await until(lambda ended=ended: len(records) == ended and not interceptor.connections)  # type: ignore[misc]
            await (
                interceptor.stats()
            )  # what has been counted is told a moment after the records, and would die with who counts
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            if victims == [first]:
                with trio.fail_after(5):
                    await interceptor.remove_workload(goes.name)
                    await interceptor.add_workload(comes.name, netns=comes.netns)
            await until(lambda victims=victims: not {*victims} & {*relay_processes(os.getpid())})  # type: ignore[misc]
            await until(lambda: len(relay_processes(os.getpid())) == 2)
            for pod in (one, two, comes):
                for _ in range(4):  # each worker has some of them
                    await served_right(pod)
        assert second not in relay_processes(os.getpid())
        assert interceptor.troubles == {}
        await until(lambda: len(records) == 64 and not interceptor.connections)
        counted = await interceptor.stats()
        assert {name: counters.outcomes for name, counters in counted.items()} == {
            one.name: {"closed": 24},
            two.name: {"closed": 24},
            comes.name: {"closed": 16},
        }


@IN_EACH_HOME
async def test_a_policy_knows_whose_connection_it_is_asked_about(
    open_lab: OpenLab, nursery: trio.Nursery, tmp_path: Path, number: int
) -> None:
    """Forward, Refuse, Handle and HandOff, one a workload; where the connections look the same."""
    path = str(tmp_path / "handed")
    records: list[Record] = []

    async def tell(stream: ConnectionStream) -> None:
        await stream.send_all(f"{stream.connection.workload} {stream.connection.original_destination[0]}".encode())

    async def policy(connection: Connection) -> Forward | Refuse | Handle | HandOff:
        return verdicts[connection.workload]

    async with (
        open_pods(open_lab, 4) as pods,
        receive_connections(path) as received,
        open_interceptor(with_workers(number), policy=policy, on_record=records.append) as interceptor,
    ):
        forwards, refuses, handles, hands_off = pods
        verdicts: dict[str, Forward | Refuse | Handle | HandOff] = {
            forwards.name: Forward(),
            refuses.name: Refuse(),
            handles.name: Handle(tell),
            hands_off.name: HandOff(path),
        }
        for pod in pods:
            await nursery.start(serve_identity, pod.node, 8080)
            await interceptor.add_workload(pod.name, netns=pod.netns)
        await served_right(forwards, ["v4"])
        await attempt(refuses.client, refuses.node.v4)
        async with await handles.connect() as stream:
            assert await stream.receive_some() == f"{handles.name} {handles.node.v4}".encode()
        async with await hands_off.connect() as stream:
            with trio.fail_after(3):
                async with await received.receive() as theirs:
                    assert theirs.connection.workload == hands_off.name
                    await theirs.send_all(b"from the receiver")
            assert await stream.receive_some() == b"from the receiver"
        await until(lambda: len(records) == 4)
        assert {record.workload: record.outcome for record in records} == {
            forwards.name: "closed",
            refuses.name: "refused_by_policy",
            handles.name: "handled",
            hands_off.name: "handed_over",
        }


# What the agent's namespace reaches, and the pods do not.

AGENT = Topology(
    links=(
        Link("agent:eth0", "server:eth0", v4="198.51.100.0/24", v6="2001:db8:2::/64"),
        Link("pod:eth0", "client:eth0", v4="192.0.2.0/24", v6="2001:db8:1::/64"),
    ),
    routes=(
        Route("client", "0.0.0.0/0", "192.0.2.1"),
        Route("client", "::/0", "2001:db8:1::1"),
        Route("agent", "203.0.113.0/24", "198.51.100.2"),
        Route("agent", "2001:db8:f::/48", "2001:db8:2::2"),
    ),
    anyip=(("server", "203.0.113.0/24"), ("server", "2001:db8:f::/48")),
)

PROGRAM = """
import signal, sys, trio, tproxyd

async def main():
    config = {"capture": {"ports": ["8080"]}, "relay": {"workers": int(sys.argv[2])}}
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with tproxyd.open_interceptor(config) as interceptor:
            await interceptor.add_workload("pod", netns=sys.argv[1], dial="agent")
            print("open", flush=True)
            async for _ in signals:
                break

trio.run(main)
"""


@IN_EACH_HOME
async def test_with_dial_agent_the_server_sees_the_agent(open_lab: OpenLab, nursery: trio.Nursery, number: int) -> None:
    """Which has the way there; nothing in its namespace is changed."""
    async with open_lab(AGENT) as lab:
        agent, pod, client = lab["agent"], lab["pod"], lab["client"]
        await nursery.start(serve_identity, lab["server"], 8080)
        before = [await node.dump() for node in lab]
        words = (sys.executable, "-c", PROGRAM, path_of(pod), str(number))
        async with agent.process(*words, collect=True) as program:
            await program.wait_for_output("open")
            assert await agent.dump() == before[0]
            for address, as_whom in (("203.0.113.9", agent.v4), ("2001:db8:f::9", agent.v6)):
                async with await client.connect(address, 8080) as stream:
                    with trio.fail_after(3):
                        seen = json.loads(await stream.receive_some())
                assert seen["peer"].rpartition(":")[0].strip("[]") == as_whom
                assert seen["local"] == format_address((address, 8080))
            program.send_signal(signal.SIGTERM)
            assert await program.wait() == 0, program.stderr_text
        assert [await node.dump() for node in lab] == before


@pytest.mark.parametrize("upstream", [{"source": "client"}, {"target": "loopback"}], ids=str)
async def test_with_dial_agent_what_cannot_be_is_refused(open_lab: OpenLab, upstream: dict[str, str]) -> None:
    async with open_pods(open_lab, 1) as (pod,), open_interceptor(CONFIG) as interceptor:
        with pytest.raises(ConfigError, match=r"workload 'pod-0': with dial = \"agent\""):
            await interceptor.add_workload(pod.name, netns=pod.netns, dial="agent", overrides={"upstream": upstream})
        assert interceptor.workloads == ()
