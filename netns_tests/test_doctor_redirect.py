"""`tproxyd doctor` where `capture.mode` is "redirect": what differs from tproxy mode. The rest is in test_doctor.py."""

from __future__ import annotations

import socket
import struct
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio

from netns_tests.foreign import add_extension_rule
from netns_tests.patients import (
    GONE,
    INPUT,
    MANGLE,
    MARK,
    Fault,
    Patient,
    applied,
    names_of,
    program,
    table,
)
from netns_tests.patients import HERE as TPROXY_HERE
from netns_tests.patients import THERE as TPROXY_THERE
from tproxyd import kernel
from tproxyd.daemon.doctor import CHECKS, examine
from tproxyd.net.sockets import open_listener
from tproxyd.testing import Lab, Node, serve_echo
from tproxyd.testing.daemon import TPROXYD, open_daemon

MODE = 'mode = "redirect"\n'
HERE, THERE = TPROXY_HERE + MODE, TPROXY_THERE + MODE
REFUSE, BYPASS = 'when_down = "refuse"\n', 'when_down = "bypass"\n'
ADMIT = "ct status dnat tcp dport 15006 accept"
LAYOUTS = pytest.mark.parametrize("layout", ["gateway", "sidecar"])


def prerouting(priority: str, *rules: str, kind: str = "filter") -> str:
    return table(f"type {kind} hook prerouting priority {priority};", *rules)


def place(gateway_lab: Lab, sidecar_lab: Lab, layout: str) -> tuple[Node, Node, str]:
    """Where the daemon runs, a client, and a configuration."""
    if layout == "gateway":
        return gateway_lab["gateway"], gateway_lab["client"], THERE
    return sidecar_lab["host"], sidecar_lab["client"], HERE


# All is well


@pytest.mark.parametrize("when_down", [REFUSE, BYPASS], ids=["refuse", "bypass"])
@LAYOUTS
async def test_a_healthy_host_is_probed_and_told_what_it_loses(
    gateway_lab: Lab, sidecar_lab: Lab, tmp_path: Path, nursery: trio.Nursery, layout: str, when_down: str
) -> None:
    node, _, config = place(gateway_lab, sidecar_lab, layout)
    patient = Patient(node, config + when_down, tmp_path)
    async with open_daemon(node, config + when_down) as daemon:
        before = await node.dump()
        done = await node.run(*TPROXYD, "doctor", "-c", str(patient.file), check=False)
        assert (done.returncode, done.stderr) == (0, "")
        first, second, *losses, last = done.stdout.splitlines()
        assert first.startswith("IPv4 probed: ")
        assert second.startswith("IPv6 probed: ")
        assert len(losses) == 4
        assert all(one.startswith("redirect mode loses: ") for one in losses)
        assert last == f"{len(CHECKS) + 1} checks made: no failures, no warnings"
        assert await node.dump() == before
        await nursery.start(serve_echo, node, 8080)
        code, content, _ = await patient.runs()
        assert (code, content["healthy"], content["findings"]) == (0, True, [])
        assert [f"redirect mode loses: {one}" for one in content["losses"]] == losses
        assert [one["result"] for one in content["probes"]] == ["captured", "captured"]
        assert await node.dump() == before
        assert await daemon.stop() == 0
    assert [record["original_destination"] for record in daemon.records()] != []
    assert {record["outcome"] for record in daemon.records()}.isdisjoint({"self_call"})


async def test_tproxy_mode_loses_nothing(sidecar_lab: Lab, tmp_path: Path) -> None:
    _, content, _ = await Patient(sidecar_lab["host"], TPROXY_HERE, tmp_path).runs("--no-probe")
    assert content["losses"] == []


async def test_the_probe_knows_who_answered(sidecar_lab: Lab, tmp_path: Path, nursery: trio.Nursery) -> None:
    host = sidecar_lab["host"]
    patient = Patient(host, HERE, tmp_path)
    async with open_daemon(host, HERE.replace("8080", "9000")) as daemon:
        for what in ("was refused", "reached an app directly"):
            report = await patient.probed()
            assert names_of(report) == ["other-configuration", "probe", "probe"]
            assert all(what in finding.seen for name, finding in report.findings if name == "probe")
            if what == "was refused":
                await nursery.start(serve_echo, host, 8080)
        assert await daemon.stop() == 0


