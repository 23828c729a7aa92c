"""Bytes: real programs through both layouts, half-close each way, resets, time-outs, slow readers. Intact, or said otherwise."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from netns_tests.way import Way, median_ms
from tproxyd.net.sockets import format_address
from tproxyd.testing import (
    ROUTED,
    Lab,
    Node,
    Transfer,
    digest_of,
    open_lab,
    payload,
    serve_echo,
    serve_sink,
    serve_source,
)
from tproxyd.testing.daemon import cpu_seconds, open_daemon

CONFIG = '[capture]\nports = ["8080", "8443", "5201"]\n'
BODY = 100_000_000


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.fixture(scope="session")
def big_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("body") / "body"
    with path.open("wb") as file:
        for chunk in payload(BODY):
            file.write(chunk)
    return path


async def test_100_mb_through_curl_both_ways(way: Way, big_file: Path, tmp_path: Path) -> None:
    """Down from Python's http.server; up as the body of a POST, to a sink that answers with its digest."""
    async with (
        open_daemon(way.proxy, CONFIG) as daemon,
        way.app.process(
            "python3",
            "-m",
            "http.server",
            "8080",
            "--bind",
            way.bind,
            "--directory",
            str(big_file.parent),
            collect=True,
        ),
    ):
        await until_listening(way, 8080)
        got = tmp_path / "got"
        await way.client.run("curl", "-sS", "-o", str(got), f"http://{way.in_url}:8080/body", timeout=60)
        async with sink_over_http(way) as received:
            await way.client.run(
                "curl", "-sS", "-H", "Expect:", "-o", str(tmp_path / "answer"), "--data-binary", f"@{big_file}",
                f"http://{way.in_url}:8443/", timeout=60,
            )  # fmt: skip
        assert await daemon.stop() == 0
    assert sha256(got) == sha256(big_file)
    assert received == [sha256(big_file)]
    assert [r["bytes_from_client"] > BODY for r in daemon.records()].count(True) == 1
    (record,) = [r for r in daemon.records() if r["bytes_from_upstream"] > BODY]
    assert record["outcome"] == "closed"
    assert record["original_destination"] == format_address((way.address, 8080))


@asynccontextmanager
async def sink_over_http(way: Way) -> AsyncIterator[list[str]]:
    """An app that takes one POST on port 8443, notes the SHA-256 of its body and answers 200."""
    received: list[str] = []

    async def answer(stream: trio.SocketStream) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            data += await stream.receive_some()
        head, _, rest = data.partition(b"\r\n\r\n")
        length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])  # type: ignore[index]  # curl sends it
        digest, left = hashlib.sha256(rest), length - len(rest)
        while left:
            chunk = await stream.receive_some(65536)
            digest.update(chunk)
            left -= len(chunk)
        received.append(digest.hexdigest())
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, answer, [way.app.listen(way.bind, 8443)])
        yield received
        nursery.cancel_scope.cancel()


async def until_listening(way: Way, port: int) -> None:
    """Until the app accepts, asked from its own node, so that the daemon sees nothing of it. A failed connect is the event."""
    with trio.fail_after(10):
        while True:
            try:
                async with await way.app.connect(way.address, port):
                    return
            except OSError:
                await trio.sleep(0.01)


