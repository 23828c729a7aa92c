"""Whom a relay loop lets in: at which listeners it listens, how many it accepts, and what has to wait in the queues meanwhile.

Knows listeners and how much room there is; refuses to know what becomes of a connection. With several workloads each has its share of the last
quarter of the room, and none more: what one of them keeps open does not keep the others' clients waiting.
"""

from __future__ import annotations

import errno
import math
import select
import socket
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from tproxyd.datapath import report
from tproxyd.datapath.connection import Connection
from tproxyd.net.sockets import accepted_socket, has_waiting

if TYPE_CHECKING:
    from tproxyd.datapath.books import Books
    from tproxyd.datapath.loop import RelayLoop
    from tproxyd.datapath.report import Setup
    from tproxyd.datapath.workload import Workload

__all__ = ["Accepting"]

_ACCEPTS = 64  # new connections between two looks at the old ones, of each listener
_LISTEN_ON = 0.02  # seconds between two looks whether somebody still waits at a listener that is to close
_PAUSE = 0.1  # seconds; without files the queue waits, connections that end give them back

_OF_THE_CONNECTION = {
    # Linux hands errors of a connection that died in the queue to accept(); the next one may be fine.
    errno.ECONNABORTED,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENONET,
    errno.ENOPROTOOPT,
    errno.EOPNOTSUPP,
    errno.EPERM,  # a firewall's
    errno.EPROTO,
}


