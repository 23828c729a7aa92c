"""Connections that relay loops have handed over, and that are with the embedding program now: who has them, what ends whoever has them there, and
what becomes of them when their loop dies.

Each stays in the books of the loop that it came from, as long as that lives; what the program does with it is proxy/handed.py.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Iterable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import msgspec
import trio

from tproxyd.datapath import EndedOrder, LivingConnection, Outcome, Record, report
from tproxyd.datapath.listing import Filter
from tproxyd.datapath.record import wall_clock
from tproxyd.interceptor.loop_channel import Orders
from tproxyd.interceptor.tally import Tally
from tproxyd.net.sockets import abort, format_address
from tproxyd.proxy import Complaints, Connection, ConnectionStream, Policy, Receivers, Sides, serve_handed

__all__ = ["HandedConnections"]

_log = logging.getLogger(__name__)

_HANDLERS_STOP = 0.5  # seconds for handlers to end when they are cancelled, before the sockets are taken away from them


class Handed(NamedTuple):
    """A connection that is with the embedding program: its socket, since when, and what ends whoever has it there. `stream` is its handler's."""

    connection: Connection
    sock: socket.socket
    scope: trio.CancelScope
    since: float
    stream: ConnectionStream | None = None

    @property
    def workload(self) -> str:
        """Whose it is."""
        return self.connection.workload


Concerns = Callable[[Handed], bool]


