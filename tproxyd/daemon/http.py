"""HTTP for those who look after a daemon: its metrics' port and its administrator's socket.

Served by the daemon's own loop, and bounded in everything: clients, bytes and time of a request, and how much of the daemon's time all of them together may have. So
whoever asks badly, slowly or often hurts neither the connections that are relayed nor others who ask.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar
from urllib.parse import parse_qsl, unquote

import h11
import trio

from tproxyd.config.wording import printable
from tproxyd.daemon.lobby import Lobby
from tproxyd.daemon.pressure import Pressure
from tproxyd.errors import TproxydError
from tproxyd.net.scheduling import may_wait

__all__ = ["Answer", "Request", "Shared", "say", "serve_http", "tell_health"]

_log = logging.getLogger(__name__)

_CLIENTS = 64  # at once; one more takes the place of one that does not get on
_PATIENCE = 10.0  # seconds for a request to come, and for each piece of its answer to be taken
_WORK = 15.0  # seconds to make an answer
_LONGEST = 60.0  # seconds for all requests of one connection: nobody holds a place for good
_LOOK = 0.1  # seconds, where all are served and none can be sent away, until one of them may be
_READ = 8192
_BODY = 16 * 1024  # bytes of a request's body; h11 has the same bound for its head
_TURN = 0.02  # seconds between two that are let in or answered: each costs a quarter of a millisecond, and what it asks for ...
_BURST = 20  # ... but so many at once after a pause
_REST = 19  # from an answer that is made for all who ask, in units of the time that making it took; ...
_LONGEST_REST = 0.25  # ... seconds at most

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """What is asked. `path` is without escapes and query; `stream` is who asks; `allow` gives the request, and its connection, so many seconds more."""

    method: str
    path: str
    query: Mapping[str, str]
    body: bytes
    stream: trio.SocketStream
    allow: Callable[[float], None]


@dataclass(frozen=True)
class Answer:
    """What is answered. A body that comes in pieces is sent as they come. `sent` is called when it has been sent, or cannot be."""

    status: int
    kind: str
    body: bytes | AsyncGenerator[bytes, None] = b""
    headers: tuple[tuple[str, str], ...] = ()
    sent: Callable[[], None] | None = None


Handle = Callable[[Request], Awaitable[Answer]]

Waiting = Callable[[], AbstractContextManager[None]]
"""Makes the block around all that waits for one client: for a whole request, or for taking an answer."""


def say(status: int, text: str, *headers: tuple[str, str]) -> Answer:
    """A line of text."""
    return Answer(status, "text/plain; charset=utf-8", f"{text}\n".encode(errors="backslashreplace"), headers)


def tell_health(reason: str) -> Answer:
    """For /healthz and /readyz: `reason` is why it is not well; empty if it is."""
    return say(503, f"not ready: {printable(reason)}") if reason else say(200, "ok")


class Shared(Generic[T]):
    """What is made once for all who wait for it, and is never older than the question. It rests in between, so that a storm of questions
    takes a tenth of the daemon's time."""

    def __init__(self, make: Callable[[], Awaitable[T]]) -> None:
        self._make = make
        self._turn = trio.Lock()
        self._rested = 0.0
        self._next: _Making[T] | None = None

    async def __call__(self) -> T:
        """What `make` gives; whatever that raises is raised for each who waits."""
        while True:
            making = self._next
            if making is None:
                making = self._next = _Making()
                await self._lead(making)
            else:
                await making.done.wait()
            if making.error is not None:
                raise making.error
            if making.result:
                return making.result[0]
            # Whoever was to make it has been cancelled.

    async def _lead(self, making: _Making[T]) -> None:
        try:
            async with self._turn:
                await trio.sleep_until(self._rested)
                self._next = None  # whoever asks from now on wants to know how things are then
                began = trio.current_time()
                try:
                    making.result.append(await self._make())
                except Exception as error:  # of whoever waits for the answer
                    making.error = error
                ended = trio.current_time()
                self._rested = ended + min(_LONGEST_REST, _REST * (ended - began))
        finally:
            if self._next is making:
                self._next = None
            making.done.set()


class _Making(Generic[T]):
    def __init__(self) -> None:
        self.done = trio.Event()
        self.result: list[T] = []
        self.error: Exception | None = None


async def serve_http(listener: trio.SocketListener, handle: Handle, *, what: str, pressure: Pressure | None) -> None:
    """Answers until cancelled, and closes the listener then. `what` names it in the log. What `handle` raises is answered with 500. `pressure` is told when
    turns have to be waited for; None: it would not help."""
    may_wait.set(True)
    # Two paces: however much those ask who are here, others come in, and each of them is answered once at once.
    places, arrivals, server = _Places(), _Pace(pressure), _Server(handle, _Pace(pressure), what)
    async with listener:
        with Lobby(listener.socket.fileno(), arrivals.turn) as lobby:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lobby.admit)
                while True:
                    client, said = await lobby.next()
                    try:
                        token = await places.take()
                    except BaseException:
                        client.close()
                        raise
                    stream = trio.SocketStream(trio.socket.from_stdlib_socket(client))
                    nursery.start_soon(_serve_client, stream, said, server, places, token)


class _Pace:
    """Turns are so far apart that all of them together take a bounded share of the daemon's time, in the order in which they are wanted."""

    def __init__(self, pressure: Pressure | None) -> None:
        self._next = 0.0
        self._pressure = pressure

    async def turn(self) -> None:
        now = trio.current_time()
        self._next = max(self._next + _TURN, now - _BURST * _TURN)
        if self._next > now:
            if self._pressure is not None:
                self._pressure.press()
            await trio.sleep_until(self._next)


