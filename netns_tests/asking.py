"""Whoever asks a daemon, well or badly."""

from __future__ import annotations

import json
import socket
import statistics
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import PIPE

import trio

from netns_tests.watch import METRICS, Http, another_works, processes, works
from netns_tests.way import Way
from tproxyd.testing import Node, serve_echo
from tproxyd.testing.daemon import LabDaemon, open_daemon

__all__ = ["CONFIG", "abused", "ask", "auto", "connect", "exchanges", "median", "serving", "unchunked"]

CONFIG = '[capture]\nports = ["8080"]\n' + METRICS
CHECKOUT = Path(__file__).parents[1]


def auto(node: Node) -> str:
    """Where a daemon of this node listens for its administrator by default."""
    return f"/run/tproxyd/netns-{node.inode}.sock"


async def connect(path: str) -> trio.SocketStream:
    """A connection to a socket whose queue may be full: then it waits, which trio's own way does not."""

    def connected() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        return sock

    return trio.SocketStream(trio.socket.from_stdlib_socket(await trio.to_thread.run_sync(connected)))


async def ask(
    path: str, target: str, method: str = "GET", body: bytes = b"", *, within: float = 5.0, more: str = ""
) -> Http:
    """One request to a socket, by the test's own user."""
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    with trio.fail_after(within):
        async with await connect(path) as stream:
            await stream.send_all(head.encode() + body)
            answer = Http(b"".join([chunk async for chunk in stream]))
    if "Transfer-Encoding: chunked" in answer.head:
        answer.body = unchunked(answer.body)
    return answer


def unchunked(data: bytes) -> bytes:
    whole = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        if not (length := int(size, 16)):
            assert data == b"\r\n"
            return whole
        whole, data = whole + data[:length], data[length + 2 :]


async def exchanges(stream: trio.SocketStream, count: int) -> list[float]:
    """Seconds of so many exchanges, one after the other."""
    took = []
    for _ in range(count):
        began = trio.current_time()
        await works(stream)
        took.append(trio.current_time() - began)
    return took


def median(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1000


@asynccontextmanager
async def serving(way: Way, nursery: trio.Nursery) -> AsyncIterator[tuple[LabDaemon, trio.SocketStream]]:
    """A daemon and a connection through it; at the end both are as they were, and nothing has gone wrong inside."""
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, CONFIG) as daemon, await way.client.connect(way.address, 8080) as stream:
        await works(stream)
        pids = processes(daemon)
        yield daemon, stream
        await works(stream)
        await another_works(way)
        assert (await ask(auto(way.proxy), "/healthz", within=8)).status == 200
        assert processes(daemon) == pids
    assert "Traceback" not in daemon.process.stderr_text


@asynccontextmanager
async def abused(node: Node, kind: str) -> AsyncIterator[dict[str, int]]:
    """Another program asks badly for the length of the block; what it has done is told at its end."""
    done: dict[str, int] = {}
    words = ("nice", "-n", "10", sys.executable, "-m", "bench.abuse", auto(node), "9101", kind)
    async with node.process(*words, stdin=PIPE, collect=True, cwd=str(CHECKOUT)) as abuse:
        await abuse.wait_for_output("up", timeout=60)
        yield done
        assert abuse.stdin is not None
        await abuse.stdin.aclose()
        assert await abuse.wait() == 0, abuse.stderr_text
        done |= json.loads(abuse.stdout_text.splitlines()[-1])
        print(done)
