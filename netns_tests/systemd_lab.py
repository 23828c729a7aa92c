"""A real systemd in a node of a lab: process 1 of namespaces of its own, with the units of this checkout and nothing else.

Knows how such a system is made: fresh /run, /tmp, /etc and /usr/sbin that only it sees (the machine's files show through as links to what is mounted read-only), a branch of the cgroup tree
of its own, the user that sysusers.d makes, and `/usr/sbin/tproxyd`, which is this checkout's. Refuses to know what is tested. Everything in it dies with its
process 1, and the lab's reaper finds that by the node's network namespace.
"""

from __future__ import annotations

import compileall
import itertools
import os
import re
import shutil
import signal
import sys
import sysconfig
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import trio

import tproxyd
from tproxyd.testing import LabError, Node
from tproxyd.testing.process import Finished, LabProcess

__all__ = ["UNITS", "System", "compile_program", "open_systemd"]

UNITS = Path(__file__).parent.parent / "systemd"

_TARGETS = (
    *("basic", "default", "final", "multi-user", "network", "network-pre", "shutdown", "sockets", "sysinit", "umount"),
    *("exit", "paths", "slices", "timers"),
)
# Of a Python that was built elsewhere than its files are in there.
_ELSEWHERE = {} if sys.base_prefix == "/usr" else {"LD_LIBRARY_PATH": "/run/lab/base/lib"}
_NUMBERS = itertools.count()
_BOOT_SECONDS = 20.0  # it takes half a second

# Process 1 before it becomes systemd. $1: the directory that this module has filled.
_BOOT = r"""
set -eu
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lab/log /run/netns /run/units
cp -R "$1"/. /run/lab/
for netns in /run/lab/netns/*; do
    [ -e "$netns" ] || continue
    touch "/run/netns/${netns##*/}"
    mount -c --bind "$(cat "$netns")" "/run/netns/${netns##*/}"
done
for place in code site base; do
    if [ -e "/run/lab/at/$place" ]; then
        mkdir "/run/lab/$place"
        mount --bind "$(cat "/run/lab/at/$place")" "/run/lab/$place"
    fi
done
for place in etc usr/sbin; do
    mkdir -p "/run/lab/real/$place"
    mount --bind "/$place" "/run/lab/real/$place"
    mount -o remount,bind,ro "/run/lab/real/$place"
    mount -t tmpfs -o mode=755 tmpfs "/$place"
    ln -s "/run/lab/real/$place"/* "/$place/"
done
for file in passwd group shadow gshadow; do
    rm -f "/etc/$file"
    [ ! -e "/run/lab/real/etc/$file" ] || cp -p "/run/lab/real/etc/$file" /etc/
done
rm -rf /etc/systemd /etc/tproxyd /etc/machine-id
echo 0123456789abcdef0123456789abcdef >/etc/machine-id
mkdir -p /etc/systemd/system
systemd-sysusers /run/lab/sysusers.conf
mkdir -p /etc/tproxyd
cp /run/lab/etc/* /etc/tproxyd/
systemd-tmpfiles --create /run/lab/tmpfiles.conf
cp -R /run/lab/units/. /run/units/
install -m 755 /run/lab/tproxyd /usr/sbin/tproxyd
for place in /tmp /var/tmp /var/lib /var/log; do
    mount -t tmpfs -o mode=1777 tmpfs "$place"
done
mount -t proc proc /proc
umount -l /sys/fs/cgroup || true
[ ! -e /dev/console ] || mount --bind /dev/null /dev/console
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=lab SYSTEMD_UNIT_PATH=/run/units /lib/systemd/systemd --system \
    --log-target=null --show-status=no
"""

# Before that: a place in the cgroup tree, then the namespaces.
_ENTER = r"""
set -eu
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir /run/cgroup
mount -t cgroup2 cgroup2 /run/cgroup
mkdir "/run/cgroup/$2"
echo $$ >"/run/cgroup/$2/cgroup.procs"
umount /run/cgroup
exec unshare --pid --fork --kill-child --mount --cgroup sh -c "$3" sh "$1"
"""

_LEAVE = r"""
mount --make-rprivate /
mount -t cgroup2 cgroup2 /sys/fs/cgroup
find "/sys/fs/cgroup/$1" -depth -type d -exec rmdir {} ';'
"""


