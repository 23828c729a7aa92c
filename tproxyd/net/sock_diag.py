"""TCP sockets of this namespace as the kernel's sock_diag tells them: states, queues, owners, and whether they are transparent.

/proc/net/tcp has the same sockets, but not that one bit, on which a listener's worth for tproxy depends. Needs no privilege.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

__all__ = ["ESTABLISHED", "LISTEN", "TIME_WAIT", "TcpSocket", "TcpStates", "find_connection", "tcp_sockets"]

_NETLINK_SOCK_DIAG = 4  # linux/netlink.h
_SOCK_DIAG_BY_FAMILY = 20  # linux/sock_diag.h
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_INET_DIAG_SKV6ONLY, _INET_DIAG_SOCKOPT = (
    11,
    22,
)  # linux/inet_diag.h; sent without being asked for, the second since 5.10
# struct inet_diag_sockopt: the sixth bit field of the first byte.
_TRANSPARENT = 1 << 5 if sys.byteorder == "little" else 1 << 2
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_ID = struct.Struct("!HH16s16s")  # ports and addresses of struct inet_diag_sockid; interface and cookie follow
_ANY_COOKIE = struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)  # on whichever interface
_REQUEST = struct.Struct("=BBBBI")  # struct inet_diag_req_v2: family, protocol, extensions, padding, states
_BODY = struct.Struct("=BBBB48sIIIII")  # struct inet_diag_msg

# include/net/tcp_states.h
ESTABLISHED, TIME_WAIT, LISTEN = 1, 6, 10
_ALL_STATES = 0xFFFFFFFF


class TcpSocket(NamedTuple):
    """One socket. `received` is what waits to be read, or, of a listener, accepted; `room` of a listener is its backlog.

    `transparent` None: this kernel does not tell. `inode` 0: no process has it. `both_families`: a listener on :: that takes IPv4, too.
    """

    state: int
    local: str
    local_port: int
    remote: str
    remote_port: int
    received: int
    room: int
    uid: int
    inode: int
    transparent: bool | None
    both_families: bool = False


def tcp_sockets(*states: int) -> list[TcpSocket]:
    """All TCP sockets of the calling thread's namespace, or those in these states. Raises OSError."""
    wanted = sum(1 << state for state in states) or _ALL_STATES
    found: list[TcpSocket] = []
    for family in (socket.AF_INET, socket.AF_INET6):
        found += _ask(family, wanted, bytes(48), dump=True)
    return found


def find_connection(local: tuple[str, int], remote: tuple[str, int]) -> TcpSocket | None:
    """The socket of one connection as seen from its local end, or None if there is none (any more). Raises OSError."""
    family = socket.AF_INET6 if ":" in local[0] else socket.AF_INET
    ends = [socket.inet_pton(family, host).ljust(16, b"\0") for host in (local[0], remote[0])]
    exact = _ID.pack(local[1], remote[1], *ends) + _ANY_COOKIE
    # With ports and addresses given, a listener would do, too.
    found = [sock for sock in _ask(family, _ALL_STATES, exact, dump=False) if sock.state != LISTEN]
    return found[0] if found else None


class TcpStates:
    """Asks for the state of single connections, in 4 us each. Of the namespace in which it was made. A context manager; close it."""

    def __init__(self) -> None:
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)
        self._sequence = 0

    def __enter__(self) -> TcpStates:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the netlink socket; harmless when repeated."""
        self._netlink.close()

    def state(self, local: tuple[str, int], remote: tuple[str, int]) -> int | None:
        """The state of the connection with these ends, or None if there is none, or the kernel cannot tell. Raises OSError."""
        request = _one_connection(local, remote)
        self._sequence = self._sequence % 0xFFFFFFFF + 1
        head = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, self._sequence, 0)
        self._netlink.send(head + request)
        while True:
            # The kernel answers within send(), so the answer is there when recv() asks for it.
            answer = self._netlink.recv(8192)
            _, kind, _, sequence, _ = _HEADER.unpack_from(answer)
            if sequence == self._sequence:
                break
        if kind == _NLMSG_ERROR:
            return None
        state = answer[_HEADER.size + 1]  # struct inet_diag_msg: family, state, ...
        return None if state == LISTEN else state  # with ports and addresses given, a listener would do, too


def _one_connection(local: tuple[str, int], remote: tuple[str, int]) -> bytes:
    family = socket.AF_INET6 if ":" in local[0] else socket.AF_INET
    ends = [socket.inet_pton(family, host).ljust(16, b"\0") for host in (local[0], remote[0])]
    return (
        _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, _ALL_STATES)
        + _ID.pack(local[1], remote[1], *ends)
        + _ANY_COOKIE
    )


def _ask(family: int, states: int, wanted: bytes, *, dump: bool) -> list[TcpSocket]:
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, states) + wanted
    flags = _NLM_F_REQUEST | (_NLM_F_DUMP if dump else 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as netlink:
        netlink.send(_HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, flags, 1, 0) + body)
        found: list[TcpSocket] = []
        while True:
            for kind, message in _messages(netlink.recv(1 << 17)):
                if kind == _NLMSG_DONE:
                    return found
                if kind == _NLMSG_ERROR:
                    number = -struct.unpack_from("=i", message)[0]
                    if number in (errno.ENOENT, errno.EAFNOSUPPORT):  # no such connection; no such family
                        return found
                    raise OSError(number, os.strerror(number))
                found.append(_read(message))
                if not dump:
                    return found


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _HEADER.size:
        length, kind, _, _, _ = _HEADER.unpack_from(data)
        yield kind, data[_HEADER.size : length]
        data = data[(length + 3) & ~3 :]


def _read(message: bytes) -> TcpSocket:
    family, state, _, _, identity, _, received, room, uid, inode = _BODY.unpack_from(message)
    local_port, remote_port, local, remote = _ID.unpack_from(identity)
    size = 16 if family == socket.AF_INET6 else 4
    transparent: bool | None = None
    both_families = False
    attributes = message[_BODY.size :]
    while len(attributes) >= 4:
        length, kind = struct.unpack_from("=HH", attributes)
        if length < 4:
            break
        if kind == _INET_DIAG_SOCKOPT:
            transparent = bool(attributes[4] & _TRANSPARENT)
        elif kind == _INET_DIAG_SKV6ONLY:
            both_families = not attributes[4] and not any(local)
        attributes = attributes[(length + 3) & ~3 :]
    return TcpSocket(
        state,
        socket.inet_ntop(family, local[:size]),
        local_port,
        socket.inet_ntop(family, remote[:size]),
        remote_port,
        received,
        room,
        uid,
        inode,
        transparent,
        both_families,
    )
