"""A relay so plain that it is right: what the real one is compared with.

Two tasks a connection, each of which copies one direction and passes its end on. When a socket breaks, both are reset. No policy,
no splice, no state machine, and no hurry.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import trio

from netns_tests.watch import reset

__all__ = ["relay_plainly"]


async def relay_plainly(listener: trio.SocketListener, connect: Callable[[], Awaitable[trio.SocketStream]]) -> None:
    """Relays every connection of `listener` over one that `connect` makes, until cancelled."""
    await trio.serve_listeners(partial(_relay, connect), [listener])


async def _relay(connect: Callable[[], Awaitable[trio.SocketStream]], client: trio.SocketStream) -> None:
    async with client, await connect() as server:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_copy, client, server)
                nursery.start_soon(_copy, server, client)
        except* trio.BrokenResourceError:
            await reset(client)
            await reset(server)


async def _copy(source: trio.SocketStream, sink: trio.SocketStream) -> None:
    while chunk := await source.receive_some(65536):
        await sink.send_all(chunk)
    await sink.send_eof()
