"""apply and revert: what is ours, all of it, and nothing else. Foreign tables, rules and routes are planted first."""

from __future__ import annotations

import re
import signal
import sys
import time

import pytest
import trio

from netns_tests.foreign import among_foreign, plant_foreign, plant_in_the_way
from netns_tests.way import Way, median_ms
from tproxyd import kernel
from tproxyd.config import config_from_mapping
from tproxyd.net.sockets import format_address
from tproxyd.plan import make_plan
from tproxyd.testing import Lab, LabError, serve_identity
from tproxyd.testing.daemon import TPROXYD, open_daemon

CONFIG = '[capture]\nports = ["8080", "9000-9099"]\nwhen_down = "refuse"\n'


async def test_apply_twice_changes_nothing_and_revert_leaves_everything_foreign(way: Way) -> None:
    node = way.proxy
    full = await among_foreign(node)
    before = await node.dump()
    first = await node.run(*TPROXYD, "apply", "-c", str(way.file(CONFIG)))
    assert "add ip rule" in first.stdout
    applied = await node.dump()
    assert applied != before
    second = await node.run(*TPROXYD, "apply", "-c", str(way.file(CONFIG)))
    assert second.stdout == "nothing to change: the kernel holds the plan\n"
    assert await node.dump() == applied
    await plant_in_the_way(node)
    # In a directory without a configuration, and none is given.
    removed = await node.run(*TPROXYD, "revert", cwd="/")
    assert "delete table inet tproxyd_guard" in removed.stdout
    assert await node.dump() == full
    assert (await node.run(*TPROXYD, "revert")).stdout == "nothing to remove\n"
    assert await node.dump() == full


async def test_apply_of_another_config_changes_the_difference_only(way: Way) -> None:
    node = way.proxy
    before = await node.dump()
    await node.run(*TPROXYD, "apply", "-c", str(way.file(CONFIG)))
    done = await node.run(*TPROXYD, "apply", "-c", str(way.file(CONFIG + "[routing]\npriority = 7000\ntable = 200\n")))
    assert "load table" not in done.stdout  # the ruleset knows neither number
    changes = done.stdout.splitlines()
    first_removal = next(index for index, line in enumerate(changes) if line.startswith("delete"))
    assert all(line.startswith("delete") for line in changes[first_removal:])  # add before remove
    assert len(changes) == 20
    done = await node.run(*TPROXYD, "apply", "-c", str(way.file('[capture]\nports = ["8080"]\n')))
    assert "delete table inet tproxyd_guard" in done.stdout
    await node.run(*TPROXYD, "revert")
    assert await node.dump() == before


