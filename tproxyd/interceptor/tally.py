"""What is counted and recorded of one place for a loop, whichever loop has filled it: counters that do not fall when one dies, and a record
of every connection that it takes with it.

Knows what loops tell of their connections; refuses to know how they are asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Container, Mapping, Sequence

import msgspec
import trio

from tproxyd.datapath import Counters, Outcome, Record
from tproxyd.datapath.record import wall_clock

__all__ = ["OnLines", "Tally", "merge_counters"]

OnLines = Callable[[bytes], None]


class Tally:
    """`counters` are those of the loop that lives; `on_lines` gets records as Relays says."""

    def __init__(self, on_lines: OnLines) -> None:
        self._on_lines = on_lines
        self._before: dict[str, Counters] = {}  # of loops that died
        self.counters: dict[str, Counters] = {}
        self._living: dict[str, tuple[float, Record]] = {}  # and when they were told
        self.records_dropped = 0

    @property
    def total(self) -> dict[str, Counters]:
        """By workload, of all loops."""
        both = (self._before, self.counters)
        return {
            name: merge_counters([one[name] for one in both if name in one])
            for name in dict.fromkeys([*self._before, *self.counters])
        }

    def count(self, name: str, counters: Counters) -> None:
        """As the loop has told of this workload."""
        before = self.counters.get(name, Counters())
        # Only COUNTED has what living connections have moved, and a counter must not fall.
        counters.bytes_from_client = max(counters.bytes_from_client, before.bytes_from_client)
        counters.bytes_from_upstream = max(counters.bytes_from_upstream, before.bytes_from_upstream)
        self.counters[name] = counters

    def drop_records(self, count: int) -> None:
        """So many records were dropped: who of the living has ended is not known any more."""
        self.records_dropped += count
        self._living.clear()

    def forget(self, name: str) -> None:
        """A workload is served no more."""
        self.counters.pop(name, None)
        self._before.pop(name, None)

    def record(self, lines: bytes) -> None:
        """Of connections that have ended."""
        if self._living:
            for line in lines.splitlines():
                self._living.pop(_identity(line), None)
        self._on_lines(lines)

    def note_living(self, lines: bytes, besides: Container[str]) -> None:
        """Of those that live, besides some identities: their records so far."""
        now = trio.current_time()
        for line in lines.splitlines():
            if (identity := _identity(line)) not in besides:
                self._living[identity] = now, msgspec.json.decode(line, type=Record)

    def lost(self, alive: Mapping[str, int]) -> dict[str, int]:
        """By workload, how many connections a loop that has died takes with it, of which so many are alive with the program."""
        # The loop tells its counters less often than it gives a connection away, and may have told of fewer.
        return {name: max(0, counters.active - alive.get(name, 0)) for name, counters in self.counters.items()}

    def bury(self, alive: Mapping[str, int], served: Collection[str]) -> None:
        """What a loop leaves behind that has died: every connection that was known gets its record, but for those that are alive."""
        lost = self.lost(alive)
        if self._living:
            ts, now = wall_clock(time.time()), trio.current_time()
            records = [
                msgspec.structs.replace(
                    record,
                    ts=ts,
                    duration_ms=round(record.duration_ms + (now - told) * 1000, 3),
                    outcome="worker_lost",
                )
                for told, record in self._living.values()
            ]
            self._on_lines(msgspec.json.Encoder().encode_lines(records))
        self._living = {}
        self._before, self.counters = self.total, {}
        for name in alive.keys() & served:
            self._before.setdefault(name, Counters())
        for name, counters in self._before.items():
            counters.active = alive.get(name, 0)
            if lost.get(name):
                counters.outcomes["worker_lost"] = counters.outcomes.get("worker_lost", 0) + lost[name]

    def count_orphan(self, name: str, outcome: Outcome) -> None:
        """A connection has ended whose loop had died before."""
        outcomes = self._before.setdefault(name, Counters()).outcomes
        outcomes[outcome] = outcomes.get(outcome, 0) + 1

    def let_orphan_go(self, name: str) -> None:
        """One of those that were alive when their loop died lives no more."""
        if name in self._before:
            self._before[name].active -= 1


def merge_counters(many: Sequence[Counters]) -> Counters:
    """The sum."""
    total = Counters()
    for one in many:
        total.accepted += one.accepted
        total.active += one.active
        for outcome, number in one.outcomes.items():
            total.outcomes[outcome] = total.outcomes.get(outcome, 0) + number
        total.bytes_from_client += one.bytes_from_client
        total.bytes_from_upstream += one.bytes_from_upstream
        total.connect_seconds = [a + b for a, b in zip(total.connect_seconds, one.connect_seconds, strict=True)]
        total.connect_seconds_sum += one.connect_seconds_sum
    return total


def _identity(line: bytes) -> str:
    """The id in a record's line. It stands behind the time: `{"ts":"2026-11-24T08:00:00.000Z","id":"0123456789abcdef",`."""
    begin = line.index(b'"id":"') + 6
    return line[begin : begin + 16].decode()
