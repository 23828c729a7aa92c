"""Whoever asks the daemon badly hurts neither connections nor others who ask."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack, suppress
from subprocess import PIPE

import pytest
import trio

from netns_tests.asking import CONFIG, abused, ask, auto, connect, exchanges, median, serving
from netns_tests.watch import Http, get, works
from netns_tests.way import GATEWAY_V4, SIDECAR_V4, Way
from tproxyd.testing.daemon import cpu_seconds, open_daemon


@pytest.mark.timed
@GATEWAY_V4
async def test_57_a_flood_of_connections_keeps_nobody_out(way: Way, nursery: trio.Nursery) -> None:
    """1,000 that say nothing, half of them at the metrics' port, and others in the place of those that are sent away."""
    async with serving(way, nursery) as (_, stream):
        alone = await exchanges(stream, 1000)
        async with abused(way.proxy, "flood") as done:
            beside = []
            for _ in range(10):
                beside += await exchanges(stream, 200)
                for target in ("/healthz", "/v1/status"):
                    assert (await ask(auto(way.proxy), target, within=8)).status == 200
                assert (await get(way.proxy, "/healthz", within=8)).status == 200
        assert done["connections"] >= 1000
        print(f"ms alone {median(alone)}, beside {median(beside)}")
        assert median(beside) < 2 * median(alone) + 0.2


@pytest.mark.timed
@SIDECAR_V4
async def test_57_who_connects_and_says_nothing_costs_no_time(way: Way, nursery: trio.Nursery) -> None:
    async with serving(way, nursery) as (daemon, _), abused(way.proxy, "flood") as done:
        await trio.sleep(1)  # what still waits in the queues is let in
        used = cpu_seconds(daemon.process.pid)
        await trio.sleep(2)
        used = cpu_seconds(daemon.process.pid) - used
    print(f"{used / 2:.1%} of a core")
    assert used < 0.06
    assert done["connections"] == 1000  # nobody had to come twice


@SIDECAR_V4
async def test_58_a_head_in_pieces_is_answered_when_it_is_whole(way: Way, nursery: trio.Nursery) -> None:
    async with serving(way, nursery), await connect(auto(way.proxy)) as client:
        for piece in (b"GET /hea", b"lthz HTTP/1.1\r\n", b"Host: x\r\n", b"\r", b"\n"):
            await client.send_all(piece)
            with trio.move_on_after(0.05):
                assert Http(await client.receive_some()).status == 200
                return
    raise AssertionError("no answer")


@SIDECAR_V4
async def test_58_half_a_head_and_no_more_is_told_so(way: Way, nursery: trio.Nursery) -> None:
    async with serving(way, nursery), await connect(auto(way.proxy)) as client:
        await client.send_all(b"GET /healthz HTTP/1.1\r\nHost")
        await client.send_eof()
        with trio.fail_after(2):
            assert Http(await client.receive_some()).status == 400
            assert not await client.receive_some()


SLOW = {
    "in the head": b"GET /v1/sta",
    "in the body": b"PUT /v1/log-level HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{",
    "after a request": b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    "not reading": b"GET /v1/plan HTTP/1.1\r\nHost: x\r\n\r\n" * 60,
}


@pytest.mark.timed
@GATEWAY_V4
async def test_58_slow_clients_are_sent_away_and_keep_nobody_waiting(way: Way, nursery: trio.Nursery) -> None:
    """80 of each kind, more than there are places."""
    path = auto(way.proxy)
    async with serving(way, nursery) as (_, stream), AsyncExitStack() as stack:
        for said in SLOW.values():
            for _ in range(80):
                client = await stack.enter_async_context(await connect(path))
                with trio.move_on_after(0.01), suppress(trio.BrokenResourceError):
                    await client.send_all(said)
            for target in ("/healthz", "/v1/status", "/v1/connections"):
                assert (await ask(path, target, within=8)).status == 200  # who is slow is waited for 10 s
            await works(stream)


