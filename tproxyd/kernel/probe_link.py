"""A temporary cable from this namespace into a throwaway one, so that a real client can be somewhere else than here.

Everything hangs on the cable: its addresses, routes and neighbours go with it, and it goes with the throwaway namespace, which lives
as long as a descriptor of this process. So nothing outlives the process either, SIGKILL included.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from tproxyd.errors import KernelError
from tproxyd.kernel.routing import refusal
from tproxyd.net.namespaces import call_in_namespace, new_namespace

__all__ = ["PROBE_INTERFACE", "ProbeWay", "open_probe_link"]

PROBE_INTERFACE = "tproxyd-probe"
"""This namespace's end of the cable."""

_EXISTS = f"an interface of that name exists: another doctor runs; or, if none does, remove it with `ip link del {PROBE_INTERFACE}`"
_FAR_END, _FAR_INDEX = "far", 4000
# The two ends of a cable must not have the same index, or the kernel reports its carrier up to a second late.
_CARRIER_SECONDS = 2.0
_IFA_F_NODAD = 0x02  # linux/if_addr.h
_NUD_PERMANENT = 0x80  # linux/neighbour.h
_SCOPE_LINK = 253
_AF = {4: socket.AF_INET, 6: socket.AF_INET6}
_LENGTH = {4: 32, 6: 128}


class ProbeWay(msgspec.Struct, frozen=True):
    """Who connects to what over the cable. `local`: the destination becomes an address of this namespace, on the cable; else it is one
    that only the cable leads to, so that nothing leaves the machine. `near` is the address of this namespace's end, where it needs one."""

    family: int
    source: str
    destination: str
    local: bool
    near: str | None = None


@contextmanager
def open_probe_link(ways: Sequence[ProbeWay]) -> Iterator[tuple[int, dict[int, str]]]:
    """The cable, for the length of the block. Gives a descriptor of the far namespace, where the sources live, and by family why there
    is no way after all. Needs CAP_NET_ADMIN and CAP_SYS_ADMIN. Raises KernelError and CapabilityError, with nothing left."""
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        far = new_namespace()
        try:
            call_in_namespace(far, _make, here)
            try:
                obstacles = _lay_ways(far, ways)
                yield far, obstacles
            finally:
                _remove()  # at once; with the namespace alone it would go some ms later
        finally:
            os.close(far)
    finally:
        os.close(here)


@contextmanager
def _open_netlink(step: str, *, gone: bool = False) -> Iterator[Any]:
    """An open pyroute2 connection for one step; its errors become ours, with the step named. `gone`: absent is fine."""
    from pyroute2 import IPRoute  # 150 ms and 24 MB: only for who probes
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as netlink:
            yield netlink
    except NetlinkError as error:
        if gone and error.code in (errno.ENOENT, errno.ESRCH):
            return
        raise refusal(step, error.code, _EXISTS) from error
    except OSError as error:
        raise refusal(step, error.errno or 0, _EXISTS) from error


def _make(here: int) -> None:
    with _open_netlink(f"make the interface {PROBE_INTERFACE}") as netlink:
        peer = {"ifname": PROBE_INTERFACE, "net_ns_fd": here}
        netlink.link("add", kind="veth", ifname=_FAR_END, index=_FAR_INDEX, peer=peer)
        netlink.link("set", index=_FAR_INDEX, state="up")
    # The namespace may have inherited the host's choice.
    switch = Path(f"/proc/sys/net/ipv6/conf/{_FAR_END}/disable_ipv6")
    if switch.exists() and switch.read_text(encoding="ascii").strip() != "0":
        switch.write_text("0", encoding="ascii")


def _remove() -> None:
    with _open_netlink(f"remove the interface {PROBE_INTERFACE}", gone=True) as netlink:
        for index in netlink.link_lookup(ifname=PROBE_INTERFACE):
            netlink.link("del", index=index)


def _lay_ways(far: int, ways: Sequence[ProbeWay]) -> dict[int, str]:
    with _open_netlink(f"set up the interface {PROBE_INTERFACE}") as netlink:
        (index,) = netlink.link_lookup(ifname=PROBE_INTERFACE)
        netlink.link("set", index=index, state="up")
        far_address = call_in_namespace(far, _wait_for_carrier, _FAR_INDEX)
        near_address = _wait_for_carrier(index)
        obstacles: dict[int, str] = {}
        for way in ways:
            if way.family == 6 and not _has_ipv6():
                obstacles[6] = "IPv6 is switched off on new interfaces (net.ipv6.conf.default.disable_ipv6)"
                continue
            _add_near(netlink, index, way, far_address)
            call_in_namespace(far, _add_far, way, near_address)
            (answer,) = netlink.route("get", dst=way.source, family=_AF[way.family])
            leads = answer.get_attr("RTA_OIF")
            if leads != index:
                name = socket.if_indextoname(leads) if leads else "nowhere"
                obstacles[way.family] = f"an ip rule sends what goes to the probe's address {way.source} to {name}"
    return obstacles


def _has_ipv6() -> bool:
    try:
        text = Path(f"/proc/sys/net/ipv6/conf/{PROBE_INTERFACE}/disable_ipv6").read_text(encoding="ascii")
    except OSError:
        return False
    return text.strip() == "0"


def _wait_for_carrier(index: int) -> str:
    """The link's hardware address, once packets can go over it."""
    end = time.monotonic() + _CARRIER_SECONDS
    with _open_netlink("wait for the probe's cable") as netlink:
        while True:
            (link,) = netlink.get_links(index)
            if link.get_attr("IFLA_OPERSTATE") == "UP":
                return str(link.get_attr("IFLA_ADDRESS"))
            if time.monotonic() > end:
                raise KernelError(
                    f"the interface {PROBE_INTERFACE} got no carrier within {_CARRIER_SECONDS:g} s; does another program "
                    "manage new interfaces here?"
                )
            time.sleep(0.002)


def _add_near(netlink: Any, index: int, way: ProbeWay, far_address: str) -> None:
    _add_route(netlink, index, way.family, way.source)
    _add_neighbour(netlink, index, way.source, far_address)
    if way.near is not None and way.near != way.destination:
        _add_address(netlink, index, way.family, way.near)
    if way.local:
        _add_address(netlink, index, way.family, way.destination)
    else:
        _add_route(netlink, index, way.family, way.destination)
        _add_neighbour(netlink, index, way.destination, far_address)


def _add_far(way: ProbeWay, near_address: str) -> None:
    with _open_netlink("set up the far end of the probe's cable") as netlink:
        _add_address(netlink, _FAR_INDEX, way.family, way.source)
        _add_route(netlink, _FAR_INDEX, way.family, way.destination)
        _add_neighbour(netlink, _FAR_INDEX, way.destination, near_address)


def _add_address(netlink: Any, index: int, family: int, address: str) -> None:
    flags = {"flags": _IFA_F_NODAD} if family == 6 else {}
    netlink.addr("add", index=index, address=address, prefixlen=_LENGTH[family], **flags)


def _add_route(netlink: Any, index: int, family: int, address: str) -> None:
    scope = {"scope": _SCOPE_LINK} if family == 4 else {}
    netlink.route("add", dst=f"{address}/{_LENGTH[family]}", family=_AF[family], oif=index, **scope)


def _add_neighbour(netlink: Any, index: int, address: str, hardware: str) -> None:
    family = _AF[6 if ":" in address else 4]
    netlink.neigh("add", dst=address, lladdr=hardware, ifindex=index, state=_NUD_PERMANENT, family=family)
