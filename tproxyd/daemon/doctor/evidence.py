"""Looks at everything that the checks want to know, once, and tells what it could not look at. Changes nothing.

Blocking, in the network namespace of the calling thread. Without privileges there is less to see; no error is raised for that.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TypeVar

import msgspec

from tproxyd import kernel
from tproxyd.config import Config
from tproxyd.daemon.comparison import kernel_view, open_nft, ssh_ports_here
from tproxyd.daemon.doctor.model import Evidence
from tproxyd.daemon.lock import KeptError, find_holder, send_order
from tproxyd.daemon.status import Serving, Waiting
from tproxyd.errors import CapabilityError, KernelError, MissingError, TproxydError
from tproxyd.kernel.routing import dump_rules
from tproxyd.kernel.state import make_steps
from tproxyd.net.capabilities import missing_capabilities
from tproxyd.net.locality import Locality
from tproxyd.net.namespaces import call_in_namespace, new_namespace
from tproxyd.net.processes import Process, processes_here, read_process, socket_holders
from tproxyd.net.sock_diag import LISTEN, TcpSocket, tcp_sockets
from tproxyd.plan import STATE, Plan, is_owned, serving_generation

__all__ = ["gather"]

T = TypeVar("T")

_NOTHING = kernel.Observed((), (), {})
_SYSCTLS = Path("/proc/sys")
_NAMES = (
    "net/ipv4/ip_forward",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/ip_local_reserved_ports",
    "net/ipv4/ip_unprivileged_port_start",
    "net/ipv4/tcp_syncookies",
    "net/ipv4/tcp_max_tw_buckets",
    "net/ipv6/conf/all/forwarding",
    "net/core/somaxconn",
    "net/bridge/bridge-nf-call-iptables",
    "net/bridge/bridge-nf-call-ip6tables",
    "net/netfilter/nf_conntrack_count",
    "net/netfilter/nf_conntrack_max",
)
_IPV4_OF_LINK = ("rp_filter", "src_valid_mark", "route_localnet")
_WORKER = "/tproxyd/datapath/worker.py"  # as interceptor/homes.py starts it; a test holds that
# A client sends its SYN again after a second.
_RETRANSMISSION = 1.2
_NETWORKD = ("/usr/lib/systemd", "/usr/local/lib/systemd", "/run/systemd", "/etc/systemd")


def gather(config: Config, file: str | None) -> Evidence:
    """One look. Raises ConfigError when the marks of the config do not fit together."""
    unseen: list[str] = []

    def look(what: str, function: Callable[[], T], default: T) -> T:
        try:
            return function()
        except (TproxydError, OSError) as error:
            unseen.append(f"{what}: {error}")
            return default

    ssh_ports = tuple(sorted(ssh_ports_here()))
    no_links: tuple[kernel.Link, ...] = ()
    links = look("interfaces", kernel.list_links, no_links)
    sysctls = _read_sysctls([link.name for link in links])
    if missing_capabilities(["CAP_SYS_PTRACE"]):
        unseen.append(
            "what other processes hold open: whose the listeners are, and how many files; that needs CAP_SYS_PTRACE"
        )
    holder = find_holder()
    trusted = holder is not None and holder.trusted
    daemon = read_process(holder.pid) if holder is not None else None
    observed = look("tproxyd's own state in the kernel", kernel.observe, None)
    no_sockets: list[TcpSocket] = []
    sockets = look("TCP sockets", tcp_sockets, no_sockets)
    serves = trusted or _is_embedded(config, observed, sockets)
    view = kernel_view(config, observed or _NOTHING, served=serves)
    plan = view.plan()
    if serves and observed is not None:  # that of a generation that drains since a hand-over goes with it
        observed = kernel.without_others(observed, plan.steering, plan.name)
    relays = _relay_processes(daemon) if serves and daemon is not None else ()
    changed = _changed_tables(plan, observed)
    draining = serves and changed == (plan.steering,) and not _changed_tables(view.plan(capturing=False), observed)
    has_own_rules = look("our ip rules", lambda: bool(dump_rules()), False)
    idle = not (serves or holder is not None or view.observed != _NOTHING or has_own_rules)
    no_rules: tuple[kernel.ForeignRule, ...] = ()
    rules = look("ip rules", lambda: tuple(kernel.list_foreign_rules()), no_rules)
    # Our own routes are not among the foreign ones.
    no_routes: tuple[kernel.ForeignRoute, ...] = ()
    routes = look("the routes of our table", lambda: tuple(kernel.list_foreign_routes(config.routing.table)), no_routes)
    holders = socket_holders([sock.inode for sock in sockets if sock.state == LISTEN])
    counters = _read_counters()
    return Evidence(
        config=config,
        file=file,
        plan=plan,
        surroundings=view.surroundings,
        loopback_up=look("lo", kernel.is_loopback_up, True),
        sysctls=sysctls,
        counters=counters,
        rp_filter_drops_now=_drops_now(sysctls, counters),
        links=links,
        rules=rules,
        rule_tables=look("the tables of other ip rules", lambda: _tables(rules, config.routing.table), {}),
        routes=routes,
        has_own_rules=has_own_rules,
        observed=observed,
        changed_tables=() if draining else changed,
        draining=draining,
        chains=look("other programs' nft rules", kernel.list_chains, None),
        families=view.surroundings.families,
        marks=plan.marks,
        holder=daemon,
        holder_trusted=trusted,
        serves=serves,
        refused_start=look("whether a daemon could start", lambda: _refused_start(config), None) if idle else None,
        told=look("what the daemon tells about itself", partial(_ask, daemon, relays), None) if trusted else None,
        relays=relays,
        sockets=tuple(sockets),
        holders={inode: tuple(pids) for inode, pids in holders.items()},
        processes=processes_here(),
        ssh_ports=ssh_ports,
        legacy_tables=tuple(f"{program} {name}" for program, names in kernel.legacy_tables().items() for name in names),
        networkd_spares_us=_networkd_spares_us(),
        nft_version=look("nft's version", kernel.nft_version, None),
        has_library=_has_library(),
        refused_ruleset=_refused(plan, unseen),
        foreign_destinations=look("which destinations are local", lambda: _foreign_destinations(config, links), ()),
        unseen=tuple(unseen),
    )


def _is_embedded(config: Config, observed: kernel.Observed | None, sockets: list[TcpSocket]) -> bool:
    """Whether a program that embeds tproxyd serves here, which holds no name: one that lives owns the table, or listens to what it steers."""
    steering = observed.tables.get(serving_generation(observed.tables)) if observed is not None else None
    if steering is None or (observed is not None and STATE in observed.tables):
        return False
    listening = any(
        sock.state == LISTEN and (sock.transparent or config.redirects) and sock.local_port == config.listen.port
        for sock in sockets
    )
    return is_owned(steering) or listening


def _ask(daemon: Process | None, relays: tuple[Process, ...]) -> Serving | None:
    """Nothing where it could not answer, or not us."""
    stopped = any(process.stopped for process in (daemon, *relays) if process is not None)
    if stopped or missing_capabilities(["CAP_NET_ADMIN"]):
        return None
    try:
        answer = send_order("status")
    except KeptError:
        return None
    try:
        told = msgspec.json.decode(answer, type=Serving | Waiting) if answer is not None else None
    except msgspec.MsgspecError as error:
        raise KernelError(f"it answers in another way than expected ({error})") from error
    return told if isinstance(told, Serving) else None


def _changed_tables(plan: Plan, observed: kernel.Observed | None) -> tuple[str, ...]:
    """Which tables are there and otherwise than planned. Those of which it cannot be told do not count."""
    if observed is None or not observed.tables:
        return ()
    with open_nft() as nft:
        steps = make_steps(plan, observed, nft, unsure=False)
    words = [step.change.what for step in steps if step.change.kind == "ruleset"]
    loaded = re.findall(r"load table inet (\w+)", " ".join(words))
    return tuple(name for name in loaded if name in observed.tables)


def _read_sysctls(links: list[str]) -> dict[str, str]:
    names = [*_NAMES]
    for link in ("all", *links):
        names += [f"net/ipv4/conf/{link}/{name}" for name in _IPV4_OF_LINK]
        names.append(f"net/ipv6/conf/{link}/disable_ipv6")
    found = {}
    for name in names:
        try:
            found[name] = " ".join((_SYSCTLS / name).read_text(encoding="utf-8").split())
        except OSError:
            continue  # no such module, no such setting
    return found


def _read_counters() -> dict[str, int]:
    counters: dict[str, int] = {}
    lines = Path("/proc/thread-self/net/netstat").read_text(encoding="ascii").splitlines()
    for names, values in zip(lines[::2], lines[1::2], strict=True):
        counters |= dict(zip(names.split()[1:], map(int, values.split()[1:]), strict=True))
    return counters


def _drops_now(sysctls: Mapping[str, str], counters: Mapping[str, int]) -> bool:
    """Whether rp_filter drops packets while we look: only then it is worth a second."""
    strict = any(name.endswith("/rp_filter") and value == "1" for name, value in sysctls.items())
    if not strict or not counters.get("IPReversePathFilter"):
        return False
    time.sleep(_RETRANSMISSION)
    return _read_counters().get("IPReversePathFilter", 0) > counters["IPReversePathFilter"]


def _tables(rules: tuple[kernel.ForeignRule, ...], own: int) -> dict[tuple[int, int], bool]:
    """The tables that marked packets may be sent to by others, if there is a route in them."""
    found: dict[tuple[int, int], bool] = {}
    main = {253, 254, 255}
    for table in {rule.table for rule in rules if rule.table} - main:
        for route in kernel.list_foreign_routes(table):
            key = (route.family, table)
            found[key] = found.get(key, False) or route.is_ours_but_for_protocol
    for family in (4, 6):
        found |= {(family, table): False for table in main}
        if (family, own) in found or any(rule.table == own for rule in rules):
            found[family, own] = True  # ours delivers everything here
    return found


def _relay_processes(process: Process) -> tuple[Process, ...]:
    """Those of its children that are its relay processes: an embedding program has others, too, and may call them as it likes."""
    pids: set[int] = set()
    for task in _listing(Path(f"/proc/{process.pid}/task")):
        try:
            pids |= set(map(int, (task / "children").read_text(encoding="ascii").split()))
        except OSError:
            continue
    return tuple(
        child
        for pid in sorted(pids)
        if (child := read_process(pid)) and any(one.endswith(_WORKER) for one in child.command)
    )


def _networkd_spares_us() -> bool:
    """Whether systemd-networkd is told to leave foreign ip rules and routes alone: the last word in byte order counts."""
    settings = {"ManageForeignRoutingPolicyRules": True, "ManageForeignRoutes": True}
    files: dict[str, Path] = {}
    for directory in _NETWORKD:
        for file in _listing(Path(directory) / "networkd.conf.d"):
            if file.suffix == ".conf":
                files[file.name] = file
    main = [Path(directory) / "networkd.conf" for directory in _NETWORKD]
    for file in [*main, *(files[name] for name in sorted(files))]:
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        for name, value in re.findall(r"^\s*(\w+)\s*=\s*(\w+)\s*$", text, re.M):
            if name in settings:
                settings[name] = value.lower() in ("yes", "true", "on", "1")
    return not any(settings.values())


def _has_library() -> bool:
    try:
        kernel.require_nf_tables()
    except MissingError:
        return True  # it cannot be opened: that would end this process
    try:
        kernel.Library().close()
    except TproxydError:
        return False
    return True


def _refused_start(config: Config) -> str | None:
    """What would keep a daemon from starting, as it would say it."""
    if not config.captures or missing_capabilities(["CAP_NET_ADMIN"]):
        return None
    try:
        kernel.preflight(config, ssh_ports=ssh_ports_here())
    except (KernelError, MissingError) as error:
        return str(error)
    return None


def _refused(plan: Plan, unseen: list[str]) -> str | None:
    """What nft says of our ruleset, tried where there is nothing else; None if it takes it."""

    def try_it() -> None:
        kernel.Program().check(plan.ruleset)

    try:
        namespace = new_namespace()
    except TproxydError as error:
        unseen.append(f"whether this kernel takes the ruleset: {error}")
        return None
    try:
        call_in_namespace(namespace, try_it)
    except CapabilityError as error:
        unseen.append(f"whether this kernel takes the ruleset: {error}")
    except MissingError as error:
        return str(error) if kernel.nft_version() is not None else None  # a finding of its own
    except TproxydError as error:
        return str(error)
    finally:
        os.close(namespace)
    return None


def _foreign_destinations(config: Config, links: tuple[kernel.Link, ...]) -> tuple[str, ...]:
    """Networks without an address of this host, as an interface or a `local` route of a whole network has it."""
    own = [ip_address(address) for link in links for address in link.addresses]
    with Locality() as locality:
        return tuple(
            str(network)
            for network in config.capture.destinations
            if network != "local" and not any(one in network for one in own) and not locality.is_local(str(network[-1]))
        )


def _listing(directory: Path) -> Iterator[Path]:
    try:
        yield from sorted(directory.iterdir())
    except OSError:
        return
