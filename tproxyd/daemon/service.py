"""A daemon that serves: what signals, orders and the administrator's requests may ask of it. Knows the interception and what is in its way; refuses to
know who asks, and over which channel.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import trio

from tproxyd.config import Config
from tproxyd.config.wording import few
from tproxyd.daemon.logs import AccessLog, set_log_level
from tproxyd.daemon.obstacles import Obstacles
from tproxyd.daemon.reload import Reloads
from tproxyd.daemon.status import Serving, make_serving
from tproxyd.errors import ConfigError, KernelError, TproxydError
from tproxyd.interceptor import Interceptor
from tproxyd.interceptor.privileges import require_needs
from tproxyd.interceptor.threads import in_thread
from tproxyd.kernel import Change

__all__ = ["Service", "Stop"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

_LAST_WORDS = 0.5  # seconds for those who wait for the end of the drain to be told


_LAST = 2.0  # seconds, at a restart, for connections that have come during the drain; meanwhile new clients wait


class Stop:
    """What the signals ask for: the first one to drain, the second one to end now. `restarts`: there will be a successor."""

    def __init__(self) -> None:
        self.drain = trio.Event()
        self.now = trio.Event()
        self.restarts = False

    def ask(self, *, restart: bool = False) -> None:
        """To drain, and asked again, to end now."""
        if self.drain.is_set():
            self.now.set()
        else:
            self.restarts = restart
            self.drain.set()


class Service:
    """Made when `interceptor` is ready; whoever makes it runs `obstacles.watch` and `serve_reloads` beside it.

    `admin_socket` is the path at which the administrator asks. `load` reads the configuration again; None where it came from the command line alone.
    `reloads` may have been asked for before this was made. `on_reload` is called with True before a reload is made, and with False after it: for who has to
    tell of it. It must not block.
    """

    def __init__(
        self,
        config: Config,
        interceptor: Interceptor,
        stop: Stop,
        access_log: AccessLog,
        *,
        admin_socket: str | None = None,
        load: Callable[[], Config] | None = None,
        reloads: Reloads | None = None,
        on_reload: Callable[[bool], None] = lambda begins: None,
    ) -> None:
        self.config = config
        self.interceptor = interceptor
        self.last_reload_ok = True
        """Whether the configuration that was read last is the one that is served."""
        self.last_reload_error = ""
        self._load = load
        self._reloads = reloads or Reloads()
        self._on_reload = on_reload
        self._changes = trio.Lock()
        self.obstacles = Obstacles(config, interceptor)
        self._stop = stop
        self._access_log = access_log
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
        return self.interceptor.records_dropped + self._access_log.dropped

    @property
    def line(self) -> str:
        """How things stand, in one line."""
        capture = self.config.capture
        ports = few([str(port) for port in capture.ports], ", ")
        what = f"captures TCP {ports}" if self.interceptor.capturing else "captures nothing"
        if self._stop.drain.is_set():
            what = "restarting" if self._stop.restarts else "stopping"
        workloads = len(self.interceptor.workloads)
        return "; ".join(
            [
                what,
                f"{self.interceptor.connections} connections",
                *([f"{workloads} workloads"] if workloads else []),
                *([f"trouble: {self.trouble}"] if self.trouble else []),
                *([f"not reloaded: {self.last_reload_error}"] if self.last_reload_error else []),
            ]
        )

    async def status(self) -> Serving:
        """How things stand."""
        return await make_serving(
            self.interceptor,
            self.trouble,
            began=self._began,
            admin_socket=self._admin_socket,
            last_reload_error=self.last_reload_error,
        )

    async def reload(self) -> str:
        """Reads the configuration again, and makes this daemon and the kernel hold it: what was changed, a line each. Raises TproxydError, with the old one
        in force. One is made at a time; cancelled, it goes on, and nobody waits for it."""
        return await self._reloads.ask().wait()

    async def serve_reloads(self) -> None:
        """Makes those that are asked for, until cancelled."""
        await self._reloads.serve(self._reload_once)

    async def _reload_once(self) -> str:
        if self._load is None:
            _log.info("nothing to reload: there is no file to read, as this daemon was started with --port alone")
            return "nothing changed: this daemon was started with --port alone, and there is no file to read"
        self._on_reload(True)
        try:
            changes = await self.change(partial(self._change, self._load))
        except TproxydError as error:
            self.last_reload_ok, self.last_reload_error = False, "; ".join(_sentences(error))
            _log.error("not reloaded, the old configuration stays in force: %s", self.last_reload_error)
            raise
        else:
            self.last_reload_ok, self.last_reload_error = True, ""
        finally:
            self._on_reload(False)
        _log.info("reloaded: %s", "; ".join(changes) or "nothing changed")
        return "\n".join(changes) or "nothing changed"

    async def change(self, step: Callable[[], Awaitable[T]]) -> T:
        """Takes a step for which what is served must stay as it is: a reload, or a hand-over. One at a time."""
        async with self._changes:
            return await step()

    async def _change(self, load: Callable[[], Config]) -> list[str]:
        try:
            if self._stop.drain.is_set():
                raise KernelError("the daemon is stopping, and reloads nothing any more; start it again")
            config = await in_thread(load)
            require_needs(config, given_up=True)
            changes = await self.interceptor.reload(config)
            self._access_log.set_up(config)
        except (TproxydError, trio.Cancelled):
            raise
        except Exception as error:  # whatever it is, it ends neither the daemon nor the next reload
            _log.exception("a reload failed; this is a bug")
            raise KernelError(f"this is a bug, please report it: {type(error).__name__}: {error}") from error
        self.config = config
        set_log_level(config)
        self.obstacles.use(config)
        return changes

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
        await self._wait(seconds, self.interceptor.drain)
        await self._tell_rest()

    async def hand_on(self, outlive: Callable[[], Awaitable[None]]) -> None:
        """The same for a restart: takes new connections until those that live now have ended, or `drain.timeout` has passed, and `outlive` has returned, which
        waits as long at most, for what else lives. Then new clients wait in the queue, and those that have come meanwhile have two seconds to end: as a
        rule milliseconds."""
        seconds = self.config.drain.timeout
        _log.info("restarting: up to %g s for connections to end; there are %d", seconds, self.interceptor.connections)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outlive)
            await self._wait(seconds, self.interceptor.wait_old)
        await self._wait(min(seconds, _LAST), self.interceptor.pause)
        await self._tell_rest()

    async def _wait(self, seconds: float, step: Callable[[], Awaitable[None]]) -> None:
        """For the end of a step, for so many seconds, but not if it is to be now."""
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:

                async def now() -> None:
                    await self._stop.now.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(now)
                await self._reloads.until_idle()  # it takes a moment, and begins with what this ends
                await step()
                nursery.cancel_scope.cancel()

    async def _tell_rest(self) -> None:
        if self.interceptor.connections:
            _log.warning("connections that have not ended and are reset: %d", self.interceptor.connections)
        self._drained.set()
        with trio.move_on_after(_LAST_WORDS):
            while self._to_tell:
                self._told = trio.Event()
                await self._told.wait()


def _sentences(error: TproxydError) -> tuple[str, ...]:
    return error.problems if isinstance(error, ConfigError) else (str(error),)
