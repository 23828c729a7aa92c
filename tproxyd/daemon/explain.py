"""`tproxyd explain`: reads what the user asks about, asks the machine what only it can say, and shows the plan's account (plan.explain)."""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from tproxyd import kernel
from tproxyd.config import Config, Endpoint
from tproxyd.config.wording import printable, shown
from tproxyd.daemon.comparison import kernel_view, open_nft, surroundings_here
from tproxyd.daemon.lock import find_holder
from tproxyd.errors import TproxydError, UsageError
from tproxyd.net.capabilities import require_capabilities
from tproxyd.net.locality import Locality, Lookup, type_of_ipv4
from tproxyd.net.proc_net import is_listening
from tproxyd.net.processes import read_process, socket_holders
from tproxyd.net.sock_diag import LISTEN, tcp_sockets
from tproxyd.plan import STATE, STEERING, Surroundings, serving_generation
from tproxyd.plan.explain import Explanation, Machine, Route, explain
from tproxyd.plan.ruleset import listen_addresses
from tproxyd.plan.selectors import AddressType, Packet

__all__ = ["Account", "Request", "explain_connection", "read_request", "show"]

Held = Literal["as planned", "draining", "differs", "empty", "unseen"]
"""What the kernel has of the plan; it is draining where a daemon that stops has switched capture off."""

_MARTIAN = {errno.EINVAL, errno.EXDEV}


class Request(NamedTuple):
    """What the user asks about; `interface` None: where the way back to the source leaves."""

    source: IPv4Address | IPv6Address
    source_port: int | None
    destination: IPv4Address | IPv6Address
    port: int
    protocol: Literal["tcp", "udp"] = "tcp"
    interface: str | None = None


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """The answer. `assumed`: nobody said on which interface the packet arrives. `daemon` is who serves, as far as can be seen; `kernel`
    whether the kernel holds the plan, `differences` what it would take, `unseen` why it could not be asked."""

    packet: Packet
    assumed: bool
    daemon: str | None
    listening: bool
    kernel: Held
    differences: tuple[str, ...]
    unseen: str
    explanation: Explanation


def show(config: Config, request: Request, *, as_json: bool) -> int:
    """Prints the account of a connection. Raises TproxydError."""
    account = explain_connection(config, request)
    sys.stdout.write(_json(account) if as_json else _text(account))
    return os.EX_OK


def read_request(source: str, destination: str, *, protocol: Literal["tcp", "udp"], interface: str | None) -> Request:
    """SRC[:PORT] and DST:PORT of the command line. Raises UsageError."""
    client, client_port, scope = _endpoint(source, "SRC", "192.0.2.1, 192.0.2.1:40000 or [2001:db8::1]:40000")
    server, port, server_scope = _endpoint(destination, "DST:PORT", "198.51.100.7:80 or [2001:db8::7]:80")
    if port is None:
        raise UsageError(
            f"DST:PORT {shown(destination)} has no port; write an address and a port, such as {Endpoint(str(server), 80)}"
        )
    if server_scope is not None:
        raise UsageError(f"DST:PORT {shown(destination)} has a scope; name the interface with --in")
    if client.is_unspecified or client.is_multicast:
        raise UsageError(f"SRC {shown(source)} is no client's address; write the address that the server would see")
    if scope is not None and interface not in (None, scope):
        raise UsageError(f"SRC {shown(source)} and --in {shown(interface)} name two interfaces; leave one of them out")
    if client.version != server.version:
        raise UsageError(
            f"{client} is IPv{client.version} and {server} is IPv{server.version}: no packet bears both; "
            "give two addresses of one family"
        )
    return Request(client, client_port, server, port, protocol, scope if interface is None else interface)


