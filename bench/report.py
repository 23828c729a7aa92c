"""The tables at the end of a run: peers by figures, and the goals. Text only; knows no measuring."""

from __future__ import annotations

from collections.abc import Sequence

from bench.figures import FIGURES, QUIET, REFERENCE, Results, Spread, spread
from bench.goals import GOALS, verdict
from tproxyd.testing.demo import table

__all__ = ["goals_table", "peers_table", "quiet", "scaling_table"]

_ALREADY_RATIOS = ("x", "%", "")  # units of figures that are not divided by the reference's
_NOT_COMPARED = ("start", "push", "idle_kib")  # told as they are


def peers_table(results: Results) -> str:
    """For each figure the absolute median, and the ratio to HAProxy: median (lowest-highest round)."""
    parts = []
    for name, figure in FIGURES.items():
        rows = []
        for peer in results.peers():
            absolute = spread(results.values(peer, name))
            if absolute is None:
                continue
            compared = figure.unit not in _ALREADY_RATIOS and name not in _NOT_COMPARED
            ratio = spread(results.ratios(peer, name)) if compared else None
            rows.append(
                (peer, _spread(absolute, figure.digits), _spread(ratio, 2) if ratio else "-", str(absolute.count))
            )
        if rows:
            better = "more is better" if figure.more_is_better else "less is better"
            unit = f" [{figure.unit}]" if figure.unit else ""
            parts.append(
                table((f"{figure.title}{unit}, {better}", "median (range)", f"vs {REFERENCE}", "rounds"), rows)
            )
    return "\n".join(parts)


def goals_table(results: Results) -> str:
    """must / aim / measured / met."""
    rows: list[Sequence[str]] = []
    for goal in GOALS:
        measured = spread(goal.values(results))
        sign = "<=" if goal.less_is_better else ">="
        rows.append(
            (
                goal.what,
                f"{sign} {goal.must:g}",
                f"{sign} {goal.aim:g}",
                _spread(measured, goal.digits) if measured else "-",
                verdict(goal, measured.median if measured else None),
            )
        )
    return table(("goal", "must", "aim", "measured: median (range)", "met?"), rows)


def scaling_table(results: Results) -> str:
    """What grows, by step: connections/s, also of those at step 0 in the same round, and p99."""
    rows = []
    bases = {(one["what"], one["peer"], one["round"]): one["per_second"] for one in results.scaling if not one["step"]}
    for what, peer, step in dict.fromkeys((one["what"], one["peer"], one["step"]) for one in results.scaling):
        ones = [one for one in results.scaling if (one["what"], one["peer"], one["step"]) == (what, peer, step)]
        rates, p99s = spread([one["per_second"] for one in ones]), spread([one["p99_us"] for one in ones])
        based = [one for one in ones if bases.get((what, peer, one["round"]))]
        ratios = spread([one["per_second"] / bases[what, peer, one["round"]] for one in based])
        assert rates is not None
        assert p99s is not None
        shown = _spread(ratios, 2) if ratios else "-"
        rows.append((peer, f"{step:,} {what}", _spread(rates, 0), shown, _spread(p99s, 0)))
    return table(("peer", "with", "new connections/s", "of those with 0", "p99 [us]"), rows) if rows else ""


def quiet(results: Results) -> str:
    """Whether the machine was left alone, in a sentence."""
    others = spread([100 * share for share in results.others])
    if others is None:
        return ""
    disturbed = sum(cell["others"] > QUIET for cell in results.cells)
    # The ratios come from turns that were left alone wherever there are three; a fifth disturbed leaves that many of five rounds.
    enough = disturbed <= len(results.cells) / 5
    verdict = "quiet enough" if enough else "NOT QUIET: ratios may be off, ranges are wide; run it again"
    return f"Other programs used {_spread(others, 0)} % of the cores during the cells, {disturbed} of {len(results.cells)} turns were disturbed: {verdict}."


def _spread(values: Spread, digits: int) -> str:
    def number(value: float) -> str:
        return f"{value:,.{digits}f}"

    if values.count == 1:
        return number(values.median)
    return f"{number(values.median)} ({number(values.low)}-{number(values.high)})"
