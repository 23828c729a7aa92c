"""Pure: which connections may be relayed.

In this version the policy is one list, settled by the kernel in nft sets: special destinations are refused unless the
config allows them. Rules on sources, names and destinations come later and live here too.
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_network

__all__ = ["SPECIAL_NETWORKS"]

SPECIAL_NETWORKS: tuple[IPv4Network | IPv6Network, ...] = tuple(
    ip_network(network)
    for network in (
        "0.0.0.0/8",  # "this network" (RFC 1122): Linux connects 0.0.0.0 to itself
        "127.0.0.0/8",  # loopback: a client must not reach what listens there for this host alone
        "169.254.0.0/16",  # link-local (RFC 3927), and 169.254.169.254: metadata of most clouds
        "100.100.100.200/32",  # metadata of Alibaba Cloud
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and limited broadcast
        "::/128",
        "::1/128",
        "::ffff:0:0/96",  # mapped IPv4: would slip past every IPv4 rule
        "fe80::/10",  # link-local
        "fd00:ec2::254/128",  # metadata of AWS over IPv6
        "fd20:ce::254/128",  # metadata of Google Cloud over IPv6
        "ff00::/8",  # multicast
    )
)
"""Destinations that are refused by default, because the proxy's own position would be lent to the client."""
