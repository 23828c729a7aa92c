"""From a Config to a Plan: marks, ip rules and local routes. The ruleset's text is made next door, in ruleset.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from ipaddress import ip_address

from tproxyd.config import Config, Endpoint, Mark, UnixPath
from tproxyd.errors import ConfigError
from tproxyd.plan.model import Family, LocalRoute, Marks, Plan, Rule, Surroundings
from tproxyd.plan.ruleset import (
    CAPTURE_CHAIN,
    DEFAULT_NAME,
    guard_table,
    listen_addresses,
    redirecting_table,
    state_table,
    steering_table,
    table_names,
    transaction,
)
from tproxyd.policy import compile_source

__all__ = ["PROTOCOL", "SUPPORTED_MARKS", "UNOWNED_BYPASS", "make_marks", "make_plan"]

PROTOCOL = 133
"""Stamp on every ip rule and route of ours: makes exact look-up and cleaning up without a config possible.

Free in iproute2's rt_protos (bird 12, zebra 11, dhcp 16, babel 42, openr 99, bgp 186, ...). systemd-networkd spares
only rules stamped `kernel` (2), and a rule has one stamp; being able to tell what is ours is worth more, and what
networkd deletes a running daemon puts back.
"""

SUPPORTED_MARKS: tuple[tuple[Mark, Mark], ...] = tuple(
    (Mark(value=1 << bit, mask=3 << bit), Mark(value=2 << bit, mask=3 << bit)) for bit in (24, 26, 28, 12)
)
"""What `auto` takes, in this order: (steering, upstream) as the two values of one two-bit field.

