"""The proxies that are compared: how each is configured, started and ended. One worker thread each.

Knows that every one listens transparently on LISTEN_PORT, goes to the original destination as the client, and is ready once it
listens. Refuses to know what is measured with it.

- HAProxy keeps address and port (`usesrc client`) and finds the destination through `option transparent`. The reference is without
  `option splice-auto`, as it comes: in three runs (3, 5 and 5 rounds, other work on the machine in all of them) the option was within the
  noise, 0.95-1.13 of it in one stream, 0.90-0.96 in eight, 1.05-1.46 in uploads, 0.84-1.03 in new connections. It has a row of its own.
- nginx does not set IP_TRANSPARENT on its listener, so it is given one, in the way in which it hands its own to its successor
  (NGINX=descriptor). On 0.0.0.0, else $server_addr would be what `listen` says instead of what the client dialled. Without
  `proxy_half_close` it drops the answer to a client that has ended its own side, so that is on.
- Envoy keeps the address, not the port: its original_src filter binds to port 0. Its default of 1,024 connections a cluster is lifted.
- The C relay is `splice_relay.c`.
- tproxyd runs with its defaults, its access log read through a pipe; so does the embedding program, `handler.py`.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from tproxyd.net.sockets import open_listener
from tproxyd.testing import LabProcess, Node, open_daemon

__all__ = [
    "ABUSED",
    "CAPTURE",
    "HANDLER",
    "HANDLER_LOOP",
    "LISTEN_PORT",
    "METRICS_PORT",
    "Peer",
    "Place",
    "all_peers",
    "tproxyd",
]

HANDLER, HANDLER_LOOP = "tproxyd handler", "tproxyd handler loop"
ABUSED = "tproxyd with metrics"
METRICS_PORT = 15020
LISTEN_PORT = 15006
CAPTURE = (
    f'[capture]\nports = ["8001-8009"]\nexclude_ports = []\nwhen_down = "bypass"\n[listen]\nport = {LISTEN_PORT}\n'
)
"""The configuration of the kernel state that all share, and of tproxyd."""

_CONNECTIONS = 12_000  # more than any cell has; HAProxy and nginx want to know
_PIPES = 512  # for HAProxy's splicing; more than connections that move much at once in any cell
_END_SECONDS = 5.0  # for an orderly end; all of them take less than one
_NGINX_STREAM = "/usr/lib/nginx/modules/ngx_stream_module.so"


@dataclass(frozen=True)
class Place:
    """Where a peer is started."""

    node: Node
    directory: Path
    programs: dict[str, str]
    """Those that are not in PATH."""


Start = Callable[[Place], AbstractAsyncContextManager[LabProcess | None]]


@dataclass(frozen=True)
class Peer:
    """A row of the tables. `start` gives the running process; None for no proxy at all."""

    name: str
    start: Start = field(repr=False)
    words: str
    """What the table's legend says."""
    keeps_port: bool = True
    needs: str = ""
    """A program without which it cannot run."""

    @property
    def proxied(self) -> bool:
        return self.name != "direct"


def all_peers() -> list[Peer]:
    """In the order of their turns. The first three are no rivals: no proxy, the reference, and the limit."""
    splice = "option splice-auto"
    tuned = f"{splice}\n"
    return [
        Peer("direct", _nothing, "no proxy: forwarded, behind the same ruleset"),
        Peer("haproxy", partial(_haproxy, "", ""), "HAProxy, default buffers: the reference", needs="haproxy"),
        Peer("haproxy+splice", partial(_haproxy, "", splice), "the same with option splice-auto", needs="haproxy"),
        Peer(
            "haproxy tuned",
            partial(_haproxy, "tune.bufsize 131072\ntune.pipesize 1048576\n", tuned),
            "HAProxy, splice-auto, buffers of 128 KiB and pipes of 1 MiB",
            needs="haproxy",
        ),
        Peer("nginx", _nginx, "nginx stream", needs="nginx"),
        Peer("envoy", _envoy, "Envoy, tcp_proxy; keeps the address, not the port", keeps_port=False, needs="envoy"),
        Peer("splice", _splice, "C, epoll and splice: the limit of user space", needs="splice_relay"),
        tproxyd("tproxyd"),
        tproxyd(
            ABUSED,
            f'[admin]\nmetrics = "127.0.0.1:{METRICS_PORT}"\n',
            "with its administrator's socket and its metrics",
        ),
        Peer(HANDLER, partial(_handler, "relay"), "a program that handles each connection: connects, and relay_to"),
        Peer(HANDLER_LOOP, partial(_handler, "loop"), "the same, with a loop of receive_some and send_all each way"),
    ]


def tproxyd(name: str, extra: str = "", words: str = "its defaults, access log on", capture: str = CAPTURE) -> Peer:
    """The daemon with further lines of configuration (whole tables)."""
    return Peer(name, partial(_tproxyd, capture + extra), words)


@asynccontextmanager
async def _nothing(_: Place) -> AsyncIterator[None]:
    yield None


