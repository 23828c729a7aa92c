"""What a relay loop and its owner say to each other, over one Unix socket that keeps messages apart (SOCK_SEQPACKET).

The first byte of a message tells its kind. A loop never waits for its owner: what does not fit is kept for later, and access-log
lines beyond a bound are dropped and counted. The end of the socket is the end of the other side, however that came about.

    owner ▶ loop    setup (pickled), a workload to serve, to take no more of, or to serve no more, or whose clients are to wait, idle?, have those that live now
                    ended?, counters?, living ones?, close one, stop; about a connection that was handed over: forward it, relay it to this upstream,
                    reset what is relayed so, it has ended; when the configuration has changed: the setup again, a workload again, what it does not
                    capture any more is to go, listeners that are to close
    loop ▶ owner    ready, added, removed, records, living connections, counters, pages, log lines, idle, those have ended; a connection that the program
                    wants to decide about; those that were relayed for it and have ended; nobody lives of an older setup of a workload, listeners are
                    closed, a handler is to end
"""

from __future__ import annotations

import pickle
import socket
from collections import deque
from typing import Literal

import msgspec

from tproxyd.config import Config
from tproxyd.datapath.record import Outcome

__all__ = [
    "Counters",
    "EndedOrder",
    "ForwardOrder",
    "HandedOver",
    "LogLine",
    "Outbox",
    "RelayOrder",
    "Setup",
    "WorkloadSetup",
]

# Owner to loop.
SETUP_PART = b"P"
SETUP_END = b"E"
TELL_IDLE = b"I"
TELL_COUNTERS = b"C"
STOP = b"S"
TELL_OLD = b"O"
PAUSE = b"H"
RESUME = b"U"
FORWARD = b"F"  # with the socket that was handed over
ENDED = b"D"
RELAY = b"V"  # with the socket that was handed over, and that of the upstream
RESET = b"Z"  # an id: what is relayed so is reset; how it has ended is still to be said
ADD_PART = b"a"  # the setup of a workload, pickled, as much of it as fits
ADD = b"A"  # the rest of it, with the descriptors of its namespace and its listeners
REMOVE = b"R"
LIST = b"L"  # a page of living connections
CLOSE = b"X"  # a connection, by its identity
LET_GO = b"g"  # name, and seconds: connections of older setups that the present one would not capture
SHED = b"s"  # name, and addresses of listeners that are to close when nobody waits there any more
RETIRE = b"w"  # a workload's listeners are closed here: others have them
# Loop to owner.
READY = b"y"
RECORDS = b"r"
LIVING = b"o"
COUNTERS = b"c"
COUNTED = b"C"
LOG = b"l"
IDLE = b"i"
OLD_ENDED = b"e"
HAND_OVER = b"h"  # with a socket
RELAYED = b"v"  # as ENDED, of some that were to be relayed
ADDED = b"A"  # name, and why not
REMOVED = b"R"
LISTED = b"L"
CLOSED = b"X"
RETIRED = b"g"  # name, and the generation of which no connection lives any more
LISTENERS_CLOSED = b"s"  # those of a workload that were to be
END_HANDLER = b"H"

FDS = 253
"""Descriptors that come with one message at most: what the kernel allows (SCM_MAX_FD). After a hand-over a loop may have many listeners."""

MESSAGE = 64 * 1024
"""Bytes of a message at most, the kind included."""

CONNECT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the histogram of connect times, in seconds; one more bucket has what took longer."""


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """All that a loop has to know of itself: of `config` its own parts, [relay] and [limits]. `limit` and `pipes` are how many connections and
    pipes this loop may have; `alone` that nothing else in the process starts programs, which keeps the capabilities `keeps`, as far as it has
    them, and no other; `asks` that an embedding program wants to see every connection that is not refused."""

    config: Config
    limit: int
    pipes: int
    alone: bool
    keeps: tuple[str, ...] = ()
    asks: bool = False


class WorkloadSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What a loop has to know of a workload, besides its sockets. `listen` are the addresses of all its listeners, `listeners` how many of them come with
    this, if it is not one an address; `dial` is where its
    upstream sockets are made: in its namespace, or in that of the program. `paused`: clients are to wait in the listeners' queues until it is told
    otherwise. Of the same name it takes the place of what the loop has: connections that live stay under the `generation` to which they came.
    `closing` are the listeners' ports that are soon to be no more."""

    name: str
    config: Config
    listen: tuple[tuple[str, int], ...]
    dial: Literal["workload", "agent"] = "workload"
    paused: bool = False
    generation: int = 0
    closing: tuple[int, ...] = ()
    listeners: int | None = None