class _Places:
    """Room for so many clients. When it is full, who comes takes the place of the one that has let us wait longest, for a whole
    request or for taking its answer: nobody keeps others out by saying nothing."""

    def __init__(self) -> None:
        self._room = trio.CapacityLimiter(_CLIENTS)
        self._waited_for: dict[trio.CancelScope, None] = {}  # in the order in which that began

    async def take(self) -> object:
        """Gives what `leave` is to be called with."""
        token = object()
        while True:
            if not self._room.available_tokens and self._waited_for:
                slowest = next(iter(self._waited_for))
                del self._waited_for[slowest]
                slowest.cancel()
            with trio.move_on_after(_LOOK):
                await self._room.acquire_on_behalf_of(token)
                return token

    def leave(self, token: object) -> None:
        self._room.release_on_behalf_of(token)

    @contextmanager
    def waiting_for(self, client: trio.CancelScope) -> Iterator[None]:
        """The block waits for this client alone, and is cancelled when another one needs its place."""
        self._waited_for[client] = None
        try:
            yield
        finally:
            self._waited_for.pop(client, None)


@dataclass(frozen=True)
class _Server:
    """What all clients of one listener have in common."""

    handle: Handle
    pace: _Pace
    what: str


async def _serve_client(
    stream: trio.SocketStream, said: bytes, server: _Server, places: _Places, token: object
) -> None:
    try:
        async with stream:
            with trio.move_on_after(_LONGEST) as client:
                await _converse(stream, said, server, client, partial(places.waiting_for, client))
    except (trio.BrokenResourceError, trio.TooSlowError, h11.LocalProtocolError):
        pass  # gone, or too slow to be waited for
    except TproxydError as error:  # in the middle of an answer: its end is missing, which the client sees
        _log.warning("an answer on %s was cut short: %s", server.what, error)
    except Exception:  # a surprise costs this client only, never the daemon
        _log.exception("an answer on %s failed; this is a bug", server.what)
    finally:
        places.leave(token)


async def _converse(
    stream: trio.SocketStream, said: bytes, server: _Server, client: trio.CancelScope, waiting: Waiting
) -> None:
    """`said` is what was read already."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(said)
    try:
        while await _answer(stream, connection, server, client, waiting):
            connection.start_next_cycle()
            with waiting():
                await server.pace.turn()
    except h11.RemoteProtocolError as error:
        with trio.fail_after(_PATIENCE), waiting():
            bad = say(error.error_status_hint, "bad request", ("Connection", "close"))
            await _send(stream, connection, bad, waiting)


async def _answer(
    stream: trio.SocketStream, connection: h11.Connection, server: _Server, client: trio.CancelScope, waiting: Waiting
) -> bool:
    """One request and its answer; whether another one may follow."""
    with trio.fail_after(_PATIENCE), waiting():
        received = await _receive(stream, connection)
    if received is None:
        return False
    asked, body = received
    if body is None:
        answer = say(413, f"a request has {_BODY} bytes at most", ("Connection", "close"))
    else:
        answer = await _make(asked, body, stream, server, client)
    try:
        await _send(stream, connection, answer, waiting, head=asked.method == b"HEAD")
    finally:
        if answer.sent is not None:
            answer.sent()
    return connection.our_state is h11.DONE and connection.their_state is h11.DONE


async def _make(
    asked: h11.Request, body: bytes, stream: trio.SocketStream, server: _Server, client: trio.CancelScope
) -> Answer:
    """What is answered, in any case."""
    try:
        with trio.fail_after(_WORK) as work:

            def allow(seconds: float) -> None:
                client.deadline = max(client.deadline, trio.current_time() + seconds + _PATIENCE)
                work.deadline = max(work.deadline, trio.current_time() + seconds)

            path, _, query = asked.target.decode("ascii").partition("?")
            fields = dict(parse_qsl(query, keep_blank_values=True))
            return await server.handle(
                Request(asked.method.decode("ascii"), unquote(path), fields, body, stream, allow)
            )
    except trio.TooSlowError:
        return say(503, "it could not be done in time; is this machine overloaded?")
    except Exception:  # a surprise costs this request only, never the daemon
        _log.exception("an answer on %s failed; this is a bug", server.what)
        return say(500, "this is a bug; the daemon's log has more")


async def _receive(stream: trio.SocketStream, connection: h11.Connection) -> tuple[h11.Request, bytes | None] | None:
    """A whole request and its body, None in its place if that is too long; None if there comes no further one."""
    request: h11.Request | None = None
    body = b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            if connection.they_are_waiting_for_100_continue:
                await stream.send_all(connection.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
            connection.receive_data(await stream.receive_some(_READ))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > _BODY and request is not None:
                return request, None
        elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
            return None
        elif isinstance(event, h11.EndOfMessage) and request is not None:
            return request, body


async def _send(
    stream: trio.SocketStream, connection: h11.Connection, answer: Answer, waiting: Waiting, *, head: bool = False
) -> None:
    headers = [("Content-Type", answer.kind), *answer.headers]
    pieces = answer.body
    if isinstance(pieces, bytes):
        headers.append(("Content-Length", str(len(pieces))))
    data = connection.send(h11.Response(status_code=answer.status, headers=headers)) or b""
    if isinstance(pieces, bytes):
        if not head:
            data += connection.send(h11.Data(data=pieces)) or b""
    else:
        async with aclosing(pieces):
            async for piece in pieces:
                if head:
                    break
                with trio.fail_after(_PATIENCE), waiting():
                    await stream.send_all(data + (connection.send(h11.Data(data=piece)) or b""))
                data = b""
    data += connection.send(h11.EndOfMessage()) or b""
    with trio.fail_after(_PATIENCE), waiting():
        await stream.send_all(data)
