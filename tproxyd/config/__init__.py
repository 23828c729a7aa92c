"""The configuration: files or a mapping become one frozen Config, or one error that lists every problem.

Pure but for reading the files: knows nothing of the kernel, of marks that are in use, or of what a value leads to.
"""

from tproxyd.config.load import DEFAULT_FILE, config_from_mapping, load_config
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
from tproxyd.config.values import Endpoint, Mark, Network, PortRange

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
    "Upstream",
    "config_from_mapping",
    "load_config",
]
