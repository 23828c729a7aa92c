"""One connection's whole life on the fast path: accepted, decided, dialled, relayed, recorded.

A plain object that the loop's events drive; no task, no coroutine, no stream. A connection that breaks is not an error: every
way in which it can end has an outcome, and only a surprise is logged. The rule for its last moment: the client never sees an
orderly close for something that went wrong. It gets a reset, after the bytes that came before it.

    (reading ──▶) dialling ──connected──▶ (sniffing ──▶) relaying ──both FINs passed on──▶ closed
                    ▲ │                                     │
                    │ └──refused, reset, ...               └──one side broke──▶ flushing ──▶ closed
                    └── handed over to the embedding program, and taken back, or ended there, or relayed to an upstream of the program's

`reading`: the client begins with a PROXY header, before which nothing is decided. `sniffing`: a header for the server waits for the names in
a ClientHello. Most connections know neither.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from typing import TYPE_CHECKING

from tproxyd.datapath.opening import (
    HEADER_SECONDS,
    InvalidHeaderError,
    make_header,
    names_of,
    peek_hello,
    take_header,
)
from tproxyd.datapath.record import UPSTREAM_OUTCOMES, Outcome
from tproxyd.datapath.timers import Timed
from tproxyd.datapath.transfer import Leg, LegBrokenError
from tproxyd.net.sockets import (
    Address,
    adopt_upstream,
    answer_at_once,
    format_address,
    format_target,
    round_trip_seconds,
    unsent_bytes,
    watch_peer,
)

if TYPE_CHECKING:
    from tproxyd.datapath.client_hello import ClientHello
    from tproxyd.datapath.listing import State
    from tproxyd.datapath.loop import RelayLoop
    from tproxyd.datapath.report import RelayOrder
    from tproxyd.datapath.workload import Workload

__all__ = ["Connection"]

_IN = select.EPOLLIN
_OUT = select.EPOLLOUT
_UNUSUAL = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR | select.EPOLLPRI
_ERROR = select.EPOLLERR
_FAILED = select.EPOLLERR | select.EPOLLHUP

# Bytes that a reset must not overtake: wait while the peer takes them, until it has taken none for this long, in seconds, or for
# two round trips, which is how often news of it comes. A client gets more: a slow one may tell only once a second that it has read (a
# receiver announces room when much of it is free), and has a right to what the server has said. What a client has sent that
# went away is worth little, and its server is to know soon.
_CLIENT_STALL = 2.0
_APP_STALL = 0.05
# Seconds between two looks at what a peer has taken; and with one that takes nothing, of which there may be many.
_LOOK = 0.002
_LOOK_SELDOM = 0.064

# The outcome alone does not tell these from a stale socket, or from a host that cannot be reached.
_NO_UNIX_SOCKET = {
    errno.ENOENT: "there is no such socket (ENOENT); start its app, or give upstream.target the path that the app was given",
    errno.EACCES: "permission denied (EACCES); it takes write permission on the socket, and search permission (x) on each directory above",
}

_READING, _DIALLING, _SNIFFING, _RELAYING, _FLUSHING, _HANDED, _CLOSED = range(7)
_STAGES: tuple[State, ...] = ("reading", "dialling", "sniffing", "relaying", "flushing", "handed")


class Connection(Timed):
    """Made by the loop for each accepted socket; `begin` decides about it and dials, and everything else is an event's work.

    `end` may be called at any time, with the outcome; the first one counts. `client` and `destination` are those of a PROXY header, where
    one came in; `dialled` is what the socket itself says. `hello` has the names of the client's TLS, as soon as they are known.
    """

    __slots__ = (
        "broken",
        "bytes_left",
        "client",
        "counted",
        "destination",
        "dialled",
        "downstream",
        "flush_end",
        "handed_upstream",
        "hello",
        "identity",
        "look_at",
        "loop",
        "moved",
        "patience",
        "pause",
        "relayed",
        "rule",
        "settled",
        "started",
        "state",
        "target",
        "upstream",
        "upstream_source",
        "workload",
    )

    broken: tuple[Leg, Outcome]
    bytes_left: int
    dialled: Address
    look_at: float
    moved: float
    pause: float
    flush_end: float
    patience: float

    def __init__(
        self, loop: RelayLoop, workload: Workload, sock: socket.SocketType, client: Address, identity: int
    ) -> None:
        super().__init__(loop.now)
        self.loop = loop
        self.workload = workload
        self.identity = identity
        self.started = loop.now
        self.client = client
        self.destination: Address | None = None
        self.hello: ClientHello | None = None
        self.target: Address | str | None = None  # a str is the path of a Unix socket
        self.upstream_source: Address | None = None
        self.rule: str | None = None
        self.state = _DIALLING
        self.counted = False
        self.handed_upstream = 0
        self.relayed = False  # to an upstream of the embedding program's, which waits for its end
        self.settled = False
        self.downstream = Leg(loop, self, sock, accepted=True)
        self.upstream: Leg | None = None

    @property
    def stage(self) -> State:
        """What is done with it, in a word; it lives."""
        return _STAGES[self.state]

    def begin(self) -> None:
        """From accept, or from a part of a PROXY header, to the dial: is it meant for us, does it come from us, do limits and policy
        allow it?"""
        try:
            self._begin()
        except OSError as error:
            if error.errno in (errno.ENOTCONN, errno.ECONNRESET):
                self.end("client_reset")  # left before it was looked at
            else:
                self._fail(error)
        except InvalidHeaderError as error:
            self._refuse_header(str(error))
        except Exception as error:  # a surprise costs this connection only
            self._fail(error)

    def end(self, outcome: Outcome) -> None:
        """Closes both sockets, in order if the outcome is `closed` and with a reset otherwise, and leaves the record."""
        if self.state == _CLOSED:
            return
        handed = self.state == _HANDED  # its socket is elsewhere
        self.state = _CLOSED
        self.leave_wheel()
        for leg in (self.downstream, self.upstream):
            if leg is not None and not handed:
                leg.drop()
                self.loop.part(leg, orderly=outcome == "closed")
        self.loop.leave(self, outcome)
        # Nothing may refer in a circle: what has ended is to be freed at once, not by the garbage collector.
        del self.downstream.connection
        if self.upstream is not None:
            del self.upstream.connection, self.upstream.other, self.downstream.other

    @property
    def is_known(self) -> bool:
        """Whether it is said who the client is: not before its PROXY header, where it begins with one."""
        return self.state not in (_READING, _CLOSED)

    @property
    def is_relayed(self) -> bool:
        return self.state == _RELAYING

    def peer_host(self) -> str:
        """The address from which its packets come, which is not the client's where a proxy speaks for one."""
        if self.workload.begins_with_header is not None and self.state != _HANDED:
            with contextlib.suppress(OSError):  # gone, which is noticed elsewhere
                return str(self.downstream.sock.getpeername()[0])
        return self.client[0]

    def settle(self) -> bool:
        """It has lived for some seconds, and is worth the system calls with which the kernel watches whether the server is still
        there; from now on its time-out runs. False if it is still dialling."""
        upstream = self.upstream
        if self.state == _DIALLING or upstream is None:
            return False
        self.settled = True
        try:
            if upstream.tcp:
                watch_peer(upstream.sock)
            if not upstream.writable:
                self.loop.note_blocked(upstream)  # what it was given for that is undone
        except OSError as error:
            self._fail(error)
        else:
            half_closed = upstream.passed_on or self.downstream.passed_on
            (self.loop.half_closed if half_closed else self.loop.idle).add(self)
        return True

    def flush(self) -> None:
        """One side has broken: gives the other one what came before, for as long as it takes it, and then ends both.

        Called again and again: the kernel has no event for what a peer has taken.
        """
        try:
            self._flush()
        except Exception as error:  # a surprise costs this connection only
            self._fail(error)

    def _flush(self) -> None:
        source = self.broken[0]
        sink = source.other
        try:
            source.pump()
        except LegBrokenError as error:
            source.ended = True
            if error.leg is sink:
                return self.end(self.broken[1])
        try:
            left = len(source.held) + source.in_pipe + unsent_bytes(sink.sock)
        except OSError:
            left = 0  # gone: nothing can be flushed
        now = self.loop.now
        if left != self.bytes_left:
            self.bytes_left, self.moved, self.pause = left, now, _LOOK
        else:
            self.pause = min(2 * self.pause, _LOOK_SELDOM)
        self.look_at = now + self.pause
        done = left == 0 and (source.ended or not source.readable)
        if done or now - self.moved >= self.patience or now >= self.flush_end:
            self.end(self.broken[1])
        return None

    def _begin(self) -> None:
        loop, workload = self.loop, self.workload
        destination = self.destination
        if destination is None:
            destination = self.destination = self.dialled = workload.original_destination(self.downstream.sock)
        else:
            header = take_header(self.downstream)
            if header is None:
                return None
            self.leave_wheel()
            self.state = _DIALLING
            self.active = loop.now  # the time-outs behind it are not the worse for it
            self.hello = names_of(header)
            if header.source is not None and header.destination is not None:
                if workload.is_nobody(header.source[0]):
                    raise InvalidHeaderError(
                        f"its PROXY header has the client {header.source[0]}, from where nobody can come"
                    )
                self.client, destination = header.source, header.destination
                self.destination = destination
                loop.renew(self)
        client = self.client
        local = workload.is_local(destination[0])
        # What this host itself sends is never captured, so a client with an address of this host is a connection of ours that a
        # router has sent back.
        if workload.is_listener(destination, local=local) or workload.is_local(client[0]):
            return self.end("self_call")
        if (
            workload.begins_with_header is not None
            and not self.downstream.watched
            and workload.begins_with_header(client[0])
        ):
            self.state = _READING
            loop.watch(self.downstream)
            loop.headers.add(self)
            return self._begin()  # it may be there already
        if not loop.enter(self):
            return self.end("limit")
        verdict = workload.decide(client[0], destination[0], destination[1])
        self.rule = verdict.rule
        if verdict.action == "refuse":
            return self.end("refused_by_policy")
        if verdict.target is None:
            target = self.target = workload.target_of(destination)
        else:
            target = self.target = verdict.target
        is_local = local
        if target is not destination and not isinstance(target, str):
            is_local = workload.is_local_target(target[0])
            if workload.is_listener(target, local=is_local):
                return self.end("self_call")
        if loop.asks:
            self.state = _HANDED
            return loop.hand_over(self)
        if workload.dials_elsewhere and workload.comes_back(target):
            return self.end("self_call")
        if not self.downstream.watched:
            loop.watch(self.downstream)
        return self._dial(is_local, local if self.dialled is destination else workload.is_local(self.dialled[0]))

    def take_back(self, sock: socket.SocketType, target: tuple[str, int] | None) -> None:
        """The embedding program has decided that it is forwarded, to another `target` or to the one that the configuration says."""
        self.downstream = Leg(self.loop, self, sock, accepted=True)
        self.state = _DIALLING
        try:
            loop, workload = self.loop, self.workload
            if target is not None:
                self.target = target
            assert self.target is not None
            is_local = False
            if not isinstance(self.target, str):
                is_local = workload.is_local_target(self.target[0])
                if workload.is_listener(self.target, local=is_local):
                    return self.end("self_call")
            if workload.dials_elsewhere and workload.comes_back(self.target):
                return self.end("self_call")
            loop.watch(self.downstream)
            return self._dial(is_local, workload.is_local(self.dialled[0]))
        except Exception as error:  # a target that is no address, for example
            return self._fail(error)

    def end_handed(self, outcome: Outcome, bytes_from_client: int, bytes_from_upstream: int) -> None:
        """The embedding program is through with it. What is relayed for it is reset, and more may have been moved than it knows."""
        self.relayed = False  # nobody waits
        self.downstream.received = max(self.downstream.received, bytes_from_client)
        self.handed_upstream = bytes_from_upstream
        if self.upstream is not None:
            self.upstream.received = max(self.upstream.received, bytes_from_upstream)
        self.end(outcome)

    def relay(self, client: socket.SocketType, sock: socket.SocketType, order: RelayOrder) -> None:
        """The embedding program has connected it to an upstream, and wants nothing of the bytes from now on."""
        loop = self.loop
        downstream = self.downstream = Leg(loop, self, client, accepted=True)
        upstream = self.upstream = Leg(loop, self, sock, accepted=False)
        upstream.other, downstream.other = downstream, upstream
        upstream.watches_out = False  # it is connected
        downstream.nonblocking = True  # as the program had it
        downstream.received, upstream.received = order.bytes_from_client, order.bytes_from_upstream
        downstream.held = order.data
        self.relayed = True
        self.state = _RELAYING
        self.active = loop.now
        try:
            self.target, self.upstream_source = adopt_upstream(sock)
            # What waits there already is told at once.
            loop.watch(downstream)
            loop.watch(upstream)
            loop.settling.add(self)
            if order.data:
                self._relay(downstream, 0)
        except Exception as error:  # a surprise costs this connection only
            self._fail(error)

    def stop_relaying(self) -> None:
        """Resets both sides of what is relayed for the program, which is still to say how it ended."""
        if not self.relayed:
            return
        self.relayed = False
        self.state = _HANDED
        self.leave_wheel()
        self.loop.flushing.discard(self)
        for leg in (self.downstream, self.upstream):
            assert leg is not None
            leg.drop()
            self.loop.part(leg, orderly=False)

    def moved_bytes(self) -> tuple[int, int]:
        """From the client, and from the upstream, which may be the embedding program."""
        upstream = self.upstream
        return self.downstream.received, self.handed_upstream if upstream is None else upstream.received

    def _dial(self, is_local: bool, dialled_local: bool) -> None:
        """Towards the target, as whom `upstream.source` says; whether it, and what has been dialled, are addresses of this host.

        What a PROXY header calls the destination is not asked about: by which way answers come back depends on where packets went.
        """
        loop, workload, target = self.loop, self.workload, self.target
        assert target is not None
        if isinstance(target, str):
            return self._dial_unix()
        choice = workload.choose_source(self.client[0], self.dialled, target, is_local, dialled_local)  # type: ignore[arg-type]  # known, once it is dialled
        if not choice.ways:
            loop.remark(
                f'a connection is refused: upstream.source = "client", and {format_address(target)} would see {choice.why}',
                kind=choice.why,
            )
            return self.end("refused_by_policy")
        sock, number, way = workload.enter().dial(choice, self.client, target)
        if sock is None:
            return self._not_connected(number)
        if way == "client" and self.client[1]:  # a PROXY header may tell of port 0, and the kernel chooses
            self.upstream_source = self.client
        return self._begin_connecting(sock, number)

    def give_up(self) -> None:
        """No word from the server within `connect_timeout`."""
        try:
            self._not_connected(errno.ETIMEDOUT)
        except Exception as error:  # a surprise costs this connection only
            self._fail(error)

    def dial_again(self) -> None:
        """There may be room in the queue of the Unix socket."""
        try:
            self._dial_unix()
        except Exception as error:  # a surprise costs this connection only
            self._fail(error)

    def _dial_unix(self) -> None:
        assert isinstance(self.target, str)
        waiting = self.workload.waiting
        sock, number = None, errno.EAGAIN
        if not waiting or next(iter(waiting)) is self:  # who comes later does not overtake
            sock, number = self.workload.enter().dial_unix(self.target)
        if number == errno.EAGAIN:
            waiting[self] = None  # until connect_timeout; who is there keeps its place
            self.loop.knocking.add(self.workload)
            return self.workload.dialling.add(self)
        waiting.pop(self, None)
        if sock is None:
            return self._not_connected(number)
        return self._begin_connecting(sock, number)

    def _begin_connecting(self, sock: socket.SocketType, number: int) -> None:
        upstream = self.upstream = Leg(self.loop, self, sock, accepted=False)
        upstream.other, self.downstream.other = self.downstream, upstream
        self.loop.watch(upstream)
        if number == 0:
            return self._connected()
        return self.workload.dialling.add(self)

    def on_event(self, leg: Leg, events: int) -> None:
        """Something has become possible on this leg's socket, or has to be looked at again (no events)."""
        if self.state == _RELAYING:
            return self._relay(leg, events)
        leg.note(events)
        if self.state == _FLUSHING:
            self.flush()
        elif leg is self.downstream and events & _ERROR:
            self.end("client_reset")  # nobody waits for the server any more
        elif self.state == _READING:
            self.begin()
        else:
            try:
                if leg is self.upstream:
                    self._on_dial(leg, events)
                elif self.state == _SNIFFING:
                    self._connected()
                elif self.workload.sniffing is not None and self.hello is None:
                    self.hello = peek_hello(leg)
            except Exception as error:  # a surprise costs this connection only
                self._fail(error)
        return None

    def open_late(self) -> None:
        """The client's first bytes have not come in time: without a PROXY header it is refused, and a ClientHello is done without."""
        if self.state == _READING:
            return self._refuse_header(f"its PROXY header was not complete within {HEADER_SECONDS:g} s")
        try:
            self._connected()
        except Exception as error:  # a surprise costs this connection only
            self._fail(error)
        return None

    def _refuse_header(self, why: str) -> None:
        text = f"the connection from {format_address(self.client)}, which is in listen.proxy_protocol_from, is refused: {why}"
        self.loop.remark(text, kind="PROXY header")
        self.end("refused_by_policy")

    def on_error(self, leg: Leg, number: int) -> None:
        """This leg's socket has failed while it was relayed."""
        try:
            self._break(leg, number)
        except Exception as error:  # a surprise costs this connection only
            self._fail(error)

    def _on_dial(self, leg: Leg, events: int) -> None:
        if self.state == _SNIFFING:
            if events & _ERROR:
                self._break(leg, leg.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        elif events & _FAILED:
            number = leg.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number in (errno.ECONNRESET, errno.EPIPE):
                # In answer to a SYN a reset is ECONNREFUSED: this one was connected, and may have said something.
                self._break(leg, number)
            else:
                self._not_connected(number or errno.ECONNREFUSED)
        else:
            self._connected()

    def _connected(self) -> None:
        """The server is there, and the first bytes are, or have been waited for."""
        upstream = self.upstream
        assert upstream is not None
        loop, workload = self.loop, self.workload
        if self.state == _DIALLING:
            if self.upstream_source is None and upstream.tcp:
                self.upstream_source = upstream.sock.getsockname()
                if self.upstream_source[:2] == self.target[:2]:  # type: ignore[index]  # it has been dialled
                    # Nobody listens, and the kernel happened to pick the very port: the socket is connected to itself.
                    return self._not_connected(errno.ECONNREFUSED)
            loop.count_connect(workload, loop.now - self.active)
        if workload.header_version is not None and not self._send_header():
            return None
        self.state = _RELAYING
        self.active = loop.now
        # Without a slot it is at a Unix socket, which is connected at once, or has waited for first bytes.
        if self.slot is None or not self.workload.lazy:
            loop.settling.add(self)
        downstream = self.downstream
        if downstream.readable:
            self._relay(downstream, 0)
            if self.state != _RELAYING:
                return None
        if upstream.tcp:
            answer_at_once(upstream.sock)
        if upstream.readable:
            self._relay(upstream, 0)
        return None

    def _send_header(self) -> bool:
        """Tells the server who the client is; False if first bytes are waited for, or that has failed."""
        loop, workload, downstream = self.loop, self.workload, self.downstream
        if workload.sniffing is not None:
            if self.hello is None:
                self.hello = peek_hello(downstream)
                if self.hello is None and loop.now < self.active + workload.sniffing.seconds:
                    self.state = _SNIFFING
                    workload.sniffing.add(self)
                    return False
            if self.state == _SNIFFING:
                self.leave_wheel()
        assert self.destination is not None
        assert workload.header_version is not None
        try:
            downstream.put_first(
                make_header(workload.header_version, self.client, self.destination, self.identity, self.hello)
            )
        except LegBrokenError as error:
            self._break(error.leg, error.error.errno or errno.EIO)
            return False
        return True

    def _not_connected(self, number: int) -> None:
        outcome = UPSTREAM_OUTCOMES.get(number, "error")
        error = OSError(number, os.strerror(number))
        assert self.target is not None
        if outcome == "error":
            self.loop.complain(error, "cannot connect to %s", format_target(self.target))
        elif outcome == "no_ports":
            self.loop.complain(
                error,
                "no free port for a connection to %s; widen net.ipv4.ip_local_port_range, or give upstream.source more addresses",
                format_target(self.target),
            )
        elif number == errno.ETIMEDOUT:
            self._tell_of_silence(self.target)
        elif isinstance(self.target, str) and number in _NO_UNIX_SOCKET:
            text = f"cannot connect to {format_target(self.target)}: {_NO_UNIX_SOCKET[number]}"
            self.loop.remark(text, kind=f"{number} {self.target}")
        self.end(outcome)

    def _tell_of_silence(self, target: Address | str) -> None:
        """Another host whose answers go another way looks like a dead one. Whoever has set up the network can tell them apart."""
        upstream = self.upstream
        if isinstance(target, str) or upstream is None or self.workload.is_local_target(target[0]):
            return
        if upstream.sock.getsockname()[0] == self.client[0]:
            self.loop.remark(
                f"no answer from {format_address(target)} to a connection that bears its client's address, {self.client[0]}; if that server "
                'lives, its answers do not come by here, or a firewall masquerades: set upstream.source = "proxy"',
                kind="silence",
            )

    def _relay(self, leg: Leg, events: int) -> None:
        """What an event on `leg` makes possible: reading from it, and writing to it what the other one has."""
        try:
            if events & _UNUSUAL:
                leg.note(events)
                if events & _ERROR:
                    return self._break(leg, leg.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
            else:
                if events & _IN:
                    leg.readable = True
                if events & _OUT:
                    leg.writable = True
            if leg.readable or leg.held or leg.pipe is not None:
                if leg.pump():
                    self.active = self.loop.now
                if leg.ended and not (leg.passed_on or leg.held or leg.in_pipe):
                    self._pass_end(leg)
            if events & _OUT and self.state == _RELAYING:
                other = leg.other
                if other.held or other.pipe is not None or other.readable:  # it has waited for that
                    if other.pump():
                        self.active = self.loop.now
                    if other.ended and not (other.passed_on or other.held or other.in_pipe):
                        self._pass_end(other)
        except LegBrokenError as error:
            self._break(error.leg, error.error.errno or errno.EIO)
        except Exception as error:  # a surprise costs this connection only
            self._fail(error)
        return None

    def _pass_end(self, leg: Leg) -> None:
        """All that came from `leg`, its FIN included, is given to the other socket."""
        leg.passed_on = True
        if leg.other.passed_on:
            return self.end("closed")
        try:
            leg.other.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise LegBrokenError(leg.other, error) from error
        self.active = self.loop.now
        if self.settled:  # else `settle` does it
            self.loop.half_closed.add(self)
        return None

    def _break(self, leg: Leg, number: int) -> None:
        client = leg is self.downstream
        self.broken = (leg, "client_reset" if client else UPSTREAM_OUTCOMES.get(number, "upstream_reset"))
        self.state = _FLUSHING
        self.leave_wheel()
        # Without what the flags say: read to the very end of what is there.
        leg.readable = leg.doubtful = leg.broken = True
        leg.usual = leg.other.usual = False
        loop = self.loop
        self.bytes_left, self.moved, self.pause = -1, loop.now, _LOOK
        self.flush_end = loop.now + loop.half_closed.seconds
        self.patience = _APP_STALL if client else _CLIENT_STALL
        with contextlib.suppress(OSError):
            self.patience = max(self.patience, 2 * round_trip_seconds(leg.other.sock))
        loop.flushing.add(self)
        self.flush()

    def _fail(self, error: Exception) -> None:
        """An end that nobody thought of: logged, with the error behind it."""
        known = isinstance(error, OSError)
        self.loop.complain(error, "connection %s failed" if known else "connection %s failed; this is a bug", self)
        self.end("error")

    def __str__(self) -> str:
        destination = format_address(self.destination) if self.destination is not None else "an unknown destination"
        return f"{self.identity:016x} to {destination}"
