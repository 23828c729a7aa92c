"""What of this namespace a plan depends on. Reads /proc and opens a socket; needs no privilege, so `tproxyd plan` asks, too."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

from tproxyd.net.proc_net import root_ports
from tproxyd.plan import Family, Surroundings

__all__ = ["is_bridge", "is_forwarding", "is_loopback_up", "look_around"]

_SIOCGIFFLAGS, _IFF_UP = 0x8913, 1  # linux/sockios.h, linux/if.h
_SIOCETHTOOL, _ETHTOOL_GDRVINFO = 0x8946, 3  # linux/sockios.h, linux/ethtool.h
__all__ = ["find_ssh_ports", "is_loopback_up", "look_around"]

_SIOCGIFFLAGS, _IFF_UP = 0x8913, 1  # linux/sockios.h, linux/if.h
_SSH_PORT, _SSH_SERVERS = 22, ("sshd", "dropbear")
_BRIDGE = Path("/proc/sys/net/bridge")


def look_around(*, ssh_ports: Iterable[int] = (), taken_marks: int = 0) -> Surroundings:
    """The surroundings of the calling process's network namespace, as they are now.

    These SSH ports and marks go in as they are: to find the ports takes a look at every process, and a plan that changed with either
    would look like somebody's doing. Who else uses marks is asked once, by `preflight`.
    """
    bridged = any(_read(_BRIDGE / name) == "1" for name in ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables"))
    sockets = _socket_families()
    off = 6 not in sockets or _read(Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6")) != "0"
    return Surroundings(
        families=(4,) if off else (4, 6),
        sockets=sockets,
        bridge_netfilter=bridged,
        ssh_ports=tuple(sorted(ssh_ports)),
        taken_marks=taken_marks,
    )


def find_ssh_ports() -> set[int]:
    """Where SSH of this namespace is served by root: port 22 if root's socket listens there, also one that systemd holds for a server that
    does not run yet, and where an SSH server does whose files may be seen. Else any app could have itself spared."""
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
    except OSError:
        return (4,)
    return (4, 6)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""  # no such module, no such setting