async def test_tls_through_openssl(way: Way, tmp_path: Path, nursery: trio.Nursery) -> None:
    """The handshake and the data are the client's and the app's own; the certificate that the client checks is the app's."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    await way.app.run(
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
        "-subj", "/CN=app.example", "-keyout", str(key), "-out", str(certificate),
    )  # fmt: skip
    async with (
        open_daemon(way.proxy, CONFIG) as daemon,
        way.app.process(
            "openssl", "s_server", "-accept", "[::]:8443" if way.bind == "::" else "0.0.0.0:8443", "-key", str(key), "-cert", str(certificate), "-rev",
            stdin=subprocess.PIPE, collect=True,
        ) as server,
    ):  # fmt: skip
        await server.wait_for_output("ACCEPT")
        async with way.client.process(
            "openssl", "s_client", "-connect", f"{way.in_url}:8443", "-CAfile", str(certificate), "-verify_return_error",
            "-brief", stdin=subprocess.PIPE, collect=True,
        ) as client:  # fmt: skip
            assert client.stdin is not None
            await client.wait_for_output("Verification: OK")
            await client.stdin.send_all(b"stressed\n")
            await client.wait_for_output("desserts")
            await client.stdin.aclose()
            await client.wait()
        assert await daemon.stop() == 0
    (record,) = daemon.records()
    assert record["original_destination"] == format_address((way.address, 8443))


async def test_iperf3_both_directions(way: Way) -> None:
    async with (
        open_daemon(way.proxy, CONFIG) as daemon,
        way.app.process(
            "iperf3", "--server", "--forceflush", "-6" if way.bind == "::" else "-4", collect=True
        ) as server,
    ):
        await server.wait_for_output("Server listening")
        for reverse in ([], ["--reverse"]):
            done = await way.client.run(
                "iperf3", "--client", way.address, "--bytes", "20M", "--parallel", "2", "--json", *reverse
            )
            end = json.loads(done.stdout)["end"]
            assert end["sum_sent"]["bytes"] >= 20 * 1024 * 1024
            # iperf3 stops its receiver as soon as the sender has handed everything over; how much was under way is its own.
            assert end["sum_received"]["bytes"] > 0
        assert await daemon.stop() == 0
    # A control connection and two streams each time.
    assert len(daemon.records()) == 6


async def test_31_half_close_by_the_client_with_data_after_the_fin(way: Way, nursery: trio.Nursery) -> None:
    """The client sends, closes its direction, and the app answers only then: with the digest, and much more after it."""
    size = 5_000_000

    async def answer(stream: trio.SocketStream) -> None:
        digest = hashlib.sha256()
        async for chunk in stream:
            digest.update(chunk)
        await stream.send_all(digest.hexdigest().encode())
        for chunk in payload(size):
            await stream.send_all(chunk)
        await stream.aclose()

    listener = way.app.listen(way.bind, 8080)
    nursery.start_soon(trio.serve_listeners, answer, [listener])
    async with open_daemon(way.proxy, CONFIG) as daemon:
        async with await way.client.connect(way.address, 8080) as stream:
            own = format_address(stream.socket.getsockname())
            for chunk in payload(size):
                await stream.send_all(chunk)
            await stream.send_eof()
            got = b"".join([chunk async for chunk in stream])
        record = await daemon.record(own)
    assert got[:64].decode() == digest_of(size)
    assert hashlib.sha256(got[64:]).hexdigest() == digest_of(size)
    assert (record["bytes_from_client"], record["bytes_from_upstream"]) == (size, size + 64)
    assert record["outcome"] == "closed"


async def test_32_half_close_by_the_app_with_data_after_the_fin(way: Way, nursery: trio.Nursery) -> None:
    size = 5_000_000
    transfers: list[Transfer] = []
    await nursery.start(partial(serve_source, way.app, 8080, size=size, address=way.bind, report=transfers.append))
    async with open_daemon(way.proxy, CONFIG) as daemon, await way.client.connect(way.address, 8080) as stream:
        own = format_address(stream.socket.getsockname())
        got = hashlib.sha256()
        async for chunk in stream:  # to the app's FIN
            got.update(chunk)
        for chunk in payload(size):
            await stream.send_all(chunk)
        await stream.send_eof()
        record = await daemon.record(own)
    assert got.hexdigest() == digest_of(size)
    assert [(t.received, t.sha256) for t in transfers] == [(size, digest_of(size))]
    assert record["outcome"] == "closed"


async def test_29_no_reset_is_seen_where_nobody_sent_one(way: Way, nursery: trio.Nursery) -> None:
    """Both have sent their FIN, and the client reads late: that the app's socket is closed is no reset, bytes are still to come."""
    size = 2_000_000
    await nursery.start(partial(serve_source, way.app, 8080, size=size, address=way.bind))
    async with open_daemon(way.proxy, CONFIG) as daemon:
        for pause in (0.1, 0.5):
            async with await way.client.connect(way.address, 8080) as stream:
                own = format_address(stream.socket.getsockname())
                await stream.send_eof()
                await trio.sleep(pause)
                got = hashlib.sha256()
                async for chunk in stream:
                    got.update(chunk)
            assert got.hexdigest() == digest_of(size)
            assert (await daemon.record(own))["outcome"] == "closed"


async def test_an_urgent_byte_stays_in_its_place(way: Way, nursery: trio.Nursery) -> None:
    received = bytearray()
    complete = trio.Event()

    async def app(stream: trio.SocketStream) -> None:
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        async for chunk in stream:
            received.extend(chunk)
        complete.set()

    nursery.start_soon(trio.serve_listeners, app, [way.app.listen(way.bind, 8080)])
    async with open_daemon(way.proxy, CONFIG), await way.client.connect(way.address, 8080) as stream:
        await stream.send_all(b"abc")
        await stream.socket.send(b"d", socket.MSG_OOB)
        await stream.send_all(b"efg")
        await stream.send_eof()
        with trio.fail_after(5):
            await complete.wait()
    assert received == b"abcdefg"


