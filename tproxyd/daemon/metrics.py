"""`[admin] metrics`: Prometheus metrics, /healthz and /readyz, over HTTP.

Served by the daemon's own loop, with a deadline for each request and a bound on how many there are. It asks the relay loops for their
counters when it is asked itself; they answer between two events, so a scrape costs a connection nothing. No label ever bears an
address of a client.
"""

from __future__ import annotations

import errno
import logging
import platform
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, get_args

import h11
import trio

from tproxyd.config import Endpoint
from tproxyd.config.wording import printable
from tproxyd.datapath import CONNECT_SECONDS, Counters, Outcome
from tproxyd.errors import KernelError
from tproxyd.interceptor import KINDS
from tproxyd.net.proc_net import port_holder
from tproxyd.net.sockets import format_address

if TYPE_CHECKING:
    from prometheus_client import Metric

__all__ = ["open_metrics_listener", "serve_metrics"]

_log = logging.getLogger(__name__)

_CLIENTS = 64  # at once; one more takes the place of one that does not get on
_PATIENCE = 10.0  # seconds for a request to come, and for its answer to be taken
_LONGEST = 60.0  # seconds for all requests of one connection: nobody holds a place for good
_LOOK = 0.1  # seconds, where all are served and none can be sent away, until one of them may be
_READ = 8192

Page = Callable[[], Awaitable[tuple[int, str, bytes]]]
"""Gives a status, a content type and a body."""

Waiting = Callable[[], AbstractContextManager[None]]
"""Makes the block around all that waits for one client: for a whole request, or for taking an answer."""


def open_metrics_listener(where: Endpoint, inherited: socket.socket | None = None) -> trio.SocketListener:
    """A listener for `serve_metrics`, which closes it; `inherited` is one that is there already. KernelError if the address cannot be had."""
    if inherited is not None:
        inherited.setblocking(False)
        return trio.SocketListener(trio.socket.from_stdlib_socket(inherited))
    sock = socket.socket(socket.AF_INET6 if ":" in where.host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((where.host, where.port))
        sock.listen(_CLIENTS)
        sock.setblocking(False)
        return trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    except OSError as error:
        holder = port_holder(where.port, family=sock.family) if error.errno == errno.EADDRINUSE else None
        sock.close()
        raise KernelError(
            f"cannot listen on {format_address((where.host, where.port))} for metrics: {error.strerror}"
            f"{f', by {holder}' if holder else ''}; choose another admin.metrics or stop what uses it"
        ) from error


async def serve_metrics(
    listener: trio.SocketListener,
    count: Callable[[], Awaitable[Counters]],
    *,
    dropped: Callable[[], int],
    repairs: Callable[[], Mapping[str, int]],
    unready: Callable[[], str],
    version: str,
) -> None:
    """Answers until cancelled, and closes the listener then.

    `count` gives the counters of all relay loops, `dropped` how many lines of the access log were not written, `repairs` how
    often the kernel's state was put right, by kind, `unready` why it is not ready, empty if it is.
    """
    pages: dict[bytes, Page] = {
        b"/metrics": partial(_metrics, count, dropped, repairs, version),
        b"/healthz": partial(_word, str),
        b"/readyz": partial(_word, unready),
    }
    places = _Places()
    async with listener, trio.open_nursery() as nursery:
        while True:
            await trio.lowlevel.wait_readable(listener.socket)
            token = await places.take()
            try:
                stream = await listener.accept()
            except OSError:  # no file left: connections that are relayed come first
                places.leave(token)
                await trio.sleep(0.1)
                continue
            nursery.start_soon(_serve_client, stream, pages, places, token)


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


async def _serve_client(stream: trio.SocketStream, pages: dict[bytes, Page], places: _Places, token: object) -> None:
    try:
        async with stream:
            with trio.move_on_after(_LONGEST) as client:
                await _converse(stream, pages, partial(places.waiting_for, client))
    except (trio.BrokenResourceError, trio.TooSlowError, h11.LocalProtocolError):
        pass  # gone, or too slow to be waited for
    except Exception:  # a surprise costs this client only, never the daemon
        _log.exception("an answer on the metrics port failed; this is a bug")
    finally:
        places.leave(token)


async def _converse(stream: trio.SocketStream, pages: dict[bytes, Page], waiting: Waiting) -> None:
    connection = h11.Connection(h11.SERVER)
    try:
        while True:
            with trio.fail_after(_PATIENCE):
                if not await _answer(stream, connection, pages, waiting):
                    return
                connection.start_next_cycle()
    except h11.RemoteProtocolError as error:
        with trio.fail_after(_PATIENCE), waiting():
            await _send(stream, connection, error.error_status_hint, "text/plain", b"bad request\n", close=True)


async def _answer(
    stream: trio.SocketStream, connection: h11.Connection, pages: dict[bytes, Page], waiting: Waiting
) -> bool:
    """One request and its answer; whether another one may follow."""
    with waiting():
        request = await _receive(stream, connection)
    if request is None:
        return False
    page = pages.get(request.target.partition(b"?")[0])
    if request.method not in (b"GET", b"HEAD"):
        status, kind, body = 405, "text/plain", b"only GET\n"
    elif page is None:
        status, kind, body = 404, "text/plain", b"/metrics, /healthz, /readyz\n"
    else:
        status, kind, body = await page()
    with waiting():
        await _send(stream, connection, status, kind, body, close=False, head=request.method == b"HEAD")
    return connection.our_state is h11.DONE and connection.their_state is h11.DONE


async def _receive(stream: trio.SocketStream, connection: h11.Connection) -> h11.Request | None:
    """A whole request; None if there comes no further one."""
    request: h11.Request | None = None
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(_READ))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
            return None
        elif isinstance(event, h11.EndOfMessage):
            return request


