"""Accepts connections of one listener and starts a task for each. Survives running out of files."""

from __future__ import annotations

import errno
import socket

import trio

from tproxyd.proxy.connection import Service, serve_connection

__all__ = ["serve_listener"]

_OUT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PAUSE = 0.1  # seconds; the queue waits, connections that end give files back


async def serve_listener(service: Service, listener: socket.socket, nursery: trio.Nursery) -> None:
    """Accepts until cancelled; each connection becomes a task of `nursery`. Does not close the listener."""
    while True:
        try:
            accepted, _ = listener.accept()
        except BlockingIOError:
            await trio.lowlevel.wait_readable(listener)
            continue
        except OSError as error:
            if error.errno not in _OUT_OF:
                # Linux hands errors of a connection that died in the queue to accept(); the next one may be fine.
                await trio.lowlevel.checkpoint()
                continue
            service.complain(error, "cannot accept connections; raise the limit of open files (ulimit -n, LimitNOFILE)")
            await trio.sleep(_PAUSE)
            continue
        accepted.setblocking(False)
        nursery.start_soon(serve_connection, service, accepted)
        await trio.lowlevel.checkpoint()
