"""What a value may look like: ports, marks, durations, networks, interface names. Each reader takes what TOML gives.

A reader returns the typed value or raises InvalidError with every problem of that value; it does not know where the value
stands. Later spellings of the contract that this version does not have are told apart from mistakes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any, TypeVar

import msgspec

from tproxyd.config.wording import shown, toml_kind

__all__ = [
    "ALL_PORTS",
    "Endpoint",
    "InvalidError",
    "Mark",
    "Network",
    "OrAuto",
    "PortRange",
    "Reader",
    "UnixPath",
    "Whole",
    "brief_seconds",
    "choice",
    "destinations",
    "endpoint",
    "excluded_interfaces",
    "flag",
    "host_endpoint",
    "integer",
    "interfaces",
    "is_interface",
    "list_of",
    "listen_endpoint",
    "mark",
    "named_networks",
    "networks",
    "or_auto",
    "ports",
    "protocols",
    "seconds",
    "socket_file",
    "some_seconds",
    "special_networks",
    "unix_path",
    "wildcard_over",
]

T = TypeVar("T")
Reader = Callable[[Any], Any]
Network = IPv4Network | IPv6Network

_LATER = "is not in this version of tproxyd"
_LONGEST_PATH = 107  # bytes; sun_path has 108, the last of which is a NUL
_LONGEST = 30 * 86400  # seconds; a longer time-out is a slip of the unit
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_MAPPED = IPv6Network("::ffff:0:0/96")
_LOOPBACK = {4: "127.0.0.1", 6: "::1"}
_INTERFACES = 'interface names, such as ["eth0", "eth*"]'


class InvalidError(Exception):
    """What is wrong with a value, and the way out; or, in `items`, what is wrong with some items of a list, or of a table."""

    def __init__(self, cause: str = "", *, items: Mapping[Any, str] | None = None) -> None:
        super().__init__(cause)
        self.cause = cause
        self.items = items or {}

    def sentences(self, name: str, value: Any, *, of: str = "") -> list[str]:
        """One sentence a problem; `name` is where the value stands, `of` what more there is to say about the place."""
        if not self.items:
            return [f"`{name}`{of} = {shown(value)} {self.cause}"]
        return [
            f"`{name}{f'[{at}]' if isinstance(at, int) else f'.{at}'}`{of} = {shown(value[at])} {cause}"
            for at, cause in self.items.items()
        ]


class PortRange(msgspec.Struct, frozen=True, order=True):
    """Ports `first` to `last`, both included, 1 to 65535."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


ALL_PORTS = (PortRange(1, 65535),)
"""What the word "all" stands for."""


