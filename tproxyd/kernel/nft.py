"""nft's language, spoken to the kernel: by the nft program, or by its library inside this process. Knows nothing of what a text means.

The program costs a child process of about 12 ms a call; it is what a user can run with the same text. The library costs 0.7 MiB and a
third of a millisecond a call, and its netlink socket can *own* tables: what is made `flags owner` through it goes when it is closed, and
until then nobody else can change or remove it, not even `nft flush ruleset`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from itertools import accumulate
from typing import Protocol

from tproxyd.errors import CapabilityError, KernelError, MissingError, TproxydError
from tproxyd.kernel.dumps import ask, attribute, attributes, dump, dump_all, each_attribute
from tproxyd.net.capabilities import missing_capabilities
from tproxyd.net.namespaces import call_in_namespace, new_namespace
from tproxyd.plan import DEFAULT_NAME, Plan

__all__ = [
    "Library",
    "Nft",
    "Program",
    "find_program",
    "has_foreign_tables",
    "has_more_rules",
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
# Names that nft itself could give. All of tproxyd's are ours; beside a name of somebody's choice stand tables of his own, perhaps.
_OURS = re.compile(rf"{DEFAULT_NAME}(_\w+)?", re.ASCII)
_SUFFIX = re.compile(r"(_(guard|state|[0-9]+))?", re.ASCII)
_OWNER = re.compile(r"\{ # progname [^\n]*\n")
_NETLINK_NETFILTER = 12  # linux/netlink.h
_GETTABLE = 10 << 8 | 1  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETTABLE
_GETGEN = 10 << 8 | 16  # NFT_MSG_GETGEN
_GETCHAIN, _GETRULE, _GETSET, _GETSETELEM = (10 << 8 | message for message in (4, 7, 10, 13))
# NFTA_CHAIN_TABLE, NFTA_RULE_TABLE, NFTA_SET_TABLE and NFTA_SET_ELEM_LIST_TABLE; NFTA_SET_NAME, NFTA_SET_ELEM_LIST_SET; NFTA_SET_ELEM_LIST_ELEMENTS
_OF_TABLE, _SET_NAME, _ELEMENTS = 1, 2, 3
_SET_FLAGS, _EVAL = 3, 0x20  # NFTA_SET_FLAGS, NFT_SET_EVAL: rules put elements into it
_OURS_FILLED = 5  # sets that our rules fill, at most: legs and ended of each family, and dials
_NFPROTO_UNSPEC, _NFPROTO_INET, _TABLE_NAME, _GEN_ID = 0, 1, 1, 1  # linux/netfilter.h; NFTA_TABLE_NAME, NFTA_GEN_ID
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
_SPARE_FILES, _SPARE_AMONG_MANY = 4, 32  # the more threads, the more are opened between a look and the library's own
_FD_SETSIZE = 1024  # sys/select.h
_FROM_TERMINALS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)


class Nft(Protocol):
    """Who speaks to the kernel: `Program`, `Library`, or `passing.Passing`. `spellings` is how this machine's nft lists a table, by the table's text as
    planned: versions differ, and finding out takes time and privileges. `listed` is what our tables were at which generation of the
    ruleset; only who is of one network namespace has it."""

    spellings: dict[str, str]
    listed: tuple[int, dict[str, str]] | None
    most: int | None
    """A table with more in it than so many elements, rules, chains and sets is listed as an empty one: it is not as planned, and nft takes a kilobyte
    and 13 us for each. What rules put into sets of ours does not count. None: of any size."""

    def run(self, text: str) -> str:
        """Runs commands as one transaction: all of them or, with an error raised, none. What the listing ones print, without counters."""

    def check(self, text: str) -> None:
        """Raises what `run` would raise, and changes nothing."""

    def fresh(self) -> AbstractContextManager[Nft]:
        """Another one of the same kind, for the network namespace of the calling thread."""


class Program:
    """The nft program, in the network namespace of whoever calls."""

    most: int | None = None

    def __init__(self) -> None:
        self.spellings: dict[str, str] = {}
        self.listed: tuple[int, dict[str, str]] | None = None

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
    forks. Used by one thread at a time. MissingError where the library is not installed, KernelError where there is no low file left for
    it: see `_open_context`.
    """

    most: int | None = None

    def __init__(self, *, give_up: int | None = None, passing: bool = False) -> None:
        """`give_up` is a file whose number it may have: closed right before. `passing`: with others that come and go. Who goes empties the cache
        of interfaces that all share, and to fill it anew the library opens one more file, or ends the process."""
        self._spare = _SPARE_AMONG_MANY if passing else _SPARE_FILES
        self._passing = passing
        self.spellings: dict[str, str] = {}
        self.listed: tuple[int, dict[str, str]] | None = None
        self._lib = _load_library()
        self._context: int | None = _open_context(self._lib, give_up, self._spare)
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
            with contextlib.suppress(TproxydError):
                _generation()  # who closes a socket of nft waits until what has been deleted is free: not within the lock
            with _one_at_a_time:
                self._lib.nft_ctx_free(self._context)
            self._context = None

    def run(self, text: str) -> str:
        if not self._context:
            raise KernelError("libnftables is closed already: the interception is over")
        with _one_at_a_time:
            if self._passing:
                _lowest_file(self._spare)  # raises KernelError
            code = self._lib.nft_run_cmd_from_buffer(self._context, text.encode())
        output: bytes = self._lib.nft_ctx_get_output_buffer(self._context)
        errors: bytes = self._lib.nft_ctx_get_error_buffer(self._context)
        if code != 0:
            raise _translate("`nft -f -`", errors.decode(errors="replace"))
        return output.decode(errors="replace")

    def check(self, text: str) -> None:
        self._dry_run(True)
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
            self._dry_run(False)
            # What it would have changed, the library takes for changed from then on, until a listing makes it read anew what there is (seen
            # with 1.0.6, when the same text was run then: "File exists", "conflicting intervals specified", the end of the process).
            with contextlib.suppress(TproxydError):
                self.run("list tables")

    def _dry_run(self, on: bool) -> None:
        if self._context:  # else `run` says that it is closed
            self._lib.nft_ctx_set_dry_run(self._context, on)

    @contextmanager
    def fresh(self) -> Iterator[Nft]:
        with Library() as other:
            yield other


