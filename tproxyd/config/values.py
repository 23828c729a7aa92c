"""What a value may look like: ports, marks, durations, networks, interface names. Each reader takes what TOML gives.

A reader returns the typed value or raises InvalidError with every problem of that value; it does not know where the value
stands. Later spellings of the contract that this version does not have are told apart from mistakes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any, TypeVar

import msgspec

__all__ = [
    "InvalidError",
    "Mark",
    "Network",
    "PortRange",
    "Reader",
    "choice",
    "destinations",
    "flag",
    "integer",
    "interfaces",
    "mark",
    "networks",
    "port_range",
    "ports",
    "protocols",
    "seconds",
    "shown",
    "toml_kind",
]

T = TypeVar("T")
Reader = Callable[[Any], Any]
Network = IPv4Network | IPv6Network

_LATER = "is not in this version of tproxyd"
_SHOWN = 60  # characters of a value in a message
_LONGEST = 30 * 86400  # seconds; a longer time-out is a slip of the unit
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_MAPPED = IPv6Network("::ffff:0:0/96")


class InvalidError(Exception):
    """Problems of one value: where inside it (`[2]`, or nothing), the value there, and cause with way out."""

    def __init__(self, cause: str, *, value: Any = ..., where: str = "") -> None:
        super().__init__(cause)
        self.problems: list[tuple[str, Any, str]] = [(where, value, cause)]

    @classmethod
    def gather(cls, problems: Sequence[tuple[str, Any, str]]) -> InvalidError:
        """One InvalidError of many problems; there must be at least one."""
        invalid = cls("")
        invalid.problems = list(problems)
        return invalid


class PortRange(msgspec.Struct, frozen=True, order=True):
    """Ports `first` to `last`, both included, 1 to 65535."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """A packet mark: `value` in the bits of `mask`. The other bits belong to others and are never changed."""

    value: int
    mask: int

    def __str__(self) -> str:
        return f"{self.value:#x}/{self.mask:#x}"


def shown(value: Any) -> str:
    """A value as it may stand in a message: as TOML spells it, short, and without control characters."""
    match value:
        case bool():
            text = "true" if value else "false"
        case str():
            text = (
                '"'
                + "".join(c if c.isprintable() and c not in '"\\' else ascii(c)[1:-1] for c in value[: _SHOWN + 1])
                + '"'
            )
        case int() if abs(value) >= 10**_SHOWN:
            return "a huge number"
        case dict():
            return "a table"
        case _:
            text = "".join(c if c.isprintable() else "?" for c in str(value)[: _SHOWN + 1])
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def toml_kind(value: Any) -> str:
    """The value's type in TOML's words."""
    kinds = (
        (bool, "a boolean"),
        (str, "a string"),
        (int, "an integer"),
        (float, "a float"),
        (list, "an array"),
        (dict, "a table"),
    )
    return next((kind for python, kind in kinds if isinstance(value, python)), "a date or time")


def choice(*allowed: str, later: Sequence[str] = ()) -> Reader:
    """One of some words."""

    def read(value: Any) -> str:
        text = _string(value)
        if text in allowed:
            return text
        if text in later:
            raise InvalidError(f"{_LATER}; use {_or(allowed)}")
        raise InvalidError(f"is none of its values; use {_or(allowed)}")

    return read


def upstream_source(value: Any) -> str:
    """ "auto" or "proxy"; the client's address as a must, or addresses, come later."""
    if isinstance(value, list) or (isinstance(value, str) and (value == "client" or _is_address(value))):
        raise InvalidError(f'{_LATER}; use "auto" or "proxy"')
    return str(choice("auto", "proxy")(value))


def upstream_target(value: Any) -> str:
    """ "original"; everything else comes later."""
    if isinstance(value, str) and (value == "loopback" or value.startswith("unix:") or ":" in value):
        raise InvalidError(f'{_LATER}; use "original"')
    return str(choice("original")(value))


