"""Observe, compare, change only the difference: all kernel state of one network namespace.

A change is a list of steps, made before the first one is taken. New things come before old ones go, capture comes on last
and goes off first, so a death between any two steps leaves nothing that steers packets to nowhere. A step that fails takes
the steps before it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import msgspec

from tproxyd.errors import KernelError, TproxydError
from tproxyd.kernel import nft, routing
from tproxyd.kernel.routing import RouteKey, RuleKey
from tproxyd.plan import STATE, Plan, remove_tables

__all__ = [
    "Observed",
    "Step",
    "apply",
    "differences",
    "is_applied",
    "is_reverted",
    "make_steps",
    "observe",
    "revert",
    "revert_steps",
    "stop_capture",
]


class Observed(msgspec.Struct, frozen=True):
    """What is ours in the kernel: rules and routes with our protocol, tables by name with their listing."""

    rules: tuple[RuleKey, ...]
    routes: tuple[RouteKey, ...]
    tables: dict[str, str]


class Step(msgspec.Struct, frozen=True):
    """One change of the kernel's state: what it does in words, the call, and the call that takes it back (if any)."""

    what: str
    do: Callable[[], None]
    undo: Callable[[], None] | None = None


def observe() -> Observed:
    """What is ours in this namespace, now. Raises MissingError, CapabilityError or KernelError."""
    return Observed(routing.dump_rules(), routing.dump_routes(), nft.list_tables())


def is_applied() -> bool:
    """Whether `tproxyd apply` was here: then the state is to stay when a daemon stops."""
    return STATE in nft.list_names()


def is_reverted() -> bool:
    """Whether `tproxyd revert` was here since: a foreign flush of the ruleset, or of the rules, leaves the other half."""
    observed = observe()
    return not (observed.rules or observed.routes or STATE in observed.tables)


def differences(plan: Plan, observed: Observed) -> list[str]:
    """What would have to change, a line each; empty when the kernel holds what is planned."""
    return [step.what for step in make_steps(plan, observed)]


def apply(plan: Plan) -> list[str]:
    """Makes the kernel hold the plan, looks whether it does, and gives what was changed; a second time, that is nothing.

    Raises MissingError, CapabilityError or KernelError, with everything as it was before.
    """
    steps = make_steps(plan, observe())
    if steps:
        nft.check(plan.ruleset)  # before the first step: most of what can fail, fails here
    with _taken(steps):
        wrong = [step.what for step in make_steps(plan, observe(), unsure=False)]
        if wrong:
            raise KernelError(
                f"the kernel does not hold what was just put there ({'; '.join(wrong)}): another program changes the same "
                "state; find it with `nft monitor` and `ip monitor`"
            )
    return [step.what for step in steps]


def revert() -> list[str]:
    """Removes all that is ours in this namespace, whatever config put it there, and gives what was removed.

    Looks first, and raises with nothing changed if it cannot. Then a step that fails does not keep the others from being taken;
    the first error is raised at the end.
    """
    steps = revert_steps(observe())
    errors: list[TproxydError] = []
    for step in steps:
        try:
            step.do()
        except TproxydError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return [step.what for step in steps]


def stop_capture(plan: Plan) -> None:
    """No new connection is taken from here on; those that live go on. The guard, if there is one, refuses new ones."""
    nft.load(plan.capture_off)


def make_steps(plan: Plan, observed: Observed, *, unsure: bool = True) -> list[Step]:
    """From what is to what should be: add routes, add rules, exchange changed tables at once, remove what is left over.

    `unsure` is whether a table counts as changed of which it cannot be told (see `_changed_tables`).
    """
    routes = [routing.route_key(route) for route in plan.routes]
    rules = [routing.rule_key(rule) for rule in plan.rules]
    steps = [
        Step(
            f"add local route of IPv{key[0]} to table {key[1]}",
            partial(routing.add_route, key),
            partial(routing.delete_route, key),
        )
        for key in routes
        if key not in observed.routes
    ]
    steps += [
        Step(
            f"add ip rule {routing.describe_rule(key)}",
            partial(routing.add_rule, key),
            partial(routing.delete_rule, key),
        )
        for key in rules
        if key not in observed.rules
    ]
    changed = _changed_tables(plan, observed, unsure=unsure)
    left_over = [name for name in observed.tables if name not in plan.tables]
    if changed or left_over:
        what = [f"load table inet {name}" for name in changed] + [f"delete table inet {name}" for name in left_over]
        # A guard that is as planned must not be in the transaction: for some microseconds around its commit the old one is no longer
        # there for a packet for which the new one was not there yet (seen: one in some thousand connections slipped through).
        load = remove_tables([*changed, *left_over]) + "\n".join(plan.tables[name] for name in changed)
        undo = remove_tables(changed)
        undo += "\n".join(text for name, text in observed.tables.items() if name in changed or name in left_over)
        steps.append(Step(", ".join(what), partial(nft.load, load), partial(nft.load, undo)))
    steps += [_delete_rule(key) for key in observed.rules if key not in rules]
    steps += [_delete_route(key) for key in observed.routes if key not in routes]
    return steps


def _changed_tables(plan: Plan, observed: Observed, *, unsure: bool) -> list[str]:
    """Planned tables that are missing or otherwise than planned.

    Where nft does not list a table in the plan's own words, it is asked for its words. Where it cannot be (that takes a network
    namespace, and CAP_SYS_ADMIN), the table counts as changed if `unsure`.
    """

    def unlike(wanted: dict[str, str], names: Iterable[str]) -> list[str]:
        # Where nft breaks lines is left to nft.
        return [name for name in names if wanted.get(name, "").split() != observed.tables.get(name, "").split()]

    changed = unlike(plan.tables, plan.tables)
    missing = [name for name in changed if name not in observed.tables]
    if changed == missing:
        return changed
    try:
        return unlike(nft.spelled(plan.ruleset), changed)
    except TproxydError:
        return changed if unsure else missing


def revert_steps(observed: Observed) -> list[Step]:
    """Steering goes first, then what it needs, the guard last: until then new connections get what `when_down` says."""
    guards = [name for name in observed.tables if name.endswith("_guard")]
    steering = [name for name in observed.tables if name not in guards]
    steps = [_delete_table(name) for name in steering]
    steps += [_delete_rule(key) for key in observed.rules]
    steps += [_delete_route(key) for key in observed.routes]
    return steps + [_delete_table(name) for name in guards]


@contextmanager
def _taken(steps: list[Step]) -> Iterator[None]:
    """Takes the steps, and takes them back if one of them or the block fails."""
    with ExitStack() as undo:
        for step in steps:
            step.do()
            if step.undo is not None:
                undo.callback(step.undo)
        yield
        undo.pop_all()


def _delete_table(name: str) -> Step:
    return Step(f"delete table inet {name}", partial(nft.load, remove_tables([name])))


def _delete_rule(key: RuleKey) -> Step:
    return Step(
        f"delete ip rule {routing.describe_rule(key)}",
        partial(routing.delete_rule, key),
        partial(routing.add_rule, key),
    )


def _delete_route(key: RouteKey) -> Step:
    return Step(
        f"delete local route of IPv{key[0]} from table {key[1]}",
        partial(routing.delete_route, key),
        partial(routing.add_route, key),
    )
