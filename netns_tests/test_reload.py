"""Reload: a daemon goes over to another configuration while it serves. What has changed is so at once, and nobody notices but whom it concerns."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from netns_tests.watch import (
    METRICS,
    attempt,
    files_of,
    many,
    metrics,
    outcomes,
    processes,
    resets_within,
    until,
    workers,
    works,
)
from netns_tests.way import BOTH_LAYOUTS, GATEWAY_V4, SIDECAR_V4, Way
from tproxyd import kernel
from tproxyd.daemon.lock import send_order
from tproxyd.daemon.reload import Reloads
from tproxyd.errors import KernelError
from tproxyd.net.sockets import format_address
from tproxyd.testing import digest_of, serve_echo, serve_identity, serve_source
from tproxyd.testing.daemon import TPROXYD, LabDaemon

CONFIG = '[capture]\nports = ["8080"]\n'
TWO_PORTS = '[capture]\nports = ["8080", "9090"]\n'
WORKERS = pytest.mark.parametrize("number", [0, 1, 2])


class Reloadable:
    """A daemon and its configuration file."""

    def __init__(self, way: Way, daemon: LabDaemon, file: Path) -> None:
        self.way, self.daemon, self.file = way, daemon, file
        self._will_say = 0

    async def reload(self, text: str | None = None) -> str:
        """Writes the file, unless it is written, and asks for a reload; what was changed. KernelError with the reason when that is refused."""
        if text is not None:
            self.file.write_text(text, encoding="utf-8")
        answer = await self.way.proxy.call_async(send_order, "reload")
        assert answer is not None
        self._will_say = max(self._said, self._will_say + 1)
        return answer

    async def hang_up(self, text: str) -> None:
        """The same with SIGHUP."""
        self.file.write_text(text, encoding="utf-8")
        await until(lambda: self._said >= self._will_say)  # of the reload before, which is answered a moment earlier
        said = self._said
        self.daemon.process.send_signal(signal.SIGHUP)
        await until(lambda: self._said > said)

    @property
    def _said(self) -> int:
        return self.daemon.process.stderr_text.count("reloaded: ")

    async def rules(self) -> str:
        """The steering table, without what packets fill."""
        return (await self.way.proxy.run("nft", "-s", "list", "table", "inet", "tproxyd")).stdout


@asynccontextmanager
async def open_reloadable(
    way: Way, config: str, *before: str, command: Sequence[str] = TPROXYD
) -> AsyncIterator[Reloadable]:
    """Stopped at the end of the block; then the kernel holds what it held. Packets do not find sockets by having found them before, whatever the rules
    say by now."""
    way.proxy.set_sysctl("net.ipv4.tcp_early_demux", 0)
    held = await way.proxy.dump()
    file = way.file(config)
    async with way.proxy.process(*before, *command, "run", "-c", str(file), collect=True) as process:
        daemon = LabDaemon(process, await process.wait_for_output("tproxyd: ready "))
        yield Reloadable(way, daemon, file)
        assert await daemon.stop() == 0
    assert await way.proxy.dump() == held
    assert "this is a bug" not in process.stderr_text


async def until_counted(way: Way, ended: int) -> None:
    """So many connections have ended by the daemon's own word."""
    with trio.fail_after(5):
        while True:
            answer = await way.proxy.call_async(send_order, "status")
            assert answer is not None
            if sum(json.loads(answer)["counters"]["outcomes"].values()) >= ended:
                return
            await trio.sleep(0.02)


async def served_by(way: Way, port: int = 8080) -> str:
    """The client's address of one connection, which ends in order."""
    async with await way.client.connect(way.address, port) as stream:
        own = format_address(stream.socket.getsockname())
        await works(stream)
        await stream.send_eof()
        assert await stream.receive_some() == b""
        return own


