"""Which capabilities this process has. Reads /proc/self/status; changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tproxyd.errors import CapabilityError

__all__ = ["require_capabilities"]

_BITS = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13}  # linux/capability.h


def require_capabilities(purpose: str, names: Sequence[str]) -> None:
    """Raises CapabilityError that names what is missing of `names` for `purpose`, and the way out."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    effective = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
    missing = [name for name in names if not effective >> _BITS[name] & 1]
    if missing:
        raise CapabilityError(
            f"{purpose} needs {' and '.join(missing)}, which this process does not have: run it as root, or in a systemd "
            f"unit add AmbientCapabilities={' '.join(missing)}"
        )
