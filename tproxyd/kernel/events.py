"""The kernel's news of what a plan is made of, as it happens: ip rules, routes, links, addresses of lo, and nft's tables.

Two netlink sockets, and only as much parsing as tells what concerns us: on a router with a full table thousands of routes change a
minute, and none of them is ours, so the kernel is told to keep those to itself. That something *may* have changed is all that is told; what, the caller finds by looking.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Iterator

import msgspec

from tproxyd.kernel.dumps import attributes
from tproxyd.net.locality import ROUTING_NEWS
from tproxyd.net.processes import move_up
from tproxyd.net.sockets import filter_messages
from tproxyd.plan import DEFAULT_NAME, PROTOCOL

__all__ = ["Events", "News"]

_NETLINK_NETFILTER = 12  # linux/netlink.h
_NFNLGRP_NFTABLES = 7  # linux/netfilter/nfnetlink.h
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_INDEX = struct.Struct("=i")  # of an interface, in struct ifinfomsg and struct ifaddrmsg
_NEWLINK, _DELLINK, _NEWADDR, _DELADDR = 16, 17, 20, 21  # linux/rtnetlink.h
_NEWROUTE, _DELROUTE, _NEWRULE, _DELRULE = 24, 25, 32, 33
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_INFO_KIND = 3, 18, 1
_RT_TABLE_COMPAT = 252  # what the one byte says of a table that does not fit into it
_LOOPBACK = 1  # the index of lo, in every namespace
_NFT_TABLE = 1  # NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE, NFTA_SET_TABLE: the first attribute of each
_NFNL_SUBSYS_NFTABLES = 10
_NFT_MSG_NEWGEN = 15
_BUFFER = 1 << 20  # bytes of news that may wait
_AT_ONCE = 256  # messages of a socket: whoever makes them as fast as they are read, in a namespace of his own, is not read to an end


class News(msgspec.Struct, frozen=True):
    """`state`: something of ours may have changed; `others`: somebody else's ruleset may have. `links`: the interfaces that are new, renamed
    or gone, index to name (None: gone)."""

    state: bool
    others: bool
    links: dict[int, str | None]


class Events:
    """News of the network namespace in whose thread it was made, and of routes only in this table or with our protocol. A context
    manager; close it. `name` is that of our tables."""

    def __init__(self, table: int, name: str = DEFAULT_NAME, *, of_many: bool = False) -> None:
        """`of_many`: there are hundreds in this process, so their files are moved out of the way."""
        self._name = name
        self._of_many = of_many
        self._epoll = select.epoll()
        if of_many:
            with self._epoll as low:
                self._epoll = select.epoll.fromfd(move_up(os.dup(low.fileno())))
        self._sockets: list[socket.socket] = []
        try:
            self._route = self._open(socket.NETLINK_ROUTE, ROUTING_NEWS)
            filter_messages(self._route, _only_our_routes(table))
            self._nft = self._open(_NETLINK_NETFILTER, 1 << (_NFNLGRP_NFTABLES - 1))
        except BaseException:
            self.close()
            raise

    def _open(self, protocol: int, groups: int) -> socket.socket:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, protocol)
        if self._of_many:
            sock = socket.socket(fileno=move_up(sock.detach()))
        self._sockets.append(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        sock.bind((0, groups))
        self._epoll.register(sock, select.EPOLLIN)
        return sock

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the sockets; harmless when repeated."""
        for sock in self._sockets:
            sock.close()
        self._epoll.close()

    def fileno(self) -> int:
        """The descriptor that becomes readable when there is news."""
        return self._epoll.fileno()

    def read(self) -> News:
        """What has come in; never blocks. News that did not fit into the sockets counts as news of everything. Where there is very much, some stays
        for the next time."""
        state = others = False
        links: dict[int, str | None] = {}
        for kind, body in _messages(self._route):
            if kind is None or kind in (_NEWRULE, _DELRULE):
                state = True
            elif kind in (_NEWROUTE, _DELROUTE):
                state = True  # the filter lets no others through
            elif kind in (_NEWADDR, _DELADDR):
                state = state or _INDEX.unpack_from(body, 4)[0] == _LOOPBACK  # ifa_index
            elif kind in (_NEWLINK, _DELLINK):
                index = _INDEX.unpack_from(body, 4)[0]  # ifi_index
                state = state or index == _LOOPBACK or _is_bridge(body)
                name = _text(body[16:], _IFLA_IFNAME)
                # AF_UNSPEC: bridges tell of their ports, too, with a family of their own.
                if name is not None and body[0] == socket.AF_UNSPEC:
                    links[index] = name if kind == _NEWLINK else None
        for kind, body in _messages(self._nft):
            if kind is None:
                state = others = True
            elif kind >> 8 == _NFNL_SUBSYS_NFTABLES and kind & 0xFF != _NFT_MSG_NEWGEN:
                table = _text(body[4:], _NFT_TABLE)
                if table is not None and table.startswith(self._name):
                    state = True
                else:
                    others = True
        return News(state, others, links)


def _is_bridge(body: bytes) -> bool:
    """Whether news of a link is of a bridge: each has settings of br_netfilter of its own."""
    return attributes(attributes(body[16:]).get(_IFLA_LINKINFO, b"")).get(_IFLA_INFO_KIND) == b"bridge\0"


def _only_our_routes(table: int) -> list[tuple[int, int, int, int]]:
    """Classic BPF: messages about routes of another protocol in another table are dropped before they wake anybody."""
    new, old = (
        int.from_bytes(struct.pack("=H", kind), "big") for kind in (_NEWROUTE, _DELROUTE)
    )  # BPF loads in network order
    return [
        (0x28, 0, 0, 4),  # load the half word at 4: nlmsg_type
        (0x15, 1, 0, new),  # if equal, skip one
        (0x15, 0, 4, old),  # if not equal, skip four
        (0x30, 0, 0, _HEADER.size + 5),  # load a byte: rtm_protocol
        (0x15, 2, 0, PROTOCOL),  # if equal, skip two
        (0x30, 0, 0, _HEADER.size + 4),  # rtm_table: what is replaced there has another protocol
        (0x15, 0, 1, table if table < 256 else _RT_TABLE_COMPAT),  # if not equal, skip one
        (0x06, 0, 0, 0xFFFFFFFF),  # return the whole message
        (0x06, 0, 0, 0),  # return nothing of it
    ]


def _messages(sock: socket.socket) -> Iterator[tuple[int | None, bytes]]:
    """Type and body of each message that waits; None as the type where some were lost."""
    for _ in range(_AT_ONCE):
        try:
            data = sock.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            yield None, b""
            continue
        while len(data) >= _HEADER.size:
            length, kind, _, _, _ = _HEADER.unpack_from(data)
            if not _HEADER.size <= length <= len(data):
                break
            yield kind, data[_HEADER.size : length]
            data = data[(length + 3) & ~3 :]


def _text(data: bytes, kind: int) -> str | None:
    """The text of the attribute of this type."""
    found = attributes(data).get(kind)
    return None if found is None else found.rstrip(b"\0").decode(errors="replace")
