"""Pure: which connections are relayed, and where to. A policy becomes one plain function, asked once a connection.

Knows addresses and rules; refuses to know sockets, the kernel and files. Special destinations are refused before any rule, unless
`policy.allow_special` lists them: the kernel settles that in nft sets, and what reaches the listener in another way is settled here.

How rules are looked up (bit vectors: Lakshman and Stiliadis, SIGCOMM 1998): the networks of all rules cut the addresses into intervals,
within which the same rules match. Each interval has a mask with a bit for each of these rules. At most three bisections (destination,
source, port) and two ANDs; the lowest bit that is left is the first rule that matches. The time hardly depends on the number of rules;
a mask has a bit a rule, so the memory grows with rules times networks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network
from socket import AF_INET, AF_INET6, inet_pton
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:  # who asks a policy need not be able to read one
    from tproxyd.config import Policy, PolicyRule

__all__ = ["SPECIAL_NETWORKS", "Decide", "Verdict", "compile_policy"]

_SPECIAL_IPV4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",  # "this network" (RFC 1122): Linux connects 0.0.0.0 to itself
            "127.0.0.0/8",  # loopback: a client must not reach what listens there for this host alone
            "169.254.0.0/16",  # link-local (RFC 3927), and 169.254.169.254: metadata of most clouds
            "100.100.100.200/32",  # metadata of Alibaba Cloud
            "168.63.129.16/32",  # WireServer of Azure
            "192.0.0.192/32",  # metadata of Oracle Cloud (classic)
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, and limited broadcast
        ),
    )
)

_SPECIAL_IPV6 = tuple(
    map(
        IPv6Network,
        (
            "::/96",  # unspecified, loopback, and IPv4-compatible (RFC 4291), which nobody uses any more
            "::ffff:0:0/96",  # mapped IPv4: would slip past every IPv4 rule
            "64:ff9b:1::/48",  # NAT64 of one's own network (RFC 8215): where in it the IPv4 address stands is up to that network
            "fe80::/10",  # link-local
            "fd00:ec2::/32",  # metadata and credentials of AWS over IPv6
            "fd20:ce::254/128",  # metadata of Google Cloud over IPv6
            "fd00:c1::a9fe:a9fe/128",  # metadata of Oracle Cloud over IPv6
            "fd00:42::42/128",  # metadata of Scaleway over IPv6
            "ff00::/8",  # multicast
        ),
    )
)

_EMBEDDING = (IPv6Network("64:ff9b::/96"), IPv6Network("2002::/16"))  # NAT64 (RFC 6052), and 6to4 (RFC 3056)


def _embedded(network: IPv4Network) -> Iterator[IPv6Network]:
    """The IPv6 addresses in which a router may find one of these IPv4 addresses, right behind a prefix."""
    for prefix in _EMBEDDING:
        length = prefix.prefixlen + network.prefixlen
        shift = 128 - prefix.prefixlen - 32
        yield IPv6Network((int(prefix.network_address) | int(network.network_address) << shift, length))


SPECIAL_NETWORKS: tuple[IPv4Network | IPv6Network, ...] = (
    *_SPECIAL_IPV4,
    *_SPECIAL_IPV6,
    *(embedded for network in _SPECIAL_IPV4 for embedded in _embedded(network)),
)
"""Destinations that are refused by default, because the proxy's own position would be lent to the client.

