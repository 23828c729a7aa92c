"""What other programs may have put into the kernel: near to ours in every name and number, and none of it ours."""

from __future__ import annotations

import socket
import struct

from tproxyd.testing import KernelState, Node

__all__ = ["add_extension_rule", "among_foreign", "plant_foreign", "plant_in_the_way", "transparent_listener"]

FOREIGN_TABLES = """
table inet foreign {
  set ports { type inet_service; flags interval; elements = { 80, 8000-8100 }; }
  chain in {
    type filter hook prerouting priority raw; policy accept;
    tcp dport @ports counter accept comment "theirs"
  }
}
table inet not_tproxyd {
  chain tproxyd {
    type filter hook prerouting priority -290; policy accept;
    meta mark set meta mark | 0x4000
  }
}
table ip tproxyd {
  chain c {
    tcp dport 8080 counter
  }
}
table ip6 tproxyd {
  chain c {
    tcp dport 8080 counter
  }
}
table bridge tproxyd {
  chain c {
    counter
  }
}
table inet tproxydaemon {
  chain c {
    counter
  }
}
"""
FOREIGN_ROUTING = [
    # Our priorities with other marks, tables, interfaces and protocols; our table number with a route that does no harm.
    "-4 rule add priority 5233 fwmark 0x100/0xf00 lookup 100",
    "-4 rule add priority 5234 from 198.51.100.0/24 lookup 101 protocol static",  # and nothing is in table 101
    "-4 rule add priority 5235 iif lo fwmark 0x8/0x8 lookup 102",
    "-6 rule add priority 5233 fwmark 0x100/0xf00 lookup 100",
    "-6 rule add priority 5235 to 2001:db8:77::/48 lookup 101 protocol 134",
    "-4 route add local 203.0.113.128/25 dev lo table 133 proto 132",
    "-4 route add local default dev lo table 100",
    "-6 route add local default dev lo table 100",
]
IN_THE_WAY = [
    # Refused at the start (test_collisions.py); who comes later finds ours, and is left alone, too.
    "-4 rule add priority 5234 fwmark 0x40/0xff lookup 133",
    "-4 rule add priority 6000 fwmark 0x1000000/0x3000000 lookup 133",
    "-4 rule add priority 5234 fwmark 0x1000000/0x3000000 lookup 133 protocol 3",  # equal to one of ours but for its protocol
    "-6 rule add priority 5234 fwmark 0x1000000/0x1000000 lookup 133",
    "-4 route add 198.51.100.0/28 dev eth0 table 133",
    "-6 route add 2001:db8:77::/48 dev eth0 table 133",
]


async def plant_foreign(node: Node) -> None:
    await node.run("nft", "-f", "-", input=FOREIGN_TABLES)
    for command in FOREIGN_ROUTING:
        await node.run("ip", *command.split())


async def among_foreign(node: Node) -> KernelState:
    """The foreign state at its fullest, and its dump, for what is expected in the end; then without what is in the way at a start."""
    await plant_foreign(node)
    await plant_in_the_way(node)
    full = await node.dump()
    for command in reversed(IN_THE_WAY):
        await node.run("ip", *command.replace(" add ", " del ").split())
    return full


async def plant_in_the_way(node: Node) -> None:
    for command in IN_THE_WAY:
        await node.run("ip", *command.split())


def add_extension_rule(kind: str, name: str, revision: int, info: bytes) -> None:
    """A rule in `ip mangle PREROUTING` as iptables-nft makes it, of one extension alone: the program need not be there."""

    def attribute(number: int, content: bytes, *, nested: bool = False) -> bytes:
        padded = content + bytes(-len(content) % 4)
        return struct.pack("=HH", 4 + len(content), number | (0x8000 if nested else 0)) + padded

    def message(kind: int, flags: int, family: int, resource: int, attributes: bytes = b"") -> bytes:
        body = struct.pack(">BBH", family, 0, resource) + attributes
        return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body

    data = attribute(1, name.encode() + b"\0") + attribute(2, struct.pack(">I", revision)) + attribute(3, info)
    expression = attribute(1, kind.encode() + b"\0") + attribute(2, data, nested=True)
    rule = attribute(1, b"mangle\0") + attribute(2, b"PREROUTING\0")
    rule += attribute(4, attribute(1, expression, nested=True), nested=True)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as sock:
        # NFNL_MSG_BATCH_BEGIN, NFT_MSG_NEWRULE (request, acknowledge, create, append), NFNL_MSG_BATCH_END.
        sock.send(message(16, 1, 0, 10) + message(10 << 8 | 6, 0xC05, 2, 0, rule) + message(17, 1, 0, 10))
        sock.settimeout(3)
        assert struct.unpack_from("=i", sock.recv(4096), 16)[0] == 0


def transparent_listener(address: tuple[str, int]) -> socket.socket:
    """On an address that need not be this host's."""
    ipv6 = ":" in address[0]
    sock = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET)
    try:
        sock.setsockopt(
            *((socket.IPPROTO_IPV6, 75) if ipv6 else (socket.SOL_IP, 19)), 1
        )  # IPV6_TRANSPARENT, IP_TRANSPARENT
        sock.bind(address)
        sock.listen()
    except BaseException:
        sock.close()
        raise
    return sock
