"""What systemd and the daemon say to each other (sd_notify(3), sd_listen_fds(3)); where there is no systemd, nothing is said.

The environment is read once, and what it says is taken out of it: a relay process that inherited NOTIFY_SOCKET could speak for the daemon.

The watchdog is fed for the data path and not for this process: only when every relay loop has answered. A loop that hangs is no death that the kernel sees, and
clients connect and wait.

Listeners are in systemd's store (FDSTORE) between the end of one daemon and the beginning of the next, in a restart, and at no other time. One that is there while
nobody accepts would be steered to after a SIGKILL, and clients would hang instead of being bypassed or refused.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence

import trio

__all__ = ["Manager", "find_manager"]

_log = logging.getLogger(__name__)

_FIRST_FD = 3  # SD_LISTEN_FDS_START
_STORED = "tproxyd-listener"  # FDNAME of ours: tells them from those of a socket unit
_PATIENCE = 1.0  # seconds for systemd to take a message; it takes microseconds
_BARRIER = 5.0  # seconds for systemd to have read everything, as sd_notify_barrier's callers have it
_SAY = 2.0  # seconds between two looks whether STATUS= is still true


class Manager:
    """The service manager. `passed` are the sockets that it has given, which are the caller's from then on, and `given` those among them that are of a socket unit.
    `address` is where it listens, None where nothing is to be said; `watchdog` the seconds within which it wants to hear of life, None without."""

    def __init__(
        self,
        address: str | None = None,
        watchdog: float | None = None,
        passed: Sequence[tuple[str, socket.socket]] = (),
    ) -> None:
        self._address = "\0" + address[1:] if address is not None and address.startswith("@") else address
        self._watchdog = watchdog
        self.passed = [sock for _, sock in passed]
        self._given = {_inode(sock) for name, sock in passed if name != _STORED}
        self._was_stored = any(name == _STORED for name, _ in passed)

    @property
    def environment(self) -> dict[str, str]:
        """What another process has to be told to speak with the same manager, once it is the service's main one."""
        found = {"NOTIFY_SOCKET": self._address.replace("\0", "@", 1)} if self._address is not None else {}
        return found | ({"WATCHDOG_USEC": str(int(self._watchdog * 1e6))} if self._watchdog is not None else {})

    def move_to(self, pid: int) -> None:
        """This process is the service's main one no more; it has nothing to say from then on."""
        self.notify(MAINPID=pid)
        self._address = None

    def notify(self, *, fds: Sequence[int] = (), **fields: object) -> bool:
        """Says all of it in one datagram: `notify(READY=1, STATUS="serves")`. Whether it was taken; if not, that is logged. Never waits for more than a second."""
        if self._address is None:
            return False
        text = "\n".join(f"{name}={str(value).replace(chr(10), ' ')}" for name, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(_PATIENCE)
                sock.connect(self._address)
                if fds:
                    socket.send_fds(sock, [text.encode()], fds)
                else:
                    sock.send(text.encode())
        except OSError as error:
            _log.warning("systemd does not take %s: %s", text.partition("=")[0], error.strerror or error)
            return False
        return True

    def reloading(self) -> None:
        """A reload has begun; READY=1 says that it has ended, well or not. In one datagram: what Type=notify-reload wants, which 252 does not know."""
        self.notify(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)

    @property
    def listens(self) -> bool:
        """Whether there is one."""
        return self._address is not None

    def empty_store(self) -> None:
        """Takes out of the store what is there: what a daemon has been given stays there, too, until it says so. Returns when that is done, or a listener that is
        opened anew would share its clients with a copy that nobody serves."""
        if self._address is not None:
            self.notify(FDSTOREREMOVE=1, FDNAME=_STORED)
            if self._was_stored and not self._wait_until_read():
                _log.warning("systemd does not say whether it has forgotten the listeners of the last run")

    def store(self, listeners: Iterable[socket.socket]) -> bool:
        """Leaves listeners for the next start, but for those that a socket unit keeps anyway. Whether all are there; if not, none is."""
        stored = {inode: sock for sock in listeners if (inode := _inode(sock)) not in self._given}
        if self._address is not None:
            # One a message: so many fit in any version's.
            done = [self.notify(fds=[sock.fileno()], FDSTORE=1, FDNAME=_STORED) for sock in stored.values()]
            if all(done) and self._wait_until_read():
                return True
            self.empty_store()
        return False

    def _wait_until_read(self) -> bool:
        """Whether all that was said has been read: who ends before is not known any more when it is."""
        ours, theirs = os.pipe()
        try:
            sent = self.notify(fds=[theirs], BARRIER=1)
            os.close(theirs)
            theirs = -1
            return sent and _is_closed_within(ours, _BARRIER)
        finally:
            os.close(ours)
            if theirs >= 0:
                os.close(theirs)

    async def feed_watchdog(self, until_answered: Callable[[], Awaitable[None]]) -> None:
        """Says WATCHDOG=1 again and again, each time when `until_answered` has returned, until cancelled."""
        if self._watchdog is None:
            return
        while True:
            with trio.move_on_after(self._watchdog / 2) as late:
                await until_answered()
            if late.cancelled_caught:
                _log.warning(
                    "a relay loop has not answered for %g s; systemd is told nothing meanwhile", self._watchdog / 2
                )
            else:
                self.notify(WATCHDOG=1)
                await trio.sleep(self._watchdog / 4)

    async def tell_status(self, line: Callable[[], str]) -> None:
        """Keeps STATUS= true, until cancelled; speaks only when there is something new."""
        told = ""
        while self._address is not None:
            if (now := line()) != told:
                self.notify(STATUS=now)
                told = now
            await trio.sleep(_SAY)


def find_manager(environment: MutableMapping[str, str] = os.environ) -> Manager:
    """Who has started this process, by its environment, from which that is removed. Descriptors are marked as not to be inherited, and
    what is no socket is closed."""
    taken = {
        name: environment.pop(name, "")
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
    }
    watchdog = None
    if taken["WATCHDOG_USEC"].isdecimal() and taken["WATCHDOG_PID"] in ("", str(os.getpid())):
        watchdog = int(taken["WATCHDOG_USEC"]) / 1e6 or None
    passed = []
    if taken["LISTEN_PID"] == str(os.getpid()) and taken["LISTEN_FDS"].isdecimal():
        names = taken["LISTEN_FDNAMES"].split(":")
        for index in range(int(taken["LISTEN_FDS"])):
            name = names[index] if index < len(names) else "unknown"
            if (sock := _take_socket(_FIRST_FD + index, name)) is not None:
                passed.append((name, sock))
    return Manager(taken["NOTIFY_SOCKET"] or None, watchdog, passed)


def _take_socket(fd: int, name: str) -> socket.socket | None:
    try:
        os.set_inheritable(fd, False)
        return socket.socket(fileno=fd)
    except OSError as error:
        _log.warning("systemd has passed descriptor %d (%s), which is no socket: %s", fd, name, error.strerror)
        with contextlib.suppress(OSError):
            os.close(fd)
        return None


def _inode(sock: socket.socket) -> int:
    """The same for all copies of a socket."""
    return os.fstat(sock.fileno()).st_ino


def _is_closed_within(fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, 0)  # POLLHUP: all copies of the other end are closed
    return bool(poll.poll(int(seconds * 1000)))
