"""`tproxyd doctor` and a daemon that lives: what it tells of itself, and how it is started again."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import trio

from netns_tests.patients import HERE, REFUSE, THERE, Patient, names_of
from tproxyd.testing import Lab
from tproxyd.testing.daemon import TPROXYD, open_daemon

REDIRECT = 'mode = "redirect"\n'


@pytest.mark.parametrize("config", [HERE + REFUSE, HERE + REDIRECT], ids=["tproxy", "redirect"])
async def test_a_daemon_that_was_told_to_revert_is_one_finding(sidecar_lab: Lab, tmp_path: Path, config: str) -> None:
    host = sidecar_lab["host"]
    patient = Patient(host, config, tmp_path)
    async with open_daemon(host, config) as daemon:
        await host.run(*TPROXYD, "revert")
        report = await patient.probed()
        assert names_of(report) == ["daemon-reverted"]
        assert "`tproxyd revert` was given to the daemon" in report.findings[0][1].seen
        assert report.findings[0][1].remedy.splitlines()[1] == (
            f"kill {daemon.process.pid}; tail --pid={daemon.process.pid} -f /dev/null"
        )
        assert {one.reason for one in report.probes} == {"`tproxyd revert` was given to the daemon"}
        assert await daemon.stop() == 0


@pytest.mark.parametrize(
    "other",
    [HERE, HERE + REFUSE + 'exclude_ports = ["8081"]\n', HERE + REFUSE + "[listen]\nport = 15999\n", THERE + REFUSE],
    ids=["no guard", "other ports", "another listener", "other destinations"],
)
async def test_a_daemon_with_another_configuration_is_one_finding(sidecar_lab: Lab, tmp_path: Path, other: str) -> None:
    host = sidecar_lab["host"]
    host.set_sysctl("net.ipv4.ip_forward", 1)
    host.set_sysctl("net.ipv6.conf.all.forwarding", 1)
    patient = Patient(host, HERE + REFUSE, tmp_path)
    async with open_daemon(host, HERE + REFUSE) as daemon:
        assert await patient.found() == []
        report = await patient.report(other)
        assert names_of(report) == ["other-configuration"]
        finding = report.findings[0][1]
        assert str(patient.file) in finding.seen
        assert finding.remedy.splitlines()[2] == f"tproxyd run -c {patient.file}"
        assert await daemon.stop() == 0


async def test_the_command_that_starts_a_daemon_again_is_its_own(sidecar_lab: Lab, tmp_path: Path) -> None:
    """Each word as the shell takes it. It ends the one that serves, waits until it has, and starts another."""
    host = sidecar_lab["host"]
    directory = tmp_path / "with space"
    directory.mkdir()
    file = directory / "a;b.toml"
    patient = Patient(host, HERE, tmp_path)
    file.write_text(HERE, encoding="utf-8")
    async with host.process(*TPROXYD, "run", "-c", str(file), collect=True) as daemon:
        await daemon.wait_for_output("ready")
        host.set_sysctl("net.core.somaxconn", 100)
        report = await patient.report()
        assert names_of(report) == ["backlog-cut"]
        remedy = report.findings[0][1].remedy
        assert remedy.splitlines()[-1] == shlex.join([sys.executable, *TPROXYD[1:], "run", "-c", str(file)])
        async with host.process("sh", "-c", remedy, collect=True) as again:
            with trio.fail_after(20):
                assert await daemon.wait() == 0  # nobody else takes note that it has ended
                await again.wait_for_output("ready")
            assert await patient.found() == []
            evidence = await patient.evidence()
            assert evidence.holder is not None
            assert evidence.holder.pid != daemon.pid
            await host.run("kill", str(evidence.holder.pid))
            with trio.fail_after(20):
                await again.wait()
