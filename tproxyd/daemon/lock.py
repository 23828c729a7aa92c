"""One daemon a network namespace: an abstract Unix socket, whose names the kernel keeps per namespace and frees at death.

Any user may bind such a name. One who does keeps the daemon from starting, as one would who binds the listener's port; that is
refused aloud, with the culprit's pid, because going on without the lock would let a second daemon undo the first one's work.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from tproxyd.errors import KernelError
from tproxyd.net.proc_net import unix_name_holder

__all__ = ["ServedError", "lock_holder", "namespace_lock"]

_NAME = "tproxyd"


class ServedError(KernelError):
    """Another tproxyd serves this network namespace."""


def lock_holder() -> str | None:
    """`name (pid N)` of the process that has the namespace, if any."""
    return unix_name_holder(_NAME)


@contextmanager
def namespace_lock(purpose: str) -> Iterator[None]:
    """Holds the namespace for the length of the block. Raises ServedError that names the process that has it already."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as held:
        try:
            held.bind("\0" + _NAME)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise KernelError(f"cannot take the lock of this network namespace: {error.strerror}") from error
            raise ServedError(
                f"cannot {purpose}: {lock_holder() or 'another process'} serves this network namespace, or is about to "
                f"(it holds the abstract socket @{_NAME}); stop it first"
            ) from error
        yield
