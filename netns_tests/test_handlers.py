"""Handlers of an embedding program: what they relay, what they do wrong, and what a client meets then."""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
import trio.lowlevel

from netns_tests.both_ends import Seen, assert_is_payload, read, read_exactly, send
from netns_tests.watch import memory_kib, reset, resets_within, works
from netns_tests.way import GATEWAY_V4, Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import LabProcess, serve_echo
from tproxyd.testing.daemon import LabDaemon

# Decides by the port that was dialled; prints records; SIGTERM drains, SIGUSR1 closes at once.
PROGRAM = """
import os, signal, socket, sys, trio
from tproxyd import Connection, ConnectionStream, Forward, Handle, Refuse, config_from_mapping, open_interceptor
from tproxyd.net.sockets import open_upstream

leaked = []

async def dial(connection):
    family = socket.AF_INET6 if ":" in connection.source[0] else socket.AF_INET
    sock = socket.socket(fileno=open_upstream(family, source=connection.source).detach())
    try:
        sock.connect(connection.original_destination)
    except BlockingIOError:
        await trio.lowlevel.wait_writable(sock)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    return sock

async def relay(stream):
    await stream.relay_to(await dial(stream.connection))

async def relay_stream(stream):
    await stream.relay_to(trio.SocketStream(trio.socket.from_stdlib_socket(await dial(stream.connection))))

async def read_nothing(stream):
    await trio.sleep_forever()

async def leak(stream):
    async def use():
        try:
            await stream.receive_some()
        except trio.ClosedResourceError:
            print("told that it is closed", flush=True)
    await stream.send_all(b"mine")
    nursery.start_soon(use)
    leaked.append(stream)

async def close_early(stream):
    await stream.send_all(b"early")
    await stream.aclose()
    await trio.sleep(0.1)

async def go_on(stream):
    with trio.CancelScope(shield=True):
        await stream.send_all(b"here")
        try:
            await stream.receive_some()
        except trio.ClosedResourceError:
            print("taken away", flush=True)
        await trio.sleep(3)

async def policy(connection: Connection):
    match connection.original_destination[1]:
        case 8080: return Forward()
        case 8090: return Handle(relay)
        case 8091: return Handle(relay_stream)
        case 8092: return Handle(read_nothing)
        case 8093: return Handle(leak)
        case 8094: return Handle(close_early)
        case 8095: return Handle(go_on)

async def main():
    global nursery
    config = config_from_mapping({"capture": {"ports": ["8080-8099"]}, "relay": {"workers": int(sys.argv[1])}})
    def on_record(record):
        print(record.source, record.outcome, record.bytes_from_client, record.bytes_from_upstream, flush=True)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGUSR1) as signals:
        async with trio.open_nursery() as nursery:
            async with open_interceptor(config, policy=policy, on_record=on_record, own_namespace=True) as interceptor:
                print("open", flush=True)
                async for number in signals:
                    if number == signal.SIGTERM:
                        await interceptor.drain()
                    break
                counters = await interceptor.counters()
                print("left", interceptor.connections, counters.active, flush=True)
            print("closed", flush=True)

trio.run(main)
"""


@asynccontextmanager
async def program(way: Way, workers: int = 1) -> AsyncIterator[LabProcess]:
    async with way.proxy.process(sys.executable, "-c", PROGRAM, str(workers), collect=True) as process:
        await process.wait_for_output("open")
        yield process


async def record(process: LabProcess, stream: trio.SocketStream) -> str:
    """What was recorded of the client's connection, while the stream is open."""
    own = format_address(stream.socket.getsockname())
    return (await process.wait_for_output(f"{own} ")).removeprefix(f"{own} ")


@asynccontextmanager
async def both_ends(way: Way, port: int) -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    """The client's and the app's of a connection that a handler relays."""
    async with way.app.listen(way.bind, port) as listener, await way.client.connect(way.address, port) as client:
        with trio.fail_after(5):
            app = await listener.accept()
        async with app:
            yield client, app


RELAYED = pytest.mark.parametrize("port", [8090, 8091], ids=["socket", "stream"])
SIZE = 3_000_001


