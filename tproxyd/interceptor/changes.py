"""What differs between two configurations, in words, and whether a program that serves under the one can go over to the other.

Knows keys and values; refuses to know how a change is made. A key that is not named here can change in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from tproxyd.config import Config
from tproxyd.config.wording import short
from tproxyd.errors import ConfigError

__all__ = ["make_changes", "require_changeable", "same_interception"]

_BORNE = "as live connections bear it: restart"
_FIXED: dict[str, str] = {
    # NAT brings connections to other sockets, at other addresses, and the ones that live need conntrack or must not have it.
    "capture.mode": "as live connections depend on it: restart",
    "routing.mark": _BORNE,
    "routing.upstream_mark": _BORNE,
    "routing.table": _BORNE,
    "routing.priority": _BORNE,
    "relay.engine": "as the relay loops begin with it: `tproxyd handover` or restart",
    "relay.workers": "as the relay loops begin with it: `tproxyd handover` or restart",
}
_FIXED_TABLES = {"admin": "as it is opened before everything else: `tproxyd handover` or restart"}
"""Tables with all that they may have one day."""


class _Change(NamedTuple):
    key: str
    before: Any
    after: Any


def make_changes(before: Config, after: Config) -> list[str]:
    """A line for each key that is otherwise, as an administrator would say it."""
    return [f"{key}: {_told(old)} -> {_told(new)}" for key, old, new in _differences(before, after)]


def require_changeable(before: Config, after: Config) -> None:
    """Raises ConfigError that names every key which only a new start can change."""
    problems = []
    for key, old, new in _differences(before, after):
        why = _FIXED.get(key) or _FIXED_TABLES.get(key.partition(".")[0])
        if why is not None:
            problems.append(f"`{key}` cannot change at a reload (it is {_told(old)}, and would be {_told(new)}), {why}")
    if problems:
        raise ConfigError(*problems)


def same_interception(before: Config, after: Config) -> bool:
    """Whether they say the same of one namespace: of what is captured, and of what becomes of it."""
    return all(getattr(before, table) == getattr(after, table) for table in _OF_NAMESPACE)


_OF_NAMESPACE = ("capture", "listen", "routing", "upstream", "policy")


def _differences(before: Config, after: Config) -> Iterator[_Change]:
    for table in Config.__struct_fields__:
        old, new = getattr(before, table), getattr(after, table)
        for key in type(old).__struct_fields__ if old != new else ():
            if getattr(old, key) != getattr(new, key):
                yield _Change(f"{table}.{key}", getattr(old, key), getattr(new, key))


def _told(value: Any) -> str:
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return short(", ".join(getattr(one, "name", None) or str(one) for one in value[:30])) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else short(f"{value:g} s" if isinstance(value, float) else str(value))
