"""Who is at the other end of a Unix socket, as the kernel tells: it takes that down when a process connects, or begins to listen.

Numbers are those of the reader's own user namespace. Whoever has none there is shown as the overflow uid and gid, which may be anybody: as a number of
somebody's they count for nothing.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from pathlib import Path
from typing import NamedTuple, Protocol

__all__ = ["Peer", "peer_of"]

_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_SO_PEERGROUPS = 59  # asm-generic/socket.h, Linux 4.13
_MOST_GROUPS = 65536  # NGROUPS_MAX

_libc = ctypes.CDLL(None, use_errno=True)


class Peer(NamedTuple):
    """Pid 0: of a process that cannot be seen from here. `uid` is None if it has none here; `gids` are its own and its supplementary groups."""

    pid: int
    uid: int | None
    gids: frozenset[int]


class _HasOptions(Protocol):
    def fileno(self) -> int: ...
    def getsockopt(self, level: int, option: int, size: int, /) -> bytes: ...


def peer_of(sock: _HasOptions) -> Peer:
    """Of a connected Unix socket. Raises OSError."""
    pid, uid, gid = _CREDENTIALS.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)  # never more
    )
    nobody, no_group = _overflow("uid"), _overflow("gid")
    return Peer(pid, uid if uid != nobody else None, frozenset({gid, *_groups(sock)}) - {no_group})


def _groups(sock: _HasOptions) -> list[int]:
    # By ctypes: Python asks for 1024 bytes at most, and so many groups are only a quarter of what directory services hand out.
    groups = (ctypes.c_uint32 * _MOST_GROUPS)()
    size = ctypes.c_uint32(ctypes.sizeof(groups))
    if _libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, groups, ctypes.byref(size)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return list(groups[: size.value // 4])


def _overflow(kind: str) -> int:
    return int(Path(f"/proc/sys/kernel/overflow{kind}").read_text(encoding="ascii"))
