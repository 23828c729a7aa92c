"""How values, keys, file names and what others have named stand in a message: on one line, printable, short. Takes whatever there is.

No value is given to str() that could be endless or nested without end: Python refuses to print integers of more than 4300
digits, and what is nested a thousand deep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, time
from typing import Any

__all__ = ["few", "printable", "short", "shown", "toml_kind"]

_SHOWN = 60  # characters of a value in a message
_FEW = 10  # of many things of a kind


def printable(text: str, *, keep: str = "") -> str:
    """The whole text, with escapes for what a terminal would obey or not show, ends of lines among it; but for characters to `keep`."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def few(items: Sequence[str], separator: str = "; ") -> str:
    """The first of them, and how many more there are."""
    more = len(items) - _FEW
    return separator.join([*items[:_FEW], f"and {more} more"] if more > 0 else items)


def short(text: str) -> str:
    """The printable text, cut where it is longer than a message can bear."""
    return _cut(printable(text[: _SHOWN + 1]))


def shown(value: Any) -> str:
    """A value as it may stand in a message: as TOML spells it, short and printable."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            escaped = value[: _SHOWN + 1].replace("\\", "\\\\").replace('"', '\\"')
            return _cut(f'"{printable(escaped)}"')
        case int():
            return str(value) if abs(value) < 10**_SHOWN else "a huge number"
        case float() | date() | time():
            return str(value)
        case list() | tuple():
            return _cut(f"[{', '.join(_shown_item(item) for item in value[:_SHOWN])}]")
        case Mapping():
            return "a table"
        case _:
            return f"<{type(value).__name__}>"  # from a program that embeds us; TOML has nothing like it


def toml_kind(value: Any) -> str:
    """The value's type in TOML's words."""
    kinds = (
        (bool, "a boolean"),
        (str, "a string"),
        (int, "an integer"),
        (float, "a float"),
        ((list, tuple), "an array"),
        (Mapping, "a table"),
        ((date, time), "a date or time"),
    )
    return next((kind for python, kind in kinds if isinstance(value, python)), "nothing that TOML has")


def _shown_item(item: Any) -> str:
    return "[...]" if isinstance(item, list | tuple) else "{...}" if isinstance(item, Mapping) else shown(item)


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
