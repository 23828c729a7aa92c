"""Who has a turn when: the groups of a run, round by round, peer by peer; and the two groups that need a network as they want it.

Knows A B C ... A B C ...: the turns of a round are neighbours in time. A turn that fails is an error in the results, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from bench import cells
from bench.abuse import KINDS
from bench.cells import Lengths, Turn
from bench.figures import FIGURES, QUIET, REFERENCE, Results
from bench.goals import BUSY, TWO_WORKERS
from bench.peers import ABUSED, CAPTURE, HANDLER, HANDLER_LOOP, Peer, all_peers
from bench.rig import Rig, UnprovenError, Visit, apply_config, open_rig
from bench.scaling import CLIENT_NETWORK, capture_excluding, networks, run_scaling
from tproxyd.testing import LabError, activate_conntrack, conntrack_count
from tproxyd.testing.daemon import TPROXYD

__all__ = ["GROUPS", "Plan", "run"]

GROUPS = ("bulk", "small", "handler", "idle", "push", "workers", "admin", "bypass", "conntrack", "scaling")

_HANDLERS = (REFERENCE, HANDLER, HANDLER_LOOP)
_NO_RIVALS_AT_IDLE = ("direct", "haproxy+splice", "haproxy tuned", BUSY)
_CONNTRACK_CONNECTIONS = 10_000
_EXCLUDED = 10_000


@dataclass(frozen=True)
class Plan:
    """What a run does. `peers` include those that only some groups have."""

    peers: Sequence[Peer]
    groups: Sequence[str]
    rounds: Mapping[str, int]
    """By group."""
    lengths: Lengths
    programs: dict[str, str]
    directory: Path
    files: int
    """As many may be open in a process."""
    abuse: Sequence[str] = KINDS
    """Of the daemon, in the group admin."""


async def run(plan: Plan, results: Results, say: Callable[[str], None]) -> None:
    """All groups. What is measured is in `results` at once, so an interrupted run has what it has."""
    peers, handlers = (
        _without(plan.peers, HANDLER, HANDLER_LOOP, ABUSED),
        [peer for peer in plan.peers if peer.name in _HANDLERS],
    )
    turns: dict[str, tuple[Turn, Sequence[Peer]]] = {
        "bulk": (partial(cells.bulk, plan.lengths), _without(peers, BUSY, TWO_WORKERS)),
        "small": (partial(cells.small, plan.lengths), _without(peers, TWO_WORKERS)),
        "handler": (partial(cells.handler, plan.lengths), handlers),
        "idle": (partial(cells.idle, plan.lengths), _without(peers, *_NO_RIVALS_AT_IDLE, TWO_WORKERS)),
        "push": (cells.push, _without(peers, BUSY, TWO_WORKERS)),
        "workers": (partial(cells.workers, plan.lengths), _workers(peers)),
        "admin": (partial(cells.admin, plan.lengths, plan.abuse), [peer for peer in plan.peers if peer.name == ABUSED]),
    }
    async with open_rig(plan.programs, plan.directory) as rig:
        results.others = rig.others  # grows with every cell
        for group in plan.groups:
            if group in turns:
                turn, those = turns[group]
                for number in range(1, plan.rounds[group] + 1):
                    for peer in those:
                        await _take(partial(_turn, rig, group, peer, number, turn, results, say), results, say, group)
            elif group == "bypass":
                for number in range(1, plan.rounds[group] + 1):
                    await _take(partial(_bypass, rig, plan, number, results, say), results, say, group)
        if "scaling" in plan.groups:
            await run_scaling(rig, peers, plan.files, plan.rounds["scaling"], results, say)
    if "conntrack" in plan.groups:
        for number in range(1, plan.rounds["conntrack"] + 1):
            for peer in plan.peers:
                if peer.name == "tproxyd":
                    await _take(partial(_conntrack, plan, peer, number, results, say), results, say, "conntrack")


async def _take(turn: Callable[[], Awaitable[None]], results: Results, say: Callable[[str], None], group: str) -> None:
    """Takes a turn, and takes it once more if it fails: a peer that loses a connection of a thousand must not cost a run of a quarter
    of an hour. What fails twice is an error of the run."""
    for attempt in (1, 2):
        try:
            return await turn()
        except (UnprovenError, LabError, trio.TooSlowError) as error:
            what = f"{group}: {str(error) or 'it took too long'}"
            if attempt == 2:
                results.errors.append(what)
            say(f"  ERROR {what}{', and is tried again' if attempt == 1 else ''}")
    return None


async def _turn(
    rig: Rig, group: str, peer: Peer, number: int, turn: Turn, results: Results, say: Callable[[str], None]
) -> None:
    async with rig.visit(peer) as visit:
        figures, raw = await turn(visit)
        if peer.proxied:
            figures["start"] = visit.start_seconds * 1000
    _tell(group, number, peer.name, figures, raw, results, say)


async def _bypass(rig: Rig, plan: Plan, number: int, results: Results, say: Callable[[str], None]) -> None:
    """The same traffic past the proxy: without any ruleset, and behind 10,000 networks of which the last is the client's.

    A proxy listens meanwhile, so that traffic which is not steered is so because the ruleset lets it off. Which of the two comes first changes
    with every round.
    """
    excluding = capture_excluding([*networks(_EXCLUDED - 1), CLIENT_NETWORK])
    peers = {peer.name: peer for peer in all_peers()}
    async with rig.visit(peers["splice"]):
        visit = Visit(rig, peers["direct"], None, 0.0)
        measured: dict[str, dict[str, float]] = {}
        try:
            for what in ("without", "behind") if number % 2 else ("behind", "without"):
                if what == "without":
                    await rig.gateway.run(*TPROXYD, "revert")
                else:
                    await apply_config(rig.gateway, plan.directory, excluding)
                measured[what] = await _traffic(visit, plan.lengths)
        finally:
            await apply_config(rig.gateway, plan.directory, CAPTURE)
    figures = {f"bypass_{name}": measured["behind"][name] / measured["without"][name] for name in ("conn32", "bulk8")}
    _tell("bypass", number, "direct", figures, measured, results, say)


async def _traffic(visit: Visit, lengths: Lengths) -> dict[str, float]:
    connections = await visit.measure("connections", 32, lengths.connections)
    download = await visit.measure("bulk", "download", 8, lengths.bulk)
    return {
        "conn32": connections.client["count"] / connections.client["seconds"],
        "bulk8": download.client["bytes"] * 8e-9 / download.client["seconds"],
        "others": max(connections.others, download.others),
    }


async def _conntrack(plan: Plan, peer: Peer, number: int, results: Results, say: Callable[[str], None]) -> None:
    """A network of its own: what makes conntrack active would slow down what is measured in it."""
    async with open_rig(plan.programs, plan.directory) as rig:
        rig.gateway.call(activate_conntrack)
        direct = next(peer for peer in all_peers() if peer.name == "direct")
        await Visit(rig, direct, None, 0.0).measure("requests", 1, 0.1)
        before = rig.gateway.call(conntrack_count)
        if before == 0:
            raise UnprovenError("conntrack is not active: a connection without a proxy made no entry")
        opened = 0
        async with rig.visit(peer) as visit:
            while opened < _CONNTRACK_CONNECTIONS:
                cell = await visit.measure("connections", 32, 1.0)
                opened += int(cell.client["opened"])
            entries = rig.gateway.call(conntrack_count) - before
    _tell("conntrack", number, peer.name, {"conntrack": float(entries)}, {"opened": opened}, results, say)


def _tell(
    group: str,
    number: int,
    peer: str,
    figures: dict[str, float],
    raw: Mapping[str, object],
    results: Results,
    say: Callable[[str], None],
) -> None:
    results.add(group, number, peer, figures, raw)
    words = ", ".join(f"{name} {value:,.{FIGURES[name].digits}f}" for name, value in figures.items())
    others = results.cells[-1]["others"]
    say(f"  {group} {number} {peer}: {words}{f' (disturbed: {others:.0%})' if others > QUIET else ''}")


def _without(peers: Sequence[Peer], *names: str) -> list[Peer]:
    return [peer for peer in peers if peer.name not in names]


def _workers(peers: Sequence[Peer]) -> list[Peer]:
    both = [peer for peer in peers if peer.name in ("tproxyd", TWO_WORKERS)]
    return both if len(both) == 2 else []
