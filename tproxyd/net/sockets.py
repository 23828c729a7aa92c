"""Every setsockopt of tproxyd, with its reason. Standard library only; knows nothing of policy, trio or netlink.

Addresses are the kernel's: what getsockname and getpeername gave is passed on as it is (a link-local IPv6 address keeps
its scope), and only `format_address` makes text of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import select
import socket
import struct
import sys
import termios
from collections.abc import Sequence
from typing import Protocol

__all__ = [
    "KEEPALIVE_IDLE",
    "KEEPALIVE_INTERVAL",
    "RECEIVE_BUFFER",
    "USER_TIMEOUT",
    "Address",
    "abort",
    "accepted_socket",
    "adopt_upstream",
    "answer_at_once",
    "bound_receive_buffer",
    "can_share_ports",
    "equip_listener",
    "filter_messages",
    "format_address",
    "format_target",
    "has_waiting",
    "listening_address",
    "open_listener",
    "open_unix_upstream",
    "open_upstream",
    "original_destination",
    "redirected_destination",
    "reset_on_close",
    "round_trip_seconds",
    "send_at_once",
    "source_towards",
    "spread_by_source",
    "unsent_bytes",
    "wait_for_reader",
    "watch_peer",
]

Address = tuple[str, int] | tuple[str, int, int, int]
"""An IPv4 or IPv6 address as the socket module gives it."""


# Missing from Python's socket module (linux/in.h, linux/in6.h).
_IP_TRANSPARENT = getattr(socket, "IP_TRANSPARENT", 19)
_IPV6_TRANSPARENT = 75

KEEPALIVE_IDLE = 60
"""Seconds of silence before the first probe."""
KEEPALIVE_INTERVAL = 15
"""Seconds between probes."""
USER_TIMEOUT = 120
"""Seconds after which an unanswered probe or unacknowledged data ends the connection: four probes, and most roads' worst outage."""

RECEIVE_BUFFER = 6 * 1024 * 1024
"""Bytes that a connection may have in a receive buffer while it stalls: what Linux gives at most by default (net.ipv4.tcp_rmem)."""

_SO_ATTACH_FILTER, _SO_ATTACH_REUSEPORT_CBPF = 26, 51  # asm-generic/socket.h
_SO_ORIGINAL_DST = (
    80  # linux/netfilter_ipv4.h; IP6T_SO_ORIGINAL_DST of linux/netfilter_ipv6/ip6_tables.h is the same number
)
_SOCKADDR_IN = struct.Struct("!2xH4s8x")  # family, port, address (linux/in.h)
_SOCKADDR_IN6 = struct.Struct(
    "!2xH4x16s4s"
)  # family, port, flow, address, scope, which is in the host's order (linux/in6.h)
_SKF_NET_OFF = 0xFFF00000  # linux/filter.h: -0x100000, from here on offsets count from the network header
_TCPI_UNACKED = 24  # offset of tcpi_unacked in struct tcp_info (linux/tcp.h)
_TCPI_RTT = 68  # offset of tcpi_rtt in struct tcp_info (linux/tcp.h)
_IP_BIND_ADDRESS_NO_PORT = getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24)
_IP_LOCAL_PORT_RANGE = 51  # linux/in.h; not in the socket module
_PORT_RANGE = struct.Struct("=I")  # the last port in the upper half


def open_listener(
    address: str, port: int, *, backlog: int | None, shared: bool = False, transparent: bool = True
) -> socket.socket:
    """A listening, non-blocking TCP socket on one address, by default a transparent one; without a backlog it is only bound. The caller closes it.

    The address should be a loopback one: the tproxy statement finds the listener there, and the network cannot. NAT's `redirect` finds only
    one on every address, which need not be transparent. `shared` lets others like it listen on the same address, and the kernel spreads connections over them (SO_REUSEPORT); all of them must be.
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
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Before bind: also allows ::1 while IPv6 is switched off on lo.
        equip_listener(sock, transparent=transparent)
        sock.bind((address, port))
        if backlog is not None:
            sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def equip_listener(sock: socket.socket, *, transparent: bool = True) -> None:
    """Makes one that somebody else has opened what `open_listener` opens, as far as that can still be done. Raises OSError."""
    if transparent:
        _set_transparent(sock)
    # Accepted sockets inherit all that follows, which saves its cost for each of them. An answer in small writes is the app's
    # own choice; held back until the client's delayed ACK, each of them would take 40 ms more.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # An urgent byte stays where it stands in the stream instead of getting lost.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    watch_peer(sock)


def listening_address(sock: socket.socket) -> Address | None:
    """Where a TCP socket listens; None if it is no such socket, or does not listen."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        return None
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return None
    name: Address = sock.getsockname()
    return name


