"""One owner a network namespace: a netlink port, whose numbers the kernel keeps per network namespace and frees at death.

Any user may bind such a port. One who does keeps the daemon from starting, as one would who binds the listener's port; that is
refused aloud, with the culprit's pid, because going on without the lock would let a second daemon undo the first one's work.

What the owner is can be seen by the groups that its socket has joined, which no stranger can join: a tproxyd, which takes orders at the port
(daemon/lock.py), or a program that embeds tproxyd and keeps a namespace that is not its own, which takes none.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from typing import NamedTuple

from tproxyd.errors import KernelError
from tproxyd.net.proc_net import netlink_port
from tproxyd.net.processes import move_up, read_process, socket_holders

__all__ = ["LOCK_PORT", "Holder", "ServedError", "find_holder", "hold_namespace", "open_port"]

# "tprd". Ports that the kernel chooses are pids (at most 22 bits) or negative; those of libnl and pyroute2 are a pid with a small number
# above it, and this pid is out of reach.
LOCK_PORT = 0x74707264
_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP = 270, 1  # linux/netlink.h
# RTNLGRP_IPV6_MROUTE_R and RTNLGRP_IPV4_MROUTE_R of linux/rtnetlink.h, since 4.13: nobody joins them without CAP_NET_ADMIN, everybody sees
# who has, and nothing comes there but the reports of multicast routing. The first: it was allowed to; the second besides: no orders.
_TRUSTED, _KEEPS = 31, 30
_SO_SNDBUFFORCE = 32  # asm-generic/socket.h


class ServedError(KernelError):
    """Another tproxyd has this network namespace."""


class Holder(NamedTuple):
    """The process that has the lock. Pid 0: it cannot be seen from here. `trusted`: it had CAP_NET_ADMIN over this namespace when it took it.
    `embeds`: it is a program that keeps this namespace beside others, and takes no orders here."""

    pid: int
    name: str
    trusted: bool
    embeds: bool = False

    def __str__(self) -> str:
        if not self.pid:
            return "a process that cannot be seen from here"
        itself = ", this very process" if self.pid == os.getpid() else ""
        return f"{self.name} (pid {self.pid}{itself})"

    @property
    def stranger(self) -> str:
        """What is to be said of one that is not trusted."""
        return (
            f"{self} holds the lock of this network namespace (netlink port {LOCK_PORT:#x}) and is no tproxyd: it took it without "
            "CAP_NET_ADMIN; end it"
        )


def find_holder() -> Holder | None:
    """Who has the lock of the calling thread's namespace, as the kernel tells, whether it answers or not; None if nobody has it."""
    found = netlink_port(LOCK_PORT)
    if found is None:
        return None
    groups, inode = found
    pid = min(socket_holders([inode]).get(inode, [0]))
    process = read_process(pid) if pid else None
    name = process.name if process is not None and process.name.isprintable() else "a process"
    return Holder(pid, name, bool(groups & _bits(_TRUSTED)), bool(groups & _bits(_KEEPS)))


def hold_namespace(purpose: str, *, answer: int = 0) -> socket.socket:
    """Takes the calling thread's namespace; it is held until the socket is closed, at which orders arrive whose answers may have so many
    bytes (0: none are taken). Needs CAP_NET_ADMIN. Raises ServedError that names the process that has it already, KernelError."""
    try:
        held = open_port() if answer else socket.socket(fileno=move_up(open_port().detach()))
    except OSError as error:
        raise KernelError(
            f"cannot take the lock of this network namespace: {error.strerror}; is the machine out of files or memory?"
        ) from error
    try:
        # Before the port is ours: whoever sees that it is taken sees by whom.
        for group in (_TRUSTED,) if answer else (_TRUSTED, _KEEPS):
            held.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        if answer:
            try:
                held.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, answer)
            except PermissionError:  # root of a user namespace: it gets what net.core.wmem_max allows
                held.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, answer)
        else:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)  # as little as there can be: nobody reads it
        _bind(held, _bits(_TRUSTED) if answer else _bits(_TRUSTED, _KEEPS))
    except OSError as error:
        held.close()
        if error.errno != errno.EADDRINUSE:
            raise KernelError(f"cannot take the lock of this network namespace: {error.strerror}") from error
        holder = find_holder()
        if holder is not None and not holder.trusted:
            raise ServedError(f"cannot {purpose}: {holder.stranger}") from error
        if holder is not None and holder.embeds:
            raise ServedError(
                f"cannot {purpose}: an embedding program, {holder}, keeps this network namespace; let it remove the workload, or end it"
            ) from error
        raise ServedError(
            f"cannot {purpose}: {holder or 'another process'} serves this network namespace, or is about to "
            f"(it holds netlink port {LOCK_PORT:#x}); stop it first"
        ) from error
    except BaseException:
        held.close()
        raise
    return held


def _bind(held: socket.socket, groups: int) -> None:
    """Takes the port. Where one has it whom no process has open, that may be one that has just been closed: whoever looks through /proc/PID/fd at
    that moment, or is between fork and exec, keeps it for some microseconds more."""
    for pause in (0.001, 0.01, 0.05, None):
        try:
            return held.bind((LOCK_PORT, groups))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or pause is None:
                raise
            holder = find_holder()
            if holder is not None and holder.pid:
                raise
            time.sleep(pause)
    return None


def open_port() -> socket.socket:
    """A socket of the kind that the lock is."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)


def _bits(*groups: int) -> int:
    return sum(1 << (group - 1) for group in groups)
