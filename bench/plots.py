"""Plots of a run's raw data, as SVG beside it: `.venv-bench/bin/python bench/plots.py bench/results/full.json`.

Runs in .venv-bench, which has matplotlib and not tproxyd, so it imports nothing of the benchmark; the file is all it knows. The same data give
the same bytes. Prints the files it has made.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

__all__ = ["main"]

RATES = {
    "bulk1": "download, 1 stream",
    "bulk8": "download, 8 streams",
    "upload8": "upload, 8 streams",
    "conn32": "new connections",
    "ka64": "kept alive, 64",
}
COSTS = {
    "cpu_per_gb": "CPU per GB",
    "conn_cpu": "CPU per connection",
    "ka1_p50": "kept alive, 1: p50",
    "conn_p99": "new connection: p99",
}
REFERENCE = "haproxy"

Ratios = dict[str, dict[str, list[float]]]


def main(source: Path) -> None:
    """Makes every plot that the file has data for."""
    data = json.loads(source.read_text(encoding="utf-8"))
    mpl.rcParams.update({"svg.hashsalt": "tproxyd", "svg.fonttype": "none", "font.size": 9})
    about = data["about"]
    note = f"{about['date'][:10]}, Linux {about['kernel']}, {about['cores']} cores; median and range of the rounds"
    for name, figures, title in (
        ("rates", RATES, "as a multiple of HAProxy's, more is better"),
        ("costs", COSTS, "as a multiple of HAProxy's, less is better"),
    ):
        ratios = ratios_of(data["cells"], figures)
        if any(ratios.values()):
            bars(ratios, figures, title, note, source.with_name(f"{source.stem}-{name}.svg"))
    for what in dict.fromkeys(one["what"] for one in data["scaling"]):
        rows = [one for one in data["scaling"] if one["what"] == what]
        scaling(rows, what, note, source.with_name(f"{source.stem}-{what.replace(' ', '-')}.svg"))


def ratios_of(cells: list[dict[str, Any]], figures: Mapping[str, str]) -> Ratios:
    """By figure and peer, one a round."""
    values = {
        (cell["group"], cell["round"], cell["peer"], name): value
        for cell in cells
        for name, value in cell["figures"].items()
    }
    found: Ratios = {name: {} for name in figures}
    for (group, number, peer, name), value in values.items():
        base = values.get((group, number, REFERENCE, name))
        if name in found and base:
            found[name].setdefault(peer, []).append(value / base)
    return found


def bars(ratios: Ratios, figures: Mapping[str, str], title: str, note: str, target: Path) -> None:
    """A cluster of bars for each figure, a colour for each peer; the line at 1 is HAProxy."""
    peers = list(dict.fromkeys(peer for by_peer in ratios.values() for peer in by_peer))
    shown, axes = plt.subplots(figsize=(9, 4))
    width = 0.8 / len(peers)
    for at, peer in enumerate(peers):
        places, heights, below, above = [], [], [], []
        for place, name in enumerate(figures):
            if values := ratios[name].get(peer):
                middle = statistics.median(values)
                places.append(place + (at - len(peers) / 2 + 0.5) * width)
                heights.append(middle)
                below.append(middle - min(values))
                above.append(max(values) - middle)
        axes.bar(places, heights, width, yerr=(below, above), label=peer, color=f"C{at}", error_kw={"lw": 0.7})
    axes.axhline(1, color="black", lw=0.7)
    axes.set_xticks(range(len(figures)), figures.values())
    axes.set_ylabel(title)
    axes.set_title(note, fontsize=8)
    axes.legend(fontsize=7, ncols=2)
    save(shown, target)


def scaling(rows: list[dict[str, Any]], what: str, note: str, target: Path) -> None:
    """Above connections/s of those at step 0 in the same round, below p99."""
    shown, (rate, p99) = plt.subplots(2, 1, figsize=(7, 5), sharex=True)
    bases = {(one["peer"], one["round"]): one["per_second"] for one in rows if one["step"] == 0}
    for peer in dict.fromkeys(one["peer"] for one in rows):
        ours = [one for one in rows if one["peer"] == peer and (peer, one["round"]) in bases]
        steps = sorted({one["step"] for one in ours})
        by_step = [[one for one in ours if one["step"] == step] for step in steps]
        relative = [[one["per_second"] / bases[peer, one["round"]] for one in ones] for ones in by_step]
        for axes, values in ((rate, relative), (p99, [[one["p99_us"] / 1000 for one in ones] for ones in by_step])):
            middles = [statistics.median(some) for some in values]
            ends = (
                [middle - min(some) for middle, some in zip(middles, values, strict=True)],
                [max(some) - middle for middle, some in zip(middles, values, strict=True)],
            )
            axes.errorbar(steps, middles, yerr=ends, marker="o", ms=3, lw=1, capsize=2, label=peer)
    for axes in (rate, p99):
        axes.set_xscale("symlog", linthresh=10 if what != "idle connections" else 1000)
        axes.set_ylim(bottom=0)
    rate.set_ylabel("connections/s, of those with 0")
    p99.set_ylabel("p99 [ms]")
    p99.set_xlabel(what)
    rate.set_title(note, fontsize=8)
    rate.legend(fontsize=7)
    save(shown, target)


def save(shown: Any, target: Path) -> None:
    """Without a date, so that the same data give the same file."""
    shown.tight_layout()
    shown.savefig(target, metadata={"Date": None})
    plt.close(shown)
    print(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
