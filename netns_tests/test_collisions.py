"""Who else uses our marks, table and priorities, or wants the same connections: refused with the culprit's own line, passed by with other
marks, or told. And what else is looked at before anything is changed.
"""

from __future__ import annotations

import ctypes
import json
import re
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from netns_tests.foreign import add_extension_rule
from netns_tests.seccomp import WITHOUT_NF_TABLES
from netns_tests.way import Way, open_way
from tproxyd import kernel
from tproxyd.config import load_config
from tproxyd.errors import KernelError
from tproxyd.net.sockets import format_address
from tproxyd.plan import make_plan
from tproxyd.testing import Node, serve_identity
from tproxyd.testing.daemon import TPROXYD, LabDaemon, open_daemon
from tproxyd.testing.plugin import OpenLab

CONFIG = '[capture]\nports = ["8080"]\n'
EXPLICIT = CONFIG + '[routing]\nmark = "0x1000000/0x3000000"\nupstream_mark = "0x2000000/0x3000000"\n'
FIRST, SECOND, LAST = "0x1000000/0x3000000", "0x4000000/0xc000000", "0x1000/0x3000"
ONE = pytest.mark.parametrize("way", ["sidecar v4"], indirect=True)
GATEWAY = pytest.mark.parametrize("way", ["gateway v4"], indirect=True)


async def plant(node: Node, *commands: str) -> None:
    """`ip` commands, or the rules of one foreign chain: `HOOK | rule | rule`."""
    for command in commands:
        if " hook " in command:
            hook, *rules = (part.strip() for part in command.split(" || "))
            await node.run(
                "nft", "-f", "-", input="\n".join(["table inet foreign {\nchain c {", f"{hook};", *rules, "}\n}\n"])
            )
        else:
            await node.run("ip", *command.split())


async def refused(way: Way, config: str, culprit: str, *, verb: str) -> None:
    """The start is refused with one sentence that quotes the culprit, and nothing has changed."""
    before = await way.proxy.dump()
    done = await way.proxy.run(*TPROXYD, verb, "-c", str(way.file(config)), check=False)
    assert done.returncode == 71, done
    assert done.stderr.count("\n") == 1
    assert f"`{culprit}` (" in done.stderr
    assert await way.proxy.dump() == before


def preflight(way: Way, config: str) -> kernel.Preflight:
    """What `apply` and `run` begin with."""
    return way.proxy.call(kernel.preflight, load_config(way.file(config)))


def refusal(way: Way, config: str, culprit: str) -> str:
    """The sentence, which quotes the culprit, and the command that shows it."""
    with pytest.raises(KernelError) as refused:
        preflight(way, config)
    assert f"`{culprit}` (" in str(refused.value)
    return str(refused.value)


def planned_mark(way: Way, config: str) -> str:
    """The steering mark that is taken."""
    return str(
        make_plan(load_config(way.file(config)), surroundings=preflight(way, config).surroundings).marks.steering
    )


async def steering_mark(node: Node) -> str:
    """The mark of our rules, from the kernel."""
    marks = set(re.findall(r"5234:\s+from all fwmark (\S+) .*proto 133", (await node.run("ip", "rule")).stdout))
    assert len(marks) == 1
    return str(marks.pop())


async def is_captured(way: Way, daemon: LabDaemon) -> None:
    async with await way.client.connect(way.address, 8080, timeout=3) as stream:
        own = format_address(stream.socket.getsockname())
        with trio.fail_after(3):
            await stream.receive_some()
    assert (await daemon.record(own))["outcome"] in ("closed", "client_reset")


def warnings(daemon: LabDaemon) -> str:
    """All that it has warned of, as it stands in its log."""
    return "\n".join(re.findall(r"^tproxyd: warning: (.*)", daemon.process.stderr_text, re.MULTILINE))


MANGLE = "type filter hook prerouting priority mangle"
OUTPUT = "type filter hook output priority 0"

