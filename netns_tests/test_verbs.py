"""The verbs that compare and confirm, and what becomes of the administrator's SSH: with real namespaces, and complete dumps."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
import trio

from netns_tests.way import Way
from tproxyd.kernel import find_ssh_ports
from tproxyd.net.sockets import format_address
from tproxyd.testing import Finished, Lab, LabProcess, Node, serve_identity
from tproxyd.testing.daemon import TPROXYD, open_daemon

CONFIG = '[capture]\nports = ["8080"]\nwhen_down = "refuse"\n'
OTHER = '[capture]\nports = ["8080", "8090-8099"]\n[routing]\npriority = 7000\n'
SAME = "no difference: the kernel holds the plan\n"


async def tproxyd(node: Node, *arguments: str, code: int = 0, **more: dict[str, str]) -> Finished:
    done = await node.run(*TPROXYD, *arguments, check=False, env=more.get("env"))
    assert done.returncode == code, (arguments, done)
    return done


def changed(diff: str) -> list[str]:
    """The lines of a diff that are more or less."""
    return [line for line in diff.splitlines()[2:] if line[0] in "+-"]


# plan --diff


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
async def test_plan_diff_shows_line_by_line_what_would_have_to_change(way: Way) -> None:
    node, file = way.proxy, str(way.file(CONFIG))
    before = await node.dump()
    everything = (await tproxyd(node, "plan", "--diff", "-c", file, code=3)).stdout
    assert everything.startswith(
        "--- kernel\n+++ plan\n@@ local routes @@\n+ip -4 route local default dev lo table 133\n"
    )
    assert all(line.startswith("+") for line in changed(everything))
    assert await node.dump() == before
    await tproxyd(node, "apply", "-c", file)
    assert (await tproxyd(node, "plan", "--diff", "-c", file)).stdout == SAME
    await node.run("ip", "-6", "rule", "del", "priority", "5234")
    await node.run("ip", "-4", "route", "flush", "table", "133")
    await node.run("nft", "add rule inet tproxyd_guard guard counter accept")
    await node.run("nft", "add table inet tproxyd_old")
    drifted = await node.dump()
    diff = (await tproxyd(node, "plan", "--diff", "-c", file, code=3)).stdout
    assert changed(diff) == [
        "+ip -4 route local default dev lo table 133",
        "+ip -6 rule priority 5234 fwmark 0x1000000/0x3000000 lookup 133",
        "-\t\tcounter accept",
        "-table inet tproxyd_old {",
        "-}",
    ]
    assert "@@ table inet tproxyd_guard, chain guard @@" in diff
    assert await node.dump() == drifted
    await tproxyd(node, "apply", "-c", file)
    assert (await tproxyd(node, "plan", "--diff", "-c", file)).stdout == SAME
    await tproxyd(node, "revert")
    assert await node.dump() == before


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
@pytest.mark.parametrize("applied", [False, True])
async def test_plan_diff_finds_no_difference_under_a_healthy_daemon(way: Way, applied: bool) -> None:
    node, file = way.proxy, str(way.file(CONFIG))
    if applied:
        await tproxyd(node, "apply", "-c", file)
    async with open_daemon(node, CONFIG) as daemon:
        assert (await tproxyd(node, "plan", "--diff", "-c", file)).stdout == SAME
        other = (await tproxyd(node, "plan", "--diff", "-c", str(way.file(OTHER)), code=3)).stdout
        assert "-table inet tproxyd_guard {" in changed(other)
        assert [line for line in changed(other) if "owner" in line or "tproxyd_state" in line] == []
        await tproxyd(node, "revert")
        diff = (await tproxyd(node, "plan", "--diff", "-c", str(way.file(CONFIG)), code=3)).stdout
        assert all(line.startswith("+") for line in changed(diff))
        assert await daemon.stop() == 0
    diff = (await tproxyd(node, "plan", "--diff", "-c", file, code=3)).stdout
    assert "+table inet tproxyd_state {" in diff


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
async def test_plan_diff_against_another_file_needs_neither_root_nor_kernel(way: Way, tmp_path: Path) -> None:
    node, other = way.proxy, tmp_path / "other.toml"
    other.write_text(OTHER)
    other.chmod(0o644)
    file = way.file(CONFIG)
    for directory in (tmp_path, *tmp_path.parents):
        if directory == Path(gettempdir()):
            break
        directory.chmod(0o755)  # pytest's own are for root alone; how many there are depends on how it runs
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *TPROXYD, "plan", "-c", str(file))
    done = await node.run(*nobody, "--diff", "--against", str(other), check=False, env={"PYTHONPATH": _checkout()})
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.startswith(f"--- plan of {other}\n+++ plan\n@@ ip rules @@\n")
    assert "-ip -6 rule priority 7001 fwmark 0x1000000/0x3000000 lookup 133" in done.stdout.splitlines()
    assert "+\t\telements = { 8080 }" in done.stdout.splitlines()
    assert "+table inet tproxyd_guard {" in done.stdout.splitlines()
    done = await node.run(*nobody, "--against", str(file), check=False)
    assert (done.returncode, done.stdout) == (0, "no difference: the plans are the same\n")
    done = await node.run(*nobody, "--diff", check=False)
    assert done.returncode == 77
    assert "CAP_NET_ADMIN" in done.stderr


def _checkout() -> str:
    return str(Path(__file__).parents[1])


# The administrator's SSH

SSHD = """
import socket
open("/proc/self/comm", "w").write("sshd")
listener = socket.create_server(("::", 2222), family=socket.AF_INET6, dualstack_ipv6=True)
print("listening", flush=True)
while True:
    listener.accept()[0].sendall(b"SSH-2.0-lab\\r\\n")
