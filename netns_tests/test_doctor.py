"""`tproxyd doctor`: silent where all is well, and for each check a fault that is injected, found, and mended by the printed command.

Where a fault cannot be made in a namespace of this machine, a stand-in is named in the test: a program of another name, a file that is
mounted over the kernel's. Remedies run with stand-ins for `systemctl` and the like: nothing of the host's is touched.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import msgspec
import pytest
import trio

from netns_tests.patients import (
    GONE,
    HERE,
    INPUT,
    MANGLE,
    MARK,
    REFUSE,
    THERE,
    Fault,
    Patient,
    applied,
    names_of,
    program,
    table,
)
from netns_tests.watch import workers
from tproxyd.daemon.doctor import CHECKS, examine
from tproxyd.daemon.lock import LOCK_PORT
from tproxyd.net.sockets import format_address
from tproxyd.testing import Lab, activate_conntrack, serve_echo
from tproxyd.testing.daemon import TPROXYD, open_daemon

# All is well

LAYOUTS = [("gateway", THERE), ("sidecar", HERE), ("sidecar", HERE + REFUSE)]


@pytest.mark.parametrize(("layout", "config"), LAYOUTS)
async def test_a_healthy_host_is_probed_in_silence_and_left_as_it_was(
    gateway_lab: Lab, sidecar_lab: Lab, tmp_path: Path, nursery: trio.Nursery, layout: str, config: str
) -> None:
    node = gateway_lab["gateway"] if layout == "gateway" else sidecar_lab["host"]
    patient = Patient(node, config, tmp_path)
    async with open_daemon(node, config) as daemon:
        before = await node.dump()
        done = await node.run(*TPROXYD, "doctor", "-c", str(patient.file), check=False)
        assert (done.returncode, done.stderr) == (0, "")
        *probed, last = done.stdout.splitlines()
        for family, (there, back) in (("IPv4", probed[:2]), ("IPv6", probed[2:])):
            assert there.startswith(f"{family} probed: a connection from ")
            assert there.endswith("port 8080 was captured")
            assert back.startswith(f"{family} probed: ")
            assert back.endswith("port 8080 answers to a client's address, and we get it")
        assert last == f"{len(CHECKS) + 1} checks made: no failures, no warnings"
        assert await node.dump() == before
        # With an app that answers, too; and what was probed stands in the access log.
        await nursery.start(serve_echo, node, 8080)
        report = await patient.probed()
        assert report.findings == ()
        assert [one.result for one in report.probes] == ["captured", "returned"] * 2
        assert await node.dump() == before
        assert await daemon.stop() == 0
    assert {record["original_destination"] for record in daemon.records()[-2:]} == {
        format_address((one.destination, 8080)) for one in report.probes if one.half == "capture"
    }
    assert "another program" not in daemon.process.stderr_text


async def test_json_and_the_option_without_a_probe(sidecar_lab: Lab, tmp_path: Path) -> None:
    patient = Patient(sidecar_lab["host"], HERE, tmp_path)
    code, content, _ = await patient.runs("--no-probe")
    assert code == 1
    assert content["healthy"] is False
    assert content["checks"] == len(CHECKS)
    assert content["probes"] == []
    (finding,) = content["findings"]
    assert finding["check"] == "not-serving"
    assert finding["severity"] == "failure"
    assert finding["remedy"] == f"tproxyd run -c {patient.file}"
    text = (await patient.node.run(*TPROXYD, "doctor", "-c", str(patient.file), check=False)).stdout
    assert text == (
        "FAILURE not-serving: no daemon serves this network namespace, and nothing is applied\n"
        "    why:  nothing is captured: clients reach the destination directly\n"
        f"    mend: tproxyd run -c {patient.file}\n\n"
        "IPv4 not probed: no daemon serves this network namespace\nIPv6 not probed: no daemon serves this network namespace\n"
        f"{len(CHECKS)} checks made: 1 failure, no warnings\n"
    )


async def test_without_privileges_it_says_what_it_could_not_look_at(sidecar_lab: Lab, tmp_path: Path) -> None:
    host = sidecar_lab["host"]
    patient = Patient(host, HERE, tmp_path)
    async with open_daemon(host, HERE) as daemon:
        drop = ("setpriv", "--bounding-set", "-all", "--inh-caps", "-all")
        done = await host.run(*drop, *TPROXYD, "doctor", "-c", str(patient.file), check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert "IPv4 not probed: that needs CAP_NET_ADMIN and CAP_SYS_ADMIN; run as root" in done.stdout
        unseen = re.findall("^not looked at: (.*?):", done.stdout, re.M)
        assert unseen == [
            "what other processes hold open",
            "tproxyd's own state in the kernel",
            "other programs' nft rules",
            "whether this kernel takes the ruleset",
        ]
        assert await daemon.stop() == 0
    done = await host.run(*drop, *TPROXYD, "doctor", "-c", str(patient.file), check=False)
    assert done.returncode == 1
    assert "FAILURE not-serving" in done.stdout


# The probe

NOT_PROBED = [
    ('interfaces = ["eth0"]', "capture.interfaces names none"),
    ('exclude_interfaces = ["tproxyd*"]', "capture.exclude_interfaces has the probe's interface"),
    ('sources = ["10.0.0.0/8", "2001:db8::/32"]', "leave no IPv4 documentation address"),
    ('sources = ["192.0.2.0/24"]', "capture.sources has no IPv6 network"),
    ('exclude_destinations = ["local"]', "capture.destinations and exclude_destinations leave no IPv4"),
]


async def test_what_leaves_no_way_for_the_probe_is_said(sidecar_lab: Lab, tmp_path: Path) -> None:
    host = sidecar_lab["host"]
    patient = Patient(host, HERE, tmp_path)
    async with open_daemon(host, HERE) as daemon:
        for key, why in NOT_PROBED:
            patient.file.write_text(HERE + key)
            report = await patient.probed()
            assert "probe" not in names_of(report)
            assert any(one.result == "impossible" and why in one.reason for one in report.probes), key
        assert await daemon.stop() == 0


PROBED = {
    "src-valid-mark": (
        "sysctl -qw net.ipv4.conf.all.src_valid_mark=1; ip rule add priority 100 fwmark 0x1000000/0x3000000 lookup 133",
        "got no answer",
    ),
    "syn-cookies-always": ("sysctl -qw net.ipv4.tcp_syncookies=2", "was answered, but never made"),
}


async def test_an_interface_of_the_probes_name_is_named_and_left_alone(sidecar_lab: Lab, tmp_path: Path) -> None:
    host = sidecar_lab["host"]
    patient = Patient(host, HERE, tmp_path)
    async with open_daemon(host, HERE) as daemon:
        await patient.sh("ip link add tproxyd-probe type veth peer name other")
        before = await host.dump()
        report = await patient.probed()
        assert [one.result for one in report.probes] == ["impossible", "impossible"]
        assert all(one.reason.endswith("remove it with `ip link del tproxyd-probe`") for one in report.probes)
        assert report.findings == ()
        assert await host.dump() == before
        assert await daemon.stop() == 0


async def test_the_probe_meets_what_clients_would(gateway_lab: Lab, tmp_path: Path) -> None:
    gateway = gateway_lab["gateway"]
    patient = Patient(gateway, THERE, tmp_path)
    async with open_daemon(gateway, THERE) as daemon:
        for check, (fault, seen) in PROBED.items():
            await patient.sh(fault)
            report = await patient.probed()
            assert set(names_of(report)) == {check, "probe"}
            assert seen in next(finding.seen for name, finding in report.findings if name == "probe")
            await patient.mend(report, check)
            assert (await patient.probed()).findings == ()
        assert await daemon.stop() == 0


@pytest.mark.parametrize(
    ("upstream", "port", "found"),
    [
        ("", 8080, ["loopback-drops", "probe-return", "probe-return"]),
        ('target = "loopback"\n', 8080, ["loopback-drops", "probe-return", "probe-return"]),
        ('target = "192.0.2.1:9090"\n', 9090, ["probe-return"]),
    ],
)
async def test_the_probe_connects_to_an_app_in_a_clients_name(
    sidecar_lab: Lab, tmp_path: Path, upstream: str, port: int, found: list[str]
) -> None:
    """What arrives on lo is dropped, as some firewalls do with addresses that do not belong there: clients are accepted, and then wait."""
    host = sidecar_lab["host"]
    config = f"{HERE}[upstream]\n{upstream}"
    patient = Patient(host, config, tmp_path)
    async with open_daemon(host, config) as daemon:
        healthy = await patient.probed()
        assert healthy.findings == ()
        assert [one.result for one in healthy.probes].count("returned") == found.count("probe-return")
        await patient.sh(
            table("type filter hook input priority 0;", f'iifname "lo" tcp dport {port} tcp flags syn drop')
        )
        report = await patient.probed()
        assert names_of(report) == found
        assert all("got no answer" in finding.seen for name, finding in report.findings if name == "probe-return")
        patient.file.write_text(f'{config}source = "proxy"\n')
        assert "probe-return" not in names_of(await patient.probed())  # nothing is asked of it then
        assert await daemon.stop() == 0


async def test_the_probe_knows_who_answered(sidecar_lab: Lab, tmp_path: Path, nursery: trio.Nursery) -> None:
    """The daemon runs with another configuration, and does not capture what this one says."""
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


@pytest.mark.parametrize("layout", ["gateway", "sidecar"])
async def test_10_a_default_drop_input_chain_is_named(
    gateway_lab: Lab, sidecar_lab: Lab, tmp_path: Path, layout: str
) -> None:
    node, config = (gateway_lab["gateway"], THERE) if layout == "gateway" else (sidecar_lab["host"], HERE)
    patient = Patient(node, config, tmp_path)
    async with open_daemon(node, config) as daemon:
        await patient.sh(
            table(INPUT, 'iifname "lo" accept', "ct state established,related accept", "tcp dport 22 accept")
        )
        before = await node.dump()
        code, content, _ = await patient.runs()
        assert code == 1
        assert {finding["check"] for finding in content["findings"]} == {"input-drops", "probe"}
        assert await node.dump() == before
        report = await patient.report()
        assert names_of(report) == ["input-drops"]
        assert "policy drop of chain inet foreign c" in report.findings[0][1].seen
        await patient.mend(report, "input-drops")
        assert (await patient.probed()).findings == ()
        assert await daemon.stop() == 0


async def test_a_probe_that_is_killed_leaves_nothing(sidecar_lab: Lab, tmp_path: Path) -> None:
    host = sidecar_lab["host"]
    patient = Patient(host, HERE, tmp_path)
    async with open_daemon(host, HERE) as daemon:
        await patient.sh(table(INPUT, 'iifname "lo" accept'))
        before = await host.dump()
        async with host.process(*TPROXYD, "doctor", "-c", str(patient.file), collect=True) as doctor:
            with trio.fail_after(5):
                while "tproxyd-probe" not in (await host.run("ip", "-br", "link")).stdout:
                    await trio.sleep(0.02)
            assert await host.dump() != before
            doctor.send_signal(9)
            await doctor.wait()
        with trio.fail_after(3):
            while await host.dump() != before:
                await trio.sleep(0.05)
        assert await daemon.stop() == 0


# Faults of the host and of others, in a node with applied state

HOST_FAULTS = [
    Fault("route-localnet", "sysctl -qw net.ipv4.conf.eth0.route_localnet=1"),
    Fault("syn-cookies-always", "sysctl -qw net.ipv4.tcp_syncookies=2"),
    Fault("backlog-cut", "sysctl -qw net.core.somaxconn=100"),
    Fault(
        "listen-port-not-reserved",
        'sysctl -qw net.ipv4.ip_local_port_range="15000 61000"',
        'sysctl -qw net.ipv4.ip_local_port_range="32768 60999"',
    ),
    Fault(
        "src-valid-mark",
        "sysctl -qw net.ipv4.conf.eth0.src_valid_mark=1\nip rule add priority 100 fwmark 0x1000000/0x3000000 lookup 133",
        "sysctl -qw net.ipv4.conf.eth0.src_valid_mark=0",
    ),
    Fault("rule-before-ours", "ip rule add priority 100 fwmark 0x1000000/0x1000000 lookup main"),
    Fault("rule-before-ours", "ip -6 rule add priority 100 fwmark 0x1000000/0x1000000 prohibit"),
    Fault("foreign-route", "ip route add 203.0.113.0/25 dev eth0 table 133"),
    Fault(
        "mark-in-use", table("type route hook output priority mangle;", "udp dport 53 meta mark set 0x1000000"), GONE
    ),
    Fault("mark-overwritten", table(MANGLE, 'iifname "eth0" meta mark set 0x5'), GONE),
    Fault("prerouting-drops", table(MANGLE, "tcp dport 8000-8100 drop"), GONE),
    Fault("input-drops", table(INPUT, 'iifname "lo" accept', "ct state new tcp dport 8080 accept"), GONE),
    Fault(
        "input-drops", table("type filter hook input priority filter;", 'iifname != "lo" tcp dport != 22 reject'), GONE
    ),
    Fault("loopback-drops", table(INPUT, MARK), GONE),
    Fault("foreign-tproxy", table(MANGLE, "meta nfproto ipv4 tcp dport 8080 tproxy ip to :9999"), GONE),
    Fault("foreign-nat", table("type nat hook prerouting priority dstnat;", "tcp dport 8080 redirect to :9999"), GONE),
    Fault("small-mtu", "ip link set eth0 mtu 1200", "ip -6 address add 2001:db8:1::1/64 dev eth0 nodad"),
]

HARMLESS = [
    table(INPUT, 'iifname "lo" accept', MARK),
    table(
        INPUT, 'iifname "lo" accept', "ct state vmap { established : accept, untracked : jump ours }", chain="c"
    ).replace("table inet foreign {\n", "table inet foreign {\nchain ours {\ntcp dport { 22, 8000-8999 } accept\n}\n"),
    table(MANGLE, "meta mark set meta mark | 0x40000", "tcp dport 9000 tproxy to :9999", "udp dport 8080 drop"),
    table("type nat hook prerouting priority dstnat;", "tcp dport 80 redirect to :9999"),
    table("type filter hook input priority filter;", "ip saddr 198.51.100.7 drop", "tcp dport 8081 drop"),
]


async def test_faults_of_the_host_and_of_other_programs(sidecar_lab: Lab, tmp_path: Path) -> None:
    async with applied(sidecar_lab["host"], HERE, tmp_path) as patient:
        for fault in HOST_FAULTS:
            await patient.suffers(fault)


async def test_what_others_have_and_does_no_harm_is_not_found(sidecar_lab: Lab, tmp_path: Path) -> None:
    async with applied(sidecar_lab["host"], HERE, tmp_path) as patient:
        # Tailscale's and wg-quick's rules, and a table of the usual TPROXY recipe with another mark.
        await patient.sh(
            "ip rule add priority 5210 fwmark 0x80000/0xff0000 lookup main\n"
            "ip rule add not fwmark 0xca6c lookup 51820\nip rule add lookup main suppress_prefixlength 0\n"
            "ip rule add priority 200 fwmark 0x1/0x1 lookup 100\nip route add local default dev lo table 100"
        )
        assert await patient.found() == []
        for text in HARMLESS:
            await patient.sh(text)
            assert await patient.found() == [], text
            await patient.sh(GONE)


async def test_a_rule_that_may_decide_otherwise_is_a_warning(sidecar_lab: Lab, tmp_path: Path) -> None:
    async with applied(sidecar_lab["host"], HERE, tmp_path) as patient:
        await patient.sh(table(INPUT, 'iifname "lo" accept', "ip saddr 192.0.2.0/24 tcp dport 8080 accept"))
        report = await patient.report()
        assert names_of(report) == ["input-drops", "input-drops"]  # perhaps for IPv4, certainly for IPv6
        assert {finding.warning for _, finding in report.findings} == {True, False}


# What is ours

STATE_FAULTS = [
    Fault("ip-rule-missing", "ip rule del priority 5234"),
    Fault("ip-rule-missing", "ip -6 rule del priority 5233"),
    Fault(
        "wrong-table",
        "ip rule del priority 5234; ip rule add priority 5234 fwmark 0x1000000/0x3000000 lookup 134 protocol 133",
    ),
    Fault("route-missing", "ip route flush table 133"),
    Fault("route-missing", "ip -6 route flush table 133"),
    Fault("table-missing", "nft delete table inet tproxyd_guard"),
    Fault("table-changed", "nft flush chain inet tproxyd capture"),
    Fault("table-left-over", "nft add table inet tproxyd_other"),
]


async def test_faults_of_our_own_state(sidecar_lab: Lab, tmp_path: Path) -> None:
    async with applied(sidecar_lab["host"], HERE + REFUSE, tmp_path) as patient:
        for fault in STATE_FAULTS:
            await patient.suffers(fault)
        # A guard that the configuration does not want any more.
        report = await patient.report(HERE)
        assert names_of(report) == ["table-left-over"]
        assert "refuses clients" in report.findings[0][1].why
        await patient.mend(report, "table-left-over")
        assert await patient.found() == []
        for keys, seen, named in (
            ("ports = []", "`capture.ports` is empty", 'ports = ["8080"]'),
            ('ports = ["80"]\nmode = "off"', '`capture.mode` is "off"', 'mode = "tproxy"'),
        ):
            report = await patient.report(f"[capture]\n{keys}\n")
            assert names_of(report) == ["nothing-captured", *["table-left-over"] * 2]
            finding = report.findings[0][1]
            assert finding.seen == f"{seen} in {patient.file}"
            assert finding.remedy == f"# in {patient.file}, under [capture]: {named}\ntproxyd apply -c {patient.file}"


async def test_listeners_that_are_missing_not_transparent_or_stuck(sidecar_lab: Lab, tmp_path: Path) -> None:
    host, client = sidecar_lab["host"], sidecar_lab["client"]
    async with AsyncExitStack() as stack, applied(host, HERE, tmp_path, backlog=1) as patient:
        for _ in range(2):
            await stack.enter_async_context(await client.connect(host.v4, 8080))
        report = await patient.report()
        assert names_of(report) == ["listener-queue-full"]
        assert "2 connections wait at the listener on 127.0.0.1:15006, which holds 1" in report.findings[0][1].seen
    assert await patient.found() == ["listener-missing"] * 2
    with ExitStack() as listeners:
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            plain = listeners.enter_context(host.open_socket(family))
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            plain.bind((address, 15006))
            plain.listen()
        report = await patient.report()
        assert names_of(report) == ["listener-not-transparent"] * 2
        assert f"(pid {os.getpid()})" in report.findings[0][1].seen


async def test_another_program_at_the_listeners_port(sidecar_lab: Lab, tmp_path: Path) -> None:
    host = sidecar_lab["host"]
    patient = Patient(host, HERE, tmp_path)
    code = "import socket, time\ns = socket.socket()\ns.setsockopt(0, 19, 1)\ns.bind(('127.0.0.1', 15006))\ns.listen()"
    async with program(host, tmp_path, "squid", code):
        report = await patient.report()
        assert names_of(report) == ["not-serving", "listener-of-another"]
        assert "squid (pid " in report.findings[1][1].seen
        await patient.mend(report, "listener-of-another")
        assert await patient.found() == ["not-serving"]


async def test_what_a_dead_daemon_leaves(sidecar_lab: Lab, tmp_path: Path) -> None:
    host = sidecar_lab["host"]
    patient = Patient(host, HERE + REFUSE, tmp_path)
    async with open_daemon(host, HERE + REFUSE) as daemon:
        daemon.process.send_signal(9)
        await daemon.process.wait()
        with trio.fail_after(3):  # its workers end at once, and with the last of them its table
            while names_of(report := await patient.report()) != ["left-by-the-dead"] or "tproxyd," in str(report):
                await trio.sleep(0.05)
        finding = report.findings[0][1]
        assert "refused" in finding.why
        first, second = finding.remedy.splitlines()
        assert first == f"tproxyd run -c {patient.file}"  # what was meant to be closed stays closed
        assert second == "# or let clients go directly to the destination: tproxyd revert"
    async with open_daemon(host, HERE + REFUSE) as daemon:
        assert (await patient.probed()).findings == ()
        assert await daemon.stop() == 0
    assert await patient.found() == ["not-serving"]


async def test_a_program_that_embeds_tproxyd_is_no_dead_daemon(sidecar_lab: Lab, tmp_path: Path) -> None:
    """It does not hold the daemon's name, but its table has an owner, and its listeners are transparent."""
    host = sidecar_lab["host"]
    patient = Patient(host, HERE, tmp_path)
    code = (
        "import trio, tproxyd\n"
        "async def main():\n"
        '    config = tproxyd.config_from_mapping({"capture": {"ports": ["8080"], "destinations": ["local"]}})\n'
        "    async with tproxyd.open_interceptor(config, own_namespace=True):\n"
        '        print("up", flush=True)\n'
        "        await trio.sleep(60)\n"
        "trio.run(main)"
    )
    async with host.process(sys.executable, "-c", code, collect=True) as embedding:
        await embedding.wait_for_output("up")
        report = await patient.probed()
        assert report.findings == ()
        assert [one.result for one in report.probes] == ["captured", "returned"] * 2


