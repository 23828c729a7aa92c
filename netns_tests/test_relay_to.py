"""`relay_to`: both sockets of a handler's connection go to the relay loop, and what becomes of them, of the handler and of the record."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from netns_tests.both_ends import Seen, all_at_once, assert_is_payload, read, read_exactly, send
from netns_tests.watch import ends_within, files_of, relay_processes, reset, resets_within
from netns_tests.way import GATEWAY_V4, Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import LabProcess

# What a handler does is said by the port. Prints records, and "ended ..." after relay_to; SIGUSR2 is what some wait for, SIGTERM drains, SIGUSR1 closes at once.
PROGRAM = """
import signal, socket, ssl, sys, trio
from tproxyd import Connection, ConnectionStream, Handle, config_from_mapping, open_interceptor
from tproxyd.net.sockets import open_upstream

scopes, go = [], trio.Event()

async def dial(connection):
    family = socket.AF_INET6 if ":" in connection.source[0] else socket.AF_INET
    sock = socket.socket(fileno=open_upstream(family, source=connection.source).detach())
    try:
        sock.connect(connection.original_destination)
    except BlockingIOError:
        await trio.lowlevel.wait_writable(sock)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    return sock

async def relay(stream, upstream=None):
    upstream = upstream or await dial(stream.connection)
    await stream.relay_to(upstream)
    inner = upstream.socket if isinstance(upstream, trio.SocketStream) else upstream
    print("ended", stream.outcome, stream.received, stream.sent, inner.fileno(), stream.socket.fileno(), flush=True)

async def relay_stream(stream):
    await relay(stream, trio.SocketStream(trio.socket.from_stdlib_socket(await dial(stream.connection))))

async def relay_unix(stream):
    upstream = socket.socket(socket.AF_UNIX)
    upstream.connect(sys.argv[3])
    await relay(stream, upstream)

async def put_back(stream):
    stream._already = await stream.receive_some(4)  # as if it had been read before
    await stream.send_all(b"seen")
    await relay(stream)

async def relay_later(stream):
    upstream = await dial(stream.connection)
    print("holds", flush=True)
    await go.wait()
    await relay(stream, upstream)

async def cancelled(stream):
    with trio.CancelScope() as scope:
        scopes.append(scope)
        await relay(stream)
    print("cancelled", scope.cancelled_caught, stream.socket.fileno(), flush=True)

async def shielded(stream):
    with trio.CancelScope(shield=True):
        await relay(stream)

async def tls(stream):
    with ssl.create_default_context().wrap_socket(await dial(stream.connection), server_hostname="x", do_handshake_on_connect=False) as upstream:
        await stream.relay_to(upstream)

async def leave(stream):
    async def use():
        try:
            await relay(stream)
        except trio.ClosedResourceError:
            print("told that it is closed", flush=True)
    nursery.start_soon(use)
    await go.wait()

HANDLERS = [relay, relay_stream, relay_unix, put_back, relay_later, cancelled, shielded, tls, leave]

async def policy(connection):
    return Handle(HANDLERS[connection.original_destination[1] - 8090])

async def main():
    global nursery
    config = config_from_mapping({
        "capture": {"ports": ["8090-8099"]},
        "relay": {"workers": int(sys.argv[1]), "idle_timeout": sys.argv[2], "half_close_timeout": sys.argv[2]},
    })
    def on_lines(lines):
        sys.stdout.write(lines.decode())
        sys.stdout.flush()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2) as signals:
        async with (
            trio.open_nursery() as nursery,
            open_interceptor(config, policy=policy, on_lines=on_lines, own_namespace=True) as interceptor,
        ):
            print("open", flush=True)
            async for number in signals:
                if number == signal.SIGUSR2:
                    go.set()
                    for scope in scopes:
                        scope.cancel()
                    continue
                if number == signal.SIGTERM:
                    await interceptor.drain()
                break
            counters = await interceptor.counters()
            print("left", interceptor.connections, counters.active, counters.bytes_from_client, counters.bytes_from_upstream, flush=True)

