"""Copies bytes both ways between two sockets until both have ended, one of them breaks, or nothing moves for too long.

What it keeps: order, half-close (a FIN is passed on, the other direction goes on), back-pressure (one read is written before
the next is made), and resets (the other side is reset too, after the bytes that came before).
"""

from __future__ import annotations

import socket
from typing import Literal

import trio

from tproxyd.config import Relay
from tproxyd.datapath import Outcome, Record
from tproxyd.net.sockets import is_closed_by_reset, unsent_bytes

__all__ = ["EndedError", "relay"]

_CHUNK = 65536
# A writer that blocks does not hear the other side's reset, because nobody reads there: ask this often, in seconds.
_LOOK_FOR_RESET = 0.05
# Bytes that a reset must not overtake: wait while the peer takes them, until it has taken none for this long, in seconds.
_FLUSH_STALL = 0.1


class EndedError(Exception):
    """The connection is over, with this outcome, and not by two FINs."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class _Side:
    """One socket and what its breaking means."""

    def __init__(self, sock: trio.socket.SocketType, on_reset: Outcome) -> None:
        self.sock = sock
        self.on_reset = on_reset


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
        self.outcome, self._seconds = (
            "half_close_timeout",
            min(self._config.half_close_timeout, self._config.idle_timeout),
        )
        self.moved()


async def relay(
    downstream: trio.socket.SocketType, upstream: trio.socket.SocketType, record: Record, config: Relay
) -> None:
    """Relays until both sides have sent their FIN; counts bytes in `record`. Closes nothing.

    Raises EndedError with client_reset, upstream_reset, idle_timeout or half_close_timeout; before a reset is reported, what came
    before it has been given to the other side, as far as that side took it.
    """
    client, server = _Side(downstream, "client_reset"), _Side(upstream, "upstream_reset")
    broken: Outcome | None = None

    async def copy(source: _Side, sink: _Side, counter: Literal["bytes_from_client", "bytes_from_upstream"]) -> None:
        nonlocal broken
        try:
            await _copy(source, sink, record, counter, clock)
        except EndedError as end:
            if broken is None:
                broken = end.outcome
            nursery.cancel_scope.cancel()
        else:
            clock.half_closed()

    async with trio.open_nursery() as nursery:
        clock = _Clock(nursery.cancel_scope, config)
        nursery.start_soon(copy, client, server, "bytes_from_client")
        nursery.start_soon(copy, server, client, "bytes_from_upstream")
    if broken is not None:
        await _flush(client if broken == "upstream_reset" else server)
        raise EndedError(broken)
    if nursery.cancel_scope.cancelled_caught:
        raise EndedError(clock.outcome)


async def _copy(
    source: _Side,
    sink: _Side,
    record: Record,
    counter: Literal["bytes_from_client", "bytes_from_upstream"],
    clock: _Clock,
) -> None:
    while True:
        try:
            data = await source.sock.recv(_CHUNK)
        except OSError as error:
            raise EndedError(source.on_reset) from error
        if not data:
            break
        setattr(record, counter, getattr(record, counter) + len(data))
        clock.moved()
        await _send(data, source, sink, clock)
    try:
        sink.sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        raise EndedError(sink.on_reset) from error


async def _send(data: bytes, source: _Side, sink: _Side, clock: _Clock) -> None:
    view = memoryview(data)
    while view:
        sent = 0
        try:
            with trio.move_on_after(_LOOK_FOR_RESET):
                sent = await sink.sock.send(view)
        except OSError as error:
            raise EndedError(sink.on_reset) from error
        if sent:
            view = view[sent:]
            clock.moved()
        elif is_closed_by_reset(source.sock):
            raise EndedError(source.on_reset)


async def _flush(side: _Side) -> None:
    """Waits until the peer has everything, or takes nothing any more. Polls: the kernel has no event for it."""
    pause, stalled, before = 0.001, 0.0, -1
    while stalled < _FLUSH_STALL:
        try:
            left = unsent_bytes(side.sock)
        except OSError:
            return  # gone: nothing can be flushed
        if left == 0:
            return
        stalled = 0.0 if left != before else stalled + pause
        before = left
        await trio.sleep(pause)
        pause = min(pause * 2, 0.02)
