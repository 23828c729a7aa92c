"""One direction's bytes: what is read from one socket of a connection and given to the other. No policy, no addresses, no clock.

Sockets are watched edge-triggered, registered once: two epoll_ctl a connection. So what is known of a socket is kept in flags,
and a flag is lowered only by what the kernel answers: EAGAIN, a short read, a partial write. A short read says that everything
has been read, which saves the EAGAIN after every request; where that is not certain (an error or urgent data is in the queue) it is not
believed. Bytes that the other side does not take are held, at most one read of them, and nothing more is read until they are gone:
that is the back-pressure.

Small reads are copied: recv and send, 16 KiB. A full read shows that there is more behind it, and the direction goes on through a
pipe (splice), in which the bytes never come to this process, until the source has nothing more to give for the moment.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from typing import Literal, Protocol

from tproxyd.datapath.pipes import PIPE_BYTES, Pipe, PipePool
from tproxyd.net.sockets import bound_receive_buffer, send_at_once

__all__ = ["WATCHED", "Engine", "Leg", "LegBrokenError", "Owner"]

Engine = Literal["auto", "copy", "splice"]

READ = 16 * 1024
"""Bytes read at a time while it may be requests and answers: a TLS record, and what a small write can be."""
BULK_READ = 128 * 1024
"""Bytes read at a time once a direction is known to carry bulk and cannot be spliced."""
TURNS = 16
"""Reads from one socket before the others have their turn; through a pipe also no more than its size."""

WATCHED = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLPRI | select.EPOLLET
"""What every socket is registered for; EPOLLOUT joins when a send has blocked, so that being writable wakes nobody before."""

_IN = select.EPOLLIN
_OUT = select.EPOLLOUT
_IN_OUT = select.EPOLLIN | select.EPOLLOUT
_READABLE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR | select.EPOLLPRI
_DOUBTFUL = select.EPOLLERR | select.EPOLLPRI
_RDHUP = select.EPOLLRDHUP
_UNIX = socket.AF_UNIX
_DONTWAIT = socket.MSG_DONTWAIT
_MORE = socket.MSG_DONTWAIT | socket.MSG_MORE
_SPLICE = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE


class Owner(Protocol):
    """What a leg needs of the loop that it belongs to."""

    now: float
    pipes: PipePool
    engine: Engine
    sends: list[Leg]

    def watch_writable(self, leg: Leg) -> None: ...
    def note_blocked(self, leg: Leg) -> None: ...
    def again(self, leg: Leg) -> None: ...


class Connected(Protocol):
    """What a leg needs of its connection."""

    active: float

    def on_event(self, leg: Leg, events: int) -> None: ...
    def on_error(self, leg: Leg, number: int) -> None: ...


class LegBrokenError(Exception):
    """A socket of the connection gave an error: `leg` is whose."""

    def __init__(self, leg: Leg, error: OSError) -> None:
        super().__init__(leg, error)
        self.leg = leg
        self.error = error


class Leg:
    """One socket of a connection, and the direction that begins there: bytes read from it go to `other`.

    `arrive` is told every event of the socket. `pump` moves what can be moved; it raises LegBrokenError when either socket fails.
    `received` counts what was read; `ended` is that the peer's FIN has been read; `passed_on` that everything up to it has been given
    to the other socket.
    """

    __slots__ = (
        "broken",
        "connection",
        "doubtful",
        "ended",
        "fd",
        "held",
        "hup",
        "in_pipe",
        "nodelay",
        "nonblocking",
        "other",
        "owner",
        "passed_on",
        "pipe",
        "queued",
        "readable",
        "received",
        "sent",
        "sock",
        "tcp",
        "usual",
        "watched",
        "watches_out",
        "writable",
    )

    other: Leg

    def __init__(self, owner: Owner, connection: Connected, sock: socket.SocketType, *, accepted: bool) -> None:
        self.owner = owner
        self.connection = connection
        self.sock = sock
        self.fd = sock.fileno()
        self.tcp = sock.family != _UNIX  # else nothing can be asked of it or set that is TCP's
        self.watched = False
        self.readable = False
        self.writable = True
        self.hup = False
        self.doubtful = False
        self.ended = False
        self.broken = False  # with a reset behind it, there is no FIN that the last bytes could wait for
        self.passed_on = False
        self.queued = False
        self.usual = (
            False  # the last read was a message, as of requests and answers, and nothing else has been seen since
        )
        self.watches_out = not accepted  # the upstream's connect is waited for
        self.nonblocking = not accepted
        self.nodelay = accepted or not self.tcp  # accepted sockets have it from the listener
        self.sent = False
        self.held: bytes = b""
        self.pipe: Pipe | None = None
        self.in_pipe = 0
        self.received = 0

    def arrive(self, events: int) -> None:
        """What epoll says of the socket. One more message of the usual kind is read here and sent at the end of the turn; all else is
        for the connection to say."""
        usual = self.usual and (events == _IN or (events == _IN_OUT and self.writable))
        if usual and self.other.writable and not self.held:
            try:
                data = self.sock.recv(READ, _DONTWAIT)
            except BlockingIOError:
                return None
            except OSError as error:
                return self.connection.on_error(self, error.errno or errno.EIO)
            length = len(data)
            self.received += length
            self.held = data
            if 0 < length < READ:
                self.connection.active = self.owner.now
                self.owner.sends.append(self)
                return None
            # Bulk, or the end, which can be read again.
        return self.connection.on_event(self, events)

    def note(self, events: int) -> None:
        """Takes down what epoll says of the socket."""
        self.usual = False
        if events & _OUT:
            self.writable = True
        if events & _READABLE:
            self.readable = True
            if events & _RDHUP:
                self.hup = True
            if events & _DOUBTFUL:
                self.doubtful = True

    def pump(self) -> bool:
        """Moves bytes from here to the other socket until one of them has to be waited for; whether any byte moved."""
        other = self.other
        moved = False
        if self.held or self.pipe or self.owner.engine == "splice":
            moved = self._pump_first()
            if self.held or self.splicing:
                return moved
        size = READ
        turns = TURNS
        while self.readable and not self.ended and other.writable:
            try:
                data = self.sock.recv(size, _DONTWAIT)
            except BlockingIOError:
                self.readable = False
                break
            except OSError as error:
                raise LegBrokenError(self, error) from error
            length = len(data)
            if length == 0:
                self.ended = True
                self.readable = False
                break
            self.received += length
            moved = True
            if length < size and not self.doubtful:
                self.readable = False
                if other.nodelay and not self.hup:
                    # A message of the usual kind. It is sent when all that is ready has been read: one kind of system call after
                    # the other keeps the kernel's code in the caches (0.80 of HAProxy's requests/s became 0.93, six rounds).
                    self.held = data
                    self.owner.sends.append(self)
                    self.usual = self.owner.engine != "splice"
                    return True
                # All that was there. With the FIN in sight before this read, there is nothing behind it.
                self.ended = self.hup
            self._give(data)
            turns -= 1
            if not self.readable:
                break
            if length == size and not self.held:
                if self.owner.engine != "copy" and not self.doubtful and self._start_splicing():
                    if self.pipe is not None or not self.readable:
                        return True
                else:
                    size = BULK_READ
            if turns == 0:
                self.owner.again(self)
                break
        return moved

    def put_first(self, data: bytes) -> None:
        """Gives the other socket something of ours, before anything that comes from here; it is not counted. Raises LegBrokenError."""
        other = self.other
        # In one packet with what is there already, which the caller lets follow at once; never held back for what may come.
        follows = self.readable and not (self.hup or self.doubtful)
        try:
            count = other.sock.send(data, _MORE if follows else _DONTWAIT)
        except BlockingIOError:
            count = 0
        except OSError as error:
            raise LegBrokenError(other, error) from error
        other.sent = not follows  # TCP_NODELAY would send it on its own
        if count < len(data):
            self.held = data[count:]
            other.block()

    @property
    def splicing(self) -> bool:
        """Whether the direction goes through a pipe at the moment."""
        return self.pipe is not None

    def send_held(self) -> bool:
        """Sends what has been left for the end of the turn; False if that did not go well."""
        data = self.held
        try:
            count = self.other.sock.send(data, _DONTWAIT)
        except OSError:
            return False
        if count == len(data):
            self.held = b""
            return True
        self.held = data[count:]
        self.other.block()
        return True

    def _pump_first(self) -> bool:
        """What comes before the next read: what is on its way already, through a pipe or held; and with the engine "splice" a pipe."""
        moved = False
        pipe = self.pipe
        if pipe is not None:
            moved = self._splice(pipe)
            if self.pipe is pipe:
                return moved
        if self.held:
            if not self.other.writable:
                return False
            before = len(self.held)
            self._give(self.held)
            moved = len(self.held) < before
            if self.held:
                return moved
        if self.owner.engine == "splice" and self.readable and not (self.ended or self.doubtful):
            moved = self._start_splicing() or moved
        return moved

    def drop(self) -> None:
        """Forgets what is on its way, and gives the pipe back. For the connection's end."""
        self.held = b""
        if self.pipe is not None:
            if self.in_pipe:
                self.owner.pipes.discard(self.pipe)
            else:
                self.owner.pipes.put(self.pipe)
            self.pipe = None
            self.in_pipe = 0

    def _give(self, data: bytes) -> None:
        """Sends to the other socket; what it does not take is held."""
        other = self.other
        if other.sent and not other.nodelay:
            # The first send needs none, and many connections have no second one.
            send_at_once(other.sock)
            other.nodelay = True
        try:
            # With the end behind it: data and FIN in one packet.
            count = other.sock.send(data, _MORE if self.ended and not self.broken else _DONTWAIT)
        except BlockingIOError:
            count = 0
        except OSError as error:
            raise LegBrokenError(other, error) from error
        other.sent = True
        if count == len(data):
            self.held = b""
        else:
            self.held = data[count:]
            other.block()

    def block(self) -> None:
        """The socket takes nothing at the moment."""
        self.writable = False
        bound_receive_buffer(self.other.sock)
        self.owner.note_blocked(self)
        if not self.watches_out:
            self.watches_out = True
            self.owner.watch_writable(self)

    def _start_splicing(self) -> bool:
        pipe = self.owner.pipes.take()
        if pipe is None:
            return False
        self.pipe = pipe
        self.usual = False
        for leg in (self, self.other):
            if not leg.nonblocking:
                os.set_blocking(leg.fd, False)  # splice knows no MSG_DONTWAIT
                leg.nonblocking = True
        if not self.other.nodelay:
            send_at_once(self.other.sock)
            self.other.nodelay = True
        self._splice(pipe)
        return True

    def _splice(self, pipe: Pipe) -> bool:
        """Moves through the pipe; whether any byte moved. The pipe is given back when nothing more is to be read for now."""
        other = self.other
        moved = False
        budget = PIPE_BYTES
        for _ in range(TURNS):
            if not self.in_pipe:
                if not self.readable or self.ended:
                    break
                try:
                    count = os.splice(self.fd, pipe.write, PIPE_BYTES, flags=_SPLICE)
                except BlockingIOError:
                    # Also where urgent data comes next, at which splice stops; recv does not.
                    self.readable = self.doubtful
                    break
                except OSError as error:
                    raise LegBrokenError(self, error) from error
                if count == 0:
                    # The end, or urgent data with the end somewhere behind it: recv can tell.
                    self.doubtful = True
                    break
                self.received += count
                self.in_pipe = count
                moved = True
            if not other.writable:
                return moved
            try:
                count = os.splice(pipe.read, other.fd, self.in_pipe, flags=_SPLICE)
            except BlockingIOError:
                other.block()
                return moved
            except OSError as error:
                raise LegBrokenError(other, error) from error
            other.sent = True
            moved = True
            self.in_pipe -= count
            budget -= count
            if budget <= 0:
                self.owner.again(self)
                return moved
        else:
            self.owner.again(self)
            return moved
        # Nothing to read for the moment: what comes next may be small.
        self.owner.pipes.put(pipe)
        self.pipe = None
        return moved
