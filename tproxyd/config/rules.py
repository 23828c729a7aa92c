"""What the keys of a policy rule may hold, where that differs from what other keys hold: name, ports, action.

Readers like those in values.py. That two rules bear one name, or that one calls the listener, is seen in load.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tproxyd.config.values import Endpoint, InvalidError, PortRange, host_endpoint, ports
from tproxyd.config.wording import shown, toml_kind

__all__ = ["MOST_RULES", "action", "rule_name", "rule_ports"]

MOST_RULES = 10_000
"""Each rule is a bit in every entry of the compiled policy."""

_ACTIONS = '"forward", "refuse" or { forward = "192.0.2.1:80" }'
_TARGET = 'an address and a port, such as "192.0.2.1:80" or "[2001:db8::1]:80"'


def rule_name(value: Any) -> str:
    """A rule's name, which stands in the access log."""
    if not isinstance(value, str):
        raise InvalidError(f'is {toml_kind(value)}; write a name, such as "no-metadata", in quotes')
    if not 1 <= len(value) <= 64 or not value.isprintable() or re.search("[\"'`]", value):
        raise InvalidError(
            'is no name of a rule: those have 1 to 64 printable characters, none of them a quote; write one such as "no-metadata"'
        )
    return value


def rule_ports(value: Any) -> tuple[PortRange, ...]:
    """As `ports`, but an empty list would make a rule that never matches, or always; nobody could tell which was meant."""
    read = ports(value)
    if not read:
        raise InvalidError("is empty; name ports, or leave the key out for every port")
    return read


def action(value: Any) -> str | Endpoint:
    """What a rule does: "forward", "refuse", or { forward = "ADDR:PORT" }."""
    if not isinstance(value, Mapping):
        if isinstance(value, str) and value in ("forward", "refuse"):
            return value
        what = "is no action" if isinstance(value, str) else f"is {toml_kind(value)}"
        raise InvalidError(f"{what}; write {_ACTIONS}")
    unknown = next((key for key in value if key != "forward"), None)
    if unknown is not None:
        raise InvalidError(f'has the unknown key {shown(unknown)}; write {{ forward = "192.0.2.1:80" }}')
    if not value:
        raise InvalidError(f"has no key; write {_ACTIONS}")
    try:
        return host_endpoint(value["forward"], _TARGET)
    except InvalidError as invalid:
        raise InvalidError(items={"forward": invalid.cause}) from None
