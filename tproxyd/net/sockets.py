"""Every setsockopt of tproxyd, with its reason. Standard library only; knows nothing of policy, trio or netlink.

Addresses are the kernel's: what getsockname and getpeername gave is passed on as it is (a link-local IPv6 address keeps
its scope), and only `format_address` makes text of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import termios

__all__ = [
    "Address",
    "abort",
    "format_address",
    "open_listener",
    "open_upstream",
    "original_destination",
    "round_trip_seconds",
    "unsent_bytes",
]

Address = tuple[str, int] | tuple[str, int, int, int]
"""An IPv4 or IPv6 address as the socket module gives it."""


# Missing from Python's socket module (linux/in.h, linux/in6.h).
_IP_TRANSPARENT = getattr(socket, "IP_TRANSPARENT", 19)
_IPV6_TRANSPARENT = 75

_TCPI_RTT = 68  # offset of tcpi_rtt in struct tcp_info (linux/tcp.h)
_IP_BIND_ADDRESS_NO_PORT = getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24)


def open_listener(address: str, port: int, *, backlog: int) -> socket.socket:
    """A listening, transparent, non-blocking TCP socket on one address. The caller closes it.

    The address should be a loopback one: the tproxy statement finds the listener there, and the network cannot.
    Raises OSError: EADDRINUSE if the port is taken, EPERM without CAP_NET_RAW or CAP_NET_ADMIN.
    """
    family = _family(address)
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if family == socket.AF_INET6:
            # Else it would take IPv4 too, as ::ffff: addresses, and clash with the IPv4 listener.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # Connections of an earlier run in TIME_WAIT would else keep the port for a minute.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Before bind: also allows ::1 while IPv6 is switched off on lo.
        _set_transparent(sock)
        # Accepted sockets inherit both. An answer in small writes is the app's own choice; held back until the client's delayed
        # ACK, each of them would take 40 ms more.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # An urgent byte stays where it stands in the stream instead of getting lost.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        sock.bind((address, port))
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def original_destination(sock: socket.socket) -> Address:
    """Where the client wanted to go: a transparently accepted socket is bound to that very address."""
    name: Address = sock.getsockname()
    return name


def open_upstream(family: int, *, source: Address | None = None) -> socket.socket:
    """A non-blocking TCP socket for one upstream connection, not yet connected. The caller closes it.

    With `source` it is bound to that address, which may be foreign (the client's own); port 0 leaves the port to the kernel.
    Raises OSError: EADDRINUSE if that address and port cannot be had.
    """
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # Also without a foreign source: "transparent" is how the ruleset knows our sockets and keeps conntrack off them.
        _set_transparent(sock)
        # Small writes are the client's own choice; holding them back would add up to 40 ms to each exchange.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)  # as on the client's side
        if source is not None and source[1] == 0:
            # The port is chosen at connect, free for this destination; chosen at bind it would have to be free for all.
            sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
        if source is not None:
            # The client's port may be in TIME_WAIT here, from its connection before, or in use towards another destination.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(source)
    except BaseException:
        sock.close()
        raise
    return sock


def abort(sock: socket.socket) -> None:
    """Close with a reset instead of a FIN; what is still unsent is dropped. Never raises OSError."""
    with contextlib.suppress(OSError):  # the connection is gone already: closing is all that is left
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def round_trip_seconds(sock: socket.socket) -> float:
    """The kernel's estimate of the round-trip time to the peer."""
    (microseconds,) = struct.unpack_from("=I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 72), _TCPI_RTT)
    return float(microseconds) / 1e6


def unsent_bytes(sock: socket.socket) -> int:
    """Bytes that the peer has not acknowledged yet (SIOCOUTQ)."""
    return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0])


def format_address(address: Address) -> str:
    """`192.0.2.1:80` or `[2001:db8::1]:80`, as in the access log."""
    host, port = address[0], address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _set_transparent(sock: socket.socket) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