Bits 24-29 lie outside the masks of Tailscale (0xff0000), kube-proxy (0x4000, 0x8000), Cilium (0xf00), Istio (0x539),
AWS's CNI (0x80) and mwan3 (0x3f00), but inside Calico's default (0xffff0000), for whose hosts bits 12-13 come last.
"""


UNOWNED_BYPASS = (
    'when_down = "bypass" with `tproxyd apply`: NAT does not look for a listener, so while none is there clients are refused; a daemon '
    "takes its rules with it, and keeps to it"
)
"""What the rules of redirect mode cannot do that outlive their daemon."""

_USUAL = Surroundings()


def make_marks(config: Config, taken: int = 0) -> Marks:
    """The two marks of a Config; `auto` takes the first pair of SUPPORTED_MARKS that fits beside the other one and has none of the
    `taken` bits.

    If no pair is free of them, it is the first one that fits: who is there already is named by who looks (`kernel.neighbours`).
    Raises ConfigError when the two given marks do not fit together, or no pair of the list fits the one that is given.
    """
    steering, upstream = config.routing.mark, config.routing.upstream_mark
    if isinstance(steering, Mark) and isinstance(upstream, Mark):
        # A file with such marks is refused when it is read; a Config made by hand is not.
        if not steering.fits(upstream):
            raise ConfigError(
                f"`routing.mark` {steering} and `routing.upstream_mark` {upstream} do not tell packets apart"
            )
        return Marks(steering, upstream)
    pairs = [
        Marks(
            steering if isinstance(steering, Mark) else auto_steering,
            upstream if isinstance(upstream, Mark) else auto_upstream,
        )
        for auto_steering, auto_upstream in SUPPORTED_MARKS
    ]
    fitting = [pair for pair in pairs if pair.steering.fits(pair.upstream)]
    if not fitting:
        raise ConfigError(
            f"`routing.mark` {steering} and `routing.upstream_mark` {upstream}: no automatic mark fits beside the given one, "
            "because its mask covers all candidates; give both marks, e.g. two values of one mask"
        )
    given = [mark.mask for mark in (steering, upstream) if isinstance(mark, Mark)]
    avoided = taken & ~(given[0] if given else 0)  # nothing here can be done about a given one
    return next((pair for pair in fitting if not pair.bits & avoided), fitting[0])


def make_plan(
    config: Config,
    *,
    surroundings: Surroundings = _USUAL,
    stays: bool = True,
    owned: bool = False,
    capturing: bool = True,
    name: str = DEFAULT_NAME,
    living: Sequence[Config] = (),
    steering: str | None = None,
) -> Plan:
    """What the kernel should hold for this Config, in a namespace with these surroundings.

    Pure: the same arguments give the same Plan on every machine; `kernel.look_around` gives the surroundings of this one.
    `stays` is for `tproxyd apply`, whose state outlives every daemon; a daemon's own goes with it. `owned` is for who holds a
    kernel.Library: the steering table goes with it and is safe from everybody else. Not `capturing`, what lives is delivered and
    nothing new is taken. `name` is that of the tables; rules and routes have none. `living` are configs, with the same marks, mode and routing, under
    which connections were taken that live: they go on being delivered. `steering` is the name of the steering table, where it is another one's
    (generations.py). A Config that captures nothing gives a plan with
    no table, rule or route. Raises ConfigError when the marks do not fit together, or for a name that is none.
    """
    marks, names = make_marks(config, surroundings.taken_marks), table_names(name)
    names = names._replace(steering=steering or names.steering)
    table, first = config.routing.table, config.routing.priority
    # NAT changes the destination to an address of this host, so there is nothing to be routed.
    families = surroundings.families if config.captures and not config.redirects else ()
    listen = listen_addresses(config)
    to_loopback = any(one.spoofs and one.targets_loopback for one in (config, *living))
    routes = tuple(
        LocalRoute(family=family, table=table, why="deliver what the rules below send here to this host")
        for family in families
    )
    rules = tuple(rule for family in families for rule in _rules(family, marks, first, table, to_loopback=to_loopback))
    tables = {}
    if config.captures:
        # What lives needs conntrack alone where NAT has brought it.
        make_table = redirecting_table if config.redirects else partial(steering_table, living=living)
        tables[names.steering] = make_table(
            config, marks, surroundings, name=names.steering, owned=owned, capturing=capturing
        )
        guard = guard_table(config, marks, surroundings, name=names.guard)
        if guard is not None:
            tables[names.guard] = guard
        if stays:
            tables[names.state] = state_table(names.state)
    return Plan(
        name=name,
        steering=names.steering,
        listen=tuple(
            (listen[family], config.listen.port) for family in (surroundings.sockets if config.captures else ())
        ),
        marks=marks,
        routes=routes,
        rules=rules,
        tables=tables,
        sysctls={},  # every way works with every setting (ruleset.py: answers of local apps are sent back by their addresses)
        ruleset=transaction(tables, names),
        # With `add` before it, `flush` succeeds where somebody has flushed the whole ruleset: capture is off there already. A table
        # with an owner cannot be flushed by others, nor added again.
        capture_off=(
            "" if owned else f"add table inet {names.steering}\nadd chain inet {names.steering} {CAPTURE_CHAIN}\n"
        )
        + f"flush chain inet {names.steering} {CAPTURE_CHAIN}\n",
        sources=_sources(config) if config.captures else (),
        losses=_losses(config, owned=owned) if config.captures and config.redirects else (),
    )


def _sources(config: Config) -> tuple[tuple[str, str], ...]:
    """Each case that `upstream.target` makes, and what is seen there as the client."""
    target, choose = config.upstream.target, compile_source(config)
    if isinstance(target, UnixPath):
        told = "its first bytes say who the client is" if config.upstream.proxy_protocol != "off" else _UNTOLD
        return ((str(target), f"nobody's address, being a Unix socket; {told}"),)

    def seen(is_local: bool, dialled_local: bool) -> str:
        choice = choose(client, dialled, fixed or dialled, is_local, dialled_local)
        return (
            choice.why if choice.ways else f'nobody, as upstream.source = "client" refuses it: it would be {choice.why}'
        )

    dialled = ("203.0.113.1", config.capture.taken_ports[0][0])
    client = "2001:db8::1" if isinstance(target, Endpoint) and ":" in target.host else "192.0.2.1"
    fixed = None
    if target == "original":
        return ("an app of this host", seen(True, True)), ("another host", seen(False, False))
    if target == "loopback":
        fixed = ("127.0.0.1", dialled[1])
        return (("127.0.0.1 or ::1", seen(True, True)),)
    fixed = (target.host, target.port)
    if ip_address(target.host).is_loopback:
        return ((str(target), seen(True, True)),)
    return (
        (f"{target}, if that is this host", seen(True, False)),
        (f"{target}, if that is another host", seen(False, False)),
        (f"{target}, if that is another host and the client has dialled this one", seen(False, True)),
    )


_UNTOLD = 'upstream.proxy_protocol = "v2" tells it who the client is'


def _losses(config: Config, *, owned: bool) -> tuple[str, ...]:
    losses = [
        'the client\'s address: whom tproxyd connects to sees the proxy\'s own (upstream.source = "auto" is "proxy")',
        "freedom from conntrack: two entries a connection, the client's and the upstream's, and while the table is full new connections "
        "are dropped",
        "listeners that the network does not reach: these are on every address, and who dials them is closed as self_call",
        "connections that arrive on an interface without an address of their family: the kernel drops them",
    ]
    if not owned and config.capture.when_down == "bypass":
        losses.append(UNOWNED_BYPASS)
    return tuple(losses)


def _rules(family: Family, marks: Marks, first: int, table: int, *, to_loopback: bool) -> tuple[Rule, ...]:
    # In the order in which they are added: a jump's target comes before the jump. Rules of one priority are about different packets.
    rules = [
        Rule(
            family=family,
            priority=first + 2,
            mark=marks.upstream,
            iif="lo",
            why="where the rule or route below is missing: not to the client, which knows no such connection and would reset it",
        ),
        Rule(
            family=family,
            priority=first,
            mark=marks.upstream,
            iif="lo",
            table=table,
            why="answers of a local app to an upstream socket that bears the client's address come back to us",
        ),
        Rule(
            family=family,
            priority=first,
            mark=marks.steering,
            iif="lo",
            goto=first + 2,
            why="keep reverse-path and output look-ups (both count as iif lo) away from the next rule: "
            "with src_valid_mark=1 they would see the local route and the packet would be dropped in silence",
        ),
        Rule(
            family=family,
            priority=first + 1,
            mark=marks.steering,
            iif=None,
            table=table,
            why="a steered packet is delivered to this host, whatever its destination address",
        ),
    ]
    if to_loopback:
        v4 = family == 4
        rules.insert(
            2,
            Rule(
                family=family,
                priority=first,
                source="127.0.0.0/8" if v4 else "::1/128",
                iif="lo",
                # IPv6 may send them by an interface, and the ruleset sends a firewall's resets back; so here are only those of sockets, and
                # not what NAT routes again, which says no protocol. IPv4 would find no way for the resets.
                tcp=not v4,
                table=table,
                why="answers of an app on a loopback address to a client's: they leave by no interface, so they can only be meant for us"
                if v4
                else "the same over IPv6, where there may be a way for a host's own address alone",
            ),
        )
    return tuple(rules)
