"""tproxyd: transparent interception for Linux, with nft TPROXY and without conntrack.

The public names, imported when they are first used: reading a config needs neither trio nor pyroute2.

    load_config, config_from_mapping    a file or a mapping becomes a frozen Config
    make_plan, render                   a Config becomes what the kernel should hold, and its text
    open_interceptor                    captures, and serves what is captured, in a trio program
    Workload, Event                     a network namespace that is captured, and what happens to it
    Connection; Forward, Refuse, Handle, HandOff    what its policy is asked, and may answer
    receive_connections                 what is handed off, in another process
    LivingConnection                    what there is to know of one while it lives
    Record, Outcome, Counters           what a connection leaves behind, and all of them together
    TproxydError and its branches       what is raised on purpose
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tproxyd.config import Config, config_from_mapping, load_config
    from tproxyd.datapath import Counters, LivingConnection, Outcome, Record
    from tproxyd.errors import CapabilityError, ConfigError, KernelError, MissingError, TproxydError, UsageError
    from tproxyd.interceptor import Event, Interceptor, Workload, open_interceptor
    from tproxyd.plan import Plan, make_plan, render
    from tproxyd.proxy import Connection, ConnectionStream, Forward, Handle, HandOff, Refuse, receive_connections

__all__ = [
    "CapabilityError",
    "Config",
    "ConfigError",
    "Connection",
    "ConnectionStream",
    "Counters",
    "Event",
    "Forward",
    "HandOff",
    "Handle",
    "Interceptor",
    "KernelError",
    "LivingConnection",
    "MissingError",
    "Outcome",
    "Plan",
    "Record",
    "Refuse",
    "TproxydError",
    "UsageError",
    "Workload",
    "__version__",
    "config_from_mapping",
    "load_config",
    "make_plan",
    "open_interceptor",
    "receive_connections",
    "render",
]

__version__ = "0.1.0"

_HOME = {
    "tproxyd.config": ("Config", "config_from_mapping", "load_config"),
    "tproxyd.errors": ("CapabilityError", "ConfigError", "KernelError", "MissingError", "TproxydError", "UsageError"),
    "tproxyd.datapath": ("Counters", "LivingConnection", "Outcome", "Record"),
    "tproxyd.interceptor": ("Event", "Interceptor", "Workload", "open_interceptor"),
    "tproxyd.plan": ("Plan", "make_plan", "render"),
    "tproxyd.proxy": (
        "Connection",
        "ConnectionStream",
        "Forward",
        "HandOff",
        "Handle",
        "Refuse",
        "receive_connections",
    ),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'tproxyd' has no attribute {name!r}")
