"""`upstream.proxy_protocol`: the server is told who its client is, in a header that HAProxy and nginx read; and the names in a ClientHello."""

from __future__ import annotations

import random
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from netns_tests.both_ends import assert_is_payload, read_exactly
from netns_tests.headers import Told, client_hello, open_haproxy, open_nginx, read_told, to_the_end
from netns_tests.watch import outcomes, reset, resets_within
from netns_tests.way import BOTH_LAYOUTS, SIDECAR_V4, Way
from tproxyd.datapath.pipes import PipePool
from tproxyd.datapath.transfer import Leg
from tproxyd.net.sockets import format_address
from tproxyd.testing import payload, serve_echo
from tproxyd.testing.daemon import LabDaemon, open_daemon

CONFIG = '[capture]\nports = ["8080"]\n'
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
ALPN, AUTHORITY, UNIQUE_ID = 0x01, 0x02, 0x05
BOTH_VERSIONS = pytest.mark.parametrize("version", ["v1", "v2"])

SAYS = """
    http-request return status 200 content-type text/plain lf-string "%[src] %[src_port] %[dst] %[dst_port] %[fc_pp_authority] %[fc_pp_unique_id]"
"""


def config(version: str, *, upstream: str = "", policy: str = "", relay: str = "") -> str:
    """As whom the connection is made is not to tell, so that the header alone can."""
    return (
        f'{CONFIG}[upstream]\nsource = "proxy"\nproxy_protocol = "{version}"\n{upstream}\n'
        f"[policy]\n{policy}\n[relay]\n{relay}\n"
    )


async def ask(way: Way) -> tuple[str, int, list[str]]:
    """One HTTP request: the client's address and port, and the words of the answer."""
    async with await way.client.connect(way.address, 8080) as stream:
        host, port = stream.socket.getsockname()[:2]
        await stream.send_all(REQUEST)
        answer = await to_the_end(stream)
    assert answer.startswith(b"HTTP/1.1 200"), answer
    return host, port, answer.partition(b"\r\n\r\n")[2].decode().split(" ")


@BOTH_VERSIONS
async def test_haproxy_is_told_who_the_client_is(way: Way, tmp_path: Path, version: str) -> None:
    text = f"frontend told\n    bind {way.bind}:8080 accept-proxy\n{SAYS}"
    async with (
        open_haproxy(way.app, tmp_path, text, (way.app.v4 if way.bind == "0.0.0.0" else way.app.v6, 8080)),
        open_daemon(way.proxy, config(version)) as daemon,
    ):
        host, port, words = await ask(way)
        record = await daemon.record(format_address((host, port)))
    assert words[:4] == [host, str(port), way.address, "8080"]
    assert words[4] in ("", "-")
    assert words[5] == (record["id"] if version == "v2" else "-") or (version == "v1" and words[5] == "")
    assert record["outcome"] == "closed"
    assert record["bytes_from_client"] == len(REQUEST)
    assert record["sni"] is None
    assert record["alpn"] is None


@BOTH_VERSIONS
@BOTH_LAYOUTS
async def test_nginx_is_told_who_the_client_is(way: Way, tmp_path: Path, version: str) -> None:
    bind = "[::]" if way.bind == "::" else way.bind
    server = (
        f"listen {bind}:8080 proxy_protocol;\nlocation / {{ return 200 "
        '"$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_addr $proxy_protocol_server_port"; }'
    )
    async with (
        open_nginx(way.app, tmp_path, server, (way.app.v4 if way.bind == "0.0.0.0" else way.app.v6, 8080)),
        open_daemon(way.proxy, config(version)) as daemon,
    ):
        host, port, words = await ask(way)
        assert await daemon.stop() == 0
    assert words == [host, str(port), way.address, "8080"]


@BOTH_VERSIONS
@pytest.mark.parametrize("way", ["sidecar v4", "sidecar v6"], indirect=True)
async def test_haproxy_on_a_unix_socket_is_told_who_the_client_is(way: Way, tmp_path: Path, version: str) -> None:
    path = f"{tmp_path}/app.sock"
    text = f"frontend told\n    bind unix@{path} accept-proxy\n{SAYS}"
    upstream = f'target = "unix:{path}"'
    async with (
        open_haproxy(way.app, tmp_path, text, path),
        open_daemon(way.proxy, config(version, upstream=upstream)) as daemon,
    ):
        host, port, words = await ask(way)
        record = await daemon.record(format_address((host, port)))
    assert words[:4] == [host, str(port), way.address, "8080"]
    assert record["upstream"] == f"unix:{path}"
    if version == "v2":
        assert words[5] == record["id"]


