"""`listen.proxy_protocol_from`: connections that a proxy in front makes for others begin with a PROXY header, and are what that says."""

from __future__ import annotations

import json
import random
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from netns_tests.headers import SIGNATURE, client_hello, open_haproxy, to_the_end, v2_header
from netns_tests.watch import ends_within, outcomes, reset, resets_within, until
from netns_tests.way import SIDECAR_V4, Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import Lab, serve_echo, serve_identity
from tproxyd.testing.daemon import LabDaemon, open_daemon

BOTH_FAMILIES = pytest.mark.parametrize("way", ["sidecar v4", "sidecar v6"], indirect=True)
CLIENT = {"v4": "192.0.2.77", "v6": "2001:db8:1::77"}
"""Whom the proxy in front speaks for: addresses that nobody has, but to which the app's host has a route, as it has one to real clients."""
LOG_LINE = "which is in listen.proxy_protocol_from, is refused: "


def config(*, capture: str = "", listen: str = "", upstream: str = "", more: str = "") -> str:
    """The client's node is the proxy in front."""
    listen = listen or 'proxy_protocol_from = ["192.0.2.2", "2001:db8:1::/64"]'
    return f'[capture]\nports = ["8080"]\n{capture}\n[listen]\n{listen}\n[upstream]\n{upstream}\n{more}'


def family(way: Way) -> str:
    return way.name.split()[1]


def header_for(way: Way, version: str, port: int = 4321) -> bytes:
    """Of a client that dialled the app."""
    client = CLIENT[family(way)]
    if version == "v2":
        return v2_header(client, port, way.address, 8080)
    return f"PROXY TCP{family(way)[1]} {client} {way.address} {port} 8080\r\n".encode()


async def send(way: Way, *pieces: bytes, pause: float = 0.02) -> trio.SocketStream:
    """A connection on which these pieces have been sent."""
    stream = await way.client.connect(way.address, 8080)
    for number, piece in enumerate(pieces):
        if number:
            await trio.sleep(pause)
        await stream.send_all(piece)
    return stream


async def refused(way: Way, daemon: LabDaemon, *pieces: bytes) -> str:
    """What is sent is no header, so the connection is reset; the outcome of its record, which has the real addresses."""
    async with await send(way, *pieces) as stream:
        own = format_address(stream.socket.getsockname())
        assert await resets_within(stream, 1)
    record = await daemon.record(own)
    assert record["original_destination"] == format_address((way.address, 8080))
    assert record["upstream"] is None
    assert record["bytes_from_client"] == 0
    return str(record["outcome"])


@pytest.mark.parametrize("word", ["send-proxy", "send-proxy-v2", "send-proxy-v2-ssl-cn"])
@BOTH_FAMILIES
async def test_a_connection_by_way_of_haproxy_is_its_clients(
    way: Way, nursery: trio.Nursery, tmp_path: Path, word: str
) -> None:
    await nursery.start(serve_identity, way.proxy, 9090)
    front: str = getattr(way.client, family(way))
    loopback = "[::1]" if family(way) == "v6" else "127.0.0.1"
    text = (
        f"frontend front\n    mode tcp\n    bind {front}:7000\n    default_backend back\n"
        f"backend back\n    mode tcp\n    server app {way.address}:8080 {word}\n"
    )
    async with (
        open_daemon(way.proxy, config(upstream=f'target = "{loopback}:9090"')) as daemon,
        open_haproxy(way.client, tmp_path, text, (front, 7000)),
    ):
        async with await way.client.connect(front, 7000) as stream:
            own = format_address(stream.socket.getsockname())
            with trio.fail_after(5):
                answer = json.loads(await stream.receive_some())
            await stream.send_eof()  # not earlier: HAProxy would spare itself the server
        record = await daemon.record(own)
    assert answer["peer"] == own  # the app sees the client, not HAProxy
    assert record["original_destination"] == format_address((front, 7000))
    assert record["outcome"] == "closed"


