"""The plan: golden files for what is shown and loaded, and what holds for every plan.

golden/NAME.toml is the configuration, golden/NAME.{txt,nft,sh,json} what `tproxyd plan` prints for it, byte for byte. That nft
and a kernel take them is tested in test_plan_in_kernel.py. After a wanted change, write them anew and read the difference:

    TPROXYD_REWRITE_GOLDEN=1 .venv/bin/python -m pytest -p no:cacheprovider netns_tests/unit/test_plan.py; git diff
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tproxyd.config import Config, Endpoint, Mark, Upstream, config_from_mapping, load_config
from tproxyd.errors import ConfigError
from tproxyd.plan import (
    FORMATS,
    PROTOCOL,
    SUPPORTED_MARKS,
    UNOWNED_BYPASS,
    Family,
    LocalRoute,
    Marks,
    Plan,
    Rule,
    Surroundings,
    is_owned,
    make_plan,
    render,
    spared_in,
    ssh_remarks,
)

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(file.stem for file in GOLDEN.glob("*.toml"))
ENDINGS = {"text": ".txt", "nft": ".nft", "shell": ".sh", "json": ".json"}
EVERY_FORMAT = ("two-lines", "everything", "nothing", "redirect")  # the others differ in the ruleset alone

TWO_LINES = config_from_mapping({"capture": {"ports": ["8080"]}})
EVERYTHING = load_config(GOLDEN / "everything.toml")


def golden_plan(name: str) -> Plan:
    families: tuple[Family, ...] = (4,) if name == "ipv4-only" else (4, 6)
    return make_plan(load_config(GOLDEN / f"{name}.toml"), surroundings=Surroundings(families=families))


def plan_of(**tables: Any) -> Plan:
    return make_plan(config_from_mapping({"capture": {"ports": ["8080"]}} | tables))


def entries(plan: Plan) -> tuple[Rule | LocalRoute, ...]:
    return (*plan.rules, *plan.routes)


# Golden files


@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name in NAMES for form in FORMATS if form == "nft" or name in EVERY_FORMAT]
)
def test_golden(name: str, form: str) -> None:
    file = (GOLDEN / name).with_suffix(ENDINGS[form])
    printed = render(golden_plan(name), form).encode()
    if "TPROXYD_REWRITE_GOLDEN" in os.environ:
        file.write_bytes(printed)
    assert printed == file.read_bytes()


def test_every_golden_file_has_its_configuration() -> None:
    assert set(FORMATS) == set(ENDINGS)
    endings = {".toml", *ENDINGS.values()}
    assert {file.name for file in GOLDEN.iterdir()} <= {name + ending for name in NAMES for ending in endings}


# Formats


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_every_format_is_lines_of_printable_text(name: str, form: str) -> None:
    printed = render(golden_plan(name), form)
    assert printed.endswith("\n")
    assert printed.replace("\n", "").replace("\t", "").isprintable()


@pytest.mark.parametrize("name", NAMES)
def test_every_format_has_the_ruleset_and_every_rule_and_route(name: str) -> None:
    plan = golden_plan(name)
    content = json.loads(render(plan, "json"))
    assert content["ruleset"] == plan.ruleset == render(plan, "nft")
    assert content["tables"] == plan.tables
    assert [rule["rule"] for rule in content["rules"]] == [rule.selector() for rule in plan.rules]
    assert plan.ruleset in render(plan, "shell")
    for form in ("text", "shell"):
        printed = render(plan, form)
        for table in plan.tables.values():
            assert table in printed
        for entry in entries(plan):
            assert f"ip -{entry.family} " in printed or f"rule -{entry.family} " in printed
            assert f"{entry.selector()} proto" in printed
    for rule in plan.rules:
        assert rule.why in render(plan, "text")


@pytest.mark.parametrize("name", NAMES)
def test_the_shell_script_is_one(name: str) -> None:
    subprocess.run(["sh", "-n"], input=render(golden_plan(name), "shell"), text=True, check=True)


# Content


def test_nothing_captured_gives_an_empty_plan() -> None:
    for tables in ({}, {"capture": {"mode": "off", "ports": "all"}}, {"capture": {"when_down": "refuse"}}):
        plan = make_plan(config_from_mapping(tables))
        assert (plan.listen, plan.routes, plan.rules, plan.tables, plan.sysctls) == ((), (), (), {}, {})
        # Loading it still takes away what an earlier configuration left.
        assert re.findall(r"^delete .*", plan.ruleset, re.M) == [
            "delete table inet tproxyd",
            "delete table inet tproxyd_guard",
            "delete table inet tproxyd_state",
        ]
        assert render(plan, "text") == "Nothing would be captured: no table, rule or route.\n"


@pytest.mark.parametrize("name", NAMES)
def test_every_nft_rule_says_why_it_is_there(name: str) -> None:
    for table in golden_plan(name).tables.values():
        rules = [
            rule for chain in re.findall(r"\tchain \w+ \{\n(.*?)\t\}\n", table, re.S) for rule in chain.splitlines()
        ]
        assert rules or re.search(r'^\tcomment "[^"]+"$', table, re.M)
        for rule in rules:
            assert re.match(r"\t\ttype (filter|nat|route) hook ", rule) or re.search(
                r' comment "[^"]{4,127}"$', rule
            ), rule


@pytest.mark.parametrize("name", NAMES)
def test_every_chain_that_is_jumped_to_is_there_and_every_set_used(name: str) -> None:
    for table in golden_plan(name).tables.values():
        chains = set(re.findall(r"chain (\w+) \{", table))
        assert set(re.findall(r"(?:goto|jump) (\w+)", table)) <= chains
        named = set(re.findall(r"@(\w+)", table)) - {"th"}  # which is a place in the packet
        assert named == set(re.findall(r"set (\w+) \{", table))


def test_what_of_the_plan_follows_from_the_configuration() -> None:
    plan = make_plan(EVERYTHING)
    assert plan.listen == (("127.0.0.1", 15099), ("::1", 15099))
    assert list(plan.tables) == ["tproxyd", "tproxyd_guard", "tproxyd_state"]
    # A daemon's own state does not stay.
    assert list(make_plan(EVERYTHING, stays=False).tables) == ["tproxyd", "tproxyd_guard"]
    assert {route.table for route in plan.routes} == {4294967295}
    assert sorted((rule.family, rule.priority) for rule in plan.rules) == [
        (family, priority) for family in (4, 6) for priority in (32763, 32763, 32764, 32765)
    ]
    assert plan.marks == Marks(Mark(value=0x10, mask=0x30), Mark(value=0x20, mask=0x30))
    assert plan.sysctls == {}
    assert list(make_plan(TWO_LINES, stays=False).tables) == ["tproxyd"]
    assert plan.capture_off == make_plan(TWO_LINES).capture_off
    assert plan.capture_off.endswith("flush chain inet tproxyd capture\n")


def test_redirect_mode_needs_nothing_of_tproxy_and_says_what_it_loses() -> None:
    plan = make_plan(load_config(GOLDEN / "redirect-everything.toml"))
    assert plan.listen == (("0.0.0.0", 15099), ("::", 15099))  # where NAT finds them
    assert (plan.routes, plan.rules, plan.sysctls) == ((), (), {})
    for word in ("tproxy ", "socket ", "notrack"):
        assert word not in plan.ruleset.replace("inet tproxyd", "")
    # As in tproxy mode: the same selectors, and the same switch.
    for name in ("capture", "guard"):
        (chain,) = re.findall(rf"\tchain {name} .*?\n\t\}}\n", plan.tables["tproxyd_guard"], re.S)
        assert chain in make_plan(EVERYTHING).tables["tproxyd_guard"]
    assert plan.capture_off == make_plan(EVERYTHING).capture_off
    assert make_plan(EVERYTHING).losses == ()
    assert "\n".join(f"# - {loss}" for loss in plan.losses) in render(plan, "text")
    # A bypass is kept by the rules that a daemon takes with it, and by no others.
    bypass = config_from_mapping({"capture": {"ports": ["8080"], "mode": "redirect"}})
    assert UNOWNED_BYPASS in make_plan(bypass).losses
    assert UNOWNED_BYPASS not in make_plan(bypass, stays=False, owned=True).losses
    assert UNOWNED_BYPASS not in plan.losses
    alone = make_plan(bypass, surroundings=Surroundings(families=(4,)))
    assert "nfproto ipv6" not in alone.tables["tproxyd"]


@pytest.mark.parametrize(("family", "other"), [(4, 6), (6, 4)])
def test_a_namespace_of_one_family_gets_nothing_of_the_other(family: Family, other: Family) -> None:
    plan = make_plan(EVERYTHING, surroundings=Surroundings(families=(family,)))
    assert {entry.family for entry in entries(plan)} == {family}
    assert len(plan.listen) == 2  # the other one may be switched on later
    alone = make_plan(EVERYTHING, surroundings=Surroundings(families=(family,), sockets=(family,)))
    assert [":" in address for address, _ in alone.listen] == [family == 6]
    assert f"nfproto ipv{family} meta l4proto tcp tproxy" in plan.tables["tproxyd"]
    assert f"nfproto ipv{other} meta l4proto tcp tproxy" not in plan.tables["tproxyd"]
    assert plan.tables["tproxyd_guard"] == make_plan(EVERYTHING).tables["tproxyd_guard"]  # refuses both


def test_a_jump_has_its_target_before_it_and_protocol_133_is_on_everything() -> None:
    plan = make_plan(TWO_LINES)
    seen: set[tuple[int, int]] = set()
    for rule in plan.rules:
        assert rule.table is None or rule.goto is None
        assert rule.goto is None or (rule.family, rule.goto) in seen
        seen.add((rule.family, rule.priority))
    assert PROTOCOL == 133
    commands = [line for line in render(plan, "shell").splitlines() if re.match(r"(ip|rule) -", line)]
    assert len(commands) == 10
    assert all(re.search(r" proto(col)? 133$", line) for line in commands)


# Plans as values


def test_a_comment_does_not_make_a_table_an_owned_one() -> None:
    forged = 'table inet tproxyd {\n\tcomment "x\n\tflags owner\n"\n}\n'
    owned = "table inet tproxyd {\n\tflags owner\n\n}\n"
    assert [is_owned(listing) for listing in (owned, forged, "")] == [True, False, False]


def test_equal_configs_give_equal_plans() -> None:
    assert make_plan(TWO_LINES) == make_plan(config_from_mapping({"capture": {"ports": [8080]}}))
    assert make_plan(EVERYTHING) == make_plan(load_config(GOLDEN / "everything.toml"))
    assert make_plan(TWO_LINES) != make_plan(EVERYTHING)
    # What the kernel has no part in changes nothing in it.
    assert make_plan(TWO_LINES) == plan_of(log={"level": "debug"}, drain={"timeout": "1s"}, listen={"backlog": 1})


def test_a_target_brings_its_port_into_the_ruleset_as_a_rule_does() -> None:
    def plan_to(target: Endpoint) -> Plan:
        return make_plan(msgspec.structs.replace(TWO_LINES, upstream=Upstream(target=target)))

    by_rule = plan_of(policy={"rule": [{"name": "x", "action": {"forward": "192.0.2.1:81"}}]})
    assert plan_to(Endpoint("192.0.2.1", 81)).ruleset == by_rule.ruleset
    # A captured port is there anyway.
    assert plan_to(Endpoint("192.0.2.1", 8080)).ruleset == make_plan(TWO_LINES).ruleset != by_rule.ruleset


def test_a_plan_is_frozen() -> None:
    plan = make_plan(TWO_LINES)
    for thing in (plan, plan.marks, plan.marks.steering, plan.rules[0], plan.routes[0]):
        for field in msgspec.structs.fields(thing):
            with pytest.raises(AttributeError):
                setattr(thing, field.name, None)


def test_a_plan_shares_nothing_with_the_next_one() -> None:
    make_plan(TWO_LINES).tables.clear()
    make_plan(TWO_LINES).sysctls["net.ipv4.ip_forward"] = "1"
    assert make_plan(TWO_LINES) == golden_plan("two-lines")


@pytest.mark.parametrize("seed", ["0", "1"])
def test_a_plan_is_the_same_in_every_process(seed: str) -> None:
    program = (
        "import sys; from pathlib import Path; from tproxyd.config import load_config; from tproxyd.plan import *\n"
        "print(end=render(make_plan(load_config(Path(sys.argv[1]))), 'json'))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program, str(GOLDEN / "everything.toml")],
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        check=True,
    ).stdout
    assert printed == (GOLDEN / "everything.json").read_bytes()


# Marks

MARKS = [
    ("both automatic", "auto", "auto", "0x1000000/0x3000000", "0x2000000/0x3000000"),
    ("both given", "0x1/0x3", "0x2/0x3", "0x1/0x3", "0x2/0x3"),
    ("the list's own steering mark", "0x1000000/0x3000000", "auto", "0x1000000/0x3000000", "0x2000000/0x3000000"),
    ("the list's own upstream mark", "auto", "0x2000000/0x3000000", "0x1000000/0x3000000", "0x2000000/0x3000000"),
    ("the two exchanged", "0x2000000/0x3000000", "auto", "0x2000000/0x3000000", "0x8000000/0xc000000"),
    ("steering elsewhere", "0x1/0x1", "auto", "0x1/0x1", "0x2000000/0x3000000"),
    ("upstream elsewhere", "auto", "0x1/0x1", "0x1000000/0x3000000", "0x1/0x1"),
    ("the third value of the field", "0x3000000/0x3000000", "auto", "0x3000000/0x3000000", "0x2000000/0x3000000"),
    ("one bit of the first field", "0x1000000/0x1000000", "auto", "0x1000000/0x1000000", "0x8000000/0xc000000"),
    ("over the first field and a bit", "auto", "0x1000000/0x7000000", "0x10000000/0x30000000", "0x1000000/0x7000000"),
    ("over bits 24 to 31", "0xff000000/0xff000000", "auto", "0xff000000/0xff000000", "0x2000/0x3000"),
]


@pytest.mark.parametrize(
    ("mark", "upstream_mark", "steering", "upstream"), [row[1:] for row in MARKS], ids=[row[0] for row in MARKS]
)
def test_marks(mark: str, upstream_mark: str, steering: str, upstream: str) -> None:
    marks = plan_of(routing={"mark": mark, "upstream_mark": upstream_mark}).marks
    assert (str(marks.steering), str(marks.upstream)) == (steering, upstream)


TAKEN = [
    ("others have other bits", {}, 0x00FFCFFF, "0x1000000/0x3000000", "0x2000000/0x3000000"),
    ("the first bit", {}, 0x1000000, "0x4000000/0xc000000", "0x8000000/0xc000000"),
    ("the upper one", {}, 0x2000000, "0x4000000/0xc000000", "0x8000000/0xc000000"),
    ("the first and third pair", {}, 0x13000000, "0x4000000/0xc000000", "0x8000000/0xc000000"),
    ("Calico's", {}, 0xFFFF0000, "0x1000/0x3000", "0x2000/0x3000"),
    ("all: whoever looks will say so", {}, 0xFFFFFFFF, "0x1000000/0x3000000", "0x2000000/0x3000000"),
    ("beside a given one", {"mark": "0x1/0x1"}, 0x1000000, "0x1/0x1", "0x8000000/0xc000000"),
    ("a given one itself", {"mark": "0x1/0x1"}, 0x3000001, "0x1/0x1", "0x8000000/0xc000000"),
    ("both given", {"mark": "0x1/0x3", "upstream_mark": "0x2/0x3"}, 0x3, "0x1/0x3", "0x2/0x3"),
]


@pytest.mark.parametrize(
    ("routing", "taken", "steering", "upstream"), [row[1:] for row in TAKEN], ids=[row[0] for row in TAKEN]
)
def test_automatic_marks_keep_away_from_what_others_use(
    routing: dict[str, str], taken: int, steering: str, upstream: str
) -> None:
    marks = make_plan(
        config_from_mapping({"capture": {"ports": ["8080"]}, "routing": routing}),
        surroundings=Surroundings(taken_marks=taken),
    ).marks
    assert (str(marks.steering), str(marks.upstream)) == (steering, upstream)


@pytest.mark.parametrize("key", ["mark", "upstream_mark"])
@pytest.mark.parametrize("mark", ["0x1/0xffffffff", "0x1000/0xfffff000", "0x1000/0x15001000"])
def test_no_automatic_mark_fits_beside_one_whose_mask_covers_all(key: str, mark: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(routing={key: mark})
    (problem,) = caught.value.problems
    assert problem.isprintable()
    assert f"`routing.{key}` {mark}" in problem
    assert "; give both marks" in problem


def test_the_documented_list_of_marks_is_of_two_bit_fields_that_do_not_overlap() -> None:
    used = 0
    for steering, upstream in SUPPORTED_MARKS:
        assert steering.mask == upstream.mask
        assert (steering.value | upstream.value, steering.value & upstream.value) == (steering.mask, 0)
        assert not used & steering.mask
        used |= steering.mask


# Whatever the configuration


def port_lists(cuts: list[int]) -> list[str]:
    """Ranges between pairs of ascending numbers, which cannot overlap."""
    return [
        f"{first}-{last}" if first != last else str(first) for first, last in zip(cuts[::2], cuts[1::2], strict=False)
    ]


def network(bits: int, prefix: int, version: int) -> str:
    kind, size = (IPv4Network, 32) if version == 4 else (IPv6Network, 128)
    prefix = min(prefix, size)
    return str(kind((bits >> (128 - prefix) << (size - prefix), prefix)))


PORTS = st.lists(st.integers(1, 65535), max_size=12, unique=True).map(sorted).map(port_lists)
NETWORKS = st.lists(
    st.builds(network, st.integers(0, 2**128 - 1), st.integers(0, 128), st.sampled_from([4, 6])).filter(
        lambda text: not text.startswith("::ffff:")
    ),
    max_size=6,
    unique=True,
)
DESTINATIONS = st.builds(lambda networks, local: networks + local, NETWORKS, st.sampled_from([[], ["local"]]))
INTERFACES = st.lists(st.from_regex(r"[a-z][a-z0-9]{3,8}\*?", fullmatch=True), max_size=4, unique=True)
MARK = st.just("auto") | st.builds(
    lambda bit, value: f"{value << bit:#x}/{3 << bit:#x}", st.integers(0, 30), st.integers(1, 3)
)
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "capture": st.fixed_dictionaries(
            {},
            optional={
                "ports": PORTS | st.just("all"),
                "exclude_ports": PORTS,
                "interfaces": INTERFACES,
                "exclude_interfaces": INTERFACES,
                "sources": NETWORKS,
                "exclude_sources": NETWORKS,
                "destinations": DESTINATIONS,
                "exclude_destinations": DESTINATIONS,
                "when_down": st.sampled_from(["bypass", "refuse"]),
            },
        ),
        "policy": st.fixed_dictionaries({"allow_special": NETWORKS}),
        "routing": st.fixed_dictionaries(
            {}, optional={"mark": MARK, "upstream_mark": MARK, "table": st.integers(1, 252)}
        ),
        "listen": st.fixed_dictionaries({"port": st.integers(1, 65535)}),
    },
)


def config_or_none(mapping: dict[str, Any]) -> Config | None:
    """None where the values exclude each other."""
    try:
        return config_from_mapping(mapping)
    except ConfigError:
        return None


@settings(max_examples=200)
@given(CONFIGS, st.sampled_from([(4, 6), (4,), (6,)]))
def test_any_configuration_gives_one_plan_whatever_the_order_of_its_lists(
    mapping: dict[str, Any], families: tuple[Family, ...]
) -> None:
    backwards = {
        table: {key: value[::-1] if isinstance(value, list) else value for key, value in reversed(keys.items())}
        for table, keys in reversed(mapping.items())
    }
    config, same = config_or_none(mapping), config_or_none(backwards)
    assert (config is None) == (same is None)
    if config is None or same is None:
        return
    plan = make_plan(config, surroundings=Surroundings(families=families))
    assert plan == make_plan(config, surroundings=Surroundings(families=families))
    assert plan.ruleset == make_plan(same, surroundings=Surroundings(families=families)).ruleset
    one, other = plan.marks.steering, plan.marks.upstream
    assert one != other
    assert not one.mask & other.mask or one.mask == other.mask
    for form in FORMATS:
        assert render(plan, form) == render(plan, form)


# The administrator's SSH


@pytest.mark.parametrize(
    ("capture", "ssh_ports", "spared"),
    [
        ({"ports": "all"}, (22,), ()),  # excluded by default
        ({"ports": "all", "exclude_ports": []}, (22,), (22,)),
        ({"ports": ["1-1000", "2222"], "exclude_ports": []}, (22, 2222), (22,)),  # named singly: the user's will
        ({"ports": ["2222"]}, (22, 2222), ()),
        ({"ports": ["2000-2999"]}, (2222, 22, 2022), (2022, 2222)),
        ({"ports": ["2000-2999"]}, (), ()),
    ],
)
def test_ssh_that_only_a_range_captures_is_spared_by_the_first_rule_of_both_chains(
    capture: dict[str, Any], ssh_ports: tuple[int, ...], spared: tuple[int, ...]
) -> None:
    config = config_from_mapping({"capture": {**capture, "when_down": "refuse"}})
    plan = make_plan(config, surroundings=Surroundings(ssh_ports=ssh_ports))
    for name in ("tproxyd", "tproxyd_guard"):
        assert spared_in(plan.tables[name]) == spared
        first = re.search(r"chain capture \{\n\t\t([^\n]*)", plan.tables[name])
        assert first is not None
        assert first[1].startswith("tcp dport " + (str(spared[0]) if len(spared) == 1 else "{")) == bool(spared)
    if not spared:
        assert plan == make_plan(config)
    info, warning = ssh_remarks(config, Surroundings(ssh_ports=ssh_ports))
    assert (info is not None) == bool(spared)
    assert (warning is not None) == any(port in ssh_ports for port in (2222,) if str(port) in capture["ports"])
