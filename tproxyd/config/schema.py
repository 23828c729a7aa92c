"""The tables and keys of the configuration, with defaults, readers and meaning. The one place where a key is declared.

Behind each key's reader stands what it is for users: the references (docs/configuration.md, the JSON schema, tproxyd.toml(5), the default
file) are made from it, and from the first paragraph of a table's docstring. `LATER` names the keys of the contract that this version does not have: they are refused by name.
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

    mode: Annotated[
        Literal["tproxy", "redirect", "off"],
        read.choice("tproxy", "redirect", "off"),
        'How packets are taken: "tproxy", or "redirect" (NAT, for kernels without nft TPROXY), or "off", which takes none.',
    ] = "tproxy"
    protocols: Annotated[tuple[str, ...], read.protocols, 'What is captured; "tcp" is all that this version knows.'] = (
        "tcp",
    )
    ports: Annotated[
        tuple[PortRange, ...],
        read.ports,
        'Destination ports and ranges to capture, such as ["8080", "9000-9099"], or "all". Empty: nothing is captured.',
    ] = ()
    exclude_ports: Annotated[tuple[PortRange, ...], read.ports, "Ports and ranges that are never captured."] = (
        PortRange(22, 22),
    )
    interfaces: Annotated[
        tuple[str, ...],
        read.interfaces,
        'Interfaces on which connections arrive, by name or by the beginning of names, such as "eth*". Empty: every one but lo.',
    ] = ()
    exclude_interfaces: Annotated[
        tuple[str, ...], read.excluded_interfaces, "Interfaces on which nothing is captured."
    ] = ()
    sources: Annotated[
        tuple[Network, ...],
        read.networks,
        'Networks of clients, IPv4 and IPv6, such as ["192.0.2.0/24", "2001:db8::/32"]. Empty: every client.',
    ] = ()
    exclude_sources: Annotated[tuple[Network, ...], read.networks, "Networks of clients that are never captured."] = ()
    destinations: Annotated[
        tuple[Network | Literal["local"], ...],
        read.destinations,
        'Networks that clients connect to, or "local": the addresses of this host. Empty: every destination, forwarded connections included.',
    ] = ()
    exclude_destinations: Annotated[
        tuple[Network | Literal["local"], ...], read.destinations, 'Networks to which nothing is captured, or "local".'
    ] = ()
    when_down: Annotated[
        Literal["bypass", "refuse"],
        read.choice("bypass", "refuse"),
        'What clients get once the daemon has died, SIGKILL included: "bypass", the destination itself, or "refuse", a reset.',
    ] = "bypass"

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
    """The listeners: on 127.0.0.1 and ::1, or with `capture.mode` "redirect" on every address."""

    port: Annotated[
        int,
        read.integer(1, 65535),
        "The port of the listeners. Add it to net.ipv4.ip_local_reserved_ports, so that no other program gets it by chance.",
    ] = 15006
    backlog: Annotated[
        int,
        read.integer(1, 1_000_000),
        "How many connections may wait to be accepted; the kernel limits it to net.core.somaxconn.",
    ] = 4096
    proxy_protocol_from: Annotated[
        tuple[Network, ...],
        read.named_networks,
        "Networks of proxies whose connections have to begin with a PROXY header, version 1 or 2, which says for whom they speak.",
    ] = ()


class Routing(msgspec.Struct, frozen=True, kw_only=True):
    """Marks, route table and priorities; `priority` and the two after it are used."""

    mark: Annotated[
        Mark | Literal["auto"],
        read.mark,
        'The mark of steered packets, value and mask, such as "0x1000000/0x3000000". "auto": the first pair of a list that nobody else uses.',
    ] = "auto"
    upstream_mark: Annotated[
        Mark | Literal["auto"],
        read.mark,
        "The mark of packets that answer connections made in a client's name, value and mask.",
    ] = "auto"
    table: Annotated[
        int,
        read.integer(1, 0xFFFFFFFF, never=(253, 254, 255), why="253, 254 and 255 are default, main and local"),
        "The route table that delivers steered packets to this host.",
    ] = 133
    priority: Annotated[
        int,
        read.integer(1, 32763, why="its three rules stand between local at 0 and main at 32766"),
        "The priority of the first ip rule; the two after it are used, too.",
    ] = 5233


class Upstream(msgspec.Struct, frozen=True, kw_only=True):
    """Where a connection goes, as whom, and how the server is told who its client is.

    `connect_timeout` is in seconds. A tuple of sources has addresses in their usual spelling, at least one.
    """

    target: Annotated[
        Literal["original", "loopback"] | Endpoint | UnixPath,
        upstream.target,
        'Where connections go: "original", where their clients wanted to go; "loopback", 127.0.0.1 or ::1 at the same port; "ADDR:PORT"; or "unix:/PATH".',
    ] = "original"
    source: Annotated[
        Literal["client", "auto", "proxy"] | tuple[str, ...],
        upstream.source,
        'As whom they are made: "client", the client\'s own address or none; "auto", the client\'s where that is possible; "proxy", this host\'s; or addresses of this host, one such as "127.0.0.6" or a list.',
    ] = "auto"
    proxy_protocol: Annotated[
        Literal["off", "v1", "v2"],
        read.choice("off", "v1", "v2"),
        'Whether a PROXY header tells the server who its client is. "v2" also tells ALPN and SNI of a TLS client.',
    ] = "off"
    connect_timeout: Annotated[float, read.some_seconds, "How long a connection to the server may take to be made."] = (
        5.0
    )


class Relay(msgspec.Struct, frozen=True, kw_only=True):
    """Who moves the bytes, and how long something may last.

    0 workers: a loop in this process. Times are in seconds.
    """

    engine: Annotated[
        Literal["auto", "copy", "splice"],
        read.choice("auto", "copy", "splice"),
        'How bytes are moved: "copy", through the program; "splice", past it in the kernel; "auto", whichever is better at the moment.',
    ] = "auto"
    workers: Annotated[
        int | Literal["auto"],
        read.or_auto(read.integer(0, 64)),
        'How many processes relay. 0: a thread of the daemon does; "auto": one process a core.',
    ] = 1
    busy_poll: Annotated[
        float,
        read.brief_seconds("0us", "10ms", why="it would burn a core for nothing"),
        "How long a relay loop asks for work again and again before it sleeps, at most 10ms: less latency for more CPU.",
    ] = 0.0
    idle_timeout: Annotated[float, read.some_seconds, "How long no byte may move before a connection is ended."] = (
        3600.0
    )
    half_close_timeout: Annotated[
        float,
        read.some_seconds,
        "How long a connection may go on without a byte once one side has ended its direction.",
    ] = 60.0


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How many connections there may be at once.

    "auto": as many as files may be open. 0 a source: as many as there are.
    """

    max_connections: Annotated[
        int | Literal["auto"],
        read.or_auto(read.integer(1, 1_000_000)),
        'How many connections there may be at once; more wait in the listener\'s queue. "auto": as many as the limit of open files allows.',
    ] = "auto"
    max_connections_per_source: Annotated[
        int,
        read.integer(0, 1_000_000),
        "How many of one client address there may be at once; more are reset. 0: no limit.",
    ] = 0


