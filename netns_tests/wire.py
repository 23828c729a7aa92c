"""What passes through a node, with the kernel's times of it: by them a test tells how long the daemon took, and not how long itself.

Knows TCP and the ICMP errors about it, and a client's connection that comes to nothing.
"""

from __future__ import annotations

import errno
import itertools
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import trio

from tproxyd.net.sockets import format_address
from tproxyd.testing import Node
from tproxyd.testing.daemon import LabDaemon

__all__ = ["Attempt", "Packet", "Wiretap", "attempt", "since_it_was_there", "since_it_was_told"]

_RST, _ACK = 0x04, 0x10
_ports = itertools.count(20001)  # never twice, so that a record is nobody else's; below those that the kernel chooses

_EVERY_PROTOCOL = 0x0003  # ETH_P_ALL
_TIMESTAMPS = 35  # SO_TIMESTAMPNS, which is also the kind of message that brings one
_FORCED_BUFFER, _BUFFER = 33, 16 << 20  # SO_RCVBUFFORCE
_UNREACHABLE = {1: 3, 58: 1}  # the type of such an error, by protocol: ICMP, ICMPv6


class Packet(NamedTuple):
    """TCP, or an error about it: then `flags` is 0, and `source` and `target` are those of the packet that it is about. `at` in seconds;
    `sent`: on its way out, and not in."""

    at: float
    interface: str
    sent: bool
    source: tuple[str, int]
    target: tuple[str, int]
    flags: int


class Wiretap:
    """Everything on every interface of the node, in order. Close it."""

    def __init__(self, node: Node) -> None:
        self._sock = node.open_socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_EVERY_PROTOCOL))
        self._sock.setblocking(False)
        self._sock.setsockopt(socket.SOL_SOCKET, _FORCED_BUFFER, _BUFFER)
        self._sock.setsockopt(socket.SOL_SOCKET, _TIMESTAMPS, 1)
        self._until_it_keeps_time(node)

    def __enter__(self) -> Wiretap:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def _until_it_keeps_time(self, node: Node) -> None:
        """The kernel begins to note times a moment after the first socket has asked for them. A packet without has that of its reading."""
        with node.open_socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            while True:
                sock.sendto(b"", ("127.0.0.1", 9))
                began = time.time()
                _, told, _, _ = self._sock.recvmsg(256, 256)
                if _seconds(told) < began:
                    return

    def heard(self) -> list[Packet]:
        """What has passed since it was asked last."""
        packets: list[Packet] = []
        while True:
            try:
                data, told, _, address = self._sock.recvmsg(256, 256)
            except BlockingIOError:
                return packets
            ends = _ends(data)
            if ends is not None:
                sent = address[2] == socket.PACKET_OUTGOING
                packets.append(Packet(_seconds(told), address[0], sent, *ends))


def _seconds(told: list[tuple[int, int, bytes]]) -> float:
    seconds, nanoseconds = next(struct.unpack("@ll", content) for _, kind, content in told if kind == _TIMESTAMPS)
    return float(seconds + nanoseconds / 1e9)


def _ends(data: bytes) -> tuple[tuple[str, int], tuple[str, int], int] | None:
    if data[0] >> 4 == 4:
        protocol, source, target, rest = data[9], data[12:16], data[16:20], data[(data[0] & 15) * 4 :]
        family = socket.AF_INET
    elif data[0] >> 4 == 6:
        protocol, source, target, rest = data[6], data[8:24], data[24:40], data[40:]
        family = socket.AF_INET6
    else:
        return None  # ARP
    if protocol in _UNREACHABLE:
        about = _ends(rest[8:]) if rest[0] == _UNREACHABLE[protocol] else None
        return (*about[:2], 0) if about is not None else None
    if protocol != socket.IPPROTO_TCP:
        return None
    ports = struct.unpack_from("!HH", rest)
    hosts = [socket.inet_ntop(family, host) for host in (source, target)]
    return (hosts[0], ports[0]), (hosts[1], ports[1]), rest[13] if len(rest) > 13 else 0


class Attempt(NamedTuple):
    """A connection that was reset, as client and wire saw it; the record is the daemon's."""

    client: tuple[str, int]
    dialled: tuple[str, int]
    record: dict[str, Any]


async def attempt(node: Node, daemon: LabDaemon, address: str, port: int = 8080, *, source_port: int = 0) -> Attempt:
    """Asserts that the handshake succeeds, and that then nothing but a reset comes."""
    own = (node.v6 if ":" in address else node.v4, source_port or next(_ports))
    number: int | None = 0
    try:
        with trio.fail_after(5):
            async with await node.connect(address, port, source_port=own[1]) as stream:
                await stream.receive_some()  # an orderly end leaves the number as it is
    except trio.BrokenResourceError as error:
        number = error.__cause__.errno if isinstance(error.__cause__, OSError) else None
    except OSError as error:  # the reset came before connect() had returned
        number = error.errno
    assert number == errno.ECONNRESET
    return Attempt(own, (address, port), await daemon.record(format_address(own)))


def _goodbye(packets: Sequence[Packet], one: Attempt) -> Packet:
    """The reset that leaves for the client."""
    return next(
        packet
        for packet in packets
        if packet.sent
        and packet.interface == "eth0"
        and packet.flags & _RST
        and packet[3:5] == (one.dialled, one.client)
    )


def since_it_was_told(packets: Sequence[Packet], one: Attempt, target: tuple[str, int]) -> float:
    """Seconds from the last word of or about the upstream to the client's reset."""
    end = _goodbye(packets, one)
    words = [
        packet.at
        for packet in packets
        if packet.at < end.at
        and ((packet.flags & _RST and packet.source == target) or (not packet.flags and packet.target == target))
    ]
    return end.at - words[-1]


def since_it_was_there(packets: Sequence[Packet], one: Attempt) -> float:
    """Seconds from the end of the client's handshake to its reset."""
    begin = next(packet for packet in packets if packet[3:] == (one.client, one.dialled, _ACK))
    return _goodbye(packets, one).at - begin.at
