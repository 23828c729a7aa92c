"""Whoever is connected to an app in a client's name has ports that are the client's, too: who gets which, and what becomes of the other."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial

import pytest
import trio

from netns_tests.watch import all_cpu_seconds, attempt, outcomes, until, works
from netns_tests.way import BOTH_LAYOUTS, Way
from tproxyd.net.sockets import can_share_ports, format_address
from tproxyd.testing import Node
from tproxyd.testing.daemon import TPROXYD, LabDaemon, open_daemon

CONFIG = '[capture]\nports = ["8080"]\n'
RANGE = "net.ipv4.ip_local_port_range"
RESERVED = "net.ipv4.ip_local_reserved_ports"
SIDECARS = pytest.mark.parametrize("way", ["sidecar v4", "sidecar v6"], indirect=True)
GATEWAYS = pytest.mark.parametrize("way", ["gateway v4", "gateway v6"], indirect=True)
CLOSE = b"close, please"


@pytest.fixture
async def app(way: Way, nursery: trio.Nursery) -> None:
    """At the ports 8080 and 9090: says who the client is, then echoes; closes when it is told to, or after the client."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            with suppress(trio.BrokenResourceError, OSError):
                await stream.send_all(format_address(stream.socket.getpeername()).encode() + b"\n")
                while (word := await stream.receive_some()) and word != CLOSE:
                    await stream.send_all(word)

    listeners = [way.app.listen(way.bind, port) for port in (8080, 9090)]
    nursery.start_soon(partial(trio.serve_listeners, serve, listeners))


Connect = Callable[..., Awaitable[tuple[trio.SocketStream, str, int]]]


@asynccontextmanager
async def connections(way: Way) -> AsyncIterator[Connect]:
    """`await connect(port, source_port=0)`: a connection that lives to the end of the block, and whom the app takes its client for."""
    async with AsyncExitStack() as stack:

        async def connect(
            port: int = 8080, *, source_port: int = 0, timeout: float = 5
        ) -> tuple[trio.SocketStream, str, int]:
            stream = await way.client.connect(way.address, port, source_port=source_port, timeout=timeout)
            await stack.enter_async_context(stream)
            with trio.fail_after(5):
                host, _, seen = (await stream.receive_some()).decode().strip().rpartition(":")
            return stream, host.strip("[]"), int(seen)

        yield connect


def own_port(stream: trio.SocketStream) -> int:
    port: int = stream.socket.getsockname()[1]
    return port


def client_address(way: Way) -> str:
    return way.client.v6 if ":" in way.address else way.client.v4


async def dropped(node: Node) -> int:
    """SYNs of clients that the ruleset has dropped because a connection in their name has the port."""
    listing = (await node.run("nft", "list", "chain", "inet", "tproxyd", "take")).stdout
    return sum(map(int, re.findall(r"counter packets (\d+) bytes \d+ drop", listing)))


@pytest.mark.parametrize(
    ("way", "first", "when_down"),
    [("sidecar v4", "client", "refuse"), ("sidecar v6", "app", "bypass")],
    indirect=["way"],
)
async def test_a_client_that_takes_our_port_waits_until_it_is_free(
    way: Way, app: None, first: str, when_down: str
) -> None:
    """Never reset, never mixed up with the connection that has the port; whoever of both sides ends that one first."""
    config = f'{CONFIG}when_down = "{when_down}"\n'
    async with open_daemon(way.proxy, config) as daemon, connections(way) as connect:
        stream, _, chosen = await connect()
        second: list[tuple[trio.SocketStream, str, int]] = []

        async def client() -> None:
            second.append(await connect(source_port=chosen, timeout=20))

        async with trio.open_nursery() as clients:
            clients.start_soon(client)
            with trio.fail_after(5):
                while not await dropped(way.proxy):
                    await trio.sleep(0.01)
            await works(stream)
            assert not second
            if first == "app":
                await stream.send_all(CLOSE)
                with trio.fail_after(5):
                    assert await stream.receive_some() == b""
            await stream.aclose()
            began = trio.current_time()
        assert trio.current_time() - began < 3  # the client tries again after a second
        ((later, host, port),) = second
        assert own_port(later) == chosen
        assert host == client_address(way)
        assert port != chosen
        await works(later)
        await later.aclose()
        await until(lambda: len(daemon.records()) == 2)
    assert [record["outcome"] for record in daemon.records()] == ["closed", "closed"]


