"""Whether this process may do what a config needs (plan/privileges.py)."""

from __future__ import annotations

import logging

from tproxyd.config import Config
from tproxyd.errors import CapabilityError
from tproxyd.net.capabilities import missing_capabilities, unit_line, unprivileged_ports_from
from tproxyd.plan import Need, needs_of

__all__ = ["needs_here", "require_needs", "tell_lacking"]

_log = logging.getLogger(__name__)


def needs_here(config: Config, *, workloads: bool = False) -> tuple[Need, ...]:
    """What a config needs in the namespace of the calling thread."""
    return needs_of(config, workloads=workloads, unprivileged_from=unprivileged_ports_from())


def require_needs(config: Config, *, workloads: bool = False, given_up: bool = False) -> None:
    """Raises CapabilityError that names what this process lacks of it, and the line of a unit that gives all of it. `given_up`: it has served with another
    config, and has kept no more than that one needs."""
    needs = needs_here(config, workloads=workloads)
    lacking = [need for need in _missing(needs) if need.required]
    if lacking:
        line = unit_line(dict.fromkeys(need.capability for need in needs if not need.of_root))
        said = dict.fromkeys(f"{need.purpose} needs {need.capability}" for need in lacking)
        if given_up:
            raise CapabilityError(
                f"{', and '.join(said)}, which this process gave up at its start, or never had: restart it with this configuration"
            )
        raise CapabilityError(
            f"{', and '.join(said)}, which this process does not have: run it as root, or in a systemd unit write {line}"
        )


def tell_lacking(config: Config) -> None:
    """Warns of what works less well for want of a capability."""
    for need in _missing(needs_here(config)):
        if not (need.required or need.of_root):
            _log.warning(
                "%s needs %s, which this process does not have: %s", need.purpose, need.capability, need.instead
            )


def _missing(needs: tuple[Need, ...]) -> list[Need]:
    missing = missing_capabilities([need.capability for need in needs])
    return [need for need in needs if need.capability in missing]
