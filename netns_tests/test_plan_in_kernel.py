"""The plan meets nft and the kernel: what is printed is taken, known again when it is listed, and the same by every way.

Over the golden files of unit/test_plan.py and over configurations that are valid but unusual.
"""

from __future__ import annotations

import tomllib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tproxyd import kernel
from tproxyd.config import config_from_mapping
from tproxyd.kernel import nft
from tproxyd.plan import Family, Plan, Surroundings, make_plan
from tproxyd.testing import Lab, Node, Topology
from tproxyd.testing.daemon import TPROXYD
from tproxyd.testing.plugin import OpenLab

GOLDEN = Path(__file__).parent / "unit" / "golden"
NAMES = sorted(file.stem for file in GOLDEN.glob("*.toml"))

TWO_NODES = Topology(nodes=("one", "other"))
"""No link between them, so that their kernel states are equal: a link's ends have hardware addresses of their own."""

UNUSUAL = [
    ("mask of all bits", 'routing.mark = "0x1/0xffffffff"\nrouting.upstream_mark = "0x2/0xffffffff"'),
    ("masks of one bit", 'routing.mark = "0x100/0x100"\nrouting.upstream_mark = "0x200/0x200"'),
    ("all bits of each mask", 'routing.mark = "0x3/0x3"\nrouting.upstream_mark = "0xc/0xc"'),
    ("the highest bit", 'routing.mark = "0x80000000/0x80000000"\nrouting.upstream_mark = "0x1/0x1"'),
    ("a mask with gaps", 'routing.mark = "0x80000001/0xf000000f"\nrouting.upstream_mark = "0x500/0xa0f00"'),
    (
        "strange names",
        'capture.interfaces = ["a\'b", "$x", "a#b", "{};", "x,y", "a@b.5", "%d", "~", "A", "a", "a1", "a10"]',
    ),
    ("long names", 'capture.interfaces = ["abcdefghijklmno", "bbcdefghijklmn*"]'),
    ("first and last ports", 'capture.ports = ["1-1023", "60000-65535"]\ncapture.exclude_ports = ["1", "65535"]'),
    ("neighbouring ports", 'capture.ports = ["8080", "8081", "8082-8090"]'),
    ("every port in two ranges", 'capture.ports = ["1-100", "101-65535"]'),
    ("ten thousand ports", f"capture.ports = {list(range(1, 60000, 6))}"),
    ("every address", 'capture.sources = ["0.0.0.0/0", "::/0"]\ncapture.destinations = ["0.0.0.0/0", "::/0", "local"]'),
    ("every special address", 'policy.allow_special = ["0.0.0.0/0", "::/0"]'),
    ("upper halves", 'capture.sources = ["128.0.0.0/1", "8000::/1"]'),
    (
        "first and last addresses",
        f'capture.exclude_sources = ["0.0.0.0", "255.255.255.255", "::", "{"ffff:" * 7}ffff"]',
    ),
    ("neighbouring networks", 'capture.sources = ["192.0.2.0/25", "192.0.2.128/26", "192.0.2.192"]'),
    (
        "spellings of IPv6",
        'capture.sources = ["::1.2.3.4", "64:ff9b::/96", "1:0:0:2::/64", "0:0:0:0:1::/80", "1:2:3:4:5:6:0:8"]',
    ),
    ("2500 networks", f"capture.sources = {[f'10.{n // 250}.{n % 250}.1' for n in range(2500)]}"),
    ("first table and priority", "routing.table = 1\nrouting.priority = 1\nlisten.port = 1"),
    ("last table and priority", "routing.table = 4294967295\nrouting.priority = 32763\nlisten.port = 65535"),
]
FAMILIES: list[tuple[Family, ...]] = [(4, 6), (4,), (6,)]


@pytest.fixture
async def nodes(open_lab: OpenLab) -> AsyncIterator[Lab]:
    async with open_lab(TWO_NODES) as lab:
        yield lab


def plan_of(toml: str, families: tuple[Family, ...] = (4, 6), *, bridge_netfilter: bool = False) -> Plan:
    return make_plan(
        config_from_mapping(tomllib.loads(toml)),
        surroundings=Surroundings(families=families, bridge_netfilter=bridge_netfilter),
    )


def apply_and_compare(plan: Plan) -> list[kernel.Change]:
    kernel.apply(plan)
    return kernel.differences(plan, kernel.observe())


@pytest.mark.parametrize("name", NAMES)
async def test_nft_takes_a_golden_ruleset_and_a_second_time_changes_nothing(nodes: Lab, name: str) -> None:
    node, file = nodes["one"], GOLDEN / f"{name}.nft"
    plan = plan_of((GOLDEN / f"{name}.toml").read_text(encoding="utf-8"), (4,) if name == "ipv4-only" else (4, 6))
    before = await node.dump()
    await node.run("nft", "-c", "-f", str(file))
    assert await node.dump() == before
    for _ in range(2):  # loading it again replaces it
        await node.run("nft", "-f", str(file))
        listed = node.call(nft.list_tables, kernel.Program())
        assert listed == nft.spelled(plan, kernel.Program())
    assert not any(change.kind == "ruleset" for change in node.call(kernel.apply, plan))
    assert kernel.differences(plan, node.call(kernel.observe)) == []
    node.call(kernel.revert)
    assert await node.dump() == before


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.*")), ids=lambda file: file.name)
async def test_the_command_prints_the_golden_files(nodes: Lab, file: Path) -> None:
    """In a namespace with nothing special about it; the one for IPv4 alone in a namespace that has no other."""
    formats = {".nft": "nft", ".txt": "text", ".sh": "shell", ".json": "json"}
    if file.suffix == ".toml":
        assert (await nodes["one"].run(*TPROXYD, "check", "-c", str(file))).stderr == ""
        return
    if file.stem == "ipv4-only":
        nodes["one"].set_sysctl("net.ipv6.conf.lo.disable_ipv6", 1)
    config = str(file.with_suffix(".toml"))
    printed = await nodes["one"].run(*TPROXYD, "plan", "-c", config, "--format", formats[file.suffix])
    assert printed.stdout == file.read_text(encoding="utf-8")  # noqa: ASYNC240  # a small file on a local disk