"""
RANGE = '[capture]\nports = ["2000-2999"]\nwhen_down = "refuse"\n'


@asynccontextmanager
async def serve_ssh(node: Node) -> AsyncIterator[LabProcess]:
    """What an SSH server looks like from outside: its name, its port, its first line."""
    async with node.process(sys.executable, "-c", SSHD, collect=True) as server:
        await server.wait_for_output("listening")
        yield server


async def first_line(way: Way, port: int) -> tuple[str, bytes]:
    """Who we are to the network, and what the server says first."""
    async with await way.client.connect(way.address, port) as stream:
        with trio.fail_after(3):
            return format_address(stream.socket.getsockname()), await stream.receive_some()


@pytest.mark.parametrize("way", ["sidecar v4", "sidecar v6"], indirect=True)
async def test_ssh_of_the_host_is_spared_where_only_a_range_captures_it(way: Way, nursery: trio.Nursery) -> None:
    node, file = way.proxy, str(way.file(RANGE))
    before = await node.dump()
    await nursery.start(serve_identity, way.app, 2300)
    async with serve_ssh(node):
        plan = (await tproxyd(node, "plan", "-c", file)).stdout
        # In the steering table and in the guard, as the first rule of the chain.
        spared = re.findall(r"chain capture \{\n\t\ttcp dport 2222 fib daddr type local return comment \"SSH", plan)
        assert len(spared) == 2
        async with open_daemon(node, RANGE) as daemon:
            assert "SSH of this host (port 2222) is in `capture.ports` only through a range" in (
                daemon.process.stderr_text
            )
            assert (await tproxyd(node, "plan", "--diff", "-c", file)).stdout == SAME
            captured, _ = await first_line(way, 2300)
            direct, said = await first_line(way, 2222)
            assert said.startswith(b"SSH-2.0")
            await daemon.record(captured)
            assert direct not in {record["source"] for record in daemon.records()}
            daemon.process.send_signal(signal.SIGKILL)
            await daemon.process.wait()
        # The guard refuses the rest.
        with pytest.raises(ConnectionRefusedError):
            await first_line(way, 2300)
        assert (await first_line(way, 2222))[1].startswith(b"SSH-2.0")
        done = await tproxyd(node, "apply", "-c", file)
        assert done.stderr.count("only through a range") == 1
        assert (await tproxyd(node, "apply", "-c", file)).stdout.startswith("nothing to change")
        assert (await tproxyd(node, "plan", "--diff", "-c", file)).stdout == SAME
    await tproxyd(node, "revert")
    assert await node.dump() == before


async def test_where_ssh_is_looked_for(sidecar_lab: Lab) -> None:
    """Root's port 22, the ports of root's SSH server, and neither of both on loopback, from where nothing is captured."""
    host = sidecar_lab["host"]
    async with host.listen("127.0.0.1", 22), host.listen("::1", 22), host.listen("0.0.0.0", 2200):
        assert host.call(find_ssh_ports) == set()
        async with host.listen(host.v6, 22), serve_ssh(host):
            assert host.call(find_ssh_ports) == {22, 2222}
    assert host.call(find_ssh_ports) == set()


LIAR = """
import os, socket, time
open("/proc/self/comm", "w").write("sshd")
handed = socket.create_server(("0.0.0.0", 2223))
os.setgid(65534)
os.setuid(65534)
own = [socket.create_server(("::", port), family=socket.AF_INET6) for port in (22, 2224)]
print("listening", flush=True)
time.sleep(60)
"""


async def test_an_app_that_calls_itself_sshd_is_not_spared(sidecar_lab: Lab) -> None:
    """Nor one on port 22 where anybody may have it, nor one that has only been handed root's socket."""
    host = sidecar_lab["host"]
    host.set_sysctl("net.ipv4.ip_unprivileged_port_start", 0)
    async with host.process(sys.executable, "-c", LIAR, collect=True) as app:
        await app.wait_for_output("listening")
        assert host.call(find_ssh_ports) == set()
        async with serve_ssh(host):
            assert host.call(find_ssh_ports) == {2222}


