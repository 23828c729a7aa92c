"""Where tproxyd's time goes: `python -m bench.profile connections|requests|bulk [COUNT]`, as root; needs perf and strace.

One load at the real daemon in the lab. Its busiest process is looked at three times: user and system time from /proc, the share of each
library by perf's samples, and how often each system call is made by strace. The last two slow it down, so only the first is a figure.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import trio

from bench.build import compile_program
from bench.peers import tproxyd
from bench.rig import Visit, open_rig
from bench.surroundings import raise_file_limit
from tproxyd.net.capabilities import require_capabilities
from tproxyd.testing.isolation import LAB_CAPABILITIES, isolate_this_process

__all__ = ["main"]

_SECONDS = 2.0
_WORDS = {"connections": ("connections",), "requests": ("requests",), "bulk": ("bulk", "download")}
_COUNTS = {"connections": 32, "requests": 64, "bulk": 8}


def main(arguments: Sequence[str]) -> None:
    """Prints the three looks."""
    mode = arguments[0] if arguments else "connections"
    if mode not in _WORDS:
        sys.exit("python -m bench.profile connections|requests|bulk [COUNT]")
    count = int(arguments[1]) if len(arguments) > 1 else _COUNTS[mode]
    require_capabilities("a profile", LAB_CAPABILITIES)
    isolate_this_process()
    raise_file_limit()
    with tempfile.TemporaryDirectory(prefix="tproxyd-bench-") as directory:
        trio.run(_profile, (*_WORDS[mode], count, _SECONDS), Path(directory))


async def _profile(words: tuple[object, ...], directory: Path) -> None:
    programs = {name: compile_program(name, directory) for name in ("load", "splice_relay")}
    async with open_rig(programs, directory) as rig, rig.visit(tproxyd("tproxyd")) as visit:
        cell = await visit.measure(*map(str, words[:1]), *words[1:])
        pid = max(cell.cpu_by_process, key=lambda one: cell.cpu_by_process[one])
        before = _times(pid)
        cell = await visit.measure(*map(str, words[:1]), *words[1:])
        user, system = (after - first for after, first in zip(_times(pid), before, strict=True))
        unit = (cell.client["bytes"] / 1e9, "GB") if "bulk" in words else (cell.client["count"], "each")
        scale = 1.0 if "bulk" in words else 1e6
        print(f"busiest process: user {user / unit[0] * scale:.2f}, system {system / unit[0] * scale:.2f} ", end="")
        print("s per GB" if "bulk" in words else "us for each; ", end="")
        rest = sum(used for other, used in cell.cpu_by_process.items() if other != pid)
        print(f" the other processes {rest / unit[0] * scale:.2f}")
        data = directory / "perf.data"
        record = ("perf", "record", "-q", "-F", "1999", "-o", str(data), "-p", str(pid))
        await _watched(visit, words, record)
        for key, rows in (("dso", 6), ("symbol", 25)):
            report = ("perf", "report", "-i", str(data), "--stdio", "--sort", key)
            done = await trio.run_process(report, capture_stdout=True, capture_stderr=True)
            lines = [
                line.rstrip() for line in done.stdout.decode(errors="replace").splitlines() if re.match(r"\s+\d", line)
            ]
            print(f"\nshare of samples by {key}", *lines[:rows], sep="\n")
        counts = directory / "strace"
        cell_count = await _watched(visit, words, ("strace", "-c", "-o", str(counts), "-p", str(pid)))
        print(f"\nsystem calls, {cell_count:.0f} times the load", counts.read_text("utf-8"), sep="\n")


async def _watched(visit: Visit, words: tuple[object, ...], tracer: Sequence[str]) -> float:
    process = await trio.lowlevel.open_process(tracer, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        await trio.sleep(0.5)  # until it is attached: neither tells
        cell = await visit.measure(*map(str, words[:1]), *words[1:])
    finally:
        process.send_signal(signal.SIGINT)
        await process.wait()
    return cell.client["count"]


def _times(pid: int) -> tuple[float, float]:
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    return int(fields[11]) / 100, int(fields[12]) / 100  # USER_HZ is 100 on every platform that Python runs on


if __name__ == "__main__":
    main(sys.argv[1:])
