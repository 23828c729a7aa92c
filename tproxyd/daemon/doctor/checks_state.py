"""Checks of what is ours: the daemon, its listeners, and its state in the kernel against what is planned."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tproxyd.daemon.doctor.model import Check, Evidence, Finding, of_tproxy_mode, quoted
from tproxyd.kernel.routing import RuleKey, describe_rule, route_key, rule_key
from tproxyd.net.sock_diag import TcpSocket
from tproxyd.net.sockets import format_address
from tproxyd.plan import GUARD, PROTOCOL, Rule, needs_of, serving_generation

__all__ = ["CHECKS"]

_FEW_FILES = 4096  # two thousand connections at most
_NEARLY = 0.9


def nothing_captured(e: Evidence) -> Iterator[Finding]:
    off = e.config.capture.mode == "off"
    named = 'mode = "tproxy"' if off else 'ports = ["8080"]'
    if not e.config.captures or not e.captured_ports:
        yield Finding(
            seen=f"in {e.configuration} every port of `capture.ports` is excluded (`capture.exclude_ports`, listen.port)"
            if e.config.captures
            else f'`capture.mode` is "off" in {e.configuration}'
            if off
            else f"`capture.ports` is empty in {e.configuration}",
            why="nothing is captured",
            remedy=f"# in {e.configuration}, under [capture]: {named}\n{e.restart()}",
        )


def not_serving(e: Evidence) -> Iterator[Finding]:
    # Without privileges what is applied shows itself by its ip rules; in redirect mode, which has none, by its listener.
    applied = e.has_own_rules or (e.observed is None and e.config.redirects and any(_planned_listeners(e)))
    here = e.is_meant_to_capture or applied or _left(e) or e.holder is not None
    if e.config.captures and not here and e.refused_start is None:
        yield Finding(
            seen="no daemon serves this network namespace, and nothing is applied",
            why="nothing is captured: clients reach the destination directly",
            remedy=e.start(),
        )


def start_refused(e: Evidence) -> Iterator[Finding]:
    if e.refused_start is not None:
        yield Finding(
            seen=f"no daemon serves this network namespace, and none can start: {e.refused_start}",
            why="nothing is captured: clients reach the destination directly",
            remedy=f"{_way_out(e.refused_start)}\n{e.start()}",
        )


def left_by_the_dead(e: Evidence) -> Iterator[Finding]:
    if not (e.is_meant_to_capture or e.is_reverted) and _left(e):
        tables = e.observed.tables if e.observed is not None else {}
        # In redirect mode there is a guard's table in any case, and NAT does not look for a listener.
        refuses = "reject" in tables.get(GUARD, "") or "redirect to" in tables.get(serving_generation(tables), "")
        yield Finding(
            seen=f"no daemon serves this network namespace, but its state is here: {', '.join(_left(e))}",
            why='a daemon has died: new connections are refused (when_down = "refuse")'
            if refuses
            else "a daemon has died; new connections pass it by" + ("" if e.config.redirects else ", live ones hang"),
            # Refused is what clients are meant to be while nobody serves.
            remedy=f"{e.start()}\n# or let clients go directly to the destination: tproxyd revert"
            if refuses
            else "tproxyd revert",
        )


def name_held_by_a_stranger(e: Evidence) -> Iterator[Finding]:
    if e.holder is not None and not e.holder_trusted:
        yield Finding(
            seen=f"the lock of this network namespace is held by {e.holder.name} (pid {e.holder.pid}, uid {e.holder.uid}), which is no tproxyd: it took it without CAP_NET_ADMIN",
            why="no daemon can start in this network namespace",
            remedy=f"kill {e.holder.pid}",
        )


def daemon_stopped(e: Evidence) -> Iterator[Finding]:
    for process in (e.holder, *e.relays):
        if process is not None and e.serves and process.stopped:
            yield Finding(
                seen=f"{process.name} (pid {process.pid}) of the daemon is stopped (SIGSTOP, or a debugger)",
                why="clients connect, and then hang: the kernel makes the connections, nobody takes them",
                remedy=f"kill -CONT {process.pid}",
            )


def daemon_draining(e: Evidence) -> Iterator[Finding]:
    if e.draining:
        yield Finding(
            seen="the daemon is stopping: it waits for its connections to end (drain.timeout)",
            why="it captures no new connections: they get what `when_down` says",
            remedy=e.start(),
            warning=True,
        )


def daemon_reverted(e: Evidence) -> Iterator[Finding]:
    if e.is_reverted:
        yield Finding(
            seen="`tproxyd revert` was given to the daemon: it has taken everything away that was in the kernel",
            why="it captures no new connections, and puts nothing back before it is started again",
            remedy=e.start(),
        )


def other_configuration(e: Evidence) -> Iterator[Finding]:
    if e.runs_another_configuration:
        yield Finding(
            seen=f"the daemon runs another configuration than {e.configuration}: the kernel holds what the daemon plans",
            why="what is said here of this configuration is not what clients meet; the daemon undoes what would be mended for it",
            remedy=e.start(f"tproxyd run{e.option}"),
        )


def capability_missing(e: Evidence) -> Iterator[Finding]:
    needs = [
        need
        for need in needs_of(
            e.config, unprivileged_from=int(e.sysctls.get("net/ipv4/ip_unprivileged_port_start", 1024))
        )
        if not need.of_root
    ]
    for process in (e.holder, *e.relays):
        if process is None or not e.serves:
            continue
        # A relay process has none that only the daemon needs; the daemon has all that it passes on.
        missing = [
            need
            for need in needs
            if need.capability not in process.capabilities and (process is e.holder or need.process == "relay")
        ]
        if missing:
            names = ", ".join(sorted({need.capability for need in missing}))
            yield Finding(
                seen=f"pid {process.pid} of the daemon lacks {names}",
                why="; ".join(
                    f"{need.purpose} needs {need.capability}{f', and without {need.instead}' * (not need.required)}"
                    for need in missing
                ),
                remedy=f"# as root, or by what gives it {names}, too:\n{e.restart()}",
                warning=not any(need.required for need in missing),
            )
            return  # the others have the same


def open_files(e: Evidence) -> Iterator[Finding]:
    raise_it = f"ulimit -n 524288\n{e.restart()}"
    for process in (e.holder, *e.relays) if e.serves else ():
        if process is None or process.files is None or process.most_files is None:
            continue
        if process.files >= process.most_files * _NEARLY:
            yield Finding(
                seen=f"pid {process.pid} of the daemon has {process.files} of {process.most_files} files open",
                why="it takes no further connections: clients wait in the listener's queue",
                remedy=raise_it,
            )
            return
        if process.most_files < _FEW_FILES and e.config.limits.max_connections == "auto":
            yield Finding(
                seen=f"pid {process.pid} of the daemon may have {process.most_files} files open",
                why=f"that is room for less than {process.most_files // 2} connections; further clients wait in the listener's queue",
                remedy=raise_it,
                warning=True,
            )
            return


def ip_rule_missing(e: Evidence) -> Iterator[Finding]:
    for rule in _missing_rules(e):
        if not _astray(e, rule):
            yield Finding(
                seen=f"the ip rule `{describe_rule(rule_key(rule))}` is missing",
                why=rule.why,
                remedy=f"ip -{rule.family} rule add {rule.selector()} protocol {PROTOCOL}",
            )


def wrong_table(e: Evidence) -> Iterator[Finding]:
    for rule in _missing_rules(e):
        for key in _astray(e, rule):
            yield Finding(
                seen=f"the ip rule at priority {rule.priority} of IPv{rule.family} is `{describe_rule(key)}`, not `{rule.selector()}`",
                why=rule.why + "; as it is, packets go somewhere else",
                remedy=f"ip -{rule.family} rule add {rule.selector()} protocol {PROTOCOL}\n"
                f"ip -{rule.family} rule del {quoted(describe_rule(key).removeprefix(f'-{rule.family} '))} protocol {PROTOCOL}",
            )


def route_missing(e: Evidence) -> Iterator[Finding]:
    if e.observed is None or not _is_compared(e) or not e.loopback_up:
        return  # while lo is down there can be none of IPv6; that is told as such
    for route in e.plan.routes:
        if route_key(route) not in e.observed.routes:
            yield Finding(
                seen=f"the IPv{route.family} route `{route.selector()}` is missing",
                why="steered packets to foreign addresses find no way to the listener: connections hang",
                remedy=f"ip -{route.family} route add {route.selector()} proto {PROTOCOL}",
            )


@of_tproxy_mode
def foreign_route(e: Evidence) -> Iterator[Finding]:
    for route in e.routes:
        if route.delivers:
            continue  # does the same as ours
        yield Finding(
            seen=f"a route of another program is in our table: IPv{route.family} `{route.line}`",
            why="steered packets to there follow it and are not captured",
            remedy=f"ip -{route.family} route del {quoted(route.line)}",
        )


def table_missing(e: Evidence) -> Iterator[Finding]:
    if e.observed is None or not _is_compared(e):
        return
    for name in e.plan.tables:
        if name not in e.observed.tables:
            yield Finding(
                seen=f"the nft table inet {name} is missing",
                why=_without_guard(e) if name == GUARD else "nothing is captured",
                remedy=e.restart(),
            )


def table_changed(e: Evidence) -> Iterator[Finding]:
    for name in e.changed_tables if _is_compared(e) else ():
        yield Finding(
            seen=f"the nft table inet {name} is otherwise than {e.configuration} plans it",
            why="somebody has changed it, or the configuration is newer than what is in force",
            remedy=e.restart(),
        )


def table_left_over(e: Evidence) -> Iterator[Finding]:
    if e.observed is None or not _is_compared(e):
        return
    for name in e.observed.tables:
        if name not in e.plan.tables:
            yield Finding(
                seen=f"the nft table inet {name} is in the kernel, but not planned",
                why='it refuses clients after the daemon\'s death, although when_down is "bypass"'
                if name == GUARD
                else "it captures by another configuration",
                remedy=f"nft delete table inet {quoted(name)}",
            )


def listener_missing(e: Evidence) -> Iterator[Finding]:
    if not _is_compared(e):
        return
    for address, port in e.plan.listen:
        family = 6 if ":" in address else 4
        if family in e.families and not _listening(e, address, port):
            yield Finding(
                seen=f"nobody listens on {format_address((address, port))}",
                why="new connections are refused: NAT does not look whether anybody listens"
                if e.config.redirects
                else "new connections are not captured: they get what `when_down` says",
                remedy=e.start(),
            )


@of_tproxy_mode
def listener_not_transparent(e: Evidence) -> Iterator[Finding]:
    for address, port, sock in _planned_listeners(e):
        if sock.transparent is False:
            yield Finding(
                seen=f"the listener on {format_address((address, port))}, {_holder_of(e, sock)}, is not transparent (IP_TRANSPARENT)",
                why="tproxy does not give connections to such a socket: nothing is captured",
                remedy=_take_over(e, sock),
            )


def listener_of_another(e: Evidence) -> Iterator[Finding]:
    for address, port, sock in _planned_listeners(e):
        pids = e.holders.get(sock.inode, ())
        # To an applied state anybody may listen; a listener that is not transparent has been told already.
        is_plain = sock.transparent is False and not e.config.redirects
        told = not pids or is_plain or e.is_applied or e.observed is None
        if not told and not (e.serves and (e.holder is None or e.holder.pid in pids)):
            yield Finding(
                seen=f"the listener on {format_address((address, port))} is not the daemon's, but of {_holder_of(e, sock)}",
                why="captured connections go to it" if e.serves else "the daemon cannot start while the port is taken",
                remedy=_take_over(e, sock),
            )


def listener_queue_full(e: Evidence) -> Iterator[Finding]:
    for address, port, sock in _planned_listeners(e):
        if sock.room and sock.received >= max(1, sock.room * _NEARLY):
            yield Finding(
                seen=f"{sock.received} connections wait at the listener on {format_address((address, port))}, which holds {sock.room}",
                why="nobody takes them: the daemon hangs, or is at its limit of connections; further clients get no answer",
                remedy=e.start(),
            )


def _way_out(sentence: str) -> str:
    """The command that an error names at its end, or else its advice. What other programs have written comes before that."""
    _, _, advice = sentence.rpartition("; ") if "; " in sentence else sentence.partition(": ")
    command = re.search(r"`(apt-get install \w+|modprobe \w+|ip link set lo up)`", advice)
    return command[1] if command else f"# {' '.join((advice or sentence).split())}"


def _left(e: Evidence) -> list[str]:
    """What of ours is in the kernel, in words."""
    if e.observed is None:
        return []
    left = [f"table inet {name}" for name in e.observed.tables]
    left += [f"{len(e.observed.rules)} ip rules"] if e.observed.rules else []
    return left + ([f"{len(e.observed.routes)} routes"] if e.observed.routes else [])


def _without_guard(e: Evidence) -> str:
    if e.config.capture.when_down == "refuse":
        return "after the daemon's death clients are not refused"
    return "after the daemon's death NAT does not carry the last words of its sockets: live clients wait"


def _is_compared(e: Evidence) -> bool:
    """Whether what is in the kernel is to be what this configuration plans."""
    return e.is_meant_to_capture and not e.runs_another_configuration


def _missing_rules(e: Evidence) -> list[Rule]:
    if e.observed is None or not _is_compared(e):
        return []
    return [rule for rule in e.plan.rules if rule_key(rule) not in e.observed.rules]


def _astray(e: Evidence, rule: Rule) -> list[RuleKey]:
    """Rules of ours in the place of this one that are otherwise."""
    planned = {rule_key(one) for one in e.plan.rules}
    observed = e.observed.rules if e.observed is not None else ()
    return [key for key in observed if key[:2] == (rule.family, rule.priority) and key not in planned]


def _listening(e: Evidence, address: str, port: int) -> list[TcpSocket]:
    everywhere = {"0.0.0.0", "::"}  # noqa: S104  # compared with, not bound to
    return [
        sock
        for sock in e.listeners
        if sock.local_port == port and (sock.local == address or (sock.both_families and address in everywhere))
    ]


def _planned_listeners(e: Evidence) -> Iterator[tuple[str, int, TcpSocket]]:
    """The first one of each planned address: with several relay processes there are more, all alike."""
    for address, port in e.plan.listen:
        for sock in _listening(e, address, port)[:1]:
            yield address, port, sock


def _holder_of(e: Evidence, sock: TcpSocket) -> str:
    pids = e.holders.get(sock.inode, ())
    return f"{e.processes.get(pids[0], 'a process')} (pid {pids[0]})" if pids else f"a process of uid {sock.uid}"


def _take_over(e: Evidence, sock: TcpSocket) -> str:
    pids = e.holders.get(sock.inode, ())
    stop = f"kill {pids[0]}" if pids else f"ss -ltnp sport = :{sock.local_port}"
    return f"{stop}\n{e.start()}"


CHECKS: tuple[Check, ...] = (
    nothing_captured,
    not_serving,
    start_refused,
    left_by_the_dead,
    name_held_by_a_stranger,
    daemon_stopped,
    daemon_draining,
    daemon_reverted,
    other_configuration,
    capability_missing,
    open_files,
    ip_rule_missing,
    wrong_table,
    route_missing,
    foreign_route,
    table_missing,
    table_changed,
    table_left_over,
    listener_missing,
    listener_not_transparent,
    listener_of_another,
    listener_queue_full,
)
