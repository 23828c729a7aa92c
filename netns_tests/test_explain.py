"""`tproxyd explain` against reality: for each packet of a table, what it foretells and what a real connection meets then.

A group is a configuration, a state of the daemon, and packets. All of a group's packets are explained and tried, and at the end it is
compared who answered, as whom the server saw the client, and what stands in the access log.
"""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio

from tproxyd.config import load_config
from tproxyd.daemon.explain import Account, explain_connection, read_request
from tproxyd.net.sockets import format_address, open_listener
from tproxyd.testing import Lab, Node, serve_identity
from tproxyd.testing.daemon import TPROXYD, LabDaemon, open_daemon

PORTS = '[capture]\nports = ["8080-8089", "9000-9099"]\nexclude_ports = ["22", "8089"]\n'
ALL_PORTS = '[capture]\nports = "all"\n'
REFUSE = 'when_down = "refuse"\n'
REDIRECT = 'mode = "redirect"\n'


class Row(NamedTuple):
    """A packet, and the outcome that it has to have."""

    source: str
    destination: str
    port: int
    outcome: str
    protocol: str = "tcp"
    sender: str = "client"
    interface: str | None = None


class Answer(NamedTuple):
    """What a client met: "served", "reset", "refused", or "nothing"; and as whom the server saw it, and where."""

    what: str
    peer: str = ""
    local: str = ""


def both(v4: str, v6: str, port: int, outcome: str, **more: Any) -> list[Row]:
    """The same in both families, from the client's first addresses."""
    return [
        Row("192.0.2.2", v4, port, outcome, **more),
        Row("2001:db8:1::2", v6, port, outcome, **more),
    ]


RULES = """
[[policy.rule]]
name = "no-printers"
destinations = ["203.0.113.7", "2001:db8:f::7"]
action = "refuse"
[[policy.rule]]
name = "not-you"
sources = ["192.0.2.3", "2001:db8:1::3"]
ports = ["8082"]
action = "refuse"
[[policy.rule]]
name = "elsewhere"
ports = ["8083"]
action = { forward = "198.51.100.2:9201" }
[[policy.rule]]
name = "here"
ports = ["8084"]
action = { forward = "127.0.0.1:9202" }
[[policy.rule]]
name = "loop"
ports = ["8085"]
action = { forward = "192.0.2.1:15006" }
[[policy.rule]]
name = "nowhere"
ports = ["8086"]
action = { forward = "[2001:db8:a::1]:80" }
"""

