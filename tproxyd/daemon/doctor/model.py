"""The data of an examination: what was seen, and what is wrong with it. Pure; how it is gathered is not known here."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from functools import wraps

import msgspec

from tproxyd.config import Config, is_interface
from tproxyd.config.wording import printable
from tproxyd.daemon.status import Serving
from tproxyd.kernel import ForeignChain, ForeignRoute, ForeignRule, Link, Observed
from tproxyd.kernel.routing import rule_key
from tproxyd.net.processes import Process
from tproxyd.net.sock_diag import LISTEN, TcpSocket
from tproxyd.net.sockets import format_address
from tproxyd.plan import STATE, Family, Marks, Plan, Surroundings

__all__ = ["Check", "Crossing", "Evidence", "Finding", "of_tproxy_mode", "quoted", "setting"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is wrong: what was seen, why it hurts, the command that mends it. `warning`: a risk, not a failure.

    The remedy is pasted into a root's shell: in it, what others have named is `quoted`.
    """

    seen: str
    why: str
    remedy: str
    warning: bool = False


class Crossing(msgspec.Struct, frozen=True, kw_only=True):
    """What is captured, and the rules of others that it crosses; `chains` None: they could not be looked at."""

    config: Config
    marks: Marks
    families: tuple[Family, ...]
    links: tuple[Link, ...]
    chains: tuple[ForeignChain, ...] | None

    @property
    def captured_links(self) -> tuple[Link, ...]:
        """Interfaces on which connections are captured."""
        capture = self.config.capture
        return tuple(
            link
            for link in self.links
            if link.name != "lo"
            and (not capture.interfaces or any(is_interface(link.name, one) for one in capture.interfaces))
            and not any(is_interface(link.name, one) for one in capture.exclude_interfaces)
        )

    @property
    def captured_ports(self) -> list[int]:
        """A port of each captured range, at most eight; where every one is captured, one that nobody is likely to have allowed."""
        capture, found = self.config.capture, []
        for ports in capture.ports:
            candidates = range(ports.first, ports.last + 1) if ports.first > 1 else (8080, *range(1, ports.last + 1))
            port = next((one for one in candidates if capture.takes_port(one) and one != self.config.listen.port), None)
            if port is not None:
                found.append(port)
        return found[:8]


class Evidence(Crossing, frozen=True, kw_only=True):
    """What one look at a namespace has found. None: it could not be looked at, and `unseen` says so.

    `sysctls` by path below /proc/sys, `counters` from /proc/net/netstat. `rule_tables` are the tables that foreign rules look up and in
    which there are routes, with whether one of them is a local default route. `holders` are the pids that hold a listening socket,
    by its inode. `serves`: a daemon does, or a program that embeds it, of which there is no `holder`. `told` is what the
    daemon tells about itself, if it does. `refused_start`: where nothing of
    ours is, why a daemon would not start. `has_own_rules` is known without privileges, other than `observed`. `foreign_destinations`:
    configured destinations that are not addresses of this namespace.
    """

    file: str | None
    plan: Plan
    surroundings: Surroundings
    loopback_up: bool
    sysctls: Mapping[str, str]
    counters: Mapping[str, int]
    rp_filter_drops_now: bool
    rules: tuple[ForeignRule, ...]
    rule_tables: Mapping[tuple[int, int], bool]
    routes: tuple[ForeignRoute, ...]
    has_own_rules: bool
    observed: Observed | None
    changed_tables: tuple[str, ...]
    draining: bool
    holder: Process | None
    holder_trusted: bool
    serves: bool
    told: Serving | None
    refused_start: str | None
    relays: tuple[Process, ...]
    sockets: tuple[TcpSocket, ...]
    holders: Mapping[int, tuple[int, ...]]
    processes: Mapping[int, str]
    ssh_ports: tuple[int, ...]
    legacy_tables: tuple[str, ...]
    networkd_spares_us: bool
    nft_version: str | None
    has_library: bool
    refused_ruleset: str | None
    foreign_destinations: tuple[str, ...]
    unseen: tuple[str, ...]

    @property
    def is_applied(self) -> bool:
        """Whether `tproxyd apply` was here."""
        return self.observed is not None and STATE in self.observed.tables

    @property
    def is_meant_to_capture(self) -> bool:
        """Whether a daemon serves, or `tproxyd apply` has put the state there for another listener."""
        return (self.serves or self.is_applied) and not self.is_reverted

    @property
    def is_reverted(self) -> bool:
        """Whether `tproxyd revert` has taken everything away from a daemon that lives."""
        told = self.told
        return told is not None and not told.capturing and bool(told.differences) and not self.draining

    @property
    def runs_another_configuration(self) -> bool:
        """Whether a daemon finds nothing wrong where this configuration would."""
        told, observed = self.told, self.observed
        if told is None or not told.capturing or told.differences or observed is None:
            return False
        return (
            bool(self.changed_tables)
            or set(self.plan.tables) != set(observed.tables)
            or any(rule_key(rule) not in observed.rules for rule in self.plan.rules)
            or set(told.listen) != {format_address(address) for address in self.plan.listen}
        )

    @property
    def forwards(self) -> bool:
        return "1" in (self.sysctls.get("net/ipv4/ip_forward"), self.sysctls.get("net/ipv6/conf/all/forwarding"))

    @property
    def listeners(self) -> list[TcpSocket]:
        return [sock for sock in self.sockets if sock.state == LISTEN]

    def restart(self) -> str:
        """The command that makes the kernel's state anew."""
        return f"tproxyd apply{self.option}" if self.is_applied and not self.serves else self.start()

    def start(self, command: str | None = None) -> str:
        """The command that makes a daemon serve with the configuration: as the one that serves was started, unless a command is given."""
        if not self.serves:
            return f"tproxyd run{self.option}"
        if self.holder is None:
            return f"# stop what serves here, and start it again, or:\ntproxyd run{self.option}"
        pid, again = self.holder.pid, command or shlex.join(map(printable, self.holder.command))
        stop = "" if self.draining else f"kill {pid}; "
        return f"# stop it, and start it again once it has ended:\n{stop}tail --pid={pid} -f /dev/null\n{again}"

    @property
    def option(self) -> str:
        return f" -c {quoted(self.file)}" if self.file else ""

    @property
    def configuration(self) -> str:
        return printable(self.file or "/etc/tproxyd/tproxyd.toml")


Check = Callable[[Evidence], Iterable[Finding]]
"""Looks at the evidence for one cause. Its name, with hyphens, is the name of the check."""


def quoted(words: str) -> str:
    """Words that others have chosen, parted by spaces, as a shell takes each as it is. With an escape in it a word names nothing any
    more, and the command fails."""
    return " ".join(shlex.quote(printable(word)) for word in words.split(" "))


def of_tproxy_mode(check: Check) -> Check:
    """A check for what hurts packets that are steered and untracked; those of redirect mode are neither."""

    @wraps(check)
    def asked(e: Evidence) -> Iterable[Finding]:
        return () if e.config.redirects else check(e)

    return asked


def setting(path: str, value: str | int) -> str:
    """The command that sets a sysctl."""
    # sysctl takes slashes, too, where an interface's own name has a dot.
    name = path if "." in path else path.replace("/", ".")
    return f"sysctl -w {shlex.quote(printable(f'{name}={value}'))}"
