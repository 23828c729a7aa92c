"""`[admin] metrics`: what it tells is what the access log says, and whoever asks badly hurts nobody."""

from __future__ import annotations

import re
import signal
from collections import Counter
from contextlib import AsyncExitStack, suppress

import pytest
import trio

from netns_tests.watch import METRICS, attempt, get, many, metrics, outcomes, processes, reset, until, works
from netns_tests.way import BOTH_LAYOUTS, GATEWAY_V4, Way
from tproxyd.testing import LabError, serve_echo
from tproxyd.testing.daemon import TPROXYD, open_daemon

CONFIG = '[capture]\nports = ["8080", "9999"]\n' + METRICS


@pytest.mark.parametrize("number", [0, 1, 2])
@GATEWAY_V4
async def test_counters_are_what_the_access_log_says(way: Way, nursery: trio.Nursery, number: int) -> None:
    """50 connections with three kinds of end, in whichever home; and two that live, whose bytes count already."""
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, CONFIG + f"[relay]\nworkers = {number}\n") as daemon:
        for index in range(50):
            if index % 5 == 0:
                await attempt(way.client, way.address, 9999)  # nobody listens there
                continue
            stream = await way.client.connect(way.address, 8080)
            await works(stream)
            if index % 5 == 1:
                await reset(stream)
            else:
                await stream.send_eof()
                assert await stream.receive_some() == b""
                await stream.aclose()
        await until(lambda: len(daemon.records()) == 50)
        ended = await metrics(way.proxy)
        told = outcomes(daemon)
        assert told == {"closed": 30, "client_reset": 10, "upstream_refused": 10}
        counted = Counter({
            match[1]: int(value)
            for name, value in ended.items()
            if (match := re.fullmatch(r'tproxyd_connections_total{outcome="(\w+)"}', name)) and value
        })  # fmt: skip
        assert counted == told
        records = daemon.records()
        for side in ("client", "upstream"):
            assert ended[f'tproxyd_bytes_total{{from="{side}"}}'] == sum(one[f"bytes_from_{side}"] for one in records)
        assert ended["tproxyd_accepted_total"] == 50
        assert ended["tproxyd_connections_active"] == 0
        assert ended["tproxyd_connect_seconds_count"] == 40
        assert ended["tproxyd_access_log_dropped_total"] == 0
        async with many(way.client, way.address, 2) as streams:
            for stream in streams:
                await works(stream)
            for _ in range(10):  # also when asked again and again
                living = await metrics(way.proxy)
                assert living["tproxyd_connections_active"] == 2
                for side in ("client", "upstream"):
                    assert (
                        living[f'tproxyd_bytes_total{{from="{side}"}}']
                        == 10 + ended[f'tproxyd_bytes_total{{from="{side}"}}']
                    )


CONTRACT = """
tproxyd_connections_total tproxyd_connections_active tproxyd_bytes_total tproxyd_connect_seconds tproxyd_accepted_total
tproxyd_drift_repairs_total tproxyd_config_last_reload_success tproxyd_access_log_dropped_total tproxyd_build_info
tproxyd_kernel_packets_total
"""


@BOTH_LAYOUTS
async def test_every_metric_is_told_with_help_and_type_and_the_kernel_s_counters_are_its_own(
    way: Way, nursery: trio.Nursery
) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, CONFIG + '[upstream]\nsource = "auto"\n') as daemon:
        async with many(way.client, way.address, 3) as streams:
            for stream in streams:
                await works(stream)
        text = (await get(way.proxy, "/metrics")).body.decode()
        assert set(re.findall(r"^# TYPE (\w+) ", text, re.M)) == set(CONTRACT.split())
        lines = text.splitlines()
        for number, line in enumerate(lines):
            if line.startswith("# HELP"):
                name = line.split()[2]
                assert re.fullmatch(rf"# TYPE {name} (counter|gauge|histogram)", lines[number + 1])
                assert line.endswith("."), line
        told = await metrics(way.proxy)
        assert told["tproxyd_config_last_reload_success"] == 1
        steered = [
            value
            for name, value in told.items()
            if name.startswith('tproxyd_kernel_packets_total{chain="take",rule="new connection: to our listener;')
        ]
        assert steered == [3]
        await way.proxy.run(*TPROXYD, "revert")
        assert not any(name.startswith("tproxyd_kernel_packets_total{") for name in await metrics(way.proxy))
        assert await daemon.stop() == 0


