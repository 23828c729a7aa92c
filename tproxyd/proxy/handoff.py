"""Connections that are given to another process: the accepted socket itself, by SCM_RIGHTS over a Unix socket.

The wire: SOCK_SEQPACKET, the receiver listens, one message a connection, of at most 64 KiB: a JSON object, and with it one descriptor. Nothing is
answered. The socket is blocking; its own name is the original destination, its peer's the client. The keys:

    version                        1; a receiver ignores keys that it does not know
    id, workload, protocol         as in the access log
    source, original_destination   "ip:port" or "[ip6]:port"
    target                         where it would have been forwarded to: the same, or "unix:/PATH"
    rule                           the name of the policy rule that let it through, or null
    data                           base64 of what has been read from the socket already; normally ""

A message is sent whole or not at all, so there is nothing to repeat; whether the other process has taken it from its queue is not known here, and with a
receiver that dies the kernel closes what waited there. Who may listen is told by SO_PEERCRED, which is whoever called listen(): unlike the owner of a path it
cannot be changed between the look and the use. In the other direction it is the receiver's to look; `receive_connections` does. Above both stands
who may write to the socket's directory.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import struct
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress

import msgspec
import trio

from tproxyd.net.sockets import abort, format_address, format_target
from tproxyd.proxy.stream import ConnectionStream
from tproxyd.proxy.verdict import Connection, HandOff

__all__ = ["NoReceiverError", "Receivers", "receive_connections"]

_VERSION = 1
_MESSAGE = 64 * 1024
_KNOCK = 0.01  # seconds between two tries where the kernel has no event: a full backlog, too many descriptors in flight
_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid: struct ucred (linux/socket.h)

_LATER = {
    errno.EAGAIN,  # of connect: the backlog is full
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.ETOOMANYREFS,  # more descriptors are in flight than files may be open, and CAP_SYS_RESOURCE and CAP_SYS_ADMIN are not there
}
_GONE = {errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN}


class NoReceiverError(Exception):
    """Nobody has taken it, and why. The socket is still the caller's."""


class _Message(msgspec.Struct, kw_only=True):
    version: int = _VERSION
    id: str
    workload: str
    protocol: str = "tcp"
    source: str
    original_destination: str
    target: str
    rule: str | None
    data: bytes  # base64 in JSON


class Receivers:
    """Who gets connections, by path: one Unix connection each, made when it is needed, kept, and made anew when it broke.

    To be closed by whoever made it. Paths do not wait for each other, nor does what is not handed off.
    """

    def __init__(self) -> None:
        self._receivers: dict[str, _Receiver] = {}

    async def hand_off(
        self, to: HandOff, connection: Connection, sock: socket.socket, already: bytes, timeout: float
    ) -> None:
        """Gives a copy of `sock` away; the caller closes its own. Raises NoReceiverError, after `timeout` seconds at the latest."""
        message = msgspec.json.encode(
            _Message(
                id=connection.id,
                workload=connection.workload,
                source=format_address(connection.source),
                original_destination=format_address(connection.original_destination),
                target=format_target(connection.target),
                rule=connection.rule,
                data=already,
            )
        )
        if len(message) > _MESSAGE:
            raise NoReceiverError(f"{len(already)} bytes have been read, more than a message holds")
        receiver = self._receivers.get(to.path)
        if receiver is None:
            self._forget_gone()
            receiver = self._receivers[to.path] = _Receiver(to.path)
        try:
            with trio.fail_after(timeout):
                await receiver.send(message, sock, to.uid)
        except trio.TooSlowError:
            raise NoReceiverError(f"who listens at {to.path} has taken nothing for {timeout:g} s") from None
        except OSError as error:
            raise NoReceiverError(f"nobody takes connections at {to.path}: {error.strerror}") from error

    def _forget_gone(self) -> None:
        """Those that nobody needs any more: pods come with a path each, and go."""
        for path, receiver in list(self._receivers.items()):
            if receiver.is_gone():
                receiver.close()
                del self._receivers[path]

    def close(self) -> None:
        for receiver in self._receivers.values():
            receiver.close()


class _Receiver:
    def __init__(self, path: str) -> None:
        self._path = path
        self._sock: socket.socket | None = None
        self._uid = -1
        self._turn = trio.Lock()  # trio lets one task at a time wait for a socket

    def is_gone(self) -> bool:
        """Whether nobody is there, and nobody is about to send."""
        if self._turn.locked():
            return False
        if self._sock is None:
            return True
        poll = select.poll()
        poll.register(self._sock, 0)  # POLLHUP is told unasked
        return bool(poll.poll(0))

    async def send(self, message: bytes, sock: socket.socket, uid: int | None) -> None:
        """Raises OSError if nobody is there, or somebody who may not be. Cancelled, it has sent nothing: no checkpoint comes after the sending."""
        await self._turn.acquire()
        try:
            fresh = False
            while True:
                if self._sock is None:
                    self._sock = await self._connect()
                    fresh = True
                if self._uid not in (0, os.geteuid(), uid):
                    self.close()  # who listens there may be another one by the next connection
                    if not fresh:
                        continue
                    raise PermissionError(errno.EPERM, f"uid {self._uid} listens there, and is not expected to")
                try:
                    socket.send_fds(self._sock, [message], [sock.fileno()])
                    return
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._sock)
                except OSError as error:
                    if error.errno in _LATER:
                        await trio.sleep(_KNOCK)
                        continue
                    self.close()
                    if error.errno not in _GONE or fresh:
                        raise
        finally:
            self._turn.release()

    async def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            while True:
                try:
                    sock.connect(self._path)  # never waits: the kernel knows at once
                    break
                except OSError as error:
                    if error.errno not in _LATER:
                        raise
                await trio.sleep(_KNOCK)
            self._uid = _peer_uid(sock)
        except BaseException:
            sock.close()
            raise
        return sock

    def close(self) -> None:
        if self._sock is not None:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()
            self._sock = None


