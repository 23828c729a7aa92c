"""The orderly stop: what living connections, half-made ones and those in their last moment get, and that nothing is left."""

from __future__ import annotations

import hashlib
import signal
import time
from functools import partial

import pytest
import trio
import trio.lowlevel

from netns_tests.way import BOTH_LAYOUTS, GATEWAY_V4, Way, median_ms
from tproxyd.net.sockets import format_address
from tproxyd.testing import digest_of, payload, serve_echo, serve_identity, serve_sink, serve_source
from tproxyd.testing.daemon import LabDaemon, open_daemon

OPEN = '[capture]\nports = ["8080"]\nwhen_down = "bypass"\n'
CLOSED = '[capture]\nports = ["8080"]\nwhen_down = "refuse"\n'


@BOTH_LAYOUTS
@pytest.mark.timed
async def test_07_sigterm_idle_ends_within_500_ms_and_leaves_the_kernel_as_it_was(way: Way) -> None:
    before = await way.proxy.dump()
    took = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        async with open_daemon(way.proxy, CLOSED) as daemon:
            sent = time.perf_counter()
            daemon.process.send_signal(number)
            assert await daemon.process.wait() == 0
            took.append(time.perf_counter() - sent)
        assert await way.proxy.dump() == before
        assert daemon.records() == []
    assert median_ms(f"idle stop, {way}", took) < 500


@BOTH_LAYOUTS
@pytest.mark.parametrize("config", [OPEN, CLOSED], ids=["open", "closed"])
async def test_08_sigterm_busy_drains_to_the_deadline_then_resets(way: Way, nursery: trio.Nursery, config: str) -> None:
    """While draining, new clients get what when_down says and living connections go on."""
    before = await way.proxy.dump()
    await nursery.start(serve_echo, way.app, 8080)
    async with (
        open_daemon(way.proxy, config + '[drain]\ntimeout = "1500ms"\n') as daemon,
        await way.client.connect(way.address, 8080) as stays,
        await way.client.connect(way.address, 8080) as ends,
    ):
        sources = {format_address(stream.socket.getsockname()): stream for stream in (stays, ends)}
        for stream in (stays, ends):
            await stream.send_all(b"before")
            assert await stream.receive_some() == b"before"
        began = time.perf_counter()
        daemon.process.send_signal(signal.SIGTERM)
        await daemon.process.wait_for_output("stopping")
        await until_not_captured(way, daemon, config)
        for stream in (stays, ends):
            await stream.send_all(b"during")
            assert await stream.receive_some() == b"during"
        await ends.send_eof()
        assert await ends.receive_some() == b""
        with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
            await stays.receive_some()
        assert await daemon.process.wait() == 0
        assert time.perf_counter() - began >= 1.5
    outcomes = {sources.get(record["source"]): record["outcome"] for record in daemon.records()}
    assert (outcomes[stays], outcomes[ends]) == ("drained", "closed")
    assert await way.proxy.dump() == before


async def until_not_captured(way: Way, daemon: LabDaemon, config: str) -> None:
    """Capture goes off right after the daemon has said that it stops. What comes before that is still served."""
    with trio.fail_after(2):
        while True:
            try:
                stream = await way.client.connect(way.address, 8080, timeout=2)
            except ConnectionRefusedError:
                assert config == CLOSED
                return
            own = format_address(stream.socket.getsockname())
            async with stream:
                await stream.send_eof()
                assert await stream.receive_some() == b""
            if config == OPEN and own not in daemon.process.stdout_text:
                with trio.move_on_after(0.2):
                    await daemon.process.wait_for_output(own)
                if own not in daemon.process.stdout_text:
                    return


@BOTH_LAYOUTS
async def test_08_drain_ends_as_soon_as_the_last_connection_does(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, OPEN) as daemon, await way.client.connect(way.address, 8080) as stream:
        await stream.send_all(b"x")
        await stream.receive_some()
        daemon.process.send_signal(signal.SIGTERM)
        await daemon.process.wait_for_output("stopping")
        await stream.send_eof()
        with trio.fail_after(5):  # the deadline would be at 30 s
            assert await daemon.process.wait() == 0
    assert [record["outcome"] for record in daemon.records()] == ["closed"]