async def connect_and_be_reset(client: Node, address: str, *, source_port: int, within: float = 2.0) -> str:
    """A connection that is reset instead of served; gives its client address. The reset may come before connect() returns."""
    own = format_address((client.v6 if ":" in address else client.v4, source_port))
    with trio.fail_after(within):
        try:
            stream = await client.connect(address, 8080, source_port=source_port)
        except ConnectionResetError:
            return own
        async with stream:
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
    return own


async def test_27_upstream_refuses_the_client_is_reset_at_once(way: Way) -> None:
    async with open_daemon(way.proxy, CONFIG) as daemon:
        own = await connect_and_be_reset(way.client, way.address, source_port=45001)
        record = await daemon.record(own)
    assert record["outcome"] == "upstream_refused"
    assert (
        record["duration_ms"] < 100
    )  # the contract says 20 ms after it is learned; this one has room for a busy machine


async def test_27_unreachable_by_icmp_from_a_router(nursery: trio.Nursery) -> None:
    """The router's ICMP is addressed to the client, whose address our socket bears: it must be delivered at the gateway."""
    async with open_lab(ROUTED) as lab:
        gateway, router = lab["gateway"], lab["router"]
        await router.run("nft", "-f", "-", input=(
            "table inet wall { chain forward { type filter hook forward priority 0;\n"
            "ip daddr 203.0.113.0/24 tcp dport 8080 reject with icmp host-unreachable\n"
            "ip6 daddr 2001:db8:f::/48 tcp dport 8080 reject with icmpv6 addr-unreachable\n}\n}\n"
        ))  # fmt: skip
        async with open_daemon(gateway, CONFIG) as daemon:
            for destination in ("203.0.113.9", "2001:db8:f::9"):
                own = await connect_and_be_reset(lab["client"], destination, source_port=45002)
                record = await daemon.record(own)
                assert record["outcome"] == "upstream_unreachable"
                # Cables without any delay: the ICMP for the first SYN may arrive while connect() still holds the socket,
                # which the kernel then only notes. The one for the second SYN, a second later, ends it; the time-out is at 5 s.
                assert record["duration_ms"] < 1900


async def test_28_black_hole_resets_at_connect_timeout(gateway_lab: Lab) -> None:
    gateway = gateway_lab["gateway"]
    await gateway_lab["server"].run("nft", "-f", "-", input=(
        "table inet hole { chain in { type filter hook prerouting priority raw;\ntcp dport 8080 drop\n}\n}\n"
    ))  # fmt: skip
    async with open_daemon(gateway, CONFIG + '[upstream]\nconnect_timeout = "300ms"\n') as daemon:
        own = await connect_and_be_reset(gateway_lab["client"], "203.0.113.9", source_port=45003)
        record = await daemon.record(own)
    assert record["outcome"] == "upstream_timeout"
    assert 300 <= record["duration_ms"] < 2000


async def test_29_upstream_resets_after_its_bytes(way: Way, nursery: trio.Nursery) -> None:
    """The client gets every byte that came before the reset, then the reset, and not an orderly end."""
    size = 3_000_000
    client_has_all = trio.Event()

    async def answer(stream: trio.SocketStream) -> None:
        for chunk in payload(size):
            await stream.send_all(chunk)
        await client_has_all.wait()
        reset_on_close(stream)
        await stream.aclose()

    nursery.start_soon(trio.serve_listeners, answer, [way.app.listen(way.bind, 8080)])
    async with open_daemon(way.proxy, CONFIG) as daemon:
        async with await way.client.connect(way.address, 8080) as stream:
            own = format_address(stream.socket.getsockname())
            digest, received = hashlib.sha256(), 0
            while received < size:
                chunk = await stream.receive_some(65536)
                digest.update(chunk)
                received += len(chunk)
            client_has_all.set()
            with trio.fail_after(1), pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        record = await daemon.record(own)
    assert digest.hexdigest() == digest_of(size)
    assert record["outcome"] == "upstream_reset"


