"""tproxyd: transparent interception for Linux, with nft TPROXY and without conntrack.

The public names, imported when they are first used: reading a config needs neither trio nor pyroute2.

    load_config, config_from_mapping    a file or a mapping becomes a frozen Config
    make_plan, render                   a Config becomes what the kernel should hold, and its text
    TproxydError and its branches       what is raised on purpose
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tproxyd.config import Config, config_from_mapping, load_config
    from tproxyd.errors import CapabilityError, ConfigError, KernelError, MissingError, TproxydError, UsageError
    from tproxyd.plan import Plan, make_plan, render

__all__ = [
    "CapabilityError",
    "Config",
    "ConfigError",
    "KernelError",
    "MissingError",
    "Plan",
    "TproxydError",
    "UsageError",
    "__version__",
    "config_from_mapping",
    "load_config",
    "make_plan",
    "render",
]

__version__ = "0.1.0"

_HOME = {
    "tproxyd.config": ("Config", "config_from_mapping", "load_config"),
    "tproxyd.errors": ("CapabilityError", "ConfigError", "KernelError", "MissingError", "TproxydError", "UsageError"),
    "tproxyd.plan": ("Plan", "make_plan", "render"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'tproxyd' has no attribute {name!r}")
