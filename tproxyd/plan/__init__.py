"""Pure: a Config becomes what the kernel should hold.

`make_plan` gives a frozen Plan (ruleset text, ip rules, local routes, sysctls); `render` shows it in the four formats.
`unified_diff` compares two states.
Nothing is opened, read or changed here, and neither trio nor pyroute2 is imported: `tproxyd plan` needs no root.
The text that is shown is the text that is applied.
"""

from tproxyd.plan.diff import Sections, unified_diff
from tproxyd.plan.generations import free_generation, generations, next_generation, of_others, serving_generation
from tproxyd.plan.model import Family, LocalRoute, Marks, Plan, Rule, Surroundings
from tproxyd.plan.plan import PROTOCOL, SUPPORTED_MARKS, UNOWNED_BYPASS, make_marks, make_plan
from tproxyd.plan.privileges import Need, needs_of, relay_capabilities
from tproxyd.plan.render import FORMATS, render
from tproxyd.plan.ruleset import (
    CAPTURE_CHAIN,
    DEFAULT_NAME,
    GUARD,
    STATE,
    STEERING,
    exchange_tables,
    is_owned,
    match_mark,
    remove_tables,
    table_names,
    waiting_table,
)
from tproxyd.plan.ssh import spared_in, ssh_remarks

__all__ = [
    "CAPTURE_CHAIN",
    "DEFAULT_NAME",
    "FORMATS",
    "GUARD",
    "PROTOCOL",
    "STATE",
    "STEERING",
    "SUPPORTED_MARKS",
    "UNOWNED_BYPASS",
    "Family",
    "LocalRoute",
    "Marks",
    "Need",
    "Plan",
    "Rule",
    "Sections",
    "Surroundings",
    "exchange_tables",
    "free_generation",
    "generations",
    "is_owned",
    "make_marks",
    "make_plan",
    "match_mark",
    "needs_of",
    "next_generation",
    "of_others",
    "relay_capabilities",
    "remove_tables",
    "render",
    "serving_generation",
    "spared_in",
    "ssh_remarks",
    "table_names",
    "unified_diff",
    "waiting_table",
]
