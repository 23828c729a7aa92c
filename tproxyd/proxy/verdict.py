"""What an embedding program's policy is asked, and what it may answer."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable

import msgspec

from tproxyd.proxy.stream import ConnectionStream

__all__ = ["Connection", "Forward", "HandOff", "Handle", "Policy", "Refuse"]

_PATH_BYTES = 107  # struct sockaddr_un (linux/un.h), less the NUL at its end


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


class HandOff(msgspec.Struct, frozen=True):
    """Give the accepted socket itself to the process that listens at the Unix socket `path` (proxy/handoff.py has the format); from then on it is
    that one's. If nobody listens there, or who does takes nothing for `policy_timeout` seconds, it becomes of it what `otherwise` says.

    Only root and this process's own user may listen there, and `uid` if that is given. ValueError if the path is none.
    """

    path: str
    otherwise: Forward | Refuse = Refuse()
    uid: int | None = None

    def __post_init__(self) -> None:
        if not self.path.startswith("/") or "\0" in self.path or len(os.fsencode(self.path)) > _PATH_BYTES:
            raise ValueError(
                f"{self.path!r} is no Unix socket's path: give an absolute one of at most {_PATH_BYTES} bytes"
            )


Policy = Callable[[Connection], Awaitable[Forward | Refuse | Handle | HandOff]]
"""Asked once for each connection that the configuration does not refuse."""
