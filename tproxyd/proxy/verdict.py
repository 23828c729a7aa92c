"""What an embedding program's policy is asked, and what it may answer."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable

import msgspec

from tproxyd.proxy.stream import ConnectionStream

__all__ = ["Connection", "Forward", "Handle", "Policy", "Refuse"]


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """A connection that has been accepted and not been decided about.

    `source`, `original_destination` and `target`, where the configuration would forward it to, are (address, port); a `target` that is a
    text is the path of a Unix socket. `id` is that of
    the access log, and `rule` the name of the configured rule that let it through, if one did.
    """

    id: str
    source: tuple[str, int]
    original_destination: tuple[str, int]
    target: tuple[str, int] | str
    workload: str = "host"
    rule: str | None = None


class Forward(msgspec.Struct, frozen=True):
    """Relay it, to `target` (address, port) if that is given, else to where the configuration says: a rule's target, or the original
    destination. ValueError if the target is none: an IP address in text, and a port from 1 to 65535."""

    target: tuple[str, int] | None = None

    def __post_init__(self) -> None:
        match self.target:
            case None:
                return
            case (str() as host, int() as port) if 1 <= port <= 65535:
                try:
                    socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
                except OSError:
                    pass
                else:
                    return
        raise ValueError(f"{self.target!r} is no target: give an IP address in text and a port from 1 to 65535")


class Refuse(msgspec.Struct, frozen=True):
    """Reset it."""


class Handle(msgspec.Struct, frozen=True):
    """Give it to `handler`, which gets a ConnectionStream and may take its time; when it returns, the stream is closed."""

    handler: Callable[[ConnectionStream], Awaitable[None]]


Policy = Callable[[Connection], Awaitable[Forward | Refuse | Handle]]
"""Asked once for each connection that the configuration does not refuse."""
