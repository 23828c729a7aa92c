"""What `tproxyd top` knows: what the daemon has answered lately, and what is looked at. Pure: an answer or a key makes another state of a state.

Refuses to know the screen (`top_screen`), the keyboard's bytes and the socket (`top`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from tproxyd.daemon.status import Serving
from tproxyd.datapath.listing import LivingConnection

__all__ = [
    "SORTS",
    "Close",
    "Moment",
    "Quit",
    "Row",
    "Sort",
    "State",
    "close_ended",
    "hear_list",
    "hear_status",
    "miss",
    "press",
    "visible",
]

_SAID = 4.0  # seconds for which a message stays
_KEPT = 61.0  # seconds of moments that are kept: a minute, and the one before it

Sort = Literal["rate", "bytes", "age"]
SORTS: tuple[Sort, ...] = ("rate", "bytes", "age")


class Moment(NamedTuple):
    """What had been counted at a time."""

    at: float
    accepted: int
    outcomes: Mapping[str, int]
    from_client: int
    from_upstream: int


class Row(NamedTuple):
    """A living connection, and the bytes a second that came from either side lately."""

    connection: LivingConnection
    from_client: float
    from_upstream: float


@dataclass(frozen=True)
class State:
    """`moments`: the oldest first, all of one daemon; `listed_at`: when `rows` were, `more`: there are others than these. `problem`: why the daemon was not
    heard last, empty if it was. `selected`: the id of a connection, empty for none; `closing`: the one of which it is asked whether it is to be closed.
    `typing`: keys are text of the filter. `message`: the answer to the last key, until the time `until`."""

    serving: Serving | None = None
    moments: tuple[Moment, ...] = ()
    rows: tuple[Row, ...] = ()
    listed_at: float = 0.0
    more: bool = False
    problem: str = ""
    sort: Sort = "rate"
    filter: str = ""
    typing: bool = False
    paused: bool = False
    selected: str = ""
    closing: str = ""
    message: str = ""
    until: float = 0.0


@dataclass(frozen=True)
class Close:
    """The connection of this id is to be closed."""

    id: str


class Quit(NamedTuple):
    """Enough seen."""


def hear_status(state: State, at: float, serving: Serving) -> State:
    """The daemon has told of itself. Of one that has taken another's place nothing is compared with what that one counted."""
    counters = serving.counters
    moment = Moment(at, counters.accepted, counters.outcomes, counters.bytes_from_client, counters.bytes_from_upstream)
    if state.message and at > state.until:
        state = replace(state, message="")
    before = state.serving
    if before is None or before.pid != serving.pid or serving.uptime_s < before.uptime_s:
        return replace(state, serving=serving, moments=(moment,), rows=(), problem="", closing="")
    kept = tuple(one for one in state.moments if at - one.at <= _KEPT)
    return replace(state, serving=serving, moments=(*kept, moment), problem="")


def hear_list(state: State, at: float, connections: Sequence[LivingConnection], *, more: bool) -> State:
    """The living connections. Of one that was not there before the rate is that of its whole life."""
    passed = max(at - state.listed_at, 0.001)
    before = {row.connection.id: row.connection for row in state.rows}
    rows = []
    for one in connections:
        old = before.get(one.id)
        seconds = passed if old is not None else max(one.age_s, 1.0)
        sent, received = (old.bytes_from_client, old.bytes_from_upstream) if old is not None else (0, 0)
        rows.append(Row(one, (one.bytes_from_client - sent) / seconds, (one.bytes_from_upstream - received) / seconds))
    heard = replace(state, rows=tuple(rows), listed_at=at, more=more)
    if state.closing and all(one.id != state.closing for one in connections):
        heard = _say(replace(heard, closing=""), "it has ended by itself")
    return _keep_selection(state, heard)


def miss(state: State, problem: str) -> State:
    """The daemon could not be asked."""
    return replace(state, problem=problem, closing="")


