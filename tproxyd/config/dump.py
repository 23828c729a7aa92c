"""A Config as a configuration file would have it: what `config_from_mapping` reads as the same Config again."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from typing import Any

import msgspec

from tproxyd.config.schema import Config, PolicyRule
from tproxyd.config.values import Endpoint, Mark, PortRange, UnixPath

__all__ = ["config_to_mapping"]


def config_to_mapping(config: Config) -> dict[str, Any]:
    """Tables, keys and values as TOML would give them, all of them, defaults included."""
    return {table: _table(getattr(config, table)) for table in config.__struct_fields__}


def _table(table: msgspec.Struct) -> dict[str, Any]:
    return {key: _value(getattr(table, key)) for key in table.__struct_fields__}


def _value(value: Any) -> Any:
    match value:
        case None:
            return ""
        case tuple():
            return [_value(item) for item in value]
        case PolicyRule():
            rule = _table(value)
            return rule | {"action": {"forward": rule["action"]}} if isinstance(value.action, Endpoint) else rule
        case float():  # nothing but durations
            return _duration(value)
        case PortRange() | Endpoint() | UnixPath() | Mark() | IPv4Network() | IPv6Network():
            return str(value)
    return value


def _duration(seconds: float) -> str:
    # In the unit in which reading it gives the very same number.
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        number = f"{seconds / size:.9f}".rstrip("0").rstrip(".")
        if float(number) * size == seconds:
            return number + unit
    return f"{seconds:.9f}s"
