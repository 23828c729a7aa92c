"""The administrator's API, over the Unix socket of `[admin] socket`: HTTP and JSON. Each resource is a row of a table.

Knows requests and who may ask what; what is asked of the daemon is `service`'s, and how HTTP is bounded `http`'s. An error is `{"error": SENTENCE,
"problems": [SENTENCE, ...]}`.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Literal

import msgspec
import trio

from tproxyd.config.dump import config_to_mapping
from tproxyd.config.wording import printable
from tproxyd.daemon.admin_socket import GROUP, Access, access_of, readers_gid
from tproxyd.daemon.http import Answer, Request, Shared, serve_http, tell_health
from tproxyd.daemon.pressure import Pressure
from tproxyd.daemon.service import Service
from tproxyd.errors import CapabilityError, ConfigError, KernelError, MissingError, TproxydError, UsageError
from tproxyd.net.peers import peer_of
from tproxyd.net.scheduling import may_wait
from tproxyd.plan import FORMATS, render

__all__ = ["serve_admin"]

_log = logging.getLogger(__name__)

_PIECE = 16 * 1024  # bytes of a list that are kept until they are sent
_RELOAD = 120.0  # seconds that a reload may take

_STATUS: Mapping[type[TproxydError], int] = {
    UsageError: 400,
    ConfigError: 422,
    MissingError: 503,
    KernelError: 503,
    CapabilityError: 503,
}
"""What an error of ours is over HTTP: asked in a wrong way, a configuration that is refused, or the machine's or its state's."""

Resource = Callable[[Request], Awaitable[Answer]]


async def serve_admin(listener: trio.SocketListener, service: Service, pressure: Pressure) -> None:
    """Answers until cancelled, and closes the listener then. `pressure` is that of serve_http."""
    await serve_http(listener, _Api(service).answer, what="the admin socket", pressure=pressure)


class _Api:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._gid = readers_gid()
        differences = Shared(service.interceptor.differences)
        self._resources: dict[str, dict[str, Resource]] = {
            "/healthz": {"GET": partial(_health, str)},
            "/readyz": {"GET": partial(_health, lambda: service.unready)},
            "/v1/status": {"GET": _json_of(Shared(service.status))},
            "/v1/config": {"GET": _json_of(Shared(self._config))},
            "/v1/plan": {"GET": self._plan},
            "/v1/diff": {"GET": _json_of(differences, key="differences")},
            "/v1/connections": {"GET": self._connections},
            "/v1/connections/ID": {"DELETE": self._close},
            "/v1/log-level": {"GET": self._log_level, "PUT": self._set_log_level},
            "/v1/reload": {"POST": self._reload},
            "/v1/drain": {"POST": self._drain},
        }

    async def answer(self, request: Request) -> Answer:
        """The one way in: finds the resource, asks whether this peer may, and makes of what is raised an answer."""
        peer = peer_of(request.stream.socket)
        access = access_of(peer, self._gid)
        if access is None:
            return _error(403, f"this is for root and for members of group {GROUP}; ask root to add you to it")
        name = request.path
        if name.startswith("/v1/connections/") and "/" not in name.removeprefix("/v1/connections/"):
            name = "/v1/connections/ID"
        methods = self._resources.get(name)
        if methods is None:
            near = difflib.get_close_matches(name, self._resources, 1, 0.4)
            return _error(404, f"there is no {request.path[:100]}; {f'is {near[0]} meant?' if near else self._all()}")
        method = "GET" if request.method == "HEAD" else request.method
        if method not in methods:
            allowed = ", ".join(["HEAD", *methods] if "GET" in methods else methods)
            return _error(
                405, f"{request.method} is nothing that {name} can do; use {allowed}", headers=[("Allow", allowed)]
            )
        if not _may(access, method):
            return _error(403, f"members of group {GROUP} may look; to {method} {name} is root's; use sudo")
        if method != "GET":
            may_wait.set(False)  # what root orders is done as soon as can be
            _log.info(
                "the administrator (uid %s, pid %d) asks: %s %s", peer.uid, peer.pid, method, printable(request.path)
            )
        try:
            return await methods[method](request)
        except TproxydError as error:
            problems = error.problems if isinstance(error, ConfigError) else (str(error),)
            return _error(next(status for kind, status in _STATUS.items() if isinstance(error, kind)), *problems)

    def _all(self) -> str:
        return f"there are {', '.join(self._resources)}"

    async def _config(self) -> object:
        return config_to_mapping(self._service.config)

    async def _plan(self, request: Request) -> Answer:
        form = _parameters(request, "format").get("format", "text")
        if form not in FORMATS:
            raise UsageError(f"there is no format {form[:60]!r}; use {', '.join(FORMATS)}")
        text = render(self._service.interceptor.plan(), form).encode()
        return Answer(200, "application/json" if form == "json" else "text/plain; charset=utf-8", text)

    async def _connections(self, request: Request) -> Answer:
        asked = _parameters(request, "workload", "source", "destination", "limit")
        limit = asked.pop("limit", None)
        if limit is not None and not (limit.isascii() and limit.isdigit() and 0 < len(limit) < 10):
            raise UsageError(f"the limit {limit[:60]!r} is no number of connections; write one such as 100")
        pieces = _list_pieces(self._service, asked, int(limit) if limit is not None else None)
        # The first one now: what is wrong with the request can be told only as long as nothing is sent.
        return Answer(200, "application/json", _from(await anext(pieces), pieces))

    async def _close(self, request: Request) -> Answer:
        identity = request.path.rpartition("/")[2]
        if await self._service.interceptor.close_connection(identity):
            return _json({"closed": identity})
        return _error(
            404,
            f"there is no connection {identity[:60]!r}; it has ended, or the id is not one of 16 hexadecimal digits",
        )

    async def _log_level(self, request: Request) -> Answer:
        _parameters(request)
        return _json({"level": logging.getLevelName(logging.getLogger().level).lower()})

    async def _set_log_level(self, request: Request) -> Answer:
        wanted = _body(request, _LogLevel)
        logging.getLogger().setLevel(wanted.level.upper())
        return _json(wanted)

    async def _reload(self, request: Request) -> Answer:
        _parameters(request)
        reload: Callable[[], Awaitable[str]] | None = getattr(self._service, "reload", None)
        if reload is None:
            return _error(501, "reload is not in this version of tproxyd; restart it to read the configuration again")
        request.allow(_RELOAD)
        return _json({"changes": (await reload()).splitlines()})

    async def _drain(self, request: Request) -> Answer:
        waits = _parameters(request, "wait").get("wait", "0")
        if waits not in ("0", "1"):
            raise UsageError(f"wait is {waits[:60]!r}; write 1 to be answered when the drain has ended, or 0")
        service = self._service
        service.ask_to_drain()
        if waits == "0":
            return _json({"draining": True, "connections": service.interceptor.connections}, status=202)
        request.allow(service.config.drain.timeout + 1)
        done = await service.drained()
        return _json({"draining": False, "connections": service.interceptor.connections}, sent=done)


class _LogLevel(msgspec.Struct, forbid_unknown_fields=True):
    level: Literal["debug", "info", "warning", "error"]


def _may(access: Access, method: str) -> bool:
    return access == "operator" or method == "GET"


async def _health(reason: Callable[[], str], _: Request) -> Answer:
    return tell_health(reason())


def _json_of(make: Callable[[], Awaitable[object]], *, key: str | None = None) -> Resource:
    """A resource without parameters: what is made, as the value of a key if one is given."""

    async def answer(request: Request) -> Answer:
        _parameters(request)
        content = await make()
        return _json(content if key is None else {key: content})

    return answer


def _parameters(request: Request, *known: str) -> dict[str, str]:
    """Those of the query. Raises UsageError for others than the known."""
    if unknown := [name for name in request.query if name not in known]:
        way_out = f"there are {', '.join(known)}" if known else "leave it out"
        raise UsageError(f"{request.path} has no parameter {unknown[0][:60]!r}; {way_out}")
    return dict(request.query)


def _body(request: Request, kind: type[_LogLevel]) -> _LogLevel:
    try:
        return msgspec.json.decode(request.body, type=kind)
    except msgspec.MsgspecError as error:
        raise UsageError(f'the body is not what {request.path} takes ({error}); send {{"level": "debug"}}') from None


async def _list_pieces(service: Service, asked: Mapping[str, Any], limit: int | None) -> AsyncGenerator[bytes, None]:
    """The list as JSON, some thousand bytes at a time: however many there are, so many of them are in memory."""
    encode = msgspec.json.Encoder().encode
    piece, count, more = bytearray(b'{"connections":['), 0, False
    async with aclosing(service.interceptor.list_connections(**asked)) as connections:
        async for connection in connections:
            if count == limit:
                more = True
                break
            piece += (b",\n" if count else b"\n") + encode(connection)
            count += 1
            if len(piece) >= _PIECE:
                yield bytes(piece)
                piece.clear()
    yield bytes(piece + (b'\n],"more":true}\n' if more else b'\n],"more":false}\n'))


async def _from(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield first
        async for piece in rest:
            yield piece


def _json(content: object, *, status: int = 200, sent: Callable[[], None] | None = None) -> Answer:
    return Answer(status, "application/json", msgspec.json.encode(content) + b"\n", sent=sent)


def _error(status: int, *problems: str, headers: Sequence[tuple[str, str]] = ()) -> Answer:
    content = {"error": problems[0], "problems": problems}
    return Answer(status, "application/json", msgspec.json.encode(content) + b"\n", tuple(headers))