async def test_a_stranger_with_our_name(sidecar_lab: Lab, tmp_path: Path) -> None:
    host = sidecar_lab["host"]
    patient = Patient(host, HERE, tmp_path)
    code = (
        "import os, socket, time\nos.setuid(65534)\ns = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)\n"
        f"s.bind(({LOCK_PORT}, 0))"
    )
    async with program(host, tmp_path, "stranger", code):
        report = await patient.report()
        assert names_of(report) == ["name-held-by-a-stranger"]
        assert "stranger (pid " in report.findings[0][1].seen
        await patient.mend(report, "name-held-by-a-stranger")
        assert await patient.found() == ["not-serving"]


async def test_faults_of_a_daemon(sidecar_lab: Lab, tmp_path: Path, nursery: trio.Nursery) -> None:
    """Stopped; with few files; about to end; and what it repairs itself once its cause is gone."""
    host = sidecar_lab["host"]
    patient = Patient(host, HERE, tmp_path)
    await nursery.start(serve_echo, host, 8080)
    async with open_daemon(host, HERE) as daemon:
        (worker,) = workers(daemon)
        for fault in (
            Fault("daemon-stopped", f"kill -STOP {worker}"),
            Fault("daemon-stopped", f"kill -STOP {daemon.process.pid}"),
            Fault("loopback-down", "ip link set lo down"),
            Fault("ipv6-off", "sysctl -qw net.ipv6.conf.lo.disable_ipv6=1"),
        ):
            await patient.suffers(fault, soon=True)
        async with await sidecar_lab["client"].connect(host.v4, 8080):
            daemon.process.send_signal(15)
            await daemon.process.wait_for_output("stopping")
            await patient.suffers(Fault("daemon-draining", "true", mends=False), soon=True)
        assert await daemon.process.wait() == 0
    async with open_daemon(host, HERE, files=300) as daemon:
        report = await patient.report()
        assert names_of(report) == ["open-files"]
        assert "may have 300 files open" in report.findings[0][1].seen
        assert await daemon.stop() == 0