async def test_the_probe_knows_a_connection_that_the_nat_of_others_has_taken(
    sidecar_lab: Lab, tmp_path: Path, nursery: trio.Nursery
) -> None:
    host = sidecar_lab["host"]
    await nursery.start(serve_echo, host, 9999)
    patient = Patient(host, HERE, tmp_path)
    async with open_daemon(host, HERE) as daemon:
        await patient.sh(prerouting("dstnat - 10", "tcp dport 8080 redirect to :9999", kind="nat"))
        report = await patient.probed()
        assert names_of(report) == ["foreign-nat", "probe", "probe"]
        assert [one.result for one in report.probes] == ["bypassed", "bypassed"]
        await patient.mend(report, "foreign-nat")
        assert (await patient.probed()).findings == ()
        assert await daemon.stop() == 0


# What hurts steered packets alone

HARMLESS_HERE = [
    "sysctl -qw net.ipv4.tcp_syncookies=2",
    "sysctl -qw net.ipv4.conf.all.route_localnet=1",
    "ip rule add priority 100 fwmark 0x1000000/0x1000000 prohibit; ip -6 rule add priority 100 fwmark 0x1000000/0x1000000 prohibit",
    "sysctl -qw net.ipv4.conf.all.src_valid_mark=1; sysctl -qw net.ipv4.conf.eth0.rp_filter=1; "
    "ip rule add priority 99 fwmark 0x1000000/0x3000000 lookup 133",
    "ip route add local default dev lo table 133; ip route add 203.0.113.0/25 dev eth0 table 133",
    table("type nat hook postrouting priority srcnat;", "masquerade"),
    GONE,
    # A firewall of the usual kind; without the mark, and without the original port.
    table(INPUT, 'iifname "lo" accept', "ct state established,related accept", "meta l4proto icmpv6 accept", ADMIT),
    GONE,
    prerouting("mangle", "ct mark & 0xff != 0 meta mark set ct mark", "meta mark set meta mark | 0x40000"),
    GONE,
    prerouting("filter", "tcp dport 8080 drop", "udp dport 53 meta mark set 0x1000000"),
    GONE,
    table("type filter hook output priority mangle;", "meta mark set 0x1000000"),
    GONE,
]


@LAYOUTS
async def test_what_does_no_harm_in_redirect_mode_is_not_found(
    gateway_lab: Lab, sidecar_lab: Lab, tmp_path: Path, layout: str
) -> None:
    """The probe shows that it does none."""
    node, _, config = place(gateway_lab, sidecar_lab, layout)
    patient = Patient(node, config, tmp_path)
    async with open_daemon(node, config) as daemon:
        for text in HARMLESS_HERE:
            await patient.sh(text)
            report = await patient.probed()
            assert report.findings == (), text
            assert [one.result for one in report.probes] == ["captured", "captured"], text
        assert await daemon.stop() == 0


async def test_the_daemon_does_not_warn_of_syn_cookies(sidecar_lab: Lab) -> None:
    host = sidecar_lab["host"]
    host.set_sysctl("net.ipv4.tcp_syncookies", 2)
    for config, warns in ((TPROXY_HERE, True), (HERE, False)):
        async with open_daemon(host, config) as daemon:
            assert await daemon.stop() == 0
        assert ("tcp_syncookies" in daemon.process.stderr_text) is warns


async def test_a_bridge_with_br_netfilter_is_no_fault(sidecar_lab: Lab, tmp_path: Path) -> None:
    host = sidecar_lab["host"]
    host.set_sysctl("net.bridge.bridge-nf-call-iptables", 1)
    async with applied(host, HERE, tmp_path) as patient:
        await patient.sh(
            "ip link add bridge0 type bridge; ip address add 198.51.100.9/24 dev bridge0; ip link set bridge0 up"
        )
        assert await patient.found() == []


