"""The administrator's own SSH: what becomes of it when the ports of capture have its port.

Through "all" or a range it is there by chance, and capturing it could lock out whoever types the command: it is spared, for this
host's own addresses alone, by the first rule of the capture chain. Named singly, it is what the user wants.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tproxyd.config import Config, PortRange
from tproxyd.plan.model import Surroundings

__all__ = ["SPARED", "nft_ports", "spared_in", "spared_ports", "ssh_remarks"]

SPARED = "SSH of this host, here only through a range: not captured, nobody is locked out"
_LISTED = re.compile(rf'tcp dport ([^"]+) fib daddr type local return comment "{SPARED}"')


def spared_ports(config: Config, surroundings: Surroundings) -> tuple[int, ...]:
    """SSH ports that only a range captures."""
    return tuple(port for port in _captured(config, surroundings) if not _named(config, port))


def nft_ports(ports: Sequence[int]) -> str:
    """So many ports as nft lists them in a match: one element in braces is listed without them."""
    return str(ports[0]) if len(ports) == 1 else f"{{ {', '.join(map(str, ports))} }}"


def spared_in(listing: str) -> tuple[int, ...]:
    """The ports that a table spares which is listed so."""
    found = _LISTED.search(listing)
    return tuple(map(int, re.findall(r"\d+", found[1]))) if found else ()


def ssh_remarks(config: Config, surroundings: Surroundings) -> tuple[str | None, str | None]:
    """A sentence about SSH ports that are spared, and one, a warning, about those that are captured; None where there are none."""
    spared = spared_ports(config, surroundings)
    taken = [port for port in _captured(config, surroundings) if port not in spared]
    return (
        f"SSH of this host ({_shown(spared)}) is in `capture.ports` only through a range, and therefore not captured; "
        "who wants it captured names the port singly"
        if spared
        else None,
        f"SSH of this host ({_shown(taken)}) is named in `capture.ports`, and its new connections are captured: if that goes wrong, you "
        "cannot log in again; leave it out, or try it with `tproxyd apply --confirm 60`"
        if taken
        else None,
    )


def _captured(config: Config, surroundings: Surroundings) -> list[int]:
    return [port for port in sorted(set(surroundings.ssh_ports)) if config.capture.takes_port(port)]


def _named(config: Config, port: int) -> bool:
    return PortRange(port, port) in config.capture.ports


def _shown(ports: tuple[int, ...] | list[int]) -> str:
    return f"port{'s' if len(ports) > 1 else ''} {', '.join(map(str, ports))}"
