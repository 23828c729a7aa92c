"""The least privilege: what each process holds, that it is enough for all of a daemon's life, and what is said where something is missing."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import PIPE
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
import trio
from pyroute2.netlink.exceptions import NetlinkError

from netns_tests.privileges import (
    AS_ROOT,
    AS_USER,
    NOBODY,
    as_user,
    elsewhere,
    held_by,
    open_daemon_as,
    readable,
    to_come_back,
)
from netns_tests.watch import relay_processes, until, workers
from netns_tests.way import BOTH_LAYOUTS, GATEWAY_V4, SIDECAR_V4, Way
from tproxyd import kernel
from tproxyd.errors import TproxydError
from tproxyd.net.capabilities import CAPABILITIES, without_capabilities
from tproxyd.net.namespaces import enter_namespace
from tproxyd.net.ownership import hold_namespace
from tproxyd.net.scheduling import Background
from tproxyd.net.sock_diag import tcp_sockets
from tproxyd.net.sockets import format_address, open_listener, open_upstream
from tproxyd.testing import Lab, serve_identity
from tproxyd.testing.daemon import TPROXYD

NICE = to_come_back()
CONFIG = '[capture]\nports = ["8080"]\n'
DOCUMENT = Path(__file__).parents[1] / "docs" / "privileges.md"
ADMIN, RAW, BIND = "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_NET_BIND_SERVICE"
PTRACE, SYS, OVERRIDE, SEARCH = "CAP_SYS_PTRACE", "CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH"

# What is added to CONFIG, by the name that the table of docs/privileges.md has for it, which says what is held then.
ADDED = {
    'source `"auto"` or `"client"`': '[upstream]\nsource = "client"\n',
    'source `"proxy"`, or addresses': '[upstream]\nsource = "127.0.0.6"\n',
    "redirect mode": 'mode = "redirect"\n',
    "`relay.workers = 0`": "[relay]\nworkers = 0\n",
    '`relay.workers = 0`, source `"proxy"`': '[upstream]\nsource = "proxy"\n[relay]\nworkers = 0\n',
    "target `unix:`": '[upstream]\ntarget = "unix:/run/app.sock"\n',
    "redirect mode, `listen.port` below 1024": 'mode = "redirect"\n[listen]\nport = 99\n',
    "redirect mode, `admin.metrics` below 1024": 'mode = "redirect"\n[admin]\nmetrics = "127.0.0.1:99"\n',
}


def held_by_document(name: str) -> tuple[set[str], set[str] | None]:
    """By the daemon, and by a relay process, if there is one."""
    (row,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \| (.*) \|$", DOCUMENT.read_text(encoding="utf-8"), re.M)
    daemon, relay = ({f"CAP_{word}" for word in re.findall(r"[A-Z]+(?:_[A-Z]+)+", cell)} for cell in row)
    return daemon, None if row[1] == "-" else relay


@SIDECAR_V4
@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize("user", [AS_ROOT, AS_USER], ids=["root", "user"])
async def test_no_process_holds_more_than_is_used(way: Way, name: str, user: Sequence[str] | None) -> None:
    """Each set of each thread, also of a relay process that is another's successor. A user has no files of others to write to."""
    of_daemon, of_relay = held_by_document(name)
    if user is not None:
        of_daemon, of_relay = of_daemon - {OVERRIDE}, None if of_relay is None else of_relay - {OVERRIDE}
    elif "workers = 0" not in ADDED[name]:
        of_daemon |= NICE
    async with open_daemon_as(way.proxy, CONFIG + ADDED[name], user) as daemon:
        held = held_by(daemon.process.pid)
        for kind in (held.permitted, held.effective, held.inheritable, held.ambient):
            assert kind == of_daemon
        assert held.no_new_privileges
        if user is None:
            assert held.bounding == of_daemon
        if of_relay is None:
            assert workers(daemon) == []
        else:
            (pid,) = workers(daemon)
            os.kill(pid, 9)
            await until(lambda: workers(daemon) not in ([], [pid]))
            await daemon.process.wait_for_output("relay")
            (successor,) = workers(daemon)
            await until(lambda: held_by(successor).permitted == of_relay)
            relay = held_by(successor)
            assert relay.effective == of_relay
            assert relay.inheritable == relay.ambient == frozenset()
            assert relay.no_new_privileges
            assert relay.bounding <= held.bounding
        assert await daemon.stop() == 0


