"""apply and revert: what is ours, all of it, and nothing else. Foreign tables, rules and routes are planted first."""

from __future__ import annotations

import re
import signal
import sys

import pytest
import trio

from netns_tests.way import Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import Lab, LabError, Node, serve_identity
from tproxyd.testing.daemon import TPROXYD, open_daemon

CONFIG = '[capture]\nports = ["8080", "9000-9099"]\nwhen_down = "refuse"\n'

FOREIGN_TABLES = """
table inet foreign {
  set ports { type inet_service; flags interval; elements = { 80, 8000-8100 }; }
  chain in {
    type filter hook prerouting priority raw; policy accept;
    tcp dport @ports counter accept comment "theirs"
  }
}
table inet not_tproxyd {
  chain tproxyd {
    type filter hook prerouting priority -290; policy accept;
    meta mark set meta mark | 0x4000
  }
}
table ip tproxyd {
  chain c {
    tcp dport 8080 counter
  }
}
table ip6 tproxyd {
  chain c {
    tcp dport 8080 counter
  }
}
table bridge tproxyd {
  chain c {
    counter
  }
}
table inet tproxydaemon {
  chain c {
    counter
  }
}
"""
FOREIGN_ROUTING = [
    # Our priorities with other marks, tables, interfaces and protocols; our table number; our very marks elsewhere.
    "-4 rule add priority 5233 fwmark 0x100/0xf00 lookup 100",
    "-4 rule add priority 5234 fwmark 0x40/0xff lookup 133",
    "-4 rule add priority 5234 from 198.51.100.0/24 lookup 101 protocol static",
    "-4 rule add priority 5235 iif lo fwmark 0x8/0x8 lookup 102",
    "-4 rule add priority 6000 fwmark 0x1000000/0x3000000 lookup 133",
    "-4 rule add priority 5234 fwmark 0x1000000/0x3000000 lookup 133 protocol 3",  # equal to one of ours but for its protocol
    "-6 rule add priority 5233 fwmark 0x100/0xf00 lookup 100",
    "-6 rule add priority 5234 fwmark 0x1000000/0x1000000 lookup 133",
    "-6 rule add priority 5235 to 2001:db8:77::/48 lookup 101 protocol 134",
    "-4 route add 198.51.100.0/28 dev eth0 table 133",
    "-4 route add local 203.0.113.128/25 dev lo table 133 proto 132",
    "-4 route add local default dev lo table 100",
    "-6 route add local default dev lo table 100",
    "-6 route add 2001:db8:77::/48 dev eth0 table 133",
]


async def plant_foreign(node: Node) -> None:
    await node.run("nft", "-f", "-", input=FOREIGN_TABLES)
    for command in FOREIGN_ROUTING:
        await node.run("ip", *command.split())


async def test_apply_twice_changes_nothing_and_revert_leaves_everything_foreign(way: Way) -> None:
    node = way.proxy
    await plant_foreign(node)
    before = await node.dump()
    first = await node.run(*TPROXYD, "apply", "-c", str(way.file(CONFIG)))
    assert "add ip rule" in first.stdout
    applied = await node.dump()
    assert applied != before
    second = await node.run(*TPROXYD, "apply", "-c", str(way.file(CONFIG)))
    assert second.stdout == "nothing to change: the kernel holds the plan\n"
    assert await node.dump() == applied
    # In a directory without a configuration, and none is given.
    removed = await node.run(*TPROXYD, "revert", cwd="/")
    assert "delete table inet tproxyd_guard" in removed.stdout
    assert await node.dump() == before
    assert (await node.run(*TPROXYD, "revert")).stdout == "nothing to remove\n"
    assert await node.dump() == before


async def test_apply_of_another_config_changes_the_difference_only(way: Way) -> None:
    node = way.proxy
    before = await node.dump()
    await node.run(*TPROXYD, "apply", "-c", str(way.file(CONFIG)))
    done = await node.run(*TPROXYD, "apply", "-c", str(way.file(CONFIG + "[routing]\npriority = 7000\ntable = 200\n")))
    assert "load table" not in done.stdout  # the ruleset knows neither number
    changes = done.stdout.splitlines()
    first_removal = next(index for index, line in enumerate(changes) if line.startswith("delete"))
    assert all(line.startswith("delete") for line in changes[first_removal:])  # add before remove
    assert len(changes) == 16
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
        assert (
            f"(pid {daemon.process.pid}) serves this network namespace and captures nothing from now on" in done.stderr
        )
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


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
@pytest.mark.parametrize("verb", ["apply", "run"])
@pytest.mark.parametrize(
    "foreign",
    [
        "nft flush ruleset",
        "nft delete table inet tproxyd_guard",
        "nft flush chain inet tproxyd capture",
        "ip -6 rule del priority 5234",
        "ip route flush table 133",
    ],
)
async def test_what_does_not_hold_right_after_it_was_put_there_is_an_error(way: Way, foreign: str, verb: str) -> None:
    if verb == "run" and "flush chain inet tproxyd " in foreign:
        return  # what a daemon owns, nobody else can flush (test_drift.py)
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
    for milliseconds in range(60, 420, 20):
        async with way.proxy.process(*TPROXYD, "apply", "-c", file, collect=True) as process:
            await trio.sleep(milliseconds / 1000)
            process.send_signal(signal.SIGINT)
            await process.wait()
            assert "Traceback" not in process.stderr_text or milliseconds < 100  # Python itself was still starting
        now = await way.proxy.dump()
        assert now in (before, applied)
        if now == applied:
            await way.proxy.run(*TPROXYD, "revert")


async def test_the_daemon_among_foreign_state_leaves_it_as_it_was(way: Way, nursery: trio.Nursery) -> None:
    node = way.proxy
    await plant_foreign(node)
    before = await node.dump()
    await nursery.start(serve_identity, way.app, 9000)
    async with open_daemon(node, CONFIG) as daemon:
        async with await way.client.connect(way.address, 9000) as stream:
            own = format_address(stream.socket.getsockname())
            await stream.receive_some()
        assert (await daemon.record(own))["outcome"] in ("closed", "client_reset")
        assert await daemon.stop() == 0
    assert await node.dump() == before


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
        assert "somebody else" in done.stderr
        assert await node.dump() == before


@pytest.mark.parametrize("way", ["sidecar v4"], indirect=True)
async def test_a_change_that_fails_half_way_is_taken_back_whole(way: Way) -> None:
    """From one applied config to another one, with a foreign route in the way: the first one stays, to the letter."""
    node = way.proxy
    await node.run(*TPROXYD, "apply", "-c", str(way.file('[capture]\nports = ["8080"]\n')))
    await node.run("ip", "-6", "route", "add", "local", "default", "dev", "lo", "table", "200")
    before = await node.dump()
    done = await node.run(
        *TPROXYD, "apply", "-c", str(way.file(CONFIG + "[routing]\npriority = 7000\ntable = 200\n")), check=False
    )
    assert done.returncode == 71
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
        assert daemon.ready.endswith(" listen=127.0.0.1:15006")
        assert "IPv6 is switched off on lo" in daemon.process.stderr_text
        async with await sidecar_lab["client"].connect(host.v4, 8080) as stream:
            own = format_address(stream.socket.getsockname())
            await stream.send_eof()
            while await stream.receive_some():
                pass
        assert (await daemon.record(own))["outcome"] == "closed"
        assert await daemon.stop() == 0
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
