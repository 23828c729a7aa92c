"""What an embedding program's policy is asked, what it may answer, and the stream that a handler gets."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import msgspec
import trio

__all__ = ["Connection", "ConnectionStream", "Forward", "Handle", "Policy", "Refuse"]


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """A connection that has been accepted and not been decided about.

    `source`, `original_destination` and `target`, where the configuration would forward it to, are (address, port); a `target` that is a
    text is the path of a Unix socket. `id` is that of
    the access log, and `rule` the name of the configured rule that let it through, if one did.
    """

    id: str
    source: tuple[str, int]
    original_destination: tuple[str, int]
    target: tuple[str, int] | str
    workload: str = "host"
    rule: str | None = None


class Forward(msgspec.Struct, frozen=True):
    """Relay it, to `target` (address, port) if that is given, else to where the configuration says: a rule's target, or the original
    destination. ValueError if the target is none: an IP address in text, and a port from 1 to 65535."""

    target: tuple[str, int] | None = None

    def __post_init__(self) -> None:
        match self.target:
            case None:
                return
            case (str() as host, int() as port) if 1 <= port <= 65535:
                try:
                    socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
                except OSError:
                    pass
                else:
                    return
        raise ValueError(f"{self.target!r} is no target: give an IP address in text and a port from 1 to 65535")


class Refuse(msgspec.Struct, frozen=True):
    """Reset it."""


class Handle(msgspec.Struct, frozen=True):
    """Give it to `handler`, which gets a ConnectionStream and may take its time; when it returns, the stream is closed."""

    handler: Callable[[ConnectionStream], Awaitable[None]]


Policy = Callable[[Connection], Awaitable[Forward | Refuse | Handle]]
"""Asked once for each connection that the configuration does not refuse."""


class ConnectionStream(trio.abc.HalfCloseableStream):
    """The client's side of a connection, for a handler. `connection` tells whose it is.

    `received` and `sent` count bytes. A handler that raises, or is cancelled, resets the client: an orderly end would tell it
    that it has everything.
    """

    def __init__(self, stream: trio.SocketStream, connection: Connection, already: bytes) -> None:
        self.connection = connection
        self.received = len(already)
        self.sent = 0
        self.broken = False
        """The client has reset the connection, or is gone."""
        self._stream = stream
        self._already = already

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The next bytes, those first that had been read before; b"" at the client's FIN. Raises BrokenResourceError on a reset."""
        if self._already:
            await trio.lowlevel.checkpoint()
            size = len(self._already) if max_bytes is None else max_bytes
            chunk, self._already = self._already[:size], self._already[size:]
            return chunk
        with self._noting():
            data = bytes(await self._stream.receive_some(max_bytes))
        self.received += len(data)
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """All of it, or BrokenResourceError."""
        with self._noting():
            await self._stream.send_all(data)
        self.sent += len(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Back-pressure without data."""
        with self._noting():
            await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """A FIN; what the client says goes on."""
        with self._noting():
            await self._stream.send_eof()

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except trio.BrokenResourceError:
            self.broken = True
            raise

    async def aclose(self) -> None:
        """Closes it; harmless when repeated."""
        await self._stream.aclose()