# Behind the gateway: the server answers for 203.0.113.0/24 and 2001:db8:f::/48.
GATEWAY_RULES = [
    *both("203.0.113.9", "2001:db8:f::9", 8080, "forwarded"),
    *both("203.0.113.9", "2001:db8:f::9", 9099, "forwarded"),
    *both("198.51.100.2", "2001:db8:2::2", 8080, "forwarded"),
    *both("192.0.2.1", "2001:db8:1::1", 8080, "forwarded"),
    *both("198.51.100.1", "2001:db8:2::1", 8080, "forwarded"),
    *both("203.0.113.9", "2001:db8:f::9", 9100, "bypassed"),
    *both("203.0.113.9", "2001:db8:f::9", 8089, "bypassed"),
    *both("203.0.113.7", "2001:db8:f::7", 8080, "refused_by_policy"),
    Row("192.0.2.3", "203.0.113.9", 8082, "refused_by_policy"),
    Row("2001:db8:1::3", "2001:db8:f::9", 8082, "refused_by_policy"),
    *both("203.0.113.9", "2001:db8:f::9", 8082, "forwarded"),
    *both("203.0.113.9", "2001:db8:f::9", 8083, "forwarded"),
    *both("203.0.113.9", "2001:db8:f::9", 8084, "forwarded"),
    *both("203.0.113.9", "2001:db8:f::9", 8085, "self_call"),
    *both("203.0.113.9", "2001:db8:f::9", 8086, "upstream_unreachable"),
    *both("169.254.169.254", "fd00:ec2::254", 8080, "refused_special"),
    Row("192.0.2.2", "100.100.100.200", 8080, "refused_special"),
    *both("203.0.113.9", "2001:db8:f::9", 8080, "bypassed", protocol="udp"),
    *both("192.0.2.1", "2001:db8:1::1", 15006, "bypassed"),
    Row("2001:db8:1::2", "2001:db8:1::", 8080, "bypassed"),  # the routers' anycast address
]
GATEWAY_SELECTORS = [
    *both("203.0.113.9", "2001:db8:f::9", 8080, "forwarded"),
    *both("203.0.113.7", "2001:db8:f::7", 8080, "bypassed"),
    *both("203.0.113.200", "2001:db8:f:1::1", 8080, "bypassed"),
    *both("192.0.2.1", "2001:db8:1::1", 8080, "forwarded"),
    Row("192.0.2.3", "203.0.113.9", 8080, "bypassed"),
    Row("192.0.2.200", "203.0.113.9", 8080, "bypassed"),
    Row("2001:db8:1::3", "2001:db8:f::9", 8080, "bypassed"),
]
GATEWAY_INTERFACES = [
    *both("203.0.113.9", "2001:db8:f::9", 8080, "bypassed"),
    Row("198.51.100.2", "192.0.2.2", 8080, "forwarded", sender="server"),
    Row("2001:db8:2::2", "2001:db8:1::2", 8080, "forwarded", sender="server"),
]
GATEWAY_EXCLUDED = [
    Row("192.0.2.2", "203.0.113.9", 8080, "forwarded"),
    Row("192.0.2.2", "192.0.2.1", 8080, "bypassed"),
    Row("2001:db8:1::2", "2001:db8:f::9", 8080, "bypassed"),  # no IPv6 network is listed
    Row("198.51.100.2", "192.0.2.2", 8080, "bypassed", sender="server"),
]
GATEWAY_ALL_PORTS = [
    *both("192.0.2.1", "2001:db8:2::1", 15006, "self_call"),
    *both("203.0.113.9", "2001:db8:f::9", 15006, "forwarded"),
    *both("203.0.113.9", "2001:db8:f::9", 22, "bypassed"),
    *both("203.0.113.9", "2001:db8:f::9", 9100, "forwarded"),
]
GATEWAY_DEFAULT_REFUSE = [
    *both("203.0.113.9", "2001:db8:f::9", 8080, "forwarded"),
    *both("203.0.113.9", "2001:db8:f::9", 8082, "refused_by_policy"),
    Row("192.0.2.2", "169.254.169.254", 8080, "upstream_unreachable"),
    Row("192.0.2.2", "169.254.1.1", 8080, "refused_special"),
]
LOCAL_ONLY = [
    *both("203.0.113.9", "2001:db8:f::9", 8080, "bypassed"),
    *both("198.51.100.1", "2001:db8:2::1", 8080, "forwarded"),
]
DEAD_OPEN = [
    *both("203.0.113.9", "2001:db8:f::9", 8080, "bypassed"),
    *both("192.0.2.1", "2001:db8:1::1", 8080, "bypassed"),
    Row("192.0.2.2", "169.254.169.254", 8080, "bypassed"),  # where the gateway has no route to
]
DEAD_CLOSED = [
    *both("203.0.113.9", "2001:db8:f::9", 8080, "refused_when_down"),
    *both("192.0.2.1", "2001:db8:1::1", 8080, "refused_when_down"),
    *both("203.0.113.9", "2001:db8:f::9", 9100, "bypassed"),
    *both("203.0.113.9", "2001:db8:f::9", 8089, "bypassed"),
    *both("203.0.113.9", "2001:db8:f::9", 8080, "bypassed", protocol="udp"),
    Row("192.0.2.2", "169.254.169.254", 8080, "refused_when_down"),
]

# There the listener is on every address.
REDIRECTED = [
    row._replace(outcome="self_call") if row.port == 15006 and row.outcome == "bypassed" else row
    for row in GATEWAY_RULES
]
REDIRECTED_TO_NOBODY = [
    *both("203.0.113.9", "2001:db8:f::9", 8080, "refused_when_down"),
    *both("192.0.2.1", "2001:db8:1::1", 8080, "refused_when_down"),
    *both("203.0.113.9", "2001:db8:f::9", 9100, "bypassed"),
    Row("192.0.2.2", "169.254.169.254", 8080, "refused_special"),
]

