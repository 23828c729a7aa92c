"""What is generated: the committed references equal what the config types say; manual pages and completions have all of the command line.

After a change of a key, `make docs` writes the committed ones anew, as does

    TPROXYD_REWRITE_GOLDEN=1 .venv/bin/python -m pytest -p no:cacheprovider netns_tests/unit/test_references.py; git diff
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from generate.command import read_command
from generate.completions import SHELLS, completion
from generate.manual import PAGES, page
from generate.reference import COMMITTED
from generate.spelling import tables, toml
from tproxyd.config import Config, config_from_mapping, load_config
from tproxyd.config.schema import LATER, PolicyRule, keys_of

ROOT = Path(__file__).parents[2]
CONFIGS = [*sorted((Path(__file__).parent / "golden").glob("*.toml")), ROOT / "packaging/tproxyd.toml"]
SCHEMA = json.loads((ROOT / "docs/tproxyd.schema.json").read_text(encoding="utf-8"))
DEFAULT_FILE = ROOT / "packaging/tproxyd.toml"


@pytest.mark.parametrize("name", COMMITTED)
def test_a_committed_reference_is_what_the_types_say(name: str) -> None:
    made = COMMITTED[name]()
    if "TPROXYD_REWRITE_GOLDEN" in os.environ:
        (ROOT / name).write_text(made, encoding="utf-8")
    assert made == (ROOT / name).read_text(encoding="utf-8"), "type `make docs`"


def test_every_key_of_this_version_is_told_and_none_of_a_later_one() -> None:
    told = {table.name: {key.name for key in table.keys} for table in tables()}
    expected = {name: {*keys_of(kind)} for name, kind in keys_of(Config).items()} | {
        "policy.rule": {*keys_of(PolicyRule)}
    }
    expected["policy"].remove("rule")  # a table of its own
    assert told == expected
    assert {table for table, keys in LATER.items() if keys is None} & set(told) == set()


@pytest.mark.parametrize(
    ("seconds", "spelled"), [(0.0, "0s"), (0.3, "300ms"), (60.0, "60s"), (7200.0, "2h"), (1e-5, "10us")]
)
def test_a_time_is_spelled_in_the_largest_unit_that_fits(seconds: float, spelled: str) -> None:
    assert toml(seconds) == f'"{spelled}"'


# The schema


def problems(value: Any, schema: dict[str, Any], at: str = "") -> list[str]:
    """What JSON Schema finds wrong, for the words of it that are used here; another word is an error of this test."""
    known = {
        "$schema",
        "title",
        "description",
        "default",
        "type",
        "properties",
        "additionalProperties",
        "required",
        "items",
        "anyOf",
        "enum",
        "const",
    }
    known |= {"pattern", "minimum", "maximum", "minItems", "maxItems", "uniqueItems", "not"}
    assert set(schema) <= known
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}
    if "type" in schema and (type(value) is not kinds[schema["type"]]):
        return [f"{at} is no {schema['type']}"]
    wrong = [
        ("enum" in schema and value not in schema["enum"], "is none of the words"),
        ("const" in schema and value != schema["const"], "is not the word"),
        ("pattern" in schema and not re.search(schema["pattern"], value), "has another form"),
        ("minimum" in schema and value < schema["minimum"], "is too small"),
        ("maximum" in schema and value > schema["maximum"], "is too large"),
        ("not" in schema and not problems(value, schema["not"]), "is excluded"),
        ("minItems" in schema and len(value) < schema["minItems"], "has too few items"),
        ("maxItems" in schema and len(value) > schema["maxItems"], "has too many items"),
        ("uniqueItems" in schema and len({*map(str, value)}) < len(value), "has an item twice"),
        (
            "anyOf" in schema and all(problems(value, one) for one in schema.get("anyOf", [])),
            "is nothing that it may be",
        ),
    ]
    found = [f"{at} {what}" for is_wrong, what in wrong if is_wrong]
    if isinstance(value, dict) and "properties" in schema:
        found += [f"{at}.{key} is missing" for key in schema.get("required", []) if key not in value]
        for key, inner in value.items():
            found += (
                problems(inner, schema["properties"][key], f"{at}.{key}")
                if key in schema["properties"]
                else [f"{at}.{key} is unknown"]
            )
    if isinstance(value, list) and "items" in schema:
        found += [one for index, item in enumerate(value) for one in problems(item, schema["items"], f"{at}[{index}]")]
    return found


@pytest.mark.parametrize("file", CONFIGS, ids=[file.name for file in CONFIGS])
def test_the_schema_takes_what_the_program_takes(file: Path) -> None:
    assert problems(tomllib.loads(file.read_text(encoding="utf-8")), SCHEMA) == []


def test_the_schema_takes_every_form_of_a_value() -> None:
    config = """
        [capture]
        ports = [8080, "9000-9099"]
        exclude_ports = "all"
        interfaces = ["eth*", "br-0.5"]
        destinations = ["local", "2001:db8::/32", "192.0.2.1"]
        [routing]
        mark = "0x1000000/0x3000000"
        [upstream]
        target = "unix:/run/app.sock"
        source = ["127.0.0.6", "::1"]
        [relay]
        workers = "auto"
        idle_timeout = "1.5h"
        [[policy.rule]]
        name = "elsewhere"
        action = { forward = "[2001:db8::1]:80" }
    """
    assert problems(tomllib.loads(config), SCHEMA) == []


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ("[capture]\nport = [80]", [".capture.port is unknown"]),
        ("[workload]", [".workload is unknown"]),
        ("[capture]\nports = 80", [".capture.ports is nothing that it may be"]),
        ('[capture]\nprotocols = ["udp"]', [".capture.protocols[0] is none of the words"]),
        ("[listen]\nport = 0", [".listen.port is too small"]),
        ("[routing]\ntable = 254", [".routing.table is excluded"]),
        ("[relay]\nworkers = 65", [".relay.workers is nothing that it may be"]),
        ('[drain]\ntimeout = "5"', [".drain.timeout has another form"]),
        ("[log]\naccess = 1", [".log.access is no boolean"]),
        (
            '[[policy.rule]]\naction = "drop"',
            [".policy.rule[0].name is missing", ".policy.rule[0].action is nothing that it may be"],
        ),
    ],
)
def test_the_schema_refuses_what_the_program_refuses(config: str, found: list[str]) -> None:
    assert problems(tomllib.loads(config), SCHEMA) == found


# The file in /etc


def test_the_default_file_captures_nothing_and_shows_every_default() -> None:
    assert load_config(DEFAULT_FILE) == Config()
    text = DEFAULT_FILE.read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 140
    whole = re.sub(r"^# ([a-z_]+ = )", r"\1", text.partition("# [[policy.rule]]")[0], flags=re.M)
    whole += re.sub(r"^# ([a-z_]+ = )", r"\1", text[text.index("[drain]") :], flags=re.M)
    shown = tomllib.loads(whole)
    assert config_from_mapping(shown) == Config()
    assert {table: {*keys} for table, keys in shown.items()} == {
        table: {*keys_of(kind)} - {"rule"} for table, kind in keys_of(Config).items()
    }


# Manual pages


@pytest.mark.parametrize("name", PAGES)
def test_a_manual_page_has_only_requests_that_are_meant(name: str) -> None:
    text = page(name, date(2026, 11, 29))
    requests = {line.split()[0] for line in text.splitlines() if line.startswith((".", "'"))}
    assert requests <= {
        ".TH",
        ".SH",
        ".SS",
        ".TP",
        ".PP",
        ".B",
        ".BR",
        ".I",
        ".EX",
        ".EE",
        ".in",
        ".ti",
        ".br",
        ".nh",
        ".hy",
        ".ad",
    }
    assert "@" not in text
    assert all(line.isascii() and len(line) <= 120 for line in text.splitlines())


def test_the_manual_has_every_verb_option_and_key() -> None:
    command = page("tproxyd.8", date(2026, 11, 29)).replace("\\-", "-")
    for verb in read_command().verbs:
        assert f".SS {verb.name}\n" in command
        assert all(f"\\fB{option.names[-1]}\\fR" in command for option in verb.options)
    file = page("tproxyd.toml.5", date(2026, 11, 29))
    for table in tables():
        _, _, rest = file.partition(f"[{table.name}]")
        assert all(f"\\fB{key.name}\\fR" in rest for key in table.keys)


# Completions

COMPLETED = [
    ("tproxyd ", {verb.name for verb in read_command().verbs} | {"-h", "--help", "--version"}),
    ("tproxyd pl", {"plan"}),
    ("tproxyd plan --f", {"--format"}),
    ("tproxyd plan --format ", {"text", "nft", "shell", "json"}),
    ("tproxyd plan --format = j", {"json"}),  # bash hands --format=j over so
    ("tproxyd check -c docs/tproxyd.sch", {"docs/tproxyd.schema.json"}),
    ("tproxyd plan --diff --against docs/tproxyd.sch", {"docs/tproxyd.schema.json"}),
    ("tproxyd explain --in l", {"lo"}),
    ("tproxyd run --port ", set()),
]


@pytest.mark.parametrize(("line", "offered"), COMPLETED)
def test_bash_completes(line: str, offered: set[str]) -> None:
    words = line.split(" ")
    script = f"""{completion("bash")}
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        _tproxyd
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script, "bash", *words], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(done.stdout.split()) == offered
    assert done.stderr == ""


@pytest.mark.parametrize("shell", SHELLS)
def test_a_completion_has_every_verb_and_option(shell: str) -> None:
    text = completion(shell)
    for verb in read_command().verbs:
        assert verb.name in text
        for option in verb.options:
            long = option.names[-1]
            assert (f"-l {long[2:]} " if shell == "fish" else long) in text
