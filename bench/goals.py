"""The goals of docs/performance.md, and whether a run meets them. The numbers here are that table's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.figures import Results
from bench.peers import ABUSED

__all__ = ["GOALS", "Goal", "verdict"]

BUSY = "tproxyd busy_poll"
TWO_WORKERS = "tproxyd 2 workers"


@dataclass(frozen=True)
class Goal:
    """One line of the goals' table. `values` are of single rounds; their median is judged."""

    what: str
    values: Callable[[Results], Sequence[float]]
    must: float
    aim: float
    digits: int = 2
    less_is_better: bool = False

    def reached(self, measured: float, target: float) -> bool:
        return measured <= target if self.less_is_better else measured >= target


def _ratio(figure: str, to: str = "haproxy", peer: str = "tproxyd") -> Callable[[Results], Sequence[float]]:
    return lambda results: results.ratios(peer, figure, to)


def _plain(figure: str, peer: str = "tproxyd") -> Callable[[Results], Sequence[float]]:
    return lambda results: results.values(peer, figure)


GOALS = (
    Goal("bulk, 1 stream, vs HAProxy", _ratio("bulk1"), 1.5, 1.8),
    Goal("bulk, 8 streams, vs HAProxy", _ratio("bulk8"), 1.6, 2.2),
    Goal("bulk, 1 stream, vs the C splice relay", _ratio("bulk1", "splice"), 0.8, 0.95),
    Goal("bulk, 8 streams, vs the C splice relay", _ratio("bulk8", "splice"), 0.8, 0.95),
    Goal("bulk, 1 stream, vs Envoy", _ratio("bulk1", "envoy"), 1.0, 1.2),
    Goal("bulk, 8 streams, vs Envoy", _ratio("bulk8", "envoy"), 1.0, 1.2),
    Goal("proxy CPU per GB vs HAProxy", _ratio("cpu_per_gb"), 0.5, 0.3, less_is_better=True),
    Goal("new connections/s vs HAProxy", _ratio("conn32"), 0.85, 1.05),
    Goal("new connections/s vs Envoy", _ratio("conn32", "envoy"), 1.3, 1.6),
    Goal("kept-alive, 1 connection, p50 vs HAProxy", _ratio("ka1_p50"), 1.15, 1.0, less_is_better=True),
    Goal("the same with busy polling on", _ratio("ka1_p50", peer=BUSY), 1.15, 0.65, less_is_better=True),
    Goal("kept-alive, 64 connections, requests/s vs HAProxy", _ratio("ka64"), 0.9, 1.05),
    Goal("the same beside 8,000 idle connections, vs without", _plain("idle_ka64"), 0.9, 0.97),
    Goal("KiB per idle connection", _plain("idle_kib"), 8, 4, digits=1, less_is_better=True),
    Goal("MiB pushed at a server that never reads", _plain("push"), 16, 4, digits=1, less_is_better=True),
    Goal("2 workers vs 1: connections per CPU second", _ratio("conn_per_cpu", "tproxyd", TWO_WORKERS), 0.9, 1.0),
    Goal("2 workers: share of the lesser one, %", _plain("least_share", TWO_WORKERS), 45, 50, digits=0),
    Goal(
        "kept-alive, 1 connection, p99 beside abuse of admin, vs none",
        _plain("abuse_ka1_p99", ABUSED),
        1.1,
        1.0,
        less_is_better=True,
    ),
    Goal(
        "kept-alive, 1 connection, p99 beside abuse of admin, vs a decoy's",
        _plain("decoy_ka1_p99", ABUSED),
        1.1,
        1.0,
        less_is_better=True,
    ),
    Goal(
        "kept-alive, 64 connections, p99 beside abuse of admin, vs none",
        _plain("abuse_ka64_p99", ABUSED),
        1.1,
        1.0,
        less_is_better=True,
    ),
    Goal(
        "kept-alive, 64 connections, p99 beside abuse of admin, vs a decoy's",
        _plain("decoy_ka64_p99", ABUSED),
        1.1,
        1.0,
        less_is_better=True,
    ),
    Goal("conntrack entries after 10,000 connections", _plain("conntrack"), 0, 0, digits=0, less_is_better=True),
    Goal("bypassed connections vs no ruleset, 10,000 CIDRs", _plain("bypass_conn32", "direct"), 0.9, 0.97),
    Goal("bypassed download vs no ruleset, 10,000 CIDRs", _plain("bypass_bulk8", "direct"), 0.9, 0.97),
    Goal("cold start to READY, ms", _plain("start"), 600, 300, digits=0, less_is_better=True),
)


def verdict(goal: Goal, measured: float | None) -> str:
    """In a word."""
    if measured is None:
        return "not measured"
    if goal.reached(measured, goal.aim):
        return "aim"
    return "yes" if goal.reached(measured, goal.must) else "NO"
