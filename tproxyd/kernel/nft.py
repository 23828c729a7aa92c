"""nft's language, spoken to the kernel: by the nft program, or by its library inside this process. Knows nothing of what a text means.

The program costs a child process of about 12 ms a call; it is what a user can run with the same text. The library costs 0.7 MiB and a
third of a millisecond a call, and its netlink socket can *own* tables: what is made `flags owner` through it goes when it is closed, and
until then nobody else can change or remove it, not even `nft flush ruleset`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Protocol

from tproxyd.errors import CapabilityError, KernelError, MissingError, TproxydError
from tproxyd.net.capabilities import missing_capabilities
from tproxyd.net.namespaces import call_in_namespace, new_namespace

__all__ = [
    "Library",
    "Nft",
    "Program",
    "find_program",
    "is_ours",
    "list_names",
    "list_tables",
    "nft_version",
    "run_program",
    "spelled",
    "without_traffic",
]

# The flags of a set whose elements come and go with the traffic, and those elements.
_DYNAMIC = re.compile(r"(flags [^\n]*\bdynamic\b[^}]*?\n)\s*elements = \{[^}]*\}\n")
_OURS = re.compile(r"tproxyd(_[a-zA-Z0-9_./-]*)?")  # nothing that nft would take for more than a name
_OWNER = re.compile(r"\{ # progname [^\n]*\n")
_NETLINK_NETFILTER = 12  # linux/netlink.h
_STATELESS = 1 << 2  # NFT_CTX_OUTPUT_STATELESS, nftables/libnftables.h
# How a rule that needs a kernel module begins to use it. Not bare words: "tproxy" is also the beginning of our tables' names.
_MODULES = (
    (r"\btproxy ip6? to\b", "nft_tproxy"),
    (r"\bsocket (transparent|wildcard)\b", "nft_socket"),
    (r"\bfib daddr\b", "nft_fib_inet"),
    (r"\breject with\b", "nft_reject_inet"),
    (r"\btype nat hook\b", "nft_chain_nat"),
    (r"\bredirect to\b", "nft_redir"),
    (r"\bct state\b", "nft_ct"),
)
_SYSTEM_PATH = "/usr/sbin:/sbin:/usr/local/sbin:/usr/bin:/bin"
# A hung nft would hang the daemon's start and stop; its largest transactions take well under a second.
_TIMEOUT = 30.0


class Nft(Protocol):
    """Who speaks to the kernel: `Program` or `Library`. `spellings` is how this machine's nft lists a table, by the table's text as
    planned: versions differ, and finding out takes time and privileges."""

    spellings: dict[str, str]

    def run(self, text: str) -> str:
        """Runs commands as one transaction: all of them or, with an error raised, none. What the listing ones print, without counters."""

    def check(self, text: str) -> None:
        """Raises what `run` would raise, and changes nothing."""

    def fresh(self) -> AbstractContextManager[Nft]:
        """Another one of the same kind, for the network namespace of the calling thread."""


class Program:
    """The nft program, in the network namespace of whoever calls."""

    def __init__(self) -> None:
        self.spellings: dict[str, str] = {}

    def run(self, text: str) -> str:
        return run_program("-s", "-f", "-", text=text)

    def check(self, text: str) -> None:
        run_program("-c", "-f", "-", text=text)

    @contextmanager
    def fresh(self) -> Iterator[Nft]:
        yield self


class Library:
    """libnftables, with a netlink socket in the network namespace of the thread that makes it. A context manager; close it, and what it
    owns in the kernel is gone.

    Ownership lives as long as any copy of the socket: it is not inherited by programs that are started, but by a child that only
    forks. Used by one thread at a time. MissingError where the library is not installed.
    """

    def __init__(self) -> None:
        self.spellings: dict[str, str] = {}
        self._lib = _load_library()
        with _close_on_exec():
            self._context = self._lib.nft_ctx_new(0)
        if not self._context:
            raise KernelError("libnftables could not be initialised: is the machine out of files or memory?")
        self._lib.nft_ctx_buffer_output(self._context)
        self._lib.nft_ctx_buffer_error(self._context)
        self._lib.nft_ctx_output_set_flags(self._context, _STATELESS)

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives up what it owns; harmless when repeated."""
        if self._context:
            self._lib.nft_ctx_free(self._context)
            self._context = None

    def run(self, text: str) -> str:
        code = self._lib.nft_run_cmd_from_buffer(self._context, text.encode())
        output: bytes = self._lib.nft_ctx_get_output_buffer(self._context)
        errors: bytes = self._lib.nft_ctx_get_error_buffer(self._context)
        if code != 0:
            raise _translate("`nft -f -`", errors.decode(errors="replace"))
        return output.decode(errors="replace")

    def check(self, text: str) -> None:
        self._lib.nft_ctx_set_dry_run(self._context, True)
        try:
            self.run(text)
        except KernelError as error:
            # Of what the kernel does not take, the library shows the first line of the whole text. The program shows the rule, and with
            # it which module is missing.
            try:
                Program().check(text)
            except MissingError as better:
                raise better from error
            except TproxydError:
                pass
            raise
        finally:
            self._lib.nft_ctx_set_dry_run(self._context, False)

    @contextmanager
    def fresh(self) -> Iterator[Nft]:
        with Library() as other:
            yield other


def list_names(nft: Nft) -> list[str]:
    """The names of our tables."""
    # Names of others may have several words, and lines.
    names = re.findall(r"^table inet (\S+)$", nft.run("list tables inet\n"), re.M)
    return sorted(name for name in names if is_ours("inet", name))


