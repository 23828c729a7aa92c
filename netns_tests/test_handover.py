"""`tproxyd handover`: a new generation beside the old one. Nobody is refused, what lives goes on, and a refusal changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from netns_tests.generations import open_generations, tables
from netns_tests.watch import (
    METRICS,
    alive,
    another_works,
    ends_in_order,
    files_of,
    get,
    metrics,
    relay_processes,
    resets_within,
    until,
    works,
)
from netns_tests.way import BOTH_LAYOUTS, CLOSED, GATEWAY_V4, OPEN, SIDECAR_V4, WHEN_DOWN, Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import digest_of, serve_echo, serve_identity, serve_source
from tproxyd.testing.daemon import TPROXYD

T = TypeVar("T")

CLIENTS = 8


@BOTH_LAYOUTS
@WHEN_DOWN
async def test_a_new_generation_serves_and_the_old_one_ends_when_its_connections_have(
    way: Way, nursery: trio.Nursery, config: str
) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_generations(way, config) as generations:
        old = generations.serving
        async with await way.client.connect(way.address, 8080) as lives:
            await works(lives)
            new = await generations.hand_over()
            assert alive(old)
            await another_works(way)
            await works(lives)
            status = await generations.status()
            assert (status["daemon"]["pid"], status["daemon"]["draining"]) == (new, old)
            assert status["daemon"]["counters"]["accepted"] == 1
            assert status["differences"] == []
            assert {"table inet tproxyd", "table inet tproxyd_1"} <= {*await tables(way)}
        await generations.ended(old)
        assert await generations.process.wait() == 0
        assert "table inet tproxyd" not in await tables(way)
        await another_works(way)
        await generations.stop()
    assert [record["outcome"] for record in generations.records()] == ["closed"] * 3


@asynccontextmanager
async def load(way: Way, *, clients: int = CLIENTS) -> AsyncIterator[Counter[str]]:
    """Clients that dial one connection after the other; what became of these."""
    met: Counter[str] = Counter()

    async def keep_dialling() -> None:
        while True:
            try:
                async with await way.client.connect(way.address, 8080, timeout=5) as stream:
                    await stream.send_all(b"hello")
                    met["served" if await stream.receive_some() == b"hello" else "ended"] += 1
                    await stream.send_eof()
                    await stream.receive_some()
            except ConnectionRefusedError:
                met["refused"] += 1
            except (ConnectionResetError, trio.BrokenResourceError):
                met["reset"] += 1

    async with trio.open_nursery() as nursery:
        for _ in range(clients):
            nursery.start_soon(keep_dialling)
        yield met
        nursery.cancel_scope.cancel()


async def test_60_hand_overs_under_load_refuse_nobody(
    way: Way, nursery: trio.Nursery, counted: Callable[[int], int]
) -> None:
    """10,000 connections in the full run, over three hand-overs."""
    await nursery.start(serve_echo, way.app, 8080)
    async with open_generations(way, CLOSED) as generations:
        async with load(way) as met:
            for turn in range(1, 4):
                await until(lambda: met.total() >= counted(10_000) * turn // 4, within=60)  # noqa: B023  # at once
                old = generations.serving
                await generations.hand_over()
                await generations.ended(old)
            await until(lambda: met.total() >= counted(10_000), within=60)
        await generations.stop()
    print(met)
    assert met.keys() == {"served"}
    # The four that the end of the test has cut off apart, each was recorded once, and by whoever served it.
    assert met["served"] <= len(generations.records()) <= met["served"] + CLIENTS


@BOTH_LAYOUTS
async def test_transfers_go_on_to_their_end_with_every_byte(way: Way, nursery: trio.Nursery) -> None:
    size = 50_000_000
    await nursery.start(partial(serve_source, size=size), way.app, 8080)
    async with open_generations(way, CLOSED) as generations:
        old = generations.serving
        async with await way.client.connect(way.address, 8080) as stream:
            digest, came = hashlib.sha256(), 0
            for turn in range(2):
                while came < size // 4 * (turn + 1):
                    chunk = bytes(await stream.receive_some())
                    digest.update(chunk)
                    came += len(chunk)
                if turn == 0:
                    await generations.hand_over()
            assert alive(old)
            async for more in stream:
                digest.update(more)
            assert digest.hexdigest() == digest_of(size)
            await stream.send_eof()
        await generations.ended(old)
        await generations.stop()
    assert [record["outcome"] for record in generations.records()] == ["closed"]


@BOTH_LAYOUTS
async def test_what_lives_longer_than_the_drain_is_reset_at_its_deadline(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with (
        open_generations(way, CLOSED + '[drain]\ntimeout = "1s"\n') as generations,
        await way.client.connect(way.address, 8080) as stream,
    ):
        own = format_address(stream.socket.getsockname())
        await works(stream)
        old = generations.serving
        await generations.hand_over()
        await works(stream)
        assert await resets_within(stream, 3)
        await generations.ended(old)
        assert await generations.process.wait() == 0
        await another_works(way)
        await generations.stop()
    (drained,) = [record for record in generations.records() if record["source"] == own]
    assert drained["outcome"] == "drained"


@pytest.mark.parametrize("way", ["sidecar v4", "sidecar v6"], indirect=True)
@pytest.mark.parametrize("target", ["original", "loopback"])
async def test_local_apps_see_the_client_before_during_and_after(way: Way, nursery: trio.Nursery, target: str) -> None:
    """The app's answers come back by sets in the kernel, of which each generation has its own."""
    await nursery.start(serve_echo, way.app, 8080)
    config = f'{CLOSED}[upstream]\nsource = "client"\ntarget = "{target}"\n'
    async with open_generations(way, config) as generations, await way.client.connect(way.address, 8080) as first:
        await works(first)
        old = generations.serving
        await generations.hand_over()
        async with await way.client.connect(way.address, 8080) as second:
            for _ in range(3):
                await works(first)
                await works(second)
            await ends_in_order(first)
            await generations.ended(old)
            await works(second)
        await generations.stop()
    seen = [str(record["upstream_source"]).rpartition(":")[0].strip("[]") for record in generations.records()]
    assert seen == [way.client.v6 if ":" in way.address else way.client.v4] * 2


