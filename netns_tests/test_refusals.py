"""Faults 27 and 28 in every way of connecting: the upstream refuses, cannot be reached, or says nothing; the client is reset, and never hangs.

How fast is told by the kernel's own times of the packets that pass the proxy: from the one by which it learns of it (a reset, an ICMP error;
where connect() itself says it or nothing comes, the ACK that ends the client's handshake) to the reset that leaves for the client.
How long this process took to see anything is no part of that, and neither is the network.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import NamedTuple

import pytest
import trio

from netns_tests.foreign import transparent_listener
from netns_tests.watch import METRICS, metrics
from netns_tests.way import AT_ONCE, median_ms
from netns_tests.wire import Packet, Wiretap, attempt, since_it_was_there, since_it_was_told
from tproxyd.net.sockets import format_address
from tproxyd.testing import ROUTED, Lab
from tproxyd.testing.daemon import open_daemon
from tproxyd.testing.plugin import OpenLab

TRIES = 3

# A second SYN comes after one second: where the answer to the first one finds connect() still at work (there are cables without any delay
# here), the kernel only notes it, and the answer to the second is the one that is heard.
TIMEOUT = 1.5
LATEST = TIMEOUT * (1 + 1 / 32) + 0.5

_FOREIGN = {"v4": ("203.0.113.9", "203.0.113.{}"), "v6": ("2001:db8:f::9", "2001:db8:f::{}")}  # the server's, anyip


class Places:
    """The addresses of one family in a lab: client - proxy - router - server."""

    def __init__(self, lab: Lab, family: str) -> None:
        self.client, self.family = lab["client"], family
        proxy = lab["gateway"].v4_on if family == "v4" else lab["gateway"].v6_on
        self.proxy, self.other = proxy["eth0"], proxy["eth1"]
        self.server, self._pattern = _FOREIGN[family]
        self.loopback = "127.0.0.1" if family == "v4" else "::1"

    def dialled(self, layout: str) -> str:
        return self.proxy if layout == "sidecar" else self.server

    def of_server(self, number: int) -> str:
        """One more."""
        return self._pattern.format(number)


def upstream(lab: Lab, source: str, **more: str) -> str:
    """The table [upstream]; the source "pool" is addresses of the proxy's."""
    proxy = lab["gateway"]
    pool = json.dumps(["127.0.0.6", proxy.v4_on["eth0"], proxy.v6_on["eth0"]])
    lines = [
        f"source = {pool if source == 'pool' else json.dumps(source)}",
        *(f'{key} = "{more[key]}"' for key in more),
    ]
    return "[upstream]\n" + "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("target", "families"),
    [
        ("original", "v4 v6"),
        ("loopback", "v4 v6"),
        ("local", "v4"),
        ("local", "v6"),
        ("remote", "v4"),
        ("remote", "v6"),
    ],
)
@pytest.mark.timed
async def test_27_nobody_listens(open_lab: OpenLab, target: str, families: str) -> None:
    """With each source and in both layouts: the kernel of whoever has the target's address resets, and so the client is."""
    async with open_lab(ROUTED) as lab:
        proxy = lab["gateway"]
        places = [Places(lab, family) for family in families.split()]
        fixed = {"local": (places[0].other, 9090), "remote": (places[0].server, 9090)}.get(target)
        key = format_address(fixed) if fixed else target
        for source in ("client", "auto", "proxy", "pool"):
            config = '[capture]\nports = ["8080"]\n' + METRICS + upstream(lab, source, target=key)
            with Wiretap(proxy) as tap:
                async with open_daemon(proxy, config) as daemon:
                    for place, layout in itertools.product(places, ("sidecar", "gateway")):
                        dialled = place.dialled(layout)
                        to = fixed or (place.loopback if target == "loopback" else dialled, 8080)
                        took = []
                        for _ in range(TRIES):
                            one = await attempt(place.client, daemon, dialled, 8080)
                            assert one.record["outcome"] == "upstream_refused"
                            assert one.record["upstream"] == format_address(to)
                            took.append(since_it_was_told(tap.heard(), one, to))
                        name = f"{layout} {place.family}, source {source}, target {target}: reset after"
                        assert median_ms(name, took) < AT_ONCE
                    counted = await metrics(proxy)
                    assert counted['tproxyd_connections_total{outcome="upstream_refused"}'] == TRIES * 2 * len(places)


