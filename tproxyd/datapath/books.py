"""The books of a relay loop: which connections live, what has been counted, what each has left behind, and what the owner is told.

Knows Connection by its addresses and byte counts; refuses to know sockets and events. Nothing here blocks: what the owner does not
take is kept for later, and access-log lines beyond a bound are dropped and counted.
"""

from __future__ import annotations

import errno
import math
import secrets
import socket
import time
import traceback
from bisect import bisect_left
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec

from tproxyd.datapath import report
from tproxyd.datapath.record import Outcome, Record, wall_clock
from tproxyd.datapath.report import CONNECT_SECONDS, LogLine, Outbox
from tproxyd.net.sockets import format_address, format_target

if TYPE_CHECKING:
    from tproxyd.datapath.connection import Connection
    from tproxyd.datapath.workload import Workload

__all__ = ["Books"]

_REPORT = 0.05  # seconds until the owner hears of what has happened
_SAY_EVERY = 5.0  # seconds between two log lines of one kind
_MOST_SAID = 256  # kinds of log lines within that time; so many cannot be meant, but a text may have addresses in it
_RELAYED = (
    500  # of those that were relayed for the owner and have ended, in one message; each is some 50 bytes of its 64 KiB
)
_MOST_ALPN = 255  # characters; a client may offer 16 KiB of names


class Clock(Protocol):
    """Whose `now` is the time of the present turn, in seconds (monotonic)."""

    now: float