@pytest.mark.parametrize("version", ["v1", "v2"])
@BOTH_FAMILIES
async def test_a_header_and_the_stream_behind_it_however_they_are_cut(
    way: Way, nursery: trio.Nursery, version: str
) -> None:
    """In one packet, in two, byte by byte. The app gets the stream alone, from the client's own address and port."""
    await nursery.start(serve_identity, way.app, 8080)
    async with open_daemon(way.proxy, config(upstream='source = "client"')) as daemon:
        for number, cut in enumerate((lambda data: [data], lambda data: [data[:20], data[20:]], bytewise)):
            port = 5001 + number
            header = header_for(way, version, port)
            async with await send(way, *cut(header + b"hello"), pause=0.002) as stream:
                await stream.send_eof()
                answer = json.loads(await to_the_end(stream))
            client = format_address((CLIENT[family(way)], port))
            record = await daemon.record(client)
            assert record["original_destination"] == format_address((way.address, 8080))
            assert record["bytes_from_client"] == 5
            assert record["outcome"] == "closed"
            assert answer["peer"] == record["upstream_source"]
            assert answer["peer"].rpartition(":")[0] == client.rpartition(":")[0]
        assert await daemon.stop() == 0
    assert len(daemon.records()) == 3


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


@SIDECAR_V4
async def test_a_stream_goes_on_behind_a_header_whose_packet_had_nothing_else(way: Way, nursery: trio.Nursery) -> None:
    """The server speaks first, and the client later; and a client whose FIN comes with the header."""
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, config()):
        async with await send(way, header_for(way, "v2")) as stream:
            await trio.sleep(0.05)
            await stream.send_all(b"hello")
            with trio.fail_after(2):
                assert await stream.receive_some() == b"hello"
        async with await send(way, header_for(way, "v2")) as stream:
            await stream.socket.send(b"!", socket.MSG_OOB)  # an urgent byte is where a look ends
            with trio.fail_after(2):
                assert await stream.receive_some() == b"!"
        for data in (b"", b"hello"):
            async with await send(way, header_for(way, "v2") + data) as stream:
                await stream.send_eof()
                assert await to_the_end(stream) == data


@BOTH_FAMILIES
async def test_a_header_may_name_a_port_that_is_not_captured(way: Way, nursery: trio.Nursery) -> None:
    """The ruleset knows nothing of it, and would not send answers to the client's address back here: the server sees this host."""
    await nursery.start(serve_identity, way.app, 9443)
    client = CLIENT[family(way)]
    async with open_daemon(way.proxy, config()) as daemon:
        async with await send(way, v2_header(client, 4321, way.address, 9443)) as stream:
            await stream.send_eof()
            answer = json.loads(await to_the_end(stream))
        record = await daemon.record(format_address((client, 4321)))
    assert record["upstream"] == format_address((way.address, 9443))
    assert record["upstream_source"] == answer["peer"]
    assert client not in answer["peer"]


@SIDECAR_V4
async def test_whoever_is_not_trusted_begins_with_what_it_likes(way: Way, nursery: trio.Nursery) -> None:
    """A header from others is theirs to send, and the server's to judge."""
    await nursery.start(serve_echo, way.app, 8080)
    listen = 'proxy_protocol_from = ["192.0.2.3", "203.0.113.0/24", "::/1"]'
    async with open_daemon(way.proxy, config(listen=listen)) as daemon:
        header = header_for(way, "v1")
        async with await send(way, header) as stream:
            own = format_address(stream.socket.getsockname())
            await stream.send_eof()
            assert await to_the_end(stream) == header
        assert (await daemon.record(own))["bytes_from_client"] == len(header)


