"""Pure: which connections may be relayed.

In this version the policy is one list: special destinations are refused unless the config allows them. The kernel settles it in
nft sets; what reaches the listener in another way is asked once more here. Rules on sources, names and destinations come later
and live here too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

__all__ = ["SPECIAL_NETWORKS", "make_is_refused"]

SPECIAL_NETWORKS: tuple[IPv4Network | IPv6Network, ...] = tuple(
    ip_network(network)
    for network in (
        "0.0.0.0/8",  # "this network" (RFC 1122): Linux connects 0.0.0.0 to itself
        "127.0.0.0/8",  # loopback: a client must not reach what listens there for this host alone
        "169.254.0.0/16",  # link-local (RFC 3927), and 169.254.169.254: metadata of most clouds
        "100.100.100.200/32",  # metadata of Alibaba Cloud
        "168.63.129.16/32",  # WireServer of Azure
        "192.0.0.192/32",  # metadata of Oracle Cloud (classic)
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and limited broadcast
        "::/128",
        "::1/128",
        "::ffff:0:0/96",  # mapped IPv4: would slip past every IPv4 rule
        "64:ff9b::/104",  # NAT64 (RFC 6052) of 0.0.0.0/8 ...
        "64:ff9b::7f00:0/104",  # ... of loopback ...
        "64:ff9b::a9fe:0/112",  # ... and of link-local
        "fe80::/10",  # link-local
        "fd00:ec2::/32",  # metadata and credentials of AWS over IPv6
        "fd20:ce::254/128",  # metadata of Google Cloud over IPv6
        "fd00:c1::a9fe:a9fe/128",  # metadata of Oracle Cloud over IPv6
        "fd00:42::42/128",  # metadata of Scaleway over IPv6
        "ff00::/8",  # multicast
    )
)
"""Destinations that are refused by default, because the proxy's own position would be lent to the client."""


def make_is_refused(allowed: Sequence[IPv4Network | IPv6Network]) -> Callable[[str], bool]:
    """Whether an address (text) is special and not among the allowed networks."""

    def is_refused(host: str) -> bool:
        address = ip_address(host.partition("%")[0])
        return any(address in network for network in SPECIAL_NETWORKS) and not any(
            address in network for network in allowed
        )

    return is_refused
