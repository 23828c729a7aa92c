"""What the steering tables of two generations are called, and which of them is in force."""

from __future__ import annotations

import pytest

from tproxyd.config import config_from_mapping
from tproxyd.errors import ConfigError
from tproxyd.interceptor.heritage import make_heritage, require_same
from tproxyd.plan import free_generation, generations, make_plan, next_generation, of_others, serving_generation

TWO_LINES = config_from_mapping({"capture": {"ports": ["8080"]}})
ONE, TWO, THREE = generations()


def table(name: str, *, capturing: bool = True, owned: bool = True) -> str:
    return make_plan(TWO_LINES, owned=owned, capturing=capturing, steering=name, stays=False).tables[name]


def test_the_names_take_turns() -> None:
    assert (ONE, TWO, THREE) == ("tproxyd", "tproxyd_1", "tproxyd_2")
    assert [next_generation(name) for name in (ONE, TWO, THREE)] == [TWO, THREE, TWO]
    assert next_generation("mesh_1", "mesh") == "mesh_2"


SERVING: dict[str, bool] = {}
DRAINING, APPLIED = {"capturing": False}, {"owned": False}


@pytest.mark.parametrize(
    ("there", "serving", "free"),
    [
        ({}, ONE, ONE),
        ({ONE: SERVING}, ONE, ONE),  # in the way of a start, which says so
        ({ONE: APPLIED}, ONE, ONE),
        ({ONE: DRAINING}, ONE, TWO),
        ({ONE: DRAINING, TWO: SERVING}, TWO, TWO),
        ({ONE: DRAINING, TWO: DRAINING}, ONE, THREE),
        ({TWO: DRAINING, THREE: SERVING}, THREE, ONE),
        ({TWO: SERVING, THREE: DRAINING}, TWO, ONE),
        ({ONE: SERVING, TWO: SERVING}, TWO, ONE),  # a moment of a hand-over
    ],
)
def test_which_one_is_in_force_and_which_a_start_takes(
    there: dict[str, dict[str, bool]], serving: str, free: str
) -> None:
    tables = {name: table(name, **how) for name, how in there.items()}
    assert serving_generation(tables) == serving
    assert free_generation(tables) == free


def test_what_is_nobodys_is_left_over_and_none_of_another_generation() -> None:
    tables = {
        ONE: table(ONE),
        TWO: table(TWO),
        THREE: table(THREE, owned=False),
        "tproxyd_guard": table("tproxyd_guard"),
    }
    assert of_others(tables, TWO) == {ONE}


def test_a_plan_of_another_generation_is_the_same_but_for_one_name() -> None:
    usual, other = (make_plan(TWO_LINES, owned=True, stays=False, steering=name) for name in (None, TWO))
    assert other.ruleset == usual.ruleset.replace("inet tproxyd ", f"inet {TWO} ").replace(
        "delete table inet tproxyd\n", f"delete table inet {TWO}\n"
    ).replace("table inet tproxyd\n", f"table inet {TWO}\n")
    assert other.capture_off == f"flush chain inet {TWO} capture\n"
    assert (other.rules, other.routes, other.listen, other.name) == (
        usual.rules,
        usual.routes,
        usual.listen,
        usual.name,
    )


def test_all_keys_that_cannot_change_are_told_at_once() -> None:
    before = make_heritage(TWO_LINES, make_plan(TWO_LINES), 0)
    require_same(before, TWO_LINES, make_plan(TWO_LINES))
    other = config_from_mapping(
        {
            "capture": {"ports": ["9090"], "mode": "redirect"},
            "listen": {"port": 1},
            "routing": {"mark": "0x1/0x1", "upstream_mark": "0x2/0x2", "table": 9, "priority": 9},
        }
    )
    with pytest.raises(ConfigError) as refused:
        require_same(before, other, make_plan(other))
    assert [problem.split("`")[1] for problem in refused.value.problems] == [
        "capture.mode",
        "listen.port",
        "routing.mark",
        "routing.upstream_mark",
        "routing.table",
        "routing.priority",
    ]
