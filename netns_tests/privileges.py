"""What tests see of privileges: what each process of a daemon holds, and a daemon that is another user's."""

from __future__ import annotations

import os
import resource
import sys
import sysconfig
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from tproxyd.net.capabilities import CAPABILITIES
from tproxyd.testing import Node
from tproxyd.testing.daemon import TPROXYD, LabDaemon

__all__ = [
    "AS_ROOT",
    "AS_USER",
    "NOBODY",
    "Held",
    "as_user",
    "elsewhere",
    "held_by",
    "open_daemon_as",
    "readable",
    "to_come_back",
]

NOBODY = 65534


class Held(NamedTuple):
    """The capabilities of all threads of a process, by name; those of no name as numbers."""

    permitted: frozenset[str]
    effective: frozenset[str]
    inheritable: frozenset[str]
    ambient: frozenset[str]
    bounding: frozenset[str]
    no_new_privileges: bool


def held_by(pid: int) -> Held:
    """All threads must have the same: a capability that one of them keeps is the process's."""
    held = {_held(task / "status") for task in Path(f"/proc/{pid}/task").iterdir()}
    assert len(held) == 1, held
    return held.pop()


def _held(status: Path) -> Held:
    fields = dict(line.split(":\t", 1) for line in status.read_text(encoding="utf-8").splitlines())
    sets = [frozenset(_names(int(fields[name], 16))) for name in ("CapPrm", "CapEff", "CapInh", "CapAmb", "CapBnd")]
    permitted, effective, inheritable, ambient, bounding = sets
    return Held(permitted, effective, inheritable, ambient, bounding, fields["NoNewPrivs"].strip() == "1")


def _names(bits: int) -> Iterator[str]:
    names = {bit: name for name, bit in CAPABILITIES.items()}
    return (names.get(bit, str(bit)) for bit in range(64) if bits >> bit & 1)


AS_ROOT: Sequence[str] | None = None
"""As the test runs."""

AS_USER = ("net_admin", "net_raw", "net_bind_service")
"""Capabilities that a unit gives to a user."""


def as_user(capabilities: Sequence[str]) -> str:
    """What makes a command that of a user of no rights with these capabilities, as `AmbientCapabilities=` gives them, and no others."""
    given = ",".join(f"+{name}" for name in capabilities)
    drop = f"setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups --inh-caps -all"
    return f"{drop},{given} --ambient-caps {given} --bounding-set -all,{given}" if given else drop


def elsewhere(wrapper: str, *arguments: str, directory: str = "mode=755") -> tuple[str, ...]:
    """`tproxyd` from a directory that is made for it (options of tmpfs), in a mount namespace of its own.

    Interpreter and checkout may be in somebody's own directory, where no other user gets.
    """
    python = os.path.relpath(os.path.realpath(sys.executable), sys.base_prefix)
    places = {"python": sys.base_prefix, "site": sysconfig.get_path("platlib"), "checkout": Path(__file__).parents[1]}
    script = [
        "set -e",
        f"mount -t tmpfs -o {directory} none /mnt",
        *(f"mkdir /mnt/{name} && mount --bind '{where}' /mnt/{name}" for name, where in places.items()),
        "cd /",
        "export LD_LIBRARY_PATH=/mnt/python/lib PYTHONPATH=/mnt/checkout:/mnt/site",
        f'exec {wrapper} /mnt/python/{python} -m tproxyd "$@"',
    ]
    return ("unshare", "--mount", "sh", "-c", "\n".join(script), "sh", *arguments)


def to_come_back() -> set[str]:
    """What root's daemon keeps to come back from SCHED_IDLE: CAP_SYS_NICE where root, as in a container, may not raise RLIMIT_NICE."""
    _, hard = resource.getrlimit(resource.RLIMIT_NICE)
    held = held_by(os.getpid()).effective
    enough = hard == resource.RLIM_INFINITY or hard >= 20 or "24" in held  # CAP_SYS_RESOURCE
    return set() if enough else {"CAP_SYS_NICE"} & held


@contextmanager
def readable(text: str) -> Iterator[Path]:
    """A configuration file that any user may read; pytest's directories are for its own alone."""
    with TemporaryDirectory(prefix="tproxyd-lab-") as directory:
        file = Path(directory, "tproxyd.toml")
        file.write_text(text, encoding="utf-8")
        Path(directory).chmod(0o755)
        yield file


@asynccontextmanager
async def open_daemon_as(node: Node, config: str, capabilities: Sequence[str] | None) -> AsyncIterator[LabDaemon]:
    """`tproxyd run` as root (AS_ROOT), or as a user with these capabilities, who has no directory for a socket of the administrator's."""
    with readable(
        f'{config}[admin]\nsocket = ""\n' if capabilities is not None and "[admin]" not in config else config
    ) as file:
        arguments = ("run", "-c", str(file))
        command = (*TPROXYD, *arguments) if capabilities is None else elsewhere(as_user(capabilities), *arguments)
        async with node.process(*command, collect=True) as process:
            yield LabDaemon(process, await process.wait_for_output("tproxyd: ready "))
