"""What a relay is: one contract for every engine in both homes, through the real daemon. Every byte, in order, both ends as they were.

The peers are this process's own sockets, one on each side of the daemon, so each test sees both ends of a connection at once. Every
test ends with the daemon's files: those that connections had are given back, and the pipes that are kept are empty.
"""

from __future__ import annotations

import array
import fcntl
import hashlib
import itertools
import json
import os
import socket
import termios
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from netns_tests.reference_relay import relay_plainly, reset
from netns_tests.way import median_ms
from tproxyd.net.sockets import format_address, unsent_bytes
from tproxyd.testing import GATEWAY, SIDECAR, LabDaemon, Node, digest_of, payload
from tproxyd.testing.daemon import open_daemon
from tproxyd.testing.plugin import OpenLab

set_hypothesis_home_dir(os.devnull)

SLOTS = 12  # connections at once; each has a port of its own, so that both ends of each are known
FIRST_PORT = 8080
REFERENCE_PORT = 9080  # not captured: the plain relay, which a test compares with
AT_ONCE = 4  # random schedules; each has a second slot for the plain relay
SPARE_PIPES = 64  # that a relay keeps for the next transfer

End = Literal["orderly", "reset", "own"]
"""How a connection ended for one side: the peer's FIN, a reset, or that it was this side that reset it before anything else."""


class Bench:
    """A daemon, and whoever talks through it. `pair` gives both ends of one connection."""

    def __init__(self, daemon: LabDaemon, client: Node, app: Node, address: str) -> None:
        self.daemon, self.client, self.app, self.address = daemon, client, app, address
        self.bind = "::" if ":" in address else "0.0.0.0"
        self.listeners = [app.listen(self.bind, FIRST_PORT + slot) for slot in range(SLOTS)]
        self._free = list(range(SLOTS))
        self._slots = trio.Semaphore(SLOTS)

    async def pair(self, slot: int, *, port: int = 0) -> tuple[trio.SocketStream, trio.SocketStream]:
        """The client's and the app's end of a new connection through the daemon; with `port` through what listens there."""
        stream = await self.client.connect(self.address, port or FIRST_PORT + slot)
        with trio.fail_after(5):
            accepted = await self.listeners[slot].accept()
        for end in (stream, accepted):
            # What the peers do to themselves is not the relay's.
            end.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.socket.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        return stream, accepted

    async def each(self, name: object, function: Callable[[Conversation], Awaitable[None]], within: float) -> None:
        """Calls `function` with a connection, as soon as a slot is free. A failure tells `name`."""
        async with self._slots:
            slot = self._free.pop()
            try:
                client, app = await self.pair(slot)
                async with client, app:
                    try:
                        with trio.fail_after(within):
                            await function(Conversation(self, client, app, *addresses_of(client)))
                    except BaseException as error:
                        error.add_note(f"in {name}")
                        raise
            finally:
                self._free.append(slot)

    async def aclose(self) -> None:
        for listener in self.listeners:
            await listener.aclose()


@dataclass
class Conversation:
    """Both ends of one connection through the daemon."""

    bench: Bench
    client: trio.SocketStream
    app: trio.SocketStream
    source: str
    destination: str

    async def record(self) -> dict[str, Any]:
        """Its line of the access log. The client's address alone could be that of an earlier one, to another port."""
        line = await self.bench.daemon.process.wait_for_output(
            f'"source":"{self.source}","original_destination":"{self.destination}"'
        )
        content: dict[str, Any] = json.loads(line)
        return content

    def ends(self, first: str) -> tuple[trio.SocketStream, trio.SocketStream]:
        """The named one ("client" or "app"), and the other."""
        return (self.client, self.app) if first == "client" else (self.app, self.client)


@dataclass
class Seen:
    """What one end has received, and how it ended."""

    data: bytearray = field(default_factory=bytearray)
    end: End | None = None


def addresses_of(stream: trio.SocketStream) -> tuple[str, str]:
    """Its own and its peer's, as in the access log."""
    return format_address(stream.socket.getsockname()), format_address(stream.socket.getpeername())


