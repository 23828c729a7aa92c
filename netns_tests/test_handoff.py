"""Connections that a policy gives to another process: the socket arrives there as it was accepted, or what the policy says otherwise happens."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio

from netns_tests.watch import attempt, files_of, works
from netns_tests.way import GATEWAY_V4, SIDECAR_V4, Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import LabProcess, serve_echo

RECEIVER = str(Path(__file__).parents[1] / "examples/fd_receiver.py")

# Hands off what goes to 8081 (else refused) and 8082 (else forwarded to 8080); prints records; serves until SIGTERM.
PROGRAM = """
import signal, sys, trio
from tproxyd import Forward, HandOff, Refuse, config_from_mapping, open_interceptor

path, workers, uid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) or None

async def policy(connection):
    match connection.original_destination[1]:
        case 8081: return HandOff(path, uid=uid)
        case 8082: return HandOff(path, Forward((connection.original_destination[0], 8080)), uid)
    return Forward()

async def main():
    config = config_from_mapping({
        "capture": {"ports": ["8080-8082"]}, "relay": {"workers": workers},
        "policy": {"rule": [{"name": "by name", "ports": ["8081"], "action": "forward"}]},
    })
    def on_lines(lines):
        sys.stdout.write(lines.decode())
        sys.stdout.flush()
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with open_interceptor(config, policy=policy, policy_timeout=0.4, on_lines=on_lines, own_namespace=True) as interceptor:
            print("open", flush=True)
            async for _ in signals:
                break
            await interceptor.drain()
            print("left", interceptor.connections, flush=True)

trio.run(main)
"""


@asynccontextmanager
async def program(way: Way, path: Path, workers: int = 1, uid: int = 0) -> AsyncIterator[LabProcess]:
    words = (sys.executable, "-c", PROGRAM, str(path), str(workers), str(uid))
    async with way.proxy.process(*words, collect=True) as process:
        await process.wait_for_output("open")
        yield process


@asynccontextmanager
async def receiver(way: Way, path: Path, *before: str) -> AsyncIterator[LabProcess]:
    """The example, run by nothing but Python."""
    async with way.app.process(
        *before, "/usr/bin/env", "-i", sys.executable, "-I", "-S", RECEIVER, str(path), collect=True
    ) as process:
        await process.wait_for_output("listening")
        yield process


async def ask(way: Way, port: int = 8081) -> tuple[str, dict[str, Any]]:
    """The client's address, and what the receiver says of the connection."""
    async with await way.client.connect(way.address, port) as stream:
        own = format_address(stream.socket.getsockname())
        with trio.fail_after(5):
            return own, json.loads(b"".join([bytes(chunk) async for chunk in stream]))


def records(process: LabProcess) -> dict[str, dict[str, Any]]:
    """By the client's address."""
    lines = [json.loads(line) for line in process.stdout_text.splitlines() if line.startswith("{")]
    return {line["source"]: line for line in lines}


@pytest.mark.parametrize(("way", "number"), [("gateway v4", 1), ("sidecar v6", 0)], indirect=["way"])
async def test_a_handed_over_socket_has_its_names_in_the_other_process(
    way: Way, number: int, counted: Callable[[int], int], tmp_path: Path
) -> None:
    """Which may be in another network namespace: behind the gateway it is in the server's."""
    before = await way.proxy.dump()
    path, total = tmp_path / "connections", counted(1000)
    told: dict[str, dict[str, Any]] = {}
    async with program(way, path, number) as process, receiver(way, path) as other:
        await ask(way)
        files = files_of(process.pid), files_of(other.pid)
        limit = trio.CapacityLimiter(16)

        async def one() -> None:
            async with limit:
                own, answer = await ask(way)
                told[own] = answer

        async with trio.open_nursery() as nursery:
            for _ in range(total):
                nursery.start_soon(one)
        assert len(told) == total
        assert (files_of(process.pid), files_of(other.pid)) == files
        process.send_signal(signal.SIGTERM)
        assert await process.wait_for_output("left") == "left 0"
        assert await process.wait() == 0
        assert process.stderr_text == ""
        seen = records(process)
    destination = format_address((way.address, 8081))
    for own, answer in told.items():
        assert format_address(answer["name"]) == answer["original_destination"] == answer["target"] == destination
        assert format_address(answer["peer"]) == answer["source"] == own
        assert (answer["version"], answer["protocol"], answer["workload"]) == (1, "tcp", "host")
        assert (answer["rule"], answer["read"]) == ("by name", 0)
        line = seen[own]
        assert (line["id"], line["outcome"], line["original_destination"]) == (answer["id"], "handed_over", destination)
        assert (line["bytes_from_client"], line["bytes_from_upstream"], line["rule"]) == (0, 0, "by name")
        assert line["duration_ms"] < 5000
    assert await way.proxy.dump() == before


