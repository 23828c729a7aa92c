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
import pickle
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from tproxyd.config import Config
from tproxyd.datapath import report
from tproxyd.datapath.accepting import Accepting
from tproxyd.datapath.books import Books
from tproxyd.datapath.connection import Connection
from tproxyd.datapath.leaving import Leaving, compile_capture
from tproxyd.datapath.listing import Answer, CloseOrder, Listing, ListOrder
from tproxyd.datapath.opening import HEADER_SECONDS
from tproxyd.datapath.pipes import PipePool
from tproxyd.datapath.record import Outcome
from tproxyd.datapath.report import Setup, WorkloadSetup
from tproxyd.datapath.timers import Wheel
from tproxyd.datapath.transfer import WATCHED, Leg
from tproxyd.datapath.workload import Place, Workload
from tproxyd.errors import TproxydError
from tproxyd.net.locality import Locality
from tproxyd.net.sockets import (
    abort,
    accepted_socket,
    wait_for_reader,
    watch_peer,
)

__all__ = ["RelayLoop", "serve_loop"]

_EVENTS = 256  # taken at a time
_ORDERS = 128  # of the owner, taken at a time: with a policy there are as many as connections
_FLUSH = 0.002  # seconds between two looks at what a peer has taken
_KNOCK = 0.01  # seconds between two tries to get into the queue of a Unix socket
_DEAF = 0.02  # seconds after news of routes until more is heard: in a namespace of somebody else's there may be as much as he likes
_STALLS = 20.0  # seconds between two looks for peers that do not read; the kernel gives them two minutes
_SETTLE = 5.0  # seconds after which a connection is worth the four system calls that watch its server
_NEWS = select.EPOLLIN | select.EPOLLONESHOT  # nothing, and no error either, until it is asked for again


def serve_loop(channel: socket.socket) -> None:
    """Runs a loop until the owner says stop or is gone; closes all that it was given. What comes first on `channel` has to be the Setup."""
    with channel:
        setup = report.receive_setup(channel)
        if setup is None:
            return  # the owner has changed its mind
        loop = RelayLoop(setup, channel)
        try:
            loop.run()
        except Exception as error:  # told to the owner, who replaces the loop
            loop.complain(error, "the relay loop failed; this is a bug")
            loop.close("worker_lost")
            raise
        loop.close()


