"""The tables and keys of the configuration, with defaults, readers and meaning. The one place where a key is declared.

`LATER` names the keys of the contract that this version does not have: they are refused by name.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Annotated, Any, Literal

import msgspec

from tproxyd.config import rules, upstream
from tproxyd.config import values as read
from tproxyd.config.values import ALL_PORTS, Endpoint, Mark, Network, PortRange, UnixPath
from tproxyd.errors import ConfigError

__all__ = [
    "LATER",
    "Admin",
    "Capture",
    "Config",
    "Drain",
    "Limits",
    "Listen",
    "Log",
    "Policy",
    "PolicyRule",
    "Relay",
    "Routing",
    "Upstream",
]


class Capture(msgspec.Struct, frozen=True, kw_only=True):
    """Which packets are taken. An empty include list means every one; what is excluded wins."""

    mode: Annotated[Literal["tproxy", "redirect", "off"], read.choice("tproxy", "redirect", "off")] = "tproxy"
    protocols: Annotated[tuple[str, ...], read.protocols] = ("tcp",)
    ports: Annotated[tuple[PortRange, ...], read.ports] = ()
    exclude_ports: Annotated[tuple[PortRange, ...], read.ports] = (PortRange(22, 22),)
    interfaces: Annotated[tuple[str, ...], read.interfaces] = ()
    exclude_interfaces: Annotated[tuple[str, ...], read.excluded_interfaces] = ()
    sources: Annotated[tuple[Network, ...], read.networks] = ()
    exclude_sources: Annotated[tuple[Network, ...], read.networks] = ()
    destinations: Annotated[tuple[Network | Literal["local"], ...], read.destinations] = ()
    exclude_destinations: Annotated[tuple[Network | Literal["local"], ...], read.destinations] = ()
    when_down: Annotated[Literal["bypass", "refuse"], read.choice("bypass", "refuse")] = "bypass"

    def takes_port(self, port: int) -> bool:
        """Whether a connection to this port may be captured."""
        return any(first <= port <= last for first, last in self.taken_ports)

    @property
    def taken_ports(self) -> list[tuple[int, int]]:
        """The ranges of ports to which connections may be captured: those that are named, without the excluded ones."""
        taken = [(one.first, one.last) for one in self.ports]
        for excluded in self.exclude_ports:
            taken = [
                part
                for first, last in taken
                for part in ((first, min(last, excluded.first - 1)), (max(first, excluded.last + 1), last))
                if part[0] <= part[1]
            ]
        return taken


class Listen(msgspec.Struct, frozen=True, kw_only=True):
    """The listeners: on 127.0.0.1 and ::1, or with `capture.mode` "redirect" on every address.

    `proxy_protocol_from`: clients whose connections begin with a PROXY header, which says for whom they speak.
    """

    port: Annotated[int, read.integer(1, 65535)] = 15006
    backlog: Annotated[int, read.integer(1, 1_000_000)] = 4096
    proxy_protocol_from: Annotated[tuple[Network, ...], read.named_networks] = ()


class Routing(msgspec.Struct, frozen=True, kw_only=True):
    """Marks, route table and priorities; `priority` and the two after it are used."""

    mark: Annotated[Mark | Literal["auto"], read.mark] = "auto"
    upstream_mark: Annotated[Mark | Literal["auto"], read.mark] = "auto"
    table: Annotated[
        int, read.integer(1, 0xFFFFFFFF, never=(253, 254, 255), why="253, 254 and 255 are default, main and local")
    ] = 133
    priority: Annotated[
        int, read.integer(1, 32763, why="its three rules stand between local at 0 and main at 32766")
    ] = 5233


class Upstream(msgspec.Struct, frozen=True, kw_only=True):
    """Where a connection goes, as whom, and how the server is told who its client is. `connect_timeout` in seconds.

    A tuple of sources has addresses in their usual spelling, at least one.
    """

    target: Annotated[Literal["original", "loopback"] | Endpoint | UnixPath, upstream.target] = "original"
    source: Annotated[Literal["client", "auto", "proxy"] | tuple[str, ...], upstream.source] = "auto"
    proxy_protocol: Annotated[Literal["off", "v1", "v2"], read.choice("off", "v1", "v2")] = "off"
    connect_timeout: Annotated[float, read.some_seconds] = 5.0


class Relay(msgspec.Struct, frozen=True, kw_only=True):
    """Who moves the bytes (0 workers: a loop in this process), and how long something may last, in seconds."""

    engine: Annotated[Literal["auto", "copy", "splice"], read.choice("auto", "copy", "splice")] = "auto"
    workers: Annotated[int | Literal["auto"], read.or_auto(read.integer(0, 64))] = 1
    busy_poll: Annotated[float, read.brief_seconds("0us", "10ms", why="it would burn a core for nothing")] = 0.0
    idle_timeout: Annotated[float, read.some_seconds] = 3600.0
    half_close_timeout: Annotated[float, read.some_seconds] = 60.0


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How many connections at once; "auto": as many as files may be open. 0 a source: as many as there are."""

    max_connections: Annotated[int | Literal["auto"], read.or_auto(read.integer(1, 1_000_000))] = "auto"
    max_connections_per_source: Annotated[int, read.integer(0, 1_000_000)] = 0