@pytest.mark.parametrize(("way", "source"), [("sidecar v4", "client"), ("sidecar v6", "auto")], indirect=["way"])
async def test_a_port_that_the_client_has_itself_is_not_chosen(way: Way, app: None, source: str) -> None:
    """Connected before the daemon came, which has ten ports to choose from: nine of them are the client's."""
    way.proxy.set_sysctl(RANGE, "40000 40009")
    async with connections(way) as connect:
        direct = [(await connect(source_port=port))[0] for port in range(40000, 40010) if port != 40007]
        async with open_daemon(way.proxy, f'{CONFIG}[upstream]\nsource = "{source}"\n'):
            stream, host, port = await connect(source_port=50000)
            assert (host, port) == (client_address(way), 40007)
            if source == "client":
                await attempt(way.client, way.address, source_port=50001)
            for one in (*direct, stream):
                await works(one)


@SIDECARS
async def test_a_port_that_the_client_has_past_us_is_not_taken(way: Way, app: None) -> None:
    """The target is another port, to which the client is connected itself: from the very port that it uses towards us, which would do
    otherwise, and from nine of the ten others."""
    way.proxy.set_sysctl(RANGE, "40000 40009")
    target = format_address((way.address, 9090))
    config = f'{CONFIG}[upstream]\ntarget = "{target}"\nsource = "client"\n'
    async with open_daemon(way.proxy, config) as daemon, connections(way) as connect:
        ports = [*(port for port in range(40000, 40010) if port != 40003), 50000]
        direct = [await connect(9090, source_port=port) for port in ports]
        assert [port for _, _, port in direct] == ports
        stream, host, port = await connect(source_port=50000)
        assert (host, port) == (client_address(way), 40003)
        other, host, port = await connect(source_port=50001)
        assert (host, port) == (client_address(way), 50001)
        for one in (*(one for one, _, _ in direct), stream, other):
            await works(one)
        # And now none is left.
        (await connect(9090, source_port=50002))[0]
        refused = await attempt(way.client, way.address, source_port=50002)
        assert (await daemon.record(refused))["outcome"] == "no_ports"


@SIDECARS
async def test_a_client_that_connects_past_us_from_its_port_of_a_connection_in_its_name(way: Way, app: None) -> None:
    """The other way about: our connection has the client's port to the app, and the client wants it itself. The app knows the connection and does
    not begin another; the client gets it when ours has ended."""
    target = format_address((way.address, 9090))
    async with (
        open_daemon(way.proxy, f'{CONFIG}[upstream]\ntarget = "{target}"\n'),
        connections(way) as connect,
    ):
        stream, _, port = await connect(source_port=50000)
        assert port == 50000
        direct: list[trio.SocketStream] = []

        async def client() -> None:
            direct.append((await connect(9090, source_port=50000, timeout=20))[0])

        async with trio.open_nursery() as clients:
            clients.start_soon(client)
            with trio.move_on_after(1.5):  # the client's first two tries
                while not direct:
                    await works(stream)
                    await trio.sleep(0.05)
            assert not direct
            await stream.send_eof()
            with trio.fail_after(5):
                assert await stream.receive_some() == b""
            began = trio.current_time()
        assert (
            trio.current_time() - began < 6
        )  # its third or fourth try: after three seconds, or seven from the beginning
        await works(direct[0])


