"""What each way to the upstream keeps of the client, measured at a real server: nginx says who its peer is, and what a PROXY header has
told it. HAProxy, which reads the same header by code of its own, has to agree.

One lab has both layouts: a client that dials the proxy (local) or a foreign address behind it (forwarded). Behind the proxy are two
servers, of which one answers the client through the proxy, and the other one past it. Knows how a row is measured and how rows
become the tables of docs/addresses.md; refuses to know what should be in them.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import trio

from netns_tests.headers import open_haproxy
from tproxyd.net.sockets import format_address
from tproxyd.testing import Lab, LabError, LabProcess, Link, Node, Route, Topology, activate_conntrack, conntrack_count
from tproxyd.testing.daemon import LabDaemon, open_daemon
from tproxyd.testing.plugin import OpenLab

__all__ = [
    "CONNECTED",
    "FAMILIES",
    "HEADERS",
    "LAYOUTS",
    "SOURCES",
    "TARGETS",
    "Field",
    "Row",
    "measure",
    "open_field",
    "sources_with",
    "table_of",
]

Family = Literal["v4", "v6"]
FAMILIES: tuple[Family, ...] = ("v4", "v6")

LAYOUTS = ("local", "forwarded")
"""What the client has dialled: the proxy, or a host behind it."""

TARGETS = {
    "original": '`"original"`',
    "loopback": '`"loopback"`',
    "here": "`ADDR:PORT` of this host",
    "back": "`ADDR:PORT` of a host behind",
    "past": "`ADDR:PORT` of a host beside",
    "other-family": "`ADDR:PORT` of the other family",
    "unix": "`unix:/PATH`",
}
"""Those of `upstream.target`, and how the table says so."""

OWN_ADDRESS = {"v4": "192.0.2.129", "v6": "2001:db8:6::6"}  # of the proxy, on lo
SOURCES = {
    "client": ('"client"', '`"client"`'),
    "auto": ('"auto"', '`"auto"`'),
    "proxy": ('"proxy"', '`"proxy"`'),
    "127.0.0.6": ('"127.0.0.6"', '`"127.0.0.6"`'),
    "own": (str(list(OWN_ADDRESS.values())), '`["ADDR4", "ADDR6"]`'),
}
"""Those of `upstream.source`: what the configuration has, and how the table says so."""

HEADERS = ("off", "v1", "v2")
"""Those of `upstream.proxy_protocol`, the column PROXY."""


def sources_with(mode: str, header: str) -> tuple[str, ...]:
    """Those that are measured with it. A header changes nothing of how a connection is made, so few show that: one in the client's name as
    far as that is possible, and one never, which in redirect mode is the same."""
    if header == "off":
        return tuple(SOURCES)
    return ("auto", "proxy") if mode == "tproxy" else ("auto",)


PEERS = {
    "both": "the client",
    "address": "the client's address, another port",
    "given": "the given address",
    "proxy": "this host",
    "nobody": "no address",
    "78": "nothing: exit code 78",
    "refused_by_policy": "nothing: `refused_by_policy`",
    "upstream_timeout": "nothing: `upstream_timeout`",
}
"""As whom the server sees its peer, or what there is instead of a connection; and how the table says so."""

CONNECTED = ("both", "address", "given", "proxy", "nobody")
"""Those of PEERS that are one."""

_TOLD = {"client": "the client"}
"""What the header has told of: the client, and what it has dialled."""

_FOREIGN = {"v4": "203.0.113.9", "v6": "2001:db8:f::9"}  # the server answers for them
_BY_RULES = {"back": 8081, "past": 8082, "other-family": 8083}
"""Ports with rules of the policy, beside 8080, which goes to `upstream.target`: one daemon serves several targets."""
_HERE, _HERE_HAPROXY = 8084, 8085  # the same, for those that expect headers; HAProxy has no row of its own
_APP_PORT, _HAPROXY_PORT = 9090, 9091  # where the ADDR:PORT targets are; not captured
# Where the answers go past the proxy no connection comes about, and that is waited for. The others need some milliseconds.
_CONNECT_TIMEOUT = "500ms"

_FIELD = Topology(
    links=(
        Link("proxy:eth0", "client:eth0", v4="192.0.2.0/25", v6="2001:db8:1::/64"),
        Link("proxy:eth1", "back:eth0", v4="198.51.100.0/25", v6="2001:db8:2::/64"),
        Link("proxy:eth2", "past:eth0", v4="198.51.100.128/25", v6="2001:db8:3::/64"),
        Link("client:eth1", "past:eth1", v4="203.0.113.128/25", v6="2001:db8:4::/64"),
    ),
    routes=(
        Route("client", "0.0.0.0/0", "192.0.2.1"),
        Route("client", "::/0", "2001:db8:1::1"),
        Route("back", "0.0.0.0/0", "198.51.100.1"),
        Route("back", "::/0", "2001:db8:2::1"),
        Route("past", "0.0.0.0/0", "198.51.100.129"),
        Route("past", "::/0", "2001:db8:3::1"),
        Route("past", "192.0.2.2/32", "203.0.113.129"),
        Route("past", "2001:db8:1::2/128", "2001:db8:4::1"),
        Route("proxy", "203.0.113.0/25", "198.51.100.2"),
        Route("proxy", "2001:db8:f::/48", "2001:db8:2::2"),
    ),
    forwarding=("proxy",),
    anyip=(("back", "203.0.113.0/25"), ("back", "2001:db8:f::/48")),
    addresses=(("proxy:lo", f"{OWN_ADDRESS['v4']}/32"), ("proxy:lo", f"{OWN_ADDRESS['v6']}/128")),
)


class Row(NamedTuple):
    """What one client met. `entries`: of conntrack, a connection. `sysctls`: names of those that were others while the daemon ran.
    `told`: what the server had from a PROXY header."""

    layout: str
    target: str
    source: str
    header: str
    family: Family
    peer: str
    entries: float
    sysctls: tuple[str, ...] = ()
    told: str = ""


class Field:
    """The lab in which rows are measured: an nginx in each node but the client, and conntrack at work in the proxy. With `headers` the servers
    expect PROXY headers, of either version, and a HAProxy is in the proxy, too."""

    def __init__(self, lab: Lab, directory: Path, *, headers: bool) -> None:
        self.lab, self.headers = lab, headers
        self.client, self.proxy = lab["client"], lab["proxy"]
        self.directory = directory
        # Each connection has a port of its own. In redirect mode the log would not have that of the client where conntrack
        # still knows another connection from it: behind NAT the two would be the same.
        self._ports = itertools.count(20000)

    def address(self, layout: str, family: Family) -> str:
        """What the client dials."""
        return _FOREIGN[family] if layout == "forwarded" else _address(self.proxy, family)

    async def ask(self, address: str, port: int, request: bytes) -> tuple[str, bytes]:
        """One connection: the client's address and port, and what it was answered; nothing if it was reset."""
        own, own_port = _address(self.client, "v6" if ":" in address else "v4"), next(self._ports)
        answer = b""
        with suppress(ConnectionResetError, trio.BrokenResourceError):
            async with await self.client.connect(address, port, source=own, source_port=own_port) as stream:
                await stream.send_all(request)
                # The server ends a connection of HTTP/1.0 itself.
                while not (request == _CLIENT_ENDS_FIRST and answer.endswith(b"\n")):
                    chunk = await stream.receive_some()
                    if not chunk:
                        break
                    answer += chunk
        return format_address((own, own_port)), answer