async def test_what_apply_put_there_stays_when_a_daemon_stops(way: Way, nursery: trio.Nursery) -> None:
    """Fail-closed over stops and restarts; a client in a loop is served or refused, and never gets through in between."""
    node = way.proxy
    before = await node.dump()
    await nursery.start(serve_identity, way.app, 8080)
    await node.run(*TPROXYD, "apply", "-c", str(way.file(CONFIG)))
    applied = await node.dump()
    guard = await node.run("nft", "-a", "list", "table", "inet", "tproxyd_guard")
    handles = re.findall(r"# handle (\d+)", guard.stdout)
    seen: list[str] = []

    async def dial() -> None:
        while True:
            try:
                async with await way.client.connect(way.address, 8080, timeout=3) as stream:
                    own = format_address(stream.socket.getsockname())
                    await stream.receive_some()
                    seen.append(own)
            except (ConnectionRefusedError, ConnectionResetError, trio.BrokenResourceError):
                pass
            await trio.sleep(0.005)

    served: list[str] = []
    async with trio.open_nursery() as loop:
        loop.start_soon(dial)
        for _ in range(2):
            async with open_daemon(node, CONFIG) as daemon:
                await daemon.process.wait_for_output('"outcome":"')
                assert await daemon.stop() == 0
            served += [record["source"] for record in daemon.records()]
            await trio.sleep(0.2)
            assert await node.dump() == applied
        loop.cancel_scope.cancel()
    assert seen
    assert set(seen) <= set(served)
    # The guard was not even exchanged for an equal one: around such a commit a few packets slip through.
    guard = await node.run("nft", "-a", "list", "table", "inet", "tproxyd_guard")
    assert re.findall(r"# handle (\d+)", guard.stdout) == handles
    await node.run(*TPROXYD, "revert")
    assert await node.dump() == before


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
async def test_revert_under_a_daemon_names_it(way: Way) -> None:
    before = await way.proxy.dump()
    async with open_daemon(way.proxy, CONFIG) as daemon:
        done = await way.proxy.run(*TPROXYD, "revert")
        assert f"pid {daemon.process.pid} serves this network namespace and captures nothing from now on" in done.stderr
        assert await way.proxy.dump() == before
        assert await daemon.stop() == 0
    assert await way.proxy.dump() == before


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
async def test_revert_is_not_undone_by_a_daemon_that_had_taken_over_from_apply(way: Way) -> None:
    before = await way.proxy.dump()
    await way.proxy.run(*TPROXYD, "apply", "-c", str(way.file(CONFIG)))
    async with open_daemon(way.proxy, CONFIG) as daemon:
        await way.proxy.run(*TPROXYD, "revert")
        assert await daemon.stop() == 0
    assert await way.proxy.dump() == before


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
async def test_a_foreign_flush_does_not_end_what_apply_is_for(way: Way) -> None:
    await way.proxy.run(*TPROXYD, "apply", "-c", str(way.file(CONFIG)))
    applied = await way.proxy.dump()
    async with open_daemon(way.proxy, CONFIG) as daemon:
        await way.proxy.run("nft", "flush", "ruleset")
        assert await daemon.stop() == 0
    assert await way.proxy.dump() == applied


# Loads the tables, and then does what a foreign program might do at that very moment.
DISTURBED = """
import subprocess, sys
from tproxyd.kernel import Library, Program
foreign = [sys.argv[1]]
def disturbing(run):
    def disturbed(self, text):
        output = run(self, text)
        while foreign and "chain" in text:  # once
            subprocess.run(["sh", "-c", foreign.pop()], check=True)
        return output
    return disturbed
Library.run, Program.run = disturbing(Library.run), disturbing(Program.run)
Library.check = lambda self, text: None  # it runs the text, too, without effect
from tproxyd.daemon.cli import main
sys.exit(main(sys.argv[2:]))
"""


DISTURBANCES = [
    "nft flush ruleset",
    "nft delete table inet tproxyd_guard",
    "ip -6 rule del priority 5234",
    "ip route flush table 133",
]


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
@pytest.mark.parametrize(
    ("verb", "foreign"),
    [
        *((verb, foreign) for verb in ("apply", "run") for foreign in DISTURBANCES),
        ("apply", "nft flush chain inet tproxyd capture"),  # what a daemon owns, nobody else can flush (test_drift.py)
    ],
)
async def test_what_does_not_hold_right_after_it_was_put_there_is_an_error(way: Way, foreign: str, verb: str) -> None:
    before = await way.proxy.dump()
    code = (sys.executable, "-c", DISTURBED, foreign, verb, "-c", str(way.file(CONFIG)))
    done = await way.proxy.run(*code, check=False)
    assert done.returncode == 71, done
    assert "the kernel does not hold what was just put there" in done.stderr
    assert done.stderr.count("\n") == 1
    assert await way.proxy.dump() == before


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
async def test_ctrl_c_during_apply_leaves_all_or_nothing(way: Way) -> None:
    before = await way.proxy.dump()
    file = str(way.file(CONFIG))
    await way.proxy.run(*TPROXYD, "apply", "-c", file)
    applied = await way.proxy.dump()
    await way.proxy.run(*TPROXYD, "revert")
    for milliseconds in range(60, 420, 30):
        async with way.proxy.process(*TPROXYD, "apply", "-c", file, collect=True) as process:
            await trio.sleep(milliseconds / 1000)
            process.send_signal(signal.SIGINT)
            await process.wait()
            assert "Traceback" not in process.stderr_text or milliseconds < 80  # Python itself was still starting
        now = await way.proxy.dump()
        assert now in (before, applied)
        if now == applied:
            await way.proxy.run(*TPROXYD, "revert")