async def test_a_daemon_that_lacks_a_capability(sidecar_lab: Lab, tmp_path: Path) -> None:
    host = sidecar_lab["host"]
    patient = Patient(host, HERE, tmp_path)
    without = ("setpriv", "--bounding-set", "-net_bind_service", "--inh-caps", "-net_bind_service")
    async with host.process(*without, *TPROXYD, "run", "-c", str(patient.file), collect=True) as daemon:
        await daemon.wait_for_output("ready")
        report = await patient.report()
        assert names_of(report) == ["capability-missing"]
        assert "lacks CAP_NET_BIND_SERVICE" in report.findings[0][1].seen
        daemon.send_signal(15)
        assert await daemon.wait() == 0


# Gateways, interfaces, bridges


async def test_faults_of_a_gateway(gateway_lab: Lab, tmp_path: Path) -> None:
    gateway, client = gateway_lab["gateway"], gateway_lab["client"]
    async with applied(gateway, THERE, tmp_path) as patient:
        for fault in (
            Fault("forwarding-off", "sysctl -qw net.ipv4.ip_forward=0"),
            Fault("forwarding-off", "sysctl -qw net.ipv6.conf.all.forwarding=0"),
            Fault("answers-dropped", table(INPUT, 'iifname "lo" accept', "tcp dport 8080 accept"), GONE),
        ):
            await patient.suffers(fault)
        await patient.sh(table("type nat hook postrouting priority srcnat;", 'oifname "eth1" masquerade'))
        assert await patient.found() == ["masquerade"]
        patient.file.write_text(THERE + '[upstream]\nsource = "proxy"\n')
        assert await patient.found() == ["table-changed"]  # what is applied would still send clients' answers back
        patient.file.write_text(THERE)
        await patient.sh(GONE)
        # Packets from a client to whom another interface leads.
        async with await client.connect("203.0.113.9", 8080):
            pass  # the gateway's neighbour, or its question for it would be the first that gets no answer
        await client.run("ip", "address", "add", "198.51.100.77/32", "dev", "eth0")
        gateway.set_sysctl("net.ipv4.conf.eth0.rp_filter", 1)

        async def knock() -> None:
            for _ in range(100):
                with pytest.raises(trio.TooSlowError):
                    await client.connect("203.0.113.9", 8080, source="198.51.100.77", timeout=0.2)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(knock)
            await trio.sleep(0.3)
            report = await patient.report()
            nursery.cancel_scope.cancel()
        assert names_of(report) == ["rp-filter"]
        assert not report.findings[0][1].warning
        assert (await patient.report()).findings[0][1].warning  # it has, but does not now
        await patient.mend(report, "rp-filter")
        assert await patient.found() == []