class System:
    """A running systemd. Paths are those that its processes see."""

    def __init__(self, node: Node, process: LabProcess, init: int) -> None:
        self.node = node
        self.process = process
        self.init = init

    async def run(self, *argv: str, check: bool = True, timeout: float = 60.0, input: str | None = None) -> Finished:  # noqa: A002  # as Node.run
        """Runs a program beside it, as root."""
        return await self.node.run(
            *("nsenter", "--target", str(self.init), "--mount", "--pid", "--cgroup", "--", *argv),
            check=check,
            timeout=timeout,
            input=input,
            env=_ELSEWHERE,
        )

    async def ctl(self, *arguments: str, check: bool = True) -> Finished:
        """`systemctl`. With `check`, LabError with what the unit's processes have said if it fails."""
        done = await self.run("systemctl", "--no-pager", *arguments, check=False)
        if check and done.returncode:
            raise LabError(f"systemctl {arguments} ended with {done.returncode}: {done.stderr}{self.log()}")
        return done

    async def show(self, name: str, unit: str = "tproxyd.service") -> str:
        """A property of a unit."""
        return (await self.run("systemctl", "show", f"--property={name}", "--value", unit)).stdout.strip()

    async def until(self, name: str, value: str, unit: str = "tproxyd.service", *, timeout: float = 20.0) -> None:
        """Waits until a property of a unit is so."""
        seen = ""
        with trio.move_on_after(timeout):
            while (seen := await self.show(name, unit)) != value:
                await trio.sleep(0.05)  # each look is two programs, which the daemon has to wait for on a small machine
            return
        raise LabError(f"{name} of {unit} is {seen!r} and not {value!r} after {timeout:g} s\n{self.log()}")

    async def main_pid(self, unit: str = "tproxyd.service") -> int:
        """The pid of a unit's main process, as this test sees it."""
        inner = int(await self.show("MainPID", unit))
        return next(pid for pid in self.pids() if _inner_pid(pid) == inner)

    async def workers(self, unit: str = "tproxyd.service") -> list[int]:
        """The pids of its children."""
        return _children(await self.main_pid(unit))

    def pids(self) -> list[int]:
        """Of all its processes, as this test sees them."""
        namespace = os.readlink(f"/proc/{self.init}/ns/pid")
        found = []
        for name in os.listdir("/proc"):
            if name.isdecimal():
                try:
                    if os.readlink(f"/proc/{name}/ns/pid") == namespace:
                        found.append(int(name))
                except OSError:
                    continue  # gone
        return found

    def path(self, inside: str) -> Path:
        """Where the test finds one of its files."""
        return Path(f"/proc/{self.init}/root{inside}")

    def configure(self, text: str, name: str = "tproxyd") -> None:
        """Writes a configuration file."""
        self.path(f"/etc/tproxyd/{name}.toml").write_text(text, encoding="utf-8")

    async def drop_in(self, text: str, unit: str = "tproxyd.service") -> None:
        """What an administrator would write with `systemctl edit`."""
        directory = self.path(f"/run/units/{unit}.d")
        directory.mkdir(exist_ok=True)
        (directory / "edit.conf").write_text(text, encoding="utf-8")
        await self.ctl("daemon-reload")

    def log(self) -> str:
        """What units and systemd have said so far."""
        said = [file.read_text(errors="replace") for file in sorted(self.path("/run/lab/log").glob("*.err"))]
        return "".join(said) + self.process.stderr_text

    def records(self, unit: str = "tproxyd.service") -> str:
        """The access log of a unit."""
        return self.path(f"/run/lab/log/{unit}.out").read_text()

    def outcomes(self) -> Counter[str]:
        """How many connections of `tproxyd.service` ended in which way, by its access log so far."""
        return Counter(re.findall(r'"outcome":"(\w+)"', self.records()))

    async def record(self, source: str, unit: str = "tproxyd.service") -> None:
        """Waits until the access log has the connection of the client with this address."""
        with trio.fail_after(5):
            while f'"source":"{source}"' not in self.records(unit):
                await trio.sleep(0.01)