async def _send(
    stream: trio.SocketStream,
    connection: h11.Connection,
    status: int,
    kind: str,
    body: bytes,
    *,
    close: bool,
    head: bool = False,
) -> None:
    headers = [("Content-Type", kind), ("Content-Length", str(len(body)))]
    if close:
        headers.append(("Connection", "close"))
    data = connection.send(h11.Response(status_code=status, headers=headers)) or b""
    if not head:
        data += connection.send(h11.Data(data=body)) or b""
    data += connection.send(h11.EndOfMessage()) or b""
    await stream.send_all(data)


async def _word(reason: Callable[[], str]) -> tuple[int, str, bytes]:
    why = reason()
    return (
        (503, "text/plain; charset=utf-8", f"not ready: {printable(why)}\n".encode())
        if why
        else (200, "text/plain", b"ok\n")
    )


async def _metrics(
    count: Callable[[], Awaitable[Counters]],
    dropped: Callable[[], int],
    repairs: Callable[[], Mapping[str, int]],
    version: str,
) -> tuple[int, str, bytes]:
    # Late: it takes some hundredths of a second to load, and READY does not wait for it.
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

    counters = await count()

    class Collector:
        def collect(self) -> Iterator[Metric]:
            return _families(counters, dropped(), repairs(), version)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    return 200, CONTENT_TYPE_LATEST, generate_latest(registry)


def _families(counters: Counters, dropped: int, repairs: Mapping[str, int], version: str) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    workload = "host"
    ended = CounterMetricFamily(
        "tproxyd_connections", "Connections that have ended, by outcome.", labels=["workload", "outcome"]
    )
    for outcome in get_args(Outcome):
        ended.add_metric([workload, outcome], counters.outcomes.get(outcome, 0))
    yield ended
    active = GaugeMetricFamily("tproxyd_connections_active", "Connections that live.", labels=["workload"])
    active.add_metric([workload], counters.active)
    yield active
    moved = CounterMetricFamily("tproxyd_bytes", "Bytes received from either side.", labels=["workload", "from"])
    moved.add_metric([workload, "client"], counters.bytes_from_client)
    moved.add_metric([workload, "upstream"], counters.bytes_from_upstream)
    yield moved
    connect = HistogramMetricFamily("tproxyd_connect_seconds", "Time until the upstream answered, from accept on.")
    buckets, total = [], 0
    for bound, number in zip((*map(str, CONNECT_SECONDS), "+Inf"), counters.connect_seconds, strict=True):
        total += number
        buckets.append((bound, float(total)))
    connect.add_metric([], buckets, counters.connect_seconds_sum)
    yield connect
    yield CounterMetricFamily("tproxyd_accepted", "Connections accepted by the listeners.", value=counters.accepted)
    yield CounterMetricFamily(
        "tproxyd_access_log_dropped", "Lines of the access log that nobody took in time.", value=dropped
    )
    repaired = CounterMetricFamily(
        "tproxyd_drift_repairs", "Kernel state put right after others had changed it, by kind.", labels=["kind"]
    )
    for kind in KINDS:
        repaired.add_metric([kind], repairs.get(kind, 0))
    yield repaired
    build = GaugeMetricFamily("tproxyd_build_info", "1, with what runs here.", labels=["version", "python", "kernel"])
    build.add_metric([version, platform.python_version(), platform.release()], 1)
    yield build
