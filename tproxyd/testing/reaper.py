"""Kills what is left in a lab's namespaces; also the program that does so when the test run was killed.

Knows namespaces by file descriptor and processes by /proc and pidfd. Standard library only, and only modules that the
interpreter loads in a few milliseconds: it is started for every lab with `python -I -S`. Refuses to know labs and tests.

The idea: a lab starts one reaper and holds one end of a socket pair. Each namespace is handed over as a *descriptor* the
moment it is made, before anything can run in it. A bare inode number would not do: the kernel gives the lowest free
number to the next namespace, so the number of a dead namespace soon names a stranger's; the descriptor pins it. When the
lab's end closes, in an orderly way or because SIGKILL ended the test run, the reaper reads EOF, kills everything
whose network namespace is among the ones it holds, until nothing is left, and ends; with it go the namespaces.

A process that left the lab's namespaces for one that it made itself is out of reach.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Collection

__all__ = ["identity", "kill_everything_in", "processes_in", "tell"]

Identity = tuple[int, int]
"""Device and inode of a namespace's file: what tells it from any other while somebody holds it open."""

_ROUNDS = 2000  # a round that still finds somebody waits 1 ms, so this is a bound of a few seconds, also for fork bombs
_MAX_DESCRIPTORS = 16  # what one recvmsg may carry; the lab sends one at a time


def identity(fd: int) -> Identity:
    """Which namespace `fd` is open on."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def processes_in(namespaces: Collection[Identity]) -> list[int]:
    """The ids of the processes whose main thread is in one of the namespaces, never this process itself.

    Zombies have left their namespaces already and are not counted.
    """
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and int(entry) != os.getpid() and _is_in(int(entry), namespaces):
            found.append(int(entry))
    return found


def kill_everything_in(namespaces: Collection[Identity], rounds: int = _ROUNDS) -> list[int]:
    """SIGKILLs every process in the namespaces until none is left; returns the ones that would not die, normally []."""
    left: list[int] = []
    for _ in range(rounds):
        left = processes_in(namespaces)
        if not left:
            break
        for pid in left:
            _kill(pid, namespaces)
        time.sleep(0.001)  # exit is asynchronous, and there is no one event for processes that are not our children
    return left


def tell(connection: socket.socket, fd: int) -> None:
    """Hands one namespace to the reaper at the other end."""
    socket.send_fds(connection, [b"n"], [fd])


def _is_in(pid: int, namespaces: Collection[Identity]) -> bool:
    try:
        status = os.stat(f"/proc/{pid}/ns/net")
    except OSError:
        return False  # gone, a zombie, or not ours to look at: then it is none of the lab's
    return (status.st_dev, status.st_ino) in namespaces


def _kill(pid: int, namespaces: Collection[Identity]) -> None:
    # The number may go to another process at any time. A pidfd stays with its process, so: open, look again, kill.
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if _is_in(pid, namespaces):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except OSError:
        pass  # it ended by itself
    finally:
        os.close(pidfd)


def _serve(connection: socket.socket) -> None:
    held: list[int] = []
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(connection, 1, _MAX_DESCRIPTORS)
        except ConnectionResetError:
            break  # the lab's end closed with our word to it unread; there is none, but EOF is what it means
        held.extend(fds)
        if not data:
            break
    kill_everything_in({identity(fd) for fd in held})


if __name__ == "__main__":
    # Ctrl-C and a closed terminal go to the whole process group; the reaper must outlive everybody.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    _serve(socket.socket(fileno=int(sys.argv[1])))
