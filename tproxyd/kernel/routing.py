"""ip rules and local routes, each change through a pyroute2 connection of its own, opened, used and closed within one call.

Only what is stamped with our protocol is looked at or deleted; the stamp is part of every request. What there is comes from a dump
that the kernel itself has filtered: pyroute2 would read every route of a full table first, for seconds.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from tproxyd.errors import CapabilityError, KernelError
from tproxyd.kernel.dumps import ask, attributes, dump_all
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
    "open_netlink",
    "route_key",
    "rule_key",
]


class RuleKey(NamedTuple):
    """An ip rule as compared. `raw` is the whole message of one that has anything besides: such a rule is none of a plan's."""

    family: int
    priority: int
    mark: int
    mask: int
    iif: str | None
    table: int | None
    goto: int | None
    raw: bytes = b""


class RouteKey(NamedTuple):
    """A local default route as compared. `raw` is the whole message of one that is not simply through lo."""

    family: int
    table: int
    raw: bytes = b""


_AF = {4: socket.AF_INET, 6: socket.AF_INET6}
_DEFAULT = {4: "0.0.0.0/0", 6: "::/0"}
_GETROUTE, _GETRULE = 26, 34  # linux/rtnetlink.h
_LOOPBACK = 1  # the index of lo, in every namespace
_FR_ACT_GOTO = 2
_RTN_LOCAL = 2
_RTA_DST, _RTA_OIF, _RTA_PRIORITY, _RTA_TABLE, _RTA_CACHEINFO, _RTA_PREF = 1, 4, 6, 15, 12, 20
_METRIC = {4: 0, 6: 1024}  # what a route has of which nothing is said
# FRA_ attributes, linux/fib_rules.h
_IIF, _GOTO, _PRIORITY, _MARK, _SUPPRESS, _TABLE, _MASK, _PROTOCOL = 3, 4, 6, 10, 14, 15, 16, 21
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
    return RuleKey(rule.family, rule.priority, rule.mark.value, rule.mark.mask, rule.iif, rule.table, rule.goto)


def route_key(route: LocalRoute) -> RouteKey:
    """What of a planned route is compared with the kernel's."""
    return RouteKey(route.family, route.table)


def dump_rules() -> tuple[RuleKey, ...]:
    """Our ip rules, in the kernel's order."""
    keys = []
    for family, af in _AF.items():
        for body in _dump(_GETRULE, struct.pack("=B11x", af)):
            has = attributes(body[12:])
            if _number(has, _PROTOCOL) != PROTOCOL:
                continue
            jumps = body[7] == _FR_ACT_GOTO
            key = RuleKey(
                family,
                _number(has, _PRIORITY),
                _number(has, _MARK),
                _number(has, _MASK),
                has[_IIF].rstrip(b"\0").decode(errors="replace") if _IIF in has else None,
                None if jumps else _number(has, _TABLE),
                _number(has, _GOTO) if jumps else None,
            )
            keys.append(key if _is_plain_rule(body, has) else key._replace(raw=body))
    return tuple(keys)


def _is_plain_rule(body: bytes, has: dict[int, bytes]) -> bool:
    """Whether a key says all of it: no address, port, user, inversion or the like besides."""
    _, dst_len, src_len, tos, _, _, _, _, flags = struct.unpack_from("=8BI", body)  # struct fib_rule_hdr
    known = {_IIF, _GOTO, _PRIORITY, _MARK, _TABLE, _MASK, _PROTOCOL}
    return (
        not (dst_len or src_len or tos or flags & _INVERT)
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
                and _number(has, _RTA_OIF) == _LOOPBACK
                and _number(has, _RTA_PRIORITY) == _METRIC[family]
            )
            keys.append(RouteKey(family, _number(has, _RTA_TABLE), b"" if plain else body))
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


def _number(has: dict[int, bytes], kind: int) -> int:
    return int.from_bytes(has.get(kind, b""), sys.byteorder)


