"""Accepts connections of one listener and starts a task for each, as many as there are files for."""

from __future__ import annotations

import errno
import os
import socket

import trio

from tproxyd.proxy.connection import serve_connection
from tproxyd.proxy.service import Service

__all__ = ["serve_listener"]

_OF_THE_CONNECTION = {
    # Linux hands errors of a connection that died in the queue to accept(); the next one may be fine.
    errno.ECONNABORTED,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENONET,
    errno.ENOPROTOOPT,
    errno.EOPNOTSUPP,
    errno.EPERM,  # a firewall's
    errno.EPROTO,
}
_PAUSE = 0.1  # seconds; the queue waits, connections that end give files and memory back


async def serve_listener(service: Service, listener: socket.socket, nursery: trio.Nursery) -> None:
    """Accepts until cancelled; each connection becomes a task of `nursery`. Does not close the listener."""
    while True:
        if service.active >= service.limit:
            full = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            service.complain(
                full, "%d connections are all there are files for; raise LimitNOFILE (ulimit -n)", service.limit
            )
            await service.wait_room()
        try:
            accepted, _ = listener.accept()
        except BlockingIOError:
            await trio.lowlevel.wait_readable(listener)
            continue
        except OSError as error:
            if error.errno not in _OF_THE_CONNECTION:
                service.complain(error, "cannot accept connections, and will try again")
                await trio.sleep(_PAUSE)
            await trio.lowlevel.checkpoint()
            continue
        accepted.setblocking(False)
        service.enter()
        nursery.start_soon(serve_connection, service, accepted)
        await trio.lowlevel.checkpoint()
