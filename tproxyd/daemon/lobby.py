"""Clients that have not said enough yet to be served. Each costs a file and some microseconds, and no task: whoever connects a thousand times and says nothing, or a
byte a second, takes no time from others."""

from __future__ import annotations

import os
import re
import resource
import select
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
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
_LOOKED_AT = 200  # ... and so many of those who have said more are looked at then; some 4 us each, 20 for a long head

_TOO_LONG = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"
    b"a head has %d bytes at most\n" % _HEAD
)
_END = re.compile(rb"\n\r?\n")  # of a head, as h11 has it, ...
_FIRST = b"!"  # ... and the least byte that may begin one


class Lobby:
    """Between a listener, given by its file and closed by its owner, and those who serve. A context manager; at its end all who wait are closed.

    `admit` lets them in until it is cancelled; `next` gives those who have said enough, each after a `turn`.
    """

    def __init__(self, listener: int, turn: Callable[[], Awaitable[None]]) -> None:
        self._turn = turn
        self._listener = socket.socket(fileno=os.dup(listener))
        self._listener.setblocking(False)
        self._ready = select.epoll()
        # By file, in the order in which they came; until when each may be here.
        self._clients: dict[int, tuple[socket.socket, float]] = {}
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
            self._clients[client.fileno()] = client, until
            # Edge-triggered: news of each client is told once.
            self._ready.register(client, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
            self._someone.set()
        return most

    def _dismiss(self, number: int) -> None:
        for fd in [*self._clients][:number]:
            self._take_out(fd).close()

    def _take_out(self, fd: int) -> socket.socket:
        client, _ = self._clients.pop(fd)
        # Closing alone does so only if no process that is being started has a copy at that moment.
        self._ready.unregister(client)
        return client

    async def _watch_the_clock(self) -> None:
        while True:
            while not self._clients:
                self._someone = trio.Event()
                await self._someone.wait()
            _, first = next(iter(self._clients.values()))
            await trio.sleep_until(first)
            now = trio.current_time()
            self._dismiss(sum(until <= now for _, until in self._clients.values()))

    async def next(self) -> socket.socket:
        """One that has said enough: a whole head, what is none, or all that it has to say. The caller closes it."""
        while True:
            await trio.lowlevel.wait_readable(self._ready)
            for _ in range(_LOOKED_AT):
                # One by one: while one has its turn, others leave, and their files become somebody else's.
                if not (ready := self._ready.poll(0, 1)):
                    break
                fd, news = ready[0]
                client, _ = self._clients[fd]
                try:
                    said = client.recv(_HEAD + 1, socket.MSG_PEEK)
                except BlockingIOError:
                    continue
                except OSError:
                    said = b""
                serves = bool(_END.search(said) or said[:1] < _FIRST or news & select.EPOLLRDHUP)
                if said and not serves and len(said) <= _HEAD:
                    continue
                self._take_out(fd)
                if not said:
                    client.close()
                elif await self._has_its_turn(client, serves=serves):
                    return client
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