@SIDECAR_V4
async def test_a_health_check_of_haproxy_is_a_connection_of_its_own(
    way: Way, nursery: trio.Nursery, tmp_path: Path
) -> None:
    """Its header says LOCAL: what counts are the addresses of the connection itself."""
    await nursery.start(serve_identity, way.app, 8080)
    text = (
        f"frontend front\n    mode tcp\n    bind {way.client.v4}:7000\n    default_backend back\n"
        "backend back\n    mode tcp\n    option tcp-check\n    tcp-check expect rstring peer.*:\n"
        f"    server app {way.address}:8080 send-proxy-v2 check inter 100ms\n"
    )
    async with (
        open_daemon(way.proxy, config()) as daemon,
        open_haproxy(way.client, tmp_path, text, (way.client.v4, 7000)),
    ):
        await until(lambda: any(record["bytes_from_upstream"] for record in daemon.records()))
        record = next(record for record in daemon.records() if record["bytes_from_upstream"])
    assert record["source"].startswith(f"{way.client.v4}:")
    assert record["original_destination"] == format_address((way.address, 8080))


LOCAL = [
    ("LOCAL", SIGNATURE + b"\x20\0\0\0"),
    ("UNSPEC", SIGNATURE + b"\x21\0\0\0"),
    ("UNKNOWN", b"PROXY UNKNOWN ff::1 ff::2 1 2\r\n"),
]


@pytest.mark.parametrize("header", [row[1] for row in LOCAL], ids=[row[0] for row in LOCAL])
@BOTH_FAMILIES
async def test_a_header_without_addresses_leaves_those_of_the_connection(
    way: Way, nursery: trio.Nursery, header: bytes
) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, config()) as daemon:
        async with await send(way, header + b"hello") as stream:
            own = format_address(stream.socket.getsockname())
            await stream.send_eof()
            assert await to_the_end(stream) == b"hello"
        record = await daemon.record(own)
    assert record["original_destination"] == format_address((way.address, 8080))


MALFORMED = [
    ("no header", [b"GET / HTTP/1.1\r\n\r\n"], "it begins like neither version of a PROXY header"),
    ("no header, slowly", [b"P", b"RO", b"BE"], "it begins like neither version of a PROXY header"),
    ("a TLS client", [client_hello()], "it begins like neither version of a PROXY header"),
    ("an address that is none", [b"PROXY TCP4 192.0.2.256 192.0.2.1 1 2\r\n"], "is no address"),
    ("a line without end", [b"PROXY UNKNOWN " + b"x" * 200], "no CRLF in the first 107 bytes"),
    ("longer than any header", [SIGNATURE + b"\x21\x11\x10\x00"], "4112 bytes, of which at most 4096 are taken"),
    ("too short for its addresses", [SIGNATURE + b"\x21\x11\x00\x0b" + bytes(11)], "too few for the addresses"),
    ("a TLV over the end", [v2_header("192.0.2.9", 1, "192.0.2.1", 8080, tlvs=b"\x02\x00\x09x")], "a TLV runs over"),
    (
        "one address mapped",
        [v2_header("::ffff:192.0.2.9", 1, "2001:db8:1::1", 8080)],
        "one address of IPv4 and one of IPv6",
    ),
]


@pytest.mark.parametrize(("pieces", "why"), [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED])
@SIDECAR_V4
async def test_49_a_trusted_proxy_whose_header_is_none_is_refused(way: Way, pieces: list[bytes], why: str) -> None:
    """Never passed on as it is, and never to the server. The log tells of it once in five seconds."""
    async with way.app.listen(way.bind, 8080) as listener, open_daemon(way.proxy, config()) as daemon:
        for _ in range(3):
            assert await refused(way, daemon, *pieces) == "refused_by_policy"
        with trio.move_on_after(0.05) as nobody:
            await listener.accept()
        assert nobody.cancelled_caught
        line = await daemon.process.wait_for_output(LOG_LINE)
        assert why in line
        assert "192.0.2.2" in line
        assert await daemon.stop() == 0
    assert daemon.process.stderr_text.count(LOG_LINE) == 1