class Endpoint(msgspec.Struct, frozen=True):
    """An address, IPv4 or IPv6 in its usual spelling and without scope, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class UnixPath(msgspec.Struct, frozen=True):
    """Where a Unix socket is: an absolute path, short enough for the address of a socket."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """A packet mark: `value` in the bits of `mask`. The other bits belong to others and are never changed."""

    value: int
    mask: int

    def __str__(self) -> str:
        return f"{self.value:#x}/{self.mask:#x}"

    def fits(self, other: Mark) -> bool:
        """Whether the two can be told apart, and setting one never changes the other."""
        return not self.mask & other.mask or (self.mask == other.mask and self.value != other.value)


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


def flag(value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise InvalidError(f"is {toml_kind(value)}; write true or false, without quotes")
    return value


class Whole(msgspec.Struct, frozen=True):
    """Reads a whole number from `low` to `high`, both included, and none of `never`. A type, so that the reference can tell the bounds."""

    low: int
    high: int
    never: Sequence[int] = ()
    why: str = ""

    def __call__(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidError(
                f"is {toml_kind(value)}; write a whole number from {self.low} to {self.high}, without quotes"
            )
        if not self.low <= value <= self.high:
            raise InvalidError(
                f"is out of range{self.why and f' ({self.why})'}; write a whole number from {self.low} to {self.high}"
            )
        if value in self.never:
            raise InvalidError(f"is taken: {self.why}; choose another number")
        return value


def integer(low: int, high: int, *, never: Sequence[int] = (), why: str = "") -> Whole:
    """A whole number from `low` to `high`, both included, and none of `never`."""
    return Whole(low, high, never, why)


class OrAuto(msgspec.Struct, frozen=True):
    """Reads what `read` takes, or the word "auto"."""

    read: Reader

    def __call__(self, value: Any) -> Any:
        if isinstance(value, str) and value == "auto":
            return value
        try:
            return self.read(value)
        except InvalidError as invalid:
            raise InvalidError(f'{invalid.cause}, or "auto"') from None


def or_auto(read: Reader) -> OrAuto:
    """What `read` takes, or the word "auto"."""
    return OrAuto(read)


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


def brief_seconds(shortest: str, longest: str, *, why: str) -> Reader:
    """A duration from `shortest` (zero, in the unit that fits) to `longest`, both included; `why` says why not longer."""
    most = seconds(longest)

    def read(value: Any) -> float:
        if not isinstance(value, str):
            raise InvalidError(f'is {toml_kind(value)}; write "{shortest}" to "{longest}", in quotes')
        duration = seconds(value)
        if duration > most:
            raise InvalidError(f'is longer than {longest}: {why}; write "{shortest}" to "{longest}"')
        return duration

    return read


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
    if isinstance(value, str) and value == "all":
        return ALL_PORTS
    return list_of(
        value, port_range, 'ports and ranges, such as ["8080", "9000-9099"], or the word "all"', fit=_overlapping
    )


def endpoint(value: Any, example: str) -> Endpoint:
    """An address and a port, "ADDR:PORT" or "[ADDR]:PORT"; `example` says how they may be written."""
    text = _string(value, example)
    match = re.fullmatch(r"(?:\[([^\[\]]*)\]|([^:\[\]]*)):([0-9]{1,5})", text)
    if match is None:
        if _is_address(text) and ":" in text:
            raise InvalidError(
                f"is an IPv6 address, or one whose port cannot be told from it; write {example}, IPv6 in brackets"
            )
        raise InvalidError(f"is no address and port; write {example}")
    host, port = match[2] if match[1] is None else match[1], int(match[3])
    if "%" in host:
        raise InvalidError(f"has a scope, which cannot be given here; write {example}")
    if not _is_address(host) or (match[1] is not None) != (":" in host):
        raise InvalidError(f"has no address before its port (names are not looked up); write {example}")
    address = ip_address(host)
    if address.version == 6 and address.ipv4_mapped is not None:
        raise InvalidError(f'is IPv4 mapped into IPv6; write "{address.ipv4_mapped}:{port}"')
    if not 1 <= port <= 65535:
        raise InvalidError("has a port out of range; ports are 1 to 65535")
    return Endpoint(str(address), port)


def host_endpoint(value: Any, example: str) -> Endpoint:
    """As `endpoint`, but one to which a connection can be made."""
    read = endpoint(value, example)
    address = ip_address(read.host)
    if address.is_unspecified:
        raise InvalidError(
            f'is nobody\'s address; if this host is meant, write "{Endpoint(_LOOPBACK[address.version], read.port)}"'
        )
    if address.is_multicast or read.host == "255.255.255.255":
        raise InvalidError("has an address to which no TCP connection can be made; write one host's address")
    if address.version == 6 and address.is_link_local:
        raise InvalidError("is link-local, which says nothing without an interface; write an address that is unique")
    return read


def listen_endpoint(value: Any) -> Endpoint | None:
    """Where to listen, "ADDR:PORT"; nowhere: ""."""
    if isinstance(value, str) and not value:
        return None
    return endpoint(value, 'an address and a port, such as "127.0.0.1:15020", or "" for none')


def socket_file(value: Any) -> str | None:
    """Where to listen, "auto" or a path; nowhere: ""."""
    text = _string(value, '"auto", a path such as "/run/tproxyd/admin.sock", or "" for none')
    return unix_path(text, "/run/tproxyd/admin.sock") if text not in ("", "auto") else text or None


def unix_path(path: str, example: str) -> str:
    """An absolute path that has room in the address of a Unix socket; `example` is one as it may be written."""
    if not path.startswith("/") or path.endswith("/"):
        raise InvalidError(f'has no absolute path of a socket; write all of it, such as "{example}"')
    if "\0" in path:
        raise InvalidError("has a NUL character, which no path can have; remove it")
    try:
        length = len(os.fsencode(path))
    except UnicodeEncodeError:  # a lone surrogate, from a program that embeds us
        raise InvalidError("has a character that no path can have; remove it") from None
    if length > _LONGEST_PATH:
        raise InvalidError(
            f"has a path of {length} bytes, and a socket's address has room for {_LONGEST_PATH}; choose a shorter one, if need be "
            "through a symbolic link"
        )
    return path


def network(value: Any) -> Network:
    """A network or a bare address, IPv4 or IPv6."""
    read = special_network(value)
    if read.version == 6 and read.subnet_of(_MAPPED):
        raise InvalidError("is IPv4 mapped into IPv6, which no packet bears; write the IPv4 network itself")
    return read


def special_network(value: Any) -> Network:
    """A network that may be IPv4 mapped into IPv6: no packet should bear such an address, but one can be sent."""
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
    return read


def networks(value: Any) -> tuple[Network, ...]:
    """A list of networks."""
    return list_of(value, network, 'networks, such as ["192.0.2.0/24"]')


def named_networks(value: Any) -> tuple[Network, ...]:
    """A list of networks that are trusted with something, so none that is everybody."""

    def read(item: Any) -> Network:
        named = network(item)
        if not named.prefixlen:
            raise InvalidError(
                "is everybody, and whoever may say whom a connection comes from must be named; write the networks of your "
                "load balancers"
            )
        return named

    return list_of(value, read, 'networks, such as ["192.0.2.0/24"]')


def special_networks(value: Any) -> tuple[Network, ...]:
    """A list of networks that are refused unless they stand here, those of mapped IPv4 among them."""
    return list_of(value, special_network, 'networks, such as ["192.0.2.0/24"]')


def destinations(value: Any) -> tuple[Network | str, ...]:
    """A list of networks and the word "local"."""

    def read(item: Any) -> Network | str:
        return "local" if isinstance(item, str) and item == "local" else network(item)

    return list_of(value, read, 'networks, or "local", such as ["local", "192.0.2.0/24"]')


def interface(value: Any) -> str:
    """An interface's name, or the beginning of names and an asterisk."""
    text = _string(value, 'an interface name, such as "eth0" or "eth*"')
    if not 1 <= len(text.encode("utf-8", "surrogatepass")) <= 15:
        raise InvalidError("is no interface name: those have 1 to 15 bytes; write one that `ip link` shows")
    if text in (".", "..") or not text.isascii() or not re.fullmatch(r"[!#-.0-9;-\[\]-~]+", text):
        raise InvalidError(
            "is no interface name: spaces, quotes, slashes, colons, backslashes and non-ASCII characters cannot be in one; "
            "write one that `ip link` shows"
        )
    if "*" in text[:-1] or text == "*":
        raise InvalidError(
            'has an asterisk that does not end a name; write "eth*", or leave the list empty for every interface'
        )
    return text