@GATEWAY_V4
@pytest.mark.parametrize(("before", "after"), [(0, 2), (1, 2), (2, 0), (3, 2), (2, 3), (2, 2), (0, 0)])
async def test_as_many_workers_as_the_new_configuration_says(
    way: Way, nursery: trio.Nursery, before: int, after: int
) -> None:
    """Others than before, twice: whoever waits at one of the old listeners is served."""
    await nursery.start(serve_echo, way.app, 8080)
    async with open_generations(way, f"{CLOSED}[relay]\nworkers = {before}\n") as generations:
        async with load(way) as met:
            for number in (after, before):
                await until(lambda: met.total() >= 50)
                old = generations.serving
                new = await generations.hand_over(f"{CLOSED}[relay]\nworkers = {number}\n")
                assert len(relay_processes(new)) == number
                await generations.ended(old)
                met_before = met.total()
                await until(lambda: met.total() >= met_before + 100)  # noqa: B023  # at once
        await generations.stop()
    assert met.keys() == {"served"}


@BOTH_LAYOUTS
async def test_the_new_generation_captures_what_the_files_say_now(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_identity, way.app, 8081)
    async with open_generations(way, OPEN) as generations:
        for config in (OPEN.replace("8080", "8081"), CLOSED.replace("8080", "8081")):
            old = generations.serving
            await generations.hand_over(config)
            await generations.ended(old)
            async with await way.client.connect(way.address, 8081) as stream:
                own = format_address(stream.socket.getsockname())
                await stream.send_eof()
                await generations.process.wait_for_output(f'"source":"{own}"')
            assert ("table inet tproxyd_guard" in await tables(way)) == (config.find("refuse") > 0)
        await generations.stop()


