"""What tproxyd raises.

One root, few branches. Every message is one sentence that names what was tried, the value seen, the likely cause and
a way out, because it is shown to the user as it is. A broken connection is not an error: it becomes an outcome in the
access log. `exit_code` is what the command line ends with (sysexits.h), so the mapping stands beside the meaning.
"""

from __future__ import annotations

import os

__all__ = ["CapabilityError", "ConfigError", "KernelError", "MissingError", "TproxydError", "UsageError"]


class TproxydError(Exception):
    """Root of everything that tproxyd raises on purpose; never raised itself."""

    exit_code: int = os.EX_SOFTWARE

    def __new__(cls, *args: object) -> TproxydError:
        if cls is TproxydError:
            raise TypeError("raise one of the branches of TproxydError, not the root")
        return super().__new__(cls, *args)


class UsageError(TproxydError):
    """The command line asks for something that does not exist or does not fit together (64)."""

    exit_code = os.EX_USAGE


class ConfigError(TproxydError):
    """The configuration cannot be used (78). `problems` has one sentence a problem, all of them at once."""

    exit_code = os.EX_CONFIG

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


class MissingError(TproxydError):
    """A program, kernel feature or daemon that is needed is not there (69)."""

    exit_code = os.EX_UNAVAILABLE


class KernelError(TproxydError):
    """The kernel refused a step: a port in use, a rule it does not take (71)."""

    exit_code = os.EX_OSERR


class CapabilityError(TproxydError):
    """The process lacks a capability (77)."""

    exit_code = os.EX_NOPERM
