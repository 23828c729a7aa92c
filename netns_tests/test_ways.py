"""As whom the server sees a connection, in every layout, with every target and source, and what a PROXY header tells it: what
docs/addresses.md says is what is measured.

The tables there are written by this test, and compared by it. After a wanted change, write them anew and read the difference:

    sudo TPROXYD_REWRITE_GOLDEN=1 .venv/bin/python -m pytest -p no:cacheprovider netns_tests/test_ways.py; git diff docs/addresses.md
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from netns_tests.ways import (
    CONNECTED,
    FAMILIES,
    HEADERS,
    LAYOUTS,
    SOURCES,
    TARGETS,
    Row,
    measure,
    open_field,
    sources_with,
    table_of,
)
from tproxyd.testing import conntrack_count
from tproxyd.testing.daemon import open_daemon
from tproxyd.testing.plugin import OpenLab

PAGE = Path(__file__).parents[1] / "docs/addresses.md"
REWRITE = (
    "docs/addresses.md has another table than what was measured; if that is as it should be, write it anew with "
    "sudo TPROXYD_REWRITE_GOLDEN=1 .venv/bin/python -m pytest -p no:cacheprovider netns_tests/test_ways.py"
)

# The words are those of `ways.PEERS`; two are of an IPv4 and an IPv6 client.
EXPECTED = {
    "tproxy": """
layout     target        client             auto              proxy   127.0.0.6    own
local      original      address            address           proxy   given/proxy  given
local      loopback      both               both              proxy   given/proxy  given
local      here          both               both              proxy   given/proxy  given
local      other-family  refused_by_policy  proxy             proxy   proxy/given  given
local      back          both               proxy             proxy   proxy        given
local      past          upstream_timeout   proxy             proxy   proxy        given
local      unix          78                 nobody            nobody  78           78
forwarded  original      both               both              proxy   proxy        given
forwarded  loopback      both               both              proxy   given/proxy  given
forwarded  here          both               both              proxy   given/proxy  given
forwarded  other-family  refused_by_policy  proxy             proxy   proxy/given  given
forwarded  back          both               both              proxy   proxy        given
forwarded  past          upstream_timeout   upstream_timeout  proxy   proxy        given
forwarded  unix          78                 nobody            nobody  78           78
""",
    "redirect": """
layout     target        client             auto              proxy   127.0.0.6    own
local      original      78                 proxy             proxy   given/proxy  given
local      loopback      78                 proxy             proxy   given/proxy  given
local      here          78                 proxy             proxy   given/proxy  given
local      other-family  78                 proxy             proxy   proxy/given  given
local      back          78                 proxy             proxy   proxy        given
local      past          78                 proxy             proxy   proxy        given
local      unix          78                 nobody            nobody  78           78
forwarded  original      78                 proxy             proxy   proxy        given
forwarded  loopback      78                 proxy             proxy   given/proxy  given
forwarded  here          78                 proxy             proxy   given/proxy  given
forwarded  other-family  78                 proxy             proxy   proxy/given  given
forwarded  back          78                 proxy             proxy   proxy        given
forwarded  past          78                 proxy             proxy   proxy        given
forwarded  unix          78                 nobody            nobody  78           78
""",
}


def expected(mode: str) -> dict[object, Row]:
    """By everything that identifies a row."""
    (_, _, *sources), *lines = (line.split() for line in EXPECTED[mode].split("\n") if line)
    assert sources == list(SOURCES)
    rows: dict[object, Row] = {}
    for layout, target, *peers in lines:
        for source, words in zip(sources, peers, strict=True):
            for family, peer in zip(FAMILIES, (words.split("/") * 2)[:2], strict=True):
                entries = _entries(mode, target, peer)
                for header in HEADERS:
                    told = "client" if header != "off" and peer in CONNECTED else ""
                    row = Row(layout, target, source, header, family, peer, entries, told=told)
                    if source in sources_with(mode, header):
                        rows[row[:5]] = row
    columns = sum(len(sources_with(mode, header)) for header in HEADERS)
    assert len(rows) == len(LAYOUTS) * len(TARGETS) * columns * len(FAMILIES)
    return rows


def _entries(mode: str, target: str, peer: str) -> int:
    """Of conntrack. NAT has one of the client's connection, and its neighbour is one of any program's."""
    if mode == "tproxy" or peer == "78":
        return 0
    return 1 if target == "unix" else 2


@pytest.mark.parametrize("mode", EXPECTED)
async def test_what_the_server_sees_and_what_it_costs(mode: str, open_lab: OpenLab, tmp_path: Path) -> None:
    measured: list[Row] = []
    some_at_once = trio.CapacityLimiter(3)

    async def measure_source(source: str, *headers: str) -> None:
        directory = tmp_path / f"{source}-{headers[0]}"
        directory.mkdir()
        async with some_at_once, open_field(open_lab, directory, headers=headers[0] != "off") as field:
            # Proof that tracking is active: a connection that is not captured has an entry.
            async with await field.client.connect(field.proxy.v4, 9090):
                assert field.proxy.call(conntrack_count) == 1
            for header in headers:
                measured.extend(await measure(field, mode, source, header))

    off, *others = HEADERS
    async with trio.open_nursery() as nursery:
        for source in sources_with(mode, off):
            nursery.start_soon(measure_source, source, off)
        for source in sources_with(mode, others[0]):
            nursery.start_soon(measure_source, source, *others)
    wanted = expected(mode)
    assert {row[:5]: row for row in measured} == wanted
    assert len(measured) == len(wanted)
    assert_page_has(f"{mode} mode", table_of(measured))


async def test_in_redirect_mode_the_clients_port_may_be_lost(open_lab: OpenLab, tmp_path: Path) -> None:
    """One port of a client, to two destinations: behind NAT the two would be the same, so it gives the second one another port, and
    the log has that."""
    config = '[capture]\nmode = "redirect"\nports = ["8080", "9090"]\n'
    async with open_field(open_lab, tmp_path) as field, open_daemon(field.proxy, config) as daemon:
        for port in (8080, 9090):
            stream = await field.client.connect(field.proxy.v4, port, source=field.client.v4, source_port=20000)
            await stream.send_all(b"GET / HTTP/1.0\r\n\r\n")
            while await stream.receive_some():
                pass
            await stream.aclose()
        assert await daemon.stop() == 0
        first, second = daemon.records()
    assert first["source"] == "192.0.2.2:20000"
    assert second["original_destination"] == "192.0.2.1:9090"
    assert second["source"].startswith("192.0.2.2:")
    assert second["source"] != first["source"]


def assert_page_has(name: str, table: str) -> None:
    """Between the markers of this name; where that is wanted, it is written there."""
    begin, end = f"<!-- measured, {name} -->\n", f"<!-- end of what was measured, {name} -->\n"
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(begin)
    old, marker, after = rest.partition(end)
    assert marker, f"docs/addresses.md has no place for the table of {name}: the lines {begin}{end}"
    if "TPROXYD_REWRITE_GOLDEN" in os.environ:
        PAGE.write_text(f"{before}{begin}{table}{end}{after}", encoding="utf-8")
    else:
        assert old == table, REWRITE
