"""One connection that a relay loop has handed over, from the policy's question to its end: `serve_handed`."""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

import trio

from tproxyd.datapath import Outcome
from tproxyd.net.sockets import abort
from tproxyd.proxy.handoff import NoReceiverError, Receivers
from tproxyd.proxy.stream import ConnectionStream, Relaying, Sides
from tproxyd.proxy.verdict import Connection, Forward, Handle, HandOff, Policy, Refuse

__all__ = ["Complaints", "serve_handed"]

_log = logging.getLogger(__name__)

_LIVES_ON = (None, "handled", "handed_over")  # outcomes after which a reset would be wrong

_SAY_EVERY = 5.0  # seconds between two log lines of one kind
_KINDS = 64  # more are looked through for those that are long ago: a path that is handed off to is a kind


class Loop(Protocol):
    """What is told to the loop that the connection came from, in whose books it stays."""

    def handles(self, connection: Connection, stream: ConnectionStream) -> None: ...
    async def forward(self, connection: Connection, sock: socket.socket, target: tuple[str, int] | None) -> None: ...
    async def relay(self, connection: Connection, sides: Sides) -> Relaying | None: ...
    async def end(self, connection: Connection, outcome: Outcome, received: int, sent: int) -> None: ...


class Complaints:
    """What goes wrong with policies and handlers, in the log: of each kind one line in five seconds, because clients can cause it."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}

    def tell(self, message: str, *args: object, kind: str = "", trace: bool = False) -> None:
        """An error, with the traceback of the exception that is being handled if `trace`. Those of another `kind` are told apart."""
        now = trio.current_time()
        if now - self._said.get(message + kind, -math.inf) >= _SAY_EVERY:
            if len(self._said) >= _KINDS:
                self._said = {key: said for key, said in self._said.items() if now - said < _SAY_EVERY}
            self._said[message + kind] = now
            _log.error(message, *args, exc_info=trace)


async def serve_handed(
    connection: Connection,
    sock: socket.socket,
    already: bytes,
    *,
    policy: Policy,
    timeout: float,
    loop: Loop,
    receivers: Receivers,
    complaints: Complaints,
) -> None:
    """Asks the policy, for at most `timeout` seconds, and does as it says; closes the socket, or gives it back to the loop, or to a receiver.

    `already` is what has been read from it. Whatever the embedding program raises costs this connection only; on cancellation
    the client is reset. Raises nothing but Cancelled.
    """
    outcome: Outcome | None = "drained"  # cancelled, unless somebody knows better
    received, sent = len(already), 0
    try:
        verdict = await _ask(policy, connection, timeout, complaints)
        if isinstance(verdict, HandOff):
            try:
                await receivers.hand_off(verdict, connection, sock, already, timeout)
            except NoReceiverError as error:
                complaints.tell("connection %s is not handed off: %s", connection.id, error, kind=verdict.path)
                verdict = verdict.otherwise
            else:
                outcome = "handed_over"
        if outcome == "handed_over":
            pass
        elif isinstance(verdict, Forward):
            outcome = None
            with trio.CancelScope(shield=True):  # what is left of its life is the loop's
                await loop.forward(connection, sock, verdict.target)
        elif isinstance(verdict, Refuse):
            outcome = "refused_by_policy"
        elif isinstance(verdict, Handle):
            stream = ConnectionStream(sock, connection, already, relay=partial(loop.relay, connection))
            loop.handles(connection, stream)
            try:
                outcome = await _handle(verdict.handler, stream, complaints)
            finally:
                received, sent = stream.received, stream.sent
        else:
            outcome = "policy_error"
    finally:
        if sock.fileno() >= 0:
            trio.lowlevel.notify_closing(sock)  # who still waits in a task of its own is told
            if outcome in _LIVES_ON:
                sock.close()
            else:
                abort(sock)
        if outcome is not None:
            with trio.CancelScope(shield=True):
                await loop.end(connection, outcome, received, sent)


async def _ask(
    policy: Policy, connection: Connection, timeout: float, complaints: Complaints
) -> Forward | Refuse | Handle | HandOff | None:
    """The policy's answer; None if it has none in time, or fails, or answers something else."""
    verdict: object = None
    try:
        with trio.move_on_after(timeout) as scope:
            verdict = await policy(connection)
    except Exception:  # the program's, whatever it is; it costs this connection only
        complaints.tell("the policy failed for connection %s, which is refused", connection.id, trace=True)
        return None
    if isinstance(verdict, Forward | Refuse | Handle | HandOff):
        return verdict
    if scope.cancelled_caught:
        complaints.tell(
            "the policy did not answer within %g s for connection %s, which is refused", timeout, connection.id
        )
    else:
        complaints.tell("the policy answered %r for connection %s, which is refused", verdict, connection.id)
    return None


async def _handle(
    handler: Callable[[ConnectionStream], Awaitable[None]], stream: ConnectionStream, complaints: Complaints
) -> Outcome:
    try:
        await handler(stream)
    except Exception:  # the program's, whatever it is; it costs this connection only
        if stream.broken:
            return "client_reset"
        complaints.tell(
            "the handler of connection %s failed, and its client is reset", stream.connection.id, trace=True
        )
        return "policy_error"
    return stream.outcome or "handled"
