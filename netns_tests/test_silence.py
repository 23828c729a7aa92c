"""Fault 32: a peer that has lost its power is found out; one that lives and does not read keeps its connection.

The kernel's times are minutes. So the values that are set are compared with the documented ones, and that the technique works is
tried with all of them, and nothing else, scaled down in a program of its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import socket
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from netns_tests.watch import many, resets_within, until, workers
from netns_tests.way import GATEWAY_V4, Way
from tproxyd.net.sockets import KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, USER_TIMEOUT, format_address
from tproxyd.testing import digest_of, payload, serve_echo
from tproxyd.testing.daemon import open_daemon

_PIDFD_GETFD = 438  # the same on every architecture (asm-generic/unistd.h)

# 120 s become 3 s, 60 and 15 s become 1 s, 20 s become 1 s, 5 s become 0.5 s.
SCALED = """
import sys, trio
from tproxyd import config_from_mapping
from tproxyd.datapath import loop
from tproxyd.interceptor import open_interceptor
from tproxyd.net import sockets

sockets.KEEPALIVE_IDLE = sockets.KEEPALIVE_INTERVAL = 1
sockets.USER_TIMEOUT = 3
loop._STALLS = 1.0
loop._SETTLE = 0.5

def told(record):
    print(record.original_destination, record.source, record.outcome, flush=True)

async def main():
    config = config_from_mapping({"capture": {"ports": ["8080-8090"]}, "relay": {"workers": 0}})
    async with open_interceptor(config, on_record=told, own_namespace=True):
        print("open", flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


def options_of(pid: int) -> dict[str, tuple[int, int, int, int]]:
    """SO_KEEPALIVE, TCP_KEEPIDLE, TCP_KEEPINTVL and TCP_USER_TIMEOUT of a process's connected sockets, by their peers."""
    found = {}
    pidfd = os.pidfd_open(pid)
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if not os.readlink(entry).startswith("socket:"):
                continue
            fd = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, int(entry.name), 0)
            assert fd >= 0, os.strerror(ctypes.get_errno())
            with socket.socket(fileno=fd) as sock:
                if sock.family != socket.AF_INET or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    continue
                tcp = [
                    sock.getsockopt(socket.IPPROTO_TCP, option)
                    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_USER_TIMEOUT)
                ]
                keepalive = sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                found[format_address(sock.getpeername())] = (keepalive, tcp[0], tcp[1], tcp[2])
    finally:
        os.close(pidfd)
    return found


@GATEWAY_V4
async def test_32_both_sides_are_watched_by_the_kernel(way: Way, nursery: trio.Nursery) -> None:
    """The client's from the beginning, the server's after five seconds."""
    watched = (1, KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, USER_TIMEOUT * 1000)
    assert watched == (1, 60, 15, 120_000)  # as documented
    await nursery.start(serve_echo, way.app, 8080)
    async with (
        open_daemon(way.proxy, '[capture]\nports = ["8080"]\n') as daemon,
        many(way.client, way.address, 1) as (stream,),
    ):
        await stream.send_all(b"hello")
        await stream.receive_some()
        own, app = format_address(stream.socket.getsockname()), format_address((way.address, 8080))
        (worker,) = workers(daemon)
        assert options_of(worker)[own] == watched
        await until(lambda: options_of(worker)[app] == watched, within=7)


def drop(port_of_theirs: str, ports: str) -> str:
    """nft: a node that hears and says nothing any more, as without power, on these ports of its own or of its peers'."""
    out = {"sport": "dport", "dport": "sport"}[port_of_theirs]
    return (
        "table inet dark {\n"
        f"chain i {{\ntype filter hook prerouting priority raw;\ntcp {port_of_theirs} {{ {ports} }} drop\n}}\n"
        f"chain o {{\ntype filter hook output priority raw;\ntcp {out} {{ {ports} }} drop\n}}\n}}\n"
    )