@SIDECAR_V4
async def test_49_a_trusted_proxy_that_ends_within_its_header(way: Way) -> None:
    async with open_daemon(way.proxy, config()) as daemon:
        for data in (b"", header_for(way, "v1")[:30], header_for(way, "v2")[:-1]):
            async with await send(way, data) as stream:
                own = format_address(stream.socket.getsockname())
                await stream.send_eof()
                assert await resets_within(stream, 1)
            assert (await daemon.record(own))["outcome"] == "refused_by_policy"
        assert "it ended before its PROXY header was complete" in await daemon.process.wait_for_output(LOG_LINE)
        async with await send(way, b"PROXY ") as stream:
            own = format_address(stream.socket.getsockname())
            await reset(stream)
        assert (await daemon.record(own))["outcome"] == "client_reset"


@pytest.mark.parametrize("number", [0, 1])
@SIDECAR_V4
@pytest.mark.timed
async def test_49_a_header_that_does_not_come_is_waited_for_three_seconds(
    way: Way, nursery: trio.Nursery, number: int
) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, config(more=f"[relay]\nworkers = {number}\n")) as daemon:
        async with await send(way) as silent, await send(way, header_for(way, "v2")[:20]) as slow:
            began = trio.current_time()
            owns = [format_address(stream.socket.getsockname()) for stream in (silent, slow)]
            for _ in range(10):  # others are not held up
                async with await send(way, header_for(way, "v2") + b"hello") as stream:
                    assert await stream.receive_some() == b"hello"
            assert trio.current_time() - began < 2
            assert await resets_within(silent, 3.5)
            assert await resets_within(slow, 0.5)
            assert 2.8 < trio.current_time() - began < 3.5
        for own in owns:
            record = await daemon.record(own)
            assert record["outcome"] == "refused_by_policy"
            assert 2990 < record["duration_ms"] < 3300
        assert "its PROXY header was not complete within 3 s" in await daemon.process.wait_for_output(LOG_LINE)


SPECIAL = ["127.0.0.1", "169.254.169.254", "224.0.0.1", "::1", "fe80::1", "fd00:ec2::254"]


NOWHERE = ["255.255.255.255", "224.0.0.5", "192.0.2.255", "::", "ff02::1"]


@pytest.mark.parametrize("source", ["client", "auto"])
@SIDECAR_V4
async def test_49_the_app_never_takes_a_client_from_nowhere_for_this_host(
    way: Way, nursery: trio.Nursery, source: str
) -> None:
    """A socket that is bound to such an address is connected from the host's own, which apps on loopback trust."""
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, config(upstream=f'target = "loopback"\nsource = "{source}"')) as daemon:
        for client in NOWHERE:
            header = v2_header(client, 7, way.app.v6 if ":" in client else way.app.v4, 8080)
            assert await refused(way, daemon, header) == "refused_by_policy"
        header = v2_header("192.0.2.254", 7, way.app.v4, 8080)
        async with await send(way, header + b"hello") as stream:
            assert await stream.receive_some() == b"hello"


NOBODY = ["0.0.0.0", "255.255.255.255", "224.0.0.5", "::", "ff02::1", "fe80::9", "::ffff:192.0.2.77", "64:ff9b::1"]


@SIDECAR_V4
async def test_49_a_client_that_cannot_be(way: Way, nursery: trio.Nursery) -> None:
    """Addresses from which nothing comes, and port 0: an outcome each, and nothing that nobody thought of."""
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, config(upstream='connect_timeout = "300ms"')) as daemon:
        for client in NOBODY:
            for port in (0, 7):
                real = way.app.v6 if ":" in client and "ffff" not in client else way.app.v4
                header = v2_header(client, port, f"::ffff:{real}" if "ffff" in client else real, 8080)
                async with await send(way, header + b"hello") as stream:
                    with suppress(trio.BrokenResourceError):
                        await stream.send_eof()
                    assert await ends_within(stream, 3)
        await until(lambda: len(daemon.records()) == 2 * len(NOBODY))
        seen = {record["source"]: (record["outcome"], record["upstream_source"]) for record in daemon.records()}
        assert await daemon.stop() == 0
    assert "error: " not in daemon.process.stderr_text
    assert seen["192.0.2.77:0"][0] == "closed"  # mapped is IPv4, and the kernel has chosen a port
    assert seen["192.0.2.77:0"][1].rpartition(":")[2] != "0"
    assert seen["192.0.2.77:7"][0] == "closed"
    assert seen["192.0.2.77:7"][1].startswith("192.0.2.77:")
    assert seen["[fe80::9]:7"][0] == "closed"
    assert {outcome for outcome, _ in seen.values()} <= {
        "closed",
        "self_call",
        "refused_by_policy",
        "upstream_unreachable",
        "upstream_timeout",
        "no_ports",
    }


