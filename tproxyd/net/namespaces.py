"""Network namespaces: open one, make one, run a function inside one. Standard library only.

Knows that a namespace belongs to a *thread*, not to a process, and that a socket keeps the namespace its thread was in
when it was made. So work that must happen inside is done by a throwaway thread that enters, works and ends:
a thread that has entered is never used again and the calling thread stays where it is, whatever is raised. Refuses to
know what a namespace is for, where names such as /run/netns come from, and who keeps the file descriptor.

The two exceptions that do move their caller, `enter_namespace` and `unshare_network`, are for a thread or process that
its owner is about to give away (a broker, a test run).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, TypeVar

from tproxyd.errors import CapabilityError, KernelError, MissingError, TproxydError
from tproxyd.net.capabilities import unit_line
from tproxyd.net.processes import move_up

__all__ = [
    "NamespaceLike",
    "NamespaceWatch",
    "call_in_namespace",
    "enter_namespace",
    "namespace_inode",
    "new_namespace",
    "open_namespace",
    "unshare_network",
]

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_NS_GET_NSTYPE = 0xB703  # _IO(0xb7, 3), linux/nsfs.h; answers the CLONE_ flag, on nsfs files only

# os.setns and os.unshare exist from Python 3.12; ctypes does for every version, and releases the GIL.
_libc = ctypes.CDLL(None, use_errno=True)


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


NamespaceLike = str | os.PathLike[str] | int | _HasFileno
"""A path (/run/netns/web, /proc/4242/ns/net), a process id, or a file descriptor as an int or an object that has one."""


def open_namespace(where: NamespaceLike) -> int:
    """A new file descriptor (close-on-exec) of a network namespace; the caller closes it, and it keeps the namespace alive.

    An int is a file descriptor if it is one of this process and open on a network namespace, else a process id: give
    an object with fileno(), or a path, where that could matter. MissingError if there is no network namespace there.
    """
    if isinstance(where, int):
        if _is_network_namespace(where):
            return os.dup(where)
        return _open(f"/proc/{where}/ns/net", f"process {where} has no network namespace")
    if isinstance(where, str | os.PathLike):
        return _open(os.fspath(where), f"there is no network namespace at {os.fspath(where)}")
    if not _is_network_namespace(where.fileno()):
        raise MissingError(f"file descriptor {where.fileno()} is not open on a network namespace")
    return os.dup(where.fileno())


class NamespaceWatch:
    """A network namespace, and whether it is still the one that is meant by what it was given by. A context manager; close it.

    The descriptor `fd` keeps the namespace alive, so that it goes is seen only from outside: a path is gone or leads to another
    one (`ip netns del`, an end of the process of /proc/PID/ns/net), or the process has ended, whose `pidfd` becomes readable then. Of one that was given
    by a descriptor nothing is to be seen, nor of a process where the kernel has no pidfds. A path is free to be unmounted meanwhile; that takes
    CAP_SYS_ADMIN here.

    `identity` is device and inode, which no other namespace has as long as this is open. Raises like `open_namespace`.
    """

    def __init__(self, where: NamespaceLike) -> None:
        self.pidfd: int | None = None
        self._path = os.path.abspath(where) if isinstance(where, str | os.PathLike) else None
        if isinstance(where, int) and not _is_network_namespace(where):
            # Before its namespace is looked up: if it lives after that, it was the same process all the time.
            self.pidfd = _open_process(where)
        self.fd = -1
        try:
            self.fd = move_up(open_namespace(where))
            if self._path is not None:
                # What is opened at a name of /run/netns keeps the mount there busy, and a plain umount (CNI's, for one) would fail.
                self.fd, at_the_name = move_up(call_in_namespace(self.fd, _own_namespace)), self.fd
                os.close(at_the_name)
            if self.gone():
                raise MissingError(f"process {where} has just ended, or the network namespace at {where} was exchanged")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> NamespaceWatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def identity(self) -> tuple[int, int]:
        return _identity(os.fstat(self.fd))

    def gone(self) -> bool:
        """Whether what it was given by means it no more. Some microseconds; never blocks."""
        if self.pidfd is not None:
            poll = select.poll()  # not select(): the number may be above 1023
            poll.register(self.pidfd, select.POLLIN)
            return bool(poll.poll(0))
        if self._path is None:
            return False
        try:
            return _identity(os.stat(self._path)) != self.identity
        except OSError as error:
            return error.errno != errno.ENOMEM

    def look_instead(self, other: NamespaceWatch) -> None:
        """From now on this is gone when what `other` was given by is: the same namespace, known by another path or process. `other` is left with
        nothing to look at, and still to be closed."""
        if self.pidfd is not None:
            os.close(self.pidfd)
        self._path, self.pidfd, other.pidfd = other._path, other.pidfd, None

    def close(self) -> None:
        """Gives the namespace up; harmless when repeated."""
        for fd in (self.fd, self.pidfd):
            if fd is not None and fd >= 0:
                os.close(fd)
        self.fd, self.pidfd = -1, None


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _open_process(pid: int) -> int | None:
    """A pidfd; None where the kernel has none (before 5.3), or a filter forbids it."""
    try:
        return move_up(os.pidfd_open(pid))
    except (ProcessLookupError, ValueError, OverflowError) as error:
        raise MissingError(f"there is no process {pid}") from error
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise MissingError(f"{pid} is not the number of a process") from error
        if error.errno in (errno.ENOSYS, errno.EPERM):
            return None
        raise KernelError(f"cannot watch process {pid}: {error.strerror}") from error


def namespace_inode(fd: int) -> int:
    """The number by which the kernel tells namespaces apart (`net:[N]`); reused once the namespace is gone."""
    return os.fstat(fd).st_ino


def new_namespace() -> int:
    """Makes an empty network namespace (lo is down) without a name; it lives as long as the returned descriptor.

    CapabilityError without CAP_SYS_ADMIN.
    """
    return _in_thread(_make)


def call_in_namespace(netns_fd: int, function: Callable[..., T], *args: Any) -> T:
    """Runs `function(*args)` in a throwaway thread inside the namespace; its result is returned, what it raises is raised.

    Blocks until the function has returned (about 0.15 ms without it). CapabilityError without CAP_SYS_ADMIN.
    """

    def inside() -> T:
        enter_namespace(netns_fd)
        return function(*args)

    return _in_thread(inside)


def enter_namespace(netns_fd: int) -> None:
    """Moves the *calling thread* for good. CapabilityError without CAP_SYS_ADMIN."""
    if _libc.setns(netns_fd, _CLONE_NEWNET) != 0:
        raise _refused("enter a network namespace", ctypes.get_errno())


def unshare_network() -> None:
    """Moves the *calling thread* into an empty namespace of its own for good. CapabilityError without CAP_SYS_ADMIN."""
    if _libc.unshare(_CLONE_NEWNET) != 0:
        raise _refused("make a network namespace", ctypes.get_errno())


def _make() -> int:
    unshare_network()
    return _own_namespace()


def _own_namespace() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _in_thread(function: Callable[[], T]) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    # A daemon thread: Ctrl-C during join() must not make the interpreter wait at its end for a function that hangs.
    thread = threading.Thread(target=body, name="tproxyd namespace", daemon=True)
    thread.start()
    thread.join()
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # the traceback refers to this frame: without this the cycle keeps the caller's objects alive
    return results[0]


def _open(path: str, missing: str) -> int:
    try:
        # O_NONBLOCK: a path that somebody mistyped may be a FIFO, and opening that would wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError as error:
        raise CapabilityError(f"cannot open {path}: permission denied; run as root or with CAP_SYS_PTRACE") from error
    except OSError as error:
        why = os.strerror(error.errno or 0)
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise KernelError(f"cannot open {path}: {why}; is the machine out of files or memory?") from error
        raise MissingError(f"{missing}: {why}") from error
    if not _is_network_namespace(fd):
        os.close(fd)
        raise MissingError(f"{missing}: {path} is something else (a stale /run/netns name is an empty file)")
    return fd


def _is_network_namespace(fd: int) -> bool:
    try:
        return fcntl.ioctl(fd, _NS_GET_NSTYPE) == _CLONE_NEWNET
    except (OSError, ValueError, OverflowError):
        return False


def _refused(step: str, number: int) -> TproxydError:
    if number == errno.EPERM:
        return CapabilityError(
            f"cannot {step}: operation not permitted; it needs CAP_SYS_ADMIN: run it as root, or in a systemd unit add "
            f"{unit_line(['CAP_SYS_ADMIN'])}"
        )
    return KernelError(f"cannot {step}: {os.strerror(number)}")
