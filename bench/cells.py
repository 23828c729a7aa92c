"""What is done in a peer's turn: the groups of cells, each a plain function of a visit that gives its figures.

Knows which load makes which figure. A group's cells follow each other in one turn of a peer; the next peer's turn comes a few
seconds later.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from bench.peers import METRICS_PORT
from bench.rig import Cell, UnprovenError, Visit, as_row
from tproxyd.daemon.admin_socket import admin_path

__all__ = ["Lengths", "Turn", "admin", "bulk", "handler", "idle", "push", "small", "workers"]

Turn = Callable[[Visit], Awaitable[tuple[dict[str, float], dict[str, object]]]]
"""Figures, and raw numbers by cell."""

_STALL = 1.0  # seconds without a byte accepted: the push has stalled
_ABUSERS = 1000
_PUSH_LIMIT = 512  # MiB; who takes this much has no limit


@dataclass(frozen=True)
class Lengths:
    """Seconds of the cells, and sizes. Below 1 s the slow start of cores and caches begins to show, hence the second and more."""

    bulk: float = 1.2
    connections: float = 1.5
    requests: float = 1.0
    idle: int = 8000


async def bulk(lengths: Lengths, visit: Visit) -> tuple[dict[str, float], dict[str, object]]:
    """Much data in few streams."""
    cells = {
        "bulk1": await visit.measure("bulk", "download", 1, lengths.bulk),
        "bulk8": await visit.measure("bulk", "download", 8, lengths.bulk),
        "upload8": await visit.measure("bulk", "upload", 8, lengths.bulk),
    }
    figures = {name: cell.client["bytes"] * 8e-9 / cell.client["seconds"] for name, cell in cells.items()}
    if visit.peer.proxied:
        down = [cells["bulk1"], cells["bulk8"]]
        figures["cpu_per_gb"] = sum(cell.cpu for cell in down) / (sum(cell.client["bytes"] for cell in down) / 1e9)
    return figures, _raw(cells)


async def small(lengths: Lengths, visit: Visit) -> tuple[dict[str, float], dict[str, object]]:
    """Many connections, and many small messages."""
    cells = {
        "conn32": await visit.measure("connections", 32, lengths.connections),
        "conn64": await visit.measure("connections", 64, lengths.connections),
        "ka1": await visit.measure("requests", 1, lengths.requests),
        "ka64": await visit.measure("requests", 64, lengths.requests),
    }
    figures = {
        "conn32": _rate(cells["conn32"]),
        "conn64": _rate(cells["conn64"]),
        "conn_p99": cells["conn32"].client["p99_us"],
        "ka1_p50": cells["ka1"].client["p50_us"],
        "ka1_p99": cells["ka1"].client["p99_us"],
        "ka64": _rate(cells["ka64"]),
        "ka64_p99": cells["ka64"].client["p99_us"],
    }
    if visit.peer.proxied:
        figures["conn_cpu"] = cells["conn32"].cpu / cells["conn32"].client["opened"] * 1e6
    return figures, _raw(cells)


async def handler(lengths: Lengths, visit: Visit) -> tuple[dict[str, float], dict[str, object]]:
    """The few cells that tell what a handler in a program costs."""
    cells = {
        "bulk1": await visit.measure("bulk", "download", 1, lengths.bulk),
        "bulk8": await visit.measure("bulk", "download", 8, lengths.bulk),
        "conn32": await visit.measure("connections", 32, lengths.connections),
        "ka1": await visit.measure("requests", 1, lengths.requests),
        "ka64": await visit.measure("requests", 64, lengths.requests),
    }
    figures = {name: cells[name].client["bytes"] * 8e-9 / cells[name].client["seconds"] for name in ("bulk1", "bulk8")}
    down = [cells["bulk1"], cells["bulk8"]]
    figures["cpu_per_gb"] = sum(cell.cpu for cell in down) / (sum(cell.client["bytes"] for cell in down) / 1e9)
    figures |= {name: _rate(cells[name]) for name in ("conn32", "ka64")}
    figures["ka1_p50"] = cells["ka1"].client["p50_us"]
    figures["conn_cpu"] = cells["conn32"].cpu / cells["conn32"].client["opened"] * 1e6
    return figures, _raw(cells)


async def idle(lengths: Lengths, visit: Visit) -> tuple[dict[str, float], dict[str, object]]:
    """The same load before and beside many idle connections of the same process, and what these cost in memory."""
    requests, connections = partial(visit.measure, "requests", 64), partial(visit.measure, "connections", 32)
    cells = {"conn32": await connections(lengths.requests), "ka64": await requests(lengths.requests)}
    memory = visit.memory_kib()
    async with visit.idle_connections(lengths.idle) as count:
        used = visit.memory_kib() - memory
        cells["ka64 beside idle"] = await requests(lengths.requests)
        cells["conn32 beside idle"] = await connections(lengths.requests)
    figures = {
        "idle_ka64": _rate(cells["ka64 beside idle"]) / _rate(cells["ka64"]),
        "idle_conn32": _rate(cells["conn32 beside idle"]) / _rate(cells["conn32"]),
        "idle_kib": used / count,
    }
    return figures, {**_raw(cells), "idle": count, "pss_kib": used}


async def admin(lengths: Lengths, kinds: Sequence[str], visit: Visit) -> tuple[dict[str, float], dict[str, object]]:
    """The same requests alone and beside programs that ask the daemon badly, at its socket and at its metrics' port: slow clients, huge headers, 1,000
    connections, a storm of scrapes, or those of the `kinds` of abuse.py; and beside the same programs when they ask a decoy of their own, which tells what of that is the machine's. There and back
    again: what drifts meanwhile hurts all alike."""
    cells: dict[str, Cell] = {}
    abused: dict[str, int] = {}
    for number, how in enumerate(("alone", "decoy", "beside", "beside", "decoy", "alone")):
        async with _abuse(visit, abused, kinds, decoy=how == "decoy") if how != "alone" else nullcontext():
            for name, connections in (("ka1", 1), ("ka64", 64)):
                what = f"{name} {how} {number}"
                cells[what] = await visit.measure("requests", connections, lengths.requests)
    figures = {}
    for name in ("ka1", "ka64"):
        p99 = {
            how: sum(cell.client["p99_us"] for what, cell in cells.items() if what.startswith(f"{name} {how}"))
            for how in ("alone", "decoy", "beside")
        }
        figures[f"abuse_{name}_p99"] = p99["beside"] / p99["alone"]
        figures[f"decoy_{name}_p99"] = p99["beside"] / p99["decoy"]
    return figures, {**_raw(cells), "abuse": abused}


@asynccontextmanager
async def _abuse(visit: Visit, done: dict[str, int], kinds: Sequence[str], *, decoy: bool) -> AsyncIterator[None]:
    """These kinds of it, of the daemon or of a decoy; adds to `done` what there was. Raises UnprovenError if that is less than there should be."""
    node, rig = visit.rig.gateway, visit.rig
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/decoy.sock" if decoy else node.call(admin_path, "auto")
        assert path is not None
        port, more = (METRICS_PORT + 1, ("decoy",)) if decoy else (METRICS_PORT, ())
        # Only when no other program wants the CPU.
        words = ("chrt", "--idle", "0", sys.executable, "-m", "bench.abuse", path, str(port), *more, *kinds)
        checkout = str(Path(__file__).parent.parent)
        async with node.process(*words, stdin=subprocess.PIPE, collect=True, cwd=checkout) as abuse:
            await abuse.wait_for_output("up", timeout=60)
            rig.helpers.append(abuse.pid)
            try:
                yield
            finally:
                rig.helpers.remove(abuse.pid)
            assert abuse.stdin is not None
            await abuse.stdin.aclose()
            with trio.fail_after(10):
                await abuse.wait()
            told = json.loads(abuse.stdout_text.splitlines()[-1])
        if ("flood" in kinds and told["connections"] < _ABUSERS) or ("storm" in kinds and not told.get("answers")):
            raise UnprovenError(f"{visit.peer.name}: it was hardly asked: {told}")
        for name, number in told.items() if not decoy else ():
            done[name] = done.get(name, 0) + number


async def push(visit: Visit) -> tuple[dict[str, float], dict[str, object]]:
    """How much is taken from a client for a server that never reads."""
    cell = await visit.measure("push", _STALL, _PUSH_LIMIT)
    return {"push": cell.client["bytes"] / 2**20}, _raw({"push": cell})


async def workers(lengths: Lengths, visit: Visit) -> tuple[dict[str, float], dict[str, object]]:
    """Connections per second of CPU; and of the two processes that used most of it, the smaller one's share."""
    cell = await visit.measure("connections", 64, 2 * lengths.connections)
    figures = {"conn_per_cpu": cell.client["opened"] / cell.cpu}
    first, second = (*sorted(cell.cpu_by_process.values(), reverse=True), 0.0)[:2]
    if visit.peer.name != "tproxyd":
        figures["least_share"] = 100 * second / (first + second)
    return figures, {**_raw({"conn64": cell}), "cpu_by_process": sorted(cell.cpu_by_process.values())}


def _rate(cell: Cell) -> float:
    return cell.client["count"] / cell.client["seconds"]


def _raw(cells: dict[str, Cell]) -> dict[str, object]:
    return {name: as_row(cell) for name, cell in cells.items()}