@asynccontextmanager
async def open_field(open_lab: OpenLab, directory: Path, *, headers: bool = False) -> AsyncIterator[Field]:
    """Writes what nginx and HAProxy need into the directory. LabError where one is missing."""
    async with open_lab(_FIELD) as lab, AsyncExitStack() as stack:
        for name in ("proxy", "back", "past"):
            await stack.enter_async_context(_open_nginx(lab[name], directory, headers=headers))
        if headers:
            # A connection over TCP, to see that it listens, could still be ending when conntrack begins to count.
            door = f"{directory}/haproxy.sock"
            text = f"{_HAPROXY}    bind unix@{door}\n"
            await stack.enter_async_context(open_haproxy(lab["proxy"], directory, text, door))
        lab["proxy"].call(activate_conntrack)
        yield Field(lab, directory, headers=headers)


async def measure(field: Field, mode: str, source: str, header: str) -> list[Row]:
    """The rows of one `upstream.source` and one `upstream.proxy_protocol`: every layout, target and family."""
    rows = []
    before = await field.proxy.dump()
    for target in ("original", "loopback", "unix") if field.headers else ("original", "loopback", "here", "unix"):
        served = {target: 8080}
        if field.headers and target == "original":
            served |= {"here": _HERE, **_BY_RULES}
        elif target == "here":
            served |= _BY_RULES
        try:
            async with open_daemon(field.proxy, _configuration(field, mode, target, source, header)) as daemon:
                during = await field.proxy.dump()
                changed = {line.partition(" ")[0] for line in {*before.sysctls} ^ {*during.sysctls}}
                for name, port in served.items():
                    measured = await _measure_target(field, daemon, name, port, source)
                    for (layout, family), (peer, told, entries) in measured.items():
                        row = Row(layout, name, source, header, family, peer, entries, tuple(sorted(changed)), told)
                        rows.append(row)
                    if port == _HERE:
                        assert await _measure_target(field, daemon, name, _HERE_HAPROXY, source) == measured
                assert await daemon.stop() == 0
        except LabError as error:
            if "ended with 78" not in str(error):
                raise
            rows += [
                Row(layout, name, source, header, family, "78", 0)
                for name, layout, family in itertools.product(served, LAYOUTS, FAMILIES)
            ]
    assert await field.proxy.dump() == before
    return rows


