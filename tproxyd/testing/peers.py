"""The simple real servers that tests put behind an interception. Real sockets in a node, served by the test's own loop.

Knows four: echo, identity (who do you think I am?), sink and source (does every byte arrive, in order, and does half-close
get through?). Refuses to know what is between the client and them. Each runs until it is cancelled, and as a client's going
away is nothing that a test of the server cares about, a broken connection ends that connection and nothing else.

    bound = await nursery.start(serve_echo, lab["server"], 8080)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import trio

from tproxyd.net.sockets import format_address
from tproxyd.testing.node import Node

__all__ = ["Bound", "Transfer", "digest_of", "payload", "serve_echo", "serve_identity", "serve_sink", "serve_source"]

_CHUNK = 65536
# 65,521 is prime, so a lost or doubled block of any power of two shifts the rest and shows in the digest.
_BLOCK = hashlib.shake_256(b"tproxyd").digest(65521)


class Bound(NamedTuple):
    """Where a server listens; the address is "*" for both families."""

    address: str
    port: int


@dataclass(frozen=True)
class Transfer:
    """What a sink or source received on one connection: the byte count and the SHA-256, and whether the client ended it
    properly (`complete`) or the connection broke."""

    received: int
    sha256: str
    complete: bool


Report = Callable[[Transfer], None]
_Started = trio.TaskStatus[Bound]


def payload(size: int) -> Iterator[bytes]:
    """`size` bytes in chunks, always the same ones, that do not compress to a pattern a broken relay could produce."""
    whole, rest = divmod(size, len(_BLOCK))
    for _ in range(whole):
        yield _BLOCK
    if rest:
        yield _BLOCK[:rest]


def digest_of(size: int) -> str:
    """SHA-256 in hex of `payload(size)`."""
    digest = hashlib.sha256()
    for chunk in payload(size):
        digest.update(chunk)
    return digest.hexdigest()


async def serve_echo(
    node: Node, port: int = 0, *, address: str = "*", task_status: _Started = trio.TASK_STATUS_IGNORED
) -> None:
    """Sends back what comes, then half-closes after the client did."""
    await _serve(node, address, port, _echo, task_status)


async def serve_identity(
    node: Node, port: int = 0, *, address: str = "*", task_status: _Started = trio.TASK_STATUS_IGNORED
) -> None:
    """Answers with one JSON line {"peer": "ip:port", "local": "ip:port"} as its socket sees them, then reads to EOF."""
    await _serve(node, address, port, _identity, task_status)


async def serve_sink(
    node: Node,
    port: int = 0,
    *,
    address: str = "*",
    report: Report | None = None,
    task_status: _Started = trio.TASK_STATUS_IGNORED,
) -> None:
    """Reads to EOF, then answers "SHA256 COUNT\\n" and closes: so the answer crosses a connection that is half-closed."""
    await _serve(node, address, port, partial(_sink, report), task_status)


async def serve_source(
    node: Node,
    port: int = 0,
    *,
    size: int,
    address: str = "*",
    report: Report | None = None,
    task_status: _Started = trio.TASK_STATUS_IGNORED,
) -> None:
    """Sends `payload(size)` and half-closes, then reads what the client still says to its EOF; `report` is told of that."""
    await _serve(node, address, port, partial(_source, size, report), task_status)


async def _echo(stream: trio.SocketStream) -> None:
    while chunk := await stream.receive_some(_CHUNK):
        await stream.send_all(chunk)
    await stream.send_eof()


async def _identity(stream: trio.SocketStream) -> None:
    peer, local = stream.socket.getpeername(), stream.socket.getsockname()
    answer = json.dumps({"peer": format_address(peer), "local": format_address(local)})
    await stream.send_all(answer.encode() + b"\n")
    while await stream.receive_some(_CHUNK):
        pass


async def _sink(report: Report | None, stream: trio.SocketStream) -> None:
    transfer = await _receive(stream, report)
    if transfer.complete:
        await stream.send_all(f"{transfer.sha256} {transfer.received}\n".encode())


async def _source(size: int, report: Report | None, stream: trio.SocketStream) -> None:
    for chunk in payload(size):
        await stream.send_all(chunk)
    await stream.send_eof()
    await _receive(stream, report)


async def _receive(stream: trio.SocketStream, report: Report | None) -> Transfer:
    digest, received, complete = hashlib.sha256(), 0, False
    with suppress(trio.BrokenResourceError):
        while chunk := await stream.receive_some(_CHUNK):
            digest.update(chunk)
            received += len(chunk)
        complete = True
    transfer = Transfer(received, digest.hexdigest(), complete)
    if report is not None:
        report(transfer)
    return transfer


async def _serve(
    node: Node,
    address: str,
    port: int,
    handler: Callable[[trio.SocketStream], Awaitable[None]],
    task_status: _Started,
) -> None:
    async def handle(stream: trio.SocketStream) -> None:
        # OSError: getpeername of a connection that was reset before it was served is ENOTCONN.
        with suppress(trio.BrokenResourceError, OSError):
            await handler(stream)

    listeners = _listen(node, address, port)
    # They listen already: who connects before the first accept waits in the backlog.
    task_status.started(Bound(address, listeners[0].socket.getsockname()[1]))
    await trio.serve_listeners(handle, listeners)


def _listen(node: Node, address: str, port: int) -> list[trio.SocketListener]:
    if address != "*":
        return [node.listen(address, port)]
    first = node.listen("0.0.0.0", port)  # noqa: S104  # every address of a throwaway node is the point
    try:
        return [first, node.listen("::", first.socket.getsockname()[1])]
    except BaseException:
        first.socket.close()
        raise