RUNNING: list[tuple[str, str, list[Row]]] = [
    ("rules", PORTS + RULES, GATEWAY_RULES),
    (
        "selectors",
        PORTS
        + 'interfaces = ["eth*"]\nsources = ["192.0.2.0/26", "2001:db8:1::/126"]\n'
        + 'exclude_sources = ["192.0.2.3", "2001:db8:1::3"]\n'
        + 'destinations = ["local", "203.0.113.0/25", "2001:db8:f::/64"]\n'
        + 'exclude_destinations = ["203.0.113.7", "2001:db8:f::7"]\n',
        GATEWAY_SELECTORS,
    ),
    ("interfaces", PORTS + 'interfaces = ["eth1", "veth*"]\n', GATEWAY_INTERFACES),
    (
        "excluded",
        PORTS + 'exclude_interfaces = ["eth1"]\nsources = ["192.0.2.0/24"]\nexclude_destinations = ["local"]\n',
        GATEWAY_EXCLUDED,
    ),
    ("all ports", ALL_PORTS + '[upstream]\nsource = "proxy"\n', GATEWAY_ALL_PORTS),
    (
        "default refuse",
        PORTS + '[policy]\ndefault = "refuse"\nallow_special = ["169.254.169.254"]\n'
        '[[policy.rule]]\nname = "web"\nports = ["8080"]\naction = "forward"\n',
        GATEWAY_DEFAULT_REFUSE,
    ),
    ("local only", PORTS + REFUSE + 'destinations = ["local"]\n', LOCAL_ONLY),
    ("redirect", PORTS + REDIRECT + REFUSE + RULES, REDIRECTED),
]

# The app lives on the host itself.
SIDECAR_ROWS = [
    *both("192.0.2.1", "2001:db8:1::1", 8080, "forwarded"),
    *both("192.0.2.1", "2001:db8:1::1", 9100, "bypassed"),
    *both("203.0.113.9", "2001:db8:f::9", 8080, "upstream_unreachable"),
    *both("169.254.169.254", "fd00:ec2::254", 8080, "refused_special"),
    Row("127.0.0.1", "127.0.0.1", 8080, "bypassed", sender="host"),
    Row("::1", "::1", 8080, "bypassed", sender="host"),
    Row("192.0.2.1", "192.0.2.1", 8080, "bypassed", sender="host"),
    Row("2001:db8:1::1", "2001:db8:1::1", 8080, "bypassed", sender="host"),
    Row("127.0.0.1", "127.0.0.1", 15006, "self_call", sender="host"),
    Row("::1", "::1", 15006, "self_call", sender="host"),
    Row("192.0.2.1", "192.0.2.2", 8080, "bypassed", sender="host"),
    Row("2001:db8:1::1", "2001:db8:1::2", 8080, "bypassed", sender="host"),
]


@pytest.mark.parametrize(("name", "config", "rows"), RUNNING, ids=[name for name, _, _ in RUNNING])
async def test_explain_agrees_with_a_gateway(
    gateway_lab: Lab, nursery: trio.Nursery, tmp_path: Path, name: str, config: str, rows: list[Row]
) -> None:
    await serve(nursery, gateway_lab, everywhere=REDIRECT not in config)
    async with open_daemon(gateway_lab["gateway"], config) as daemon:
        await compare(gateway_lab, "gateway", explainer(tmp_path, config), rows, daemon)


async def test_explain_agrees_with_a_sidecar(sidecar_lab: Lab, nursery: trio.Nursery, tmp_path: Path) -> None:
    await serve(nursery, sidecar_lab)
    async with open_daemon(sidecar_lab["host"], PORTS) as daemon:
        await compare(sidecar_lab, "host", explainer(tmp_path, PORTS), SIDECAR_ROWS, daemon)