# Faults of the host and of others, in a node with applied state

FAULTS = [
    Fault("mark-in-use", prerouting("mangle", "udp dport 53 meta mark set 0x1000000"), GONE),
    Fault("mark-overwritten", prerouting("raw + 10", 'iifname "eth0" meta mark set 0x5'), GONE),
    Fault("mark-overwritten", prerouting("mangle", "meta mark set ct mark"), GONE),
    Fault("prerouting-drops", prerouting("-400", "tcp dport 8080 drop"), GONE),
    Fault("prerouting-drops", prerouting("raw + 10", "tcp dport 8000-8100 drop"), GONE),
    Fault("prerouting-drops", prerouting("mangle", "ct state new tcp dport 8080 drop"), GONE),
    Fault("prerouting-drops", prerouting("dstnat - 3", "tcp dport 8080 drop"), GONE),
    Fault("prerouting-drops", prerouting("dstnat + 1", "tcp dport 15006 drop"), GONE),
    Fault("prerouting-drops", prerouting("filter", "meta mark 0 tcp dport 15006 drop"), GONE),
    Fault("input-drops", table(INPUT, 'iifname "lo" accept', "ct state established accept", MARK), GONE),
    Fault("input-drops", table(INPUT, 'iifname "lo" accept', "tcp dport 8080 accept"), GONE),
    Fault(
        "input-drops", table("type filter hook input priority filter;", 'iifname != "lo" tcp dport != 22 reject'), GONE
    ),
    Fault("loopback-drops", table(INPUT, ADMIT), GONE),
    Fault("loopback-drops", table(INPUT, ADMIT, "ct state new accept"), GONE),
    Fault("foreign-tproxy", table(MANGLE, "meta nfproto ipv4 tcp dport 8080 tproxy ip to :9999"), GONE),
    Fault("foreign-notrack", prerouting("raw - 10", "tcp dport 8080 notrack"), GONE),
    Fault("foreign-nat", prerouting("dstnat - 10", "tcp dport 8080 redirect to :9999", kind="nat"), GONE),
    Fault("foreign-nat", prerouting("dstnat", "tcp dport 8080 redirect to :9999", kind="nat"), GONE),
    Fault("address-missing", "ip link add one type veth peer name two; ip link set one up; ip link set two up"),
    Fault("address-missing", "ip -6 address flush dev one"),
]


async def test_faults_of_the_host_and_of_other_programs(sidecar_lab: Lab, tmp_path: Path) -> None:
    async with applied(sidecar_lab["host"], HERE, tmp_path) as patient:
        for fault in FAULTS:
            await patient.suffers(fault)


async def test_the_nat_of_others_is_a_failure_only_where_it_comes_first(sidecar_lab: Lab, tmp_path: Path) -> None:
    async with applied(sidecar_lab["host"], HERE + REFUSE, tmp_path) as patient:
        for priority, warning, why in (
            ("dstnat - 10", False, "are reset"),
            ("dstnat", True, "not apply to them any more"),
        ):
            await patient.sh(prerouting(priority, "tcp dport 8080 redirect to :9999", kind="nat"))
            ((name, finding),) = (await patient.report()).findings
            assert (name, finding.warning) == ("foreign-nat", warning)
            assert why in finding.why
            await patient.sh(GONE)
        await patient.sh(prerouting("dstnat - 10", "tcp dport 8080 redirect to :9999", kind="nat"))
        report = await patient.report(HERE)
        assert any("go where it says" in finding.why for _, finding in report.findings)


