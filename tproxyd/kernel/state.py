"""Observe, compare, change only the difference: all kernel state of one network namespace.

A change is a list of steps, made before the first one is taken. New things come before old ones go, capture comes on last
and goes off first, so a death between any two steps leaves nothing that steers packets to nowhere. A step that fails takes
the steps before it back.

Who holds a Library and plans an owned steering table gives that Library to every call; all others leave `nft` out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Literal

import msgspec

from tproxyd.config.wording import few
from tproxyd.errors import KernelError, TproxydError
from tproxyd.kernel import routing
from tproxyd.kernel.nft import Nft, Program, list_names, list_tables, spelled
from tproxyd.kernel.routing import RouteKey, RuleKey
from tproxyd.net.capabilities import missing_capabilities
from tproxyd.plan import (
    CAPTURE_CHAIN,
    DEFAULT_NAME,
    Plan,
    exchange_tables,
    is_owned,
    of_others,
    remove_tables,
    table_names,
    waiting_table,
)

__all__ = [
    "Change",
    "Kind",
    "Observed",
    "Step",
    "apply",
    "check",
    "differences",
    "expected",
    "is_applied",
    "make_steps",
    "observe",
    "planned",
    "remove_steering",
    "repair",
    "restore",
    "revert",
    "revert_steps",
    "sections",
    "stop_capture",
    "without_others",
]

Kind = Literal["route", "rule", "ruleset"]

_PROGRAM = Program()
_MOST_SPELLINGS = 32  # tables; more are from plans that are gone


class Observed(msgspec.Struct, frozen=True):
    """What is ours in the kernel, or should be: rules and routes with our protocol, tables by name with their listing."""

    rules: tuple[RuleKey, ...]
    routes: tuple[RouteKey, ...]
    tables: dict[str, str]


class Change(msgspec.Struct, frozen=True):
    """One change of the kernel's state, in words."""

    kind: Kind
    what: str

    def __str__(self) -> str:
        return self.what


class Step(msgspec.Struct, frozen=True):
    """A change, the call that makes it, the call that takes it back (if any), and what finds out beforehand that it cannot be made."""

    change: Change
    do: Callable[[], object]
    undo: Callable[[], object] | None = None
    check: Callable[[], None] | None = None


def require_ours(name: str, tables: dict[str, str]) -> None:
    """Raises KernelError where a table of this name is not of ours: `filter`, say, which is an administrator's firewall. Nobody else calls one
    as ours is called without being asked, and one that is empty is no loss."""
    text = tables.get(name, "")
    if name != DEFAULT_NAME and "{" in text.partition("{")[2] and f"chain {CAPTURE_CHAIN} {{" not in text:
        raise KernelError(
            f"the table inet {name} is another program's: it has no chain {CAPTURE_CHAIN!r}, as tproxyd's would; use another name, or delete it yourself"
        )


def observe(nft: Nft = _PROGRAM, name: str = DEFAULT_NAME) -> Observed:
    """What is ours in this namespace, now; `name` is that of the tables. Raises MissingError, CapabilityError or KernelError."""
    return Observed(routing.dump_rules(), routing.dump_routes(), list_tables(nft, name))


def planned(plan: Plan) -> Observed:
    """What `observe` gives when the kernel holds the plan, but for the words of its tables."""
    return Observed(
        tuple(routing.rule_key(rule) for rule in plan.rules),
        tuple(routing.route_key(route) for route in plan.routes),
        plan.tables,
    )


def expected(plan: Plan, observed: Observed, nft: Nft = _PROGRAM) -> Observed:
    """The same, in the words in which nft lists the tables here, as far as it can be asked for them (see `_changed_tables`)."""
    tables = plan.tables
    if any(name in observed.tables for name in _unlike(tables, observed.tables)):
        with suppress(TproxydError):
            tables = {**tables, **spelled(plan, nft)}
    unlike = _unlike(tables, observed.tables)
    return msgspec.structs.replace(
        planned(plan), tables={name: tables[name] if name in unlike else observed.tables[name] for name in tables}
    )


