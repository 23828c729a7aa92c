"""`tproxyd doctor` where others keep clients from being answered: what they drop in the hooks output and postrouting, and ip rules of theirs
that come first."""

from __future__ import annotations

from pathlib import Path

import pytest

from netns_tests.patients import GONE, HERE, THERE, Fault, Patient, applied, names_of, table
from tproxyd.testing import Lab
from tproxyd.testing.daemon import open_daemon

REDIRECT = 'mode = "redirect"\n'
OUTPUT = "type filter hook output priority filter; policy drop;"
MINE = (
    'oifname "lo" accept',
    "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept",
    "meta l4proto icmp accept",
)

ANSWERS_DROPPED = {
    "policy": (HERE, table(OUTPUT, *MINE, "tcp dport 443 accept", "ct state established,related accept")),
    "postrouting": (HERE, table("type filter hook postrouting priority mangle;", "ct state untracked drop")),
    "before-conntrack": (HERE, table("type filter hook output priority raw - 10;", "tcp sport 8000-8100 drop")),
    "redirect-output": (HERE + REDIRECT, table(OUTPUT, *MINE, "tcp sport { 22, 8080 } accept")),
    "redirect-postrouting": (
        HERE + REDIRECT,
        table("type filter hook postrouting priority srcnat + 10;", "tcp sport 8080 drop"),
    ),
}


@pytest.mark.parametrize("name", ANSWERS_DROPPED)
async def test_10_answers_to_clients_that_are_dropped_are_named(sidecar_lab: Lab, tmp_path: Path, name: str) -> None:
    host, (config, fault) = sidecar_lab["host"], ANSWERS_DROPPED[name]
    patient = Patient(host, config, tmp_path)
    async with open_daemon(host, config) as daemon:
        await patient.sh(fault)
        report = await patient.probed()
        assert set(names_of(report)) == {"output-drops", "probe"}
        finding = report.findings[0][1]
        assert not finding.warning
        probes = [finding.remedy for name, finding in report.findings if name == "probe"]
        assert all(" --in eth0 -c " in remedy for remedy in probes)
        assert " '[2001:db8:" in probes[1]
        for remedy in probes:
            await patient.sh(remedy)
        assert "which are the answers to captured clients" in finding.seen
        await patient.mend(report, "output-drops")
        report = await patient.probed()
        # There our own packets to the app are dropped, too, which is another fault.
        assert set(names_of(report)) == ({"probe-return"} if name == "postrouting" else set())
        assert [one.result for one in report.probes if one.half == "capture"] == ["captured", "captured"]
        assert await daemon.stop() == 0


async def test_10_output_rules_that_let_answers_pass_are_not_found(sidecar_lab: Lab, tmp_path: Path) -> None:
    async with applied(sidecar_lab["host"], HERE, tmp_path) as patient:
        for rules in (
            (*MINE, "tcp sport 8080 accept"),
            (*MINE, "ct state established,related,untracked accept"),
            (*MINE, 'oifname "eth*" accept'),
        ):
            await patient.sh(table(OUTPUT, *rules))
            assert await patient.found() == [], rules
            await patient.sh(GONE)
        await patient.suffers(Fault("output-drops", table(OUTPUT, *MINE, "tcp sport 8081 accept"), GONE))


async def test_an_ip_rule_of_others_for_some_clients_is_a_warning(gateway_lab: Lab, tmp_path: Path) -> None:
    """As for several uplinks. Its table has to lead somewhere, and it has to come before ours."""
    async with applied(gateway_lab["gateway"], THERE, tmp_path) as patient:
        for rule in ("from 192.0.2.0/24", "not fwmark 0x80000/0xff0000"):
            await patient.sh(f"ip rule add priority 100 {rule} lookup 77")
            assert await patient.found() == []
            await patient.sh("ip route add default via 198.51.100.2 table 77")
            report = await patient.report()
            assert names_of(report) == ["rule-before-ours"]
            finding = report.findings[0][1]
            assert finding.warning
            assert f"`100: {'not from all' if rule[:3] == 'not' else 'from'} " in finding.seen
            assert "connections to other hosts' addresses that it takes are not delivered here" in finding.why
            assert "routing.priority below 98" in finding.remedy
            await patient.sh("ip rule del priority 100; ip rule add priority 6000 from 192.0.2.0/24 lookup 77")
            assert await patient.found() == []
            await patient.sh("ip rule del priority 6000; ip route flush table 77")
        await patient.sh(
            "ip rule add priority 100 lookup local; ip rule add priority 101 from 192.0.2.0/24 lookup local"
        )
        assert await patient.found() == []
