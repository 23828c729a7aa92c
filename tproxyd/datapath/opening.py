"""What stands before the client's own bytes: the PROXY header that a trusted client begins with, and the one that the server gets.

Knows one leg at a time and what is in its receive buffer; refuses to know what is decided by it (connection.py) and how long that is
waited for (loop.py). Looks with MSG_PEEK and takes no byte that is not a header's: whatever is there stays for who relays it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from tproxyd.datapath.client_hello import MOST_BYTES as MOST_HELLO_BYTES
from tproxyd.datapath.client_hello import NO_HELLO, ClientHello, read_client_hello
from tproxyd.datapath.proxy_header import (
    MOST_BYTES,
    InvalidHeaderError,
    ProxyHeader,
    make_v1,
    make_v2,
    parse_header,
)

if TYPE_CHECKING:
    from tproxyd.config import Network
    from tproxyd.datapath.transfer import Leg
    from tproxyd.net.sockets import Address

__all__ = [
    "HEADER_SECONDS",
    "InvalidHeaderError",
    "compile_networks",
    "make_header",
    "names_of",
    "peek_hello",
    "take_header",
]

HEADER_SECONDS = 3.0
"""How long a header is waited for. Whoever sends one does so at once, so it is late only where its packet was lost: the specification (2)
wants at least these seconds, for a retransmission, and "a few" at most."""

_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT


def compile_networks(networks: Sequence[Network]) -> Callable[[str], bool]:
    """One function that tells whether an address, as getpeername gives it, is in any of them."""
    by_family = {
        version: [(int(one.netmask), int(one.network_address)) for one in networks if one.version == version]
        for version in (4, 6)
    }

    def contains(host: str) -> bool:
        if ":" in host:
            value = int.from_bytes(socket.inet_pton(socket.AF_INET6, host.partition("%")[0]), "big")
            return any(value & mask == address for mask, address in by_family[6])
        value = int.from_bytes(socket.inet_pton(socket.AF_INET, host), "big")
        return any(value & mask == address for mask, address in by_family[4])

    return contains


def take_header(leg: Leg) -> ProxyHeader | None:
    """Reads the header at the beginning of the connection, and nothing behind it; None while it is not complete.

    Raises InvalidHeaderError, whose text tells why, when there is none and will be none; OSError when the client is gone.
    """
    try:
        data = leg.sock.recv(MOST_BYTES, _PEEK)
    except BlockingIOError:
        return None
    header = parse_header(data) if data else None
    if header is None:
        if leg.hup or not data:  # the FIN was seen before that look: more will not come
            raise InvalidHeaderError("it ended before its PROXY header was complete")
        return None
    hosts = [address[0] for address in (header.source, header.destination) if address is not None]
    if len({":" in host for host in hosts}) == 2:
        # Mapped IPv4 is IPv4, so one header can have both: no connection can, and the next hop could not be told of it.
        raise InvalidHeaderError("its PROXY header has one address of IPv4 and one of IPv6")
    leg.sock.recv(header.length, socket.MSG_DONTWAIT)
    # Epoll has told of what is behind it already, if it has come with it. A look ends where urgent data begins.
    leg.readable = len(data) > header.length or leg.hup or leg.doubtful
    return header


def peek_hello(leg: Leg) -> ClientHello | None:
    """The names in the client's first bytes, which stay where they are; NO_HELLO if these are no ClientHello, or will not be a whole one.
    None while that depends on bytes that are still to come."""
    try:
        data = leg.sock.recv(MOST_HELLO_BYTES, _PEEK)
    except BlockingIOError:
        return None
    except OSError:  # gone, as whoever reads will see
        return NO_HELLO
    leg.readable = True  # and who has looked may be told of it no more
    hello = read_client_hello(data) if data else NO_HELLO
    return NO_HELLO if hello is None and leg.hup else hello


def names_of(header: ProxyHeader) -> ClientHello | None:
    """What a header that came in says of the client's TLS, which may have ended at the proxy that sent it; None if nothing."""
    if header.authority is None and not header.alpn:
        return None
    return ClientHello(header.authority, (header.alpn,) if header.alpn else ())


def make_header(
    version: Literal["v1", "v2"], client: Address, destination: Address, identity: int, hello: ClientHello | None
) -> bytes:
    """The header for the server. Version 2 has the connection's id, and what is known of the names in the ClientHello."""
    if version == "v1":
        return make_v1(client, destination)
    sni, alpn = hello or NO_HELLO
    return make_v2(client, destination, alpn=alpn[0] if alpn else None, authority=sni, unique_id=f"{identity:016x}")
