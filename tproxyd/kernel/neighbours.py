"""Whoever else uses packet marks, ip rules, route tables and transparent proxying in this namespace, and whether that can live beside us.

Foreign is what has not our protocol and is in none of our tables. What it does to us, each tried in the lab:

**Collisions**: the start is refused, or with "auto" other marks are taken.

- *The same mark bits*, in an ip rule or in an nft or iptables rule that tests or sets them, also between packet and connection marks:
  each would take the other's packets. Bits count and not values, but for who writes whole marks (`marks.py`).
- *A route in our table* that does not deliver to this host: steered packets would follow it. A foreign `local` route does the same
  as ours and is harmless, unless the two could not be told apart.
- *A rule that looks up our table*: our default route would swallow what its owner sends there.
- *A rule at one of our three priorities* that takes packets by anything but a mark, with a result: among equal priorities the one that
  was there first is asked first, so which of the two wins would depend on who started first.

**Warnings**: they concern some packets, and nobody but the administrator knows which are meant.

- *A rule before ours* that takes packets by anything but a mark (`from`, `not fwmark`, everything): connections to addresses of this
  host do not meet it, as the local table comes first; connections to other addresses are not delivered here.
- *A rule that sets the whole mark*, behind our chains, of connections that are captured: for those to other addresses our mark is lost.
- *Another transparent proxy* for a captured port: the later one gets the packets of a connection that the earlier one has accepted.
- *A REDIRECT* for a captured port: ours comes first, and what it takes is never tracked and never redirected.
- *What cannot be read*: the rules of iptables-legacy.

**Harmless**: rules of a firewall that compare with the very mark that we set, for those are about us; rules at our priorities or before for packets that their owner has marked, with other bits; rules that nothing comes of (an
empty table, another protocol, `iif lo`, `oif`); rules behind ours; `ct mark` restored as a whole, because ours have no connection tracking.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from tproxyd.config import Config, Mark
from tproxyd.errors import KernelError
from tproxyd.kernel.foreign_routing import ForeignRule, has_routes, list_foreign_routes, list_foreign_rules
from tproxyd.kernel.foreign_ruleset import ForeignNftRule, list_foreign_nft_rules
from tproxyd.kernel.nft import has_more_rules
from tproxyd.plan import DEFAULT_NAME, SUPPORTED_MARKS, Marks

__all__ = [
    "Neighbour",
    "NeighbourKind",
    "legacy_tables",
    "look_at_neighbours",
    "require_no_collision",
    "taken_marks",
    "tell_neighbours",
]

NeighbourKind = Literal[
    "mark",
    "route",
    "equal route",
    "table",
    "priority",
    "rule before",
    "overwrite",
    "tproxy",
    "redirect",
    "unreadable",
    "too many",
]

_MOST = 3  # of a kind that are told one by one
_MOST_RULES = 4000  # that are looked at where somebody else may have made as many as he likes
_LAST_OF_OURS = 2  # priority, and the two after it
_LEGACY = {"iptables": "ip_tables_names", "ip6tables": "ip6_tables_names"}


class Neighbour(msgspec.Struct, frozen=True, kw_only=True):
    """Something foreign that concerns us: its kind, its own line, and the command that shows that line. `bits` of marks that it uses."""

    kind: NeighbourKind
    line: str
    shown_by: str
    bits: int = 0

    def __str__(self) -> str:
        return f"`{self.line}` ({self.shown_by})"


def look_at_neighbours(config: Config, name: str = DEFAULT_NAME, *, few: bool = False) -> tuple[Neighbour, ...]:
    """All that is foreign and concerns this config, those with mark bits of any kind among it; the same for the same kernel
    state. `name` is that of our tables. `few`: of very many nft rules none is looked at, and that is told.

    Raises MissingError (no nft, no ip rules), CapabilityError, KernelError.
    """
    if few and has_more_rules(_MOST_RULES):
        # 50,000 of them took 24 s, in six of which the parser of JSON let no other thread of the program run.
        ruleset = [Neighbour(kind="too many", line="nft list ruleset", shown_by=f"more than {_MOST_RULES} rules")]
    else:
        ruleset = [*_ruleset(config, list_foreign_nft_rules(_own_marks(config), name))]
    return (
        *_rules(config, list_foreign_rules()),
        *_routes(config),
        *ruleset,
        *_legacy(),
    )


def taken_marks(neighbours: Iterable[Neighbour]) -> int:
    """The bits of packet marks that they use, for Surroundings."""
    taken = 0
    for neighbour in neighbours:
        taken |= neighbour.bits
    return taken


def require_no_collision(config: Config, marks: Marks, neighbours: Iterable[Neighbour]) -> None:
    """Raises KernelError, with the culprit's line, if one of them and this config with these marks cannot live together."""
    for neighbour in neighbours:
        sentence = _collision(config, marks, neighbour)
        if sentence is not None:
            raise KernelError(sentence)