Each of IPv4 also where an IPv6 address has it in it. By NAT64 (64:ff9b::/96) and 6to4, which are used to reach public addresses, only
the special ones are refused; of what has no such use (mapped, IPv4-compatible), or no known form (64:ff9b:1::/48), all. A NAT64 prefix
that a network has chosen for itself cannot be known here: that is for a policy rule.
"""


class Verdict(NamedTuple):
    """What becomes of a connection. `rule` None: no rule said so; `target` None: where it was going."""

    action: Literal["forward", "refuse"]
    rule: str | None = None
    target: tuple[str, int] | None = None


Decide = Callable[[str, str, int], Verdict]
"""Takes source address, destination address and destination port, as getpeername and getsockname give them."""

_Network = IPv4Network | IPv6Network
_Interval = tuple[int, int]
"""The first, and the one behind the last."""

_MAPPED = IPv6Network("::ffff:0:0/96")


def compile_policy(policy: Policy) -> Decide:
    """One function for the whole policy: special destinations, then the first rule that matches, then the default.

    It gives one of the verdicts that were made here, never a new one.
    """
    rules, default, allowed = policy.rule, Verdict(policy.default), policy.allow_special
    # Bit 0 is "special", then one bit a rule, and the last is the default, which always matches: no mask is ever 0.
    verdicts = (
        default,
        Verdict("refuse"),
        *map(_verdict, rules),
        default,
    )  # by the length of the lowest bit; 0 is unused

    def destinations(version: int) -> tuple[list[bytes], list[int]]:
        # An IPv4 address that is mapped into IPv6 is refused, but where it is allowed, IPv4 rules are not to be slipped past.
        mapped = version == 6 and any(one.version == 6 and one.overlaps(_MAPPED) for one in allowed)
        of_rules = (_within(version, rule.destinations, mapped=mapped) for rule in rules)
        return _address_table(version, [_special(version, allowed), *of_rules, None])

    def sources(version: int) -> tuple[list[bytes], list[int]]:
        return _address_table(version, [None, *(_within(version, rule.sources) for rule in rules), None])

    to4, to4_masks = destinations(4)
    to6, to6_masks = destinations(6)
    from4, from4_masks = sources(4)
    from6, from6_masks = sources(6)
    ports, ports_masks = _table([None, *map(_port_intervals, rules), None], 1 << 16)
    by_source = any(rule.sources for rule in rules)
    by_port = bool(ports)

    def decide(source: str, destination: str, port: int) -> Verdict:
        if ":" in destination:
            mask = to6_masks[bisect_right(to6, inet_pton(AF_INET6, destination.partition("%")[0]))]
        else:
            mask = to4_masks[bisect_right(to4, inet_pton(AF_INET, destination))]
        if by_source:
            if ":" in source:
                mask &= from6_masks[bisect_right(from6, inet_pton(AF_INET6, source.partition("%")[0]))]
            else:
                mask &= from4_masks[bisect_right(from4, inet_pton(AF_INET, source))]
        if by_port:
            mask &= ports_masks[bisect_right(ports, port)]
        return verdicts[(mask & -mask).bit_length()]

    return decide


def _verdict(rule: PolicyRule) -> Verdict:
    if isinstance(rule.action, str):
        return Verdict(rule.action, rule.name)
    return Verdict("forward", rule.name, (rule.action.host, rule.action.port))


def _special(version: int, allowed: Sequence[_Network]) -> list[_Interval]:
    """The special addresses without those that are allowed."""
    starts, masks = _table([_intervals(version, SPECIAL_NETWORKS), _intervals(version, allowed)], 1 << _bits(version))
    return [
        (start, stop)
        for start, stop, mask in zip([0, *starts], [*starts, 1 << _bits(version)], masks, strict=True)
        if mask == 1
    ]


def _within(version: int, networks: Sequence[_Network], *, mapped: bool = False) -> list[_Interval] | None:
    """The addresses of one version that a rule's list takes in; None: there is no list, so all of both."""
    if not networks:
        return None
    intervals = _intervals(version, networks)
    if mapped:
        base = int(_MAPPED.network_address)
        intervals += [(base + start, base + stop) for start, stop in _intervals(4, networks)]
    return intervals


def _intervals(version: int, networks: Iterable[_Network]) -> list[_Interval]:
    starts = [(int(one.network_address), one.prefixlen) for one in networks if one.version == version]
    return [(start, start + (1 << _bits(version) - length)) for start, length in starts]


def _port_intervals(rule: PolicyRule) -> list[_Interval] | None:
    if not rule.ports or any(one.first <= 1 and one.last == 65535 for one in rule.ports):
        return None
    return [(one.first, one.last + 1) for one in rule.ports]


def _bits(version: int) -> int:
    return 32 if version == 4 else 128


def _address_table(version: int, lists: Sequence[list[_Interval] | None]) -> tuple[list[bytes], list[int]]:
    """Addresses as inet_pton gives them: bytes, which are in the same order as the numbers."""
    starts, masks = _table(lists, 1 << _bits(version))
    return [start.to_bytes(_bits(version) // 8, "big") for start in starts], masks


def _table(lists: Sequence[list[_Interval] | None], stop: int) -> tuple[list[int], list[int]]:
    """Where the intervals of 0 up to `stop` begin, but for the first, and the mask of each: one more than there are beginnings.

    Bit i is set where an interval of lists[i] reaches, and everywhere if that is None. One sweep: a beginning or an end turns
    bits over.
    """
    everywhere = 0
    turns: dict[int, int] = {}
    for index, intervals in enumerate(lists):
        bit = 1 << index
        if intervals is None:
            everywhere |= bit
            continue
        for ends in _merged(intervals):
            for position in ends:
                turns[position] = turns.get(position, 0) ^ bit
    mask = everywhere ^ turns.pop(0, 0)
    turns.pop(stop, None)
    starts = sorted(turns)
    masks = [mask]
    shared = {mask: mask}
    for start in starts:
        mask ^= turns[start]
        masks.append(shared.setdefault(mask, mask))
    return starts, masks


def _merged(intervals: Iterable[_Interval]) -> list[_Interval]:
    """The same numbers in intervals that neither overlap nor touch."""
    merged: list[_Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged
