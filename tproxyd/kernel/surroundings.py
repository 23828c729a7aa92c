"""What of this namespace a plan depends on. Reads /proc and opens a socket; needs no privilege, so `tproxyd plan` asks, too."""

from __future__ import annotations

import fcntl
import socket
import struct
from pathlib import Path

from tproxyd.plan import Family, Surroundings

__all__ = ["is_forwarding", "is_loopback_up", "look_around"]

_SIOCGIFFLAGS, _IFF_UP = 0x8913, 1  # linux/sockios.h, linux/if.h
_BRIDGE = Path("/proc/sys/net/bridge")


def look_around() -> Surroundings:
    """The surroundings of the calling process's network namespace, as they are now."""
    bridged = any(_read(_BRIDGE / name) == "1" for name in ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables"))
    sockets = _socket_families()
    off = 6 not in sockets or _read(Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6")) != "0"
    return Surroundings(families=(4,) if off else (4, 6), sockets=sockets, bridge_netfilter=bridged)


def is_forwarding() -> bool:
    """Whether this namespace forwards packets of either family."""
    return any(_read(Path("/proc/sys/net") / name) == "1" for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"))


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
