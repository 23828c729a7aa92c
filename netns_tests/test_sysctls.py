"""Settings under which the usual TPROXY set-up breaks in silence: in every combination a captured connection is served, at once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import trio

from netns_tests.way import Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import serve_identity
from tproxyd.testing.daemon import LabDaemon, open_daemon

CONFIG = '[capture]\nports = ["8080"]\nwhen_down = "refuse"\n'
TO_APPS = """\
[capture]
ports = ["8080", "8081"]
when_down = "refuse"
[upstream]
source = "client"
target = "loopback"
[[policy.rule]]
name = "another port"
ports = ["8081"]
action = {{ forward = "{app}" }}
"""

# A name with {} is of each interface, and of "all".
SETTINGS = {
    ("net.ipv4.conf.{}.src_valid_mark",): (0, 1),
    ("net.ipv4.conf.{}.rp_filter",): (0, 1, 2),
    ("net.ipv4.tcp_fwmark_accept",): (0, 1),
    ("net.ipv4.fwmark_reflect", "net.ipv6.fwmark_reflect"): (0, 1),
}


async def test_what_decides_about_marks_and_ways_back_in_every_combination(way: Way, nursery: trio.Nursery) -> None:
    """Preset, as the administrator's: nothing is changed by the daemon, and nothing has to be."""
    await nursery.start(serve_identity, way.app, 8080)
    await assert_served_in_every_combination(way, CONFIG, [8080])


async def test_the_same_as_the_client_to_local_apps(way: Way, nursery: trio.Nursery) -> None:
    """On loopback, and at an address of the host, both with the client's address and port: their answers have the longest way back."""
    app = (way.proxy.v6 if ":" in way.address else way.proxy.v4, 9090)
    for port in (8080, 9090):
        await nursery.start(serve_identity, way.proxy, port)
    await assert_served_in_every_combination(way, TO_APPS.format(app=format_address(app)), [8080, 8081])


async def assert_served_in_every_combination(way: Way, config: str, ports: Sequence[int]) -> None:
    names = {
        setting: {name.format(interface) for name in setting for interface in ("all", *way.proxy.v4_on)}
        for setting in SETTINGS
    }
    before = await way.proxy.dump()
    old = {name: way.proxy.sysctl(name) for name in itertools.chain(*names.values())}
    slow = []
    async with open_daemon(way.proxy, config) as daemon:
        for values in itertools.product(*SETTINGS.values()):
            combination = dict(zip(SETTINGS, values, strict=True))
            for setting, value in combination.items():
                for name in names[setting]:
                    way.proxy.set_sysctl(name, value)
            for port in ports:
                began = time.perf_counter()
                await assert_served(way, daemon, port, f"{combination} port {port}")
                if time.perf_counter() - began > 0.9:  # a lost SYN is sent again after a second
                    slow.append((combination, port))
        assert not slow
        assert daemon.process.stderr_text.count("repaired") == 0
        assert await daemon.stop() == 0
    for name, was in old.items():
        way.proxy.set_sysctl(name, was)
    assert await way.proxy.dump() == before


async def assert_served(way: Way, daemon: LabDaemon, port: int, settings: str) -> None:
    """With an end of its own for each side, and as the client where another end than its own is dialled."""
    async with await way.client.connect(way.address, port, timeout=3) as stream:
        own = format_address(stream.socket.getsockname())
        await stream.send_eof()
        answer = b"".join([chunk async for chunk in stream])
    record = await daemon.record(own)
    assert record["outcome"] == "closed", settings
    assert answer, settings
    if record["upstream"] != record["original_destination"]:
        assert record["upstream_source"] == own, settings