trio.run(main)
"""

RELAY, STREAM, UNIX, PUT_BACK, LATER, CANCELLED, SHIELDED, TLS, LEAVE = range(8090, 8099)
HOMES = pytest.mark.parametrize("workers", [0, 1], ids=["a thread", "a process"])
UPSTREAMS = pytest.mark.parametrize("port", [RELAY, STREAM, UNIX], ids=["socket", "stream", "unix"])
SIZE = 5_000_001


class Program:
    """The program at work, and the Unix socket of its app."""

    def __init__(self, way: Way, process: LabProcess, unix: trio.socket.SocketType) -> None:
        self.way, self.process, self._unix = way, process, unix

    @asynccontextmanager
    async def both_ends(self, port: int) -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
        """The client's and the app's of a connection whose handler relays it."""
        async with (
            self.way.app.listen(self.way.bind, port) as tcp,
            await self.way.client.connect(self.way.address, port) as client,
        ):
            with trio.fail_after(5):
                app = trio.SocketStream((await self._unix.accept())[0]) if port == UNIX else await tcp.accept()
            async with app:
                yield client, app

    async def record(self, client: trio.SocketStream) -> dict[str, Any]:
        """What was recorded of it, while its stream is open."""
        source = format_address(client.socket.getsockname())
        with trio.fail_after(5):
            while True:
                found = self.records(source)
                if found:
                    (line,) = found  # one, and no more
                    return line
                await trio.sleep(0.01)

    def records(self, source: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.process.stdout_text.splitlines() if line.startswith("{")]
        return [line for line in lines if line["source"] == source]

    def files(self) -> Counter[str]:
        """Of all its processes. Spare pipes are the loop's to keep."""
        files = sum((files_of(pid) for pid in (self.process.pid, *relay_processes(self.process.pid))), Counter())
        files.pop("pipe", None)
        return files

    async def has_files(self, files: Counter[str]) -> None:
        with trio.move_on_after(3):
            while self.files() != files:
                await trio.sleep(0.01)
        assert self.files() == files


@asynccontextmanager
async def open_program(way: Way, workers: int, directory: Path, timeout: str = "1h") -> AsyncIterator[Program]:
    """At its end everything is as it was before: files, and the kernel's state."""
    before = await way.proxy.dump()
    path = str(directory / "app")
    with trio.socket.socket(socket.AF_UNIX) as listener:
        await listener.bind(path)
        listener.listen()
        words = (sys.executable, "-c", PROGRAM, str(workers), timeout, path)
        async with way.proxy.process(*words, collect=True) as process:
            await process.wait_for_output("open")
            program = Program(way, process, listener)
            files = program.files()
            yield program
            if process.returncode is None:
                await program.has_files(files)
                process.send_signal(signal.SIGTERM)
                assert (await process.wait_for_output("left 0 0")).startswith("left 0 0")
            with trio.fail_after(5):
                assert await process.wait() == 0
    assert "Traceback" not in process.stderr_text
    assert await way.proxy.dump() == before


def told(record: dict[str, Any]) -> tuple[str, int, int]:
    return record["outcome"], record["bytes_from_client"], record["bytes_from_upstream"]


@UPSTREAMS
@HOMES
@GATEWAY_V4
async def test_bulk_passes_whole_both_ways_at_once_and_the_record_says_to_whom(
    way: Way, workers: int, port: int, tmp_path: Path
) -> None:
    async with open_program(way, workers, tmp_path) as program, program.both_ends(port) as (client, app):
        seen = {"client": Seen(), "app": Seen()}

        async def say(stream: trio.SocketStream) -> None:
            await send(stream, SIZE)
            await stream.send_eof()

        with trio.fail_after(20):
            await all_at_once(
                partial(say, client),
                partial(say, app),
                partial(read, client, seen["client"]),
                partial(read, app, seen["app"]),
            )
            ended = await program.process.wait_for_output("ended")
        for one in seen.values():
            assert one.end == "orderly"
            assert_is_payload(one.data, SIZE)
        assert ended == f"ended None {SIZE} {SIZE} -1 -1"
        record = await program.record(client)
        assert told(record) == ("handled", SIZE, SIZE)
        where, own = format_address((way.address, port)), format_address(client.socket.getsockname())
        names = (f"unix:{tmp_path}/app", None) if port == UNIX else (where, own)
        assert (record["upstream"], record["upstream_source"]) == names


@UPSTREAMS
@HOMES
@GATEWAY_V4
async def test_31_a_half_close_passes_and_the_other_side_says_all_that_it_has(
    way: Way, workers: int, port: int, tmp_path: Path
) -> None:
    async with open_program(way, workers, tmp_path) as program:
        for first in ("client", "app"):
            async with program.both_ends(port) as (client, app):
                one, other = (client, app) if first == "client" else (app, client)
                with trio.fail_after(10):
                    await one.send_all(b"the end")
                    await one.send_eof()
                    assert await read_exactly(other, 7) == b"the end"
                    assert await other.receive_some() == b""
                    seen = Seen()
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(read, one, seen)
                        await send(other, SIZE)
                        await other.send_eof()
                assert seen.end == "orderly"
                assert_is_payload(seen.data, SIZE)
                moved = (7, SIZE) if first == "client" else (SIZE, 7)
                assert told(await program.record(client)) == ("handled", *moved)


