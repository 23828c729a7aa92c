"""What is measured: the figures with their names and units, and what was measured, by peer and round.

Knows that a ratio is made within a round and only then summed up. Refuses to know how a figure came about (`cells`) and how it is
shown (`report`).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FIGURES", "QUIET", "REFERENCE", "Figure", "Results", "Spread", "spread"]

REFERENCE = "haproxy"

QUIET = 0.1
"""Share of the cores that others may use. What the kernel does for the benchmark in threads of its own counts as others, too: 0 to 9 % of the
cores when nothing else runs."""
_ENOUGH = 3


@dataclass(frozen=True)
class Figure:
    """A column. `digits` after the point where its absolute value is told."""

    title: str
    unit: str
    digits: int = 0
    more_is_better: bool = True


FIGURES: Mapping[str, Figure] = {
    "bulk1": Figure("download, 1 stream", "Gbit/s", 2),
    "bulk8": Figure("download, 8 streams", "Gbit/s", 2),
    "upload8": Figure("upload, 8 streams", "Gbit/s", 2),
    "cpu_per_gb": Figure("proxy CPU per GB (download)", "s", 2, more_is_better=False),
    "conn32": Figure("new connections, 32 at a time", "1/s"),
    "conn64": Figure("new connections, 64 at a time", "1/s"),
    "conn_p99": Figure("new connection, 32 at a time, p99", "us", 0, more_is_better=False),
    "conn_cpu": Figure("proxy CPU per connection", "us", 1, more_is_better=False),
    "ka1_p50": Figure("kept alive, 1 connection, p50", "us", 1, more_is_better=False),
    "ka1_p99": Figure("kept alive, 1 connection, p99", "us", 1, more_is_better=False),
    "ka64": Figure("kept alive, 64 connections", "1/s"),
    "ka64_p99": Figure("kept alive, 64 connections, p99", "us", 0, more_is_better=False),
    "idle_ka64": Figure("kept alive 64 beside idle ones, of that without", "x", 2),
    "idle_conn32": Figure("new connections beside idle ones, of that without", "x", 2),
    "idle_kib": Figure("memory per idle connection", "KiB", 1, more_is_better=False),
    "push": Figure("pushed at a server that never reads", "MiB", 1, more_is_better=False),
    "conn_per_cpu": Figure("connections per proxy CPU second", "1/s"),
    "least_share": Figure("share of the worker with the least", "%", 0),
    "conntrack": Figure("conntrack entries after the connections", "", 0, more_is_better=False),
    "bypass_conn32": Figure("bypassed new connections, of that without ruleset", "x", 2),
    "bypass_bulk8": Figure("bypassed download, of that without ruleset", "x", 2),
    "abuse_ka1_p99": Figure(
        "kept alive, 1 connection, p99 beside abuse, of that without", "x", 2, more_is_better=False
    ),
    "abuse_ka64_p99": Figure(
        "kept alive, 64 connections, p99 beside abuse, of that without", "x", 2, more_is_better=False
    ),
    "decoy_ka1_p99": Figure(
        "kept alive, 1 connection, p99 beside abuse, of that beside the same of a decoy", "x", 2, more_is_better=False
    ),
    "decoy_ka64_p99": Figure(
        "kept alive, 64 connections, p99 beside abuse, of that beside the same of a decoy", "x", 2, more_is_better=False
    ),
    "start": Figure("start to ready", "ms", 0, more_is_better=False),
}


@dataclass(frozen=True)
class Spread:
    """Of some values: the middle, the ends, and how many there are."""

    median: float
    low: float
    high: float
    count: int


def spread(values: Sequence[float]) -> Spread | None:
    """None of nothing."""
    return Spread(statistics.median(values), min(values), max(values), len(values)) if values else None


@dataclass
class Results:
    """Everything that was measured. `cells` is what is written down; the rest is made of it."""

    cells: list[dict[str, Any]] = field(default_factory=list)
    scaling: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    """By cell: the share of the cores that other programs used."""

    def add(self, group: str, number: int, peer: str, figures: Mapping[str, float], raw: Mapping[str, Any]) -> None:
        """One turn. `raw` has a row for each of its cells, and may have more."""
        others = max((row["others"] for row in raw.values() if isinstance(row, dict) and "others" in row), default=0.0)
        self.cells.append(
            {
                "group": group,
                "round": number,
                "peer": peer,
                "others": others,
                "figures": {name: round(value, 6) for name, value in figures.items()},
                "raw": raw,
            }
        )

    def values(self, peer: str, figure: str) -> list[float]:
        """One a round; see `_quiet_ones`."""
        return _quiet_ones(list(self._by_round(peer, figure).values()))

    def ratios(self, peer: str, figure: str, to: str = REFERENCE) -> list[float]:
        """The peer's figure in units of the other's, round by round; see `_quiet_ones`. Rounds that lack one of them are left out."""
        bases = self._by_round(to, figure)
        ours = self._by_round(peer, figure)
        pairs = [(ours[key], bases[key]) for key in ours if key in bases and bases[key][0]]
        return _quiet_ones([(value / base, max(others, more)) for (value, others), (base, more) in pairs])

    def _by_round(self, peer: str, figure: str) -> dict[tuple[str, int], tuple[float, float]]:
        """Value, and what others used meanwhile, by group and round."""
        return {
            (cell["group"], cell["round"]): (cell["figures"][figure], cell["others"])
            for cell in self.cells
            if cell["peer"] == peer and figure in cell["figures"]
        }

    def peers(self) -> list[str]:
        """In the order of their first turns."""
        return list(dict.fromkeys(cell["peer"] for cell in self.cells))


def _quiet_ones(values: Sequence[tuple[float, float]]) -> list[float]:
    """Of (value, share of the cores that others used), the values of turns that were left alone, if there are enough of them; else all."""
    quiet = [value for value, others in values if others <= QUIET]
    return quiet if len(quiet) >= _ENOUGH else [value for value, _ in values]