def sections(state: Observed) -> dict[str, list[str]]:
    """A state as text, to be shown and compared. Rules and routes are sorted: the order in which they were made means nothing."""
    return {
        "local routes": [
            f"ip -{key.family} route local default dev {'some other' if key.raw else 'lo'} table {key.table}"
            for key in sorted(state.routes)
        ],
        "ip rules": [
            f"ip -{key[0]} rule {routing.describe_rule(key).partition(' ')[2]}"
            for key in sorted(state.rules, key=lambda key: (key[:2], str(key)))
        ],
        **{f"table inet {name}": text.rstrip("\n").split("\n") for name, text in sorted(state.tables.items())},
    }


def is_applied(name: str = DEFAULT_NAME) -> bool:
    """Whether `tproxyd apply` was here: then the state is to stay when a daemon stops."""
    return table_names(name).state in list_names(name)


def differences(plan: Plan, observed: Observed, nft: Nft = _PROGRAM) -> list[Change]:
    """What would have to change; empty when the kernel holds what is planned."""
    return [step.change for step in make_steps(plan, observed, nft)]


def apply(plan: Plan, nft: Nft = _PROGRAM, *, checked: bool = False) -> list[Change]:
    """Makes the kernel hold the plan, looks whether it does, and gives what was changed; a second time, that is nothing. `checked`: the
    kernel is known to take it, in another namespace; what it refuses is found out a little later then, and taken back all the same.

    Raises MissingError, CapabilityError or KernelError, with everything as it was before.
    """
    before = observe(nft, plan.name)
    require_ours(plan.name, before.tables)
    steps = make_steps(plan, before, nft)
    for step in steps:
        if step.check is not None and not checked:
            step.check()  # before the first step: most of what can fail, fails here
    with _taken(steps):
        if steps:
            observed = observe(nft, plan.name)
            wrong = [step.change.what for step in make_steps(plan, observed, nft, unsure=False)]
            if wrong:
                raise KernelError(
                    f"the kernel does not hold what was just put there ({few(wrong)}): another program changes the same "
                    "state; find it with `nft monitor` and `ip monitor`"
                )
            _learn_spellings(plan, observed, nft)
    return [step.change for step in steps]


def check(plan: Plan, nft: Nft = _PROGRAM) -> None:
    """Whether this kernel takes the plan, as far as it can tell without a change. Raises MissingError, CapabilityError or KernelError."""
    for step in make_steps(plan, observe(nft, plan.name), nft):
        if step.check is not None:
            step.check()


def repair(plan: Plan, kinds: Collection[str], nft: Nft = _PROGRAM) -> tuple[list[Change], TproxydError | None]:
    """Puts right what is otherwise than planned, of these kinds. One step that cannot be taken does not keep the others from it.

    What was changed, and the first error. Raises like `observe`, with nothing changed.
    """
    done: list[Change] = []
    failed: TproxydError | None = None
    for step in make_steps(plan, observe(nft, plan.name), nft):
        if step.change.kind in kinds:
            try:
                step.do()
            except TproxydError as error:
                failed = failed or error
            else:
                done.append(step.change)
    if any(change.kind == "ruleset" for change in done):
        _learn_spellings(plan, observe(nft, plan.name), nft)
    return done, failed


def _learn_spellings(plan: Plan, observed: Observed, nft: Nft) -> None:
    """Where nothing else can tell, what is listed right after loading it is how it is spelled."""
    for name, text in plan.tables.items():
        if name in observed.tables:
            nft.spellings.setdefault(text, observed.tables[name])


def restore(before: Observed) -> None:
    """Makes the kernel hold again what was observed before, un-owned. Raises KernelError and the like, with nothing half-way."""
    now = observe()
    with _taken(_steps(before, now, _unlike(before.tables, now.tables), _PROGRAM)):
        pass