_SERVER_ENDS_FIRST = b"GET / HTTP/1.0\r\n\r\n"
_CLIENT_ENDS_FIRST = b"GET / HTTP/1.1\r\nHost: app\r\n\r\n"


async def _measure_target(
    field: Field, daemon: LabDaemon, target: str, port: int, source: str
) -> dict[tuple[str, Family], tuple[str, str, float]]:
    """By layout and family the peer, one of PEERS, what a header told, and the conntrack entries a connection. All clients at once, which
    costs one time-out where there are several."""
    peers: dict[tuple[str, Family], tuple[str, str]] = {}

    async def ask(layout: str, family: Family) -> None:
        address = field.address(layout, family)
        seen = set()
        for request in requests:
            own, answer = await field.ask(address, port, request)
            record = await daemon.record(own)
            assert record["original_destination"] == format_address((address, port))
            seen.add(_seen(field, own, source, (layout, target), answer.decode(), record))
        assert len(seen) == 1, (target, layout, family, seen)
        peers[layout, family] = seen.pop()

    requests = (_SERVER_ENDS_FIRST, _CLIENT_ENDS_FIRST)
    before = field.proxy.call(conntrack_count)
    async with trio.open_nursery() as nursery:
        for layout, family in itertools.product(LAYOUTS, FAMILIES):
            nursery.start_soon(ask, layout, family)
    entries = (field.proxy.call(conntrack_count) - before) / (len(requests) * len(peers))
    return {cell: (*seen, entries) for cell, seen in peers.items()}


def _seen(
    field: Field, own: str, source: str, way: tuple[str, str], answer: str, record: Mapping[str, Any]
) -> tuple[str, str]:
    """As whom the server saw the connection of a client, `own`, and what a header told. It must be the server of this way (layout and
    target), and the access log must say the same."""
    if record["outcome"] != "closed":
        assert answer == ""
        return str(record["outcome"]), ""
    *words, told_host, told_port, dialled_host, dialled_port = answer.splitlines()[-1].split(" ")
    if not field.headers:
        assert not any((told_host, told_port, dialled_host, dialled_port))
        return _peer(field, own, source, way, words, record), ""
    assert format_address((told_host, int(told_port))) == own
    assert format_address((dialled_host, int(dialled_port))) == record["original_destination"]
    if words == ["haproxy"]:  # to which the header is all that it sees
        assert record["original_destination"].endswith(f":{_HERE_HAPROXY}")
        host, _, port = record["upstream_source"].rpartition(":")
        words = ["proxy", record["upstream"], host.strip("[]"), port]
    return _peer(field, own, source, way, words, record), "client"


