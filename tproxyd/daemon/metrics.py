"""`[admin] metrics`: Prometheus metrics, /healthz and /readyz, over HTTP.

It asks the relay loops for their counters when it is asked itself; they answer between two events, and however many scrapes there are, no more
often than `http.Shared` lets them. No label ever bears an address of a client.
"""

from __future__ import annotations

import errno
import platform
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, get_args

import trio

from tproxyd.config import Endpoint
from tproxyd.daemon.http import Answer, Request, Shared, say, serve_http, tell_health
from tproxyd.daemon.pressure import Pressure
from tproxyd.datapath import CONNECT_SECONDS, Counters, Outcome
from tproxyd.errors import KernelError, TproxydError
from tproxyd.interceptor import KINDS
from tproxyd.net.proc_net import port_holder
from tproxyd.net.sockets import format_address

if TYPE_CHECKING:
    from prometheus_client import Metric

__all__ = ["open_metrics_listener", "open_metrics_socket", "serve_metrics"]

_BACKLOG = 64


def open_metrics_listener(where: Endpoint, inherited: socket.socket | None = None) -> trio.SocketListener:
    """A listener for `serve_metrics`, which closes it; `inherited` is one that is there already, perhaps elsewhere. KernelError if the address cannot be had."""
    if inherited is not None and inherited.getsockname()[:2] != (where.host, where.port):
        inherited.close()
        inherited = None
    return trio.SocketListener(trio.socket.from_stdlib_socket(inherited or open_metrics_socket(where)))


def open_metrics_socket(where: Endpoint) -> socket.socket:
    """The same for who is not in trio. The caller closes it."""
    sock = socket.socket(socket.AF_INET6 if ":" in where.host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((where.host, where.port))
        sock.listen(_BACKLOG)
        sock.setblocking(False)
        return sock
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
    reloaded: Callable[[], bool],
    packets: Callable[[], Awaitable[Mapping[tuple[str, str, str], int]]],
    version: str,
    pressure: Pressure,
) -> None:
    """Answers until cancelled, and closes the listener then.

    `count` gives the counters of all relay loops, `dropped` how many lines of the access log were not written, `repairs` how
    often the kernel's state was put right, by kind, `unready` why it is not ready, empty if it is, `reloaded` whether the configuration that was read
    last is the one that is served, `packets` what the rules that count have counted, by table, chain and comment; `pressure` is that of serve_http.
    """

    async def make() -> bytes:
        # Late: it takes some hundredths of a second to load, and READY does not wait for it.
        from prometheus_client import CollectorRegistry, generate_latest

        counters = await count()
        try:
            counted = await packets()
        except (OSError, TproxydError):  # taken away, or not to be seen at the moment
            counted = {}

        class Collector:
            def collect(self) -> Iterator[Metric]:
                return _families(counters, dropped(), repairs(), reloaded(), counted, version)

        registry = CollectorRegistry(auto_describe=False)
        registry.register(Collector())
        return generate_latest(registry)

    await serve_http(listener, partial(_answer, Shared(make), unready), what="the metrics port", pressure=pressure)


async def _answer(page: Shared[bytes], unready: Callable[[], str], request: Request) -> Answer:
    if request.method not in ("GET", "HEAD"):
        return say(405, "only GET", ("Allow", "GET, HEAD"))
    match request.path:
        case "/metrics":
            from prometheus_client import CONTENT_TYPE_LATEST

            return Answer(200, CONTENT_TYPE_LATEST, await page())
        case "/healthz":
            return tell_health("")
        case "/readyz":
            return tell_health(unready())
    return say(404, "/metrics, /healthz, /readyz")


def _families(
    counters: Counters,
    dropped: int,
    repairs: Mapping[str, int],
    reloaded: bool,
    packets: Mapping[tuple[str, str, str], int],
    version: str,
) -> Iterator[Metric]:
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
    seen = CounterMetricFamily(
        "tproxyd_kernel_packets",
        "Packets that the ruleset has counted since its tables were loaded, by the rule's comment.",
        labels=["table", "chain", "rule"],
    )
    for labels, number in sorted(packets.items()):
        seen.add_metric(labels, number)
    yield seen
    yield GaugeMetricFamily(
        "tproxyd_config_last_reload_success",
        "1 if the configuration in force is the one that was read last, 0 if that one was refused.",
        value=int(reloaded),
    )
    build = GaugeMetricFamily("tproxyd_build_info", "1, with what runs here.", labels=["version", "python", "kernel"])
    build.add_metric([version, platform.python_version(), platform.release()], 1)
    yield build