@asynccontextmanager
async def receive_connections(
    path: str | os.PathLike[str], *, uids: Collection[int] | None = None, mode: int = 0o600
) -> AsyncIterator[trio.MemoryReceiveChannel[ConnectionStream]]:
    """Listens at a Unix socket for connections that a policy's `HandOff(path)` sends here:

        async with receive_connections("/run/app/connections.sock") as connections, trio.open_nursery() as nursery:
            async for stream in connections:
                nursery.start_soon(serve, stream)

    Each is a ConnectionStream as a handler gets it, and the caller's to close; what nobody asks for waits with its sender. They are taken from root and this process's
    own user, or from `uids`. `mode` is that of the socket's path. A path that a dead process has left is taken over. At the end of the block
    nothing is received any more, and the path is removed. Raises OSError: EADDRINUSE if somebody listens there. What the block itself raises arrives in
    an ExceptionGroup, as from a nursery.
    """
    file = os.fspath(path)
    allowed = frozenset({0, os.geteuid()} if uids is None else uids)
    listener = _listen(file, mode)
    try:
        made = os.stat(file)
        sending, receiving = trio.open_memory_channel[ConnectionStream](0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_accept, listener, allowed, sending, nursery)
            try:
                # Closed without a checkpoint: in the cancelled scope its Cancelled would take the place of what the block has raised.
                with receiving:
                    yield receiving
            finally:
                nursery.cancel_scope.cancel()
    finally:
        listener.close()
        with suppress(OSError):
            now = os.stat(file)
            if (now.st_dev, now.st_ino) == (made.st_dev, made.st_ino):  # else it is a successor's
                os.unlink(file)


def _listen(path: str, mode: int) -> socket.socket:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except FileNotFoundError:
            pass
        except ConnectionRefusedError:
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise FileExistsError(errno.EEXIST, "there is something else than a socket", path) from None
            os.unlink(path)
        except BlockingIOError:
            raise OSError(errno.EADDRINUSE, "somebody listens there", path) from None
        else:
            raise OSError(errno.EADDRINUSE, "somebody listens there", path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        listener.bind(path)
        os.chmod(path, mode)  # nobody can connect before listen
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


async def _accept(
    listener: socket.socket,
    allowed: frozenset[int],
    sending: trio.MemorySendChannel[ConnectionStream],
    nursery: trio.Nursery,
) -> None:
    while True:
        await trio.lowlevel.wait_readable(listener)
        try:
            sender, _ = listener.accept()
        except BlockingIOError:
            continue
        except OSError:  # no file left
            await trio.sleep(_KNOCK)
            continue
        if _peer_uid(sender) in allowed:
            nursery.start_soon(_receive, sender, sending)
        else:
            sender.close()


async def _receive(sender: socket.socket, sending: trio.MemorySendChannel[ConnectionStream]) -> None:
    """All that one interceptor hands off, until it is gone."""
    decode = msgspec.json.Decoder(_Message).decode
    with sender:
        sender.setblocking(False)
        while True:
            await trio.lowlevel.wait_readable(sender)
            try:
                data, fds, _, _ = socket.recv_fds(sender, _MESSAGE, 1)
            except BlockingIOError:
                continue
            except OSError:
                return
            if not data:
                return
            if not fds:
                continue  # no file left here: the kernel has closed it
            try:
                sock = socket.socket(fileno=fds[0])
            except OSError:  # no socket at all
                os.close(fds[0])
                return
            try:
                told = decode(data)
                target = told.target
                connection = Connection(
                    id=told.id,
                    source=_parse(told.source),
                    original_destination=_parse(told.original_destination),
                    target=target.removeprefix("unix:") if target.startswith("unix:") else _parse(target),
                    workload=told.workload,
                    rule=told.rule,
                )
                stream = ConnectionStream(sock, connection, told.data)
                await sending.send(stream)
            except (ValueError, trio.BrokenResourceError):  # not of ours; or nobody wants any more
                abort(sock)
                return
            except BaseException:
                abort(sock)
                raise


def _peer_uid(sock: socket.socket) -> int:
    _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(uid)


def _parse(text: str) -> tuple[str, int]:
    """The inverse of `format_address`."""
    host, _, port = text.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)
