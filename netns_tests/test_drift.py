"""What other programs do to the kernel's state while a daemon serves under load: repaired within a second, one event each, and the
connections that live go on.

"Under load" is four clients in a loop, and live connections are asked for an echo after every repair. A repair is from the moment at which the other program begins to the one at which the daemon says so; a complete dump then equals the one before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import trio

from netns_tests.drift import echo, events, open_live, under_load, until_mended
from netns_tests.watch import METRICS, get, metrics, until
from netns_tests.way import BOTH_LAYOUTS, Way, median_ms
from tproxyd import kernel
from tproxyd.testing import Lab, serve_echo
from tproxyd.testing.daemon import open_daemon

Counted = Callable[[int], int]
CONFIG = '[capture]\nports = ["8080"]\nwhen_down = "refuse"\n' + METRICS


FAULTS = {
    "nft flush ruleset": ("nft flush ruleset", "ruleset"),
    "the guard deleted": ("nft delete table inet tproxyd_guard", "ruleset"),
    "a chain of the guard flushed": ("nft flush chain inet tproxyd_guard guard", "ruleset"),
    "ip rule del": ("ip -{family} rule del priority 5234", "rule"),
    "all rules of the protocol": ("ip -{family} rule flush protocol 133", "rule"),
    "ip route flush table": ("ip -{family} route flush table 133", "route"),
}


# A table is one for both families; rules and routes are each family's own.
@pytest.mark.parametrize(
    ("way", "name"),
    [
        (f"{layout} {family}", name)
        for name, (command, _) in FAULTS.items()
        for layout, own in (("gateway", "v4"), ("sidecar", "v6"))
        for family in (("v4", "v6") if "{family}" in command else (own,))
    ],
    indirect=["way"],
)
@pytest.mark.timed
async def test_09_11_12_what_others_remove_is_back_within_a_second(
    way: Way, nursery: trio.Nursery, counted: Counted, name: str
) -> None:
    command, kind = FAULTS[name]
    command = command.format(family=6 if ":" in way.address else 4)
    await nursery.start(serve_echo, way.app, 8080)
    before = await way.proxy.dump()
    took, times = [], counted(50)
    async with open_daemon(way.proxy, CONFIG) as daemon:
        planned = await way.proxy.dump()
        async with open_live(way.client, way.address) as live, under_load(way.client, way.address):
            for number in range(1, times + 1):
                began = trio.current_time()
                await way.proxy.run(*command.split())
                took.append(await until_mended(daemon, way.proxy, planned, live, number=number, began=began))
        await trio.sleep(0.3)  # no second event for the same thing
        assert len(events(daemon)) == times
        assert (await metrics(way.proxy))[f'tproxyd_drift_repairs_total{{kind="{kind}"}}'] == times
        assert await daemon.stop() == 0
    assert await way.proxy.dump() == before
    median_ms(f"{name}, {way}", took)
    assert max(took) < 1


@BOTH_LAYOUTS
async def test_nobody_else_can_change_the_steering_table(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, CONFIG) as daemon:
        planned = await way.proxy.dump()
        for command in (
            "nft delete table inet tproxyd",
            "nft flush chain inet tproxyd capture",
            "nft add rule inet tproxyd capture accept",
        ):
            done = await way.proxy.run(*command.split(), check=False)
            assert "Operation not permitted" in done.stderr
        assert await way.proxy.dump() == planned
        assert await daemon.stop() == 0


@pytest.mark.parametrize("way", ["gateway v4", "sidecar v4"], indirect=True)
@pytest.mark.timed
async def test_14_lo_down_and_up(way: Way, counted: Counted, nursery: trio.Nursery) -> None:
    """The kernel deletes the IPv6 local route for good; connections of both families go on when lo is back."""
    four, six = way, way.in_family("v6")
    await nursery.start(serve_echo, four.app, 8080)
    took, times = [], counted(50)
    async with open_daemon(four.proxy, CONFIG) as daemon:
        planned = await four.proxy.dump()
        async with open_live(four.client, four.address, six.address) as live, under_load(four.client, four.address):
            for number in range(1, times + 1):
                await four.proxy.run("ip", "link", "set", "lo", "down")
                began = trio.current_time()
                await four.proxy.run("ip", "link", "set", "lo", "up")
                took.append(await until_mended(daemon, four.proxy, planned, live, number=number, began=began))
                async with await six.client.connect(six.address, 8080) as stream:
                    await echo(stream, b"six", within=3)
        assert len(events(daemon)) == times
        assert await daemon.stop() == 0
    median_ms(f"lo down and up, {way}", took)
    assert max(took) < 1


@pytest.mark.parametrize(
    ("way", "scope"), [("gateway v4", "lo"), ("sidecar v4", "lo"), ("sidecar v4", "all")], indirect=["way"]
)
@pytest.mark.timed
async def test_15_ipv6_switched_off_and_on(way: Way, scope: str, counted: Counted, nursery: trio.Nursery) -> None:
    """IPv4 notices nothing. Live connections of IPv6 stand still while it is off, and go on, if their addresses are still there: they
    are where it was off on lo alone."""
    four, six = way, way.in_family("v6")
    kept = (four.address, six.address) if scope == "lo" else (four.address,)
    await nursery.start(serve_echo, four.app, 8080)
    took, times = [], counted(50)
    async with open_daemon(four.proxy, CONFIG) as daemon:
        planned = await four.proxy.dump()
        async with open_live(four.client, *kept) as live, under_load(four.client, four.address):
            for number in range(1, times + 1):
                for value in (1, 0):
                    began = trio.current_time()
                    four.proxy.set_sysctl(f"net.ipv6.conf.{scope}.disable_ipv6", value)
                    count = 2 * number - value
                    await until(lambda count=count: len(events(daemon)) >= count, within=3)  # type: ignore[misc]
                    took.append(trio.current_time() - began)
                    await echo(live[0], b"%d" % number, within=3)
                for stream in live:
                    await echo(stream, b"six", within=3)
                if scope == "all":
                    await four.proxy.run("ip", "address", "add", f"{six.address}/64", "dev", "eth0", "nodad")
                    with trio.move_on_after(
                        3
                    ):  # the kernel gives the address its local route in a worker, a moment later
                        while await four.proxy.dump() != planned:
                            await trio.sleep(0.01)
                assert await four.proxy.dump() == planned
                async with await six.client.connect(six.address, 8080) as stream:
                    await echo(stream, b"six", within=3)
        assert len(events(daemon)) == 2 * times
        assert await daemon.stop() == 0
    median_ms(f"IPv6 off and on, {scope}, {way}", took)
    assert max(took) < 1


@pytest.mark.timed
async def test_17_an_interface_renamed_again_and_again(
    sidecar_lab: Lab, counted: Counted, nursery: trio.Nursery
) -> None:
    """One event each; captured while it bears the name. Live connections go on."""
    host, client, times = sidecar_lab["host"], sidecar_lab["client"], counted(50)
    await nursery.start(serve_echo, host, 8080)
    took = []
    async with open_daemon(host, CONFIG.replace("[admin]", 'interfaces = ["eth0"]\n[admin]')) as daemon:
        async with open_live(client, host.v4, host.v6) as live:
            names = ("eth0", "other0")
            for number in range(1, times + 1):
                began = trio.current_time()
                await host.run("ip", "link", "set", names[0], "name", names[1])
                names = (names[1], names[0])
                await until(lambda number=number: len(events(daemon)) >= number, within=3)  # type: ignore[misc]
                took.append(trio.current_time() - began)
                for stream in live:
                    await echo(stream, b"%d" % number, within=3)
                async with await client.connect(host.v4, 8080) as stream:
                    await echo(stream, b"x", within=3)
        await trio.sleep(0.2)
        assert len(events(daemon)) == times
        captured = 2 + times // 2
        await until(lambda: len(daemon.records()) == captured)
        assert await daemon.stop() == 0
    assert len(daemon.records()) == captured
    median_ms("renamed", took)
    assert max(took) < 1


async def test_many_interfaces_that_come_and_many_strange_rules_make_no_flood_of_words(sidecar_lab: Lab) -> None:
    """40 pairs of veth, each named by capture; 300 ip rules with our protocol, mended at once and told in a short line."""
    host = sidecar_lab["host"]
    pairs = "".join(f"link add veth{n}a type veth peer name veth{n}b\n" for n in range(40))
    strange = "".join(f"rule add priority {n} fwmark {n} lookup 9 protocol 133\n" for n in range(6000, 6300))
    config = CONFIG.replace("[admin]", 'exclude_interfaces = ["veth*"]\n[admin]')
    async with open_daemon(host, config) as daemon:
        planned = len((await host.dump()).rules)
        await host.run("ip", "-batch", "-", input=pairs)
        await host.run("ip", "-batch", "-", input=strange)
        await until(lambda: "repaired" in daemon.process.stderr_text, within=5)
        with trio.fail_after(10):
            while len((await host.dump()).rules) != planned:
                await trio.sleep(0.1)
        said = daemon.process.stderr_text.splitlines()
        assert sum("has come" in line for line in said) == 60
        assert any(re.search(r"; and \d+ more$", line) for line in said)
        assert max(map(len, said)) < 1500
        assert await daemon.stop() == 0


async def test_a_program_that_does_it_again_and_again_is_answered_with_pauses(sidecar_lab: Lab) -> None:
    """Else two programs that disagree would take a core each."""
    host = sidecar_lab["host"]
    async with open_daemon(host, CONFIG) as daemon:

        async def fight() -> None:
            while True:
                await host.run("ip", "-4", "rule", "del", "priority", "5234", check=False)

        async with trio.open_nursery() as other:
            other.start_soon(fight)
            await trio.sleep(3)
            other.cancel_scope.cancel()
        assert 5 <= len(events(daemon)) <= 25
        with trio.fail_after(2):
            while "5234:" not in (await host.run("ip", "-4", "rule")).stdout:
                await trio.sleep(0.05)
        assert await daemon.stop() == 0


async def test_53_news_that_did_not_fit_means_a_look_at_everything(sidecar_lab: Lab) -> None:
    """Ten thousand routes with our protocol come and go while a rule of ours is deleted. (Of other routes there is no news.)"""
    host = sidecar_lab["host"]
    batch = "".join(f"route add 198.51.{n // 256}.{n % 256}/32 dev eth0 proto 133\n" for n in range(10_000))
    async with open_daemon(host, CONFIG) as daemon:
        planned = await host.dump()
        await host.run("ip", "-batch", "-", input=batch + "rule del priority 5234\n" + batch.replace(" add ", " del "))
        await until(lambda: events(daemon), within=3)
        assert await host.dump() == planned
        assert await daemon.stop() == 0


NEWS = {
    "ip route add 198.51.100.9/32 dev eth0": None,  # other routes wake nobody: a router has many
    "ip -6 route add 2001:db8:9::/64 dev eth0": None,
    "ip route add local default dev lo table 133 proto 133": True,
    "ip -6 route add local default dev lo table 133 proto 133": True,
    "ip route replace local default dev lo table 133 proto static": True,
    "ip route del local default dev lo table 133": True,
    "ip -6 route del local default dev lo table 133": True,
    "ip -6 rule add priority 9 fwmark 1 lookup 9": True,
    "nft add table inet foreign": False,
    "nft add table inet tproxyd_guard": True,
    "nft add chain inet tproxyd_guard c": True,
    "nft add rule inet tproxyd_guard c accept": True,
    "nft delete table inet tproxyd_guard": True,
    "ip link set lo down": True,
    "ip link set lo up": True,
    "ip addr del ::1/128 dev lo": True,  # what switching IPv6 off on lo does
    "ip link set eth0 name other0": False,
}


async def test_what_is_news_of_ours(sidecar_lab: Lab) -> None:
    host = sidecar_lab["host"]
    with host.call(kernel.Events, 133) as events:
        seen: dict[str, bool | None] = {}
        for command in NEWS:
            await host.run(*command.split())
            state, woken = False, False
            with trio.move_on_after(0.1):
                while True:
                    await trio.lowlevel.wait_readable(events.fileno())
                    woken, news = True, events.read()
                    state = state or news.state
            seen[command] = state if woken else None
        assert seen == NEWS
        assert "other0" in news.links.values()


async def test_what_cannot_be_repaired_is_told_by_readyz_until_it_can(sidecar_lab: Lab) -> None:
    """A foreign route stands where ours was: it is named, and when it goes ours comes back."""
    host = sidecar_lab["host"]
    async with open_daemon(host, CONFIG) as daemon:
        planned = await host.dump()
        assert (await get(host, "/readyz")).status == 200
        await host.run("ip", "route", "replace", "local", "default", "dev", "lo", "table", "133", "proto", "static")
        await daemon.process.wait_for_output("cannot repair the kernel's state")
        answer = await get(host, "/readyz")
        assert (answer.status, b"somebody else" in answer.body) == (503, True)
        await trio.sleep(1.2)
        assert daemon.process.stderr_text.count("cannot repair") == 1  # said once
        await host.run("ip", "route", "del", "local", "default", "dev", "lo", "table", "133", "proto", "static")
        await until(lambda: events(daemon), within=3)
        assert await host.dump() == planned
        assert (await get(host, "/readyz")).status == 200
        assert await daemon.stop() == 0