async def test_interfaces_without_an_address(sidecar_lab: Lab, tmp_path: Path) -> None:
    """A failure where the configuration names one; not for the ports of a bridge, nor where IPv6 is off or nothing is at the other end."""
    host = sidecar_lab["host"]
    await host.run("ip", "link", "add", "one", "type", "veth", "peer", "name", "two")
    await host.run("ip", "link", "set", "one", "up")
    async with applied(host, HERE, tmp_path) as patient:
        await patient.sh("ip link set two up")
        ((_, finding),) = (await patient.report()).findings
        assert finding.warning
        assert finding.seen.removesuffix(" have no IPv4 address").split(", ") in (["one", "two"], ["two", "one"])
        named = dict((await patient.report(HERE + 'interfaces = ["eth0", "one"]\n')).findings)["address-missing"]
        assert (named.warning, named.seen) == (False, "one has no IPv4 address")
        patient.file.write_text(HERE)
        await patient.sh(
            "ip link add br0 type bridge; ip address add 198.51.100.1/24 dev br0; ip link set br0 up\n"
            "ip link set one master br0; ip link set two master br0"
        )
        assert await patient.found() == []
        await patient.sh("ip link set one nomaster; ip link set two down; ip address add 198.51.100.9/32 dev one")
        await patient.sh("ip -6 address flush dev one; sysctl -qw net.ipv6.conf.one.disable_ipv6=1; ip link set two up")
        await patient.sh("ip link set two master br0")
        assert await patient.found() == []


async def test_clients_on_an_interface_without_an_address_are_served_after_the_remedy(
    gateway_lab: Lab, tmp_path: Path, nursery: trio.Nursery
) -> None:
    gateway, client = gateway_lab["gateway"], gateway_lab["client"]
    await nursery.start(serve_echo, gateway_lab["server"], 8080)
    for one, other in ((gateway, client), (client, gateway)):
        hardware = (await one.run("ip", "-br", "link", "show", "eth0")).stdout.split()[2]
        for address in (one.v4, one.v6):
            await other.run("ip", "neighbour", "replace", address, "lladdr", hardware, "dev", "eth0")
    patient = Patient(gateway, THERE, tmp_path)
    async with open_daemon(gateway, THERE) as daemon:
        await patient.sh(
            "ip address flush dev eth0\nip route add 192.0.2.0/24 dev eth0\nip -6 route add 2001:db8:1::/64 dev eth0"
        )
        for destination in ("203.0.113.9", "2001:db8:f::9"):
            with pytest.raises(trio.TooSlowError):
                await client.connect(destination, 8080, timeout=0.5)
        report = await patient.report()
        assert names_of(report) == ["address-missing"] * 2
        await patient.mend(report, "address-missing")
        assert await patient.found() == []
        for destination in ("203.0.113.9", "2001:db8:f::9"):
            async with await client.connect(destination, 8080, timeout=2):
                pass
        assert await daemon.stop() == 0


# Firewalls


@LAYOUTS
async def test_10_a_default_drop_input_chain_is_named(
    gateway_lab: Lab, sidecar_lab: Lab, tmp_path: Path, layout: str
) -> None:
    """The remedy admits what is captured, and nobody who dials the listener."""
    node, client, config = place(gateway_lab, sidecar_lab, layout)
    patient = Patient(node, config, tmp_path)
    async with open_daemon(node, config) as daemon:
        usual = ('iifname "lo" accept', "ct state established,related accept", "meta l4proto icmpv6 accept")
        await patient.sh(table(INPUT, *usual))
        report = await patient.probed()
        assert names_of(report) == ["input-drops", "probe", "probe"]
        finding = report.findings[0][1]
        assert finding.seen.startswith("captured packets to port 15006 from eth0")
        assert finding.remedy.endswith(f"'{ADMIT}'")
        await patient.mend(report, "input-drops")
        assert (await patient.probed()).findings == ()
        for address in (node.v4, node.v6):
            with pytest.raises(trio.TooSlowError):
                await client.connect(address, 15006, timeout=0.3)
        assert await daemon.stop() == 0


async def test_the_input_chain_of_iptables_gets_a_rule_in_its_words(sidecar_lab: Lab, tmp_path: Path) -> None:
    async with applied(sidecar_lab["host"], HERE, tmp_path) as patient:
        await patient.sh(
            table(INPUT, 'iif "lo" accept', chain="INPUT").replace("table inet foreign", "table ip filter")
        )
        ((name, finding),) = (await patient.report()).findings
        assert (name, finding.remedy) == (
            "input-drops",
            "iptables -t filter -I INPUT -p tcp --dport 15006 -m conntrack --ctstate DNAT -j ACCEPT",
        )


