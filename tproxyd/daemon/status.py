"""`tproxyd status`: what is planned and what the kernel holds, who serves, what lives. The daemon's side of it, and the verb.

A daemon tells about itself over the order channel; what the kernel holds is looked at here.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tproxyd import __version__, kernel
from tproxyd.config import Config
from tproxyd.config.wording import printable
from tproxyd.daemon.comparison import DIFFERENT, compare
from tproxyd.daemon.lock import KeptError, StrangerError, find_holder, send_order
from tproxyd.errors import KernelError
from tproxyd.kernel import Change
from tproxyd.net.capabilities import require_capabilities
from tproxyd.net.sockets import format_address
from tproxyd.plan import STATE, is_owned

if TYPE_CHECKING:
    from tproxyd.interceptor import Interceptor

__all__ = ["Serving", "Waiting", "make_serving", "status", "tell_serving", "tell_waiting"]


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """What has been counted since the start; `outcomes` of connections that have ended."""

    accepted: int
    outcomes: dict[str, int]
    bytes_from_client: int
    bytes_from_upstream: int


class Serving(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="daemon"):
    """What a daemon tells about itself. `trouble`: why it is not ready, empty if it is; `differences`: between its own plan and the kernel;
    `admin_socket` is where the administrator asks it; `last_reload_error`: why the configuration in force is an older one, empty if it is not;
    `draining`: the pid of the generation before it, which still has connections since a hand-over."""

    pid: int
    version: str
    uptime_s: float
    listen: list[str]
    marks: dict[str, str]
    capturing: bool
    connections: int
    counters: Counted
    repairs: dict[str, int]
    trouble: str
    differences: list[Change]
    admin_socket: str | None = None
    last_reload_error: str = ""
    draining: int | None = None


class Waiting(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="apply"):
    """What `tproxyd apply --confirm` tells about itself."""

    pid: int
    seconds_left: float


class _Table(msgspec.Struct, frozen=True):
    name: str
    owned: bool


class _Held(msgspec.Struct, frozen=True):
    rules: list[str]
    routes: list[str]
    tables: list[_Table]


class _Report(msgspec.Struct, frozen=True, kw_only=True):
    """`applied`: it is to stay when a daemon stops. `planned_by`: "daemon", or the file with which the kernel is compared; null with
    `differences` null: nobody says what should be there."""

    daemon: Serving | None
    waiting: Waiting | None
    applied: bool
    observed: _Held
    planned_by: str | None
    differences: list[Change] | None


async def make_serving(
    interceptor: Interceptor,
    trouble: str,
    *,
    began: float,
    admin_socket: str | None = None,
    last_reload_error: str = "",
) -> Serving:
    """What a daemon tells of itself; `began` is when it was ready, on time.monotonic()."""
    counters = await interceptor.counters()
    marks = interceptor.marks
    return Serving(
        pid=os.getpid(),
        version=__version__,
        uptime_s=round(time.monotonic() - began, 3),
        listen=[format_address(address) for address in interceptor.listen],
        marks={"steering": str(marks.steering), "upstream": str(marks.upstream)},
        capturing=interceptor.capturing,
        connections=counters.active,
        counters=Counted(
            accepted=counters.accepted,
            outcomes={outcome: number for outcome, number in counters.outcomes.items() if number},
            bytes_from_client=counters.bytes_from_client,
            bytes_from_upstream=counters.bytes_from_upstream,
        ),
        repairs=dict(interceptor.repairs),
        trouble=trouble,
        differences=await interceptor.differences(),
        admin_socket=admin_socket,
        last_reload_error=last_reload_error,
    )


def tell_serving(serving: Serving) -> str:
    """The daemon's answer to the order `status`."""
    return _encode(serving)


def tell_waiting(seconds_left: float) -> str:
    """The answer of `tproxyd apply --confirm`."""
    return _encode(Waiting(pid=os.getpid(), seconds_left=round(seconds_left, 1)))


