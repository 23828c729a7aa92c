"""Whoever asks a daemon badly: its administrator's socket and its metrics' port, all kinds at once or some of them.

    python -m bench.abuse SOCKET PORT [decoy] [flood] [slow] [huge] [storm]

Says `up` when 1,000 connections have been made (or what else there is has begun), goes on until stdin ends, and then tells as a line of JSON what it has
done: connections made, answers got. Who starts it sees to it that it takes no CPU from what is measured (chrt, nice): it stands in for programs on
other cores, and what it costs the daemon is the daemon's own time. With `decoy` it listens there itself, and answers all alike: what the same abuse costs the
machine when it is nobody's.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import trio
import trio.lowlevel

__all__ = ["KINDS", "main"]

KINDS = ("flood", "slow", "huge", "storm")

_FLOOD = 1000  # connections at once
_SLOW = 50  # of each kind of slowness, and at each of the two places
_HUGE = 4  # and so many at a time, as above
_STORM = 10  # as above, of each resource
_HEAD = b"\r\nHost: x\r\n"
_DEAR = ("/v1/status", "/v1/diff", "/v1/connections", "/v1/plan?format=json")

Connect = Callable[[], Awaitable[trio.SocketStream]]


class _Abuse:
    def __init__(self, places: list[Connect]) -> None:
        self.places = places
        self.done: Counter[str] = Counter()
        self.flooded = trio.Event()
        self.answered = trio.Event()

    async def connect(self, place: int) -> trio.SocketStream:
        stream = await self.places[place]()
        self.done["connections"] += 1
        if self.done["connections"] >= _FLOOD:
            self.flooded.set()
        return stream

    async def flood(self, place: int) -> None:
        """Makes a connection, says nothing, and when it is sent away makes the next."""
        while True:
            with suppress(OSError, trio.BrokenResourceError):
                async with await self.connect(place) as stream:
                    while await stream.receive_some():
                        pass
            await trio.sleep(0.05)

    async def slow(self, place: int, said: bytes) -> None:
        """Says something, then a byte a second, and reads nothing. All do so at the same moment: this program is to wake up seldom."""
        while True:
            with suppress(OSError, trio.BrokenResourceError):
                async with await self.connect(place) as stream:
                    await stream.send_all(said)
                    while True:
                        await trio.sleep_until(trio.current_time() // 1 + 1)
                        await stream.send_all(b"x")
            await trio.sleep(0.05)

    async def huge(self, place: int) -> None:
        """A header without an end, again and again."""
        while True:
            with suppress(OSError, trio.BrokenResourceError):
                async with await self.connect(place) as stream:
                    await stream.send_all(b"GET / HTTP/1.1" + _HEAD + b"X: " + b"x" * 100_000)
                    while await stream.receive_some():
                        pass
                    self.done["answers"] += 1
            await trio.sleep(0.01)

    async def storm(self, place: int, target: str) -> None:
        """Asks as soon as the last answer is there."""
        while True:
            with suppress(OSError, trio.BrokenResourceError):
                async with await self.connect(place) as stream:
                    await stream.send_all(f"GET {target} HTTP/1.1".encode() + _HEAD + b"Connection: close\r\n\r\n")
                    whole = 0
                    while data := await stream.receive_some(65536):
                        whole += len(data)
                    self.done["answers"] += whole > 0
                    if whole:
                        self.answered.set()
            await trio.lowlevel.checkpoint()


async def _connect(path: str) -> trio.SocketStream:
    # Where the queue is full, trio would take the socket for connected.
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        while True:
            with suppress(BlockingIOError):
                sock.connect(path)
                return trio.SocketStream(trio.socket.from_stdlib_socket(sock))
            await trio.sleep(0.01)
    except BaseException:
        sock.close()
        raise


_CLIENTS = 64  # whom a decoy serves at once, as the daemon does
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n"


async def _decoy(listener: trio.SocketListener) -> None:
    """Answers whoever has sent a head, and sends away whoever has not for a tenth of a second."""
    room = trio.CapacityLimiter(_CLIENTS)

    async def serve(stream: trio.SocketStream) -> None:
        async with room, stream:
            with suppress(OSError, trio.BrokenResourceError), trio.move_on_after(0.1):
                head = b""
                while b"\r\n\r\n" not in head and len(head) < 16384 and (data := await stream.receive_some(8192)):
                    head += data
                await stream.send_all(_ANSWER)

    async with trio.open_nursery() as nursery:
        while True:
            nursery.start_soon(serve, await listener.accept())


async def main(path: str, port: int, kinds: list[str]) -> None:
    """Until stdin ends."""
    async with trio.open_nursery() as decoys:
        if "decoy" in kinds:
            kinds = [kind for kind in kinds if kind != "decoy"] or [*KINDS]
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(path)
                sock.listen(128)
                sock.setblocking(False)
                here = trio.SocketListener(trio.socket.from_stdlib_socket(sock.dup()))
            decoys.start_soon(_decoy, here)
            for listener in await trio.open_tcp_listeners(port, host="127.0.0.1"):
                decoys.start_soon(_decoy, listener)
        await _ask_badly(path, port, kinds)
        decoys.cancel_scope.cancel()


async def _ask_badly(path: str, port: int, kinds: list[str]) -> None:
    places: list[Connect] = [partial(_connect, path), partial(trio.open_tcp_stream, "127.0.0.1", port)]
    abuse = _Abuse(places)
    async with trio.open_nursery() as nursery:
        for place in range(2):
            if "flood" in kinds:
                for _ in range(_FLOOD // 2):
                    nursery.start_soon(abuse.flood, place)
            if "slow" in kinds:
                for said in (b"GET /v1/sta", b"PUT /v1/log-level HTTP/1.1" + _HEAD + b"Content-Length: 1000\r\n\r\n{"):
                    for _ in range(_SLOW):
                        nursery.start_soon(abuse.slow, place, said)
                for _ in range(_SLOW):  # takes no answer
                    nursery.start_soon(abuse.slow, place, (b"GET /metrics HTTP/1.1" + _HEAD + b"\r\n") * 200)
            if "huge" in kinds:
                for _ in range(_HUGE):
                    nursery.start_soon(abuse.huge, place)
            if "storm" in kinds:
                for target in ("/metrics",) if place else _DEAR:
                    for _ in range(_STORM):
                        nursery.start_soon(abuse.storm, place, target)
        if "flood" in kinds:
            await abuse.flooded.wait()
        if "storm" in kinds:
            await abuse.answered.wait()
        print("up", flush=True)
        stdin = trio.lowlevel.FdStream(os.dup(0))
        while await stdin.receive_some():
            pass
        nursery.cancel_scope.cancel()
    print(json.dumps(abuse.done), flush=True)


if __name__ == "__main__":
    trio.run(main, sys.argv[1], int(sys.argv[2]), sys.argv[3:] or [*KINDS])
