"""The references that are committed: docs/configuration.md, docs/tproxyd.schema.json, and the file that is installed in /etc/tproxyd."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from typing import Any

from generate.spelling import Key, Table, tables

__all__ = ["COMMITTED", "default_file", "markdown", "schema"]

_GIVEN = '"..."'  # where a key has no default


def markdown() -> str:
    """docs/configuration.md: a table of keys for each table of the configuration."""
    lines = [
        "# Configuration reference",
        "",
        "Made from the types of `tproxyd/config/schema.py` by `make docs`; a test compares. Without `-c`, `/etc/tproxyd/tproxyd.toml` is read,",
        "then `conf.d/*.toml` beside it in byte order: tables merge by key, lists replace, rules are added. Every key has a default but those",
        "that a rule must have; `tproxyd check` names all that is wrong at once. A time is a number and one of us, ms, s, m, h. [tproxyd.schema.json](tproxyd.schema.json) is the same for",
        "editors, and the [guide](guide.md) shows it as one file and says what belongs together.",
    ]
    for table in tables():
        lines += [
            "",
            f"## {_brackets(table)}",
            "",
            table.doc,
            "",
            "| key | default | may be | what it is |",
            "| --- | --- | --- | --- |",
        ]
        lines += [
            f"| `{key.name}` | {'must be given' if key.default is None else f'`{key.default}`'} | {_cell(key.kind)} | {_cell(key.doc)} |"
            for key in table.keys
        ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _brackets(table: Table) -> str:
    return f"[[{table.name}]]" if table.is_array else f"[{table.name}]"


def schema() -> str:
    """docs/tproxyd.schema.json: what editors and linters of TOML check against. It cannot say what must hold between keys."""
    top: dict[str, Any] = {}
    for table in tables():
        described = _object(table)
        if table.is_array:
            outer, _, inner = table.name.partition(".")
            top[outer]["properties"][inner] = {"type": "array", "items": described}
        else:
            top[table.name] = described
    whole = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "tproxyd.toml",
        "description": "The configuration of tproxyd.",
        "type": "object",
        "properties": top,
        "additionalProperties": False,
    }
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def _object(table: Table) -> dict[str, Any]:
    required = [key.name for key in table.keys if key.default is None]
    return {
        "description": table.doc,
        "type": "object",
        "properties": {key.name: _described(key) for key in table.keys},
        **({"required": required} if required else {}),
        "additionalProperties": False,
    }


def _described(key: Key) -> dict[str, Any]:
    default = {} if key.default is None else {"default": json.loads(key.default)}
    return {"description": key.doc, **key.schema, **default}


def default_file() -> str:
    """packaging/tproxyd.toml: every table, every key in a comment with its default, so that it captures nothing as it is."""
    lines = [
        "# The configuration of tproxyd. As it stands it captures nothing: every key is a comment that shows its default. To begin, take the",
        '# "# " away from `ports` and name some, then:',
        "#     tproxyd check && tproxyd plan",
        "# What stands in conf.d/*.toml beside this file is read after it, and stays untouched when a package brings a new version of this one.",
        "# tproxyd.toml(5) has all of this with more words.",
    ]
    for table in tables():
        if table.is_array:
            lines += [
                "",
                *_comment(f"{table.doc} Write as many as you need, each under a line {_brackets(table)}:"),
                f"# {_brackets(table)}",
            ]
        else:
            lines += ["", *_comment(table.doc), _brackets(table)]
        for key in table.keys:
            lines += ["", *_comment(f"{key.doc} ({key.kind})"), f"# {key.name} = {key.default or _GIVEN}"]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)]


COMMITTED: dict[str, Callable[[], str]] = {
    "docs/configuration.md": markdown,
    "docs/tproxyd.schema.json": schema,
    "packaging/tproxyd.toml": default_file,
}
"""The files of the checkout that are generated, and what makes their text."""
