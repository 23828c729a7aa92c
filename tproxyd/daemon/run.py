"""`tproxyd run`: start, say ready, serve, drain, stop. Everything that belongs to the process and not to the interception."""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio

from tproxyd import __version__
from tproxyd.config import Config
from tproxyd.daemon.admin_socket import AdminSocket, open_admin_socket
from tproxyd.daemon.comparison import session_ports
from tproxyd.daemon.lock import Orders, namespace_lock, reverted, serve_orders
from tproxyd.daemon.logs import LineWriter, access_format, encode_line, set_up_logging
from tproxyd.daemon.service import Service, Stop
from tproxyd.daemon.status import tell_serving
from tproxyd.errors import TproxydError
from tproxyd.interceptor import open_interceptor
from tproxyd.interceptor.threads import in_thread
from tproxyd.kernel import packet_counts
from tproxyd.net.capabilities import require_capabilities
from tproxyd.net.sockets import format_address

__all__ = ["run"]

_log = logging.getLogger(__name__)

_STOP = (signal.SIGTERM, signal.SIGINT)


def run(config: Config) -> int:
    """Serves until SIGTERM or SIGINT and drains; a second one ends it at once. 0 after a clean stop. Raises TproxydError."""
    # Before the lock, which needs one of them.
    require_capabilities("capturing connections", ("CAP_NET_ADMIN", "CAP_NET_RAW"))
    stderr = LineWriter(sys.stderr.fileno())
    set_up_logging(config, stderr)
    _allow_all_files()
    stdout = sys.stdout.fileno()
    access_log = LineWriter(stdout, access_format(config, stdout)) if config.log.access else None
    try:
        with namespace_lock("start") as held:
            trio.run(_serve, config, stderr, access_log, held)
    except BaseExceptionGroup as group:
        error = _only(group)
        if error is None:
            raise
        raise error from group
    finally:
        if access_log is not None:
            access_log.close()
            if access_log.dropped:
                _log.warning(
                    "lines of the access log that were dropped because stdout did not take them: %d", access_log.dropped
                )
        stderr.close()
    return os.EX_OK


async def _serve(config: Config, stderr: LineWriter, access_log: LineWriter | None, held: socket.socket) -> None:
    stop = Stop()
    with (
        trio.open_signal_receiver(*_STOP, signal.SIGHUP) as signals,
        open_admin_socket(config.admin.socket) as admin,
    ):
        async with trio.open_nursery() as nursery, _metrics_listener(config) as metrics:
            nursery.start_soon(_listen_to_signals, signals, stop)
            # A signal that comes while this starts is answered as soon as it has: that takes a fraction of a second.
            on_lines = access_log.write if access_log is not None else None
            async with open_interceptor(
                config, on_lines=on_lines, own_namespace=True, ssh_ports=[*session_ports()], namespace_held=True
            ) as interceptor:
                path = admin.path if admin is not None else None
                service = Service(config, interceptor, stop, access_log, admin_socket=path)
                orders: Orders = {"revert": partial(_revert, service), "status": partial(_status, service)}
                nursery.start_soon(serve_orders, held, orders)
                if metrics is not None:
                    nursery.start_soon(_serve_metrics, metrics, service)
                if admin is not None:
                    nursery.start_soon(_serve_admin, admin, service)
                nursery.start_soon(service.obstacles.watch)
                # At any log level, and on one line: others wait for it.
                listen = ",".join(format_address(address) for address in interceptor.listen)
                stderr.write(encode_line(f"tproxyd: ready pid={os.getpid()} listen={listen}"))
                await stop.drain.wait()
                await service.drain()
            nursery.cancel_scope.cancel()


async def _revert(service: Service) -> str:
    return reverted(
        await service.revert(),
        "serves this network namespace and captures nothing from now on; restart or stop it",
    )


async def _status(service: Service) -> str:
    return tell_serving(await service.status())


@asynccontextmanager
async def _metrics_listener(config: Config) -> AsyncIterator[trio.SocketListener | None]:
    """Open before anything else: that its address is taken is to be known while nothing has been changed."""
    if config.admin.metrics is None:
        yield None
    else:
        from tproxyd.daemon.metrics import open_metrics_listener  # late: who has no metrics need not load it

        async with open_metrics_listener(config.admin.metrics) as listener:
            yield listener


async def _serve_metrics(listener: trio.SocketListener, service: Service) -> None:
    from tproxyd.daemon.metrics import serve_metrics

    await serve_metrics(
        listener,
        service.interceptor.counters,
        dropped=lambda: service.dropped,
        repairs=lambda: service.interceptor.repairs,
        unready=lambda: service.unready,
        reloaded=lambda: service.last_reload_ok,
        packets=lambda: in_thread(packet_counts),
        version=__version__,
    )


async def _serve_admin(admin: AdminSocket, service: Service) -> None:
    async with trio.SocketListener(trio.socket.from_stdlib_socket(admin.sock)) as listener:
        await trio.lowlevel.wait_readable(admin.sock)  # as long as nobody asks, HTTP is not loaded
        from tproxyd.daemon.admin import serve_admin

        await serve_admin(listener, service)


async def _listen_to_signals(signals: AsyncIterator[int], stop: Stop) -> None:
    async for number in signals:
        if number == signal.SIGHUP:
            _log.warning("SIGHUP: reload is not in this version of tproxyd; restart it to read the configuration again")
        else:
            stop.ask()


def _allow_all_files() -> None:
    """Raises the soft limit of open files to the hard one: it is low for programs that use select(), and this one does not."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _only(group: BaseExceptionGroup[BaseException]) -> TproxydError | None:
    """The one error of ours in a group of trio's, if there is nothing else in it."""
    errors = group.exceptions
    if len(errors) != 1:
        return None
    if isinstance(errors[0], BaseExceptionGroup):
        return _only(errors[0])
    return errors[0] if isinstance(errors[0], TproxydError) else None