@BOTH_LAYOUTS
async def test_08_a_second_sigterm_means_now(way: Way, nursery: trio.Nursery) -> None:
    before = await way.proxy.dump()
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, OPEN) as daemon, await way.client.connect(way.address, 8080) as stream:
        await stream.send_all(b"x")
        await stream.receive_some()
        daemon.process.send_signal(signal.SIGTERM)
        await daemon.process.wait_for_output("stopping")
        daemon.process.send_signal(signal.SIGTERM)
        with trio.fail_after(5):
            assert await daemon.process.wait() == 0
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
    assert [record["outcome"] for record in daemon.records()] == ["drained"]
    assert await way.proxy.dump() == before


async def test_08_what_the_relay_has_taken_is_delivered_before_the_rules_go(way: Way, nursery: trio.Nursery) -> None:
    """The app has sent all and closed; the client has not read yet. The last bytes wait in the proxy's kernel."""
    size = 400_000
    before = await way.proxy.dump()
    await nursery.start(partial(serve_source, way.app, 8080, size=size))
    async with open_daemon(way.proxy, OPEN) as daemon, await way.client.connect(way.address, 8080) as stream:
        own = format_address(stream.socket.getsockname())
        await stream.send_eof()
        await daemon.record(own)  # for the relay it is over
        daemon.process.send_signal(signal.SIGTERM)
        await daemon.process.wait_for_output("stopping")
        digest = hashlib.sha256()
        with trio.fail_after(10):
            async for chunk in stream:
                digest.update(chunk)
        assert digest.hexdigest() == digest_of(size)
        assert await daemon.process.wait() == 0
    assert await way.proxy.dump() == before


@BOTH_LAYOUTS
async def test_08_an_upload_that_the_app_reads_late_is_delivered_too(way: Way, nursery: trio.Nursery) -> None:
    size = 300_000
    read_now, digests = trio.Event(), []

    async def app(stream: trio.SocketStream) -> None:
        await stream.send_eof()
        await read_now.wait()
        digests.append(hashlib.sha256(b"".join([chunk async for chunk in stream])).hexdigest())

    nursery.start_soon(trio.serve_listeners, app, [way.app.listen(way.bind, 8080)])
    async with open_daemon(way.proxy, OPEN) as daemon:
        async with await way.client.connect(way.address, 8080) as stream:
            own = format_address(stream.socket.getsockname())
            with trio.fail_after(5):
                for chunk in payload(size):
                    await stream.send_all(chunk)
                await stream.send_eof()
        await daemon.record(own)
        daemon.process.send_signal(signal.SIGTERM)
        await daemon.process.wait_for_output("stopping")
        read_now.set()
        with trio.fail_after(10):
            assert await daemon.process.wait() == 0
            while not digests:
                await trio.sleep(0.01)  # the app's end is no event of ours
    assert digests == [digest_of(size)]


async def test_08_a_handshake_under_way_is_served(way: Way, nursery: trio.Nursery) -> None:
    """The client has its SYN-ACK; its own ACK and data are held back over the stop, as a long way would."""
    await nursery.start(serve_identity, way.app, 8080)
    hold = (
        "table inet hold {\nchain o {\ntype filter hook output priority 0;\n"
        "tcp dport 8080 tcp flags & (syn|ack) == ack drop\n}\n}\n"
    )
    async with open_daemon(way.proxy, OPEN) as daemon:
        await way.client.run("nft", "-f", "-", input=hold)
        async with await way.client.connect(way.address, 8080) as stream:
            own = format_address(stream.socket.getsockname())
            await stream.send_all(b"hello")
            daemon.process.send_signal(signal.SIGTERM)
            await daemon.process.wait_for_output("stopping")
            await trio.sleep(0.3)
            await way.client.run("nft", "delete", "table", "inet", "hold")
            with trio.fail_after(5):
                assert b"peer" in await stream.receive_some()
        assert await daemon.process.wait() == 0
    assert [record["source"] for record in daemon.records()] == [own]