@BOTH_LAYOUTS
@pytest.mark.parametrize("mode", ["tproxy", "redirect"])
async def test_what_the_files_leave_out_now_is_not_taken_while_the_old_one_drains(
    way: Way, nursery: trio.Nursery, mode: str
) -> None:
    await nursery.start(serve_identity, way.app, 8080)
    both = f'[capture]\nports = ["8080", "8081"]\nwhen_down = "bypass"\nmode = "{mode}"\n'
    async with open_generations(way, both) as generations, await way.client.connect(way.address, 8080) as lives:
        await lives.receive_some()
        await generations.hand_over(both.replace('"8080", ', ""))
        async with await way.client.connect(way.address, 8080) as stream:  # the app itself
            own = format_address(stream.socket.getsockname())
            assert json.loads(await stream.receive_some())["peer"] == own
        assert alive(generations.pids[0])
        await lives.aclose()
        await generations.stop()
    assert own not in [record["source"] for record in generations.records()]
    assert "error" not in generations.process.stderr_text


@SIDECAR_V4
async def test_who_came_before_a_reload_ends_after_a_hand_over_and_nothing_is_put_right_for_it(
    way: Way, nursery: trio.Nursery
) -> None:
    """What the kernel is to hold without it is not the old generation's any more."""
    await nursery.start(serve_echo, way.app, 8080)
    async with open_generations(way, CLOSED) as generations:
        old = generations.serving
        async with (
            await way.client.connect(way.address, 8080) as later,
            await way.client.connect(way.address, 8080) as first,
        ):
            await works(first)
            generations.file.write_text(f'{CLOSED}[upstream]\ntarget = "loopback"\n', encoding="utf-8")
            await way.proxy.run(*TPROXYD, "reload", "-c", str(generations.file))
            await works(later)  # was accepted before
            async with await way.client.connect(way.address, 8080) as last:
                await works(last)
                await generations.hand_over(OPEN + '[upstream]\ntarget = "loopback"\n')
                held = await way.proxy.dump()
                await works(first)
                for stream in (first, later):
                    own = format_address(stream.socket.getsockname())
                    await stream.aclose()
                    await generations.process.wait_for_output(f'"source":"{own}"')
                await trio.sleep(1)  # nothing is what is waited for
                assert await way.proxy.dump() == held
                await works(last)
        await generations.ended(old)
        told = (await generations.status())["daemon"]
        assert told["repairs"] == {}
        await generations.stop()


REFUSED = {
    "syntax": ("[capture", "tproxyd.toml"),
    "unknown key": (CLOSED + "colour = 1\n", "colour"),
    "nothing to capture": ("[log]\naccess = true\n", "capture"),
    "mark": (CLOSED + '[routing]\nmark = "0x10000000/0x30000000"\n', "`routing.mark` cannot change from 0x"),
    "table": (CLOSED + "[routing]\ntable = 134\n", "`routing.table` cannot change from 133 to 134"),
    "priority": (CLOSED + "[routing]\npriority = 6000\n", "`routing.priority` cannot change from 5233 to 6000"),
    "port": (CLOSED + "[listen]\nport = 15007\n", "`listen.port` cannot change from 15006 to 15007"),
    "mode": (CLOSED + 'mode = "redirect"\n', "`capture.mode` cannot change from tproxy to redirect"),
    "rule": (CLOSED, "`upstream.target` and `upstream.source` cannot change so"),
    "metrics": (CLOSED + '[admin]\nmetrics = "127.0.0.1:9999"\n', "127.0.0.1:9999 for metrics: Address already in use"),
    "sources and workers": (
        CLOSED + "[relay]\nworkers = 3\n[limits]\nmax_connections_per_source = 5\n",
        "`relay.workers` cannot change at a hand-over where",
    ),
}


