"""What the keys of [upstream] may hold, where that differs from what other keys hold: target, source.

Readers like those in values.py. That a source does not go with a target, or a target is the listener, is seen in load.py.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

from tproxyd.config.values import Endpoint, InvalidError, UnixPath, host_endpoint, list_of, unix_path
from tproxyd.config.wording import toml_kind

__all__ = ["MOST_SOURCES", "source", "target"]

MOST_SOURCES = 64
"""Each is as many connections more to one server as there are local ports: 28,000, if nobody has changed that."""

_TARGETS = '"original", "loopback", an address and a port, such as "127.0.0.1:8080", or "unix:/run/app.sock"'
_WORDS = ("client", "auto", "proxy")
_SOURCES = '"client", "auto", "proxy", or addresses of this host, such as "127.0.0.6"'
_ADDRESS = 'an address, such as "127.0.0.6" or "2001:db8::6"'


def target(value: Any) -> str | Endpoint | UnixPath:
    """Where connections go: "original", "loopback", "ADDR:PORT" or "unix:/PATH"."""
    if not isinstance(value, str):
        raise InvalidError(f"is {toml_kind(value)}; write {_TARGETS}, in quotes")
    if value in ("original", "loopback"):
        return value
    if value.startswith("unix:"):
        return UnixPath(unix_path(value.removeprefix("unix:"), "unix:/run/app.sock"))
    if ":" in value or value[:1].isdigit():  # also an address without a port, or a port without an address
        return host_endpoint(value, 'an address and a port, such as "127.0.0.1:8080" or "[::1]:8080"')
    raise InvalidError(f"is none of its values; use {_TARGETS}")


def source(value: Any) -> str | tuple[str, ...]:
    """As whom connections are made: "client", "auto", "proxy", or addresses in their usual spelling, from one or from a list."""
    if isinstance(value, str):
        return value if value in _WORDS else (_address(value, f"is none of its values; use {_SOURCES}"),)
    if not isinstance(value, list | tuple):
        raise InvalidError(f"is {toml_kind(value)}; write {_SOURCES}, in quotes")
    if not value:
        raise InvalidError('is empty; write addresses, or "proxy" for the one that the route to the server has')
    if len(value) > MOST_SOURCES:
        raise InvalidError(f"has {len(value)} addresses, {MOST_SOURCES} at most; leave some out")
    return list_of(value, _item, "addresses")


def _item(value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidError(f"is {toml_kind(value)}; write {_ADDRESS}, in quotes")
    if value in _WORDS:
        raise InvalidError(f"is no address; write {_ADDRESS}, or the word alone, without brackets")
    return _address(value, f"is no address; write {_ADDRESS}")


def _address(text: str, otherwise: str) -> str:
    """One that a socket can be bound to; `otherwise` is the problem of what is no address at all."""
    host, slash, _ = text.partition("/")
    host, scope, _ = host.partition("%")
    try:
        address = ip_address(host)
    except ValueError:
        raise InvalidError(otherwise) from None
    if slash:
        raise InvalidError("is a network; write those of its addresses that this host has, one by one")
    if scope:
        raise InvalidError("has a scope, which cannot be given here; write an address that is unique without it")
    if address.version == 6 and address.ipv4_mapped is not None:
        raise InvalidError(f'is IPv4 mapped into IPv6; write "{address.ipv4_mapped}"')
    if address.is_unspecified:
        raise InvalidError('is nobody\'s address; write "proxy" for the one that the route to the server has')
    if address.is_multicast or host == "255.255.255.255":
        raise InvalidError("is no address from which a connection can be made; write one that this host has")
    if address.version == 6 and address.is_link_local:
        raise InvalidError("is link-local, which says nothing without an interface; write an address that is unique")
    return str(address)
