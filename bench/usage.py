"""What a proxy costs: CPU time and memory of a process and all that it has started, from /proc.

Knows process trees by their parents' numbers. CPU time is that of /proc/PID/task/*/schedstat, in nanoseconds: the ticks of
/proc/PID/stat are 10 ms, which is 2 % of a cell. It holds what the kernel did on the process's behalf, softirqs included that
interrupted it. Memory is PSS, so what processes share is counted once; the kernel's own memory for sockets is not in it.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

__all__ = ["cpu_seconds", "machine_seconds", "own_seconds", "pss_kib", "tree"]

_PROC = Path("/proc")


def tree(root: int) -> list[int]:
    """The process and all its descendants, parents first."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdecimal() and (parent := _parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:  # grows while it is walked
        found += children.get(pid, [])
    return found


def cpu_seconds(pids: list[int]) -> dict[int, float]:
    """By process, all its threads together; without those that are gone."""
    return {pid: seconds for pid in pids if (seconds := _cpu_of(pid)) is not None}


def pss_kib(pids: list[int]) -> int:
    """All of them together."""
    return sum(_pss_of(pid) for pid in pids)


def machine_seconds() -> float:
    """CPU time that was used on the whole machine, by whomever, interrupts and what the host took away included."""
    words = (_PROC / "stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(word) for word in words[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _parent(entry: Path) -> int | None:
    try:
        # The command stands in parentheses and may contain any character, so what counts comes after the last one.
        return int((entry / "stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:
        return None  # gone meanwhile


def _cpu_of(pid: int) -> float | None:
    try:
        threads = list((_PROC / str(pid) / "task").iterdir())
        return sum(int((thread / "schedstat").read_bytes().split()[0]) for thread in threads) / 1e9
    except (FileNotFoundError, ProcessLookupError):
        return None


def _pss_of(pid: int) -> int:
    for line in (_PROC / str(pid) / "smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0  # a zombie has no memory
