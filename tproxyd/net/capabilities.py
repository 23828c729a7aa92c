"""Which capabilities this process has, and how it gives up the others for good. Standard library only.

Capabilities belong to a *thread*: who gives them up has to do it while there is one alone, and each later one has as few. What a process may
pass on to programs that it starts is what it holds itself: by the bounding set if it is run by uid 0, else by the ambient one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from tproxyd.errors import CapabilityError, KernelError

__all__ = [
    "CAPABILITIES",
    "keep_capabilities",
    "missing_capabilities",
    "require_capabilities",
    "to_read_code",
    "unit_line",
    "unprivileged_ports_from",
    "without_capabilities",
]

CAPABILITIES = {
    "CAP_DAC_OVERRIDE": 1,
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_NICE": 23,
}
"""Those that matter here, and their bits (linux/capability.h)."""

_OF_FILES = ("CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH")

# linux/prctl.h
_CAPBSET_READ, _CAPBSET_DROP, _SET_NO_NEW_PRIVS, _CAP_AMBIENT = 23, 24, 38, 47
_AMBIENT_RAISE, _AMBIENT_CLEAR_ALL = 2, 4
_VERSION_3 = 0x20080522  # linux/capability.h: sets of 64 bits, in two halves

# capget and capset have no other way in; both are in every libc, declared or not.
_libc = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Half(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def missing_capabilities(names: Sequence[str]) -> list[str]:
    """Which of the named capabilities are not in effect for this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    effective = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
    return [name for name in names if not effective >> CAPABILITIES[name] & 1]


def require_capabilities(purpose: str, names: Sequence[str]) -> None:
    """Raises CapabilityError that names what is missing of `names` for `purpose`, and the way out."""
    missing = missing_capabilities(names)
    if missing:
        raise CapabilityError(
            f"{purpose} needs {' and '.join(missing)}, which this process does not have: run it as root, or in a systemd "
            f"unit add {unit_line(missing)}"
        )


def unit_line(names: Collection[str]) -> str:
    """The line of a systemd unit that gives them to a user other than root."""
    return f"AmbientCapabilities={' '.join(names)}"


def unprivileged_ports_from() -> int:
    """The first port that anybody may bind to in the namespace of the calling thread."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 1024  # before Linux 4.11


def keep_capabilities(names: Collection[str], *, pass_on: bool) -> None:
    """Gives up all capabilities but these, as far as they are there, for good: no program that is started gets one back. With `pass_on`
    programs that are started have the same ones; else none.

    For a process with one thread, in its beginning. Raises KernelError.
    """
    if len(os.listdir("/proc/self/task")) != 1:
        raise KernelError(
            "cannot give up the capabilities that are not needed: another thread runs already, and would keep them; does a debugger, or a "
            "sitecustomize module of this Python, start one?"
        )
    _, permitted, _ = _get()
    kept = _bits(names) & permitted
    _prctl(_SET_NO_NEW_PRIVS, 1)
    _prctl(_CAP_AMBIENT, _AMBIENT_CLEAR_ALL)
    _drop_bounds(kept if pass_on else 0)
    _set(effective=kept, permitted=kept, inheritable=kept if pass_on else 0)
    for bit in _each(kept if pass_on else 0):
        _prctl(_CAP_AMBIENT, _AMBIENT_RAISE, bit)


def to_read_code() -> list[str]:
    """What this process needs for its own code, where that may be read only because it is root: a checkout in somebody's own directory. Parts of it are
    loaded late, encodings by the standard library for one."""
    places = {*sys.path, str(Path(__file__).parent), str(Path(os.__file__).parent), sys.executable}
    with without_capabilities(_OF_FILES):
        return [] if all(map(_can_read, places)) else [_OF_FILES[1]]


def _can_read(path: str) -> bool:
    try:
        os.close(os.open(path or ".", os.O_RDONLY | os.O_CLOEXEC))
    except PermissionError:
        return False
    except OSError:
        pass  # there is no such file, and nothing is missed
    return True


class without_capabilities:  # noqa: N801  # used as a context manager, and reads as one
    """A block in which the calling thread has none of these in effect."""

    def __init__(self, names: Collection[str]) -> None:
        self._without = _bits(names)

    def __enter__(self) -> None:
        self._before = _get()
        effective, permitted, inheritable = self._before
        _set(effective=effective & ~self._without, permitted=permitted, inheritable=inheritable)

    def __exit__(self, *_: object) -> None:
        effective, permitted, inheritable = self._before
        _set(effective=effective, permitted=permitted, inheritable=inheritable)


def _drop_bounds(kept: int) -> None:
    """Takes all others out of the bounding set. That takes CAP_SETPCAP, which root has; whoever has not gets no more from it than it holds, since
    it has no new privileges."""
    for bit in range(64):
        there = _libc.prctl(_CAPBSET_READ, bit, 0, 0, 0)
        if there < 0:
            return  # beyond the last one that this kernel knows
        if there and not kept >> bit & 1 and _libc.prctl(_CAPBSET_DROP, bit, 0, 0, 0) != 0:
            if ctypes.get_errno() == errno.EPERM:
                return
            raise _refused()


def _get() -> tuple[int, int, int]:
    """Effective, permitted, inheritable."""
    halves = (_Half * 2)()
    if _libc.capget(ctypes.byref(_Header(_VERSION_3, 0)), halves) != 0:
        raise _refused()
    low, high = halves
    return (
        low.effective | high.effective << 32,
        low.permitted | high.permitted << 32,
        low.inheritable | high.inheritable << 32,
    )


def _set(*, effective: int, permitted: int, inheritable: int) -> None:
    halves = (_Half * 2)(
        *(_Half(*(word >> shift & 0xFFFFFFFF for word in (effective, permitted, inheritable))) for shift in (0, 32))
    )
    if _libc.capset(ctypes.byref(_Header(_VERSION_3, 0)), halves) != 0:
        raise _refused()


def _prctl(option: int, first: int, second: int = 0) -> None:
    if _libc.prctl(option, first, second, 0, 0) != 0:
        raise _refused()


def _refused() -> KernelError:
    return KernelError(
        f"cannot give up the capabilities that are not needed: {os.strerror(ctypes.get_errno())}; does a seccomp filter or a "
        "securebit (SecureBits=) forbid it?"
    )


def _bits(names: Collection[str]) -> int:
    return sum(1 << CAPABILITIES[name] for name in {*names})


def _each(bits: int) -> list[int]:
    return [bit for bit in range(bits.bit_length()) if bits >> bit & 1]
