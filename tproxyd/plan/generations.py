"""Two generations of one daemon, for as long as a hand-over takes: each owns a steering table, and all else they share.

A table that is owned is for nobody else to exchange, so the next generation cannot take its predecessor's place by name. It takes the next name instead:
`tproxyd`, then `tproxyd_1` and `tproxyd_2` in turn. Knows what tables are called and how they are listed; refuses to know who lives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from tproxyd.plan.ruleset import CAPTURE_CHAIN, DEFAULT_NAME, is_owned

__all__ = ["free_generation", "generations", "next_generation", "of_others", "serving_generation"]

_CAPTURES_NOTHING = re.compile(rf"^\tchain {CAPTURE_CHAIN} \{{\n\t\}}$", re.MULTILINE)


def generations(name: str = DEFAULT_NAME) -> tuple[str, ...]:
    """What the steering tables of one who bears this name may be called, the usual one first."""
    return name, f"{name}_1", f"{name}_2"


def next_generation(steering: str, name: str = DEFAULT_NAME) -> str:
    """The name of the table that comes beside this one."""
    _, one, two = generations(name)
    return two if steering == one else one


def of_others(tables: Mapping[str, str], steering: str, name: str = DEFAULT_NAME) -> frozenset[str]:
    """Of tables as they are listed, the steering tables of other generations than that of `steering`. They go with their owners, and nobody else
    can take them away; one that is nobody's is left over, and not among them."""
    return frozenset(one for one in generations(name) if one != steering and is_owned(tables.get(one, "")))


def free_generation(tables: Mapping[str, str], name: str = DEFAULT_NAME) -> str:
    """What the table of a start is called: as usual, unless a generation that has lost its successor still drains by that name. One that captures is
    no such thing: it is in the way, and whoever loads the table says so."""
    return next((one for one in generations(name) if not _drains(tables.get(one, ""))), name)


def serving_generation(tables: Mapping[str, str], name: str = DEFAULT_NAME) -> str:
    """Which of them is the one that captures, or would be."""
    there = [one for one in generations(name) if one in tables]
    return next((one for one in reversed(there) if not _drains(tables[one])), there[0] if there else name)


def _drains(listing: str) -> bool:
    return is_owned(listing) and _CAPTURES_NOTHING.search(listing) is not None
