"""Netlink: what it tells when it is asked for everything of a kind, and single requests. Standard library only: pyroute2 takes as long to
load as all of the rest.

Bodies and attributes are given as bytes; what they mean is known to who asks.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator

__all__ = ["ask", "attribute", "attributes", "dump", "dump_all", "each_attribute", "number_in"]

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type
_ERROR = struct.Struct("=i")
_REQUEST, _ACK, _DUMP = 1, 4, 0x300  # NLM_F_, linux/netlink.h
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_DUMP_INTERRUPTED = 0x10  # NLM_F_DUMP_INTR: it changed meanwhile, and something may be missing or there twice
_TRIES = 5
_SOL_NETLINK, _GET_STRICT_CHK = 270, 12
_TYPE = 0x3FFF  # NLA_TYPE_MASK: without the flags for nested and for byte order
_LARGEST = 1 << 18  # bytes; the kernel sends at most 32 KiB at a time


def ask(protocol: int, kind: int, body: bytes, flags: int = 0) -> bytes:
    """Makes one request that is no dump, and gives the body of its answer; of one that is only acknowledged, nothing. Raises OSError
    with the kernel's error."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as sock:
        sock.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | _ACK | flags, 1, 0) + body)
        data = sock.recv(_LARGEST)
    length, answer, _, _, _ = _HEADER.unpack_from(data)
    if answer != _NLMSG_ERROR:
        return data[_HEADER.size : length]
    number = -_ERROR.unpack_from(data, _HEADER.size)[0]
    if number:
        raise OSError(number, os.strerror(number))
    return b""


def dump_all(protocol: int, kind: int, body: bytes) -> list[bytes]:
    """The bodies of all answers to one dump request of this netlink protocol, from a moment at which nothing changed, if that comes
    within five tries. Raises OSError with the kernel's error."""
    for _ in range(_TRIES):
        interrupted: list[bool] = []
        bodies = list(dump(protocol, kind, body, interrupted))
        if not interrupted:
            break
    return bodies


def dump(protocol: int, kind: int, body: bytes, interrupted: list[bool] | None = None) -> Iterator[bytes]:
    """The same as they come in, of whatever moment; if it changed meanwhile, a word of that is put into the list. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as sock:
        if protocol == socket.NETLINK_ROUTE:
            sock.setsockopt(_SOL_NETLINK, _GET_STRICT_CHK, 1)  # the kernel filters by what the request says
        sock.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | _DUMP, 1, 0) + body)
        while True:
            data = memoryview(sock.recv(_LARGEST))
            while len(data) >= _HEADER.size:
                length, answer, flags, _, _ = _HEADER.unpack_from(data)
                if flags & _DUMP_INTERRUPTED and interrupted is not None:
                    interrupted.append(True)
                content = bytes(data[_HEADER.size : length])
                if answer in (_NLMSG_DONE, _NLMSG_ERROR):
                    number = -_ERROR.unpack_from(content)[0] if len(content) >= _ERROR.size else 0
                    if number:
                        raise OSError(number, os.strerror(number))
                    return
                yield content
                data = data[(length + 3) & ~3 :]


def attribute(kind: int, content: bytes) -> bytes:
    """One attribute, padded as netlink wants it."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(content), kind) + content + bytes(-len(content) % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """Attributes by type; of several with one type, as in a list, the last."""
    return dict(each_attribute(data))


def each_attribute(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and content of each attribute."""
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE, data[_ATTRIBUTE.size : length]
        data = data[(length + 3) & ~3 :]


def number_in(has: dict[int, bytes], kind: int) -> int:
    """The value of an attribute, of any width; 0 where there is none."""
    return int.from_bytes(has.get(kind, b""), sys.byteorder)