def has_waiting(listener: socket.socket) -> bool:
    """Whether a connection waits there to be accepted."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return bool(poll.poll(0))


def spread_by_source(listener: socket.socket, members: int) -> None:
    """Lets the kernel choose among `members` shared listeners of one address by the client's address alone, so that all
    connections of one client come to the same. Called on any one of them, after all of them listen."""
    words = [8, 12, 16, 20] if listener.family == socket.AF_INET6 else [12]  # where the source address stands
    # Classic BPF on the packet: A ^= next word of the source address; return A % members (linux/filter.h).
    program = [(0x20, 0, 0, _SKF_NET_OFF + words[0])]  # ld [net + word]
    for word in words[1:]:
        program += [
            (0x07, 0, 0, 0),  # tax
            (0x20, 0, 0, _SKF_NET_OFF + word),  # ld [net + word]
            (0xAC, 0, 0, 0),  # xor x
        ]
    program += [
        (0x07, 0, 0, 0),  # tax: fold the halves, because networks differ in their last bits and hosts in the others
        (0x74, 0, 0, 16),  # rsh 16
        (0xAC, 0, 0, 0),  # xor x
        (0x94, 0, 0, members),  # mod members
        (0x16, 0, 0, 0),  # ret a
    ]
    _attach(listener, _SO_ATTACH_REUSEPORT_CBPF, program)


def filter_messages(sock: socket.socket, program: Sequence[tuple[int, int, int, int]]) -> None:
    """Lets the socket receive only what this classic BPF program (linux/filter.h: code, jump if true, jump if false, constant) returns a
    length for."""
    _attach(sock, _SO_ATTACH_FILTER, program)


def _attach(sock: socket.socket, option: int, program: Sequence[tuple[int, int, int, int]]) -> None:
    buffer = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("HL", len(program), ctypes.addressof(buffer)))


def original_destination(sock: socket.SocketType) -> Address:
    """Where the client wanted to go: a transparently accepted socket is bound to that very address."""
    name: Address = sock.getsockname()
    return name


def redirected_destination(sock: socket.SocketType) -> Address:
    """Where the client wanted to go, of a connection that NAT has brought here: conntrack remembers.

    Where it knows nothing of the connection, nothing was changed (or forgotten since), and it is the address that the socket is bound to.
    """
    try:
        if sock.family == socket.AF_INET6:
            data = sock.getsockopt(socket.IPPROTO_IPV6, _SO_ORIGINAL_DST, _SOCKADDR_IN6.size)
            port, address, scope = _SOCKADDR_IN6.unpack(data)
            return socket.inet_ntop(socket.AF_INET6, address), port, 0, int.from_bytes(scope, sys.byteorder)
        port, address = _SOCKADDR_IN.unpack(sock.getsockopt(socket.IPPROTO_IP, _SO_ORIGINAL_DST, _SOCKADDR_IN.size))
        return socket.inet_ntop(socket.AF_INET, address), port
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOPROTOOPT):  # no such connection, no conntrack
            raise
        return original_destination(sock)


def accepted_socket(family: int, fd: int) -> socket.SocketType:
    """The socket of an accepted descriptor, blocking: use it with MSG_DONTWAIT. Half the cost of `socket.accept`."""
    return socket.SocketType(family, socket.SOCK_STREAM, 0, fd)


def can_share_ports() -> bool:
    """Whether this kernel has what `open_upstream` needs for a `shared` port: Linux 6.3."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        try:
            sock.setsockopt(socket.IPPROTO_IP, _IP_LOCAL_PORT_RANGE, _PORT_RANGE.pack(0))
        except OSError:
            return False
        return True


