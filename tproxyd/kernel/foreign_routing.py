"""The ip rules and routes that are not ours, as far as they can meet what is: all rules, and the routes of single tables."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_network

import msgspec

from tproxyd.errors import KernelError, MissingError
from tproxyd.kernel.dumps import attributes, dump, number_in
from tproxyd.plan import PROTOCOL, Family

__all__ = ["ForeignRoute", "ForeignRule", "has_routes", "list_foreign_routes", "list_foreign_rules"]

Address = IPv4Address | IPv6Address

_AF: dict[Family, int] = {4: socket.AF_INET, 6: socket.AF_INET6}
_GETROUTE, _GETRULE = 26, 34  # linux/rtnetlink.h
_INVERT = 2  # FIB_RULE_INVERT, linux/fib_rules.h
# enum of FRA_ attributes, linux/fib_rules.h
_DST, _SRC, _IIF, _GOTO, _PRIORITY, _MARK, _TUN_ID = 1, 2, 3, 4, 6, 10, 12
_SUPPRESS, _TABLE, _MASK, _OIF, _L3MDEV, _UIDS, _PROTOCOL, _IP_PROTO, _SPORT, _DPORT = (
    14,
    15,
    16,
    17,
    19,
    20,
    21,
    22,
    23,
    24,
)
_TO_TABLE, _TO_GOTO, _NOP = 1, 2, 3  # FR_ACT_
_ACTIONS = {_NOP: "nop", 6: "blackhole", 7: "unreachable", 8: "prohibit"}
_TABLES = {253: "default", 254: "main", 255: "local"}
_PROTOCOLS = {2: "kernel", 4: "static", 16: "dhcp"}  # those that iproute2 has names for and people meet
_TYPES = {
    2: "local",
    3: "broadcast",
    4: "anycast",
    5: "multicast",
    6: "blackhole",
    7: "unreachable",
    8: "prohibit",
    9: "throw",
}
_EVERY_USER = struct.pack("=II", 0, 0xFFFFFFFF)
_RTN_LOCAL = 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_METRIC, _RTA_TABLE = 1, 4, 5, 6, 15
_RT_TABLE_LOCAL = 255
_IPPROTO_TCP = 6


class ForeignRule(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody else's ip rule. `line` is what `ip rule` shows, with numbers for tables; `ends` is whether it ends the look-up itself,
    `narrowed` whether it has a selector besides mark and iif (addresses, ports, users, ...), `suppressing` whether it ignores some results."""

    family: Family
    priority: int
    line: str
    mark: int = 0
    mask: int = 0
    inverted: bool = False
    iif: str | None = None
    oif: str | None = None
    ip_proto: int | None = None
    table: int | None = None
    goto: int | None = None
    ends: bool = False
    l3mdev: bool = False
    narrowed: bool = False
    suppressing: bool = False
    source: str | None = None
    destination: str | None = None
    source_ports: tuple[int, int] | None = None
    ports: tuple[int, int] | None = None

    @property
    def mark_bits(self) -> int:
        """The bits of packet marks that its owner uses: those of its mask, or without a mask those of the value."""
        return self.mark if self.mask == 0xFFFFFFFF else self.mask

    @property
    def selects_by_mark(self) -> bool:
        """Whether it is for packets alone that its owner has marked."""
        return self.mask != 0 and not self.inverted

    @property
    def can_take_tcp_that_arrives(self) -> bool:
        """Whether it may see a captured packet on its way in, by anything but the mark."""
        if self.table == _RT_TABLE_LOCAL:
            return False  # delivered to this host, which is what is wanted
        if self.inverted:
            return True
        return self.oif is None and self.iif != "lo" and self.ip_proto in (None, _IPPROTO_TCP)

    def selects(
        self,
        source: Address,
        destination: Address,
        source_port: int | None,
        port: int,
        interface: str | None,
        mark: int,
    ) -> bool:
        """Whether such a packet is one for it, as far as its addresses, TCP ports, interface and mark say."""
        matches = (
            (self.source is None or source in ip_network(self.source))
            and (self.destination is None or destination in ip_network(self.destination))
            and (self.source_ports is None or _is_between(source_port, self.source_ports))
            and (self.ports is None or _is_between(port, self.ports))
            and self.iif in (None, interface)
            and mark & self.mask == self.mark
        )
        return matches != self.inverted

    @property
    def can_take_answers(self) -> bool:
        """Whether it may see an answer of a local app to one of our sockets, by anything but the mark."""
        if self.table == _RT_TABLE_LOCAL:
            return False
        return self.inverted or (self.iif in (None, "lo") and self.ip_proto in (None, _IPPROTO_TCP))