FIREWALL = """
table inet firewall {
  chain input {
    type filter hook input priority filter; policy drop;
    iifname "lo" accept
    ct state established,related accept
    meta l4proto ipv6-icmp accept
    tcp dport { 22, 9101 } accept
  }
}
"""


@pytest.mark.parametrize(("way", "mode"), [("gateway v4", "tproxy"), ("sidecar v6", "redirect")], indirect=["way"])
async def test_10_readyz_names_a_default_drop_input_chain(way: Way, mode: str, nursery: trio.Nursery) -> None:
    """One that is there at the start, one that comes; until it goes, or admits what is captured."""
    await nursery.start(serve_echo, way.app, 8080)
    node, config = way.proxy, CONFIG.replace("[capture]", f'[capture]\nmode = "{mode}"')

    async def until_ready(status: int) -> bytes:
        with trio.fail_after(15):
            while (answer := await get(node, "/readyz")).status != status:
                await trio.sleep(0.05)
        return answer.body

    await node.run("nft", "-f", "-", input=FIREWALL)
    async with open_daemon(node, config) as daemon:
        assert b"policy drop of chain inet firewall input" in await until_ready(503)
        assert "trouble      " in (await node.run(*TPROXYD, "status")).stdout
        await node.run("nft", "delete", "table", "inet", "firewall")
        assert await until_ready(200) == b"ok\n"
        await node.run("nft", "-f", "-", input=FIREWALL)
        await until_ready(503)
        admitted = "meta mark & 0x3000000 == 0x1000000" if mode == "tproxy" else "ct status dnat tcp dport 15006"
        await node.run("nft", f"insert rule inet firewall input {admitted} accept")
        await until_ready(200)
        async with await way.client.connect(way.address, 8080, timeout=2):
            pass
        assert daemon.process.stderr_text.count("a firewall of this host keeps clients away") == 2
        assert await daemon.stop() == 0


@GATEWAY_V4
async def test_readyz_while_it_serves_and_while_it_drains(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, CONFIG) as daemon, await way.client.connect(way.address, 8080) as stream:
        await works(stream)
        for path in ("/healthz", "/readyz"):
            assert (await get(way.proxy, path)).status == 200
        assert (await get(way.proxy, "/metrics?x=1")).status == 200
        assert (await get(way.proxy, "/nothing")).status == 404
        assert (await get(way.proxy, "/metrics", method="POST")).status == 405
        daemon.process.send_signal(signal.SIGTERM)
        await daemon.process.wait_for_output("stopping")
        assert (await get(way.proxy, "/readyz")).status == 503
        assert (await get(way.proxy, "/healthz")).status == 200
        assert (await get(way.proxy, "/metrics")).status == 200
        await works(stream)
        await stream.send_eof()
        assert await daemon.process.wait() == 0


@GATEWAY_V4
async def test_curl_gets_the_metrics_and_their_head(way: Way) -> None:
    async with open_daemon(way.proxy, CONFIG):
        url = "http://127.0.0.1:9101/metrics"
        got = await way.proxy.run("curl", "-sS", "-i", url)
        assert got.stdout.startswith("HTTP/1.1 200 ")
        assert "tproxyd_build_info{" in got.stdout
        head = await way.proxy.run("curl", "-sS", "-I", "-m", "3", url)
        assert head.stdout.startswith("HTTP/1.1 200 ")
        twice = await way.proxy.run(
            "curl", "-sS", "-o", "/dev/null", "-o", "/dev/null", "-w", "%{num_connects} ", url, url
        )
        assert twice.stdout == "1 0 "


