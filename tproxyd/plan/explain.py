"""What happens to the first packet of a connection, step by step, and which rule decides: the way of the ruleset, walked in Python.

The kernel's part is asked of the very rules from which nft has its text (selectors, ruleset.take_rules), the daemon's part of the
function that decides about connections (policy). What only the machine can say is handed in: what its routing does with the packet,
whether anybody listens, which tables there are. Refuses to know how the machine is asked, and what other programs' rules do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import msgspec

from tproxyd.config import Config, Endpoint, UnixPath
from tproxyd.plan.model import Surroundings
from tproxyd.plan.plan import make_plan
from tproxyd.plan.ruleset import GUARD, STEERING, listen_addresses, match_mark, take_rules
from tproxyd.plan.selectors import (
    CAPTURE_CHAIN,
    GUARD_TAKE,
    LOOPBACK,
    OPENS,
    Packet,
    Selector,
    arrival_rules,
    capture_rules,
)
from tproxyd.plan.sets import element_of, has_all_ports
from tproxyd.policy import Verdict, Way, compile_policy, compile_source

__all__ = ["Explanation", "Foreseen", "Machine", "Route", "Seen", "Stage", "explain"]

Foreseen = Literal[
    "forwarded",
    "refused_by_policy",
    "self_call",
    "upstream_unreachable",
    "upstream_timeout",
    "refused_special",
    "refused_when_down",
    "given_to_another",
    "bypassed",
    "dropped",
]
"""What becomes of a connection. The first is `closed` in the access log, if all goes well; the next four are called so there, too. The
rest are the kernel's: a reset in place of a special destination, or because nobody took what was selected; given to a program that
listens where `tproxyd apply` brings connections; on its way as if tproxyd were not there; lost in this host's routing."""


Seen = Literal["client", "client_ip", "given", "proxy"]
"""What an upstream sees as the client: its address and port, as far as that port can be had; its address, from another port; an address
of `upstream.source`; this host."""

_SEEN: dict[Way, Seen] = {
    "client": "client",
    "client_ip": "client_ip",
    "chosen_port": "client_ip",
    "pool": "given",
    "proxy": "proxy",
}

_SELF_CALL = "is the destination, or the client, this daemon?"
# Whom it would speak for, and what they dialled, nobody can foresee; and the kernel is asked about the packet that arrives.
_WITHOUT_ADDRESSES = " (with a PROXY header without addresses; one with addresses is decided about by these)"


class Route(NamedTuple):
    """What routing does with a packet: kind "local" (delivered here; `error`: an app could not answer), "unicast" and the like (leaves by
    `interface`, on `to_bridge` a bridge), or "" (dropped, and why in `error`). `rule` is another program's ip rule that takes it before ours."""

    kind: str
    interface: str = ""
    error: str = ""
    to_bridge: bool = False
    rule: str = ""


class Machine(NamedTuple):
    """What the machine says.

    `arrives(mark)`: what its routing does with the packet in question, bearing this mark; `leaves(host, port)`: with a packet of its own to
    there, port 0 being any. `listening`: whether there is a listener of the packet's family, `listener`: whose, if it is no tproxyd's. `capturing`: not so while a daemon drains. `tables`:
    the names of our tables in the kernel; None if it could not be asked, and they are taken to be as planned.
    `steering`: which of them captures.
    """

    arrives: Callable[[int], Route]
    leaves: Callable[[str, int], Route]
    listening: bool = True
    capturing: bool = True
    tables: frozenset[str] | None = None
    listener: str | None = None
    steering: str = STEERING


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """A step on the way: where, which rule or question, whether it applies, what was found, and whether that decides."""

    where: str
    rule: str
    matches: bool
    because: str
    decides: bool = False


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """The whole account.

    `kernel_rule` is the stage that decided in the kernel. As in the access log, `rule` is the name of the policy rule that decided then (None:
    the default, or it did not come to that), and `upstream` where it is connected to; `upstream_source` is as whom.
    """

    outcome: Foreseen
    what: str
    kernel_rule: Stage
    rule: str | None
    upstream: str | None
    upstream_source: Seen | None
    stages: tuple[Stage, ...]


def explain(config: Config, surroundings: Surroundings, packet: Packet, machine: Machine) -> Explanation:
    """What happens to this packet where the kernel holds the plan for this Config. Raises what make_plan and `machine` raise."""
    return _Account(config, surroundings, packet, machine).explain()


