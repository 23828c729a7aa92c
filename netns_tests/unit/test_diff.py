"""The unified diff of two states: a table of (name, before, after, expected text)."""

from __future__ import annotations

import pytest

from tproxyd.plan import unified_diff

TABLE = [
    "table inet t {",
    "\tset ports {",
    "\t\telements = { 1 }",
    "\t}",
    "",
    "\tchain c {",
    "\t\tone",
    "\t\ttwo",
    "\t}",
    "}",
]


def without(line: str) -> list[str]:
    return [other for other in TABLE if other != line]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {}, []),
        ({"ip rules": ["a", "b"], "table": TABLE}, {"ip rules": ["a", "b"], "table": TABLE}, []),
        ({}, {"ip rules": ["a"]}, ["@@ ip rules @@", "+a"]),
        ({"ip rules": ["a"]}, {}, ["@@ ip rules @@", "-a"]),
        ({"ip rules": []}, {}, []),
        ({"x": ["a"]}, {"x": ["b"]}, ["@@ x @@", "-a", "+b"]),
        (
            {"t": TABLE},
            {"t": without("\t\ttwo")},
            ["@@ t, chain c @@", " \tchain c {", " \t\tone", "-\t\ttwo", " \t}", " }"],
        ),
        (
            {"t": without("\t\telements = { 1 }")},
            {"t": TABLE},
            ["@@ t, set ports @@", " table inet t {", " \tset ports {", "+\t\telements = { 1 }", " \t}", " "],
        ),
        # What lies between is left out.
        (
            {"x": list("abcdefghi")},
            {"x": list("Abcdefgh")},
            ["@@ x @@", "-a", "+A", " b", " c", "@@ x @@", " g", " h", "-i"],
        ),
    ],
)
def test_unified_diff(before: dict[str, list[str]], after: dict[str, list[str]], expected: list[str]) -> None:
    diff = unified_diff(before, after, names=("kernel", "plan"))
    assert diff.splitlines() == (["--- kernel", "+++ plan", *expected] if expected else [])


def test_a_long_list_of_which_everything_is_different_takes_no_time() -> None:
    many = 20_000
    diff = unified_diff({"x": [f"a{n}" for n in range(many)]}, {"x": [f"b{n}" for n in range(many)]}, names=("a", "b"))
    assert diff.count("\n") == 3 + 2 * many