@pytest.fixture
async def certificate(way: Way, tmp_path: Path) -> Path:
    """Of app.example, with its key in the same file."""
    key, file = tmp_path / "key.pem", tmp_path / "both.pem"
    await way.app.run(
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
        "-subj", "/CN=app.example", "-addext", "subjectAltName=DNS:app.example", "-keyout", str(key), "-out", str(file),
    )  # fmt: skip
    file.write_text(file.read_text() + key.read_text())
    return file


@BOTH_LAYOUTS
async def test_haproxy_is_told_the_names_of_a_tls_client(way: Way, tmp_path: Path, certificate: Path) -> None:
    text = f"frontend told\n    bind {way.bind}:8080 accept-proxy ssl crt {certificate} alpn http/1.1\n{SAYS}"
    context = ssl.create_default_context(cafile=str(certificate))
    context.set_alpn_protocols(["http/1.1", "h2"])
    async with (
        open_haproxy(way.app, tmp_path, text, (way.app.v4 if way.bind == "0.0.0.0" else way.app.v6, 8080)),
        open_daemon(way.proxy, config("v2")) as daemon,
    ):
        stream = await way.client.connect(way.address, 8080)
        host, port = stream.socket.getsockname()[:2]
        async with trio.SSLStream(stream, context, server_hostname="app.example", https_compatible=True) as tls:
            await tls.send_all(REQUEST)
            answer = await to_the_end(tls)
        record = await daemon.record(format_address((host, port)))
    words = answer.partition(b"\r\n\r\n")[2].decode().split(" ")
    assert words == [host, str(port), way.address, "8080", "app.example", record["id"]]
    assert record["sni"] == "app.example"
    assert record["alpn"] == "http/1.1,h2"


class Wire:
    """A server that sees the very bytes: `accept` gives its end, `dial` the client's. `own` is the address of the client that dialled last."""

    own = ""

    def __init__(self, way: Way, daemon: LabDaemon, listener: trio.SocketListener) -> None:
        self.way, self.daemon, self._listener = way, daemon, listener

    async def dial(self) -> trio.SocketStream:
        stream = await self.way.client.connect(self.way.address, 8080)
        stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.own = format_address(stream.socket.getsockname())
        return stream

    async def accept(self) -> trio.SocketStream:
        with trio.fail_after(5):
            return await self._listener.accept()

    async def record(self) -> dict[str, object]:
        """The last one's."""
        return await self.daemon.record(self.own)


@asynccontextmanager
async def open_wire(way: Way, text: str) -> AsyncIterator[Wire]:
    async with way.app.listen(way.bind, 8080) as listener, open_daemon(way.proxy, text) as daemon:
        yield Wire(way, daemon, listener)
        assert "this is a bug" not in daemon.process.stderr_text


async def told(stream: trio.SocketStream) -> Told:
    with trio.fail_after(5):  # half of the longest time that a hello is waited for here
        return await read_told(stream)


@BOTH_LAYOUTS
async def test_a_header_has_the_names_of_a_hello_and_comes_in_one_packet_with_it(way: Way) -> None:
    hello = client_hello()
    async with open_wire(way, config("v2", policy='sniff_timeout = "5s"')) as wire:
        client = await wire.dial()
        await client.send_all(hello)
        server = await wire.accept()
        async with client, server:
            header = await told(server)
            assert header.source == format_address(client.socket.getsockname())
            assert header.destination == format_address((way.address, 8080))
            assert header.command == 0x21
            assert header.tlvs[ALPN] == b"h2"
            assert header.tlvs[AUTHORITY] == b"app.example"
            assert header.rest == hello
            assert data_segments(server) == 1
            await server.send_all(b"answer")
            assert await client.receive_some() == b"answer"
        record = await wire.record()
    assert header.tlvs[UNIQUE_ID] == str(record["id"]).encode()
    assert record["bytes_from_client"] == len(hello)


@BOTH_VERSIONS
@BOTH_LAYOUTS
async def test_a_client_that_writes_a_header_itself_gets_it_through_behind_ours(
    way: Way, tmp_path: Path, version: str
) -> None:
    """The server reads one header, and takes what the client has written for the client's own bytes: no HTTP."""
    text = f"frontend told\n    bind {way.bind}:8080 accept-proxy\n{SAYS}"
    liar = f"PROXY TCP{'6' if ':' in way.address else '4'} {way.address} {way.address} 1 2\r\n".encode()
    async with (
        open_haproxy(way.app, tmp_path, text, (way.app.v4 if way.bind == "0.0.0.0" else way.app.v6, 8080)),
        open_daemon(way.proxy, config(version)) as daemon,
    ):
        async with await way.client.connect(way.address, 8080) as stream:
            own = format_address(stream.socket.getsockname())
            await stream.send_all(liar + REQUEST)
            assert (await to_the_end(stream)).split()[1] == b"400"
        assert (await daemon.record(own))["bytes_from_client"] == len(liar + REQUEST)