async def test_forwarding_with_no_destinations_is_warned_of_by_check_and_doctor(
    gateway_lab: Lab, sidecar_lab: Lab, tmp_path: Path
) -> None:
    gateway, plain = gateway_lab["gateway"], '[capture]\nports = ["8080"]\n'
    async with applied(gateway, THERE, tmp_path) as patient:
        patient.file.write_text(plain)
        await patient.sh(f"tproxyd apply -c {patient.file}")
        report = await patient.report()
        assert names_of(report) == ["forwarding-captures-all"]
        assert report.healthy
        checked = await gateway.run(*TPROXYD, "check", "-c", str(patient.file))
        assert "warning: forwarding is on" in checked.stderr
        assert (await sidecar_lab["host"].run(*TPROXYD, "check", "-c", str(patient.file))).stderr == ""
        patient.file.write_text(THERE)
        assert (await gateway.run(*TPROXYD, "check", "-c", str(patient.file))).stderr == ""


async def test_destinations_with_an_address_of_this_host_need_no_forwarding(sidecar_lab: Lab, tmp_path: Path) -> None:
    own = HERE.replace('"local"', '"192.0.2.0/24", "2001:db8:1::/64"')
    async with applied(sidecar_lab["host"], own, tmp_path) as patient:
        foreign = await patient.found(own.replace("192.0.2.0/24", "198.51.100.0/24"))
        assert "forwarding-off" in foreign


