"""The ways in which bytes are moved (`relay.engine`), where they are moved (`workers`), and that nothing stays behind."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from functools import partial

import pytest
import trio

from netns_tests.watch import (
    all_cpu_seconds,
    attempt,
    files_of,
    many,
    memory_kib,
    outcomes,
    processes,
    reset,
    resets_within,
    until,
    workers,
)
from netns_tests.way import GATEWAY_V4, Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import Lab, digest_of, payload, serve_echo, serve_sink, serve_source
from tproxyd.testing.daemon import LabDaemon, open_daemon

CAPTURE = '[capture]\nports = ["8080", "8081", "8082", "9999"]\n'
ENGINES = pytest.mark.parametrize("engine", ["copy", "splice", "auto"])
SIZE = 20_000_000


def relay(**values: object) -> str:
    lines = [f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}" for key, value in values.items()]
    return CAPTURE + "[relay]\n" + "\n".join(lines) + "\n"


async def transfer_both_ways(way: Way) -> None:
    """Down on 8081, up on 8082; every byte, in order."""
    digest = hashlib.sha256()
    async with await way.client.connect(way.address, 8081) as stream:
        await stream.send_eof()
        async for chunk in stream:
            digest.update(chunk)
    assert digest.hexdigest() == digest_of(SIZE)
    async with await way.client.connect(way.address, 8082) as stream:
        for chunk in payload(SIZE):
            await stream.send_all(chunk)
        await stream.send_eof()
        assert (await stream.receive_some()).decode() == f"{digest_of(SIZE)} {SIZE}\n"


@ENGINES
@pytest.mark.parametrize("files", [None, 60], ids=["", "without pipes"])
@GATEWAY_V4
async def test_every_engine_moves_every_byte_also_without_pipes(
    way: Way, nursery: trio.Nursery, engine: str, files: int | None
) -> None:
    """60 files leave one pipe, which another transfer holds: then it copies."""
    await nursery.start(partial(serve_source, way.app, 8081, size=SIZE))
    await nursery.start(serve_sink, way.app, 8082)
    async with open_daemon(way.proxy, relay(engine=engine), files=files) as daemon:
        async with many_transfers(way):
            await transfer_both_ways(way)
        await until(lambda: outcomes(daemon)["closed"] == 2)
        if engine == "copy" or files:
            assert files_of(workers(daemon)[0])["pipe"] <= (0 if engine == "copy" else 2)


class many_transfers:  # noqa: N801  # used as a function
    """A download on 8081 that is not read, so that whoever relays it stays in the middle of it."""

    def __init__(self, way: Way) -> None:
        self._way = way

    async def __aenter__(self) -> None:
        self._stream = await self._way.client.connect(self._way.address, 8081)
        await self._stream.receive_some(1)
        await trio.sleep(0.1)

    async def __aexit__(self, *_: object) -> None:
        await reset(self._stream)


# A system on which splice(2) fails as in a sandbox: os.splice is replaced, which stands in for a seccomp filter.
NO_SPLICE = """
import logging, os, trio
def splice(*arguments, **more):
    raise OSError({number}, os.strerror({number}))
os.splice = splice
from tproxyd import MissingError, config_from_mapping
from tproxyd.interceptor import open_interceptor
async def main():
    config = {{"capture": {{"ports": ["8081", "8082"]}}, "relay": {{"workers": 0, "engine": "{engine}"}}}}
    async with open_interceptor(config_from_mapping(config), on_record=lambda r: print(r.outcome, flush=True), own_namespace=True):
        print("open", flush=True)
        await trio.sleep_forever()
logging.basicConfig()
try:
    trio.run(main)
except MissingError as error:
    print(error)