@pytest.mark.parametrize("way", ["gateway v4", "sidecar v6"], indirect=True)
async def test_in_redirect_mode_the_header_has_what_conntrack_knows(way: Way) -> None:
    text = '[capture]\nmode = "redirect"\nports = ["8080"]\n[upstream]\nproxy_protocol = "v2"\n'
    async with open_wire(way, text) as wire:
        async with await wire.dial() as client, await wire.accept() as server:
            await client.send_all(b"hello")
            header = await told(server)
            assert header.source == wire.own
            assert header.destination == format_address((way.address, 8080))
            assert server.socket.getpeername()[:2] != client.socket.getsockname()[:2]
        assert (await wire.record())["outcome"] == "closed"


def data_segments(stream: trio.SocketStream) -> int:
    """How many packets with data have come (tcpi_data_segs_in of struct tcp_info, linux/tcp.h)."""
    data = stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
    return int(struct.unpack_from("=I", data, 152)[0])


@pytest.mark.parametrize(("version", "policy"), [("v1", ""), ("v2", 'sniff_timeout = "0s"')])
@SIDECAR_V4
async def test_35_without_sniffing_a_header_waits_for_nothing(way: Way, version: str, policy: str) -> None:
    async with open_wire(way, config(version, policy=policy)) as wire:
        async with await wire.dial() as client, await wire.accept() as server:
            with trio.fail_after(0.2):
                assert await server.receive_some(6) in (b"PROXY ", b"\r\n\r\n\0\r")
            await server.receive_some(200)
            await client.send_all(client_hello())
            await server.receive_some(2000)
        record = await wire.record()
    assert record["sni"] is None


@BOTH_LAYOUTS
@pytest.mark.timed
async def test_35_a_server_that_speaks_first_is_kept_waiting_for_sniff_timeout_and_no_longer(way: Way) -> None:
    async with open_wire(way, config("v2", policy='sniff_timeout = "400ms"')) as wire:
        hello, began = client_hello(), trio.current_time()
        async with await wire.dial() as client, await wire.accept() as server:
            header = await told(server)
            took = trio.current_time() - began
            assert 0.39 < took < 0.6
            assert header.rest == b""
            assert set(header.tlvs) == {UNIQUE_ID}
            await server.send_all(b"220 ready")
            assert await client.receive_some() == b"220 ready"
            # What comes then is relayed as ever, and not looked at.
            await client.send_all(hello)
            assert await read_exactly(server, len(hello)) == hello
        record = await wire.record()
    assert record["outcome"] == "closed"
    assert record["sni"] is None


@BOTH_LAYOUTS
async def test_34_a_client_hello_in_pieces_is_waited_for(way: Way) -> None:
    hello = client_hello()
    async with open_wire(way, config("v2", policy='sniff_timeout = "5s"')) as wire:
        async with await wire.dial() as client, await wire.accept() as server:
            for at in range(0, len(hello), 100):
                await client.send_all(hello[at : at + 100])
                with trio.move_on_after(0.02) as nothing:  # is told before the hello is whole
                    if at + 100 < len(hello):
                        await trio.lowlevel.wait_readable(server.socket)
                assert nothing.cancelled_caught or at + 100 >= len(hello)
            header = await told(server)
            assert header.tlvs[AUTHORITY] == b"app.example"
            assert header.rest == hello
        assert (await wire.record())["sni"] == "app.example"


@SIDECAR_V4
@pytest.mark.timed
async def test_34_a_client_hello_that_is_too_slow_is_done_without(way: Way) -> None:
    hello = client_hello()
    async with open_wire(way, config("v2", policy='sniff_timeout = "300ms"')) as wire:
        began = trio.current_time()
        async with await wire.dial() as client, await wire.accept() as server:
            await client.send_all(hello[:100])
            header = await told(server)
            assert 0.29 < trio.current_time() - began < 0.5
            assert AUTHORITY not in header.tlvs
            await client.send_all(hello[100:])
            await client.send_eof()
            assert header.rest + await to_the_end(server) == hello
        record = await wire.record()
    assert record["sni"] is None
    assert record["bytes_from_client"] == len(hello)