class HandedConnections:
    """Those of one place for a loop, by identity. `served` are the names of workloads that are served now."""

    def __init__(
        self,
        policy: Policy | None,
        policy_timeout: float,
        receivers: Receivers,
        *,
        tally: Tally,
        served: Container[str],
    ) -> None:
        self._policy, self._policy_timeout, self._receivers = policy, policy_timeout, receivers
        self.tally = tally
        self._served = served
        self._complaints = Complaints()
        self._there: dict[str, Handed] = {}
        self._abandoned: set[str] = (
            set()
        )  # those of them that were not given up in time; the loop has recorded their end
        self._recorded: set[str] = (
            set()
        )  # those of them that the loop has relayed to their end, while the handler goes on
        self._orphans: set[str] = set()  # those of them whose loop has died
        self.relaying: dict[str, Relaying] = {}
        """Those of them that the loop relays for a handler, which waits."""
        self._given_up = trio.lowlevel.ParkingLot()  # where the end of one of them is waited for
        self._ended = False

    def __bool__(self) -> bool:
        return bool(self._there)

    def __contains__(self, identity: object) -> bool:
        return identity in self._there

    def take(self, message: bytes, fd: int, nursery: trio.Nursery, loop: Orders) -> None:
        """One that the program is to decide about, with its socket."""
        assert self._policy is not None
        told = msgspec.msgpack.decode(message, type=report.HandedOver)
        family = socket.AF_INET6 if ":" in told.source[0] else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM, 0, fd)  # told all that, it does not ask the kernel
        scope = trio.CancelScope()
        connection = Connection(
            id=told.id,
            workload=told.workload,
            source=told.source,
            original_destination=told.original_destination,
            target=told.target,
            rule=told.rule,
        )
        self._there[told.id] = Handed(connection, sock, scope, trio.current_time())
        serve = partial(
            serve_handed,
            policy=self._policy,
            timeout=self._policy_timeout,
            loop=_Origin(self, loop),
            receivers=self._receivers,
            complaints=self._complaints,
        )
        nursery.start_soon(_within, scope, partial(serve, connection, sock, told.data))

    def note_stream(self, identity: str, stream: ConnectionStream) -> None:
        """A handler of the program has it."""
        handed = self._there.get(identity)
        if handed is not None:
            self._there[identity] = handed._replace(stream=stream)

    def end_relayed(self, many: Iterable[EndedOrder]) -> None:
        """The loop has relayed them to their end."""
        for ended in many:
            if ended.id in self._there:
                self._recorded.add(ended.id)
            if (relaying := self.relaying.pop(ended.id, None)) is not None:
                relaying.end(ended)

    def is_recorded(self, identity: str) -> bool:
        """Whether the loop has told how it ended."""
        return identity in self._recorded

    def forget(self, identity: str) -> None:
        """It is not with the program any more."""
        gone = self._there.pop(identity, None)
        if identity in self._orphans:
            self._orphans.discard(identity)
            if gone is not None:
                self.tally.let_orphan_go(gone.workload)
        self._abandoned.discard(identity)
        self._recorded.discard(identity)
        if (relaying := self.relaying.pop(identity, None)) is not None:
            relaying.end(None)  # some other task of the program's waits for it
        self._given_up.unpark_all()

    def record(self, record: Record) -> None:
        """The end of one that no loop can record."""
        if record.id in self._abandoned:
            return
        if record.workload in self._served:  # else it is not counted any more
            self.tally.count_orphan(record.workload, record.outcome)
        self.tally.record(msgspec.json.encode(record) + b"\n")

    # Ending them.

    def cancel(self, identity: str) -> bool:
        """Whether there was one of this identity; to be followed by `take_away`."""
        handed = self._there.get(identity)
        if handed is not None:
            handed.scope.cancel()
        return handed is not None

    async def take_away(self, identity: str) -> None:
        """Waits a moment for its handler, which has been cancelled, and takes the socket away from one that goes on."""
        await self._take_away(lambda one: one.connection.id == identity)

    async def end_all(self) -> None:
        """The same for all of them: neither their clients nor all that comes after is to wait for handlers that go on."""
        if self._there and not self._ended:
            self._ended = True
            await self._take_away()

    async def end_all_of(self, workload: str) -> None:
        """Cancels them, of this workload alone, and does the same."""
        for handed in self._there.values():
            if handed.workload == workload:
                handed.scope.cancel()
        await self._take_away(lambda one: one.workload == workload)

    async def wait_given_up(self, workload: str) -> None:
        """Returns when the program has no connection of this workload any more."""
        await self._until_given_up(lambda one: one.workload == workload)

    async def wait_orphans(self, workload: str) -> None:
        """The same, for those whose loop has died."""
        while any(self._there[identity].workload == workload for identity in self._orphans & self._there.keys()):
            await self._given_up.park()

    async def _until_given_up(self, concerns: Concerns = lambda _: True) -> None:
        while any(concerns(one) for key, one in self._there.items() if key not in self._abandoned):
            await self._given_up.park()

    async def _take_away(self, concerns: Concerns = lambda _: True) -> None:
        with trio.CancelScope(shield=True), trio.move_on_after(_HANDLERS_STOP):
            await self._until_given_up(concerns)
        for key, handed in self._there.items():
            if not concerns(handed) or key in self._abandoned:
                continue
            sock = handed.sock
            _log.error("the handler of connection %s goes on although it was cancelled; its client is reset", key)
            if sock.fileno() >= 0:
                trio.lowlevel.notify_closing(sock)
                abort(sock)
            if key not in self._orphans:
                self._abandoned.add(key)

    # When their loop has died.

    def alive(self) -> Counter[str]:
        """By workload, how many outlive it: what it relayed for them does not, but is counted when its handler has ended."""
        return Counter(handed.workload for identity, handed in self._there.items() if identity not in self._recorded)

    def orphan(self) -> None:
        """It has died."""
        self._orphans |= self._there.keys() - self._recorded
        self.lose_relayed()

    def lose_relayed(self) -> None:
        """Nobody relays them any more."""
        relaying, self.relaying = self.relaying, {}
        for one in relaying.values():
            one.end(EndedOrder(one.identity, "worker_lost", 0, 0))

    # Listing them.

    def add_moved(self, page: Iterable[LivingConnection]) -> None:
        """Of those that handlers have, the loop does not know what they have moved."""
        for one in page:
            handed = self._there.get(one.id)
            if handed is not None and handed.stream is not None:
                one.bytes_from_client, one.bytes_from_upstream = handed.stream.received, handed.stream.sent

    def orphans(self, which: Filter) -> list[LivingConnection]:
        """Those that no loop lists."""
        matches = which.compile()
        orphans = [self._there[identity] for identity in sorted(self._orphans & self._there.keys())]
        return [
            _orphan(orphan)
            for orphan in orphans
            if matches(orphan.workload, orphan.connection.source, orphan.connection.original_destination)
        ]


async def _within(scope: trio.CancelScope, function: Callable[[], Awaitable[None]]) -> None:
    with scope:
        await function()


