"""Is an address local to this namespace? The kernel's own answer, kept until something about routes, rules, links or addresses changes.

The layout of a connection depends on it: local (sidecar) or forwarded (gateway). A list of interface addresses would miss
`local` routes (a load balancer's any-IP prefix), and a trial bind is fooled by ip_nonlocal_bind; a route look-up is what
the kernel itself would do with the packet. One netlink exchange, about 10 us, the first time; then a look into a dict. Nothing
goes stale: the kernel queues the news of a change while it makes it, and any news empties the dict. (Deleting a link tells of the link
but not of its IPv4 routes, hence news of everything that a look-up depends on.)
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from types import TracebackType
from typing import NamedTuple

__all__ = ["ROUTING_NEWS", "Locality", "Lookup", "type_of_ipv4"]

_RTM_GETROUTE = 26
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_RTA_DST, _RTA_SRC, _RTA_IIF, _RTA_OIF, _RTA_MARK, _RTA_IP_PROTO, _RTA_SPORT, _RTA_DPORT = 1, 2, 3, 4, 16, 27, 28, 29
_RTN_LOCAL = 2
_KINDS = {
    1: "unicast",
    2: "local",
    3: "broadcast",
    4: "anycast",
    5: "multicast",
}  # linux/rtnetlink.h; the others lead nowhere
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_RTMSG = struct.Struct("=BBBBBBBBI")  # struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr: length, type
_NETLINK_FIB_LOOKUP, _RT_TABLE_LOCAL = 10, 255  # linux/netlink.h, linux/rtnetlink.h
# struct fib_result_nl (net/ip_fib.h): address, mark, tos, scope, table; then what is found: table, prefix length, hop, type, scope, error.
_FIB_RESULT = struct.Struct("=4sI8Bi")
# No route, or a route that says so: then it is certainly not an address of ours.
_NOT_ROUTED = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.EAFNOSUPPORT, errno.ENODEV}


# RTNLGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE, IPV6_RULE (linux/rtnetlink.h), as bits.
ROUTING_NEWS = sum(1 << (group - 1) for group in (1, 5, 7, 8, 9, 11, 19))
_KEPT = 8192  # answers; clients' addresses are theirs to choose
_AT_ONCE = 64  # messages that are taken in: whoever makes them as fast as we read is not read to an end


class Lookup(NamedTuple):
    """What the kernel does with a packet: its kind of destination ("unicast", "local", "broadcast", "anycast", "multicast"), and the index
    of the interface that it leaves by. Kind "" is nothing: dropped, and `error` is the kernel's number for why."""

    kind: str
    interface: int = 0
    error: int = 0


def type_of_ipv4(host: str) -> str:
    """What kind the table `local` has this IPv4 address for, "" if none. Raises OSError.

    nft's `fib daddr type` asks nothing else, and neither does a socket that is to answer from this address, while routing finds `local`
    routes in every table that an ip rule leads to.
    """
    request = _FIB_RESULT.pack(socket.inet_aton(host), 0, 0, 0, _RT_TABLE_LOCAL, 0, 0, 0, 0, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_FIB_LOOKUP) as sock:
        sock.send(_HEADER.pack(_HEADER.size + len(request), 0, _NLM_F_REQUEST, 1, 0) + request)
        *_, kind, _, error = _FIB_RESULT.unpack_from(sock.recv(8192), _HEADER.size)
    return "" if error else _KINDS.get(kind, "")