@pytest.mark.parametrize("way", ["sidecar v4"], indirect=True)
async def test_ssh_that_is_named_singly_is_captured_with_a_warning(way: Way) -> None:
    config = RANGE.replace('"2000-2999"', '"2000-2221", "2222"')
    async with serve_ssh(way.proxy), open_daemon(way.proxy, config) as daemon:
        assert "SSH of this host (port 2222) is named in `capture.ports`" in daemon.process.stderr_text
        source, said = await first_line(way, 2222)
        assert said.startswith(b"SSH-2.0")
        await daemon.record(source)
        assert await daemon.stop() == 0


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
async def test_the_port_of_the_session_is_spared_and_ssh_through_the_host_is_not(
    way: Way, nursery: trio.Nursery
) -> None:
    """SSH_CONNECTION, for a server that does not listen here under a name that is known. Behind a gateway, port 2222 is not its own."""
    env = {"SSH_CONNECTION": "192.0.2.9 50000 192.0.2.1 2222"}
    plan = (await way.proxy.run(*TPROXYD, "plan", "-c", str(way.file(RANGE)), env=env)).stdout
    assert plan.count('tcp dport 2222 fib daddr type local return comment "SSH') == 2
    await nursery.start(serve_identity, way.app, 2222)
    async with way.proxy.process(*TPROXYD, "run", "-c", str(way.file(RANGE)), collect=True, env=env) as daemon:
        await daemon.wait_for_output("tproxyd: ready")
        assert "only through a range" in daemon.stderr_text
        # Asked by somebody who is in no session.
        assert (await tproxyd(way.proxy, "plan", "--diff", "-c", str(way.file(RANGE)))).stdout == SAME
        source, _ = await first_line(way, 2222)
        await daemon.wait_for_output(f'"source":"{source}"')
        daemon.send_signal(signal.SIGTERM)
        assert await daemon.wait() == 0


# status


async def status(node: Node, *arguments: str, code: int) -> dict[str, Any]:
    done = await tproxyd(node, "status", "--json", *arguments, code=code)
    assert done.stderr == ""
    content: dict[str, Any] = json.loads(done.stdout)
    assert list(content) == ["daemon", "waiting", "applied", "observed", "planned_by", "differences"]
    return content


