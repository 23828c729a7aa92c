"""One daemon a network namespace: an abstract Unix socket, whose names the kernel keeps per network namespace and frees at death.

Any user may bind such a name. One who does keeps the daemon from starting, as one would who binds the listener's port; that is
refused aloud, with the culprit's pid, because going on without the lock would let a second daemon undo the first one's work.

Who holds the name also takes orders there, a word each, from root or from its own user: what belongs to a living daemon only that
daemon can take away. The answer is `ok`, `error` or `unknown`, and lines for people or for who has given the order.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import trio

from tproxyd.errors import KernelError, TproxydError
from tproxyd.net.proc_net import unix_name_holder

__all__ = [
    "Orders",
    "ServedError",
    "UnknownOrderError",
    "ask_holder",
    "lock_holder",
    "namespace_lock",
    "reverted",
    "send_order",
    "serve_orders",
]

_NAME = "tproxyd"
_LONGEST = 64  # bytes of an order
_PATIENCE = 2.0  # seconds for an order to arrive
_WORK = 15.0  # seconds for what it asks for

Orders = Mapping[str, Callable[[], Awaitable[str]]]
"""What each order does; the text that is returned is the answer, and a TproxydError that is raised, too."""


class ServedError(KernelError):
    """Another tproxyd serves this network namespace."""


class UnknownOrderError(KernelError):
    """Who has the namespace is not one who takes this order."""


def lock_holder() -> str | None:
    """`name (pid N)` of the process that has the namespace, if any."""
    return unix_name_holder(_NAME)


def ask_holder() -> tuple[int | None, bool]:
    """The pid of the process that has the namespace, None if nobody has it, and whether it can be trusted. Asks the kernel, not it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_PATIENCE)
        try:
            sock.connect("\0" + _NAME)
        except OSError:
            # Nobody, or one who has bound the name and does not listen.
            holder = lock_holder()
            match = re.search(r"\(pid (\d+)\)$", holder or "")
            return (int(match[1]) if match else None), False
        pid, _, _ = _credentials(sock)
        return pid, _is_trusted(sock)


@contextmanager
def namespace_lock(purpose: str) -> Iterator[socket.socket]:
    """Holds the namespace for the length of the block; gives the socket at which orders arrive. Raises ServedError that names the
    process that has it already."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as held:
        try:
            held.bind("\0" + _NAME)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise KernelError(f"cannot take the lock of this network namespace: {error.strerror}") from error
            raise ServedError(
                f"cannot {purpose}: {lock_holder() or 'another process'} serves this network namespace, or is about to "
                f"(it holds the abstract socket @{_NAME}); stop it first"
            ) from error
        held.listen(8)
        yield held


async def serve_orders(held: socket.socket, orders: Orders) -> None:
    """Takes orders, one after the other, until cancelled."""
    held.setblocking(False)
    listener = trio.socket.from_stdlib_socket(held)
    while True:
        try:
            client, _ = await listener.accept()
        except OSError:  # no file left, or the client has gone
            await trio.sleep(0.1)
            continue
        with client:
            if _is_trusted(client):
                with contextlib.suppress(OSError, trio.BrokenResourceError):  # it has gone
                    await _answer(client, orders)


async def _answer(client: trio.socket.SocketType, orders: Orders) -> None:
    with trio.move_on_after(_PATIENCE) as patience:
        word = (await client.recv(_LONGEST)).decode(errors="replace").strip()
        patience.deadline += _WORK
        order = orders.get(word)
        try:
            answer = "ok\n" + await order() if order is not None else "unknown\n"
        except TproxydError as error:
            answer = f"error\n{error}"
        with trio.CancelScope(shield=True), trio.move_on_after(_PATIENCE):
            await trio.SocketStream(client).send_all(answer.encode())


def send_order(order: str) -> str | None:
    """Gives an order to the one that has the namespace, and waits for the answer; None if nobody has it, or who has it ends meanwhile.

    Raises KernelError if it cannot be trusted, refuses, or does not answer; UnknownOrderError if it does not know the order.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_WORK)
        try:
            sock.connect("\0" + _NAME)
            if not _is_trusted(sock):
                raise KernelError(
                    f"{lock_holder() or 'a process'} of another user holds the abstract socket @{_NAME}: end it, it is not a daemon of root"
                )
            sock.sendall(order.encode() + b"\n")
            answer = b""
            while chunk := sock.recv(65536):
                answer += chunk
        except TimeoutError as error:
            raise KernelError(
                f"{lock_holder() or 'the daemon'} does not answer: is it stopped (SIGSTOP)? End it, and try again"
            ) from error
        except OSError:
            return None
    kind, _, text = answer.decode(errors="replace").partition("\n")
    if kind == "unknown":
        raise UnknownOrderError(f"{lock_holder() or 'the process that has this network namespace'} cannot {order}")
    if kind == "error":
        raise KernelError(f"{lock_holder() or 'the daemon'} refuses: {text}")
    return text if kind == "ok" else None


def reverted(removed: Iterable[object], remark: str) -> str:
    """The answer to the order `revert`: what was removed, and what that means for who answers."""
    return "\n".join(map(str, removed)) + f"\n\npid {os.getpid()} {remark}"


def _is_trusted(sock: socket.socket | trio.socket.SocketType) -> bool:
    """Whether the other end is root's or our own user's."""
    _, uid, _ = _credentials(sock)
    return uid in (0, os.geteuid())


def _credentials(sock: socket.socket | trio.socket.SocketType) -> tuple[int, int, int]:
    """Process, user and group of the other end."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, uid, gid
