"""Copies bytes both ways between two sockets until both have ended, one of them breaks, or nothing moves for too long.

What it keeps: order, half-close (a FIN is passed on, the other direction goes on), back-pressure (one read is written before
the next is made), and resets (the other side is reset too, after the bytes that came before).
"""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import trio

from tproxyd.config import Relay
from tproxyd.datapath import EndedError, Outcome, Record
from tproxyd.net.sockets import round_trip_seconds, unsent_bytes

__all__ = ["ResetWatch", "relay"]

_CHUNK = 65536
# Bytes that a reset must not overtake: wait while the peer takes them, until it has taken none for this long, in seconds, or for two
# round trips, which is how often news of it comes.
_FLUSH_STALL = 0.05

_Counter = Literal["bytes_from_client", "bytes_from_upstream"]


class ResetWatch:
    """Hears resets on sockets that nobody reads at the moment: whoever waits for the other side to take bytes, for example.

    An epoll of its own that asks for nothing, because errors come unasked, however much unread data there is. It costs nothing
    while nothing happens. Made for any number of connections; whoever makes it runs `serve` and closes it.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._scopes: dict[int, trio.CancelScope] = {}

    def close(self) -> None:
        """Closes the epoll; nobody may watch any more."""
        self._epoll.close()

    async def serve(self) -> None:
        """Runs until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            for fd, event in self._epoll.poll(0):
                # EPOLLHUP alone is no reset: it also comes once both FINs have, with data still to be read.
                if event & select.EPOLLERR and fd in self._scopes:
                    self._scopes[fd].cancel()

    @contextmanager
    def watching(self, sock: socket.socket) -> Iterator[trio.CancelScope]:
        """Cancels the block when the socket is reset; the scope's `cancelled_caught` tells that it was."""
        fd = sock.fileno()
        with trio.CancelScope() as scope:
            self._epoll.register(fd, select.EPOLLET)
            self._scopes[fd] = scope
            try:
                yield scope
            finally:
                del self._scopes[fd]
                self._epoll.unregister(fd)


class _Side:
    """One socket, what its breaking means, and what has been read for it and not been taken yet."""

    def __init__(self, sock: socket.socket, on_reset: Outcome) -> None:
        self.sock = sock
        self.on_reset = on_reset
        self.pending = memoryview(b"")


class _Clock:
    """Ends the relay when no byte has moved for long enough. Moving the deadline is two assignments a chunk."""

    def __init__(self, scope: trio.CancelScope, config: Relay) -> None:
        self._scope = scope
        self._config = config
        self.outcome: Literal["idle_timeout", "half_close_timeout"] = "idle_timeout"
        self._seconds = config.idle_timeout
        self.moved()

    def moved(self) -> None:
        self._scope.deadline = trio.current_time() + self._seconds

    def half_closed(self) -> None:
        self.outcome = "half_close_timeout"
        self._seconds = min(self._config.half_close_timeout, self._config.idle_timeout)
        self.moved()


async def relay(
    downstream: socket.socket, upstream: socket.socket, record: Record, config: Relay, watch: ResetWatch
) -> None:
    """Relays between two non-blocking sockets until both sides have sent their FIN; counts bytes in `record`. Closes nothing.

    Raises EndedError with client_reset, upstream_reset, idle_timeout or half_close_timeout; before a reset is reported, what came
    before it has been given to the other side, as far as that side took it.
    """
    client, server = _Side(downstream, "client_reset"), _Side(upstream, "upstream_reset")
    broken: Outcome | None = None
    open_directions = 2

    async def direct(source: _Side, sink: _Side, counter: _Counter) -> None:
        nonlocal broken, open_directions
        try:
            await _copy(source, sink, record, counter, clock, watch)
            open_directions -= 1
            if open_directions:
                clock.half_closed()
                with watch.watching(source.sock):  # nobody reads there any more
                    await trio.sleep_forever()
                raise EndedError(source.on_reset)
        except EndedError as end:
            broken = broken or end.outcome
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        clock = _Clock(nursery.cancel_scope, config)
        nursery.start_soon(direct, client, server, "bytes_from_client")
        nursery.start_soon(direct, server, client, "bytes_from_upstream")
    if broken is not None:
        with trio.move_on_after(config.half_close_timeout):
            await _flush(client if broken == "upstream_reset" else server)
        raise EndedError(broken)
    if open_directions:
        raise EndedError(clock.outcome)


async def _copy(
    source: _Side, sink: _Side, record: Record, counter: _Counter, clock: _Clock, watch: ResetWatch
) -> None:
    """Copies one direction to its FIN and passes that on. EndedError if either side breaks."""
    while True:
        try:
            data = source.sock.recv(_CHUNK)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(source.sock)
            continue
        except OSError as error:
            raise EndedError(source.on_reset) from error
        if not data:
            break
        setattr(record, counter, getattr(record, counter) + len(data))
        clock.moved()
        await _send(data, source, sink, clock, watch)
        await trio.lowlevel.checkpoint()  # a fast peer must not keep the loop to itself
    try:
        sink.sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        raise EndedError(sink.on_reset) from error


async def _send(data: bytes, source: _Side, sink: _Side, clock: _Clock, watch: ResetWatch) -> None:
    sink.pending = memoryview(data)
    while sink.pending:
        try:
            sent = sink.sock.send(sink.pending)
        except BlockingIOError:
            with watch.watching(source.sock) as reset:
                await trio.lowlevel.wait_writable(sink.sock)
            if reset.cancelled_caught:
                raise EndedError(source.on_reset) from None
        except OSError as error:
            raise EndedError(sink.on_reset) from error
        else:
            sink.pending = sink.pending[sent:]
            clock.moved()


async def _flush(side: _Side) -> None:
    """Waits until the peer has everything, what is still pending included, or takes nothing any more.

    Polls: the kernel has no event for what the peer has taken.
    """
    try:
        patience = max(_FLUSH_STALL, 2 * round_trip_seconds(side.sock))
        pause, changed, before = 0.001, trio.current_time(), -1
        while trio.current_time() - changed < patience:
            with suppress(BlockingIOError):
                while side.pending:
                    side.pending = side.pending[side.sock.send(side.pending) :]
            left = len(side.pending) + unsent_bytes(side.sock)
            if left == 0:
                return
            if left != before:
                before, changed = left, trio.current_time()
            await trio.sleep(pause)
            pause = min(pause * 2, 0.02)
    except OSError:
        return  # gone: nothing can be flushed