class PolicyRule(msgspec.Struct, frozen=True, kw_only=True):
    """Matches where all of its lists do; an empty one means every one. An Endpoint is where to forward instead."""

    name: Annotated[str, rules.rule_name]
    sources: Annotated[tuple[Network, ...], read.networks] = ()
    destinations: Annotated[tuple[Network, ...], read.networks] = ()
    ports: Annotated[tuple[PortRange, ...], rules.rule_ports] = ALL_PORTS
    protocols: Annotated[tuple[str, ...], read.protocols] = ("tcp",)
    action: Annotated[Literal["forward", "refuse"] | Endpoint, rules.action]


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of a connection: the first rule that matches says it, else `default`.

    `allow_special`: special destinations for which that is so, too; the others are refused before any rule. `sniff_timeout`: how
    long, in seconds, the first bytes of a client are waited for where something depends on them.
    """

    default: Annotated[Literal["forward", "refuse"], read.choice("forward", "refuse")] = "forward"
    rule: Annotated[tuple[PolicyRule, ...], PolicyRule] = ()
    allow_special: Annotated[tuple[Network, ...], read.special_networks] = ()
    sniff_timeout: Annotated[
        float, read.brief_seconds("0s", "10s", why="who waits for the server to speak first would wait as long")
    ] = 0.3


class Drain(msgspec.Struct, frozen=True, kw_only=True):
    """How long live connections have after SIGTERM, in seconds."""

    timeout: Annotated[float, read.seconds] = 30.0


class Admin(msgspec.Struct, frozen=True, kw_only=True):
    """Where the daemon is asked, and tells about itself; None: nowhere. `socket` is a path, or "auto": one of the namespace's (daemon/admin_socket.py)."""

    socket: Annotated[str | None, read.socket_file] = "auto"

    metrics: Annotated[Endpoint | None, read.listen_endpoint] = None


class Log(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon's messages on stderr (`level`) and the access log on stdout (`format`, `access`)."""

    level: Annotated[Literal["debug", "info", "warning", "error"], read.choice("debug", "info", "warning", "error")] = (
        "info"
    )
    format: Annotated[Literal["auto", "text", "json"], read.choice("auto", "text", "json")] = "auto"
    access: Annotated[bool, read.flag] = True


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The whole configuration. Two configs with the same content are equal."""

    capture: Capture = Capture()
    listen: Listen = Listen()
    routing: Routing = Routing()
    upstream: Upstream = Upstream()
    relay: Relay = Relay()
    limits: Limits = Limits()
    policy: Policy = Policy()
    drain: Drain = Drain()
    admin: Admin = Admin()
    log: Log = Log()

    @property
    def captures(self) -> bool:
        """Whether anything would be captured at all."""
        return self.capture.mode != "off" and bool(self.capture.ports)

    @property
    def redirects(self) -> bool:
        """Whether NAT brings connections to the listeners, and not tproxy."""
        return self.capture.mode == "redirect"

    @property
    def spoofs(self) -> bool:
        """Whether upstream sockets may bear an address that is none of this host's: the client's, or one that is given."""
        return not self.redirects and self.upstream.source != "proxy"

    @property
    def targets_loopback(self) -> bool:
        """Whether connections may be made to a loopback address: there the kernel sends no answer to another host's address."""
        targets = [self.upstream.target, *(rule.action for rule in self.policy.rule)]
        return "loopback" in targets or any(
            isinstance(target, Endpoint) and ip_address(target.host).is_loopback for target in targets
        )

    def arrives_at_port(self, port: int) -> bool:
        """Whether this is the local port of a client's connection, as its socket here has it."""
        return port == self.listen.port if self.redirects else self.capture.takes_port(port)

    def relays_port(self, port: int) -> bool:
        """Whether connections may be made to this port: a captured one, or one of `target_ports`."""
        return self.capture.takes_port(port) or port in self.target_ports

    @property
    def target_ports(self) -> frozenset[int]:
        """The ports of the addresses that connections are made to in place of their own: by policy rules, and by `upstream.target`."""
        targets = (self.upstream.target, *(rule.action for rule in self.policy.rule))
        return frozenset(target.port for target in targets if isinstance(target, Endpoint))

    def require_captures(self) -> None:
        """Raises ConfigError if nothing would be captured."""
        if not self.captures:
            raise ConfigError(
                'nothing to capture: `capture.ports` is empty or `capture.mode` is "off"; name ports, e.g. ports = ["8080"]'
            )


LATER: dict[str, tuple[str, ...] | None] = {
    "policy.rule": ("interfaces", "workloads", "sni", "alpn", "http_host"),
    "workload": None,
    "outbound": None,
}
"""Keys of later versions by table; None: the whole table."""


@functools.cache
def keys_of(table: type[msgspec.Struct]) -> Mapping[str, Any]:
    """A table's keys and their readers. In place of one stands a type: of the table, or of each table of an array."""
    from typing import get_type_hints

    hints = get_type_hints(table, include_extras=True)
    return {name: hint.__metadata__[0] if hasattr(hint, "__metadata__") else hint for name, hint in hints.items()}
