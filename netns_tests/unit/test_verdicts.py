"""What a policy may answer, and the stream that a handler gets."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest
import trio
import trio.testing

from tproxyd import Connection, ConnectionStream, Forward, HandOff
from tproxyd.datapath import EndedOrder
from tproxyd.proxy import Relaying, Sides

CONNECTION = Connection(
    id="0", source=("192.0.2.2", 4444), original_destination=("203.0.113.9", 80), target=("203.0.113.9", 80)
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def stream_on(sock: socket.socket, already: bytes) -> ConnectionStream:
    return ConnectionStream(sock, CONNECTION, already)


@pytest.mark.parametrize("target", [None, ("192.0.2.1", 80), ("2001:db8::1", 65535)])
def test_targets(target: tuple[str, int] | None) -> None:
    assert Forward(target).target == target


@pytest.mark.parametrize(
    "target",
    ["192.0.2.1:80", ("192.0.2.1", "80"), ("192.0.2.1", 0), ("192.0.2.1", 70000), ("app.example", 80), ("192.0.2.1",),
     (IPv4Address("192.0.2.1"), 80), ("[2001:db8::1]", 80), ("", 80)],
)  # fmt: skip
def test_what_is_no_target_is_refused_where_it_is_written(target: object) -> None:
    with pytest.raises(ValueError, match="is no target: give an IP address in text and a port from 1 to 65535"):
        Forward(target)  # type: ignore[arg-type]


async def test_what_had_been_read_already_comes_first(pair: tuple[socket.socket, socket.socket]) -> None:
    stream = stream_on(pair[0], b"already")
    pair[1].send(b" and then")
    assert await stream.receive_some(3) == b"alr"
    assert await stream.receive_some() == b"eady"
    assert await stream.receive_some() == b" and then"
    await stream.send_all(b"answer")
    await stream.send_eof()
    pair[1].shutdown(socket.SHUT_WR)
    assert await stream.receive_some() == b""
    assert pair[1].recv(100) == b"answer"
    assert (stream.received, stream.sent, stream.broken) == (16, 6, False)
    await stream.aclose()


async def test_a_client_that_is_gone_is_told_from_other_trouble(pair: tuple[socket.socket, socket.socket]) -> None:
    stream = stream_on(pair[0], b"")
    pair[1].close()
    with pytest.raises(trio.BrokenResourceError):
        await stream.send_all(b"x" * 1_000_000)
    assert stream.broken
    await stream.aclose()


async def test_a_stream_whose_calls_never_wait_lets_others_have_their_turn_and_can_be_cancelled(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    stream = stream_on(pair[0], b"")
    pair[1].send(b"x" * 10_000)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(1_000):
            assert await stream.receive_some(1) == b"x"
        assert turns >= 1_000 // 16 - 1
        nursery.cancel_scope.cancel()
        for _ in range(100):
            await stream.receive_some(1)
    assert stream.received < 1_000 + 32


async def test_one_task_sends_at_a_time_and_none_after_the_end(pair: tuple[socket.socket, socket.socket]) -> None:
    stream = stream_on(pair[0], b"")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, b"x" * 10_000_000)
        await trio.testing.wait_all_tasks_blocked()
        assert 0 < stream.sent < 10_000_000  # what the kernel has taken is told at once
        for call in (stream.send_all(b"y"), stream.send_eof(), stream.wait_send_all_might_not_block()):
            with pytest.raises(trio.BusyResourceError):
                await call
        nursery.cancel_scope.cancel()
    await stream.send_eof()
    await stream.send_eof()
    with pytest.raises(trio.ClosedResourceError):
        await stream.send_all(b"y")
    assert not stream.broken


async def test_who_waits_for_a_client_is_told_when_its_stream_is_closed(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    stream = stream_on(pair[0], b"")

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive_some()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await stream.aclose()
    for call in (stream.receive_some(), stream.send_all(b"y"), stream.wait_send_all_might_not_block()):
        with pytest.raises(trio.ClosedResourceError):
            await call
    await stream.aclose()
    assert not stream.broken


@pytest.mark.parametrize("size", [-1, 0])
async def test_nothing_cannot_be_asked_for(pair: tuple[socket.socket, socket.socket], size: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        await stream_on(pair[0], b"").receive_some(size)


@pytest.mark.parametrize("path", ["relative.sock", "", "/" + 107 * "x", "/a\0b", "/" + 54 * "é"])
def test_what_is_no_path_of_a_unix_socket_is_refused_where_it_is_written(path: str) -> None:
    with pytest.raises(ValueError, match="is no Unix socket's path"):
        HandOff(path)
    assert HandOff("/" + 106 * "x").otherwise


class CancelAt(trio.abc.Instrument):
    """Cancels the scope when so many steps of tasks have been taken."""

    def __init__(self, step: int, scope: trio.CancelScope) -> None:
        self.step, self.scope, self.seen = step, scope, 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.seen += 1
        if self.seen == self.step:
            self.scope.cancel()


class Reset(ConnectionStream):
    """Remembers whether it was: a Unix socket's peer is not told."""

    was_reset = False

    def abort(self) -> None:
        self.was_reset = True
        super().abort()


