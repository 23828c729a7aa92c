"""The configuration's values and keys: every reader, every default, later keys refused by name. No files (see there).

Tables of (name, TOML, expected). A line such as `listen.port = 0` is TOML for the key of a table. Every sentence that a
test sees goes through `problems_of`, which holds it to the contract: one printable line with a way out behind `;`.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Sequence
from ipaddress import ip_network
from typing import Any

import msgspec
import pytest

from tproxyd.config import (
    Config,
    Endpoint,
    Mark,
    Network,
    Policy,
    PolicyRule,
    PortRange,
    UnixPath,
    Upstream,
    config_from_mapping,
)
from tproxyd.config.schema import keys_of
from tproxyd.config.wording import toml_kind
from tproxyd.errors import ConfigError

DEFAULTS = """
[capture]
mode = "tproxy"
protocols = ["tcp"]
ports = []
exclude_ports = ["22"]
interfaces = []
exclude_interfaces = []
sources = []
exclude_sources = []
destinations = []
exclude_destinations = []
when_down = "bypass"
[listen]
port = 15006
backlog = 4096
proxy_protocol_from = []
[routing]
mark = "auto"
upstream_mark = "auto"
table = 133
priority = 5233
[upstream]
target = "original"
source = "auto"
proxy_protocol = "off"
connect_timeout = "5s"
[relay]
engine = "auto"
workers = 1
busy_poll = "0us"
idle_timeout = "1h"
half_close_timeout = "60s"
[limits]
max_connections = "auto"
max_connections_per_source = 0
[policy]
default = "forward"
rule = []
allow_special = []
sniff_timeout = "300ms"
[drain]
timeout = "30s"
[admin]
socket = "auto"
metrics = ""
[log]
level = "info"
format = "auto"
access = true
"""
"""What the keys of this version are when nothing is written."""

KEYS = [f"{table}.{key}" for table, keys in tomllib.loads(DEFAULTS).items() for key in keys]
NETWORK_LISTS = [f"capture.{name}" for name in ("sources", "exclude_sources", "destinations", "exclude_destinations")]
NETWORK_LISTS += ["listen.proxy_protocol_from", "policy.allow_special"]


def problems_of(read: Callable[[], Config]) -> tuple[str, ...]:
    """The problems that reading gives, each held to the contract's shape."""
    with pytest.raises(ConfigError) as caught:
        read()
    assert caught.value.exit_code == os.EX_CONFIG
    assert str(caught.value) == "\n".join(caught.value.problems)
    for problem in caught.value.problems:
        assert problem.isprintable()
        assert "; " in problem, "no way out"
    return caught.value.problems


def problems_in(text: str) -> tuple[str, ...]:
    return problems_of(lambda: config_from_mapping(tomllib.loads(text)))


def value_of_toml(text: str, key: str) -> Any:
    table, _, name = key.partition(".")
    return tomllib.loads(text)[table][name]


def value_of(config: Config, key: str) -> Any:
    table, _, name = key.partition(".")
    return getattr(getattr(config, table), name)