@BOTH_LAYOUTS
@pytest.mark.parametrize("user", [AS_ROOT, AS_USER], ids=["root", "user"])
async def test_all_of_a_daemons_life_with_no_more_than_that(
    way: Way, nursery: trio.Nursery, user: Sequence[str] | None
) -> None:
    """Captures in the client's name and from its port below 1024, repairs what others remove, drains, and leaves nothing."""
    await nursery.start(serve_identity, way.app, 8080)
    before = await way.proxy.dump()
    async with open_daemon_as(way.proxy, CONFIG + 'when_down = "refuse"\n', user) as daemon:
        planned = await way.proxy.dump()
        own = await _connect(way, 700)
        record = await daemon.record(own)
        assert record["outcome"] == "closed"
        if way.name.startswith("gateway"):
            assert record["upstream_source"] == own
        else:
            assert record["upstream_source"].rpartition(":")[0] == own.rpartition(":")[0]
        for command in (
            "ip -6 rule del priority 5234",
            "ip route flush table 133",
            "nft delete table inet tproxyd_guard",
        ):
            await way.proxy.run(*command.split())
            await until(lambda: way.proxy.call(_is_there) == 3)
        assert await way.proxy.dump() == planned
        assert (await way.proxy.run(*TPROXYD, "status")).stdout.startswith(f"daemon       pid {daemon.process.pid},")
        await _connect(way, 0)
        assert await daemon.stop() == 0
        assert not re.search(r"error|warning: (?!another)|Traceback", daemon.process.stderr_text), (
            daemon.process.stderr_text
        )
    assert await way.proxy.dump() == before


async def _connect(way: Way, source_port: int) -> str:
    async with await way.client.connect(way.address, 8080, source_port=source_port) as stream:
        own = format_address(stream.socket.getsockname())
        assert await stream.receive_some()
    return own


def _is_there() -> int:
    """Of what the test removes, how much."""
    observed = kernel.observe()
    return (
        any(rule.family == 6 and rule.priority == 5234 for rule in observed.rules)
        + any(route.family == 4 for route in observed.routes)
        + ("tproxyd_guard" in observed.tables)
    )


# Without what `tproxyd run` does not start: what is added to CONFIG, the capability, and what the sentence says of it.
REQUIRED = [
    ("", ADMIN, "capturing connections (tables, ip rules and routes)"),
    ("", RAW, "a transparent socket in a relay process"),
    ('[upstream]\nsource = "client"\n', BIND, 'a client\'s port below 1024 (`upstream.source` = "client")'),
    ("[listen]\nport = 99\n", BIND, "`listen.port` = 99"),
    ('[admin]\nmetrics = "127.0.0.1:99"\n', BIND, '`admin.metrics` = "127.0.0.1:99"'),
]


@SIDECAR_V4
@pytest.mark.parametrize("user", [AS_ROOT, AS_USER], ids=["root", "user"])
@pytest.mark.parametrize(("more", "capability", "purpose"), REQUIRED)
async def test_fault_55_a_capability_that_is_missing_is_named_with_what_needs_it(
    way: Way, more: str, capability: str, purpose: str, user: Sequence[str] | None
) -> None:
    before = await way.proxy.dump()
    name = capability.removeprefix("CAP_").lower()
    with readable(CONFIG + more) as file:
        arguments = ("run", "-c", str(file))
        command: tuple[str, ...] = (
            "setpriv",
            "--bounding-set",
            f"-{name}",
            "--inh-caps",
            f"-{name}",
            *TPROXYD,
            *arguments,
        )
        if user is not None:
            command = elsewhere(as_user([one for one in user if one != name]), *arguments)
        done = await way.proxy.run(*command, check=False)
    assert (done.returncode, done.stdout) == (77, "")
    assert done.stderr == (
        f"tproxyd: {purpose} needs {capability}, which this process does not have: run it as root, or in a systemd unit write "
        "AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW CAP_NET_BIND_SERVICE\n"
    )
    assert await way.proxy.dump() == before


SPARED = {
    "proxy without NET_BIND_SERVICE": ('[upstream]\nsource = "proxy"\n', ("net_admin", "net_raw"), ""),
    "a range without SYS_PTRACE": (
        '[upstream]\nsource = "proxy"\n',
        ("net_admin", "net_raw"),
        "an SSH server is looked for at port 22 alone",
    ),
    "auto without NET_BIND_SERVICE": ("", ("net_admin", "net_raw"), "such a client is seen with another port"),
    "redirect without NET_RAW": ('mode = "redirect"\n', ("net_admin",), ""),
    "no relay process without NET_RAW": ("[relay]\nworkers = 0\n", ("net_admin", "net_bind_service"), ""),
}


