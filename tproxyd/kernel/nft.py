"""The nft program: load a text in one transaction, list our tables. Knows nothing of what the text means.

A child process costs about 12 ms a call. The library would be faster, but the text given to nft is the text that a user
can give to nft, and the errors are the ones that a user can look up.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess

from tproxyd.errors import CapabilityError, KernelError, MissingError
from tproxyd.net.namespaces import call_in_namespace, new_namespace

__all__ = ["check", "list_names", "list_tables", "load", "nft_version", "spelled", "without_traffic"]

# The flags of a set whose elements come and go with the traffic, and those elements.
_DYNAMIC = re.compile(r"(flags [^\n]*\bdynamic\b[^}]*?\n)\s*elements = \{[^}]*\}\n")
_OURS = re.compile(r"tproxyd(_.*)?")
# How a rule that needs a kernel module begins to use it. Not bare words: "tproxy" is also the beginning of our tables' names.
_MODULES = (
    (r"\btproxy ip6? to\b", "nft_tproxy"),
    (r"\bsocket (transparent|wildcard)\b", "nft_socket"),
    (r"\bfib daddr\b", "nft_fib_inet"),
    (r"\breject with\b", "nft_reject_inet"),
)
_SYSTEM_PATH = "/usr/sbin:/sbin:/usr/local/sbin:/usr/bin:/bin"
# A hung nft would hang the daemon's start and stop; its largest transactions take well under a second.
_TIMEOUT = 30.0


def load(text: str) -> None:
    """Loads a text as one transaction: all of it or, with an error raised, nothing."""
    _run("-f", "-", text=text)


def check(text: str) -> None:
    """Raises what `load` would raise, and changes nothing."""
    _run("-c", "-f", "-", text=text)


def list_names() -> list[str]:
    """The names of our tables."""
    words = [line.split() for line in _run("list", "tables", "inet").splitlines()]
    return sorted(
        name for table, family, name in words if (table, family) == ("table", "inet") and _OURS.fullmatch(name)
    )


def list_tables() -> dict[str, str]:
    """Our tables: name to listing, without counters, handles and what the rules themselves have put into sets."""
    return {name: _list_table(name) for name in list_names()}


def spelled(ruleset: str) -> dict[str, str]:
    """How this machine's nft lists the tables of a ruleset: versions differ, and so do some values of marks.

    Found out by loading it in a throwaway network namespace, in some 40 ms. CapabilityError without CAP_SYS_ADMIN.
    """

    def load_and_list() -> dict[str, str]:
        load(ruleset)
        return list_tables()

    namespace = new_namespace()
    try:
        return call_in_namespace(namespace, load_and_list)
    finally:
        os.close(namespace)


def without_traffic(listing: str) -> str:
    """A listing without the elements that rules themselves have put into sets: those come and go with the traffic."""
    return _DYNAMIC.sub(r"\1", listing)


def _list_table(name: str) -> str:
    return without_traffic(_run("-s", "list", "table", "inet", name))


def nft_version() -> str | None:
    """What `nft --version` says, or None where there is no nft."""
    try:
        return _run("--version").strip()
    except MissingError:
        return None


def _run(*arguments: str, text: str = "") -> str:
    nft = shutil.which("nft", path=_SYSTEM_PATH) or shutil.which("nft")  # root's PATH is not always root's own
    if nft is None:
        raise MissingError("the program nft is missing: install it, on Debian with `apt-get install nftables`")
    try:
        done = subprocess.run(
            [nft, *arguments],
            input=text,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
            env={"PATH": os.environ.get("PATH", _SYSTEM_PATH), "LC_ALL": "C"},  # its messages are read below
            # A signal to the terminal's process group is the daemon's to handle; half of a teardown is worse than none.
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        raise KernelError(
            f"`nft {' '.join(arguments)}` did not end within {_TIMEOUT:.0f} s: is the system overloaded?"
        ) from error
    except OSError as error:
        raise KernelError(
            f"cannot start `nft {' '.join(arguments)}`: {error.strerror}; is the machine out of files, memory or processes?"
        ) from error
    if done.returncode == 0:
        return done.stdout
    raise _translate(arguments, done.stderr)


def _translate(arguments: tuple[str, ...], stderr: str) -> KernelError | MissingError | CapabilityError:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    first = lines[0] if lines else "no message"
    shown = f"`nft {' '.join(arguments)}` failed: {first}"
    if "Operation not permitted" in stderr:
        return CapabilityError(
            f"{shown}: changing the ruleset needs CAP_NET_ADMIN in this network namespace; run as root"
        )
    # The kernel answers ENOENT for an expression whose module it does not have; nft shows the rule in the line below.
    rule = lines[1] if len(lines) > 1 else ""
    for pattern, module in _MODULES:
        if "No such file or directory" in first and re.search(pattern, rule):
            return MissingError(
                f"{shown}: this kernel has no {module}; load it with `modprobe {module}` or use a kernel that has it"
            )
    return KernelError(f"{shown}: {lines[1]}" if len(lines) > 1 else shown)
