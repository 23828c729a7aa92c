"""What the documents claim and a program can check: the guide's configuration, the rows of docs/faults.md."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from tproxyd.config import Config, PolicyRule, config_from_mapping
from tproxyd.config.schema import keys_of
from tproxyd.daemon.doctor import CHECKS, PROBE_CHECKS, check_name

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/guide.md").read_text(encoding="utf-8")


def test_the_guide_shows_every_key_with_its_default() -> None:
    (block,) = (text for text in re.findall(r"```toml\n(.*?)```", GUIDE, re.S) if "[listen]" in text)
    shown = tomllib.loads(block)
    assert config_from_mapping(shown) == Config()
    assert {table: set(keys) for table, keys in shown.items()} == {
        table: set(keys_of(kind)) for table, kind in keys_of(Config).items()
    }


def test_the_guide_shows_a_rule_with_every_key() -> None:
    (block,) = (text for text in re.findall(r"```toml\n(.*?)```", GUIDE, re.S) if text.startswith("[[policy.rule]]"))
    shown = tomllib.loads(block)
    (rule,) = shown["policy"]["rule"]
    assert len(config_from_mapping(shown).policy.rule) == 1
    assert set(rule) == set(keys_of(PolicyRule))


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    for name in ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/performance.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        commands = re.findall(r"(?:^    |`)(?:sudo )?make ([a-z-]+)", text, re.M)
        assert set(commands) <= targets, name
    assert {"demo", "nstest", "venv"} <= targets


def test_docs_architecture_names_every_module_in_its_room() -> None:
    """And no other."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    section = text.split("### The modules of each\n")[1].split("\n## ")[0]
    told: dict[str, set[str]] = {}
    for room, modules in re.findall(r"^- \*\*`([a-z]+)/`\*\*(.*?)(?=^- |\Z)", section, re.M | re.S):
        told.setdefault(room, set()).update(re.findall(r"`([a-z_]+)`", modules))
    there: dict[str, set[str]] = {}
    for file in (ROOT / "tproxyd").glob("*/**/*.py"):
        if not file.stem.startswith("__"):
            there.setdefault(file.relative_to(ROOT / "tproxyd").parts[0], set()).add(file.stem)
    assert told == there


def test_docs_faults_tells_which_rows_have_tests() -> None:
    """A row's number stands in its test's name, as in test_05_..., test_01_to_03_... or test_18_40_..."""
    tested: set[int] = set()
    for file in sorted(ROOT.glob("netns_tests/**/test_*.py")):
        for name in re.findall(r"def test_((?:\d\d_)+(?:to_\d\d_)?)", file.read_text(encoding="utf-8")):
            numbers = [int(number) for number in re.findall(r"\d\d", name)]
            tested |= set(range(numbers[0], numbers[1] + 1)) if "to" in name else set(numbers)
    faults = (ROOT / "docs/faults.md").read_text(encoding="utf-8")
    told = re.search(r"^Rows with tests by now: ([\d, -]+)\.", faults, re.M)
    assert told
    ranges = [(part.strip().split("-") * 2)[:2] for part in told[1].split(",")]
    assert tested == {number for first, last in ranges for number in range(int(first), int(last) + 1)}


def test_every_check_of_the_doctor_is_explained_and_tested() -> None:
    names = {check_name(check) for check in CHECKS} | {*PROBE_CHECKS.values()}
    assert len(names) == len(CHECKS) + len(PROBE_CHECKS) >= 20
    troubleshooting = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    explained = {
        name
        for row in re.findall(r"^\| (`[a-z0-9`, -]+`) \|", troubleshooting, re.M)
        for name in re.findall(r"[a-z0-9-]+", row)
    }
    assert explained == names
    tests = "".join(file.read_text(encoding="utf-8") for file in ROOT.glob("netns_tests/test_doctor*.py"))
    assert {name for name in names if f'"{name}"' not in tests} == set()
