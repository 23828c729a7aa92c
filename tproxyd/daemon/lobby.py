"""Clients that have not said enough yet to be served. Each costs a file, what it has said, and some microseconds, but no task: whoever connects a thousand times and says nothing, or a
byte a second, takes no time from others."""

from __future__ import annotations

import os
import re
import resource
import select
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType

import trio
import trio.lowlevel

__all__ = ["Lobby"]

_ROOM = 1024  # clients, of which the one that is longest here goes when there comes one more
_FILES = 8  # ... and no more than one for so many files that may be open
_PATIENCE = 10.0  # seconds for a whole head
_HEAD = 16 * 1024  # bytes of one
_RATE = 800  # clients a second that are let in; some 10 us each ...
_BURST = 64  # ... but so many at once after a pause
_BREATH = 0.05  # seconds until others are let in, when that was too many: so a flood wakes the loop 20 times a second and not 800
_LOOK = 0.03  # seconds from one look at what they say to the next ...
_LOOKED_AT = 200  # ... and so many of those who have said more are looked at then; some 4 us each

_TOO_LONG = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"
    b"a head has %d bytes at most\n" % _HEAD
)
_END = re.compile(rb"\n\r?\n")  # of a head, as h11 has it, ...
_FIRST = b"!"  # ... and the least byte that may begin one


@dataclass(slots=True)
class _Client:
    sock: socket.socket
    until: float  # when it has to have said a whole head
    # Read, and not only looked at: what has come in small pieces takes a millisecond each time (seen: 1.5 for some thousands of single bytes).
    said: bytearray = field(default_factory=bytearray)


class Lobby:
    """Between a listener, given by its file and closed by its owner, and those who serve. A context manager; at its end all who wait are closed.

    `admit` lets them in until it is cancelled; `next` gives those who have said enough, each after a `turn`.
    """

    def __init__(self, listener: int, turn: Callable[[], Awaitable[None]]) -> None:
        self._turn = turn
        self._listener = socket.socket(fileno=os.dup(listener))
        self._listener.setblocking(False)
        self._ready = select.epoll()
        self._clients: dict[int, _Client] = {}  # by file, in the order in which they came
        self._room = min(_ROOM, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _FILES))
        self._someone = trio.Event()

    def __enter__(self) -> Lobby:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._dismiss(len(self._clients))
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
        """How much of the budget that was."""
        for number in range(most):
            try:
                client, _ = self._listener.accept()
            except BlockingIOError:
                return number
            except OSError:  # no file left: connections that are relayed come first
                self._dismiss(len(self._clients) // 2 + 1)
                return most
            if len(self._clients) >= self._room:
                self._dismiss(1)
            client.setblocking(False)
            self._clients[client.fileno()] = _Client(client, until)
            # Edge-triggered: news of each client is told once.
            self._ready.register(client, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
            self._someone.set()
        return most

    def _dismiss(self, number: int) -> None:
        for fd in [*self._clients][:number]:
            self._take_out(fd).sock.close()

    def _take_out(self, fd: int) -> _Client:
        client = self._clients.pop(fd)
        # Closing alone does so only if no process that is being started has a copy at that moment.
        self._ready.unregister(client.sock)
        return client

    async def _watch_the_clock(self) -> None:
        while True:
            while not self._clients:
                self._someone = trio.Event()
                await self._someone.wait()
            await trio.sleep_until(next(iter(self._clients.values())).until)
            now = trio.current_time()
            self._dismiss(sum(client.until <= now for client in self._clients.values()))

    async def next(self) -> tuple[socket.socket, bytes]:
        """One that has said enough: a whole head, what is none, or all that it has to say; and what that is, as far as it has been read. The caller
        closes it."""
        while True:
            await trio.lowlevel.wait_readable(self._ready)
            for _ in range(_LOOKED_AT):
                # One by one: while one has its turn, others leave, and their files become somebody else's.
                if not (ready := self._ready.poll(0, 1)):
                    break
                fd, news = ready[0]
                client = self._clients[fd]
                said, seen = client.said, len(client.said)
                try:
                    said += client.sock.recv(_HEAD + 1 - seen)
                except BlockingIOError:
                    continue
                except OSError:
                    said.clear()
                ends = len(said) == seen or news & select.EPOLLRDHUP
                serves = bool(_END.search(said, max(0, seen - 2)) or said[:1] < _FIRST or ends)
                if not serves and len(said) <= _HEAD:
                    continue
                sock = self._take_out(fd).sock
                if not said:
                    sock.close()
                elif await self._has_its_turn(sock, serves=serves):
                    return sock, bytes(said)
            await trio.sleep(_LOOK)

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