STATES = {"new and DNAT": (0x88, 0, "in", ["new", "dnat"]), "not invalid": (0x1, 1, "!=", ["invalid"])}


@pytest.mark.parametrize("name", STATES)
async def test_conntrack_states_of_iptables_are_read(sidecar_lab: Lab, name: str) -> None:
    """nft shows nothing of them but that they are there; what else that extension may ask for is left as it is."""
    host = sidecar_lab["host"]
    states, inverted, operator, words = STATES[name]
    await host.run("nft", "-f", "-", input=f"table ip mangle {{\nchain PREROUTING {{\n{MANGLE}\n}}\n}}\n")

    def add(asked: int) -> None:
        # struct xt_conntrack_mtinfo3: addresses, ports and the like; what is asked, and turned round; states; status, ports.
        info = bytes(146) + struct.pack("=HHH", asked, inverted, states) + bytes(16)
        add_extension_rule("match", "conntrack", 3, info)

    for asked in (0x1, 0x2001, 0x41):
        host.call(add, asked)
    ((*known, unknown),) = [chain.rules for chain in host.call(kernel.list_chains)]
    told = {"match": {"op": operator, "left": {"ct": {"key": "state"}}, "right": words}}
    assert [rule.statements for rule in known] == [[told], [told]]
    assert [list(one) for one in unknown.statements] == [["xt"]]


async def test_firewalld_admits_what_nat_brings_by_itself(sidecar_lab: Lab, tmp_path: Path) -> None:
    host = sidecar_lab["host"]
    async with applied(host, HERE, tmp_path) as patient, program(host, tmp_path, "firewalld", "import time"):
        report = await patient.report()
        assert names_of(report) == ["firewalld"]
        assert "INPUT 0 -p tcp --dport 15006 -m conntrack --ctstate DNAT -j ACCEPT" in report.findings[0][1].remedy
        await patient.sh(table(INPUT, 'iifname "lo" accept', "ct status dnat accept", chain="filter_INPUT"))
        assert await patient.found() == []


# What is ours


@pytest.mark.parametrize("when_down", [REFUSE, BYPASS], ids=["refuse", "bypass"])
async def test_faults_of_our_own_state(sidecar_lab: Lab, tmp_path: Path, when_down: str) -> None:
    async with applied(sidecar_lab["host"], HERE + when_down, tmp_path) as patient:
        for fault in (
            Fault("table-missing", "nft delete table inet tproxyd_guard"),
            Fault("table-changed", "nft flush chain inet tproxyd divert"),
            Fault("table-left-over", "nft add table inet tproxyd_other"),
        ):
            await patient.suffers(fault)


async def test_listeners(sidecar_lab: Lab, tmp_path: Path) -> None:
    """They need not be transparent, but be there: NAT does not look for one."""
    host = sidecar_lab["host"]
    async with applied(host, HERE, tmp_path) as patient:
        pass
    report = await patient.report()
    assert names_of(report) == ["listener-missing"] * 2
    assert "are refused" in report.findings[0][1].why
    with ExitStack() as listeners:
        for address in ("0.0.0.0", "::"):
            make = partial(open_listener, address, 15006, backlog=5, transparent=False)
            listeners.enter_context(host.call(make))
        assert await patient.found() == []
        drop = ("setpriv", "--bounding-set", "-all", "--inh-caps", "-all")
        done = await host.run(*drop, *TPROXYD, "doctor", "-c", str(patient.file), check=False)
        assert (done.returncode, done.stderr) == (0, "")
    with host.open_socket(socket.AF_INET6) as both:
        both.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        both.bind(("::", 15006))
        both.listen()
        assert await patient.found() == []


async def test_another_program_at_the_listeners_port(sidecar_lab: Lab, tmp_path: Path) -> None:
    host = sidecar_lab["host"]
    patient = Patient(host, HERE, tmp_path)
    async with program(host, tmp_path, "squid", "import socket, time\ns = socket.create_server(('0.0.0.0', 15006))"):
        report = await patient.report()
        assert names_of(report) == ["not-serving", "listener-of-another"]
        await patient.mend(report, "listener-of-another")
        assert await patient.found() == ["not-serving"]