@pytest.mark.parametrize("wrapped", [False, True], ids=["socket", "stream"])
async def test_61_a_relay_that_is_cancelled_at_any_step_closes_its_upstream_and_gives_no_end_in_order(
    wrapped: bool,
) -> None:
    """Where no loop relays. With what had been read before, more than one buffer of it each way, and half-closes."""
    size = 600_000
    step = 0
    while True:
        step += 1
        (ours, client), (upstream, server) = socket.socketpair(), socket.socketpair()
        number = upstream.fileno()
        with ours, client, server:
            for end in (client, server):
                end.setblocking(False)
            stream = Reset(ours, CONNECTION, b"already")
            with trio.CancelScope() as scope:
                instrument = CancelAt(step, scope)
                trio.lowlevel.add_instrument(instrument)
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(_say, client, b"x" * size)
                        nursery.start_soon(_say, server, b"y" * size)
                        nursery.start_soon(_hear, client, size)
                        nursery.start_soon(_hear, server, size + 7)
                        given = trio.SocketStream(trio.socket.from_stdlib_socket(upstream)) if wrapped else upstream
                        await stream.relay_to(given)
                finally:
                    trio.lowlevel.remove_instrument(instrument)
            if given is upstream:
                assert upstream.fileno() < 0
            else:
                assert isinstance(given, trio.SocketStream)
                assert given.socket.fileno() < 0
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(number)
            if not scope.cancelled_caught:
                break
            assert ours.fileno() < 0
            assert stream.was_reset or stream.received == size + 7, step  # else it was through already
    assert (stream.received, stream.sent, stream.outcome) == (size + 7, size, None)
    assert step > 20


@pytest.mark.parametrize("wrapped", [False, True], ids=["socket", "stream"])
@pytest.mark.parametrize("given", [False, True], ids=["not given yet", "given"])
async def test_61_a_relay_that_is_cancelled_before_a_loop_has_it_or_after_leaves_no_socket_open_here(
    pair: tuple[socket.socket, socket.socket], wrapped: bool, given: bool
) -> None:
    class Forever:
        async def ended(self) -> EndedOrder:
            await trio.sleep_forever()

    async def relay(sides: Sides) -> Relaying:
        assert (sides.already, sides.received) == (b"already", 7)
        if not given:
            await trio.sleep_forever()
        return Forever()

    upstream, server = socket.socketpair()
    with server:
        stream = Reset(pair[0], CONNECTION, b"already", relay=relay)
        sock = trio.SocketStream(trio.socket.from_stdlib_socket(upstream)) if wrapped else upstream
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.relay_to, sock)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert stream.was_reset is not given  # else that is the loop's
        assert (sock.socket if isinstance(sock, trio.SocketStream) else sock).fileno() == stream.socket.fileno() == -1
        assert server.recv(1) == pair[1].recv(1) == b""


async def test_a_relay_whose_loop_has_died_is_done_without(pair: tuple[socket.socket, socket.socket]) -> None:
    async def relay(_: Sides) -> None:
        return None

    upstream, server = socket.socketpair()
    with server:
        stream = ConnectionStream(pair[0], CONNECTION, b"already", relay=relay)
        pair[1].send(b" and then")
        pair[1].shutdown(socket.SHUT_WR)
        server.send(b"answer")
        server.shutdown(socket.SHUT_WR)
        await stream.relay_to(upstream)
        assert (stream.received, stream.sent, stream.outcome) == (16, 6, None)
        assert server.recv(100) + server.recv(100) == b"already and then"
        assert pair[1].recv(100) == b"answer"


async def _say(sock: socket.socket, data: bytes) -> None:
    while data:
        await trio.lowlevel.wait_writable(sock)
        data = data[sock.send(data[:50_000]) :]
    sock.shutdown(socket.SHUT_WR)


async def _hear(sock: socket.socket, size: int) -> None:
    total = 0
    while True:
        await trio.lowlevel.wait_readable(sock)
        data = sock.recv(100_000)
        total += len(data)
        if not data:
            break
    assert total == size