@pytest.mark.parametrize("way", ["sidecar v6"], indirect=True)
async def test_status_of_a_daemon_tells_what_lives_and_what_it_has_counted(way: Way, nursery: trio.Nursery) -> None:
    node = way.proxy
    await nursery.start(serve_identity, way.app, 8080)
    async with open_daemon(node, CONFIG) as daemon:
        async with await way.client.connect(way.address, 8080) as stream:
            await stream.receive_some()
        await daemon.process.wait_for_output('"outcome"')
        async with await way.client.connect(way.address, 8080) as stream:
            await stream.receive_some()
            told = await status(node, code=0)
        serving = told["daemon"]
        assert serving["pid"] == daemon.process.pid
        assert serving["listen"] == ["127.0.0.1:15006", "[::1]:15006"]
        assert serving["marks"] == {"steering": "0x1000000/0x3000000", "upstream": "0x2000000/0x3000000"}
        assert 0 < serving["uptime_s"] < 60
        assert (serving["capturing"], serving["connections"]) == (True, 1)
        assert serving["counters"]["accepted"] == 2
        assert sum(serving["counters"]["outcomes"].values()) == 1
        assert serving["counters"]["bytes_from_upstream"] > 0
        assert (told["applied"], told["planned_by"], told["differences"]) == (False, "daemon", [])
        assert {table["name"]: table["owned"] for table in told["observed"]["tables"]} == {
            "tproxyd": True,
            "tproxyd_guard": False,
        }
        assert (len(told["observed"]["rules"]), len(told["observed"]["routes"])) == (8, 2)
        text = (await tproxyd(node, "status")).stdout
        assert text.startswith(f"daemon       pid {daemon.process.pid}, version ")
        assert "\nlisten       127.0.0.1:15006, [::1]:15006\n" in text
        assert (
            "\nkernel       8 ip rules, 2 local routes, tables inet: tproxyd (owned), tproxyd_guard\n"
            "applied      no\n"
            "planned      by the daemon: the kernel holds it\n"
        ) in text
        assert await daemon.stop() == 0


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
async def test_status_shows_drift_repairs_and_a_revert(way: Way) -> None:
    node, file = way.proxy, str(way.file(CONFIG))
    async with open_daemon(node, CONFIG) as daemon:
        await node.run("ip", "-4", "rule", "del", "priority", "5234")
        await daemon.process.wait_for_output("repaired")
        told = await status(node, code=0)
        assert told["daemon"]["repairs"] == {"rule": 1}
        # With a file named, that is what counts.
        assert (await status(node, "-c", file, code=0))["planned_by"] == file
        other = await status(node, "-c", str(way.file(OTHER)), code=3)
        assert other["differences"]
        await tproxyd(node, "revert")
        told = await status(node, code=3)
        assert told["daemon"]["capturing"] is False
        assert {change["kind"] for change in told["differences"]} == {"route", "rule", "ruleset"}
        assert told["observed"] == {"rules": [], "routes": [], "tables": []}
        assert await daemon.stop() == 0


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
async def test_status_without_a_daemon(way: Way) -> None:
    node, file = way.proxy, str(way.file(CONFIG))
    nothing = await status(node, code=69)
    assert (nothing["daemon"], nothing["waiting"], nothing["differences"]) == (None, None, None)
    assert (await status(node, "-c", file, code=69))["differences"]
    await tproxyd(node, "apply", "-c", file)
    told = await status(node, "-c", file, code=0)
    assert (told["applied"], told["planned_by"], told["differences"]) == (True, file, [])
    # Nobody says what should be there.
    told = await status(node, code=3)
    assert (told["applied"], told["planned_by"], told["differences"]) == (True, None, None)
    await node.run("ip", "-6", "rule", "del", "priority", "5234")
    told = await status(node, "-c", file, code=3)
    assert told["differences"] == [
        {"kind": "rule", "what": "add ip rule -6 priority 5234 fwmark 0x1000000/0x3000000 lookup 133"}
    ]
    assert (await tproxyd(node, "status", "-c", file, code=3)).stdout == (
        "daemon   none\n"
        "kernel   7 ip rules, 2 local routes, tables inet: tproxyd, tproxyd_guard, tproxyd_state\n"
        "applied  yes: stays until `tproxyd revert`\n"
        f"planned  by {file}: the kernel does not hold it; see `tproxyd plan --diff`\n"
        "         add ip rule -6 priority 5234 fwmark 0x1000000/0x3000000 lookup 133\n"
    )
    await tproxyd(node, "revert")
    async with open_daemon(node, CONFIG) as daemon:
        daemon.process.send_signal(signal.SIGKILL)
        await daemon.process.wait()
    # What it leaves: the guard, rules and routes.
    told = await status(node, code=3)
    assert (told["daemon"], told["applied"]) == (None, False)
    assert told["observed"]["tables"] == [{"name": "tproxyd_guard", "owned": False}]
    await tproxyd(node, "revert")
    await status(node, code=69)


