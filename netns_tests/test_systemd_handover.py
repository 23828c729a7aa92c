"""`tproxyd handover` under a real systemd: the unit stays as it is, whichever process is its main one, and whatever ends in which order."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from netns_tests.service import expect_captured, kill, load_of, open_service, tables
from netns_tests.systemd_lab import System
from netns_tests.watch import alive, another_works, ends_in_order, resets_within, until, works
from netns_tests.way import BOTH_LAYOUTS, CLOSED, OPEN, SIDECAR_V4, Way
from tproxyd.testing import serve_echo, serve_identity

WATCHDOG = 1.0


async def hand_over(system: System) -> tuple[int, int]:
    """The pids of the old and the new generation."""
    old = await system.main_pid()
    await system.run("tproxyd", "handover")
    new = await system.main_pid()
    assert new != old
    return old, new


async def fed(system: System) -> None:
    """Returns when the watchdog would have ended twice what feeds it no more."""
    fed_at = {await system.show("WatchdogTimestampMonotonic")}
    ends = time.monotonic() + 2 * WATCHDOG
    while time.monotonic() < ends:
        fed_at.add(await system.show("WatchdogTimestampMonotonic"))
        assert await system.show("ActiveState") == "active"
    assert len(fed_at) > 4


@pytest.mark.parametrize(
    ("way", "config"),
    [("gateway v4", OPEN), ("sidecar v6", CLOSED + "[relay]\nworkers = 2\n")],
    ids=["gateway", "sidecar"],
    indirect=["way"],
)
async def test_60_hand_overs_under_load_refuse_nobody_and_the_unit_stays_active(
    way: Way, nursery: trio.Nursery, tmp_path: Path, code: Path, config: str, counted: Callable[[int], int]
) -> None:
    """10,000 connections, two hand-overs, then a restart and a stop by systemd, which knows by then none of its own children."""
    await nursery.start(serve_identity, way.app, 8080)
    count = counted(10_000)
    async with open_service(way, code, tmp_path, config, edit=f"WatchdogSec={WATCHDOG:g}s") as system:
        async with load_of(way) as load:
            for turn in (1, 2):
                await load.until(count * turn // 4)
                old, _ = await hand_over(system)
                await until(lambda: not alive(old))  # noqa: B023  # at once
                await fed(system)
            assert await system.show("NRestarts") == "0"
            await load.until(count * 3 // 4)
            main = await system.main_pid()
            await system.ctl("restart", "tproxyd")
            assert await system.main_pid() != main
            assert await system.show("NFileDescriptorStore") == "0"
            await load.until(count)
        assert load.errors == [], system.log()
        assert await system.show("NRestarts") == "0"
        await system.ctl("stop", "tproxyd")
        assert await system.show("Result") == "success"
        assert load.unrecorded(system) == []


@BOTH_LAYOUTS
async def test_what_lives_goes_on_until_the_drain_is_over(
    way: Way, nursery: trio.Nursery, tmp_path: Path, code: Path
) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_service(way, code, tmp_path, CLOSED + '[drain]\ntimeout = "2s"\n') as system:
        ends, stays = [await way.client.connect(way.address, 8080) for _ in range(2)]
        async with ends, stays:
            await works(ends)
            await works(stays)
            old, _ = await hand_over(system)
            await works(ends)
            await ends_in_order(ends)
            await works(stays)
            assert await resets_within(stays, 4)
        await until(lambda: not alive(old))
        assert await system.show("SubState") == "running"
        await another_works(way)
        await system.ctl("stop", "tproxyd")
        assert system.outcomes() == {"closed": 2, "drained": 1}


@SIDECAR_V4
@pytest.mark.parametrize("verb", ["stop", "restart"])
async def test_08_a_stop_or_a_restart_lets_drain_what_still_does(
    way: Way, nursery: trio.Nursery, tmp_path: Path, code: Path, verb: str
) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_service(way, code, tmp_path, CLOSED) as system:
        async with await way.client.connect(way.address, 8080) as lives:
            await works(lives)
            old, new = await hand_over(system)
            await system.ctl(verb, "--no-block", "tproxyd")
            await system.until("SubState", "stop-sigterm")
            await works(lives)
            assert alive(old)
            await ends_in_order(lives)
        if verb == "stop":
            await system.until("ActiveState", "inactive")
            assert await tables(way) == []
        else:
            await system.until("SubState", "running")
            assert await system.main_pid() not in (old, new)
            await another_works(way)
        assert await system.show("Result") == "success"
        assert system.outcomes().keys() == {"closed"}
        assert not alive(old)
        assert not alive(new)


@pytest.mark.parametrize(
    ("way", "config"), [("gateway v4", OPEN), ("sidecar v4", CLOSED)], ids=["open", "closed"], indirect=["way"]
)
@pytest.mark.parametrize("drains", [True, False], ids=["the old one drains", "the old one has ended"])
async def test_06_sigkill_of_the_new_main_process_starts_anew(
    way: Way, nursery: trio.Nursery, tmp_path: Path, code: Path, config: str, drains: bool
) -> None:
    """While the old one drains it is the killed one's parent, and not systemd."""
    await nursery.start(serve_echo, way.app, 8080)
    async with open_service(way, code, tmp_path, config) as system:
        async with await way.client.connect(way.address, 8080) as lives:
            await works(lives)
            old, new = await hand_over(system)
            if not drains:
                await ends_in_order(lives)
                await until(lambda: not alive(old))
            killed = await kill(new)
            await system.until("NRestarts", "1")
            await system.until("ActiveState", "active")
            print(f"served again {time.perf_counter() - killed:.2f} s after SIGKILL")
            assert time.perf_counter() - killed < 8, "that was the watchdog"
        assert not alive(old)
        await another_works(way)
        await system.until("StatusText", "captures TCP 8080; 0 connections")


