"""What a relay is: one contract for every engine in both homes, through the real daemon. Every byte, in order, both ends as they were.

`netns_tests/both_ends.py` gives both ends of each connection. Every test ends with the daemon's files: those that connections had are
given back, and the pipes that are kept are empty. test_schedules.py has what nobody thought of.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import pytest
import trio

from netns_tests.both_ends import (
    Bench,
    Conversation,
    Seen,
    all_at_once,
    assert_begins_payload,
    assert_is_payload,
    expected_digest,
    read,
    read_exactly,
    send,
)
from netns_tests.watch import reset
from netns_tests.way import median_ms
from tproxyd.net.sockets import unsent_bytes
from tproxyd.testing import payload

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


@pytest.mark.timed
async def test_29_30_resets_are_passed_on_after_the_bytes_before(bench: Bench) -> None:
    """By either side; the other side reads, or reads and talks. It gets a part of what was sent, and never an orderly end.

    A Unix socket has no reset: test_unix_upstream.py says what an app there sees, and how it breaks off.
    """

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
        assert seen.end == "reset" or broken or (bench.unix is not None and seen.end == "orderly")
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
            for first in (("client", "app") if bench.unix is None else ("client",)) for talks in (False, True) for _ in range(4)
        )
    )  # fmt: skip


# Time.


@pytest.mark.timed
async def test_33_slow_readers_slow_writers_and_no_stalls(bench: Bench) -> None:
    """All at once: whoever is slow holds nobody else up, and small exchanges take no 40 ms (a delayed ACK)."""
    size = 4_000_000
    rounds = 500

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


@pytest.mark.parametrize("bench", ["auto process sidecar v4", "splice thread sidecar v4"], indirect=True)
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


@pytest.mark.parametrize("bench", ["auto process sidecar v4", "copy thread sidecar v4"], indirect=True)
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


@pytest.mark.parametrize("bench", ["auto process sidecar v4", "copy thread sidecar v4"], indirect=True)
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

    # What the relay has not read yet at the reset: enough, and soon read.
    bench.app.set_sysctl("net.ipv4.tcp_rmem", "4096 131072 1048576")
    await all_at_once(*(partial(bench.each, f"number {number}", abandon, 15) for number in range(4)))