@RELAYED
@pytest.mark.parametrize(("way", "number"), [("gateway v4", 1), ("gateway v6", 0)], indirect=["way"])
async def test_what_a_handler_relays_arrives_whole_in_both_directions_also_after_a_fin(
    way: Way, port: int, number: int
) -> None:
    before = await way.proxy.dump()
    async with program(way, number) as process:
        for first in ("client", "app"):
            async with both_ends(way, port) as (client, app):
                assert app.socket.getpeername()[:2] == client.socket.getsockname()[:2]
                one, other = (client, app) if first == "client" else (app, client)
                with trio.fail_after(10):
                    await one.send_eof()
                    assert await other.receive_some() == b""
                    seen = Seen()
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(read, one, seen)
                        await send(other, SIZE)
                        await other.send_eof()
                assert seen.end == "orderly"
                assert_is_payload(seen.data, SIZE)
                moved = (0, SIZE) if first == "client" else (SIZE, 0)
                assert await record(process, client) == "handled {} {}".format(*moved)
        process.send_signal(signal.SIGTERM)
        assert await process.wait_for_output("left") == "left 0 0"
        assert await process.wait() == 0
    assert process.stderr_text == ""
    assert await way.proxy.dump() == before


@RELAYED
@GATEWAY_V4
async def test_29_30_a_handler_s_relay_passes_a_reset_on_after_the_bytes_before_it(way: Way, port: int) -> None:
    async with program(way) as process:
        for first, outcome in (("client", "client_reset"), ("app", "upstream_reset")):
            async with both_ends(way, port) as (client, app):
                one, other = (client, app) if first == "client" else (app, client)
                with trio.fail_after(10):
                    for end, data in ((one, b"from one"), (other, b"from the other")):
                        await end.send_all(data)
                        back = other if end is one else one
                        assert await read_exactly(back, len(data)) == data
                    own = format_address(client.socket.getsockname())
                    await one.send_all(b"last words")
                    await trio.sleep(
                        0.05
                    )  # they are sent; a reset that overtakes them on the wire is the kernel's right
                    await reset(one)
                    assert await read_exactly(other, 10) == b"last words"
                    assert await resets_within(other, 1)
                    line = await process.wait_for_output(f"{own} ")
                moved = "18 14" if first == "client" else "14 18"
                assert line == f"{own} {outcome} {moved}"
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    assert process.stderr_text == ""  # nothing of it is an error


@GATEWAY_V4
async def test_30_what_a_server_has_said_reaches_a_slow_client_before_the_reset(way: Way) -> None:
    async with program(way) as process, both_ends(way, 8090) as (client, app):
        with trio.fail_after(15):
            await send(app, 200_000)
            await trio.sleep(0.1)
            await reset(app)
            seen = await read(client, Seen(), size=4096, pause=0.02, pauses=20)
            assert seen.end == "reset"
            assert_is_payload(seen.data, 200_000)
            assert await record(process, client) == "upstream_reset 0 200000"


@GATEWAY_V4
async def test_30_a_reset_behind_an_answer_that_waits_lets_it_through_and_is_no_end_in_order(way: Way) -> None:
    """The client does not read, so nothing is read from the server; then it speaks, and the server is gone."""
    async with program(way) as process, both_ends(way, 8090) as (client, app):
        with trio.fail_after(15):
            sent = 0
            with trio.move_on_after(0.5):  # until nothing more is taken
                while True:
                    sent += await app.socket.send(b"y" * 65536)
            await reset(app)
            await client.send_all(b"anybody there?")
            seen = await read(client, Seen())
            assert seen.end == "reset"
            assert 1_000_000 < len(seen.data) <= sent
            # Whether what it has said was read depends on which of the two was noticed first.
            lines = [f"upstream_reset {said} {len(seen.data)}" for said in (0, 14)]
            assert await record(process, client) in lines


@GATEWAY_V4
async def test_33_a_relay_of_a_handler_that_finds_no_reader_takes_no_memory(way: Way) -> None:
    async with program(way) as process, both_ends(way, 8090) as (client, app):
        await _is_blocked_without_memory(process, client)
        await reset(app)
        assert await resets_within(client, 3)


@GATEWAY_V4
async def test_33_a_handler_that_does_not_read_blocks_its_client_and_takes_no_memory(way: Way) -> None:
    async with program(way) as process, await way.client.connect(way.address, 8092) as client:
        await _is_blocked_without_memory(process, client)
        process.send_signal(signal.SIGUSR1)
        assert await resets_within(client, 1)
        assert (await record(process, client)).startswith("drained ")