BAD = [
    b"nonsense\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\n\r\n",  # without Host
    b"GET /metrics HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 1_000_000,
    b"\x16\x03\x01\x02\x00" + b"\0" * 600,  # TLS
    b"POST /metrics HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /metrics HTTP/9.9\r\nHost: x\r\n\r\n",
]


@GATEWAY_V4
async def test_59_bad_requests_hurt_nobody(way: Way, nursery: trio.Nursery) -> None:
    """Each sent and waited for, sent and half-closed, and sent and reset at once."""
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, CONFIG) as daemon, await way.client.connect(way.address, 8080) as stream:
        pids = processes(daemon)
        for data in BAD:
            for ending in ("wait", "half-close", "reset", "reset", "reset"):
                asking = await way.proxy.connect("127.0.0.1", 9101)
                answer = b""
                try:
                    with trio.move_on_after(1):
                        await asking.send_all(data)
                        if ending == "half-close":
                            await asking.send_eof()
                        if ending != "reset":
                            answer = await asking.receive_some()
                except trio.BrokenResourceError:
                    pass  # it does not read all of a huge header
                await reset(asking)
                print(f"{data[:40]!r} {ending}: {answer[:30]!r}")
            await works(stream)
            assert (await get(way.proxy, "/healthz")).status == 200
        assert processes(daemon) == pids
    assert "Traceback" not in daemon.process.stderr_text


@GATEWAY_V4
async def test_59_slow_clients_and_a_storm_of_scrapes_hurt_nobody(way: Way, nursery: trio.Nursery) -> None:
    """80 clients that say half a word, more than are served at once, and scrapes from 20 at a time."""
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, CONFIG) as daemon, await way.client.connect(way.address, 8080) as stream:
        async with trio.open_nursery() as scrapes:

            async def scrape() -> None:
                for _ in range(5):
                    assert (await get(way.proxy, "/metrics", within=20)).status == 200

            for _ in range(20):
                scrapes.start_soon(scrape)
            for _ in range(20):
                await works(stream)
        slow = [await way.proxy.connect("127.0.0.1", 9101) for _ in range(80)]
        for each in slow:
            await each.send_all(b"GET /metr")
        await works(stream)
        for each in slow:
            await reset(each)
        assert (await get(way.proxy, "/metrics")).status == 200
        await works(stream)
        assert await get(way.proxy, "/healthz")
        daemon.process.send_signal(signal.SIGTERM)
        await daemon.process.wait_for_output("stopping")
        await stream.send_eof()
        assert await daemon.process.wait() == 0


@pytest.mark.timed
@GATEWAY_V4
async def test_59_who_says_nothing_keeps_nobody_out(way: Way) -> None:
    """200 clients that say nothing, 200 that say half a word, and 200 that ask and take no answer."""
    node = way.proxy
    async with open_daemon(node, CONFIG) as daemon, AsyncExitStack() as stack:
        for said in (b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 1000):
            for _ in range(200):
                client = await stack.enter_async_context(await node.connect("127.0.0.1", 9101))
                with suppress(trio.BrokenResourceError), trio.move_on_after(0.01):
                    await client.send_all(said)
            for path in ("/healthz", "/readyz", "/metrics"):
                assert (await get(node, path, within=8)).status == 200  # who says nothing is waited for 10 s
        assert await daemon.stop() == 0
    assert "Traceback" not in daemon.process.stderr_text


@GATEWAY_V4
async def test_19_the_holder_of_the_port_of_the_metrics_is_named_and_nothing_is_left(way: Way) -> None:
    before = await way.proxy.dump()
    async with way.proxy.listen("127.0.0.1", 9101):
        with pytest.raises(LabError, match=r"ended with 71") as failed:
            async with open_daemon(way.proxy, CONFIG):
                pass
    (line,) = [line for line in str(failed.value).splitlines() if line.startswith("tproxyd: ")]
    assert re.search(r"127\.0\.0\.1:9101 for metrics: Address already in use, by (python|pytest)", line)
    assert await way.proxy.dump() == before