async def test_faults_of_interfaces(sidecar_lab: Lab, tmp_path: Path) -> None:
    host = sidecar_lab["host"]
    await host.run("ip", "link", "add", "spare0", "type", "bridge")
    await host.run("ip", "link", "set", "spare0", "up")
    named = HERE + 'interfaces = ["eth*", "spare0"]\n'
    async with applied(host, named, tmp_path) as patient:
        await patient.suffers(Fault("interface-down", "ip link set spare0 down"))
        await patient.sh("ip link set spare0 name other0")
        report = await patient.report()
        assert names_of(report) == ["interface-missing"]
        assert "'spare0', but there is no such interface; there are lo, eth0, other0" in report.findings[0][
            1
        ].seen.replace("lo, other0, eth0", "lo, eth0, other0")
        await patient.sh("ip link set other0 name spare0 up")
        # A VRF cannot be made by every kernel: what the kernel would tell of one stands in.
        evidence = await patient.evidence()
        links = tuple(
            msgspec.structs.replace(link, master="blue", master_kind="vrf") if link.name == "eth0" else link
            for link in evidence.links
        )
        assert names_of(examine(msgspec.structs.replace(evidence, links=links), ())) == ["vrf"]


async def test_a_bridge_with_br_netfilter(sidecar_lab: Lab, tmp_path: Path) -> None:
    host = sidecar_lab["host"]
    host.set_sysctl("net.bridge.bridge-nf-call-iptables", 1)
    async with applied(host, HERE, tmp_path) as patient:
        await patient.sh("ip link add bridge0 type bridge; ip link set bridge0 up")
        report = await patient.report()
        assert names_of(report) == ["br-netfilter"]
        await patient.mend(report, "br-netfilter")
        report = await patient.report()
        assert names_of(report) == ["table-changed"]  # the ruleset need not leave bridges alone any more
        await patient.mend(report, "table-changed")
        assert await patient.found() == []