def close_ended(state: State, identity: str, problem: str = "") -> State:
    """A connection was closed, or could not be."""
    if problem:
        return _say(state, problem)
    heard = replace(
        state,
        rows=tuple(row for row in state.rows if row.connection.id != identity),
        closing="" if state.closing == identity else state.closing,
    )
    return _say(_keep_selection(state, heard), "closed")


def visible(state: State) -> list[Row]:
    """What the filter lets through, in the order that is asked for; equals the older first, so that nothing jumps about."""
    wanted = state.filter.casefold()
    rows = [row for row in state.rows if wanted in _text(row.connection)] if wanted else list(state.rows)
    rows.sort(key=_ORDER[state.sort])
    return rows


def press(state: State, key: str, page: int) -> tuple[State, Close | Quit | None]:
    """A key: a character, or the name of one that is none ("up", "enter" ...). `page`: how many rows are on the screen at a time."""
    state = replace(state, message="")
    if state.closing:
        asked, state = state.closing, replace(state, closing="")
        return (state, Close(asked)) if key in ("y", "Y") else (_say(state, "not closed"), None)
    if state.typing:
        return _type(state, key), None
    if key in ("q", "Q"):
        return state, Quit()
    if key in _MOVES:
        return _move(state, key, page), None
    match key:
        case "s":
            return replace(state, sort=SORTS[(SORTS.index(state.sort) + 1) % len(SORTS)]), None
        case "f" | "/":
            return replace(state, typing=True), None
        case "p":
            return replace(state, paused=not state.paused), None
        case "escape":
            return replace(state, filter="", selected=""), None
        case "k" if not state.selected:
            return _say(state, "choose a connection first, with the arrows"), None
        case "k":
            return replace(state, closing=state.selected), None
    return state, None


_ORDER: Mapping[Sort, Callable[[Row], tuple[float, float]]] = {
    "rate": lambda row: (-row.from_client - row.from_upstream, -row.connection.age_s),
    "bytes": lambda row: (
        -row.connection.bytes_from_client - row.connection.bytes_from_upstream,
        -row.connection.age_s,
    ),
    "age": lambda row: (-row.connection.age_s, 0.0),
}

_MOVES: Mapping[str, Callable[[int, int], int]] = {
    "up": lambda at, page: at - 1,
    "down": lambda at, page: at + 1,
    "page up": lambda at, page: at - page,
    "page down": lambda at, page: at + page,
    "home": lambda at, page: 0,
    "end": lambda at, page: 1 << 30,
}


def _move(state: State, key: str, page: int) -> State:
    rows = visible(state)
    if not rows:
        return state
    at = next((at for at, row in enumerate(rows) if row.connection.id == state.selected), None)
    # The first of these keys chooses the first row, and moves from there only by more than one.
    to = 0 if at is None and key in ("up", "down") else _MOVES[key](at or 0, page)
    return replace(state, selected=rows[max(0, min(to, len(rows) - 1))].connection.id)


def _say(state: State, message: str) -> State:
    return replace(state, message=message, until=(state.moments[-1].at if state.moments else 0.0) + _SAID)


def _type(state: State, key: str) -> State:
    if key == "enter":
        state = replace(state, typing=False)
    elif key == "escape":
        state = replace(state, typing=False, filter="")
    elif key == "backspace":
        state = replace(state, filter=state.filter[:-1])
    elif len(key) == 1 and len(state.filter) < 60:
        state = replace(state, filter=state.filter + key)
    if state.selected and all(row.connection.id != state.selected for row in visible(state)):
        return replace(state, selected="")
    return state


def _keep_selection(before: State, after: State) -> State:
    """Where the selected connection has gone, the one that takes its place on the screen is."""
    if not after.selected or any(row.connection.id == after.selected for row in after.rows):
        return after
    at = next((at for at, row in enumerate(visible(before)) if row.connection.id == after.selected), 0)
    rows = visible(after)
    return replace(after, selected=rows[min(at, len(rows) - 1)].connection.id if rows else "")


def _text(one: LivingConnection) -> str:
    told = (one.id, one.workload, one.state, one.source, one.original_destination, one.upstream, one.rule, one.sni)
    return " ".join(filter(None, told)).casefold()