def flag(value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise InvalidError(f"is {toml_kind(value)}; write true or false, without quotes")
    return value


def integer(low: int, high: int, *, never: Sequence[int] = (), why: str = "") -> Reader:
    """A whole number from `low` to `high`, both included, and none of `never`."""

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidError(f"is {toml_kind(value)}; write a whole number from {low} to {high}, without quotes")
        if not low <= value <= high:
            raise InvalidError(f"is out of range{why and f' ({why})'}; write a whole number from {low} to {high}")
        if value in never:
            raise InvalidError(f"is taken: {why}; choose another number")
        return value

    return read


def seconds(value: Any) -> float:
    """A duration such as "300ms", "5s", "2m", "1h", as seconds."""
    text = _string(value, 'a number and a unit, such as "5s"')
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)(us|ms|s|m|h)", text)
    if match is None:
        raise InvalidError('is no duration; write a number and one of us, ms, s, m, h, such as "300ms" or "5s"')
    duration = float(match[1]) * _UNITS[match[2]]
    if duration > _LONGEST:
        raise InvalidError("is longer than 30 days; is the unit right?")
    return duration


def some_seconds(value: Any) -> float:
    """A duration that is not zero."""
    duration = seconds(value)
    if not duration:
        raise InvalidError("would end every connection at once; write a time above zero")
    return duration


def mark(value: Any) -> Mark | str:
    """ "auto", or "0xVALUE/0xMASK"."""
    text = _string(value, '"auto" or "0xVALUE/0xMASK"')
    if text == "auto":
        return text
    match = re.fullmatch(r"(0[xX][0-9a-fA-F]{1,8})/(0[xX][0-9a-fA-F]{1,8})", text)
    if match is None:
        raise InvalidError(
            'is no mark; write "auto", or value and mask in hexadecimal (32 bits), such as "0x1000000/0x3000000"'
        )
    number, mask = int(match[1], 16), int(match[2], 16)
    if not number:
        raise InvalidError("has the value 0, which every unmarked packet has; choose a bit of the mask")
    if number & ~mask:
        raise InvalidError(f"has bits outside its mask ({number & ~mask:#x}); widen the mask or drop them")
    return Mark(value=number, mask=mask)


