"""`tproxyd doctor` where nobody serves: what would keep a daemon from starting, in the words of the start itself, is a finding."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from netns_tests.seccomp import WITHOUT_NF_TABLES
from tproxyd.testing import Lab, Node
from tproxyd.testing.daemon import TPROXYD

HERE = '[capture]\nports = ["8080"]\ndestinations = ["local"]\n'
GIVEN = '[routing]\nmark = "0x1000000/0x3000000"\nupstream_mark = "0x2000000/0x3000000"\n'

REFUSED = {
    "a rule to our table": (HERE, "ip rule add priority 6000 from 198.51.100.0/24 lookup 133", "# choose another routing.table, or remove the rule"),
    "a rule at our priority": (HERE, "ip rule add priority 5234 prohibit", "# choose another `routing.priority`, or move the rule"),
    "a mark in use": (
        HERE + GIVEN, "ip rule add priority 9000 fwmark 0x3000000/0x3000000 lookup 999",
        '# give bits that nobody uses, or "auto", which takes free ones'),
    "lo is down": (HERE, "ip link set lo down", "ip link set lo up"),
}  # fmt: skip


async def examined(node: Node, config: str, directory: Path, *, wrapped: str = "exec") -> list[dict[str, Any]]:
    """The findings; `wrapped` is the beginning of the shell's command line that examines."""
    file = directory / "tproxyd.toml"
    file.write_text(config, encoding="utf-8")
    command = shlex.join([*TPROXYD, "doctor", "-c", str(file), "--no-probe", "--json"])
    done = await node.run("unshare", "--mount", "sh", "-ec", f"{wrapped} {command}", check=False)
    assert done.stderr == ""
    findings: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    return findings


@pytest.mark.parametrize("name", REFUSED)
async def test_13_54_what_refuses_the_start_is_the_finding(sidecar_lab: Lab, tmp_path: Path, name: str) -> None:
    host = sidecar_lab["host"]
    config, fault, remedy = REFUSED[name]
    (idle,) = await examined(host, config, tmp_path)
    assert idle["check"] == "not-serving"
    await host.run("sh", "-ec", fault)
    started = await host.run(*TPROXYD, "run", "-c", str(tmp_path / "tproxyd.toml"), check=False)
    sentence = started.stderr.strip().removeprefix("tproxyd: ")
    findings = {finding["check"]: finding for finding in await examined(host, config, tmp_path)}
    assert "not-serving" not in findings
    assert "loopback-down" not in findings
    refused = findings["start-refused"]
    assert refused["severity"] == "failure"
    assert sentence in refused["seen"]
    assert refused["remedy"] == f"{remedy}\ntproxyd run -c {tmp_path}/tproxyd.toml"


async def test_54_an_nft_that_is_too_old_or_missing_is_told_once(sidecar_lab: Lab, tmp_path: Path) -> None:
    """Files that are mounted over the program stand in."""
    host = sidecar_lab["host"]
    nft = (await host.run("sh", "-c", "command -v nft")).stdout.strip()
    old = tmp_path / "nft"
    old.write_text("#!/bin/sh\necho 'nftables v0.9.8 (E.D.S.)'\n")
    old.chmod(0o755)
    for stand_in, said in ((old, "nft is too old (nftables v0.9.8"), (Path("/dev/null"), "the program nft ")):
        findings = await examined(host, HERE, tmp_path, wrapped=f"mount --bind {stand_in} {nft}\nexec")
        told = [finding for finding in findings if "nft" in finding["check"] or finding["check"] == "start-refused"]
        assert [finding["check"] for finding in told] == ["start-refused"]
        assert said in told[0]["seen"]
        assert told[0]["remedy"] == f"apt-get install nftables\ntproxyd run -c {tmp_path}/tproxyd.toml"


async def test_54_a_kernel_without_nf_tables_is_examined_to_the_end(sidecar_lab: Lab, tmp_path: Path) -> None:
    """libnftables would end the process there."""
    wrapped = shlex.join(["exec", sys.executable, "-c", WITHOUT_NF_TABLES])
    refused, ruleset = await examined(sidecar_lab["host"], HERE, tmp_path, wrapped=wrapped)
    assert [refused["check"], ruleset["check"]] == ["start-refused", "kernel-refuses-ruleset"]
    assert refused["remedy"] == f"modprobe nf_tables\ntproxyd run -c {tmp_path}/tproxyd.toml"


async def test_interfaces_are_named_as_nft_reads_them(sidecar_lab: Lab, tmp_path: Path) -> None:
    """A trailing asterisk alone is a pattern."""
    host = sidecar_lab["host"]
    await host.run("ip", "link", "add", "a[0]", "type", "bridge")
    for pattern, found in (("a[0]", False), ("a[*", False), ("a[1]", True), ("?[0]", True), ("b*", True)):
        findings = await examined(host, HERE + f'interfaces = ["eth0", "{pattern}"]\n', tmp_path)
        assert ("interface-missing" in [finding["check"] for finding in findings]) == found, pattern
