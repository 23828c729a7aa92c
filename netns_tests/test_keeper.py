"""The kernel's state of a namespace that is not the caller's own, kept from outside: put there, mended, taken away, and had by one alone."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from netns_tests.labs import BRIDGE
from netns_tests.watch import until
from tproxyd import kernel
from tproxyd.config import Config, config_from_mapping
from tproxyd.errors import ConfigError, KernelError, MissingError, TproxydError
from tproxyd.interceptor.keeper import Keeper
from tproxyd.interceptor.plan_book import PlanBook
from tproxyd.interceptor.threads import in_thread
from tproxyd.net.namespaces import NamespaceWatch, call_in_namespace, new_namespace
from tproxyd.net.ownership import hold_namespace
from tproxyd.plan import make_plan, table_names
from tproxyd.testing import SIDECAR, Lab, Node, read_state
from tproxyd.testing.daemon import TPROXYD, open_daemon
from tproxyd.testing.plugin import OpenLab

CONFIG = {"capture": {"ports": ["8080"], "when_down": "refuse"}}
TOML = '[capture]\nports = ["8080"]\nwhen_down = "refuse"\n'
NOTHING = kernel.Observed((), (), {})


def config(**tables: Any) -> Config:
    return config_from_mapping(CONFIG | tables)


@asynccontextmanager
async def open_keeper(netns: int, what: Config | None = None, **options: Any) -> AsyncIterator[Keeper]:
    """As an interceptor has it: whatever happens, nothing is left."""
    keeper = await in_thread(partial(Keeper, what or config(), netns=netns, **options))
    try:
        await keeper.put()
        try:
            async with trio.open_nursery() as watching:
                await watching.start(keeper.watch)
                yield keeper
                watching.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await keeper.leave()
    finally:
        keeper.close()


def tables(node: Node) -> list[str]:
    return sorted(node.call(kernel.observe).tables)


DRIFT = {
    "nft flush ruleset": {"ruleset": 1},
    "nft delete table inet tproxyd": {"ruleset": 1},
    "nft flush chain inet tproxyd capture": {"ruleset": 1},
    "ip rule del priority 5234": {"rule": 1},
    "ip -6 rule del priority 5234": {"rule": 1},
    "ip route flush table 133": {"route": 1},
    "ip -6 route flush table 133": {"route": 1},
}


async def test_what_others_change_in_a_kept_namespace_is_mended(sidecar_lab: Lab) -> None:
    """And nothing happens in the namespace of who keeps it."""
    host = sidecar_lab["host"]
    own, before = read_state(), await host.dump()
    async with open_keeper(host.netns) as keeper:
        planned = await host.dump()
        assert tables(host) == ["tproxyd", "tproxyd_guard"]
        assert await keeper.differences() == []
        for command, repairs in DRIFT.items():
            counted = keeper.repairs.copy()
            await host.run(*command.split())
            await until(lambda counted=counted: keeper.repairs != counted)  # type: ignore[misc]
            assert keeper.repairs - counted == repairs, command
            assert await host.dump() == planned, command
        assert read_state() == own
    assert await host.dump() == before


async def test_lo_and_ipv6_may_be_switched_off_and_on_in_a_kept_namespace(sidecar_lab: Lab) -> None:
    host = sidecar_lab["host"]
    before = await host.dump()
    async with open_keeper(host.netns) as keeper:
        planned = await host.dump()
        await host.run("sh", "-c", "ip link set lo down; ip link set lo up")
        await until(lambda: keeper.repairs["route"] == 1)  # the kernel takes the IPv6 one with it
        assert await host.dump() == planned
        host.set_sysctl("net.ipv6.conf.lo.disable_ipv6", 1)
        await until(lambda: keeper.surroundings.families == (4,))
        assert await keeper.differences() == []
        assert (await host.run("ip", "-6", "rule", "show", "priority", "5234")).stdout == ""
        host.set_sysctl("net.ipv6.conf.lo.disable_ipv6", 0)
        await until(lambda: keeper.repairs["ipv6"] == 2)
        assert keeper.surroundings.families == (4, 6)
        assert await host.dump() == planned
    assert await host.dump() == before


async def test_br_netfilter_is_looked_at_where_there_are_bridges(sidecar_lab: Lab) -> None:
    """Its settings are the kept namespace's. Without the module there is nothing to be switched, and bridges change nothing."""
    host = sidecar_lab["host"]
    async with open_keeper(host.netns) as keeper:
        planned = host.call(kernel.observe)
        await host.run("ip", "link", "add", "br0", "type", "bridge")
        if BRIDGE.exists():
            for value in ("1", "0"):
                await trio.sleep(
                    0.5
                )  # the news of the bridge, and of what was repaired, has come to an end: now there is none
                host.set_sysctl("net.bridge.bridge-nf-call-iptables", value)
                await until(lambda value=value: keeper.surroundings.bridge_netfilter == (value == "1"))  # type: ignore[misc]
                assert await keeper.differences() == []
        await host.run("ip", "link", "del", "br0")
        assert host.call(kernel.observe) == planned


