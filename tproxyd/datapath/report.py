"""What a relay loop and its owner say to each other, over one Unix socket that keeps messages apart (SOCK_SEQPACKET).

The first byte of a message tells its kind. A loop never waits for its owner: what does not fit is kept for later, and access-log
lines beyond a bound are dropped and counted. The end of the socket is the end of the other side, however that came about.

    owner ▶ loop    setup (pickled), idle?, counters?, stop
    loop ▶ owner    ready, records, living connections, counters, log lines, idle
"""

from __future__ import annotations

import socket
from collections import deque
from typing import Literal

import msgspec

from tproxyd.config import Config
from tproxyd.datapath.record import Outcome

__all__ = ["Counters", "LogLine", "Outbox", "Setup"]

# Owner to loop.
TELL_IDLE = b"I"
TELL_COUNTERS = b"C"
STOP = b"S"
# Loop to owner.
READY = b"R"
RECORDS = b"r"
LIVING = b"o"
COUNTERS = b"c"
COUNTED = b"C"
LOG = b"l"
IDLE = b"i"

MESSAGE = 64 * 1024
"""Bytes of a message at most, the kind included."""

CONNECT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the histogram of connect times, in seconds; one more bucket has what took longer."""


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """All that a loop has to know. `listen` are the addresses of all listeners; `limit` and `pipes` are how many connections and
    pipes this loop may have; `alone` that nothing else in the process starts programs."""

    config: Config
    listen: tuple[tuple[str, int], ...]
    limit: int
    pipes: int
    alone: bool


class Counters(msgspec.Struct, kw_only=True, array_like=True):
    """What one loop has counted since it began. `connect_seconds` has one number a bucket of CONNECT_SECONDS."""

    accepted: int = 0
    active: int = 0
    outcomes: dict[Outcome, int] = msgspec.field(default_factory=dict)
    bytes_from_client: int = 0
    bytes_from_upstream: int = 0
    connect_seconds: list[int] = msgspec.field(default_factory=lambda: [0] * (len(CONNECT_SECONDS) + 1))
    connect_seconds_sum: float = 0.0
    records_dropped: int = 0


class LogLine(msgspec.Struct, array_like=True):
    """Something for the log. `trace` is the traceback of a surprise."""

    level: Literal["info", "warning", "error"]
    text: str
    trace: str | None = None


class Outbox:
    """Messages on their way to the owner: sent when there is room, in order, and never waited for."""

    _BOUND = 256  # messages; with lines of 300 bytes some 50,000 records

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._queue: deque[bytes] = deque()

    @property
    def full(self) -> bool:
        """Nobody has read for so long that nothing more is kept."""
        return len(self._queue) >= self._BOUND

    def put(self, kind: bytes, content: bytes = b"") -> None:
        """Queues one message; to be followed by `send`."""
        self._queue.append(kind + content)

    def send(self) -> bool:
        """Sends what the socket takes; whether that was all. Raises OSError when the owner is gone."""
        queue = self._queue
        while queue:
            try:
                self._sock.send(queue[0])
            except BlockingIOError:
                return False
            queue.popleft()
        return True


def lines_to_messages(lines: bytes) -> list[bytes]:
    """Whole lines, as many at a time as a message holds."""
    messages = []
    begin = 0
    while len(lines) - begin >= MESSAGE:
        end = lines.rfind(b"\n", begin, begin + MESSAGE - 1) + 1
        messages.append(lines[begin:end])
        begin = end
    if begin < len(lines):
        messages.append(lines[begin:])
    return messages
