"""Pure: a Config becomes what the kernel should hold.

`make_plan` gives a frozen Plan (ruleset text, ip rules, local routes, sysctls); `render` shows it in the four formats.
Nothing is opened, read or changed here, and neither trio nor pyroute2 is imported: `tproxyd plan` needs no root.
The text that is shown is the text that is applied.
"""

from tproxyd.plan.model import Family, LocalRoute, Marks, Plan, Rule, Surroundings
from tproxyd.plan.plan import PROTOCOL, SUPPORTED_MARKS, make_marks, make_plan
from tproxyd.plan.render import FORMATS, render
from tproxyd.plan.ruleset import STATE, is_owned, remove_tables

__all__ = [
    "FORMATS",
    "PROTOCOL",
    "STATE",
    "SUPPORTED_MARKS",
    "Family",
    "LocalRoute",
    "Marks",
    "Plan",
    "Rule",
    "Surroundings",
    "is_owned",
    "make_marks",
    "make_plan",
    "remove_tables",
    "render",
]
