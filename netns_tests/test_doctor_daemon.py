"""`tproxyd doctor` and a daemon that lives: what it tells of itself, and how it is started again."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from netns_tests.patients import HERE, REFUSE, THERE, Patient, names_of
from netns_tests.watch import relay_processes
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


# Captures the namespace that it runs in, and has a worker of its own that is none of tproxyd's.
AGENT = """
import os, signal, subprocess, sys, tomllib, trio, tproxyd

async def main():
    other = subprocess.Popen([sys.executable, "-I", "-S", sys.argv[2], "sleep"], stdout=subprocess.PIPE)
    other.stdout.readline()
    other.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, other.pid, os.WSTOPPED)
    try:
        async with tproxyd.open_interceptor(tomllib.loads(sys.argv[1]) | {"relay": {"workers": 1}}, own_namespace=True):
            print("open", other.pid, flush=True)
            await trio.to_thread.run_sync(sys.stdin.read)
    finally:
        other.kill()
        other.wait()

trio.run(main)
"""


async def test_a_child_of_an_embedding_program_that_is_no_relay_process_is_not_taken_for_one(
    sidecar_lab: Lab, tmp_path: Path
) -> None:
    """Although it is a program of Python's, called worker.py as well, and stopped, which would be a failure of ours."""
    host = sidecar_lab["host"]
    directory = tmp_path / "datapath"
    directory.mkdir()
    own = directory / "worker.py"
    own.write_text("import time; print('here', flush=True); time.sleep(600)\n", encoding="utf-8")
    patient = Patient(host, HERE, tmp_path)
    command = (sys.executable, "-c", AGENT, HERE, str(own))
    async with host.process(*command, collect=True, stdin=subprocess.PIPE) as agent:
        await agent.wait_for_output("open")
        evidence = await patient.evidence()
        other = int(agent.stdout_text.split()[1])
        (relay,) = set(relay_processes(agent.pid)) - {other}
        assert [process.pid for process in evidence.relays] == [relay]
        assert await patient.found() == []
        assert agent.stdin is not None
        await agent.stdin.aclose()
        assert await agent.wait() == 0, agent.stderr_text