class ForeignRoute(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody else's route. `delivers`: to this host, as ours does; `is_ours_but_for_protocol`: the kernel takes no second one."""

    family: Family
    line: str
    delivers: bool
    is_ours_but_for_protocol: bool


def list_foreign_rules() -> list[ForeignRule]:
    """All ip rules without our protocol, both families, in the kernel's order. MissingError where the kernel has no ip rules."""
    return [
        rule
        for family in _AF
        for body in _dump(_GETRULE, struct.pack("=B11x", _AF[family]), family)
        if (rule := _rule(family, body)) is not None
    ]


def list_foreign_routes(table: int) -> Iterator[ForeignRoute]:
    """The routes of one table without our protocol, both families."""
    for family in _AF:
        for body in _table(family, table):
            if body[5] != PROTOCOL:
                yield _route(family, table, body)


def has_routes(family: Family, table: int) -> bool:
    """Whether a look-up in this table can have a result."""
    return any(True for _ in _table(family, table))


def _table(family: Family, table: int) -> Iterator[bytes]:
    # struct rtmsg, and RTA_TABLE.
    return _dump(_GETROUTE, struct.pack("=B11xHHI", _AF[family], 8, _RTA_TABLE, table), family)


def _dump(kind: int, request: bytes, family: Family) -> Iterator[bytes]:
    try:
        yield from dump(socket.NETLINK_ROUTE, kind, request)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return  # no such table
        if error.errno in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
            if family == 6:
                return  # a kernel without IPv6
            raise MissingError(
                "this kernel has no policy routing (ip rules): use one that is built with CONFIG_IP_MULTIPLE_TABLES"
            ) from error
        raise KernelError(f"cannot list the ip rules and routes of other programs: {error.strerror}") from error


def _rule(family: Family, body: bytes) -> ForeignRule | None:
    _, dst_len, src_len, tos, table8, _, _, action, flags = struct.unpack_from("=8BI", body)
    has = attributes(body[12:])
    if has.get(_PROTOCOL, b"\0")[0] == PROTOCOL:
        return None
    mark, mask = number_in(has, _MARK), number_in(has, _MASK)
    iif, oif = _text(has, _IIF), _text(has, _OIF)
    table = number_in(has, _TABLE) if _TABLE in has else table8
    goto = number_in(has, _GOTO) if action == _TO_GOTO else None
    l3mdev = _L3MDEV in has and has[_L3MDEV] != b"\0"
    ip_proto = has[_IP_PROTO][0] if _IP_PROTO in has else None
    priority = number_in(has, _PRIORITY)
    suppress = struct.unpack("=i", has.get(_SUPPRESS, b"\xff" * 4))[0]
    narrowed = bool(src_len or dst_len or tos or flags & _INVERT or oif) or any(
        kind in has for kind in (_IP_PROTO, _SPORT, _DPORT, _TUN_ID)
    )
    narrowed = narrowed or has.get(_UIDS, _EVERY_USER) != _EVERY_USER
    words = [f"{priority}:", *(["not"] if flags & _INVERT else [])]
    words.append(f"from {_network(family, has.get(_SRC), src_len)}")
    if dst_len:
        words.append(f"to {_network(family, has.get(_DST), dst_len)}")
    if tos:
        words.append(f"tos {tos:#x}")
    if mask:
        words.append(f"fwmark {mark:#x}" + ("" if mask == 0xFFFFFFFF else f"/{mask:#x}"))
    words += [f"iif {iif}"] * bool(iif) + [f"oif {oif}"] * bool(oif)
    if _UIDS in has:
        words.append("uidrange {}-{}".format(*struct.unpack("=II", has[_UIDS])))
    if ip_proto is not None:
        words.append(f"ipproto {'tcp' if ip_proto == _IPPROTO_TCP else ip_proto}")
    for name, kind in (("sport", _SPORT), ("dport", _DPORT)):
        if (ports := _ports(has, kind)) is not None:
            first, last = ports
            words.append(f"{name} {first}" if first == last else f"{name} {first}-{last}")
    if _TUN_ID in has:
        words.append(f"tun_id {int.from_bytes(has[_TUN_ID], 'big')}")
    if l3mdev:
        words.append("lookup [l3mdev-table]")
    elif action == _TO_TABLE:
        words.append(f"lookup {_TABLES.get(table, table)}")
        if suppress >= 0:
            words.append(f"suppress_prefixlength {suppress}")
    else:
        words.append(f"goto {goto}" if goto is not None else _ACTIONS.get(action, f"action {action}"))
    words += _proto(has.get(_PROTOCOL, b"\0")[0], unsaid=(0, 2, 3))
    return ForeignRule(
        family=family,
        priority=priority,
        line=" ".join(words),
        mark=mark,
        mask=mask,
        inverted=bool(flags & _INVERT),
        iif=iif,
        oif=oif,
        ip_proto=ip_proto,
        table=table if action == _TO_TABLE and not l3mdev else None,
        goto=goto,
        ends=action not in (_TO_TABLE, _TO_GOTO, _NOP),
        l3mdev=l3mdev,
        narrowed=narrowed,
        suppressing=suppress >= 0,
        source=_network(family, has.get(_SRC), src_len) if src_len else None,
        destination=_network(family, has.get(_DST), dst_len) if dst_len else None,
        source_ports=_ports(has, _SPORT),
        ports=_ports(has, _DPORT),
    )


def _route(family: Family, table: int, body: bytes) -> ForeignRoute:
    _, dst_len, _, _, _, protocol, _, kind, _ = struct.unpack_from("=8BI", body)
    has = attributes(body[12:])
    words = [_TYPES[kind]] if kind in _TYPES else []
    words.append(_network(family, has.get(_RTA_DST), dst_len) if dst_len else "default")
    if _RTA_GATEWAY in has:
        words.append(f"via {socket.inet_ntop(_AF[family], has[_RTA_GATEWAY])}")
    device = _device(number_in(has, _RTA_OIF))
    if device:
        words.append(f"dev {device}")
    metric = number_in(has, _RTA_METRIC)
    usual = 1024 if family == 6 else 0
    ours = kind == _RTN_LOCAL and not dst_len and device == "lo" and metric in (0, usual)
    words += [f"table {table}", *_proto(protocol)] + ([] if metric in (0, usual) else [f"metric {metric}"])
    return ForeignRoute(family=family, line=" ".join(words), delivers=kind == _RTN_LOCAL, is_ours_but_for_protocol=ours)


def _proto(number: int, *, unsaid: tuple[int, ...] = (0, 3)) -> list[str]:
    # 3 is boot, what `ip` stamps by default; it does not show that, nor the kernel's own of rules.
    return [] if number in unsaid else [f"proto {_PROTOCOLS.get(number, number)}"]


def _ports(has: dict[int, bytes], kind: int) -> tuple[int, int] | None:
    if kind not in has:
        return None
    first, last = struct.unpack("=HH", has[kind])
    return first, last


def _is_between(port: int | None, ports: tuple[int, int]) -> bool:
    return port is not None and ports[0] <= port <= ports[1]


def _text(has: dict[int, bytes], kind: int) -> str | None:
    return has[kind].rstrip(b"\0").decode(errors="replace") if kind in has else None


def _network(family: Family, address: bytes | None, length: int) -> str:
    if address is None or not length:
        return "all"
    text = socket.inet_ntop(_AF[family], address)
    return text if length == len(address) * 8 else f"{text}/{length}"


def _device(index: int) -> str | None:
    try:
        return socket.if_indextoname(index) if index else None
    except OSError:
        return f"if{index}"