@SIDECAR_V4
@pytest.mark.parametrize("case", REFUSED)
async def test_06_what_cannot_be_served_is_refused_and_the_old_one_goes_on(
    way: Way, nursery: trio.Nursery, case: str
) -> None:
    config, named = REFUSED[case]
    await nursery.start(serve_echo, way.app, 8080)
    first = CLOSED + '[upstream]\ntarget = "loopback"\n' if case == "rule" else CLOSED
    with way.proxy.open_socket(socket.AF_INET, socket.SOCK_STREAM) as taken:
        taken.bind(("127.0.0.1", 9999))
        taken.listen()
        async with open_generations(way, first) as generations, await way.client.connect(way.address, 8080) as lives:
            await works(lives)
            state = await way.proxy.dump()
            generations.file.write_text(config, encoding="utf-8")
            assert named in await generations.refused()
            await works(lives)
            assert await way.proxy.dump() == state
            await another_works(way)
            status = await generations.status()
            assert (status["daemon"]["pid"], status["daemon"]["draining"]) == (generations.serving, None)
            assert status["daemon"]["repairs"] == {}
            # And when it is mended, it is done.
            generations.file.write_text(first, encoding="utf-8")
            await generations.hand_over()
            await works(lives)
            await lives.aclose()
            await generations.stop()


@SIDECAR_V4
@pytest.mark.parametrize("place", ["same", "another", "none"])
async def test_06_the_old_one_is_asked_by_its_administrator_after_a_refusal(
    way: Way, tmp_path: Path, place: str
) -> None:
    """The new one was refused when it had the socket already, or had opened another one in its place."""
    (tmp_path / "run").mkdir()
    path = f"{tmp_path}/run/admin.sock"
    later = {"same": path, "another": f"{tmp_path}/run/other.sock", "none": ""}[place]
    config = f'{CLOSED}[admin]\nsocket = "{path}"\n'
    async with open_generations(way, config) as generations:
        ask = (*TPROXYD, "connections", "-c", str(way.file(config)))
        await way.proxy.run(*ask)
        generations.file.write_text(f'{CLOSED}[listen]\nport = 15007\n[admin]\nsocket = "{later}"\n', encoding="utf-8")
        assert "`listen.port` cannot change" in await generations.refused()
        generations.file.write_text(config, encoding="utf-8")
        await way.proxy.run(*ask)
        assert os.listdir(tmp_path / "run") == ["admin.sock"]
        # And when it is not refused, it is the new one that is asked, there alone.
        moved = f'{CLOSED}[admin]\nsocket = "{later}"\n'
        old = generations.serving
        await generations.hand_over(moved)
        await generations.ended(old)
        assert os.listdir(tmp_path / "run") == [os.path.basename(later)] * bool(later)
        if later:
            await way.proxy.run(*ask)
        await generations.stop()
    assert os.listdir(tmp_path / "run") == []


@SIDECAR_V4
async def test_another_one_while_the_old_one_drains_is_refused_and_then_done_by_the_next_name(
    way: Way, nursery: trio.Nursery
) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_generations(way, OPEN) as generations:
        for name in ("tproxyd_1", "tproxyd_2", "tproxyd_1"):
            old = generations.serving
            async with await way.client.connect(way.address, 8080) as stream:
                await works(stream)
                await generations.hand_over()
                assert f"pid {old} still drains since the last hand-over" in await generations.refused()
                await works(stream)
            await generations.ended(old)
            assert await tables(way) == [f"table inet {name}"]
        await generations.stop()


@SIDECAR_V4
async def test_exactly_one_answers_orders_throughout(way: Way) -> None:
    async with open_generations(way, OPEN) as generations:
        answered: list[int] = []

        async def keep_asking() -> None:
            while True:
                told = await generations.status()
                answered.append(told["daemon"]["pid"])

        async with trio.open_nursery() as asking:
            for _ in range(2):
                asking.start_soon(keep_asking)
            await until(lambda: len(answered) >= 2)
            for _ in range(2):
                old = generations.serving
                await generations.hand_over()
                await until(lambda: answered[-1] == generations.serving)
                await generations.ended(old)
            asking.cancel_scope.cancel()
        assert {*answered} == {*generations.pids}
        await generations.stop()
        await generations.refused(code=69)


