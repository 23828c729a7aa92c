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

import msgspec
import trio

from tproxyd import __version__
from tproxyd.config import Config
from tproxyd.daemon.comparison import session_ports
from tproxyd.daemon.handover import Generations, Old, take_over
from tproxyd.daemon.lock import Orders, namespace_lock, reverted, serve_orders
from tproxyd.daemon.logs import LineWriter, access_format, encode_line, set_up_logging
from tproxyd.daemon.service import Service, Stop
from tproxyd.daemon.status import tell_serving
from tproxyd.errors import TproxydError
from tproxyd.interceptor import open_interceptor
from tproxyd.net.capabilities import require_capabilities
from tproxyd.net.sockets import format_address

__all__ = ["run"]

_log = logging.getLogger(__name__)

_STOP = (signal.SIGTERM, signal.SIGINT)


def run(config: Config) -> int:
    """Serves until SIGTERM or SIGINT and drains; a second one ends it at once. 0 after a clean stop. Raises TproxydError.

    Takes the place of a generation that has started it for that (handover.py)."""
    old = take_over()
    try:
        return _run(config, old)
    except TproxydError as error:
        if old is not None:
            old.refuse(error)
        raise
    finally:
        if old is not None:
            old.close()


def _run(config: Config, old: Old | None) -> int:
    # Before the lock, which needs one of them.
    require_capabilities("capturing connections", ("CAP_NET_ADMIN", "CAP_NET_RAW"))
    stderr = LineWriter(sys.stderr.fileno())
    set_up_logging(config, stderr)
    _allow_all_files()
    stdout = sys.stdout.fileno()
    access_log = LineWriter(stdout, access_format(config, stdout)) if config.log.access else None
    try:
        with namespace_lock("start") if old is None else old.lock as held:
            trio.run(_serve, config, stderr, access_log, held, old)
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
    config: Config, stderr: LineWriter, access_log: LineWriter | None, held: socket.socket, old: Old | None
) -> None:
    stop = Stop()
    with trio.open_signal_receiver(*_STOP, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery, _metrics_listener(config, old) as metrics:
            nursery.start_soon(_listen_to_signals, signals, stop)
            # A signal that comes while this starts is answered as soon as it has: that takes a fraction of a second.
            on_lines = access_log.write if access_log is not None else None
            async with open_interceptor(
                config,
                on_lines=on_lines,
                own_namespace=True,
                ssh_ports=[*session_ports()],
                namespace_held=True,
                predecessor=old.predecessor if old is not None else None,
            ) as interceptor:
                service = Service(config, interceptor, stop, access_log)
                generations = Generations(interceptor, stop, held, metrics, old)
                orders: Orders = {
                    "revert": partial(_revert, service, generations),
                    "status": partial(_status, service, generations),
                    "handover": generations.hand_over,
                }
                if not generations.begin():
                    nursery.cancel_scope.cancel()
                    return
                nursery.start_soon(generations.serve, partial(serve_orders, held, orders))
                if metrics is not None:
                    nursery.start_soon(_serve_metrics, metrics, service, generations.serving_metrics)
                nursery.start_soon(service.obstacles.watch)
                # At any log level, and on one line: others wait for it.
                listen = ",".join(format_address(address) for address in interceptor.listen)
                stderr.write(encode_line(f"tproxyd: ready pid={os.getpid()} listen={listen}"))
                generations.say_ready()
                await stop.drain.wait()
                deadline = trio.current_time() + config.drain.timeout
                await service.drain()
                await generations.outlive(deadline)
            nursery.cancel_scope.cancel()


async def _revert(service: Service, generations: Generations) -> str:
    ended = await generations.end_old()  # its connections need what goes now
    return reverted(
        await service.revert(),
        "serves this network namespace and captures nothing from now on; restart or stop it"
        + (f" (pid {ended}, which still drained since a hand-over, has ended with its connections)" if ended else ""),
    )


async def _status(service: Service, generations: Generations) -> str:
    return tell_serving(msgspec.structs.replace(await service.status(), draining=generations.draining))


@asynccontextmanager
async def _metrics_listener(config: Config, old: Old | None) -> AsyncIterator[trio.SocketListener | None]:
    """Open before anything else: that its address is taken is to be known while nothing has been changed."""
    if config.admin.metrics is None:
        yield None
    else:
        from tproxyd.daemon.metrics import open_metrics_listener  # late: who has no metrics need not load it

        inherited = old.metrics_at(config.admin.metrics) if old is not None else None
        async with open_metrics_listener(config.admin.metrics, inherited) as listener:
            yield listener


async def _serve_metrics(listener: trio.SocketListener, service: Service, scope: trio.CancelScope) -> None:
    from tproxyd.daemon.metrics import serve_metrics

    with scope:
        await serve_metrics(
            listener,
            service.interceptor.counters,
            dropped=lambda: service.dropped,
            repairs=lambda: service.interceptor.repairs,
            unready=lambda: service.unready,
            version=__version__,
        )


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
