"""What the living connections of one generation of a daemon need of the kernel's state, said to the next one.

Private to the daemon (`tproxyd handover`): an embedding program has no use for it. Knows what has to stay as it is; refuses to know how processes speak.
"""

from __future__ import annotations

import msgspec

from tproxyd.config import Config
from tproxyd.errors import ConfigError
from tproxyd.plan import Plan

__all__ = ["Heritage", "make_heritage", "require_same"]


class Heritage(msgspec.Struct, frozen=True, kw_only=True):
    """`taken_marks` is what the predecessor's `auto` kept away from; `rules` and `routes` are what its living connections need."""

    steering: str
    taken_marks: int
    mode: str
    port: int
    marks: dict[str, str]
    table: int
    priority: int
    rules: tuple[str, ...]
    routes: tuple[str, ...]


def make_heritage(config: Config, plan: Plan, taken_marks: int) -> Heritage:
    """Of a config and what is planned by it."""
    return Heritage(
        steering=plan.steering,
        taken_marks=taken_marks,
        mode=config.capture.mode,
        port=config.listen.port,
        marks={"mark": str(plan.marks.steering), "upstream_mark": str(plan.marks.upstream)},
        table=config.routing.table,
        priority=config.routing.priority,
        rules=tuple(f"IPv{rule.family} {rule.selector()}" for rule in plan.rules),
        routes=tuple(f"IPv{route.family} {route.selector()}" for route in plan.routes),
    )


def require_same(before: Heritage, config: Config, plan: Plan) -> None:
    """Raises ConfigError that names each key that cannot change while connections of the predecessor live."""
    now = make_heritage(config, plan, before.taken_marks)
    keys = [
        ("capture.mode", before.mode, now.mode),
        ("listen.port", before.port, now.port),
        *((f"routing.{key}", before.marks[key], now.marks[key]) for key in now.marks),
        ("routing.table", before.table, now.table),
        ("routing.priority", before.priority, now.priority),
    ]
    problems = [
        f"`{key}` cannot change from {old} to {new} at a hand-over, because living connections need it; restart the daemon"
        for key, old, new in keys
        if old != new
    ]
    families = tuple(f"IPv{route.family} " for route in plan.routes)  # of one that is switched off by now nothing lives
    lost = [rule for rule in before.rules if rule not in now.rules and rule.startswith(families)]
    if lost and not problems:
        problems.append(
            "`upstream.target` and `upstream.source` cannot change so at a hand-over, because living connections need the ip rule "
            f"`{lost[0].partition(' ')[2]}`, which would go; restart the daemon"
        )
    if problems:
        raise ConfigError(*problems)