class RelayLoop:
    """Made in the thread that calls `run`; that thread closes it. The attributes without underscore are for its connections."""

    def __init__(self, setup: Setup, channel: socket.socket) -> None:
        config = setup.config
        self.now = time.monotonic()
        channel.setblocking(False)
        self._channel = channel
        self._books = Books(self, channel, per_source=config.limits.max_connections_per_source)
        self._listing = Listing(self._books.connections)
        self.enter, self.renew, self.complain, self.remark, self.count_connect = (
            self._books.enter,
            self._books.renew,
            self._books.complain,
            self._books.remark,
            self._books.count_connect,
        )
        self.engine = config.relay.engine
        self.pipes = PipePool(setup.pipes if self.engine != "copy" else 0)
        settling, idle, half_closed = _times(config)
        self.settling: Wheel[Connection] = Wheel(settling)
        self.idle: Wheel[Connection] = Wheel(idle)
        self.half_closed: Wheel[Connection] = Wheel(half_closed)
        # Where connections wait for their upstream, and for first bytes: a wheel a time-out, whoever's it is.
        self.headers: Wheel[Connection] = Wheel(HEADER_SECONDS)
        self._dialling: dict[float, Wheel[Connection]] = {}
        self._opening: dict[float, Wheel[Connection]] = {HEADER_SECONDS: self.headers}
        self.flushing: set[Connection] = set()
        self.knocking: set[Workload] = set()  # connections of theirs wait for room in the queue of a Unix socket

        self.asks = setup.asks
        self._alone = setup.alone
        self._handed: dict[str, Connection] = {}  # those that the owner has, or has given back to be relayed for it
        self._forward: list[tuple[report.ForwardOrder | report.RelayOrder, list[int]]] = []
        self._leaving = Leaving()
        self._set_relay(setup)
        self._asked: set[Workload] = set()  # to tell when they are idle
        self._old: dict[Workload, set[Connection]] = {}  # to tell when these have ended
        self._parts = self._setup_parts = b""
        self._again: list[Leg] = []
        self.sends: list[Leg] = []  # what is held there is sent at the end of the batch
        self._blocked: set[Leg] = set()
        self._waited_for: set[Leg] = set()

        self._stopping = False
        self._stalls_due = math.inf
        self._noisy: list[Locality] = []  # whose news wait
        self._noisy_due = math.inf

        self._epoll = select.epoll()
        self._place = Place()
        self._handlers: dict[int, Callable[[int], None]] = {channel.fileno(): self._on_orders}
        self._epoll.register(channel.fileno(), select.EPOLLIN)
        self._workloads: dict[str, Workload] = {}
        self._accepting = Accepting(
            self,
            setup,
            books=self._books,
            workloads=self._workloads,
            epoll=self._epoll,
            handlers=self._handlers,
        )

    def run(self) -> None:
        """Turns until the owner wants no more of it."""
        self._books.tell(report.READY)
        self._report()
        poll, handlers = self._epoll.poll, self._handlers
        while not self._stopping:
            timeout = self._timeout()
            spins = self._busy and self._books.connections and timeout
            events = self._spin(timeout) if spins else poll(timeout, _EVENTS)
            self.now = time.monotonic()
            for fd, event in events:
                handler = handlers.get(fd)
                if handler is not None:  # closed by what was done about an event before it
                    try:
                        handler(event)
                    except Exception as error:  # of none of the connections: those look after themselves
                        self.complain(error, "an event was not handled; this is a bug")
            if self.sends:
                sends, self.sends = self.sends, []
                for leg in sends:
                    if leg.held and leg.watched and not leg.send_held():
                        leg.connection.on_event(leg, 0)
            if self._again:
                again, self._again = self._again, []
                for leg in again:
                    leg.queued = False
                    if leg.watched:
                        leg.connection.on_event(leg, 0)
            if self._accepting.ready:
                self._accepting.take()
            if self._forward:
                orders, self._forward = self._forward, []
                for order, fds in orders:
                    self._take_back(order, fds)
            if self._asked:
                self._serve_queues()
            self._keep_time()

    def close(self, outcome: Outcome = "drained") -> None:
        """Resets what is left, with this outcome, and closes everything, the listeners first."""
        self._accepting.stop()
        for connection in list(self._books.connections.values()):
            connection.end(outcome)
        with contextlib.suppress(OSError):  # the last words, if there is anybody to hear them
            self._channel.settimeout(1.0)
            self._report()
        self._epoll.close()
        for workload in self._workloads.values():
            workload.close()
        self._place.close()
        self.pipes.close()

    # For connections.

    def watch(self, leg: Leg) -> None:
        """Tells the leg what epoll says of its socket, from now on until `part`."""
        self._epoll.register(leg.fd, WATCHED | select.EPOLLOUT if leg.watches_out else WATCHED)
        leg.watched = True
        self._handlers[leg.fd] = leg.arrive

    def unwatch(self, leg: Leg) -> None:
        """Tells it nothing more, and leaves its socket open."""
        leg.watched = False
        del self._handlers[leg.fd]
        self._epoll.unregister(leg.fd)

    def watch_writable(self, leg: Leg) -> None:
        """A send has blocked: from now on it is told, too, when one would not."""
        self._epoll.modify(leg.fd, WATCHED | select.EPOLLOUT)

    def note_blocked(self, leg: Leg) -> None:
        """Its peer does not read: if that goes on, it is looked whether it lives."""
        if not leg.tcp:
            return
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
        if leg.watched:
            leg.watched = False
            del self._handlers[leg.fd]
            if not self._alone or self.asks:
                # Elsewhere there may be a copy of this descriptor for a moment: with a program that is being started, until it
                # execs, or with the owner that has given the socket back. As long would epoll go on telling of it, under a number
                # that may be somebody else's by then.
                self._epoll.unregister(leg.fd)
        self._blocked.discard(leg)
        self._waited_for.discard(leg)
        if orderly:
            leg.sock.close()
        else:
            abort(leg.sock)

    def hand_over(self, connection: Connection) -> None:
        """Gives the connection's socket to the owner, whose program decides; it stays in the books here."""
        if connection.downstream.watched:  # it began with a header
            self.unwatch(connection.downstream)
        if self._books.outbox.full:
            # Nobody takes anything: the program that is to decide does not run.
            abort(connection.downstream.sock)
            return connection.end("policy_error")
        handed = report.HandedOver(
            id=f"{connection.identity:016x}",
            workload=connection.workload.name,
            source=connection.client[:2],
            original_destination=connection.destination[:2] if connection.destination else ("", 0),
            target=connection.target if isinstance(connection.target, str) else (connection.target or ("", 0))[:2],
            rule=connection.rule,
        )
        self._handed[handed.id] = connection
        self._books.hand_over(handed, connection.downstream.sock)
        return None

    def leave(self, connection: Connection, outcome: Outcome) -> None:
        """It has ended."""
        books = self._books
        self.flushing.discard(connection)
        connection.workload.waiting.pop(connection, None)
        if connection.relayed:
            outcome = "handled" if outcome == "closed" else outcome
            identity = f"{connection.identity:016x}"
            self._handed.pop(identity, None)
            received, sent = connection.moved_bytes()
            books.end_relayed(report.EndedOrder(identity, outcome, received, sent))
        books.leave(connection, outcome)
        workload = connection.workload
        if workload.tells_idle and not workload.connections:
            books.due = self.now
        self._accepting.note_end(workload)

    # Its own.

    def _timeout(self) -> float | None:
        """Seconds until something is due; None without anything."""
        if self._again or self._accepting.ready:
            return 0.0
        due = min(
            self.settling.due,
            self.idle.due,
            self.half_closed.due,
            self._books.due,
            self._stalls_due,
            self._accepting.due,
            self._noisy_due,
            self._leaving.due,
        )
        for wheel in (*self._dialling.values(), *self._opening.values()):
            due = min(due, wheel.due)
        if self.flushing:
            due = min(due, self.now + _FLUSH)
        if self.knocking:
            due = min(due, self.now + _KNOCK)
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
                if now >= connection.look_at:
                    connection.flush()
        for workload in list(self.knocking):
            self._knock(workload)
        for wheel in self._dialling.values():
            if now >= wheel.due:
                for connection in wheel.expire(now, also_active=True):
                    if not connection.settle():
                        connection.give_up()
        if now >= self.settling.due:
            for connection in self.settling.expire(now, also_active=True):
                connection.settle()
        if now >= self.idle.due:
            for connection in self.idle.expire(now):
                connection.end("idle_timeout")
        if now >= self.half_closed.due:
            for connection in self.half_closed.expire(now):
                connection.end("half_close_timeout")
        for wheel in self._opening.values():
            if now >= wheel.due:
                for connection in wheel.expire(now, also_active=True):
                    connection.open_late()
        if now >= self._accepting.due:
            self._accepting.keep_time(now)
        if now >= self._noisy_due:
            self._noisy_due = math.inf
            noisy, self._noisy = self._noisy, []
            for locality in noisy:
                locality.keeps = True
                self._epoll.modify(locality.fileno(), _NEWS)
        if now >= self._stalls_due:
            self._look_for_stalls()
        if now >= self._leaving.due:
            for connection in self._leaving.expire(now):
                self._end_wherever(connection)
        if now >= self._books.due:
            self._report()
        elif self._books.urgent and not self._books.hurry():
            self._stopping = True  # the owner is gone

    def _knock(self, workload: Workload) -> None:
        while workload.waiting:
            first = next(iter(workload.waiting))
            first.dial_again()
            if first in workload.waiting:
                return  # no room for the first one, so none for the others: asking for each would take all of our time
        self.knocking.discard(workload)

    def _report(self) -> None:
        books = self._books
        there = books.report()
        for workload in list(self._asked):
            # Who waited for room while others lived is served before it is said that nobody is left.
            if workload.tells_idle and not workload.connections and not self._accepting.take_all(workload):
                self._asked.discard(workload)
                workload.tells_idle = False
                books.tell(report.IDLE, workload.name.encode())
                there = books.report()
        for workload, old in list(self._old.items()):
            if old.isdisjoint(workload.connections):
                del self._old[workload]
                books.tell(report.OLD_ENDED, workload.name.encode())
                there = books.report()
        if not there:
            self._stopping = True  # the owner is gone

    def _look_for_stalls(self) -> None:
        """Peers that have not read for some time keep their connection until the idle time-out, as long as they live."""
        for leg in list(self._blocked):
            if not leg.writable and wait_for_reader(leg.sock, self._idle_timeout):
                self._blocked.discard(leg)
                self._waited_for.add(leg)
        for leg in list(self._waited_for):
            if leg.writable:  # it reads again, and is watched again
                watch_peer(leg.sock)
                self._waited_for.discard(leg)
        self._stalls_due = self.now + _STALLS if self._blocked or self._waited_for else math.inf

    def _wheel(self, kind: str, seconds: float) -> Wheel[Connection]:
        wheels = self._dialling if kind == "dial" else self._opening
        if seconds not in wheels:
            wheels[seconds] = Wheel(seconds)
        return wheels[seconds]

    def _add(self, setup: WorkloadSetup, listeners: Sequence[socket.socket], netns: int) -> None:
        """Serves one more workload, or another one in the place of that of its name. Raises OSError or TproxydError, with its sockets closed."""
        before = self._workloads.get(setup.name)
        workload = Workload(
            setup, listeners, netns, self._place, self._wheel, settling=self.settling.seconds, before=before
        )
        self._workloads[setup.name] = workload
        if before is not None:
            return self._replace(before, workload)
        try:
            for locality in workload.localities:
                self._handlers[locality.fileno()] = self._on_news(locality)
                self._epoll.register(locality.fileno(), _NEWS)
        except BaseException:
            del self._workloads[setup.name]
            raise
        self._accepting.open(workload)
        return None

    def _replace(self, before: Workload, workload: Workload) -> None:
        self._accepting.replace(before, workload)
        if before in self._asked:
            self._asked.discard(before)
            self._asked.add(workload)
        if not before.living:
            self._books.retire(before)

    def _end_wherever(self, connection: Connection) -> None:
        """Resets it, with the program or not: what is decided about it from now on comes too late."""
        identity = f"{connection.identity:016x}"
        if self._handed.pop(identity, None) is not None:
            self._books.tell(report.END_HANDLER, identity.encode())
        connection.end("drained")

    def _set_relay(self, setup: Setup) -> None:
        self._busy = setup.config.relay.busy_poll
        self._idle_timeout = setup.config.relay.idle_timeout

    def _tune(self, setup: Setup) -> None:
        """Takes from a setup what may change while connections live; it holds for them, too."""
        self._set_relay(setup)
        self._accepting.limit_to(setup)
        self._books.limit_sources(setup.config.limits.max_connections_per_source)
        for wheel, seconds in zip((self.settling, self.idle, self.half_closed), _times(setup.config), strict=True):
            if wheel.seconds != seconds:
                wheel.change(seconds)
        for connection in self._books.connections.values():
            if (
                connection.is_relayed and not connection.settled
            ):  # perhaps it waits in the wheel of its dial, for longer than that
                self.settling.add(connection)
        for workload in self._workloads.values():
            workload.settle_after(self.settling.seconds)
        self._accepting.look_for_room()

    def _remove(self, workload: Workload) -> None:
        """Resets what lives of it, and forgets it."""
        del self._workloads[workload.name]
        self._asked.discard(workload)
        self._old.pop(workload, None)
        self.knocking = {one for one in self.knocking if one.name != workload.name}
        self._accepting.close_listeners(workload)
        for connection in list(workload.connections):
            # With the program or not: what is decided about it from now on comes too late.
            self._handed.pop(f"{connection.identity:016x}", None)
            connection.end("drained")
        self._noisy = [one for one in self._noisy if one not in workload.localities]
        for locality in workload.localities:
            del self._handlers[locality.fileno()]
            self._epoll.unregister(locality.fileno())
        workload.close()
        self._accepting.share_out()

    def _on_news(self, locality: Locality) -> Callable[[int], None]:
        def take(_: int) -> None:
            # What is asked meanwhile is asked of the kernel, and kept by nobody.
            locality.keeps = False
            locality.forget()
            self._noisy.append(locality)
            self._noisy_due = min(self._noisy_due, self.now + _DEAF)

        return take

    def _serve_queues(self) -> None:
        """Whoever's handshake is complete is served before it is said that a workload is idle: no more than can wait in the queue."""
        for workload in self._asked:
            if not workload.tells_idle:
                self._accepting.take_queue(workload)
                workload.tells_idle = True
                self._books.due = self.now

    # With the owner.

    def _on_orders(self, _: int) -> None:
        for _ in range(_ORDERS):
            try:
                order, fds, _, _ = socket.recv_fds(self._channel, report.MESSAGE, report.FDS)
            except BlockingIOError:
                return
            except OSError:
                order, fds = b"", []
            self._obey(order[:1], order[1:], fds)
            if self._stopping:
                return

    def _obey(self, kind: bytes, content: bytes, fds: list[int]) -> None:
        match kind:
            case report.FORWARD:
                # Dialled after this batch of events, as every new connection.
                self._forward.append((msgspec.msgpack.decode(content, type=report.ForwardOrder), fds))
            case report.RELAY:
                self._forward.append((msgspec.msgpack.decode(content, type=report.RelayOrder), fds))
            case report.RESET:
                self._reset(content.decode())
            case report.ENDED:
                ended = msgspec.msgpack.decode(content, type=report.EndedOrder)
                handed = self._handed.pop(ended.id, None)
                if handed is not None:
                    handed.end_handed(ended.outcome, ended.bytes_from_client, ended.bytes_from_upstream)
            case report.ADD_PART:
                self._parts += content
            case report.ADD:
                data, self._parts = self._parts + content, b""
                self._add_as_ordered(data, fds)
            case report.SETUP_PART:
                self._setup_parts += content
            case report.SETUP_END:
                data, self._setup_parts = self._setup_parts + content, b""
                self._tune(pickle.loads(data))  # noqa: S301  # from the owner alone, over a socket that has no name
            case report.LET_GO:
                name, seconds = msgspec.msgpack.decode(content, type=tuple[str, float])
                if (workload := self._workloads.get(name)) is not None:
                    captures = compile_capture(workload.capture, workload.is_local)
                    self._leaving.judge(workload.connections, captures, self.now + seconds)
            case report.SHED:
                name, addresses = msgspec.msgpack.decode(content, type=tuple[str, list[tuple[str, int]]])
                workload = self._workloads.get(name)
                if workload is None or not self._accepting.shed(workload, addresses):
                    self._books.tell(report.LISTENERS_CLOSED, name.encode())
            case report.REMOVE:
                name = content.decode()
                if name in self._workloads:
                    self._remove(self._workloads[name])
                self._books.tell(report.REMOVED, content)
            case report.RETIRE:
                if (workload := self._workloads.get(content.decode())) is not None:
                    self._accepting.close_listeners(workload)
            case report.TELL_IDLE:
                workload = self._workloads.get(content.decode())
                if workload is not None:
                    self._asked.add(workload)
            case report.TELL_OLD:
                workload = self._workloads.get(content.decode())
                if workload is not None:
                    self._old[workload] = set(workload.connections)
                    self._books.due = self.now
            case report.PAUSE:
                workload = self._workloads.get(content.decode())
                if workload is not None:
                    self._accepting.pause(workload)
            case report.RESUME:
                workload = self._workloads.get(content.decode())
                if workload is not None:
                    self._accepting.resume(workload)
            case report.TELL_COUNTERS:
                self._books.tell(
                    report.COUNTED, msgspec.msgpack.encode(self._books.count_now(self._workloads.values()))
                )
            case report.LIST:
                page = self._listing.page(msgspec.msgpack.decode(content, type=ListOrder), self.now)
                self._books.tell(report.LISTED, msgspec.msgpack.encode(page))
            case report.CLOSE:
                close = msgspec.msgpack.decode(content, type=CloseOrder)
                self._books.tell(report.CLOSED, msgspec.msgpack.encode(Answer(close.number, self._close(close.id))))
            case report.STOP:
                self._stopping = True
            case _:
                self._stopping = True  # the owner is gone

    def _close(self, identity: str) -> Literal["closed", "none", "handed"]:
        """Resets a connection of that identity on both sides; one that is with the owner is the owner's to end."""
        if identity in self._handed:
            return "handed"
        connection = self._books.connections.get(int(identity, 16))
        if connection is None:
            return "none"
        connection.end("drained")
        return "closed"

    def _add_as_ordered(self, data: bytes, fds: list[int]) -> None:
        """The setup of a workload, and with it the descriptors of its namespace and its listeners."""
        setup: WorkloadSetup = pickle.loads(data)  # noqa: S301  # from the owner alone, over a socket that has no name
        try:
            if len(fds) != 1 + (len(setup.listen) if setup.listeners is None else setup.listeners):
                for fd in fds:
                    os.close(fd)
                raise OSError(errno.EMFILE, "the kernel had no descriptors for it here; raise LimitNOFILE (ulimit -n)")
            netns, *listeners = fds
            opened = [socket.socket(fileno=fd) for fd in listeners]
            for listener in opened:
                listener.setblocking(False)
            self._add(setup, opened, netns)
        except (OSError, TproxydError) as error:
            self._books.tell(report.ADDED, msgspec.msgpack.encode((setup.name, str(error))))
        else:
            self._books.tell(report.ADDED, msgspec.msgpack.encode((setup.name, "")))

    def _take_back(self, order: report.ForwardOrder | report.RelayOrder, fds: list[int]) -> None:
        relays = isinstance(order, report.RelayOrder)
        connection = self._handed.get(order.id)
        if connection is None or len(fds) < 1 + relays:
            for fd in fds:
                abort(socket.socket(fileno=fd))
            if connection is not None:
                full = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                self.complain(
                    full, "no file left for a connection that the program has given back; raise LimitNOFILE (ulimit -n)"
                )
                connection.relayed = relays  # and somebody waits for its end
                connection.end("error")
                self._handed.pop(order.id, None)
            elif isinstance(order, report.RelayOrder):  # it has been ended here meanwhile
                ended = report.EndedOrder(order.id, "drained", order.bytes_from_client, order.bytes_from_upstream)
                self._books.end_relayed(ended)
            return None
        # Not the client's: a PROXY header may tell of one of the other family.
        client = accepted_socket(connection.downstream.sock.family, fds[0])
        if isinstance(order, report.RelayOrder):
            return connection.relay(client, accepted_socket(order.family, fds[1]), order)
        del self._handed[order.id]
        self._books.renew(connection)
        return connection.take_back(client, order.target)

    def _reset(self, identity: str) -> None:
        """The owner does not want it to be relayed any more, and will say how it has ended."""
        for order, fds in self._forward:
            if order.id == identity:
                for fd in fds:
                    abort(socket.socket(fileno=fd))
                self._forward.remove((order, fds))
                break
        connection = self._handed.get(identity)
        if connection is not None:
            connection.stop_relaying()


def _times(config: Config) -> tuple[float, float, float]:
    """After how many seconds a connection is one that stays, and what the time-outs of silence and of one direction are."""
    shortest = min(config.relay.idle_timeout, config.relay.half_close_timeout)
    return min(_SETTLE, shortest), config.relay.idle_timeout, shortest
