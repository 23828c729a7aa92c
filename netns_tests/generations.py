"""A daemon and the generations that come after it by hand-overs, as tests see them."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from netns_tests.watch import alive, until
from netns_tests.way import Way
from tproxyd.testing.daemon import TPROXYD
from tproxyd.testing.process import LabProcess

__all__ = ["Generations", "descendants", "open_generations", "tables"]


class Generations:
    """The daemon that the test has started, and what came after it by hand-overs: `pids`, the last one serves. All share outputs and configuration file."""

    def __init__(self, way: Way, file: Path, process: LabProcess) -> None:
        self.way, self.file, self.process = way, file, process
        self.pids = [process.pid]

    @property
    def serving(self) -> int:
        return self.pids[-1]

    async def hand_over(self, config: str | None = None) -> int:
        """To a new generation with this configuration, or the same again; its pid."""
        if config is not None:
            self.file.write_text(config, encoding="utf-8")
        done = await self.way.proxy.run(*TPROXYD, "handover")
        told = re.fullmatch(
            r"pid (\d+) serves from now on; pid (\d+) goes on with the connections that it has\n", done.stdout
        )
        assert told is not None, done
        assert int(told[2]) == self.serving
        self.pids.append(int(told[1]))
        return self.serving

    async def refused(self, *, code: int = 1) -> str:
        """What is said when it is."""
        done = await self.way.proxy.run(*TPROXYD, "handover", check=False)
        assert (done.returncode, done.stdout) == (code, ""), done
        return done.stderr

    async def status(self) -> dict[str, Any]:
        """What `tproxyd status` tells."""
        told: dict[str, Any] = json.loads((await self.way.proxy.run(*TPROXYD, "status", "--json")).stdout)
        return told

    async def ended(self, pid: int, *, within: float = 10.0) -> None:
        with suppress(trio.TooSlowError):
            await until(lambda: not alive(pid), within=within)
        assert not alive(pid), self.process.stderr_text

    async def stop(self) -> None:
        """Ends them all in order."""
        os.kill(self.serving, signal.SIGTERM)
        for pid in self.pids:
            await self.ended(pid)
        assert "Traceback" not in self.process.stderr_text
        assert "bug" not in self.process.stderr_text

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.process.stdout_text.splitlines(keepends=True) if line.endswith("\n")]


@asynccontextmanager
async def open_generations(
    way: Way, config: str, *, env: Mapping[str, str] | None = None
) -> AsyncIterator[Generations]:
    """At the end of the block the test has ended them, and the kernel holds what it held before; whoever still runs after a failure is killed."""
    before = await way.proxy.dump()
    file = way.file(config)
    async with way.proxy.process(*TPROXYD, "run", "-c", str(file), collect=True, env=env) as process:
        await process.wait_for_output("tproxyd: ready ")
        generations = Generations(way, file, process)
        try:
            yield generations
            assert await way.proxy.dump() == before
        finally:
            for pid in {*generations.pids[1:], *descendants(process.pid)}:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Daemons that a daemon has started to take its place, as far as they live and are not ready yet: until then each has a parent of its own."""
    return [child for parent in _children(pid) for child in _children(parent) if alive(child) and _is_daemon(child)]


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def _is_daemon(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return b"run" in command and b"tproxyd" in command
    return False


async def tables(way: Way) -> list[str]:
    return (await way.proxy.run("nft", "list", "tables")).stdout.split("\n")[:-1]