# What runs short, and what else runs


async def test_ports_and_sockets_that_run_short(sidecar_lab: Lab, tmp_path: Path, nursery: trio.Nursery) -> None:
    host = sidecar_lab["host"]
    await nursery.start(serve_echo, host, 9090)
    async with applied(host, HERE, tmp_path) as patient:
        host.set_sysctl("net.ipv4.ip_local_port_range", "40000 40009")
        async with AsyncExitStack() as stack:
            for _ in range(9):
                await stack.enter_async_context(await host.connect("192.0.2.1", 9090))
            report = await patient.report()
            assert names_of(report) == ["ephemeral-ports"]
            assert "9 of 10 ports are in use from 192.0.2.1 to 192.0.2.1 port 9090" in report.findings[0][1].seen
        host.set_sysctl("net.ipv4.ip_local_port_range", "32768 60999")
        host.set_sysctl("net.ipv4.tcp_max_tw_buckets", 9)
        report = await patient.report()
        assert names_of(report) == ["time-wait-full"]
        await patient.mend(report, "time-wait-full")
        assert await patient.found() == []


async def test_other_programs_that_meddle(sidecar_lab: Lab, tmp_path: Path) -> None:
    """Programs of these names stand in; their configuration is a tmpfs mounted for the one process that looks."""
    host = sidecar_lab["host"]
    listen = "import os, socket, time\n%ss = socket.socket()\ns.bind(('0.0.0.0', 8080))\ns.listen()"
    async with applied(host, HERE, tmp_path) as patient:
        (tmp_path / "anybody").mkdir()
        async with program(host, tmp_path / "anybody", "sshd", listen % "os.setuid(65534)\n"):
            assert await patient.found() == []
        async with program(host, tmp_path, "sshd", listen % ""):
            report = await patient.report()
            assert names_of(report) == ["ssh-captured"]
            assert 'exclude_ports = ["22", "8080"]' in report.findings[0][1].remedy
        async with program(host, tmp_path, "firewalld", "import time"):
            assert await patient.found() == ["firewalld"]
            await patient.sh(table(INPUT, 'iifname "lo" accept', MARK, chain="filter_INPUT"))
            assert await patient.found() == []
            await patient.sh(GONE)
        async with program(host, tmp_path, "systemd-networkd", "import time"):
            report = await patient.report()
            assert names_of(report) == ["networkd"]
            own = f"mount -t tmpfs none /etc/systemd\nPATH={patient.bin}:$PATH\n"
            _, content, _ = await patient.runs("--no-probe", before=own + report.findings[0][1].remedy)
            assert content["findings"] == []


