"""Accepts connections of one listener and starts a task for each. Survives running out of files."""

from __future__ import annotations

import errno
import logging
import socket

import trio

from tproxyd.proxy.connection import Service, serve_connection

__all__ = ["serve_listener"]

_log = logging.getLogger(__name__)

_OUT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PAUSE = 0.1  # seconds; the queue waits, connections that end give files back
_SAY_EVERY = 5.0  # seconds between two log lines about it


async def serve_listener(service: Service, listener: socket.socket, nursery: trio.Nursery) -> None:
    """Accepts until cancelled; each connection becomes a task of `nursery`. Does not close the listener."""
    said = -_SAY_EVERY
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
            if trio.current_time() - said >= _SAY_EVERY:
                said = trio.current_time()
                _log.error(
                    "cannot accept connections: %s; raise the limit of open files (ulimit -n, LimitNOFILE)", error
                )
            await trio.sleep(_PAUSE)
            continue
        accepted.setblocking(False)
        nursery.start_soon(serve_connection, service, accepted)
        await trio.lowlevel.checkpoint()