@BOTH_LAYOUTS
@WORKERS
async def test_a_port_more_is_captured_and_who_lives_goes_on(way: Way, nursery: trio.Nursery, number: int) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    await nursery.start(serve_echo, way.app, 9090)
    relay = f"[relay]\nworkers = {number}\n"
    async with open_reloadable(way, CONFIG + relay) as served, await way.client.connect(way.address, 8080) as live:
        await works(live)
        assert await served.reload(TWO_PORTS + relay) == "capture.ports: 8080 -> 8080, 9090"
        await works(live)
        assert (await served.daemon.record(await served_by(way, 9090)))["outcome"] == "closed"
        assert await served.reload() == "nothing changed"
        await served.hang_up(CONFIG + relay)
        await works(live)
        own = await served_by(way, 9090)  # past us
        await served.daemon.record(await served_by(way))
        assert own not in served.daemon.process.stdout_text


@pytest.mark.parametrize(("number", "source"), [(0, "client"), (1, "client"), (1, "proxy"), (2, "proxy")])
@BOTH_LAYOUTS
async def test_45_what_is_removed_drains_and_the_rest_is_untouched(
    way: Way, nursery: trio.Nursery, number: int, source: str
) -> None:
    """Until it has ended, the kernel goes on delivering it; then nothing of it is left there."""
    for port in (8080, 9090):
        await nursery.start(serve_echo, way.app, port)
    rest = f'[relay]\nworkers = {number}\n[upstream]\nsource = "{source}"\n[drain]\ntimeout = "1s"\n'
    async with (
        open_reloadable(way, TWO_PORTS + rest) as served,
        await way.client.connect(way.address, 8080) as stays,
        await way.client.connect(way.address, 9090) as ends,
        await way.client.connect(way.address, 9090) as goes,
    ):
        own = format_address(goes.socket.getsockname())
        for stream in (stays, ends, goes):
            await works(stream)
        await served.reload(CONFIG + rest)
        assert "relayed_ports" in await served.rules()
        for stream in (stays, ends, goes):
            await works(stream)
        await ends.send_eof()
        assert await ends.receive_some() == b""
        assert await resets_within(goes, 3)
        assert (await served.daemon.record(own))["outcome"] == "drained"
        with trio.fail_after(3):
            while "relayed_ports" in await served.rules():
                await trio.sleep(0.02)
        await works(stays)
        await stays.send_eof()
        assert await stays.receive_some() == b""
        await until(lambda: len(served.daemon.records()) == 3)
        assert outcomes(served.daemon) == {"closed": 2, "drained": 1}


@BOTH_LAYOUTS
async def test_45_what_the_relay_has_taken_is_delivered_though_its_port_is_captured_no_more(
    way: Way, nursery: trio.Nursery
) -> None:
    """The app has sent all and closed, the client has not read yet, and for the relay it is over: the last bytes wait in the proxy's kernel."""
    size = 400_000
    await nursery.start(partial(serve_source, way.app, 9090, size=size))
    rest = '[upstream]\nsource = "proxy"\n[drain]\ntimeout = "0s"\n'
    async with open_reloadable(way, TWO_PORTS + rest) as served, await way.client.connect(way.address, 9090) as stream:
        own = format_address(stream.socket.getsockname())
        await stream.send_eof()
        await served.daemon.record(own)
        await served.reload(CONFIG + rest)
        await trio.sleep(1.0)  # longer than anybody else has to be delivered to; what is not to happen has no event
        digest = hashlib.sha256()
        with trio.fail_after(10):
            async for chunk in stream:
                digest.update(chunk)
        assert digest.hexdigest() == digest_of(size)
        with trio.fail_after(5):
            while "relayed_ports" in await served.rules():
                await trio.sleep(0.02)


@BOTH_LAYOUTS
@WORKERS
async def test_another_listen_port_refuses_nobody(way: Way, nursery: trio.Nursery, number: int) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    rest = f"[relay]\nworkers = {number}\n"
    async with open_reloadable(way, CONFIG + rest) as served, await way.client.connect(way.address, 8080) as live:
        await works(live)
        for port in (15007, 15006, 15008):
            assert f"-> {port}" in await served.reload(f"{CONFIG}{rest}[listen]\nport = {port}\n")
            await works(live)
            await served.daemon.record(await served_by(way))
            listening = (await way.proxy.run("ss", "-Htln")).stdout
            assert [one for one in (15006, 15007, 15008) if f":{one} " in listening] == [port]
        told = (await way.proxy.run(*TPROXYD, "status")).stdout
        assert "127.0.0.1:15008" in told