@pytest.mark.parametrize(("when_down", "why"), [(REFUSE, "refused"), (BYPASS, "pass it by")], ids=["refuse", "bypass"])
async def test_what_a_dead_daemon_leaves(sidecar_lab: Lab, tmp_path: Path, when_down: str, why: str) -> None:
    host = sidecar_lab["host"]
    patient = Patient(host, HERE + when_down, tmp_path)
    async with open_daemon(host, HERE + when_down) as daemon:
        daemon.process.send_signal(9)
        await daemon.process.wait()
        with trio.fail_after(3):
            while names_of(report := await patient.report()) != ["left-by-the-dead"] or "tproxyd," in str(report):
                await trio.sleep(0.05)
        finding = report.findings[0][1]
        assert why in finding.why
        refuses = why == "refused"  # then what was meant to be closed stays closed until a daemon serves again
        assert finding.remedy.splitlines()[0] == (f"tproxyd run -c {patient.file}" if refuses else "tproxyd revert")
        await patient.sh("tproxyd revert")
        assert await patient.found() == ["not-serving"]


async def test_a_program_that_embeds_tproxyd_is_no_dead_daemon(sidecar_lab: Lab, tmp_path: Path) -> None:
    host = sidecar_lab["host"]
    patient = Patient(host, HERE, tmp_path)
    code = (
        "import pathlib, sys, trio, tproxyd\n"
        "from tproxyd.config import load_config\n"
        "async def main():\n"
        "    async with tproxyd.open_interceptor(load_config(pathlib.Path(sys.argv[1])), own_namespace=True):\n"
        '        print("up", flush=True)\n'
        "        await trio.sleep(60)\n"
        "trio.run(main)"
    )
    async with host.process(sys.executable, "-c", code, str(patient.file), collect=True) as embedding:
        await embedding.wait_for_output("up")
        report = await patient.probed()
        assert report.findings == ()
        assert [one.result for one in report.probes] == ["captured", "captured"]


async def test_faults_of_a_daemon(sidecar_lab: Lab, tmp_path: Path, nursery: trio.Nursery) -> None:
    host = sidecar_lab["host"]
    patient = Patient(host, HERE, tmp_path)
    await nursery.start(serve_echo, host, 8080)
    async with open_daemon(host, HERE) as daemon:
        for fault in (
            Fault("loopback-down", "ip link set lo down"),
            Fault("ipv6-off", "sysctl -qw net.ipv6.conf.lo.disable_ipv6=1"),
        ):
            await patient.suffers(fault, soon=True)
        async with await sidecar_lab["client"].connect(host.v4, 8080):
            daemon.process.send_signal(15)
            await daemon.process.wait_for_output("stopping")
            await patient.suffers(Fault("daemon-draining", "true", mends=False), soon=True)
        assert await daemon.process.wait() == 0


async def test_conntrack_full_and_a_vrf(sidecar_lab: Lab, tmp_path: Path) -> None:
    """What the kernel would tell stands in: the limit is the host's, and a VRF cannot be made by every kernel."""
    async with applied(sidecar_lab["host"], HERE, tmp_path) as patient:
        evidence = await patient.evidence()
        for count, warning in (("90", True), ("100", False)):
            used = {"net/netfilter/nf_conntrack_count": count, "net/netfilter/nf_conntrack_max": "100"}
            report = examine(msgspec.structs.replace(evidence, sysctls={**evidence.sysctls, **used}), ())
            ((name, finding),) = report.findings
            assert (name, finding.warning) == ("conntrack-full", warning)
            assert "two each" in finding.why
        links = tuple(
            msgspec.structs.replace(link, master="blue", master_kind="vrf") if link.name == "eth0" else link
            for link in evidence.links
        )
        ((name, finding),) = examine(msgspec.structs.replace(evidence, links=links), ()).findings
        assert name == "vrf"
        assert "refused" in finding.why