async def test_what_runs_without_a_file_is_looked_at_without_one(sidecar_lab: Lab) -> None:
    host = sidecar_lab["host"]
    port = ("--port", "8080")
    async with host.process(*TPROXYD, "run", *port, collect=True) as daemon:
        await daemon.wait_for_output("ready")
        assert (await tproxyd(host, "plan", "--diff", *port)).stdout == SAME
        assert "planned      by the command line: the kernel holds it" in (await tproxyd(host, "status", *port)).stdout
        assert "forwarded: relayed" in (await tproxyd(host, "explain", "192.0.2.2", "192.0.2.1:8080", *port)).stdout
        assert "no failures" in (await tproxyd(host, "doctor", "--no-probe", *port)).stdout
    refused = await tproxyd(host, "plan", "--diff", code=78)
    assert "there is no such file; name another with -c, or capture ports without a file: --port 8080" in refused.stderr


# apply --confirm, confirm


@asynccontextmanager
async def waiting(
    node: Node, file: Path, seconds: int, *, stdin: int | None = subprocess.DEVNULL
) -> AsyncIterator[LabProcess]:
    """`tproxyd apply --confirm`, once the change is made and it waits."""
    command = (*TPROXYD, "apply", "-c", str(file), "--confirm", str(seconds))
    async with node.process(*command, stdin=stdin, collect=True) as process:
        await process.wait_for_output("s to confirm the change")
        yield process


