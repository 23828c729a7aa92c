"""Output to systemd's journal: a Unix stream socket that $JOURNAL_STREAM names stands in for it."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import AsyncIterator

import pytest
import trio

from netns_tests.way import GATEWAY_V4, Way
from tproxyd.testing import Lab, serve_identity
from tproxyd.testing.daemon import TPROXYD


class Journal:
    """`theirs` is for a service's stdout and stderr, `named` what its environment says of it; `line(text)` waits for a line that has the text."""

    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair()
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        status = os.fstat(self.theirs.fileno())
        self.named = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        self._rest = b""

    async def line(self, text: str) -> str:
        with trio.fail_after(10):
            while True:
                while b"\n" not in self._rest:
                    self._rest += await self._stream.receive_some()
                line, _, self._rest = self._rest.partition(b"\n")
                if text.encode() in line:
                    return line.decode()

    def close(self) -> None:
        self._stream.socket.close()
        self.theirs.close()


@pytest.fixture
async def journal() -> AsyncIterator[Journal]:
    opened = Journal()
    yield opened
    opened.close()


@GATEWAY_V4
async def test_messages_bear_their_priority_and_connections_are_json(
    way: Way, nursery: trio.Nursery, journal: Journal
) -> None:
    await nursery.start(serve_identity, way.app, 8080)
    command = (*TPROXYD, "run", "--port", "8080")
    fd = journal.theirs.fileno()
    async with way.proxy.process(*command, stdout=fd, stderr=fd, env=journal.named) as daemon:
        assert (await journal.line("load table")).startswith("<6>tproxyd: info: ")
        assert (await journal.line("ready")).startswith("tproxyd: ready pid=")  # others wait for these very words
        daemon.send_signal(signal.SIGHUP)
        assert (await journal.line("nothing to reload")).startswith("<6>tproxyd: info: ")
        async with await way.client.connect(way.address, 8080) as stream:
            assert await stream.receive_some()
        assert json.loads(await journal.line('"source"'))["outcome"] == "closed"
        daemon.send_signal(signal.SIGTERM)
        assert await daemon.wait() == 0


async def test_why_it_does_not_start_is_an_error_there(sidecar_lab: Lab, journal: Journal) -> None:
    host, fd = sidecar_lab["host"], journal.theirs.fileno()
    for port, error in (("99999", "out of range"), ("8080", "cannot listen")):
        taken = host.listen("127.0.0.1", 15006)
        async with host.process(*TPROXYD, "run", "--port", port, stderr=fd, env=journal.named) as daemon:
            assert (await journal.line(error)).startswith("<3>tproxyd: ")
            assert await daemon.wait() in (os.EX_USAGE, os.EX_OSERR)
        await taken.aclose()