MARKS = {
    "an ip rule": ("-4 rule add priority 7 fwmark 0x1000000/0x3000000 lookup 100", "7: from all fwmark 0x1000000/0x3000000 lookup 100"),
    "an ip rule behind ours": ("-6 rule add priority 9000 fwmark 0x2000000/0xff000000 lookup 100", "9000: from all fwmark 0x2000000/0xff000000 lookup 100"),
    "an ip rule with the whole mark": ("-4 rule add priority 7 fwmark 0x1000000 lookup 100", "7: from all fwmark 0x1000000 lookup 100"),
    "an ip rule for all others": ("-4 rule add priority 9000 not fwmark 0x1000000/0x1000000 lookup 100", "9000: not from all fwmark 0x1000000/0x1000000 lookup 100"),
    "set, whole": (f"{OUTPUT} || meta mark set 0x1000000", "meta mark set 0x01000000"),
    "set, some bits": (f"{MANGLE} || meta mark set meta mark and 0xfeffffff or 0x1000000", "meta mark set meta mark | 0x01000000"),
    "cleared": (f"{MANGLE} || meta mark set meta mark and 0xffff", "meta mark set meta mark & 0x0000ffff"),
    "set from a map": (f"{MANGLE} || meta mark set tcp dport map {{ 80 : 0x1, 81 : 0x1000000 }}", "meta mark set tcp dport map { 80 : 0x00000001, 81 : 0x01000000 }"),
    "tested": (f"{OUTPUT} || meta mark and 0x1000000 == 0x1000000 counter accept", "meta mark & 0x01000000 == 0x01000000 counter accept"),
    "tested, as a prefix": (f"{OUTPUT} || meta mark and 0xfe000000 != 0 accept", "meta mark != 0x00000000/7 accept"),
    "tested, whole": (f"{OUTPUT} || meta mark {{ 1, 0x2000000 }} accept", "meta mark { 0x00000001, 0x02000000 } accept"),
    "a verdict map": (f"{OUTPUT} || meta mark vmap {{ 0x2000000 : drop }}", "meta mark vmap { 0x02000000 : drop }"),
    "restored from conntrack": (f"{MANGLE} || meta mark set ct mark and 0xff000000", "meta mark set ct mark & 0xff000000"),
    "saved to conntrack": (f"{OUTPUT} || ct mark set meta mark and 0x3000000", "ct mark set meta mark & 0x03000000"),
}  # fmt: skip


@ONE
@pytest.mark.parametrize("name", MARKS)
async def test_13_given_marks_that_are_in_use_are_refused_and_auto_takes_others(way: Way, name: str) -> None:
    planted, culprit = MARKS[name]
    await plant(way.proxy, planted)
    assert '"auto", which takes free ones' in refusal(way, EXPLICIT, culprit)
    # These have the bits of three pairs in them.
    wide = name in ("an ip rule behind ours", "tested, as a prefix", "restored from conntrack", "cleared")
    assert planned_mark(way, CONFIG) == (LAST if wide else SECOND)


async def test_13_traffic_is_right_with_the_next_pair_and_with_the_last(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_identity, way.app, 8080)
    for planted, mark in (
        ("-4 rule add priority 7 fwmark 0x1000000/0x3000000 lookup 100", SECOND),
        ("-4 rule add priority 7 fwmark 0x10000/0xffff0000 lookup 100", LAST),
    ):
        await plant(way.proxy, planted)
        before = await way.proxy.dump()
        async with open_daemon(way.proxy, CONFIG) as daemon:
            assert await steering_mark(way.proxy) == mark
            await is_captured(way, daemon)
            assert await daemon.stop() == 0
        assert await way.proxy.dump() == before


@ONE
async def test_13_auto_takes_the_same_pair_every_time(way: Way, nursery: trio.Nursery) -> None:
    """Over restarts, a kill and `apply`: what is ours is not in our way."""
    node = way.proxy
    await plant(node, "-4 rule add priority 7 fwmark 0x1000000/0x3000000 lookup 100")
    before = await node.dump()
    await nursery.start(serve_identity, way.app, 8080)
    file = str(way.file(CONFIG))
    for end in (signal.SIGKILL, signal.SIGTERM):
        async with open_daemon(node, CONFIG) as daemon:
            assert await steering_mark(node) == SECOND
            await is_captured(way, daemon)
            daemon.process.send_signal(end)
            await daemon.process.wait()
    assert await node.dump() == before
    await node.run(*TPROXYD, "apply", "-c", file)
    applied = await node.dump()
    assert await steering_mark(node) == SECOND
    assert (await node.run(*TPROXYD, "apply", "-c", file)).stdout == "nothing to change: the kernel holds the plan\n"
    async with open_daemon(node, CONFIG) as daemon:
        await is_captured(way, daemon)
        assert await daemon.stop() == 0
    assert await node.dump() == applied
    await node.run(*TPROXYD, "revert")
    assert await node.dump() == before