async def test_a_tproxyd_apply_in_a_kept_namespace_is_taken_over_and_stays(sidecar_lab: Lab, tmp_path: Path) -> None:
    host, file = sidecar_lab["host"], tmp_path / "tproxyd.toml"
    file.write_text(TOML, encoding="utf-8")
    await host.run(*TPROXYD, "apply", "-c", str(file))
    applied = await host.dump()
    async with open_keeper(host.netns) as keeper:
        assert await keeper.differences() == []
    assert await host.dump() == applied


class CancelAt(trio.abc.Instrument):
    def __init__(self, step: int, scope: trio.CancelScope) -> None:
        self.step, self.scope, self.seen = step, scope, 0

    def before_task_step(self, task: object) -> None:
        self.seen += 1
        if self.seen == self.step:
            self.scope.cancel()


async def test_61_cancelled_at_any_step_nothing_is_left_in_a_kept_namespace(sidecar_lab: Lab) -> None:
    host = sidecar_lab["host"]
    before, step, seen = await host.dump(), 0, 1
    with closing(PlanBook()) as book:
        while seen >= step:
            step += 1
            with trio.CancelScope() as scope:
                instrument = CancelAt(step, scope)
                trio.lowlevel.add_instrument(instrument)
                try:
                    async with open_keeper(host.netns, book=book) as keeper:
                        await keeper.stop_capture()
                finally:
                    trio.lowlevel.remove_instrument(instrument)
            seen = instrument.seen
            assert host.call(kernel.observe) == NOTHING, step
    assert step > 5
    assert await host.dump() == before


@contextmanager
def closing(book: PlanBook) -> Iterator[PlanBook]:
    try:
        yield book
    finally:
        book.close()


async def test_20_a_lock_that_is_just_being_given_up_refuses_nobody(sidecar_lab: Lab) -> None:
    """Closed by its owner, and for a moment somebody's yet who has looked at the file: here it is on its way through a socket."""
    host = sidecar_lab["host"]
    here, there = socket.socketpair()
    with here, there:
        held = host.call(hold_namespace, "capture here")
        socket.send_fds(here, [b"x"], [held.fileno()])
        held.close()
        closing_late = threading.Timer(0.02, there.close)
        closing_late.start()
        async with open_keeper(host.netns):
            pass
        closing_late.join()
        # Who stays is refused as before.
        with host.call(hold_namespace, "capture here"), pytest.raises(KernelError, match="this very process"):
            Keeper(config(), netns=host.netns)


async def test_20_a_namespace_has_one_keeper(sidecar_lab: Lab, tmp_path: Path) -> None:
    """A second one is refused, and so are a daemon and every verb that would act on it; each names the one that is there."""
    host, file = sidecar_lab["host"], tmp_path / "tproxyd.toml"
    file.write_text(TOML, encoding="utf-8")
    before = await host.dump()
    async with open_keeper(host.netns):
        kept = await host.dump()
        with pytest.raises(KernelError, match=rf"an embedding program, .* \(pid {os.getpid()}, this very process\)"):
            Keeper(config(), netns=host.netns)
        named = f"(pid {os.getpid()}), keeps this network namespace"
        for verb, code in (
            (("run", "-c", str(file)), 71),
            (("apply", "-c", str(file)), 1),
            (("revert",), 71),
            (("revert", "--name", "mesh"), 71),
            (("status",), 3),
        ):
            done = await host.run(*TPROXYD, *verb, check=False, timeout=10)
            assert (done.returncode, named in done.stderr) == (code, True), (verb, done)
        done = await host.run(*TPROXYD, "confirm", check=False)
        assert (done.returncode, f"(pid {os.getpid()})" in done.stderr) == (69, True), done
        assert (
            "the kernel holds the plan"
            in (await host.run(*TPROXYD, "explain", "-c", str(file), "192.0.2.2", "192.0.2.1:8080")).stdout
        )
        assert await host.dump() == kept
    assert await host.dump() == before
    async with open_keeper(host.netns):
        assert await host.dump() == kept
    assert await host.dump() == before