def _peer(
    field: Field, own: str, source: str, way: tuple[str, str], words: Sequence[str], record: Mapping[str, Any]
) -> str:
    """Which of PEERS it was; `words` are where the connection had come to, and from whom."""
    target = way[1]
    node, local, host, port = words
    behind = target == "back" or way == ("forwarded", "original")
    assert node == ("back" if behind else "past" if target == "past" else "proxy")
    if target == "unix":
        assert host == "unix:"
        assert record["upstream"] == f"unix:{_socket(field.directory, field.proxy)}"
        assert record["upstream_source"] is None
        return "nobody"
    assert record["upstream"] == local
    if target == "original":
        assert local == record["original_destination"]
    elif target == "loopback":
        assert local in ("127.0.0.1:8080", "[::1]:8080")
    else:
        dialled = record["original_destination"].rpartition(":")[2]
        assert local.endswith(f":{_HAPROXY_PORT if dialled == str(_HERE_HAPROXY) else _APP_PORT}")
    peer = format_address((host, int(port)))
    assert record["upstream_source"] == peer
    if peer == own:
        return "both"
    if host in (field.client.v4, field.client.v6):
        return "address"
    if host in (source, *(OWN_ADDRESS.values() if source == "own" else ())):
        return "given"
    assert host in ("127.0.0.1", "::1", *field.proxy.v4_on.values(), *field.proxy.v6_on.values())
    return "proxy"


def _configuration(field: Field, mode: str, target: str, source: str, header: str) -> str:
    proxy, lab = field.proxy, field.lab
    where = {
        "here": format_address((proxy.v4, _APP_PORT)),
        "unix": f"unix:{_socket(field.directory, proxy)}",
    }
    # Name, port, clients, and where they are brought.
    rules = [] if field.headers else [("here v6", 8080, "::/0", (proxy.v6, _APP_PORT))]
    for clients, family, other in (("0.0.0.0/0", "v4", "v6"), ("::/0", "v6", "v4")):
        addresses = {name: _address(lab[name], family) for name in ("back", "past")}
        addresses["other-family"] = _address(proxy, other)
        rules += [
            (f"{name} {family}", _BY_RULES[name], clients, (address, _APP_PORT)) for name, address in addresses.items()
        ]
        for port, app in ((_HERE, _APP_PORT), (_HERE_HAPROXY, _HAPROXY_PORT)):
            rules.append((f"{port} {family}", port, clients, (_address(proxy, family), app)))
    lines = [
        f'[capture]\nmode = "{mode}"\nports = ["8080-{_HERE_HAPROXY}"]',
        f'[upstream]\ntarget = "{where.get(target, target)}"\nsource = {SOURCES[source][0]}\nproxy_protocol = "{header}"',
        f'connect_timeout = "{_CONNECT_TIMEOUT}"',
        *(
            f'[[policy.rule]]\nname = "{name}"\nports = ["{port}"]\nsources = ["{clients}"]\n'
            f'action = {{ forward = "{format_address(address)}" }}'
            for name, port, clients, address in (rules if target == ("original" if field.headers else "here") else ())
        ),
    ]
    return "\n".join(lines) + "\n"


@asynccontextmanager
async def _open_nginx(node: Node, directory: Path, *, headers: bool) -> AsyncIterator[LabProcess]:
    """It says where the connection has come to, from whom, and what a header says of both: "NODE OWN:PORT ADDRESS PORT ADDRESS PORT ADDRESS
    PORT"; nothing of the latter four without."""
    expects = " proxy_protocol" if headers else ""
    told = " ".join(f"$proxy_protocol_{name}" for name in ("addr", "port", "server_addr", "server_port"))
    servers = "".join(
        f"server {{ {' '.join(f'listen {listen}{expects};' for listen in listens)} "
        f'return 200 "{node.name} {own} $remote_addr $remote_port {told}\\n"; }}\n'
        for own, listens in (
            ("$server_addr:$server_port", [f"0.0.0.0:{port}" for port in (8080, _APP_PORT)]),
            ("[$server_addr]:$server_port", [f"[::]:{port}" for port in (8080, _APP_PORT)]),
            ("-", [f"unix:{_socket(directory, node)}"]),
        )
    )
    unused = (
        "client_body",
        "proxy",
        "fastcgi",
        "uwsgi",
        "scgi",
    )  # it makes directories for them, in /var/lib by default
    temporary = " ".join(f"{name}_temp_path {directory};" for name in unused)
    file = directory / f"{node.name}.conf"
    file.write_text(
        f"""\
daemon off;
master_process off;
pid {directory}/{node.name}.pid;
error_log stderr notice;
events {{ worker_connections 64; }}
http {{
    access_log off;
    {temporary}
    {servers}}}
""",
        encoding="utf-8",
    )
    async with node.process("nginx", "-p", str(directory), "-e", "stderr", "-c", str(file), collect=True) as process:
        await process.wait_for_output("getrlimit(RLIMIT_NOFILE)")  # the last that it says before it serves
        yield process