class _Account:
    """The stages so far. `decide` says that the last one of them settles what the kernel, or the policy, has to say."""

    def __init__(self, config: Config, surroundings: Surroundings, packet: Packet, machine: Machine) -> None:
        self.config, self.surroundings, self.packet, self.machine = config, surroundings, packet, machine
        self.plan = make_plan(config, surroundings=surroundings)
        self.marks = self.plan.marks
        self.steering = machine.steering
        self.listener = Endpoint(listen_addresses(config)[packet.family], config.listen.port)
        self.destination = Endpoint(str(packet.destination), packet.port)
        self.stages: list[Stage] = []
        self.kernel_rule: Stage | None = None
        self.waits_for_header = False

    def explain(self) -> Explanation:
        if not self.config.captures:
            self.add("configuration", "capture", True, "nothing is captured: it names no ports, or its mode is off")
            return self.bypassed()
        if self.packet.interface is None:
            self.add("prerouting", "(nothing arrives)", True, "this host sends it elsewhere; captured is what arrives")
            return self.bypassed()
        arrived = self.walk(self.steering, "intercept", arrival_rules(self.config, self.surroundings))
        if arrived is not None and arrived.verdict == OPENS.verdict:
            chosen = self.walk(self.steering, CAPTURE_CHAIN, capture_rules(self.config, self.surroundings))
            if chosen is not None and chosen.verdict == "goto take":
                return self.selected()
            if chosen is None:
                self.add(
                    f"inet {self.steering} {CAPTURE_CHAIN}", "(end of the chain)", True, "not a captured destination"
                )
        return self.not_taken()

    # In the kernel.

    def selected(self) -> Explanation:
        take = f"inet {self.steering} take"
        rules = take_rules(self.config, self.marks, self.surroundings.families)
        if not self.is_held(self.steering):
            self.add(f"inet {self.steering}", "(the table)", False, "is not in the kernel: nothing is steered")
        elif not self.machine.capturing:
            self.add(f"inet {self.steering} {CAPTURE_CHAIN}", "(the chain)", False, "is empty while the daemon stops")
        elif not any(rule.test(self.packet).matches for rule in rules):
            self.add(
                take, "(end of the chain)", True, f"IPv{self.packet.family} is switched off here: nothing is steered"
            )
        elif not self.machine.listening and not self.config.redirects:
            tproxy = next(rule for rule in reversed(rules) if rule.test(self.packet).matches)
            self.add(take, tproxy.match, False, f"nobody listens on {self.listener}: the rule breaks off")
        else:
            taken = self.walk(self.steering, "take", rules)
            self.decide()
            if taken is not None and "reject" in taken.verdict:
                what = "a special destination, which is never relayed unless policy.allow_special lists it"
                return self.end("refused_special", f"reset by the kernel: {what}")
            return self.redirected() if self.config.redirects else self.steered()
        return self.not_taken()

    def redirected(self) -> Explanation:
        nat = f"{match_mark(self.marks.steering)} redirect to :{self.listener.port}"
        self.add(
            f"inet {self.steering} divert", nat, True, "NAT brings it here, unless another program's NAT comes first"
        )
        if self.machine.listening:
            return self.accepted()
        self.add("listener", str(self.listener), False, "nobody listens, and NAT does not look for that")
        return self.end("refused_when_down", "reset by the kernel: it is brought to a port where nobody listens")

    def steered(self) -> Explanation:
        packet, mark = self.packet, self.marks.steering
        route = self.machine.arrives(mark.value)
        here = route.kind == "local"
        if route.rule:
            self.add("ip rule", route.rule, True, "of another program: it comes before ours, and takes the packet")
            self.decide()
            return self.end(
                "dropped", f"not delivered to the listener: another program's ip rule takes it: {route.rule}"
            )
        if packet.destination_type == "local":
            self.add("ip rule", "priority 0 lookup local", here, f"{packet.destination} is an address of this host")
        else:
            rule = next(rule for rule in self.plan.rules if rule.family == packet.family and rule.iif is None)
            self.add("ip rule", rule.selector(), here, f"the packet bears {mark}")
            local = next(route for route in self.plan.routes if route.family == packet.family)
            self.add("route", local.selector(), here, "to this host" if here else "it is not delivered to this host")
        if here:
            return self.accepted()
        if not route.kind:
            self.add("routing", f"from {packet.source} on {packet.interface}", True, route.error)
        else:
            # It does not come as far as the chain `stray`: what tproxy has given a socket is not forwarded.
            missing = f"our ip rule or route is missing: it would leave by {route.interface}"
            self.add("routing", f"from {packet.source} on {packet.interface}", True, missing)
        self.decide()
        return self.end("dropped", f"steered, and then dropped by the kernel: {self.stages[-1].because}")

    def not_taken(self) -> Explanation:
        """What the steering table has let off, or could give to nobody: is there a guard that refuses it?"""
        if self.config.capture.when_down == "refuse" and self.is_guarded():
            guard = f"{GUARD_TAKE.match} {GUARD_TAKE.verdict}"
            if self.is_held(GUARD):
                self.add(f"inet {GUARD} take", guard, True, "selected, and nobody has taken it")
                self.decide()
                return self.end("refused_when_down", 'reset by the kernel: when_down is "refuse", and nobody takes it')
            self.add(f"inet {GUARD} take", guard, False, "the table is not in the kernel, so when_down is not in force")
        return self.bypassed()

    def is_guarded(self) -> bool:
        """Whether the guard's chains select the packet: the same rules, but for what only the steering table lets off."""
        if LOOPBACK.test(self.packet).matches or not OPENS.test(self.packet).matches:
            return False
        if self.stays_on_bridges():
            return False
        chosen = next(
            (rule for rule in capture_rules(self.config, self.surroundings) if rule.test(self.packet).matches), None
        )
        return chosen is not None and chosen.verdict == "goto take"

    def stays_on_bridges(self) -> bool:
        """Whether it is none of what the guard refuses of that which arrives on a bridge, while br_netfilter is on: what is for this host,
        and what leaves by another interface than a bridge."""
        if self.config.redirects or not (self.surroundings.bridge_netfilter and self.packet.on_bridge):
            return False
        route = self.machine.arrives(0)
        return not route.kind or route.to_bridge

    def bypassed(self) -> Explanation:
        self.decide()
        packet = self.packet
        if packet.interface is None:
            where = "it leaves this host"
        elif self.config.redirects and self.machine.listening and self.is_dialled_directly():
            return self.accepted()
        elif packet.interface == "lo":
            if self.machine.listening and self.destination == self.listener:
                return self.accepted()
            where = "it is delivered to this host"
        elif packet.destination_type not in ("unicast", "local"):
            where = f"it is left to the kernel, as {packet.destination_type}"
        else:
            route = self.machine.arrives(0)
            if not route.kind:
                where = f"this host's routing drops it ({route.error})"
            elif route.kind == "local":
                where = "it is delivered to this host" + (f" ({route.error})" if route.error else "")
            else:
                where = f"it is forwarded through {route.interface}"
        return self.end("bypassed", f"not captured: {where}, as if tproxyd were not there")

    def is_dialled_directly(self) -> bool:
        """Whether it goes to a listener on every address, as it is."""
        packet = self.packet
        is_here = packet.destination_type == "local" or self.machine.arrives(0).kind == "local"
        return packet.protocol == "tcp" and packet.port == self.listener.port and is_here

    # In the daemon, as in datapath/connection.py.

    def accepted(self) -> Explanation:
        packet, stranger = self.packet, self.machine.listener
        if stranger is not None:
            self.add("listener", str(self.listener), True, f"is that of {stranger}, not of tproxyd", decides=True)
            return self.end("given_to_another", f"given to {stranger}; what it does is its own policy")
        self.add("listener", str(self.listener), True, f"accepts it; the original destination is {self.destination}")
        if self.is_listener(self.destination):
            return self.self_call("the destination is the listener itself")
        if self.is_local(str(packet.source)):
            return self.self_call(f"{packet.source} is an address of this host: a connection of ours that came back")
        self.add("self-call", _SELF_CALL, False, "neither is")
        trusted = element_of(self.config.listen.proxy_protocol_from, packet.source)
        if trusted is not None:
            self.waits_for_header = True
            rule = f"listen.proxy_protocol_from has {trusted}"
            self.add(
                "PROXY header",
                rule,
                True,
                "waited for, and reset without one; its addresses count from here on, if it has any",
            )
        verdict = compile_policy(self.config.policy)(str(packet.source), str(packet.destination), packet.port)
        self.add("policy", *self.policy_words(verdict), decides=True)
        if verdict.action == "refuse":
            return self.end("refused_by_policy", f"reset by the daemon: {self.stages[-1].rule}", verdict)
        target = self.target_of(verdict)
        if isinstance(target, UnixPath):
            because = "a Unix socket, where connections have no addresses"
            self.add("dial", str(target), True, because)
            return self.end("forwarded", f"relayed to {target}: {because}", verdict, target)
        if target != self.destination and self.is_listener(target):
            by = "the rule" if verdict.target is not None else "upstream.target"
            return self.self_call(f"{by} forwards to the listener itself", verdict)
        return self.dialled(verdict, target)

    def target_of(self, verdict: Verdict) -> Endpoint | UnixPath:
        if verdict.target is not None:
            return Endpoint(*verdict.target)
        target = self.config.upstream.target
        if target == "original":
            return self.destination
        if target == "loopback":
            return Endpoint("::1" if self.packet.family == 6 else "127.0.0.1", self.packet.port)
        return target

    def policy_words(self, verdict: Verdict) -> tuple[str, bool, str]:
        policy, packet = self.config.policy, self.packet
        rule = next((rule for rule in policy.rule if rule.name == verdict.rule), None)
        if rule is None:
            if verdict.action != policy.default:
                return "special destinations", True, "refused unless policy.allow_special lists them"
            return f'default = "{policy.default}"', True, "no rule matches" if policy.rule else "there is no rule"
        found = [
            f"{name} has {element_of(elements, value)}"
            for name, elements, value in (
                ("sources", rule.sources, packet.source),
                ("destinations", rule.destinations, packet.destination),
                ("ports", () if has_all_ports(rule.ports) else rule.ports, packet.port),
            )
            if elements
        ]
        action = rule.action if isinstance(rule.action, str) else f"forward to {rule.action}"
        return (
            f'rule "{rule.name}": {action}',
            True,
            f"the first that matches: {', '.join(found) or 'it takes every one'}",
        )

    def dialled(self, verdict: Verdict, upstream: Endpoint) -> Explanation:
        route = self.machine.leaves(upstream.host, upstream.port)
        if not route.kind:
            self.add("dial", str(upstream), False, route.error)
            what = f"reset by the daemon: there is no way to {upstream} ({route.error})"
            return self.end("upstream_unreachable", what, verdict)
        if route.error:
            self.add("dial", str(upstream), False, route.error)
            what = f"reset by the daemon after connect_timeout: {route.error}"
            return self.end("upstream_timeout", what, verdict, upstream)
        dialled = (self.destination.host, self.destination.port)
        choice = compile_source(self.config)(
            str(self.packet.source),
            dialled,
            dialled if upstream == self.destination else (upstream.host, upstream.port),
            route.kind == "local",
            self.is_local(self.destination.host),
        )
        if not choice.ways:
            self.add("dial", str(upstream), False, f"it would see {choice.why}", decides=True)
            what = f'reset by the daemon: upstream.source = "client", but {upstream} would see {choice.why}'
            return self.end("refused_by_policy", what, verdict)
        self.add("dial", str(upstream), True, f"it sees {choice.why}")
        return self.end(
            "forwarded", f"relayed to {upstream}, which sees {choice.why}", verdict, upstream, _SEEN[choice.ways[0]]
        )

    def self_call(self, because: str, verdict: Verdict | None = None) -> Explanation:
        self.add("self-call", _SELF_CALL, True, because, decides=True)
        return self.end("self_call", f"reset by the daemon: {because}", verdict)

    # What is asked along the way.

    def is_held(self, table: str) -> bool:
        return self.machine.tables is None or table in self.machine.tables

    def is_local(self, host: str) -> bool:
        return self.machine.leaves(host, 0).kind == "local"

    def is_listener(self, address: Endpoint) -> bool:
        return address.port == self.config.listen.port and (
            address.host in listen_addresses(self.config).values() or self.is_local(address.host)
        )

    # The account itself.

    def add(self, where: str, rule: str, matches: bool, because: str, *, decides: bool = False) -> None:
        self.stages.append(Stage(where=where, rule=rule, matches=matches, because=because, decides=decides))

    def decide(self) -> None:
        self.kernel_rule = self.stages[-1] = msgspec.structs.replace(self.stages[-1], decides=True)

    def walk(self, table: str, chain: str, rules: Sequence[Selector]) -> Selector | None:
        """Adds a stage for each rule that is about such packets, up to the first that matches."""
        for rule in rules:
            finding = rule.test(self.packet)
            if finding.because:
                self.add(f"inet {table} {chain}", f"{rule.match} {rule.verdict}".lstrip(), *finding)
            if finding.matches:
                return rule
        return None

    def end(
        self,
        outcome: Foreseen,
        what: str,
        verdict: Verdict | None = None,
        upstream: Endpoint | UnixPath | None = None,
        source: Seen | None = None,
    ) -> Explanation:
        assert self.kernel_rule is not None
        return Explanation(
            outcome=outcome,
            what=what + _WITHOUT_ADDRESSES if self.waits_for_header else what,
            kernel_rule=self.kernel_rule,
            rule=verdict.rule if verdict is not None else None,
            upstream=str(upstream) if upstream is not None else None,
            upstream_source=source,
            stages=tuple(self.stages),
        )