class Locality:
    """Answers `is_local` for the namespace in which it was made. A context manager; close it.

    Whoever holds it calls `forget` when `fileno()` becomes readable. Where that happens more often than it is worth, `keeps` is set to False
    for a time: then every answer is the kernel's, and the news may wait.
    """

    def __init__(self) -> None:
        self.keeps = True
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        try:
            self._news = socket.socket(
                socket.AF_NETLINK,
                socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
                socket.NETLINK_ROUTE,
            )
            try:
                self._news.bind((0, ROUTING_NEWS))
            except BaseException:
                self._news.close()
                raise
        except BaseException:
            self._sock.close()
            raise
        self._sequence = 0
        self._answers: dict[str, bool] = {}

    def __enter__(self) -> Locality:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the netlink sockets; harmless when repeated."""
        self._sock.close()
        self._news.close()

    def fileno(self) -> int:
        """The descriptor that becomes readable when answers may have changed."""
        return self._news.fileno()

    def forget(self) -> None:
        """Takes in the news: every answer will be asked for again. Never blocks; where there is very much, it stays readable."""
        self._answers.clear()
        for _ in range(_AT_ONCE):
            try:
                self._news.recv(8192)
            except BlockingIOError:
                return
            except OSError:  # ENOBUFS: there was more news than the socket holds, which comes to the same
                continue

    def is_local(self, host: str) -> bool:
        """Whether packets to this address (text, no scope) are delivered to this namespace. Raises OSError."""
        answer = self._answers.get(host)
        if answer is None:
            answer = self._look_up(host)
            if self.keeps:
                if len(self._answers) >= _KEPT:
                    self._answers.clear()
                self._answers[host] = answer
        return answer

    def look_up(
        self,
        host: str,
        *,
        source: str = "",
        interface: int = 0,
        mark: int = 0,
        protocol: int = 0,
        source_port: int = 0,
        port: int = 0,
    ) -> Lookup:
        """Where a packet to this address (text, no scope) goes, if this host sends it, or if it arrives from `source` on the interface
        with this index; asked anew each time. `protocol` and ports: ip rules may select by them. Raises OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        address = socket.inet_pton(family, host)
        from_address = socket.inet_pton(family, source) if source else b""
        body = _RTMSG.pack(family, len(address) * 8, len(from_address) * 8, 0, 0, 0, 0, 0, 0)
        for kind, value in (
            (_RTA_DST, address),
            (_RTA_SRC, from_address),
            (_RTA_IIF, struct.pack("=I", interface) if interface else b""),
            (_RTA_MARK, struct.pack("=I", mark) if mark else b""),
            (_RTA_IP_PROTO, bytes([protocol]) if protocol else b""),
            (_RTA_SPORT, struct.pack("!H", source_port) if source_port else b""),
            (_RTA_DPORT, struct.pack("!H", port) if port else b""),
        ):
            if value:
                body += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)
        number, answer = self._ask(body)
        if number:
            return Lookup("", error=number)
        found = _KINDS.get(_RTMSG.unpack_from(answer)[7], "")
        at, leaves_by = _RTMSG.size, 0
        while at + _ATTRIBUTE.size <= len(answer):
            length, kind = _ATTRIBUTE.unpack_from(answer, at)
            if kind == _RTA_OIF:
                (leaves_by,) = struct.unpack_from("=I", answer, at + _ATTRIBUTE.size)
            at += max(_ATTRIBUTE.size, length + 3 & ~3)
        return Lookup(found, leaves_by, 0 if found else errno.EHOSTUNREACH)

    def _look_up(self, host: str) -> bool:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        address = socket.inet_pton(family, host)
        body = _RTMSG.pack(family, len(address) * 8, 0, 0, 0, 0, 0, 0, 0)
        body += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(address), _RTA_DST) + address
        number, answer = self._ask(body)
        if number in _NOT_ROUTED:
            return False
        if number:
            raise OSError(number, os.strerror(number))
        return bool(_RTMSG.unpack_from(answer)[7] == _RTN_LOCAL)

    def _ask(self, body: bytes) -> tuple[int, bytes]:
        """The kernel's error number, or 0 and the answer: a struct rtmsg and its attributes."""
        self._sequence = self._sequence % 0xFFFFFFFF + 1
        # The kernel answers within send(), so the answer is there when recv() asks for it.
        self._sock.send(_HEADER.pack(_HEADER.size + len(body), _RTM_GETROUTE, _NLM_F_REQUEST, self._sequence, 0) + body)
        while True:
            answer = self._sock.recv(8192)
            length, kind, _, sequence, _ = _HEADER.unpack_from(answer)
            if sequence == self._sequence:
                break
        if kind == _NLMSG_ERROR:
            return -struct.unpack_from("=i", answer, _HEADER.size)[0], b""
        return 0, answer[_HEADER.size : length]
