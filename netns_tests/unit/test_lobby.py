"""Who waits in the lobby, who is served next, and who is sent away."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.lowlevel
import trio.testing

from tproxyd.daemon import lobby
from tproxyd.daemon.lobby import Lobby

HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class Street:
    """Outside: whoever comes."""

    def __init__(self, listener: socket.socket, hall: Lobby, stack: ExitStack) -> None:
        self._address = listener.getsockname()
        self._hall = hall
        self._stack = stack

    async def client(self, said: bytes = b"") -> socket.socket:
        """One that has been let in."""
        client = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(self._address)
        client.sendall(said)
        await trio.testing.wait_all_tasks_blocked(0.01)
        client.setblocking(False)
        return client

    async def served(self) -> bytes:
        """What the next one has said who is served."""
        with trio.fail_after(2):
            client, said = await self._hall.next()
        with client, suppress(BlockingIOError):
            said += client.recv(100_000)
        return said

    async def nobody_is(self, seconds: float = 0.1) -> bool:
        with trio.move_on_after(seconds):
            await self._hall.next()
            return False
        return True


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Street]:
    with ExitStack() as clients, ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
        listener.bind(str(path / "socket"))
        listener.listen()
        hall = stack.enter_context(Lobby(listener.fileno(), trio.lowlevel.checkpoint))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hall.admit)
            yield Street(listener, hall, clients)
            nursery.cancel_scope.cancel()


def sockets() -> set[int]:
    """Those that this process has open."""
    found = set()
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(FileNotFoundError):  # the directory itself
            if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                found.add(fd)
    return found


def is_closed(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:  # with what it had said unread
        return True


async def test_they_are_served_in_the_order_in_which_their_heads_are_whole(tmp_path: Path) -> None:
    async with opened(tmp_path) as street:
        first = await street.client(b"GET /1")
        await street.client()
        assert await street.nobody_is()
        await street.client(HEAD.replace(b"/", b"/3", 1))
        first.sendall(HEAD.removeprefix(b"GET /"))
        assert (await street.served()).startswith(b"GET /3 ")
        assert (await street.served()).startswith(b"GET /1 ")
        assert await street.nobody_is()


@pytest.mark.parametrize(
    "said",
    [b"\x16\x03\x01", b"GET /\n\n", b"PUT / HTTP/1.1\r\n\r\n" + b"x" * 20_000],
    ids=["TLS", "bare line feeds", "a long body"],
)
async def test_what_is_whole_or_will_be_no_head_is_served_at_once(said: bytes, tmp_path: Path) -> None:
    async with opened(tmp_path) as street:
        await street.client(said)
        assert await street.served() == said


async def test_a_head_in_thousands_of_writes_is_served(tmp_path: Path) -> None:
    """A Unix socket has room for some hundreds, however short they are."""
    head = HEAD.replace(b"x", b"x" * 3000)
    async with opened(tmp_path) as street, trio.open_nursery() as nursery:
        client = await street.client()

        async def say() -> None:
            for byte in head:
                while True:
                    with suppress(BlockingIOError):
                        client.send(bytes([byte]))
                        break
                    await trio.sleep(0.001)

        nursery.start_soon(say)
        assert await street.served() == head


async def test_who_is_sent_away_says_nothing_more_though_another_program_has_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As has one that is being started, until it is."""
    monkeypatch.setattr(lobby, "_ROOM", 1)
    async with opened(tmp_path) as street:
        before = sockets()
        first = await street.client()
        (theirs,) = sockets() - before - {first.fileno()}
        copy = os.dup(theirs)
        try:
            await street.client()
            first.sendall(HEAD)
            assert await street.nobody_is()
        finally:
            os.close(copy)


async def test_a_head_without_an_end_is_refused_here(tmp_path: Path) -> None:
    async with opened(tmp_path) as street:
        client = await street.client(b"GET / HTTP/1.1\r\nX: " + b"x" * 17_000)
        assert await street.nobody_is()
        assert client.recv(1000).startswith(b"HTTP/1.1 431 ")
        assert is_closed(client)


async def test_who_leaves_is_forgotten(tmp_path: Path) -> None:
    async with opened(tmp_path) as street:
        (await street.client()).close()
        half = await street.client(b"GET /")
        half.shutdown(socket.SHUT_WR)
        assert await street.served() == b"GET /"  # is told what is missing


async def test_the_one_that_is_longest_here_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lobby, "_ROOM", 3)
    async with opened(tmp_path) as street:
        clients = [await street.client(b"GET /") for _ in range(5)]
        assert [is_closed(client) for client in clients] == [True, True, False, False, False]


async def test_who_has_said_a_whole_head_is_the_last_to_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lobby, "_ROOM", 3)
    async with opened(tmp_path) as street:
        asked = [await street.client(HEAD.replace(b"/", f"/{number}".encode(), 1)) for number in range(2)]
        assert (await street.served()).startswith(b"GET /0 ")  # with the other one behind it in line
        silent = [await street.client() for _ in range(4)]
        assert [is_closed(client) for client in silent] == [True, True, False, False]
        assert not is_closed(asked[1])
        assert (await street.served()).startswith(b"GET /1 ")


async def test_who_says_no_whole_head_has_so_many_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lobby, "_PATIENCE", 0.3)
    async with opened(tmp_path) as street:
        first = await street.client(b"GET /")
        await trio.sleep(0.2)
        second = await street.client()
        first.sendall(b"index")
        await trio.sleep(0.15)
        assert [is_closed(client) for client in (first, second)] == [True, False]
        await trio.sleep(0.2)
        assert is_closed(second)


async def test_at_the_end_all_are_sent_away(tmp_path: Path) -> None:
    async with opened(tmp_path) as street:
        clients = [(await street.client()).dup(), (await street.client(HEAD)).dup()]
    for client in clients:
        with client:
            assert is_closed(client)
