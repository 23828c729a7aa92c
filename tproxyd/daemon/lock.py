"""One daemon a network namespace: an abstract Unix socket, which the kernel keeps per namespace and frees at death."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from tproxyd.errors import KernelError

__all__ = ["ServedError", "namespace_lock"]

_NAME = "\0tproxyd"


class ServedError(KernelError):
    """Another tproxyd serves this network namespace."""


@contextmanager
def namespace_lock(purpose: str) -> Iterator[None]:
    """Holds the namespace for the length of the block. Raises ServedError that names the daemon that has it already.

    Anybody may bind an abstract name. A holder who is neither root nor our own user cannot be a daemon that captures
    here, so it is not allowed to keep one away.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as held:
        try:
            held.bind(_NAME)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise KernelError(f"cannot take the lock of this network namespace: {error.strerror}") from error
            holder = _holder()
            if holder is None or holder[1] in (0, os.geteuid()):
                pid = "unknown" if holder is None else str(holder[0])
                raise ServedError(
                    f"cannot {purpose}: another tproxyd (pid {pid}) serves this network namespace; stop it first"
                ) from error
        else:
            held.listen(1)  # so that its pid can be asked for
        yield


def _holder() -> tuple[int, int] | None:
    """(pid, uid) of who listens on the lock's name, or None if it has just gone or does not listen."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as caller:
        try:
            caller.connect(_NAME)
            pid, uid, _ = struct.unpack("3i", caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        except OSError:
            return None
    return pid, uid