@HOMES
@GATEWAY_V4
async def test_29_30_a_reset_passes_each_way_behind_the_bytes_and_the_handler_learns_which_side_it_was(
    way: Way, workers: int, tmp_path: Path
) -> None:
    async with open_program(way, workers, tmp_path) as program:
        for first, outcome in (("client", "client_reset"), ("app", "upstream_reset")):
            async with program.both_ends(RELAY) as (client, app):
                one, other = (client, app) if first == "client" else (app, client)
                source = format_address(client.socket.getsockname())
                with trio.fail_after(10):
                    await other.send_all(b"hello")
                    assert await read_exactly(one, 5) == b"hello"
                    await one.send_all(b"last words")
                    assert await read_exactly(other, 10) == b"last words"
                    await reset(one)
                    assert await resets_within(other, 1)
                    moved = (10, 5) if first == "client" else (5, 10)
                    ended = await program.process.wait_for_output(f"ended {outcome}")
                    while not (lines := program.records(source)):
                        await trio.sleep(0.01)
                assert ended == "ended {} {} {} -1 -1".format(outcome, *moved)
                assert [told(line) for line in lines] == [(outcome, *moved)]


@HOMES
@GATEWAY_V4
async def test_what_has_been_read_before_goes_first_and_what_the_handler_has_said_counts(
    way: Way, workers: int, tmp_path: Path
) -> None:
    async with (
        open_program(way, workers, tmp_path) as program,
        way.app.listen(way.bind, PUT_BACK) as listener,
        await way.client.connect(way.address, PUT_BACK) as client,
    ):
        with trio.fail_after(10):
            await client.send_all(b"head and body")
            async with await listener.accept() as app:
                assert await read_exactly(app, 13) == b"head and body"
                await app.send_all(b" answer")
                assert await read_exactly(client, 11) == b"seen answer"
                await app.send_eof()
                await client.send_eof()
                assert await client.receive_some() == await app.receive_some() == b""
            assert told(await program.record(client)) == ("handled", 13, 11)


@HOMES
@GATEWAY_V4
async def test_61_a_relay_that_its_handler_cancels_is_reset_on_both_sides_and_the_handler_says_how_it_ended(
    way: Way, workers: int, tmp_path: Path
) -> None:
    async with open_program(way, workers, tmp_path) as program, program.both_ends(CANCELLED) as (client, app):
        with trio.fail_after(10):
            await client.send_all(b"hello")
            assert await read_exactly(app, 5) == b"hello"
            program.process.send_signal(signal.SIGUSR2)
            assert await resets_within(client, 0.5)
            assert await resets_within(app, 0.5)
            assert await program.process.wait_for_output("cancelled") == "cancelled True -1"
            assert told(await program.record(client)) == ("handled", 5, 0)


@GATEWAY_V4
async def test_a_handler_that_ends_before_its_relay_has_both_sides_reset(way: Way, tmp_path: Path) -> None:
    async with open_program(way, 1, tmp_path) as program, program.both_ends(LEAVE) as (client, app):
        with trio.fail_after(10):
            await client.send_all(b"hello")
            assert await read_exactly(app, 5) == b"hello"
            program.process.send_signal(signal.SIGUSR2)
            assert await resets_within(client, 0.5)
            assert await resets_within(app, 0.5)
            await program.process.wait_for_output("told that it is closed")
            assert told(await program.record(client)) == ("handled", 5, 0)


@pytest.mark.parametrize("port", [RELAY, SHIELDED], ids=["a handler", "a handler that goes on"])
@HOMES
@GATEWAY_V4
async def test_61_the_end_of_the_block_resets_what_is_relayed_for_handlers(
    way: Way, workers: int, port: int, tmp_path: Path
) -> None:
    async with open_program(way, workers, tmp_path) as program, program.both_ends(port) as (client, app):
        with trio.fail_after(10):
            await client.send_all(b"hello")
            assert await read_exactly(app, 5) == b"hello"
            program.process.send_signal(signal.SIGUSR1)
            assert await resets_within(client, 1)
            assert await resets_within(app, 1)
            assert await program.process.wait() == 0
        assert told(await program.record(client)) == ("drained", 5, 0)
        if port == SHIELDED:
            assert "ended drained 5 0 -1 -1" in program.process.stdout_text


@HOMES
@GATEWAY_V4
async def test_a_drain_waits_for_what_is_relayed_for_a_handler(way: Way, workers: int, tmp_path: Path) -> None:
    async with open_program(way, workers, tmp_path) as program, program.both_ends(RELAY) as (client, app):
        with trio.fail_after(10):
            await client.send_all(b"hello")
            assert await read_exactly(app, 5) == b"hello"
            program.process.send_signal(signal.SIGTERM)
            assert not await ends_within(client, 0.3)
            for stream in (client, app):
                await stream.send_eof()
            assert await program.process.wait_for_output("left") == "left 0 0 5 0"
            assert await program.process.wait() == 0
        assert told(await program.record(client)) == ("handled", 5, 0)


