"""`tproxyd.service` as tests see it: started in a systemd of its own, and what clients meet meanwhile."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from netns_tests.systemd_lab import System, open_systemd
from netns_tests.way import OPEN, Way
from tproxyd.net.sockets import format_address

__all__ = [
    "Load",
    "expect_captured",
    "expect_when_down",
    "kill",
    "load_of",
    "open_service",
    "peer_seen",
    "tables",
]

_CLIENTS = 8


@asynccontextmanager
async def open_service(way: Way, code: Path, directory: Path, config: str, *, edit: str = "") -> AsyncIterator[System]:
    """systemd in the proxy's node, `tproxyd.service` (with what `edit` has for [Service]) started in it; at the end of the block stopped, and nothing of it is left."""
    async with open_systemd(way.proxy, directory / "system", code, config) as system:
        if edit:
            await system.drop_in(f"[Service]\n{edit}\n")
        before = await way.proxy.dump()
        await system.ctl("start", "tproxyd")
        yield system
        await system.ctl("stop", "tproxyd")
        left = await way.proxy.dump()
        assert left == before, system.log()


async def peer_seen(way: Way) -> tuple[str, str]:
    """The client's own address and the one that the app sees."""
    async with await way.client.connect(way.address, 8080, timeout=20) as stream:
        own = format_address(stream.socket.getsockname())
        with trio.fail_after(20):
            answer = await stream.receive_some()
            await stream.send_eof()
            while await stream.receive_some():
                pass
    return own, json.loads(answer)["peer"]


async def expect_captured(way: Way, system: System) -> None:
    own, _ = await peer_seen(way)
    await system.record(own)


async def tables(way: Way) -> list[str]:
    return sorted(re.findall(r"tproxyd\w*", (await way.proxy.run("nft", "list", "tables")).stdout))


async def expect_when_down(way: Way, system: System, config: str) -> None:
    if config == OPEN:
        own, peer = await peer_seen(way)
        assert peer == own
    else:
        for _ in range(5):
            with pytest.raises(ConnectionRefusedError):
                await way.client.connect(way.address, 8080, timeout=3)


async def kill(pid: int) -> float:
    """SIGKILL; when it was sent. Returns when the process has ended."""
    pidfd = os.pidfd_open(pid)
    try:
        began = time.perf_counter()
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)
    return began


@asynccontextmanager
async def load_of(way: Way) -> AsyncIterator[Load]:
    """Eight clients for the length of the block."""
    load = Load(way)
    async with trio.open_nursery() as nursery:
        for _ in range(_CLIENTS):
            nursery.start_soon(load.dial)
        yield load
        nursery.cancel_scope.cancel()


class Load:
    """Clients in a loop; `waits` are how long each connection took from dial to end, `errors` what went wrong."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self.waits: list[float] = []
        self.errors: list[str] = []
        self.sources: list[str] = []

    async def dial(self) -> None:
        while True:
            began = time.perf_counter()
            try:
                own, _ = await peer_seen(self._way)
            except (OSError, trio.BrokenResourceError, trio.TooSlowError, ValueError) as error:
                self.errors.append(repr(error))
            else:
                self.sources.append(own)
            self.waits.append(time.perf_counter() - began)

    def unrecorded(self, system: System) -> list[str]:
        """Those who were served, and are not in the access log."""
        recorded = {*re.findall(r'"source":"([^"]+)"', system.records())}
        return [own for own in self.sources if own not in recorded]

    async def until(self, count: int) -> None:
        """Returns when so many connections have been tried."""
        with trio.fail_after(120):
            while len(self.waits) < count:
                await trio.sleep(0.01)