def compile_program(directory: Path) -> Path:
    """A copy of the package with its bytecode, as an installation has it; `make` has none written into the checkout."""
    copy = directory / "code" / "tproxyd"
    shutil.copytree(Path(tproxyd.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert compileall.compile_dir(copy, quiet=2)
    return copy.parent


@asynccontextmanager
async def open_systemd(
    node: Node, directory: Path, code: Path, config: str, *, netns: Mapping[str, Node] | None = None
) -> AsyncIterator[System]:
    """Boots it in the node, with this configuration in /etc/tproxyd/tproxyd.toml and nothing started; killed at the end of the block. `code` is of
    `compile_program`, `directory` an empty one for what the system is made of; `netns` are nodes that it has in /run/netns, by name."""
    _fill(directory, code, config, netns or {})
    cgroup = f"tproxyd-lab-{os.getpid()}-{next(_NUMBERS)}"
    command = ("unshare", "--mount", "sh", "-c", _ENTER, "sh", str(directory), cgroup, _BOOT)
    try:
        async with node.process(*command, collect=True) as process:
            init = await _until_booted(node, process)
            try:
                yield System(node, process, init)
            finally:
                # With process 1 of a pid namespace all others in it have ended, and then the place in the cgroup tree is empty.
                os.kill(init, signal.SIGKILL)
                with trio.CancelScope(shield=True):
                    await process.wait()
    finally:
        with trio.CancelScope(shield=True):
            await node.run("unshare", "--mount", "sh", "-c", _LEAVE, "sh", cgroup, check=False)


def _fill(directory: Path, code: Path, config: str, netns: Mapping[str, Node]) -> None:
    for name in ("units", "etc", "netns", "at"):
        (directory / name).mkdir(parents=True)
    for file in UNITS.glob("*.s*"):
        if file.is_file():
            shutil.copy(file, directory / "units")
    for target in _TARGETS:
        text = f"[Unit]\nDescription={target}\nDefaultDependencies=no\n"
        (directory / "units" / f"{target}.target").write_text(text)
    edit = "[Service]\nStandardOutput=append:/run/lab/log/%n.out\nStandardError=append:/run/lab/log/%n.err\n"
    edit += "".join(f"Environment={variable}={value}\n" for variable, value in _ELSEWHERE.items())
    for unit in ("tproxyd.service", "tproxyd@.service"):
        drop_in = directory / "units" / f"{unit}.d"
        drop_in.mkdir()
        (drop_in / "lab.conf").write_text(edit)
    for kind in ("sysusers", "tmpfiles"):
        shutil.copy(UNITS / f"{kind}.d" / "tproxyd.conf", directory / f"{kind}.conf")
    (directory / "etc" / "tproxyd.toml").write_text(config)
    for other_name, other in netns.items():
        (directory / "netns" / other_name).write_text(f"/proc/{os.getpid()}/fd/{other.netns}")
    places = {"code": str(code), "site": sysconfig.get_path("purelib")}
    python = Path(sys.base_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")
    if sys.base_prefix != "/usr":  # it may be in somebody's home, which the sandbox hides
        places["base"] = sys.base_prefix
        python = Path("/run/lab/base", *python.relative_to(sys.base_prefix).parts)
    for place, path in places.items():
        (directory / "at" / place).write_text(path)
    (directory / "tproxyd").write_text(
        f"#!{python} -IB\nimport sys\nsys.path += ['/run/lab/code', '/run/lab/site']\n"
        "from tproxyd.__main__ import entry\nentry()\n"
    )


async def _until_booted(node: Node, process: LabProcess) -> int:
    with trio.move_on_after(_BOOT_SECONDS):
        while process.returncode is None:
            for init in _children(process.pid):
                enter = ("nsenter", "--target", str(init), "--mount", "--pid", "--cgroup", "--")
                if not (await node.run(*enter, "systemctl", "is-active", "default.target", check=False)).returncode:
                    return init
            await trio.sleep(0.02)
    raise LabError(f"systemd did not boot\n--- stdout\n{process.stdout_text}--- stderr\n{process.stderr_text}")


def _children(parent: int) -> list[int]:
    """Each thread has those that it has started."""
    lists = [file.read_text() for file in Path(f"/proc/{parent}/task").glob("*/children")]
    return [int(pid) for one in lists for pid in one.split()]


def _inner_pid(pid: int) -> int | None:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    return next(int(line.split()[-1]) for line in status.splitlines() if line.startswith("NSpid:"))
