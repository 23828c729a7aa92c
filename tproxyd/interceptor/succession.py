"""Listeners that one generation of a daemon passes on to the next: whoever waits in their queues is served by the next one.

Private to the daemon, as `heritage`. What is said about the kernel's state is there; this is about sockets.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from typing import NamedTuple

from tproxyd.config import Config
from tproxyd.errors import ConfigError
from tproxyd.interceptor.heritage import Heritage
from tproxyd.interceptor.listeners import Listeners, open_listeners
from tproxyd.net.sockets import spread_by_source

__all__ = ["Predecessor", "distinct", "take_listeners"]

_MOST = 240  # listeners of one loop: with a descriptor of its namespace they come in one message, which takes 253 (SCM_MAX_FD)


class Predecessor(NamedTuple):
    """A generation that lives and serves: what its connections need, and its listeners, which stay the caller's."""

    heritage: Heritage
    listeners: tuple[socket.socket, ...]


def distinct(listeners: Listeners) -> list[socket.socket]:
    """One of each: loops may have copies of the same listener. In the order in which they were opened."""
    found: dict[int, socket.socket] = {}
    for listener in (one for group in listeners for one in group):
        found.setdefault(os.fstat(listener.fileno()).st_ino, listener)
    return list(found.values())


@contextmanager
def take_listeners(
    config: Config, listen: Sequence[tuple[str, int]], loops: int, inherited: Sequence[socket.socket]
) -> Iterator[Listeners]:
    """The predecessor's listeners at these addresses, for each of so many loops; an address that it had none at is opened. Copies are closed at the end of
    the block, the inherited ones stay the caller's.

    Each of them is served by somebody, because clients wait in its queue: with fewer loops than before some serve several, with more of them
    some share one. Then the kernel spreads clients less evenly, until the next start. Raises ConfigError, and KernelError as `open_listeners`.
    """
    with ExitStack() as stack:
        groups: Listeners = [[] for _ in range(loops)]
        for address in listen:
            there = [one for one in inherited if _is_at(one, address)]
            if not there:
                opened = stack.enter_context(open_listeners(config, [address], loops))
                for group, own in zip(groups, opened, strict=True):
                    group += own
                continue
            if config.limits.max_connections_per_source and len(there) != loops:
                raise ConfigError(
                    f"`relay.workers` cannot change at a hand-over where `limits.max_connections_per_source` counts (there are "
                    f"{len(there)} listeners, for {loops} loops): all of one client has to come to one of them; restart the daemon"
                )
            for index in range(max(loops, len(there))):
                copy = stack.enter_context(there[index % len(there)].dup())
                copy.listen(config.listen.backlog)
                groups[index % loops].append(copy)
            if config.limits.max_connections_per_source and loops > 1:
                spread_by_source(there[0], loops)
        if max(map(len, groups)) > _MOST:
            raise ConfigError(
                f"`relay.workers`: {len(inherited)} listeners are too many to be served by {loops} loops; restart the daemon"
            )
        yield groups


def _is_at(listener: socket.socket, address: tuple[str, int]) -> bool:
    host, port = listener.getsockname()[:2]
    return port == address[1] and ip_address(host) == ip_address(address[0])