def table(rows: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """Rows of (name, ...) as arguments of parametrize; the name becomes the id."""
    return {"argvalues": [row[1:] for row in rows], "ids": [row[0] for row in rows]}


def nets(*texts: str) -> tuple[Network, ...]:
    return tuple(ip_network(text) for text in texts)


# Good values


def test_defaults_are_those_of_the_contract() -> None:
    assert config_from_mapping(tomllib.loads(DEFAULTS)) == config_from_mapping({}) == Config()
    assert sorted(KEYS) == sorted(f"{name}.{key}" for name, kind in keys_of(Config).items() for key in keys_of(kind))


def test_two_lines_are_enough_and_nothing_captures_nothing() -> None:
    assert config_from_mapping(tomllib.loads('[capture]\nports = ["8080"]\n')).captures
    assert not Config().captures
    assert not config_from_mapping({"capture": {"ports": ["8080"], "mode": "off"}}).captures


GOOD = [
    ("loopback", 'upstream.target = "loopback"', "loopback"),
    ("an address", 'upstream.target = "192.0.2.1:80"', Endpoint("192.0.2.1", 80)),
    ("an app", 'upstream.target = "127.0.0.1:8080"', Endpoint("127.0.0.1", 8080)),
    ("an IPv6 address, not as usually spelt", 'upstream.target = "[2001:DB8:0::1]:080"', Endpoint("2001:db8::1", 80)),
    ("a Unix socket", 'upstream.target = "unix:/run/app.sock"', UnixPath("/run/app.sock")),
    ("a path with all that paths have", 'upstream.target = "unix:/a b:c/größe"', UnixPath("/a b:c/größe")),
    ("the longest path", f'upstream.target = "unix:/{"x" * 106}"', UnixPath(f"/{'x' * 106}")),
    ("the longest path in bytes", f'upstream.target = "unix:/{"ö" * 53}"', UnixPath(f"/{'ö' * 53}")),
    ("as the client", 'upstream.source = "client"', "client"),
    ("from an address", 'upstream.source = "127.0.0.6"', ("127.0.0.6",)),
    ("from addresses", 'upstream.source = ["127.0.0.6", "2001:DB8::0:6"]', ("127.0.0.6", "2001:db8::6")),
    (
        "from 64 addresses",
        f"upstream.source = {[f'192.0.2.{n}' for n in range(64)]}",
        tuple(f"192.0.2.{n}" for n in range(64)),
    ),
    ("PROXY v1", 'upstream.proxy_protocol = "v1"', "v1"),
    ("PROXY v2", 'upstream.proxy_protocol = "v2"', "v2"),
    (
        "load balancers",
        'listen.proxy_protocol_from = ["192.0.2.0/24", "2001:db8::1"]',
        nets("192.0.2.0/24", "2001:db8::1"),
    ),
    ("no sniffing", 'policy.sniff_timeout = "0s"', 0.0),
    ("sniff for long", 'policy.sniff_timeout = "10s"', 10.0),
    ("sniff for long, in other words", 'policy.sniff_timeout = "10000000us"', 10.0),
    ("refuse by default", 'policy.default = "refuse"', "refuse"),
    ("no rule", "policy.rule = []", ()),
    ("mode off", 'capture.mode = "off"', "off"),
    ("one port, a range, a number", 'capture.ports = ["1", "9000-9099", 65535]', (1, (9000, 9099), 65535)),
    ("neighbouring ranges", 'capture.ports = ["2-3", "1", "4"]', ((2, 3), 1, 4)),
    ("a range of one port", 'capture.ports = ["80-80"]', (80,)),
    ("leading zeros", 'capture.ports = ["00080"]', (80,)),
    ("every port", 'capture.ports = "all"', ((1, 65535),)),
    ("no port", "capture.ports = []", ()),
    ("no excluded port", "capture.exclude_ports = []", ()),
    ("every port excluded, none captured", 'capture.exclude_ports = "all"', ((1, 65535),)),
    ("interfaces", 'capture.interfaces = ["eth0", "wg*", "br-1.5@x"]', ("eth0", "wg*", "br-1.5@x")),
    (
        "names beside a wildcard",
        'capture.interfaces = ["eth*", "et", "wth0", "x1*", "x"]',
        ("eth*", "et", "wth0", "x1*", "x"),
    ),
    ("fifteen bytes", 'capture.interfaces = ["abcdefghijklmno"]', ("abcdefghijklmno",)),
    ("lo may be excluded", 'capture.exclude_interfaces = ["lo"]', ("lo",)),
    ("networks", 'capture.sources = ["192.0.2.0/24", "2001:db8::/32"]', nets("192.0.2.0/24", "2001:db8::/32")),
    ("addresses", 'capture.exclude_sources = ["192.0.2.1", "::1"]', nets("192.0.2.1/32", "::1/128")),
    ("everything", 'capture.sources = ["0.0.0.0/0", "::/0"]', nets("0.0.0.0/0", "::/0")),
    ("local", 'capture.destinations = ["local", "192.0.2.1"]', ("local", *nets("192.0.2.1"))),
    ("local excluded", 'capture.exclude_destinations = ["local"]', ("local",)),
    (
        "mapped IPv6 allowed",
        'policy.allow_special = ["::ffff:0:0/96", "::ffff:192.0.2.0/120", "::ffff:192.0.2.1"]',
        nets("::ffff:0:0/96", "::ffff:192.0.2.0/120", "::ffff:192.0.2.1/128"),
    ),
    ("metadata allowed", 'policy.allow_special = ["169.254.169.254"]', nets("169.254.169.254")),
    ("refuse", 'capture.when_down = "refuse"', "refuse"),
    ("lowest port", "listen.port = 1", 1),
    ("highest port", "listen.port = 65535", 65535),
    ("backlog of one", "listen.backlog = 1", 1),
    ("a mark", 'routing.mark = "0x1000000/0x3000000"', Mark(value=1 << 24, mask=3 << 24)),
    ("the whole mark", 'routing.mark = "0XFFFFFFFF/0xffffffff"', Mark(value=2**32 - 1, mask=2**32 - 1)),
    ("lowest table", "routing.table = 1", 1),
    ("table below default", "routing.table = 252", 252),
    ("table above local", "routing.table = 256", 256),
    ("highest table", "routing.table = 4294967295", 2**32 - 1),
    ("lowest priority", "routing.priority = 1", 1),
    ("highest priority", "routing.priority = 32763", 32763),
    ("as the proxy", 'upstream.source = "proxy"', "proxy"),
    ("microseconds", 'upstream.connect_timeout = "1us"', 1e-6),
    ("milliseconds", 'upstream.connect_timeout = "300ms"', 0.3),
    ("a fraction", 'upstream.connect_timeout = "0.5s"', 0.5),
    ("minutes", 'relay.idle_timeout = "2m"', 120.0),
    ("thirty days", 'relay.half_close_timeout = "720h"', 30 * 86400.0),
    ("no draining", 'drain.timeout = "0s"', 0.0),
    ("splice", 'relay.engine = "splice"', "splice"),
    ("a loop inside", "relay.workers = 0", 0),
    ("64 workers", "relay.workers = 64", 64),
    ("a worker a core", 'relay.workers = "auto"', "auto"),
    ("spin a little", 'relay.busy_poll = "50us"', pytest.approx(50e-6)),
    ("spin for long", 'relay.busy_poll = "10ms"', 0.01),
    ("spin for long, in other words", 'relay.busy_poll = "10000us"', 0.01),
    ("one connection", "limits.max_connections = 1", 1),
    ("a million connections", "limits.max_connections = 1_000_000", 1_000_000),
    ("as many as can be", 'limits.max_connections = "auto"', "auto"),
    ("one a source", "limits.max_connections_per_source = 1", 1),
    ("a million a source", "limits.max_connections_per_source = 1_000_000", 1_000_000),
    ("metrics", 'admin.metrics = "127.0.0.1:15020"', Endpoint("127.0.0.1", 15020)),
    ("metrics for everybody", 'admin.metrics = "[::]:1"', Endpoint("::", 1)),
    ("metrics over IPv6, not as usually spelt", 'admin.metrics = "[2001:DB8:0::1]:080"', Endpoint("2001:db8::1", 80)),
    ("no metrics", 'admin.metrics = ""', None),
    ("socket", 'admin.socket = "/run/x.sock"', "/run/x.sock"),
    ("no socket", 'admin.socket = ""', None),
    ("warning", 'log.level = "warning"', "warning"),
    ("json", 'log.format = "json"', "json"),
    ("no access log", "log.access = false", False),
]


@pytest.mark.parametrize(("text", "expected"), **table(GOOD))
def test_good_value(text: str, expected: object) -> None:
    key = text.partition(" ")[0]
    if "ports" in key:
        assert isinstance(expected, tuple)
        expected = tuple(PortRange(*one) if isinstance(one, tuple) else PortRange(one, one) for one in expected)
    assert value_of(config_from_mapping(tomllib.loads(text)), key) == expected


# Malformed values

BAD = [
    ("port 0", 'capture.ports = ["0"]', '`capture.ports[0]` = "0" is out of range; ports are 1 to 65535'),
    ("port 65536", 'capture.ports = ["80", 65536]', "`capture.ports[1]` = 65536 is out of range;"),
    ("range beyond the end", 'capture.ports = ["9000-65536"]', '[0]` = "9000-65536" is out of range;'),
    ("a million", "capture.ports = [1000000]", "`capture.ports[0]` = 1000000 is out of range;"),
    ("a huge port", f"capture.ports = [0x{'f' * 200}]", "`capture.ports[0]` = a huge number is out of range;"),
    ("a huge port in quotes", f'capture.ports = ["{"9" * 200}"]', f'= "{"9" * 59}... is no port or range; write'),
    ("negative port", "capture.ports = [-1]", "`capture.ports[0]` = -1 is no port or range;"),
    ("inverted range", 'capture.ports = ["9099-9000"]', 'is an inverted range; write "9000-9099"'),
    ("no range", 'capture.ports = ["1-"]', '= "1-" is no port or range; write "8080" or "9000-9099"'),
    ("a service's name", 'capture.exclude_ports = ["ssh"]', '`capture.exclude_ports[0]` = "ssh" is no port or range;'),
    ("spaces", 'capture.ports = [" 80"]', '= " 80" is no port or range;'),
    ("foreign digits", 'capture.ports = ["٨٠"]', "is no port or range;"),
    ("all in a list", 'capture.ports = ["all"]', '`capture.ports[0]` = "all" is no port or range;'),
    ("twice", 'capture.ports = ["80", "80"]', '`capture.ports[1]` = "80" overlaps "80" in the same list; merge'),
    ("overlap", 'capture.ports = ["9000-9099", "9", "9099-9100"]', '[2]` = "9099-9100" overlaps "9000-9099" in the'),
    ("overlap of later with earlier", 'capture.ports = ["80", "1-100"]', '[0]` = "80" overlaps "1-100" in the same'),
    ("a word for a list", 'capture.ports = "8080"', '= "8080" is a string; write an array of ports and ranges'),
    ("a boolean port", "capture.ports = [true]", "`capture.ports[0]` = true is a boolean; write a port or a range"),
    ("a list in the list", "capture.ports = [[80]]", "`capture.ports[0]` = [80] is an array; write a port"),
    ("ports of yesterday", "capture.ports = [2024-01-01]", "= 2024-01-01 is a date or time; write a port"),
    ("mode", 'capture.mode = "TPROXY"', '= "TPROXY" is none of its values; use "tproxy", "redirect" or "off"'),
    ("protocol", 'capture.protocols = ["sctp"]', '`capture.protocols[0]` = "sctp" is none of its values; use "tcp"'),
    ("no protocol", "capture.protocols = []", '= [] is empty; write ["tcp"], or switch capture off with mode = "off"'),
    ("protocol twice", 'capture.protocols = ["tcp", "tcp"]', '[1]` = "tcp" stands in the list twice; remove one'),
    ("when_down", 'capture.when_down = "drop"', '= "drop" is none of its values; use "bypass" or "refuse"'),
    ("no interface name", 'capture.interfaces = [""]', "is no interface name"),
    (
        "sixteen bytes",
        'capture.interfaces = ["abcdefghijklmnop"]',
        '"abcdefghijklmnop" is no interface name: those have 1',
    ),
    ("slash", 'capture.interfaces = ["a/b"]', '"a/b" is no interface name: spaces, quotes, slashes'),
    ("quote", 'capture.interfaces = ["a\\"b"]', '"a\\"b" is no interface name: spaces, quotes'),
    ("backslash", 'capture.interfaces = ["a\\\\b"]', '"a\\\\b" is no interface name: spaces, quotes'),
    ("newline", 'capture.interfaces = ["a\\nb"]', '"a\\nb" is no interface name: spaces, quotes'),
    ("NUL", 'capture.interfaces = ["a\\u0000"]', "is no interface name: spaces, quotes"),
    ("space", 'capture.exclude_interfaces = ["a b"]', '"a b" is no interface name: spaces'),
    ("colon", 'capture.exclude_interfaces = ["eth0:1"]', '"eth0:1" is no interface name: spaces, quotes, slashes, col'),
    ("non-ASCII", 'capture.interfaces = ["größe0"]', '"größe0" is no interface name: spaces, quotes'),
    ("two dots", 'capture.interfaces = [".."]', '".." is no interface name'),
    (
        "asterisk alone",
        'capture.interfaces = ["*"]',
        'has an asterisk that does not end a name; write "eth*", or leave',
    ),
    ("asterisk in the middle", 'capture.interfaces = ["e*h"]', '"e*h" has an asterisk that does not end a name;'),
    ("two asterisks", 'capture.exclude_interfaces = ["e**"]', '"e**" has an asterisk that does not end a name;'),
    ("lo", 'capture.interfaces = ["eth0", "lo"]', '`capture.interfaces[1]` = "lo" cannot be captured: it carries'),
    ("interface twice", 'capture.interfaces = ["a", "b", "a"]', '[2]` = "a" stands in the list twice; remove one'),
    (
        "a name within a wildcard",
        'capture.interfaces = ["eth0", "eth*"]',
        '`capture.interfaces[0]` = "eth0" is taken in by "eth*" in the same list; remove one of the two',
    ),
    (
        "a wildcard within a wildcard",
        'capture.exclude_interfaces = ["e*", "eth*"]',
        '[1]` = "eth*" is taken in by "e*" in',
    ),
    (
        "the stem of a wildcard",
        'capture.exclude_interfaces = ["eth", "eth*"]',
        '[0]` = "eth" is taken in by "eth*" in the',
    ),
    ("listen 0", "listen.port = 0", "`listen.port` = 0 is out of range; write a whole number from 1 to 65535"),
    ("listen 65536", "listen.port = 65536", "= 65536 is out of range; write a whole number from 1 to 65535"),
    ("listen huge", f"listen.port = 0x{'f' * 5000}", "`listen.port` = a huge number is out of range;"),
    ("listen is true", "listen.port = true", "= true is a boolean; write a whole number from 1 to 65535, without"),
    ("listen in quotes", 'listen.port = "15006"', '= "15006" is a string; write a whole number from 1 to 65535, w'),
    ("backlog 0", "listen.backlog = 0", "`listen.backlog` = 0 is out of range; write a whole number from 1 to"),
    ("backlog above a million", "listen.backlog = 1000001", "= 1000001 is out of range;"),
    *(
        (f"table {n}", f"routing.table = {n}", f"= {n} is taken: 253, 254 and 255 are default, main and local; choose")
        for n in (253, 254, 255)
    ),
    ("table 0", "routing.table = 0", "`routing.table` = 0 is out of range"),
    ("table of 33 bits", "routing.table = 4294967296", "= 4294967296 is out of range"),
    ("priority 0", "routing.priority = 0", "`routing.priority` = 0 is out of range (its three rules stand between"),
    ("no room for three", "routing.priority = 32764", "write a whole number from 1 to 32763"),
    ("mark without mask", 'routing.mark = "0x1"', '= "0x1" is no mark; write "auto", or value and mask in hexadecimal'),
    ("decimal mark", 'routing.mark = "1/3"', '`routing.mark` = "1/3" is no mark; write'),
    ("mark of 36 bits", 'routing.mark = "0x100000000/0x100000000"', '= "0x100000000/0x100000000" is no mark;'),
    ("mark 0", 'routing.mark = "0x0/0x3"', "has the value 0, which every unmarked packet has; choose a bit of the"),
    ("bits outside", 'routing.upstream_mark = "0x7/0x3"', '`routing.upstream_mark` = "0x7/0x3" has bits outside its '),
    ("mask 0", 'routing.mark = "0x1/0x0"', "has bits outside its mask (0x1); widen the mask or drop them"),
    (
        "target",
        'upstream.target = "origin"',
        '= "origin" is none of its values; use "original", "loopback", an address and',
    ),
    ("no target", 'upstream.target = ""', '= "" is none of its values; use "original",'),
    (
        "a name for a target",
        'upstream.target = "localhost:8080"',
        "before its port (names are not looked up); write an",
    ),
    (
        "a target's port alone",
        'upstream.target = ":8080"',
        '= ":8080" has no address before its port (names are not looked',
    ),
    (
        "a number for a target",
        'upstream.target = "8080"',
        'is no address and port; write an address and a port, such as "127.',
    ),
    (
        "a target without port",
        'upstream.target = "192.0.2.1"',
        '= "192.0.2.1" is no address and port; write an address and',
    ),
    (
        "an IPv6 target without port",
        'upstream.target = "2001:db8::1"',
        "is an IPv6 address, or one whose port cannot be told",
    ),
    (
        "an IPv6 target without port, in brackets",
        'upstream.target = "[2001:db8::1]"',
        "is no address and port; write an addr",
    ),
    ("a target at port 0", 'upstream.target = "192.0.2.1:0"', "has a port out of range; ports are 1 to 65535"),
    (
        "nobody as a target",
        'upstream.target = "0.0.0.0:80"',
        'nobody\'s address; if this host is meant, write "127.0.0.1:80"',
    ),
    (
        "multicast as a target",
        'upstream.target = "224.0.0.1:80"',
        "has an address to which no TCP connection can be made;",
    ),
    ("a target with a scope", 'upstream.target = "[fe80::1%eth0]:80"', "has a scope, which cannot be given here;"),
    ("a mapped target", 'upstream.target = "[::ffff:192.0.2.1]:80"', 'mapped into IPv6; write "192.0.2.1:80"'),
    (
        "a URL as a target",
        'upstream.target = "http://192.0.2.1:80"',
        "is no address and port; write an address and a port",
    ),
    (
        "a relative path",
        'upstream.target = "unix:run/app.sock"',
        "has no absolute path of a socket; write all of it, such as",
    ),
    ("no path", 'upstream.target = "unix:"', '= "unix:" has no absolute path of a socket; write all of it'),
    ("an abstract socket", 'upstream.target = "unix:@app"', "has no absolute path of a socket; write all of it"),
    ("a directory", 'upstream.target = "unix:/run/"', "has no absolute path of a socket; write all of it"),
    (
        "NUL in a path",
        'upstream.target = "unix:/run/a\\u0000"',
        "has a NUL character, which no path can have; remove it",
    ),
    (
        "a long path",
        f'upstream.target = "unix:/{"x" * 107}"',
        "has a path of 108 bytes, and a socket's address has room for 107;",
    ),
    (
        "a path of many bytes",
        f'upstream.target = "unix:/{"ö" * 54}"',
        "has a path of 109 bytes, and a socket's address has room",
    ),
    (
        "source",
        'upstream.source = "me"',
        '= "me" is none of its values; use "client", "auto", "proxy", or addresses of',
    ),
    ("no source", 'upstream.source = ""', '= "" is none of its values; use "client",'),
    (
        "no source in a list",
        "upstream.source = []",
        '= [] is empty; write addresses, or "proxy" for the one that the route',
    ),
    ("a source with port", 'upstream.source = "192.0.2.1:80"', "is none of its values; use"),
    (
        "a network of sources",
        'upstream.source = "127.0.0.0/8"',
        '= "127.0.0.0/8" is a network; write those of its addresses that',
    ),
    (
        "a network in a list",
        'upstream.source = ["192.0.2.1", "::1/128"]',
        '[1]` = "::1/128" is a network; write those of its',
    ),
    (
        "a source with scope",
        'upstream.source = "fe80::1%eth0"',
        "has a scope, which cannot be given here; write an address",
    ),
    ("a link-local source", 'upstream.source = ["fe80::1"]', "is link-local, which says nothing without an interface;"),
    (
        "a mapped source",
        'upstream.source = ["::ffff:192.0.2.1"]',
        '[0]` = "::ffff:192.0.2.1" is IPv4 mapped into IPv6; write "192.0.2.1"',
    ),
    (
        "nobody as a source",
        'upstream.source = "::"',
        '= "::" is nobody\'s address; write "proxy" for the one that the route',
    ),
    (
        "multicast as a source",
        'upstream.source = "ff02::1"',
        "is no address from which a connection can be made; write one",
    ),
    (
        "broadcast as a source",
        'upstream.source = "255.255.255.255"',
        "is no address from which a connection can be made;",
    ),
    (
        "a word among sources",
        'upstream.source = ["auto"]',
        '[0]` = "auto" is no address; write an address, such as "127.0.0.6" or',
    ),
    (
        "a name among sources",
        'upstream.source = ["localhost"]',
        '[0]` = "localhost" is no address; write an address, such as',
    ),
    (
        "a number among sources",
        "upstream.source = [127]",
        "`upstream.source[0]` = 127 is an integer; write an address, such as",
    ),
    ("a source twice", 'upstream.source = ["::1", "0::1"]', '[1]` = "0::1" stands in the list twice; remove one'),
    (
        "65 sources",
        f"upstream.source = {[f'192.0.2.{n}' for n in range(65)]}",
        "has 65 addresses, 64 at most; leave some out",
    ),
    ("proxy protocol", 'upstream.proxy_protocol = "v3"', '= "v3" is none of its values; use "off", "v1" or "v2"'),
    (
        "everybody may say who he is",
        'listen.proxy_protocol_from = ["192.0.2.1", "0.0.0.0/0"]',
        '[1]` = "0.0.0.0/0" is everybody, and',
    ),
    (
        "everybody of IPv6",
        'listen.proxy_protocol_from = ["::/0"]',
        "whoever may say whom a connection comes from must be named; w",
    ),
    (
        "sniff for long",
        'policy.sniff_timeout = "10.001s"',
        "is longer than 10s: who waits for the server to speak first would wa",
    ),
    (
        "sniff without unit",
        'policy.sniff_timeout = "300"',
        '= "300" is no duration; write a number and one of us, ms, s, m, h',
    ),
    ("level", 'log.level = "trace"', '= "trace" is none of its values; use "debug", "info", "warning" or "error"'),
    ("format", 'log.format = "xml"', '`log.format` = "xml" is none of its values; use "auto", "text" or "json"'),
    ("flag in quotes", 'log.access = "yes"', '= "yes" is a string; write true or false, without quotes'),
    ("no unit", 'upstream.connect_timeout = "5"', '= "5" is no duration; write a number and one of us, ms, s, m, h'),
    ("a bare number", "relay.idle_timeout = 5", '= 5 is an integer; write a number and a unit, such as "5s", in quo'),
    ("days", 'relay.idle_timeout = "1d"', '`relay.idle_timeout` = "1d" is no duration;'),
    ("negative", 'drain.timeout = "-5s"', '`drain.timeout` = "-5s" is no duration;'),
    ("NaN", "relay.idle_timeout = nan", "= nan is a float; write a number and a unit"),
    ("NaN in quotes", 'relay.idle_timeout = "nans"', '= "nans" is no duration;'),
    ("infinite", 'relay.idle_timeout = "infs"', '= "infs" is no duration;'),
    ("above 30 days", 'drain.timeout = "720.1h"', '= "720.1h" is longer than 30 days; is the unit right?'),
    ("zero connect", 'upstream.connect_timeout = "0s"', '= "0s" would end every connection at once; write a time ab'),
    ("zero idle", 'relay.idle_timeout = "0.000h"', "would end every connection at once;"),
    ("zero half-close", 'relay.half_close_timeout = "0us"', "would end every connection at once;"),
    ("default", 'policy.default = "drop"', '= "drop" is none of its values; use "forward" or "refuse"'),
    ("engine", 'relay.engine = "zero-copy"', '= "zero-copy" is none of its values; use "auto", "copy" or "splice"'),
    ("65 workers", "relay.workers = 65", '= 65 is out of range; write a whole number from 0 to 64, or "auto"'),
    (
        "fewer than no workers",
        "relay.workers = -1",
        '= -1 is out of range; write a whole number from 0 to 64, or "auto"',
    ),
    (
        "half a worker",
        "relay.workers = 0.5",
        '= 0.5 is a float; write a whole number from 0 to 64, without quotes, or "auto"',
    ),
    (
        "workers in quotes",
        'relay.workers = "2"',
        '= "2" is a string; write a whole number from 0 to 64, without quotes,',
    ),
    ("endlessly many workers", f"relay.workers = 0x{'f' * 5000}", "`relay.workers` = a huge number is out of range;"),
    ("spin for too long", 'relay.busy_poll = "10.1ms"', "is longer than 10ms: it would burn a core for nothing; write"),
    ("spin for a year", 'relay.busy_poll = "8760h"', "is longer than 30 days;"),
    (
        "no connections",
        "limits.max_connections = 0",
        '= 0 is out of range; write a whole number from 1 to 1000000, or "auto"',
    ),
    ("too many connections", "limits.max_connections = 1_000_001", "= 1000001 is out of range;"),
    (
        "connections in quotes",
        'limits.max_connections = "100"',
        '"100" is a string; write a whole number from 1 to 1000000',
    ),
    (
        "fewer than none a source",
        "limits.max_connections_per_source = -1",
        "= -1 is out of range; write a whole number from 0",
    ),
    ("too many a source", "limits.max_connections_per_source = 1_000_001", "= 1000001 is out of range;"),
    (
        "auto a source",
        'limits.max_connections_per_source = "auto"',
        '"auto" is a string; write a whole number from 0 to',
    ),
    (
        "metrics without port",
        'admin.metrics = "127.0.0.1"',
        '"127.0.0.1" is no address and port; write an address and a port',
    ),
    (
        "metrics without address",
        'admin.metrics = ":80"',
        '":80" has no address before its port (names are not looked up);',
    ),
    (
        "a port alone",
        'admin.metrics = "15020"',
        '"15020" is no address and port; write an address and a port, such as "127.',
    ),
    (
        "a name",
        'admin.metrics = "localhost:80"',
        '"localhost:80" has no address before its port (names are not looked up);',
    ),
    (
        "no brackets",
        'admin.metrics = "::1:80"',
        '"::1:80" is an IPv6 address, or one whose port cannot be told from it;',
    ),
    (
        "IPv4 in brackets",
        'admin.metrics = "[127.0.0.1]:80"',
        "has no address before its port (names are not looked up);",
    ),
    (
        "scope in brackets",
        'admin.metrics = "[fe80::1%eth0]:80"',
        "has a scope, which cannot be given here; write an addr",
    ),
    ("a socket without its directory", 'admin.socket = "admin.sock"', '"admin.sock" has no absolute path of a socket;'),
    ("a directory as socket", 'admin.socket = "/run/"', '"/run/" has no absolute path of a socket;'),
    ("a long socket", f'admin.socket = "/{"x" * 107}"', "has a path of 108 bytes,"),
    ("no path", "admin.socket = false", 'false is a boolean; write "auto", a path such as'),
    ("mapped", 'admin.metrics = "[::ffff:127.0.0.1]:80"', 'is IPv4 mapped into IPv6; write "127.0.0.1:80"'),
    (
        "metrics at port 0",
        'admin.metrics = "127.0.0.1:0"',
        '"127.0.0.1:0" has a port out of range; ports are 1 to 65535',
    ),
    ("metrics at port 65536", 'admin.metrics = "[::1]:65536"', "has a port out of range;"),
    ("metrics in a file", 'admin.metrics = "unix:/run/metrics"', '"unix:/run/metrics" is no address and port;'),
    ("text cut short", f'log.level = "{"x" * 1000}"', f'= "{"x" * 59}... is none of its values;'),
    ("control characters", 'log.level = "\\u001b[2J\\u0007"', '= "\\x1b[2J\\x07" is none of its values;'),
    ("right-to-left", 'log.level = "\\u202e"', '= "\\u202e" is none of its values;'),
    ("huge in a nested list", f"capture.ports = [[0x{'f' * 5000}]]", "is an array; write a port or a range"),
    (
        "tables in a nested list",
        f"capture.ports = [[{{ {'a.' * 5000}a = 1 }}]]",
        "is an array; write a port or a range",
    ),
]

BAD_NETWORKS = [
    ("text", '"example.org"', '"example.org" is no network; write an address with its prefix length'),
    ("long prefix", '"192.0.2.0/33"', '"192.0.2.0/33" is no network;'),
    ("leading zeros", '"192.0.02.1"', '"192.0.02.1" is no network;'),
    ("empty", '""', '"" is no network;'),
    ("no prefix behind the slash", '"192.0.2.0/"', '"192.0.2.0/" is no network;'),
    ("netmask", '"192.0.2.0/255.255.255.0"', 'has a mask in place of a prefix length; write "192.0.2.0/24"'),
    ("host mask", '"192.0.2.0/0.0.0.255"', 'has a mask in place of a prefix length; write "192.0.2.0/24"'),
    ("host bits", '"192.0.2.1/24"', '"192.0.2.1/24" has bits set behind its prefix; write "192.0.2.0/24"'),
    ("host bits v6", '"2001:db8::1/32"', 'has bits set behind its prefix; write "2001:db8::/32"'),
    ("scope", '"fe80::1%eth0"', '"fe80::1%eth0" has a scope, which a network cannot have; write it without the % part'),
    ("scope of a network", '"fe80::%1/64"', "has a scope, which a network cannot have;"),
    ("a number", "1", "= 1 is an integer; write a network"),
    ("twice", '"192.0.2.1", "192.0.2.1/32"', '[1]` = "192.0.2.1/32" stands in the list twice; remove one'),
]
MAPPED = "is IPv4 mapped into IPv6, which no packet bears; write the IPv4 network itself"


@pytest.mark.parametrize(("text", "expected"), **table(BAD))
def test_malformed_value(text: str, expected: str) -> None:
    (problem,) = problems_in(text)
    assert expected in problem
    assert problem.startswith(f"config: `{text.partition(' ')[0]}")


@pytest.mark.parametrize("key", NETWORK_LISTS)
@pytest.mark.parametrize(("value", "expected"), **table(BAD_NETWORKS))
def test_malformed_network(key: str, value: str, expected: str) -> None:
    (problem,) = problems_in(f"{key} = [{value}]")
    assert problem.startswith(f"config: `{key}[")
    assert expected in problem


@pytest.mark.parametrize("key", NETWORK_LISTS[:5])
@pytest.mark.parametrize("value", ["::ffff:192.0.2.1", "::ffff:192.0.2.0/120", "::ffff:0:0/96"])
def test_mapped_network(key: str, value: str) -> None:
    assert problems_in(f'{key} = ["{value}"]') == (f'config: `{key}[0]` = "{value}" {MAPPED}',)


def test_local_is_no_source_and_an_empty_list_in_a_list_no_network() -> None:
    assert '`capture.sources[0]` = "local" is no network;' in problems_in('capture.sources = ["local"]')[0]
    assert "[0]` = [] is an array; write a network" in problems_in("capture.destinations = [[]]")[0]


KINDS = ["true", "7", "1.5", '"text"', "[]", "{ a = 1 }", "2024-01-01", "12:00:00"]
WRONG_TYPES = [
    (key, kind)
    for key in KEYS
    for kind in KINDS
    if toml_kind(tomllib.loads(f"x = {kind}")["x"]) != toml_kind(value_of_toml(DEFAULTS, key))
    and (key, kind) not in (("limits.max_connections", "7"), ("upstream.source", "[]"))
]


@pytest.mark.parametrize(("key", "kind"), WRONG_TYPES)
def test_wrong_type(key: str, kind: str) -> None:
    (problem,) = problems_in(f"{key} = {kind}")
    shown = "a table" if kind.startswith("{") else kind
    assert problem.startswith(f"config: `{key}` = {shown} is {toml_kind(tomllib.loads(f'x = {kind}')['x'])}; write ")


# Keys

UNKNOWN = [
    ("top level", "captur = {}", "`captur` is not a key of the configuration; did you mean `capture`?"),
    (
        "in a table",
        "[capture]\nport = []",
        "`capture.port` is not a key of the configuration; did you mean `capture.ports`?",
    ),
    ("far off", "xyzzy = 1", "`xyzzy` is not a key of the configuration; remove it"),
    ("unknown table", "[loging]\nlevel = 1", "`loging` is not a key of the configuration; did you mean `log"),
    ("a key of no table", 'ports = ["80"]', "did you mean `capture.ports`?"),
    ("a key of another table", "[listen]\nidle_timeout = 1", "did you mean `relay.idle_timeout`?"),
    ("misspelt, of another table", "[capture]\nbaklog = 1", "did you mean `listen.backlog`?"),
    ("hyphen", "[capture]\nexclude-ports = []", "did you mean `capture.exclude_ports`?"),
    ("upper case", "[Capture]\nports = []", "`Capture` is not a key of the configuration; did you mean `capture`?"),
    ("control characters", '"a\\u001b\\nb" = 1', "`a\\x1b\\nb` is not a key of the configuration; remove it"),
    ("control characters in a table", '[log]\n"\\r" = 1', "`log.\\r` is not a key of the configuration;"),
    ("empty", '"" = 1', "`` is not a key of the configuration; remove it"),
    ("very long", f"{'k' * 1000} = 1", f"`{'k' * 50}"),
    ("a value for a table", "capture = 8080", "`capture` is an integer; it is a table: write [capture] on a line of"),
    (
        "a list for a table",
        "[[capture]]\nports = []",
        "`capture` is an array; it is a table: write [capture] on a line",
    ),
]


@pytest.mark.parametrize(("text", "expected"), **table(UNKNOWN))
def test_unknown_key_or_table(text: str, expected: str) -> None:
    (problem,) = problems_in(text)
    assert problem.startswith("config: `")
    assert expected in problem


LATER = [
    'capture.protocols = ["udp"]',
    '[[workload]]\nname = "web"\n[workload.capture]\nmode = "redirect"',
    'outbound.ports = "all"',
    "outbound.dns_port = 0",
]


@pytest.mark.parametrize("text", LATER)
def test_what_later_versions_have_is_refused_by_name(text: str) -> None:
    (problem,) = problems_in(text)
    assert "is not in this version of tproxyd; " in problem
    assert text.strip("[]").partition(".")[0].partition("]")[0] in problem


# Good values that are read, and that the data path cannot carry out yet: when it can, these rows are GOOD.


def test_a_target_is_told_as_it_is_written() -> None:
    for text in ("192.0.2.1:80", "[2001:db8::1]:80", "unix:/run/app.sock"):
        assert str(keys_of(Upstream)["target"](text)) == text


def test_an_upstream_target_has_a_port_to_which_connections_are_made() -> None:
    captured = config_from_mapping({"capture": {"ports": ["8080"]}})
    rule = PolicyRule(name="x", action=Endpoint("192.0.2.1", 81))
    for upstream, ports in (
        (Upstream(target=Endpoint("192.0.2.1", 80)), {80, 81, 8080}),
        (Upstream(target=UnixPath("/run/app.sock")), {81, 8080}),
        (Upstream(target="loopback"), {81, 8080}),
    ):
        config = msgspec.structs.replace(captured, upstream=upstream, policy=Policy(rule=(rule,)))
        assert {port for port in (79, 80, 81, 8080) if config.relays_port(port)} == ports


# Values that do not fit together

TOGETHER = [
    (
        "equal marks",
        'routing.mark = "0x1/0x3"\nrouting.upstream_mark = "0x1/0x3"',
        "`routing.upstream_mark` = 0x1/0x3 equals `routing.mark`; they tell packets apart: make them differ",
    ),
    (
        "one value in two masks",
        'routing.mark = "0x1/0x3"\nrouting.upstream_mark = "0x1/0x1"',
        "`routing.upstream_mark` = 0x1/0x1 overlaps the mask of `routing.mark` = 0x1/0x3",
    ),
    (
        "overlapping masks",
        'routing.mark = "0x1/0xff"\nrouting.upstream_mark = "0x100/0x180"',
        "use two values of one mask, or masks without a common bit",
    ),
    (
        "the only port excluded by default",
        'capture.ports = ["22"]',
        "`capture.exclude_ports`",
    ),
    (
        "every port excluded",
        'capture.ports = "all"\ncapture.exclude_ports = "all"',
        "excludes every port of `capture.ports`: nothing would be captured",
    ),
    (
        "excluded in pieces",
        'capture.ports = ["80-90"]\ncapture.exclude_ports = ["1-84", "85", "86-100"]',
        "excludes every port of `capture.ports`: nothing would be captured",
    ),
    (
        "a rule that forwards to the listener",
        'policy.rule = [{ name = "a", action = "refuse" }, { name = "b", action = { forward = "[0::1]:15006" } }]',
        '`policy.rule[1].action.forward` (rule "b") = "[::1]:15006" is tproxyd\'s own listener (`listen.port`), which',
    ),
    (
        "a rule that forwards to the listener of redirect mode",
        'capture.mode = "redirect"\npolicy.rule = [{ name = "b", action = { forward = "127.0.0.2:15006" } }]',
        '`policy.rule[0].action.forward` (rule "b") = "127.0.0.2:15006" is tproxyd\'s own listener',
    ),
    (
        "the listener as a target",
        'listen.port = 80\nupstream.target = "[0::1]:80"',
        '`upstream.target` = "[::1]:80" is tproxyd\'s own listener (`listen.port`), which would call itself; name another',
    ),
    (
        "the listener of redirect mode as a target",
        'capture.mode = "redirect"\nupstream.target = "127.9.9.9:15006"',
        '`upstream.target` = "127.9.9.9:15006" is tproxyd\'s own listener (`listen.port`), which would call itself; name an',
    ),
    (
        "the listener's port at loopback",
        'upstream.target = "loopback"\ncapture.ports = ["15005-15006"]\ncapture.exclude_ports = [15005]',
        '`upstream.target` = "loopback" and `capture.ports`, which has 15006 alone, lead every connection to tproxyd\'s own',
    ),
    (
        "the client's address in redirect mode",
        'capture.mode = "redirect"\nupstream.source = "client"',
        '`upstream.source` = "client" is impossible with `capture.mode` = "redirect": the answers to the client\'s address would',
    ),
    (
        "the client's address and a Unix socket",
        'capture.mode = "redirect"\nupstream = { source = "client", target = "unix:/run/app.sock" }',
        '`upstream.source` = "client" does not go with `upstream.target` = "unix:/run/app.sock": a Unix socket has no source',
    ),
    (
        "an address and a Unix socket",
        'upstream = { source = "127.0.0.6", target = "unix:/run/app.sock" }',
        '`upstream.source` = ["127.0.0.6"] does not go with `upstream.target` = "unix:/run/app.sock": a Unix socket has no',
    ),
    (
        "metrics where clients arrive",
        'admin.metrics = "0.0.0.0:15006"',
        '`admin.metrics` = "0.0.0.0:15006" has the port of `listen.port`, where clients arrive; choose another',
    ),
    (
        "metrics where clients arrive in redirect mode",
        'capture.mode = "redirect"\nadmin.metrics = "192.0.2.1:15006"',
        '`admin.metrics` = "192.0.2.1:15006" has the port of `listen.port`, where clients arrive; choose another',
    ),
    (
        "interface in both lists",
        'capture.interfaces = ["eth0", "eth1"]\ncapture.exclude_interfaces = ["eth1"]',
        '`capture.exclude_interfaces` has "eth1", which is in `capture.interfaces` too; remove it from one',
    ),
    (
        "interface within an excluded wildcard",
        'capture.interfaces = ["eth0", "wg0"]\ncapture.exclude_interfaces = ["e*"]',
        '`capture.exclude_interfaces` has "e*", which takes in "eth0" of `capture.interfaces`: nothing would be captured',
    ),
    (
        "wildcard within an excluded wildcard",
        'capture.interfaces = ["eth*", "w*"]\ncapture.exclude_interfaces = ["e*", "wg*"]',
        '"e*", which takes in "eth*" of `capture.interfaces`: nothing would be captured there; narrow the one or remove',
    ),
]


@pytest.mark.parametrize(("text", "expected"), **table(TOGETHER))
def test_values_that_exclude_each_other(text: str, expected: str) -> None:
    (problem,) = problems_in(text)
    assert expected in problem


TOGETHER_GOOD = [
    ("redirect mode and addresses", 'capture.mode = "redirect"\nupstream.source = ["127.0.0.6"]'),
    (
        "a Unix socket",
        'upstream = { target = "unix:/run/app.sock", proxy_protocol = "v2" }',
    ),
    ("a Unix socket as the proxy", 'upstream = { target = "unix:/run/app.sock", source = "proxy" }'),
    ("the listener's port of another", 'upstream.target = "192.0.2.1:15006"'),
    ("the listener's port of another loopback address", 'upstream.target = "127.0.0.2:15006"'),
    ("the listener's port among others", 'upstream.target = "loopback"\ncapture.ports = ["15005-15006"]'),
    ("every port at loopback", 'upstream.target = "loopback"\ncapture.ports = "all"'),
    ("nothing is captured", 'upstream.target = "loopback"\ncapture = { ports = [15006], mode = "off" }'),
]
"""What fits together."""


@pytest.mark.parametrize("text", [text for _, text in TOGETHER_GOOD], ids=[name for name, _ in TOGETHER_GOOD])
def test_values_that_fit_together(text: str) -> None:
    config_from_mapping(tomllib.loads(text))


def test_redirect_mode_takes_what_it_can_promise() -> None:
    for source in ("auto", "proxy"):
        assert config_from_mapping({"capture": {"mode": "redirect"}, "upstream": {"source": source}}).redirects
    rule = {"name": "x", "action": {"forward": "192.0.2.1:15006"}}  # whose address that is cannot be known here
    config_from_mapping({"capture": {"mode": "redirect"}, "policy": {"rule": [rule]}})


def test_a_port_excluded_by_default_is_named() -> None:
    (problem,) = problems_in('capture.ports = ["22"]')  # nobody wrote exclude_ports, so it must say what is in it
    assert "22" in problem
    assert '`capture.exclude_ports` = ["22"] (the default) excludes' in problem
    (problem,) = problems_in('capture.ports = ["22"]\ncapture.exclude_ports = [22, 23]')
    assert '`capture.exclude_ports` = ["22", "23"] excludes' in problem


def test_metrics_may_have_the_listeners_port_at_another_address() -> None:
    config_from_mapping({"admin": {"metrics": "192.0.2.1:15006"}, "listen": {"port": 15006}})


def test_an_interface_may_be_taken_out_of_a_wildcard() -> None:
    config_from_mapping({"capture": {"interfaces": ["eth*", "wg0"], "exclude_interfaces": ["eth1", "eth2*", "wg1"]}})
    config_from_mapping({"capture": {"exclude_interfaces": ["e*"]}})


def test_two_values_of_one_mask_and_disjoint_masks_are_marks() -> None:
    for one, other in (("0x1/0x3", "0x2/0x3"), ("0x1/0x3", "0x4/0xc")):
        config_from_mapping({"routing": {"mark": one, "upstream_mark": other}})
    config_from_mapping({"capture": {"mode": "off", "ports": ["22"]}})
    config_from_mapping({"capture": {"ports": ["80-90"], "exclude_ports": ["80-89"]}})


AT_ONCE = [
    (
        "over tables and lists",
        'prots = 1\ncapture.ports = ["0", "80", "x"]\nlisten.port = 0\nlog.level = 1\nadmin.socket = "x"',
        ["`prots`", "`capture.ports[0]`", "`capture.ports[2]`", "`listen.port`", "`log.level`", "`admin.socket`"],
    ),
    ("a bad name and lo", 'capture.interfaces = ["lo", "a/b"]', ["`capture.interfaces[0]`", "`capture.interfaces[1]`"]),
    ("two duplicates", 'capture.sources = ["::1", "::2", "::1", "::2"]', ["sources[2]`", "sources[3]`"]),
    ("two overlaps", 'capture.ports = ["1", "1", "2", "2"]', ["ports[1]`", "ports[3]`"]),
    ("two overlaps with a wide range", 'capture.ports = ["5", "1-100", "50"]', ["ports[0]`", "ports[2]`"]),
    (
        "an interface twice and two within a wildcard",
        'capture.interfaces = ["eth0", "a", "eth*", "a", "eth1*"]',
        ["interfaces[0]`", "interfaces[3]`", "interfaces[4]`"],
    ),
    ("a bad network and a duplicate", 'capture.sources = ["x", "::1", "::1"]', ["sources[0]`", "sources[2]`"]),
    (
        "a bad key and values that exclude each other",
        'listen.prot = 1\nrouting.mark = "0x1/0x1"\nrouting.upstream_mark = "0x1/0x1"',
        ["`listen.prot`", "`routing.upstream_mark`"],
    ),
    (
        "two that do not go with the same third",
        'capture = { mode = "redirect", ports = [22] }\nupstream.source = "client"\nadmin.metrics = "192.0.2.1:15006"',
        ["`capture.exclude_ports`", "`upstream.source`", "`admin.metrics`"],
    ),
    (
        "a bad port of the listener, and no targets that would be the default one",
        'listen.port = 0\nupstream.target = "[::1]:15006"\n'
        'policy.rule = [{ name = "x", action = { forward = "127.0.0.1:15006" } }]',
        ["`listen.port`"],
    ),
    (
        "a bad value and only what does not depend on it",
        'capture.ports = ["22"]\ncapture.exclude_ports = ["x"]\n'
        'capture.interfaces = ["a", "b"]\ncapture.exclude_interfaces = ["a", "b"]',
        ["`capture.exclude_ports[0]`", 'has "a"', 'has "b"'],
    ),
]


@pytest.mark.parametrize(("text", "expected"), **table(AT_ONCE))
def test_all_problems_are_reported_at_once(text: str, expected: list[str]) -> None:
    problems = problems_in(text)
    assert [part for part in expected if not any(part in problem for problem in problems)] == []
    assert len(problems) == len(expected)
