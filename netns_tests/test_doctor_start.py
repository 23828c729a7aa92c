"""`tproxyd doctor --no-probe` where nobody serves."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from tproxyd.testing import Lab, Node
from tproxyd.testing.daemon import TPROXYD

HERE = '[capture]\nports = ["8080"]\ndestinations = ["local"]\n'


async def examined(node: Node, config: str, directory: Path, *, wrapped: str = "exec") -> list[dict[str, Any]]:
    """The findings; `wrapped` is the beginning of the shell's command line that examines."""
    file = directory / "tproxyd.toml"
    file.write_text(config, encoding="utf-8")
    command = shlex.join([*TPROXYD, "doctor", "-c", str(file), "--no-probe", "--json"])
    done = await node.run("unshare", "--mount", "sh", "-ec", f"{wrapped} {command}", check=False)
    assert done.stderr == ""
    findings: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    return findings


async def test_interfaces_are_named_as_nft_reads_them(sidecar_lab: Lab, tmp_path: Path) -> None:
    """A trailing asterisk alone is a pattern."""
    host = sidecar_lab["host"]
    await host.run("ip", "link", "add", "a[0]", "type", "bridge")
    for pattern, found in (("a[0]", False), ("a[*", False), ("a[1]", True), ("?[0]", True), ("b*", True)):
        findings = await examined(host, HERE + f'interfaces = ["eth0", "{pattern}"]\n', tmp_path)
        assert ("interface-missing" in [finding["check"] for finding in findings]) == found, pattern
