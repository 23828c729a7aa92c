"""The programs in examples/, each as somebody would type it, and what a client of theirs meets; and the test that docs/embedding.md shows."""

from __future__ import annotations

import json
import re
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from netns_tests.watch import attempt
from netns_tests.way import SIDECAR_V4, Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import Lab, LabProcess, Link, Node, Topology, Transfer, serve_echo, serve_identity, serve_sink
from tproxyd.testing.plugin import OpenLab

EXAMPLES = Path(__file__).parents[1] / "examples"

PODS = Topology(
    links=tuple(Link(f"{pod}:eth0", f"{pod} client:eth0", v4="192.0.2.0/24") for pod in ("web", "db")), nodes=("agent",)
)
"""Two pods of one address, each with a client of its own, and where the agent runs, which has no way to either."""

SAYS_WHAT_IT_HEARS = """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        said = f"{self.command} {self.path}\\n{self.headers}".encode() + body
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)
    do_POST = do_GET

ThreadingHTTPServer(("0.0.0.0", 8080), Handler).serve_forever()
"""


@asynccontextmanager
async def example(
    node: Node, ready: str, name: str, *words: str, before: tuple[str, ...] = ()
) -> AsyncIterator[LabProcess]:
    """At the end of the block it is told to end, and does so without a complaint."""
    async with node.process(*before, sys.executable, str(EXAMPLES / name), *words, collect=True) as process:
        if ready:
            await process.wait_for_output(ready)
        yield process
        process.send_signal(signal.SIGTERM)
        with trio.fail_after(10):
            assert await process.wait() == 0, process.stderr_text


@asynccontextmanager
async def resident(node: Node) -> AsyncIterator[int]:
    """The number of a process that does nothing but live there."""
    async with node.process("sleep", "infinity") as process:
        yield process.pid


@pytest.fixture
async def pods(open_lab: OpenLab) -> AsyncIterator[Lab]:
    async with open_lab(PODS) as lab:
        yield lab


async def ask(lab: Lab, pod: str) -> tuple[str, str, str]:
    """The client's address, and what the app sees as its client's and as its own."""
    async with await lab[f"{pod} client"].connect("192.0.2.1", 8080) as stream:
        seen = json.loads(await stream.receive_some())
        return format_address(stream.socket.getsockname()), seen["peer"], seen["local"]


async def is_captured(lab: Lab, pod: str) -> bool:
    """Whether the app is asked by somebody else in its client's name: from the client's address, and not its port."""
    own, peer, _ = await ask(lab, pod)
    assert peer.startswith("192.0.2.2:")
    return peer != own


def test_every_example_has_a_test() -> None:
    told = Path(__file__).read_text(encoding="utf-8")
    assert [file.name for file in EXAMPLES.glob("*.py") if f'"{file.name}"' not in told] == []


async def test_agent_captures_where_a_process_lives(pods: Lab, nursery: trio.Nursery) -> None:
    before = [await node.dump() for node in pods]
    await nursery.start(serve_identity, pods["web"], 8080)
    async with resident(pods["web"]) as pid:
        assert not await is_captured(pods, "web")
        async with example(pods["agent"], "captured", "agent.py", "web", str(pid)) as agent:
            assert await is_captured(pods, "web")
            line = await agent.wait_for_output("192.0.2.2")
            assert "workload='web'" in line
            assert "outcome='closed'" in line
        assert not await is_captured(pods, "web")
    assert [await node.dump() for node in pods] == before


async def test_agent_says_in_one_sentence_what_is_not_there(pods: Lab) -> None:
    done = await pods["agent"].run(sys.executable, str(EXAMPLES / "agent.py"), "web", "/nowhere/web", check=False)
    assert (done.returncode, done.stdout) == (69, "")
    assert re.fullmatch("there is no network namespace at /nowhere/web: .*\n", done.stderr)