@ONE
async def test_13_the_marks_of_a_daemon_stay_when_others_come_and_it_repairs(way: Way, nursery: trio.Nursery) -> None:
    """Live connections bear them. The next start takes others."""
    await nursery.start(serve_identity, way.app, 8080)
    async with open_daemon(way.proxy, CONFIG) as daemon:
        await plant(way.proxy, "-4 rule add priority 7 fwmark 0x1000000/0x3000000 lookup 100")
        file = str(way.file(CONFIG))
        await way.proxy.run(*TPROXYD, "plan", "--diff", "-c", file)
        explained = await way.proxy.run(*TPROXYD, "explain", "-c", file, "192.0.2.2", f"{way.address}:8080", "--json")
        assert json.loads(explained.stdout)["kernel"] == "as planned"
        assert json.loads(explained.stdout)["outcome"] == "forwarded"
        await way.proxy.run("ip", "rule", "del", "priority", "5234")
        await daemon.process.wait_for_output("repaired: add ip rule")
        assert await steering_mark(way.proxy) == FIRST
        assert await daemon.stop() == 0
    async with open_daemon(way.proxy, CONFIG) as daemon:
        assert await steering_mark(way.proxy) == SECOND
        assert await daemon.stop() == 0


@ONE
async def test_13_auto_that_finds_no_free_mark_names_who_has_the_first(way: Way) -> None:
    await plant(
        way.proxy,
        f"{OUTPUT} || meta mark and 0xffff0000 == 0x10000 accept",
        "-4 rule add priority 7 fwmark 0x1000/0xf000 lookup 100",
    )
    sentence = refusal(way, CONFIG, "meta mark 0x00010000/16 accept")
    assert "finds no free mark" in sentence
    assert "nft list chain inet foreign c" in sentence


IN_THE_WAY = {
    "a route in our table": (["-4 route add 198.51.100.0/28 dev eth0 table 133"], "198.51.100.0/28 dev eth0 table 133", "routing.table"),
    "a default route in our table": (["-6 route add blackhole default table 133"], "blackhole default dev lo table 133", "routing.table"),
    "a route that ends the look-up": (["-4 route add throw 198.51.100.0/28 table 133 proto static"], "throw 198.51.100.0/28 table 133 proto static", "routing.table"),
    "a rule to our table": (["-4 rule add priority 9 fwmark 0x40/0xff lookup 133"], "9: from all fwmark 0x40/0xff lookup 133", "routing.table"),
    "a rule at our priority": (
        ["-4 rule add priority 5234 from 192.0.2.0/24 lookup 101 protocol static", "-4 route add 198.51.100.0/24 dev eth0 table 101"],
        "5234: from 192.0.2.0/24 lookup 101 proto static", "routing.priority"),
    "a rule at the first priority that ends": (["-6 rule add priority 5233 to 2001:db8:77::/48 prohibit"], "5233: from all to 2001:db8:77::/48 prohibit", "routing.priority"),
    "a rule for answers at our priority": (
        ["-4 rule add priority 5235 iif lo lookup 101", "-4 route add 198.51.100.0/24 dev eth0 table 101"],
        "5235: from all iif lo lookup 101", "routing.priority"),
}  # fmt: skip


@ONE
@pytest.mark.parametrize("name", IN_THE_WAY)
async def test_13_who_uses_our_table_or_priorities_is_named(way: Way, name: str) -> None:
    planted, culprit, key = IN_THE_WAY[name]
    await plant(way.proxy, *planted)
    assert f"choose another {key}" in refusal(way, CONFIG, culprit).replace("`", "")
    preflight(way, CONFIG + "[routing]\ntable = 1330\npriority = 6000\n")  # the way out that it names