@pytest.mark.parametrize("version", ["v1", "v2"])
@SIDECAR_V4
async def test_41_a_special_destination_in_a_header_is_refused(way: Way, version: str) -> None:
    """A header may name what no packet could."""
    async with way.app.listen("127.0.0.1", 9090) as listener, open_daemon(way.proxy, config()) as daemon:
        for number, address in enumerate(SPECIAL):
            client = CLIENT["v6" if ":" in address else "v4"]
            header = v2_header(client, 7001 + number, address, 9090)
            if version == "v1":
                kind = "TCP6" if ":" in address else "TCP4"
                header = f"PROXY {kind} {client} {address} {7001 + number} 9090\r\n".encode()
            async with await send(way, header) as stream:
                assert await resets_within(stream, 1)
            record = await daemon.record(format_address((client, 7001 + number)))
            assert record["outcome"] == "refused_by_policy"
            assert record["original_destination"] == format_address((address, 9090))
        with trio.move_on_after(0.05) as nobody:
            await listener.accept()
        assert nobody.cancelled_caught
    assert LOG_LINE not in daemon.process.stderr_text  # no fault of the proxy's


@SIDECAR_V4
async def test_40_a_header_cannot_lead_a_connection_back_here(way: Way) -> None:
    """The listener, its port at another address of this host, and clients that are this host itself."""
    async with open_daemon(way.proxy, config()) as daemon:
        for number, (client, address, port) in enumerate((
            ("203.0.113.77", "127.0.0.1", 15006),
            ("203.0.113.77", "192.0.2.1", 15006),
            ("2001:db8:f::77", "2001:db8:1::1", 15006),
            ("192.0.2.1", "192.0.2.1", 8080),
            ("127.0.0.1", "192.0.2.1", 8080),
        )):  # fmt: skip
            async with await send(way, v2_header(client, 7001 + number, address, port)) as stream:
                assert await resets_within(stream, 1)
            assert (await daemon.record(format_address((client, 7001 + number))))["outcome"] == "self_call"


