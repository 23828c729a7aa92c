"""Settings under which the usual TPROXY set-up breaks in silence: in every combination a captured connection is served, at once."""

from __future__ import annotations

import itertools
import time

import trio

from netns_tests.way import Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import serve_identity
from tproxyd.testing.daemon import open_daemon

CONFIG = '[capture]\nports = ["8080"]\nwhen_down = "refuse"\n'


async def test_src_valid_mark_times_rp_filter_times_tcp_fwmark_accept(way: Way, nursery: trio.Nursery) -> None:
    """Preset, as the administrator's: nothing is changed by the daemon, and nothing has to be."""
    await nursery.start(serve_identity, way.app, 8080)
    before = await way.proxy.dump()
    marking = [f"net.ipv4.conf.{interface}.src_valid_mark" for interface in ("all", *way.proxy.v4_on)]
    filtering = [f"net.ipv4.conf.{interface}.rp_filter" for interface in ("all", *way.proxy.v4_on)]
    accepting = ["net.ipv4.tcp_fwmark_accept"]
    old = {name: way.proxy.sysctl(name) for name in (*marking, *filtering, *accepting)}
    slow = []
    async with open_daemon(way.proxy, CONFIG) as daemon:
        for marks, rp_filter, accept in itertools.product((0, 1), (0, 1, 2), (0, 1)):
            for names, value in ((marking, marks), (filtering, rp_filter), (accepting, accept)):
                for name in names:
                    way.proxy.set_sysctl(name, value)
            settings = f"src_valid_mark={marks} rp_filter={rp_filter} tcp_fwmark_accept={accept}"
            began = time.perf_counter()
            async with await way.client.connect(way.address, 8080, timeout=3) as stream:
                own = format_address(stream.socket.getsockname())
                await stream.send_eof()
                while await stream.receive_some():
                    pass
            record = await daemon.record(own)
            assert record["outcome"] == "closed", settings
            if time.perf_counter() - began > 0.9:  # a lost SYN is sent again after a second
                slow.append(settings)
        assert not slow
        assert daemon.process.stderr_text.count("repaired") == 0
        assert await daemon.stop() == 0
    for name, was in old.items():
        way.proxy.set_sysctl(name, was)
    assert await way.proxy.dump() == before
