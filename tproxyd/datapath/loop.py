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

import msgspec

from tproxyd.datapath import report
from tproxyd.datapath.books import Books
from tproxyd.datapath.connection import Connection
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
_ACCEPTS = 64  # new connections between two looks at the old ones, of each listener
_ORDERS = 128  # of the owner, taken at a time: with a policy there are as many as connections
_FLUSH = 0.002  # seconds between two looks at what a peer has taken
_KNOCK = 0.01  # seconds between two tries to get into the queue of a Unix socket
_DEAF = 0.02  # seconds after news of routes until more is heard: in a namespace of somebody else's there may be as much as he likes
_PAUSE = 0.1  # seconds; without files the queue waits, connections that end give them back
_STALLS = 20.0  # seconds between two looks for peers that do not read; the kernel gives them two minutes
_SETTLE = 5.0  # seconds after which a connection is worth the four system calls that watch its server
_NEWS = select.EPOLLIN | select.EPOLLONESHOT  # nothing, and no error either, until it is asked for again

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
        self.enter, self.renew, self.complain, self.remark, self.count_connect = (
            self._books.enter,
            self._books.renew,
            self._books.complain,
            self._books.remark,
            self._books.count_connect,
        )
        self.engine = config.relay.engine
        self.pipes = PipePool(setup.pipes if self.engine != "copy" else 0)
        shortest = min(config.relay.idle_timeout, config.relay.half_close_timeout)
        self.settling: Wheel[Connection] = Wheel(min(_SETTLE, shortest))
        self.idle: Wheel[Connection] = Wheel(config.relay.idle_timeout)
        self.half_closed: Wheel[Connection] = Wheel(shortest)
        # Where connections wait for their upstream, and for first bytes: a wheel a time-out, whoever's it is.
        self.headers: Wheel[Connection] = Wheel(HEADER_SECONDS)
        self._dialling: dict[float, Wheel[Connection]] = {}
        self._opening: dict[float, Wheel[Connection]] = {HEADER_SECONDS: self.headers}
        self.flushing: set[Connection] = set()
        self.knocking: set[Workload] = set()  # connections of theirs wait for room in the queue of a Unix socket

        self.asks = setup.asks
        self._alone = setup.alone
        self._handed: dict[str, Connection] = {}
        self._forward: list[tuple[report.ForwardOrder, int]] = []
        self._backlog = config.listen.backlog
        self._limit = setup.limit
        self._full = (
            f"{setup.limit} connections live, as many as limits.max_connections allows: new ones wait"
            if config.limits.max_connections != "auto"
            else f"{setup.limit} connections are all there are files for: new ones wait; raise LimitNOFILE (ulimit -n)"
        )
        self._busy = config.relay.busy_poll
        self._idle_timeout = config.relay.idle_timeout
        self._asked: set[Workload] = set()  # to tell when they are idle
        self._parts = b""
        self._again: list[Leg] = []
        self.sends: list[Leg] = []  # what is held there is sent at the end of the batch
        self._blocked: set[Leg] = set()
        self._waited_for: set[Leg] = set()

        self._stopping = False
        self._stalls_due = math.inf
        self._resume_due = math.inf
        self._noisy: list[Locality] = []  # whose news wait
        self._noisy_due = math.inf

        self._epoll = select.epoll()
        self._place = Place()
        self._handlers: dict[int, Callable[[int], None]] = {channel.fileno(): self._on_orders}
        self._epoll.register(channel.fileno(), select.EPOLLIN)
        self._workloads: dict[str, Workload] = {}
        self._ready: dict[socket.socket, Workload] = {}
        self._accepting = True
        # Of several workloads each has its share of the last quarter of the room, and none more: what one of them keeps open does not keep the
        # others' clients waiting.
        self._common = self._share = self._limit
        self._sated: set[Workload] = set()  # those that have their share, while only shares are left

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
            if self._ready:
                ready, self._ready = self._ready, {}
                for listener, workload in ready.items():
                    self._accept(workload, listener)
            if self._forward:
                orders, self._forward = self._forward, []
                for order, fd in orders:
                    self._take_back(order, fd)
            if self._asked:
                self._serve_queues()
            self._keep_time()

    def close(self, outcome: Outcome = "drained") -> None:
        """Resets what is left, with this outcome, and closes everything, the listeners first."""
        self._accepting = False  # nothing is accepted any more, however much room there is
        for workload in self._workloads.values():
            workload.close_listeners()
        for connection in list(self._books.connections):
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
        self._books.tell(report.HAND_OVER, msgspec.msgpack.encode(handed), sock=connection.downstream.sock)
        return None

    def leave(self, connection: Connection, outcome: Outcome) -> None:
        """It has ended."""
        books = self._books
        self.flushing.discard(connection)
        connection.workload.waiting.pop(connection, None)
        books.leave(connection, outcome)
        workload = connection.workload
        if workload.tells_idle and not workload.connections:
            books.due = self.now
        if not self._accepting and self._resume_due == math.inf and len(books.connections) < self._limit:
            self._resume_accepting()
        if self._sated and self._accepting:
            if len(books.connections) < self._common:
                self._feed(*self._sated)
            elif workload in self._sated and len(workload.connections) < self._share:
                self._feed(workload)

    # Its own.

    def _timeout(self) -> float | None:
        """Seconds until something is due; None without anything."""
        if self._again or self._ready:
            return 0.0
        due = min(
            self.settling.due,
            self.idle.due,
            self.half_closed.due,
            self._books.due,
            self._stalls_due,
            self._resume_due,
            self._noisy_due,
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
        if now >= self._resume_due:
            self._resume_due = math.inf
            self._resume_accepting()
        if now >= self._noisy_due:
            self._noisy_due = math.inf
            noisy, self._noisy = self._noisy, []
            for locality in noisy:
                locality.keeps = True
                self._epoll.modify(locality.fileno(), _NEWS)
        if now >= self._stalls_due:
            self._look_for_stalls()
        if now >= self._books.due:
            self._report()

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
            if workload.tells_idle and not workload.connections and not self._accept_all(workload):
                self._asked.discard(workload)
                workload.asked_idle = workload.tells_idle = False
                books.tell(report.IDLE, workload.name.encode())
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
        """Serves one more workload. Raises OSError or TproxydError, with its sockets closed."""
        workload = self._workloads[setup.name] = Workload(
            setup, listeners, netns, self._place, self._wheel, settling=self.settling.seconds
        )
        for locality in workload.localities:
            self._handlers[locality.fileno()] = self._on_news(locality)
            self._epoll.register(locality.fileno(), _NEWS)
        self._share_out()
        if self._accepting:
            self._listen_to(workload)

    def _share_out(self) -> None:
        count = len(self._workloads)
        self._common = self._limit if count < 2 else self._limit - self._limit // 4
        self._share = self._limit if count < 2 else max(1, self._limit // 4 // count)
        if self._accepting:
            self._feed(*self._sated)

    def _feed(self, *workloads: Workload) -> None:
        """Lets them accept again."""
        self._sated.difference_update(workloads)
        for workload in workloads:
            self._listen_to(workload)

    def _remove(self, workload: Workload) -> None:
        """Resets what lives of it, and forgets it."""
        del self._workloads[workload.name]
        self._asked.discard(workload)
        self.knocking.discard(workload)
        if self._accepting and workload not in self._sated:
            self._turn_away(workload)
        self._sated.discard(workload)
        for listener in workload.listeners:
            self._ready.pop(listener, None)
        workload.close_listeners()
        for connection in list(workload.connections):
            # With the program or not: what is decided about it from now on comes too late.
            self._handed.pop(f"{connection.identity:016x}", None)
            connection.end("drained")
        self._noisy = [one for one in self._noisy if one not in workload.localities]
        for locality in workload.localities:
            del self._handlers[locality.fileno()]
            self._epoll.unregister(locality.fileno())
        workload.close()
        self._share_out()

    def _retire(self, workload: Workload) -> None:
        """Accepts nothing of it any more: whoever waits is served by others, who have the same listeners. What lives goes on."""
        if self._accepting and workload not in self._sated:
            self._turn_away(workload)
        for listener in workload.listeners:
            self._ready.pop(listener, None)
        workload.close_listeners()

    def _on_news(self, locality: Locality) -> Callable[[int], None]:
        def take(_: int) -> None:
            # What is asked meanwhile is asked of the kernel, and kept by nobody.
            locality.keeps = False
            locality.forget()
            self._noisy.append(locality)
            self._noisy_due = min(self._noisy_due, self.now + _DEAF)

        return take

    def _on_listener(self, workload: Workload, listener: socket.socket) -> Callable[[int], None]:
        # At most once a turn: what a flood brings must not keep the connections that live from theirs.
        return lambda _: self._ready.__setitem__(listener, workload)

    def _listen_to(self, workload: Workload) -> None:
        for listener in workload.listeners:
            self._handlers[listener.fileno()] = self._on_listener(workload, listener)
            self._epoll.register(listener.fileno(), select.EPOLLIN)

    def _turn_away(self, workload: Workload) -> None:
        for listener in workload.listeners:
            del self._handlers[listener.fileno()]
            self._epoll.unregister(listener.fileno())

    def _resume_accepting(self) -> None:
        self._accepting = True
        for workload in self._workloads.values():
            self._listen_to(workload)

    def _pause_accepting(self) -> None:
        self._accepting = False
        for workload in self._workloads.values():
            if workload not in self._sated:
                self._turn_away(workload)
        self._sated.clear()

    def _serve_queues(self) -> None:
        """Whoever's handshake is complete is served before it is said that a workload is idle: no more than can wait in the queue."""
        for workload in self._asked:
            if not workload.tells_idle:
                for _ in range(1 + self._backlog // _ACCEPTS):
                    if not self._accept_all(workload):
                        break
                workload.tells_idle = True
                self._books.due = self.now

    def _accept_all(self, workload: Workload) -> int:
        return sum(self._accept(workload, listener) for listener in workload.listeners)

    def _accept(self, workload: Workload, listener: socket.socket) -> int:
        """Takes what waits, as far as there is room; how many that were."""
        books = self._books
        family, accept = workload.accepts[listener]
        for count in range(_ACCEPTS):
            if not self._accepting:
                return count
            if len(books.connections) >= self._limit:
                books.remark(self._full)
                self._pause_accepting()
                return count
            if len(books.connections) >= self._common and len(workload.connections) >= self._share:
                if workload not in self._sated:
                    books.remark(
                        f"workload {workload.name} has its share of the room that is left, {self._share} connections: its new ones wait",
                        kind="share",
                    )
                    self._sated.add(workload)
                    self._turn_away(workload)
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
            connection = Connection(self, workload, accepted_socket(family, fd), client, books.next_identity())
            books.open(connection)
            connection.begin()
        self._ready[listener] = workload
        return _ACCEPTS

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
                self._forward.append((msgspec.msgpack.decode(content, type=report.ForwardOrder), fds[0] if fds else -1))
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
            case report.REMOVE:
                name = content.decode()
                if name in self._workloads:
                    self._remove(self._workloads[name])
                self._books.tell(report.REMOVED, content)
            case report.RETIRE:
                if (workload := self._workloads.get(content.decode())) is not None:
                    self._retire(workload)
            case report.TELL_IDLE:
                workload = self._workloads.get(content.decode())
                if workload is not None and not workload.asked_idle:
                    workload.asked_idle = True
                    self._asked.add(workload)
            case report.TELL_COUNTERS:
                self._books.tell(
                    report.COUNTED, msgspec.msgpack.encode(self._books.count_now(self._workloads.values()))
                )
            case report.STOP:
                self._stopping = True
            case _:
                self._stopping = True  # the owner is gone

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
            self._workloads.pop(setup.name, None)
            self._books.tell(report.ADDED, msgspec.msgpack.encode((setup.name, str(error))))
        else:
            self._books.tell(report.ADDED, msgspec.msgpack.encode((setup.name, "")))

    def _take_back(self, order: report.ForwardOrder, fd: int) -> None:
        connection = self._handed.pop(order.id, None)
        if connection is None or fd < 0:
            if fd >= 0:
                abort(socket.socket(fileno=fd))
            if connection is not None:
                full = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                self.complain(
                    full, "no file left for the connection that the policy forwards; raise LimitNOFILE (ulimit -n)"
                )
                connection.end("error")
            return
        self._books.renew(connection)
        # Not the client's: a PROXY header may tell of one of the other family.
        connection.take_back(accepted_socket(connection.downstream.sock.family, fd), order.target)
