"""The real daemon, in a node of a lab: started as its users start it, stopped or killed at the end of the block."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tproxyd.testing.node import Node
from tproxyd.testing.process import LabProcess

__all__ = ["TPROXYD", "LabDaemon", "cpu_seconds", "open_daemon"]

TPROXYD = (sys.executable, "-m", "tproxyd")
"""The command, run by the interpreter of the test."""


class LabDaemon:
    """A running `tproxyd run`. `ready` is the line that it said."""

    def __init__(self, process: LabProcess, ready: str) -> None:
        self.process = process
        self.ready = ready

    async def record(self, source: str) -> dict[str, Any]:
        """Waits for the access-log line of the connection from this client address (`ip:port`, `[ip6]:port`)."""
        line = await self.process.wait_for_output(f'"source":"{source}"')
        content: dict[str, Any] = json.loads(line)
        return content

    async def stop(self) -> int:
        """SIGTERM, and its exit code once it has ended; from then on `records` is complete."""
        self.process.send_signal(signal.SIGTERM)
        return await self.process.wait()

    def records(self) -> list[dict[str, Any]]:
        """All records so far, in the order in which the connections ended."""
        return [json.loads(line) for line in self.process.stdout_text.splitlines(keepends=True) if line.endswith("\n")]


@asynccontextmanager
async def open_daemon(node: Node, config: str, *, files: int | None = None) -> AsyncIterator[LabDaemon]:
    """Runs `tproxyd run` in the node with this configuration (TOML) and waits for its ready line.

    `files` is the most that it may have open (RLIMIT_NOFILE, hard and soft); by default as many as the test run may.

    Killed at the end of the block if it still runs; then its kernel state stays behind, as it would on a real machine.
    LabError with all that it printed if it does not become ready.
    """
    with tempfile.TemporaryDirectory(prefix="tproxyd-lab-") as directory:
        file = Path(directory) / "tproxyd.toml"
        file.write_text(config, encoding="utf-8")
        limit = ("prlimit", f"--nofile={files}:{files}") if files else ()
        async with node.process(*limit, *TPROXYD, "run", "-c", str(file), collect=True) as process:
            yield LabDaemon(process, await process.wait_for_output("tproxyd: ready "))


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
