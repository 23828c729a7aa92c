"""The wall clock is somebody else's: it may jump, and nothing here may believe it but the log."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import trio

from netns_tests.watch import works
from netns_tests.way import BOTH_LAYOUTS, Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import serve_echo
from tproxyd.testing.daemon import TPROXYD, LabDaemon

SOURCE = Path(__file__).with_name("wall_clock.c")
CONFIG = """
[capture]
ports = ["8080"]
[relay]
workers = {workers}
idle_timeout = "3s"
half_close_timeout = "2s"
"""


@pytest.mark.parametrize(("workers", "days"), [(0, 1), (1, -1)])
@BOTH_LAYOUTS
async def test_46_the_wall_clock_jumps_a_day(
    way: Way, nursery: trio.Nursery, tmp_path: Path, workers: int, days: int
) -> None:
    """No connection is too old or too young for that: the next one and the one that lives are served, time-outs last as long as they should."""
    await nursery.start(serve_echo, way.app, 8080)
    clock, library = tmp_path / "clock", tmp_path / "wall_clock.so"
    await trio.run_process(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(library), str(SOURCE)])
    wrong = {"LD_PRELOAD": str(library), "WALL_CLOCK": str(clock)}
    command = (*TPROXYD, "run", "-c", str(way.file(CONFIG.format(workers=workers))))
    async with way.proxy.process(*command, env=wrong, collect=True) as process:
        daemon = LabDaemon(process, await process.wait_for_output("tproxyd: ready "))
        async with await way.client.connect(way.address, 8080) as lives:
            own = format_address(lives.socket.getsockname())
            await works(lives)
            clock.write_text(f"{days * 86_400}\n")
            began = trio.current_time()
            while trio.current_time() - began < 1.5:  # more than a turn of every wheel
                await works(lives)
                async with await way.client.connect(way.address, 8080) as stream:
                    await works(stream)
                await trio.sleep(0.1)
            idle = trio.current_time()
            with trio.fail_after(10):
                with pytest.raises(trio.BrokenResourceError):
                    await lives.receive_some()
            assert 2.5 < trio.current_time() - idle < 8
        record = await daemon.record(own)
        assert record["outcome"] == "idle_timeout"
        assert 4_000 < record["duration_ms"] < 20_000
        told = datetime.fromisoformat(record["ts"])
        assert abs(told - datetime.now(told.tzinfo) - timedelta(days=days)) < timedelta(minutes=1)
        assert json.loads((await way.proxy.run(*TPROXYD, "status", "--json")).stdout)["daemon"]["uptime_s"] < 60
        assert await daemon.stop() == 0