class _Origin:
    """The loop that a connection came from, where account is kept of it; when that has died, it is kept here."""

    def __init__(self, handed: HandedConnections, loop: Orders) -> None:
        self._handed = handed
        self._loop = loop
        self._began = trio.current_time()

    def handles(self, connection: Connection, stream: ConnectionStream) -> None:
        """A handler of the program has it."""
        self._handed.note_stream(connection.id, stream)

    async def forward(self, connection: Connection, sock: socket.socket, target: tuple[str, int] | None) -> None:
        """Gives the connection back to the loop, which relays it; the caller closes its own copy of the socket."""
        order = report.FORWARD + msgspec.msgpack.encode(report.ForwardOrder(connection.id, target))
        try:
            await self._loop.send(order, [sock.fileno()])
        except (OSError, trio.ClosedResourceError):
            abort(sock)
            self._record(connection, "worker_lost", 0, 0)
        finally:
            self._handed.forget(connection.id)

    async def relay(self, connection: Connection, sides: Sides) -> Relaying | None:
        """Gives copies of both sockets to the loop; None if it has died."""
        sock = sides.upstream
        order = report.RelayOrder(connection.id, sock.family, sides.received, sides.sent, sides.already)
        fds = [sides.client.fileno(), sock.fileno()]
        relaying = self._handed.relaying[connection.id] = Relaying(self._handed, self._loop, connection.id)
        try:
            await self._loop.send(report.RELAY + msgspec.msgpack.encode(order), fds)
        except (OSError, trio.ClosedResourceError):
            self._handed.relaying.pop(connection.id, None)  # unless it is lost already
            return None
        except BaseException:
            self._handed.relaying.pop(connection.id, None)
            raise
        return relaying

    async def end(self, connection: Connection, outcome: Outcome, received: int, sent: int) -> None:
        """The connection has ended here, if not in the loop that relayed it."""
        if self._handed.is_recorded(connection.id):
            return self._handed.forget(connection.id)
        order = report.EndedOrder(connection.id, outcome, received, sent)
        try:
            await self._loop.send(report.ENDED + msgspec.msgpack.encode(order))
        except (OSError, trio.ClosedResourceError):
            self._record(connection, outcome, received, sent)
        finally:
            self._handed.forget(connection.id)
        return None

    def _record(self, connection: Connection, outcome: Outcome, received: int, sent: int) -> None:
        self._handed.record(
            Record(
                ts=wall_clock(time.time()),
                id=connection.id,
                workload=connection.workload,
                source=format_address(connection.source),
                original_destination=format_address(connection.original_destination),
                rule=connection.rule,
                bytes_from_client=received,
                bytes_from_upstream=sent,
                duration_ms=round((trio.current_time() - self._began) * 1000, 3),
                outcome=outcome,
            )
        )


class Relaying:
    """A connection that a loop relays for a handler."""

    def __init__(self, handed: HandedConnections, loop: Orders, identity: str) -> None:
        self.identity = identity
        self._handed = handed
        self._loop = loop
        self._ended = trio.Event()
        self._how: EndedOrder | None = None

    def end(self, how: EndedOrder | None) -> None:
        """None: the handler has ended before."""
        self._how = how
        self._ended.set()

    async def ended(self) -> EndedOrder:
        """Waits for its end. Cancelled, it has the loop reset both sides; how the connection ended is the handler's to say then."""
        try:
            await self._ended.wait()
        except BaseException:
            self._handed.relaying.pop(self.identity, None)
            with trio.CancelScope(shield=True), suppress(OSError, trio.ClosedResourceError):
                await self._loop.send(report.RESET + self.identity.encode())
            raise
        if self._how is None:
            raise trio.ClosedResourceError("this stream is closed: its handler has ended")
        return self._how


def _orphan(handed: Handed) -> LivingConnection:
    """What is known of a connection with the program whose loop has died."""
    one, stream = handed.connection, handed.stream
    return LivingConnection(
        id=one.id,
        workload=one.workload,
        state="handed",
        age_s=round(trio.current_time() - handed.since, 3),
        source=format_address(one.source),
        original_destination=format_address(one.original_destination),
        rule=one.rule,
        bytes_from_client=stream.received if stream is not None else 0,
        bytes_from_upstream=stream.sent if stream is not None else 0,
    )
