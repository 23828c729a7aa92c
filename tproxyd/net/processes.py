"""What /proc tells of processes: their names, who holds which socket, their capabilities and limits; numbers of files. Standard library only.

Everything is a look at one moment: a process that has ended meanwhile, or that is not ours to see, is left out.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from tproxyd.net.capabilities import CAPABILITIES

__all__ = ["Process", "move_up", "processes_here", "read_process", "socket_holders"]

_PROC = Path("/proc")
_FD_SETSIZE = 1024  # sys/select.h


class Process(NamedTuple):
    """One process. `command` is its program and its arguments. `capabilities` has the names of CAPABILITIES that it has in effect; `stopped`: it does not run (SIGSTOP).

    `files` is how many are open, `most_files` the soft limit; None if that is not ours to see.
    """

    pid: int
    name: str
    command: tuple[str, ...]
    uid: int
    stopped: bool
    capabilities: frozenset[str]
    files: int | None
    most_files: int | None


def read_process(pid: int) -> Process | None:
    """What there is to know of a process, or None if there is none."""
    directory = _PROC / str(pid)
    try:
        status = dict(line.split(":", 1) for line in _text(directory / "status").splitlines() if ":" in line)
        command = tuple(_text(directory / "cmdline").rstrip("\0").split("\0"))
    except OSError:
        return None
    files = most_files = None
    with contextlib.suppress(OSError):
        files = len(os.listdir(directory / "fd"))
        most_files, _ = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    effective = int(status.get("CapEff", "0"), 16)
    return Process(
        pid=pid,
        name=status.get("Name", "").strip(),
        command=command,
        uid=int(status.get("Uid", "0").split()[0]),
        stopped=status.get("State", "").strip()[:1] in ("T", "t"),
        capabilities=frozenset(name for name, bit in CAPABILITIES.items() if effective >> bit & 1),
        files=files,
        most_files=most_files,
    )


def move_up(fd: int) -> int:
    """The same file with a number above those that select() can wait for, in place of this one; this one where the limit forbids it.

    For files that are kept long and come by the hundred: libnftables, among other libraries of a program, needs a low number."""
    try:
        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FD_SETSIZE)
    except OSError:
        return fd
    os.close(fd)
    return high


def processes_here() -> dict[int, str]:
    """Name by pid of every process of the calling thread's network namespace, as far as they are ours to see."""
    here = os.readlink("/proc/thread-self/ns/net")
    found = {}
    for directory in _pids():
        with contextlib.suppress(OSError):
            if os.readlink(directory / "ns/net") == here:
                found[int(directory.name)] = _text(directory / "comm").strip()
    return found


def socket_holders(inodes: Collection[int]) -> dict[int, list[int]]:
    """The processes, by pid, that hold each of these sockets. A socket whose holder is not ours to see is missing."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes if inode}
    found: dict[int, list[int]] = {}
    for directory in _pids() if wanted else ():
        with contextlib.suppress(OSError):
            held = {_target(fd) for fd in (directory / "fd").iterdir()}
            for link in held & wanted.keys():
                found.setdefault(wanted[link], []).append(int(directory.name))
    return found


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed meanwhile
        return ""


def _pids() -> Iterator[Path]:
    return (directory for directory in _PROC.iterdir() if directory.name.isdecimal())


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