@pytest.mark.parametrize(
    ("config", "rows"), [(PORTS, DEAD_OPEN), (PORTS + REFUSE, DEAD_CLOSED)], ids=["open", "closed"]
)
@pytest.mark.parametrize("state", ["killed", "applied", "draining"])
async def test_explain_agrees_where_nobody_serves(
    gateway_lab: Lab, nursery: trio.Nursery, tmp_path: Path, state: str, config: str, rows: list[Row]
) -> None:
    """After SIGKILL the steering table is gone; what `tproxyd apply` has put there still has it, and no listener. A daemon that drains
    has both, and captures nothing new."""
    gateway = gateway_lab["gateway"]
    await serve(nursery, gateway_lab)
    explain = explainer(tmp_path, config)
    async with AsyncExitStack() as stack:
        if state == "applied":
            await gateway.run(*TPROXYD, "apply", "-c", str(tmp_path / "tproxyd.toml"))
        else:
            daemon = await stack.enter_async_context(open_daemon(gateway, config))
            stream = await stack.enter_async_context(await gateway_lab["client"].connect("203.0.113.9", 8080))
            await stream.receive_some()
            if state == "killed":
                daemon.process.send_signal(signal.SIGKILL)
                await daemon.process.wait()
            else:
                daemon.process.send_signal(signal.SIGTERM)
                with trio.fail_after(5):
                    while explain(gateway, rows[0], 30000).kernel != "draining":
                        await trio.sleep(0.02)
        await compare(gateway_lab, "gateway", explain, rows)
    # After `revert` the kernel has nothing to refuse with.
    await gateway.run(*TPROXYD, "revert")
    await compare(gateway_lab, "gateway", explain, both("203.0.113.9", "2001:db8:f::9", 8080, "bypassed"))


@pytest.mark.parametrize("state", ["killed", "applied"])
async def test_explain_agrees_where_nobody_serves_in_redirect_mode(
    gateway_lab: Lab, nursery: trio.Nursery, tmp_path: Path, state: str
) -> None:
    """What `tproxyd apply` has put there redirects, whoever listens."""
    gateway = gateway_lab["gateway"]
    await serve(nursery, gateway_lab, everywhere=False)
    explain = explainer(tmp_path, PORTS + REDIRECT)
    if state == "applied":
        await gateway.run(*TPROXYD, "apply", "-c", str(tmp_path / "tproxyd.toml"))
        await compare(gateway_lab, "gateway", explain, REDIRECTED_TO_NOBODY)
    else:
        async with open_daemon(gateway, PORTS + REDIRECT) as daemon:
            daemon.process.send_signal(signal.SIGKILL)
            await daemon.process.wait()
        await compare(gateway_lab, "gateway", explain, DEAD_OPEN)
    await gateway.run(*TPROXYD, "revert")


async def test_explain_agrees_where_routing_drops(gateway_lab: Lab, nursery: trio.Nursery, tmp_path: Path) -> None:
    """A reverse-path filter, forwarding switched off, a rule of ours that is missing."""
    gateway, client = gateway_lab["gateway"], gateway_lab["client"]
    await serve(nursery, gateway_lab)
    # The way back to this address leaves by eth1.
    await client.run("ip", "address", "add", "198.51.100.50/32", "dev", "eth0")
    gateway.set_sysctl("net.ipv4.conf.all.rp_filter", 1)
    gateway.set_sysctl("net.ipv6.conf.all.forwarding", 0)
    rows = [
        *both("203.0.113.9", "2001:db8:f::9", 8080, "forwarded"),
        Row("198.51.100.50", "203.0.113.9", 8080, "dropped", interface="eth0"),
        Row("198.51.100.50", "203.0.113.9", 9100, "bypassed", interface="eth0"),
        Row("2001:db8:1::2", "2001:db8:f::9", 9100, "bypassed"),
    ]
    async with open_daemon(gateway, PORTS) as daemon:
        await compare(gateway_lab, "gateway", explainer(tmp_path, PORTS), rows, daemon)
    explain = explainer(tmp_path, PORTS)
    await gateway.run(*TPROXYD, "apply", "-c", str(tmp_path / "tproxyd.toml"))
    with gateway.call(partial(open_listener, "127.0.0.1", 15006, backlog=10)):
        await gateway.run("ip", "rule", "del", "priority", "5234")
        await compare(gateway_lab, "gateway", explain, [Row("192.0.2.2", "203.0.113.9", 8080, "dropped")])
    await gateway.run(*TPROXYD, "revert")


