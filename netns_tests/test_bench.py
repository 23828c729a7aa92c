"""The benchmark itself: one tiny round, with all its proofs. Its numbers mean nothing here."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from bench.build import compile_program
from bench.cells import Lengths
from bench.figures import FIGURES, Results
from bench.peers import ABUSED, Peer, all_peers
from bench.report import goals_table, peers_table
from bench.rig import UnprovenError, open_rig
from bench.rounds import GROUPS, Plan, run

TINY = Lengths(bulk=0.2, connections=0.2, requests=0.2, idle=100)
ONCE = dict.fromkeys(GROUPS, 1)
NAMES = ("direct", "splice", "tproxyd")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if shutil.which("gcc") is None:
        pytest.fail("gcc is missing: `make nstest` installs it")
    folder = tmp_path_factory.mktemp("programs")
    return {name: compile_program(name, folder) for name in ("load", "splice_relay")}


def peers(*names: str) -> Sequence[Peer]:
    return [peer for peer in all_peers() if peer.name in names]


async def test_a_round_with_proof_in_every_cell(programs: dict[str, str], tmp_path: Path) -> None:
    results = Results()
    await run(Plan(peers(*NAMES), ("bulk", "small"), ONCE, TINY, programs, tmp_path, 10_000), results, print)
    assert results.errors == []
    assert [(cell["group"], cell["peer"]) for cell in results.cells] == [
        (group, peer) for group in ("bulk", "small") for peer in NAMES
    ]
    for cell in results.cells:
        assert all(value > 0 for value in cell["figures"].values())
        for raw in cell["raw"].values():
            assert (raw["steered"] > 0) == (raw["cpu_s"] > 0) == (cell["peer"] != "direct")
    assert set(results.cells[0]["figures"]) <= set(FIGURES)
    assert "tproxyd" in peers_table(results)
    assert goals_table(results).count("not measured") > 0  # no HAProxy, no ratio to it


async def test_a_program_s_handlers_are_measured_when_they_are_asked_for(
    programs: dict[str, str], tmp_path: Path
) -> None:
    names = ("tproxyd handler", "tproxyd handler loop")
    results = Results()
    await run(Plan(peers("splice", *names), ("handler",), ONCE, TINY, programs, tmp_path, 10_000), results, print)
    assert results.errors == []
    assert [cell["peer"] for cell in results.cells] == [*names]  # the C relay has no turn in this group
    for cell in results.cells:
        assert all(value > 0 for value in cell["figures"].values())
        assert set(cell["figures"]) <= set(FIGURES)


@pytest.mark.timed
async def test_a_daemon_that_is_asked_badly_is_asked_enough(programs: dict[str, str], tmp_path: Path) -> None:
    results = Results()
    await run(Plan(peers("splice", ABUSED), ("admin",), ONCE, TINY, programs, tmp_path, 10_000), results, print)
    assert results.errors == []
    (cell,) = results.cells
    assert cell["peer"] == ABUSED
    assert {"abuse_ka1_p99", "abuse_ka64_p99", "decoy_ka1_p99", "decoy_ka64_p99"} < set(cell["figures"]) <= set(FIGURES)
    assert cell["raw"]["abuse"]["connections"] >= 2000
    there = ["alone", "decoy", "beside"]
    assert [name.split()[1] for name in cell["raw"] if name.startswith("ka64")] == [*there, *reversed(there)]


async def test_idle_connections_and_a_server_that_never_reads(programs: dict[str, str], tmp_path: Path) -> None:
    results = Results()
    await run(Plan(peers("splice"), ("idle", "push"), ONCE, TINY, programs, tmp_path, 10_000), results, print)
    assert results.errors == []
    assert 0.5 < results.values("splice", "push")[0] < 100
    assert results.values("splice", "idle_kib")[0] < 50


async def test_a_proxy_that_is_not_in_the_path_has_no_figures(programs: dict[str, str], tmp_path: Path) -> None:
    async with open_rig(programs, tmp_path) as rig, rig.visit(peers("splice")[0]) as visit:
        await visit.measure("requests", 1, 0.1)
        await rig.gateway.run("nft", "flush", "chain", "inet", "tproxyd", "take")
        with pytest.raises(UnprovenError, match="only 0 of 1 connections were steered"):
            await visit.measure("requests", 1, 0.1)


async def test_a_second_listener_on_the_port_is_noticed(programs: dict[str, str], tmp_path: Path) -> None:
    async with open_rig(programs, tmp_path) as rig:
        visit = partial(rig.visit, peers("splice")[0])
        async with visit():
            with pytest.raises(UnprovenError, match="is taken before splice starts"):
                async with visit():
                    pytest.fail("it was not noticed")