def port_range(value: Any) -> PortRange:
    """A port or a range: "8080", 8080, "9000-9099"."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value) if abs(value) < 10**6 else "0"
    text = _string(value, 'a port or a range, such as "8080" or "9000-9099"')
    match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", text)
    if match is None:
        raise InvalidError('is no port or range; write "8080" or "9000-9099"')
    first = int(match[1])
    last = int(match[2]) if match[2] else first
    if not (1 <= first <= 65535 and 1 <= last <= 65535):
        raise InvalidError("is out of range; ports are 1 to 65535")
    if first > last:
        raise InvalidError(f'is an inverted range; write "{last}-{first}"')
    return PortRange(first, last)


def ports(value: Any) -> tuple[PortRange, ...]:
    """A list of ports and ranges, or "all". Overlaps are a mistake: one of the two is not what was meant."""
    if value == "all":
        return (PortRange(1, 65535),)
    read = _list(value, port_range, 'ports and ranges, such as ["8080", "9000-9099"], or the word "all"')
    in_order = sorted(enumerate(read), key=lambda item: item[1])
    for (_, before), (index, after) in itertools.pairwise(in_order):
        if after.first <= before.last:
            raise InvalidError(
                f'overlaps "{before}" in the same list; merge the two', value=str(after), where=f"[{index}]"
            )
    return tuple(read)


def network(value: Any) -> Network:
    """A network or a bare address, IPv4 or IPv6."""
    text = _string(value, 'a network, such as "192.0.2.0/24"')
    if "%" in text:
        raise InvalidError("has a scope, which a network cannot have; write it without the % part")
    try:
        read = ip_network(text, strict=False)
    except ValueError:
        raise InvalidError(
            'is no network; write an address with its prefix length, such as "192.0.2.0/24" or "2001:db8::/32"'
        ) from None
    if "/" in text and not text.rpartition("/")[2].isdigit():
        raise InvalidError(f'has a mask in place of a prefix length; write "{read}"')
    if "/" in text and ip_address(text.partition("/")[0]) != read.network_address:
        raise InvalidError(f'has bits set behind its prefix; write "{read}"')
    if read.version == 6 and read.subnet_of(_MAPPED):
        raise InvalidError("is IPv4 mapped into IPv6, which no packet bears; write the IPv4 network itself")
    return read


def networks(value: Any) -> tuple[Network, ...]:
    """A list of networks."""
    return tuple(_unique(_list(value, network, 'networks, such as ["192.0.2.0/24"]')))


def destinations(value: Any) -> tuple[Network | str, ...]:
    """A list of networks and the word "local"."""
    return tuple(
        _unique(
            _list(
                value,
                lambda v: v if v == "local" else network(v),
                'networks, or "local", such as ["local", "192.0.2.0/24"]',
            )
        )
    )


def interface(value: Any) -> str:
    """An interface's name, or the beginning of names and an asterisk."""
    text = _string(value, 'an interface name, such as "eth0" or "eth*"')
    if not 1 <= len(text.encode("utf-8", "surrogatepass")) <= 15:
        raise InvalidError("is no interface name: those have 1 to 15 bytes")
    if text in (".", "..") or not text.isascii() or not re.fullmatch(r"[!#-.0-9;-\[\]-~]+", text):
        raise InvalidError(
            "is no interface name: spaces, quotes, slashes, colons, backslashes and non-ASCII characters cannot be in one"
        )
    if "*" in text[:-1] or text == "*":
        raise InvalidError(
            'has an asterisk that does not end a name; write "eth*", or leave the list empty for every interface'
        )
    return text


def interfaces(value: Any) -> tuple[str, ...]:
    """A list of interfaces to capture on."""
    read = _unique(_list(value, interface, 'interface names, such as ["eth0", "eth*"]'))
    for index, name in enumerate(read):
        if name == "lo":
            raise InvalidError(
                "cannot be captured: it carries what this host sends to itself, and an app that calls itself must reach itself; "
                "remove it",
                value=name,
                where=f"[{index}]",
            )
    return tuple(read)


def excluded_interfaces(value: Any) -> tuple[str, ...]:
    """A list of interfaces not to capture on; lo is never captured, naming it is harmless."""
    return tuple(_unique(_list(value, interface, 'interface names, such as ["eth0", "eth*"]')))


def protocols(value: Any) -> tuple[str, ...]:
    """["tcp"]; udp comes later."""
    read = _unique(_list(value, choice("tcp", later=("udp",)), '["tcp"]'))
    if not read:
        raise InvalidError('is empty; write ["tcp"], or switch capture off with mode = "off"')
    return tuple(read)


def _string(value: Any, example: str = "a string") -> str:
    if not isinstance(value, str):
        raise InvalidError(f"is {toml_kind(value)}; write {example}, in quotes")
    return value


def _list(value: Any, read: Callable[[Any], T], example: str) -> list[T]:
    if not isinstance(value, list | tuple):
        raise InvalidError(f"is {toml_kind(value)}; write an array of {example}")
    values: list[T] = []
    problems: list[tuple[str, Any, str]] = []
    for index, item in enumerate(value):
        try:
            values.append(read(item))
        except InvalidError as invalid:
            problems += [(f"[{index}]{where}", item if v is ... else v, cause) for where, v, cause in invalid.problems]
    if problems:
        raise InvalidError.gather(problems)
    return values


def _unique(values: list[T]) -> list[T]:
    seen: set[T] = set()
    for index, value in enumerate(values):
        if value in seen:
            raise InvalidError("stands in the list twice; remove one", value=str(value), where=f"[{index}]")
        seen.add(value)
    return values


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _or(words: Iterable[str]) -> str:
    quoted = [f'"{word}"' for word in words]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"
