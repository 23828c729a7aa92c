"""What can be said of packages without root or a network. Their life on a system is `make deb-test`."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def pins(lock: str) -> dict[str, str]:
    """The versions of a lock, without what is for other systems only."""
    found = re.findall(r"^([a-z0-9-]+)==(\S+) (?!;)", (ROOT / lock).read_text(encoding="utf-8"), re.M)
    assert found
    return dict(found)


def test_what_is_installed_is_what_is_tested() -> None:
    assert pins("requirements.lock").items() <= pins("requirements-dev.lock").items()


def test_the_copyright_file_names_every_library() -> None:
    text = (ROOT / "packaging/debian/copyright").read_text(encoding="utf-8")
    stage = (ROOT / "packaging/stage").read_text(encoding="utf-8")
    left_out = re.findall(r"^for unused in (.*?); do", stage, re.M)[0].split()
    modules = {name.replace("-", "_").removesuffix("_py") for name in pins("requirements.lock")}
    assert [name for name in modules.difference(left_out) if f" usr/lib/tproxyd/{name}/" not in text] == []


def test_what_top_needs_is_installed() -> None:
    assert "rich" in pins("requirements.lock")


SCRIPTS = [
    file for file in (ROOT / "packaging").rglob("*") if file.is_file() and file.read_bytes().startswith(b"#!/bin/sh")
]


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_a_script_can_be_run_and_is_read_whole(script: Path) -> None:
    assert script.stat().st_mode & 0o111 or script.parent.name == "debian"
    subprocess.run(["sh", "-n", str(script)], check=True)


def test_wheel_and_source_archive_have_what_they_need(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    (archive,) = tmp_path.glob("*.tar.gz")
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "tproxyd").rglob("*.py")}
    with zipfile.ZipFile(wheel) as packed:
        inside = set(packed.namelist())
    assert modules | {"tproxyd/py.typed"} <= inside
    assert {name.partition("/")[0] for name in inside if not name.startswith("tproxyd-")} == {"tproxyd"}
    with tarfile.open(archive) as packed_source:
        source = {name.partition("/")[2] for name in packed_source.getnames()}
    folders = [
        folder for folder in ("packaging", "systemd", "docs", "netns_tests", "examples") if (ROOT / folder).is_dir()
    ]
    files = {str(file.relative_to(ROOT)) for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert (
        modules | files | {"Makefile", "pyproject.toml", "requirements.lock", "requirements-dev.lock", "LICENSE"}
        <= source
    )
