"""Two states as a unified diff, section by section, without line numbers that nobody could look up: what is missing, what is left over."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher

__all__ = ["Sections", "unified_diff"]

Sections = Mapping[str, Sequence[str]]
"""Lines by title. The order of a section's lines has a meaning."""

_CONTEXT = 2
_BLOCK = re.compile(r"\t(?:chain|set) \w+")


def unified_diff(before: Sections, after: Sections, *, names: tuple[str, str]) -> str:
    """What makes `after` of `before`, `-` and `+` before the lines, with the names of both at the top; empty where they are equal."""
    titles = list(dict.fromkeys([*before, *after]))
    lines = [line for title in titles for line in _hunks(title, before.get(title, ()), after.get(title, ()))]
    return "\n".join([f"--- {names[0]}", f"+++ {names[1]}", *lines, ""]) if lines else ""


def _hunks(title: str, before: Sequence[str], after: Sequence[str]) -> Iterator[str]:
    # Without the matcher's guess of what is junk: the many equal braces and comments of a ruleset are no reason to show more.
    for group in SequenceMatcher(None, before, after, autojunk=False).get_grouped_opcodes(_CONTEXT):
        if all(tag == "equal" for tag, *_ in group):
            continue  # of two equal ones that is what is left
        where = _block(before[: next(first for tag, first, *_ in group if tag != "equal")])
        yield f"@@ {title}{where and f', {where}'} @@"
        for tag, first, last, new_first, new_last in group:
            if tag == "equal":
                yield from (f" {line}" for line in before[first:last])
            else:
                yield from (f"-{line}" for line in before[first:last])
                yield from (f"+{line}" for line in after[new_first:new_last])


def _block(lines: Sequence[str]) -> str:
    """The chain or set that the last of these lines of a table stands in."""
    for line in reversed(lines):
        if found := _BLOCK.match(line):
            return found[0].strip()
        if line == "\t}":
            break
    return ""