def tell_neighbours(neighbours: Iterable[Neighbour]) -> list[str]:
    """A sentence for each that is no collision but worth a warning."""
    told: Counter[NeighbourKind] = Counter()
    sentences = []
    for neighbour in neighbours:
        warning = _WARNINGS.get(neighbour.kind)
        if warning is None:
            continue
        told[neighbour.kind] += 1
        if told[neighbour.kind] <= _MOST:
            sentences.append(warning.format(neighbour))
    return sentences + [
        f"{count - _MOST} more rules of other programs of this kind ({kind}) are not told one by one"
        for kind, count in told.items()
        if count > _MOST
    ]


_WARNINGS: dict[NeighbourKind, str] = {
    "rule before": "an ip rule of another program comes before tproxyd's: {}; connections to other hosts' addresses that it takes are "
    "not delivered here (routing.priority below its own puts tproxyd first)",
    "overwrite": "a rule of another program sets all bits of packet marks: {}; captured connections to other hosts' addresses that it "
    "meets get stuck (let it set its own bits alone, e.g. `meta mark set meta mark | 0x1`)",
    "tproxy": "another transparent proxy has a rule for captured ports: {}; which of the two gets a connection is not defined (take "
    "the port out of one of them)",
    "redirect": "a rule of another program redirects a captured port: {}; what tproxyd captures does not come to it (take the port out "
    "of one of them)",
    "too many": "other programs have too many nft rules here for tproxyd to look at: {}; if one of them uses its marks, connections get stuck (give "
    "routing.mark and routing.upstream_mark other bits)",
    "unreadable": "iptables-legacy has tables that tproxyd cannot read: {}; look there for marks, TPROXY and REDIRECT (or move them to "
    "nft, with `iptables-legacy-save | iptables-nft-restore`)",
}


def _collision(config: Config, marks: Marks, neighbour: Neighbour) -> str | None:
    routing = config.routing
    last = routing.priority + _LAST_OF_OURS
    match neighbour.kind:
        case _ if neighbour.bits & marks.bits:
            key, mark = (
                ("mark", marks.steering) if neighbour.bits & marks.steering.mask else ("upstream_mark", marks.upstream)
            )
            if isinstance(getattr(routing, key), Mark):
                return (
                    f"`routing.{key}` is {mark}, and another program uses bits of it: {neighbour}; give bits that nobody uses, "
                    'or "auto", which takes free ones'
                )
            return (
                f'`routing.{key}` = "auto" finds no free mark, and the first one, {mark}, collides with another program: '
                f"{neighbour}; give routing.mark and routing.upstream_mark with bits that nobody uses"
            )
        case "equal route":
            return (
                f"`routing.table` {routing.table} has the route that tproxyd needs, but of somebody else: {neighbour}; the two could "
                "not be told apart afterwards; remove it, or choose another routing.table"
            )
        case "route":
            return (
                f"`routing.table` {routing.table} has a route of another program: {neighbour}; captured packets would follow it; "
                "choose another routing.table, or remove the route"
            )
        case "table":
            return (
                f"another program's rule uses `routing.table` {routing.table}: {neighbour}; all that it sends there would be delivered "
                "to this host; choose another routing.table, or remove the rule"
            )
        case "priority":
            return (
                f"another program's rule is at one of the priorities {routing.priority} to {last} and takes captured packets, too: "
                f"{neighbour}; choose another `routing.priority`, or move the rule"
            )
    return None


