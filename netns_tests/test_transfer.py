"""Bytes: real programs through both layouts, half-close each way, small packets, small writes. Every one arrives, in order."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from netns_tests.way import BOTH_LAYOUTS, Way, median_ms
from tproxyd.net.sockets import format_address
from tproxyd.testing import (
    Transfer,
    digest_of,
    payload,
    serve_source,
)
from tproxyd.testing.daemon import open_daemon

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


@BOTH_LAYOUTS
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


@BOTH_LAYOUTS
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


@BOTH_LAYOUTS
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


@BOTH_LAYOUTS
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


@BOTH_LAYOUTS
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
        with trio.fail_after(5):
            while not transfers:  # the proxy is done with it a moment before the app is
                await trio.sleep(0.01)
    assert got.hexdigest() == digest_of(size)
    assert [(t.received, t.sha256) for t in transfers] == [(size, digest_of(size))]
    assert record["outcome"] == "closed"


@BOTH_LAYOUTS
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


@BOTH_LAYOUTS
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


@BOTH_LAYOUTS
@pytest.mark.timed
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
