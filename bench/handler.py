"""An embedding program that handles every connection itself: connects as the client, and moves the bytes. A peer of the group `handler`.

    python -m bench.handler CONFIG relay|loop

`relay` leaves the bytes to `ConnectionStream.relay_to`; `loop` takes and gives each piece, as a handler that looks at them would. Its access log
is on, read through a pipe as the daemon's is.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from functools import partial
from pathlib import Path

import trio

from tproxyd import Connection, ConnectionStream, Handle, load_config, open_interceptor
from tproxyd.net.sockets import open_upstream

__all__ = ["main"]

_READ = 256 * 1024


async def dial(connection: Connection) -> socket.socket:
    """To the original destination, with the client's address and port."""
    family = socket.AF_INET6 if ":" in connection.source[0] else socket.AF_INET
    fd = open_upstream(family, source=connection.source).detach()
    sock = socket.socket(family, socket.SOCK_STREAM, 0, fd)
    try:
        try:
            sock.connect(connection.original_destination)
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)
            if number := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(number, os.strerror(number)) from None
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    except BaseException:
        sock.close()
        raise
    return sock


async def relay(stream: ConnectionStream) -> None:
    await stream.relay_to(await dial(stream.connection))


async def loop(stream: ConnectionStream) -> None:
    sock = trio.socket.from_stdlib_socket(await dial(stream.connection))
    async with trio.SocketStream(sock) as upstream, trio.open_nursery() as nursery:
        nursery.start_soon(_pump, upstream, stream)
        await _pump(stream, upstream)


async def _pump(source: trio.abc.ReceiveStream, sink: trio.abc.HalfCloseableStream) -> None:
    while data := await source.receive_some(_READ):
        await sink.send_all(data)
    await sink.send_eof()


async def main(config: Path, way: str) -> None:
    handle = Handle(relay if way == "relay" else loop)

    async def policy(_: Connection) -> Handle:
        return handle

    write = partial(os.write, 1)
    gc.set_threshold(50_000, 20, 100)  # as a program would that has many connections
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with open_interceptor(
            load_config(config), policy=policy, on_lines=lambda lines: void(write(lines)), own_namespace=True
        ):
            print("ready", file=sys.stderr, flush=True)
            async for _ in signals:
                break


def void(_: object) -> None:
    """For callbacks that give nothing."""


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), sys.argv[2])
