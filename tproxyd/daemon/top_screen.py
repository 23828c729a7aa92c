"""The screen of `tproxyd top`: a state becomes lines. Pure; the only module that needs rich, and of that the styled text and the widths of characters.

Lines are put together here and not by rich's tables: 0.4 ms instead of 13 for a screen of 120x40. Whatever is shown has been through `printable`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from tproxyd.config.wording import printable
from tproxyd.daemon.client import short_age, short_size
from tproxyd.daemon.top_state import Moment, Row, State, visible

__all__ = ["LEAST", "frame", "rows_shown"]

LEAST = (60, 15)
"""Columns and lines of the smallest terminal that has room for everything."""

_BARS = "▁▂▃▄▅▆▇█"
_GAP = "  "
_MINUTE = 60.0
_ROOMY = 20  # lines from which on some may stay empty
_NARROWEST_ADDRESS = 15  # columns of an address that is cut: "…:1234]:65535" still tells the port

# Ended as ends are, or as somebody had wanted; any other outcome is worth a look.
_GOOD = {"closed", "handled", "handed_over"}
_CHOSEN = {"refused_by_policy", "limit", "idle_timeout", "drained", "client_reset", "self_call"}


def frame(state: State, width: int, height: int, *, keys: bool = True) -> list[Text]:
    """As many lines as there is room for, or fewer. Without `keys` the last one, which names them, is left out."""
    if keys and (width < LEAST[0] or height < LEAST[1]):
        return [Text(_cut(f"{LEAST[0]}x{LEAST[1]} are needed, this is {width}x{height}", width))]
    head = list(_head(state, width, height))
    room = max(height - len(head) - 1 - keys, 0)
    rows = visible(state)
    at = next((at for at, row in enumerate(rows) if row.connection.id == state.selected), 0)
    first = at // room * room if room else 0
    shown = rows[first : first + room]
    table = list(_table(state, shown, width))
    if not shown:
        table.append(Text(_cut(_why_none(state), width), "dim"))
    lines = head + table
    if keys:
        lines += [Text()] * (height - 1 - len(lines))
        lines.append(_foot(state, width, first, len(shown), len(rows)))
    return lines[:height]


def rows_shown(state: State, width: int, height: int) -> int:
    """How many connections there is room for."""
    return max(height - sum(1 for _ in _head(state, width, height)) - 2, 1)


def _head(state: State, width: int, height: int) -> Iterator[Text]:
    serving = state.serving
    if serving is None:
        yield Text("tproxyd", "bold")
    else:
        line = Text()
        line.append("tproxyd " + printable(serving.version), "bold")
        line.append(f"  pid {serving.pid}  ready for {_long_age(serving.uptime_s)}  capture ")
        line.append(*(("on", "bold green") if serving.capturing else ("off", "bold red")))
        if state.paused:
            line.append(_GAP)
            line.append(" paused ", "black on yellow")
        line.truncate(width)
        yield line
    for trouble in _troubles(state):
        most = 2 if height >= _ROOMY else 1
        for told in textwrap.wrap(printable(trouble), width, max_lines=most, placeholder=" …"):
            yield Text(_cut(told, width), "bold red")
    if serving is None:
        return
    counters = serving.counters
    ends = f"{serving.connections} living, {counters.accepted} accepted"
    for what, of, unit, style, total in (
        ("new connections", "accepted", "", "green", ends),
        ("from clients", "from_client", "B", "cyan", f"{short_size(counters.bytes_from_client)}B in all"),
        ("from upstreams", "from_upstream", "B", "magenta", f"{short_size(counters.bytes_from_upstream)}B in all"),
    ):
        rates = list(_rates(state.moments, of))
        now = rates[-1] if rates else 0.0
        rate = short_size(now) + unit if unit else f"{now:.1f}"
        line = Text(f"{what:<15} {rate:>8}/s  ")
        room = min(60, width - line.cell_len - max(30, len(ends) + 2))
        line.append(f"{_sparkline(rates[-room:]):>{room}}", style)
        line.append(_GAP + total, "dim")
        line.truncate(width)
        yield line
    yield _outcomes(state, width)
    yield _workloads(state, width)
    if height >= _ROOMY:
        yield Text()


def _troubles(state: State) -> Iterator[str]:
    if state.problem:
        yield state.problem
    serving = state.serving
    if serving is None:
        return
    if serving.trouble:
        yield f"trouble: {serving.trouble}"
    if serving.last_reload_error:
        yield f"the last reload failed, an older configuration is in force: {serving.last_reload_error}"
    if serving.differences and not serving.trouble:
        more = f", and {len(serving.differences) - 1} more" if len(serving.differences) > 1 else ""
        yield f"the kernel does not hold what is planned: {serving.differences[0].what}{more}; see `tproxyd plan --diff`"


def _rates(moments: Sequence[Moment], of: str) -> Iterator[float]:
    for before, after in pairwise(moments):
        yield (getattr(after, of) - getattr(before, of)) / max(after.at - before.at, 0.001)


def _sparkline(rates: Sequence[float]) -> str:
    most = max(rates, default=0.0)
    if most <= 0:
        return _BARS[0] * len(rates)
    return "".join(_BARS[round(max(rate, 0.0) / most * (len(_BARS) - 1))] for rate in rates)


def _outcomes(state: State, width: int) -> Text:
    assert state.serving is not None
    outcomes = state.serving.counters.outcomes
    now = state.moments[-1]
    before = next(one for one in state.moments if now.at - one.at <= _MINUTE)
    passed = now.at - before.at
    when = "minute" if passed > _MINUTE - 2 else f"{passed:.0f} s"
    items = []
    for outcome, count in sorted(outcomes.items(), key=lambda one: -one[1]):
        style = "green" if outcome in _GOOD else "yellow" if outcome in _CHOSEN else "red"
        lately = count - before.outcomes.get(outcome, 0)
        items.append(Text.assemble((printable(outcome), style), f" {count}", (f" +{lately}" if lately else "", "bold")))
    when = f"in the last {when}" if width >= 100 else "lately"
    return _listed(f"ended (+ {when})" if passed >= 1 else "ended", items, width)


def _workloads(state: State, width: int) -> Text:
    found: dict[str, list[Row]] = {}
    for row in state.rows:
        found.setdefault(row.connection.workload, []).append(row)
    items = []
    for name, rows in sorted(found.items(), key=lambda one: -len(one[1])):
        rate = sum(row.from_client + row.from_upstream for row in rows)
        items.append(Text(f"{_cut(name, 40)} {len(rows)} living, {short_size(rate)}B/s"))
    return _listed("workloads", items, width)


def _listed(what: str, items: Sequence[Text], width: int) -> Text:
    """As many as there is room for, and how many more there are."""
    line = Text(what)
    for at, item in enumerate(items):
        rest = len(items) - at - 1
        more = f"{_GAP}{rest} more" if rest else ""
        if line.cell_len + len(_GAP) + item.cell_len + len(more) > width:
            line.append(f"{_GAP}{rest + 1} more")
            break
        line.append(_GAP)
        line.append_text(item)
    if not items:
        line.append(f"{_GAP}none", "dim")
    line.truncate(width)
    return line


class _Column(NamedTuple):
    """`name` is its heading; `sort`: by which order it is marked; `goes`: the higher, the sooner it is left out where there is no room, 0: never."""

    name: str
    tell: Callable[[Row], str]
    goes: int = 0
    right: bool = False
    sort: str = ""


_COLUMNS = (
    _Column("client", lambda row: row.connection.source),
    _Column("destination", lambda row: row.connection.original_destination or "-"),
    _Column("upstream", lambda row: _elsewhere(row), 7),
    _Column("workload", lambda row: row.connection.workload, 6),
    _Column("state", lambda row: row.connection.state, 5),
    _Column("rule", lambda row: row.connection.rule or "-", 8),
    _Column("sni", lambda row: row.connection.sni or "-", 9),
    _Column("age", lambda row: short_age(row.connection.age_s), 1, right=True, sort="age"),
    _Column("up/s", lambda row: short_size(row.from_client), 0, right=True, sort="rate"),
    _Column("down/s", lambda row: short_size(row.from_upstream), 0, right=True, sort="rate"),
    _Column("sent", lambda row: short_size(row.connection.bytes_from_client), 4, right=True, sort="bytes"),
    _Column("received", lambda row: short_size(row.connection.bytes_from_upstream), 3, right=True, sort="bytes"),
    _Column("id", lambda row: row.connection.id, 10),
)


# Columns that may have nothing to say; of all connections, so that they do not come and go with those on the screen.
_OPTIONAL: Mapping[str, Callable[[Sequence[Row]], bool]] = {
    "upstream": lambda rows: any(_elsewhere(row) not in ("-", "=") for row in rows),
    "workload": lambda rows: len({row.connection.workload for row in rows}) > 1,
    "rule": lambda rows: any(row.connection.rule for row in rows),
    "sni": lambda rows: any(row.connection.sni for row in rows),
}


def _elsewhere(row: Row) -> str:
    upstream = row.connection.upstream
    return "-" if upstream is None else "=" if upstream == row.connection.original_destination else upstream


def _table(state: State, rows: Sequence[Row], width: int) -> Iterator[Text]:
    """Columns as wide as they have to be. Those that say nothing, and then some more where there is no room, are left out; then addresses are cut."""
    cells = [[printable(column.tell(row)) for column in _COLUMNS] for row in rows]
    headings = [f"{one.name}▼" if one.sort and one.sort == state.sort else one.name for one in _COLUMNS]
    widths = [max(map(cell_len, column)) for column in zip(headings, *cells, strict=True)]
    columns = [at for at, one in enumerate(_COLUMNS) if one.name not in _OPTIONAL or _OPTIONAL[one.name](state.rows)]

    def excess() -> int:
        return sum(widths[at] + len(_GAP) for at in columns) - len(_GAP) - width

    spared = sorted((at for at in columns if _COLUMNS[at].goes), key=lambda at: _COLUMNS[at].goes)
    while spared and excess() > 0:
        at = spared.pop()
        if _COLUMNS[at].sort != state.sort:  # by what they are sorted has to be seen
            columns.remove(at)
    for at in sorted((0, 1), key=lambda at: -widths[at]):
        other = widths[1 - at]
        if (over := excess()) > 0:
            # The wider one first, down to the other's width, and both alike from there.
            half = max(over - max(widths[at] - other, 0), 0) // 2
            widths[at] = max(widths[at] - (over - half), _NARROWEST_ADDRESS)

    def line(row: Sequence[str]) -> str:
        return _GAP.join(_fit(row[at], widths[at], right=_COLUMNS[at].right, tail=at < 2) for at in columns)

    yield Text(set_cell_size(line(headings), width), "bold underline")
    for row, told in zip(rows, cells, strict=True):
        text = set_cell_size(line(told), width)
        style = "reverse" if row.connection.id == state.selected else "" if _moves(row) else "dim"
        yield Text(text, style)


def _moves(row: Row) -> bool:
    return row.from_client + row.from_upstream > 0 or row.connection.state != "relaying"


def _why_none(state: State) -> str:
    if state.rows:
        return f"none of {len(state.rows)} connections has {state.filter!r}"
    return "no connection lives" if state.serving is not None else ""


def _foot(state: State, width: int, first: int, shown: int, count: int) -> Text:
    if state.closing:
        one = next(row.connection for row in state.rows if row.connection.id == state.closing)
        what = f"{one.source} to {one.original_destination or '-'}"
        return Text(
            set_cell_size(_cut(f" y closes {what}, with a reset on both sides; n leaves it ", width), width),
            "black on yellow",
        )
    if state.typing:
        end = "_  Enter keeps it, Esc clears it"
        return Text(f"filter: {_tail(state.filter, width - len(end) - 9)}{end}", "bold")
    if state.message:
        return Text(_cut(state.message, width), "bold yellow")
    least = "+" if state.more else ""
    place = f"{first + 1 if shown else 0}-{first + shown} of {count}{least}"
    line = Text()
    room = width - len(place) - len(_GAP)
    for key, what in (
        ("q", "quit"),
        ("s", f"sort: {state.sort}"),
        ("f", f"filter: {_cut(state.filter, 20)}" if state.filter else "filter"),
        ("k", "close"),
        ("p", "go on" if state.paused else "pause"),
        ("↑↓", "choose"),
        ("PgUp PgDn", "scroll"),
        ("Esc", "all again"),
    ):
        item = Text.assemble((key, "bold"), " ", (what, "yellow" if key == "f" and state.filter else ""))
        if line.cell_len + len(_GAP) + item.cell_len > room:
            break
        line.append_text(item)
        line.append(_GAP)
    line.append(" " * max(width - line.cell_len - len(place), 0))
    line.append(place, "dim")
    line.truncate(width)
    return line


def _cut(text: str, width: int) -> str:
    """The printable text, with an ellipsis where it had to be cut."""
    text = printable(text)
    return text if cell_len(text) <= width else set_cell_size(text, max(width - 1, 0)) + "…"


def _tail(text: str, width: int) -> str:
    text = printable(text)
    return text if cell_len(text) <= width else "…" + set_cell_size(text[::-1], max(width - 1, 0))[::-1]


def _fit(text: str, width: int, *, right: bool, tail: bool) -> str:
    """Exactly so wide; of what is too long, the beginning is cut where the end tells more."""
    text = _tail(text, width) if tail else _cut(text, width)
    space = " " * (width - cell_len(text))
    return space + text if right else text + space


def _long_age(seconds: float) -> str:
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s" if minutes else f"{left} s"