def list_names(name: str = DEFAULT_NAME) -> list[str]:
    """The names of our tables, those of who is called so."""
    return sorted(table for family, table in _all_tables(_NFPROTO_INET) if is_ours("inet", table, name))


def has_foreign_tables(name: str = DEFAULT_NAME) -> bool:
    """Whether there is any table of any family that is not ours, which are those of who is called so."""
    return any(
        not is_ours("inet" if family == _NFPROTO_INET else "other", table, name)
        for family, table in _all_tables(_NFPROTO_UNSPEC)
    )


def _all_tables(family: int) -> list[tuple[int, str]]:
    """Family and name. Not from nft: that takes half a megabyte for each table of anybody's, and names may be anything."""
    try:
        bodies = dump_all(_NETLINK_NETFILTER, _GETTABLE, bytes([family, 0, 0, 0]))  # struct nfgenmsg
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise CapabilityError(
                "cannot list the tables of nft: that needs CAP_NET_ADMIN in this network namespace; run as root"
            ) from error
        if error.errno in (errno.EPROTONOSUPPORT, errno.EOPNOTSUPP):
            return []  # a kernel without nf_tables
        raise KernelError(
            f"cannot list the tables of nft: {error.strerror}; is the machine out of files or memory?"
        ) from error
    return [
        (body[0], attributes(body[4:]).get(_TABLE_NAME, b"").rstrip(b"\0").decode(errors="replace")) for body in bodies
    ]


def list_tables(nft: Nft, name: str = DEFAULT_NAME) -> dict[str, str]:
    """Our tables: name to listing, without counters, handles, the owner's name and what the rules themselves have put into sets.

    What is listed is remembered, and listed again only when somebody's ruleset has changed: beside fifty thousand connections to local apps, which all
    stand in a set, that takes most of a second.
    """
    if isinstance(nft, Program):  # used in any namespace
        return _list_tables(nft, name)
    generation = _generation()
    if nft.listed is None or nft.listed[0] != generation:
        tables = _list_tables(nft, name)
        if _generation() != generation:
            return tables
        nft.listed = (generation, tables)
    return dict(nft.listed[1])


def _list_tables(nft: Nft, name: str) -> dict[str, str]:
    tables = {}
    for table in list_names(name):
        try:
            tables[table] = _list_table(nft, table)
        except KernelError:
            if table in list_names(name):
                raise  # else it has gone meanwhile
    return tables


def _generation() -> int:
    """The number of the ruleset's last change by anybody, in the namespace of the calling thread."""
    try:
        body = ask(_NETLINK_NETFILTER, _GETGEN, bytes(4))  # struct nfgenmsg
    except OSError as error:
        raise KernelError(f"cannot ask for the ruleset's generation: {error.strerror}") from error
    return int.from_bytes(attributes(body[4:])[_GEN_ID], "big")


def spelled(plan: Plan, nft: Nft) -> dict[str, str]:
    """How this machine's nft lists the tables of a plan: versions differ, and so do some values of marks.

    Found out by loading it in a throwaway network namespace, in some 40 ms, or 5 with the library. CapabilityError without
    CAP_SYS_ADMIN.
    """

    def load_and_list() -> dict[str, str]:
        # One who owns tables lists them before it ends; a program that ends would have lost them.
        with nft.fresh() as other:
            other.run(plan.ruleset)
            return list_tables(other, plan.name)

    namespace = new_namespace()
    try:
        return call_in_namespace(namespace, load_and_list)
    finally:
        os.close(namespace)


def without_traffic(listing: str) -> str:
    """A listing without the elements that rules themselves have put into sets: those come and go with the traffic."""
    return _DYNAMIC.sub(r"\1", listing)


