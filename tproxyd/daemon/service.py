"""A daemon that serves: what signals, orders and the administrator's requests may ask of it. Knows the interception and what is in its way; refuses to
know who asks, and over which channel.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import trio

from tproxyd.config import Config
from tproxyd.daemon.logs import LineWriter
from tproxyd.daemon.obstacles import Obstacles
from tproxyd.daemon.status import Serving, make_serving
from tproxyd.interceptor import Interceptor
from tproxyd.kernel import Change

__all__ = ["Service", "Stop"]

_log = logging.getLogger(__name__)

_LAST_WORDS = 0.5  # seconds for those who wait for the end of the drain to be told


class Stop:
    """What the signals ask for: the first one to drain, the second one to end now."""

    def __init__(self) -> None:
        self.drain = trio.Event()
        self.now = trio.Event()

    def ask(self) -> None:
        """To drain, and asked again, to end now."""
        (self.now if self.drain.is_set() else self.drain).set()


class Service:
    """Made when `interceptor` is ready; whoever makes it runs `obstacles.watch` beside it. `access_log`: None where there is none; `admin_socket` is the
    path at which the administrator asks."""

    def __init__(
        self,
        config: Config,
        interceptor: Interceptor,
        stop: Stop,
        access_log: LineWriter | None,
        *,
        admin_socket: str | None = None,
    ) -> None:
        self.config = config
        self.interceptor = interceptor
        self.obstacles = Obstacles(config, interceptor)
        self._stop = stop
        self._access_log = access_log
        self.last_reload_ok = True
        """Whether the configuration that was read last is the one that is served."""
        self._admin_socket = admin_socket
        self._drained = trio.Event()
        self._to_tell = 0  # who waits for that, and has not passed it on yet
        self._told = trio.Event()
        self._began = time.monotonic()

    @property
    def trouble(self) -> str:
        """Why it is not as it should be; empty if it is."""
        return self.interceptor.trouble or self.obstacles.trouble

    @property
    def unready(self) -> str:
        """Why no new connection should be sent here; empty if that is fine."""
        return "stopping" if self._stop.drain.is_set() else self.trouble

    @property
    def dropped(self) -> int:
        """Lines of the access log that were not written."""
        return self.interceptor.records_dropped + (self._access_log.dropped if self._access_log is not None else 0)

    async def status(self) -> Serving:
        """How things stand."""
        return await make_serving(self.interceptor, self.trouble, began=self._began, admin_socket=self._admin_socket)

    async def revert(self) -> list[Change]:
        """Takes all kernel state away, for good; what was removed. Raises TproxydError."""
        removed = await self.interceptor.revert()
        _log.warning(
            "`tproxyd revert` has removed all kernel state: nothing is captured from now on; restart or stop this daemon"
        )
        return removed

    def ask_to_drain(self) -> None:
        """As SIGTERM does; asked again, it changes nothing."""
        self._stop.drain.set()

    async def drained(self) -> Callable[[], None]:
        """Returns when the drain has ended; what it gives is to be called when that has been passed on, for which there is a moment."""
        self._to_tell += 1
        try:
            await self._drained.wait()
        except BaseException:
            self._pass_on()
            raise
        return self._pass_on

    def _pass_on(self) -> None:
        self._to_tell -= 1
        self._told.set()

    async def drain(self) -> None:
        """Takes no new connection, and returns when the last one has ended, `drain.timeout` has passed, or `stop.now` is asked for."""
        seconds = self.config.drain.timeout
        _log.info("stopping: up to %g s for connections to end; there are %d", seconds, self.interceptor.connections)
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:

                async def now() -> None:
                    await self._stop.now.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(now)
                await self.interceptor.drain()
                nursery.cancel_scope.cancel()
        if self.interceptor.connections:
            _log.warning("connections that have not ended and are reset: %d", self.interceptor.connections)
        self._drained.set()
        with trio.move_on_after(_LAST_WORDS):
            while self._to_tell:
                self._told = trio.Event()
                await self._told.wait()