def open_upstream(
    family: int, *, source: Address | None = None, transparent: bool = True, shared: bool = False
) -> socket.SocketType:
    """A non-blocking TCP socket for one upstream connection, not yet connected. The caller closes it.

    With `source` it is bound to that address, which may be foreign (the client's own) if it is `transparent`; port 0 leaves the port to the
    kernel. A `shared` port, of ip_local_port_range, is taken at connect and for this destination alone (EADDRNOTAVAIL if it cannot be had, also
    if it is in TIME_WAIT); else nobody's connect() on this host is given that port until the socket is gone.
    Raises OSError: EADDRINUSE if that address and port cannot be had.
    """
    sock = socket.SocketType(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if transparent:
            # Also without a foreign source: it is how the ruleset knows our sockets and keeps conntrack off them.
            _set_transparent(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)  # as on the client's side
        # A port may be in TIME_WAIT here, from a connection before, or in use towards another destination.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if source is not None:
            if shared:
                sock.setsockopt(socket.IPPROTO_IP, _IP_LOCAL_PORT_RANGE, _PORT_RANGE.pack(source[1] * 0x10001))
                source = (source[0], 0, *source[2:])
            if source[1] == 0:
                # The port is chosen at connect, free for this destination; chosen at bind it would have to be free for all.
                sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind(source)
        # The ACK of the server's SYN-ACK waits for the first bytes and goes with them: a packet less. Undone by `answer_at_once`,
        # without which answers would be acknowledged 40 ms late and stall whoever writes twice before reading.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
    except BaseException:
        sock.close()
        raise
    return sock


def source_towards(target: Address) -> str:
    """The address of this host that a connection to there gets of the kernel. Raises OSError where there is no way."""
    with socket.socket(socket.AF_INET6 if ":" in target[0] else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(target)  # sends nothing
        host: str = sock.getsockname()[0]
        return host


def open_unix_upstream() -> socket.SocketType:
    """A non-blocking Unix stream socket, not yet connected. The caller closes it."""
    sock = socket.SocketType(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)  # also these have urgent bytes, since Linux 5.15
    except BaseException:
        sock.close()
        raise
    return sock


def adopt_upstream(sock: socket.SocketType) -> tuple[Address | str | None, Address | None]:
    """Of a connected stream socket that somebody else has opened: who is there, and as whom it was reached. None for what has no name, or has gone."""
    peer: Address | str | bytes | None = None
    own: Address | None = None
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)  # as `open_upstream` has it
        peer = sock.getpeername()
        if sock.family == socket.AF_UNIX:
            return (peer or None) if isinstance(peer, str) else None, None
        own = _unmapped(sock.getsockname())
    return _unmapped(peer) if isinstance(peer, tuple) else None, own


def _unmapped(address: Address) -> Address:
    """An IPv4 address as one, also where a socket of IPv6 has it."""
    host = address[0]
    return (host[7:], address[1]) if host.startswith("::ffff:") and "." in host else address


def answer_at_once(sock: socket.SocketType) -> None:
    """Sends the ACK that `open_upstream` holds back, if no data has taken it along by now."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def send_at_once(sock: socket.SocketType) -> None:
    """Small writes are the client's own choice; holding them back would add up to 40 ms to each exchange."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def watch_peer(sock: socket.SocketType) -> None:
    """Lets the kernel find out that a peer has vanished: probes when nothing moves, an end to retransmissions when nothing is
    answered. Either ends the connection with ETIMEDOUT after about two minutes."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT * 1000)


def bound_receive_buffer(sock: socket.SocketType) -> None:
    """Takes a receive buffer back to RECEIVE_BUFFER that the kernel has let grow beyond it.

    For a sender whose data is not taken on the other side at the moment. Read in large pieces, a socket is given a buffer by the rate of
    its first milliseconds: 12 MiB were seen with net.ipv4.tcp_rmem up to 32 MiB, all of which such a sender would fill.
    """
    if sock.family != socket.AF_UNIX and sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) > RECEIVE_BUFFER:
        # The kernel doubles what is asked for, and gives no more than twice net.core.rmem_max: 8 MiB where tcp_rmem has 32 (seen on 6.18), and 416 KiB
        # where it has 6, and only who has raised that comes here. To force it takes CAP_NET_ADMIN, which no relay process is to have.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER // 2)
        # What was under way for the larger one is dropped, and a reset behind it is beyond the window: Linux discards that without a
        # word (seen once in thirty such resets). So it is asked every second whether such a sender is still there.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)


def wait_for_reader(sock: socket.SocketType, seconds: float) -> bool:
    """Gives a peer whose window is closed, but who answers the probes, `seconds` instead of the two minutes of `watch_peer`.

    With TCP_USER_TIMEOUT Linux ends a connection also when its peer lives and just does not read (tried on 6.18). Does
    nothing, and gives False, while sent bytes are not acknowledged: then the peer may be gone.
    """
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCPI_UNACKED + 4)
    if struct.unpack_from("=I", info, _TCPI_UNACKED)[0]:
        return False
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, min(int(seconds * 1000), 0x7FFFFFFF))
    return True


def abort(sock: socket.SocketType) -> None:
    """Close with a reset instead of a FIN; what is still unsent is dropped. Never raises OSError."""
    with contextlib.suppress(OSError):  # the connection is gone already: closing is all that is left
        reset_on_close(sock)
    sock.close()


class HasOptions(Protocol):
    """A socket, of the socket module or of trio's."""

    def setsockopt(self, level: int, optname: int, value: bytes, /) -> None: ...


def reset_on_close(sock: HasOptions) -> None:
    """Lets the close of the last copy of this socket be a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def round_trip_seconds(sock: socket.SocketType) -> float:
    """The kernel's estimate of the round-trip time to the peer."""
    (microseconds,) = struct.unpack_from("=I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 72), _TCPI_RTT)
    return float(microseconds) / 1e6


def unsent_bytes(sock: socket.SocketType) -> int:
    """Bytes that the peer has not acknowledged yet (SIOCOUTQ)."""
    return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0])


def format_address(address: Address) -> str:
    """`192.0.2.1:80` or `[2001:db8::1]:80`, as in the access log."""
    host, port = address[0], address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def format_target(target: Address | str) -> str:
    """The same of what is dialled: an address, or the path of a Unix socket."""
    return f"unix:{target}" if isinstance(target, str) else format_address(target)


def _set_transparent(sock: socket.SocketType) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
