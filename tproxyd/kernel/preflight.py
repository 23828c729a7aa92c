"""Looks at all that could keep a config from working here, before anything is changed. One sentence for each thing, with its remedy.

Whether the kernel takes the ruleset itself (its modules) is asked right before the first change, by `state.apply`.

Tried and found harmless, therefore not looked at: rp_filter, src_valid_mark, tcp_fwmark_accept, fwmark_reflect, accept_local,
route_localnet, ip_early_demux, tcp_early_demux, ip_forward and ipv6 forwarding off, ip_nonlocal_bind, bindv6only, tcp_l3mdev_accept,
tcp_migrate_req, disable_policy, disable_xfrm, drop_unicast_in_l2_multicast.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from pathlib import Path

import msgspec

from tproxyd.config import Config
from tproxyd.errors import MissingError, TproxydError
from tproxyd.kernel.neighbours import look_at_neighbours, require_no_collision, taken_marks, tell_neighbours
from tproxyd.kernel.nft import nft_version
from tproxyd.kernel.surroundings import is_loopback_up, look_around
from tproxyd.net.capabilities import missing_capabilities
from tproxyd.plan import DEFAULT_NAME, Surroundings, make_marks

__all__ = ["Preflight", "is_too_old", "look_ahead", "preflight", "require_nf_tables", "require_nft"]

_NETLINK_NETFILTER = 12  # linux/netlink.h
_OLDEST_NFT = (1, 0, 0)  # 0.9.8 knows neither `flags owner` nor `tcp flags syn / fin,syn,rst,ack`
_SYNCOOKIES = Path("/proc/sys/net/ipv4/tcp_syncookies")


class Preflight(msgspec.Struct, frozen=True):
    """What a plan is made from, and what the administrator should know."""

    surroundings: Surroundings
    warnings: tuple[str, ...]


def preflight(
    config: Config, *, ssh_ports: Iterable[int] = (), name: str = DEFAULT_NAME, nft_known: bool = False
) -> Preflight:
    """Whether this config can work in the calling thread's namespace. Changes nothing. `name` is that of our tables; `nft_known`: that
    nft is there and not too old is known (`require_nft`), which takes a child process to find out; so it is in namespaces of somebody else's, where
    very many rules are not looked at.

    Raises MissingError (no nf_tables, no policy routing, no nft or too old a one, lo down), CapabilityError, and KernelError if another
    program is in the way.
    """
    require_nf_tables()
    if not nft_known:
        require_nft()
    if not is_loopback_up():
        raise MissingError(
            "the interface lo is down, and nothing can be delivered to the listeners: switch it on with `ip link set lo up`"
        )
    neighbours = look_at_neighbours(config, name, few=nft_known)
    surroundings = look_around(ssh_ports=ssh_ports, taken_marks=taken_marks(neighbours))
    require_no_collision(config, make_marks(config, surroundings.taken_marks), neighbours)
    return Preflight(surroundings, (*_surrounding_warnings(config, surroundings), *tell_neighbours(neighbours)))


def look_ahead(config: Config, *, ssh_ports: Iterable[int] = ()) -> Surroundings:
    """The surroundings that `preflight` would find, as far as this process may look; for a plan that is shown. Raises nothing."""
    if not missing_capabilities(["CAP_NET_ADMIN"]):
        try:
            return look_around(ssh_ports=ssh_ports, taken_marks=taken_marks(look_at_neighbours(config)))
        except TproxydError:
            pass
    return look_around(ssh_ports=ssh_ports)


def require_nf_tables() -> None:
    """Raises MissingError. Not left to libnftables: that ends the whole process where there is no such socket."""
    try:
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER).close()
    except OSError as error:
        raise MissingError(
            f"this kernel has no nf_tables ({error.strerror}): load it with `modprobe nf_tables`, use a kernel that has it, or allow "
            "AF_NETLINK (in a systemd unit: RestrictAddressFamilies=AF_NETLINK)"
        ) from error


def is_too_old(version: str | None) -> bool:
    """Whether an nft that says this of itself is one that tproxyd cannot work with."""
    number = re.search(r"v(\d+)\.(\d+)\.(\d+)", version or "")
    return number is not None and tuple(map(int, number.groups())) < _OLDEST_NFT


def require_nft() -> None:
    """Raises MissingError where nft is too old."""
    said = nft_version()
    if is_too_old(said):
        raise MissingError(
            f"the program nft is too old ({said}): tproxyd needs version {'.'.join(map(str, _OLDEST_NFT))} or later; "
            "upgrade it, on Debian with `apt-get install nftables`"
        )


def _surrounding_warnings(config: Config, surroundings: Surroundings) -> list[str]:
    warnings = []
    if 6 not in surroundings.families:
        warnings.append(
            "IPv6 is switched off on lo: only IPv4 is captured (net.ipv6.conf.lo.disable_ipv6=0 switches it on)"
        )
    if surroundings.bridge_netfilter and config.redirects:  # NAT there is what br_netfilter is for
        warnings.append(
            "br_netfilter is on: what machines of one bridge send to one another is captured, too (capture.exclude_interfaces leaves "
            "a bridge out)"
        )
    elif surroundings.bridge_netfilter:
        warnings.append(
            "br_netfilter is on: what arrives on bridges is not captured (net.bridge.bridge-nf-call-iptables=0 and "
            "-ip6tables=0 switch it off)"
        )
    if _always_cookies() and not config.redirects:  # NAT needs no socket to know a connection by
        warnings.append(
            "every connection is made by a SYN cookie (net.ipv4.tcp_syncookies=2): those to other hosts' addresses are reset when they "
            "are captured (net.ipv4.tcp_syncookies=1 mends it)"
        )
    return warnings


def _always_cookies() -> bool:
    try:
        return _SYNCOOKIES.read_text(encoding="ascii").strip() == "2"
    except OSError:
        return False
