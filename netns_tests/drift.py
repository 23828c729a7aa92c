"""How tests see what a daemon makes of other programs' changes: its events, under load."""

from __future__ import annotations

import re

import trio

from netns_tests.watch import until
from tproxyd.testing import KernelState, Node
from tproxyd.testing.daemon import LabDaemon

__all__ = ["echo", "events", "load", "until_mended"]


async def echo(stream: trio.SocketStream, word: bytes, *, within: float) -> None:
    with trio.fail_after(within):
        await stream.send_all(word)
        got = b""
        while len(got) < len(word):
            got += await stream.receive_some()
    assert got == word


async def load(client: Node, address: str) -> None:
    """One client in a loop; what becomes of its connections while something is broken is not asked here."""
    while True:
        try:
            async with await client.connect(address, 8080, timeout=1) as stream:
                await echo(stream, b"load", within=1)
        except (OSError, trio.BrokenResourceError, trio.TooSlowError):
            await trio.sleep(0.05)


def events(daemon: LabDaemon) -> list[str]:
    """What the daemon has told of changes by others."""
    return re.findall(
        r"another program has changed.*|IPv6 is (?:off|on).*|interface .*(?:called|come|gone).*",
        daemon.process.stderr_text,
    )


async def until_mended(
    daemon: LabDaemon, node: Node, planned: KernelState, live: trio.SocketStream, *, number: int, began: float
) -> float:
    """Waits for so many events; then all is as planned, and the live connection goes on. Seconds since `began`."""
    await until(lambda: len(events(daemon)) >= number, within=3)
    took = trio.current_time() - began
    assert await node.dump() == planned
    await echo(live, b"%d" % number, within=3)
    return took