def _list_table(nft: Nft, name: str) -> str:
    if nft.most is not None and _has_more(name, nft.most):
        return f"table inet {name} {{\n}}\n"
    listing = nft.run(f"list table inet {name}\n")
    return without_traffic(_OWNER.sub("{\n", listing, count=1))


def has_more_rules(most: int) -> bool:
    """Whether there are more rules than this, in tables of whatever family and of anybody. Not read further than that."""
    try:
        return any(count >= most for count, _ in enumerate(dump(_NETLINK_NETFILTER, _GETRULE, bytes(4))))
    except OSError:
        return False  # nft will say what is wrong


def _has_more(table: str, most: int) -> bool:
    """Whether more stands in a table than this. Not read further than that: whoever has the namespace may have put millions there."""
    of_table = bytes([_NFPROTO_INET, 0, 0, 0]) + attribute(_OF_TABLE, table.encode() + b"\0")

    def pieces() -> Iterator[int]:
        for kind in (_GETCHAIN, _GETRULE):  # chains of other tables, too: the kernel does not choose
            for _ in dump(_NETLINK_NETFILTER, kind, of_table):
                yield 1
        names, filled = [], 0
        for body in dump(_NETLINK_NETFILTER, _GETSET, of_table):
            has = attributes(body[4:])
            if int.from_bytes(has.get(_SET_FLAGS, b""), "big") & _EVAL and filled < _OURS_FILLED:
                filled += 1
            else:
                names.append(has[_SET_NAME])
            yield 1
        for name in names:
            for body in dump(_NETLINK_NETFILTER, _GETSETELEM, of_table + attribute(_SET_NAME, name)):
                yield sum(1 for _ in each_attribute(attributes(body[4:]).get(_ELEMENTS, b"")))

    try:
        return any(total > most for total in accumulate(pieces()))
    except OSError:
        return False  # it has gone meanwhile, or nft will say what is wrong


def is_ours(family: str, table: str, name: str = DEFAULT_NAME) -> bool:
    """Whether a table is one of ours, by its name: of those of who is called so."""
    if family != "inet" or not table.startswith(name):
        return False
    return (_OURS.fullmatch(table) if name == DEFAULT_NAME else _SUFFIX.fullmatch(table, len(name))) is not None


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
    # Whoever starts it answers the signals that a terminal sends to all: nft inherits that they are blocked, and half of a teardown is
    # worse than none. A session of its own comes too late for the first of them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FROM_TERMINALS)
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
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if done.returncode == 0:
        return done.stdout
    if done.returncode < 0:
        raise KernelError(f"`nft {' '.join(arguments)}` was killed by {signal.Signals(-done.returncode).name}")
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


# For all contexts of the process: they share a cache of the names of interfaces (src/iface.c of nftables), which is no thread's own. (And no
# namespace's: of interfaces by number our texts have lo alone, which is 1 everywhere.)
_one_at_a_time = threading.Lock()


def _open_context(lib: ctypes.CDLL, give_up: int | None, spare: int) -> int:
    """A context of the library. KernelError where it cannot be had, or would be a danger to the whole process:

    - It ends the process where there is no file left for its socket. So there have to be some more than that one, because other threads
      open files, too.
    - It waits with select(), which glibc ends the process for when the number of the socket is 1024 or more.

    The socket is marked as not to be inherited: the library does not.
    """
    with _one_at_a_time:
        if give_up is not None:
            os.close(give_up)
        lowest = _lowest_file(spare)
        context: int | None = lib.nft_ctx_new(0)
        if not context:
            raise KernelError("libnftables could not be initialised: is the machine out of files or memory?")
        # Of others there is no such socket that programs inherit. Another thread may have been quicker to take that number.
        found = [lowest] if _is_inherited_netfilter(lowest) else _inherited_netfilter_sockets()
        for fd in found:
            fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        if max(found, default=_FD_SETSIZE) >= _FD_SETSIZE:
            lib.nft_ctx_free(context)
            raise KernelError(
                f"libnftables needs a file below number {_FD_SETSIZE}, and this process has so many open that there is none"
            )
    return context


def _lowest_file(left: int) -> int:
    """The number that the next file will have. Raises KernelError where there are not so many left."""
    spare: list[int] = []
    try:
        for _ in range(left):
            spare.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise KernelError(f"cannot open libnftables: {error.strerror}; raise the limit of open files") from error
    finally:
        for fd in spare:
            os.close(fd)
    return spare[0]


def _inherited_netfilter_sockets() -> list[int]:
    return [fd for fd in map(int, os.listdir("/proc/self/fd")) if _is_inherited_netfilter(fd)]


def _is_inherited_netfilter(fd: int) -> bool:
    try:
        return not fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC and _is_netfilter(fd)
    except OSError:  # of another thread, and closed already; or no socket
        return False


def _is_netfilter(fd: int) -> bool:
    """Raises OSError where there is no file."""
    if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
        return False
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