@GATEWAY_V4
async def test_42_a_loop_that_dies_takes_what_it_relays_and_handlers_know_it(way: Way, tmp_path: Path) -> None:
    """One that has not begun to relay goes on, without a loop."""
    async with (
        open_program(way, 1, tmp_path) as program,
        program.both_ends(RELAY) as (client, app),
        program.both_ends(LATER) as (held, held_app),
    ):
        process = program.process
        with trio.fail_after(10):
            await client.send_all(b"hello")
            assert await read_exactly(app, 5) == b"hello"
            await process.wait_for_output("holds")
            (worker,) = relay_processes(process.pid)
            os.kill(worker, signal.SIGKILL)
            assert await ends_within(client, 1)
            assert await ends_within(app, 1)
            assert await process.wait_for_output("ended worker_lost") == "ended worker_lost 0 0 -1 -1"
            assert (await program.record(client))["outcome"] == "worker_lost"
            process.send_signal(signal.SIGUSR2)
            await held.send_all(b"to the end")
            assert await read_exactly(held_app, 10) == b"to the end"
            async with program.both_ends(STREAM) as (again, again_app):  # by the loop that has taken its place
                await again.send_all(b"again")
                assert await read_exactly(again_app, 5) == b"again"
                for stream in (again, again_app, held, held_app):
                    await stream.send_eof()
                assert told(await program.record(again)) == ("handled", 5, 0)
            assert told(await program.record(held)) == ("handled", 10, 0)
            process.send_signal(signal.SIGTERM)
            assert (await process.wait_for_output("left")).startswith("left 0 0 ")
            assert await process.wait() == 0


@GATEWAY_V4
async def test_21_a_loop_without_a_file_left_resets_what_it_is_to_relay_and_the_handler_knows_it(
    way: Way, tmp_path: Path
) -> None:
    async with open_program(way, 1, tmp_path) as program, program.both_ends(LATER) as (client, app):
        process = program.process
        with trio.fail_after(10):
            await process.wait_for_output("holds")
            (worker,) = relay_processes(process.pid)
            before = resource.prlimit(worker, resource.RLIMIT_NOFILE)
            resource.prlimit(worker, resource.RLIMIT_NOFILE, (3, before[1]))
            process.send_signal(signal.SIGUSR2)
            assert await ends_within(client, 1)  # the kernel closes what it cannot give
            assert await ends_within(app, 1)
            assert await process.wait_for_output("ended error") == "ended error 0 0 -1 -1"
            resource.prlimit(worker, resource.RLIMIT_NOFILE, before)
            assert told(await program.record(client)) == ("error", 0, 0)
            assert process.stderr_text.count("no file left") == 1


@HOMES
@GATEWAY_V4
async def test_the_loop_s_time_outs_are_those_of_what_it_relays_for_handlers(
    way: Way, workers: int, tmp_path: Path
) -> None:
    async with open_program(way, workers, tmp_path, timeout="300ms") as program:
        for outcome in ("idle_timeout", "half_close_timeout"):
            async with program.both_ends(RELAY) as (client, app):
                with trio.fail_after(10):
                    if outcome == "half_close_timeout":
                        await client.send_eof()
                        assert await app.receive_some() == b""
                    else:
                        assert await resets_within(app, 3)
                    assert await resets_within(client, 3)
                    await program.process.wait_for_output(f"ended {outcome} 0 0")
                assert told(await program.record(client)) == (outcome, 0, 0)


@GATEWAY_V4
async def test_what_tls_hides_is_not_relayed_in_the_clear(way: Way, tmp_path: Path) -> None:
    async with way.proxy.process(
        sys.executable, "-c", PROGRAM, "0", "1h", str(tmp_path / "none"), collect=True
    ) as process:
        await process.wait_for_output("open")
        async with way.app.listen(way.bind, TLS) as listener, await way.client.connect(way.address, TLS) as client:
            with trio.fail_after(5):
                async with await listener.accept() as app:
                    try:
                        await client.send_all(b"secret")
                    except trio.BrokenResourceError:
                        pass  # it has been reset by now, and an error is told once
                    else:
                        assert await resets_within(client, 3)
                    seen = await read(app, Seen())
                    assert not seen.data
        process.send_signal(signal.SIGTERM)
        with trio.fail_after(5):
            assert await process.wait() == 0
    assert "would lay open what TLS hides" in process.stderr_text