@SIDECAR_V4
async def test_limits_and_rules_are_about_the_client_of_the_header(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    more = (
        "[limits]\nmax_connections_per_source = 1\n"
        '[[policy.rule]]\nname = "no-78"\nsources = ["192.0.2.78"]\naction = "refuse"\n'
        '[[policy.rule]]\nname = "no-443"\nports = ["443"]\naction = "refuse"\n'
    )

    def header(client: str, port: int, to: int = 8080) -> bytes:
        return v2_header(client, port, way.address, to)

    async with open_daemon(way.proxy, config(more=more)) as daemon:
        async with await send(way, header("192.0.2.77", 1001) + b"x") as first:
            assert await first.receive_some() == b"x"
            for client, port, to, outcome, rule in (
                ("192.0.2.77", 1002, 8080, "limit", None),
                ("192.0.2.78", 1003, 8080, "refused_by_policy", "no-78"),
                ("192.0.2.79", 1004, 443, "refused_by_policy", "no-443"),
            ):
                async with await send(way, header(client, port, to)) as stream:
                    assert await resets_within(stream, 1)
                record = await daemon.record(f"{client}:{port}")
                assert (record["outcome"], record["rule"]) == (outcome, rule)
            async with await send(way, header("192.0.2.79", 1005) + b"y") as other:
                assert await other.receive_some() == b"y"
        assert (await daemon.record("192.0.2.77:1001"))["outcome"] == "closed"
        async with await send(way, header("192.0.2.77", 1006) + b"z") as again:
            assert await again.receive_some() == b"z"


@BOTH_FAMILIES
async def test_in_redirect_mode(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_identity, way.app, 8080)
    async with open_daemon(way.proxy, config(capture='mode = "redirect"')) as daemon:
        async with await send(way, header_for(way, "v2") + b"hello") as stream:
            await stream.send_eof()
            await to_the_end(stream)
        record = await daemon.record(format_address((CLIENT[family(way)], 4321)))
        assert record["original_destination"] == record["upstream"] == format_address((way.address, 8080))
        assert record["bytes_from_client"] == 5
        assert await refused(way, daemon, b"GET / HTTP/1.1\r\n\r\n") == "refused_by_policy"


@pytest.mark.parametrize("engine", ["auto", "splice"])
async def test_a_chain_of_two_hands_the_client_on(gateway_lab: Lab, nursery: trio.Nursery, engine: str) -> None:
    """The first tells the second who its client is, and what name it asked for; the app sees the client's own address."""
    client, gateway, server = gateway_lab["client"], gateway_lab["gateway"], gateway_lab["server"]
    await nursery.start(serve_identity, server, 8080)
    relay = f'[relay]\nengine = "{engine}"\n'
    first = f'[capture]\nports = ["8080"]\n[upstream]\nsource = "proxy"\nproxy_protocol = "v2"\n{relay}'
    second = f'[capture]\nports = ["8080"]\n[listen]\nproxy_protocol_from = ["198.51.100.1", "2001:db8:2::1"]\n{relay}'
    hello = client_hello()
    async with open_daemon(gateway, first) as daemon, open_daemon(server, second) as behind:
        for address in ("203.0.113.9", "2001:db8:f::9"):
            async with await client.connect(address, 8080) as stream:
                own = format_address(stream.socket.getsockname())
                await stream.send_all(hello)
                await stream.send_eof()
                answer = json.loads(await to_the_end(stream))
            records = [await one.record(own) for one in (daemon, behind)]
            assert [record["original_destination"] for record in records] == [format_address((address, 8080))] * 2
            assert [record["bytes_from_client"] for record in records] == [len(hello)] * 2
            assert [record["sni"] for record in records] == ["app.example"] * 2
            assert [record["alpn"] for record in records] == ["h2,http/1.1", "h2"]
            assert answer["peer"] == records[1]["upstream_source"]
            assert answer["peer"].rpartition(":")[0] == own.rpartition(":")[0]


PROGRAM = """
import signal, sys, trio
from tproxyd import Forward, Handle, Refuse, config_from_mapping, open_interceptor

async def shout(stream):
    data = b"".join([chunk async for chunk in stream])
    await stream.send_all(data.upper())

async def policy(connection):
    print("asked", *connection.source, *connection.original_destination, *connection.target, flush=True)
    return {1: Forward(), 2: Handle(shout), 3: Refuse()}[connection.source[1]]

async def main():
    config = config_from_mapping({
        "capture": {"ports": ["8080"]}, "relay": {"workers": int(sys.argv[1])},
        "listen": {"proxy_protocol_from": ["192.0.2.2", "2001:db8:1::2"]},
        "upstream": {"target": sys.argv[2], "proxy_protocol": "v2"},
    })
    def on_record(record):
        print("record", record.source, record.outcome, record.bytes_from_client, flush=True)
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with open_interceptor(config, policy=policy, on_record=on_record, own_namespace=True):
            print("open", flush=True)
            async for number in signals:
                break

trio.run(main)
"""


@pytest.mark.parametrize("number", [0, 1])
@BOTH_FAMILIES
async def test_a_policy_is_asked_about_the_client_of_the_header(way: Way, nursery: trio.Nursery, number: int) -> None:
    """Also where that is of the other family than the connection, and the socket goes there and back with data in it."""
    await nursery.start(serve_echo, way.app, 9090)
    target = "127.0.0.1:9090" if family(way) == "v4" else "[::1]:9090"
    async with way.proxy.process(sys.executable, "-c", PROGRAM, str(number), target, collect=True) as process:
        await process.wait_for_output("open")
        client, destination = (
            ("2001:db8:f::77", "2001:db8:f::1") if family(way) == "v4" else ("203.0.113.77", "203.0.113.1")
        )
        for port, expected, record in (
            (1, b"hello", "closed 5"),
            (2, b"HELLO", "handled 5"),
            (3, None, "refused_by_policy 0"),
        ):
            async with await send(way, v2_header(client, port, destination, 443)[:20]) as stream:
                await trio.sleep(0.02)
                await stream.send_all(v2_header(client, port, destination, 443)[20:] + b"hello")
                if expected is None:
                    assert await resets_within(stream, 2)
                else:
                    await stream.send_eof()
                    answer = await to_the_end(stream)
                    if record == "closed 5":  # what the echo was sent begins with the server's own header
                        assert answer.startswith(v2_header(client, port, destination, 443)[:14])
                    else:
                        assert answer == expected
                    assert answer.endswith(expected)
            host = target.rpartition(":")[0].strip("[]")
            assert await process.wait_for_output(f"asked {client} {port} ") == (
                f"asked {client} {port} {destination} 443 {host} 9090"
            )
            source = format_address((client, port))
            assert await process.wait_for_output(f"record {source} ") == f"record {source} {record}"
        async with await send(way, b"GET / HTTP/1.1\r\n\r\n") as stream:
            own = format_address(stream.socket.getsockname())
            assert await resets_within(stream, 2)
        assert await process.wait_for_output(f"record {own} ") == f"record {own} refused_by_policy 0"
        assert "this is a bug" not in process.stderr_text


@SIDECAR_V4
async def test_49_headers_with_anything_in_them(way: Way, nursery: trio.Nursery, counted: Callable[[int], int]) -> None:
    """Changed, cut and doubled; each costs its connection at most, and the others are served."""
    await nursery.start(serve_echo, way.app, 8080)
    chance = random.Random(49)
    whole = [
        header_for(way, "v1"),
        header_for(way, "v2"),
        v2_header(CLIENT["v4"], 9, way.address, 8080, tlvs=b"\x02\x00\x03abc\x01\x00\x02h2\x05\x00\x01x"),
    ]

    def any_header() -> bytes:
        data = bytearray(chance.choice(whole))
        for _ in range(chance.randrange(4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if chance.random() < 0.3:
            del data[chance.randrange(len(data)) :]
        return bytes(data) + chance.choice((b"", bytes(data), client_hello()))

    async def attempt(data: bytes, cut: int) -> None:
        async with few:
            stream = await send(way, data[:cut])
            async with stream:
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(data[cut:])
                    await stream.send_eof()
                assert await ends_within(stream, 5), data

    few = trio.CapacityLimiter(20)
    upstream = 'proxy_protocol = "v2"\nconnect_timeout = "300ms"'  # a client that was made up may be one to whom no route leads
    async with open_daemon(way.proxy, config(upstream=upstream)) as daemon:
        count = counted(2000)
        async with trio.open_nursery() as many:
            for _ in range(count):
                data = any_header()
                many.start_soon(attempt, data, chance.randrange(len(data) + 1))
        async with await send(way, header_for(way, "v2", 9999) + b"hello") as stream:
            await stream.send_eof()
            assert (await to_the_end(stream)).endswith(b"hello")
        await until(lambda: sum(outcomes(daemon).values()) == count + 1)
        assert await daemon.stop() == 0
    assert "this is a bug" not in daemon.process.stderr_text
    assert outcomes(daemon)["error"] == 0
    assert outcomes(daemon)["refused_by_policy"] > count // 10
    assert outcomes(daemon)["closed"] > count // 10