@pytest.mark.parametrize("toml", [row[1] for row in UNUSUAL], ids=[row[0] for row in UNUSUAL])
async def test_the_kernel_takes_whatever_the_config_reader_takes(nodes: Lab, toml: str) -> None:
    """And lists it as planned: else `apply` would load it again each time, and a daemon see drift where there is none."""
    ports = "" if "capture.ports" in toml else 'capture.ports = "all"\n'
    plan = plan_of(f'{ports}{toml}\ncapture.when_down = "refuse"')
    assert nodes["one"].call(apply_and_compare, plan) == []


@pytest.mark.parametrize("families", FAMILIES, ids=["both", "IPv4", "IPv6"])
async def test_the_kernel_takes_a_plan_for_each_family(nodes: Lab, families: tuple[Family, ...]) -> None:
    plan = plan_of((GOLDEN / "everything.toml").read_text(encoding="utf-8"), families)
    assert nodes["one"].call(apply_and_compare, plan) == []


async def test_the_kernel_takes_a_plan_for_a_host_with_br_netfilter(nodes: Lab) -> None:
    plan = plan_of((GOLDEN / "everything.toml").read_text(encoding="utf-8"), bridge_netfilter=True)
    assert 'iifkind "bridge" accept' in plan.tables["tproxyd"]
    assert nodes["one"].call(apply_and_compare, plan) == []


# The shell script


async def script(node: Node, file: Path) -> None:
    """Runs what `tproxyd plan --format shell` prints, as root."""
    printed = await node.run(*TPROXYD, "plan", "-c", str(file), "--format", "shell")
    done = await node.run("sh", input=printed.stdout)
    assert (done.stdout, done.stderr) == ("", "")


async def apply(node: Node, file: Path) -> None:
    await node.run(*TPROXYD, "apply", "-c", str(file))


CAPTURING = [name for name in NAMES if name not in ("nothing", "ipv4-only")]


@pytest.mark.parametrize("name", CAPTURING)
async def test_the_shell_script_gives_the_same_kernel_state_as_apply(nodes: Lab, name: str) -> None:
    one, other = nodes["one"], nodes["other"]
    before = await one.dump()
    assert before == await other.dump()
    await apply(one, GOLDEN / f"{name}.toml")
    applied = await one.dump()
    assert applied != before
    for _ in range(2):
        await script(other, GOLDEN / f"{name}.toml")
        assert await other.dump() == applied
    await apply(one, GOLDEN / f"{name}.toml")
    assert await one.dump() == applied
    # What the script did is ours to the last bit: revert needs no config and finds all of it.
    await other.run(*TPROXYD, "revert")
    assert await other.dump() == before


@pytest.mark.parametrize(("first", "second"), [("refuse", "two-lines"), ("two-lines", "everything")])
async def test_the_shell_script_replaces_another_configuration_as_apply_does(
    nodes: Lab, first: str, second: str
) -> None:
    """Without the guard, and with other marks, table and priorities."""
    for change, node in ((apply, nodes["one"]), (script, nodes["other"])):
        await change(node, GOLDEN / f"{first}.toml")
        await change(node, GOLDEN / f"{second}.toml")
    assert await nodes["other"].dump() == await nodes["one"].dump()


async def test_the_shell_script_does_without_ipv6_where_it_is_switched_off_as_apply_does(nodes: Lab) -> None:
    for change, node in ((apply, nodes["one"]), (script, nodes["other"])):
        node.set_sysctl("net.ipv6.conf.all.disable_ipv6", 1)
        await change(node, GOLDEN / "two-lines.toml")
    assert await nodes["other"].dump() == await nodes["one"].dump()


async def test_the_shell_script_leaves_foreign_rules_routes_and_tables_alone(nodes: Lab) -> None:
    for change, node in ((apply, nodes["one"]), (script, nodes["other"])):
        await node.run("nft", "-f", "-", input="table inet foreign { chain c { counter; }; }\ntable ip tproxyd { }\n")
        await node.run("ip", "rule", "add", "priority", "5233", "fwmark", "0x1/0x1", "lookup", "7", "protocol", "7")
        await node.run("ip", "route", "add", "local", "192.0.2.0/24", "dev", "lo", "table", "133", "proto", "7")
        before = await node.dump()
        await change(node, GOLDEN / "two-lines.toml")
        assert "- " not in [line[:2] for line in before.diff(await node.dump()).splitlines()]
    assert await nodes["other"].dump() == await nodes["one"].dump()


async def test_the_shell_script_stops_at_the_first_error(nodes: Lab) -> None:
    """Without a route to deliver them to, nothing may be steered."""
    node = nodes["one"]
    printed = await node.run(*TPROXYD, "plan", "-c", str(GOLDEN / "two-lines.toml"), "--format", "shell")
    before = await node.dump()
    with trio.fail_after(10):
        done = await node.run("setpriv", "--bounding-set=-net_admin", "sh", input=printed.stdout, check=False)
    assert done.returncode != 0
    assert done.stderr
    assert await node.dump() == before
