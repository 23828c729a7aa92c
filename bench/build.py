"""Compiles the two C programs into a folder that goes with the run. Knows gcc's words; refuses to know what the programs do."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tproxyd.testing import LabError

__all__ = ["compile_program"]

_SECONDS = 60.0  # each takes about one


def compile_program(name: str, directory: Path) -> str:
    """The path of the program made of `bench/{name}.c`, in the given folder."""
    compiler = shutil.which("gcc")
    if compiler is None:
        raise LabError("the benchmark needs gcc and libc6-dev: apt install gcc libc6-dev")
    program = directory / name
    source = Path(__file__).with_name(f"{name}.c")
    done = subprocess.run(
        [compiler, "-O2", "-Wall", "-o", str(program), str(source)],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise LabError(f"gcc could not compile {source.name}:\n{done.stderr}")
    return str(program)