@pytest.mark.timed
@GATEWAY_V4
async def test_58_who_says_a_byte_a_second_has_ten_seconds_in_all(way: Way, nursery: trio.Nursery) -> None:
    path = auto(way.proxy)
    async with serving(way, nursery) as (_, stream), trio.open_nursery() as slow:

        async def drip(name: str, said: bytes) -> None:
            began = trio.current_time()
            async with await connect(path) as client:
                with suppress(trio.BrokenResourceError), trio.fail_after(15):
                    await client.send_all(said)
                    while True:
                        with trio.move_on_after(1):
                            if name != "not reading":
                                while await client.receive_some():
                                    pass
                                break
                            await trio.sleep_forever()
                        await client.send_all(b"x")
            took = trio.current_time() - began
            print(f"{name}: {took:.1f} s")
            assert 8 < took < 14

        for name, said in SLOW.items():
            if name == "not reading":
                said = said * 20  # more than the kernel keeps for it
            slow.start_soon(drip, name, said)
        for _ in range(5):
            await works(stream)
            assert (await ask(path, "/healthz")).status == 200


DRIP = """
import select, socket
clients = []
for _ in range(60):
    client = socket.create_connection(("127.0.0.1", 9101))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.sendall(b"GET / HTTP/1.1 X: " + b"x" * 12000)
    client.setblocking(False)
    clients.append(client)
print("up", flush=True)
while not select.select([0], [], [], 0)[0]:
    for client in clients:
        try:
            client.send(b"x")
        except OSError:
            pass
"""


@pytest.mark.timed
@SIDECAR_V4
async def test_58_who_says_a_byte_at_a_time_as_fast_as_can_be_takes_little_time(
    way: Way, nursery: trio.Nursery
) -> None:
    """At the end of long heads, at the metrics' port."""
    async with serving(way, nursery) as (daemon, stream):
        assert (await ask(auto(way.proxy), "/healthz", within=8)).status == 200
        command = ("chrt", "--idle", "0", sys.executable, "-c", DRIP)  # on another machine, it would take no CPU here
        async with way.proxy.process(*command, stdin=PIPE, collect=True) as drip:
            await drip.wait_for_output("up")
            used, longest = cpu_seconds(daemon.process.pid), 0.0
            for _ in range(20):
                began = trio.current_time()
                assert (await ask(auto(way.proxy), "/healthz", within=8)).status == 200
                longest = max(longest, trio.current_time() - began)
                await trio.sleep(0.05)
                await works(stream)
            used = cpu_seconds(daemon.process.pid) - used
            assert drip.stdin is not None
            await drip.stdin.aclose()
            await drip.wait()
        print(f"answered after {longest:.3f} s at most; {used:.2f} CPU seconds")
        assert longest < 0.3
        assert used < 0.6


CROWD = """
import resource, select, socket
resource.setrlimit(resource.RLIMIT_NOFILE, (2000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
poll, head = select.epoll(), b"GET /healthz HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n"
clients = {}

def come():
    client = socket.socket()
    client.bind(("127.0.0.2", 0))
    client.connect(("127.0.0.1", 9101))
    client.sendall(head)
    clients[client.fileno()] = client
    poll.register(client, select.EPOLLIN)

for _ in range(1200):
    come()
print("up", flush=True)
while not select.select([0], [], [], 0)[0]:
    for fd, _ in poll.poll(0.1):
        clients.pop(fd).close()
        come()
"""


