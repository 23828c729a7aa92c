"""`tproxyd run`: start, say ready, serve, drain, stop. Everything that belongs to the process and not to the interception."""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from functools import partial

import trio

from tproxyd import __version__
from tproxyd.config import Config
from tproxyd.daemon.lock import Orders, namespace_lock, reverted, serve_orders
from tproxyd.daemon.logs import LineWriter, access_format, encode_line, set_up_logging
from tproxyd.daemon.obstacles import Obstacles
from tproxyd.daemon.privileges import give_up_privileges
from tproxyd.daemon.status import tell_serving
from tproxyd.errors import TproxydError
from tproxyd.interceptor import Interceptor, open_interceptor
from tproxyd.net.sockets import format_address

__all__ = ["run"]

_log = logging.getLogger(__name__)

_STOP = (signal.SIGTERM, signal.SIGINT)


def run(config: Config) -> int:
    """Serves until SIGTERM or SIGINT and drains; a second one ends it at once. 0 after a clean stop. Raises TproxydError."""
    _allow_all_files()
    seen = give_up_privileges(config)  # before there is another thread
    stderr = LineWriter(sys.stderr.fileno())
    set_up_logging(config, stderr)
    for warning in seen.warnings:
        _log.warning("%s", warning)
    stdout = sys.stdout.fileno()
    access_log = LineWriter(stdout, access_format(config, stdout)) if config.log.access else None
    try:
        with namespace_lock("start") as held:
            trio.run(_serve, config, stderr, access_log, held, seen.ssh_ports)
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


async def _serve(
    config: Config, stderr: LineWriter, access_log: LineWriter | None, held: socket.socket, ssh_ports: Collection[int]
) -> None:
    stop = _Stop()
    with trio.open_signal_receiver(*_STOP, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery, _metrics_listener(config) as metrics:
            nursery.start_soon(_listen_to_signals, signals, stop)
            # A signal that comes while this starts is answered as soon as it has: that takes a fraction of a second.
            on_lines = access_log.write if access_log is not None else None
            async with open_interceptor(
                config, on_lines=on_lines, own_namespace=True, ssh_ports=[*ssh_ports], namespace_held=True
            ) as interceptor:
                obstacles = Obstacles(config, interceptor)

                def trouble() -> str:
                    return interceptor.trouble or obstacles.trouble

                orders: Orders = {
                    "revert": partial(_revert, interceptor),
                    "status": partial(tell_serving, interceptor, trouble, began=time.monotonic()),
                }
                nursery.start_soon(serve_orders, held, orders)
                if metrics is not None:
                    nursery.start_soon(_serve_metrics, metrics, interceptor, trouble, stop, access_log)
                nursery.start_soon(obstacles.watch)
                # At any log level, and on one line: others wait for it.
                listen = ",".join(format_address(address) for address in interceptor.listen)
                stderr.write(encode_line(f"tproxyd: ready pid={os.getpid()} listen={listen}"))
                await stop.drain.wait()
                await _drain(config, interceptor, stop)
            nursery.cancel_scope.cancel()


async def _revert(interceptor: Interceptor) -> str:
    removed = await interceptor.revert()
    _log.warning(
        "`tproxyd revert` has removed all kernel state: nothing is captured from now on; restart or stop this daemon"
    )
    return reverted(removed, "serves this network namespace and captures nothing from now on; restart or stop it")


@asynccontextmanager
async def _metrics_listener(config: Config) -> AsyncIterator[trio.SocketListener | None]:
    """Open before anything else: that its address is taken is to be known while nothing has been changed."""
    if config.admin.metrics is None:
        yield None
    else:
        from tproxyd.daemon.metrics import open_metrics_listener  # late: who has no metrics need not load it

        async with open_metrics_listener(config.admin.metrics) as listener:
            yield listener


async def _serve_metrics(
    listener: trio.SocketListener,
    interceptor: Interceptor,
    trouble: Callable[[], str],
    stop: _Stop,
    access_log: LineWriter | None,
) -> None:
    from tproxyd.daemon.metrics import serve_metrics

    await serve_metrics(
        listener,
        interceptor.counters,
        dropped=lambda: interceptor.records_dropped + (access_log.dropped if access_log is not None else 0),
        repairs=lambda: interceptor.repairs,
        unready=lambda: "stopping" if stop.drain.is_set() else trouble(),
        version=__version__,
    )


class _Stop:
    """What the signals ask for: the first one to drain, the second one to end now."""

    def __init__(self) -> None:
        self.drain = trio.Event()
        self.now = trio.Event()


async def _listen_to_signals(signals: AsyncIterator[int], stop: _Stop) -> None:
    async for number in signals:
        if number == signal.SIGHUP:
            _log.warning("SIGHUP: reload is not in this version of tproxyd; restart it to read the configuration again")
        elif stop.drain.is_set():
            stop.now.set()
        else:
            stop.drain.set()


async def _drain(config: Config, interceptor: Interceptor, stop: _Stop) -> None:
    _log.info(
        "stopping: up to %g s for connections to end; there are %d", config.drain.timeout, interceptor.connections
    )
    with trio.move_on_after(config.drain.timeout):
        async with trio.open_nursery() as nursery:

            async def now() -> None:
                await stop.now.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(now)
            await interceptor.drain()
            nursery.cancel_scope.cancel()
    if interceptor.connections:
        _log.warning("connections that have not ended and are reset: %d", interceptor.connections)


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