def files_but_pipes(served: Reloadable) -> list[Counter[str]]:
    """Open files of each process; of pipes a transfer leaves some in the pool."""
    return [files_of(pid) - Counter(pipe=1_000_000) for pid in processes(served.daemon)]


LOAD = 20
"""Reloads while clients come and go."""


@pytest.mark.parametrize(
    ("way", "number"),
    [("gateway v4", 1), ("gateway v6", 2), ("sidecar v4", 0), ("sidecar v6", 1)],
    indirect=["way"],
)
async def test_reloads_under_load_lose_no_connection(way: Way, nursery: trio.Nursery, number: int) -> None:
    """Capture, policy, upstream, listeners and limits change again and again; each client is served, a transfer is whole, and no file is left."""
    size = 10_000_000
    await nursery.start(serve_echo, way.app, 8080)
    await nursery.start(partial(serve_source, way.app, 8081, size=size))
    relay = f"[relay]\nworkers = {number}\n"
    changes = [
        "[listen]\nport = 15007\n",
        '[[policy.rule]]\nname = "some"\nsources = ["203.0.113.77/32"]\naction = "refuse"\n[drain]\ntimeout = "2s"\n',
        '[upstream]\nsource = "proxy"\n',
        '[upstream]\nsource = "client"\nconnect_timeout = "3s"\n',
        "[listen]\nport = 15008\nbacklog = 1024\n[limits]\nmax_connections_per_source = 5000\n",
        "",
    ]
    texts = [
        f'[capture]\nports = ["8080", "8081", "{9000 + index}"]\n{relay}{change}'
        for index, change in enumerate(changes)
    ]
    failed: list[str] = []
    count = 0

    async def come_and_go() -> None:
        nonlocal count
        while True:
            try:
                await served_by(way)
                count += 1
            except (OSError, trio.BrokenResourceError, trio.TooSlowError, AssertionError) as error:
                failed.append(repr(error))

    async def receive(stream: trio.SocketStream) -> None:
        digest = hashlib.sha256()
        async for chunk in stream:
            digest.update(chunk)
            await trio.sleep(0.005)  # a slow client: this lasts as long as the reloads do
        assert digest.hexdigest() == digest_of(size)

    async with open_reloadable(way, texts[-1]) as served:
        files = files_but_pipes(served)
        async with (
            await way.client.connect(way.address, 8081) as transfer,
            await way.client.connect(way.address, 8080) as live,
            trio.open_nursery() as receiving,
        ):
            receiving.start_soon(receive, transfer)
            async with trio.open_nursery() as load:
                for _ in range(4):
                    load.start_soon(come_and_go)
                for index in range(LOAD):
                    before = count
                    await served.reload(texts[index % len(texts)])
                    await works(live)
                    await until(lambda before=before: count >= before + 4 or failed)  # type: ignore[misc]
                load.cancel_scope.cancel()
        assert failed == []
        # Those that were under way when the load ended were given up by their clients.
        await until(lambda: len(served.daemon.records()) >= count + 2)
        await until(lambda: any(one["bytes_from_upstream"] == size for one in served.daemon.records()))
        assert {record["outcome"] for record in served.daemon.records()} <= {"closed", "client_reset"}
        (whole,) = (one for one in served.daemon.records() if one["bytes_from_upstream"] == size)
        assert whole["outcome"] == "closed"
        await served.reload(texts[-1])
        # What was open at the beginning may have been open for a moment only.
        await until(lambda: all(now <= before for now, before in zip(files_but_pipes(served), files, strict=True)))
    print(f"{way}, {number} workers: {count} connections served during {LOAD} reloads")