@pytest.mark.parametrize("family", ["v4", "v6"])
@pytest.mark.timed
async def test_27_nobody_listens_where_the_client_s_port_is_taken(open_lab: OpenLab, family: str) -> None:
    """A gateway falls back to the client's address with another port; the reset to that one is heard, too."""
    async with open_lab(ROUTED) as lab:
        proxy, place = lab["gateway"], Places(lab, family)
        taken = getattr(place.client, family), 30001
        with proxy.call(transparent_listener, taken), Wiretap(proxy) as tap:
            async with open_daemon(proxy, '[capture]\nports = ["8080"]\n' + upstream(lab, "client")) as daemon:
                one = await attempt(place.client, daemon, place.server, 8080, source_port=taken[1])
                packets = tap.heard()
                assert one.record["outcome"] == "upstream_refused"
                assert since_it_was_told(packets, one, one.dialled) * 1000 < AT_ONCE
                (source,) = {packet.source for packet in packets if packet.sent and packet.interface == "eth1"}
                assert source[0] == taken[0]
                assert source[1] != taken[1]


class Failure(NamedTuple):
    """`match` is what a firewall does, or a type of route. It is learnt by a `word` of the network, at `once` or `never`."""

    match: str
    outcome: str
    learnt: str = "word"


FAILURES = {
    "a firewall resets": Failure("reject with tcp reset", "upstream_refused"),
    "port unreachable": Failure("reject with icmpx port-unreachable", "upstream_refused"),
    "host unreachable": Failure("reject with icmpx host-unreachable", "upstream_unreachable"),
    "prohibited": Failure("reject with icmpx admin-prohibited", "upstream_unreachable"),
    "dropped": Failure("drop", "upstream_timeout", "never"),
    "unreachable route": Failure("unreachable", "upstream_unreachable", "once"),
    "prohibiting route": Failure("prohibit", "upstream_unreachable", "once"),
    "black hole": Failure("blackhole", "upstream_unreachable", "once"),
}
ROUTES = [name for name, failure in FAILURES.items() if failure.learnt == "once"]

# Ports: hundreds are where to, tens are how it fails, units are the layout and the try.
ORIGINAL, LOOPBACK, LOCAL, REMOTE = 8100, 8200, 8300, 8400
TARGETS = {ORIGINAL: "original", LOOPBACK: "loopback", LOCAL: "local", REMOTE: "remote"}


def firewall(chain: str, names: Iterable[str]) -> str:
    """nft: what fails so, fails here."""
    rules = [
        f"tcp dport {{ {', '.join(f'{base + 10 * number}-{base + 10 * number + 9}' for base in TARGETS)} }} {failure.match}"
        for number, (name, failure) in enumerate(FAILURES.items())
        if name in names
    ]
    return "table inet wall {\nchain c {\n" + "\n".join([chain, *rules]) + "\n}\n}\n"