# Until here Ctrl-C is Python's, which tells of it with a traceback and ends with 1.
FROM_ITS_FIRST_LINE = """
import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
print("begins", flush=True)
from tproxyd.__main__ import entry
entry()
"""


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
async def test_ctrl_c_during_a_start_ends_it_and_leaves_nothing(way: Way) -> None:
    """At no moment does the daemon crash, or go on as if nothing had been said."""
    before = await way.proxy.dump()
    start = [sys.executable, "-c", FROM_ITS_FIRST_LINE, "run", "-c", str(way.file(CONFIG))]
    for milliseconds in range(0, 480, 60):
        async with way.proxy.process(*start, collect=True) as process:
            await process.wait_for_output("begins")
            await trio.sleep(milliseconds / 1000)
            process.send_signal(signal.SIGINT)
            with trio.fail_after(5):
                assert await process.wait() in (0, -signal.SIGINT), process.stderr_text
            assert "a bug" not in process.stderr_text
        assert await way.proxy.dump() == before, milliseconds


async def test_the_daemon_among_foreign_state_leaves_it_as_it_was(way: Way, nursery: trio.Nursery) -> None:
    node = way.proxy
    full = await among_foreign(node)
    await nursery.start(serve_identity, way.app, 9000)
    async with open_daemon(node, CONFIG) as daemon:
        assert "warning" not in daemon.process.stderr_text.lower()
        async with await way.client.connect(way.address, 9000) as stream:
            own = format_address(stream.socket.getsockname())
            await stream.receive_some()
        assert (await daemon.record(own))["outcome"] in ("closed", "client_reset")
        await plant_in_the_way(node)
        assert await daemon.stop() == 0
    assert await node.dump() == full


async def test_what_a_killed_daemon_left_is_reverted_without_its_config(way: Way) -> None:
    node = way.proxy
    await plant_foreign(node)
    before = await node.dump()
    other = CONFIG + '[routing]\npriority = 9000\ntable = 4000000000\nmark = "0x40000000/0xc0000000"\n'
    async with open_daemon(node, other) as daemon:
        daemon.process.send_signal(signal.SIGKILL)
        await daemon.process.wait()
    assert await node.dump() != before
    await node.run(*TPROXYD, "revert")
    assert await node.dump() == before


@pytest.mark.parametrize("way", ["sidecar v4"], indirect=True)
@pytest.mark.parametrize(
    "culprit",
    [
        "-6 route add local default dev lo table 133",
        "-4 route add local default dev lo table 133",
    ],
)
async def test_13_an_equal_route_of_somebody_else_is_refused_and_nothing_is_half_applied(
    way: Way, culprit: str
) -> None:
    """Ours could not be told from theirs afterwards."""
    node = way.proxy
    await node.run("ip", *culprit.split())
    before = await node.dump()
    for command in (("apply", "-c", str(way.file(CONFIG))), ("run", "-c", str(way.file(CONFIG)))):
        done = await node.run(*TPROXYD, *command, check=False)
        assert done.returncode == 71
        assert done.stderr.count("\n") == 1
        assert "`local default dev lo table 133` (ip -" in done.stderr
        assert "somebody else" in done.stderr
        assert await node.dump() == before