"""


@pytest.mark.parametrize("number", [1, 22, 38], ids=["EPERM", "EINVAL", "ENOSYS"])
@GATEWAY_V4
async def test_where_splice_is_refused_auto_copies_and_says_so(way: Way, nursery: trio.Nursery, number: int) -> None:
    await nursery.start(partial(serve_source, way.app, 8081, size=SIZE))
    await nursery.start(serve_sink, way.app, 8082)
    program = NO_SPLICE.format(number=number, engine="auto")
    async with way.proxy.process(sys.executable, "-c", program, collect=True) as process:
        await process.wait_for_output("open")
        await transfer_both_ways(way)
        assert process.stderr_text.count("splice(2) does not work here") == 1


@GATEWAY_V4
async def test_where_splice_is_refused_the_engine_splice_is_too_and_nothing_is_changed(way: Way) -> None:
    before = await way.proxy.dump()
    done = await way.proxy.run(sys.executable, "-c", NO_SPLICE.format(number=38, engine="splice"))
    assert done.stdout == (
        '`relay.engine` = "splice", but splice(2) does not work here: Function not implemented; allow it (in a systemd unit: '
        'SystemCallFilter=splice), or set engine = "copy"\n'
    )
    assert await way.proxy.dump() == before


@pytest.mark.parametrize("engine", ["splice", "auto"])
@GATEWAY_V4
@pytest.mark.timed
async def test_29_30_resets_pass_at_once_with_every_engine(way: Way, nursery: trio.Nursery, engine: str) -> None:
    """In the middle of bulk, in both directions; and none of the bytes before the upstream's gets lost."""
    taken = 3_000_000
    client_has_all, ended = trio.Event(), trio.Event()

    async def resetting(stream: trio.SocketStream) -> None:
        for chunk in payload(taken):
            await stream.send_all(chunk)
        await client_has_all.wait()
        await reset(stream)

    async def endless(stream: trio.SocketStream) -> None:
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await stream.send_all(b"x" * 65536)
        ended.set()
        await stream.aclose()

    nursery.start_soon(trio.serve_listeners, resetting, [way.app.listen(way.bind, 8081)])
    nursery.start_soon(trio.serve_listeners, endless, [way.app.listen(way.bind, 8082)])
    async with open_daemon(way.proxy, relay(engine=engine)) as daemon:
        async with await way.client.connect(way.address, 8081) as stream:
            digest, got = hashlib.sha256(), 0
            while got < taken:
                chunk = await stream.receive_some(65536)
                digest.update(chunk)
                got += len(chunk)
            began = trio.current_time()
            client_has_all.set()
            assert await resets_within(stream, 1)
            first = trio.current_time() - began
        stream = await way.client.connect(way.address, 8082)
        await stream.receive_some(100_000)
        began = trio.current_time()
        await reset(stream)
        with trio.fail_after(1):
            await ended.wait()
        second = trio.current_time() - began
        await until(lambda: outcomes(daemon) == {"upstream_reset": 1, "client_reset": 1})
    print(f"{engine}: the upstream's reset passed on in {first * 1000:.1f} ms, the client's in {second * 1000:.1f} ms")
    assert digest.hexdigest() == digest_of(taken)
    assert max(first, second) < 0.5  # 100 ms, with room for a busy machine


@pytest.mark.parametrize(("engine", "number"), [("splice", 1), ("auto", 0)])
@GATEWAY_V4
async def test_33_a_stalled_reader_costs_no_memory(way: Way, nursery: trio.Nursery, engine: str, number: int) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await stream.send_all(b"x" * 65536)
        await stream.aclose()

    nursery.start_soon(trio.serve_listeners, answer, [way.app.listen(way.bind, 8080)])
    async with open_daemon(way.proxy, relay(engine=engine, workers=number)) as daemon:
        async with many(way.client, way.address, 5) as streams:
            for stream in streams:
                await stream.receive_some(1000)
            before = memory_kib(daemon, anonymous=True)
            used = all_cpu_seconds(daemon)
            await trio.sleep(1)
            grown, used = memory_kib(daemon, anonymous=True) - before, all_cpu_seconds(daemon) - used
            print(f"{engine}, {number} workers: {grown} KiB more after a second, {used:.1%} CPU")
            assert grown < 2048
            for stream in streams:
                await reset(stream)
        await until(lambda: outcomes(daemon) == {"client_reset": 5})


async def test_30_a_client_that_resets_while_its_server_does_not_answer_ends_the_dial(gateway_lab: Lab) -> None:
    gateway, client = gateway_lab["gateway"], gateway_lab["client"]
    await gateway_lab["server"].run("nft", "-f", "-", input=(
        "table inet hole { chain in { type filter hook prerouting priority raw;\ntcp dport 8080 drop\n}\n}\n"
    ))  # fmt: skip
    async with open_daemon(gateway, CAPTURE) as daemon:
        stream = await client.connect("203.0.113.9", 8080)
        own = format_address(stream.socket.getsockname())
        await stream.send_all(b"hello")
        await trio.sleep(0.3)
        assert "SYN-SENT" in (await gateway.run("ss", "-Htan")).stdout
        began = trio.current_time()
        await reset(stream)
        record = await daemon.record(own)
        took = trio.current_time() - began
        print(f"cancelled after {took * 1000:.1f} ms")
        assert record["outcome"] == "client_reset"
        assert took < 0.5  # 100 ms, with room for a busy machine; the connect time-out is at 5 s
        assert "SYN-SENT" not in (await gateway.run("ss", "-Htan")).stdout