@SIDECAR_V4
async def test_06_sigkill_of_the_old_process_while_it_drains_changes_nothing(
    way: Way, nursery: trio.Nursery, tmp_path: Path, code: Path
) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_service(way, code, tmp_path, CLOSED, edit=f"WatchdogSec={WATCHDOG:g}s") as system:
        async with await way.client.connect(way.address, 8080) as lives:
            await works(lives)
            old, new = await hand_over(system)
            await kill(old)
            await fed(system)
        assert await system.main_pid() == new
        assert await system.show("NRestarts") == "0"
        await another_works(way)


@SIDECAR_V4
async def test_06_one_that_is_refused_leaves_the_unit_as_it_was(
    way: Way, nursery: trio.Nursery, tmp_path: Path, code: Path
) -> None:
    await nursery.start(serve_identity, way.app, 8080)
    async with open_service(way, code, tmp_path, CLOSED, edit=f"WatchdogSec={WATCHDOG:g}s") as system:
        main = await system.main_pid()
        system.configure("[capture]\nprots = 1\n")
        done = await system.run("tproxyd", "handover", check=False)
        assert done.returncode == 1
        assert "capture.prots" in done.stderr
        await fed(system)
        assert await system.main_pid() == main
        assert await system.show("NRestarts") == "0"
        await expect_captured(way, system)


@SIDECAR_V4
async def test_a_package_that_has_been_upgraded_serves_after_a_hand_over(
    way: Way, nursery: trio.Nursery, tmp_path: Path, code: Path
) -> None:
    """The program is another file by then, and what was loaded of the old one is gone."""
    await nursery.start(serve_echo, way.app, 8080)
    async with open_service(way, code, tmp_path, CLOSED) as system:
        async with await way.client.connect(way.address, 8080) as lives:
            await works(lives)
            upgraded = system.path("/run/lab/upgraded")
            shutil.copytree(code, upgraded, ignore=shutil.ignore_patterns("__pycache__"))
            module = upgraded / "tproxyd" / "__init__.py"
            assert '__version__ = "' in module.read_text()
            module.write_text(module.read_text().replace('__version__ = "', '__version__ = "9.'))
            program = system.path("/usr/sbin/tproxyd")
            new_program = program.with_suffix(".dpkg-new")
            new_program.write_text(program.read_text().replace("/run/lab/code", "/run/lab/upgraded"))
            new_program.chmod(0o755)
            new_program.rename(program)
            old, _ = await hand_over(system)
            assert (await system.run("tproxyd", "--version")).stdout.startswith("tproxyd 9.")
            status = json.loads((await system.run("tproxyd", "status", "--json", check=False)).stdout)
            assert status["daemon"]["version"].startswith("9.")
            await works(lives)
            os.kill(old, signal.SIGTERM)
        await until(lambda: not alive(old))
        await another_works(way)
        assert await system.show("NRestarts") == "0"