# Somebody adds a route when all has been looked at and nothing has been changed yet.
LATE = """
import subprocess, sys
from tproxyd import kernel
look = kernel.preflight
def preflight(config, **more):
    found = look(config, **more)
    subprocess.run(["ip", *sys.argv[1].split()], check=True)
    return found
kernel.preflight = preflight
from tproxyd.daemon.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("way", ["sidecar v4"], indirect=True)
async def test_a_change_that_fails_half_way_is_taken_back_whole(way: Way) -> None:
    """From one applied config to another one, with a foreign route in the way: the first one stays, to the letter."""
    node = way.proxy
    await node.run(*TPROXYD, "apply", "-c", str(way.file('[capture]\nports = ["8080"]\n')))
    route = "-6 route add local default dev lo table 200"
    await node.run("ip", *route.split())
    before = await node.dump()
    await node.run("ip", *route.replace("add", "del").split())
    file = way.file(CONFIG + "[routing]\npriority = 7000\ntable = 200\n")
    done = await node.run(sys.executable, "-c", LATE, route, "apply", "-c", str(file), check=False)
    assert done.returncode == 71
    assert "cannot add the IPv6 local route to table 200: somebody else has put an equal one there" in done.stderr
    assert await node.dump() == before


async def test_16_ipv6_switched_off_at_the_start_leaves_ipv4_unaffected(
    sidecar_lab: Lab, nursery: trio.Nursery
) -> None:
    host = sidecar_lab["host"]
    for scope in ("all", "lo", "eth0"):
        host.set_sysctl(f"net.ipv6.conf.{scope}.disable_ipv6", 1)
    before = await host.dump()
    await nursery.start(
        serve_identity,
        host,
        8080,
    )
    async with open_daemon(host, CONFIG) as daemon:
        assert daemon.ready.endswith(" listen=127.0.0.1:15006,[::1]:15006")  # IPv6 may come later
        assert "IPv6 is switched off on lo" in daemon.process.stderr_text
        async with await sidecar_lab["client"].connect(host.v4, 8080) as stream:
            own = format_address(stream.socket.getsockname())
            await stream.send_eof()
            while await stream.receive_some():
                pass
        assert (await daemon.record(own))["outcome"] == "closed"
        for scope in ("all", "lo", "eth0"):
            host.set_sysctl(f"net.ipv6.conf.{scope}.disable_ipv6", 0)
        await daemon.process.wait_for_output("IPv6 is on again, and captured")
        await host.run("ip", "addr", "add", f"{host.v6}/64", "dev", "eth0", "nodad")
        async with await sidecar_lab["client"].connect(host.v6, 8080) as stream:
            own = format_address(stream.socket.getsockname())
            await stream.send_eof()
            while await stream.receive_some():
                pass
        assert (await daemon.record(own))["outcome"] == "closed"
        for scope in ("all", "lo", "eth0"):
            host.set_sysctl(f"net.ipv6.conf.{scope}.disable_ipv6", 1)
        assert await daemon.stop() == 0
    assert await host.dump() == before


# A kernel without IPv6, as far as sockets go: a seccomp filter answers EAFNOSUPPORT to socket(AF_INET6, ...), in this process and all its
# children.
WITHOUT_AF_INET6 = """
import ctypes, os, platform, struct, sys
LOAD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h
SOCKET = {"x86_64": 41, "aarch64": 198}[platform.machine()]
program = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in (
        (LOAD, 0, 0, 0),  # struct seccomp_data: the system call's number
        (JUMP_EQUAL, 0, 3, SOCKET),
        (LOAD, 0, 0, 16),  # its first argument
        (JUMP_EQUAL, 0, 1, 10),  # AF_INET6
        (RETURN, 0, 0, 0x00050000 | 97),  # SECCOMP_RET_ERRNO, EAFNOSUPPORT
        (RETURN, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
    )
)
buffer = ctypes.create_string_buffer(program)
filter_program = struct.pack("HxxxxxxP", 6, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, filter_program, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
os.execv(sys.argv[1], sys.argv[1:])
"""


async def test_16_no_af_inet6_at_all_leaves_ipv4_unaffected(sidecar_lab: Lab, nursery: trio.Nursery) -> None:
    host = sidecar_lab["host"]
    before = await host.dump()
    await nursery.start(serve_identity, host, 8080)
    command = (sys.executable, "-c", WITHOUT_AF_INET6, *TPROXYD, "run", "--port", "8080")
    async with host.process(*command, collect=True) as daemon:
        assert (await daemon.wait_for_output("tproxyd: ready ")).endswith(" listen=127.0.0.1:15006")
        async with await sidecar_lab["client"].connect(host.v4, 8080) as stream:
            own = format_address(stream.socket.getsockname())
            await stream.send_eof()
            while await stream.receive_some():
                pass
        await daemon.wait_for_output(f'"source":"{own}"')
        daemon.send_signal(signal.SIGTERM)
        assert await daemon.wait() == 0
    assert await host.dump() == before


async def test_17_capture_follows_the_name_of_the_interface(sidecar_lab: Lab, nursery: trio.Nursery) -> None:
    """Renamed away it goes direct, renamed back it is captured again; no crash in between."""
    host, client = sidecar_lab["host"], sidecar_lab["client"]
    await nursery.start(serve_identity, host, 8080)

    async def source() -> str:
        async with await client.connect(host.v4, 8080) as stream:
            await stream.send_eof()
            while await stream.receive_some():
                pass
            return format_address(stream.socket.getsockname())

    config = '[capture]\nports = ["8080"]\ninterfaces = ["eth0"]\n'
    async with open_daemon(host, config) as daemon:
        one = await source()
        await host.run("ip", "link", "set", "eth0", "name", "other0")
        two = await source()
        await host.run("ip", "link", "set", "other0", "name", "eth0")
        three = await source()
        assert await daemon.stop() == 0
    seen = {record["source"] for record in daemon.records()}
    assert (one in seen, two in seen, three in seen) == (True, False, True)


@pytest.mark.timed
async def test_ten_thousand_networks_load_in_under_a_second(sidecar_lab: Lab) -> None:
    """A time that the issue names: the transaction itself, as the program and as the library load it."""
    host = sidecar_lab["host"]
    networks = [f"10.{n // 250}.{n % 250}.0/25" for n in range(5000)]
    networks += [f"2001:db8:{n:x}::/48" for n in range(5000)]
    plan = make_plan(config_from_mapping({"capture": {"ports": ["8080"], "exclude_sources": networks}}))
    before = await host.dump()
    took: dict[str, list[float]] = {"program": [], "library": []}
    with host.call(kernel.Library) as library:
        for name, nft in (("program", kernel.Program()), ("library", library)):
            for _ in range(3):
                began = time.perf_counter()
                host.call(nft.run, plan.ruleset)
                took[name].append(time.perf_counter() - began)
                changes = kernel.differences(plan, host.call(kernel.observe, nft), nft)
                assert "ruleset" not in {change.kind for change in changes}
                assert {change.kind for change in host.call(kernel.revert, nft)} == {"ruleset"}
    for name, seconds in took.items():
        median_ms(f"10,000 networks, by the {name}", seconds)
        assert min(seconds) < 1
    assert await host.dump() == before


async def test_a_table_with_our_name_is_replaced(sidecar_lab: Lab) -> None:
    """`inet tproxyd` is ours by name: what an older version left there is exchanged as a whole."""
    host = sidecar_lab["host"]
    before = await host.dump()
    await host.run("nft", "-f", "-", input="table inet tproxyd_old {\n}\ntable inet tproxyd {\n}\n")
    async with open_daemon(host, CONFIG) as daemon:
        assert "tproxyd_old" not in (await host.run("nft", "list", "tables")).stdout
        assert await daemon.stop() == 0
    assert await host.dump() == before


async def test_the_lab_error_shows_what_the_daemon_said(sidecar_lab: Lab) -> None:
    with pytest.raises(LabError, match="nothing to capture"):
        async with open_daemon(sidecar_lab["host"], "[capture]\nports = []\n"):
            pass


@pytest.mark.parametrize("way", ["sidecar v4"], indirect=True)
async def test_what_was_checked_beside_another_ruleset_can_be_put_in_its_place(way: Way) -> None:
    """By one library: a dry run must not change what it believes to be there."""

    def exchange() -> None:
        with kernel.Library() as library:
            for networks in ([], ["203.0.113.0/24"], ["203.0.113.0/25", "192.0.2.128/25"], []):
                config = config_from_mapping({"capture": {"ports": ["8080"], "sources": networks}})
                kernel.apply(make_plan(config, stays=False, owned=True), library)

    before = await way.proxy.dump()
    way.proxy.call(exchange)
    way.proxy.call(kernel.revert)
    assert await way.proxy.dump() == before
