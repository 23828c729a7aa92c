"""The configuration: files or a mapping become one frozen Config, or one error that lists every problem.

Pure but for reading the files: knows nothing of the kernel, of marks that are in use, or of what a value leads to. What reads files
is imported when it is first used: a relay process gets its Config ready-made, and needs the types alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tproxyd.config.schema import (
    Admin,
    Capture,
    Config,
    Drain,
    Limits,
    Listen,
    Log,
    Policy,
    PolicyRule,
    Relay,
    Routing,
    Upstream,
)
from tproxyd.config.values import Endpoint, Mark, Network, PortRange, UnixPath, is_interface

if TYPE_CHECKING:
    from tproxyd.config.load import DEFAULT_FILE, config_from_mapping, load_config, override

__all__ = [
    "DEFAULT_FILE",
    "Admin",
    "Capture",
    "Config",
    "Drain",
    "Endpoint",
    "Limits",
    "Listen",
    "Log",
    "Mark",
    "Network",
    "Policy",
    "PolicyRule",
    "PortRange",
    "Relay",
    "Routing",
    "UnixPath",
    "Upstream",
    "config_from_mapping",
    "is_interface",
    "load_config",
    "override",
]


def __getattr__(name: str) -> Any:
    if name in ("DEFAULT_FILE", "config_from_mapping", "load_config", "override"):
        return getattr(import_module("tproxyd.config.load"), name)
    raise AttributeError(f"module 'tproxyd.config' has no attribute {name!r}")