async def _is_blocked_without_memory(process: LabProcess, client: trio.SocketStream) -> None:
    daemon = LabDaemon(process, "")
    await trio.lowlevel.checkpoint()
    before = memory_kib(daemon, anonymous=True)
    pushed = 0
    chunk = b"x" * 65536
    while True:
        with trio.move_on_after(1) as scope:  # a second without a byte: it is blocked
            pushed += await client.socket.send(chunk)
        if scope.cancelled_caught:
            break
        assert pushed < 64 * 2**20, "nobody reads, and it is taken all the same"
    assert memory_kib(daemon, anonymous=True) - before < 2048


@GATEWAY_V4
async def test_a_handler_that_keeps_its_stream_loses_it_at_its_end(way: Way) -> None:
    async with program(way) as process:
        async with await way.client.connect(way.address, 8093) as client:
            with trio.fail_after(3):
                assert b"".join([bytes(chunk) async for chunk in client]) == b"mine"
                await process.wait_for_output("told that it is closed")
                assert await record(process, client) == "handled 0 4"
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


@GATEWAY_V4
async def test_a_handler_that_closes_early_has_handled_its_connection(way: Way) -> None:
    async with program(way) as process:
        async with await way.client.connect(way.address, 8094) as client:
            with trio.fail_after(3):
                assert b"".join([bytes(chunk) async for chunk in client]) == b"early"
                assert await record(process, client) == "handled 0 5"
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    assert process.stderr_text == ""


@pytest.mark.parametrize("number", [0, 1])
@GATEWAY_V4
async def test_63_a_handler_that_goes_on_after_its_cancellation_keeps_nothing_but_itself(way: Way, number: int) -> None:
    """Its client, the others and the kernel's state do not wait for it; only the block does, as trio has it."""
    before = await way.proxy.dump()
    async with program(way, number) as process, trio.open_nursery() as nursery:
        await nursery.start(serve_echo, way.app, 8080)
        stubborn = await way.client.connect(way.address, 8095)
        forwarded = await way.client.connect(way.address, 8080)
        idle = await way.client.connect(way.address, 8092)
        async with stubborn, forwarded, idle:
            assert await read_exactly(stubborn, 4) == b"here"
            await works(forwarded)
            with trio.fail_after(2):
                process.send_signal(signal.SIGUSR1)
                for stream in (idle, stubborn, forwarded):
                    assert await resets_within(stream, 1)
                await process.wait_for_output("taken away")
                for stream, moved in ((stubborn, "0"), (idle, "0 0"), (forwarded, "5 5")):
                    assert (await record(process, stream)).startswith(f"drained {moved}")
                while await way.proxy.dump() != before:
                    await trio.sleep(0.01)
            assert process.returncode is None
            with trio.fail_after(5):
                assert await process.wait() == 0
            own = format_address(stubborn.socket.getsockname())
        assert process.stdout_text.count(f"{own} ") == 1
        assert "goes on although it was cancelled" in process.stderr_text
        nursery.cancel_scope.cancel()


@GATEWAY_V4
async def test_42_63_handlers_at_work_and_static_connections_do_not_disturb_each_other(way: Way) -> None:
    """64 handlers relay, one after the other loses its client, and every connection that the policy forwards is served."""
    async with program(way) as process, trio.open_nursery() as servers:
        for port in (8080, 8090):
            await servers.start(serve_echo, way.app, port)

        async def talk(port: int, *, breaks: bool) -> None:
            async with await way.client.connect(way.address, port) as stream:
                for _ in range(50):
                    await works(stream)
                if breaks:
                    await reset(stream)
                else:
                    await stream.send_eof()
                    assert await stream.receive_some() == b""

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for number in range(64):
                    nursery.start_soon(partial(talk, 8090, breaks=number % 4 == 0))
                    if number % 2:
                        nursery.start_soon(partial(talk, 8080, breaks=False))
        process.send_signal(signal.SIGTERM)
        assert await process.wait_for_output("left") == "left 0 0"
        assert await process.wait() == 0
        outcomes = [line.split()[1:] for line in process.stdout_text.splitlines() if ":" in line]
        assert sorted(outcomes) == sorted(
            48 * [["handled", "250", "250"]] + 16 * [["client_reset", "250", "250"]] + 32 * [["closed", "250", "250"]]
        )
        assert process.stderr_text == ""
        servers.cancel_scope.cancel()
