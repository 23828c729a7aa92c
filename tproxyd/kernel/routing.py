"""ip rules and local routes through pyroute2, each open, used and closed within one call.

Only messages stamped with our protocol are looked at or deleted; the stamp is part of every request.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tproxyd.errors import CapabilityError, KernelError
from tproxyd.plan import PROTOCOL, LocalRoute, Rule

__all__ = [
    "RuleKey",
    "add_route",
    "add_rule",
    "delete_route",
    "delete_rule",
    "describe_rule",
    "dump_messages",
    "dump_routes",
    "dump_rules",
    "open_netlink",
    "route_key",
    "rule_key",
]

RuleKey = tuple[int, int, int, int, str | None, int | None, int | None]
"""An ip rule as compared: family, priority, mark, mask, iif, table, goto."""

RouteKey = tuple[int, int]
"""A local default route as compared: family, table."""

_AF = {4: socket.AF_INET, 6: socket.AF_INET6}
_DEFAULT = {4: "0.0.0.0/0", 6: "::/0"}
_FR_ACT_GOTO = 2
_RTN_LOCAL = 2
_EXISTS = (
    "somebody else has put an equal one there (see `ip rule` and `ip route show table all`); remove it, or choose another "
    "routing.table, routing.priority or routing.mark"
)
_RT_SCOPE_HOST = 254  # what an IPv4 local route has, on add and on delete; IPv6 has no scopes


def rule_key(rule: Rule) -> RuleKey:
    """What of a planned rule is compared with the kernel's."""
    return (rule.family, rule.priority, rule.mark.value, rule.mark.mask, rule.iif, rule.table, rule.goto)


def route_key(route: LocalRoute) -> RouteKey:
    """What of a planned route is compared with the kernel's."""
    return (route.family, route.table)


def dump_rules() -> tuple[RuleKey, ...]:
    """Our ip rules, in the kernel's order."""
    keys: list[RuleKey] = []
    with open_netlink("list ip rules") as netlink:
        for family, af in _AF.items():
            for message in dump_messages(netlink.rule, af):
                get = message.get_attr
                if get("FRA_PROTOCOL") != PROTOCOL:
                    continue
                goto = get("FRA_GOTO") if message["action"] == _FR_ACT_GOTO else None
                table = get("FRA_TABLE") if goto is None else None
                keys.append(
                    (
                        family,
                        get("FRA_PRIORITY") or 0,
                        get("FRA_FWMARK") or 0,
                        get("FRA_FWMASK") or 0,
                        get("FRA_IIFNAME"),
                        table,
                        goto,
                    )
                )
    return tuple(keys)


def dump_routes() -> tuple[RouteKey, ...]:
    """Our local default routes. The kernel filters by protocol, so a full routing table costs nothing here."""
    keys: list[RouteKey] = []
    with open_netlink("list routes") as netlink:
        for family, af in _AF.items():
            for message in dump_messages(netlink.route, af, proto=PROTOCOL):
                if message["proto"] == PROTOCOL and message["type"] == _RTN_LOCAL and not message["dst_len"]:
                    keys.append((family, message.get_attr("RTA_TABLE")))
    return tuple(keys)


def add_rule(key: RuleKey) -> None:
    """Adds one rule; an equal one with another protocol, somebody else's, is another rule to the kernel."""
    with open_netlink(f"add ip rule {describe_rule(key)}") as netlink:
        netlink.rule("add", protocol=PROTOCOL, **_rule_arguments(key))


def delete_rule(key: RuleKey) -> None:
    """Deletes one rule of ours; fine if it is gone already."""
    with open_netlink(f"delete ip rule {describe_rule(key)}", gone=True) as netlink:
        netlink.rule("del", protocol=PROTOCOL, **_rule_arguments(key))


def add_route(key: RouteKey) -> None:
    """Adds one local default route. Raises KernelError if the table has an equal one of somebody else."""
    with open_netlink(f"add the IPv{key[0]} local route to table {key[1]}") as netlink:
        netlink.route("add", **_route_arguments(key))


def delete_route(key: RouteKey) -> None:
    """Deletes one local default route of ours; fine if it is gone already."""
    with open_netlink(f"delete the IPv{key[0]} local route of table {key[1]}", gone=True) as netlink:
        netlink.route("del", **_route_arguments(key))


def _rule_arguments(key: RuleKey) -> dict[str, Any]:
    family, priority, mark, mask, iif, table, goto = key
    arguments: dict[str, Any] = {"family": _AF[family], "priority": priority}
    if mask:
        arguments |= {"fwmark": mark, "fwmask": mask}
    if iif is not None:
        arguments["iifname"] = iif
    if goto is not None:
        return arguments | {"action": "goto", "goto": goto}
    return arguments | {"table": table}


def _route_arguments(key: RouteKey) -> dict[str, Any]:
    family, table = key
    return {
        "family": _AF[family],
        "dst": _DEFAULT[family],
        "type": "local",
        "scope": _RT_SCOPE_HOST if family == 4 else 0,
        "table": table,
        "oif": socket.if_nametoindex("lo"),
        "proto": PROTOCOL,
    }


def dump_messages(request: Any, af: int, **arguments: Any) -> Iterator[Any]:
    """The messages of one family; none from a kernel without it."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        yield from request("dump", family=af, **arguments)
    except NetlinkError as error:
        # A kernel without IPv6 has none of ours; one that has never seen this table says ENOENT.
        if error.code not in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.ENOENT):
            raise


def describe_rule(key: RuleKey) -> str:
    """A rule key as `ip rule` would spell it."""
    family, priority, mark, mask, iif, table, goto = key
    words = [f"-{family} priority {priority} fwmark {mark:#x}/{mask:#x}"]
    if iif is not None:
        words.append(f"iif {iif}")
    words.append(f"goto {goto}" if goto is not None else f"lookup {table}")
    return " ".join(words)


@contextmanager
def open_netlink(step: str, *, gone: bool = False, exists: str = _EXISTS) -> Iterator[Any]:
    """An open pyroute2 connection for one step; its errors become ours, with the step named. `gone`: absent is fine. `exists`: what to
    say where there is an equal one already."""
    from pyroute2 import IPRoute  # 150 ms and 24 MB: only once the kernel is really asked
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        # Strict: the kernel honours the filters of a dump instead of sending everything.
        with IPRoute(strict_check=True) as netlink:
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
