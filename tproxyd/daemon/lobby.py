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
from dataclasses import dataclass, field
from types import TracebackType

import trio
import trio.lowlevel

__all__ = ["Lobby"]

_ROOM = 1024  # clients, of which the one that is longest here goes when there comes one more
_FILES = 8  # no more than this fraction of the files that may be open
_PATIENCE = 10.0  # seconds for a whole head
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
_END = re.compile(rb"\n\r?\n")  # as h11 has it


@dataclass
class _Client:
    sock: socket.socket
    until: float
    said: bytearray = field(default_factory=bytearray)

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
            try:
                self._ready.register(client, select.EPOLLIN)
            except OSError:  # fs.epoll.max_user_watches: as above
                client.close()
                self._dismiss(len(self._clients) // 2 + 1)
                return most
            self._clients[client.fileno()] = _Client(client, until)
            self._someone.set()
        return most

    def _dismiss(self, number: int) -> None:
        for fd in [*self._clients][:number]:
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
            await trio.lowlevel.wait_readable(self._ready)
            for _ in range(_LOOKS):
                if not (ready := self._ready.poll(0, 1)):
                    break
                client = self._clients[ready[0][0]]
                before = len(client.said)
                ended = client.hear()
                serves = bool(client.said) and (ended or client.has_asked(before))
                if not (ended or serves or len(client.said) > _HEAD):
                    continue
                self._ready.unregister(client.sock)
                del self._clients[client.sock.fileno()]
                if not client.said:
                    client.sock.close()
                elif await self._has_its_turn(client.sock, serves=serves):
                    return client.sock, bytes(client.said)
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