def status(config: Config | None, path: Path | None, *, as_json: bool) -> int:
    """Prints how things stand. With a config, what it plans is compared with the kernel, else what the daemon plans.

    0 when the kernel holds what is planned; DIFFERENT when not, or when something is there and nobody says what should be; 69
    when there is no daemon and nothing of ours. Raises TproxydError.
    """
    require_capabilities("looking at the ruleset", ("CAP_NET_ADMIN",))
    told = _ask()
    daemon = told if isinstance(told, Serving) else None
    differences = daemon.differences if daemon is not None else None
    if config is not None:
        found = compare(config, served=daemon is not None)
        observed, differences = found.observed, found.changes
    else:
        observed = kernel.observe()
    lines = kernel.sections(observed)
    report = _Report(
        daemon=daemon,
        waiting=told if isinstance(told, Waiting) else None,
        applied=STATE in observed.tables,
        observed=_Held(
            rules=lines["ip rules"],
            routes=lines["local routes"],
            tables=[_Table(name, is_owned(text)) for name, text in sorted(observed.tables.items())],
        ),
        planned_by=str(path) if config is not None else "daemon" if daemon else None,
        differences=differences,
    )
    if as_json:
        sys.stdout.write(msgspec.json.format(_encode(report), indent=2) + "\n")
    else:
        width = max(len(name) for name, _ in _rows(report))
        for name, text in _rows(report):
            print(f"{name:{width}}  {printable(text)}")
    if daemon is None and not (observed.rules or observed.routes or observed.tables):
        return os.EX_UNAVAILABLE
    return os.EX_OK if differences == [] else DIFFERENT


def _ask() -> Serving | Waiting | None:
    """What the one tells that has this namespace, if it is one of ours. Raises KernelError if it does not."""
    try:
        answer = send_order("status")
    except (KeptError, StrangerError) as error:
        print(f"tproxyd: warning: {error}", file=sys.stderr)
        return None
    if answer is None:
        return None
    try:
        return msgspec.json.decode(answer, type=Serving | Waiting)
    except msgspec.MsgspecError as error:
        raise KernelError(
            f"{find_holder() or 'the daemon'} answers in another way than expected ({error}): is it of another version?"
        ) from error


def _encode(content: object) -> str:
    return msgspec.json.encode(content).decode()


def _rows(report: _Report) -> Iterator[tuple[str, str]]:
    daemon = report.daemon
    if daemon is None:
        waiting = report.waiting
        yield "daemon", "none"
        if waiting is not None:
            yield (
                "apply",
                f"pid {waiting.pid} waits {waiting.seconds_left:.0f} s for `tproxyd confirm`, and then takes its change back",
            )
    else:
        yield "daemon", f"pid {daemon.pid}, version {daemon.version}, ready for {_duration(daemon.uptime_s)}"
        yield "capture", "on" if daemon.capturing else "off"
        yield "listen", ", ".join(daemon.listen)
        yield "admin", daemon.admin_socket or "no socket"
        yield "marks", ", ".join(f"{name} {mark}" for name, mark in daemon.marks.items())
        counters = daemon.counters
        yield "connections", f"{daemon.connections} living, {counters.accepted} accepted since the start"
        ended = [f"{name} {number}" for name, number in sorted(counters.outcomes.items())]
        yield "ended", ", ".join(ended) or "none"
        yield "bytes", f"{counters.bytes_from_client} from clients, {counters.bytes_from_upstream} from upstreams"
        yield "repairs", ", ".join(f"{kind} {number}" for kind, number in sorted(daemon.repairs.items())) or "none"
        if daemon.draining is not None:
            yield "draining", f"pid {daemon.draining}, the generation before it, until its connections have ended"
        if daemon.trouble:
            yield "trouble", daemon.trouble
        if daemon.last_reload_error:
            yield "reload", f"the last one failed, an older configuration is in force: {daemon.last_reload_error}"
    held = report.observed
    if held.rules or held.routes or held.tables:
        tables = [f"{table.name} (owned)" if table.owned else table.name for table in held.tables]
        yield (
            "kernel",
            f"{len(held.rules)} ip rules, {len(held.routes)} local routes, tables inet: {', '.join(tables) or 'none'}",
        )
    else:
        yield "kernel", "nothing of tproxyd's"
    yield "applied", "yes: stays until `tproxyd revert`" if report.applied else "no"
    planned = "the daemon" if report.planned_by == "daemon" else report.planned_by
    if report.differences is None:
        yield "planned", "not known: give the configuration with -c"
    elif not report.differences:
        yield "planned", f"by {planned}: the kernel holds it"
    else:
        yield "planned", f"by {planned}: the kernel does not hold it; see `tproxyd plan --diff`"
        for change in report.differences:
            yield "", change.what


def _duration(seconds: float) -> str:
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s" if minutes else f"{left} s"