@pytest.mark.parametrize(
    ("way", "first"), [("gateway v4", ""), ("sidecar v6", OTHER)], indirect=["way"], ids=["nothing", "another config"]
)
async def test_a_change_that_is_not_confirmed_in_time_is_taken_back_to_the_letter(way: Way, first: str) -> None:
    """Whether there was nothing of ours before or another config, foreign state around it; SIGHUP and a closed stdin are no answer."""
    node = way.proxy
    await node.run("nft", "-f", "-", input="table inet foreign { chain c { counter; }; }")
    await node.run("ip", "-6", "rule", "add", "priority", "5234", "fwmark", "0x8/0x8", "lookup", "100")
    if first:
        await tproxyd(node, "apply", "-c", str(way.file(first)))
    before = await node.dump()
    began = trio.current_time()
    async with waiting(node, way.file(CONFIG), 1) as process:
        assert "load table inet tproxyd, load table inet tproxyd_guard" in process.stdout_text
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTSTP)
        assert await process.wait() == 1
    assert 1 <= trio.current_time() - began < 12
    assert "not confirmed within 1 s: the change is taken back" in process.stderr_text
    assert await node.dump() == before


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
async def test_yes_on_stdin_confirms_and_nothing_else_does(way: Way) -> None:
    node, file = way.proxy, way.file(CONFIG)
    await tproxyd(node, "apply", "-c", str(file))
    applied = await node.dump()
    await tproxyd(node, "revert")
    async with waiting(node, file, 60, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        await process.stdin.send_all(b"no\nyes please\n\nYES\nye")
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.5):
            await process.wait()
        await process.stdin.send_all(b"s\n yes \n")
        assert await process.wait() == 0
    assert process.stdout_text.endswith("confirmed: the change stays\n")
    assert await node.dump() == applied
    # With nothing to change there is nothing to wait for.
    done = await tproxyd(node, "apply", "-c", str(file), "--confirm", "60")
    assert done.stdout == "nothing to change: the kernel holds the plan\n"


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
async def test_confirm_elsewhere_confirms_and_status_tells_who_waits(way: Way) -> None:
    node, file = way.proxy, way.file(CONFIG)
    nothing = await tproxyd(node, "confirm", code=69)
    assert "no change waits to be confirmed" in nothing.stderr
    async with waiting(node, file, 60) as process:
        told = await status(node, "-c", str(file), code=0)
        assert told["waiting"]["pid"] == process.pid
        assert 40 < told["waiting"]["seconds_left"] <= 60
        # Neither a second one nor a daemon may come in between.
        for verb, code in (("apply", 1), ("run", 71)):
            assert f"(pid {process.pid})" in (await tproxyd(node, verb, "-c", str(file), code=code)).stderr
        applied = await node.dump()
        assert (await tproxyd(node, "confirm")).stdout == "confirmed: the change stays\n"
        assert await process.wait() == 0
    assert await node.dump() == applied
    await tproxyd(node, "confirm", code=69)
    async with open_daemon(node, CONFIG) as daemon:
        assert "serves here" in (await tproxyd(node, "confirm", code=69)).stderr
        assert await daemon.stop() == 0


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_takes_the_change_back_at_once(way: Way, number: signal.Signals) -> None:
    await tproxyd(way.proxy, "apply", "-c", str(way.file(OTHER)))
    before = await way.proxy.dump()
    async with waiting(way.proxy, way.file(CONFIG), 60) as process:
        for _ in range(3):  # more of them change nothing
            process.send_signal(number)
        with trio.fail_after(10):
            assert await process.wait() == 1
    assert re.fullmatch(
        r"tproxyd: 60 s to confirm [^\n]*\ntproxyd: stopped before it was confirmed: [^\n]*\n", process.stderr_text
    )
    assert await way.proxy.dump() == before


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
async def test_a_signal_at_any_moment_leaves_what_was_there_before(way: Way) -> None:
    """SIGTERM while the change is made, waited for, or taken back."""
    before = await way.proxy.dump()
    command = (*TPROXYD, "apply", "-c", str(way.file(CONFIG)), "--confirm", "1")
    for milliseconds in range(200, 1800, 400):
        async with way.proxy.process(*command, collect=True) as process:
            await trio.sleep(milliseconds / 1000)
            process.send_signal(signal.SIGTERM)
            # Before its handlers were there, or after its work was done, the signal ends it.
            assert await process.wait() in (1, -signal.SIGTERM)
            assert "Traceback" not in process.stderr_text
        assert await way.proxy.dump() == before


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
async def test_a_ctrl_c_that_is_held_reaches_no_program_that_takes_the_change_back(way: Way) -> None:
    """A terminal sends it to the whole process group, nft among it."""
    await tproxyd(way.proxy, "apply", "-c", str(way.file(OTHER)))
    before = await way.proxy.dump()
    command = ("setsid", *TPROXYD, "apply", "-c", str(way.file(CONFIG)), "--confirm", "1")
    for _ in range(4):
        async with way.proxy.process(*command, collect=True) as process:
            await process.wait_for_output("s to confirm the change")
            for _ in range(20):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGINT)
                await trio.sleep(0.006)
            # After its work is done, the next one ends it.
            assert await process.wait() in (1, -signal.SIGINT)
        assert await way.proxy.dump() == before


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
async def test_a_killed_apply_takes_nothing_back_and_is_in_nobodys_way(way: Way) -> None:
    before = await way.proxy.dump()
    async with waiting(way.proxy, way.file(CONFIG), 1) as process:
        applied = await way.proxy.dump()
        process.send_signal(signal.SIGKILL)
        await process.wait()
    await trio.sleep(1.2)
    assert await way.proxy.dump() == applied
    await tproxyd(way.proxy, "confirm", code=69)
    assert (await tproxyd(way.proxy, "apply", "-c", str(way.file(CONFIG)))).stdout.startswith("nothing to change")
    await tproxyd(way.proxy, "revert")
    assert await way.proxy.dump() == before


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
async def test_revert_while_a_change_waits_is_the_last_word(way: Way) -> None:
    before = await way.proxy.dump()
    await tproxyd(way.proxy, "apply", "-c", str(way.file(OTHER)))
    async with waiting(way.proxy, way.file(CONFIG), 60) as process:
        done = await tproxyd(way.proxy, "revert")
        assert "delete table inet tproxyd" in done.stdout
        assert f"pid {process.pid} waited for its change to be confirmed, and ends" in done.stderr
        assert await process.wait() == 1
    assert "`tproxyd revert` has removed everything meanwhile" in process.stderr_text
    assert await way.proxy.dump() == before


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
async def test_what_others_changed_meanwhile_is_taken_back_or_said(way: Way) -> None:
    node = way.proxy
    await tproxyd(node, "apply", "-c", str(way.file(OTHER)))
    before = await node.dump()
    elsewhere = CONFIG + "[routing]\ntable = 200\n"
    async with waiting(node, way.file(elsewhere), 60) as process:
        await node.run("nft", "flush", "ruleset")
        await node.run("ip", "-4", "rule", "flush", "protocol", "133")
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 1
    assert await node.dump() == before
    async with waiting(node, way.file(elsewhere), 60) as process:
        # Where ours has to be again.
        await node.run("ip", "-4", "route", "add", "local", "default", "dev", "lo", "table", "133")
        stays = await node.dump()
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 71
    assert "could not be taken back, and stays: cannot add the IPv4 local route to table 133" in process.stderr_text
    assert await node.dump() == stays


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
async def test_on_a_terminal_the_seconds_count_down_and_a_lost_one_does_not_stop_them(way: Way) -> None:
    """Typed yes; then the other end of the terminal is closed, as by a connection that breaks off."""
    node, command = way.proxy, (*TPROXYD, "apply", "-c", str(way.file(CONFIG)), "--confirm", "3")
    before = await node.dump()
    for answer in (b"yes\n", b""):
        ours, theirs = pty.openpty()
        # A session of its own, whose terminal this is: SIGHUP comes from the kernel when it is gone.
        session = ("setsid", "--ctty", "--wait", *command)
        try:
            async with node.process(*session, stdin=theirs, stdout=theirs, stderr=theirs) as process:
                os.close(theirs)
                said = b""
                while b"  2 s to confirm" not in said:
                    await trio.lowlevel.wait_readable(ours)
                    said += os.read(ours, 4096)
                assert b"\rtproxyd:   3 s to confirm" in said
                if answer:
                    os.write(ours, answer)
                    assert await process.wait() == 0
                    assert await node.dump() != before
                    await tproxyd(node, "revert")
                else:
                    os.close(ours)
                    ours = -1
                    with trio.fail_after(15):
                        await process.wait()
        finally:
            if ours >= 0:
                os.close(ours)
        with trio.move_on_after(10):
            while await node.dump() != before:
                await trio.sleep(0.1)
        assert await node.dump() == before


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
async def test_an_output_that_takes_nothing_does_not_stop_the_clock(way: Way) -> None:
    """As a terminal after Ctrl-S, or one whose connection is dead."""
    node, command = way.proxy, (*TPROXYD, "apply", "-c", str(way.file(CONFIG)), "--confirm", "1")
    before = await node.dump()
    read_end, write_end = os.pipe()
    try:
        size = fcntl.fcntl(write_end, fcntl.F_GETPIPE_SZ)
        os.write(write_end, bytes(size))
        async with node.process(*command, stdout=write_end, stderr=write_end):
            with trio.fail_after(15):
                while await node.dump() == before:
                    await trio.sleep(0.02)
            with trio.fail_after(15):
                while await node.dump() != before:
                    await trio.sleep(0.02)
    finally:
        os.close(read_end)
        os.close(write_end)
