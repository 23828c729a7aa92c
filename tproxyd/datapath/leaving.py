"""Connections that a change of the configuration has left outside: they have some time to end, and are then reset.

Knows a connection by the addresses that were really dialled, as the ruleset did when it was captured; refuses to know by which interface it
came, which nothing tells afterwards: it stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tproxyd.config import Network
from tproxyd.datapath.opening import compile_networks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tproxyd.config import Capture
    from tproxyd.datapath.connection import Connection

__all__ = ["Leaving", "compile_capture"]

Captures = Callable[[str, tuple[str, int]], bool]


def compile_capture(capture: Capture, is_local: Callable[[str], bool]) -> Captures:
    """One function that tells whether a connection from this address to that one would be captured, for all that its addresses tell."""

    def matches(listed: Sequence[Network | str]) -> Callable[[str], bool]:
        contains = compile_networks([one for one in listed if not isinstance(one, str)])
        local = "local" in listed
        return lambda host: contains(host) or (local and is_local(host))

    sources, excluded_sources = matches(capture.sources), matches(capture.exclude_sources)
    destinations, excluded = matches(capture.destinations), matches(capture.exclude_destinations)
    ports = capture.taken_ports

    def captures(source: str, destination: tuple[str, int]) -> bool:
        host, port = destination
        return (
            any(first <= port <= last for first, last in ports)
            and (not capture.sources or sources(source))
            and not excluded_sources(source)
            and (not capture.destinations or destinations(host))
            and not excluded(host)
        )

    return captures


class Leaving:
    """Those of one loop. `due` is when to call `expire`; infinite where there is none."""

    def __init__(self) -> None:
        self._deadlines: dict[Connection, float] = {}
        self.due = math.inf

    def judge(self, connections: Iterable[Connection], captures: Captures, deadline: float) -> None:
        """Gives those that would not be captured until the deadline; who has one already keeps it, and who would be captured again has none."""
        for connection in connections:
            if captures(connection.peer_host(), connection.dialled[:2]):
                self._deadlines.pop(connection, None)
            else:
                self._deadlines.setdefault(connection, deadline)
        self.due = min(self._deadlines.values(), default=math.inf)

    def expire(self, now: float) -> list[Connection]:
        """Those whose time is up. Some may have ended meanwhile."""
        expired = [connection for connection, deadline in self._deadlines.items() if deadline <= now]
        for connection in expired:
            del self._deadlines[connection]
        self.due = min(self._deadlines.values(), default=math.inf)
        return expired
