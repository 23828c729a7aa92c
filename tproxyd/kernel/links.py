"""The network interfaces of this namespace. Only looked at."""

from __future__ import annotations

import socket
import struct
import sys

import msgspec

from tproxyd.errors import KernelError
from tproxyd.kernel.dumps import attributes, dump_all

__all__ = ["Link", "list_links"]

_IFF_UP, _IFF_LOWER_UP = 0x1, 0x10000  # linux/if.h
# linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h: RTM_, IFLA_, IFLA_INFO_, IFA_
_GETLINK, _GETADDR = 18, 22
_IFNAME, _MTU, _MASTER, _LINKINFO = 3, 4, 10, 18
_INFO_KIND = 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2


class Link(msgspec.Struct, frozen=True):
    """A network interface. `carrier`: it is up, and so is what is at its other end; `kind` is "" for hardware and lo; `master` is the name of the bridge, VRF or bond that has it."""

    name: str
    kind: str
    mtu: int
    up: bool
    master: str | None
    master_kind: str
    addresses: tuple[str, ...] = ()
    carrier: bool = False


def list_links() -> tuple[Link, ...]:
    """Every interface of this namespace. Raises KernelError."""
    try:
        found = {
            struct.unpack_from("=i", body, 4)[0]: (body, attributes(body[16:]))  # struct ifinfomsg
            for body in dump_all(socket.NETLINK_ROUTE, _GETLINK, bytes(16))
        }
        addresses: dict[int, list[str]] = {}
        for body in dump_all(socket.NETLINK_ROUTE, _GETADDR, bytes(8)):  # struct ifaddrmsg
            has = attributes(body[8:])
            address = socket.inet_ntop(body[0], has.get(_IFA_LOCAL) or has[_IFA_ADDRESS])
            addresses.setdefault(struct.unpack_from("=I", body, 4)[0], []).append(address)
    except OSError as error:
        raise KernelError(
            f"cannot list interfaces: {error.strerror}; is the machine out of files or memory?"
        ) from error
    names = {index: _text(has, _IFNAME) for index, (_, has) in found.items()}
    kinds = {index: _text(attributes(has.get(_LINKINFO, b"")), _INFO_KIND) for index, (_, has) in found.items()}

    def link(index: int, body: bytes, has: dict[int, bytes]) -> Link:
        master = int.from_bytes(has.get(_MASTER, b""), sys.byteorder)
        flags = struct.unpack_from("=I", body, 8)[0]
        return Link(
            names[index],
            kinds[index],
            int.from_bytes(has.get(_MTU, b""), sys.byteorder),
            bool(flags & _IFF_UP),
            names.get(master),
            kinds.get(master, ""),
            tuple(addresses.get(index, ())),
            bool(flags & _IFF_LOWER_UP),
        )

    return tuple(link(index, body, has) for index, (body, has) in found.items())


def _text(has: dict[int, bytes], kind: int) -> str:
    return has.get(kind, b"").rstrip(b"\0").decode(errors="replace")