@SIDECAR_V4
async def test_43_a_bad_file_changes_nothing_and_is_told(way: Way, nursery: trio.Nursery) -> None:
    """Whatever is wrong with it; a good one is in force again at once."""
    await nursery.start(serve_echo, way.app, 8080)
    good = CONFIG + METRICS
    # As a user who may not read everything.
    limited = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-all")
    async with open_reloadable(way, good, *limited) as served, await way.client.connect(way.address, 8080) as live:
        await works(live)
        held = await way.proxy.dump()

        def syntax() -> None:
            served.file.write_text("[capture\n")

        def unknown_key() -> None:
            served.file.write_text(good + "[listen]\nprot = 1\n")

        def nothing_to_capture() -> None:
            served.file.write_text("[capture]\nports = []\n" + METRICS)

        def unreadable() -> None:
            served.file.write_text(good)
            served.file.chmod(0)

        def a_directory() -> None:
            served.file.unlink()
            served.file.mkdir()

        def missing() -> None:
            served.file.unlink()

        def of_100_mb() -> None:
            with served.file.open("wb") as file:
                file.truncate(100 << 20)

        for number, (mistake, reason) in enumerate(
            (
                (syntax, "is not TOML"),
                (unknown_key, "`listen.prot`"),
                (nothing_to_capture, "nothing to capture"),
                (missing, "no such file"),
                (unreadable, "cannot be read"),
                (a_directory, "is a directory"),
                (of_100_mb, "is larger than 8 MiB"),
            ),
            1,
        ):
            mistake()
            with pytest.raises(KernelError, match=reason):
                await served.reload()
            assert (await metrics(way.proxy))["tproxyd_config_last_reload_success"] == 0
            told = await way.proxy.run(*TPROXYD, "status")
            assert "an older configuration is in force" in told.stdout
            assert reason in told.stdout
            assert served.daemon.process.stderr_text.count("not reloaded") == number
            await works(live)
            await served.daemon.record(await served_by(way))
            assert await way.proxy.dump() == held
            shutil.rmtree(served.file) if served.file.is_dir() else served.file.unlink(missing_ok=True)
            assert await served.reload(good) == "nothing changed"
            assert (await metrics(way.proxy))["tproxyd_config_last_reload_success"] == 1
            assert "older" not in (await way.proxy.run(*TPROXYD, "status")).stdout