@SIDECAR_V4
async def test_what_apply_has_put_there_stays_after_the_last_generation(way: Way, nursery: trio.Nursery) -> None:
    before = await way.proxy.dump()
    await nursery.start(serve_echo, way.app, 8080)
    await way.proxy.run(*TPROXYD, "apply", "-c", str(way.file(CLOSED)))
    applied = await way.proxy.dump()
    async with open_generations(way, CLOSED) as generations, await way.client.connect(way.address, 8080) as lives:
        await works(lives)
        await generations.hand_over()
        await works(lives)
        await another_works(way)
        await lives.aclose()
        await generations.stop()
    assert await way.proxy.dump() == applied
    await way.proxy.run(*TPROXYD, "revert")
    assert await way.proxy.dump() == before


@BOTH_LAYOUTS
@WHEN_DOWN
async def test_in_redirect_mode(way: Way, nursery: trio.Nursery, config: str) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    redirect = config + 'mode = "redirect"\n'
    async with open_generations(way, redirect) as generations:
        async with load(way, clients=4) as met, await way.client.connect(way.address, 8080) as lives:
            await works(lives)
            old = generations.serving
            await until(lambda: met.total() >= 20)
            await generations.hand_over()
            await works(lives)
            met_before = met.total()
            await until(lambda: met.total() >= met_before + 20)
            await ends_in_order(lives)
            await generations.ended(old)
            met_before = met.total()
            await until(lambda: met.total() >= met_before + 20)
        await generations.stop()
    assert met.keys() == {"served"}


async def settled(look: Callable[[], T]) -> T:
    """What there is when it has not changed for half a second: a daemon that is ready opens a few more files."""
    since, found = trio.current_time(), look()
    while trio.current_time() - since < 0.5:
        await trio.sleep(0.05)
        if (now := look()) != found:
            since, found = trio.current_time(), now
    return found


@GATEWAY_V4
async def test_the_new_generation_has_the_files_of_any_daemon_and_the_metrics_go_on(
    way: Way, nursery: trio.Nursery
) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_generations(way, OPEN + METRICS) as generations:
        await get(way.proxy, "/readyz")
        first = await settled(lambda: (files_of(generations.serving), files_of(*relay_processes(generations.serving))))
        for _ in range(2):
            old = generations.serving
            async with await way.client.connect(way.address, 8080) as stream:
                await works(stream)
                new = await generations.hand_over()
                assert (await get(way.proxy, "/readyz")).status == 200
                assert (await metrics(way.proxy))["tproxyd_accepted_total"] == 0  # the new one's
                await works(stream)
            await generations.ended(old)
            await until(lambda: files_of(new) == first[0])  # noqa: B023  # at once
            assert files_of(*relay_processes(new)) == first[1]
        await generations.stop()


