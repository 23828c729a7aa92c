"""ip rules and local routes, each change a netlink message of its own.

Only what is stamped with our protocol is looked at or deleted; the stamp is part of every request. Not through pyroute2: it takes a
third of a daemon's start to load, and 24 MB, for four kinds of messages of some fixed fields; and it would read every route of a full
table before it filters, for seconds. (It makes the doctor's probe, which needs much more of netlink: probe_link.py.)
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from itertools import starmap
from typing import NamedTuple

from tproxyd.errors import CapabilityError, KernelError, TproxydError
from tproxyd.kernel.dumps import ask, attribute, attributes, dump_all, number_in
from tproxyd.plan import PROTOCOL, LocalRoute, Rule

__all__ = [
    "RouteKey",
    "RuleKey",
    "add_route",
    "add_rule",
    "delete_route",
    "delete_rule",
    "describe_rule",
    "dump_routes",
    "dump_rules",
    "refusal",
    "route_key",
    "rule_key",
]


class RuleKey(NamedTuple):
    """An ip rule as compared; with neither `table` nor `goto` it is an `unreachable` one. `raw` is the whole message of one that has anything besides: such a rule is none of a plan's."""

    family: int
    priority: int
    mark: int
    mask: int
    iif: str | None
    table: int | None
    goto: int | None
    source: str | None = None
    tcp: bool = False
    raw: bytes = b""


class RouteKey(NamedTuple):
    """A local default route as compared. `raw` is the whole message of one that is not simply through lo."""

    family: int
    table: int
    raw: bytes = b""


_AF = {4: socket.AF_INET, 6: socket.AF_INET6}
_GETROUTE, _GETRULE = 26, 34  # linux/rtnetlink.h
_LOOPBACK = 1  # the index of lo, in every namespace
_FR_ACT_TO_TABLE, _FR_ACT_GOTO, _FR_ACT_UNREACHABLE = 1, 2, 7
_U32 = struct.Struct("=I")
_RTN_LOCAL = 2
_RTA_DST, _RTA_OIF, _RTA_PRIORITY, _RTA_TABLE, _RTA_CACHEINFO, _RTA_PREF = 1, 4, 6, 15, 12, 20
_METRIC = {4: 0, 6: 1024}  # what a route has of which nothing is said
# FRA_ attributes, linux/fib_rules.h
_SRC, _IIF, _GOTO, _PRIORITY, _MARK, _SUPPRESS, _TABLE, _MASK, _PROTOCOL, _IP_PROTO = 2, 3, 4, 6, 10, 14, 15, 16, 21, 22
_INVERT = 2  # FIB_RULE_INVERT
_NEWROUTE, _DELROUTE, _NEWRULE, _DELRULE = 24, 25, 32, 33
_CREATE = 0x600  # NLM_F_CREATE | NLM_F_EXCL
_EXISTS = (
    "somebody else has put an equal one there (see `ip rule` and `ip route show table all`); remove it, or choose another "
    "routing.table, routing.priority or routing.mark"
)
_RT_SCOPE_HOST = 254  # what an IPv4 local route has, on add and on delete; IPv6 has no scopes


def rule_key(rule: Rule) -> RuleKey:
    """What of a planned rule is compared with the kernel's."""
    value, mask = (rule.mark.value, rule.mark.mask) if rule.mark is not None else (0, 0)
    return RuleKey(rule.family, rule.priority, value, mask, rule.iif, rule.table, rule.goto, rule.source, rule.tcp)


def route_key(route: LocalRoute) -> RouteKey:
    """What of a planned route is compared with the kernel's."""
    return RouteKey(route.family, route.table)


def dump_rules() -> tuple[RuleKey, ...]:
    """Our ip rules, in the kernel's order."""
    keys = []
    for family, af in _AF.items():
        for body in _dump(_GETRULE, struct.pack("=B11x", af)):
            has = attributes(body[12:])
            if number_in(has, _PROTOCOL) != PROTOCOL:
                continue
            action = body[7]
            key = RuleKey(
                family,
                number_in(has, _PRIORITY),
                number_in(has, _MARK),
                number_in(has, _MASK),
                has[_IIF].rstrip(b"\0").decode(errors="replace") if _IIF in has else None,
                number_in(has, _TABLE) if action == _FR_ACT_TO_TABLE else None,
                number_in(has, _GOTO) if action == _FR_ACT_GOTO else None,
                _network(af, has[_SRC], body[2]) if body[2] and _SRC in has else None,
                number_in(has, _IP_PROTO) == socket.IPPROTO_TCP,
            )
            keys.append(key if _is_plain_rule(body, has) else key._replace(raw=body))
    return tuple(keys)


def _is_plain_rule(body: bytes, has: dict[int, bytes]) -> bool:
    """Whether a key says all of it: no address, port, user, inversion or the like besides."""
    _, dst_len, _, tos, _, _, _, action, flags = struct.unpack_from("=8BI", body)  # struct fib_rule_hdr
    known = {_SRC, _IIF, _GOTO, _PRIORITY, _MARK, _TABLE, _MASK, _PROTOCOL, _IP_PROTO}
    return (
        not (dst_len or tos or flags & _INVERT)
        and action in (_FR_ACT_TO_TABLE, _FR_ACT_GOTO, _FR_ACT_UNREACHABLE)
        and number_in(has, _IP_PROTO) in (0, socket.IPPROTO_TCP)
        and has.keys() - known <= {_SUPPRESS}
        and has.get(_SUPPRESS, b"\xff" * 4) == b"\xff" * 4
    )