def revert(
    nft: Nft = _PROGRAM,
    name: str = DEFAULT_NAME,
    *,
    checked: bool = False,
    but: Collection[str] = (),
    steering: str | None = None,
) -> list[Change]:
    """Removes all that is ours in this namespace, with tables of this name, whatever config put it there, and gives what was removed. Tables
    in `but` stay.

    Looks first, and raises with nothing changed if it cannot, if a table of this name is not of ours, or if one is owned by somebody who lives: then all of it is. Then a step that fails does not keep the others from being taken;
    the first error is raised at the end. `checked`: it is known that nobody owns them. `steering`: for who owns the table of this name; those of other
    generations go with their owners.
    """
    observed = observe(nft, name)
    require_ours(name, observed.tables)
    if steering is not None:
        observed = without_others(observed, steering, name)
    tables = {one: text for one, text in observed.tables.items() if one not in but}
    steps = revert_steps(msgspec.structs.replace(observed, tables=tables), nft)
    for step in steps:
        if step.check is not None and not checked:
            step.check()
    errors: list[TproxydError] = []
    for step in steps:
        try:
            step.do()
        except TproxydError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return [step.change for step in steps]


def stop_capture(plan: Plan, stopped: Plan, nft: Nft) -> None:
    """No new connection is taken from here on; those that live go on. The guard, if there is one, refuses new ones. `stopped` is what the kernel holds
    then."""
    nft.run(plan.capture_off)
    if missing_capabilities(["CAP_SYS_ADMIN"]):
        # No way to ask how it is spelled (`_changed_tables`): unknown words would be put right, and told as somebody's doing.
        _learn_spellings(stopped, observe(nft, plan.name), nft)


def remove_steering(plan: Plan, nft: Nft) -> None:
    """Takes the steering table away, and leaves all that another generation may need."""
    tables = list_tables(nft, plan.name)
    if plan.steering in tables:
        nft.run(remove_tables({plan.steering: tables[plan.steering]}))


def make_steps(plan: Plan, observed: Observed, nft: Nft = _PROGRAM, *, unsure: bool = True) -> list[Step]:
    """From what is to what should be: add routes, add rules, exchange changed tables at once, remove what is left over.

    `unsure` is whether a table counts as changed of which it cannot be told (see `_changed_tables`).
    """
    observed = without_others(observed, plan.steering, plan.name)
    return _steps(planned(plan), observed, _changed_tables(plan, observed, nft, unsure=unsure), nft)


def without_others(observed: Observed, steering: str, name: str) -> Observed:
    """What is there but for the steering tables of other generations, which go with their owners."""
    others = of_others(observed.tables, steering, name)
    if not others:
        return observed
    tables = {one: listing for one, listing in observed.tables.items() if one not in others}
    return msgspec.structs.replace(observed, tables=tables)


def _steps(wanted: Observed, observed: Observed, changed: list[str], nft: Nft) -> list[Step]:
    steps = [_add_route(key) for key in wanted.routes if key not in observed.routes]
    steps += [_add_rule(key) for key in wanted.rules if key not in observed.rules]
    left_over = [name for name in observed.tables if name not in wanted.tables]
    # What has steered between two daemons goes when the new one's table is there, and not with its coming: in one transaction, a packet can
    # see the old one gone and the new one not there yet.
    after = [name for name in left_over if changed and name.endswith(waiting_table(""))]
    left_over = [name for name in left_over if name not in after]
    if changed or left_over:
        what = [f"load table inet {name}" for name in changed] + [f"delete table inet {name}" for name in left_over]
        # A guard that is as planned must not be in the transaction: for some microseconds around its commit the old one is no longer
        # there for a packet for which the new one was not there yet (seen: one in some thousand connections slipped through).
        old = {name: observed.tables.get(name, "") for name in [*changed, *left_over]}
        new = {name: wanted.tables.get(name, "") for name in old}
        load, undo = exchange_tables(old, new), exchange_tables(new, old)
        change = Change("ruleset", few(what, ", "))
        steps.append(Step(change, partial(nft.run, load), partial(nft.run, undo), partial(nft.check, load)))
    for name in after:
        remove = remove_tables({name: observed.tables[name]})
        steps.append(
            Step(
                Change("ruleset", f"delete table inet {name}"),
                partial(nft.run, remove),
                partial(nft.run, observed.tables[name]),
                partial(nft.check, remove),
            )
        )
    steps += [_delete_rule(key) for key in sorted(observed.rules, key=_when_deleted) if key not in wanted.rules]
    steps += [_delete_route(key) for key in observed.routes if key not in wanted.routes]
    return steps