class PolicyRule(msgspec.Struct, frozen=True, kw_only=True):
    """A rule matches where all of its keys do; the first that matches decides.

    An empty list means every one. An Endpoint is where to forward instead.
    """

    name: Annotated[
        str, rules.rule_name, "The rule's name, which stands in the access log; no two rules have the same."
    ]
    sources: Annotated[tuple[Network, ...], read.networks, "Networks of clients. Left out: every client."] = ()
    destinations: Annotated[
        tuple[Network, ...], read.networks, "Networks that clients connect to. Left out: every destination."
    ] = ()
    ports: Annotated[tuple[PortRange, ...], rules.rule_ports, 'Destination ports and ranges, or "all".'] = ALL_PORTS
    protocols: Annotated[tuple[str, ...], read.protocols, "The protocols that the rule is about."] = ("tcp",)
    action: Annotated[
        Literal["forward", "refuse"] | Endpoint,
        rules.action,
        'What becomes of the connection: "forward", to where it was going; "refuse", a reset; or { forward = "ADDR:PORT" }, there instead.',
    ]


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of a connection: the first rule that matches says it, else `default`.

    `sniff_timeout` is in seconds.
    """

    default: Annotated[
        Literal["forward", "refuse"],
        read.choice("forward", "refuse"),
        "What becomes of a connection that no rule decides.",
    ] = "forward"
    rule: Annotated[
        tuple[PolicyRule, ...], PolicyRule, "Rules in order. Those of conf.d come behind those of the main file."
    ] = ()
    allow_special: Annotated[
        tuple[Network, ...],
        read.special_networks,
        "Special destinations (loopback, link-local, cloud metadata, multicast, mapped addresses) for which the rules decide; the others are refused before any rule.",
    ] = ()
    sniff_timeout: Annotated[
        float,
        read.brief_seconds("0s", "10s", why="who waits for the server to speak first would wait as long"),
        'How long a client\'s first bytes are waited for where a PROXY header is to tell ALPN and SNI, at most 10s. "0s": not at all.',
    ] = 0.3


class Drain(msgspec.Struct, frozen=True, kw_only=True):
    """What happens between SIGTERM and the end.

    `timeout` is in seconds.
    """

    timeout: Annotated[
        float, read.seconds, "How long live connections have to end after SIGTERM; then they are reset."
    ] = 30.0


class Admin(msgspec.Struct, frozen=True, kw_only=True):
    """Where the daemon is asked, and tells about itself.

    None: nowhere. `socket` is a path, or "auto": one of the namespace's (daemon/admin_socket.py).
    """

    socket: Annotated[
        str | None,
        read.socket_file,
        'The Unix socket at which `tproxyd connections`, `reload`, `drain` and `top` ask. "auto": /run/tproxyd/admin.sock in the initial '
        "network namespace, else /run/tproxyd/netns-INODE.sock; a path; empty: none.",
    ] = "auto"

    metrics: Annotated[
        Endpoint | None,
        read.listen_endpoint,
        'Where Prometheus metrics, /healthz and /readyz are served, such as "127.0.0.1:15020". Empty: nowhere.',
    ] = None


class Log(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon's messages on stderr (`level`) and the access log on stdout (`format`, `access`)."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        read.choice("debug", "info", "warning", "error"),
        "The least important messages that are written.",
    ] = "info"
    format: Annotated[
        Literal["auto", "text", "json"],
        read.choice("auto", "text", "json"),
        'The form of the access log. "auto": text on a terminal, JSON otherwise.',
    ] = "auto"
    access: Annotated[bool, read.flag, "Whether there is an access log, one line a connection."] = True


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