@asynccontextmanager
async def _haproxy(settings: str, options: str, place: Place) -> AsyncIterator[LabProcess]:
    # It does not start if it could not hold maxconn connections with the files that it may have.
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 200  # less what it has besides
    most = min(_CONNECTIONS, (files - 2 * _PIPES) // 2)
    config = place.directory / "haproxy.cfg"
    config.write_text(
        f"""\
global
    nbthread 1
    maxconn {most}
    maxpipes {_PIPES}
    {settings}
defaults
    mode tcp
    timeout connect 5s
    timeout client 1h
    timeout server 1h
    {options}
frontend in
    bind 127.0.0.1:{LISTEN_PORT} transparent
    maxconn {most}
    backlog 4096
    default_backend out
backend out
    option transparent
    source 0.0.0.0 usesrc client
""",
        encoding="utf-8",
    )
    async with _ended(place.node.process("haproxy", "-db", "-f", str(config), collect=True)) as process:
        yield process


@asynccontextmanager
async def _nginx(place: Place) -> AsyncIterator[LabProcess]:
    config = place.directory / "nginx.conf"
    config.write_text(
        f"""\
load_module {_NGINX_STREAM};
user root;
daemon off;
worker_processes 1;
pid {place.directory}/nginx.pid;
error_log stderr crit;
events {{ worker_connections {2 * _CONNECTIONS}; }}
stream {{
    server {{
        listen 0.0.0.0:{LISTEN_PORT} backlog=4096;
        proxy_bind $remote_addr:$remote_port transparent;
        proxy_pass $server_addr:$server_port;
        proxy_connect_timeout 5s;
        proxy_timeout 1h;
        proxy_half_close on;
    }}
}}
""",
        encoding="utf-8",
    )
    with place.node.call(partial(open_listener, "0.0.0.0", LISTEN_PORT, backlog=4096)) as listener:  # noqa: S104  # see above
        process = place.node.process(
            *("nginx", "-p", str(place.directory), "-e", "stderr", "-c", str(config)),
            collect=True,
            env={"NGINX": f"{listener.fileno()};"},
            pass_fds=(listener.fileno(),),
        )
        async with _ended(process) as running:
            await trio.sleep(0.1)  # the port is open before nginx is ready: nothing else tells
            yield running


@asynccontextmanager
async def _envoy(place: Place) -> AsyncIterator[LabProcess]:
    config = place.directory / "envoy.json"
    config.write_text(json.dumps(_envoy_config(), indent=1), encoding="utf-8")
    process = place.node.process(
        *(place.programs["envoy"], "-c", str(config), "--concurrency", "1"),
        *("--disable-hot-restart", "--log-level", "error"),
        collect=True,
    )
    async with _ended(process) as running:
        yield running


def _envoy_config() -> dict[str, object]:
    def typed(name: str, **fields: object) -> dict[str, object]:
        return {"@type": f"type.googleapis.com/envoy.extensions.filters.{name}", **fields}

    cluster = {
        "name": "out",
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "5s",
        "circuit_breakers": {
            "thresholds": [{"max_connections": 10 * _CONNECTIONS, "max_pending_requests": 10 * _CONNECTIONS}]
        },
    }
    listener = {
        "name": "in",
        "transparent": True,
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": LISTEN_PORT}},
        "tcp_backlog_size": 4096,
        "listener_filters": [
            {"name": "original_dst", "typed_config": typed("listener.original_dst.v3.OriginalDst")},
            {"name": "original_src", "typed_config": typed("listener.original_src.v3.OriginalSrc")},
        ],
        "filter_chains": [
            {
                "filters": [
                    {
                        "name": "tcp",
                        "typed_config": typed("network.tcp_proxy.v3.TcpProxy", stat_prefix="out", cluster="out"),
                    }
                ]
            }
        ],
    }
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


@asynccontextmanager
async def _splice(place: Place) -> AsyncIterator[LabProcess]:
    process = place.node.process(place.programs["splice_relay"], "127.0.0.1", str(LISTEN_PORT), collect=True)
    async with _ended(process) as running:
        yield running


@asynccontextmanager
async def _tproxyd(config: str, place: Place) -> AsyncIterator[LabProcess]:
    async with open_daemon(place.node, config) as daemon:
        try:
            yield daemon.process
        finally:
            await _end(daemon.process)


@asynccontextmanager
async def _handler(way: str, place: Place) -> AsyncIterator[LabProcess]:
    config = place.directory / "handler.toml"
    config.write_text(CAPTURE, encoding="utf-8")
    process = place.node.process(
        *(sys.executable, "-m", "bench.handler", str(config), way), collect=True, cwd=str(Path(__file__).parent.parent)
    )
    async with _ended(process) as running:
        await running.wait_for_output("ready")  # its listeners are there before the capture is its own
        yield running


@asynccontextmanager
async def _ended(opening: AbstractAsyncContextManager[LabProcess]) -> AsyncIterator[LabProcess]:
    """Runs it, and ends it with its workers: killed at once, it would leave these behind."""
    async with opening as process:
        try:
            yield process
        finally:
            await _end(process)


async def _end(process: LabProcess) -> None:
    process.send_signal(signal.SIGTERM)
    with trio.move_on_after(_END_SECONDS, shield=True):
        await process.wait()
    # What is still there is killed by whoever opened it, and its descendants by `rig`.
