"""This end of the socket to a relay loop: what is said to it, and what it says. What messages mean is in datapath/report.py.

Knows trio and descriptors that go with a message; refuses to know who speaks.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

import trio

from tproxyd.datapath import report

__all__ = ["Orders", "make_channel", "messages"]

_MESSAGES = 32  # of a loop that are taken before other tasks have their turn
_ONE_DESCRIPTOR = socket.CMSG_SPACE(4)
_CHANNEL_BYTES = 1 << 20  # of messages that wait; the kernel gives what net.core.wmem_max allows


def make_channel() -> tuple[socket.socket, socket.socket]:
    """Both ends, blocking."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CHANNEL_BYTES)
    return ours, theirs


class Orders:
    """What is said to a loop, by as many tasks as there are connections: trio lets only one at a time wait for a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._turn = trio.Lock()

    async def send(self, order: bytes, fds: Sequence[int] = ()) -> None:
        """With copies of these descriptors. At once if there is room, and else in the order of those who wait; cancelled, it was not sent. Raises OSError or
        ClosedResourceError when the loop is gone."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
        if not self._turn.locked():
            with suppress(BlockingIOError):
                self._sock.sendmsg([order], rights)
                return
        async with self._turn:
            while True:
                if (
                    self._sock.fileno() < 0
                ):  # closed while others had their turn: what trio says to that number is no answer
                    raise trio.ClosedResourceError("the loop is gone")
                await trio.lowlevel.wait_writable(self._sock)
                with suppress(BlockingIOError):
                    self._sock.sendmsg([order], rights)
                    return

    def close(self) -> None:
        """Closes the socket; who waits for room is told."""
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()


async def messages(channel: socket.socket) -> AsyncIterator[tuple[bytes, int | None]]:
    """Messages, each with the descriptor that came with it, until the other end is gone."""
    turns = _MESSAGES
    while True:
        try:
            message, rights, _, _ = channel.recvmsg(report.MESSAGE, _ONE_DESCRIPTOR)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(channel)
            turns = _MESSAGES
            continue
        except OSError:
            return
        if not message:
            return
        yield message, struct.unpack("i", rights[0][2])[0] if rights else None
        turns -= 1
        if not turns:
            turns = _MESSAGES
            await trio.lowlevel.checkpoint()