@ONE
@pytest.mark.parametrize("verb", ["apply", "run"])
@pytest.mark.parametrize("name", ["a mark", "a route in our table", "a rule at our priority"])
async def test_13_the_start_is_refused_with_nothing_changed(way: Way, name: str, verb: str) -> None:
    planted, culprit = MARKS["set, whole"] if name == "a mark" else IN_THE_WAY[name][:2]
    await plant(way.proxy, *([planted] if isinstance(planted, str) else planted))
    await refused(way, EXPLICIT, culprit, verb=verb)


HARMLESS = [
    "-4 rule add priority 7 fwmark 0x1 lookup 100",  # the usual TPROXY set-up of others: alone with its whole mark
    "-4 route add local default dev lo table 100",
    "-4 rule add priority 9000 not fwmark 0xca6c lookup 51820",  # wg-quick, started before
    "-4 route add 198.51.100.128/25 dev eth0 table 51820",
    "-4 rule add priority 8 ipproto udp lookup 51820",
    "-4 rule add priority 9 from 192.0.2.0/24 lookup 777",  # where nothing is
    "-4 rule add priority 5234 fwmark 0x8/0x8 lookup 51820",
    "-4 rule add priority 10 goto 5000",
    "-4 rule add priority 5000 nop",
    "-4 route add local 203.0.113.128/25 dev lo table 133 proto 132",
    f"{MANGLE} || meta mark set ct mark || ct mark set meta mark || ct mark and 0x1000000 == 0x1000000 counter || meta mark set meta mark or 0x4000"
    " || meta mark and 0x3000000 == 0x1000000 counter || meta mark 0x1 counter || udp dport 53 tproxy ip to :53 || tcp dport 9090 tproxy ip to :9091 || udp dport 53 meta mark set 0x1",
]  # fmt: skip


async def test_13_neighbours_that_do_no_harm_are_passed_over_in_silence(way: Way, nursery: trio.Nursery) -> None:
    await plant(way.proxy, *HARMLESS)
    before = await way.proxy.dump()
    await nursery.start(serve_identity, way.app, 8080)
    async with open_daemon(way.proxy, EXPLICIT) as daemon:
        assert warnings(daemon) == ""
        await is_captured(way, daemon)
        assert await daemon.stop() == 0
    assert await way.proxy.dump() == before


TOLD = {
    "source routing": (
        ["-4 rule add priority 100 from 192.0.2.0/24 lookup 500", "-4 route add default dev eth0 table 500"],
        "100: from 192.0.2.0/24 lookup 500", "comes before tproxyd's", False),
    "a full tunnel": (
        ["-4 rule add priority 5232 not fwmark 0xca6c lookup 51820", "-4 route add default dev eth0 table 51820"],
        "5232: not from all fwmark 0xca6c lookup 51820", "comes before tproxyd's", False),
    "the main table first": (["-4 rule add priority 100 lookup main suppress_prefixlength 0"],
        "100: from all lookup main suppress_prefixlength 0", "comes before tproxyd's", False),
    "a jump over ours": (["-4 rule add priority 100 goto 32766"], "100: from all goto 32766", "comes before tproxyd's", False),
    "the whole mark": ([f"{MANGLE} || meta mark set 0x1"], "meta mark set 0x00000001", "sets all bits", False),
    "another proxy": ([f"{MANGLE} || tcp dport 8000-8100 tproxy ip to :9091"], "tcp dport 8000-8100 tproxy ip to :9091", "another transparent proxy", True),
    "REDIRECT": (["type nat hook prerouting priority dstnat || tcp dport { 80, 8080 } redirect to :9090"],
        "tcp dport { 80, 8080 } redirect to :9090", "redirects a captured port", True),
}  # fmt: skip