@GATEWAY_V4
@pytest.mark.parametrize("name", SPARED)
async def test_what_is_not_asked_for_is_not_missed(way: Way, nursery: trio.Nursery, name: str) -> None:
    more, user, warning = SPARED[name]
    await nursery.start(serve_identity, way.app, 8080)
    ports = CONFIG.replace("8080", "8080-8090") if "range" in name else CONFIG
    async with open_daemon_as(way.proxy, ports + more, user) as daemon:
        own = await _connect(way, 700)
        record = await daemon.record(own)
        assert record["outcome"] == "closed"
        kept = "without NET_RAW" in name and "redirect" not in name
        assert (record["upstream_source"] == own) == kept
        assert await daemon.stop() == 0
        warnings = [line for line in daemon.process.stderr_text.splitlines() if "warning" in line]
        assert len(warnings) == bool(warning)
        assert warning in "".join(warnings)


@SIDECAR_V4
@pytest.mark.parametrize("user", [AS_ROOT, AS_USER], ids=["root", "user"])
async def test_who_is_in_the_way_is_named_by_root_and_told_of_by_a_user(way: Way, user: Sequence[str] | None) -> None:
    """What has more than a daemon keeps is not its to look at: root looks before it gives that up, a user never may."""
    arguments = ("run", "--port", "8080")
    command = (*TPROXYD, *arguments) if user is None else elsewhere(as_user(user), *arguments)
    with way.proxy.call(lambda: open_listener("127.0.0.1", 15006, backlog=1)):
        done = await way.proxy.run(*command, check=False)
    assert done.returncode == 71
    named = rf", by [^;]+ \(pid {os.getpid()}\)" if user is None else ""
    assert re.search(rf"cannot listen on 127.0.0.1:15006: Address already in use{named}; choose", done.stderr)
    async with open_daemon_as(way.proxy, CONFIG, AS_ROOT) as daemon:
        done = await way.proxy.run(*command, check=False)
        assert done.returncode == 71
        assert (
            f"(pid {daemon.process.pid})" if user is None else "a process that cannot be seen from here"
        ) in done.stderr
        assert await daemon.stop() == 0


@SIDECAR_V4
async def test_the_doctor_of_a_daemon_that_is_another_users(way: Way) -> None:
    """Root's has nothing to say about it; the user's own says what it cannot look at."""
    async with open_daemon_as(way.proxy, CONFIG, AS_USER) as daemon:
        done = await way.proxy.run(*TPROXYD, "doctor", "--port", "8080", check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert "no failures, no warnings" in done.stdout
        done = await way.proxy.run(*elsewhere(as_user(AS_USER), "doctor", "--port", "8080"), check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert re.findall("^not looked at: (.*?):", done.stdout, re.M) == [
            "what other processes hold open",
            "whether this kernel takes the ruleset",
        ]
        assert await daemon.stop() == 0


async def test_root_of_a_user_namespace_is_root_enough(sidecar_lab: Lab) -> None:
    """`unshare -Urn`: all capabilities over what is made there, and none over the host."""
    inside = f"ip link set lo up; exec {' '.join(TPROXYD)} run --port 8080"
    async with sidecar_lab["host"].process("unshare", "-Urn", "sh", "-c", inside, collect=True) as daemon:
        await daemon.wait_for_output("tproxyd: ready ")
        assert held_by(daemon.pid).permitted == {ADMIN, RAW, BIND}
        (relay,) = relay_processes(daemon.pid)
        assert held_by(relay).permitted == {RAW, BIND}
        daemon.send_signal(signal.SIGTERM)
        assert await daemon.wait() == 0


@SIDECAR_V4
async def test_code_that_root_alone_may_read_is_read_for_all_of_its_life(way: Way) -> None:
    """A checkout in a user's own directory, and `sudo`: what reading takes is kept, for what is loaded late."""
    private = elsewhere("env", "run", "-c", str(way.file(CONFIG)), directory=f"mode=700,uid={NOBODY}")
    async with way.proxy.process(*private, collect=True) as daemon:
        await daemon.wait_for_output("tproxyd: ready ")
        assert held_by(daemon.pid).permitted == {ADMIN, RAW, BIND, SEARCH} | NICE
        (pid,) = relay_processes(daemon.pid)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: relay_processes(daemon.pid) not in ([], [pid]))
        (successor,) = relay_processes(daemon.pid)
        await until(lambda: held_by(successor).permitted == {RAW, BIND, SEARCH})
        daemon.send_signal(signal.SIGTERM)
        assert await daemon.wait() == 0


# Gives up nothing of its own, whatever its relay process does.
PROGRAM = """
import trio
from tproxyd import open_interceptor

async def main():
    async with open_interceptor({"capture": {"ports": ["8080"]}}, own_namespace=True):
        print("open", flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


async def test_a_program_that_embeds_it_keeps_its_own(sidecar_lab: Lab) -> None:
    async with sidecar_lab["host"].process(sys.executable, "-c", PROGRAM, collect=True) as program:
        await program.wait_for_output("open")
        assert held_by(program.pid) == held_by(os.getpid())
        (relay,) = relay_processes(program.pid)
        held = held_by(relay)
        assert held.permitted == held.effective == {RAW, BIND, SYS}
        assert held.no_new_privileges
        program.send_signal(signal.SIGKILL)
        await program.wait()
    await sidecar_lab["host"].run(*TPROXYD, "revert")


# Wants to capture in a namespace that it may not enter.
AGENT = """
import sys, trio
from tproxyd import CapabilityError, open_interceptor

async def main():
    async with open_interceptor({"capture": {"ports": ["8080"]}}) as interceptor:
        try:
            await interceptor.add_workload("pod", netns=sys.argv[1])
        except CapabilityError as error:
            print(error, interceptor.workloads)

trio.run(main)
"""


async def test_fault_55_a_workload_that_may_not_be_entered(gateway_lab: Lab) -> None:
    without = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    path = f"/proc/{os.getpid()}/fd/{gateway_lab['server'].netns}"
    done = await gateway_lab["gateway"].run(*without, sys.executable, "-c", AGENT, path)
    assert done.stdout == (
        "cannot enter a network namespace: operation not permitted; it needs CAP_SYS_ADMIN: run it as root, or in a systemd unit add "
        "AmbientCapabilities=CAP_SYS_ADMIN ()\n"
    )


# What docs/privileges.md says: a call that fails without, and the capabilities of which each is enough for it.


class Others(NamedTuple):
    """What is another user's: a Unix socket, and a process."""

    path: Path
    pid: int


def _open_upstream(_: Others) -> None:
    open_upstream(socket.AF_INET, source=("203.0.113.1", 40000)).close()


def _bind_low(_: Others) -> None:
    open_listener("127.0.0.1", 99, backlog=1, transparent=False).close()


def _enter(_: Others) -> None:
    netns = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        enter_namespace(netns)
    finally:
        os.close(netns)


def _connect_unix(others: Others) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(others.path))


