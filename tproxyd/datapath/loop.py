"""The relay loop: one epoll, and everything that happens in it. Accepts, drives the connections, keeps time, counts, reports.

One loop is one thread's whole work, in this process or in one of its own; it imports neither trio nor pyroute2 and knows its owner only
as the other end of a socket (report.py). The order of one turn is what keeps file numbers honest: first the events, then new connections.
A descriptor that an event handler closes can so not come back as somebody else's before the last event of the batch has been handled.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import secrets
import select
import socket
import time
import traceback
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import msgspec

from tproxyd.datapath import report
from tproxyd.datapath.connection import Connection
from tproxyd.datapath.pipes import PipePool
from tproxyd.datapath.record import Outcome, Record
from tproxyd.datapath.report import CONNECT_SECONDS, Counters, LogLine, Outbox, Setup
from tproxyd.datapath.timers import Wheel
from tproxyd.datapath.transfer import WATCHED, Leg
from tproxyd.net.locality import Locality
from tproxyd.net.sockets import Address, abort, accepted_socket, format_address, wait_for_reader
from tproxyd.policy import compile_policy

__all__ = ["RelayLoop", "serve_loop"]

_EVENTS = 256  # taken at a time
_ACCEPTS = 64  # new connections between two looks at the old ones
_REPORT = 0.05  # seconds until the owner hears of what has happened
_FLUSH = 0.002  # seconds between two looks at what a peer has taken
_PAUSE = 0.1  # seconds; without files the queue waits, connections that end give them back
_STALLS = (
    20.0  # seconds between two looks for peers that do not read; well below the two minutes that the kernel gives them
)
_SETTLE = 5.0  # seconds after which a connection is worth the four system calls that watch its server
_SAY_EVERY = 5.0  # seconds between two log lines of one kind

_OF_THE_CONNECTION = {
    # Linux hands errors of a connection that died in the queue to accept(); the next one may be fine.
    errno.ECONNABORTED,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENONET,
    errno.ENOPROTOOPT,
    errno.EOPNOTSUPP,
    errno.EPERM,  # a firewall's
    errno.EPROTO,
}


def serve_loop(channel: socket.socket, listeners: Sequence[socket.socket]) -> None:
    """Runs a loop on these listeners until the owner says stop or is gone; closes all that it was given.

    What comes first on `channel` has to be the Setup. Every listener must be non-blocking.
    """
    with channel:
        setup = report.receive_setup(channel)
        if setup is None:
            return  # the owner has changed its mind
        loop = RelayLoop(setup, listeners, channel)
        try:
            loop.run()
        except Exception as error:
            loop.complain(error, "the relay loop failed; this is a bug")
            raise
        finally:
            loop.close()


class RelayLoop:
    """Made in the thread that calls `run`; that thread closes it. The attributes without underscore are for its connections."""

    def __init__(self, setup: Setup, listeners: Sequence[socket.socket], channel: socket.socket) -> None:
        config = setup.config
        self.now = time.monotonic()
        self.engine = config.relay.engine
        self.pipes = PipePool(setup.pipes if self.engine != "copy" else 0)
        self.keeps_source = config.upstream.source == "auto"
        self.decide = compile_policy(config.policy)
        self.is_relayed_port = config.relays_port
        shortest = min(config.relay.idle_timeout, config.relay.half_close_timeout)
        self.dialling: Wheel[Connection] = Wheel(config.upstream.connect_timeout)
        self.settling: Wheel[Connection] = Wheel(min(_SETTLE, shortest))
        self.idle: Wheel[Connection] = Wheel(config.relay.idle_timeout)
        self.half_closed: Wheel[Connection] = Wheel(shortest)
        # A connection stays where it waited for its upstream, and what it waits for now is asked when that time is up: most have
        # ended by then, and have entered one wheel instead of three.
        self.lazy = self.dialling.seconds <= self.settling.seconds
        self.flushing: set[Connection] = set()

        self.asks = setup.asks
        self._alone = setup.alone
        self._handed: dict[str, Connection] = {}
        self._forward: list[tuple[report.ForwardOrder, int]] = []
        self._listen_port = config.listen.port
        self._listen_hosts = frozenset(host for host, _ in setup.listen)
        self._limit = setup.limit
        self._full = (
            f"{setup.limit} connections live, as many as limits.max_connections allows: new ones wait"
            if config.limits.max_connections != "auto"
            else f"{setup.limit} connections are all there are files for: new ones wait; raise LimitNOFILE (ulimit -n)"
        )
        self._per_source = config.limits.max_connections_per_source
        self._sources: dict[str, int] = {}
        self._busy = config.relay.busy_poll
        self._idle_timeout = config.relay.idle_timeout
        # Unique across restarts without a file: random start, then counted.
        self._next_identity = secrets.randbits(63)
        self._connections: set[Connection] = set()
        self._new: list[Connection] = []  # not told to the owner yet
        self._again: list[Leg] = []
        self._blocked: set[Leg] = set()

        self._counters = Counters()
        self._records: list[Record] = []
        self._encode = msgspec.json.Encoder()
        self._said: dict[object, float] = {}
        self._told_at = -1.0  # of `now`, for which the text of the wall clock is kept
        self._told = ""
        self._asked_idle = self._tells_idle = False
        self._stopping = False
        self._report_due = math.inf
        self._stalls_due = math.inf
        self._resume_due = math.inf

        self._channel = channel
        channel.setblocking(False)
        self._outbox = Outbox(channel)
        self._epoll = select.epoll()
        self._locality = Locality()
        self.is_local = self._locality.is_local
        self._handlers: dict[int, Callable[[int], None]] = {
            channel.fileno(): self._on_orders,
            self._locality.fileno(): self._on_news,
        }
        for fd in self._handlers:
            self._epoll.register(fd, select.EPOLLIN)
        self._listeners = list(listeners)
        self._ready: list[socket.socket] = []
        self._accepting = False
        self._resume_accepting()

    def run(self) -> None:
        """Turns until the owner wants no more of it."""
        self._outbox.put(report.READY)
        self._send_reports()
        poll, handlers = self._epoll.poll, self._handlers
        while not self._stopping:
            timeout = self._timeout()
            spins = self._busy and self._connections and timeout
            events = self._spin(timeout) if spins else poll(timeout, _EVENTS)
            self.now = time.monotonic()
            for fd, event in events:
                handler = handlers.get(fd)
                if handler is not None:  # closed by what was done about an event before it
                    handler(event)
            if self._again:
                again, self._again = self._again, []
                for leg in again:
                    leg.queued = False
                    if leg.handle is not None:
                        leg.handle(0)
            if self._ready:
                ready, self._ready = self._ready, []
                for listener in ready:
                    self._accept(listener)
            if self._forward:
                orders, self._forward = self._forward, []
                for order, fd in orders:
                    self._take_back(order, fd)
            if self._asked_idle and not self._tells_idle:
                # Whoever's handshake is complete is served, too.
                while sum(self._accept(listener) for listener in self._listeners):
                    pass
                self._tells_idle = True
                self._report_due = self.now
            self._keep_time()

    def close(self) -> None:
        """Resets what is left and closes everything, the listeners first."""
        for listener in self._listeners:
            listener.close()
        self._listeners = []  # nothing is accepted any more, however much room there is
        for connection in list(self._connections):
            connection.end("drained")
        with contextlib.suppress(OSError):  # the last words, if there is anybody to hear them
            self._channel.settimeout(1.0)
            self._report()
        self._epoll.close()
        self._locality.close()
        self.pipes.close()

    # For connections.

    def is_listener(self, address: Address | tuple[str, int], *, local: bool) -> bool:
        """Whether nobody but us can be meant: a listener's own address, or its port at another address of this host."""
        return address[1] == self._listen_port and (local or address[0] in self._listen_hosts)

    def enter(self, connection: Connection) -> bool:
        """Whether its client may have one more connection; it has, then."""
        if self._per_source:
            host = connection.client[0]
            count = self._sources.get(host, 0)
            if count >= self._per_source:
                return False
            self._sources[host] = count + 1
            connection.counted = True
        return True

    def watch(self, leg: Leg, handle: Callable[[int], None]) -> None:
        """Calls `handle` with what epoll says of the leg's socket, from now on until `part`."""
        self._epoll.register(leg.fd, WATCHED | select.EPOLLOUT if leg.watches_out else WATCHED)
        leg.handle = self._handlers[leg.fd] = handle

    def watch_writable(self, leg: Leg) -> None:
        """A send has blocked: from now on it is told, too, when one would not."""
        self._epoll.modify(leg.fd, WATCHED | select.EPOLLOUT)

    def note_blocked(self, leg: Leg) -> None:
        """Its peer does not read: if that goes on, it is looked whether it lives."""
        self._blocked.add(leg)
        if self._stalls_due == math.inf:
            self._stalls_due = self.now + _STALLS

    def again(self, leg: Leg) -> None:
        """There is more to do for this leg, after the others have had their turn."""
        if not leg.queued:
            leg.queued = True
            self._again.append(leg)

    def part(self, leg: Leg, *, orderly: bool) -> None:
        """Closes the leg's socket, with a reset unless `orderly`."""
        if leg.handle is not None:
            leg.handle = None
            del self._handlers[leg.fd]
            if not self._alone:
                # A program that is being started has a copy of this descriptor until it execs, and as long would epoll go on
                # telling of it, under a number that may be somebody else's by then.
                self._epoll.unregister(leg.fd)
        self._blocked.discard(leg)
        if orderly:
            leg.sock.close()
        else:
            abort(leg.sock)

    def hand_over(self, connection: Connection) -> None:
        """Gives the connection's socket to the owner, whose program decides; it stays in the books here."""
        if self._outbox.full:
            # Nobody takes anything: the program that is to decide does not run.
            abort(connection.downstream.sock)
            return connection.end("policy_error")
        handed = report.HandedOver(
            id=f"{connection.identity:016x}",
            source=connection.client[:2],
            original_destination=connection.target[:2] if connection.target else ("", 0),
            rule=connection.rule,
        )
        self._handed[handed.id] = connection
        self._outbox.put(report.HAND_OVER, msgspec.msgpack.encode(handed), sock=connection.downstream.sock)
        return self._send_reports()

    def count_connect(self, seconds: float) -> None:
        """An upstream has answered after so many seconds."""
        counters = self._counters
        counters.connect_seconds_sum += seconds
        counters.connect_seconds[bisect_left(CONNECT_SECONDS, seconds)] += 1

    def leave(self, connection: Connection, outcome: Outcome) -> None:
        """One connection less, and its record."""
        self._connections.discard(connection)
        self.flushing.discard(connection)
        if connection.counted:
            host = connection.client[0]
            count = self._sources[host] - 1
            if count:
                self._sources[host] = count
            else:
                del self._sources[host]
        counters = self._counters
        counters.active -= 1
        counters.outcomes[outcome] = counters.outcomes.get(outcome, 0) + 1
        record = self._record(connection, outcome)
        counters.bytes_from_client += record.bytes_from_client
        counters.bytes_from_upstream += record.bytes_from_upstream
        self._records.append(record)
        if self._report_due == math.inf:
            self._report_due = self.now + _REPORT
        if self._tells_idle and not self._connections:
            self._report_due = self.now
        if not self._accepting and self._resume_due == math.inf and counters.active < self._limit:
            self._resume_accepting()

    def complain(self, error: Exception, message: str, *args: object) -> None:
        """Tells what must not be passed over, with the error behind it; of errors of one kind one line in five seconds.

        Whatever one client can cause, many clients can cause a thousand times a second. A surprise comes with its traceback.
        """
        if self._may_say((message, type(error), getattr(error, "errno", None))):
            trace = None if isinstance(error, OSError) else "".join(traceback.format_exception(error))
            self._log("error", f"{message % args}: {error}", trace)

    # Its own.

    def _may_say(self, kind: object) -> bool:
        if self.now - self._said.get(kind, -math.inf) < _SAY_EVERY:
            return False
        self._said[kind] = self.now
        return True

    def _record(self, connection: Connection, outcome: Outcome) -> Record:
        upstream = connection.upstream
        target, source = connection.target, connection.upstream_source
        return Record(
            ts=self._wall_clock(),
            id=f"{connection.identity:016x}",
            source=format_address(connection.client),
            original_destination=format_address(connection.destination) if connection.destination else None,
            upstream=format_address(target) if target and upstream else None,
            upstream_source=format_address(source) if source else None,
            rule=connection.rule,
            bytes_from_client=connection.downstream.received,
            bytes_from_upstream=upstream.received if upstream else connection.handed_upstream,
            duration_ms=round((self.now - connection.started) * 1000, 3),
            outcome=outcome,
        )

    def _wall_clock(self) -> str:
        """RFC 3339 in UTC with milliseconds, the same for all that ends in one turn."""
        if self._told_at != self.now:
            self._told_at = self.now
            now = time.time()
            self._told = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"
        return self._told

    def _timeout(self) -> float | None:
        """Seconds until something is due; None without anything."""
        if self._again or self._ready:
            return 0.0
        due = min(
            self.dialling.due,
            self.settling.due,
            self.idle.due,
            self.half_closed.due,
            self._report_due,
            self._stalls_due,
            self._resume_due,
        )
        if self.flushing:
            due = min(due, self.now + _FLUSH)
        if due == math.inf:
            return None
        return max(0.0, due - self.now)

    def _spin(self, timeout: float | None) -> list[tuple[int, int]]:
        """Asks again and again for `busy_poll`, and only then sleeps: a wake-up costs more than a few questions."""
        poll = self._epoll.poll
        end = self.now + self._busy
        while not (events := poll(0, _EVENTS)):
            if time.monotonic() >= end:
                return poll(timeout, _EVENTS)
        return events

    def _keep_time(self) -> None:
        now = self.now
        if self.flushing:
            for connection in list(self.flushing):
                connection.flush()
        if now >= self.dialling.due:
            for connection in self.dialling.expire(now, also_active=True):
                if not connection.settle():
                    connection.end("upstream_timeout")
        if now >= self.settling.due:
            for connection in self.settling.expire(now, also_active=True):
                connection.settle()
        if now >= self.idle.due:
            for connection in self.idle.expire(now):
                connection.end("idle_timeout")
        if now >= self.half_closed.due:
            for connection in self.half_closed.expire(now):
                connection.end("half_close_timeout")
        if now >= self._resume_due:
            self._resume_due = math.inf
            self._resume_accepting()
        if now >= self._stalls_due:
            self._look_for_stalls()
        if now >= self._report_due:
            self._report()

    def _look_for_stalls(self) -> None:
        """Peers that have not read for some time keep their connection until the idle time-out, as long as they live."""
        for leg in list(self._blocked):
            if not leg.writable and wait_for_reader(leg.sock, self._idle_timeout):
                self._blocked.discard(leg)
        self._stalls_due = self.now + _STALLS if self._blocked else math.inf

    def _on_listener(self, listener: socket.socket) -> Callable[[int], None]:
        return lambda _: self._ready.append(listener)

    def _on_news(self, _: int) -> None:
        self._locality.forget()

    def _resume_accepting(self) -> None:
        self._accepting = True
        for listener in self._listeners:
            self._handlers[listener.fileno()] = self._on_listener(listener)
            self._epoll.register(listener.fileno(), select.EPOLLIN)

    def _pause_accepting(self) -> None:
        self._accepting = False
        for listener in self._listeners:
            del self._handlers[listener.fileno()]
            self._epoll.unregister(listener.fileno())

    def _accept(self, listener: socket.socket) -> int:
        """Takes what waits, as far as there is room; how many that were."""
        family, counters = listener.family, self._counters
        # What `socket.accept` is made of, without the second object and its getsockname.
        accept: Callable[[], tuple[int, Address]] = cast(Any, listener)._accept
        for count in range(_ACCEPTS):
            if not self._accepting:
                return count
            if counters.active >= self._limit:
                if self._may_say("full"):
                    self._log("warning", self._full)
                self._pause_accepting()
                return count
            try:
                fd, client = accept()
            except BlockingIOError:
                return count
            except OSError as error:
                if error.errno not in _OF_THE_CONNECTION:
                    self.complain(error, "cannot accept connections, and will try again")
                    self._pause_accepting()
                    self._resume_due = self.now + _PAUSE
                    return count
                continue
            counters.accepted += 1
            counters.active += 1
            self._next_identity = (self._next_identity + 1) & 0xFFFFFFFFFFFFFFFF
            connection = Connection(self, accepted_socket(family, fd), client, self._next_identity)
            self._connections.add(connection)
            self._new.append(connection)
            if self._report_due == math.inf:
                self._report_due = self.now + _REPORT
            connection.begin()
        self._ready.append(listener)
        return _ACCEPTS

    # With the owner.

    def _on_orders(self, _: int) -> None:
        try:
            order, fds, _, _ = socket.recv_fds(self._channel, report.MESSAGE, 1)
        except BlockingIOError:
            return
        except OSError:
            order, fds = b"", []
        match order[:1]:
            case report.FORWARD:
                # Dialled after this batch of events, as every new connection.
                self._forward.append((msgspec.msgpack.decode(order[1:], type=report.ForwardOrder), fds[0]))
            case report.ENDED:
                ended = msgspec.msgpack.decode(order[1:], type=report.EndedOrder)
                handed = self._handed.pop(ended.id, None)
                if handed is not None:
                    handed.end_handed(ended.outcome, ended.bytes_from_client, ended.bytes_from_upstream)
            case report.TELL_IDLE:
                self._asked_idle = True
            case report.TELL_COUNTERS:
                self._outbox.put(report.COUNTED, msgspec.msgpack.encode(self._counters_now()))
                self._report_due = self.now
            case report.STOP:
                self._stopping = True
            case _:
                self._stopping = True  # the owner is gone

    def _take_back(self, order: report.ForwardOrder, fd: int) -> None:
        connection = self._handed.pop(order.id, None)
        if connection is None:
            os.close(fd)
            return
        family = socket.AF_INET6 if ":" in connection.client[0] else socket.AF_INET
        connection.take_back(accepted_socket(family, fd), order.target)

    def _counters_now(self) -> Counters:
        """With what living connections have moved so far."""
        counters = msgspec.structs.replace(self._counters)
        for connection in self._connections:
            counters.bytes_from_client += connection.downstream.received
            if connection.upstream is not None:
                counters.bytes_from_upstream += connection.upstream.received
        return counters

    def _log(self, level: Literal["info", "warning", "error"], text: str, trace: str | None = None) -> None:
        if not self._outbox.full:
            self._outbox.put(report.LOG, msgspec.msgpack.encode(LogLine(level, text[:4000], trace and trace[-16000:])))
            self._report_due = self.now

    def _report(self) -> None:
        """Tells the owner what has happened since it was told last."""
        self._report_due = math.inf
        outbox = self._outbox
        if self._new:
            # Those that ended meanwhile are in the records. Should this process die, the owner knows who died with it.
            living = [
                self._record(connection, "worker_lost") for connection in self._new if connection in self._connections
            ]
            self._new = []
            self._put_lines(report.LIVING, living)
        if self._records:
            records, self._records = self._records, []
            self._put_lines(report.RECORDS, records)
        if not outbox.full:
            outbox.put(report.COUNTERS, msgspec.msgpack.encode(self._counters))
        # Who waited for room while others lived is served before it is said that nobody is left.
        if self._tells_idle and not self._connections and not sum(map(self._accept, self._listeners)):
            self._asked_idle = self._tells_idle = False
            outbox.put(report.IDLE)
        self._send_reports()

    def _put_lines(self, kind: bytes, records: list[Record]) -> None:
        if self._outbox.full:
            if kind == report.RECORDS:
                self._counters.records_dropped += len(records)
            return
        for message in report.lines_to_messages(self._encode.encode_lines(records)):
            self._outbox.put(kind, message)

    def _send_reports(self) -> None:
        try:
            if not self._outbox.send():
                self._report_due = self.now + _REPORT  # the owner is busy; it is told later
        except OSError:
            self._stopping = True  # the owner is gone