class Accepting:
    """Of one loop, for all `workloads` that it serves. `take` is to be called at the end of a turn where something is `ready`, and `keep_time` when it
    is `due`."""

    def __init__(
        self,
        loop: RelayLoop,
        setup: Setup,
        *,
        books: Books,
        workloads: Mapping[str, Workload],
        epoll: select.epoll,
        handlers: dict[int, Callable[[int], None]],
    ) -> None:
        self._loop, self._books, self._workloads = loop, books, workloads
        self._epoll, self._handlers = epoll, handlers
        self.ready: dict[socket.socket, Workload] = {}
        self._on = True
        self._resume_due = math.inf
        self._shedding: dict[socket.socket, Workload] = {}  # listeners that close when nobody waits there
        self._shed_due = math.inf
        self._sated: set[Workload] = set()  # those that have their share, while only shares are left
        self.limit_to(setup)
        self.share_out()

    @property
    def due(self) -> float:
        return min(self._resume_due, self._shed_due)

    def limit_to(self, setup: Setup) -> None:
        """So many connections, from now on; to be followed by `look_for_room`."""
        config = setup.config
        self._backlog = config.listen.backlog
        self._limit = setup.limit
        self._full = (
            f"{setup.limit} connections live, as many as limits.max_connections allows: new ones wait"
            if config.limits.max_connections != "auto"
            else f"{setup.limit} connections are all there are files for: new ones wait; raise LimitNOFILE (ulimit -n)"
        )

    def look_for_room(self) -> None:
        """The limit may be a higher one."""
        self.share_out()
        self._resume_with_room()

    # What is served.

    def open(self, workload: Workload) -> None:
        """One more."""
        self.share_out()
        if self._on:
            self._listen_to(workload)

    def replace(self, before: Workload, workload: Workload) -> None:
        """The listeners are other descriptors, mostly of the same sockets: nobody who waits there is lost."""
        self.close_listeners(before)
        if self._on:
            self._listen_to(workload)

    def close_listeners(self, workload: Workload) -> None:
        """Nothing of it is accepted any more; what lives goes on."""
        if self._listens(workload):
            self._turn_away(workload)
        self._sated.discard(workload)
        for listener in workload.listeners:
            self.ready.pop(listener, None)
            self._shedding.pop(listener, None)
        workload.close_listeners()

    def share_out(self) -> None:
        """Each workload that is served now has its share."""
        count = len(self._workloads)
        self._common = self._limit if count < 2 else self._limit - self._limit // 4
        self._share = self._limit if count < 2 else max(1, self._limit // 4 // count)
        if self._on:
            self._feed(*self._sated)

    def shed(self, workload: Workload, addresses: Collection[tuple[str, int]]) -> bool:
        """Closes its listeners at these addresses when nobody waits there any more, and tells the owner; False if there are none."""
        for listener in workload.listeners:
            if listener.getsockname()[:2] in addresses:
                self._shedding[listener] = workload
        self._shed_due = self._loop.now
        return workload in self._shedding.values()

    def pause(self, workload: Workload) -> None:
        """Takes nobody for it any more, or until `resume`: its clients wait in the queue."""
        if self._listens(workload):
            self._turn_away(workload)
        self._sated.discard(workload)
        workload.paused = True

    def resume(self, workload: Workload) -> None:
        """Takes those who wait, and all others. Harmless without `pause`."""
        if workload.paused:
            workload.paused = False
            if self._on:
                self._listen_to(workload)

    def stop(self) -> None:
        """Nothing is accepted any more, however much room there is."""
        self._on = False
        for workload in self._workloads.values():
            workload.close_listeners()

    # Turns.

    def take(self) -> None:
        """Accepts at the listeners where somebody waits."""
        ready, self.ready = self.ready, {}
        for listener, workload in ready.items():
            self._accept(workload, listener)

    def take_all(self, workload: Workload) -> int:
        """Accepts at all of its listeners; how many that were."""
        return sum(self._accept(workload, listener) for listener in workload.listeners)

    def take_queue(self, workload: Workload) -> None:
        """Accepts whoever's handshake is complete: no more than can wait in the queue."""
        for _ in range(1 + self._backlog // _ACCEPTS):
            if not self.take_all(workload):
                break

    def note_end(self, workload: Workload) -> None:
        """A connection of it has ended, and made room."""
        if not self._on:
            self._resume_with_room()
        if self._sated and self._on:
            if len(self._books.connections) < self._common:
                self._feed(*self._sated)
            elif len(workload.connections) < self._share:
                served = self._workloads.get(workload.name)  # the same, or one that has taken its place
                if served in self._sated:
                    self._feed(served)

    def keep_time(self, now: float) -> None:
        """Does what is due."""
        if now >= self._resume_due:
            self._resume_due = math.inf
            self._resume_all()
        if now >= self._shed_due:
            self._shed()

    def _accept(self, workload: Workload, listener: socket.socket) -> int:
        """Takes what waits, as far as there is room; how many that were."""
        if workload.paused:
            return 0
        loop, books = self._loop, self._books
        family, accept = workload.accepts[listener]
        for count in range(_ACCEPTS):
            if not self._on:
                return count
            if len(books.connections) >= self._limit:
                books.remark(self._full)
                self._pause_all()
                return count
            if len(books.connections) >= self._common and len(workload.connections) >= self._share:
                if workload not in self._sated:
                    books.remark(
                        f"workload {workload.name} has its share of the room that is left, {self._share} connections: its new ones wait",
                        kind="share",
                    )
                    self._turn_away(workload)
                    self._sated.add(workload)
                return count
            try:
                fd, client = accept()
            except BlockingIOError:
                return count
            except OSError as error:
                if error.errno not in _OF_THE_CONNECTION:
                    books.complain(error, "cannot accept connections, and will try again")
                    self._pause_all()
                    self._resume_due = loop.now + _PAUSE
                    return count
                continue
            connection = Connection(loop, workload, accepted_socket(family, fd), client, books.next_identity())
            books.open(connection)
            connection.begin()
        self.ready[listener] = workload
        return _ACCEPTS

    def _shed(self) -> None:
        """Closes those at which nobody waits any more."""
        self._shed_due = math.inf
        for listener, workload in list(self._shedding.items()):
            self._accept(workload, listener)
            if has_waiting(listener):
                self._shed_due = self._loop.now + _LISTEN_ON  # there was no room, or very many wait
                continue
            del self._shedding[listener]
            self.ready.pop(listener, None)
            if self._listens(workload):
                self._unwatch(listener)
            workload.listeners.remove(listener)
            listener.close()
            if workload not in self._shedding.values():
                self._books.tell(report.LISTENERS_CLOSED, workload.name.encode())

    # Listening, of each workload and of all.

    def _listens(self, workload: Workload) -> bool:
        return self._on and not workload.paused and workload not in self._sated

    def _listen_to(self, workload: Workload) -> None:
        if workload.paused:
            return
        for listener in workload.listeners:
            self._handlers[listener.fileno()] = self._on_listener(workload, listener)
            self._epoll.register(listener.fileno(), select.EPOLLIN)

    def _on_listener(self, workload: Workload, listener: socket.socket) -> Callable[[int], None]:
        # At most once a turn: what a flood brings must not keep the connections that live from theirs.
        return lambda _: self.ready.__setitem__(listener, workload)

    def _turn_away(self, workload: Workload) -> None:
        for listener in workload.listeners:
            self._unwatch(listener)

    def _unwatch(self, listener: socket.socket) -> None:
        del self._handlers[listener.fileno()]
        self._epoll.unregister(listener.fileno())

    def _pause_all(self) -> None:
        for workload in self._workloads.values():
            if self._listens(workload):
                self._turn_away(workload)
        self._sated.clear()
        self._on = False

    def _resume_all(self) -> None:
        self._on = True
        for workload in self._workloads.values():
            self._listen_to(workload)

    def _resume_with_room(self) -> None:
        if not self._on and self._resume_due == math.inf and len(self._books.connections) < self._limit:
            self._resume_all()

    def _feed(self, *workloads: Workload) -> None:
        """Lets them accept again."""
        self._sated.difference_update(workloads)
        for workload in workloads:
            self._listen_to(workload)
