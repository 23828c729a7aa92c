"""What of this namespace a plan depends on. Reads /proc and opens a socket; needs no privilege, so `tproxyd plan` asks, too."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import socket
import struct
from collections.abc import Iterable, Iterator
from ipaddress import ip_address
from pathlib import Path

from tproxyd.kernel.dumps import attributes, dump_all
from tproxyd.net.proc_net import root_ports
from tproxyd.net.sock_diag import LISTEN, tcp_sockets
from tproxyd.plan import Family, Surroundings

__all__ = [
    "bridge_sysctl",
    "find_ssh_ports",
    "has_bridges",
    "is_bridge",
    "is_forwarding",
    "is_loopback_up",
    "look_around",
]

_SIOCGIFFLAGS, _IFF_UP = 0x8913, 1  # linux/sockios.h, linux/if.h
_SIOCETHTOOL, _ETHTOOL_GDRVINFO = 0x8946, 3  # linux/sockios.h, linux/ethtool.h
_SSH_PORT, _SSH_SERVERS = 22, ("sshd", "dropbear")
# linux/rtnetlink.h, linux/if_link.h: RTM_, IFLA_, IFLA_INFO_, IFLA_BR_
_GETLINK, _LINKINFO = 18, 18
_INFO_KIND, _INFO_DATA = 1, 2
_NF_CALL_IPTABLES, _NF_CALL_IP6TABLES = 36, 37
_BRIDGE = Path("/proc/sys/net/bridge")


def look_around(*, ssh_ports: Iterable[int] = (), taken_marks: int = 0) -> Surroundings:
    """The surroundings of the calling process's network namespace, as they are now.

    These SSH ports and marks go in as they are: to find the ports takes a look at every process, and a plan that changed with either
    would look like somebody's doing. Who else uses marks is asked once, by `preflight`. Raises OSError where there is no file left to
    look with: that must not pass for IPv6 switched off.
    """
    sockets = _socket_families()
    off = 6 not in sockets or _read(Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6")) != "0"
    return Surroundings(
        families=(4,) if off else (4, 6),
        sockets=sockets,
        bridge_netfilter=_is_bridge_netfilter_on(),
        ssh_ports=tuple(sorted(ssh_ports)),
        taken_marks=taken_marks,
    )


def bridge_sysctl() -> tuple[str, ...]:
    """The settings of br_netfilter for all bridges, empty where it is not loaded. Raises OSError where there is no file left."""
    return tuple(_read(_BRIDGE / f"bridge-nf-call-{name}") for name in ("iptables", "ip6tables"))


def _is_bridge_netfilter_on() -> bool:
    """For all bridges, or for one of them: each has settings of its own, which only netlink tells in every namespace."""
    settings = bridge_sysctl()
    if "1" in settings or not any(settings):
        return "1" in settings
    return any(
        b"\1" in (bridge.get(_NF_CALL_IPTABLES), bridge.get(_NF_CALL_IP6TABLES))
        for bridge in map(attributes, _bridges())
    )


def has_bridges() -> bool:
    """Whether there is a bridge, up or down. Raises OSError."""
    return any(True for _ in _bridges())


def _bridges() -> Iterator[bytes]:
    """What the kernel has of each bridge (IFLA_BR_)."""
    # struct ifinfomsg, and IFLA_LINKINFO with IFLA_INFO_KIND: bridges only.
    kind = struct.pack("=HH8s", 11, _INFO_KIND, b"bridge\0")
    links = dump_all(socket.NETLINK_ROUTE, _GETLINK, bytes(16) + struct.pack("=HH", 4 + len(kind), _LINKINFO) + kind)
    for link in links:
        info = attributes(attributes(link[16:]).get(_LINKINFO, b""))
        if info.get(_INFO_KIND) == b"bridge\0":
            yield info.get(_INFO_DATA, b"")


def find_ssh_ports(*, usual_alone: bool = False) -> set[int]:
    """Where SSH of this namespace is served by root: port 22 if root's socket listens there, also one that systemd holds for a server that
    does not run yet, and where an SSH server does whose files may be seen. Else any app could have itself spared.

    The `usual_alone` is found without a look at the files of every process of the machine."""
    if usual_alone:
        # /proc/net/tcp takes the kernel 5 ms on a machine of any size; this, some microseconds.
        ours = [sock for sock in tcp_sockets(LISTEN) if sock.uid == 0 and sock.local_port == _SSH_PORT]
        return {_SSH_PORT} if any(not ip_address(sock.local).is_loopback for sock in ours) else set()
    return root_ports(_SSH_SERVERS) | (root_ports() & {_SSH_PORT})


def is_forwarding() -> bool:
    """Whether this namespace forwards packets of others, of either family."""
    names = ("ipv4/ip_forward", "ipv6/conf/all/forwarding")
    return any(_read(Path("/proc/sys/net") / name) not in ("0", "") for name in names)


def is_bridge(interface: str) -> bool:
    """Whether it is one, as nft's `iifkind` has it; not its ports. Raises OSError."""
    # struct ethtool_drvinfo: a command, the driver's name, and more; struct ifreq has its address.
    info = ctypes.create_string_buffer(struct.pack("=I", _ETHTOOL_GDRVINFO), 256)
    request = struct.pack("16sP", interface.encode(), ctypes.addressof(info))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            fcntl.ioctl(sock, _SIOCETHTOOL, request)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return False  # a driver that has no name
            raise
    return info.raw[4:36].rstrip(b"\0") == b"bridge"


def is_loopback_up() -> bool:
    """While lo is down, nothing is delivered to listeners, and the kernel takes no IPv6 route through it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        # struct ifreq: a name of 16 bytes, and flags.
        answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16sH22x", b"lo", 0))
    flags: int = struct.unpack_from("H", answer, 16)[0]
    return bool(flags & _IFF_UP)


def _socket_families() -> tuple[Family, ...]:
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
    except OSError as error:
        if error.errno not in (errno.EAFNOSUPPORT, errno.EPERM, errno.EACCES):  # not there, or forbidden by a filter
            raise
        return (4,)
    return (4, 6)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (FileNotFoundError, PermissionError):
        return ""  # no such module, no such setting