@SIDECAR_V4
async def test_44_a_storm_of_reloads_ends_with_the_last_file(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_reloadable(way, CONFIG) as served, await way.client.connect(way.address, 8080) as live:
        for index in range(100):
            served.file.write_text(f'[capture]\nports = ["8080", "{9000 + index}"]\n')
            served.daemon.process.send_signal(signal.SIGHUP)
        await until(lambda: ", 9099" in served.daemon.process.stderr_text)
        assert "9099" in await served.rules()
        assert served.daemon.process.stderr_text.count("reloaded: ") < 50
        await works(live)
        assert await served.reload() == "nothing changed"


@SIDECAR_V4
async def test_what_cannot_change_in_place_is_refused_by_name_and_all_at_once(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    new = (
        '[capture]\nports = ["8080", "9090"]\nmode = "redirect"\n[routing]\nmark = "0x10000000/0x30000000"\ntable = 7\npriority = 77\n'
        '[relay]\nworkers = 2\nengine = "copy"\n[admin]\nmetrics = "127.0.0.1:9101"\n'
    )
    async with open_reloadable(way, CONFIG) as served:
        held = await way.proxy.dump()
        with pytest.raises(KernelError) as refused:
            await served.reload(new)
        for key in (
            "capture.mode",
            "routing.mark",
            "routing.table",
            "routing.priority",
            "relay.workers",
            "relay.engine",
            "admin.metrics",
        ):
            assert f"`{key}` cannot change at a reload" in str(refused.value)
        assert "capture.ports" not in str(refused.value)
        assert await way.proxy.dump() == held
        await served.daemon.record(await served_by(way))


@BOTH_LAYOUTS
async def test_what_a_connection_gets_is_what_the_file_said_when_it_came(way: Way, nursery: trio.Nursery) -> None:
    """Verdict, upstream and header are those of then; new clients get the new ones."""
    await nursery.start(serve_echo, way.app, 8080)
    await nursery.start(serve_identity, way.app, 8081)
    other = f'[upstream]\ntarget = "{way.in_url}:8081"\n'
    client = way.client.v6 if ":" in way.address else way.client.v4
    refuse = f'[[policy.rule]]\nname = "not-you"\nsources = ["{client}"]\naction = "refuse"\n'
    async with open_reloadable(way, CONFIG) as served, await way.client.connect(way.address, 8080) as live:
        own = format_address(live.socket.getsockname())
        await works(live)
        assert await served.reload(CONFIG + other) == f"upstream.target: original -> {way.in_url}:8081"
        async with await way.client.connect(way.address, 8080) as elsewhere:
            assert b'"local"' in await elsewhere.receive_some()
            await works(live)
            assert "policy.rule: none -> not-you" in await served.reload(CONFIG + refuse)
            refused = await attempt(way.client, way.address, 8080, source_port=40001)
            assert (await served.daemon.record(refused))["rule"] == "not-you"
            await works(live)
        await served.reload(CONFIG + '[upstream]\nproxy_protocol = "v1"\n')
        async with await way.client.connect(way.address, 8080) as headed:
            await headed.send_all(b"x")
            assert (await headed.receive_some()).startswith(b"PROXY TCP")
        await works(live)
        await live.send_eof()
        assert await live.receive_some() == b""
        record = await served.daemon.record(own)
        assert (record["outcome"], record["upstream"]) == ("closed", format_address((way.address, 8080)))
        assert record["bytes_from_client"] == record["bytes_from_upstream"] == 20


@GATEWAY_V4
@WORKERS
async def test_time_outs_and_limits_hold_for_those_who_live_too(way: Way, nursery: trio.Nursery, number: int) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    relay = f"[relay]\nworkers = {number}\n"
    async with open_reloadable(way, CONFIG + relay) as served:
        async with many(way.client, way.address, 3) as streams:
            for stream in streams:
                await works(stream)
            limits = "[limits]\nmax_connections = {}\nmax_connections_per_source = {}\n"
            await served.reload(CONFIG + relay + limits.format(100, 3))
            if number < 2:  # with more, those who came before are counted where they came to
                limited = await attempt(way.client, way.address, 8080, source_port=40001)
                assert (await served.daemon.record(limited))["outcome"] == "limit"
            await streams[0].send_eof()
            assert await streams[0].receive_some() == b""
            await served.daemon.record(format_address(streams[0].socket.getsockname()))
            await served.daemon.record(await served_by(way))
            # As many live as may: who comes waits in the queue.
            await served.reload(CONFIG + relay + limits.format(2, 0))
            if number < 2:
                async with await way.client.connect(way.address, 8080) as waits:
                    await waits.send_all(b"hello")
                    with trio.move_on_after(0.3) as patience:
                        await waits.receive_some()
                    assert patience.cancelled_caught
                    await served.reload(CONFIG + relay + limits.format(10, 0))
                    with trio.fail_after(5):
                        assert await waits.receive_some() == b"hello"
            for stream in streams[1:]:
                await works(stream)
            await served.reload(CONFIG + relay + 'idle_timeout = "500ms"\n')
            for stream in streams[1:]:
                assert await resets_within(stream, 3)
        await until(lambda: outcomes(served.daemon)["idle_timeout"] == 2)
        with pytest.raises(KernelError, match="does not fit"):
            await served.reload(CONFIG + relay + "[limits]\nmax_connections = 1000000\n")


@SIDECAR_V4
async def test_log_and_access_log_go_over_at_once(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_reloadable(way, CONFIG + "[log]\naccess = false\n") as served:
        silent = await served_by(way)
        for _ in range(2):  # the loop answers the second one when it has told of everything
            await until_counted(way, 1)
        await served.reload(CONFIG + '[log]\nlevel = "warning"\nformat = "text"\n')
        own = await served_by(way)
        line = await served.daemon.process.wait_for_output(f"tcp {own} -> ")
        assert line.rstrip().endswith(": closed")
        assert silent not in served.daemon.process.stdout_text
        assert "reloaded: " not in served.daemon.process.stderr_text  # no more worth a line
        await served.reload(CONFIG)
        await served.daemon.record(await served_by(way))
        assert "reloaded: log.level: warning -> info" in await served.daemon.process.wait_for_output("reloaded: ")


@SIDECAR_V4
async def test_when_down_is_true_from_the_reload_on(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    held = await way.proxy.dump()
    for first, second in (("bypass", "refuse"), ("refuse", "bypass")):
        file = way.file(f'{CONFIG}when_down = "{first}"\n')
        async with way.proxy.process(*TPROXYD, "run", "-c", str(file), collect=True) as process:
            daemon = LabDaemon(process, await process.wait_for_output("tproxyd: ready "))
            await Reloadable(way, daemon, file).reload(f'{CONFIG}when_down = "{second}"\n')
            process.send_signal(signal.SIGKILL)
            await process.wait()
        if second == "refuse":
            with pytest.raises(ConnectionRefusedError):
                await way.client.connect(way.address, 8080)
        else:
            await served_by(way)
        await way.proxy.run(*TPROXYD, "revert")
        assert await way.proxy.dump() == held


@SIDECAR_V4
async def test_a_reload_that_fails_on_its_way_is_taken_back(way: Way, nursery: trio.Nursery) -> None:
    """The new port is taken; the guard's table is somebody else's; a relay process does not answer."""
    await nursery.start(serve_echo, way.app, 8080)
    program = "from tproxyd.interceptor import loop_owner; loop_owner._START = 1.0\nfrom tproxyd.daemon.cli import entry; entry()"
    hasty = (sys.executable, "-c", program)
    async with (
        open_reloadable(way, CONFIG, command=hasty) as served,
        await way.client.connect(way.address, 8080) as live,
        way.proxy.listen("127.0.0.1", 15007),
    ):
        await works(live)
        held = await way.proxy.dump()
        with pytest.raises(KernelError, match=r"cannot listen on 127\.0\.0\.1:15007: Address already in use"):
            await served.reload(TWO_PORTS + "[listen]\nport = 15007\n")
        assert await way.proxy.dump() == held
        with way.proxy.call(kernel.Library) as others:
            others.run("table inet tproxyd_guard {\n\tflags owner\n}\n")
            with pytest.raises(KernelError, match="tproxyd_guard"):
                await served.reload(TWO_PORTS + 'when_down = "refuse"\n')
        assert await way.proxy.dump() == held
        (worker,) = workers(served.daemon)
        os.kill(worker, signal.SIGSTOP)
        try:
            with pytest.raises(KernelError, match="a relay loop did not answer"):
                await served.reload(TWO_PORTS)
        finally:
            os.kill(worker, signal.SIGCONT)
        await works(live)
        with trio.fail_after(5):  # until the loop has said that nobody lives under what it was told meanwhile
            while await way.proxy.dump() != held:
                await trio.sleep(0.05)
        await served.daemon.record(await served_by(way))
        assert served.daemon.process.stderr_text.count("not reloaded") == 3
        assert await served.reload(TWO_PORTS) == "capture.ports: 8080 -> 8080, 9090"
        await nursery.start(serve_echo, way.app, 9090)
        await served.daemon.record(await served_by(way, 9090))


@SIDECAR_V4
async def test_a_relay_process_that_dies_comes_back_with_the_present_configuration(
    way: Way, nursery: trio.Nursery
) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    await nursery.start(serve_echo, way.app, 9090)
    async with open_reloadable(way, CONFIG) as served:
        await served.reload(TWO_PORTS + "[listen]\nport = 15007\n[limits]\nmax_connections_per_source = 1\n")
        (worker,) = workers(served.daemon)
        os.kill(worker, signal.SIGKILL)
        await until(lambda: workers(served.daemon) not in ([], [worker]))
        async with await way.client.connect(way.address, 9090) as stream:
            await works(stream)
            limited = await attempt(way.client, way.address, 9090, source_port=40001)
            assert (await served.daemon.record(limited))["outcome"] == "limit"


@SIDECAR_V4
async def test_while_it_drains_a_daemon_reloads_nothing(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_reloadable(way, CONFIG) as served:
        async with await way.client.connect(way.address, 8080) as live:
            await works(live)
            served.daemon.process.send_signal(signal.SIGTERM)
            await served.daemon.process.wait_for_output("stopping")
            with pytest.raises(KernelError, match="is stopping"):
                await served.reload(TWO_PORTS)
            await works(live)
        assert await served.daemon.process.wait() == 0


@SIDECAR_V4
async def test_sighup_during_the_start_is_done_after_it(way: Way) -> None:
    program = """
import os, signal
from pathlib import Path
from tproxyd.interceptor import keeper
put = keeper.Keeper._put
def put_late(self, nft):
    Path(os.environ["FILE"]).write_text('[capture]\\nports = ["8080", "9090"]\\n')
    os.kill(os.getpid(), signal.SIGHUP)
    return put(self, nft)
keeper.Keeper._put = put_late
from tproxyd.daemon.cli import entry
entry()
"""
    file = way.file(CONFIG)
    command = ("env", f"FILE={file}", sys.executable, "-c", program)
    async with open_reloadable(way, CONFIG, command=command) as served:
        assert "8080 -> 8080, 9090" in await served.daemon.process.wait_for_output("reloaded: ")


@SIDECAR_V4
async def test_without_a_file_there_is_nothing_to_reload(way: Way) -> None:
    async with way.proxy.process(*TPROXYD, "run", "--port", "8080", collect=True) as process:
        await process.wait_for_output("tproxyd: ready ")
        process.send_signal(signal.SIGHUP)
        await process.wait_for_output("no file to read")
        answer = await way.proxy.call_async(send_order, "reload")
        assert answer is not None
        assert answer.startswith("nothing changed")
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


@SIDECAR_V4
async def test_45_only_what_its_addresses_take_out_of_capture_drains(way: Way, nursery: trio.Nursery) -> None:
    """A source, a destination: those go. An interface: nobody can tell any more by which one they came, and they stay."""
    await nursery.start(serve_echo, way.app, 8080)
    drain = '[drain]\ntimeout = "0s"\n'
    for line, goes in (
        ('exclude_sources = ["{client}"]', True),
        ('sources = ["{client}"]', False),
        ('destinations = ["2001:db8::/32"]', True),
        ('exclude_interfaces = ["eth0"]', False),
    ):
        ports = 'ports = ["8080", "9090"]\n'
        async with (
            open_reloadable(way, f"[capture]\n{ports}{drain}") as served,
            await way.client.connect(way.address, 8080) as live,
        ):
            await works(live)
            await served.reload(f"[capture]\n{ports}{line.format(client=way.client.v4)}\n{drain}")
            if goes:
                assert await resets_within(live, 3), line
            else:
                await works(live)
        assert outcomes(served.daemon)["drained"] == goes, line


@pytest.mark.parametrize("way", ["sidecar v4", "sidecar v6"], indirect=True)
async def test_apps_that_see_the_client_s_address_reach_it_after_reloads(way: Way, nursery: trio.Nursery) -> None:
    """What the kernel remembers of them stays when the table is exchanged, and so do the rules, though the new file needs none of it."""
    files = (
        "[drain]\n",
        '[upstream]\nsource = "proxy"\n',
        '[upstream]\ntarget = "loopback"\n',
        "[listen]\nport = 15009\n",
    )
    loopback = '[[policy.rule]]\nname = "in"\nports = ["9090"]\naction = { forward = "127.0.0.1:7070" }\n'
    start = TWO_PORTS + ("" if ":" in way.address else loopback)
    speak = trio.Event()
    heard: list[bytes] = []

    async def speak_later(stream: trio.SocketStream) -> None:
        heard.append(await stream.receive_some())
        await speak.wait()
        await stream.send_all(b"at last")
        await stream.receive_some()

    for bind, port in (
        (way.bind, 8080),
        ("127.0.0.1" if ":" not in way.address else way.bind, 7070 if ":" not in way.address else 9090),
    ):
        nursery.start_soon(trio.serve_listeners, speak_later, [way.proxy.listen(bind, port)])
    async with (
        open_reloadable(way, start) as served,
        await way.client.connect(way.address, 8080) as one,
        await way.client.connect(way.address, 9090) as another,
    ):
        for stream in (one, another):
            await stream.send_all(b"hello")
        await until(lambda: len(heard) == 2)
        for text in files:
            await served.reload(TWO_PORTS + text)
        speak.set()
        for stream in (one, another):
            with trio.fail_after(5):
                assert await stream.receive_some() == b"at last"
            await stream.send_eof()
        # The last ones have gone, and with them what they needed.
        await until(lambda: len(served.daemon.records()) == 2)
        await served.reload(TWO_PORTS + '[upstream]\nsource = "proxy"\n')
        with trio.fail_after(5):
            while "dials" in await served.rules() or "127.0.0.0/8" in (await way.proxy.run("ip", "rule")).stdout:
                await trio.sleep(0.05)
    nursery.cancel_scope.cancel()


async def test_44_a_hundred_requests_are_two_reloads() -> None:
    """One that is being made when they come, and one more for all of them, which sees what the last one wanted."""
    made, go_on = 0, trio.Event()
    reloads = Reloads()

    async def reload() -> str:
        nonlocal made
        made += 1
        await go_on.wait()
        if made == 2:
            raise KernelError("no")
        return "done"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reloads.serve, reload)
        first = reloads.ask()
        await trio.testing.wait_all_tasks_blocked()
        asked = [reloads.ask() for _ in range(100)]
        go_on.set()
        assert await first.wait() == "done"
        for one in asked:
            with pytest.raises(KernelError, match="no"):
                await one.wait()
        assert made == 2
        nursery.cancel_scope.cancel()


@GATEWAY_V4
async def test_redirect_mode_reloads_as_well(way: Way, nursery: trio.Nursery) -> None:
    """The listener's port is that of the live connection's socket: NAT goes on bringing it there."""
    for port in (8080, 9090):
        await nursery.start(serve_echo, way.app, port)
    redirect = 'mode = "redirect"\nwhen_down = "refuse"\n'
    drain = '[drain]\ntimeout = "500ms"\n'
    async with (
        open_reloadable(way, TWO_PORTS + redirect + drain) as served,
        await way.client.connect(way.address, 8080) as live,
        await way.client.connect(way.address, 9090) as goes,
    ):
        for stream in (live, goes):
            await works(stream)
        await served.reload(CONFIG + redirect + drain + "[listen]\nport = 15007\n")
        for stream in (live, goes):
            await works(stream)
        await served.daemon.record(await served_by(way))
        assert await resets_within(goes, 3)
        await works(live)


@pytest.mark.parametrize("when_down", ["bypass", "refuse"])
@SIDECAR_V4
async def test_06_sigkill_at_any_step_of_a_reload_is_one_in_service(
    way: Way, nursery: trio.Nursery, when_down: str
) -> None:
    """Right before and right after each change of the kernel: clients get what when_down says, and the next start finds nothing in its way."""
    program = """
import os, signal, sys
from tproxyd.interceptor import keeper
change, left = keeper.Keeper._change, int(os.environ["AFTER"])
def die(self, nft):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    changes = change(self, nft)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return changes
keeper.Keeper._change = die
from tproxyd.daemon.cli import entry
entry()
"""
    await nursery.start(serve_echo, way.app, 8080)
    held = await way.proxy.dump()
    text = f'{CONFIG}when_down = "{when_down}"\n'
    new = f'[capture]\nports = ["8080", "9090"]\nwhen_down = "{when_down}"\n[listen]\nport = 15007\n[upstream]\ntarget = "loopback"\n'
    for after in (0, 1, 2):
        file = way.file(text)
        command = (sys.executable, "-c", program, "run", "-c", str(file))
        async with way.proxy.process(*command, collect=True, env={"AFTER": str(after)}) as process:
            await process.wait_for_output("tproxyd: ready ")
            file.write_text(new)
            process.send_signal(signal.SIGHUP)
            assert await process.wait() == -signal.SIGKILL
        if when_down == "refuse":
            with pytest.raises(ConnectionRefusedError):
                await way.client.connect(way.address, 8080)
        else:
            await served_by(way)
        async with way.proxy.process(*TPROXYD, "run", "-c", str(file), collect=True) as process:
            daemon = LabDaemon(process, await process.wait_for_output("tproxyd: ready "))
            async with await way.client.connect(way.address, 8080) as stream:
                await works(stream)
            assert await daemon.stop() == 0
        assert await way.proxy.dump() == held
