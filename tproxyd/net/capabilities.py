"""Which capabilities this process has. Reads /proc/self/status; changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tproxyd.errors import CapabilityError

__all__ = ["CAPABILITIES", "missing_capabilities", "require_capabilities"]

CAPABILITIES = {
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
}
"""Those that matter here, and their bits (linux/capability.h)."""


def missing_capabilities(names: Sequence[str]) -> list[str]:
    """Which of the named capabilities are not in effect for this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    effective = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
    return [name for name in names if not effective >> CAPABILITIES[name] & 1]


def require_capabilities(purpose: str, names: Sequence[str]) -> None:
    """Raises CapabilityError that names what is missing of `names` for `purpose`, and the way out."""
    missing = missing_capabilities(names)
    if missing:
        raise CapabilityError(
            f"{purpose} needs {' and '.join(missing)}, which this process does not have: run it as root, or in a systemd "
            f"unit add AmbientCapabilities={' '.join(missing)}"
        )