OTHERS = """
rule add priority 100 ipproto tcp dport 8087 blackhole
rule add priority 101 ipproto tcp dport 9201 unreachable
rule add priority 102 ipproto tcp sport 20001-20002 dport 8080 blackhole
rule add priority 103 ipproto tcp dport 9099 lookup 200
rule add priority 104 ipproto udp dport 8080 unreachable
"""
ROUTED_BY_OTHERS = [
    *both("203.0.113.9", "2001:db8:f::9", 8080, "dropped"),  # from the ports of the third rule
    *both("203.0.113.9", "2001:db8:f::9", 8080, "forwarded"),
    *both("203.0.113.9", "2001:db8:f::9", 8087, "dropped"),
    *both("203.0.113.9", "2001:db8:f::9", 8083, "upstream_unreachable"),
    *both("203.0.113.9", "2001:db8:f::9", 9099, "forwarded"),
    *both("203.0.113.9", "2001:db8:f::9", 9201, "bypassed"),
    Row("192.0.2.2", "203.0.113.70", 8080, "upstream_timeout"),
    Row("2001:db8:1::2", "2001:db8:f:7::9", 8080, "forwarded"),
    *both("203.0.113.70", "2001:db8:f:7::9", 9100, "bypassed"),
]
LOCAL_BY_OTHERS = [
    Row("192.0.2.2", "203.0.113.70", 8080, "bypassed"),  # an address of this host by its table `local` alone
    Row("2001:db8:1::2", "2001:db8:f:7::9", 8080, "forwarded"),
    *both("192.0.2.1", "2001:db8:1::1", 8080, "forwarded"),
]


@pytest.mark.parametrize(
    ("config", "rules", "rows"),
    [
        (PORTS + RULES + '[upstream]\nconnect_timeout = "300ms"\n', OTHERS, ROUTED_BY_OTHERS),
        (PORTS + 'destinations = ["local"]\n', "", LOCAL_BY_OTHERS),
    ],
    ids=["rules", "routes"],
)
async def test_explain_agrees_where_others_route(
    gateway_lab: Lab, nursery: trio.Nursery, tmp_path: Path, config: str, rules: str, rows: list[Row]
) -> None:
    """Their ip rules select by protocol and ports; their `local` routes are in other tables than `local`, where IPv4 delivers to them,
    but sockets cannot answer."""
    gateway = gateway_lab["gateway"]
    await serve(nursery, gateway_lab)
    async with open_daemon(gateway, config) as daemon:
        for family, network in (("-4", "203.0.113.64/28"), ("-6", "2001:db8:f:7::/64")):
            await gateway.run("ip", family, "route", "add", "local", network, "dev", "lo", "table", "main")
            await gateway.run("ip", family, "-batch", "-", input=rules)
        await compare(gateway_lab, "gateway", explainer(tmp_path, config), rows, daemon)


async def test_ssh_that_comes_after_the_daemon_is_captured(
    gateway_lab: Lab, nursery: trio.Nursery, tmp_path: Path
) -> None:
    """A daemon spares what it saw at its start. Without one, the port of the session counts in which the user types."""
    gateway, config = gateway_lab["gateway"], '[capture]\nports = "all"\nexclude_ports = []\n'
    await serve(nursery, gateway_lab)
    explain = explainer(tmp_path, config)
    spared = [*both("192.0.2.1", "2001:db8:1::1", 9100, "bypassed")]
    async with open_daemon(gateway, config) as daemon:
        await nursery.start(serve_identity, gateway, 22)
        assert explain(gateway, spared[0], 30000).kernel == "as planned"
        await compare(gateway_lab, "gateway", explain, both("192.0.2.1", "2001:db8:1::1", 22, "forwarded"), daemon)
    with pytest.MonkeyPatch.context() as session:
        session.setenv("SSH_CONNECTION", "192.0.2.2 4000 192.0.2.1 9100")
        await compare(gateway_lab, "gateway", explain, spared)
        assert "port 9100 is where SSH is served" in str(explain(gateway, spared[0], 30000).explanation.stages)