async def test_29_a_reset_does_not_overtake_what_came_before(way: Way, nursery: trio.Nursery) -> None:
    """The app sends and resets at once; a slow client still gets what the proxy had received."""

    async def answer(stream: trio.SocketStream) -> None:
        await stream.send_all(b"x" * 50_000)
        await stream.receive_some()  # the client's word that the proxy has read everything by now
        reset_on_close(stream)
        await stream.aclose()

    nursery.start_soon(trio.serve_listeners, answer, [way.app.listen(way.bind, 8080)])
    async with open_daemon(way.proxy, CONFIG) as daemon, await way.client.connect(way.address, 8080) as stream:
        own = format_address(stream.socket.getsockname())
        await trio.lowlevel.wait_readable(stream.socket)
        await stream.send_all(b"go")
        await daemon.record(own)
        got = 0
        with pytest.raises(trio.BrokenResourceError):
            while True:
                got += len(await stream.receive_some(10_000))
    assert got == 50_000


async def test_30_client_aborts_mid_transfer(way: Way, nursery: trio.Nursery) -> None:
    """Downloading: the app's side is closed within 100 ms (with room for a busy machine)."""
    ended = trio.Event()

    async def answer(stream: trio.SocketStream) -> None:
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await stream.send_all(b"x" * 65536)
        ended.set()
        await stream.aclose()

    nursery.start_soon(trio.serve_listeners, answer, [way.app.listen(way.bind, 8080)])
    async with open_daemon(way.proxy, CONFIG) as daemon:
        stream = await way.client.connect(way.address, 8080)
        own = format_address(stream.socket.getsockname())
        await stream.receive_some(1000)
        reset_on_close(stream)
        await stream.aclose()
        with trio.fail_after(1):
            await ended.wait()
        assert (await daemon.record(own))["outcome"] == "client_reset"


async def test_30_client_aborts_while_the_app_does_not_read(way: Way, nursery: trio.Nursery) -> None:
    """Uploading into a full pipe: nobody reads the client's side then, and still its reset is seen and passed on."""
    accepted: list[trio.SocketStream] = []
    seen = trio.Event()

    async def answer(stream: trio.SocketStream) -> None:
        accepted.append(stream)
        await seen.wait()
        with trio.fail_after(1), pytest.raises(trio.BrokenResourceError):
            while await stream.receive_some(65536):
                pass

    nursery.start_soon(trio.serve_listeners, answer, [way.app.listen(way.bind, 8080)])
    async with open_daemon(way.proxy, CONFIG) as daemon:
        stream = await way.client.connect(way.address, 8080)
        own = format_address(stream.socket.getsockname())
        with trio.move_on_after(1) as full:
            while True:
                await stream.send_all(b"x" * 65536)
        assert full.cancelled_caught
        reset_on_close(stream)
        await stream.aclose()
        with trio.fail_after(2):
            record = await daemon.record(own)
        seen.set()
        assert record["outcome"] == "client_reset"


async def test_small_writes_are_not_held_back(way: Way, nursery: trio.Nursery) -> None:
    """Three writes each way, with a pause between them: whoever holds one back until the delayed ACK adds 40 ms to each round."""

    async def in_three(stream: trio.SocketStream) -> None:
        for _ in range(3):
            await stream.send_all(b"x")
            await trio.sleep(0.002)

    async def answer(stream: trio.SocketStream) -> None:
        stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while await read(stream, 3):
            await in_three(stream)
        await stream.aclose()

    async def read(stream: trio.SocketStream, count: int) -> bool:
        while count:
            chunk = await stream.receive_some(count)
            if not chunk:
                return False
            count -= len(chunk)
        return True

    async def rounds(what: str) -> float:
        took = []
        async with await way.client.connect(way.address, 8080) as stream:
            stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(20):
                began = trio.current_time()
                await in_three(stream)
                assert await read(stream, 3)
                took.append(trio.current_time() - began)
        return median_ms(f"twice three small writes, {what}, {way}", took)

    nursery.start_soon(trio.serve_listeners, answer, [way.app.listen(way.bind, 8080)])
    direct = await rounds("direct")
    async with open_daemon(way.proxy, CONFIG) as daemon:
        captured = await rounds("captured")
        assert await daemon.stop() == 0
    assert len(daemon.records()) == 1
    assert captured - direct < 25


