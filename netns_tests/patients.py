"""Who the doctor examines in its tests: a node with one configuration, the faults that are injected there, and other programs' tables."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import trio

from tproxyd import kernel
from tproxyd.config import load_config
from tproxyd.daemon.doctor import Report, examine
from tproxyd.daemon.doctor.evidence import gather
from tproxyd.daemon.doctor.model import Evidence
from tproxyd.daemon.doctor.probe import probe
from tproxyd.net.sockets import open_listener
from tproxyd.plan import make_plan
from tproxyd.testing import Node
from tproxyd.testing.daemon import TPROXYD

__all__ = [
    "GONE",
    "HERE",
    "INPUT",
    "MANGLE",
    "MARK",
    "REFUSE",
    "THERE",
    "Fault",
    "Patient",
    "applied",
    "names_of",
    "program",
    "table",
]

HERE = '[capture]\nports = ["8080"]\ndestinations = ["local"]\n'
THERE = '[capture]\nports = ["8080"]\ndestinations = ["203.0.113.0/24", "2001:db8:f::/48"]\n'
REFUSE = 'when_down = "refuse"\n'
_PYTHON = Path(sys.executable).resolve()
STUBS = ("systemctl", "apt-get", "firewall-cmd", "modprobe")


class Fault(NamedTuple):
    """What makes it, what finds it. `undo` takes away what the remedy leaves; not `mends`: the remedy is an edit, or not for here."""

    check: str
    inject: str
    undo: str = ""
    mends: bool = True


class Patient:
    """A node that is examined with one configuration."""

    def __init__(self, node: Node, config: str, directory: Path) -> None:
        self.node = node
        self.file = directory / f"{node.name}.toml"
        self.file.write_text(config, encoding="utf-8")
        self.bin = directory / "bin"
        self.bin.mkdir(exist_ok=True)
        for name in STUBS:
            self._program(name, "exit 0")
        # A daemon would serve until it is stopped; tests start their own.
        self._program("tproxyd", f'[ "$1" != run ] || exit 0\nexec {" ".join(TPROXYD)} "$@"')

    def _program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (self.bin / name).chmod(0o755)

    async def evidence(self, config: str | None = None) -> Evidence:
        if config is not None:
            self.file.write_text(config, encoding="utf-8")
        return await self.node.call_async(gather, load_config(self.file), str(self.file))

    async def report(self, config: str | None = None) -> Report:
        return examine(await self.evidence(config), ())

    async def probed(self) -> Report:
        def both() -> Report:
            evidence = gather(load_config(self.file), str(self.file))
            return examine(evidence, probe(evidence))

        return await self.node.call_async(both)

    async def found(self, config: str | None = None) -> list[str]:
        return names_of(await self.report(config))

    async def sh(self, text: str) -> None:
        path = f"{self.bin}:{os.environ['PATH']}:/usr/sbin:/sbin"
        await self.node.run("sh", "-ec", text, env={"PATH": path})

    async def mend(self, report: Report, check: str) -> None:
        for name, finding in report.findings:
            if name == check:
                await self.sh(finding.remedy)

    async def runs(self, *arguments: str, before: str = "true") -> tuple[int, dict[str, Any], str]:
        """The command itself, in a mount namespace of its own. Its code, its JSON, its stderr."""
        command = " ".join([*TPROXYD, "doctor", "-c", str(self.file), "--json", *arguments])
        done = await self.node.run("unshare", "--mount", "sh", "-ec", f"{before}\nexec {command}", check=False)
        assert "Traceback" not in done.stderr
        return done.returncode, json.loads(done.stdout), done.stderr

    async def suffers(self, fault: Fault, *, soon: bool = False) -> None:
        """Injects the fault, sees exactly that finding, mends it as told, sees nothing. `soon`: once a daemon has repaired the rest."""
        await self.sh(fault.inject)
        with trio.move_on_after(3):
            while set(names_of(report := await self.report())) != {fault.check} and soon:
                await trio.sleep(0.05)
        assert set(names_of(report)) == {fault.check}, (fault, report.findings)
        for name, finding in report.findings:
            assert all((finding.seen, finding.why, finding.remedy)), name
        if fault.mends:
            await self.mend(report, fault.check)
            with trio.fail_after(3):
                while (left := (await self.report()).findings) and soon:
                    await trio.sleep(0.05)
            assert left == (), fault
        await self.sh(fault.undo)


def names_of(report: Report) -> list[str]:
    return [name for name, _ in report.findings]


@asynccontextmanager
async def applied(node: Node, config: str, directory: Path, *, backlog: int = 128) -> AsyncIterator[Patient]:
    """A healthy node without a daemon: `tproxyd apply`, and somebody's listeners (transparent, but for redirect mode)."""
    patient = Patient(node, config, directory)
    config_read = load_config(patient.file)
    plan = node.call(lambda: make_plan(config_read, surroundings=kernel.look_around()))
    await node.call_async(kernel.apply, plan)
    with ExitStack() as stack:
        make = partial(open_listener, backlog=backlog, transparent=not config_read.redirects)
        for address, port in plan.listen:
            stack.enter_context(node.call(make, address, port))
        assert (await patient.report()).findings == ()
        yield patient


@asynccontextmanager
async def program(node: Node, directory: Path, name: str, code: str) -> AsyncIterator[None]:
    """Python under another program's name."""
    (directory / name).symlink_to(_PYTHON)
    async with node.process(
        str(directory / name), "-Ic", code + "\nprint('up', flush=True)\ntime.sleep(60)", collect=True
    ) as one:
        await one.wait_for_output("up")
        yield


def table(hook: str, *rules: str, chain: str = "c") -> str:
    text = "\n".join(["table inet foreign {", f"chain {chain} {{", hook, *rules, "}", "}"])
    return f"nft -f - <<'END'\n{text}\nEND"


GONE = "nft delete table inet foreign"
INPUT = "type filter hook input priority filter; policy drop;"
MANGLE = "type filter hook prerouting priority mangle; policy accept;"
MARK = "meta mark & 0x3000000 == 0x1000000 accept"
