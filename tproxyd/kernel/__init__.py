"""What the kernel holds: looked at, put there, taken away. Blocking calls, no trio; the only room that imports pyroute2.

Everything acts on the network namespace of the calling thread, and only on what is ours: nft tables `inet tproxyd` and
`inet tproxyd_*`, ip rules and local default routes with protocol 133. Nothing else is ever changed or removed.
"""

from tproxyd.kernel.events import Events
from tproxyd.kernel.foreign import (
    ForeignChain,
    ForeignNftRule,
    ForeignRoute,
    ForeignRule,
    Link,
    list_chains,
    list_links,
    list_routes,
    list_rules,
)
from tproxyd.kernel.nft import Library, Nft, Program, nft_version
from tproxyd.kernel.probe_link import PROBE_INTERFACE, ProbeWay, open_probe_link
from tproxyd.kernel.state import (
    Change,
    Kind,
    Observed,
    apply,
    differences,
    is_applied,
    is_reverted,
    make_steps,
    observe,
    restore,
    revert,
    revert_steps,
    stop_capture,
)
from tproxyd.kernel.surroundings import is_forwarding, is_loopback_up, look_around

__all__ = [
    "PROBE_INTERFACE",
    "Change",
    "Events",
    "ForeignChain",
    "ForeignNftRule",
    "ForeignRoute",
    "ForeignRule",
    "Kind",
    "Library",
    "Link",
    "Nft",
    "Observed",
    "ProbeWay",
    "Program",
    "apply",
    "differences",
    "is_applied",
    "is_forwarding",
    "is_loopback_up",
    "is_reverted",
    "list_chains",
    "list_links",
    "list_routes",
    "list_rules",
    "look_around",
    "make_steps",
    "nft_version",
    "observe",
    "open_probe_link",
    "restore",
    "revert",
    "revert_steps",
    "stop_capture",
]
