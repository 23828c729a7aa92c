"""`tproxyd apply` and `tproxyd revert`: kernel state without a daemon."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from tproxyd import kernel
from tproxyd.config import Config
from tproxyd.config.wording import printable
from tproxyd.daemon.admin_socket import remove_stale
from tproxyd.daemon.comparison import ssh_ports_here
from tproxyd.daemon.lock import ServedError, StrangerError, find_holder, namespace_lock, send_order
from tproxyd.errors import KernelError
from tproxyd.net.capabilities import require_capabilities
from tproxyd.plan import DEFAULT_NAME, GUARD, UNOWNED_BYPASS, Surroundings, make_plan, ssh_remarks, table_names

__all__ = ["apply", "revert", "revert_after_exit"]


def apply(config: Config, *, seconds: int | None = None) -> int:
    """Makes the kernel hold the config's plan, to stay; says what was changed. With `seconds`, takes it back unless it is confirmed
    in that time. Raises TproxydError, with nothing changed."""
    config.require_captures()
    require_capabilities("changing the ruleset and the policy routing", ("CAP_NET_ADMIN",))
    try:
        with namespace_lock("apply") as held:
            found = kernel.preflight(config, ssh_ports=ssh_ports_here())
            plan = make_plan(config, surroundings=found.surroundings)
            _tell_ssh(config, found.surroundings)
            for warning in found.warnings:
                print(f"tproxyd: warning: {printable(warning)}", file=sys.stderr)
            if seconds is None:
                with _uninterrupted():
                    changes = kernel.apply(plan)
            else:
                from tproxyd.daemon.confirm import apply_until_confirmed  # late: who does not wait need not load it

                changes = apply_until_confirmed(plan, held, seconds)
    except ServedError as error:
        error.exit_code = 1  # the contract's: apply did nothing, because a daemon serves here
        raise
    if seconds is not None and changes:
        print("confirmed: the change stays")
    else:
        _tell(changes, nothing="nothing to change: the kernel holds the plan")
    if UNOWNED_BYPASS in plan.losses:
        print(f"tproxyd: warning: {UNOWNED_BYPASS}", file=sys.stderr)
    return os.EX_OK


def revert(name: str = DEFAULT_NAME) -> int:
    """Removes all that is ours, with tables of this name; says what was removed. Who has this namespace, a daemon, does it, and is named; so
    is a stranger who has its lock, and does not. Raises ConfigError for a name that is none, KernelError where a program keeps this namespace."""
    table_names(name)
    require_capabilities("removing rules and tables", ("CAP_NET_ADMIN",))
    holder = find_holder()
    if name != DEFAULT_NAME and holder is not None and holder.trusted and not holder.embeds:
        raise KernelError(
            f"{holder} serves this network namespace: its ip rules and routes could not be told from those of {name!r}; stop it first"
        )
    remark = ""
    try:
        answer = send_order("revert")
    except StrangerError as error:
        answer, remark = None, str(error)
    if answer is not None:
        text, _, remark = answer.partition("\n\n")
        removed: Sequence[object] = text.splitlines()
    else:  # nobody of ours has it
        with _uninterrupted():
            removed = kernel.revert(name=name)
            if name == DEFAULT_NAME and holder is None and (left := remove_stale("auto")) is not None:
                removed = [*removed, f"remove the administrator's socket {left}"]
    _tell(removed, nothing="nothing to remove")
    if remark:
        print(f"tproxyd: warning: {printable(remark)}", file=sys.stderr)
    return os.EX_OK


def revert_after_exit(*, clean: bool) -> int:
    """What ExecStopPost= calls. After a `clean` end of a daemon it removes everything, after any other one steering, and what refuses in its place stays
    (when_down = "refuse"). Nothing is changed where a successor serves already, nor what `tproxyd apply` has put there. Says what was removed. Raises
    TproxydError."""
    require_capabilities("removing rules and tables", ("CAP_NET_ADMIN",))
    with ExitStack() as stack:
        try:
            # Held, so that nobody begins meanwhile whose state would be taken for the old one's.
            stack.enter_context(namespace_lock("revert"))
        except ServedError:
            holder = find_holder()
            if holder is None or holder.trusted:
                print(f"nothing removed: {holder or 'another process'} serves this network namespace, or is about to")
                return os.EX_OK
            print(f"tproxyd: warning: {printable(holder.stranger)}", file=sys.stderr)
        stack.enter_context(_uninterrupted())
        left = [f"remove the administrator's socket {path}"] if (path := remove_stale("auto")) is not None else []
        if kernel.is_applied():
            _tell(left, nothing="nothing removed")
            print("the rest stays: `tproxyd apply` has put it there")
        else:
            _tell([*kernel.revert(but=() if clean else (GUARD,)), *left], nothing="nothing to remove")
    return os.EX_OK


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the few tenths of a second that a change takes: half of one would be left."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _tell_ssh(config: Config, surroundings: Surroundings) -> None:
    spared, taken = ssh_remarks(config, surroundings)
    if spared:
        print(f"tproxyd: {spared}", file=sys.stderr)
    if taken:
        print(f"tproxyd: warning: {taken}", file=sys.stderr)


def _tell(changes: Sequence[object], *, nothing: str) -> None:
    for change in changes or [nothing]:
        print(printable(str(change)))