def dump_routes() -> tuple[RouteKey, ...]:
    """Our local default routes, in milliseconds beside a full routing table."""
    keys = []
    for family, af in _AF.items():
        for body in _dump(_GETROUTE, struct.pack("=B4xB6x", af, PROTOCOL)):  # struct rtmsg
            if body[5] != PROTOCOL or body[7] != _RTN_LOCAL or body[1]:
                continue
            has = attributes(body[12:])
            plain = (
                has.keys() <= {_RTA_DST, _RTA_OIF, _RTA_PRIORITY, _RTA_TABLE, _RTA_CACHEINFO, _RTA_PREF}
                and number_in(has, _RTA_OIF) == _LOOPBACK
                and number_in(has, _RTA_PRIORITY) == _METRIC[family]
            )
            keys.append(RouteKey(family, number_in(has, _RTA_TABLE), b"" if plain else body))
    return tuple(keys)


def _dump(kind: int, request: bytes) -> list[bytes]:
    """What the kernel has of one family; nothing where it has not the family, nor has ever seen the table."""
    try:
        return dump_all(socket.NETLINK_ROUTE, kind, request)
    except OSError as error:
        if error.errno in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.ENOENT):
            return []
        what = "ip rules" if kind == _GETRULE else "routes"
        raise KernelError(f"cannot list {what}: {error.strerror}; is the machine out of files or memory?") from error


def add_rule(key: RuleKey) -> None:
    """Adds one rule; an equal one with another protocol, somebody else's, is another rule to the kernel."""
    _change(f"add ip rule {describe_rule(key)}", _NEWRULE, key.raw or _rule_message(key), _CREATE)


def delete_rule(key: RuleKey) -> None:
    """Deletes one rule of ours; fine if it is gone already."""
    _change(f"delete ip rule {describe_rule(key)}", _DELRULE, key.raw or _rule_message(key))


def add_route(key: RouteKey) -> None:
    """Adds one local default route. Raises KernelError if the table has an equal one of somebody else."""
    step = f"add the IPv{key.family} local route to table {key.table}"
    _change(step, _NEWROUTE, key.raw or _route_message(key), _CREATE)


def delete_route(key: RouteKey) -> None:
    """Deletes one local default route of ours; fine if it is gone already."""
    step = f"delete the IPv{key.family} local route of table {key.table}"
    _change(step, _DELROUTE, key.raw or _route_message(key))


def _change(step: str, kind: int, body: bytes, flags: int = 0) -> None:
    """Makes one change, and names the step where the kernel refuses it. What is to be deleted may be gone."""
    try:
        ask(socket.NETLINK_ROUTE, kind, body, flags)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH) and kind in (_DELRULE, _DELROUTE):
            return
        raise refusal(step, error.errno or 0, _EXISTS) from error


def _rule_message(key: RuleKey) -> bytes:
    """struct fib_rule_hdr and attributes."""
    family, priority, mark, mask, iif, table, goto, source, tcp, _ = key
    words = [(_PRIORITY, _U32.pack(priority)), (_PROTOCOL, bytes([PROTOCOL]))]
    if mask:
        words += [(_MARK, _U32.pack(mark)), (_MASK, _U32.pack(mask))]
    if iif is not None:
        words.append((_IIF, iif.encode() + b"\0"))
    if tcp:
        words.append((_IP_PROTO, bytes([socket.IPPROTO_TCP])))
    action, length = _FR_ACT_UNREACHABLE, 0
    if goto is not None:
        action = _FR_ACT_GOTO
        words.append((_GOTO, _U32.pack(goto)))
    elif table is not None:
        action = _FR_ACT_TO_TABLE
        words.append((_TABLE, _U32.pack(table)))
    if source is not None:
        host, _, bits = source.partition("/")
        length = int(bits)
        words.append((_SRC, socket.inet_pton(_AF[family], host)))
    return struct.pack("=8BI", _AF[family], 0, length, 0, 0, 0, 0, action, 0) + b"".join(starmap(attribute, words))


def _network(family: int, address: bytes, length: int) -> str:
    return f"{socket.inet_ntop(family, address)}/{length}"


def _route_message(key: RouteKey) -> bytes:
    """struct rtmsg and attributes."""
    scope = _RT_SCOPE_HOST if key.family == 4 else 0
    header = struct.pack("=8BI", _AF[key.family], 0, 0, 0, 0, PROTOCOL, scope, _RTN_LOCAL, 0)
    return header + attribute(_RTA_TABLE, _U32.pack(key.table)) + attribute(_RTA_OIF, _U32.pack(_LOOPBACK))


def describe_rule(key: RuleKey) -> str:
    """A rule key as `ip rule` would spell it."""
    family, priority, mark, mask, iif, table, goto, source, tcp, raw = key
    words = [f"-{family} priority {priority}"]
    if source is not None:
        words.append(f"from {source}")
    if mask:
        words.append(f"fwmark {mark:#x}/{mask:#x}")
    if iif is not None:
        words.append(f"iif {iif}")
    if tcp:
        words.append("ipproto tcp")
    if goto is not None:
        words.append(f"goto {goto}")
    else:
        words.append("unreachable" if table is None else f"lookup {table}")
    return " ".join(words) + (" and something else" if raw else "")


def refusal(step: str, number: int, exists: str) -> TproxydError:
    """The kernel's refusal of a step, in words. `exists`: what to say where there is an equal one already."""
    if number == errno.EPERM:
        return CapabilityError(f"cannot {step}: that needs CAP_NET_ADMIN in this network namespace; run as root")
    if number == errno.EEXIST:
        return KernelError(f"cannot {step}: {exists}")
    if number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
        return KernelError(f"cannot {step}: {os.strerror(number)}; is the machine out of files or memory?")
    return KernelError(f"cannot {step}: the kernel says {os.strerror(number)}")
