"""The network interfaces of this namespace. Only looked at."""

from __future__ import annotations

import msgspec

from tproxyd.kernel.routing import open_netlink

__all__ = ["Link", "list_links"]

_IFF_UP, _IFF_LOWER_UP = 0x1, 0x10000  # linux/if.h


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
    """Every interface of this namespace."""
    with open_netlink("list interfaces") as netlink:
        messages = list(netlink.get_links())
        addresses: dict[int, list[str]] = {}
        for message in netlink.get_addr():
            addresses.setdefault(message["index"], []).append(
                message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
            )
    names = {message["index"]: message.get_attr("IFLA_IFNAME") for message in messages}
    kinds = {message["index"]: message.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") or "" for message in messages}
    return tuple(
        Link(
            names[message["index"]],
            kinds[message["index"]],
            message.get_attr("IFLA_MTU") or 0,
            bool(message["flags"] & _IFF_UP),
            names.get(message.get_attr("IFLA_MASTER")),
            kinds.get(message.get_attr("IFLA_MASTER"), ""),
            tuple(addresses.get(message["index"], ())),
            bool(message["flags"] & _IFF_UP and message["flags"] & _IFF_LOWER_UP),
        )
        for message in messages
    )
