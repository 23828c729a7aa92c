"""What /proc tells of this namespace's sockets: who holds a port, where a program listens, and which connections the kernel still
works on.

The first is for messages that name a culprit, never for decisions.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

__all__ = [
    "Connections",
    "closing_connections",
    "half_open_connections",
    "is_listening",
    "netlink_port",
    "open_file_count",
    "port_holder",
    "root_ports",
]

# Column st of /proc/net/tcp (include/net/tcp_states.h).
_SYN_RECV = frozenset({"03"})
_UNDELIVERED = frozenset(
    {"04", "09", "0B"}
)  # FIN_WAIT1, LAST_ACK, CLOSING: the peer has not confirmed the last bytes, or the FIN
_LISTEN = "0A"

Connections = dict[tuple[str, str], str]
"""Local and remote end as /proc writes them, which together name a connection, and its queues, which change when it moves on."""


def port_holder(port: int, *, family: int) -> str | None:
    """`name (pid N)` of a process that listens on this TCP port, on whichever address; None if it cannot be told."""
    rows = _rows("tcp6" if family == socket.AF_INET6 else "tcp")
    return _process_with(row[9] for row in rows if row[3] == _LISTEN and _port(row[1]) == port)


def is_listening(address: str, port: int) -> bool:
    """Whether a TCP socket listens on this address and port, or on every address of its family or of both."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    words = struct.iter_unpack("=I", socket.inet_pton(family, address))
    exact = "".join(f"{word:08X}" for (word,) in words)  # the kernel prints each word in its own byte order
    ends = {f"{host}:{port:04X}" for host in (exact, "0" * len(exact), "0" * 32)}
    tables = ("tcp6",) if family == socket.AF_INET6 else ("tcp", "tcp6")
    return any(row[3] == _LISTEN and row[1] in ends for table in tables for row in _rows(table))


def netlink_port(port: int) -> tuple[int, int] | None:
    """Groups and inode of the rtnetlink socket that has this port; None if none has.

    Unlike /proc/net/unix, whose names are any bytes, this table has nothing but the kernel's numbers: it can be believed.
    """
    found = ((int(row[3], 16), int(row[9])) for row in _rows("netlink") if row[1:3] == ["0", str(port)])
    return next(found, None)


def root_ports(programs: Collection[str] | None = None) -> set[int]:
    """TCP ports at which a socket of uid 0 listens on an address other than loopback; of these programs alone if they are given, which
    run as uid 0 themselves, as far as their files can be seen. Uids are those of our own user namespace.

    Anybody may call a process as he likes, and who has been handed a socket of root's may be anybody.
    """
    ports = {
        row[9]: _port(row[1])
        for table in ("tcp", "tcp6")
        for row in _rows(table)
        if row[3] == _LISTEN and row[7] == "0" and not _is_loopback(row[1])
    }
    if programs is None:
        return set(ports.values())
    found = set()
    for directory in _processes() if ports else ():
        try:
            name = (directory / "comm").read_text(encoding="utf-8", errors="replace").rstrip("\n")
            if name in programs and _is_root(directory):
                links = [os.readlink(fd) for fd in (directory / "fd").iterdir()]
                found |= {ports[inode] for inode in (link[8:-1] for link in links) if inode in ports}
        except OSError:
            continue  # it has ended meanwhile, or its files are not ours to see
    return found


def half_open_connections(captured: Callable[[int], bool]) -> Connections:
    """Connections to a captured port whose handshake is under way: no listener has them yet."""
    return _connections(_SYN_RECV, captured)


def closing_connections(captured: Callable[[int], bool]) -> Connections:
    """Connections with a captured port on one side that no process has any more, while the kernel still delivers their last bytes."""
    return _connections(_UNDELIVERED, captured)


def open_file_count() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd"))


def _connections(states: frozenset[str], captured: Callable[[int], bool]) -> Connections:
    return {
        (row[1], row[2]): row[4]
        for table in ("tcp", "tcp6")
        for row in _rows(table)
        # Inode 0: it belongs to no process.
        if row[3] in states and row[9] == "0" and (captured(_port(row[1])) or captured(_port(row[2])))
    }


def _port(end: str) -> int:
    return int(end.rpartition(":")[2], 16)


def _is_loopback(end: str) -> bool:
    words = end.rpartition(":")[0]
    address = b"".join(int(words[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(words), 8))
    return address[0] == 127 if len(address) == 4 else address == socket.inet_pton(socket.AF_INET6, "::1")


def _rows(table: str) -> list[list[str]]:
    # Of the calling thread's namespace. Names of other sockets may hold any bytes. No IPv6, no table.
    try:
        text = Path(f"/proc/thread-self/net/{table}").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [line.split() for line in text.splitlines()[1:]]


def _processes() -> Iterator[Path]:
    return (directory for directory in Path("/proc").iterdir() if directory.name.isdecimal())


def _is_root(directory: Path) -> bool:
    """Whether a process runs as uid 0. Not to be seen by who owns its directory: that is root's where a process may not be dumped."""
    status = (directory / "status").read_text(encoding="utf-8", errors="replace")
    return re.search(r"^Uid:\t0\t0\t", status, re.M) is not None


def _process_with(inodes: Iterable[str]) -> str | None:
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for directory in _processes() if wanted else ():
        try:
            if any(os.readlink(fd) in wanted for fd in (directory / "fd").iterdir()):
                name = (directory / "comm").read_text(encoding="utf-8", errors="replace").strip()
                return f"{name if name.isprintable() else 'a process'} (pid {directory.name})"
        except OSError:
            continue  # it has ended meanwhile, or its files are not ours to see
    return None