def _changed_tables(plan: Plan, observed: Observed, nft: Nft, *, unsure: bool) -> list[str]:
    """Planned tables that are missing or otherwise than planned.

    Where nft does not list a table in the plan's own words, it is asked for its words. Where it cannot be (that takes a network
    namespace, and CAP_SYS_ADMIN), the table counts as changed if `unsure`.
    """
    changed = _unlike(plan.tables, observed.tables)
    missing = [name for name in changed if name not in observed.tables]
    # Who owns a table is spelled the same everywhere.
    otherwise = [
        name
        for name in changed
        if name not in missing and is_owned(plan.tables[name]) != is_owned(observed.tables[name])
    ]
    doubtful = [name for name in changed if name not in (*missing, *otherwise)]
    words = {name: nft.spellings.get(plan.tables[name]) for name in doubtful}
    if None in words.values():
        try:
            words |= spelled(plan, nft)
        except TproxydError:
            return changed if unsure else missing + otherwise
        if len(nft.spellings) > _MOST_SPELLINGS:
            nft.spellings.clear()
        nft.spellings.update((plan.tables[name], listing) for name, listing in words.items() if listing is not None)
    unlike = _unlike({name: words[name] or "" for name in doubtful}, observed.tables)
    return [name for name in changed if name not in doubtful or name in unlike]


def _when_deleted(key: RuleKey) -> int:
    """The rule that steers goes before the one that keeps the look-up of the way back from it: with src_valid_mark on, packets
    would be dropped in between."""
    return 0 if key.iif is None and key.goto is None else 1 if key.goto is not None else 2


def _unlike(wanted: dict[str, str], observed: dict[str, str]) -> list[str]:
    # Where nft breaks lines is left to nft.
    return [name for name, text in wanted.items() if text.split() != observed.get(name, "").split()]


def revert_steps(observed: Observed, nft: Nft = _PROGRAM) -> list[Step]:
    """Steering goes first, then what it needs, the guard last: until then new connections get what `when_down` says."""

    def delete(name: str) -> Step:
        text = remove_tables({name: observed.tables[name]})
        return Step(
            Change("ruleset", f"delete table inet {name}"), partial(nft.run, text), check=partial(nft.check, text)
        )

    guards = [name for name in observed.tables if name.endswith("_guard")]
    steps = [delete(name) for name in observed.tables if name not in guards]
    steps += [_delete_rule(key) for key in sorted(observed.rules, key=_when_deleted)]
    steps += [_delete_route(key) for key in observed.routes]
    return steps + [delete(name) for name in guards]


@contextmanager
def _taken(steps: Iterable[Step]) -> Iterator[None]:
    """Takes the steps, and takes them back if one of them or the block fails."""
    with ExitStack() as undo:
        for step in steps:
            step.do()
            if step.undo is not None:
                undo.callback(step.undo)
        yield
        undo.pop_all()


def _add_rule(key: RuleKey) -> Step:
    return Step(
        Change("rule", f"add ip rule {routing.describe_rule(key)}"),
        partial(routing.add_rule, key),
        partial(routing.delete_rule, key),
    )


def _delete_rule(key: RuleKey) -> Step:
    return Step(
        Change("rule", f"delete ip rule {routing.describe_rule(key)}"),
        partial(routing.delete_rule, key),
        partial(routing.add_rule, key),
    )


def _add_route(key: RouteKey) -> Step:
    return Step(
        Change("route", f"add local route of IPv{key.family} to table {key.table}"),
        partial(routing.add_route, key),
        partial(routing.delete_route, key),
    )


def _delete_route(key: RouteKey) -> Step:
    return Step(
        Change("route", f"delete local route of IPv{key.family} from table {key.table}"),
        partial(routing.delete_route, key),
        partial(routing.add_route, key),
    )
