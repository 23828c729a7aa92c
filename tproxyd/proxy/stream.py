"""The client's side of a connection, for whoever decides what is said there: a trio stream that asks the socket first.

trio.SocketStream makes two checkpoints and takes a lock for each call, which is most of what a small message costs. Here a call that the
socket can answer at once gives way only every so often, and one that has to wait waits as any other. `relay_to` is both directions of a
connection, for a handler that has decided and wants nothing of the bytes: a relay loop's work, where the connection has come from one that
lives. Else, in a process that was given the connection, or when the loop has died, it is done here. Refuses to know policies, and what a loop is.
"""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, Protocol

import trio

from tproxyd.datapath import EndedOrder, Outcome
from tproxyd.net.sockets import abort, reset_on_close, round_trip_seconds, unsent_bytes

if TYPE_CHECKING:
    from tproxyd.proxy.verdict import Connection

__all__ = ["ConnectionStream", "Relaying", "Sides"]

_TURNS = 16  # calls that need not wait before others have their turn, and a cancellation is noticed
_READ = 16 * 1024  # bytes read at a time: a TLS record, and what a small write can be
_BULK_READ = 256 * 1024  # the same after a full read
_RELAY_READ = 512 * 1024
"""Bytes that a relay reads at a time, and holds at most in each direction. CPU seconds per GB over one stream and over eight, medians of five rounds
with HAProxy's 0.77 and 0.90 beside them: 0.45 and 0.42 with 256 KiB, 0.37 and 0.35 with 512, 0.31 and 0.32 with 1 MiB."""

# Bytes that a reset must not overtake are waited for as the relay loop does it (datapath/connection.py).
_PATIENCE = 2.0  # seconds without progress; and two round trips at least
_LOOK, _LOOK_SELDOM = 0.002, 0.064  # seconds between two looks: the kernel has no event for what a peer has taken

_RELAYED_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)  # those that a relay loop knows

_buffers: trio.lowlevel.RunVar[bytearray | None] = trio.lowlevel.RunVar("tproxyd relay buffer", None)
"""What bulk is read into: one an event loop, because it is empty again before anybody waits."""


class Sides(NamedTuple):
    """What a loop is given to relay: both sockets, non-blocking, what has been read from the client and is to go first, and what has been moved so far."""

    client: socket.socket
    upstream: socket.socket | trio.socket.SocketType
    already: bytes
    received: int
    sent: int


class Relaying(Protocol):
    """A connection that a loop relays on copies of its sockets."""

    async def ended(self) -> EndedOrder:
        """Waits for its end, which the loop has recorded then. Cancelled, it resets both sides."""