async def test_conntrack_nearly_full_and_rules_of_iptables_legacy(
    sidecar_lab: Lab, tmp_path: Path, nursery: trio.Nursery
) -> None:
    """Files that are mounted over the kernel's stand in: the real limit is the host's, and this kernel has no legacy tables."""
    host = sidecar_lab["host"]
    await nursery.start(serve_echo, host, 9090)
    host.call(activate_conntrack)
    async with applied(host, HERE, tmp_path) as patient, AsyncExitStack() as stack:
        for _ in range(9):
            await stack.enter_async_context(await host.connect("192.0.2.1", 9090))
        (tmp_path / "max").write_text("10\n")
        (tmp_path / "net").mkdir()  # the kernel lets nothing be mounted over a single file there
        (tmp_path / "net" / "ip_tables_names").write_text("nat\nfilter\n")
        stand_ins = (
            f"mount --bind {tmp_path}/max /proc/sys/net/netfilter/nf_conntrack_max\n"
            f"net=/proc/$$/task/$$/net; cp $net/netstat $net/unix {tmp_path}/net\nmount --bind {tmp_path}/net $net"
        )
        code, content, _ = await patient.runs("--no-probe", before=stand_ins)
        found = {finding["check"]: finding["seen"] for finding in content["findings"]}
        assert set(found) == {"conntrack-full", "iptables-legacy"}
        assert "of 10 conntrack entries" in found["conntrack-full"]
        assert found["iptables-legacy"].endswith("iptables filter, iptables nat")
        assert code == 0  # both are warnings