async def test_a_namespace_that_a_daemon_serves_is_not_kept(sidecar_lab: Lab) -> None:
    host = sidecar_lab["host"]
    async with open_daemon(host, TOML) as daemon:
        served = await host.dump()
        with pytest.raises(KernelError, match=rf"\(pid {daemon.process.pid}\) serves this network namespace"):
            Keeper(config(), netns=host.netns)
        assert await host.dump() == served
        # An order that names the tables of somebody else is none to this daemon.
        done = await host.run(*TPROXYD, "revert", "--name", "mesh", check=False)
        assert (done.returncode, f"(pid {daemon.process.pid}) serves" in done.stderr) == (71, True), done
        assert await host.dump() == served
        assert await daemon.stop() == 0


async def test_what_keeps_a_config_from_working_is_found_in_the_kept_namespace(sidecar_lab: Lab) -> None:
    """And the namespace is free again."""
    host = sidecar_lab["host"]
    await host.run("ip", "route", "add", "local", "default", "dev", "lo", "table", "133")
    before = await host.dump()
    with pytest.raises(KernelError, match="has the route that tproxyd needs"):
        Keeper(config(), netns=host.netns)
    await host.run("ip", "route", "flush", "table", "133")
    await host.run("ip", "link", "set", "lo", "down")
    with pytest.raises(MissingError, match="lo is down"):
        Keeper(config(), netns=host.netns)
    await host.run("ip", "link", "set", "lo", "up")
    # Marks of others that are seen there are kept away from.
    await host.run("nft", "-f", "-", input=MARKS)
    async with open_keeper(host.netns) as keeper:
        assert str(keeper.marks.steering) == "0x4000000/0xc000000"
    assert before.rules == (await host.dump()).rules


MARKS = """table ip others {
  chain c {
    type filter hook prerouting priority 0;
    meta mark & 0x3000000 == 0x3000000 accept
  }
}
"""


async def test_ssh_of_a_kept_namespace_is_spared(sidecar_lab: Lab) -> None:
    host = sidecar_lab["host"]
    what = config(capture={"ports": ["1-9000"], "exclude_ports": []})
    listener = host.listen("0.0.0.0", 22)
    async with listener, open_keeper(host.netns, what) as keeper:
        assert keeper.surroundings.ssh_ports == (22,)
        assert await keeper.differences() == []
    async with open_keeper(host.netns, what) as keeper:
        assert keeper.surroundings.ssh_ports == ()


async def test_the_tables_bear_the_name_that_is_given(sidecar_lab: Lab) -> None:
    """What only begins with that name is somebody else's."""
    host = sidecar_lab["host"]
    await host.run("nft", "add", "table", "inet", "mesh_nat")
    before = await host.dump()
    async with open_keeper(host.netns, name="mesh") as keeper:
        kept = await host.dump()
        names = (await host.run("nft", "list", "tables")).stdout.split()
        assert [name for name in names if name not in ("table", "inet")] == ["mesh_nat", "mesh", "mesh_guard"]
        await host.run("nft", "delete", "table", "inet", "mesh")
        await until(lambda: keeper.repairs["ruleset"] == 1)
        assert await host.dump() == kept
    assert await host.dump() == before

    host.call(kernel.apply, make_plan(config(), name="mesh"))  # and nobody takes it away
    assert await host.dump() != before
    await host.run(*TPROXYD, "revert", "--name", "mesh")
    assert await host.dump() == before


