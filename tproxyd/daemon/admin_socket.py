"""Where a daemon is asked by its administrator: the Unix socket of `[admin] socket`, its place, its modes, and who may connect.

Knows the file; what is said over it is `admin`'s, and `client`'s on the other side. Neither trio nor h11: the verbs that ask want to know the path, too,
and a daemon that nobody asks does without HTTP.
"""

from __future__ import annotations

import grp
import logging
import os
import pwd
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Literal

from tproxyd.errors import KernelError
from tproxyd.net.peers import Peer, peer_of
from tproxyd.net.processes import read_process

__all__ = [
    "GROUP",
    "AdminSocket",
    "access_of",
    "admin_path",
    "open_admin_socket",
    "path_in",
    "readers_gid",
    "remove_stale",
    "take_place",
]

GROUP = "tproxyd"
"""Members of this group may look, if there is one."""

_DIRECTORY = "/run/tproxyd"
_ONLY_IN_THE_FIRST = (
    "/proc/sys/net/core/netdev_max_backlog"  # a sysctl that the kernel shows in no other network namespace
)
_BACKLOG = 128

_log = logging.getLogger(__name__)

Access = Literal["operator", "reader"]


def admin_path(setting: str | None) -> str | None:
    """The path that `admin.socket` means in the calling thread's network namespace; None: there is none."""
    if setting != "auto":
        return setting
    if os.path.exists(_ONLY_IN_THE_FIRST):
        return f"{_DIRECTORY}/admin.sock"
    return path_in(os.stat("/proc/thread-self/ns/net").st_ino)


def path_in(inode: int) -> str:
    """The same of a network namespace that is not the initial one, by its inode."""
    return f"{_DIRECTORY}/netns-{inode}.sock"


def remove_stale(setting: str | None) -> str | None:
    """Removes what a dead daemon has left where `admin.socket` says, and gives its path; None if there is nothing like it. Raises nothing."""
    with suppress(OSError, KernelError):
        path = admin_path(setting)
        if path is not None:
            os.lstat(path)
            directory = os.path.dirname(path)
            _make_way(path, _is_ours(directory) or _is_the_service_s(directory))
            return path
    return None


def readers_gid() -> int | None:
    """The group whose members may look."""
    try:
        return grp.getgrnam(GROUP).gr_gid
    except KeyError:
        return None


def access_of(peer: Peer, gid: int | None) -> Access | None:
    """What a peer may do: everything as root or as the daemon's own user, look as a member of the readers' group `gid`, or nothing."""
    if peer.uid in (0, os.geteuid()):
        return "operator"
    return "reader" if gid is not None and gid in peer.gids else None


class AdminSocket:
    """A listening socket at a path of its own. A context manager; at its end the path is removed, unless it is a successor's by then, or, `lent`, a
    predecessor's still."""

    def __init__(self, path: str, sock: socket.socket, *, lent: bool = False) -> None:
        self.path, self.sock = path, sock
        self._made: tuple[int, int] | None = None if lent else _identity(path)

    def settle(self) -> None:
        """The path is the predecessor's no more."""
        with suppress(OSError):
            self._made = _identity(self.path)

    def leave(self) -> None:
        """The path is a successor's from now on, who has the same socket."""
        self._made = None

    def __enter__(self) -> AdminSocket:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.sock.close()
        with suppress(OSError):
            if _identity(self.path) == self._made:
                os.unlink(self.path)


@contextmanager
def open_admin_socket(setting: str | None, inherited: socket.socket | None = None) -> Iterator[AdminSocket | None]:
    """Listens where `admin.socket` says, for the length of the block; None where it says "". What a dead daemon has left there is replaced.
    `inherited` is a living one's, whose place this takes (`take_place`).

    Raises KernelError if somebody listens there, something else than a socket is there, or it cannot be had. "auto" is given up with a warning in the last
    case: capturing is worth more than being asked.
    """
    path = admin_path(setting)
    if inherited is not None:
        there = inherited.getsockname()
        if path is not None and there == path and os.path.exists(path):
            with AdminSocket(path, inherited, lent=True) as taken:
                yield taken
            return
        inherited.close()
    if path is None:
        yield None
        return
    opened = None
    try:
        if setting == "auto":
            _make_directory()
        opened = AdminSocket(path, _listen(path))
    except OSError as error:
        sentence = f"cannot listen at {path} for the administrator: {error.strerror or error}"
        if setting != "auto":
            raise KernelError(f'{sentence}; choose another admin.socket, or "" for none') from error
        _log.warning("%s; `tproxyd connections`, `reload` and `drain` do not work without it", sentence)
    if opened is None:
        yield None
    else:
        with opened:
            yield opened


def take_place(admin: AdminSocket | None, before: str | None) -> None:
    """The predecessor, which was asked at the path `before`, goes on no more. Until then it may, and is asked there as ever."""
    if admin is not None and admin.path == before:
        admin.settle()
    elif before is not None:
        with suppress(OSError):
            os.unlink(before)  # nobody will be asked there any more


def _make_directory() -> None:
    with suppress(FileExistsError):
        os.mkdir(_DIRECTORY, 0o755)
        os.chmod(_DIRECTORY, 0o755)  # noqa: S103  # whatever the umask took away: the sockets in it have modes of their own


def _listen(path: str) -> socket.socket:
    """Raises KernelError, and OSError."""
    ours = _is_ours(os.path.dirname(path))
    _make_way(path, ours or _is_the_service_s(os.path.dirname(path)))
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # The mode that the path is made with: Linux takes it from the socket, and nothing has to be changed at a path that somebody could exchange.
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(path)
        gid = readers_gid()
        if gid is not None and ours:
            with suppress(PermissionError):  # without CAP_CHOWN: root, and who runs as a member, can ask all the same
                if os.lstat(path).st_gid != gid:  # a unit's user has that group, and its sandbox forbids the call
                    os.chown(path, -1, gid, follow_symlinks=False)
                os.chmod(path, 0o660)
        sock.listen(_BACKLOG)  # nobody could connect before
    except BaseException:
        sock.close()
        raise
    return sock


def _make_way(path: str, ours: bool) -> None:
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(there.st_mode):
        raise KernelError(
            f"cannot listen at {path} for the administrator: there is something else than a socket; remove it, or choose another admin.socket"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
            holder = _named(peer_of(probe))
        except ConnectionRefusedError:
            holder = None
        except BlockingIOError:
            holder = "a process with a full queue"
    if holder is not None:
        raise KernelError(
            f"cannot listen at {path} for the administrator: {holder} does; stop it, or choose another admin.socket"
        )
    if not ours:
        raise KernelError(
            f"cannot listen at {path} for the administrator: an old socket is there, in a directory that others may write to, who could "
            "exchange it; remove it, or choose another admin.socket"
        )
    os.unlink(path)


def _is_ours(directory: str) -> bool:
    """Whether nobody but root and ourselves may make or remove something there."""
    found = os.stat(directory)
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & 0o022


def _is_the_service_s(directory: str) -> bool:
    """Whether nobody but the units' user may: what is made there is not trusted as in one of root's, but an old socket may go."""
    found = os.stat(directory)
    with suppress(KeyError):
        return found.st_uid == pwd.getpwnam(GROUP).pw_uid and not found.st_mode & 0o022
    return False


def _named(peer: Peer) -> str:
    process = read_process(peer.pid) if peer.pid else None
    return f"{process.name} (pid {peer.pid})" if process is not None else "a process that cannot be seen from here"


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino
