"""What the keepers of one program have in common, so that hundreds of them are quick and small.

Workloads mostly have equal configs in equal surroundings: their plan is made once, its text is there once, and how nft spells it here and
whether this kernel takes it is found out once. A libnftables context, 0.7 MiB, is open for the length of a step only.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar, cast

from tproxyd import kernel
from tproxyd.config import Config
from tproxyd.plan import Plan, Surroundings, make_plan

__all__ = ["PlanBook"]

H = TypeVar("H", bound=Hashable)

_BESIDES = (
    20_000  # more in a table than is planned is looked at piece by piece; then it is known to be otherwise without
)
_MOST = 64  # plans, of some 40 KB; more are made anew, in a millisecond each


class PlanBook:
    """Used from many threads: nothing here takes more than one step on what is shared. Close it, when nobody keeps a namespace with it.

    `at_once`: in so many namespaces nft may be spoken to at a time. Best made before the program has opened many files (kernel/passing.py).
    """

    def __init__(self, at_once: int = 4) -> None:
        self._files = kernel.LowFiles(at_once)
        self._plans: dict[Hashable, Plan] = {}
        self._same: dict[Hashable, Hashable] = {}
        self._taken: set[str] = set()  # rulesets
        self._spellings: dict[str, str] = {}
        self._has_nft = False

    def close(self) -> None:
        """Harmless when repeated."""
        self._files.close()

    def plan(
        self,
        config: Config,
        surroundings: Surroundings,
        *,
        stays: bool,
        owned: bool,
        capturing: bool,
        name: str,
        living: tuple[Config, ...] = (),
        steering: str | None = None,
    ) -> Plan:
        """What `make_plan` makes of these; not to be changed, because others have the same one."""
        key = (config, surroundings, stays, owned, capturing, name, living, steering)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MOST:
                self._plans, self._taken = {}, set()
            plan = make_plan(
                config,
                surroundings=surroundings,
                stays=stays,
                owned=owned,
                capturing=capturing,
                name=name,
                living=living,
                steering=steering,
            )
            self._plans[key] = plan
        return plan

    def same(self, value: H) -> H:
        """The value itself, or an equal one that is there already."""
        if len(self._same) >= _MOST:
            self._same = {}
        return cast(H, self._same.setdefault(value, value))

    def apply(self, plan: Plan, nft: kernel.Nft) -> list[kernel.Change]:
        """`kernel.apply`, that asks beforehand only once whether this kernel takes a ruleset: that costs as much as putting it there, and
        waits for all CPUs."""
        changes = kernel.apply(plan, nft, checked=plan.ruleset in self._taken)
        self._taken.add(plan.ruleset)
        return changes

    def require_nft(self) -> None:
        """Raises MissingError where there is no nft, which `tproxyd revert` will need, or too old a one."""
        if not self._has_nft:
            kernel.find_program()
            kernel.require_nft()
            self._has_nft = True

    def open_nft(self, listed: tuple[int, dict[str, str]] | None, plan: Plan) -> kernel.Passing:
        """For one step in the calling thread's namespace, what was listed there the last time, and what is to be there. A context manager."""
        # An element is followed by a comma, and is two in the kernel where it is a range.
        most = _BESIDES + 2 * max(text.count(",") for text in plan.tables.values())
        return kernel.Passing(self._files, self._spellings, listed, most)

    def shared_texts(self, listed: tuple[int, dict[str, str]] | None, plan: Plan) -> tuple[int, dict[str, str]] | None:
        """The same, with the texts that are there already in place of equal ones."""
        if listed is None:
            return None
        generation, tables = listed
        known = {text: text for name in tables if (text := plan.tables.get(name)) is not None}
        known |= {text: text for one in [*known] if (text := self._spellings.get(one)) is not None}
        return generation, {name: known.get(text, text) for name, text in tables.items()}
