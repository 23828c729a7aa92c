"""An embedding program's own policy: what it may answer, what it may do wrong, and that connections come to it and go back whole."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from netns_tests.watch import workers
from netns_tests.way import SIDECAR_V4, Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import LabProcess, serve_echo
from tproxyd.testing.daemon import LabDaemon

# Decides by the port that was dialled; serves until SIGTERM; prints records.
PROGRAM = """
import signal, sys, trio
from tproxyd import Connection, ConnectionStream, Forward, Handle, Refuse, config_from_mapping, open_interceptor

async def shout(stream: ConnectionStream) -> None:
    with_end = bytearray()
    while chunk := await stream.receive_some():
        with_end += chunk
    await stream.send_all(str(stream.connection.original_destination[1]).encode() + bytes(with_end).upper())

async def fail(stream):
    await stream.receive_some(1)
    raise ValueError("the handler's own mistake")

async def end_slowly(stream):
    try:
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            await trio.sleep(4)

async def policy(connection: Connection):
    match connection.original_destination[1]:
        case 8080: return Forward()
        case 8081: return Forward(target=(connection.original_destination[0], 8080))
        case 8082: return Refuse()
        case 8083: return Handle(shout)
        case 8084: raise ValueError("the policy's own mistake")
        case 8085: await trio.sleep_forever()
        case 8086: return "forward"
        case 8087: return Handle(fail)
        case 8089: return Handle(end_slowly)
        case 8088: return Forward(target=(connection.original_destination[0], "8080"))

async def main():
    config = config_from_mapping({
        "capture": {"ports": ["8080-8099"]}, "relay": {"workers": int(sys.argv[1])},
        "policy": {"rule": [{"name": "never", "ports": ["8099"], "action": "refuse"}]},
    })
    def on_record(record):
        print(record.source, record.outcome, record.bytes_from_client, record.bytes_from_upstream, record.rule, flush=True)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGUSR1) as signals:
        async with open_interceptor(config, policy=policy, policy_timeout=0.3, on_record=on_record, own_namespace=True) as interceptor:
            print("open", flush=True)
            async for number in signals:
                if number == signal.SIGTERM:
                    await interceptor.drain()
                break
            counters = await interceptor.counters()
            print("left", interceptor.connections, counters.active, sum(counters.outcomes.values()), flush=True)

trio.run(main)
"""


@asynccontextmanager
async def program(way: Way, workers: int) -> AsyncIterator[LabProcess]:
    async with way.proxy.process(sys.executable, "-c", PROGRAM, str(workers), collect=True) as process:
        await process.wait_for_output("open")
        yield process


async def exchange(way: Way, port: int, data: bytes) -> tuple[str, bytes | None]:
    """The client's address, and what came back by the server's FIN; None if it was reset."""
    try:
        stream = await way.client.connect(way.address, port)
    except ConnectionResetError:
        return "", None
    async with stream:
        own = format_address(stream.socket.getsockname())
        try:
            with trio.fail_after(3):
                await stream.send_all(data)
                await stream.send_eof()
                return own, b"".join([bytes(chunk) async for chunk in stream])
        except trio.BrokenResourceError:
            return own, None


@pytest.mark.parametrize(
    ("way", "number"), [("gateway v4", 0), ("gateway v4", 1), ("sidecar v6", 0), ("sidecar v6", 2)], indirect=["way"]
)
async def test_42_a_policy_decides_and_whatever_it_does_wrong_costs_one_connection(
    way: Way, nursery: trio.Nursery, number: int
) -> None:
    before = await way.proxy.dump()
    await nursery.start(serve_echo, way.app, 8080)
    async with program(way, number) as process:
        answers = {}
        for port, expected in {
            8080: (b"hello", "closed 5 5 None"),
            8081: (b"hello", "closed 5 5 None"),
            8082: (None, "refused_by_policy 0 0 None"),
            8083: (b"8083HELLO", "handled 5 9 None"),
            8084: (None, "policy_error 0 0 None"),
            8085: (None, "policy_error 0 0 None"),
            8086: (None, "policy_error 0 0 None"),
            8087: (None, "policy_error 1 0 None"),
            8088: (None, "policy_error 0 0 None"),
            8099: (None, "refused_by_policy 0 0 never"),
        }.items():
            told = len(process.stdout_text)
            own, answer = await exchange(way, port, b"hello")
            answers[port] = answer
            assert answer == expected[0], port
            while "\n" not in process.stdout_text[told:]:
                await trio.sleep(0.01)
            source, _, line = process.stdout_text[told:].strip().partition(" ")
            assert own in ("", source)
            assert line == expected[1]
        process.send_signal(signal.SIGTERM)
        assert await process.wait_for_output("left") == f"left 0 0 {len(answers)}"
        assert await process.wait() == 0
    assert "the policy's own mistake" in process.stderr_text
    assert "the handler's own mistake" in process.stderr_text
    assert await way.proxy.dump() == before


@SIDECAR_V4
async def test_42_a_hanging_policy_holds_nobody_else_up(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with program(way, 1), trio.open_nursery() as many:
        for _ in range(50):
            many.start_soon(exchange, way, 8085, b"x")
        began = trio.current_time()
        for _ in range(20):
            assert (await exchange(way, 8080, b"y"))[1] == b"y"
        assert trio.current_time() - began < 2


@SIDECAR_V4
async def test_42_a_handler_outlives_the_worker_that_its_connection_came_from(way: Way, nursery: trio.Nursery) -> None:
    """What was forwarded is lost with the worker and recorded; what a handler has goes on, and is waited for by a drain."""
    await nursery.start(serve_echo, way.app, 8080)
    async with program(way, 1) as process:
        handled = await way.client.connect(way.address, 8083)
        forwarded = await way.client.connect(way.address, 8080)
        async with handled, forwarded:
            await forwarded.send_all(b"x")
            assert await forwarded.receive_some() == b"x"
            await handled.send_all(b"before ")
            await trio.sleep(0.2)  # a report of the loop tells that both live
            (worker,) = workers(LabDaemon(process, ""))
            os.kill(worker, signal.SIGKILL)
            lost = format_address(forwarded.socket.getsockname())
            assert (await process.wait_for_output(f"{lost} ")).startswith(f"{lost} worker_lost ")
            assert (await exchange(way, 8080, b"again"))[1] == b"again"
            process.send_signal(signal.SIGTERM)
            await trio.sleep(0.2)
            assert process.returncode is None
            await handled.send_all(b"after")
            await handled.send_eof()
            with trio.fail_after(3):
                assert b"".join([bytes(chunk) async for chunk in handled]) == b"8083BEFORE AFTER"
            own = format_address(handled.socket.getsockname())
            assert await process.wait_for_output(f"{own} ") == f"{own} handled 12 16 None"
        assert await process.wait_for_output("left") == "left 0 0 3"
        assert await process.wait() == 0


@SIDECAR_V4
async def test_42_a_handler_that_ends_slowly_costs_no_other_its_record(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with program(way, 1) as process:
        slow = await way.client.connect(way.address, 8089)
        stays = await way.client.connect(way.address, 8080)
        async with slow, stays:
            await stays.send_all(b"x")
            assert await stays.receive_some() == b"x"
            process.send_signal(signal.SIGUSR1)
            own = format_address(stays.socket.getsockname())
            with trio.fail_after(10):
                assert await process.wait_for_output(f"{own} ") == f"{own} drained 1 1 None"
                assert await process.wait() == 0
