"""`tproxyd handover`, and one of the two generations dies, stands still, or is told to stop: whenever that is, the other one is unaffected."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress

import pytest
import trio

from netns_tests.generations import Generations, descendants, open_generations, tables
from netns_tests.watch import alive, another_works, ends_in_order, relay_processes, until, works
from netns_tests.way import BOTH_LAYOUTS, CLOSED, GATEWAY_V4, OPEN, SIDECAR_V4, WHEN_DOWN, Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import serve_echo
from tproxyd.testing.daemon import TPROXYD, open_daemon
from tproxyd.testing.process import LabProcess

SWEEP = (0, 60, 120, 200, 300, 400, 500, 700)
"""Milliseconds after the new process has begun; on an idle machine it is ready after some 400."""


async def begun(generations: Generations) -> int:
    """The pid of the new generation, as soon as there is one."""
    await until(lambda: descendants(generations.process.pid))
    return descendants(generations.process.pid)[0]


async def is_served(way: Way, generations: Generations) -> bool:
    """Whether a new client comes to a daemon; else it comes to the app itself, or is refused."""
    try:
        stream = await way.client.connect(way.address, 8080, timeout=3)
    except ConnectionRefusedError:
        return False
    async with stream:
        own = format_address(stream.socket.getsockname())
        await works(stream)
        await ends_in_order(stream)
    with trio.move_on_after(0.5):
        await generations.process.wait_for_output(f'"source":"{own}"')
        return True
    return False


async def answered(verb: LabProcess) -> tuple[int, str]:
    with trio.fail_after(20):
        code = await verb.wait()
    return code, verb.stderr_text


@GATEWAY_V4
@pytest.mark.parametrize("milliseconds", SWEEP)
async def test_06_the_new_one_is_killed_at_any_moment_and_somebody_serves(
    way: Way, nursery: trio.Nursery, milliseconds: int
) -> None:
    """Before it is ready the old one goes on, and says so; after that it has already left all to the new one."""
    await nursery.start(serve_echo, way.app, 8080)
    async with open_generations(way, CLOSED) as generations, await way.client.connect(way.address, 8080) as lives:
        await works(lives)
        served = await way.proxy.dump()
        # With another guard and another ruleset, so that there is something to be put right.
        generations.file.write_text(CLOSED.replace('["8080"]', '["8080", "9090"]'), encoding="utf-8")
        async with way.proxy.process(*TPROXYD, "handover", collect=True) as verb:
            new = await begun(generations)
            await trio.sleep(milliseconds / 1000)
            loops = relay_processes(new)
            os.kill(new, signal.SIGKILL)
            code, said = await answered(verb)
        await until(lambda: not any(map(alive, loops)))  # for some milliseconds they accept, and reset
        await works(lives)
        if code:
            assert code == 1
            assert "the new generation has ended before it was ready (signal SIGKILL)" in said
            assert await way.proxy.dump() == served
            assert await is_served(way, generations)
            generations.pids.append(await generations.hand_over(CLOSED))
            await works(lives)
        else:
            assert not await is_served(way, generations)
            await way.proxy.run(*TPROXYD, "status", check=False)  # nobody, and it answers
        await lives.aclose()
        if code:
            await generations.stop()
        else:
            await generations.ended(generations.process.pid)
            await way.proxy.run(*TPROXYD, "revert")


@pytest.mark.parametrize("way", ["sidecar v6"], indirect=True)
@pytest.mark.parametrize("milliseconds", SWEEP)
async def test_06_the_old_one_is_killed_at_any_moment_and_the_new_one_serves_if_it_has_inherited(
    way: Way, nursery: trio.Nursery, milliseconds: int
) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_generations(way, OPEN) as generations:
        async with way.proxy.process(*TPROXYD, "handover", collect=True) as verb:
            new = await begun(generations)
            generations.pids.append(new)
            await trio.sleep(milliseconds / 1000)
            os.kill(generations.process.pid, signal.SIGKILL)
            code, said = await answered(verb)
        # What it is about to inherit is in its socket from the first moment on.
        await generations.process.wait_for_output(f"ready pid={new} ")
        assert await is_served(way, generations)
        if code:
            assert code in (1, 69)
            assert "Traceback" not in said
        told = await generations.status()
        assert (told["daemon"]["pid"], told["daemon"]["draining"], told["differences"]) == (new, None, [])
        assert [name for name in await tables(way) if "tproxyd" in name] == ["table inet tproxyd_1"]
        await generations.hand_over()
        assert await is_served(way, generations)
        await generations.stop()


@BOTH_LAYOUTS
@WHEN_DOWN
async def test_06_the_old_one_is_killed_while_it_drains(way: Way, nursery: trio.Nursery, config: str) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_generations(way, config) as generations, await way.client.connect(way.address, 8080) as lives:
        await works(lives)
        await generations.hand_over()
        os.kill(generations.process.pid, signal.SIGKILL)
        await generations.ended(generations.process.pid)
        assert await is_served(way, generations)
        assert "table inet tproxyd" not in await tables(way)
        told = await generations.status()
        assert (told["daemon"]["draining"], told["daemon"]["repairs"]) == (None, {})
        await generations.stop()


@BOTH_LAYOUTS
@WHEN_DOWN
async def test_06_the_new_one_is_killed_while_the_old_one_drains(way: Way, nursery: trio.Nursery, config: str) -> None:
    """New clients get what when_down says, what lives goes on, and another start does not wait for its end."""
    await nursery.start(serve_echo, way.app, 8080)
    async with open_generations(way, config) as generations, await way.client.connect(way.address, 8080) as lives:
        await works(lives)
        new = await generations.hand_over()
        loops = relay_processes(new)
        os.kill(new, signal.SIGKILL)
        await until(lambda: not [pid for pid in (new, *loops) if alive(pid)])
        for _ in range(3):
            if config == CLOSED:
                with pytest.raises(ConnectionRefusedError):
                    await way.client.connect(way.address, 8080, timeout=2)
            else:
                assert not await is_served(way, generations)
            await works(lives)
        assert "which serves since the hand-over, has ended" in generations.process.stderr_text
        async with open_daemon(way.proxy, config) as another:
            async with await way.client.connect(way.address, 8080) as stream:
                own = format_address(stream.socket.getsockname())
                await works(stream)
                await works(lives)
            await another.record(own)
            await works(lives)
            await ends_in_order(lives)
            await generations.ended(generations.process.pid)
            await another_works(way)
            assert await another.stop() == 0


@SIDECAR_V4
async def test_06_a_new_one_that_stands_still_is_ended_after_ten_seconds(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_generations(way, CLOSED) as generations:
        served = await way.proxy.dump()
        async with way.proxy.process(*TPROXYD, "handover", collect=True) as verb:
            new = await begun(generations)
            os.kill(new, signal.SIGSTOP)
            assert await is_served(way, generations)
            code, said = await answered(verb)
        assert code == 1
        assert "the new generation was not ready within 10 s, and is ended" in said
        assert not alive(new)
        assert await way.proxy.dump() == served
        assert await is_served(way, generations)
        await generations.stop()


@SIDECAR_V4
@pytest.mark.parametrize("milliseconds", SWEEP)
async def test_a_new_one_that_is_told_to_stop_while_it_starts_leaves_all_to_the_old_one(
    way: Way, nursery: trio.Nursery, milliseconds: int
) -> None:
    """Once it serves, its stop is that of the daemon."""
    await nursery.start(serve_echo, way.app, 8080)
    async with open_generations(way, CLOSED) as generations:
        served = await way.proxy.dump()
        async with way.proxy.process(*TPROXYD, "handover", collect=True) as verb:
            new = await begun(generations)
            await trio.sleep(milliseconds / 1000)
            with suppress(ProcessLookupError):
                os.kill(new, signal.SIGTERM)
            code, said = await answered(verb)
        await generations.ended(new)
        print(code, said)
        if code:
            assert "SIGTERM" in said or "it was asked to stop while it started" in said
            assert await way.proxy.dump() == served
            assert await is_served(way, generations)
            await generations.stop()
        await generations.ended(generations.process.pid)
        assert await generations.process.wait() == 0
    assert "Traceback" not in generations.process.stderr_text


@SIDECAR_V4
@pytest.mark.parametrize("both", [False, True], ids=["the old one alone", "both"])
async def test_06_a_stop_during_the_start_of_the_new_one_stops_it_all(
    way: Way, nursery: trio.Nursery, both: bool
) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_generations(way, CLOSED) as generations:
        async with way.proxy.process(*TPROXYD, "handover", collect=True) as verb:
            new = await begun(generations)
            os.kill(generations.process.pid, signal.SIGTERM)
            if both:
                with suppress(ProcessLookupError):
                    os.kill(new, signal.SIGTERM)
            code, said = await answered(verb)
        assert code != 0, said
        await generations.ended(generations.process.pid)
        assert await generations.process.wait() == 0
        await generations.ended(new)


@SIDECAR_V4
async def test_an_old_one_that_stands_still_keeps_the_new_one_from_nothing(way: Way, nursery: trio.Nursery) -> None:
    """It is killed when the state is to go that its connections need."""
    await nursery.start(serve_echo, way.app, 8080)
    async with (
        open_generations(way, CLOSED + '[drain]\ntimeout = "500ms"\n') as generations,
        await way.client.connect(way.address, 8080) as lives,
    ):
        await works(lives)
        old = generations.serving
        await generations.hand_over()
        os.kill(old, signal.SIGSTOP)
        assert await is_served(way, generations)
        os.kill(generations.serving, signal.SIGTERM)
        for pid in generations.pids:
            await generations.ended(pid)
        assert (
            f"pid {old}, the generation before this one, does not end, and is killed" in generations.process.stderr_text
        )


@SIDECAR_V4
async def test_an_old_one_that_stands_still_when_it_should_leave_keeps_no_order_waiting_for_good(
    way: Way, nursery: trio.Nursery
) -> None:
    """Stopped at the ready line of the new one: before it has let that one answer, or a moment later."""
    await nursery.start(serve_echo, way.app, 8080)
    async with open_generations(way, CLOSED) as generations:
        async with way.proxy.process(*TPROXYD, "handover", collect=True) as verb:
            new = await begun(generations)
            generations.pids.append(new)
            await generations.process.wait_for_output(f"ready pid={new} ")
            os.kill(generations.process.pid, signal.SIGSTOP)
            told = json.loads((await way.proxy.run(*TPROXYD, "status", "--json", timeout=15)).stdout)
            assert told["daemon"]["pid"] == new
            os.kill(generations.process.pid, signal.SIGCONT)
            await answered(verb)
        await generations.ended(generations.process.pid)
        assert await is_served(way, generations)
        await generations.stop()


@SIDECAR_V4
async def test_access_log_lines_of_two_generations_are_whole(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_generations(way, OPEN) as generations:
        streams = [await way.client.connect(way.address, 8080) for _ in range(100)]
        await generations.hand_over()
        streams += [await way.client.connect(way.address, 8080) for _ in range(100)]
        async with trio.open_nursery() as closing:
            for stream in streams:
                closing.start_soon(stream.aclose)
        await generations.ended(generations.process.pid)
        await generations.stop()
    assert len({record["id"] for record in generations.records()}) == 200