@GATEWAY_V4
@pytest.mark.timed
async def test_busy_polling_takes_time_only_while_connections_live(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)

    async def share(daemon: LabDaemon) -> float:
        used = all_cpu_seconds(daemon)
        await trio.sleep(1)
        return all_cpu_seconds(daemon) - used

    async with open_daemon(way.proxy, relay(busy_poll="10ms")) as daemon:
        await trio.sleep(0.5)  # its first look at the kernel's state, right after it is ready, is not what is measured
        none = await share(daemon)
        async with many(way.client, way.address, 1) as (stream,):
            idle = await share(daemon)
            used = all_cpu_seconds(daemon)
            with trio.move_on_after(1):
                while True:  # one exchange each 8 ms: within the time that is polled
                    await stream.send_all(b"x")
                    await stream.receive_some()
                    await trio.sleep(0.008)
            busy = all_cpu_seconds(daemon) - used
        await until(lambda: outcomes(daemon) == {"closed": 1})
        after = await share(daemon)
    print(f"busy_poll 10 ms: no connection {none:.1%}, an idle one {idle:.1%}, a busy one {busy:.1%}, gone {after:.1%}")
    assert max(none, after) < 0.05
    assert idle < 0.1
    assert busy > 0.2


@pytest.mark.parametrize("number", [0, 1])
@GATEWAY_V4
@pytest.mark.timed
async def test_time_outs_come_on_time_in_either_home(way: Way, nursery: trio.Nursery, number: int) -> None:
    """Never early; late by a thirty-second of the time at most, and some room for a busy machine."""

    async def mute(stream: trio.SocketStream) -> None:
        with pytest.raises(trio.BrokenResourceError):
            while True:
                if not await stream.receive_some():
                    await trio.sleep(0.05)
        await stream.aclose()

    nursery.start_soon(trio.serve_listeners, mute, [way.app.listen(way.bind, 8080)])
    config = relay(workers=number, idle_timeout="1600ms", half_close_timeout="800ms")
    async with open_daemon(way.proxy, config) as daemon:
        async with many(way.client, way.address, 2) as (idle, half):
            for stream in (idle, half):
                await stream.send_all(b"x")
            began = trio.current_time()
            await half.send_eof()
            assert await resets_within(half, 3)
            halved = trio.current_time() - began
            assert await resets_within(idle, 3)
            idled = trio.current_time() - began
        await until(lambda: outcomes(daemon) == {"half_close_timeout": 1, "idle_timeout": 1})
    print(f"half_close_timeout 800 ms: after {halved * 1000:.0f} ms; idle_timeout 1600 ms: after {idled * 1000:.0f} ms")
    assert 0.79 <= halved < 0.825 + 0.3
    assert 1.59 <= idled < 1.65 + 0.3


