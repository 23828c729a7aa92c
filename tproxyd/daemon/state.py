"""`tproxyd apply` and `tproxyd revert`: kernel state without a daemon."""

from __future__ import annotations

import os
from collections.abc import Sequence

from tproxyd import kernel
from tproxyd.config import Config
from tproxyd.daemon.lock import ServedError, namespace_lock
from tproxyd.errors import ConfigError
from tproxyd.net.capabilities import require_capabilities
from tproxyd.plan import make_plan

__all__ = ["apply", "revert"]


def apply(config: Config) -> int:
    """Makes the kernel hold the config's plan; says what was changed. Raises TproxydError, with nothing changed."""
    if not config.captures:
        raise ConfigError(
            'nothing to capture: `capture.ports` is empty or `capture.mode` is "off"; name ports, e.g. ports = ["8080"]'
        )
    require_capabilities("changing the ruleset and the policy routing", ("CAP_NET_ADMIN",))
    plan = make_plan(config, surroundings=kernel.look_around())
    try:
        with namespace_lock("apply"):
            changes = kernel.apply(plan).changes
    except ServedError as error:
        error.exit_code = 1  # the contract's: apply did nothing, because a daemon serves here
        raise
    _tell(changes, nothing="nothing to change: the kernel holds the plan")
    return os.EX_OK


def revert() -> int:
    """Removes all that is ours; says what was removed."""
    require_capabilities("removing rules and tables", ("CAP_NET_ADMIN",))
    _tell(kernel.revert(), nothing="nothing to remove")
    return os.EX_OK


def _tell(changes: Sequence[str], *, nothing: str) -> None:
    for change in changes or [nothing]:
        print(change)