FIRST_BYTES = [
    ("no TLS", b"GET / HTTP/1.1\r\n\r\n"),
    ("one byte that no TLS begins with", b"x"),
    ("a hello that is none", b"\x16\x03\x01\x00\x05\x02\0\0\x01\0"),
    ("a hello with lengths that do not come out", client_hello()[:43] + b"\xff" + client_hello()[44:]),
    ("a hello that would be too long", b"\x16\x03\x01\x40\x00\x01\0\xff\xff" + bytes(16000)),
]


@pytest.mark.parametrize("data", [row[1] for row in FIRST_BYTES], ids=[row[0] for row in FIRST_BYTES])
@SIDECAR_V4
async def test_48_what_is_no_client_hello_is_not_waited_for(way: Way, data: bytes) -> None:
    async with open_wire(way, config("v2", policy='sniff_timeout = "10s"')) as wire:
        async with await wire.dial() as client, await wire.accept() as server:
            await client.send_all(data)
            header = await told(server)
            assert set(header.tlvs) == {UNIQUE_ID}
            await client.send_eof()
            assert header.rest + await to_the_end(server) == data
        assert (await wire.record())["sni"] is None


@SIDECAR_V4
async def test_34_the_end_of_a_client_that_has_said_too_little_is_not_waited_behind(way: Way) -> None:
    """A FIN, alone or after the beginning of a hello, says that nothing more will come; it reaches the server behind the header."""
    async with open_wire(way, config("v2", policy='sniff_timeout = "10s"')) as wire:
        for data in (b"", client_hello()[:50]):
            async with await wire.dial() as client, await wire.accept() as server:
                if data:
                    await client.send_all(data)
                await client.send_eof()
                header = await told(server)
                assert header.rest + await to_the_end(server) == data
                await server.send_all(b"answer")
                await server.send_eof()
                assert await to_the_end(client) == b"answer"
            assert (await wire.record())["outcome"] == "closed"


@BOTH_LAYOUTS
async def test_34_a_client_that_breaks_off_while_its_hello_is_waited_for(way: Way) -> None:
    async with open_wire(way, config("v2", policy='sniff_timeout = "10s"')) as wire:
        async with await wire.dial() as client, await wire.accept() as server:
            await client.send_all(client_hello()[:50])
            await reset(client)
            assert await resets_within(server, 1)
        assert (await wire.record())["outcome"] == "client_reset"


@BOTH_LAYOUTS
async def test_34_a_server_that_breaks_off_while_a_hello_is_waited_for(way: Way) -> None:
    async with open_wire(way, config("v2", policy='sniff_timeout = "10s"')) as wire, await wire.dial() as client:
        await reset(await wire.accept())
        assert await resets_within(client, 1)
        record = await wire.record()
    assert record["outcome"] == "upstream_reset"


@SIDECAR_V4
async def test_34_a_connection_whose_hello_was_waited_for_comes_to_its_idle_timeout(way: Way) -> None:
    text = config(
        "v2", policy='sniff_timeout = "100ms"', relay='idle_timeout = "400ms"', upstream='connect_timeout = "200ms"'
    )
    async with open_wire(way, text) as wire:
        async with await wire.dial() as client, await wire.accept() as server:
            await told(server)
            assert await resets_within(client, 2)
            assert (await wire.record())["outcome"] == "idle_timeout"
        async with await wire.dial() as client, await wire.accept() as server:
            await client.send_all(client_hello())
            await told(server)
            assert await resets_within(client, 2)
            assert (await wire.record())["outcome"] == "idle_timeout"


@SIDECAR_V4
async def test_48_first_bytes_with_anything_in_them(
    way: Way, nursery: trio.Nursery, counted: Callable[[int], int]
) -> None:
    """Hellos changed, cut and sent in two pieces, some with an urgent byte in between: each comes whole behind its header."""
    await nursery.start(serve_echo, way.app, 8080)
    chance, few, whole = random.Random(48), trio.CapacityLimiter(20), client_hello()

    async def attempt(data: bytes, cut: int, urgent: bytes) -> None:
        async with few, await way.client.connect(way.address, 8080) as stream:
            await stream.send_all(data[:cut])
            if urgent:
                await stream.socket.send(urgent, socket.MSG_OOB)
            await stream.send_all(data[cut:])
            await stream.send_eof()
            header = await told(stream)
            assert header.source == format_address(stream.socket.getsockname())
            assert header.rest + await to_the_end(stream) == data[:cut] + urgent + data[cut:]

    text = config("v2", policy='sniff_timeout = "100ms"')
    async with open_daemon(way.proxy, text) as daemon:
        async with trio.open_nursery() as many:
            for _ in range(counted(2000)):
                data = bytearray(whole)
                for _ in range(chance.randrange(4)):
                    data[chance.randrange(len(data))] = chance.randrange(256)
                if chance.random() < 0.3:
                    del data[chance.randrange(1, len(data)) :]
                urgent = b"!" if chance.random() < 0.2 else b""
                many.start_soon(attempt, bytes(data), chance.randrange(len(data) + 1), urgent)
        assert await daemon.stop() == 0
    assert "this is a bug" not in daemon.process.stderr_text
    assert set(outcomes(daemon)) == {"closed"}
    assert {record["sni"] for record in daemon.records()} >= {None, "app.example"}


