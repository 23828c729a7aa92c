"""Clients that have not said enough yet to be served. Each costs a file and some microseconds, and no task: whoever connects a thousand times and says nothing, or a
byte a second, takes no time from others."""

from __future__ import annotations

import os
import re
import resource
import select
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from types import TracebackType

import trio
import trio.lowlevel

__all__ = ["Lobby"]

_ROOM = 1024  # clients, of which one goes when there comes one more
_FILES = 8  # no more than this fraction of the files that may be open
_PATIENCE = 10.0  # seconds to say a whole head; then its turn comes sooner or later
_HEAD = 16 * 1024  # bytes of one
_RATE = 800  # clients a second that are let in; some 10 us each ...
_BURST = 64  # ... but so many at once after a pause
_BREATH = 0.05  # seconds until others are let in, when that was too many
_LOOK = 0.03  # seconds from one look at what they say to the next ...
_LOOKS = 100  # ... at so many of them at most, some 5 us each: who says a byte at a time, a thousand of them, keeps the thread from little

_TOO_LONG = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"
    b"a head has %d bytes at most\n" % _HEAD
)
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_END = re.compile(rb"\n\r?\n")  # as h11 has it


@dataclass
class _Client:
    sock: socket.socket
    peer: str | int
    until: float
    said: bytearray = field(default_factory=bytearray)
    serves: bool = False

    def hear(self) -> bool:
        """Reads on; whether that was all. What is said is taken from the kernel, which keeps some hundreds of writes, however short they are: who says a head
        in more of them would wait for room, and never end it. Nor is anything read twice."""
        try:
            heard = self.sock.recv(_HEAD + 1 - len(self.said))
        except BlockingIOError:
            return False
        except OSError:
            self.said.clear()
            return True
        self.said += heard
        return not heard

    def has_asked(self, before: int) -> bool:
        """Whether this is a whole head, or none; `before`: so many bytes of it were neither."""
        return bool(_END.search(self.said, max(0, before - 2)) or b"" < self.said[:1] < b"!")


def _peer(client: socket.socket, address: tuple[str, int]) -> str | int:
    """Who is at the other end: the user of this host, or the address; of IPv6 its network, since each host has all addresses of one."""
    if client.family == socket.AF_UNIX:
        return int(_CREDENTIALS.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[1])
    host = address[0]
    if client.family == socket.AF_INET or host.startswith("::ffff:"):
        return host
    return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])[:8].hex()


class Lobby:
    """Between a listener, given by its file and closed by its owner, and those who serve. A context manager; at its end all who wait are closed.

    `admit` lets them in until it is cancelled; `next` gives those who have said enough, each after a `turn`: of each peer, which is an address, or a user of this
    host, one in turn, so nobody waits for all that another one asks.
    """

    def __init__(self, listener: int, turn: Callable[[], Awaitable[None]]) -> None:
        self._turn = turn
        self._listener = socket.socket(fileno=os.dup(listener))
        self._listener.setblocking(False)
        self._ready = select.epoll()
        self._clients: dict[int, _Client] = {}  # who have not said enough, by file, in the order in which they came
        self._lines: dict[
            str | int, deque[_Client]
        ] = {}  # who have, of each peer, in the order in which they have; the peer whose turn is next first
        self._waiting = 0  # of those, in all
        self._room = min(_ROOM, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _FILES))
        self._someone = trio.Event()

    def __enter__(self) -> Lobby:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._dismiss(len(self._clients))
        for client in chain.from_iterable(self._lines.values()):
            client.sock.close()
        self._ready.close()
        self._listener.close()

    async def admit(self) -> None:
        """Lets clients in and, when their time is up, out."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_the_clock)
            budget, then = float(_BURST), trio.current_time()
            while True:
                await trio.lowlevel.wait_readable(self._listener)
                now = trio.current_time()
                budget, then = min(_BURST, budget + (now - then) * _RATE), now
                budget -= self._accept(int(budget), now + _PATIENCE)
                if budget < 1:
                    await trio.sleep(_BREATH)

    def _accept(self, most: int, until: float) -> int:
        for number in range(most):
            try:
                client, address = self._listener.accept()
            except BlockingIOError:
                return number
            except OSError:  # no file left: connections that are relayed come first
                self._make_room((len(self._clients) + self._waiting) // 2 + 1)
                return most
            if len(self._clients) + self._waiting >= self._room:
                self._make_room(1)
            client.setblocking(False)
            try:
                self._ready.register(client, select.EPOLLIN)
            except OSError:  # fs.epoll.max_user_watches: as above
                client.close()
                self._make_room((len(self._clients) + self._waiting) // 2 + 1)
                return most
            self._clients[client.fileno()] = _Client(client, _peer(client, address), until)
            self._someone.set()
        return most

    def _make_room(self, number: int) -> None:
        """Whoever came last of the peer that has most in line; or who is longest here of those who have not said enough, if they are more."""
        for _ in range(number):
            peer = max(self._lines, key=lambda peer: len(self._lines[peer]), default=None)
            if peer is None or len(self._clients) >= len(self._lines[peer]):
                self._dismiss(1)
            else:
                self._out_of_line(peer, -1).sock.close()

    def _out_of_line(self, peer: str | int, index: int) -> _Client:
        line = self._lines[peer]
        client = line[index]
        del line[index]
        self._waiting -= 1
        if not line:
            del self._lines[peer]
        return client

    def _dismiss(self, number: int) -> None:
        for fd in list(islice(self._clients, number)):
            client = self._clients.pop(fd)
            # Its end does not do that, while a program that is being started has a copy of it.
            self._ready.unregister(client.sock)
            client.sock.close()

    async def _watch_the_clock(self) -> None:
        while True:
            if not self._clients:
                self._someone = trio.Event()
                await self._someone.wait()
            now = trio.current_time()
            self._dismiss(sum(client.until <= now for client in self._clients.values()))
            for client in self._clients.values():
                await trio.sleep_until(client.until)
                break

    async def next(self) -> tuple[socket.socket, bytes]:
        """One that has said enough, a whole head, what is none, or all that it has to say; and what was read of that. The caller closes it."""
        while True:
            if not self._lines:
                await trio.lowlevel.wait_readable(self._ready)
            self._look()
            if not self._lines:
                await trio.sleep(_LOOK)
                continue
            peer = next(iter(self._lines))
            client = self._out_of_line(peer, 0)
            if peer in self._lines:
                self._lines[peer] = self._lines.pop(peer)
            if await self._has_its_turn(client.sock, serves=client.serves):
                return client.sock, bytes(client.said)

    def _look(self) -> None:
        for _ in range(_LOOKS):
            if not (ready := self._ready.poll(0, 1)):
                break
            client = self._clients[ready[0][0]]
            before = len(client.said)
            ended = client.hear()
            client.serves = bool(client.said) and (ended or client.has_asked(before))
            if not (ended or client.serves or len(client.said) > _HEAD):
                continue
            self._ready.unregister(client.sock)
            del self._clients[client.sock.fileno()]
            if client.said:
                self._lines.setdefault(client.peer, deque()).append(client)
                self._waiting += 1
            else:
                client.sock.close()

    async def _has_its_turn(self, client: socket.socket, *, serves: bool) -> bool:
        """Whether it is to be served; else it has been refused, for a head without an end."""
        try:
            await self._turn()
            if not serves:
                with suppress(OSError):
                    client.send(_TOO_LONG)
                client.close()
        except BaseException:
            client.close()
            raise
        return serves
