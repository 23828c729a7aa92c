"""Checks of the programs around: nft and the kernel's modules, and what else runs here and meddles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tproxyd import kernel
from tproxyd.daemon.doctor.model import Check, Evidence, Finding
from tproxyd.kernel import ChainRule
from tproxyd.plan.ssh import spared_ports

__all__ = ["CHECKS"]

_MODULES = {"tproxy": "nft_tproxy nft_socket", "redirect": "nft_chain_nat nft_redir nft_ct"}


def nft_missing(e: Evidence) -> Iterator[Finding]:
    if e.nft_version is None and e.refused_start is None:
        yield Finding(
            seen="there is no program nft that works",
            why="without it neither `apply` nor `revert` nor this examination can see or change the ruleset",
            remedy="apt-get install nftables",
        )


def nft_too_old(e: Evidence) -> Iterator[Finding]:
    if kernel.is_too_old(e.nft_version) and e.refused_start is None:
        yield Finding(
            seen=f"the program nft is too old: {e.nft_version}",
            why="the next start will be refused",
            remedy="apt-get install nftables",
        )


def libnftables_missing(e: Evidence) -> Iterator[Finding]:
    if e.nft_version is not None and not e.has_library:
        yield Finding(
            seen="there is no libnftables.so.1",
            why="the daemon cannot own its table: another program's `nft flush ruleset` interrupts connections until it is repaired",
            remedy="apt-get install libnftables1",
            warning=True,
        )


def kernel_refuses_ruleset(e: Evidence) -> Iterator[Finding]:
    if e.refused_ruleset is not None:
        yield Finding(
            seen=e.refused_ruleset,
            why="the kernel does not take the ruleset, so nothing can be captured",
            remedy=f"modprobe -a {_MODULES['redirect' if e.config.redirects else 'tproxy']} nft_fib_inet nft_reject_inet",
        )


def networkd(e: Evidence) -> Iterator[Finding]:
    if "systemd-network" in e.processes.values() and not e.networkd_spares_us:  # the kernel keeps fifteen letters
        yield Finding(
            seen="systemd-networkd runs, and is not told to leave other programs' ip rules and routes alone",
            why="when it restarts it deletes ours: the daemon puts them back, `tproxyd apply` alone cannot",
            remedy="mkdir -p /etc/systemd/networkd.conf.d\n"
            "printf '[Network]\\nManageForeignRoutingPolicyRules=no\\nManageForeignRoutes=no\\n' > "
            "/etc/systemd/networkd.conf.d/tproxyd.conf\nsystemctl restart systemd-networkd",
            warning=True,
        )


def firewalld(e: Evidence) -> Iterator[Finding]:
    if "firewalld" in e.processes.values() and e.chains is not None and not _admits(e):
        port, redirects = e.config.listen.port, e.config.redirects
        words = (
            f"-p tcp --dport {port} -m conntrack --ctstate DNAT"
            if redirects
            else f"-m mark --mark {e.plan.marks.steering}"
        )
        yield Finding(
            seen=f"firewalld runs, and none of its rules admits what is {'brought' if redirects else 'steered'} here",
            why=f"its INPUT rules see captured connections with {f'the port {port}' if redirects else 'their original port'} and reject "
            "what they do not know; a reload of it may remove rules that were put there by hand",
            remedy=f"firewall-cmd --permanent --direct --add-rule ipv4 filter INPUT 0 {words} -j ACCEPT\n"
            f"firewall-cmd --permanent --direct --add-rule ipv6 filter INPUT 0 {words} -j ACCEPT\nfirewall-cmd --reload",
            warning=True,
        )


def iptables_legacy(e: Evidence) -> Iterator[Finding]:
    if e.legacy_tables:
        yield Finding(
            seen=f"there are rules of iptables-legacy: {', '.join(e.legacy_tables)}",
            why="they act beside nft, which does not show them, and neither can this examination see what they drop or mark",
            remedy="iptables-legacy-save | iptables-nft-restore && iptables-legacy -F\n"
            "ip6tables-legacy-save | ip6tables-nft-restore && ip6tables-legacy -F",
            warning=True,
        )


def ssh_captured(e: Evidence) -> Iterator[Finding]:
    spared = spared_ports(e.config, e.surroundings)
    captured = [port for port in e.ssh_ports if e.config.capture.takes_port(port) and port not in spared]
    if captured and e.config.captures:
        excluded = sorted({*map(str, e.config.capture.exclude_ports), *map(str, captured)})
        yield Finding(
            seen=f"SSH listens on port {', '.join(map(str, captured))}, which is captured",
            why='your way to this host leads through the proxy: when that hangs, or dies with when_down = "refuse", you are locked out',
            remedy=f"# in {e.configuration}, under [capture]: exclude_ports = {excluded}\n".replace("'", '"')
            + e.restart(),
            warning=True,
        )


def _admits(e: Evidence) -> bool:
    steering = e.plan.marks.steering
    marks = (f"{steering.value:#010x}", f"{steering.value:#x}")

    def admits(rule: ChainRule) -> bool:
        if e.config.redirects:  # as its own rules do
            return any("dnat" in _words_of(one, "ct") for one in rule.statements)
        return "mark" in rule.text and any(word in rule.text for word in marks)

    return any(
        chain.hook == "input" or "INPUT" in chain.name
        for chain in e.chains or ()
        for rule in chain.rules
        if admits(rule)
    )


def _words_of(statement: dict[str, Any], kind: str) -> list[Any]:
    """What a match of this kind is compared with."""
    match statement:
        case {"match": {"left": dict() as left, "right": right}} if kind in left:
            return right if isinstance(right, list) else [right]
    return []


CHECKS: tuple[Check, ...] = (
    nft_missing,
    nft_too_old,
    libnftables_missing,
    kernel_refuses_ruleset,
    networkd,
    firewalld,
    iptables_legacy,
    ssh_captured,
)