@BOTH_LAYOUTS
@pytest.mark.parametrize("config", [OPEN, CLOSED], ids=["open", "closed"])
async def test_08_clients_are_not_steered_to_listeners_that_nobody_serves(
    way: Way, nursery: trio.Nursery, config: str
) -> None:
    """Without any time to drain: clients in a loop get the daemon, or what when_down says. What was taken already is reset."""
    await nursery.start(serve_identity, way.app, 8080)
    answers: list[str] = []

    async def dial() -> None:
        while True:
            try:
                async with await way.client.connect(way.address, 8080, timeout=3) as stream:
                    answers.append("answer" if await stream.receive_some() else "end")
            except ConnectionRefusedError:
                answers.append("refused")
            except (ConnectionResetError, trio.BrokenResourceError):
                answers.append("reset")
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as loop:
        for _ in range(4):
            loop.start_soon(dial)
        for _ in range(2):
            async with open_daemon(way.proxy, config + '[drain]\ntimeout = "0s"\n') as daemon:
                await daemon.process.wait_for_output('"outcome":"closed"')
                assert await daemon.stop() == 0
        loop.cancel_scope.cancel()
    assert answers.count("end") == 0
    # At most the few that were under way: each of the four, each of two times.
    assert answers.count("reset") <= 8
    assert answers.count("answer") > 20


@GATEWAY_V4
async def test_08_a_client_that_vanished_does_not_hold_the_stop_up_for_long(way: Way, nursery: trio.Nursery) -> None:
    """Its last bytes are never taken. They get three seconds without progress, not the whole time for draining."""
    await nursery.start(serve_sink, way.app, 8080)
    deaf = "table inet deaf {\nchain i {\ntype filter hook prerouting priority 0;\ntcp sport 8080 drop\n}\n}\n"
    async with open_daemon(way.proxy, OPEN) as daemon, await way.client.connect(way.address, 8080) as stream:
        own = format_address(stream.socket.getsockname())
        await way.client.run("nft", "-f", "-", input=deaf)
        await stream.send_eof()  # the app answers that, and nobody takes the answer
        assert (await daemon.record(own))["outcome"] == "closed"
        began = time.perf_counter()
        with trio.fail_after(15):
            assert await daemon.stop() == 0
        assert 3 <= time.perf_counter() - began < 8
    assert "the last bytes of 1 closed connections were not taken" in daemon.process.stderr_text


@BOTH_LAYOUTS
async def test_09_after_a_foreign_flush_of_the_ruleset_a_stop_still_drains(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, OPEN) as daemon, await way.client.connect(way.address, 8080) as stream:
        await stream.send_all(b"before")
        assert await stream.receive_some() == b"before"
        await way.proxy.run("nft", "flush", "ruleset")
        daemon.process.send_signal(signal.SIGTERM)
        await daemon.process.wait_for_output("stopping")
        await trio.sleep(0.3)
        assert daemon.process.returncode is None
        if way.app is way.proxy:  # at a gateway the flush has taken the way back with it
            await stream.send_all(b"after")
            assert await stream.receive_some() == b"after"
        daemon.process.send_signal(signal.SIGTERM)
        assert await daemon.process.wait() == 0
    assert "nft_tproxy" not in daemon.process.stderr_text
    assert "table inet tproxyd" not in (await way.proxy.run("nft", "list", "ruleset")).stdout


@GATEWAY_V4
async def test_21_with_every_file_in_use_a_stop_still_drains(way: Way, nursery: trio.Nursery) -> None:
    """Connections leave the daemon the files that it needs to take its rules away."""
    before = await way.proxy.dump()
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, OPEN + '[drain]\ntimeout = "1s"\n', files=120) as daemon:
        streams = [await way.client.connect(way.address, 8080) for _ in range(100)]
        await daemon.process.wait_for_output("are all there are files for")
        daemon.process.send_signal(signal.SIGTERM)
        await daemon.process.wait_for_output("stopping")
        await streams[0].send_all(b"during")
        with trio.fail_after(2):
            assert await streams[0].receive_some() == b"during"
        assert await daemon.process.wait() == 0
        for stream in streams:
            await stream.aclose()
    assert "Traceback" not in daemon.process.stderr_text
    assert await way.proxy.dump() == before