def explain_connection(config: Config, request: Request) -> Account:
    """Asks this network namespace, and explains. Raises UsageError if there is no such interface, or it cannot be told which one."""
    holder = find_holder()
    held = _held(config, served=holder is not None and holder.trusted)
    surroundings = held.surroundings
    with Locality() as locality:
        target = locality.look_up(str(request.destination))
        interface = request.interface
        if interface is None:
            interface = _assumed_interface(locality, request, target)
        index = _index(interface) if interface is not None else 0
        packet = Packet(
            source=request.source,
            source_port=request.source_port,
            destination=request.destination,
            port=request.port,
            protocol=request.protocol,
            interface=interface,
            on_bridge=interface is not None and surroundings.bridge_netfilter and kernel.is_bridge(interface),
            destination_type=_type_of(request.destination, target),
        )
        listening = is_listening(listen_addresses(config)[packet.family], config.listen.port)
        # What `tproxyd apply` has put there brings connections to whoever listens.
        serves = holder is not None and holder.trusted
        strange = listening and not serves and STATE in (held.tables or ())

        def arrives(mark: int) -> Route:
            found = locality.look_up(
                str(packet.destination),
                source=str(packet.source),
                interface=index,
                mark=mark,
                protocol=socket.IPPROTO_UDP if packet.protocol == "udp" else socket.IPPROTO_TCP,
                source_port=packet.source_port or 0,
                port=packet.port,
            )
            route = _arriving(packet, found)
            return route._replace(rule=_first_taker(config, packet, mark)) if mark and found.kind != "local" else route

        def leaves(host: str, port: int) -> Route:
            found = locality.look_up(host, protocol=socket.IPPROTO_TCP if port else 0, port=port)
            if found.kind == "local":
                return _delivered(host)
            return Route(found.kind, _name(found.interface), "" if found.kind else _no_way(host, found))

        machine = Machine(
            arrives,
            leaves,
            listening,
            held.kernel != "draining",
            held.tables,
            _listener(config, packet) if strange else None,
            held.steering,
        )
        return Account(
            packet=packet,
            assumed=request.interface is None,
            daemon=str(holder) if holder is not None and holder.trusted else None,
            listening=listening,
            kernel=held.kernel,
            differences=held.differences,
            unseen=held.unseen,
            explanation=explain(held.config, surroundings, packet, machine),
        )


def _endpoint(text: str, what: str, example: str) -> tuple[IPv4Address | IPv6Address, int | None, str | None]:
    """Address, port and scope; the latter two only where they are given."""
    match = re.fullmatch(r"(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::([0-9]+))?", text)
    host, port = (match[2] if match[1] is None else match[1], match[3]) if match else (text, None)
    try:
        address = ip_address(host)
    except ValueError:
        raise UsageError(
            f"{what} {shown(text)} is no address (names are not looked up, IPv6 with a port stands in brackets); "
            f"write {example}"
        ) from None
    if match is not None and match[1] is not None and address.version == 4:
        raise UsageError(f"{what} {shown(text)} has IPv4 in brackets; write {example}")
    if port is not None and not 1 <= int(port[:6]) <= 65535:
        raise UsageError(f"{what} {shown(text)} has a port out of range; ports are 1 to 65535")
    scope = address.scope_id if isinstance(address, IPv6Address) else None
    plain = ip_address(host.partition("%")[0])
    return plain, int(port) if port is not None else None, scope


def _assumed_interface(locality: Locality, request: Request, target: Lookup) -> str | None:
    back = locality.look_up(str(request.source))
    if back.kind == "local":
        return "lo" if target.kind == "local" else None  # or it is this host that sends
    if back.kind != "unicast":
        raise UsageError(
            f"there is no way back to {request.source}, so it cannot be told on which interface it arrives; "
            "name one with --in IFACE"
        )
    return _name(back.interface)


def _index(interface: str) -> int:
    try:
        return socket.if_nametoindex(interface)
    except (OSError, ValueError):
        names = ", ".join(name for _, name in socket.if_nameindex())
        raise UsageError(
            f"there is no interface {shown(interface)} in this network namespace; there are {names}"
        ) from None


def _name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"interface {index}"  # gone meanwhile


def _type_of(destination: IPv4Address | IPv6Address, found: Lookup) -> AddressType:
    """As nft's `fib daddr type` has it, which knows some without a route."""
    if destination.is_multicast:
        return "multicast"
    if destination.version == 4 and int(destination) in (0, 0xFFFFFFFF):
        return "broadcast"
    known: dict[str, AddressType] = {"local": "local", "broadcast": "broadcast", "anycast": "anycast"}
    return known.get(type_of_ipv4(str(destination)) if destination.version == 4 else found.kind, "unicast")


def _arriving(packet: Packet, found: Lookup) -> Route:
    if found.kind == "local":
        return _delivered(str(packet.destination))
    switch = "net.ipv4.ip_forward" if packet.family == 4 else "net.ipv6.conf.all.forwarding"
    # The kernel says this itself only of IPv4, and not that this is why.
    if (found.kind or found.error == errno.EHOSTUNREACH) and _sysctl(switch) == "0":
        return Route("", error=f"forwarding is off: {switch} is 0")
    if found.error in _MARTIAN:
        why = f"{packet.source} to {packet.destination} cannot come in on {packet.interface}: martian, rp_filter, or a blackhole"
        return Route("", error=why)
    if not found.kind:
        return Route("", error=_no_way(str(packet.destination), found))
    name = _name(found.interface)
    return Route(found.kind, name, to_bridge=packet.on_bridge and kernel.is_bridge(name))


