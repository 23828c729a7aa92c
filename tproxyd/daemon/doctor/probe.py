"""The live probe: a client in a throwaway namespace connects to a captured port through the real ruleset.

Its handshake completes only if capture, the rule, the route, the listener and the way back all work. Then the other half: a connection to
an app of this host in the client's name, made as the daemon makes it, whose answers (a reset is one, too) must come back. Where the
configuration leaves no address, port or interface for either, that is said, and nothing is guessed.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Literal

import msgspec

from tproxyd import kernel
from tproxyd.config import Config, Endpoint, UnixPath, is_interface
from tproxyd.daemon.doctor.model import Evidence, Finding, quoted
from tproxyd.errors import TproxydError
from tproxyd.kernel import PROBE_INTERFACE, ProbeWay
from tproxyd.net.capabilities import missing_capabilities
from tproxyd.net.locality import Locality
from tproxyd.net.namespaces import call_in_namespace
from tproxyd.net.ports import read_port_choice
from tproxyd.net.sock_diag import TcpStates, find_connection, tcp_sockets
from tproxyd.net.sockets import abort, format_address, open_upstream

__all__ = ["PROBE_CHECKS", "Probe", "choose_address", "findings_of", "probe", "why_not"]

_PATIENCE = 2.5  # seconds: a SYN, and its retransmission after one
_DOCUMENTATION: dict[int, tuple[IPv4Network | IPv6Network, ...]] = {
    4: tuple(map(ip_network, ("203.0.113.0/24", "198.51.100.0/24", "192.0.2.0/24"))),  # RFC 5737
    6: (ip_network("2001:db8:ffff::/48"), ip_network("2001:db8::/32")),  # RFC 3849
}
_TRIED = 32  # addresses of a network
_LOOKS, _LOOK = 20, 0.01  # for a connection that was answered

PROBE_CHECKS = {"capture": "probe", "return": "probe-return"}
"""What its findings are called, by the half of a connection that they are about."""

Result = Literal["captured", "bypassed", "refused", "silent", "unmade", "impossible", "returned"]


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """One connection that was tried: of a client, or to an app in its name (`half` "return"). `result` "impossible": it was not, and
    `reason` says why."""

    family: int
    half: Literal["capture", "return"] = "capture"
    result: Result
    source: str = ""
    destination: str = ""
    port: int = 0
    reason: str = ""


def why_not(e: Evidence) -> str | None:
    """Why nothing can be probed, or None."""
    capture = e.config.capture
    if not e.serves:
        return "no daemon serves this network namespace"
    if e.is_reverted:
        return "`tproxyd revert` was given to the daemon"
    if not e.config.captures:
        return "the configuration captures nothing"
    missing = missing_capabilities(["CAP_NET_ADMIN", "CAP_SYS_ADMIN"])
    if missing:
        return f"that needs {' and '.join(missing)}; run as root"
    if capture.interfaces and not any(is_interface(PROBE_INTERFACE, one) for one in capture.interfaces):
        return f"capture.interfaces names none that the probe's interface {PROBE_INTERFACE} could be"
    if any(is_interface(PROBE_INTERFACE, one) for one in capture.exclude_interfaces):
        return f"capture.exclude_interfaces has the probe's interface {PROBE_INTERFACE}"
    if not e.captured_ports:
        return "there is no captured port besides the listener's own"
    return None


def probe(e: Evidence) -> list[Probe]:
    """Connects once a family, and removes everything again. Raises nothing: what goes wrong is a result."""
    reason = why_not(e)
    if reason is not None:
        return [Probe(family=family, result="impossible", reason=reason) for family in e.families]
    done, ways = [], []
    with Locality() as locality:
        for family in e.families:
            way = _choose_way(e.config, family, locality)
            if isinstance(way, str):
                done.append(Probe(family=family, result="impossible", reason=way))
            else:
                ways.append(way)
    try:
        if ways:
            with kernel.open_probe_link(ways) as (far, obstacles):
                done += [Probe(family=number, result="impossible", reason=why) for number, why in obstacles.items()]
                free = [way for way in ways if way.family not in obstacles]
                with ThreadPoolExecutor() as both:  # what hangs for one family often hangs for the other, too
                    for halves in both.map(lambda way: _probe_way(e, far, way), free):
                        done += halves
    except (TproxydError, OSError) as error:
        tried = {one.family for one in done}
        done += [
            Probe(family=way.family, result="impossible", reason=str(error)) for way in ways if way.family not in tried
        ]
    return sorted(done, key=lambda one: (one.family, one.half))


def _probe_way(e: Evidence, far: int, way: ProbeWay) -> list[Probe]:
    there = _connect(e, far, way)
    back = _connect_to_app(e, way) if there.result == "captured" and e.config.spoofs else None
    return [there] if back is None else [there, back]


def findings_of(e: Evidence, probes: Sequence[Probe]) -> list[tuple[str, Finding]]:
    """What the probe has found out, with the half's name as a check."""
    return [(PROBE_CHECKS[one.half], finding) for one in probes if (finding := _finding(e, one))]


