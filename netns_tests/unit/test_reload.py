"""The pure parts of a reload: what differs, what may, what stays in the plan for who lives, and who is to go."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tproxyd.config import Config, config_from_mapping
from tproxyd.datapath.leaving import compile_capture
from tproxyd.datapath.timers import Timed, Wheel
from tproxyd.errors import ConfigError
from tproxyd.interceptor.changes import make_changes, require_changeable, same_interception
from tproxyd.plan import make_plan

CLIENT, HOST = "192.0.2.2", "198.51.100.7"


def config(*ports: str, **tables: Any) -> Config:
    return config_from_mapping({"capture": {"ports": [*ports], **tables.pop("capture", {})}} | tables)


def test_changes_are_told_by_key() -> None:
    before = config("8080")
    rule = {"name": "a", "action": "refuse"}
    after = config(
        "8080",
        "9000-9010",
        policy={"rule": [rule]},
        log={"access": False},
        drain={"timeout": "1s"},
        admin={"metrics": "127.0.0.1:9101"},
    )
    assert make_changes(before, after) == [
        "capture.ports: 8080 -> 8080, 9000-9010",
        "policy.rule: none -> a",
        "drain.timeout: 30 s -> 1 s",
        "admin.metrics: none -> 127.0.0.1:9101",
        "log.access: true -> false",
    ]
    assert make_changes(before, config("8080")) == []
    many = config(*(str(port) for port in range(1000, 3000, 2)))
    assert all(len(line) < 200 for line in make_changes(before, many))


def test_what_cannot_change_is_named_all_at_once() -> None:
    before = config("8080")
    with pytest.raises(ConfigError) as refused:
        require_changeable(
            before, config("8080", capture={"mode": "redirect"}, relay={"workers": 0}, routing={"table": 7})
        )
    assert [re.findall("`([^`]*)`", problem)[0] for problem in refused.value.problems] == [
        "capture.mode",
        "routing.table",
        "relay.workers",
    ]
    require_changeable(before, config("9090", relay={"idle_timeout": "1s"}, upstream={"source": "proxy"}))


def test_limits_and_logs_are_not_of_one_namespace() -> None:
    assert same_interception(config("8080"), config("8080", log={"level": "debug"}, limits={"max_connections": 7}))
    assert not same_interception(config("8080"), config("8080", listen={"backlog": 7}))


def ports_let_through(ruleset: str) -> list[str]:
    name = re.search(r"tcp dport != @(\w+) tcp sport", ruleset)
    if name is None:
        return []
    found = re.search(rf"set {name[1]} {{.*?elements = {{ (.*?) }}", ruleset, re.DOTALL)
    assert found is not None
    return [one.strip() for one in found[1].split(",")]


@pytest.mark.parametrize(
    ("now", "living", "ports"),
    [
        (config("8080"), [], ["8080"]),
        (config("8080"), [config("8080")], ["8080"]),
        (config("8080"), [config("9090"), config("9091")], ["8080", "9090", "9091"]),
        (config("8000-8100"), [config("8050-8200")], ["8000-8200"]),
        (config("8000-8100"), [config("8050-8060")], ["8000-8100"]),
        (config("8080"), [config("8080", upstream={"target": "192.0.2.9:7070"})], ["7070", "8080"]),
        (config("8080"), [config("1-65535")], []),
    ],
)
def test_packets_of_who_lives_are_let_through_and_captured_is_what_the_config_says(
    now: Config, living: list[Config], ports: list[str]
) -> None:
    plan, alone = make_plan(now, living=living), make_plan(now)
    assert ports_let_through(plan.ruleset) == ports
    capture = re.compile(r"\tchain capture \{.*?\n\t\}", re.DOTALL)
    assert capture.findall(plan.ruleset) == capture.findall(alone.ruleset)
    assert (plan.listen, plan.marks, plan.routes, plan.rules) == (alone.listen, alone.marks, alone.routes, alone.rules)


def test_who_bears_a_client_s_address_is_sent_back_as_long_as_he_lives() -> None:
    now = config("8080", upstream={"source": "proxy"})
    spoofing = config("8080", upstream={"target": "loopback", "connect_timeout": "9s"})
    alone, plan = make_plan(now), make_plan(now, living=[spoofing])
    assert "set dials" not in alone.ruleset
    assert "set dials" in plan.ruleset
    assert "type route hook output" in plan.ruleset
    assert "timeout 11s" in plan.ruleset  # he may be dialling still
    assert {rule.source for rule in plan.rules} - {rule.source for rule in alone.rules} == {"127.0.0.0/8", "::1/128"}


def test_for_redirected_connections_the_ruleset_need_know_nothing() -> None:
    redirect = {"mode": "redirect"}
    now, before = config("8080", capture=redirect), config("9090", capture=redirect)
    assert make_plan(now, living=[before]) == make_plan(now)


@pytest.mark.parametrize(
    ("capture", "captured"),
    [
        ({}, True),
        ({"exclude_ports": ["8080"]}, False),
        ({"sources": ["192.0.2.0/24"]}, True),
        ({"sources": ["203.0.113.0/24"]}, False),
        ({"sources": ["2001:db8::/32"]}, False),
        ({"exclude_sources": ["192.0.2.2/32"]}, False),
        ({"exclude_sources": ["203.0.113.0/24"]}, True),
        ({"destinations": ["local"]}, True),
        ({"destinations": ["203.0.113.0/24"]}, False),
        ({"destinations": ["203.0.113.0/24", "local"]}, True),
        ({"exclude_destinations": ["local"]}, False),
        ({"interfaces": ["eth7"]}, True),
        ({"exclude_interfaces": ["eth*"]}, True),
    ],
)
def test_who_is_to_go_is_told_by_addresses_alone(capture: dict[str, Any], captured: bool) -> None:
    captures = compile_capture(config("8080", "8082", capture=capture).capture, lambda host: host == HOST)
    assert captures(CLIENT, (HOST, 8080)) == captured
    assert not captures(CLIENT, (HOST, 8081))


def test_another_time_out_holds_for_who_waits() -> None:
    wheel: Wheel[Timed] = Wheel(100.0)
    members = [Timed(0.0), Timed(2.0)]
    for member in members:
        wheel.add(member)
    wheel.change(1.0)
    assert wheel.due <= 1.1
    assert [*wheel.expire(1.5)] == members[:1]
    wheel.change(10.0)
    assert [*wheel.expire(11.9)] == []
    assert [*wheel.expire(12.9)] == members[1:]