def reset_on_close(stream: trio.SocketStream) -> None:
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def test_33_slow_reader_does_not_grow_the_proxy(way: Way, nursery: trio.Nursery) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await stream.send_all(b"x" * 65536)
        await stream.aclose()

    nursery.start_soon(trio.serve_listeners, answer, [way.app.listen(way.bind, 8080)])
    async with open_daemon(way.proxy, CONFIG) as daemon:
        before = resident_kib(daemon.process.pid)
        streams = [await way.client.connect(way.address, 8080) for _ in range(10)]
        with trio.move_on_after(2):
            async for _ in streams[0]:
                pass
        assert resident_kib(daemon.process.pid) - before < 8 * 1024
        for stream in streams:
            reset_on_close(stream)
            await stream.aclose()


@pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
async def test_33_stalled_connections_cost_no_time(way: Way, nursery: trio.Nursery) -> None:
    """Nothing is polled for them: 300 downloads that nobody reads."""

    async def answer(stream: trio.SocketStream) -> None:
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await stream.send_all(b"x" * 65536)
        await stream.aclose()

    for node in (way.client, way.proxy, way.app):  # small buffers, so that they are full soon
        node.set_sysctl("net.ipv4.tcp_wmem", "4096 16384 32768")
        node.set_sysctl("net.ipv4.tcp_rmem", "4096 16384 32768")
    nursery.start_soon(trio.serve_listeners, answer, [way.app.listen(way.bind, 8080)])
    async with open_daemon(way.proxy, CONFIG) as daemon:
        streams = [await way.client.connect(way.address, 8080) for _ in range(300)]
        await trio.sleep(1)
        used = cpu_seconds(daemon.process.pid)
        await trio.sleep(2)
        share = (cpu_seconds(daemon.process.pid) - used) / 2
        print(f"CPU with 300 stalled connections: {share:.1%}")
        assert share < 0.1
        for stream in streams:
            reset_on_close(stream)
            await stream.aclose()
        with trio.fail_after(5):  # and still every reset is heard
            while len(daemon.records()) < 300:
                await trio.sleep(0.01)  # the log's length is no event
    assert {record["outcome"] for record in daemon.records()} == {"client_reset"}


def resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))


async def test_idle_timeout_resets_both_sides(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(partial(serve_echo, way.app, 8080, address=way.bind))
    async with open_daemon(way.proxy, CONFIG + '[relay]\nidle_timeout = "300ms"\n') as daemon:
        async with await way.client.connect(way.address, 8080) as stream:
            own = format_address(stream.socket.getsockname())
            for _ in range(5):  # bytes that move keep it alive beyond the time-out
                await stream.send_all(b"hello")
                assert await stream.receive_some() == b"hello"
                await trio.sleep(0.1)
            with trio.fail_after(2), pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        record = await daemon.record(own)
    assert record["outcome"] == "idle_timeout"
    assert record["bytes_from_client"] == record["bytes_from_upstream"] == 25


async def test_half_close_timeout(way: Way, nursery: trio.Nursery) -> None:
    async def silent(stream: trio.SocketStream) -> None:
        with pytest.raises(trio.BrokenResourceError):
            while True:
                if not await stream.receive_some():
                    await trio.sleep(0.05)

    nursery.start_soon(trio.serve_listeners, silent, [way.app.listen(way.bind, 8080)])
    async with open_daemon(way.proxy, CONFIG + '[relay]\nhalf_close_timeout = "300ms"\n') as daemon:
        async with await way.client.connect(way.address, 8080) as stream:
            own = format_address(stream.socket.getsockname())
            await stream.send_eof()
            with trio.fail_after(2), pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        assert (await daemon.record(own))["outcome"] == "half_close_timeout"


@pytest.mark.parametrize("family", ["v4", "v6"])
async def test_51_small_mtu_behind_a_router(nursery: trio.Nursery, family: str) -> None:
    """The last hop takes 1400 bytes; the gateway learns that only from an ICMP error addressed to the client."""
    async with open_lab(ROUTED) as lab:
        transfers: list[Transfer] = []

        async def serve(task_status: trio.TaskStatus[object]) -> None:
            await serve_sink(lab["server"], 8080, report=transfers.append, task_status=task_status)

        await nursery.start(serve)
        destination = "203.0.113.9" if family == "v4" else "2001:db8:f::9"
        async with open_daemon(lab["gateway"], CONFIG) as daemon:
            with trio.fail_after(10):
                async with await lab["client"].connect(destination, 8080) as stream:
                    own = format_address(stream.socket.getsockname())
                    for chunk in payload(2_000_000):
                        await stream.send_all(chunk)
                    await stream.send_eof()
                    assert digest_of(2_000_000).encode() in await stream.receive_some()
                record = await daemon.record(own)
        assert record["outcome"] == "closed"
        assert record["upstream_source"] == own