@pytest.mark.parametrize(
    ("source", "family"),
    [("client", "v4"), ("client", "v6"), ("auto", "v4"), ("proxy", "v6"), ("pool", "v4"), ("pool", "v6")],
)
@pytest.mark.timed
async def test_27_28_unreachable_and_silent_upstreams(open_lab: OpenLab, source: str, family: str) -> None:
    """Both layouts and all targets at once: refused by a router's, the server's, or this host's own firewall; by a route; or never answered."""
    async with open_lab(ROUTED) as lab:
        proxy, place = lab["gateway"], Places(lab, family)
        for node in lab:  # the kernel sends six errors at once, and one a second then
            node.set_sysctl("net.ipv4.icmp_ratelimit", 0)
            node.set_sysctl("net.ipv6.icmp.ratelimit", 0)
        by_router = ("a firewall resets", "host unreachable", "prohibited")
        for node, chain, names in (
            (lab["router"], "type filter hook forward priority 0;", by_router),
            (lab["server"], "type filter hook input priority 0;", FAILURES.keys() - set(by_router) - set(ROUTES)),
            (proxy, 'type filter hook input priority 0; iifname != "lo" accept', FAILURES.keys() - set(ROUTES)),
        ):
            await node.run("nft", "-f", "-", input=firewall(chain, names))
        hosts = {}
        for number, name in enumerate(FAILURES):
            hosts[name] = place.of_server(10 + number)
            if name in ROUTES:
                await proxy.run("ip", "route", "add", FAILURES[name].match, hosts[name])
        rules = [
            f'[[policy.rule]]\nname = "r{port}"\nports = ["{port}"]\naction = {{ forward = "{format_address((to, port))}" }}\n'
            for number, name in enumerate(FAILURES)
            for base, to in ((LOOPBACK, place.loopback), (LOCAL, place.other), (REMOTE, hosts[name]))
            for port in range(base + 10 * number, base + 10 * number + 2 * TRIES)
        ]
        config = '[capture]\nports = ["8100-8499"]\n' + upstream(lab, source, connect_timeout=f"{TIMEOUT * 1000:.0f}ms")
        took: dict[str, list[float]] = {}
        packets: list[Packet] = []

        async def one(layout: str, base: int, name: str, port: int) -> None:
            failure = FAILURES[name]
            dialled = hosts[name] if layout == "gateway" else place.proxy
            to = {ORIGINAL: dialled, LOOPBACK: place.loopback, LOCAL: place.other, REMOTE: hosts[name]}[base]
            what = f"{layout} {family}, source {source}, target {TARGETS[base]}, {name}"
            try:
                got = await attempt(place.client, daemon, dialled, port)
                packets.extend(tap.heard())
                assert got.record["outcome"] == failure.outcome
                learnt = (
                    since_it_was_told(packets, got, (to, port))
                    if failure.learnt == "word"
                    else since_it_was_there(packets, got)
                )
            except BaseException as error:
                error.add_note(f"in {what}")
                raise
            took.setdefault(f"{what}, learnt {failure.learnt}", []).append(learnt)

        with Wiretap(proxy) as tap:
            async with open_daemon(proxy, config + "".join(rules)) as daemon:
                async with trio.open_nursery() as attempts:
                    for turn, (number, name), base, (side, layout) in itertools.product(
                        range(TRIES), enumerate(FAILURES), TARGETS, enumerate(("sidecar", "gateway"))
                    ):
                        remote = base == REMOTE or (base == ORIGINAL and layout == "gateway")
                        if remote or name not in ROUTES:
                            attempts.start_soon(one, layout, base, name, base + 10 * number + TRIES * side + turn)
                            await trio.sleep(0.01)  # one after the other, or they are late because of one another
                assert await daemon.stop() == 0
        for name, seconds in took.items():
            median = median_ms(name, seconds)
            if name.endswith("never"):
                assert all(TIMEOUT <= one < LATEST for one in seconds)
            else:
                assert median < AT_ONCE


async def test_27_only_errors_about_our_own_connections_are_kept(open_lab: OpenLab) -> None:
    """A client that is not captured is told by this host's firewall that it is refused, while another one's connections are rejected, too."""
    async with open_lab(ROUTED) as lab:
        proxy, place, past = lab["gateway"], Places(lab, "v6"), Places(lab, "v4")
        await proxy.run("nft", "-f", "-", input=(
            "table inet wall {\nchain c {\ntype filter hook input priority 0;\n"
            f'iifname "lo" tcp dport 8080 reject with icmpx port-unreachable\nip daddr {past.proxy} tcp dport 8080 reject\n}}\n}}\n'
        ))  # fmt: skip
        config = f'[capture]\nports = ["8080"]\nexclude_sources = ["{past.client.v4}"]\n' + upstream(lab, "client")
        async with open_daemon(proxy, config) as daemon:
            for number in range(TRIES):
                one = await attempt(place.client, daemon, place.proxy)
                assert one.record["outcome"] == "upstream_refused"
                with (
                    pytest.raises(ConnectionRefusedError),
                    trio.fail_after(0.5),
                ):  # a second SYN would come after a second
                    await past.client.connect(past.proxy, 8080, source_port=one.client[1] + 10000 + number)
            assert await daemon.stop() == 0
