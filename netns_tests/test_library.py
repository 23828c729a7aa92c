"""An embedding program: `open_interceptor` in a process of somebody's own, in a node of the lab."""

from __future__ import annotations

import json
import signal
import sys

import pytest
import trio

from netns_tests.way import Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import serve_identity

# Serves until SIGTERM cancels it. Its on_record fails for the first connection, and prints the others.
PROGRAM = """
import signal, sys, trio
from tproxyd import config_from_mapping
from tproxyd.interceptor import open_interceptor

records = []
def on_record(record):
    records.append(record)
    print(record.source, record.outcome, flush=True)
    if len(records) == 1:
        raise ValueError("this program's own mistake")

async def main():
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            async for _ in signals:
                nursery.cancel_scope.cancel()
    print("cancelled", flush=True)

async def serve():
    async with open_interceptor(config_from_mapping({"capture": {"ports": ["8080"]}}), on_record=on_record) as interceptor:
        print("open", interceptor.listen, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


async def test_63_an_exception_in_one_connection_costs_no_other(way: Way, nursery: trio.Nursery) -> None:
    """And cancelling takes everything down: connections, listeners, kernel state."""
    before = await way.proxy.dump()
    await nursery.start(serve_identity, way.app, 8080)
    async with way.proxy.process(sys.executable, "-c", PROGRAM, collect=True) as program:
        await program.wait_for_output("open")
        async with await way.client.connect(way.address, 8080) as lives:
            assert b"peer" in await lives.receive_some()
            for _ in range(3):
                async with await way.client.connect(way.address, 8080) as stream:
                    own = format_address(stream.socket.getsockname())
                    await stream.send_eof()
                    assert json.loads(b"".join([chunk async for chunk in stream]))
                assert await program.wait_for_output(own) == f"{own} closed"
            program.send_signal(signal.SIGTERM)
            with pytest.raises(trio.BrokenResourceError):
                await lives.receive_some()
            own = format_address(lives.socket.getsockname())
        assert await program.wait_for_output(own) == f"{own} drained"
        await program.wait_for_output("cancelled")
        assert await program.wait() == 0
    assert "this program's own mistake" in program.stderr_text
    assert await way.proxy.dump() == before
