"""The data of a plan. Two plans with the same content are equal; nothing here knows how a plan is made or applied."""

from __future__ import annotations

from typing import Literal

import msgspec

from tproxyd.config import Mark

__all__ = ["Family", "LocalRoute", "Marks", "Plan", "Rule", "Surroundings"]

Family = Literal[4, 6]


class Marks(msgspec.Struct, frozen=True):
    """The two marks. `steering` sends a packet to our sockets; `upstream` tells our own connections over lo apart.

    They must differ: with tcp_fwmark_accept=1 a socket inherits the mark of its SYN, and a listener that answered with
    the steering mark would have its own SYN-ACK routed back to lo (every client times out).
    """

    steering: Mark
    upstream: Mark

    @property
    def bits(self) -> int:
        """All bits that are ours."""
        return self.steering.mask | self.upstream.mask


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan depends on besides the config: what the namespace can do in which it is applied.

    `families`: where IPv6 is switched off, nothing of IPv6 is steered. `sockets`: the families of which there can be sockets at all;
    listeners are opened for all of them, for IPv6 may be switched on later. `bridge_netfilter`: br_netfilter shows what arrives on
    bridges to the ruleset before its time, and it cannot be captured. `ssh_ports`: where the administrator reaches this host. `taken_marks`: the
    bits of packet marks that other programs use, as far as it is known; `auto` keeps away from them.
    """

    families: tuple[Family, ...] = (4, 6)
    sockets: tuple[Family, ...] = (4, 6)
    bridge_netfilter: bool = False
    ssh_ports: tuple[int, ...] = ()
    taken_marks: int = 0


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """One ip rule, for packets with a mark or from a network. `table` is looked up, or `goto` is the priority to jump to; with neither
    there is no way for them (`unreachable`). `tcp`: only for what a look-up says to be TCP, as those of sockets do."""

    family: Family
    priority: int
    mark: Mark | None = None
    source: str | None = None
    iif: str | None
    tcp: bool = False
    table: int | None = None
    goto: int | None = None
    why: str

    def selector(self) -> str:
        """The rule as `ip rule add` takes it, without the protocol."""
        words = [f"priority {self.priority}"]
        if self.source is not None:
            words.append(f"from {self.source}")
        if self.mark is not None:
            words.append(f"fwmark {self.mark}")
        if self.iif is not None:
            words.append(f"iif {self.iif}")
        if self.tcp:
            words.append("ipproto tcp")
        if self.goto is not None:
            words.append(f"goto {self.goto}")
        else:
            words.append("unreachable" if self.table is None else f"lookup {self.table}")
        return " ".join(words)


class LocalRoute(msgspec.Struct, frozen=True, kw_only=True):
    """`local default dev lo`: every address is ours, for packets that a rule sends to this table."""

    family: Family
    table: int
    why: str

    def selector(self) -> str:
        """The route as `ip route add` takes it, without the protocol."""
        return f"local default dev lo table {self.table}"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """All that the kernel should hold in one network namespace.

    `tables` maps a table's name to its body in the spelling of `nft -s list table`, so that what is observed can be
    compared with it. `routes` and `rules` are in the order in which they are added; the tables come last, in one
    transaction. `listen` is where the listeners have to be, as (address, port). `name`: what the tables' names begin with; `steering`: what
    the steering table is called, of which there may be one a generation.
    """

    name: str
    steering: str
    listen: tuple[tuple[str, int], ...]
    marks: Marks
    routes: tuple[LocalRoute, ...]
    rules: tuple[Rule, ...]
    tables: dict[str, str]
    sysctls: dict[str, str]
    ruleset: str
    capture_off: str
    """What makes the plan one that does not capture, without a moment in between."""
    sources: tuple[tuple[str, str], ...] = ()
    """Whom connections are made to, and what is seen there as the client."""
    losses: tuple[str, ...] = ()
    """What this mode of capture loses against tproxy, a line each."""