def is_interface(name: str, pattern: str) -> bool:
    """Whether the pattern, a name or the beginning of names and an asterisk, takes in this name. No other character is special, as in nft."""
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def wildcard_over(name: str, names: Iterable[str]) -> str | None:
    """The widest wildcard among `names`, a set or a dict, that takes in `name` and more; "eth*" takes in "eth", too."""
    widest_first = (name[:end] + "*" for end in range(1, len(name.removesuffix("*")) + 1))
    return next((wildcard for wildcard in widest_first if wildcard in names and wildcard != name), None)


def interfaces(value: Any) -> tuple[str, ...]:
    """A list of interfaces to capture on."""

    def read(item: Any) -> str:
        name = interface(item)
        if name == "lo":
            raise InvalidError(
                "cannot be captured: it carries what this host sends to itself, and an app that calls itself must reach itself; "
                "remove it"
            )
        return name

    return list_of(value, read, _INTERFACES, fit=_taken_in)


def excluded_interfaces(value: Any) -> tuple[str, ...]:
    """A list of interfaces not to capture on; lo is never captured, naming it is harmless."""
    return list_of(value, interface, _INTERFACES, fit=_taken_in)


def protocols(value: Any) -> tuple[str, ...]:
    """["tcp"]; udp comes later."""
    read: tuple[str, ...] = list_of(value, choice("tcp", later=("udp",)), '["tcp"]')
    if not read:
        raise InvalidError('is empty; write ["tcp"], or switch capture off with mode = "off"')
    return read


def _string(value: Any, example: str = "a string") -> str:
    if not isinstance(value, str):
        raise InvalidError(f"is {toml_kind(value)}; write {example}, in quotes")
    return value


def _repeated(good: Mapping[int, Any]) -> dict[int, str]:
    first: dict[Any, int] = {}
    return {
        index: "stands in the list twice; remove one"
        for index, item in good.items()
        if first.setdefault(item, index) != index
    }


def _overlapping(good: Mapping[int, PortRange]) -> dict[int, str]:
    problems: dict[int, str] = {}
    widest: PortRange | None = None  # that which reaches furthest of those before; not always the one just before
    for index, item in sorted(good.items(), key=lambda pair: pair[1]):
        if widest is not None and item.first <= widest.last:
            problems[index] = f'overlaps "{widest}" in the same list; merge the two'
        if widest is None or item.last > widest.last:
            widest = item
    return problems


def _taken_in(good: Mapping[int, str]) -> dict[int, str]:
    # nft refuses a set whose elements overlap ("conflicting intervals"), and a wildcard is an interval of names.
    names = set(good.values())
    wider = {index: wildcard_over(name, names) for index, name in good.items()}
    return _repeated(good) | {
        index: f'is taken in by "{wildcard}" in the same list; remove one of the two'
        for index, wildcard in wider.items()
        if wildcard is not None
    }


def list_of(
    value: Any, read: Callable[[Any], T], example: str, *, fit: Callable[[Mapping[int, T]], dict[int, str]] = _repeated
) -> tuple[T, ...]:
    """Reads every item; `fit` finds, by index, those of the good ones that cannot stand beside the others."""
    if not isinstance(value, list | tuple):
        raise InvalidError(f"is {toml_kind(value)}; write an array of {example}")
    good: dict[int, T] = {}
    problems: dict[int, str] = {}
    for index, item in enumerate(value):
        try:
            good[index] = read(item)
        except InvalidError as invalid:
            problems[index] = invalid.cause
    problems |= fit(good)
    if problems:
        raise InvalidError(items=dict(sorted(problems.items())))
    return tuple(good.values())


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _or(words: Iterable[str]) -> str:
    quoted = [f'"{word}"' for word in words]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"
