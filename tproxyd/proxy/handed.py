"""One connection that a relay loop has handed over, from the policy's question to its end: `serve_handed`."""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from tproxyd.datapath import Outcome
from tproxyd.net.sockets import abort
from tproxyd.proxy.verdict import Connection, ConnectionStream, Forward, Handle, Policy, Refuse

__all__ = ["serve_handed"]

_log = logging.getLogger(__name__)


class Loop(Protocol):
    """What is told to the loop that the connection came from, in whose books it stays."""

    async def forward(self, connection: Connection, sock: socket.socket, target: tuple[str, int] | None) -> None: ...
    async def end(self, connection: Connection, outcome: Outcome, received: int, sent: int) -> None: ...


async def serve_handed(
    connection: Connection, sock: socket.socket, already: bytes, *, policy: Policy, timeout: float, loop: Loop
) -> None:
    """Asks the policy, for at most `timeout` seconds, and does as it says; closes the socket, or gives it back to the loop.

    `already` is what has been read from it. Whatever the embedding program raises costs this connection only; on cancellation
    the client is reset. Raises nothing but Cancelled.
    """
    outcome: Outcome | None = "drained"  # cancelled, unless somebody knows better
    received, sent = len(already), 0
    try:
        verdict = await _ask(policy, connection, timeout)
        if isinstance(verdict, Forward):
            outcome = None
            with trio.CancelScope(shield=True):  # what is left of its life is the loop's
                await loop.forward(connection, sock, verdict.target)
        elif isinstance(verdict, Refuse):
            outcome = "refused_by_policy"
        elif isinstance(verdict, Handle):
            sock.setblocking(False)
            stream = ConnectionStream(trio.SocketStream(trio.socket.from_stdlib_socket(sock)), connection, already)
            try:
                outcome = await _handle(verdict.handler, stream)
            finally:
                received, sent = stream.received, stream.sent
        else:
            outcome = "policy_error"
    finally:
        if outcome in (None, "handled"):
            sock.close()
        else:
            abort(sock)
        if outcome is not None:
            with trio.CancelScope(shield=True):
                await loop.end(connection, outcome, received, sent)


async def _ask(policy: Policy, connection: Connection, timeout: float) -> Forward | Refuse | Handle | None:
    """The policy's answer; None if it has none in time, or fails, or answers something else."""
    try:
        with trio.fail_after(timeout):
            verdict: object = await policy(connection)
    except trio.TooSlowError:
        _log.error("the policy did not answer within %g s for connection %s, which is refused", timeout, connection.id)
        return None
    except Exception:
        _log.exception("the policy failed for connection %s, which is refused", connection.id)
        return None
    if isinstance(verdict, Forward | Refuse | Handle):
        return verdict
    _log.error("the policy answered %r for connection %s, which is refused", verdict, connection.id)
    return None


async def _handle(handler: Callable[[ConnectionStream], Awaitable[None]], stream: ConnectionStream) -> Outcome:
    try:
        await handler(stream)
    except Exception as error:
        if isinstance(error, trio.BrokenResourceError):
            return "client_reset"
        _log.exception("the handler of connection %s failed, and its client is reset", stream.connection.id)
        return "policy_error"
    return "handled"
