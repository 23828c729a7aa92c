"""Is an address local to this namespace? The kernel's own answer, with no cache that could go stale.

The layout of a connection depends on it: local (sidecar) or forwarded (gateway). A list of interface addresses would miss
`local` routes (a load balancer's any-IP prefix), and a trial bind is fooled by ip_nonlocal_bind; a route look-up is what
the kernel itself would do with the packet. One netlink exchange, about 10 us.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from types import TracebackType

__all__ = ["Locality"]

_RTM_GETROUTE = 26
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_RTA_DST = 1
_RTN_LOCAL = 2
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_RTMSG = struct.Struct("=BBBBBBBBI")  # struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr: length, type
# No route, or a route that says so: then it is certainly not an address of ours.
_NOT_ROUTED = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.EAFNOSUPPORT, errno.ENODEV}


class Locality:
    """Answers `is_local` for the namespace in which it was made. A context manager; close it."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._sequence = 0

    def __enter__(self) -> Locality:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the netlink socket; harmless when repeated."""
        self._sock.close()

    def is_local(self, host: str) -> bool:
        """Whether packets to this address (text, no scope) are delivered to this namespace. Raises OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        address = socket.inet_pton(family, host)
        self._sequence = self._sequence % 0xFFFFFFFF + 1
        body = _RTMSG.pack(family, len(address) * 8, 0, 0, 0, 0, 0, 0, 0)
        body += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(address), _RTA_DST) + address
        # The kernel answers within send(), so the answer is there when recv() asks for it.
        self._sock.send(_HEADER.pack(_HEADER.size + len(body), _RTM_GETROUTE, _NLM_F_REQUEST, self._sequence, 0) + body)
        while True:
            answer = self._sock.recv(8192)
            _, kind, _, sequence, _ = _HEADER.unpack_from(answer)
            if sequence == self._sequence:
                break
        if kind == _NLMSG_ERROR:
            number = -struct.unpack_from("=i", answer, _HEADER.size)[0]
            if number in _NOT_ROUTED:
                return False
            raise OSError(number, os.strerror(number))
        return bool(_RTMSG.unpack_from(answer, _HEADER.size)[7] == _RTN_LOCAL)