@pytest.mark.timed
@SIDECAR_V4
async def test_57_a_crowd_from_one_address_keeps_no_other_one_waiting(way: Way, nursery: trio.Nursery) -> None:
    """1,200 at once, more than there is room for, each with a whole head; it takes the daemon 24 s to answer as many."""
    async with serving(way, nursery) as (_, stream):
        command = ("chrt", "--idle", "0", sys.executable, "-c", CROWD)
        async with way.proxy.process(*command, stdin=PIPE, collect=True) as crowd:
            await crowd.wait_for_output("up", timeout=30)
            await trio.sleep(2)  # all are in
            for _ in range(3):
                began = trio.current_time()
                assert (await get(way.proxy, "/healthz", within=15)).status == 200
                print(f"answered after {trio.current_time() - began:.3f} s")
                assert trio.current_time() - began < 2
                await works(stream)
            assert crowd.stdin is not None
            await crowd.stdin.aclose()
            await crowd.wait()


BAD = {
    b"GET /v1/status HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 1_000_000: 431,
    b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n": 431,
    b"PUT /v1/log-level HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + b"{" * 1_000_000: 413,
    b"PUT /v1/log-level HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"8000\r\n" + b"{" * 0x8000: 413,
    b"nonsense\r\n\r\n": 400,
    b"GET /healthz HTTP/1.1\r\n\r\n": 400,  # without Host
    b"POST /v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n": 400,
    b"POST /v1/drain HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n": 400,
    b"\x16\x03\x01\x02\x00" + b"\0" * 600: 400,
}


@GATEWAY_V4
async def test_59_huge_heads_and_bodies_are_refused_and_hurt_nobody(way: Way, nursery: trio.Nursery) -> None:
    path = auto(way.proxy)
    async with serving(way, nursery) as (daemon, stream):
        for data, status in BAD.items():
            answer = b""
            async with await connect(path) as asking:
                with trio.fail_after(5):
                    with suppress(trio.BrokenResourceError):  # it does not read all of it
                        await asking.send_all(data)
                    with suppress(trio.BrokenResourceError):
                        answer = await asking.receive_some()
            assert Http(answer).status == status, data[:60]
            await works(stream)
        assert "stopping" not in daemon.process.stderr_text


@SIDECAR_V4
async def test_59_a_long_configuration_is_put_into_words_once_for_all_who_ask(way: Way) -> None:
    """Each time it costs some milliseconds of the thread that repairs, too; any member of the group may ask."""
    sources = ", ".join(f'"10.{high}.{low}.0/24"' for high in range(10) for low in range(200))
    async with open_daemon(way.proxy, f"{CONFIG}\n".replace("[admin]", f"sources = [{sources}]\n[admin]")) as daemon:
        await ask(auto(way.proxy), "/v1/config", within=10)
        used = cpu_seconds(daemon.process.pid)
        answers: list[Http] = []

        async def keep_asking() -> None:
            for _ in range(10):
                answers.append(await ask(auto(way.proxy), "/v1/config", within=20))

        async with trio.open_nursery() as asking:
            for _ in range(20):
                asking.start_soon(keep_asking)
        used = cpu_seconds(daemon.process.pid) - used
        print(f"{len(answers)} answers in {used:.2f} CPU seconds")
    assert {answer.status for answer in answers} == {200}
    assert len({bytes(answer.body) for answer in answers}) == 1
    assert used < 0.4


@pytest.mark.timed
@GATEWAY_V4
async def test_59_a_storm_of_scrapes_takes_little_of_the_daemon_s_time(way: Way, nursery: trio.Nursery) -> None:
    """Ten at once that ask for the metrics, and ten for each of the dearest resources of the socket, without a pause."""
    async with serving(way, nursery) as (daemon, stream):
        alone = await exchanges(stream, 1000)
        async with abused(way.proxy, "storm") as done:
            began, used = trio.current_time(), cpu_seconds(daemon.process.pid)
            beside = []
            while trio.current_time() < began + 3:
                beside += await exchanges(stream, 200)
            share = (cpu_seconds(daemon.process.pid) - used) / (trio.current_time() - began)
        assert done["answers"] >= 50  # each has had one
        print(f"ms alone {median(alone)}, beside {median(beside)}; {share:.0%} of a core")
        assert median(beside) < 2 * median(alone) + 0.2
        assert share < 0.6