async def test_watch_directory_follows_namespaces_that_come_and_go(
    pods: Lab, tmp_path: Path, nursery: trio.Nursery
) -> None:
    """Mounted as `ip netns` and CNI runtimes do, in a mount namespace that goes with the test."""
    before = [await node.dump() for node in pods]
    for pod in ("web", "db"):
        await nursery.start(
            lambda task_status, pod=pod: serve_identity(pods[pod], 8080, address="127.0.0.1", task_status=task_status)
        )
    path = tmp_path / "pod"
    private = ("unshare", "--mount")

    async def event(kind: str, number: int = 1) -> dict[str, Any]:
        """The number-th one of this kind."""
        with trio.fail_after(10):
            while True:
                events = [json.loads(line) for line in process.stdout_text.splitlines()]
                found = [one for one in events if re.fullmatch(kind, one["kind"])]
                if len(found) >= number:
                    assert len(found) == number
                    assert found[-1]["workload"] == "pod"
                    return dict(found[-1])
                await trio.sleep(0.02)

    async with (
        resident(pods["web"]) as web,
        resident(pods["db"]) as db,
        example(pods["agent"], "", "watch_directory.py", str(tmp_path), before=private) as process,
    ):

        async def inside(*words: str) -> None:
            await pods["agent"].run("nsenter", "--mount", "--target", str(process.pid), *words)

        path.touch()  # which a runtime does first
        assert "something else" in (await event("failed"))["detail"]
        await inside("mount", "--bind", f"/proc/{web}/ns/net", str(path))
        await event("added")
        assert (await ask(pods, "web"))[2] == "127.0.0.1:8080"
        await inside("umount", str(path))
        await inside("mount", "--bind", f"/proc/{db}/ns/net", str(path))
        await event("added", 2)
        assert (await ask(pods, "db"))[2] == "127.0.0.1:8080"
        with pytest.raises(ConnectionRefusedError):  # the app listens at 127.0.0.1 alone
            await pods["web client"].connect("192.0.2.1", 8080)
        await inside("umount", str(path))
        path.unlink()
        await event("vanished|removed", 2)
    assert [await node.dump() for node in pods] == before


async def open_tls(way: Way, place: Path, certificate: str | None) -> trio.SSLStream[trio.SocketStream]:
    """To the app, with what `mtls.py` has put there."""
    context = ssl.create_default_context(cafile=place / "ca.pem")
    if certificate:
        context.load_cert_chain(place / f"{certificate}.pem", place / f"{certificate}.key")
    stream = await way.client.connect(way.address, 8080)
    return trio.SSLStream(stream, context, server_hostname="app.example")


@SIDECAR_V4
async def test_mtls_lets_in_whom_the_authority_knows(way: Way, nursery: trio.Nursery) -> None:
    before = await way.proxy.dump()
    await nursery.start(serve_echo, way.app, 8080)
    async with example(way.proxy, "certificates in", "mtls.py", "8080") as process:
        place = Path((await process.wait_for_output("certificates in")).removeprefix("certificates in "))

        with trio.fail_after(10):
            async with await open_tls(way, place, "client") as stream:
                for size in (1, 1_000_000):
                    nursery.start_soon(stream.send_all, b"x" * size)
                    received = 0
                    while received < size:
                        received += len(await stream.receive_some())
            assert "client" in await process.wait_for_output("accepted")
            (command,) = re.findall(
                r"^    (openssl s_client .*)$", (EXAMPLES / "mtls.py").read_text(encoding="utf-8"), re.M
            )
            words = command.replace("HOST:PORT", f"{way.address}:8080").split()
            done = await way.client.run(*words, cwd=str(place), input="Q\n")  # s_client's word for the end
            assert "Verify return code: 0 (ok)" in done.stdout
            async with await open_tls(way, place, None) as stream:
                await stream.do_handshake()  # in TLS 1.3 a client has done its part before it is judged
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
                await stream.transport_stream.aclose()
        assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in await process.wait_for_output("refused")
        async with await way.client.connect(way.address, 8080) as plain:
            await plain.send_all(b"GET / HTTP/1.0\r\n\r\n")
            with trio.fail_after(5):
                assert b"HTTP" not in b"".join([bytes(chunk) async for chunk in plain])
    assert not await trio.Path(place).exists()
    assert process.stderr_text == ""
    assert await way.proxy.dump() == before