async def test_programs_and_modules_that_are_missing(sidecar_lab: Lab, tmp_path: Path) -> None:
    """/dev/null is mounted over nft, and over its library; a script stands in for an old nft on a kernel without nft_tproxy, with a
    library of its own."""
    host = sidecar_lab["host"]
    nft = (await host.run("sh", "-c", "command -v nft")).stdout.strip()
    (tmp_path / "nft").write_text(
        f"#!/bin/sh\n[ \"$1\" = --version ] && echo 'nftables v0.9.8 (E.D.S.)' && exit\n"
        f'[ "$1" = -c ] || exec env LD_LIBRARY_PATH={tmp_path} {tmp_path}/real "$@"\necho \'-:1:2-3: Error: Could not process rule: No such file or directory\' >&2\n'
        "echo 'meta l4proto tcp tproxy ip to 127.0.0.1:15006' >&2\nexit 1\n"
    )
    (tmp_path / "nft").chmod(0o755)
    async with applied(host, HERE, tmp_path) as patient:

        async def found(before: str) -> tuple[int, dict[str, str]]:
            code, content, _ = await patient.runs("--no-probe", before=before)
            return code, {finding["check"]: finding["seen"] for finding in content["findings"]}

        code, seen = await found(f"mount --bind /dev/null {nft}")
        assert (code, set(seen)) == (1, {"nft-missing"})
        hide = (
            "for lib in $(ldconfig -p | sed -n 's/.*libnftables.so.1.*=> //p'); do\n"
            f"cp -L $lib {tmp_path}/libnftables.so.1; mount --bind /dev/null $lib; done\n"
            f"cp {nft} {tmp_path}/real; mount --bind {tmp_path}/nft {nft}"
        )
        code, seen = await found(hide)
        assert (code, set(seen)) == (1, {"libnftables-missing", "nft-too-old", "kernel-refuses-ruleset"})
        assert "modprobe nft_tproxy" in seen["kernel-refuses-ruleset"]