@BOTH_LAYOUTS
async def test_11_drift_is_repaired_by_the_new_one_alone(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_generations(way, CLOSED) as generations, await way.client.connect(way.address, 8080) as lives:
        await works(lives)
        await generations.hand_over()
        for command in (
            ("ip", "rule", "del", "priority", "5234"),
            ("ip", "-6", "route", "del", "local", "default", "dev", "lo", "table", "133"),
            ("nft", "delete", "table", "inet", "tproxyd_guard"),
        ):
            await way.proxy.run(*command)

        async def differences() -> object:
            return json.loads((await way.proxy.run(*TPROXYD, "status", "--json", check=False)).stdout)["differences"]

        with trio.fail_after(5):
            while await differences():
                await trio.sleep(0.05)
        await works(lives)
        told = (await generations.status())["daemon"]
        assert told["repairs"] == {"route": 1, "rule": 1, "ruleset": 1}
        assert generations.process.stderr_text.count("add ip rule") <= 1 + 8  # at the start, and once more
        await lives.aclose()
        await generations.stop()


@BOTH_LAYOUTS
async def test_revert_in_the_middle_takes_all_of_both(way: Way, nursery: trio.Nursery) -> None:
    before = await way.proxy.dump()
    await nursery.start(serve_identity, way.app, 8080)
    async with open_generations(way, CLOSED) as generations, await way.client.connect(way.address, 8080) as lives:
        await lives.receive_some()
        old = generations.serving
        new = await generations.hand_over()
        done = await way.proxy.run(*TPROXYD, "revert")
        assert f"pid {old}, which still drained since a hand-over, has ended with its connections" in done.stderr
        assert await resets_within(lives, 3)
        await generations.ended(old)
        assert await way.proxy.dump() == before
        async with await way.client.connect(way.address, 8080) as stream:  # the app itself
            own = format_address(stream.socket.getsockname())
            assert json.loads(await stream.receive_some())["peer"] == own
        assert "nothing is captured here any more" in await generations.refused()
        assert alive(new)
        await generations.stop()


@SIDECAR_V4
async def test_every_verb_knows_which_of_two_tables_is_in_force(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_generations(way, CLOSED) as generations:
        config = ("-c", str(generations.file))

        async def diagnosis() -> tuple[int, str]:
            done = await way.proxy.run(*TPROXYD, "doctor", *config, check=False)
            return done.returncode, done.stdout.replace(str(generations.serving), "PID")

        healthy = await diagnosis()
        async with await way.client.connect(way.address, 8080) as stream:
            await works(stream)
            await generations.hand_over()
            for _ in range(2):
                assert (await way.proxy.run(*TPROXYD, "plan", "--diff", *config)).stdout.startswith("no difference")
                assert "tproxyd_1 (owned)" in (await way.proxy.run(*TPROXYD, "status", *config)).stdout
                told = await way.proxy.run(*TPROXYD, "explain", way.client.v4, f"{way.address}:8080", *config)
                assert "inet tproxyd_1 take" in told.stdout
                assert "the kernel holds the plan" in told.stdout
                assert await diagnosis() == healthy
                if alive(generations.pids[0]):
                    await stream.aclose()
                    await generations.ended(generations.pids[0])
        await generations.stop()


@SIDECAR_V4
async def test_a_stop_lets_the_old_one_drain_to_its_deadline_and_leaves_nothing(
    way: Way, nursery: trio.Nursery
) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    config = OPEN + '[drain]\ntimeout = "2s"\n'
    async with open_generations(way, config) as generations, await way.client.connect(way.address, 8080) as lives:
        await works(lives)
        await generations.hand_over()
        os.kill(generations.serving, signal.SIGTERM)
        for _ in range(5):
            await works(lives)
            await trio.sleep(0.1)
        assert await resets_within(lives, 5)
        for pid in generations.pids:
            await generations.ended(pid)


@SIDECAR_V4
async def test_systemd_is_told_of_the_new_main_process(way: Way, tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(path)
        async with open_generations(way, OPEN, env={"NOTIFY_SOCKET": path}) as generations:
            new = await generations.hand_over()
            said: list[bytes] = []

            def ready_again() -> bool:
                with suppress(BlockingIOError):
                    while True:
                        said.extend(notify.recv(4096, socket.MSG_DONTWAIT).split(b"\n"))
                moved = f"MAINPID={new}".encode()
                return moved in said and b"READY=1" in said[said.index(moved) :]

            # Of the new one systemd hears nothing before it knows it.
            await until(ready_again)
            assert said.count(b"READY=1") == 2
            await generations.stop()


@SIDECAR_V4
@pytest.mark.parametrize("number", ["3", "99", "x"])
async def test_a_socket_that_no_daemon_has_given_is_refused(way: Way, number: str) -> None:
    done = await way.proxy.run(
        *TPROXYD, "run", "--port", "8080", env={"TPROXYD_HANDOVER": number}, check=False, timeout=5
    )
    assert done.returncode == 71
    assert "only a daemon sets that hands over: unset it" in done.stderr
