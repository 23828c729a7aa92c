"""How a daemon tells, at a restart, who cleans up after it that a successor takes over what it leaves. Loads nothing: clients wait meanwhile.

The word is a file in the unit's runtime directory, which the successor removes: the directory may outlive a stop, for others' sake. The unit has it removed earlier where the restart has become a
stop: that only systemd knows, and only root can always ask it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["announce", "arrive", "can_be_announced", "ended_well", "is_expected"]


def can_be_announced(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the unit has a RuntimeDirectory=."""
    return _mark(environment) is not None


def announce(environment: Mapping[str, str] = os.environ) -> None:
    """A successor comes. Raises OSError."""
    mark = _mark(environment)
    if mark is not None:
        mark.touch()


def arrive(environment: Mapping[str, str] = os.environ) -> None:
    """This is the successor, and no other one is expected from now on. Raises OSError."""
    mark = _mark(environment)
    if mark is not None:
        mark.unlink(missing_ok=True)


def is_expected(environment: Mapping[str, str] = os.environ) -> bool:
    """In ExecStopPost=: whether the daemon has ended in order, and has announced a successor."""
    mark = _mark(environment)
    return ended_well(environment) and mark is not None and mark.exists()


def ended_well(environment: Mapping[str, str] = os.environ) -> bool:
    """In ExecStopPost=: whether the daemon has ended in order."""
    return environment.get("SERVICE_RESULT") == "success"


def _mark(environment: Mapping[str, str]) -> Path | None:
    directory = environment.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return Path(directory) / "restarting" if directory else None
