"""What of this namespace a plan depends on. Reads /proc and opens a socket; needs no privilege, so `tproxyd plan` asks, too."""

from __future__ import annotations

import socket
from pathlib import Path

from tproxyd.plan import Family, Surroundings

__all__ = ["look_around"]

_BRIDGE = Path("/proc/sys/net/bridge")


def look_around() -> Surroundings:
    """The surroundings of the calling process's network namespace, as they are now."""
    bridged = any(_read(_BRIDGE / name) == "1" for name in ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables"))
    return Surroundings(families=_usable_families(), bridge_netfilter=bridged)


def _usable_families() -> tuple[Family, ...]:
    """(4,) where the kernel or lo has IPv6 switched off: it takes no local route there."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
    except OSError:
        return (4,)
    return (4, 6) if _read(Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6")) == "0" else (4,)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""  # no such module, no such setting