async def test_the_command(gateway_lab: Lab, tmp_path: Path) -> None:
    """For people, for programs, without a privilege, with a mistake; and nothing is changed by asking."""
    gateway = gateway_lab["gateway"]
    file = tmp_path / "tproxyd.toml"
    file.write_text(PORTS + RULES, encoding="utf-8")
    command = (*TPROXYD, "explain", "-c", str(file))
    async with open_daemon(gateway, PORTS + RULES) as daemon:
        before = await gateway.dump()
        text = (await gateway.run(*command, "192.0.2.2:40000", "203.0.113.7:8080")).stdout.splitlines()
        assert text[0].startswith("TCP from 192.0.2.2:40000 to 203.0.113.7:8080, arriving on eth0 (assumed ")
        assert f"(pid {daemon.process.pid}) serves this network namespace" in text[1]
        assert text[2] == "the kernel holds the plan"
        kernel, policy = (line for line in text if line.startswith("=> "))
        assert re.match(r"=> inet tproxyd take +yes  meta nfproto ipv4 meta l4proto tcp tproxy ip to 127", kernel)
        assert re.match(r'=> policy +yes  rule "no-printers": refuse  # .* destinations has 203\.0\.113\.7$', policy)
        assert text[-1] == 'refused_by_policy: reset by the daemon: rule "no-printers": refuse'

        arguments = ("2001:db8:1::2", "[2001:db8:f::9]:8083", "--in", "eth0", "--json")
        answer = json.loads((await gateway.run(*command, *arguments)).stdout)
        assert answer["original_destination"] == "[2001:db8:f::9]:8083"
        assert (answer["interface"], answer["interface_assumed"], answer["kernel"]) == ("eth0", False, "as planned")
        assert (answer["outcome"], answer["rule"]) == ("forwarded", "elsewhere")
        assert (answer["upstream"], answer["upstream_source"]) == ("198.51.100.2:9201", "proxy")
        assert answer["kernel_rule"] in answer["stages"]

        weak = ("setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin")
        text = (await gateway.run(*weak, *command, "192.0.2.2", "203.0.113.9:8080")).stdout.splitlines()
        assert text[2].startswith("this explains the plan, not what the kernel holds: ")
        assert "CAP_NET_ADMIN" in text[2]
        assert text[-1].startswith("forwarded: ")

        for words, sentence in (
            (("192.0.2.2", "203.0.113.9:80", "--in", "eth7"), 'no interface "eth7"'),
            (("2001:db8:a::1", "[2001:db8:f::9]:80"), "name one with --in IFACE"),
        ):
            done = await gateway.run(*command, *words, check=False)
            assert (done.returncode, done.stdout) == (64, "")
            assert re.fullmatch(r"tproxyd: [^\n]+\n", done.stderr)
            assert sentence in done.stderr
        assert await gateway.dump() == before
    await gateway.run(*TPROXYD, "revert")
    await gateway.run(
        "ip", "rule", "add", "priority", "5234", "fwmark", "0x1000000/0x3000000", "lookup", "133", "protocol", "133"
    )
    text = (await gateway.run(*command, "192.0.2.2", "203.0.113.9:8080")).stdout.splitlines()
    assert text[1:3] == [
        "no daemon serves here",
        "the kernel differs from the plan, which this explains; to make it so:",
    ]
    assert "    load table inet tproxyd, load table inet tproxyd_state" in text
    assert text[-1].startswith("bypassed: ")


# How a row is tried and compared.

Explain = Callable[[Node, Row, int], Account]


def explainer(directory: Path, text: str) -> Explain:
    """What explains a row from a source port, in a node, by this configuration."""
    file = directory / "tproxyd.toml"
    file.write_text(text, encoding="utf-8")
    config = load_config(file)

    def explain(node: Node, row: Row, port: int) -> Account:
        request = read_request(
            endpoint(row.source, port),
            endpoint(row.destination, row.port),
            protocol="udp" if row.protocol == "udp" else "tcp",
            interface=row.interface,
        )
        return node.call(explain_connection, config, request)

    return explain


def endpoint(host: str, port: int) -> str:
    return format_address((host, port))


async def serve(nursery: trio.Nursery, lab: Lab, *, everywhere: bool = True) -> None:
    """Somebody answers wherever a packet of the table may come to, so that who is not served was refused. Not `everywhere`, the
    port of redirect mode's listeners is left to them."""
    addresses = "".join(
        f"address add {address} dev eth0 nodad\n" for address in ("192.0.2.3/24", "192.0.2.200/24", "2001:db8:1::3/64")
    )
    await lab["client"].run("ip", "-batch", "-", input=addresses)
    for node in lab:
        for port in (8080, 8082, 8089, 9099, 9100, 9201, 9202):
            await nursery.start(serve_identity, node, port)
        if node.name == "server":
            for port in (22, 15006):
                await nursery.start(serve_identity, node, port)
            # An IPv6 socket cannot be bound to an address that only a route makes local.
            await node.run("ip", "address", "add", "2001:db8:f::9", "dev", "lo", "nodad")
            for address in ("203.0.113.9", "2001:db8:f::9"):
                await nursery.start(serve_udp, node, address)
        elif node.name == "gateway" and everywhere:
            for address in ("192.0.2.1", "2001:db8:1::1"):
                await nursery.start(partial(serve_identity, node, 15006, address=address))