@pytest.mark.parametrize("number", [0, 1])
@SIDECAR_V4
async def test_what_is_handed_over_outlives_the_interceptor(way: Way, number: int, tmp_path: Path) -> None:
    """It is the other process's, and to addresses of this host no rule of ours is needed."""
    code = (
        "import socket, sys\n"
        "with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:\n"
        "    listener.bind(sys.argv[1]); listener.listen(); print('listening', flush=True)\n"
        "    sender, _ = listener.accept()\n"
        "    _, (fd,), _, _ = socket.recv_fds(sender, 65536, 1)\n"
        "    sock = socket.socket(fileno=fd)\n"
        "    while data := sock.recv(4096): sock.sendall(data)\n"
    )
    path = tmp_path / "connections"
    async with way.app.process(sys.executable, "-c", code, str(path), collect=True) as other:
        await other.wait_for_output("listening")
        async with program(way, path, number) as process:
            stream = await way.client.connect(way.address, 8081)
            await works(stream)
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0  # a drain does not wait for what is not ours any more
        async with stream:
            await works(stream)
            await stream.send_eof()
            assert await stream.receive_some() == b""
        assert await other.wait() == 0


@GATEWAY_V4
async def test_without_a_receiver_the_policy_s_other_answer_counts_and_with_one_it_is_handed_over_again(
    way: Way, nursery: trio.Nursery, tmp_path: Path
) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    path = tmp_path / "connections"
    async with program(way, path) as process:

        async def otherwise() -> None:
            """Refused the one, forwarded the other."""
            own = await attempt(way.client, way.address, 8081)
            async with await way.client.connect(way.address, 8082) as stream:
                await works(stream)
                forwarded = format_address(stream.socket.getsockname())
            if own:
                assert '"outcome":"refused_by_policy"' in await process.wait_for_output(f'"source":"{own}"')
            line = await process.wait_for_output(f'"source":"{forwarded}"')
            assert '"outcome":"closed"' in line
            assert f'"upstream":"{format_address((way.address, 8080))}"' in line

        async def handed_over() -> None:
            for port in (8081, 8082):
                own, _ = await ask(way, port)
                assert '"outcome":"handed_over"' in await process.wait_for_output(f'"source":"{own}"')

        await otherwise()  # nobody has ever listened
        async with receiver(way, path) as other:
            await handed_over()
            other.send_signal(signal.SIGKILL)
            await other.wait()
        assert path.exists()
        await otherwise()  # killed; its file is stale
        async with receiver(way, path):
            await handed_over()
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    assert "nobody takes connections at " in process.stderr_text
    assert "Traceback" not in process.stderr_text


@GATEWAY_V4
@pytest.mark.timed
async def test_a_receiver_that_stands_still_gets_what_its_queue_takes_and_the_rest_is_refused_in_time(
    way: Way, nursery: trio.Nursery, tmp_path: Path
) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    total = 400  # more than the queue takes by the kernel's default size
    answered: list[str] = []
    refused: list[float] = []
    path = tmp_path / "connections"
    async with program(way, path) as process, receiver(way, path) as other:
        await ask(way)
        other.send_signal(signal.SIGSTOP)

        async def one() -> None:
            began = trio.current_time()
            try:
                own, _ = await ask(way)
                answered.append(own)
            except (trio.BrokenResourceError, ConnectionResetError):
                refused.append(trio.current_time() - began)

        def handed_over() -> int:
            return process.stdout_text.count('"outcome":"handed_over"') - 1

        with trio.fail_after(15):
            async with trio.open_nursery() as clients:
                for _ in range(total):
                    clients.start_soon(one)
                async with await way.client.connect(way.address, 8080) as forwarded:
                    while handed_over() + len(refused) < total:
                        await works(forwarded)  # nobody else waits
                        await trio.sleep(0.01)
                assert not answered
                held = handed_over()
                other.send_signal(signal.SIGCONT)
        assert len(answered) == held > 10  # each of them, to the last
        assert len(refused) == total - held > 10
        assert max(refused) < 3
        await ask(way)
        assert records(process).keys() >= {*answered}
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    assert "has taken nothing for 0.4 s" in process.stderr_text


@SIDECAR_V4
async def test_somebody_else_s_process_gets_connections_only_if_the_policy_names_its_user(
    way: Way,
) -> None:
    code = (
        "import os, sys, socket\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "listener.bind(sys.argv[1]); os.chmod(sys.argv[1], 0o777); listener.listen(); print('listening', flush=True)\n"
        "while True:\n"
        "    sender, _ = listener.accept()\n"
        "    while received := socket.recv_fds(sender, 65536, 1):\n"
        "        if not received[0]: break\n"
        "        with socket.socket(fileno=received[1][0]) as sock: sock.sendall(received[0])\n"
    )
    with TemporaryDirectory(prefix="tproxyd-test-") as directory:  # not below pytest's, which is root's alone
        os.chown(directory, 65534, 65534)
        path = Path(directory) / "connections"
        async with way.app.process(sys.executable, "-I", "-c", code, str(path), collect=True) as other:
            await other.wait_for_output("listening")
            for uid in (0, 65534):
                async with program(way, path, uid=uid) as process:
                    if uid:
                        await ask(way)
                    else:
                        await attempt(way.client, way.address, 8081)
                        await process.wait_for_output("uid 65534 listens there, and is not expected to")
                    process.send_signal(signal.SIGTERM)
                    assert await process.wait() == 0
