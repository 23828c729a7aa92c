"""`tproxyd apply --confirm`: a change of the kernel's state that is taken back unless somebody says in time that it is good.

For machines that are far away: what may go wrong is that nobody can reach them any more. So nothing that a lost terminal does counts as
an answer, and nothing that it can block (its input, its output, a stop by Ctrl-Z) is waited for. What is killed outright takes nothing
back: its change stays.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Literal

import trio

from tproxyd import kernel
from tproxyd.config.wording import printable
from tproxyd.daemon.lock import Orders, UnknownOrderError, find_holder, reverted, send_order, serve_orders
from tproxyd.daemon.status import tell_waiting
from tproxyd.errors import KernelError, MissingError, TproxydError
from tproxyd.interceptor.threads import in_thread
from tproxyd.net.capabilities import require_capabilities
from tproxyd.plan import Plan

__all__ = ["apply_until_confirmed", "confirm"]

_NOW = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)  # take it back at once
# A terminal that is gone, and what would stop the process and its clock: Ctrl-Z, and reading from or writing to the terminal in the
# background.
_IGNORED = (signal.SIGHUP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
_RETRY = 1.0  # seconds; the terminal is not ours to read while this is in the background
_LONGEST = 1024  # bytes of a line on stdin

Outcome = Literal["confirmed", "reverted", "stopped", "too late"]


class _Wait:
    """What is waited for. The first outcome counts."""

    def __init__(self) -> None:
        self.outcome: Outcome | None = None
        self.ended = trio.Event()

    def end(self, outcome: Outcome) -> None:
        if self.outcome is None:
            self.outcome = outcome
        self.ended.set()

    async def confirm(self) -> str:
        """The order of `tproxyd confirm`."""
        if self.outcome not in (None, "confirmed"):
            raise KernelError("the change is being taken back already")
        self.end("confirmed")
        return ""

    async def revert(self) -> str:
        """The order of `tproxyd revert`: then there is nothing to confirm, and nothing to go back to."""
        if self.outcome is not None:
            raise KernelError("the change has just been confirmed, or is being taken back: try again")
        self.outcome = "stopped"  # if it fails
        try:
            removed = await in_thread(kernel.revert)
            self.outcome = "reverted"
        finally:
            self.ended.set()
        return reverted(removed, "waited for its change to be confirmed, and ends")


def apply_until_confirmed(plan: Plan, held: socket.socket, seconds: int) -> list[kernel.Change]:
    """Makes the kernel hold the plan, and gives what was changed once that is confirmed, by `yes` on stdin or the order `confirm` at the
    lock's socket; nothing to change needs no word.

    Otherwise the kernel holds again what it held before, and KernelError with exit code 1 says why; with 71, that it could not be
    taken back.
    """
    with _steadfast() as asked:
        before = kernel.observe()
        changes = kernel.apply(plan)
        if not changes:
            return changes
        outcome: Outcome | None = None
        try:
            outcome = trio.run(_wait, held, seconds, changes, asked)
        finally:
            if outcome not in ("confirmed", "reverted"):
                _take_back(before)
    if sys.stderr.isatty():
        with suppress(OSError):
            print(file=sys.stderr)  # behind the seconds
    if outcome == "confirmed":
        return changes
    error = KernelError(
        {
            "reverted": "not confirmed: `tproxyd revert` has removed everything meanwhile",
            "stopped": "stopped before it was confirmed: the change is taken back, and the kernel holds what it held before",
        }.get(
            str(outcome),
            f"not confirmed within {seconds} s: the change is taken back, and the kernel holds what it held before",
        )
    )
    error.exit_code = 1
    raise error


def confirm() -> int:
    """Confirms the change that waits in this network namespace. Raises MissingError if none does, and CapabilityError."""
    require_capabilities("confirming a change", ("CAP_NET_ADMIN",))
    try:
        answer = send_order("confirm")
    except UnknownOrderError:
        answer = None
    if answer is None:
        holder = find_holder()
        raise MissingError(
            "no change waits to be confirmed in this network namespace: its time is over and it has been taken back, it is confirmed "
            f"already, or `tproxyd apply --confirm` runs elsewhere{f' ({holder} serves here)' if holder else ''}"
        )
    print("confirmed: the change stays")
    return os.EX_OK


@contextmanager
def _steadfast() -> Iterator[list[int]]:
    """Signals of `_NOW` are collected, others ignored, so that a change is made or taken back as a whole. By handlers: a blocked signal
    could still be delivered to another thread."""
    asked: list[int] = []
    handlers = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in _NOW}
    handlers |= {number: signal.signal(number, signal.SIG_IGN) for number in _IGNORED}
    try:
        yield asked
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _take_back(before: kernel.Observed) -> None:
    try:
        kernel.restore(before)
    except TproxydError as error:
        raise KernelError(
            f"the change could not be taken back, and stays: {error}; `tproxyd revert` removes all of it"
        ) from error


async def _wait(held: socket.socket, seconds: int, changes: Sequence[kernel.Change], asked: Sequence[int]) -> Outcome:
    wait = _Wait()
    with trio.open_signal_receiver(*_NOW) as signals, trio.move_on_after(seconds) as time:
        if asked:
            wait.end("stopped")  # while the change was made
        orders: Orders = {
            "confirm": wait.confirm,
            "revert": wait.revert,
            "status": partial(_tell, time),
        }
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_orders, held, orders)
            nursery.start_soon(_listen_to_signals, signals, wait)
            nursery.start_soon(_listen_to_stdin, wait)
            nursery.start_soon(_show, time, changes)
            await wait.ended.wait()
            nursery.cancel_scope.cancel()
    return wait.outcome or "too late"


async def _tell(time: trio.CancelScope) -> str:
    return tell_waiting(time.deadline - trio.current_time())


async def _listen_to_signals(signals: AsyncIterator[int], wait: _Wait) -> None:
    async for _ in signals:
        wait.end("stopped")


async def _listen_to_stdin(wait: _Wait) -> None:
    """A line `yes` confirms. Its end does not, and nothing else that it says or does has a meaning."""
    line = b""
    while len(line) < _LONGEST:
        try:
            # In a thread that may be left behind: whatever stdin is, and whoever else reads from it, this must not block.
            chunk = await trio.to_thread.run_sync(os.read, sys.stdin.fileno(), _LONGEST, abandon_on_cancel=True)
        except OSError:
            await trio.sleep(_RETRY)
            continue
        if not chunk:
            return
        *lines, line = (line + chunk).split(b"\n")
        if any(one.strip() == b"yes" for one in lines):
            wait.end("confirmed")
            return


async def _show(time: trio.CancelScope, changes: Sequence[kernel.Change]) -> None:
    await _write(sys.stdout.fileno(), "".join(f"{printable(str(change))}\n" for change in changes))
    how = "type yes, or `tproxyd confirm` elsewhere, or it is taken back"
    if not sys.stderr.isatty():
        left = time.deadline - trio.current_time()
        await _write(sys.stderr.fileno(), f"tproxyd: {left:.0f} s to confirm the change: {how}\n")
        return
    while True:
        left = time.deadline - trio.current_time()
        await _write(sys.stderr.fileno(), f"\rtproxyd: {left:3.0f} s to confirm the change: {how} ")
        await trio.sleep(left % 1 or 1)


async def _write(fd: int, text: str) -> None:
    # As above: a terminal that takes nothing (Ctrl-S, a dead connection) must not keep the change from being taken back.
    with suppress(OSError):
        await trio.to_thread.run_sync(os.write, fd, text.encode(), abandon_on_cancel=True)