def _rules(config: Config, rules: Iterable[ForeignRule]) -> Iterator[Neighbour]:
    table, first = config.routing.table, config.routing.priority
    for rule in rules:
        shown_by = f"ip -{rule.family} rule"
        if rule.mark_bits:
            yield Neighbour(kind="mark", line=rule.line, shown_by=shown_by, bits=rule.mark_bits)
        if rule.table == table:
            yield Neighbour(kind="table", line=rule.line, shown_by=shown_by)
        elif _takes_what_is_ours(rule, first):
            kind: NeighbourKind = "priority" if rule.priority >= first else "rule before"
            yield Neighbour(kind=kind, line=rule.line, shown_by=shown_by)


def _takes_what_is_ours(rule: ForeignRule, first: int) -> bool:
    if rule.selects_by_mark:
        return False
    last_of_steering, last = first + 1, first + _LAST_OF_OURS
    steered = rule.priority <= last_of_steering and rule.can_take_tcp_that_arrives
    answers = first <= rule.priority <= last and rule.can_take_answers
    return (steered or answers) and (
        rule.ends
        or rule.l3mdev
        or (rule.goto is not None and rule.goto > last_of_steering)
        or (rule.table is not None and has_routes(rule.family, rule.table))
    )


def _routes(config: Config) -> Iterator[Neighbour]:
    table = config.routing.table
    for route in list_foreign_routes(table):
        if route.is_ours_but_for_protocol or not route.delivers:
            yield Neighbour(
                kind="equal route" if route.is_ours_but_for_protocol else "route",
                line=route.line,
                shown_by=f"ip -{route.family} route show table {table}",
            )


def _ruleset(config: Config, rules: Iterable[ForeignNftRule]) -> Iterator[Neighbour]:
    captured = config.capture.taken_ports
    for rule in rules:
        shown_by = f"nft list chain {rule.table} {rule.chain}"
        ours = not rule.ports or any(
            one <= last and first <= other for one, other in rule.ports for first, last in captured
        )
        kind: NeighbourKind | None = rule.takes if ours else None
        if kind is None:
            kind = "overwrite" if ours and rule.overwrites else "mark"
        if kind != "mark" or rule.bits:
            yield Neighbour(kind=kind, line=rule.line, shown_by=shown_by, bits=rule.bits)


def _own_marks(config: Config) -> frozenset[tuple[int, int]]:
    """Value and mask of each mark that this config may lead to."""
    given = [mark for mark in (config.routing.mark, config.routing.upstream_mark) if isinstance(mark, Mark)]
    return frozenset((mark.value, mark.mask) for mark in (*given, *(mark for pair in SUPPORTED_MARKS for mark in pair)))


def _legacy() -> Iterator[Neighbour]:
    for program, tables in legacy_tables().items():
        yield Neighbour(kind="unreadable", line=", ".join(tables), shown_by=f"{program}-legacy-save")


def legacy_tables() -> dict[str, list[str]]:
    """The tables of iptables-legacy by program, "iptables" or "ip6tables", where there are any."""
    found = {}
    for program, name in _LEGACY.items():
        try:
            # Of the calling thread's namespace.
            tables = Path(f"/proc/thread-self/net/{name}").read_text(encoding="ascii").split()
        except OSError:
            continue  # no such module
        if tables:
            found[program] = sorted(tables)
    return found