@pytest.mark.parametrize("name", ["", "1", "_mesh", "a" * 33, "x;include", "mésh", "mesh-1", "mesh\n", "ip", "chain"])
async def test_a_name_that_is_none_is_refused(sidecar_lab: Lab, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be that of tproxyd's tables"):
        Keeper(config(), netns=sidecar_lab["host"].netns, name=name)
    done = await sidecar_lab["host"].run(*TPROXYD, "revert", "--name", name, check=False)
    assert done.returncode == 78, done


async def test_a_name_that_nft_would_take_for_something_else_is_refused(sidecar_lab: Lab) -> None:
    """All the words that the nft of this machine knows are asked for, as the messages of its parser have them."""
    words = words_of_nft()
    assert {"chain", "tproxy", "ip6"} <= {*words}
    admitted = [word for word in words if is_admitted(word)]
    assert len(words) > len(admitted) > len(words) // 2
    text = "".join(f"table inet {word} {{ }}\nlist table inet {word}\n" for word in admitted)
    done = await sidecar_lab["host"].run("nft", "-c", text, check=False)
    assert "syntax error" not in done.stderr, done.stderr


def words_of_nft() -> list[str]:
    with kernel.Library():
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    (library,) = set(re.findall(r"/\S*/libnftables\.so\S*", maps))
    found = re.findall(rb'[\0"]([a-zA-Z][a-zA-Z0-9_]{0,31})[\0"]', Path(library).read_bytes())
    return sorted({word.decode() for word in found})


def is_admitted(name: str) -> bool:
    with suppress(ConfigError):
        return bool(table_names(name))
    return False


@pytest.mark.parametrize("how", ["program", "revert"])
async def test_another_program_s_table_that_has_the_name_is_left_alone(sidecar_lab: Lab, how: str) -> None:
    """An administrator's firewall, of all tables; and an empty one is nobody's."""
    host = sidecar_lab["host"]
    await host.run("nft", "table inet filter { chain input { type filter hook input priority 0; tcp dport 9 drop; }; }")
    before = await host.dump()
    if how == "program":
        with pytest.raises(KernelError, match="the table inet filter is another program's"):
            async with open_keeper(host.netns, name="filter"):
                pass
    else:
        done = await host.run(*TPROXYD, "revert", "--name", "filter", check=False)
        assert done.returncode == 71
        assert "the table inet filter is another program's" in done.stderr
    assert await host.dump() == before
    await host.run("nft", "delete table inet filter; add table inet filter")
    async with open_keeper(host.netns, name="filter"):
        pass
    assert "filter" not in (await host.run("nft", "list", "tables")).stdout


async def test_hundreds_of_namespaces_are_put_and_left_in_little_time(counted: Callable[[int], int]) -> None:
    """The share of the kernel's state: less than 20 ms of CPU each, and 60 KiB of Python's memory. The first one finds out for all."""
    netns = [new_namespace() for _ in range(counted(200) + 1)]
    kept: dict[int, Keeper] = {}
    try:
        for fd in netns:
            call_in_namespace(fd, switch_lo_on)
        with closing(PlanBook()) as book:
            async with trio.open_nursery() as watching:

                async def add(fd: int) -> None:
                    kept[fd] = await in_thread(partial(Keeper, config(), netns=fd, book=book))
                    await kept[fd].put()
                    await watching.start(kept[fd].watch)

                async def remove(fd: int) -> None:
                    await kept[fd].leave()
                    kept.pop(fd).close()

                await add(netns[0])
                rest = netns[1:]
                assert await cost("added", rest, add) < 0.02
                for keeper in kept.values():
                    assert await keeper.differences() == []
                assert await cost("removed", rest, remove) < 0.02
                tracemalloc.start()
                try:
                    await cost("added again, traced", rest, add)
                    each = tracemalloc.get_traced_memory()[0] / len(rest)
                finally:
                    tracemalloc.stop()
                print(f"memory of Python's for each: {each / 1024:.1f} KiB")
                assert each < 60 * 1024
                await cost("removed", rest, remove)
                await remove(netns[0])
                watching.cancel_scope.cancel()
        for fd in netns:
            assert call_in_namespace(fd, kernel.observe) == NOTHING
    finally:
        for keeper in kept.values():
            keeper.close()
        for fd in netns:
            os.close(fd)


def switch_lo_on() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


async def cost(what: str, netns: list[int], function: Callable[[int], Any]) -> float:
    """Does it for each, four at a time; prints how long it took, and gives seconds of CPU for one."""
    limit = trio.CapacityLimiter(4)

    async def one(fd: int) -> None:
        async with limit:
            await function(fd)

    began, cpu = time.monotonic(), cpu_seconds()
    async with trio.open_nursery() as nursery:
        for fd in netns:
            nursery.start_soon(one, fd)
    took, cpu = time.monotonic() - began, cpu_seconds() - cpu
    print(f"{len(netns)} namespaces {what} in {took:.2f} s, {cpu / len(netns) * 1000:.1f} ms of CPU each")
    return cpu / len(netns)


def cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


# Files on all low numbers, but for those that are kept beforehand if there is an argument.
MANY_FILES = """
import os, resource, subprocess, sys, trio
from tproxyd import config_from_mapping, kernel
from tproxyd.errors import KernelError
from tproxyd.interceptor.keeper import Keeper
from tproxyd.interceptor.plan_book import PlanBook
from tproxyd.net.namespaces import call_in_namespace, new_namespace

hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
netns = new_namespace()
call_in_namespace(netns, subprocess.run, ["ip", "link", "set", "lo", "up"])
book, low = (PlanBook(), kernel.LowFiles(1)) if len(sys.argv) > 1 else (None, None)
while os.open("/dev/null", os.O_RDONLY) < 1100:
    pass
book, low = book or PlanBook(), low or kernel.LowFiles(1)
for _ in range(3):
    with low.turn() as nft:
        print(type(nft).__name__, nft.run("list tables"))

async def main():
    keeper = Keeper(config_from_mapping({"capture": {"ports": ["8080"]}}), netns=netns, book=book)
    await keeper.put()
    assert await keeper.differences() == []
    print(sorted(call_in_namespace(netns, kernel.observe).tables))
    await keeper.leave()
    keeper.close()
    print(sorted(call_in_namespace(netns, kernel.observe).tables))

trio.run(main)
try:
    kernel.Library()
    print("opened")
except KernelError as error:
    print(error)
"""


@pytest.mark.parametrize("beforehand", [(), ("kept",)], ids=["no low number", "numbers kept beforehand"])
async def test_a_program_with_thousands_of_files_is_not_ended_by_libnftables(
    sidecar_lab: Lab, beforehand: tuple[str, ...]
) -> None:
    """It waits with select(), for which glibc aborts a process whose file has a number above 1023."""
    done = await sidecar_lab["host"].run(sys.executable, "-c", MANY_FILES, *beforehand, timeout=60)
    nft = "Library" if beforehand else "Program"
    assert done.stdout.split()[:5] == [nft, nft, nft, "['tproxyd']", "[]"]
    assert "needs a file below number 1024" in done.stdout


async def test_a_process_that_ends_is_the_end_of_its_namespace(sidecar_lab: Lab) -> None:
    host = sidecar_lab["host"]
    async with host.process("sleep", "60") as process:
        with NamespaceWatch(process.pid) as by_pid, NamespaceWatch(f"/proc/{process.pid}/ns/net") as by_path:
            assert by_pid.identity == by_path.identity == identity(host.netns)
            assert not by_pid.gone()
            assert not by_path.gone()
            process.send_signal(signal.SIGKILL)
            assert by_pid.pidfd is not None
            with trio.fail_after(3):
                await trio.lowlevel.wait_readable(by_pid.pidfd)
            assert by_pid.gone()
            await process.wait()
            assert by_path.gone()
            assert by_path.pidfd is None
            # What is held lives on.
            assert call_in_namespace(by_pid.fd, read_state) == await host.dump()
    with pytest.raises(MissingError, match="there is no process"):
        NamespaceWatch(process.pid)


async def test_a_path_that_leads_elsewhere_or_nowhere_is_the_end_of_its_namespace(
    open_lab: OpenLab, tmp_path: Path
) -> None:
    async with open_lab(SIDECAR) as lab:
        paths = {}
        for node in lab:
            paths[node.name] = Path(f"/proc/{os.getpid()}/fd/{node.netns}")
        name, other = tmp_path / "name", tmp_path / "other"
        name.symlink_to(paths["host"])
        with NamespaceWatch(name) as watch:
            assert watch.identity == identity(lab["host"].netns)
            assert not watch.gone()
            other.symlink_to(paths["client"])
            other.rename(name)
            assert watch.gone()
            other.symlink_to(paths["host"])
            other.rename(name)
            assert not watch.gone()
            name.unlink()
            assert watch.gone()
        with pytest.raises(MissingError, match="there is no network namespace at"):
            NamespaceWatch(name)


async def test_a_namespace_that_is_watched_can_be_unmounted(sidecar_lab: Lab, tmp_path: Path) -> None:
    """By whoever has mounted it at a path, in the usual way, which minds who has it open through the mount."""
    code = (
        "import subprocess, sys; from tproxyd.net.namespaces import NamespaceWatch\n"
        "with NamespaceWatch(sys.argv[1]) as watch:\n"
        "    subprocess.run(['umount', sys.argv[1]], check=True); print(watch.gone())\n"
    )
    path = tmp_path / "name"
    path.touch()
    mounted = f'mount --bind /proc/self/ns/net {path} && exec "$@"'
    words = ("unshare", "--mount", "sh", "-c", mounted, "sh", sys.executable, "-c", code, str(path))
    assert (await sidecar_lab["host"].run(*words)).stdout == "True\n"


async def test_of_a_descriptor_no_end_is_seen(sidecar_lab: Lab) -> None:
    host = sidecar_lab["host"]
    with NamespaceWatch(host.netns) as watch:
        assert watch.fd != host.netns
        assert (watch.identity, watch.gone(), watch.pidfd) == (identity(host.netns), False, None)
    for wrong in (2**22 + 1, -1):
        with pytest.raises(TproxydError):
            NamespaceWatch(wrong)


def identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
