"""One daemon a network namespace (net/ownership.py), and what others may ask of it.

Who holds the port takes orders there, a word each: what belongs to a living daemon only that daemon can take away. The kernel lets
nobody send from one process to another over rtnetlink who has not CAP_NET_ADMIN over the namespace: not the order, so it comes from
one who could do the work by hand, and not the answer. Nobody else can fill the queue either. An abstract Unix socket, which anybody may
connect to, knows uids alone, and all containers of a pod have uid 0.

The answer is `ok`, `error` or `unknown`, and lines for people or for who has given the order.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import trio

from tproxyd.errors import KernelError, TproxydError
from tproxyd.net.ownership import LOCK_PORT, Holder, ServedError, find_holder, hold_namespace, open_port

__all__ = [
    "LOCK_PORT",
    "Holder",
    "KeptError",
    "Orders",
    "ServedError",
    "StrangerError",
    "UnknownOrderError",
    "find_holder",
    "namespace_lock",
    "reverted",
    "send_order",
    "serve_orders",
]

_log = logging.getLogger(__name__)

_MOST = 1 << 22  # bytes of an answer; the kernel wants all of it to fit in the sender's buffer
_LONGEST = 64  # bytes of an order
_WORK = 15.0  # seconds for what it asks for
_PATIENCE = 2.0  # seconds more for the order and the answer to arrive
_LOOK = 0.2  # seconds between two looks whether the one that is to answer lives

Orders = Mapping[str, Callable[[], Awaitable[str]]]
"""What each order does; the text that is returned is the answer, and an error that is raised, too."""


class StrangerError(KernelError):
    """Who has the lock cannot be a tproxyd."""


class UnknownOrderError(KernelError):
    """Who has the namespace is not one who takes this order."""


class KeptError(UnknownOrderError):
    """A program that embeds tproxyd keeps this network namespace, and takes no order."""


@contextmanager
def namespace_lock(purpose: str) -> Iterator[socket.socket]:
    """Holds the namespace for the length of the block; gives the socket at which orders arrive. Needs CAP_NET_ADMIN. Raises ServedError
    that names the process that has it already."""
    with hold_namespace(purpose, answer=_MOST) as held:
        yield held


async def serve_orders(held: socket.socket, orders: Orders) -> None:
    """Takes orders, one after the other, until cancelled."""
    held.setblocking(False)
    port = trio.socket.from_stdlib_socket(held)
    while True:
        try:
            content, (sender, _) = await port.recvfrom(_LONGEST)
        except OSError:  # the queue has overflowed
            await trio.sleep(0.1)
            continue
        if sender != 0:  # the kernel
            answer = await _obey(content.decode(errors="replace").strip(), orders)
            with contextlib.suppress(OSError):  # it has gone
                # Never waits, so that what has been done is also told when this is cancelled meanwhile.
                held.sendto(answer.encode(errors="replace")[:_MOST], (sender, 0))


async def _obey(word: str, orders: Orders) -> str:
    order = orders.get(word)
    if order is None:
        return "unknown\n"
    try:
        with trio.fail_after(_WORK):
            return "ok\n" + await order()
    except TproxydError as error:
        return f"error\n{error}"
    except trio.TooSlowError:
        return f"error\nit could not be done within {_WORK:g} s"
    except Exception as error:  # whatever it is, it ends neither the daemon nor its ear for the next order
        _log.exception("the order %s failed", word)
        return f"error\n{type(error).__name__}: {error}"


def send_order(order: str) -> str | None:
    """Gives an order to the one that has the namespace, and waits for the answer; None if nobody has it, or who has it ends meanwhile.

    Needs CAP_NET_ADMIN. Raises StrangerError if it cannot be trusted, UnknownOrderError if it does not know the order (KeptError: it takes
    none), and KernelError if it refuses or does not answer.
    """
    holder = find_holder()
    if holder is not None and not holder.trusted:
        raise StrangerError(holder.stranger)
    if holder is not None and holder.embeds:
        raise KeptError(
            f"cannot {order}: an embedding program, {holder}, keeps this network namespace, and takes no orders here: it is for that program "
            "to tell of it, and to remove it"
        )
    with open_port() as sock:
        for option, seconds in ((socket.SO_SNDTIMEO, _PATIENCE), (socket.SO_RCVTIMEO, _LOOK)):
            sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(seconds), int(seconds % 1 * 1_000_000)))
        try:
            sock.sendto(f"{order}\n".encode(), (LOCK_PORT, 0))
            answer = _await_answer(sock)
        except ConnectionRefusedError:
            return None
        except TimeoutError as error:
            raise KernelError(
                f"{holder or 'the daemon'} does not answer: is it stopped (SIGSTOP)? End it, and try again"
            ) from error
        except OSError as error:
            raise KernelError(
                f"cannot ask {holder or 'the daemon'} to {order}: {error.strerror}; is it busy? Try again"
            ) from error
    kind, _, text = answer.decode(errors="replace").partition("\n")
    if kind == "unknown":
        raise UnknownOrderError(f"{holder or 'the process that has this network namespace'} cannot {order}")
    if kind == "error":
        raise KernelError(f"{holder or 'the daemon'} refuses: {text}")
    return text


def reverted(removed: Iterable[object], remark: str) -> str:
    """The answer to the order `revert`: what was removed, and what that means for who answers."""
    return "\n".join(map(str, removed)) + f"\n\npid {os.getpid()} {remark}"


def _await_answer(sock: socket.socket) -> bytes:
    """Raises ConnectionRefusedError when the port is nobody's any more, and TimeoutError."""
    deadline = time.monotonic() + _WORK + _PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            answer, (sender, _) = sock.recvfrom(_MOST)
            if sender == LOCK_PORT:
                return answer
        with contextlib.suppress(BlockingIOError):
            # An order that nobody knows: refused, if nobody is there. It is answered behind ours, or instead of it by one who has come meanwhile.
            sock.sendto(b"\n", (LOCK_PORT, 0))
    raise TimeoutError
