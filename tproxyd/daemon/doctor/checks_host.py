"""Checks of the machine around: sysctls, interfaces, and what runs short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from ipaddress import ip_address

from tproxyd.config import is_interface
from tproxyd.daemon.doctor.model import Check, Evidence, Finding, of_tproxy_mode, quoted, setting
from tproxyd.net.sock_diag import LISTEN, TIME_WAIT

__all__ = ["CHECKS"]

_NEARLY = 0.9  # of a limit
_PORTS_NEARLY = 0.8  # of the ephemeral ports: the kernel's search for a free one gets slow before they are gone
_DUMMY = "192.0.0.8"  # RFC 7600: for a host that has no address
_SMALLEST_MTU = 1280  # what IPv6 needs (RFC 8200); below it Linux switches IPv6 off on the interface


def loopback_down(e: Evidence) -> Iterator[Finding]:
    if not e.loopback_up and e.refused_start is None:
        yield Finding(
            seen="the interface lo is down",
            why="apps of this host are not reached, and no daemon starts"
            if e.config.redirects
            else "steered packets are delivered through lo: every captured connection hangs",
            remedy="ip link set lo up",
        )


def ipv6_off(e: Evidence) -> Iterator[Finding]:
    off = e.sysctls.get("net/ipv6/conf/lo/disable_ipv6") == "1"
    others = [link.name for link in e.captured_links if e.sysctls.get(f"net/ipv6/conf/{link.name}/disable_ipv6") == "0"]
    if off and others:
        yield Finding(
            seen=f"net.ipv6.conf.lo.disable_ipv6 = 1, while {_names(others)} has IPv6",
            why=f"IPv6 connections {'are not captured' if e.config.redirects else 'cannot be delivered to the listener'}: they get what "
            "`when_down` says",
            remedy=setting("net/ipv6/conf/lo/disable_ipv6", 0),
        )


def small_mtu(e: Evidence) -> Iterator[Finding]:
    for link in e.links:
        if (link.name == "lo" or link in e.captured_links) and 0 < link.mtu < _SMALLEST_MTU:
            yield Finding(
                seen=f"the MTU of {link.name} is {link.mtu}",
                why="below 1280 Linux switches IPv6 off on the interface, and every packet is small",
                remedy=f"ip link set dev {quoted(link.name)} mtu {65536 if link.name == 'lo' else 1500}",
                warning=True,
            )


@of_tproxy_mode
def src_valid_mark(e: Evidence) -> Iterator[Finding]:
    where = _where(e, "src_valid_mark", "1")
    if not where:
        return
    steering = e.plan.marks.steering
    for rule in e.rules:
        takes = not rule.narrowed and rule.iif is None and rule.mask and steering.value & rule.mask == rule.mark
        if takes and rule.priority < e.config.routing.priority and e.rule_tables.get((rule.family, rule.table or 0)):
            yield Finding(
                seen=f"{where}, and a rule of another program sends marked packets to a local route: `{rule.line}`",
                why="the kernel then looks up the way back with the mark, too, finds the local route, and drops every steered packet "
                "in silence",
                remedy=f"ip -{rule.family} rule del priority {rule.priority} fwmark {rule.mark:#x}/{rule.mask:#x}",
            )


def rp_filter(e: Evidence) -> Iterator[Finding]:
    dropped = e.counters.get("IPReversePathFilter", 0)
    strict = [link.name for link in e.captured_links if _rp_filter(e, link.name) == 1]
    if not strict or not dropped:
        return
    # The higher of `all` and the interface counts: 2 on the interface is enough, and lets the others be.
    yield Finding(
        seen=f"rp_filter is 1 (strict) on {_names(strict)}, and has dropped {dropped} packets"
        + (", some of them just now" if e.rp_filter_drops_now else " so far"),
        why="packets of clients to whom another interface leads are dropped before they are captured"
        + ("" if e.rp_filter_drops_now else "; it may have been others' packets"),
        remedy="\n".join(setting(f"net/ipv4/conf/{name}/rp_filter", 2) for name in strict),
        warning=not e.rp_filter_drops_now,
    )


@of_tproxy_mode
def route_localnet(e: Evidence) -> Iterator[Finding]:
    where = _where(e, "route_localnet", "1")
    if where:
        port = e.config.listen.port
        yield Finding(
            seen=where,
            why=f"neighbours on these networks can reach what listens on 127.0.0.1, the listener on port {port} among it (it closes "
            "such connections)",
            remedy=f"nft 'add table ip localnet; add chain ip localnet in {{ type filter hook prerouting priority raw - 10; }}; "
            f'add rule ip localnet in iif != "lo" ip daddr 127.0.0.0/8 tcp dport {port} drop\''
            if _kube_proxy(e)
            else "\n".join(
                setting(name, 0)
                for name, value in e.sysctls.items()
                if name.endswith("/route_localnet") and value == "1"
            ),
            warning=True,
        )


@of_tproxy_mode
def br_netfilter(e: Evidence) -> Iterator[Finding]:
    bridges = [link.name for link in e.captured_links if link.kind == "bridge"]
    if e.surroundings.bridge_netfilter and bridges:
        on = [
            name
            for name in ("net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables")
            if e.sysctls.get(name) == "1"
        ]
        yield Finding(
            seen=f"br_netfilter is on, and there is a bridge: {_names(bridges)}",
            why="what arrives on a bridge is shown to the ruleset too early and cannot be captured; if other rules rely on seeing bridged "
            "packets (Docker's and Kubernetes' between containers of one bridge do), exclude the bridge instead (exclude_interfaces)",
            remedy="\n".join(setting(name, 0) for name in on),
        )


def forwarding_off(e: Evidence) -> Iterator[Finding]:
    for family, name in ((4, "net/ipv4/ip_forward"), (6, "net/ipv6/conf/all/forwarding")):
        foreign = [one for one in e.foreign_destinations if (":" in one) == (family == 6)]
        if foreign and e.sysctls.get(name) == "0":
            yield Finding(
                seen=f"{name.replace('/', '.')} = 0, while {_names(foreign)} {'is' if len(foreign) == 1 else 'are'} not of this host",
                why="captured connections work, but all other traffic to there is dropped, and after the daemon's death "
                "captured ports are, too",
                remedy=setting(name, 1),
                warning=True,
            )


def forwarding_captures_all(e: Evidence) -> Iterator[Finding]:
    capture = e.config.capture
    if e.config.captures and e.forwards and not capture.destinations:
        yield Finding(
            seen="forwarding is on, and capture.destinations is empty",
            why="forwarded connections are captured, too: on a host of containers or virtual machines that is their own outbound traffic",
            remedy=f'# in {e.configuration}, under [capture]: destinations = ["local"], or the networks that are meant\n{e.restart()}',
            warning=True,
        )


@of_tproxy_mode
def syn_cookies_always(e: Evidence) -> Iterator[Finding]:
    if e.sysctls.get("net/ipv4/tcp_syncookies") == "2":
        yield Finding(
            seen="net.ipv4.tcp_syncookies = 2 (always)",
            why="captured connections to foreign addresses cannot be made with SYN cookies: they hang",
            remedy=setting("net/ipv4/tcp_syncookies", 1),
        )


def backlog_cut(e: Evidence) -> Iterator[Finding]:
    most, wanted = int(e.sysctls.get("net/core/somaxconn", "0")), e.config.listen.backlog
    if 0 < most < wanted:
        yield Finding(
            seen=f"net.core.somaxconn = {most}, less than listen.backlog = {wanted}",
            why="the kernel cuts the listener's queue to it without a word, and a burst of clients waits for retransmissions",
            remedy="\n".join([setting("net/core/somaxconn", wanted), *([e.restart()] if e.serves else [])]),
            warning=True,
        )


def listen_port_not_reserved(e: Evidence) -> Iterator[Finding]:
    port, words = e.config.listen.port, e.sysctls.get("net/ipv4/ip_local_port_range", "").split()
    reserved = e.sysctls.get("net/ipv4/ip_local_reserved_ports", "")
    if len(words) == 2 and int(words[0]) <= port <= int(words[1]) and not _is_listed(port, reserved):
        yield Finding(
            seen=f"listen.port = {port} is one of the ports that programs get by chance (net.ipv4.ip_local_port_range = {' '.join(words)})",
            why="another program's connection may have it when the daemon starts, which then fails",
            remedy=setting("net/ipv4/ip_local_reserved_ports", ",".join(filter(None, [reserved, str(port)]))),
            warning=True,
        )


def conntrack_full(e: Evidence) -> Iterator[Finding]:
    count, most = (int(e.sysctls.get(f"net/netfilter/nf_conntrack_{name}", "0")) for name in ("count", "max"))
    if most and count >= most * _NEARLY:
        yield Finding(
            seen=f"{count} of {most} conntrack entries are in use",
            why="captured connections need two each, and new ones are dropped when they are used up, as is everything else on this host"
            if e.config.redirects
            else "captured connections need none, but everything else on this host is dropped when they are used up",
            remedy=setting("net/netfilter/nf_conntrack_max", 2 * most),
            warning=not e.config.redirects or count < most,
        )


def ephemeral_ports(e: Evidence) -> Iterator[Finding]:
    words = e.sysctls.get("net/ipv4/ip_local_port_range", "").split()
    if len(words) != 2:
        return
    first, last = map(int, words)
    pairs = Counter(
        (sock.local, sock.remote, sock.remote_port)
        for sock in e.sockets
        if sock.state != LISTEN and first <= sock.local_port <= last
    )
    for (local, remote, port), count in pairs.most_common(1):
        if count >= _PORTS_NEARLY * (last - first + 1):
            yield Finding(
                seen=f"{count} of {last - first + 1} ports are in use from {local} to {remote} port {port} (TIME_WAIT included)",
                why="the next connections to there end with outcome no_ports",
                remedy=setting("net/ipv4/ip_local_port_range", "1024 65535"),
                warning=True,
            )


def time_wait_full(e: Evidence) -> Iterator[Finding]:
    most = int(e.sysctls.get("net/ipv4/tcp_max_tw_buckets", "0") or 0)
    count = sum(sock.state == TIME_WAIT for sock in e.sockets)
    if most and count >= most * _NEARLY:
        yield Finding(
            seen=f"{count} sockets are in TIME_WAIT, of {most} at most",
            why="further ones are forgotten at once, and a late packet of an old connection can break a new one",
            remedy=setting("net/ipv4/tcp_max_tw_buckets", max(65536, 4 * most)),
            warning=True,
        )


def interface_missing(e: Evidence) -> Iterator[Finding]:
    names, capture = [link.name for link in e.links], e.config.capture

    def absent(patterns: Sequence[str]) -> list[str]:
        return [one for one in patterns if not any(is_interface(name, one) for name in names)]

    wanted = absent(capture.interfaces)
    # An excluded pattern may be for what is to come; an exact name may be a slip.
    excluded = absent([one for one in capture.exclude_interfaces if "*" not in one])
    for key, missing, why in (
        ("interfaces", wanted, "nothing arrives there, so nothing is captured"),
        ("exclude_interfaces", excluded, "it excludes nothing"),
    ):
        for pattern in missing:
            yield Finding(
                seen=f"capture.{key} has {pattern!r}, but there is no such interface; there are {_names(names)}",
                why=why,
                remedy=f"# name the interface as it is called, in {e.configuration}\nip -br link\n{e.restart()}",
                warning=len(wanted) < len(capture.interfaces) or key != "interfaces",
            )


def interface_down(e: Evidence) -> Iterator[Finding]:
    for link in e.captured_links:
        if not link.up and link.name in e.config.capture.interfaces:
            yield Finding(
                seen=f"the interface {link.name} is down",
                why="it is one of capture.interfaces, and nothing arrives there",
                remedy=f"ip link set dev {quoted(link.name)} up",
            )


def address_missing(e: Evidence) -> Iterator[Finding]:
    """NAT's `redirect` gives a connection an address of the interface that it came in on, whichever."""
    if not e.config.redirects or not e.config.captures:
        return
    # What arrives on a port of a bridge or a bond arrives on that.
    links = [link for link in e.captured_links if link.carrier and (link.master is None or link.master_kind == "vrf")]
    for family in e.families:
        without = [
            link.name
            for link in links
            if not any((":" in address) == (family == 6) for address in link.addresses)
            and (family == 4 or e.sysctls.get(f"net/ipv6/conf/{link.name}/disable_ipv6") == "0")
        ]
        if without:
            yield Finding(
                seen=f"{_names(without)} {'has' if len(without) == 1 else 'have'} no IPv{family} address",
                why=f"IPv{family} connections that arrive there and are captured are dropped: NAT has no address to give them",
                remedy="# any will do, one that another interface has, too\n"
                + "\n".join(f"ip -{family} address add {_spare(e, family)} dev {name}" for name in without),
                # Perhaps none of that family arrives there, or nothing at all, as on the interface below a VLAN.
                warning=not any(name in e.config.capture.interfaces for name in without),
            )