@GATEWAY
@pytest.mark.parametrize("name", TOLD)
async def test_what_is_half_in_the_way_is_told_and_it_is_true(way: Way, nursery: trio.Nursery, name: str) -> None:
    planted, culprit, sentence, works = TOLD[name]
    await plant(way.proxy, *planted)
    await nursery.start(serve_identity, way.app, 8080)
    async with open_daemon(way.proxy, CONFIG) as daemon:
        told = warnings(daemon)
        assert f"`{culprit}`" in told
        assert sentence in told
        assert len(told.splitlines()) == 1
        if works:
            await is_captured(way, daemon)
        else:
            with pytest.raises((trio.TooSlowError, OSError)):
                await way.client.connect(way.address, 8080, timeout=0.5)
        assert await daemon.stop() == 0


@GATEWAY
async def test_of_many_rules_of_a_kind_some_are_told(way: Way) -> None:
    rules = " || ".join(f"tcp dport 8080 ip saddr 192.0.2.{n} redirect to :9090" for n in range(20))
    await plant(way.proxy, f"type nat hook prerouting priority dstnat || {rules}")
    *told, rest = preflight(way, CONFIG).warnings
    assert len(told) == 3
    assert "17 more rules" in rest


def words(*values: int) -> bytes:
    return struct.pack(f"={len(values)}I", *values)


EXTENSIONS = {
    "MARK": ("target", "MARK", 2, words(0x1000000, 0x3000000), "MARK 0x1000000/0x3000000", True),
    "CONNMARK": ("target", "CONNMARK", 1, words(0, 0xFF000000, 0xFF000000) + b"\2\0\0\0", "CONNMARK 0x0 ctmask 0xff000000 nfmask 0xff000000", True),
    "mark": ("match", "mark", 1, words(0x1000000, 0x1000000) + bytes(4), "mark 0x1000000/0x1000000", True),
    "MARK of somebody else": ("target", "MARK", 2, words(0x40000, 0xFF0000), "MARK", False),
    "CONNMARK as a whole": ("target", "CONNMARK", 1, words(0, 0xFFFFFFFF, 0xFFFFFFFF) + b"\2\0\0\0", "CONNMARK", False),
}  # fmt: skip


@ONE
@pytest.mark.parametrize("name", EXTENSIONS)
async def test_13_rules_of_iptables_nft_are_read_too(way: Way, name: str) -> None:
    """nft shows nothing of them but that they are there."""
    kind, extension, revision, info, culprit, collides = EXTENSIONS[name]
    await way.proxy.run("nft", "-f", "-", input=f"table ip mangle {{\nchain PREROUTING {{\n{MANGLE};\n}}\n}}\n")
    way.proxy.call(add_extension_rule, kind, extension, revision, info)
    if collides:
        assert "(nft list chain ip mangle PREROUTING)" in refusal(way, EXPLICIT, f"(iptables: {culprit})")
    else:
        assert preflight(way, EXPLICIT).warnings == ()


def make_legacy_table() -> None:
    """Asks for a table's state as iptables-legacy does, which makes the table."""
    libc = ctypes.CDLL(None, use_errno=True)
    info, length = ctypes.create_string_buffer(b"filter", 84), ctypes.c_uint32(84)  # struct ipt_getinfo
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        # 64: IPT_SO_GET_INFO.
        code = libc.getsockopt(sock.fileno(), socket.IPPROTO_IP, 64, info, ctypes.byref(length))
    assert code == 0, ctypes.get_errno()


@ONE
async def test_tables_of_iptables_legacy_are_told(way: Way) -> None:
    way.proxy.call(make_legacy_table)
    [warning] = preflight(way, CONFIG).warnings
    done = await way.proxy.run(*TPROXYD, "apply", "-c", str(way.file(CONFIG)))
    assert done.stderr == f"tproxyd: warning: {warning}\n"
    assert "tables that tproxyd cannot read: `filter` (iptables-legacy-save)" in warning


@pytest.mark.parametrize(
    ("layout", "family", "works"), [("sidecar", "v4", True), ("gateway", "v4", False), ("gateway", "v6", False)]
)
async def test_forced_syn_cookies_are_told_with_the_sysctl(
    open_lab: OpenLab, tmp_path: Path, layout: str, family: str, works: bool
) -> None:
    async with open_way(f"{layout} {family}", open_lab, tmp_path) as way, trio.open_nursery() as nursery:
        await meets_forced_cookies(way, nursery, works=works)
        nursery.cancel_scope.cancel()


