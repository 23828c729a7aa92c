"""What the kernel holds: looked at, put there, taken away. Blocking calls, no trio; the only room that imports pyroute2.

Everything acts on the network namespace of the calling thread, and only on what is ours: nft tables `inet tproxyd` and
`inet tproxyd_*`, ip rules and local default routes with protocol 133. Nothing else is ever changed or removed.
"""

from tproxyd.kernel.nft import nft_version
from tproxyd.kernel.state import (
    Observed,
    apply,
    differences,
    is_applied,
    is_reverted,
    make_steps,
    observe,
    revert,
    revert_steps,
    stop_capture,
)
from tproxyd.kernel.surroundings import look_around

__all__ = [
    "Observed",
    "apply",
    "differences",
    "is_applied",
    "is_reverted",
    "look_around",
    "make_steps",
    "nft_version",
    "observe",
    "revert",
    "revert_steps",
    "stop_capture",
]