@pytest.mark.parametrize("bind_service", [True, False], ids=["with the capability", "without it"])
@pytest.mark.parametrize(
    ("way", "target"),
    [("gateway v6", "original"), ("sidecar v4", "loopback")],
    indirect=["way"],
)
async def test_a_client_port_below_1024(way: Way, app: None, target: str, bind_service: bool) -> None:
    """Kept with CAP_NET_BIND_SERVICE; another port without it, with which "client" does not start."""
    config = f'{CONFIG}[upstream]\ntarget = "{target}"\nsource = "{"client" if bind_service else "auto"}"\n'
    wrapper = (
        () if bind_service else ("setpriv", "--bounding-set", "-net_bind_service", "--inh-caps", "-net_bind_service")
    )
    command = (*wrapper, *TPROXYD, "run", "-c", str(way.file(config)))
    async with way.proxy.process(*command, collect=True) as process, connections(way) as connect:
        daemon = LabDaemon(process, await process.wait_for_output("tproxyd: ready "))
        stream, host, port = await connect(source_port=700)
        assert host == client_address(way)
        assert (port == 700) == bind_service
        await works(stream)
        await stream.aclose()
        record = await daemon.record(format_address((host, 700)))
        assert record["outcome"] == "closed"
        assert record["upstream_source"] == format_address((host, port))
        assert await daemon.stop() == 0


@SIDECARS
async def test_the_listeners_port_and_reserved_ones_are_not_chosen(way: Way, app: None) -> None:
    way.proxy.set_sysctl(RANGE, "15005 15008")
    way.proxy.set_sysctl(RESERVED, "15007,20000-30000")
    async with (
        open_daemon(way.proxy, f'{CONFIG}[upstream]\nsource = "client"\n') as daemon,
        connections(way) as connect,
    ):
        chosen = {(await connect())[2] for _ in range(2)}
        assert chosen == {15005, 15008}
        refused = await attempt(way.client, way.address, source_port=50000)
        assert (await daemon.record(refused))["outcome"] == "no_ports"


@GATEWAYS
async def test_a_client_that_comes_again_before_its_last_connection_has_ended(way: Way, app: None) -> None:
    """The server closes first, the client then, and the server does not hear of that yet: our socket with the client's port is still there."""
    deaf = "table inet deaf {\nchain in {\ntype filter hook input priority 0;\ntcp flags fin drop\n}\n}\n"
    async with open_daemon(way.proxy, CONFIG) as daemon, connections(way) as connect:
        stream, _, port = await connect(source_port=50000)
        assert port == 50000
        await way.app.run("nft", "-f", "-", input=deaf)
        await stream.send_all(CLOSE)
        with trio.fail_after(5):
            assert await stream.receive_some() == b""
        await stream.aclose()
        await until(daemon.records)
        began = trio.current_time()
        again, host, port = await connect(source_port=50000)
        assert trio.current_time() - began < 0.9
        assert host == client_address(way)
        assert port != 50000
        await works(again)
        # The server hears of it, and the port can be had again.
        await way.app.run("nft", "delete", "table", "inet", "deaf")
        await again.aclose()
        await until(lambda: len(daemon.records()) == 2)
        with trio.fail_after(10):
            while await states(way.proxy, 50000) & {"LAST-ACK", "CLOSING", "FIN-WAIT-1", "FIN-WAIT-2"}:
                await trio.sleep(0.02)
        assert (await connect(source_port=50000))[2] == 50000


async def states(node: Node, port: int) -> set[str]:
    """Of sockets with this local port."""
    return {line.split()[0] for line in (await node.run("ss", "-Htan", f"sport = {port}")).stdout.splitlines()}