@GATEWAY_V4
async def test_many_connections_leave_nothing_behind(
    way: Way, nursery: trio.Nursery, counted: Callable[[int], int]
) -> None:
    """100,000 with every kind of end: files and memory of all processes are what they were after the first tenth."""
    total = counted(100_000)

    async def app(stream: trio.SocketStream) -> None:
        try:
            word = await stream.receive_some()
            if word == b"reset me":
                return await reset(stream)
            if word != b"silence":
                await stream.send_all(word)
            while await stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass
        return await stream.aclose()

    async def one(number: int) -> None:
        kind = number % 10
        if kind == 0:
            await attempt(way.client, way.address, 9999)
            return
        try:
            stream = await way.client.connect(way.address, 8080)
        except ConnectionResetError:
            return
        try:
            if kind == 1:
                await stream.send_all(b"reset me")
                await resets_within(stream, 5)
            elif kind == 2:
                await stream.send_all(b"hello")
                await reset(stream)
            elif kind == 3 and number % 1000 == 3:
                await stream.send_all(b"silence")
                await resets_within(stream, 5)  # by the idle time-out
            else:
                await stream.send_all(b"hello")
                await stream.receive_some()
                await stream.send_eof()
                await stream.receive_some()
        finally:
            await stream.aclose()

    async def client(numbers: range) -> None:
        for number in numbers:
            await one(number)

    async def so_many(first: int, last: int) -> None:
        async with trio.open_nursery() as clients:
            for offset in range(10):
                clients.start_soon(client, range(first + offset * 7919, last + offset * 7919, 10))
        await until(lambda: daemon.process.stdout_text.count("\n") >= last, within=10)
        await trio.sleep(0.3)

    nursery.start_soon(trio.serve_listeners, app, [way.app.listen(way.bind, 8080)])
    async with open_daemon(way.proxy, relay(idle_timeout="300ms")) as daemon:
        await so_many(0, total // 10)
        files, memory = [files_of(pid).total() for pid in processes(daemon)], memory_kib(daemon, anonymous=True)
        await so_many(total // 10, total)
        grown = memory_kib(daemon, anonymous=True) - memory
        print(f"{total} connections, {dict(outcomes(daemon))}: {grown:+d} KiB after the first tenth")
        now = [files_of(pid).total() for pid in processes(daemon)]
        # Spare pipes may be kept, two ends each.
        assert all(later <= before + 8 for later, before in zip(now, files, strict=True))
        assert grown < 1024
        assert {"closed", "client_reset", "upstream_reset", "upstream_refused", "idle_timeout"} >= set(outcomes(daemon))
        assert "bug" not in daemon.process.stderr_text


# Relays a number of connections with mixed ends in this process, and looks what the loop still has.
KEPT = """
import gc, socket, struct, sys, trio
from tproxyd import config_from_mapping
from tproxyd.datapath import loop
from tproxyd.datapath.connection import Connection
from tproxyd.interceptor import open_interceptor

loops, init = [], loop.RelayLoop.__init__
def noting(self, *arguments):
    init(self, *arguments)
    loops.append(self)
loop.RelayLoop.__init__ = noting

async def main():
    config = {"capture": {"ports": ["8080", "9999"]}, "relay": {"workers": 0, "idle_timeout": "300ms"}}
    async with open_interceptor(config_from_mapping(config), on_record=lambda record: None, own_namespace=True) as interceptor:
        print("open", flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)
        (own,) = loops
        kept = {
            "connections": own._books.connections, "new": own._books._new, "again": own._again, "blocked": own._blocked,
            "flushing": own.flushing, "sources": own._books._sources, "records": own._books._records, "ready": own._accepting.ready,
            "handed": own._handed,
            **{f"of {name}": one.connections for name, one in own._workloads.items()},
            **{f"waiting of {name}": one.waiting for name, one in own._workloads.items()},
            **{name: [one for wheel in wheels for slot in wheel._slots.values() for one in slot]
               for name, wheels in (
                   ("dialling", own._dialling.values()), ("opening", own._opening.values()),
                   ("settling", [own.settling]), ("idle", [own.idle]), ("half_closed", [own.half_closed]))},
        }
        print({name: len(what) for name, what in kept.items() if what}, len(own._handlers), own.pipes.open - len(own.pipes._spare))
        gc.disable()
        print(sum(isinstance(one, Connection) for one in gc.get_objects()), flush=True)
trio.run(main)
"""


@GATEWAY_V4
async def test_a_loop_keeps_nothing_of_connections_that_have_ended(way: Way, nursery: trio.Nursery) -> None:
    import subprocess

    await nursery.start(serve_echo, way.app, 8080)
    async with way.proxy.process(sys.executable, "-c", KEPT, collect=True, stdin=subprocess.PIPE) as process:
        await process.wait_for_output("open")
        for number in range(100):
            if number % 4 == 0:
                await attempt(way.client, way.address, 9999)
                continue
            async with await way.client.connect(way.address, 8080) as stream:
                await stream.send_all(b"x" * 100_000)
                await stream.receive_some(1)
                if number % 4 == 1:
                    await reset(stream)
                elif number % 4 == 2:
                    await stream.send_eof()
                    while await stream.receive_some():
                        pass
                elif number < 20:
                    await resets_within(stream, 5)
        await trio.sleep(1)
        assert process.stdin is not None
        await process.stdin.send_all(b"\n")
        assert await process.wait() == 0
    _, kept, alive = process.stdout_text.splitlines()
    assert kept == "{} 4 0"  # the channel, the netlink socket, two listeners
    assert int(alive) <= 2  # what the local variables of the running loop still name, whatever the number
