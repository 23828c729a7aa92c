"""`Interceptor.reload`: what an embedding program has, its workloads and its handlers, goes over to another configuration and lives on."""

from __future__ import annotations

import socket
from collections import Counter
from typing import Any

import pytest
import trio

from netns_tests.pods import CONFIG, listen_to_events, open_pods
from netns_tests.watch import resets_within, until, works
from tproxyd import ConfigError, Connection, ConnectionStream, Forward, Handle, Record, kernel, open_interceptor
from tproxyd.testing import Node, serve_echo
from tproxyd.testing.plugin import OpenLab


def captured_ports(node: Node) -> str:
    """As the kernel's set has them."""
    table = node.call(kernel.observe).tables["tproxyd"]
    return table.partition("set ports {")[2].partition("elements = {")[2].partition("}")[0].strip()


def with_ports(*ports: str, **tables: Any) -> dict[str, Any]:
    return {**CONFIG, "capture": {"ports": list(ports)}, **tables}


async def test_each_workload_goes_over_with_its_overrides_and_its_connections(
    open_lab: OpenLab, nursery: trio.Nursery
) -> None:
    records: list[Record] = []
    async with (
        open_pods(open_lab, 3) as (plain, overridden, off),
        open_interceptor(CONFIG, on_record=records.append) as interceptor,
    ):
        for pod in (plain, overridden, off):
            for port in (8080, 9090):
                await nursery.start(serve_echo, pod.node, port)
        await interceptor.add_workload(plain.name, netns=plain.netns)
        ports = {"capture": {"ports": ["9090"]}}
        await interceptor.add_workload(overridden.name, netns=overridden.netns, overrides=ports)
        await interceptor.add_workload(off.name, netns=off.netns, overrides={"capture": {"mode": "off"}})
        async with (
            listen_to_events(interceptor) as seen,
            await plain.connect() as live,
            await overridden.connect(9090) as other,
        ):
            for stream in (live, other):
                await works(stream)
            new = with_ports("8080", "9999", listen={"port": 15007}, drain={"timeout": "0s"})
            assert await interceptor.reload(new) == [
                "capture.ports: 8080 -> 8080, 9999",
                "listen.port: 15006 -> 15007",
                "drain.timeout: 30 s -> 0 s",
            ]
            assert (captured_ports(plain.node), captured_ports(overridden.node)) == ("8080, 9999", "9090")
            assert off.node.call(kernel.observe).tables == {}
            assert interceptor.plan(overridden.name).listen[0] == ("127.0.0.1", 15007)
            for stream in (live, other):
                await works(stream)
            async with await overridden.connect(9090) as fresh:
                await works(fresh)
            await interceptor.reload(with_ports("9999", drain={"timeout": "0s"}))
            assert await resets_within(live, 3)
            await works(other)
            assert seen.events == []
            assert (await interceptor.stats())[overridden.name].active == 1
        # Who comes later has the new one, too.
        await interceptor.remove_workload(plain.name)
        await interceptor.add_workload(plain.name, netns=plain.netns)
        assert captured_ports(plain.node) == "9999"
        await until(lambda: len(records) == 3)
        kinds = Counter((one.workload, one.outcome) for one in records)
        assert kinds[plain.name, "drained"] == 1
        assert sum(kinds.values()) == 3
    nursery.cancel_scope.cancel()


async def test_a_workload_that_cannot_go_over_is_captured_anew_and_costs_no_other(
    open_lab: OpenLab, nursery: trio.Nursery
) -> None:
    """The new listener's port is taken in one of the namespaces."""
    async with open_pods(open_lab, 2) as (good, bad), open_interceptor(CONFIG) as interceptor:
        for pod in (good, bad):
            await nursery.start(serve_echo, pod.node, 8080)
            await interceptor.add_workload(pod.name, netns=pod.netns)
        async with listen_to_events(interceptor) as seen, await good.connect() as live, await bad.connect() as lost:
            for stream in (live, lost):
                await works(stream)
            async with bad.node.listen("127.0.0.1", 15007):
                await interceptor.reload({**CONFIG, "listen": {"port": 15007}})
                await works(live)
                told = await seen.until("failed", bad.name)
                assert "cannot listen on 127.0.0.1:15007" in told.detail
                assert await resets_within(lost, 3)
                await seen.until("failed", bad.name)
            await seen.until("added", bad.name)
            async with await bad.connect() as fresh:
                await works(fresh)
            await works(live)
    nursery.cancel_scope.cancel()


async def test_overrides_that_do_not_fit_to_the_new_configuration_refuse_it(open_lab: OpenLab) -> None:
    async with open_pods(open_lab, 2) as (one, other), open_interceptor(CONFIG) as interceptor:
        for pod in (one, other):
            await interceptor.add_workload(pod.name, netns=pod.netns, dial="agent")
        with pytest.raises(ConfigError) as refused:
            await interceptor.reload({**CONFIG, "upstream": {"source": "client"}})
        assert len(refused.value.problems) == 2
        with pytest.raises(ConfigError, match=r"`relay\.workers` cannot change at a reload"):
            await interceptor.reload({**CONFIG, "relay": {"workers": 2}})
        assert await interceptor.reload(CONFIG) == []


@pytest.mark.parametrize("number", [0, 1])
async def test_what_a_handler_has_it_keeps_unless_it_would_not_be_captured(
    open_lab: OpenLab, nursery: trio.Nursery, number: int
) -> None:
    handling: list[Connection] = []
    records: list[Record] = []

    async def shout(stream: ConnectionStream) -> None:
        handling.append(stream.connection)
        while chunk := await stream.receive_some():
            await stream.send_all(chunk.upper())

    async def policy(connection: Connection) -> Forward | Handle:
        return Handle(shout) if connection.original_destination[1] > 9000 else Forward()

    def config(*ports: str, **tables: Any) -> dict[str, Any]:
        return with_ports(*ports, **{"relay": {"workers": number}, "drain": {"timeout": "1s"}, **tables})

    async def shouts(stream: trio.SocketStream) -> None:
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"HELLO"

    async with (
        open_pods(open_lab, 1) as (pod,),
        open_interceptor(config("8080", "9090", "9091"), policy=policy, on_record=records.append) as interceptor,
    ):
        await nursery.start(serve_echo, pod.node, 8080)
        await interceptor.add_workload(pod.name, netns=pod.netns)
        async with await pod.connect(9090) as stays, await pod.connect(9091) as goes, await pod.connect() as live:
            await shouts(stays)
            await shouts(goes)
            await works(live)
            await interceptor.reload(config("8080", "9090", listen={"port": 15007}))
            await shouts(goes)
            assert await resets_within(goes, 3)
            await shouts(stays)
            await works(live)
            await stays.send_eof()
            assert await stays.receive_some() == b""
        await until(lambda: len(records) == 3)
        assert Counter(one.outcome for one in records) == {"drained": 1, "handled": 1, "closed": 1}
        assert len(handling) == 2
    nursery.cancel_scope.cancel()


async def test_a_program_s_own_listeners_go_on_under_another_policy(nursery: trio.Nursery) -> None:
    del nursery
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with open_interceptor(CONFIG, listeners=[listener]) as interceptor:
            assert await interceptor.reload({**CONFIG, "limits": {"max_connections": 10}}) == [
                "limits.max_connections: auto -> 10"
            ]
            assert await interceptor.reload({**CONFIG, "policy": {"default": "refuse"}}) == [
                "limits.max_connections: 10 -> auto",
                "policy.default: forward -> refuse",
            ]
            assert (await interceptor.stats())["host"].active == 0