def add_rule(key: RuleKey) -> None:
    """Adds one rule; an equal one with another protocol, somebody else's, is another rule to the kernel."""
    with open_netlink(f"add ip rule {describe_rule(key)}") as netlink:
        if key.raw:
            ask(socket.NETLINK_ROUTE, _NEWRULE, key.raw, _CREATE)
            return
        netlink.rule("add", protocol=PROTOCOL, **_rule_arguments(key))


def delete_rule(key: RuleKey) -> None:
    """Deletes one rule of ours; fine if it is gone already."""
    with open_netlink(f"delete ip rule {describe_rule(key)}", gone=True) as netlink:
        if key.raw:
            ask(socket.NETLINK_ROUTE, _DELRULE, key.raw)
            return
        netlink.rule("del", protocol=PROTOCOL, **_rule_arguments(key))


def add_route(key: RouteKey) -> None:
    """Adds one local default route. Raises KernelError if the table has an equal one of somebody else."""
    with open_netlink(f"add the IPv{key.family} local route to table {key.table}") as netlink:
        if key.raw:
            ask(socket.NETLINK_ROUTE, _NEWROUTE, key.raw, _CREATE)
            return
        netlink.route("add", **_route_arguments(key))


def delete_route(key: RouteKey) -> None:
    """Deletes one local default route of ours; fine if it is gone already."""
    with open_netlink(f"delete the IPv{key.family} local route of table {key.table}", gone=True) as netlink:
        if key.raw:
            ask(socket.NETLINK_ROUTE, _DELROUTE, key.raw)
            return
        netlink.route("del", **_route_arguments(key))


def _rule_arguments(key: RuleKey) -> dict[str, Any]:
    family, priority, mark, mask, iif, table, goto, _ = key
    arguments: dict[str, Any] = {"family": _AF[family], "priority": priority}
    if mask:
        arguments |= {"fwmark": mark, "fwmask": mask}
    if iif is not None:
        arguments["iifname"] = iif
    if goto is not None:
        return arguments | {"action": "goto", "goto": goto}
    return arguments | {"table": table}


def _route_arguments(key: RouteKey) -> dict[str, Any]:
    family, table, _ = key
    return {
        "family": _AF[family],
        "dst": _DEFAULT[family],
        "type": "local",
        "scope": _RT_SCOPE_HOST if family == 4 else 0,
        "table": table,
        "oif": _LOOPBACK,
        "proto": PROTOCOL,
    }


def describe_rule(key: RuleKey) -> str:
    """A rule key as `ip rule` would spell it."""
    family, priority, mark, mask, iif, table, goto, raw = key
    words = [f"-{family} priority {priority} fwmark {mark:#x}/{mask:#x}"]
    if iif is not None:
        words.append(f"iif {iif}")
    words.append(f"goto {goto}" if goto is not None else f"lookup {table}")
    return " ".join(words) + (" and something else" if raw else "")


@contextmanager
def open_netlink(step: str, *, gone: bool = False, exists: str = _EXISTS) -> Iterator[Any]:
    """An open pyroute2 connection for one step; its errors become ours, with the step named. `gone`: absent is fine. `exists`: what to
    say where there is an equal one already."""
    from pyroute2 import IPRoute  # 150 ms and 24 MB: only once the kernel is really asked
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as netlink:
            yield netlink
    except NetlinkError as error:
        if gone and error.code in (errno.ENOENT, errno.ESRCH):
            return
        if error.code == errno.EPERM:
            raise CapabilityError(
                f"cannot {step}: that needs CAP_NET_ADMIN in this network namespace; run as root"
            ) from error
        if error.code == errno.EEXIST:
            raise KernelError(f"cannot {step}: {exists}") from error
        raise KernelError(
            f"cannot {step}: the kernel says {error.args[1] if len(error.args) > 1 else error}"
        ) from error
    except OSError as error:
        raise KernelError(
            f"cannot {step}: {error.strerror or error}; is the machine out of files or memory?"
        ) from error
