"""Throwaway networks for tests: real kernels, real sockets, real programs, and nothing left behind.

`open_lab(GATEWAY)` gives a client, a gateway and a server in namespaces of their own; each Node runs programs, opens sockets
and shows what the kernel holds. `open_daemon(node, toml)` runs the real daemon in one. Needs root.

The pytest plugin (`tproxyd.testing.plugin`, loaded by pytest itself) makes fixtures of it, for tests that run under pytest-trio
(`pip install tproxyd[testing]`; `trio_mode = true` in pytest's configuration, or `@pytest.mark.trio` on each test):

    from tproxyd.testing import Lab, open_daemon, serve_echo

    async def test_it(gateway_lab: Lab, nursery):
        await nursery.start(serve_echo, gateway_lab["server"], 8080)
        async with open_daemon(gateway_lab["gateway"], '[capture]\\nports = ["8080"]\\n') as daemon:
            async with await gateway_lab["client"].connect("203.0.113.9", 8080) as stream:
                ...

Names are imported when they are first used: pytest loads the plugin, and with it this module, in every run of every user.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tproxyd.testing.build import LabError
    from tproxyd.testing.daemon import LabDaemon, open_daemon
    from tproxyd.testing.lab import Lab, open_lab
    from tproxyd.testing.node import Node
    from tproxyd.testing.peers import (
        Bound,
        Transfer,
        digest_of,
        payload,
        serve_echo,
        serve_identity,
        serve_sink,
        serve_source,
    )
    from tproxyd.testing.process import Finished, LabProcess
    from tproxyd.testing.state import KernelState, activate_conntrack, conntrack_count, read_state
    from tproxyd.testing.topology import GATEWAY, ROUTED, SIDECAR, Link, Route, Topology

_HOME = {
    "build": ("LabError",),
    "daemon": ("LabDaemon", "open_daemon"),
    "lab": ("Lab", "open_lab"),
    "node": ("Node",),
    "peers": (
        "Bound",
        "Transfer",
        "digest_of",
        "payload",
        "serve_echo",
        "serve_identity",
        "serve_sink",
        "serve_source",
    ),
    "process": ("Finished", "LabProcess"),
    "state": ("KernelState", "activate_conntrack", "conntrack_count", "read_state"),
    "topology": ("GATEWAY", "ROUTED", "SIDECAR", "Link", "Route", "Topology"),
}

__all__ = [
    "GATEWAY",
    "ROUTED",
    "SIDECAR",
    "Bound",
    "Finished",
    "KernelState",
    "Lab",
    "LabDaemon",
    "LabError",
    "LabProcess",
    "Link",
    "Node",
    "Route",
    "Topology",
    "Transfer",
    "activate_conntrack",
    "conntrack_count",
    "digest_of",
    "open_daemon",
    "open_lab",
    "payload",
    "read_state",
    "serve_echo",
    "serve_identity",
    "serve_sink",
    "serve_source",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"tproxyd.testing.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