@SIDECAR_V4
async def test_mtls_tells_the_app_an_end_from_a_cut(way: Way, nursery: trio.Nursery) -> None:
    """Who cuts the connection without the key must not be able to make a part of an upload pass for all of it."""
    told, reports = trio.open_memory_channel[Transfer](2)
    await nursery.start(lambda task_status: serve_sink(way.app, 8080, report=told.send_nowait, task_status=task_status))
    async with example(way.proxy, "certificates in", "mtls.py", "8080") as process:
        place = Path((await process.wait_for_output("certificates in")).removeprefix("certificates in "))
        with trio.fail_after(10):
            for ends in (True, False):
                stream = await open_tls(way, place, "client")
                await stream.send_all(b"x" * 100_000)
                await (stream if ends else stream.transport_stream).aclose()
                report = await reports.receive()
                assert (report.complete, report.received <= 100_000) == (ends, True)


@SIDECAR_V4
async def test_http_aware_judges_every_request(way: Way) -> None:
    before = await way.proxy.dump()
    curl, url = ("curl", "-sS", "--max-time", "10"), f"http://{way.address}:8080"
    async with (
        way.app.process(sys.executable, "-c", SAYS_WHAT_IT_HEARS) as app,
        example(way.proxy, "captured", "http_aware.py", "8080") as process,
    ):
        said = await way.client.run(
            *curl, "--retry-connrefused", "--retry", "9", "-H", "X-Forwarded-For: 198.51.100.7", f"{url}/a", f"{url}/b"
        )
        assert re.findall(r"^GET (\S+)$|^x-forwarded-for: (\S+)$", said.stdout, re.M | re.I) == [
            ("/a", ""),
            ("", "192.0.2.2"),
            ("/b", ""),
            ("", "192.0.2.2"),
        ]
        body = "y" * 300_000
        said = await way.client.run(*curl, "--data-binary", "@-", f"{url}/c", input=body)
        assert said.stdout.endswith(body)
        said = await way.client.run(*curl, "-w", "%{http_code}", f"{url}/admin/users")
        assert said.stdout == "403"
        head = "HTTP/1.1\r\nHost: app.example\r\n\r\n"
        for second, code in ((f"GET /admin {head}", b"403"), ("no request at all\r\n\r\n", b"400")):
            async with await way.client.connect(way.address, 8080) as stream:
                await stream.send_all(f"GET /d {head}{second}".encode())
                with trio.fail_after(5):
                    heard = b"".join([bytes(chunk) async for chunk in stream])
            assert re.findall(rb"HTTP/1.1 (\d+)", heard) == [b"200", code]
        assert app.returncode is None
    assert process.stderr_text == ""
    assert await way.proxy.dump() == before


@SIDECAR_V4
async def test_hand_off_gives_connections_to_who_listens(way: Way, tmp_path: Path) -> None:
    before = await way.proxy.dump()
    path = str(tmp_path / "connections")
    async with example(way.proxy, "captured", "hand_off.py", "8080", path) as process:
        async with way.app.process(sys.executable, str(EXAMPLES / "fd_receiver.py"), path, collect=True) as receiver:
            await receiver.wait_for_output("listening")
            async with await way.client.connect(way.address, 8080) as stream:
                own = format_address(stream.socket.getsockname())
                told = json.loads(b"".join([bytes(chunk) async for chunk in stream]))
                assert (told["source"], format_address(told["peer"])) == (own, own)
                assert (
                    format_address(told["name"]) == told["original_destination"] == format_address((way.address, 8080))
                )
                await process.wait_for_output(f"{own} handed_over")
        own = await attempt(way.client, way.address, source_port=20000)
        await process.wait_for_output(f"{own} refused_by_policy")
    assert await way.proxy.dump() == before


async def test_the_test_that_is_shown_to_users_is_one(open_lab: OpenLab, nursery: trio.Nursery) -> None:
    page = await trio.Path(EXAMPLES.parent / "docs/embedding.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```python\n(import json\n.*?)^```", page, re.M | re.S)
    names: dict[str, Any] = {}
    exec(text, names)
    (test,) = (value for name, value in names.items() if name.startswith("test_"))
    await test(open_lab, nursery)
    nursery.cancel_scope.cancel()