@pytest.mark.parametrize("target", ["original", "unix"])
@pytest.mark.parametrize("engine", ["auto", "copy", "splice"])
@pytest.mark.parametrize("number", [0, 1])
@SIDECAR_V4
async def test_the_stream_behind_a_header_is_whole(
    way: Way, tmp_path: Path, engine: str, number: int, target: str
) -> None:
    """Both ways, with the first bytes there before the server, and a server that does not read for a while: back-pressure, in order."""
    size = 3_000_000
    relay = f'engine = "{engine}"\nworkers = {number}'
    upstream = ""
    if target == "original":
        listener = way.app.listen(way.bind, 8080)
    else:
        upstream = f'target = "unix:{tmp_path}/app"'
        sock = trio.socket.socket(socket.AF_UNIX)
        await sock.bind(str(tmp_path / "app"))
        sock.listen()
        listener = trio.SocketListener(sock)
    async with listener, open_daemon(way.proxy, config("v2", upstream=upstream, relay=relay)) as daemon:
        async with await way.client.connect(way.address, 8080) as client:
            own = format_address(client.socket.getsockname())

            async def send(stream: trio.SocketStream) -> None:
                for chunk in payload(size):
                    await stream.send_all(chunk)
                await stream.send_eof()

            async with trio.open_nursery() as both:
                both.start_soon(send, client)
                server = await listener.accept()
                async with server:
                    await trio.sleep(0.1)  # it does not read
                    header = await told(server)
                    assert header.source == own
                    both.start_soon(send, server)
                    assert_is_payload(header.rest + await to_the_end(server), size)
                    assert_is_payload(await to_the_end(client), size)
        record = await daemon.record(own)
    assert record["outcome"] == "closed"
    assert record["bytes_from_client"] == record["bytes_from_upstream"] == size


class Loop:
    """A loop that does nothing, for a leg alone."""

    now, engine = 0.0, "copy"

    def __init__(self) -> None:
        self.pipes = PipePool(0)
        self.sends: list[Leg] = []
        self.watched: list[Leg] = []

    def watch_writable(self, leg: Leg) -> None:
        self.watched.append(leg)

    def note_blocked(self, leg: Leg) -> None: ...
    def again(self, leg: Leg) -> None: ...


def test_a_header_that_a_full_socket_takes_in_pieces_stays_before_the_stream() -> None:
    client, downstream = socket.socketpair()
    upstream, server = socket.socketpair()
    with client, downstream, upstream, server:
        upstream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        loop = Loop()
        legs = [Leg(loop, None, sock, accepted=True) for sock in (downstream, upstream)]  # type: ignore[arg-type]
        legs[0].other, legs[1].other = legs[1], legs[0]
        header = bytes(range(256)) * 200
        client.send(b"the stream")
        legs[0].readable = True
        legs[0].put_first(header)
        assert legs[0].held
        assert loop.watched == [legs[1]]
        received = b""
        while len(received) < len(header) + 10:
            received += server.recv(65536)
            legs[1].writable = True
            legs[0].pump()
            for leg in loop.sends:
                leg.send_held()
            loop.sends.clear()
        assert received == header + b"the stream"
        assert legs[0].received == 10


@SIDECAR_V4
async def test_a_stop_ends_connections_that_wait_for_a_hello(way: Way) -> None:
    text = config("v2", policy='sniff_timeout = "10s"') + '[drain]\ntimeout = "100ms"\n'
    async with open_wire(way, text) as wire, await wire.dial() as client, await wire.accept():
        assert await wire.daemon.stop() == 0
        assert await resets_within(client, 1)
    (record,) = wire.daemon.records()
    assert record["outcome"] == "drained"