def list_tables(nft: Nft) -> dict[str, str]:
    """Our tables: name to listing, without counters, handles, the owner's name and what the rules themselves have put into sets."""
    return {name: _list_table(nft, name) for name in list_names(nft)}


def spelled(ruleset: str, nft: Nft) -> dict[str, str]:
    """How this machine's nft lists the tables of a ruleset: versions differ, and so do some values of marks.

    Found out by loading it in a throwaway network namespace, in some 40 ms, or 5 with the library. CapabilityError without
    CAP_SYS_ADMIN.
    """

    def load_and_list() -> dict[str, str]:
        # One who owns tables lists them before it ends; a program that ends would have lost them.
        with nft.fresh() as other:
            other.run(ruleset)
            return list_tables(other)

    namespace = new_namespace()
    try:
        return call_in_namespace(namespace, load_and_list)
    finally:
        os.close(namespace)


def without_traffic(listing: str) -> str:
    """A listing without the elements that rules themselves have put into sets: those come and go with the traffic."""
    return _DYNAMIC.sub(r"\1", listing)


def _list_table(nft: Nft, name: str) -> str:
    listing = nft.run(f"list table inet {name}\n")
    return without_traffic(_OWNER.sub("{\n", listing, count=1))


def is_ours(family: str, table: str) -> bool:
    """Whether a table is one of ours, by its name."""
    return family == "inet" and _OURS.fullmatch(table) is not None


def nft_version() -> str | None:
    """What `nft --version` says, or None where there is no nft."""
    try:
        return run_program("--version").strip()
    except MissingError:
        return None


def find_program() -> str:
    """Where the nft program is. Raises MissingError with the package's name."""
    nft = shutil.which("nft", path=_SYSTEM_PATH) or shutil.which("nft")  # root's PATH is not always root's own
    if nft is None:
        raise MissingError("the program nft is missing: install it, on Debian with `apt-get install nftables`")
    return nft


def run_program(*arguments: str, text: str = "") -> str:
    """What nft prints, given this text as its standard input. Raises MissingError, CapabilityError, KernelError."""
    nft = find_program()
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
    raise _translate(f"`nft {' '.join(arguments)}`", done.stderr)


@cache
def _load_library() -> ctypes.CDLL:
    try:
        lib = ctypes.CDLL("libnftables.so.1")
    except OSError as error:
        raise MissingError(
            f"the library libnftables.so.1 is missing: install it, on Debian with `apt-get install libnftables1` ({error})"
        ) from error
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    for name, result, arguments in (
        ("nft_ctx_new", pointer, [ctypes.c_uint32]),
        ("nft_ctx_free", None, [pointer]),
        ("nft_ctx_buffer_output", ctypes.c_int, [pointer]),
        ("nft_ctx_buffer_error", ctypes.c_int, [pointer]),
        ("nft_ctx_output_set_flags", None, [pointer, ctypes.c_uint]),
        ("nft_ctx_set_dry_run", None, [pointer, ctypes.c_bool]),
        ("nft_run_cmd_from_buffer", ctypes.c_int, [pointer, text]),
        ("nft_ctx_get_output_buffer", text, [pointer]),
        ("nft_ctx_get_error_buffer", text, [pointer]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


_opening = threading.Lock()


@contextmanager
def _close_on_exec() -> Iterator[None]:
    """Marks the netlink sockets that the block opens as not to be inherited: the library does not."""
    with _opening:
        before = set(os.listdir("/proc/self/fd"))
        yield
        for name in set(os.listdir("/proc/self/fd")) - before:
            with contextlib.suppress(OSError):  # of another thread, and closed already
                if os.readlink(f"/proc/self/fd/{name}").startswith("socket:") and _is_netfilter(int(name)):
                    fcntl.fcntl(int(name), fcntl.F_SETFD, fcntl.FD_CLOEXEC)


def _is_netfilter(fd: int) -> bool:
    with socket.socket(fileno=os.dup(fd)) as sock:
        return sock.family == socket.AF_NETLINK and sock.proto == _NETLINK_NETFILTER


def _translate(shown: str, stderr: str) -> TproxydError:
    lines = [line for line in stderr.splitlines() if line.strip()]
    first = lines[0].strip() if lines else "no message"
    shown = f"{shown} failed: {first}"
    rule = lines[1].strip() if len(lines) > 1 else ""
    if "Operation not permitted" in stderr:
        if not missing_capabilities(["CAP_NET_ADMIN"]):
            # A table with an owner is for nobody else.
            return KernelError(
                f"{shown}: {rule}: another process owns this table, a daemon or what it has left; end it (`ss -f netlink -p` names it)"
            )
        return CapabilityError(
            f"{shown}: changing the ruleset needs CAP_NET_ADMIN in this network namespace; run as root"
        )
    module = _missing_module(lines) if "No such file or directory" in first else None
    if module is not None:
        return MissingError(
            f"{shown}: this kernel has no {module}; load it with `modprobe {module}` or use a kernel that has it"
        )
    return KernelError(f"{shown}: {rule}" if rule else shown)


def _missing_module(lines: list[str]) -> str | None:
    """The kernel answers ENOENT for an expression whose module it does not have. nft shows the rule in the line below, and below that
    marks the expression: a rule may have several that need one."""
    rule, marks, *_ = [*lines[1:], "", ""]
    first, last = marks.find("^"), marks.rfind("^")
    found = [(match, module) for pattern, module in _MODULES for match in re.finditer(pattern, rule)]
    marked = [module for match, module in found if match.start() <= last and match.end() > first >= 0]
    return next(iter(marked + [module for _, module in found]), None)
