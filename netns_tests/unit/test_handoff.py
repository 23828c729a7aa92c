"""Handing a socket to another process, and taking it: both ends of the Unix socket, and receivers that are not as they should be."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
import trio.testing

from tproxyd import Connection, ConnectionStream, HandOff, receive_connections
from tproxyd.proxy import Receivers
from tproxyd.proxy.handoff import NoReceiverError

CONNECTION = Connection(
    id="0123456789abcdef",
    source=("2001:db8::2", 4444),
    original_destination=("2001:db8::9", 80),
    target="/run/app.sock",
    workload="web",
    rule="to the app",
)


@pytest.fixture
async def receivers() -> AsyncIterator[Receivers]:
    opened = Receivers()
    yield opened
    opened.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """What is handed off, and its client."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def deaf(tmp_path: Path) -> Iterator[socket.socket]:
    """Listens, and that is all."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "deaf"))
        listener.listen(0)
        yield listener


async def hand(receivers: Receivers, path: Path, sock: socket.socket, data: bytes = b"", within: float = 5.0) -> None:
    await receivers.hand_off(HandOff(str(path)), CONNECTION, sock, data, within)


async def test_a_connection_arrives_with_all_that_is_known_of_it(
    receivers: Receivers, pair: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    path = tmp_path / "connections"
    with trio.fail_after(5):
        async with receive_connections(path) as connections:
            assert path.stat().st_mode & 0o777 == 0o600
            await hand(receivers, path, pair[0], b"\0already")
            pair[0].close()
            pair[1].send(b" and then")
            stream = await connections.receive()
            assert stream.connection == CONNECTION
            assert await stream.receive_some() == b"\0already"
            assert await stream.receive_some() == b" and then"
            assert stream.received == 17
            await stream.aclose()
            assert pair[1].recv(1) == b""
        assert not path.exists()


async def test_the_message_is_what_the_documentation_says(
    receivers: Receivers, pair: tuple[socket.socket, socket.socket], deaf: socket.socket
) -> None:
    await hand(receivers, Path(deaf.getsockname()), pair[0], b"abc")
    sender, _ = deaf.accept()
    with sender:
        message, fds, _, _ = socket.recv_fds(sender, 65536, 2)
    assert len(fds) == 1
    with socket.socket(fileno=fds[0]) as sock:
        assert sock.getblocking()
        assert os.fstat(sock.fileno()).st_ino == os.fstat(pair[0].fileno()).st_ino
    assert json.loads(message) == {
        "version": 1,
        "id": "0123456789abcdef",
        "workload": "web",
        "protocol": "tcp",
        "source": "[2001:db8::2]:4444",
        "original_destination": "[2001:db8::9]:80",
        "target": "unix:/run/app.sock",
        "rule": "to the app",
        "data": "YWJj",
    }


@pytest.mark.parametrize("what", ["nothing", "stale", "file", "stream"])
async def test_where_nobody_takes_connections_is_known_at_once(
    receivers: Receivers, pair: tuple[socket.socket, socket.socket], tmp_path: Path, what: str
) -> None:
    path = tmp_path / "connections"
    with ExitStack() as stack:
        if what == "file":
            path.touch()
        elif what != "nothing":
            kind = socket.SOCK_STREAM if what == "stream" else socket.SOCK_SEQPACKET
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
            listener.bind(str(path))
            if what == "stream":
                listener.listen()
            else:
                listener.close()
        with trio.fail_after(1), pytest.raises(NoReceiverError, match="nobody takes connections at /"):
            await hand(receivers, path, pair[0])
    assert pair[0].getblocking()


async def test_a_receiver_that_reads_nothing_costs_its_own_connections_a_wait_and_no_others(
    receivers: Receivers, pair: tuple[socket.socket, socket.socket], deaf: socket.socket, tmp_path: Path
) -> None:
    path = Path(deaf.getsockname())
    sent = 0
    with pytest.raises(NoReceiverError, match=r"has taken nothing for 0\.2 s"):
        while sent < 10_000:
            await hand(receivers, path, pair[0], within=0.2)
            sent += 1
    assert 10 < sent < 10_000
    refused = []

    async def wait_in_vain() -> None:
        began = trio.current_time()
        with pytest.raises(NoReceiverError):
            await hand(receivers, path, pair[0], within=0.5)
        refused.append(trio.current_time() - began)

    async with trio.open_nursery() as nursery, receive_connections(tmp_path / "reads") as connections:
        for _ in range(5):
            nursery.start_soon(wait_in_vain)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(20):
            await hand(receivers, tmp_path / "reads", pair[0], within=0.3)
            (await connections.receive()).abort()
        assert refused == []  # they wait still, all at a time
    assert len(refused) == 5
    assert max(refused) < 1
    # Now it reads: what was said to be sent is there, each one whole, and nothing else.
    with deaf.accept()[0] as sender:
        sender.setblocking(False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hand, receivers, path, pair[0])
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(sent + 1):
                await trio.lowlevel.wait_readable(sender)
                message, fds, _, _ = socket.recv_fds(sender, 65536, 2)
                assert json.loads(message)["id"] == CONNECTION.id
                assert len(fds) == 1
                os.close(fds[0])
        with pytest.raises(BlockingIOError):
            sender.recv(1)


async def test_a_full_backlog_is_waited_for(
    receivers: Receivers, pair: tuple[socket.socket, socket.socket], deaf: socket.socket
) -> None:
    path = deaf.getsockname()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as first:
        first.connect(path)
        with pytest.raises(NoReceiverError, match="has taken nothing"):
            await hand(receivers, path, pair[0], within=0.1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hand, receivers, path, pair[0])
            await trio.sleep(0.05)
            deaf.accept()[0].close()
    with deaf.accept()[0] as sender:
        os.close(socket.recv_fds(sender, 65536, 1)[1][0])


async def test_who_is_cancelled_while_waiting_has_sent_nothing(
    receivers: Receivers, pair: tuple[socket.socket, socket.socket], deaf: socket.socket
) -> None:
    path = Path(deaf.getsockname())
    sent = 0
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(0.2):
            while True:
                await hand(receivers, path, pair[0])
                sent += 1
        nursery.start_soon(hand, receivers, path, pair[0])
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    with deaf.accept()[0] as sender:
        sender.setblocking(False)
        for _ in range(sent):
            os.close(socket.recv_fds(sender, 65536, 1)[1][0])
        with pytest.raises(BlockingIOError):
            sender.recv(1)
        await hand(receivers, path, pair[0])  # and whoever comes next is not held up
        os.close(socket.recv_fds(sender, 65536, 1)[1][0])


@pytest.mark.parametrize("missed", [False, True])
async def test_a_receiver_may_go_and_come_again(
    receivers: Receivers, pair: tuple[socket.socket, socket.socket], tmp_path: Path, missed: bool
) -> None:
    """Whether or not a connection has come meanwhile."""
    path = tmp_path / "connections"
    for _ in range(3):
        async with receive_connections(path) as connections:
            for _ in range(3):
                await hand(receivers, path, pair[0])
                (await connections.receive()).close()
        if missed:
            with pytest.raises(NoReceiverError):
                await hand(receivers, path, pair[0])


async def test_what_the_block_raises_arrives(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as raised:
        async with receive_connections(tmp_path / "connections"):
            raise ValueError("the program's own mistake")
    assert raised.group_contains(ValueError, match="the program's own mistake")
    assert not (tmp_path / "connections").exists()


async def test_what_nobody_has_asked_for_is_reset_at_the_receiver_s_end(receivers: Receivers, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        async with receive_connections(tmp_path / "connections"):
            with accepted:
                await hand(receivers, tmp_path / "connections", accepted)
            await trio.testing.wait_all_tasks_blocked(0.05)
        client.settimeout(2)
        with pytest.raises(ConnectionResetError):
            client.recv(1)


async def test_a_place_that_is_taken_is_not_taken_over_and_one_that_is_left_is(
    tmp_path: Path, deaf: socket.socket
) -> None:
    async def open_at(path: Path) -> None:
        async with receive_connections(path):
            pass

    with pytest.raises(OSError, match="somebody listens there"):
        await open_at(tmp_path / "deaf")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="something else than a socket"):
        await open_at(tmp_path / "file")
    assert (tmp_path / "file").exists()
    deaf.close()
    await open_at(tmp_path / "deaf")
    # A successor that has taken the path meanwhile keeps it.
    async with receive_connections(tmp_path / "one"):
        os.unlink(tmp_path / "one")
        async with receive_connections(tmp_path / "one"):
            made = (tmp_path / "one").stat().st_ino
            assert made
    assert not (tmp_path / "one").exists()


async def test_connections_are_taken_from_whom_they_may_come(tmp_path: Path) -> None:
    path = tmp_path / "connections"
    for uids, taken in (({os.geteuid()}, True), ({os.geteuid() + 1}, False)):
        ours, theirs = socket.socketpair()
        with ours, theirs, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sender:
            async with receive_connections(path, uids=uids) as connections:
                sender.connect(str(path))
                message = {"id": "0", "workload": "host", "source": "192.0.2.2:1", "rule": None, "data": "", "more": 1}
                message |= {"original_destination": "192.0.2.3:80", "target": "192.0.2.3:80", "version": 1}
                socket.send_fds(sender, [json.dumps(message).encode()], [ours.fileno()])
                with trio.move_on_after(0.5 if not taken else 5):
                    (await connections.receive()).close()
                    assert taken
                    continue
                assert not taken
                sender.setblocking(False)
                with pytest.raises(ConnectionResetError):  # hung up, with the message unread
                    sender.recv(1)


@pytest.mark.parametrize("message", [b"{}", b"not json", b'{"version": 1}'])
async def test_a_message_that_is_none_ends_its_sender_and_nobody_else(
    receivers: Receivers, pair: tuple[socket.socket, socket.socket], tmp_path: Path, message: bytes
) -> None:
    path = tmp_path / "connections"
    with trio.fail_after(5):
        async with receive_connections(path) as connections:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
                stranger.connect(str(path))
                socket.send_fds(stranger, [message], [pair[0].fileno()])
                assert not await trio.to_thread.run_sync(stranger.recv, 1)
            await hand(receivers, path, pair[0])
            stream: ConnectionStream = await connections.receive()
            stream.close()


async def test_a_descriptor_that_is_no_socket_ends_its_sender_and_nobody_else(
    receivers: Receivers, pair: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    path = tmp_path / "connections"
    reading, writing = os.pipe()
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with trio.fail_after(5), ExitStack() as stack:
        stack.callback(os.close, writing)
        async with receive_connections(path) as connections:
            with stranger:
                stranger.connect(str(path))
                socket.send_fds(stranger, [b"{}"], [reading])
                assert not await trio.to_thread.run_sync(stranger.recv, 1)
            os.close(reading)
            with pytest.raises(BrokenPipeError):  # nobody else has it open
                os.write(writing, b"x")
            await hand(receivers, path, pair[0])
            stream: ConnectionStream = await connections.receive()
            stream.close()


async def test_of_receivers_that_are_gone_no_file_is_kept(
    receivers: Receivers, pair: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    """A path a pod, and pods come and go as long as the program runs; one that is there still is kept."""
    async with receive_connections(tmp_path / "stays") as stays, trio.open_nursery() as nursery:
        nursery.start_soon(take_all, stays)
        await hand(receivers, tmp_path / "stays", pair[0])
        before = len(os.listdir("/proc/self/fd"))
        for number in range(20):
            async with receive_connections(tmp_path / str(number)) as connections:
                await hand(receivers, tmp_path / str(number), pair[0])
                await (await connections.receive()).aclose()
            with pytest.raises(NoReceiverError):
                await hand(receivers, tmp_path / f"none {number}", pair[0])
        assert len(os.listdir("/proc/self/fd")) <= before + 2
        assert set(receivers._receivers) <= {str(tmp_path / name) for name in ("stays", "19", "none 19")}
        nursery.cancel_scope.cancel()


async def take_all(connections: trio.MemoryReceiveChannel[ConnectionStream]) -> None:
    async for stream in connections:
        await stream.aclose()
