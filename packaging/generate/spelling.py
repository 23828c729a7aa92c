"""How keys, defaults and types of the configuration are spelled in TOML, in words and in JSON Schema.

A key's type says most of it; where a reader takes something else than its type is written as, the reader is asked for by name.
What is not known here is an error, not a guess: a new kind of value needs a line in `_TYPES` or `_READERS`.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import msgspec

from tproxyd.config import rules, upstream, values
from tproxyd.config.schema import Config, keys_of

__all__ = ["Key", "Table", "tables", "toml"]

Schema = dict[str, Any]


class Key(NamedTuple):
    """One key: its default as TOML spells it, None where it must be given; what it may hold, in words and as a schema; what it is."""

    name: str
    default: str | None
    kind: str
    schema: Schema
    doc: str


class Table(NamedTuple):
    """One table, or each table of an array; `name` is what stands between the brackets."""

    name: str
    is_array: bool
    doc: str
    keys: tuple[Key, ...]


class _Spelling(NamedTuple):
    kind: str
    schemas: tuple[Schema, ...]  # any of these


_PORT = {"type": "string", "pattern": "^[0-9]{1,5}(-[0-9]{1,5})?$"}
_ENDPOINT = r"^(\[[0-9A-Fa-f:.]+\]|[0-9.]+):[0-9]{1,5}$"
_ADDRESS = {"type": "string", "pattern": "^[0-9A-Fa-f:.]+$"}

# Patterns are for editors: they tell a slip of the fingers; what the words of a value mean, `tproxyd check` knows alone.
_TYPES: dict[Any, _Spelling] = {
    bool: _Spelling("true or false", ({"type": "boolean"},)),
    float: _Spelling(
        'a time, such as "300ms" or "1h"',
        ({"type": "string", "pattern": r"^[0-9]{1,15}(\.[0-9]{1,9})?(us|ms|s|m|h)$"},),
    ),
    values.PortRange: _Spelling("ports and ranges", (_PORT, {"type": "integer", "minimum": 1, "maximum": 65535})),
    values.Mark: _Spelling(
        '"VALUE/MASK", in hexadecimal',
        ({"type": "string", "pattern": "^0[xX][0-9a-fA-F]{1,8}/0[xX][0-9a-fA-F]{1,8}$"},),
    ),
    values.Endpoint: _Spelling('"ADDR:PORT"', ({"type": "string", "pattern": _ENDPOINT},)),
    values.UnixPath: _Spelling('"unix:/PATH"', ({"type": "string", "pattern": "^unix:/.*[^/]$"},)),
    IPv4Network | IPv6Network: _Spelling(
        "networks", ({"type": "string", "pattern": "^[0-9A-Fa-f:.]+(/[0-9]{1,3})?$"},)
    ),
}

_INTERFACE = {"type": "string", "pattern": r"^[!#-.0-9;-\[\]-~]{1,15}$"}
_INTERFACES = _Spelling("a list of interfaces", ({"type": "array", "items": _INTERFACE, "uniqueItems": True},))

_READERS: dict[Any, _Spelling] = {
    values.protocols: _Spelling(
        'a list of "tcp"', ({"type": "array", "items": {"enum": ["tcp"]}, "minItems": 1, "uniqueItems": True},)
    ),
    values.listen_endpoint: _Spelling(
        '"ADDR:PORT", or "" for none', ({"type": "string", "pattern": _ENDPOINT}, {"const": ""})
    ),
    values.socket_file: _Spelling(
        '"auto", a path, or "" for none', ({"type": "string", "pattern": "^/.*[^/]$"}, {"enum": ["auto", ""]})
    ),
    values.interfaces: _INTERFACES,
    values.excluded_interfaces: _INTERFACES,
    rules.rule_name: _Spelling("a name", ({"type": "string", "pattern": "^[^\"'`]{1,64}$"},)),
    rules.action: _Spelling(
        '"forward", "refuse" or { forward = "ADDR:PORT" }',
        (
            {"enum": ["forward", "refuse"]},
            {
                "type": "object",
                "properties": {"forward": {"type": "string", "pattern": _ENDPOINT}},
                "required": ["forward"],
                "additionalProperties": False,
            },
        ),
    ),
    upstream.source: _Spelling(
        '"client", "auto", "proxy", an address or a list of addresses',
        (
            {"enum": ["client", "auto", "proxy"]},
            _ADDRESS,
            {
                "type": "array",
                "items": _ADDRESS,
                "minItems": 1,
                "maxItems": upstream.MOST_SOURCES,
                "uniqueItems": True,
            },
        ),
    ),
}


def tables() -> Iterator[Table]:
    """All tables in the order of the schema; an array of tables comes behind the table that it belongs to."""
    for name, kind in keys_of(Config).items():
        yield _table(name, kind)
        for key, inner in keys_of(kind).items():
            if isinstance(inner, type):
                yield _table(f"{name}.{key}", inner, is_array=True)


def _table(name: str, kind: type[msgspec.Struct], *, is_array: bool = False) -> Table:
    hints = get_type_hints(kind, include_extras=True)
    keys = []
    for field in msgspec.structs.fields(kind):
        try:
            hint, reader, doc = get_args(hints[field.name])
        except ValueError:
            raise SystemExit(
                f"`{name}.{field.name}` says nothing for users: write what it is behind its reader in tproxyd/config/schema.py"
            ) from None
        if not isinstance(reader, type):  # else it is an array of tables, which is a Table of its own
            spelling = _spelling(hint, reader, f"{name}.{field.name}")
            default = None if field.required else toml(field.default)
            keys.append(Key(field.name, default, spelling.kind, _any_of(spelling.schemas), doc))
    return Table(name, is_array, (kind.__doc__ or "").split("\n\n")[0].replace("\n    ", " "), tuple(keys))


def _any_of(schemas: tuple[Schema, ...]) -> Schema:
    return schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}


def _spelling(hint: Any, reader: Any, where: str) -> _Spelling:
    if reader in _READERS:
        return _READERS[reader]
    if isinstance(reader, values.OrAuto):
        inner = _spelling(_without_words(hint), reader.read, where)
        return _Spelling(f'{inner.kind}, or "auto"', (*inner.schemas, {"const": "auto"}))
    if isinstance(reader, values.Whole):
        schema: Schema = {"type": "integer", "minimum": reader.low, "maximum": reader.high}
        return _Spelling(
            f"{reader.low} to {reader.high}",
            ({**schema, "not": {"enum": list(reader.never)}} if reader.never else schema,),
        )
    if hint in _TYPES:
        return _TYPES[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return _Spelling(" or ".join(f'"{word}"' for word in arguments), ({"enum": list(arguments)},))
    if origin is tuple and arguments[1:] == (...,):
        item = _spelling(arguments[0], None, where)
        schema = {"type": "array", "items": _any_of(item.schemas), "uniqueItems": True}
        if arguments[0] is values.PortRange:
            return _Spelling(f'a list of {item.kind}, or "all"', (schema, {"const": "all"}))
        return _Spelling(f"a list of {item.kind}", (schema,))
    if origin in (Union, types.UnionType):
        words = [one for one in arguments if get_origin(one) is Literal]
        rest = _without_words(hint)
        others = [rest] if rest in _TYPES else [one for one in arguments if one not in words]
        parts = [_spelling(one, None, where) for one in (*words, *others)]
        return _Spelling(" or ".join(part.kind for part in parts), tuple(s for part in parts for s in part.schemas))
    raise SystemExit(f"`{where}` is a {hint}, which has no spelling yet: give it one in packaging/generate/spelling.py")


def _without_words(hint: Any) -> Any:
    """A union without its Literal."""
    rest = tuple(one for one in get_args(hint) if get_origin(one) is not Literal)
    return Union[rest] if rest else hint  # noqa: UP007  # of a tuple that is known only now


def toml(value: Any) -> str:
    """A value as a TOML file spells it."""
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            return f'"{_time(value)}"'
        case None:
            return '""'
        case tuple():
            return '"all"' if value == values.ALL_PORTS else f"[{', '.join(toml(item) for item in value)}]"
        case _:
            return f'"{value}"'


def _time(seconds: float) -> str:
    if not seconds:
        return "0s"
    # Minutes are left out: "60s" says more to who looks for a time-out than "1m".
    for unit, size in (("h", 3600 * 10**6), ("s", 10**6), ("ms", 10**3), ("us", 1)):
        count, rest = divmod(round(seconds * 10**6), size)
        if count and not rest:
            return f"{count}{unit}"
    raise SystemExit(f"a default of {seconds} s is spelled in no whole number of microseconds")