def choose_address(
    family: int,
    wanted: Iterable[IPv4Network | IPv6Network],
    excluded: Iterable[IPv4Network | IPv6Network],
    taken: Iterable[str] = (),
    *,
    is_local: Locality | None = None,
) -> str | None:
    """A documentation address within `wanted` (none: anywhere) and outside `excluded`, which is not taken and no address of this host."""
    wanted = [network for network in wanted if network.version == family]
    excluded = [network for network in excluded if network.version == family]
    for documentation in _DOCUMENTATION[family]:
        for network in wanted or [documentation]:
            if not network.overlaps(documentation):
                continue
            inner = max(network, documentation, key=lambda one: one.prefixlen)
            # From the end, where lab and example networks have their hosts last; never the broadcast address.
            last = int(inner[-1]) - (inner.num_addresses > 2)
            for number in range(last, max(int(inner[0]), last - _TRIED) - 1, -1):
                address = ip_address(number) if family == 4 else ip_address(number.to_bytes(16, "big"))
                if any(address in one for one in excluded) or str(address) in taken:
                    continue
                if is_local is None or not is_local.is_local(str(address)):
                    return str(address)
    return None


def _choose_way(config: Config, family: int, locality: Locality) -> ProbeWay | str:
    capture = config.capture
    if capture.sources and not any(network.version == family for network in capture.sources):
        return f"capture.sources has no IPv{family} network"
    source = choose_address(family, capture.sources, capture.exclude_sources, is_local=locality)
    if source is None:
        return f"capture.sources and exclude_sources leave no IPv{family} documentation address"
    networks = [one for one in capture.destinations if one != "local" and one.version == family]
    excluded = [one for one in capture.exclude_destinations if one != "local"]
    # To a foreign address wherever one is captured: that needs the ip rule and the route, too.
    destination, near, local = None, None, False
    if networks or not capture.destinations:
        destination = choose_address(family, networks, excluded, {source}, is_local=locality)
    if destination is None and "local" in capture.destinations and "local" not in capture.exclude_destinations:
        destination, local = choose_address(family, [], excluded, {source}, is_local=locality), True
    if destination is None:
        return f"capture.destinations and exclude_destinations leave no IPv{family} documentation address"
    if config.redirects:
        # What NAT makes the destination: the only address of the cable's end here.
        near = destination if local else choose_address(family, [], [], {source, destination}, is_local=locality)
    return ProbeWay(family, source, destination, local, near)


def _connect(e: Evidence, far: int, way: ProbeWay) -> Probe:
    port = e.captured_ports[0]
    family = socket.AF_INET6 if way.family == 6 else socket.AF_INET
    client = call_in_namespace(far, socket.socket, family, socket.SOCK_STREAM)
    result: Result = "captured"
    try:
        client.settimeout(_PATIENCE)
        client.bind((way.source, 0))
        try:
            client.connect((way.destination, port))
        except ConnectionRefusedError:
            result = "refused"
        except (ConnectionResetError, BrokenPipeError):
            pass  # accepted, and then reset: by a policy, or because the upstream refuses
        except OSError:
            result = "silent"
        else:
            result = _who_answered(client, way, port, e.config.listen.port)
    finally:
        with contextlib.suppress(OSError):
            abort(client)
    return Probe(family=way.family, result=result, source=way.source, destination=way.destination, port=port)


