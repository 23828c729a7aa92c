"""What all connections of one network namespace share: their number and its limit, their ids, where their records go."""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Callable

import trio

from tproxyd.config import Config
from tproxyd.datapath import Record
from tproxyd.net.locality import Locality
from tproxyd.policy import make_is_refused
from tproxyd.proxy.relay import ResetWatch

__all__ = ["Service"]

_log = logging.getLogger(__name__)

_SAY_EVERY = 5.0  # seconds between two log lines of one kind


class Service:
    """Made once a namespace; whoever makes it closes `locality` and `watch`.

    `listen` are the listeners' own addresses and `limit` is how many connections may live at once. `on_record` is called once
    for each connection, at its end, and must not block. `active` counts the connections that live.
    """

    def __init__(
        self,
        config: Config,
        *,
        listen: tuple[tuple[str, int], ...],
        limit: int,
        locality: Locality,
        watch: ResetWatch,
        on_record: Callable[[Record], None],
    ) -> None:
        self.config = config
        self.listen = frozenset(listen)
        self.listen_port = config.listen.port
        self.limit = limit
        self.locality = locality
        self.watch = watch
        self.is_refused = make_is_refused(config.policy.allow_special)
        self.on_record = on_record
        self.active = 0
        self._one_left = trio.Event()
        self._said: dict[object, float] = {}
        # Unique across restarts without a file: random start, then counted.
        self._ids = itertools.count(secrets.randbits(63))

    def next_id(self) -> str:
        """A connection's id, unique: 16 hexadecimal digits."""
        return f"{next(self._ids) & 0xFFFFFFFFFFFFFFFF:016x}"

    def enter(self) -> None:
        """One connection more."""
        self.active += 1

    def leave(self, record: Record) -> None:
        """One connection less, and its record handed over. What `on_record` raises is logged and costs nobody else."""
        self.active -= 1
        if self.active == 0 or self.active == self.limit - 1:  # nobody waits for other numbers
            self._one_left.set()
            self._one_left = trio.Event()
        try:
            self.on_record(record)
        except Exception as error:  # the embedding program's, whatever it is
            self.complain(error, "on_record failed for connection %s", record.id)

    async def wait_idle(self) -> None:
        """Returns as soon as no connection lives."""
        while self.active:
            await self._one_left.wait()

    async def wait_room(self) -> None:
        """Returns as soon as there may be one connection more."""
        while self.active >= self.limit:
            await self._one_left.wait()

    def complain(self, error: Exception, message: str, *args: object) -> None:
        """Logs what must not be passed over, with the error behind it; of errors of one kind one line in five seconds.

        Whatever one client can cause, many clients can cause a thousand times a second. A surprise comes with its traceback.
        """
        kind = (message, type(error), getattr(error, "errno", None))
        now = time.monotonic()
        if now - self._said.get(kind, -_SAY_EVERY) < _SAY_EVERY:
            return
        self._said[kind] = now
        expected = isinstance(error, OSError)
        _log.error(message + ": %s", *args, error, exc_info=None if expected else error)
