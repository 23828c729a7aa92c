"""One connection's whole life, top to bottom: `serve_connection`.

A connection that breaks is not an error: every way in which it can end has an outcome, and only a surprise is logged. The
rule for its last moment: the client never sees an orderly close for something that went wrong. It gets a reset.
"""

from __future__ import annotations

import errno
import itertools
import logging
import secrets
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime

import trio

from tproxyd.config import Config
from tproxyd.datapath import Outcome, Record
from tproxyd.net.locality import Locality
from tproxyd.net.sockets import Address, abort, format_address, open_upstream, original_destination
from tproxyd.proxy.relay import EndedError, relay

__all__ = ["Service", "serve_connection"]

_log = logging.getLogger(__name__)

_CONNECT_OUTCOMES: dict[int, Outcome] = {
    errno.ECONNREFUSED: "upstream_refused",
    errno.ECONNRESET: "upstream_reset",
    errno.ETIMEDOUT: "upstream_timeout",
    errno.ENETUNREACH: "upstream_unreachable",
    errno.EHOSTUNREACH: "upstream_unreachable",
    errno.ENETDOWN: "upstream_unreachable",
    errno.EHOSTDOWN: "upstream_unreachable",
    errno.ENONET: "upstream_unreachable",
    errno.ENOPROTOOPT: "upstream_unreachable",  # ICMP "protocol unreachable"
    errno.EPROTO: "upstream_unreachable",  # ICMPv6 "administratively prohibited" and its like
    errno.EACCES: "upstream_unreachable",  # a `prohibit` route, or ICMPv6 "policy fail"
    errno.EPERM: "upstream_unreachable",  # a firewall's output chain dropped it
    errno.EINVAL: "upstream_unreachable",  # a `blackhole` route
    errno.EADDRINUSE: "no_ports",
    errno.EADDRNOTAVAIL: "no_ports",
}


_SAY_EVERY = 5.0  # seconds


class Service:
    """What all connections of one namespace share. Whoever makes it closes `locality`.

    `listen` are the listeners' own addresses. `on_record` is called once for each connection, at its end, and must not
    block. `active` counts the connections that live; `idle` is set while there is none.
    """

    def __init__(
        self,
        config: Config,
        *,
        listen: tuple[tuple[str, int], ...],
        locality: Locality,
        on_record: Callable[[Record], None],
    ) -> None:
        self.config = config
        self.listen = frozenset(listen)
        self.listen_port = config.listen.port
        self.locality = locality
        self.on_record = on_record
        self.active = 0
        self._idle = trio.Event()
        self._idle.set()
        self._said: dict[object, float] = {}
        # Unique across restarts without a file: random start, then counted.
        self._ids = itertools.count(secrets.randbits(63))

    def next_id(self) -> str:
        """A connection's id, unique: 16 hexadecimal digits."""
        return f"{next(self._ids) & 0xFFFFFFFFFFFFFFFF:016x}"

    def enter(self) -> None:
        """One connection more."""
        if not self.active:
            self._idle = trio.Event()
        self.active += 1

    def leave(self, record: Record) -> None:
        """One connection less, and its record handed over. What `on_record` raises is logged and costs nobody else."""
        self.active -= 1
        if not self.active:
            self._idle.set()
        try:
            self.on_record(record)
        except Exception as error:  # the embedding program's, whatever it is
            self.complain(error, "on_record failed for connection %s", record.id)

    def complain(self, error: Exception, message: str, *args: object) -> None:
        """Logs what must not be passed over, with the error behind it; of errors of one kind one line in five seconds.

        Whatever one client can cause, many clients can cause a thousand times a second. A surprise comes with its traceback.
        """
        kind = (message, type(error), getattr(error, "errno", None))
        now = time.monotonic()
        if now - self._said.get(kind, -_SAY_EVERY) < _SAY_EVERY:
            return
        self._said[kind] = now
        expected = isinstance(error, OSError)
        _log.error(message + ": %s", *args, error, exc_info=None if expected else error)

    async def wait_idle(self) -> None:
        """Returns as soon as no connection lives."""
        while self.active:
            await self._idle.wait()


