"""What a firewall of this host does to captured connections while a daemon serves, for the log and for /readyz. Found as the doctor finds it."""

from __future__ import annotations

import logging
import time

import trio

from tproxyd import kernel
from tproxyd.config import Config
from tproxyd.config.wording import few
from tproxyd.errors import TproxydError
from tproxyd.interceptor import Interceptor
from tproxyd.interceptor.threads import in_thread

__all__ = ["Obstacles"]

_log = logging.getLogger(__name__)

_REST, _SHORTEST_REST = 20, 0.5  # between two looks: so many times the length of the last one, and seconds


class Obstacles:
    """`trouble` says what drops captured connections before they reach the listener; empty if nothing does, or it cannot be seen."""

    def __init__(self, config: Config, interceptor: Interceptor) -> None:
        self.trouble = ""
        self._config = config
        self._interceptor = interceptor

    def use(self, config: Config) -> None:
        """Asks about this one from now on. Where the kernel's rules have changed with it, that is looked at at once (Keeper.change)."""
        self._config = config

    async def watch(self) -> None:
        """Looks now, and whenever somebody else's rules have changed, until cancelled."""
        while True:
            changed = self._interceptor.others
            began = time.monotonic()
            try:
                found = await in_thread(self._look)
            except (TproxydError, OSError) as error:
                _log.debug("cannot look at other programs' rules: %s", error)
                found = self.trouble
            if found and found != self.trouble:
                _log.error("a firewall of this host keeps clients away: %s; `tproxyd doctor` names the remedy", found)
            elif self.trouble and not found:
                _log.info("no firewall of this host keeps clients away any more")
            self.trouble = found
            await trio.sleep(max(_SHORTEST_REST, _REST * (time.monotonic() - began)))
            await changed.wait()

    def _look(self) -> str:
        # Late, and in this thread: a start does not wait for it.
        from tproxyd.daemon.doctor.checks_others import input_drops
        from tproxyd.daemon.doctor.model import Crossing

        seen = Crossing(
            config=self._config,
            marks=self._interceptor.marks,
            families=self._interceptor.families,
            links=kernel.list_links(),
            chains=kernel.list_chains(),
        )
        return few([finding.seen for finding in input_drops(seen) if not finding.warning])
