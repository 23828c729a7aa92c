"""Who listens on a TCP port here? Read from /proc, for a message that names the culprit; never for a decision."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

__all__ = ["port_holder"]

_TCP_LISTEN = "0A"  # st in /proc/net/tcp (include/net/tcp_states.h)


def port_holder(port: int, *, family: int) -> str | None:
    """`name (pid N)` of a process that listens on this port, on whichever address; None if it cannot be told."""
    inodes = {f"socket:[{inode}]" for inode in _listening(port, family)}
    for directory in Path("/proc").iterdir() if inodes else ():
        if not directory.name.isdecimal():
            continue
        try:
            if any(os.readlink(fd) in inodes for fd in (directory / "fd").iterdir()):
                name = (directory / "comm").read_text(encoding="utf-8", errors="replace").strip()
                return f"{name if name.isprintable() else '?'} (pid {directory.name})"
        except OSError:
            continue  # it has ended meanwhile, or belongs to somebody whose files are not ours to see
    return None


def _listening(port: int, family: int) -> Iterator[str]:
    table = Path("/proc/thread-self/net/tcp6" if family == socket.AF_INET6 else "/proc/thread-self/net/tcp")
    for line in table.read_text(encoding="ascii").splitlines()[1:]:
        fields = line.split()
        if fields[3] == _TCP_LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
            yield fields[9]
