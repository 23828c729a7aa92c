"""`tproxyd run`: start, say ready, serve, drain, stop. Everything that belongs to the process and not to the interception."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import AsyncIterator

import trio

from tproxyd.config import Config
from tproxyd.daemon.lock import namespace_lock
from tproxyd.daemon.logs import AccessLog, set_up_logging
from tproxyd.datapath import Record
from tproxyd.errors import TproxydError
from tproxyd.interceptor import Interceptor, open_interceptor
from tproxyd.net.sockets import format_address

__all__ = ["run"]

_log = logging.getLogger(__name__)

_STOP = (signal.SIGTERM, signal.SIGINT)


def run(config: Config) -> int:
    """Serves until SIGTERM or SIGINT and drains; a second one ends it at once. 0 after a clean stop. Raises TproxydError."""
    set_up_logging(config)
    access_log = AccessLog(config, fd=sys.stdout.fileno()) if config.log.access else None
    try:
        with namespace_lock("start"):
            trio.run(_serve, config, access_log)
    except BaseExceptionGroup as group:
        error = _only(group)
        if error is None:
            raise
        raise error from group
    finally:
        if access_log is not None:
            access_log.close()
            if access_log.dropped:
                _log.warning("%d lines of the access log were dropped, because nobody read stdout", access_log.dropped)
    return os.EX_OK


async def _serve(config: Config, access_log: AccessLog | None) -> None:
    on_record = access_log.write if access_log is not None else _forget
    stop = _Stop()
    with trio.open_signal_receiver(*_STOP, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_listen_to_signals, signals, stop)
            # A signal that comes while this starts is answered as soon as it has: that takes a fraction of a second.
            async with open_interceptor(config, on_record=on_record) as interceptor:
                _say_ready(interceptor)
                await stop.drain.wait()
                await _drain(config, interceptor, stop)
            nursery.cancel_scope.cancel()


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
    _log.info("stopping: %d connections have up to %g s to end", interceptor.connections, config.drain.timeout)
    with trio.move_on_after(config.drain.timeout):
        async with trio.open_nursery() as nursery:

            async def now() -> None:
                await stop.now.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(now)
            await interceptor.drain()
            nursery.cancel_scope.cancel()
    if interceptor.connections:
        _log.warning("%d connections are reset: they did not end in time", interceptor.connections)


def _say_ready(interceptor: Interceptor) -> None:
    listen = ",".join(format_address(address) for address in interceptor.listen)
    # At any log level, on one line, and whole: others wait for it.
    os.write(sys.stderr.fileno(), f"tproxyd: ready pid={os.getpid()} listen={listen}\n".encode())


def _only(group: BaseExceptionGroup[BaseException]) -> TproxydError | None:
    """The one error of ours in a group of trio's, if there is nothing else in it."""
    errors = group.exceptions
    if len(errors) != 1:
        return None
    if isinstance(errors[0], BaseExceptionGroup):
        return _only(errors[0])
    return errors[0] if isinstance(errors[0], TproxydError) else None


def _forget(record: Record) -> None:
    """With `log.access = false` nobody wants the record."""
