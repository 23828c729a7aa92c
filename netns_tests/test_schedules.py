"""Random schedules: what two peers see through the daemon is what they see through a relay so plain that it is right."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from netns_tests.both_ends import (
    FIRST_PORT,
    Bench,
    Seen,
    all_at_once,
    assert_begins_payload,
    read,
)
from netns_tests.reference_relay import relay_plainly
from netns_tests.watch import reset
from tproxyd.testing import payload

set_hypothesis_home_dir(os.devnull)

REFERENCE_PORT = 9080  # not captured: the plain relay, which a test compares with
AT_ONCE = 4  # random schedules; each has a second slot for the plain relay


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


def check(schedule: tuple[Script, Script], real: tuple[Seen, Seen], plain: tuple[Seen, Seen], *, resets: bool) -> None:
    """What each side saw through the daemon, against what it saw through the plain relay; whether the daemon's way to the app `resets`."""
    breaks = any(script.end.startswith("reset") for script in schedule)
    for mine, theirs, saw, should in zip(schedule, reversed(schedule), real, plain, strict=True):
        if not breaks:
            assert saw.end == should.end == "orderly"
            assert saw.data == should.data
            assert len(saw.data) == theirs.total
        else:
            assert_begins_payload(saw.data, theirs.total)
            assert_begins_payload(should.data, theirs.total)
            if not resets:
                assert saw.end is not None
            elif theirs.end.startswith("reset") and mine.end.startswith("fin"):
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
            check(schedule, seen[slot], seen[AT_ONCE + slot], resets=bench.unix is None)

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
