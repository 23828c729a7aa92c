"""Pure: what a config needs of which capability, in which process. docs/privileges.md has the same as a table, with the call that fails without.

Processes that relay hold nothing but what they use. The one that starts them, and starts them anew when they die, holds that, too.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from tproxyd.config import Config, UnixPath

__all__ = ["Need", "needs_of", "relay_capabilities"]


class Need(NamedTuple):
    """`purpose` needs `capability` in this process. Where it is not `required`, there is something that works less well without: `instead`."""

    capability: str
    process: Literal["daemon", "relay"]
    purpose: str
    instead: str = ""

    @property
    def required(self) -> bool:
        return not self.instead

    @property
    def of_root(self) -> bool:
        """Whether it stands for files: a user is given those instead."""
        return self.capability.startswith("CAP_DAC_")


def needs_of(config: Config, *, workloads: bool = False, unprivileged_from: int = 1024) -> tuple[Need, ...]:
    """All of them, in the order in which they are told. `workloads`: namespaces other than the own one are to be served. `unprivileged_from` is the first
    port that anybody may bind to."""
    relay: Literal["daemon", "relay"] = "relay" if config.relay.workers != 0 else "daemon"
    needs = [Need("CAP_NET_ADMIN", "daemon", "capturing connections (tables, ip rules and routes)")]
    if relay == "relay" and not config.redirects:
        # Who has CAP_NET_ADMIN may do the same, and a loop in its process does with that.
        needs.append(Need("CAP_NET_RAW", "relay", "a transparent socket in a relay process"))
    if config.listen.port < unprivileged_from:
        needs.append(Need("CAP_NET_BIND_SERVICE", "daemon", f"`listen.port` = {config.listen.port}"))
    metrics = config.admin.metrics
    if metrics is not None and metrics.port < unprivileged_from:
        needs.append(Need("CAP_NET_BIND_SERVICE", "daemon", f'`admin.metrics` = "{metrics}"'))
    if not config.redirects and config.upstream.source in ("client", "auto") and unprivileged_from > 1:
        instead = "such a client is seen with another port" if config.upstream.source == "auto" else ""
        purpose = f'a client\'s port below {unprivileged_from} (`upstream.source` = "{config.upstream.source}")'
        needs.append(Need("CAP_NET_BIND_SERVICE", relay, purpose, instead))
    if isinstance(config.upstream.target, UnixPath):
        instead = "the daemon has to be one who may write to it"
        needs.append(Need("CAP_DAC_OVERRIDE", relay, "a Unix socket that belongs to another user", instead))
    if workloads:
        purpose = "going into the network namespaces of workloads"
        needs += [Need("CAP_SYS_ADMIN", process, purpose) for process in dict.fromkeys(("daemon", relay))]
    return tuple(needs)


def relay_capabilities(config: Config) -> tuple[str, ...]:
    """What a relay process keeps of what its program has: also what a workload may need that comes later, with another config. A daemon has
    given up before what it will not need, and an embedding program is not asked to."""
    others = isinstance(config.upstream.target, UnixPath)
    return ("CAP_NET_RAW", "CAP_NET_BIND_SERVICE", "CAP_SYS_ADMIN", *(("CAP_DAC_OVERRIDE",) if others else ()))