def _who_answered(client: socket.socket, way: ProbeWay, port: int, listen_port: int) -> Result:
    """An answer is not a connection yet: with SYN cookies there is none here before the client's ACK, which may go elsewhere. And for
    a local address an app may have answered, whose socket is not transparent; where NAT captures, one at another port than the listener's."""
    client.setblocking(False)
    remote = (way.source, client.getsockname()[1])
    for _ in range(_LOOKS):
        if way.near is not None:
            here = _local_port(way.near, listen_port, remote)
            if here is not None:
                return "captured" if here == listen_port else "bypassed"
        elif (other := find_connection((way.destination, port), remote)) is not None:
            return "bypassed" if other.transparent is False else "captured"
        try:
            client.recv(1)
        except BlockingIOError:
            time.sleep(_LOOK)
        except OSError:
            return "captured"  # and reset: by a policy, or because the upstream refuses
        else:
            return "captured"  # and ended
    return "unmade"


def _local_port(near: str, listen_port: int, remote: tuple[str, int]) -> int | None:
    """Where the connection with this remote end has been brought to."""
    if find_connection((near, listen_port), remote) is not None:
        return listen_port
    # NAT of others may bring it anywhere.
    found = [one.local_port for one in tcp_sockets() if (one.remote, one.remote_port) == remote]
    return found[0] if found else None


def _connect_to_app(e: Evidence, way: ProbeWay) -> Probe | None:
    """As the daemon connects to an app of this host; None where it does not do so in a client's name."""
    family = socket.AF_INET6 if way.family == 6 else socket.AF_INET
    target = e.config.upstream.target
    with Locality() as locality, TcpStates() as states:
        if isinstance(target, UnixPath):
            return None
        if isinstance(target, Endpoint):
            to = (target.host, target.port)
        elif target == "loopback":
            to = ("::1" if way.family == 6 else "127.0.0.1", e.captured_ports[0])
        else:
            to = (way.destination if way.local else _own_address(family, way.source), e.captured_ports[0])
        if not to[0] or (":" in to[0]) != (way.family == 6) or not locality.is_local(to[0]):
            return None
        free = (port for port in read_port_choice().others(64) if states.state(to, (way.source, port)) is None)
        port = next(free, 0)
    result: Result = "returned"
    sock = open_upstream(family, source=(way.source, port))
    sock.settimeout(_PATIENCE)
    try:
        sock.connect(to)
    except (ConnectionRefusedError, ConnectionResetError):
        pass  # nobody listens; its answer has come back
    except OSError:
        result = "silent"
    finally:
        abort(sock)
    return Probe(family=way.family, half="return", result=result, source=way.source, destination=to[0], port=to[1])


def _own_address(family: socket.AddressFamily, client: str) -> str:
    """That of this host by which the client is reached; "" if it has none of this family."""
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((client, 9))
        except OSError:
            return ""
        return str(sock.getsockname()[0])


def _finding(e: Evidence, one: Probe) -> Finding | None:
    if one.result in ("captured", "impossible", "returned"):
        return None
    target = format_address((one.destination, one.port))
    if one.half == "return":
        return Finding(
            seen=f"a connection to {target} that bears a client's address, {one.source}, got no answer",
            why="so will those that the daemon makes to apps of this host, until connect_timeout: the SYN, or the answer to it, is dropped or "
            "goes to the client; the other findings may say why",
            remedy=f'# if nothing else helps, in {e.configuration}, under [upstream]: source = "proxy"\n{e.restart()}',
        )
    happened = {
        "refused": ("was refused", "it met a rule that rejects, or the guard, or nobody listens"),
        "silent": ("got no answer", "the SYN, or the answer to it, is dropped or goes elsewhere"),
        "unmade": ("was answered, but never made", "the client's ACK goes elsewhere, as it does with SYN cookies"),
        "bypassed": ("reached an app directly", "it was not captured"),
    }[one.result]
    link = next((link.name for link in e.captured_links if link.up), None)
    where = f" --in {quoted(link)}" if link else ""
    return Finding(
        seen=f"a connection from {one.source} to {target}, through the ruleset as it is, {happened[0]}",
        why=f"so will clients: {happened[1]}; the other findings may say why",
        # The probe's own interface is gone; what arrives on the others is treated alike.
        remedy=f"tproxyd explain {one.source} {quoted(target)}{where}{e.option}",
    )
