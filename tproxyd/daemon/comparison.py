"""What would be planned for this namespace, and what it holds: for `plan`, `plan --diff`, `apply`, `status`, `explain` and `doctor`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from tproxyd import kernel
from tproxyd.config import Config
from tproxyd.config.wording import printable
from tproxyd.errors import MissingError
from tproxyd.net.capabilities import require_capabilities
from tproxyd.net.sockets import format_address
from tproxyd.plan import (
    STATE,
    SUPPORTED_MARKS,
    Plan,
    Surroundings,
    is_owned,
    make_plan,
    match_mark,
    serving_generation,
    spared_in,
    unified_diff,
)

__all__ = [
    "DIFFERENT",
    "Comparison",
    "KernelView",
    "compare",
    "diff_against",
    "diff_kernel",
    "kernel_view",
    "open_nft",
    "session_ports",
    "ssh_ports_here",
    "surroundings_here",
]

DIFFERENT = 3
"""Exit code: what is there is not what is planned."""


class Comparison(msgspec.Struct, frozen=True):
    """What a config plans here, what there is, and what would have to change."""

    plan: Plan
    observed: kernel.Observed
    expected: kernel.Observed
    changes: list[kernel.Change]


class KernelView(msgspec.Struct, frozen=True):
    """What of ours there is, and what it is to be compared with: the config in which `auto` means the marks in use, the surroundings with
    the SSH ports that are spared. `served`: a daemon keeps it."""

    config: Config
    surroundings: Surroundings
    observed: kernel.Observed
    served: bool

    def plan(self, *, capturing: bool = True) -> Plan:
        """What would be there on the same occasion: a daemon owns its steering table and leaves no word that it is to stay, unless
        `tproxyd apply` was here before it."""
        name = serving_generation(self.observed.tables)
        steering = self.observed.tables.get(name)
        return make_plan(
            self.config,
            surroundings=self.surroundings,
            stays=not self.served or STATE in self.observed.tables,
            owned=self.served and (steering is None or is_owned(steering)),
            capturing=capturing,
            steering=name,
        )


def session_ports() -> set[int]:
    """The port of this host at which the SSH session arrives that this runs in, if it runs in one and sudo has not dropped it."""
    words = os.environ.get("SSH_CONNECTION", "").split()  # client, its port, server, its port
    return {int(words[3])} if len(words) == 4 and words[3].isdecimal() and int(words[3]) <= 65535 else set()


def ssh_ports_here() -> set[int]:
    """Where the administrator reaches this host by SSH, as far as it can be seen."""
    return {*kernel.find_ssh_ports(), *session_ports()}


def surroundings_here(config: Config) -> Surroundings:
    """What a plan depends on in this namespace, for a verb that a user types."""
    return kernel.look_ahead(config, ssh_ports=ssh_ports_here())


@contextmanager
def open_nft() -> Iterator[kernel.Nft]:
    """The library where there is one: only it can list, in a namespace of its own, a table that goes with its owner. Raises MissingError."""
    kernel.require_nf_tables()
    try:
        library = kernel.Library()
    except MissingError:
        yield kernel.Program()
        return
    with library:
        yield library


def kernel_view(config: Config, observed: kernel.Observed, *, served: bool) -> KernelView:
    """What is there, seen as whoever put it there would: `served` is whether a daemon did.

    Who else uses which marks by now is a question for the next start, and a daemon knows of the SSH ports that it saw at its own.
    """
    surroundings = surroundings_here(config)
    steering = observed.tables.get(serving_generation(observed.tables))
    served = served or (steering is not None and is_owned(steering))
    if served and steering is not None:
        surroundings = msgspec.structs.replace(surroundings, ssh_ports=spared_in(steering))
    return KernelView(_with_held_marks(config, observed), surroundings, observed, served)


def compare(config: Config, *, served: bool) -> Comparison:
    """A config's plan and the kernel; `served` is whether a daemon does. Raises MissingError, CapabilityError or KernelError."""
    with open_nft() as nft:
        observed = kernel.observe(nft)
        plan = kernel_view(config, observed, served=served).plan()
        return Comparison(plan, observed, kernel.expected(plan, observed, nft), kernel.differences(plan, observed, nft))


def diff_kernel(config: Config) -> int:
    """Prints what would have to change in the kernel, and gives DIFFERENT if that is anything."""
    from tproxyd.daemon.lock import find_holder  # late: it brings trio, which `tproxyd plan` does without

    require_capabilities("looking at the ruleset", ("CAP_NET_ADMIN",))
    holder = find_holder()
    found = compare(config, served=holder is not None and holder.trusted)
    observed = kernel.without_others(found.observed, found.plan.steering, found.plan.name)
    before, after = kernel.sections(observed), kernel.sections(found.expected)
    return _print(unified_diff(before, after, names=("kernel", "plan")), "no difference: the kernel holds the plan")


def diff_against(config: Config, other: Config, path: Path) -> int:
    """Prints what the config plans otherwise than another one, which the path names, and gives DIFFERENT if that is anything."""
    surroundings = surroundings_here(config)
    one, two = (
        {
            "listeners": [format_address(address) for address in plan.listen],
            **kernel.sections(kernel.planned(plan)),
            "sysctls": [f"{name} = {value}" for name, value in plan.sysctls.items()],
        }
        for plan in (make_plan(content, surroundings=surroundings) for content in (other, config))
    )
    return _print(unified_diff(one, two, names=(f"plan of {path}", "plan")), "no difference: the plans are the same")


def _print(diff: str, same: str) -> int:
    sys.stdout.write(printable(diff or same + "\n", keep="\n\t"))
    return DIFFERENT if diff else os.EX_OK


def _with_held_marks(config: Config, observed: kernel.Observed) -> Config:
    held = {(value, mask) for _, _, value, mask, *_ in observed.rules}
    text = "" if held else observed.tables.get(serving_generation(observed.tables), "")  # redirect mode has no ip rules
    for steering, upstream in SUPPORTED_MARKS:
        both = {(steering.value, steering.mask), (upstream.value, upstream.mask)}
        if both <= held or match_mark(steering) in text:
            routing = msgspec.structs.replace(
                config.routing,
                mark=steering if config.routing.mark == "auto" else config.routing.mark,
                upstream_mark=upstream if config.routing.upstream_mark == "auto" else config.routing.upstream_mark,
            )
            return msgspec.structs.replace(config, routing=routing)
    return config
