"""Pure: whose address and port a connection to the upstream bears, and why so. `upstream.source` becomes one plain function.

What is possible depends on how the answers come back, for they are sent to the address that the connection bears:

- **Another host's** go by this host again when it is their way to the client: a gateway's case, where the ruleset knows our sockets by
  their address and port. Where the client dialled this very host, the answers of another one would go past it.
- **A local app's** are sent back by the ruleset, which remembers the connection (plan/ruleset.py), or, from a loopback address, by an
  ip rule. With the client's own port it would be the very connection that was intercepted, unless address or port are others than
  those that the client dialled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:  # who asks need not be able to read a configuration
    from tproxyd.config import Config

__all__ = ["Choice", "Choose", "Way", "compile_source"]

Way = Literal["client", "client_ip", "chosen_port", "pool", "proxy"]
"""The client's address and port; its address with a port of the kernel's choice; with one of ours, towards a local app; an address of
`upstream.source`; an address of this host, as any program's."""


class Choice(NamedTuple):
    """`ways` in the order of trying: the next one where the kernel says that the port is taken. Without any the connection is refused.
    `why` ends the sentence "the server sees ..."; of a refused one, "... would see". `pool`: the addresses of the way of this name."""

    ways: tuple[Way, ...]
    why: str
    pool: tuple[str, ...] = ()


Choose = Callable[[str, tuple[str, int], tuple[str, int], bool, bool], Choice]
"""Takes the client's address, what it dialled, what is dialled now (the same object if that is the same), and whether the
latter and the former are addresses of this namespace."""

_LINK_LOCAL = ("fe8", "fe9", "fea", "feb")  # fe80::/10

_TO_SERVER: tuple[Way, ...] = ("client", "client_ip")
_TO_APP: tuple[Way, ...] = ("client", "chosen_port")
_TO_THE_APP: tuple[Way, ...] = ("chosen_port",)

_SERVER = "the client's own address, and its port where that can be had: its answers come back this way"
_APP = "the client's own address, and its port where that can be had: the ruleset sends its answers back here"
_THE_APP = (
    "the client's own address, from another port (with its own it would be the connection that was intercepted): the ruleset sends its "
    "answers back here"
)
_ON_LOOPBACK = "the client's own address and port: an ip rule sends its answers back here"


def compile_source(config: Config) -> Choose:
    """One function for `upstream.source`, for connections to an address."""
    source = config.upstream.source
    if isinstance(source, tuple):
        return _from_pool(source)
    if source == "proxy":
        return _always(Choice(("proxy",), 'this host as the client: upstream.source = "proxy"'))
    if config.redirects:
        return _always(Choice(("proxy",), 'this host as the client: capture.mode = "redirect"'))
    must = source == "client"
    sent_back = config.targets_loopback
    captured, others = config.capture.taken_ports, config.target_ports

    def some(ways: tuple[Way, ...], why: str) -> Choice:
        return Choice(ways if must else (*ways, "proxy"), why)

    def none(why: str) -> Choice:
        return Choice(() if must else ("proxy",), f"this host as the client: {why}")

    server, app, the_app = some(_TO_SERVER, _SERVER), some(_TO_APP, _APP), some(_TO_THE_APP, _THE_APP)
    on_loopback = some(_TO_APP, _ON_LOOPBACK)
    elsewhere = (
        server
        if must
        else none("its answers to the client would not come by here, where the client has dialled this host")
    )
    other_family = none("the client is of the other family")
    link_local = none("the client's address is of one link alone")
    itself = none("the server is the client itself, and would not take from the network what bears its own address")
    unknown_port = none("the ruleset does not know this port, which no key names")
    no_rule = none("no key names a loopback address, so there is no ip rule for its answers")

    def choose(
        client: str, dialled: tuple[str, int], target: tuple[str, int], is_local: bool, dialled_local: bool
    ) -> Choice:
        if client.startswith(_LINK_LOCAL):
            return link_local
        if target is dialled:
            return the_app if is_local else server
        if (":" in client) != (":" in target[0]):
            return other_family
        if client == target[0]:
            return itself
        port = target[1]
        if port not in others and not any(first <= port <= last for first, last in captured):
            return unknown_port
        if is_local:
            if target[0] == "::1" or target[0].startswith("127."):
                return on_loopback if sent_back else no_rule
            return the_app if target == dialled else app
        return elsewhere if dialled_local else server

    return choose


def _always(choice: Choice) -> Choose:
    return lambda client, dialled, target, is_local, dialled_local: choice


def _from_pool(source: tuple[str, ...]) -> Choose:
    """Where none of the addresses fits, it is this host's own: one of the other family, or a loopback one towards another host."""
    choices = {}
    for ipv6 in (False, True):
        family = tuple(host for host in source if (":" in host) == ipv6)
        for is_local in (False, True):
            pool = (
                family if is_local else tuple(host for host in family if not host.startswith("127.") and host != "::1")
            )
            choices[ipv6, is_local] = (
                Choice(("pool",), f"{' or '.join(pool)}: upstream.source", pool)
                if pool
                else Choice(("proxy",), "this host as the client: no address of upstream.source fits")
            )
    return lambda client, dialled, target, is_local, dialled_local: choices[":" in target[0], is_local]