class HandedOver(msgspec.Struct):
    """A connection whose socket goes to the owner with this; `data` is what has been read from it already."""

    id: str
    workload: str
    source: tuple[str, int]
    original_destination: tuple[str, int]
    target: tuple[str, int] | str
    rule: str | None
    data: bytes = b""


class ForwardOrder(msgspec.Struct):
    """Its socket comes back: relay it, to `target` if that is given."""

    id: str
    target: tuple[str, int] | None


class RelayOrder(msgspec.Struct):
    """Its socket comes back, and that of an upstream of this family: relay between them. `data` is what has been read from the client and is to go
    first; no more than came with HandedOver, so it fits. The numbers are what has been moved so far, `data` included."""

    id: str
    family: int
    bytes_from_client: int
    bytes_from_upstream: int
    data: bytes = b""


class EndedOrder(msgspec.Struct):
    """It has ended, and how."""

    id: str
    outcome: Outcome
    bytes_from_client: int
    bytes_from_upstream: int


class Counters(msgspec.Struct, kw_only=True, array_like=True):
    """What one loop has counted of a workload since it began. `connect_seconds` has one number a bucket of CONNECT_SECONDS."""

    accepted: int = 0
    active: int = 0
    outcomes: dict[Outcome, int] = msgspec.field(default_factory=dict)
    bytes_from_client: int = 0
    bytes_from_upstream: int = 0
    connect_seconds: list[int] = msgspec.field(default_factory=lambda: [0] * (len(CONNECT_SECONDS) + 1))
    connect_seconds_sum: float = 0.0


class Count(msgspec.Struct, array_like=True):
    """The counters of those workloads that have changed, and how many records have been dropped since the last one."""

    counters: dict[str, Counters]
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
        self._queue: deque[tuple[bytes, socket.SocketType | None]] = deque()

    @property
    def full(self) -> bool:
        """Nobody has read for so long that nothing more is kept."""
        return len(self._queue) >= self._BOUND

    def put(self, kind: bytes, content: bytes = b"", *, sock: socket.SocketType | None = None) -> None:
        """Queues one message; to be followed by `send`. A socket goes with it, and is closed here then."""
        self._queue.append((kind + content, sock))

    def send(self) -> bool:
        """Sends what the socket takes; whether that was all. Raises OSError when the owner is gone."""
        queue = self._queue
        while queue:
            message, sock = queue[0]
            try:
                if sock is None:
                    self._sock.send(message)
                else:
                    socket.send_fds(self._sock, [message], [sock.fileno()])
                    sock.close()
            except BlockingIOError:
                return False
            queue.popleft()
        return True


def split_setup(setup: Setup) -> list[bytes]:
    """The setup as messages. With thousands of networks it is larger than one may be."""
    data = pickle.dumps(setup)
    parts = [data[begin : begin + MESSAGE - 1] for begin in range(0, len(data), MESSAGE - 1)]
    return [SETUP_PART + part for part in parts[:-1]] + [SETUP_END + parts[-1]]


def receive_setup(channel: socket.socket) -> Setup | None:
    """Waits for the setup, the first that is said; None if the owner has gone instead."""
    data = b""
    while True:
        message = channel.recv(MESSAGE)
        if not message:
            return None
        data += message[1:]
        if message[:1] == SETUP_END:
            setup: Setup = pickle.loads(data)  # noqa: S301  # from the parent alone, over a socket that has no name
            return setup


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
