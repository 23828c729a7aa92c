"""`tproxyd run`: start, say ready, serve, drain, stop. Everything that belongs to the process and not to the interception."""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio

from tproxyd import __version__
from tproxyd.config import Config
from tproxyd.daemon.comparison import session_ports
from tproxyd.daemon.lock import Orders, namespace_lock, reverted, serve_orders
from tproxyd.daemon.logs import AccessLog, LineWriter, encode_line, set_up_logging
from tproxyd.daemon.reload import Reloads
from tproxyd.daemon.service import Service, Stop
from tproxyd.daemon.status import tell_serving
from tproxyd.errors import TproxydError
from tproxyd.interceptor import open_interceptor
from tproxyd.net.capabilities import require_capabilities
from tproxyd.net.sockets import format_address

__all__ = ["run"]

_log = logging.getLogger(__name__)

_STOP = (signal.SIGTERM, signal.SIGINT)


def run(config: Config, load: Callable[[], Config] | None = None) -> int:
    """Serves until SIGTERM or SIGINT and drains; a second one ends it at once. 0 after a clean stop. Raises TproxydError.

    `load` reads the configuration again at SIGHUP; None where it came from the command line alone."""
    # Before the lock, which needs one of them.
    require_capabilities("capturing connections", ("CAP_NET_ADMIN", "CAP_NET_RAW"))
    stderr = LineWriter(sys.stderr.fileno())
    set_up_logging(config, stderr)
    _allow_all_files()
    access_log = AccessLog(config, sys.stdout.fileno())
    try:
        with namespace_lock("start") as held:
            trio.run(_serve, config, load, stderr, access_log, held)
    except BaseExceptionGroup as group:
        error = _only(group)
        if error is None:
            raise
        raise error from group
    finally:
        access_log.close()
        if access_log.dropped:
            _log.warning(
                "lines of the access log that were dropped because stdout did not take them: %d", access_log.dropped
            )
        stderr.close()
    return os.EX_OK


async def _serve(
    config: Config,
    load: Callable[[], Config] | None,
    stderr: LineWriter,
    access_log: AccessLog,
    held: socket.socket,
) -> None:
    stop, reloads = Stop(), Reloads()
    with trio.open_signal_receiver(*_STOP, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery, _metrics_listener(config) as metrics:
            nursery.start_soon(_listen_to_signals, signals, stop, reloads)
            # A signal that comes while this starts is answered as soon as it has: that takes a fraction of a second.
            async with open_interceptor(
                config, on_lines=access_log.write, own_namespace=True, ssh_ports=[*session_ports()], namespace_held=True
            ) as interceptor:
                service = Service(config, interceptor, stop, access_log, load=load, reloads=reloads)
                orders: Orders = {
                    "revert": partial(_revert, service),
                    "status": partial(_status, service),
                    "reload": service.reload,
                }
                nursery.start_soon(serve_orders, held, orders)
                if metrics is not None:
                    nursery.start_soon(_serve_metrics, metrics, service)
                nursery.start_soon(service.obstacles.watch)
                nursery.start_soon(service.serve_reloads)
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
        version=__version__,
    )


async def _listen_to_signals(signals: AsyncIterator[int], stop: Stop, reloads: Reloads) -> None:
    async for number in signals:
        if number == signal.SIGHUP:
            reloads.ask()  # what comes of it is told in the log
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