def _change_ruleset(_: Others) -> None:
    with kernel.Library() as nft:
        nft.run("table inet tried { }\ndelete table inet tried\n")


def _come_back(_: Others) -> None:
    if NICE:
        how = Background(os.SCHED_OTHER, tuple(NICE))
        how.enter()
        how.leave()
        if os.sched_getscheduler(0) != os.SCHED_OTHER:
            raise PermissionError("it stays where it is")


CALLS: dict[str, tuple[Callable[[Others], object], set[str]]] = {
    "rules and routes": (lambda _: kernel.observe(), {ADMIN}),
    "ruleset": (_change_ruleset, {ADMIN}),
    "the lock": (lambda _: hold_namespace("try", answer=1).close(), {ADMIN}),
    "a transparent listener": (lambda _: open_listener("127.0.0.1", 15006, backlog=1).close(), {ADMIN, RAW}),
    "a client's address": (_open_upstream, {ADMIN, RAW}),
    "a port below 1024": (_bind_low, {BIND}),
    "a namespace": (_enter, {SYS}),
    "another user's socket": (_connect_unix, {OVERRIDE}),
    "another user's namespace": (lambda others: os.stat(f"/proc/{others.pid}/ns/net"), {PTRACE}),
    "the usual share of the CPU": (_come_back, NICE or {*CAPABILITIES, "none"}),
    "sockets of others": (lambda _: tcp_sockets(), {*CAPABILITIES, "none"}),
}


@pytest.mark.parametrize("name", CALLS)
async def test_what_each_capability_is_for(sidecar_lab: Lab, name: str) -> None:
    call, enough = CALLS[name]
    host = sidecar_lab["host"]

    def works_with(held: str, others: Others) -> bool:
        def work() -> bool:
            with without_capabilities(CAPABILITIES.keys() - {held}):
                try:
                    call(others)
                except (OSError, TproxydError, NetlinkError):
                    return False
            return True

        return host.call(work)  # in a thread of its own: namespaces and capabilities are a thread's

    with TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as app:
        path = Path(directory, "app.sock")
        app.bind(str(path))
        app.listen()
        os.chown(path, NOBODY, NOBODY)
        os.chmod(path, 0o600)  # it blocks as little as chown
        async with host.process(
            "setpriv", f"--reuid={NOBODY}", "sh", "-c", "echo up; read x", stdin=PIPE, collect=True
        ) as process:
            await process.wait_for_output("up")
            others = Others(path, process.pid)
            assert {held for held in (*CAPABILITIES, "none") if works_with(held, others)} == enough