def _first_taker(config: Config, packet: Packet, mark: int) -> str:
    """Another program's ip rule before ours that takes such a packet, as `ip rule` shows it; "" if there is none."""
    for rule in kernel.list_foreign_rules():
        if (
            rule.family == packet.family
            and rule.priority <= config.routing.priority + 1
            and rule.can_take_tcp_that_arrives
            and not rule.suppressing
            and rule.selects(packet.source, packet.destination, packet.source_port, packet.port, packet.interface, mark)
            and (rule.ends or (rule.table is not None and kernel.has_routes(rule.family, rule.table)))
        ):
            return rule.line
    return ""


def _listener(config: Config, packet: Packet) -> str:
    """Who listens where such packets are brought to."""
    address, port = listen_addresses(config)[packet.family], config.listen.port
    inodes = [
        sock.inode
        for sock in tcp_sockets()
        if sock.state == LISTEN and sock.local_port == port and (sock.local == address or sock.both_families)
    ]
    for pids in socket_holders(inodes).values():
        process = read_process(min(pids))
        if process is not None:
            return f"{process.name} (pid {process.pid})"
    return "a process that cannot be seen from here"


def _delivered(host: str) -> Route:
    if ":" in host or type_of_ipv4(host) == "local":
        return Route("local")
    # A socket without IP_TRANSPARENT: seen as no answer to the SYN.
    return Route("local", error=f"no app can answer from {host}: its route is `local`, but not in the table `local`")


def _no_way(host: str, found: Lookup) -> str:
    return f"there is no route to {host} ({os.strerror(found.error)})"


def _sysctl(name: str) -> str:
    try:
        return Path("/proc/sys", *name.split(".")).read_text(encoding="ascii").strip()
    except OSError:
        return ""


class _Held(NamedTuple):
    config: Config
    surroundings: Surroundings
    kernel: Held
    tables: frozenset[str] | None
    differences: tuple[str, ...] = ()
    unseen: str = ""
    steering: str = STEERING


def _held(config: Config, *, served: bool) -> _Held:
    """What of the plan is in the kernel."""
    try:
        require_capabilities("looking at the ruleset", ("CAP_NET_ADMIN",))
        with open_nft() as nft:
            view = kernel_view(config, kernel.observe(nft), served=served)
            missing = kernel.differences(view.plan(), view.observed, nft)
            drains = bool(missing) and not kernel.differences(view.plan(capturing=False), view.observed, nft)
    except TproxydError as error:
        return _Held(config, surroundings_here(config), "unseen", None, unseen=str(error))
    observed = view.observed
    found = partial(_Held, view.config, view.surroundings, steering=serving_generation(observed.tables))
    names = frozenset(observed.tables)
    if not missing or drains:
        return found("draining" if drains else "as planned", names)
    is_empty = not (names or observed.rules or observed.routes)
    return found("empty" if is_empty else "differs", names, tuple(map(str, missing)))


def _text(account: Account) -> str:
    packet, explanation = account.packet, account.explanation
    source = str(packet.source) if packet.source_port is None else str(Endpoint(str(packet.source), packet.source_port))
    arriving = f"arriving on {packet.interface}" if packet.interface is not None else "sent by this host"
    if account.assumed:
        arriving += " (assumed from the way back to the source; --in says otherwise)"
    lines = [f"{packet.protocol.upper()} from {source} to {Endpoint(str(packet.destination), packet.port)}, {arriving}"]
    if account.daemon:
        lines.append(f"{account.daemon} serves this network namespace")
    else:
        lines.append("somebody listens, who cannot be seen" if account.listening else "no daemon serves here")
    match account.kernel:
        case "as planned":
            lines.append("the kernel holds the plan")
        case "draining":
            lines.append("the daemon is stopping: what lives goes on, and nothing new is captured")
        case "empty":
            lines.append("the kernel holds nothing of the plan, which this explains")
        case "differs":
            lines.append("the kernel differs from the plan, which this explains; to make it so:")
            lines += [f"    {change}" for change in account.differences]
        case "unseen":
            lines.append(f"this explains the plan, not what the kernel holds: {account.unseen}")
    lines.append("")
    width = max(len(stage.where) for stage in explanation.stages)
    for stage in explanation.stages:
        mark, says = "=>" if stage.decides else "  ", "yes" if stage.matches else "no"
        lines.append(f"{mark} {stage.where:{width}}  {says:3}  {stage.rule}  # {stage.because}")
    return "\n".join([*map(printable, lines), "", printable(f"{explanation.outcome}: {explanation.what}"), ""])


def _json(account: Account) -> str:
    packet = account.packet
    content = {
        "protocol": packet.protocol,
        "source": str(packet.source),
        "source_port": packet.source_port,
        "original_destination": str(Endpoint(str(packet.destination), packet.port)),
        "destination_type": packet.destination_type,
        "interface": packet.interface,
        "interface_assumed": account.assumed,
        "daemon": account.daemon,
        "listening": account.listening,
        "kernel": account.kernel,
        "differences": account.differences,
        **msgspec.structs.asdict(account.explanation),
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=2).decode() + "\n"