class Books:
    """Of one loop. `due` is when to call `report`; `connections` are those that live, wherever their sockets are."""

    def __init__(self, clock: Clock, channel: socket.socket, *, per_source: int) -> None:
        self._clock = clock
        self.outbox = Outbox(channel)
        self.connections: dict[int, Connection] = {}  # by identity, in the order in which they began
        self.due = math.inf
        self._new: list[Connection] = []  # not told to the owner yet
        self._changed: set[Workload] = set()  # their counters
        self._dropped = 0
        self._records: list[Record] = []
        self.urgent = False
        """Something waits for `hurry`, at the end of this turn."""
        self._relayed: list[report.EndedOrder] = []
        self._encode = msgspec.json.Encoder()
        self._per_source = per_source
        self._sources: dict[tuple[str, str], int] = {}  # by workload and address
        # Unique across restarts without a file: random start, then counted.
        self._next_identity = secrets.randbits(63)
        self._said: dict[object, float] = {}  # when, by kind; the one that was said longest ago comes first
        self._told_at = -1.0  # of `now`, for which the text of the wall clock is kept
        self._told = ""

    def next_identity(self) -> int:
        """A number for a new connection, of 64 bits."""
        self._next_identity = (self._next_identity + 1) & 0xFFFFFFFFFFFFFFFF
        return self._next_identity

    def open(self, connection: Connection) -> None:
        """One connection more."""
        workload = connection.workload
        workload.counters.accepted += 1
        workload.counters.active += 1
        workload.connections.add(connection)
        workload.living += 1
        self._changed.add(workload)
        self.connections[connection.identity] = connection
        self._new.append(connection)
        if self.due == math.inf:
            self.due = self._clock.now + _REPORT

    def renew(self, connection: Connection) -> None:
        """The owner is to be told again that it lives, and of whom it would die."""
        self._new.append(connection)
        if self.due == math.inf:
            self.due = self._clock.now + _REPORT

    def retire(self, workload: Workload) -> None:
        """Nobody lives of it any more, and another one has its place."""
        self.tell(report.RETIRED, msgspec.msgpack.encode((workload.name, workload.generation)))

    def limit_sources(self, per_source: int) -> None:
        """From now on a client may have so many connections; who lives counts, but for those of which it is not known yet whose they are."""
        self._per_source = per_source
        for connection in self.connections.values() if per_source else ():
            if not connection.counted and connection.is_known:
                source = connection.workload.name, connection.client[0]
                self._sources[source] = self._sources.get(source, 0) + 1
                connection.counted = True

    def enter(self, connection: Connection) -> bool:
        """Whether its client may have one more connection; it has, then."""
        if self._per_source:
            source = connection.workload.name, connection.client[0]
            count = self._sources.get(source, 0)
            if count >= self._per_source:
                return False
            self._sources[source] = count + 1
            connection.counted = True
        return True

    def count_connect(self, workload: Workload, seconds: float) -> None:
        """An upstream has answered after so many seconds."""
        counters = workload.counters
        counters.connect_seconds_sum += seconds
        counters.connect_seconds[bisect_left(CONNECT_SECONDS, seconds)] += 1

    def leave(self, connection: Connection, outcome: Outcome) -> None:
        """One connection less, and its record."""
        workload = connection.workload
        self.connections.pop(connection.identity, None)
        workload.connections.discard(connection)
        workload.living -= 1
        if workload.retired and not workload.living:
            self.retire(workload)
        if connection.counted:
            source = workload.name, connection.client[0]
            count = self._sources[source] - 1
            if count:
                self._sources[source] = count
            else:
                del self._sources[source]
        self._changed.add(workload)
        counters = workload.counters
        counters.active -= 1
        counters.outcomes[outcome] = counters.outcomes.get(outcome, 0) + 1
        record = self._record(connection, outcome)
        counters.bytes_from_client += record.bytes_from_client
        counters.bytes_from_upstream += record.bytes_from_upstream
        self._records.append(record)
        if self.due == math.inf:
            self.due = self._clock.now + _REPORT

    def complain(self, error: Exception, message: str, *args: object) -> None:
        """Tells what must not be passed over, with the error behind it; of errors of one kind one line in five seconds.

        Whatever one client can cause, many clients can cause a thousand times a second. A surprise comes with its traceback.
        """
        if self._may_say((message, type(error), getattr(error, "errno", None))):
            trace = None if isinstance(error, OSError) else "".join(traceback.format_exception(error))
            self._log("error", f"{message % args}: {error}", trace)

    def remark(self, text: str, *, kind: str = "") -> None:
        """Tells what the administrator should know; the same, or another one of its `kind`, again after five seconds."""
        if self._may_say(kind or text):
            self._log("warning", text)

    def count_now(self, workloads: Iterable[Workload]) -> report.Count:
        """Of all workloads, with what living connections have moved so far."""
        counted = {}
        for workload in workloads:
            counters = counted[workload.name] = msgspec.structs.replace(workload.counters)
            for connection in workload.connections:
                counters.bytes_from_client += connection.downstream.received
                if connection.upstream is not None:
                    counters.bytes_from_upstream += connection.upstream.received
        return report.Count(counted)

    def tell(self, kind: bytes, content: bytes = b"", *, sock: socket.SocketType | None = None) -> None:
        """Says something to the owner at the next report; a socket goes with it, and is closed here then."""
        self.outbox.put(kind, content, sock=sock)
        self.due = self._clock.now

    def hand_over(self, told: report.HandedOver, sock: socket.socket | socket.SocketType) -> None:
        """Gives the owner a connection at the end of this turn, and closes the socket here then."""
        self.outbox.put(report.HAND_OVER, msgspec.msgpack.encode(told), sock=sock)
        self.urgent = True

    def end_relayed(self, ended: report.EndedOrder) -> None:
        """Tells the owner at the end of this turn that a connection has ended which was relayed for it."""
        self._relayed.append(ended)
        self.urgent = True

    def hurry(self) -> bool:
        """Tells the owner what somebody there waits for; all else has time until the next report. False if there is no owner any more."""
        self.urgent = False
        for begin in range(0, len(self._relayed), _RELAYED):
            self.outbox.put(report.RELAYED, msgspec.msgpack.encode(self._relayed[begin : begin + _RELAYED]))
        self._relayed = []
        return self._send()

    def report(self) -> bool:
        """Tells the owner what has happened since it was told last; False if there is no owner any more."""
        self.due = math.inf
        if self._new:
            # Those that ended meanwhile are in the records. Should this process die, the owner knows who died with it.
            living = [self._record(one, "worker_lost") for one in self._new if one.identity in self.connections]
            self._new = []
            self._put_lines(report.LIVING, living)
        if self._records:
            records, self._records = self._records, []
            self._put_lines(report.RECORDS, records)
        if self._changed and not self.outbox.full:
            changed = {workload.name: workload.counters for workload in self._changed}
            self.outbox.put(report.COUNTERS, msgspec.msgpack.encode(report.Count(changed, self._dropped)))
            self._changed, self._dropped = set(), 0
        return self.hurry()

    def _send(self) -> bool:
        try:
            if not self.outbox.send():
                self.due = min(self.due, self._clock.now + _REPORT)  # it is busy, and told later
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
                return False
            self.due = min(
                self.due, self._clock.now + _REPORT
            )  # short of memory, or of files in flight: it is told later
        return True

    def _put_lines(self, kind: bytes, records: list[Record]) -> None:
        if self.outbox.full:
            if kind == report.RECORDS:
                self._dropped += len(records)
            return
        for message in report.lines_to_messages(self._encode.encode_lines(records)):
            self.outbox.put(kind, message)

    def _log(self, level: Literal["info", "warning", "error"], text: str, trace: str | None = None) -> None:
        if not self.outbox.full:
            self.tell(report.LOG, msgspec.msgpack.encode(LogLine(level, text[:4000], trace and trace[-16000:])))

    def _may_say(self, kind: object) -> bool:
        """Whether nothing of this kind has been said in the last five seconds. What is older is forgotten as soon as there is much of it."""
        said, now = self._said, self._clock.now
        if now - said.get(kind, -math.inf) < _SAY_EVERY:
            return False
        said.pop(kind, None)
        if len(said) >= _MOST_SAID:
            oldest = next(iter(said))
            if now - said[oldest] < _SAY_EVERY:
                return False
            del said[oldest]
        said[kind] = now
        return True

    def _record(self, connection: Connection, outcome: Outcome) -> Record:
        upstream = connection.upstream
        target, source, hello = connection.target, connection.upstream_source, connection.hello
        received, sent = connection.moved_bytes()
        return Record(
            ts=self._wall_clock(),
            id=f"{connection.identity:016x}",
            workload=connection.workload.name,
            source=format_address(connection.client),
            original_destination=format_address(connection.destination) if connection.destination else None,
            upstream=format_target(target) if target and upstream else None,
            upstream_source=format_address(source) if source else None,
            rule=connection.rule,
            sni=hello.sni if hello else None,
            alpn=",".join(hello.alpn)[:_MOST_ALPN] or None if hello else None,
            bytes_from_client=received,
            bytes_from_upstream=sent,
            duration_ms=round((self._clock.now - connection.started) * 1000, 3),
            outcome=outcome,
        )

    def _wall_clock(self) -> str:
        """The same for all that ends in one turn."""
        if self._told_at != self._clock.now:
            self._told_at = self._clock.now
            self._told = wall_clock(time.time())
        return self._told