@GATEWAY_V4
async def test_32_peers_that_lost_their_power_are_reaped(way: Way, nursery: trio.Nursery) -> None:
    """Clients at 8081 and 8082, servers at 8083 to 8086; silent before (keepalive) and with data under way (user time-out). The connection
    to 8086 never was silent for as long as it takes to settle, the one to 8085 was, and is not any more."""
    clients, servers = (8081, 8082), (8083, 8084, 8085, 8086)
    for port in clients + servers:
        await nursery.start(serve_echo, way.app, port)
    async with (
        way.proxy.process(sys.executable, "-c", SCALED, collect=True) as process,
        AsyncExitStack() as stack,
    ):
        await process.wait_for_output("open")

        async def trickle(stream: trio.SocketStream) -> None:
            with pytest.raises(trio.BrokenResourceError):
                while True:
                    await stream.send_all(b"x")
                    await trio.sleep(0.1)

        streams = {}
        for port in clients + servers:
            streams[port] = await stack.enter_async_context(await way.client.connect(way.address, port))
            await streams[port].send_all(b"hello")
            assert await streams[port].receive_some() == b"hello"
        nursery.start_soon(trickle, streams[8086])
        await streams[8082].send_all(b"x" * 2_000)
        await trio.sleep(1)  # settled
        await way.app.run("nft", "-f", "-", input=drop("dport", ", ".join(map(str, servers))))
        await streams[8084].send_all(b"into the dark")
        await way.client.run("nft", "-f", "-", input=drop("sport", "8081, 8082"))
        began = trio.current_time()
        nursery.start_soon(trickle, streams[8085])
        for port in (8083, 8084):
            assert await resets_within(streams[port], 9)
        for port in clients + servers:
            line = await process.wait_for_output(f"{way.address}:{port} ", timeout=9)
            assert line.endswith("client_reset" if port in clients else "upstream_timeout")
        took = trio.current_time() - began
        print(f"all reaped after {took:.1f} s; 3 s and a probe's interval, scaled from 120 s")
        assert took < 8


@GATEWAY_V4
async def test_32_a_peer_that_lives_and_does_not_read_keeps_its_connection(way: Way, nursery: trio.Nursery) -> None:
    """For more than twice the user time-out, after which Linux would end it; then everything arrives. A client at 8081, a server at 8082."""
    size = 3_000_000
    read_now = trio.Event()
    digests: list[str] = []

    async def send(stream: trio.SocketStream) -> None:
        for chunk in payload(size):
            await stream.send_all(chunk)
        await stream.send_eof()

    async def receive(stream: trio.SocketStream) -> None:
        digest = hashlib.sha256()
        await read_now.wait()
        async for chunk in stream:
            digest.update(chunk)
        digests.append(digest.hexdigest())

    async def sending_app(stream: trio.SocketStream) -> None:
        await send(stream)
        await stream.receive_some()
        await stream.aclose()

    async def receiving_app(stream: trio.SocketStream) -> None:
        await receive(stream)
        await stream.aclose()

    for node in (way.client, way.proxy, way.app):  # small buffers, so that they are full soon
        node.set_sysctl("net.ipv4.tcp_wmem", "4096 16384 65536")
        node.set_sysctl("net.ipv4.tcp_rmem", "4096 16384 65536")
    nursery.start_soon(trio.serve_listeners, sending_app, [way.app.listen(way.bind, 8081)])
    nursery.start_soon(trio.serve_listeners, receiving_app, [way.app.listen(way.bind, 8082)])
    async with way.proxy.process(sys.executable, "-c", SCALED, collect=True) as process:
        await process.wait_for_output("open")
        async with (
            await way.client.connect(way.address, 8081) as reads,
            await way.client.connect(way.address, 8082) as writes,
            trio.open_nursery() as transfer,
        ):
            transfer.start_soon(receive, reads)
            transfer.start_soon(send, writes)
            await trio.sleep(7.5)
            assert "808" not in process.stdout_text, process.stdout_text
            read_now.set()
            await until(lambda: len(digests) == 2, within=10)
    assert digests == [digest_of(size)] * 2