async def serve_udp(node: Node, address: str, task_status: trio.TaskStatus[None]) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with trio.socket.from_stdlib_socket(node.open_socket(family, socket.SOCK_DGRAM)) as sock:
        await sock.bind((address, 8080))
        task_status.started()
        while True:
            _, peer = await sock.recvfrom(100)
            await sock.sendto(
                json.dumps({"peer": format_address(peer), "local": endpoint(address, 8080)}).encode(), peer
            )


async def attempt(node: Node, row: Row, port: int) -> Answer:
    """What this packet meets."""
    if row.protocol == "udp":
        return await attempt_udp(node, row, port)
    try:
        stream = await node.connect(row.destination, row.port, source=row.source, source_port=port, timeout=0.4)
    except ConnectionRefusedError:
        return Answer("refused")
    except ConnectionResetError:
        return Answer("reset")
    except (trio.TooSlowError, OSError):
        return Answer("nothing")
    async with stream:
        try:
            with trio.fail_after(2):
                answer = await stream.receive_some()
        except trio.BrokenResourceError:
            return Answer("reset")
    return Answer("served", **json.loads(answer))


async def attempt_udp(node: Node, row: Row, port: int) -> Answer:
    family = socket.AF_INET6 if ":" in row.source else socket.AF_INET
    with trio.socket.from_stdlib_socket(node.open_socket(family, socket.SOCK_DGRAM)) as sock:
        await sock.bind((row.source, port))
        await sock.connect((row.destination, row.port))
        await sock.send(b"hello")
        with trio.fail_after(2):
            return Answer("served", **json.loads(await sock.recv(1000)))


async def compare(lab: Lab, proxy: str, explain: Explain, rows: Sequence[Row], daemon: LabDaemon | None = None) -> None:
    """Explains and tries each row; at the end, which stops the daemon, its log is complete, and all is compared."""
    seen: list[tuple[Row, str, Account, Answer]] = []
    for port, row in enumerate(rows, 20001):
        account = explain(lab[proxy], row, port)
        answer = await attempt(lab[row.sender], row, port)
        seen.append((row, endpoint(row.source, port), account, answer))
    records: dict[str, dict[str, Any]] = {}
    if daemon is not None:
        assert await daemon.stop() == 0
        records = {record["source"]: record for record in daemon.records()}
    wrong = []
    for row, own, account, answer in seen:
        explanation = account.explanation
        try:
            assert explanation.outcome == row.outcome
            assert_real(row, own, account, answer, records.get(own))
            assert sum(stage == explanation.kernel_rule for stage in explanation.stages) == 1
        except AssertionError as error:
            wrong.append(f"{row}\n  {explanation.what}\n  {answer} {records.get(own)}\n  {error}")
    assert not wrong, "\n".join(wrong)


def assert_real(row: Row, own: str, account: Account, answer: Answer, record: dict[str, Any] | None) -> None:
    explanation = account.explanation
    match explanation.outcome:
        case "forwarded":
            assert record is not None
            assert record["outcome"] == "closed"
            assert answer.what == "served"
            assert answer.local == record["upstream"] == explanation.upstream
            assert answer.peer == record["upstream_source"]
            assert (answer.peer == own) == (explanation.upstream_source == "client")
            host, client = answer.peer.rpartition(":")[0], own.rpartition(":")[0]
            assert (host == client) == (explanation.upstream_source in ("client", "client_ip"))
        case "refused_by_policy" | "self_call" | "upstream_unreachable" | "upstream_timeout":
            assert record is not None
            assert record["outcome"] == explanation.outcome
            assert answer.what == "reset"
            assert record["upstream"] == explanation.upstream
            assert (record["upstream"] is None) == (explanation.outcome != "upstream_timeout")
        case "refused_special" | "refused_when_down":
            assert record is None
            assert answer.what == "refused"
        case "bypassed":
            assert record is None
            is_lost = (
                re.search("drops it|no app can answer", explanation.what)
                or account.packet.destination_type == "anycast"
            )
            if is_lost:
                assert answer.what == "nothing"
            else:
                assert answer == Answer("served", own, endpoint(row.destination, row.port))
                here = "delivered to this host" in explanation.what
                assert here == (account.packet.destination_type == "local")
        case "dropped":
            assert record is None
            assert answer.what == "nothing"
    if record is not None:
        assert record["rule"] == explanation.rule