_HAPROXY = rf"""
frontend told
    bind 0.0.0.0:{_HAPROXY_PORT} accept-proxy
    bind [::]:{_HAPROXY_PORT} v6only accept-proxy
    http-request return status 200 content-type text/plain lf-string "haproxy %[src] %[src_port] %[dst] %[dst_port]\n"
"""
"""It takes the header's addresses for those of the connection."""


def _socket(directory: Path, node: Node) -> Path:
    return directory / f"{node.name}.sock"


def _address(node: Node, family: Family | str) -> str:
    return node.v4 if family == "v4" else node.v6


# The table

_HEAD = (
    "layout",
    "target",
    "source",
    "PROXY",
    "family",
    "ip kept",
    "port kept",
    "the server sees",
    "the header says",
    "conntrack",
    "sysctls",
)
_NOT_MEASURED = "-"


def table_of(rows: Sequence[Row]) -> str:
    """Markdown. Rows that say the same of several families, layouts, sources or targets share a line."""
    dimensions = [LAYOUTS, TARGETS, SOURCES, HEADERS, FAMILIES]
    orders: list[list[str]] = [list(values) for values in dimensions]
    lines: list[tuple[Any, ...]] = [(*((value,) for value in row[: len(orders)]), _cells(row)) for row in rows]
    for merged in (4, 3, 0, 2, 1):  # in the order of _HEAD
        shared: dict[Any, set[str]] = {}
        for line in lines:
            shared.setdefault((line[:merged], line[merged + 1 :]), set()).update(line[merged])
        lines = [
            (*before, tuple(sorted(values, key=orders[merged].index)), *behind)
            for (before, behind), values in shared.items()
        ]
    # Those with a header last; else by what is asked first: where to, of what layout.
    lines.sort(key=lambda line: [[orders[number].index(value) for value in line[number]] for number in (3, 1, 0, 2, 4)])
    names: list[Mapping[str, str]] = [
        {},
        TARGETS,
        {name: words for name, (_, words) in SOURCES.items()},
        {},
        {"v4": "IPv4", "v6": "IPv6"},
    ]
    cells = [_HEAD, ("---",) * len(_HEAD)]
    for line in lines:
        keys = (_said(values, order, said) for values, order, said in zip(line, orders, names, strict=False))
        cells.append((*keys, *line[-1]))
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _said(values: Sequence[str], order: Sequence[str], words: Mapping[str, str]) -> str:
    missing = [words.get(value, value) for value in order if value not in values]
    if len(order) > 1 and len(missing) == 0:
        return "any"
    if len(order) > len(HEADERS) and len(missing) == 1:
        return f"any but {missing[0]}"
    return ", ".join(words.get(value, value) for value in values)


def _cells(row: Row) -> tuple[str, ...]:
    """What the table says of it."""
    kept = {"both": ("yes", "yes"), "address": ("yes", "no"), "given": ("no", "no"), "proxy": ("no", "no")}
    costs = (f"{row.entries:g}", ", ".join(row.sysctls) or "none")
    nothing = (_NOT_MEASURED, _NOT_MEASURED)
    sees = (PEERS[row.peer], _TOLD.get(row.told, _NOT_MEASURED))
    return (*kept.get(row.peer, nothing), *sees, *(nothing if row.peer == "78" else costs))