class ConnectionStream(trio.abc.HalfCloseableStream):
    """The client's side of a connection. `connection` tells whose it is; `socket` is the non-blocking socket.

    `received` and `sent` count bytes. A handler that raises, or is cancelled, resets the client: an orderly end would tell it
    that it has everything. Unlike other streams of trio it is no checkpoint in every call, but in every sixteenth at least.
    One task may receive while another sends; two that do the same get BusyResourceError.
    """

    def __init__(
        self,
        sock: socket.socket,
        connection: Connection,
        already: bytes = b"",
        *,
        relay: Callable[[Sides], Awaitable[Relaying | None]] | None = None,
    ) -> None:
        """`relay` gives copies of both sockets to a loop; None from it: there is none any more."""
        sock.setblocking(False)
        self._relay = relay
        self.connection = connection
        self.socket = sock
        self.received = len(already)
        self.sent = 0
        self.broken = False
        """The client has reset the connection, or is gone."""
        self.outcome: Outcome | None = None
        """How `relay_to` ended, if that was not in order."""
        self._already = already
        self._size = _READ
        self._turns = _TURNS
        self._sending = False
        self._ended = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The next bytes, those first that had been read before; b"" at the client's FIN. Raises BrokenResourceError on a reset."""
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"{max_bytes} bytes cannot be received: at least one")
        await self._take_turn()
        size = self._size if max_bytes is None else max_bytes
        if self._already:
            chunk, self._already = self._already[:size], self._already[size:]
            return chunk
        while True:
            try:
                data = self.socket.recv(size)
            except BlockingIOError:
                await self._wait(reading=True)
            except OSError as error:
                raise self._broken(error) from error
            else:
                break
        self.received += len(data)
        if max_bytes is None:
            self._size = _BULK_READ if len(data) >= _READ else _READ
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """All of it, or BrokenResourceError. `sent` tells how much the kernel has taken, also if this is cancelled."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending to this client")
        if self._ended:
            raise trio.ClosedResourceError("send_eof was called")
        self._sending = True
        try:
            await self._take_turn()
            with memoryview(data) as view, view.cast("B") as left:
                await self._send(left)
        finally:
            self._sending = False

    async def _send(self, left: memoryview) -> None:
        begin = 0
        while True:
            try:
                count = self.socket.send(left[begin:] if begin else left)
            except BlockingIOError:
                await self._wait(reading=False)
                continue
            except OSError as error:
                raise self._broken(error) from error
            self.sent += count
            begin += count
            if begin >= len(left):
                return

    async def wait_send_all_might_not_block(self) -> None:
        """Back-pressure without data."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending to this client")
        await self._wait(reading=False)

    async def send_eof(self) -> None:
        """A FIN; what the client says goes on."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending to this client")
        await self._take_turn()
        if self._ended:
            return
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise self._broken(error) from error
        self._ended = True

    async def aclose(self) -> None:
        """Closes it; harmless when repeated."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """The same at once. Tasks that wait for the client get ClosedResourceError."""
        if self.socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self.socket)
            self.socket.close()

    def abort(self) -> None:
        """Closes it with a reset."""
        if self.socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self.socket)
            abort(self.socket)

    async def relay_to(self, upstream: socket.socket | trio.SocketStream) -> None:
        """Moves bytes both ways, what had been read before first, until both sides have ended, and closes both.

        `upstream` is a connected TCP or Unix socket, or a stream of one; it is this call's to close, also on cancellation,
        which resets both. A FIN is passed on as one. If a side breaks, the other one is reset after the bytes that came before; that is
        no error: `outcome` says which, and so does the record. The relay loop that the connection came from does it, with its `idle_timeout` and
        `half_close_timeout`; `received` and `sent` are told at the end, where the record is written; until then the stream counts as closed for all other calls. In a process that got the connection from
        `receive_connections`, and where that loop has died before, there is no time-out but the kernel's for peers that have vanished.
        Raises TypeError for an `ssl.SSLSocket`, whose bytes are not those of its connection.
        """
        if isinstance(upstream, ssl.SSLSocket):
            raise TypeError(
                "relay_to moves a socket's own bytes, and would lay open what TLS hides: relay in the handler"
            )
        already, self._already = self._already, b""
        if self._relay is not None and await self._relay_elsewhere(self._relay, upstream, already):
            return
        await _Relay(self, upstream).run(already)

    async def _relay_elsewhere(
        self,
        relay: Callable[[Sides], Awaitable[Relaying | None]],
        upstream: socket.socket | trio.SocketStream,
        already: bytes,
    ) -> bool:
        """Lets a loop do it, to the end; False if none does."""
        sock = upstream.socket if isinstance(upstream, trio.SocketStream) else upstream
        if sock.family not in _RELAYED_FAMILIES or sock.type != socket.SOCK_STREAM:
            return False
        try:
            if isinstance(sock, socket.socket):
                sock.setblocking(False)
            relaying = await relay(Sides(self.socket, sock, already, self.received, self.sent))
        except BaseException:
            with suppress(OSError):
                reset_on_close(sock)
            _close(sock)
            self.abort()
            raise
        if relaying is None:
            return False
        # A copy that is left open here would keep an end from being one.
        _close(sock)
        self.close()
        ended = await relaying.ended()
        self.received = max(self.received, ended.bytes_from_client)
        self.sent = max(self.sent, ended.bytes_from_upstream)
        if ended.outcome != "handled":
            self.outcome = ended.outcome
            self.broken = ended.outcome == "client_reset"
        return True

    async def _take_turn(self) -> None:
        self._turns -= 1
        if self._turns <= 0:
            self._turns = _TURNS
            await trio.lowlevel.checkpoint()

    async def _wait(self, *, reading: bool) -> None:
        self._turns = _TURNS
        if self.socket.fileno() < 0:
            raise trio.ClosedResourceError("this stream is closed")
        await (trio.lowlevel.wait_readable if reading else trio.lowlevel.wait_writable)(self.socket)

    def _broken(self, error: OSError) -> Exception:
        if self.socket.fileno() < 0 or error.errno == errno.EBADF:
            return trio.ClosedResourceError("this stream is closed")
        self.broken = True
        return trio.BrokenResourceError(f"the client is gone: {error.strerror}")


def _close(sock: socket.socket | trio.socket.SocketType) -> None:
    if isinstance(sock, socket.socket) and sock.fileno() >= 0:
        trio.lowlevel.notify_closing(sock)
    sock.close()  # trio's own tells who waits


class _Relay:
    """Both directions between a client and its upstream, where no loop relays them."""

    def __init__(self, stream: ConnectionStream, upstream: socket.socket | trio.SocketStream) -> None:
        self._stream = stream
        self._client = stream.socket
        self._given = upstream
        if isinstance(upstream, trio.SocketStream):
            # The same descriptor under a second object, which never closes it: what trio's own socket can do, it does with checkpoints.
            inner = upstream.socket
            self._upstream = socket.socket(inner.family, inner.type, inner.proto, inner.fileno())
        else:
            self._upstream = upstream
            upstream.setblocking(False)
        self._ended = 0
        self._scope = trio.CancelScope()
        buffer = _buffers.get()
        if buffer is None:
            _buffers.set(buffer := bytearray(_RELAY_READ))
        self._buffer = memoryview(buffer)

    async def run(self, already: bytes) -> None:
        orderly = False
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                nursery.start_soon(self._pump, self._upstream, self._client, b"")
                await self._pump(self._client, self._upstream, already)
            outcome = self._stream.outcome
            if outcome is None:
                orderly = True
                self._stream.close()
            else:
                await _flush(self._upstream if outcome == "client_reset" else self._client)
        finally:
            if not orderly:
                self._stream.abort()
            self._close_upstream(orderly=orderly)

    async def _pump(self, source: socket.socket, sink: socket.socket, held: bytes) -> None:
        """One direction, to its end: the source's FIN is passed on, or something broke."""
        stream, buffer = self._stream, self._buffer
        forth = source is self._client
        recv_into, send = source.recv_into, sink.send
        ask_again = not forth  # the first answer of a server is often its last, and its FIN is there with it
        if held and not await self._send_rest(sink, held):
            return None
        while True:
            try:
                count = recv_into(buffer)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(source)
                continue
            except OSError as error:
                self._break(source, error)
                return self._scope.cancel()  # it has been read to its end, and nothing can be said to it
            if not count:
                break
            if forth:
                stream.received += count
            try:
                sent = send(buffer[:count])
            except BlockingIOError:
                sent = 0
            except OSError as error:
                return self._break(sink, error)
            if not forth:
                stream.sent += sent
            if sent < count:
                if not await self._send_rest(sink, bytes(buffer[sent:count])):
                    return None
            elif count == _RELAY_READ:
                await trio.lowlevel.checkpoint()  # there is more, and others have their turn
            elif ask_again:
                ask_again = False
            else:
                # All that was there: what comes next is waited for without asking.
                await trio.lowlevel.wait_readable(source)
        if stream.outcome is None:  # else it is no end in order, but what is left of a reset
            self._ended += 1
            try:
                if self._ended < 2:  # after the second one both are closed
                    sink.shutdown(socket.SHUT_WR)
            except OSError as error:
                return self._break(sink, error)
        return None

    async def _send_rest(self, sink: socket.socket, data: bytes) -> bool:
        """What did not go at once. The buffer is the other connections' meanwhile. False if the sink broke."""
        while data:
            await trio.lowlevel.wait_writable(sink)
            try:
                sent = sink.send(data)
            except BlockingIOError:
                continue
            except OSError as error:
                self._break(sink, error)
                return False
            if sink is self._client:
                self._stream.sent += sent
            data = data[sent:]
        return True

    def _break(self, side: socket.socket, error: OSError) -> None:
        """A socket has failed. The first one says how the connection ended."""
        stream = self._stream
        if stream.outcome is None:
            if side is self._client:
                stream.broken = True
                stream.outcome = "client_reset"
            else:
                stream.outcome = "upstream_timeout" if error.errno == errno.ETIMEDOUT else "upstream_reset"
        # Found on sending: what that side had said before it broke is still read and passed on, as long as it is taken.
        self._scope.deadline = min(self._scope.deadline, trio.current_time() + _PATIENCE)

    def _close_upstream(self, *, orderly: bool) -> None:
        if self._upstream.fileno() < 0:
            return
        if not orderly:
            with suppress(OSError):
                reset_on_close(self._upstream)
        if isinstance(self._given, trio.SocketStream):
            self._upstream.detach()
            self._given.socket.close()
        else:
            if not orderly:  # else nobody waits for it any more
                trio.lowlevel.notify_closing(self._upstream)
            self._upstream.close()


async def _flush(sock: socket.socket) -> None:
    """Returns when the peer has all that it was sent, or takes no more of it."""
    left, pause = -1, _LOOK
    with suppress(OSError):  # gone, too
        patience = _PATIENCE if sock.family == socket.AF_UNIX else max(_PATIENCE, 2 * round_trip_seconds(sock))
        moved = trio.current_time()
        while (now_left := unsent_bytes(sock)) and trio.current_time() - moved < patience:
            if now_left != left:
                left, moved, pause = now_left, trio.current_time(), _LOOK
            await trio.sleep(pause)
            pause = min(2 * pause, _LOOK_SELDOM)
