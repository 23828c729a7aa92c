"""`tproxyd doctor`: every known cause of silent failure, each with its remedy, and a live probe of capture and the way back.

One look at everything (`evidence`), then one small pure function a cause (`checks_*`), from what was seen to nothing or a finding. The
probe (`probe`) connects for real. Nothing is mended here: a remedy is a command for whoever reads it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import msgspec

from tproxyd.config import Config
from tproxyd.config.wording import printable
from tproxyd.daemon.doctor import checks_host, checks_others, checks_programs, checks_state
from tproxyd.daemon.doctor.evidence import gather
from tproxyd.daemon.doctor.model import Check, Evidence, Finding
from tproxyd.daemon.doctor.probe import PROBE_CHECKS, Probe, findings_of, probe

__all__ = ["CHECKS", "PROBE_CHECKS", "Report", "check_name", "doctor", "examine"]

CHECKS: tuple[Check, ...] = (
    *checks_state.CHECKS,
    *checks_programs.CHECKS,
    *checks_host.CHECKS,
    *checks_others.CHECKS,
)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What an examination has come to. `findings` are (name of the check, finding); `probes` empty: not asked for. `losses` is what the
    mode of capture lacks: nothing is wrong with that."""

    checks: int
    findings: tuple[tuple[str, Finding], ...]
    probes: tuple[Probe, ...]
    unseen: tuple[str, ...]
    losses: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong but risks."""
        return all(finding.warning for _, finding in self.findings)


def check_name(check: Check) -> str:
    """What a check is called in reports and documents."""
    return str(check.__name__).replace("_", "-")


def doctor(config: Config, file: str | None, *, probing: bool, as_json: bool) -> int:
    """Examines this network namespace and prints what it finds: 0 if nothing is wrong (or only warnings), 1 otherwise."""
    evidence = gather(config, file)
    report = examine(evidence, probe(evidence) if probing else ())
    sys.stdout.write(_json(report) if as_json else _text(report))
    return 0 if report.healthy else 1


def examine(evidence: Evidence, probes: Sequence[Probe]) -> Report:
    """Runs every check."""
    findings = [(check_name(check), finding) for check in CHECKS for finding in check(evidence)]
    findings += findings_of(evidence, probes)
    tried = any(one.result != "impossible" for one in probes)
    return Report(
        checks=len(CHECKS) + tried,
        # Failures first.
        findings=tuple(sorted(findings, key=lambda one: one[1].warning)),
        probes=tuple(probes),
        unseen=evidence.unseen,
        losses=evidence.plan.losses,
    )


def _text(report: Report) -> str:
    blocks = []
    for name, finding in report.findings:
        remedy = "\n".join(f"          {printable(line)}" for line in finding.remedy.split("\n")).strip()
        kind = "warning" if finding.warning else "FAILURE"
        seen, why = printable(finding.seen), printable(finding.why)
        blocks.append(f"{kind} {name}: {seen}\n    why:  {why}\n    mend: {remedy}\n")
    notes = []
    for one in report.probes:
        if one.result == "impossible":
            notes.append(f"IPv{one.family} not probed: {printable(one.reason)}\n")
        elif one.result == "captured":
            notes.append(
                f"IPv{one.family} probed: a connection from {one.source} to {one.destination} port {one.port} was captured\n"
            )
        elif one.result == "returned":
            notes.append(
                f"IPv{one.family} probed: {one.destination} port {one.port} answers to a client's address, and we get it\n"
            )
    notes += [f"not looked at: {printable(what)}\n" for what in report.unseen]
    notes += [f"redirect mode loses: {what}\n" for what in report.losses]
    failures = sum(not finding.warning for _, finding in report.findings)
    warnings = len(report.findings) - failures
    return "\n".join(
        [
            *blocks,
            "".join(notes)
            + f"{report.checks} checks made: {_count(failures, 'failure')}, {_count(warnings, 'warning')}\n",
        ]
    )


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def _json(report: Report) -> str:
    content = {
        "healthy": report.healthy,
        "checks": report.checks,
        "findings": [
            {
                "check": name,
                "severity": "warning" if finding.warning else "failure",
                "seen": finding.seen,
                "why": finding.why,
                "remedy": finding.remedy,
            }
            for name, finding in report.findings
        ],
        "probes": report.probes,
        "not_looked_at": report.unseen,
        "losses": report.losses,
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=2).decode() + "\n"
