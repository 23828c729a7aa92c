"""A Plan as text: for people, for nft, for a shell, for programs. The same content in each; nothing is added or left out."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from tproxyd.config import Endpoint
from tproxyd.plan.model import Plan
from tproxyd.plan.plan import PROTOCOL

__all__ = ["FORMATS", "render"]


def render(plan: Plan, form: str = "text") -> str:
    """The plan in one of FORMATS, ending with a newline. `nft` is what `nft -f -` loads; `shell` needs root, sh, ip, nft."""
    return FORMATS[form](plan)


def _text(plan: Plan) -> str:
    if not plan.tables:
        return "Nothing would be captured: no table, rule or route.\n"
    sections = []
    if plan.losses:
        sections += ["# What this mode loses", *(f"# - {loss}" for loss in plan.losses), ""]
    sections.append(f"# Listeners, {'' if plan.losses else 'transparent, '}opened before capture goes on")
    sections += [str(Endpoint(address, port)) for address, port in plan.listen]
    sections += ["", "# What is seen as the client"]
    sections += [f"by {who}: {what}" for who, what in plan.sources]
    sections += ["", "# Local routes"]
    for route in plan.routes:
        sections.append(f"ip -{route.family} route add {route.selector()} proto {PROTOCOL}    # {route.why}")
    if not plan.routes:
        sections.append("none")
    sections += ["", "# Rules"]
    for rule in plan.rules:
        sections.append(f"# {rule.why}")
        sections.append(f"ip -{rule.family} rule add {rule.selector()} protocol {PROTOCOL}")
    if not plan.rules:
        sections.append("none")
    sections += ["", "# Sysctls"]
    sections += [f"{name} = {value}" for name, value in plan.sysctls.items()] or ["none has to be changed"]
    sections += ["", "# Ruleset, in one transaction, last"]
    return "\n".join(sections) + "\n" + "\n".join(plan.tables.values())


def _nft(plan: Plan) -> str:
    return plan.ruleset


def _shell(plan: Plan) -> str:
    lines = [f"ip -{route.family} route add {route.selector()} proto {PROTOCOL}" for route in plan.routes]
    lines += [f"ip -{rule.family} rule add {rule.selector()} protocol {PROTOCOL}" for rule in plan.rules]
    lines += [f"sysctl -qw {name}={value}" for name, value in plan.sysctls.items()]
    return _SHELL_BEGIN + "\n".join(lines) + "\n\nnft -f - <<'RULESET'\n" + plan.ruleset + "RULESET\n"


_SHELL_BEGIN = f"""#!/bin/sh
# Makes the kernel hold what `tproxyd apply` makes it hold. Run as root. Unlike apply it removes and adds again what is there
# already, so packets of live connections may get lost, and be sent again, while it runs.
set -eu

# What is tproxyd's already, whichever configuration put it there: rules and routes by their protocol, tables by their name.
for family in -4 -6; do
    ip $family rule flush protocol {PROTOCOL} 2>/dev/null || :  # a kernel without this family has none
    ip $family route show table all proto {PROTOCOL} 2>/dev/null | while read -r route; do
        case $route in "local default "*) ip $family route del $route ;; esac
    done
done
nft list tables inet | while read -r _ _ name; do
    case $name in tproxyd_*) nft delete table inet "$name" ;; esac
done

"""


def _json(plan: Plan) -> str:
    content = {
        "losses": plan.losses,
        "sources": [{"upstream": who, "sees": what} for who, what in plan.sources],
        "listen": [str(Endpoint(address, port)) for address, port in plan.listen],
        "marks": {"steering": str(plan.marks.steering), "upstream": str(plan.marks.upstream)},
        "protocol": PROTOCOL,
        "routes": [{"family": r.family, "route": r.selector(), "why": r.why} for r in plan.routes],
        "rules": [{"family": r.family, "rule": r.selector(), "why": r.why} for r in plan.rules],
        "sysctls": plan.sysctls,
        "tables": plan.tables,
        "ruleset": plan.ruleset,
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=2).decode() + "\n"


FORMATS: dict[str, Callable[[Plan], str]] = {"text": _text, "nft": _nft, "shell": _shell, "json": _json}
"""The formats of `tproxyd plan --format`."""
