"""How tests see what a daemon makes of other programs' changes: its events, under load."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from netns_tests.watch import until
from tproxyd.testing import KernelState, Node
from tproxyd.testing.daemon import LabDaemon

__all__ = ["echo", "events", "open_live", "under_load", "until_mended"]


async def echo(stream: trio.SocketStream, word: bytes, *, within: float) -> None:
    with trio.fail_after(within):
        await stream.send_all(word)
        got = b""
        while len(got) < len(word):
            got += await stream.receive_some()
    assert got == word


@asynccontextmanager
async def open_live(client: Node, *addresses: str) -> AsyncIterator[list[trio.SocketStream]]:
    """A connection to each, which is to outlive what is done to the kernel's state."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(await client.connect(address, 8080)) for address in addresses]


@asynccontextmanager
async def under_load(client: Node, address: str) -> AsyncIterator[None]:
    """Four clients that connect, ask and leave in a loop meanwhile."""
    async with trio.open_nursery() as clients:
        for _ in range(4):
            clients.start_soon(_load, client, address)
        yield
        clients.cancel_scope.cancel()


async def _load(client: Node, address: str) -> None:
    """What becomes of its connections while something is broken is not asked here."""
    while True:
        try:
            async with await client.connect(address, 8080, timeout=1) as stream:
                await echo(stream, b"load", within=1)
        except (OSError, trio.BrokenResourceError, trio.TooSlowError):
            await trio.sleep(0.05)


def events(daemon: LabDaemon) -> list[str]:
    """What the daemon has told of changes by others."""
    return re.findall(
        r"another program has changed.*|(?:IPv6 is (?:off|on)|br_netfilter is (?:off|on),).*|interface .*(?:called|come|gone).*",
        daemon.process.stderr_text,
    )


async def until_mended(
    daemon: LabDaemon,
    node: Node,
    planned: KernelState,
    live: Sequence[trio.SocketStream],
    *,
    number: int,
    began: float,
) -> float:
    """Waits for so many events; then all is as planned, and the live connections go on. Seconds since `began`."""
    await until(lambda: len(events(daemon)) >= number, within=3)
    took = trio.current_time() - began
    assert await node.dump() == planned
    for stream in live:
        await echo(stream, b"%d" % number, within=3)
    return took