async def meets_forced_cookies(way: Way, nursery: trio.Nursery, *, works: bool) -> None:
    way.proxy.set_sysctl("net.ipv4.tcp_syncookies", 2)
    await nursery.start(serve_identity, way.app, 8080)
    async with open_daemon(way.proxy, CONFIG) as daemon:
        assert "net.ipv4.tcp_syncookies=2" in warnings(daemon)
        if works:
            await is_captured(way, daemon)
        else:
            with pytest.raises(ConnectionResetError):
                await way.client.connect(way.address, 8080)
        assert await daemon.stop() == 0


async def missing(way: Way, *command: str, verbs: Sequence[str] = ("apply", "run")) -> str:
    """`apply` and `run`, each at the end of this command, say in one sentence what is missing, and nothing has changed."""
    before = await way.proxy.dump()
    sentence = ""
    for verb in verbs:
        line = [*TPROXYD, verb, "-c", str(way.file(CONFIG))]
        done = await way.proxy.run(*command, *line, check=False)
        assert done.returncode == 69, done
        assert done.stderr.count("\n") == 1
        sentence = done.stderr
    assert await way.proxy.dump() == before
    return sentence


@ONE
async def test_54_lo_that_is_down_is_named(way: Way) -> None:
    await way.proxy.run("ip", "link", "set", "lo", "down")
    assert "`ip link set lo up`" in await missing(way)


@ONE
async def test_54_an_nft_that_is_too_old_is_named(way: Way, tmp_path: Path) -> None:
    old = tmp_path / "nft"
    old.write_text('#!/bin/sh\necho "nftables v0.9.8 (E.D.S.)"\n')
    old.chmod(0o755)
    nft = (await way.proxy.run("sh", "-c", "command -v nft")).stdout.strip()
    hide = f'mount --bind {old} {nft} && exec "$@"'
    sentence = await missing(way, "unshare", "--mount", "sh", "-c", hide, "sh", verbs=["run"])
    assert "nft is too old (nftables v0.9.8 (E.D.S.))" in sentence


@ONE
async def test_54_a_kernel_without_nf_tables_is_named_with_the_module(way: Way) -> None:
    sentence = await missing(way, sys.executable, "-c", WITHOUT_NF_TABLES, verbs=["apply", "run", "status"])
    assert "no nf_tables (Protocol not supported)" in sentence
    assert "modprobe nf_tables" in sentence


# What nft 1.0.6 and its library were seen to say of an expression that a kernel does not have, put in their mouths: this kernel has all
# that is needed.
WITHOUT_MODULE = """
import re, sys
from tproxyd.kernel import nft
SAID = "Error: Could not process rule: No such file or directory"
def refusing(run, shown):
    def refused(*arguments, text=""):
        text = text or str(arguments[-1])
        for line in text.splitlines():
            if found := re.search(sys.argv[1], line):
                marks = " " * found.start() + "^" * (found.end() - found.start())
                raise nft._translate("`nft`", shown.format(rule=line, marks=marks))
        return run(*arguments, text=text) if shown.startswith("/dev") else run(*arguments)
    return refused
nft.Library.run = refusing(nft.Library.run, SAID + "\\ntable inet tproxyd\\n      ^^^^^^^")
nft.run_program = refusing(nft.run_program, "/dev/stdin:4:93-97: " + SAID + "\\n{rule}\\n{marks}")
from tproxyd.daemon.cli import main
sys.exit(main(sys.argv[5:]))
"""


@ONE
@pytest.mark.parametrize(
    ("expression", "module"),
    [
        ("tproxy ip to", "nft_tproxy"),
        ("socket transparent", "nft_socket"),
        ("fib daddr", "nft_fib_inet"),
        ("reject with", "nft_reject_inet"),
    ],
)
async def test_54_a_missing_module_is_named_before_anything_is_changed(way: Way, expression: str, module: str) -> None:
    sentence = await missing(way, sys.executable, "-c", WITHOUT_MODULE, expression)
    assert f"modprobe {module}" in sentence