def vrf(e: Evidence) -> Iterator[Finding]:
    for link in e.captured_links:
        if link.master_kind == "vrf":
            yield Finding(
                seen=f"{link.name} belongs to the VRF {link.master}",
                why="the listener is in no VRF, and the kernel gives it no connections of one (net.ipv4.tcp_l3mdev_accept = 0): they are "
                "refused; tproxyd does not support VRFs"
                if e.config.redirects
                else "a VRF's rule comes before ours, so steered packets are not delivered: connections through it hang",
                remedy=f"ip link set dev {quoted(link.name)} nomaster",
            )


def _where(e: Evidence, name: str, value: str) -> str:
    """The settings of all captured interfaces that have this value, `all` among them."""
    links = ["all", *(link.name for link in e.captured_links)]
    found = [f"net.ipv4.conf.{link}.{name}" for link in links if e.sysctls.get(f"net/ipv4/conf/{link}/{name}") == value]
    return f"{_names(found)} = {value}" if found else ""


def _spare(e: Evidence, family: int) -> str:
    """An address of this host that an interface may have besides another, or one that everybody may give himself."""
    for link in e.links:
        for address in link.addresses:
            if link.name != "lo" and (":" in address) == (family == 6) and not ip_address(address).is_link_local:
                return f"{address}/{ip_address(address).max_prefixlen}" + (" nodad" if family == 6 else "")
    return "fe80::8/64 nodad" if family == 6 else f"{_DUMMY}/32"


def _rp_filter(e: Evidence, link: str) -> int:
    return max(int(e.sysctls.get(f"net/ipv4/conf/{name}/rp_filter", "0")) for name in ("all", link))


def _kube_proxy(e: Evidence) -> bool:
    """It needs route_localnet for node ports on 127.0.0.1."""
    return "kube-proxy" in e.processes.values()


def _is_listed(port: int, ranges: str) -> bool:
    for part in filter(None, ranges.split(",")):
        first, _, last = part.partition("-")
        if int(first) <= port <= int(last or first):
            return True
    return False


def _names(names: list[str] | list[int]) -> str:
    return ", ".join(map(str, names))


CHECKS: tuple[Check, ...] = (
    loopback_down,
    ipv6_off,
    small_mtu,
    src_valid_mark,
    rp_filter,
    route_localnet,
    br_netfilter,
    forwarding_off,
    forwarding_captures_all,
    syn_cookies_always,
    backlog_cut,
    listen_port_not_reserved,
    conntrack_full,
    ephemeral_ports,
    time_wait_full,
    interface_missing,
    interface_down,
    address_missing,
    vrf,
)
