"""What becomes of tproxyd's connections/s and their p99 as something grows: idle connections, policy rules, lists of networks.

Knows the steps of each and how they are made. Each step is compared with step 0 of the same round. HAProxy goes along with the idle connections,
to show what of a change is the machine's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack

import trio

from bench.figures import Results
from bench.goals import TWO_WORKERS
from bench.peers import CAPTURE, Peer, tproxyd
from bench.rig import Rig, UnprovenError, Visit, apply_config
from tproxyd.testing import LabError

__all__ = ["CLIENT_NETWORK", "IDLE", "capture_excluding", "networks", "run_scaling"]

IDLE = (0, 1000, 2000, 4000, 8000)
IDLE_OF_TWO = (0, 10_000)
RULES = (0, 10, 100, 1000)
NETWORKS = (0, 10, 100, 1000, 10_000)
CLIENT_NETWORK = "192.0.2.0/24"
_SECONDS = 1.0


def networks(count: int) -> list[str]:
    """So many that nobody here is in, and that cannot be merged: every other /30 of 198.18.0.0/15, which is there for benchmarks (RFC 2544)."""
    return [f"198.{18 + number // 8192}.{number // 32 % 256}.{number % 32 * 8}/30" for number in range(count)]


def capture_excluding(sources: Sequence[str]) -> str:
    """The capture of all, less these."""
    return CAPTURE.replace("when_down", f"exclude_sources = {_listed(sources)}\nwhen_down")


async def run_scaling(
    rig: Rig, peers: Sequence[Peer], files: int, rounds: int, results: Results, say: Callable[[str], None]
) -> None:
    """All of it, `rounds` times."""
    most = (files - 1500) // 2  # an idle connection takes two files of the proxy
    for number in range(1, rounds + 1):
        for peer in peers:
            if peer.name in ("haproxy", "tproxyd"):
                steps = [step for step in IDLE if step <= most]
                await _idle(rig, peer, steps, number, results, say)
            elif peer.name == TWO_WORKERS:
                await _idle(rig, peer, [step for step in IDLE_OF_TWO if step <= 2 * most], number, results, say)
        known = next((peer for peer in peers if peer.name == "tproxyd"), None)
        for what, step, config, capture in _configurations() if known else ():
            peer = tproxyd(f"tproxyd, {step} {what}", config, capture=capture)
            await _started(rig, what, peer, step, capture, number, results, say)


def _configurations() -> Iterator[tuple[str, int, str, str]]:
    """What grows, its step, tproxyd's further configuration, and the capture."""
    for step in RULES:
        yield "rules", step, "".join(_rule(f"r{at}", [network]) for at, network in enumerate(networks(step))), CAPTURE
    for step in NETWORKS:
        yield "networks of one rule", step, _rule("listed", networks(step)) if step else "", CAPTURE
    for step in NETWORKS:
        yield "networks in exclude_sources", step, "", capture_excluding(networks(step))


def _rule(name: str, sources: Sequence[str]) -> str:
    return f'[[policy.rule]]\nname = "{name}"\nsources = {_listed(sources)}\naction = "refuse"\n'


def _listed(words: Sequence[str]) -> str:
    return str(list(words)).replace("'", '"')


async def _idle(
    rig: Rig, peer: Peer, steps: Sequence[int], number: int, results: Results, say: Callable[[str], None]
) -> None:
    # One process for all steps; what grows is added to what is there.
    try:
        async with rig.visit(peer) as visit, AsyncExitStack() as stack:
            there = 0
            for step in steps:
                if step > there:
                    await stack.enter_async_context(visit.idle_connections(step - there))
                    there = step
                await _measure(visit, "idle connections", peer.name, step, number, results, say)
    except (UnprovenError, LabError, trio.TooSlowError) as error:
        _fail(f"idle connections: {peer.name}", error, results, say)


async def _started(
    rig: Rig,
    what: str,
    peer: Peer,
    step: int,
    capture: str,
    number: int,
    results: Results,
    say: Callable[[str], None],
) -> None:
    # The daemon leaves its own configuration's state behind, hence the kernel's is made anew on both sides.
    try:
        await apply_config(rig.gateway, rig.place.directory, capture)
        async with rig.visit(peer) as visit:
            await _measure(visit, what, "tproxyd", step, number, results, say)
    except (UnprovenError, LabError, trio.TooSlowError) as error:
        _fail(f"{step} {what}", error, results, say)
    finally:
        await apply_config(rig.gateway, rig.place.directory, CAPTURE)


async def _measure(
    visit: Visit, what: str, peer: str, step: int, number: int, results: Results, say: Callable[[str], None]
) -> None:
    numbers = (await visit.measure("connections", 32, _SECONDS)).client
    rate, p99 = numbers["count"] / numbers["seconds"], numbers["p99_us"]
    results.scaling.append(
        {"what": what, "peer": peer, "step": step, "round": number, "per_second": round(rate, 1), "p99_us": p99}
    )
    say(f"  scaling {number} {peer}, {step} {what}: {rate:,.0f}/s, p99 {p99:,.0f} us")


def _fail(what: str, error: Exception, results: Results, say: Callable[[str], None]) -> None:
    results.errors.append(f"scaling: {what}: {str(error) or 'it took too long'}")
    say(f"  ERROR {results.errors[-1]}")
