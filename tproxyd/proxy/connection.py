"""One connection's whole life, top to bottom: `serve_connection`.

A connection that breaks is not an error: every way in which it can end has an outcome, and only a surprise is logged. The
rule for its last moment: the client never sees an orderly close for something that went wrong. It gets a reset.
"""

from __future__ import annotations

import errno
import socket
import time
from datetime import UTC, datetime

from tproxyd.datapath import EndedError, Record
from tproxyd.net.sockets import Address, abort, format_address, original_destination
from tproxyd.proxy.relay import relay
from tproxyd.proxy.service import Service
from tproxyd.proxy.upstream import dial

__all__ = ["serve_connection"]


async def serve_connection(service: Service, downstream: socket.socket) -> None:
    """Serves one accepted, non-blocking socket, which the service has counted already, to its end and closes it.

    Raises nothing but Cancelled (the outcome is then `drained`).
    """
    begin = time.monotonic()
    record = Record(id=service.next_id())
    upstream: socket.socket | None = None
    orderly = False
    try:
        destination = original_destination(downstream)
        record.original_destination = format_address(destination)
        client: Address = downstream.getpeername()
        record.source = format_address(client)

        local = service.locality.is_local(destination[0])
        if is_self_call(service, client, destination, local=local):
            raise EndedError("self_call")
        if service.is_refused(destination[0]):
            raise EndedError("refused_by_policy")

        upstream = await dial(service, client, destination, local=local)
        record.upstream = format_address(destination)
        record.upstream_source = format_address(upstream.getsockname())

        await relay(downstream, upstream, record, service.config.relay, service.watch)
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
                if orderly:
                    side.close()
                else:
                    abort(side)
        record.duration_ms = round((time.monotonic() - begin) * 1000, 3)
        record.ts = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        service.leave(record)


def is_self_call(service: Service, client: Address, destination: Address, *, local: bool) -> bool:
    """Whether the client asked for the listener, or is this host: relaying that would come back here, again and again.

    Dialled directly, the socket's name is a listener's address. Intercepted on the listener's port at another address of this
    host, nobody but us can be meant. And what this host itself sends is never captured, so a client with an address of this
    host is a connection of ours that a router has sent back.
    """
    return (
        (destination[0], destination[1]) in service.listen
        or (local and destination[1] == service.listen_port)
        or service.locality.is_local(client[0])
    )