async def serve_connection(service: Service, accepted: socket.socket) -> None:
    """Serves one accepted socket to its end and closes it. Raises nothing but Cancelled (the outcome is then `drained`)."""
    begin = time.monotonic()
    record = Record(id=service.next_id())
    downstream = trio.socket.from_stdlib_socket(accepted)
    upstream: trio.socket.SocketType | None = None
    orderly = False
    service.enter()
    try:
        destination = original_destination(accepted)
        record.original_destination = format_address(destination)
        client: Address = accepted.getpeername()
        record.source = format_address(client)

        local = service.locality.is_local(destination[0])
        if is_self_call(service, destination, local=local):
            raise EndedError("self_call")

        upstream = await dial(service, client, destination, local=local)
        record.upstream = format_address(upstream.getpeername())
        record.upstream_source = format_address(upstream.getsockname())

        await relay(downstream, upstream, record, service.config.relay)
        record.outcome = "closed"
        orderly = True
    except EndedError as end:
        record.outcome = end.outcome
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.ECONNRESET):
            record.outcome = "client_reset"  # left before it was looked at
        else:
            service.complain(error, "connection %s to %s", record.id, record.original_destination)
    except Exception as error:  # the one place for a surprise: it costs this connection only
        service.complain(error, "connection %s to %s failed; this is a bug", record.id, record.original_destination)
    except BaseException:  # Cancelled; from within the relay's nursery it may come as a group
        record.outcome = "drained"
        raise
    finally:
        for side in (downstream, upstream):
            if side is not None:
                close(side, orderly=orderly)
        record.duration_ms = round((time.monotonic() - begin) * 1000, 3)
        record.ts = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        service.leave(record)


def is_self_call(service: Service, destination: Address, *, local: bool) -> bool:
    """Whether the client asked for the listener itself: relaying that would come back here, again and again.

    Dialled directly, the socket's name is a listener's address. Intercepted on the listener's port at another address of
    this host, nobody but us can be meant.
    """
    return (destination[0], destination[1]) in service.listen or (local and destination[1] == service.listen_port)


async def dial(service: Service, client: Address, destination: Address, *, local: bool) -> trio.socket.SocketType:
    """Connects to the original destination, in `upstream.connect_timeout`. The caller closes the socket.

    Towards another host with the client's own address and port, if `upstream.source` allows it. Towards an address of this
    host as the proxy: with the client's address the 4-tuple would be the one that was just intercepted. Raises EndedError.
    """
    keep = service.config.upstream.source == "auto" and not local
    family = socket.AF_INET6 if len(destination) == 4 else socket.AF_INET
    upstream: trio.socket.SocketType | None = None
    try:
        upstream = trio.socket.from_stdlib_socket(open_upstream(family, source=client if keep else None))
        with trio.fail_after(service.config.upstream.connect_timeout):
            await upstream.connect(destination)
        if upstream.getsockname() == destination:
            # Nobody listens, and the kernel happened to pick the very port: the socket is connected to itself.
            raise ConnectionRefusedError(errno.ECONNREFUSED, "connected to itself")
    except trio.TooSlowError:
        outcome: Outcome = "upstream_timeout"
    except OSError as error:
        if error.errno not in _CONNECT_OUTCOMES:
            service.complain(error, "cannot connect to %s", format_address(destination))
        outcome = _CONNECT_OUTCOMES.get(error.errno or 0, "error")
    except BaseException:
        if upstream is not None:
            upstream.close()
        raise
    else:
        return upstream
    if upstream is not None:
        upstream.close()
    raise EndedError(outcome)


def close(side: trio.socket.SocketType, *, orderly: bool) -> None:
    """Closes one side: with a FIN after an orderly end, else with a reset. Wakes whoever still waits for it."""
    trio.lowlevel.notify_closing(side)
    plain = socket.socket(fileno=side.detach())
    if orderly:
        plain.close()
    else:
        abort(plain)
