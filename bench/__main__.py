"""`python -m bench`: the command line. Opens nothing before it has moved away from the host's network.

sudo make bench              everything, about 17 minutes
sudo make bench-quick        the goals that a change of the data path may miss, in less than 5 minutes
python -m bench --only bulk --peers haproxy+splice --rounds 9
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import trio

from bench.abuse import KINDS
from bench.build import compile_program
from bench.cells import Lengths
from bench.figures import Results
from bench.report import goals_table, peers_table, quiet, scaling_table
from bench.rounds import GROUPS, Plan, run
from bench.surroundings import BENCH_PYTHON, CHECKOUT, available_peers, envoy_path, raise_file_limit, versions
from tproxyd.net.capabilities import missing_capabilities
from tproxyd.testing.build import LabError
from tproxyd.testing.isolation import LAB_CAPABILITIES, isolate_this_process

__all__ = ["main"]

_QUICK_PEERS = ("direct", "haproxy", "splice", "tproxyd", "tproxyd busy_poll", "tproxyd 2 workers")
_QUICK_GROUPS = ("bulk", "small", "idle", "push", "conntrack")

# At most so many where figures hardly vary between rounds, or where a round takes long.
_ROUNDS = {"push": 3, "scaling": 3}
_QUICK_ROUNDS = {"idle": 2, "push": 1, "bypass": 2, "conntrack": 1, "scaling": 1}


def main(arguments: list[str]) -> int:
    """0 if everything could be measured (whether or not the goals are met), 1 if not, 77 without root."""
    words = _parse(arguments)
    if missing := missing_capabilities(LAB_CAPABILITIES):
        print(f"bench: needs root ({' and '.join(missing)}): type `sudo make bench`", file=sys.stderr)
        return os.EX_NOPERM
    isolate_this_process()
    files = raise_file_limit()
    results, about = Results(), dict[str, str]()
    say = partial(print, flush=True)
    with tempfile.TemporaryDirectory(prefix="tproxyd-bench-") as directory:
        try:
            plan = _plan(words, Path(directory), files)
            about = {**versions(plan.programs), "idle connections": str(plan.lengths.idle)}
            say("; ".join(f"{name} {value}" for name, value in about.items()))
            for peer in plan.peers:
                say(f"  {peer.name}: {peer.words}")
            trio.run(run, plan, results, say)
        except* LabError as errors:
            results.errors += [str(error) for error in errors.exceptions]
        except* KeyboardInterrupt:
            results.errors.append("interrupted")
    for text in (peers_table(results), scaling_table(results), goals_table(results), quiet(results)):
        say("\n" + text if text else "")
    if words.out and about:
        _write(Path(words.out), "quick" if words.quick else "full", about, results)
    for error in results.errors:
        say(f"ERROR {error}")
    return 1 if results.errors else 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="tproxyd beside other transparent proxies")
    parser.add_argument("--quick", action="store_true", help="less than 5 minutes: few peers, short cells")
    parser.add_argument(
        "groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; all but handler and admin if none is named"
    )
    parser.add_argument("--only", action="append", default=[], choices=GROUPS, help="the same, one at a time")
    parser.add_argument("--peers", action="append", help="this peer beside haproxy; may be given again")
    parser.add_argument(
        "--abuse", action="append", choices=KINDS, help="in the group admin this kind of it alone; may be given again"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each group (5)")
    parser.add_argument(
        "--out", default=str(CHECKOUT / "bench/results"), help="folder for raw data and plots; '' writes none"
    )
    words = parser.parse_args(arguments)
    words.groups += words.only
    if unknown := set(words.groups) - set(GROUPS):
        parser.error(f"no group is called {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    return words


def _plan(words: argparse.Namespace, directory: Path, files: int) -> Plan:
    programs = {name: compile_program(name, directory) for name in ("load", "splice_relay")}
    if envoy := envoy_path():
        programs["envoy"] = envoy
    peers, missing = available_peers(programs)
    for sentence in missing:
        print(sentence)
    wanted = ("haproxy", *words.peers) if words.peers else _QUICK_PEERS if words.quick else None
    most = _QUICK_ROUNDS if words.quick else _ROUNDS
    groups = words.groups or (_QUICK_GROUPS if words.quick else set(GROUPS) - {"handler", "admin"})
    # What an idle connection takes: two files in the proxy; and some for the rest.
    idle = min(4000 if words.quick else 8000, (files - 1500) // 2)
    return Plan(
        peers=[peer for peer in peers if wanted is None or peer.name in wanted],
        groups=[group for group in GROUPS if group in groups],
        rounds={group: min(words.rounds, most.get(group, words.rounds)) for group in GROUPS},
        lengths=Lengths(bulk=0.7, connections=0.8, requests=0.6, idle=idle) if words.quick else Lengths(idle=idle),
        abuse=words.abuse or KINDS,
        programs=programs,
        directory=directory,
        files=files,
    )


def _write(folder: Path, name: str, about: dict[str, str], results: Results) -> None:
    made = [folder, folder / f"{name}.json"]
    folder.mkdir(exist_ok=True)
    cells, scaling = (",\n".join(map(json.dumps, rows)) for rows in (results.cells, results.scaling))
    made[1].write_text(
        f'{{"about": {json.dumps(about)},\n"errors": {json.dumps(results.errors)},\n"cells": [\n{cells}\n],\n'
        f'"scaling": [\n{scaling}\n]}}\n',
        "utf-8",
    )
    if BENCH_PYTHON.exists():
        plots = Path(__file__).with_name("plots.py")
        done = subprocess.run([BENCH_PYTHON, plots, made[1]], capture_output=True, text=True, check=False)
        made += [Path(line) for line in done.stdout.splitlines()]
        if done.returncode != 0:
            results.errors.append(f"plots: {done.stderr}")
    owner = CHECKOUT.stat()
    for path in made:  # root's files in somebody's checkout would be a nuisance
        os.chown(path, owner.st_uid, owner.st_gid)
    print(f"raw data and plots: {folder}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
