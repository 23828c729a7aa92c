"""`tproxyd apply` and `tproxyd revert`: kernel state without a daemon."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tproxyd import kernel
from tproxyd.config import Config
from tproxyd.daemon.lock import ServedError, lock_holder, namespace_lock, send_order
from tproxyd.net.capabilities import require_capabilities
from tproxyd.plan import make_plan

__all__ = ["apply", "revert"]


def apply(config: Config) -> int:
    """Makes the kernel hold the config's plan, to stay; says what was changed. Raises TproxydError, with nothing changed."""
    config.require_captures()
    require_capabilities("changing the ruleset and the policy routing", ("CAP_NET_ADMIN",))
    try:
        with namespace_lock("apply"), _uninterrupted():
            found = kernel.preflight(config)
            changes = kernel.apply(make_plan(config, surroundings=found.surroundings))
    except ServedError as error:
        error.exit_code = 1  # the contract's: apply did nothing, because a daemon serves here
        raise
    for warning in found.warnings:
        print(f"tproxyd: warning: {warning}", file=sys.stderr)
    _tell(changes, nothing="nothing to change: the kernel holds the plan")
    return os.EX_OK


def revert() -> int:
    """Removes all that is ours; says what was removed. Under a daemon that serves, the daemon does it, and is named."""
    require_capabilities("removing rules and tables", ("CAP_NET_ADMIN",))
    holder = lock_holder()
    answer = send_order("revert") if holder else None
    if answer is not None:
        removed: Sequence[object] = answer.splitlines()
    else:
        holder = None  # it has ended
        with _uninterrupted():
            removed = kernel.revert()
    _tell(removed, nothing="nothing to remove")
    if holder:
        print(
            f"tproxyd: warning: {holder} serves this network namespace and captures nothing from now on; restart or stop it",
            file=sys.stderr,
        )
    return os.EX_OK


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the few tenths of a second that a change takes: half of one would be left."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _tell(changes: Sequence[object], *, nothing: str) -> None:
    for change in changes or [nothing]:
        print(change)
