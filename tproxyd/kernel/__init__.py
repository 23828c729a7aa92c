"""What the kernel holds: looked at, put there, taken away. Blocking calls, no trio.

Everything acts on the network namespace of the calling thread, and only on what is ours: nft tables `inet tproxyd` and
`inet tproxyd_*`, ip rules and local default routes with protocol 133. Nothing else is ever changed or removed.
"""

from tproxyd.kernel.events import Events
from tproxyd.kernel.foreign_chains import ChainRule, ForeignChain, list_chains
from tproxyd.kernel.foreign_routing import (
    ForeignRoute,
    ForeignRule,
    has_routes,
    list_foreign_routes,
    list_foreign_rules,
)
from tproxyd.kernel.links import Link, list_links
from tproxyd.kernel.neighbours import Neighbour, legacy_tables, look_at_neighbours
from tproxyd.kernel.nft import Library, Nft, Program, find_program, nft_version
from tproxyd.kernel.packet_counters import packet_counts
from tproxyd.kernel.passing import LowFiles, Passing
from tproxyd.kernel.preflight import Preflight, is_too_old, look_ahead, preflight, require_nf_tables, require_nft
from tproxyd.kernel.probe_link import PROBE_INTERFACE, ProbeWay, open_probe_link
from tproxyd.kernel.state import (
    Change,
    Kind,
    Observed,
    apply,
    check,
    differences,
    expected,
    is_applied,
    make_steps,
    observe,
    planned,
    remove_steering,
    repair,
    restore,
    revert,
    revert_steps,
    sections,
    stop_capture,
    without_others,
)
from tproxyd.kernel.surroundings import (
    bridge_sysctl,
    find_ssh_ports,
    has_bridges,
    is_bridge,
    is_forwarding,
    is_loopback_up,
    look_around,
)

__all__ = [
    "PROBE_INTERFACE",
    "ChainRule",
    "Change",
    "Events",
    "ForeignChain",
    "ForeignRoute",
    "ForeignRule",
    "Kind",
    "Library",
    "Link",
    "LowFiles",
    "Neighbour",
    "Nft",
    "Observed",
    "Passing",
    "Preflight",
    "ProbeWay",
    "Program",
    "apply",
    "bridge_sysctl",
    "check",
    "differences",
    "expected",
    "find_program",
    "find_ssh_ports",
    "has_bridges",
    "has_routes",
    "is_applied",
    "is_bridge",
    "is_forwarding",
    "is_loopback_up",
    "is_too_old",
    "legacy_tables",
    "list_chains",
    "list_foreign_routes",
    "list_foreign_rules",
    "list_links",
    "look_ahead",
    "look_around",
    "look_at_neighbours",
    "make_steps",
    "nft_version",
    "observe",
    "open_probe_link",
    "packet_counts",
    "planned",
    "preflight",
    "remove_steering",
    "repair",
    "require_nf_tables",
    "require_nft",
    "restore",
    "revert",
    "revert_steps",
    "sections",
    "stop_capture",
    "without_others",
]
