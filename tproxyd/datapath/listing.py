"""Living connections as a page at a time: which of them are asked for, and what is told of each.

Whoever asks goes on behind the last one of the page before, by its identity: identities are counted upwards, so nothing has to be kept for a
listing that nobody goes on with, and what begins or ends meanwhile moves nothing. A page looks at a bounded number of connections, for as long as it
is made no other connection gets on.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Literal

import msgspec

from tproxyd.errors import UsageError
from tproxyd.net.sockets import Address, format_address, format_target

if TYPE_CHECKING:
    from tproxyd.datapath.connection import Connection

__all__ = [
    "Answer",
    "CloseOrder",
    "End",
    "Filter",
    "ListOrder",
    "Listing",
    "LivingConnection",
    "Page",
    "State",
    "read_end",
]

_TOLD = 32  # connections of a page; some 8 us each
_LOOKED_AT = 512  # of which most may be filtered out; less than 1 us each

State = Literal["reading", "dialling", "sniffing", "relaying", "flushing", "handed"]
"""What is done with a connection: its PROXY header is waited for, its upstream, the client's first bytes; it is relayed; what came before a reset is
delivered; the embedding program has it."""


class LivingConnection(msgspec.Struct, kw_only=True):
    """A connection that lives, as the access log will name it. `age_s` is from accept on; bytes are those so far. What is not known is None."""

    id: str
    workload: str
    state: State
    age_s: float
    source: str
    original_destination: str | None = None
    upstream: str | None = None
    upstream_source: str | None = None
    rule: str | None = None
    sni: str | None = None
    bytes_from_client: int = 0
    bytes_from_upstream: int = 0


class End(msgspec.Struct, frozen=True, array_like=True):
    """A network and a port that an end of a connection has; an empty network is every one, and so is port 0."""

    network: str = ""
    port: int = 0


class Filter(msgspec.Struct, frozen=True, array_like=True):
    """Which connections: those of a workload, from and to some addresses; None: all of them."""

    workload: str | None = None
    source: End | None = None
    destination: End | None = None

    def compile(self) -> Callable[[str, Address | None, Address | None], bool]:
        """A function of workload, source and original destination."""
        workload, source, destination = self.workload, _compile(self.source), _compile(self.destination)

        def matches(name: str, client: Address | None, dialled: Address | None) -> bool:
            return workload in (None, name) and source(client) and destination(dialled)

        return matches


class ListOrder(msgspec.Struct, array_like=True):
    """A page of those behind the identity `after`; `number` comes back with it."""

    number: int
    filter: Filter
    after: str = ""


class Page(msgspec.Struct, array_like=True):
    """`after` is where the next one goes on; empty: there is none. `seconds` is how long nothing else was done."""

    number: int
    connections: list[LivingConnection]
    after: str
    seconds: float


class CloseOrder(msgspec.Struct, array_like=True):
    """End this connection."""

    number: int
    id: str


class Answer(msgspec.Struct, array_like=True):
    """It has been ended, there is none, or the owner has it."""

    number: int
    result: Literal["closed", "none", "handed"]


class Listing:
    """Of one loop's connections, by identity, in the order in which they began."""

    def __init__(self, connections: Mapping[int, Connection]) -> None:
        self._connections = connections
        self._index: list[int] = []  # identities at the moment when a listing began

    def page(self, order: ListOrder, now: float) -> Page:
        """The next page."""
        began = time.monotonic()
        after = int(order.after or "-1", 16)
        if after < 0 or not self._index:
            self._index = list(self._connections)
        index, matches = self._index, order.filter.compile()
        told: list[LivingConnection] = []
        at = bisect_right(index, after)
        end = min(at + _LOOKED_AT, len(index))
        while at < end and len(told) < _TOLD:
            connection = self._connections.get(index[at])
            if connection is not None and matches(connection.workload.name, connection.client, connection.destination):
                told.append(_tell(connection, now))
            at += 1
        if at >= len(index):
            self._index = []  # whoever else lists goes on with one that is made anew
            last = ""
        else:
            last = f"{index[at - 1]:016x}"
        return Page(order.number, told, last, time.monotonic() - began)


def read_end(text: str, what: str) -> End:
    """An address, a network, either with a port, or a port: "192.0.2.7", "192.0.2.0/24", "192.0.2.7:80", "[2001:db8::7]:80", ":80". Raises UsageError, in
    which `what` is what the text stands for."""
    match = re.fullmatch(r"\[([^\[\]]+)\](?::([0-9]{1,5}))?|([^:\[\]]*):([0-9]{1,5})", text)
    host, port = (text, 0) if match is None else (match[1] or match[3], int(match[2] or match[4] or 0))
    try:
        if port > 65535 or not (host or port):
            raise ValueError
        return End(str(ip_network(host, strict=False)) if host else "", port)
    except ValueError:
        raise UsageError(
            f'{what} {text[:60]!r} is no address, network or port; write "192.0.2.7", "192.0.2.0/24", "192.0.2.7:80", "[2001:db8::7]:80" or ":80"'
        ) from None


def _compile(end: End | None) -> Callable[[Address | None], bool]:
    if end is None:
        return lambda _: True
    port = end.port
    if not end.network:
        return lambda address: address is not None and address[1] == port
    network: IPv4Network | IPv6Network = ip_network(end.network)
    if network.prefixlen == network.max_prefixlen:
        host = str(network.network_address)
        return lambda address: address is not None and address[0].partition("%")[0] == host and port in (0, address[1])

    def matches(address: Address | None) -> bool:
        return address is not None and port in (0, address[1]) and ip_address(address[0]) in network

    return matches


def _tell(connection: Connection, now: float) -> LivingConnection:
    upstream, target, source = connection.upstream, connection.target, connection.upstream_source
    return LivingConnection(
        id=f"{connection.identity:016x}",
        workload=connection.workload.name,
        state=connection.stage,
        age_s=round(now - connection.started, 3),
        source=format_address(connection.client),
        original_destination=format_address(connection.destination) if connection.destination else None,
        upstream=format_target(target) if target and upstream else None,
        upstream_source=format_address(source) if source else None,
        rule=connection.rule,
        sni=connection.hello.sni if connection.hello else None,
        bytes_from_client=connection.downstream.received,
        bytes_from_upstream=upstream.received if upstream else 0,
    )