async def read(
    stream: trio.SocketStream, seen: Seen, *, size: int = 65536, pause: float = 0.0, pauses: int = 1 << 30
) -> Seen:
    """To the end, whatever that is; `pause` before each of the first `pauses` reads."""
    try:
        for number in itertools.count():
            if pause and number < pauses:
                await trio.sleep(pause)
            chunk = await stream.receive_some(size)
            if not chunk:
                break
            seen.data += chunk
        seen.end = seen.end or "orderly"
    except trio.BrokenResourceError:
        seen.end = "reset"
    except trio.ClosedResourceError:  # by the other task of this side
        seen.end = seen.end or "own"
    return seen


async def read_exactly(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = await stream.receive_some(count - len(data))
        assert chunk, f"the connection ended after {len(data)} of {count} bytes"
        data += chunk
    return data


async def send(stream: trio.SocketStream, size: int) -> None:
    for chunk in payload(size):
        await stream.send_all(chunk)


expected_digest = cache(digest_of)


def assert_is_payload(data: bytes | bytearray, size: int) -> None:
    """All of it, and nothing else. Said in digests: a difference of 5 MB is nothing to look at."""
    assert len(data) == size
    assert hashlib.sha256(data).hexdigest() == expected_digest(size)


def assert_begins_payload(data: bytes | bytearray, size: int) -> None:
    assert len(data) <= size
    assert hashlib.sha256(data).hexdigest() == digest_of(len(data))


async def all_at_once(*functions: Callable[[], Awaitable[Any]]) -> None:
    async with trio.open_nursery() as nursery:
        for function in functions:
            nursery.start_soon(function)


RELAYS = [
    pytest.param((engine, workers, layout), id=f"{engine} {home} {layout}")
    for engine, workers, home, layout in [
        *((engine, *home, "sidecar v4") for engine in ("auto", "copy", "splice") for home in ((0, "thread"), (1, "process"))),
        ("auto", 1, "process", "gateway v6"),
    ]
]  # fmt: skip


def relays(*names: str) -> list[Any]:
    """Some of them."""
    return [one for one in RELAYS if one.id in names]


@pytest.fixture(params=RELAYS)
async def bench(request: pytest.FixtureRequest, open_lab: OpenLab) -> AsyncIterator[Bench]:
    engine, workers, layout = request.param
    config = (
        f'[capture]\nports = ["{FIRST_PORT}-{FIRST_PORT + SLOTS - 1}"]\n'
        f'[relay]\nengine = "{engine}"\nworkers = {workers}\n'
    )
    async with open_lab(SIDECAR if layout == "sidecar v4" else GATEWAY) as lab:
        if layout == "sidecar v4":
            proxy = app = lab["host"]
            address = app.v4
        else:
            proxy, app, address = lab["gateway"], lab["server"], "2001:db8:f::9"
        async with open_daemon(proxy, config) as daemon:
            before = files_of(daemon.process.pid)
            bench = Bench(daemon, lab["client"], app, address)
            try:
                yield bench
            finally:
                await bench.aclose()
            await assert_files_are_back(daemon.process.pid, before)
            assert "this is a bug" not in daemon.process.stderr_text
            assert "Traceback" not in daemon.process.stderr_text
            assert await daemon.stop() == 0


def files_of(pid: int) -> Counter[str]:
    """Open files of the process and its children by kind: pipe, socket, anon_inode:[eventpoll], and paths as they are."""
    found: Counter[str] = Counter()
    for process in family_of(pid):
        for name in os.listdir(f"/proc/{process}/fd"):
            with suppress(FileNotFoundError):
                target = os.readlink(f"/proc/{process}/fd/{name}")
                found[target.partition(":[")[0]] += 1
    return found


def family_of(pid: int) -> list[int]:
    children = " ".join(file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children"))
    return [pid, *map(int, children.split())]


async def assert_files_are_back(pid: int, before: Counter[str]) -> None:
    """A connection's record may come a moment before its files are closed. Spare pipes stay, and nothing may be in them."""
    with trio.move_on_after(3):
        while True:
            more = files_of(pid) - before
            pipes = more.pop("pipe", 0)
            if not more and pipes <= 2 * SPARE_PIPES:
                break
            await trio.sleep(0.01)
    assert not more
    assert pipes <= 2 * SPARE_PIPES
    assert pipes % 2 == 0
    assert not files_of(pid)["pipe"] or not list(full_pipes(pid))


def full_pipes(pid: int) -> list[str]:
    """Those from which the process or a child of it could still read something that it wrote itself."""
    found = []
    for process in family_of(pid):
        ends: dict[str, set[int]] = {}
        for name in os.listdir(f"/proc/{process}/fd"):
            path = f"/proc/{process}/fd/{name}"
            with suppress(FileNotFoundError):
                target = os.readlink(path)
                if target.startswith("pipe:"):
                    ends.setdefault(target, set()).add(os.stat(path, follow_symlinks=False).st_mode & 0o700)
        for target, modes in ends.items():
            if len(modes) < 2:
                continue  # the other end is somebody else's: its output
            waiting = array.array("i", [0])
            path = next(
                f"/proc/{process}/fd/{name}"
                for name in os.listdir(f"/proc/{process}/fd")
                if os.readlink(f"/proc/{process}/fd/{name}") == target
            )
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                fcntl.ioctl(fd, termios.FIONREAD, waiting)
            finally:
                os.close(fd)
            if waiting[0]:
                found.append(f"{process}: {target} holds {waiting[0]} bytes")
    return found


# Orderly ends.

SIZES = (0, 1, 16383, 16384, 16385, 5_000_000)
"""Nothing, a byte, around one read of the relay, and much."""


async def test_31_32_half_close_matrix(bench: Bench) -> None:
    """Who ends first, after how much, and what comes the other way after that: all combinations."""

    async def one_then_the_other(before: int, after: int, first: str, talk: Conversation) -> None:
        ender, other = talk.ends(first)
        answer = Seen()

        async def end_first() -> None:
            await send(ender, before)
            await ender.send_eof()
            await read(ender, answer)

        async def end_last() -> None:
            request = await read(other, Seen())
            assert request.end == "orderly"
            assert_is_payload(request.data, before)
            await send(other, after)
            await other.send_eof()

        await all_at_once(end_first, end_last)
        assert answer.end == "orderly"
        assert_is_payload(answer.data, after)
        await check_record(talk, (before, after) if first == "client" else (after, before))

    async def both(up: int, down: int, talk: Conversation) -> None:
        async def side(stream: trio.SocketStream, mine: int, theirs: int) -> None:
            seen = Seen()

            async def say() -> None:
                await send(stream, mine)
                await stream.send_eof()

            await all_at_once(say, partial(read, stream, seen))
            assert seen.end == "orderly"
            assert_is_payload(seen.data, theirs)

        await all_at_once(partial(side, talk.client, up, down), partial(side, talk.app, down, up))
        await check_record(talk, (up, down))

    async def check_record(talk: Conversation, moved: tuple[int, int]) -> None:
        record = await talk.record()
        assert record["outcome"] == "closed"
        assert (record["bytes_from_client"], record["bytes_from_upstream"]) == moved

    await all_at_once(
        *(
            partial(
                bench.each, f"{first} first, {before} before, {after} after",
                partial(both, before, after) if first == "both" else partial(one_then_the_other, before, after, first), 15,
            )
            for first in ("client", "app", "both") for before in SIZES for after in SIZES
        )
    )  # fmt: skip


# Ends that are none.


async def test_29_30_resets_are_passed_on_after_the_bytes_before(bench: Bench) -> None:
    """By either side; the other side reads, or reads and talks. It gets a part of what was sent, and never an orderly end."""

    async def break_off(first: str, when: str, talks: bool, talk: Conversation) -> None:
        breaker, other = talk.ends(first)
        size = {"at once": 0, "after 100 bytes": 100, "in the middle of 3 MB": 3_000_000}[when]
        seen = Seen()
        arrived, ended = trio.Event(), trio.Event()
        began = 0.0

        async def breaks() -> None:
            nonlocal began
            if when == "after 100 bytes":
                await send(breaker, size)
                await arrived.wait()
            elif size:
                with trio.move_on_after(0.02):
                    await send(breaker, size)
            await reset(breaker)
            began = trio.current_time()
            with trio.fail_after(1):
                await ended.wait()

        async def reads() -> None:
            if when == "after 100 bytes":
                seen.data += await read_exactly(other, size)
                arrived.set()
            await read(other, seen)
            ended.set()

        async def says() -> None:
            if talks:
                with suppress(trio.BrokenResourceError):
                    while True:
                        await send(other, 65536)
                broken.append("saying")  # it has taken the error; reading may look like an orderly end after that

        broken: list[str] = []
        await all_at_once(breaks, reads, says)
        assert seen.end == "reset" or broken
        assert_begins_payload(seen.data, size)
        record = await talk.record()
        assert record["outcome"] == ("client_reset" if first == "client" else "upstream_reset")
        assert len(seen.data) <= record["bytes_from_client" if first == "client" else "bytes_from_upstream"] <= size

    await all_at_once(
        *(
            partial(
                bench.each, f"{first} resets {when}, the other {'talks' if talks else 'listens'}",
                partial(break_off, first, when, talks), 5,
            )
            for when in ("at once", "after 100 bytes", "in the middle of 3 MB")
            for first in ("client", "app") for talks in (False, True) for _ in range(4)
        )
    )  # fmt: skip


# Time.


async def test_33_slow_readers_slow_writers_and_no_stalls(bench: Bench) -> None:
    """All at once: whoever is slow holds nobody else up, and small exchanges take no 40 ms (a delayed ACK)."""
    size = 4_000_000
    rounds = 2000

    async def slow_reader(reader: str, pause: float, pauses: int, talk: Conversation) -> None:
        to, source = talk.ends(reader)
        seen = Seen()

        async def say() -> None:
            await send(source, size)
            await source.send_eof()

        await all_at_once(say, partial(read, to, seen, pause=pause, pauses=pauses))
        assert seen.end == "orderly"
        assert_is_payload(seen.data, size)
        await to.send_eof()

    async def pausing_reader(reader: str, talk: Conversation) -> None:
        to, source = talk.ends(reader)
        seen = Seen()

        async def say() -> None:
            await send(source, size)
            await source.send_eof()

        async def pause_in_the_middle() -> None:
            while len(seen.data) < size // 2:
                seen.data += await to.receive_some(16384)
            await trio.sleep(1)
            await read(to, seen)

        await all_at_once(say, pause_in_the_middle)
        assert_is_payload(seen.data, size)
        await to.send_eof()

    async def byte_by_byte(talk: Conversation) -> None:
        expected = b"".join(payload(rounds))
        seen = Seen()

        async def say() -> None:
            for number in range(rounds):
                await talk.client.send_all(expected[number : number + 1])
            await talk.client.send_eof()

        async def echo() -> None:
            while chunk := await talk.app.receive_some(1):
                await talk.app.send_all(chunk)
            await talk.app.send_eof()

        await all_at_once(say, echo, partial(read, talk.client, seen, size=1))
        assert seen.data == expected

    async def exchanges(
        say: Sequence[bytes], answer: Sequence[bytes], count: int, first: str, talk: Conversation
    ) -> None:
        """One side says `say` in as many writes, the other answers when it has all of it."""
        asks, answers = talk.ends(first)
        took = []

        async def ask() -> None:
            for _ in range(count):
                began = trio.current_time()
                for part in say:
                    await asks.send_all(part)
                assert await read_exactly(asks, len(b"".join(answer))) == b"".join(answer)
                took.append(trio.current_time() - began)
            await asks.send_eof()

        async def reply() -> None:
            for _ in range(count):
                assert await read_exactly(answers, len(b"".join(say))) == b"".join(say)
                for part in answer:
                    await answers.send_all(part)
            assert await answers.receive_some() == b""
            await answers.send_eof()

        await all_at_once(ask, reply)
        worst = sorted(took)[-max(1, len(took) // 100)]
        median_ms(f"{len(say)} writes, {len(answer)} in answer, {first} begins; 99 % below", [worst])
        assert sorted(took)[len(took) // 2] < 0.02

    small = [b"x"]
    three = [b"GET ", b"/ HTTP/1.1\r\n", b"\r\n"]
    await all_at_once(
        *(partial(bench.each, f"{who} reads slowly", partial(slow_reader, who, 0.02, 1 << 30), 15) for who in ("client", "app")),
        *(partial(bench.each, f"{who} pauses", partial(pausing_reader, who), 15) for who in ("client", "app")),
        partial(bench.each, "byte by byte", byte_by_byte, 15),
        partial(bench.each, "a byte there, a byte back", partial(exchanges, small, small, rounds, "client"), 15),
        partial(bench.each, "the server speaks first", partial(exchanges, small, small, 200, "app"), 15),
        partial(bench.each, "write, write, read", partial(exchanges, three[:2], small, 200, "client"), 15),
        partial(bench.each, "write, write, write, read, read", partial(exchanges, three, [b"200", b"OK"], 200, "client"), 15),
        partial(bench.each, "large answers", partial(exchanges, small, [b"y" * 16385], 100, "client"), 15),
        partial(bench.each, "large questions", partial(exchanges, [b"z" * 40_000], small, 100, "client"), 15),
    )  # fmt: skip


async def test_33_1_gib_both_ways_at_once(bench: Bench, counted: Callable[[int], int]) -> None:
    size = counted(1024) * 1024 * 1024 + 1

    async def side(stream: trio.SocketStream) -> str:
        digest = hashlib.sha256()

        async def say() -> None:
            await send(stream, size)
            await stream.send_eof()

        async def listen() -> None:
            while chunk := await stream.receive_some(262144):
                digest.update(chunk)

        await all_at_once(say, listen)
        assert digest.hexdigest() == expected
        return digest.hexdigest()

    async def flood(talk: Conversation) -> None:
        await all_at_once(partial(side, talk.client), partial(side, talk.app))
        record = await talk.record()
        assert record["outcome"] == "closed"
        assert record["bytes_from_client"] == record["bytes_from_upstream"] == size

    expected = expected_digest(size)
    await bench.each("1 GiB both ways", flood, 120)


# Urgent bytes.


async def test_urgent_bytes_stay_in_their_place(bench: Bench) -> None:
    """So many bytes, an urgent one, so many again; with the FIN behind them, and with an exchange instead."""

    async def urgent(first: str, around: int, ends: bool, talk: Conversation) -> None:
        source, to = talk.ends(first)
        await all_at_once(
            partial(say_urgently, source, around, around, fin=ends), partial(hear, to, 2 * around + 1, fin=ends)
        )
        if not ends:
            for _ in range(50):
                await source.send_all(b"?")
                assert await read_exactly(to, 1) == b"?"
                await to.send_all(b"!")
                assert await read_exactly(source, 1) == b"!"

    await all_at_once(
        *(
            partial(
                bench.each, f"{first}, {around} around, {'FIN' if ends else 'exchange'} behind",
                partial(urgent, first, around, ends), 10,
            )
            for first in ("client", "app") for around in (3, 20_000, 1_000_000) for ends in (True, False) for _ in range(3)
        )
    )  # fmt: skip


@pytest.mark.parametrize("bench", relays("auto process sidecar v4", "splice thread sidecar v4"), indirect=True)
async def test_33_urgent_byte_behind_much_that_a_late_reader_leaves(bench: Bench) -> None:
    """It comes while its direction is carried by a pipe that is full, and so does all that follows: no event is to come."""

    async def urgent(before: int, ends: bool, talk: Conversation) -> None:
        await all_at_once(
            partial(say_urgently, talk.app, before, 1000, fin=ends),
            partial(hear, talk.client, before + 1001, fin=ends, late=0.3),
        )

    await all_at_once(
        *(
            partial(bench.each, f"{before} before, {'FIN behind' if ends else 'nothing behind'}", partial(urgent, before, ends), 3)
            for before in range(200_000, 1_700_000, 150_000) for ends in (True, False)
        )
    )  # fmt: skip


async def say_urgently(stream: trio.SocketStream, before: int, behind: int, *, fin: bool) -> None:
    content = b"".join(payload(before + 1 + behind))
    await stream.send_all(content[:before])
    assert await stream.socket.send(content[before : before + 1], socket.MSG_OOB) == 1
    await stream.send_all(content[before + 1 :])
    if fin:
        await stream.send_eof()


async def hear(stream: trio.SocketStream, size: int, *, fin: bool, late: float = 0.0) -> None:
    await trio.sleep(late)
    if fin:
        seen = await read(stream, Seen())
        assert seen.end == "orderly"
        assert_is_payload(seen.data, size)
    else:
        assert_is_payload(await read_exactly(stream, size), size)


# What has been received before an end that is none.


@pytest.mark.parametrize("bench", relays("auto process sidecar v4", "copy thread sidecar v4"), indirect=True)
async def test_29_reset_behind_a_fin_leaves_what_was_received(bench: Bench) -> None:
    """The app answers, ends its direction, and resets (it does not want the rest of an upload). The client reads late, but reads."""

    async def answer(size: int, talk: Conversation) -> None:
        with trio.move_on_after(1) as full:
            await send(talk.app, size)
            await talk.app.send_eof()
            while unsent_bytes(talk.app.socket):  # type: ignore[arg-type]  # trio's has fileno(), too
                await trio.sleep(0.01)
        await trio.sleep(0.05)  # all of it has been received by the daemon's kernel: it has these many ms to read it
        await reset(talk.app)
        seen = await read(talk.client, Seen())
        record = await talk.record()
        assert len(seen.data) == record["bytes_from_upstream"]
        assert full.cancelled_caught or len(seen.data) == size

    for node in (bench.client, bench.app):  # small buffers, so that little is much
        node.set_sysctl("net.ipv4.tcp_wmem", "4096 16384 65536")
        node.set_sysctl("net.ipv4.tcp_rmem", "4096 16384 65536")
    await all_at_once(
        *(partial(bench.each, f"{size} bytes", partial(answer, size), 5) for size in range(58_000, 94_000, 3000))
    )


@pytest.mark.parametrize("bench", relays("auto process sidecar v4", "copy thread sidecar v4"), indirect=True)
async def test_29_33_reset_lets_a_slow_reader_read_what_was_received(bench: Bench) -> None:
    """64 KiB every 20 ms. Its kernel tells of room only now and then, when much has become free: that is not a stall."""

    async def abandon(talk: Conversation) -> None:
        seen = Seen()

        async def say() -> None:
            with trio.move_on_after(0.5):
                await send(talk.app, 40_000_000)
            await reset(talk.app)

        await all_at_once(say, partial(read, talk.client, seen, pause=0.02))
        assert seen.end == "reset"
        record = await talk.record()
        assert len(seen.data) == record["bytes_from_upstream"]

    await all_at_once(*(partial(bench.each, f"number {number}", abandon, 15) for number in range(4)))


# Anything.


@dataclass(frozen=True)
class Script:
    """What one side does. `sends` are (bytes, seconds of pause before them)."""

    sends: tuple[tuple[int, float], ...]
    read_size: int
    read_pause: float
    end: Literal["fin", "fin after reading", "reset", "reset after reading"]

    @property
    def total(self) -> int:
        return sum(size for size, _ in self.sends)


_SIZES = st.sampled_from(
    [0, 1, 100, 16383, 16384, 16385, 32768, 65536, 131071, 131072, 131073, 147456, 262144]
) | st.integers(0, 300_000)
_PAUSES = st.sampled_from([0.0, 0.0, 0.0, 0.001, 0.005])


def scripts() -> st.SearchStrategy[Script]:
    return st.builds(
        Script,
        st.lists(st.tuples(_SIZES, _PAUSES), max_size=6).map(tuple),
        st.sampled_from([1000, 16384, 65536, 300_000]),
        _PAUSES,
        st.sampled_from(
            ["fin", "fin", "fin", "fin after reading", "fin after reading", "reset", "reset after reading"]
        ),
    )


def schedules() -> st.SearchStrategy[tuple[Script, Script]]:
    """Both sides' scripts. If each waited for the other's end, nobody would end."""
    return st.tuples(scripts(), scripts()).filter(
        lambda pair: not all(script.end.endswith("after reading") for script in pair)
    )


async def play(stream: trio.SocketStream, script: Script) -> Seen:
    """Does what the script says, while reading to the end."""
    seen = Seen()
    at_end = trio.Event()
    broke = False

    async def say() -> None:
        nonlocal broke
        content = b"".join(payload(script.total))
        begin = 0
        try:
            for size, pause in script.sends:
                await trio.sleep(pause)
                await stream.send_all(content[begin : begin + size])
                begin += size
            if script.end.endswith("after reading"):
                await at_end.wait()
            if script.end.startswith("fin"):
                await stream.send_eof()
            else:
                seen.end = seen.end or "own"
                await reset(stream)
        except trio.BrokenResourceError:
            broke = True

    async def listen() -> None:
        await read(stream, seen, size=script.read_size, pause=script.read_pause, pauses=20)
        at_end.set()

    await all_at_once(say, listen)
    if broke:
        seen.end = "reset"  # also if reading, after it, looked like an orderly end
    return seen


async def play_both(
    bench: Bench, schedule: tuple[Script, Script], slot: int, port: int, into: dict[int, tuple[Seen, Seen]]
) -> None:
    """Over a new connection to `port`, or through the daemon if it is 0; the app's end is accepted by the slot's listener."""
    client, app = await bench.pair(slot, port=port)
    seen: list[Seen] = [Seen(), Seen()]

    async def side(number: int, stream: trio.SocketStream) -> None:
        seen[number] = await play(stream, schedule[number])

    async with client, app:
        await all_at_once(partial(side, 0, client), partial(side, 1, app))
    into[slot] = (seen[0], seen[1])


def check(schedule: tuple[Script, Script], real: tuple[Seen, Seen], plain: tuple[Seen, Seen]) -> None:
    """What each side saw through the daemon, against what it saw through the plain relay."""
    breaks = any(script.end.startswith("reset") for script in schedule)
    for mine, theirs, saw, should in zip(schedule, reversed(schedule), real, plain, strict=True):
        if not breaks:
            assert saw.end == should.end == "orderly"
            assert saw.data == should.data
            assert len(saw.data) == theirs.total
        else:
            assert_begins_payload(saw.data, theirs.total)
            assert_begins_payload(should.data, theirs.total)
            if theirs.end.startswith("reset") and mine.end.startswith("fin"):
                assert saw.end == should.end == "reset"
            elif theirs.end.startswith("reset"):
                assert saw.end in ("reset", "own")


async def test_29_to_33_any_schedule_ends_as_through_a_plain_relay(bench: Bench, counted: Callable[[int], int]) -> None:
    """Hypothesis runs in a thread, and asks this loop for each example: up to four connections at once."""

    async def run(examples: list[tuple[Script, Script]]) -> None:
        seen: dict[int, tuple[Seen, Seen]] = {}
        with trio.fail_after(10):
            await all_at_once(
                *(partial(play_both, bench, one, slot, 0, seen) for slot, one in enumerate(examples)),
                *(
                    partial(play_both, bench, one, slot, REFERENCE_PORT + slot, seen)
                    for slot, one in enumerate(examples, AT_ONCE)
                ),
            )
        for slot, schedule in enumerate(examples):
            check(schedule, seen[slot], seen[AT_ONCE + slot])

    @settings(
        max_examples=counted(250),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(schedules(), min_size=1, max_size=AT_ONCE))
    def anything(examples: list[tuple[Script, Script]]) -> None:
        trio.from_thread.run(run, examples)

    async with trio.open_nursery() as nursery:
        for slot in range(AT_ONCE, 2 * AT_ONCE):
            own = bench.app.listen(bench.bind, REFERENCE_PORT + slot)
            nursery.start_soon(relay_plainly, own, partial(bench.app.connect, bench.address, FIRST_PORT + slot))
        await trio.to_thread.run_sync(anything)
        nursery.cancel_scope.cancel()