@pytest.mark.parametrize(
    ("way", "source"),
    [("sidecar v4", "client"), ("sidecar v6", "client"), ("sidecar v4", "127.0.0.6"), ("sidecar v6", "proxy")],
    indirect=["way"],
)
async def test_25_without_a_free_port_the_client_is_reset_as_whomever_it_would_be(
    way: Way, app: None, source: str
) -> None:
    """Ten ports, all in use. One line is logged for a flood of clients, and none of them is tried for longer than a moment."""
    way.proxy.set_sysctl(RANGE, "40000 40009")
    config = f'{CONFIG}[upstream]\nsource = "{source}"\n'
    async with open_daemon(way.proxy, config) as daemon, connections(way) as connect:
        live = [await connect(source_port=port) for port in range(50000, 50010)]
        assert {port for _, _, port in live} == set(range(40000, 40010))
        used = all_cpu_seconds(daemon)
        for number in range(100):
            await attempt(way.client, way.address, source_port=51000 + number)
        await until(lambda: outcomes(daemon) == {"no_ports": 100})
        cost = (all_cpu_seconds(daemon) - used) / 100
        print(f"{way}, {source}: {cost * 1000:.1f} ms of CPU for each")
        assert cost < 0.01
        assert daemon.process.stderr_text.count("no free port for a connection to") == 1
        assert "Traceback" not in daemon.process.stderr_text
        for stream, _, _ in live:
            await works(stream)
        await live[0][0].aclose()
        await until(lambda: outcomes(daemon) == {"no_ports": 100, "closed": 1})
        assert (await connect(source_port=52000))[2] == live[0][2]
        way.proxy.set_sysctl(RANGE, "40000 40011")  # which the log says to do
        assert {(await connect(source_port=port))[2] for port in (52001, 52002)} == {40010, 40011}


@pytest.mark.parametrize(
    ("way", "upstream"),
    [
        ("sidecar v4", 'source = "client"'),
        ("sidecar v6", 'source = "client"'),
        ("sidecar v4", 'target = "loopback"'),
        ("sidecar v6", 'target = "loopback"'),
        ("sidecar v4", 'target = "192.0.2.1:9090"'),
        ("sidecar v4", 'source = "127.0.0.6"'),
        ("sidecar v6", 'source = "proxy"'),
    ],
    indirect=["way"],
)
async def test_26_a_port_in_time_wait_is_used_again(way: Way, app: None, upstream: str) -> None:
    """One port is all there is: of the client's, where that is kept, else of those that can be chosen. Whoever closed first the time before."""
    way.proxy.set_sysctl(RANGE, "40001 40001")
    keeps = "target" in upstream
    slowest = 0.0
    async with open_daemon(way.proxy, f"{CONFIG}[upstream]\n{upstream}\n") as daemon:
        for number, first in enumerate(("app", "app", "client", "client", "app", "client"), 1):
            async with connections(way) as connect:
                with trio.fail_after(10):
                    while True:
                        began = trio.current_time()
                        try:
                            stream, host, port = await connect(source_port=50000 if keeps else 50000 + number)
                            break
                        except OSError:  # its own kernel has it in TIME_WAIT
                            await trio.sleep(0.05)
                slowest = max(slowest, trio.current_time() - began)
                assert port == (50000 if keeps else 40001)
                if "127" not in upstream and "proxy" not in upstream:
                    assert host == client_address(way)
                if first == "app":
                    await stream.send_all(CLOSE)
                else:
                    await stream.send_eof()
                with trio.fail_after(5):
                    assert await stream.receive_some() == b""
            await until(lambda number=number: len(daemon.records()) == number)  # type: ignore[misc]
        assert outcomes(daemon) == {"closed": 6}
    print(f"{way}, {upstream}: {slowest * 1000:.1f} ms")
    assert slowest < 0.9


@BOTH_LAYOUTS
async def test_ports_in_clients_names_are_free_for_the_host_itself(way: Way, app: None) -> None:
    """Ten ports are all that it has; ten connections of clients have the same ones, and end, and are in TIME_WAIT then. Before Linux 6.3 they
    are missing for so long."""
    way.proxy.set_sysctl(RANGE, "40000 40009")
    own = 9091
    other = way.app.listen(way.bind, own)
    async with other, open_daemon(way.proxy, f'{CONFIG}[upstream]\nsource = "client"\n') as daemon:
        async with connections(way) as connect:
            for port in range(40000, 40010):
                await connect(source_port=port if way.app is not way.proxy else port + 1000)
            assert await can_connect(way.proxy, way.address, own) == can_share_ports()
        await until(lambda: outcomes(daemon) == {"closed": 10})
        assert await can_connect(way.proxy, way.address, own) == can_share_ports()


async def can_connect(node: Node, address: str, port: int) -> bool:
    try:
        async with await node.connect(address, port):
            return True
    except OSError:
        return False
