"""Interceptors beside each other in one process, in the program's own namespace, on its own sockets; and what they leave alone."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import pytest
import trio

from netns_tests.pods import CONFIG, ask, open_pods, served_right
from netns_tests.watch import works
from netns_tests.way import SIDECAR_V4, Way
from tproxyd import ConfigError, KernelError, Record, kernel, open_interceptor
from tproxyd.net.sockets import format_address
from tproxyd.testing import LabProcess, Node, serve_echo, serve_identity
from tproxyd.testing.daemon import TPROXYD, open_daemon
from tproxyd.testing.plugin import OpenLab

# Captures the namespace that it runs in, until its input ends.
EMBEDS = """
import sys, trio, tproxyd

async def main():
    try:
        async with tproxyd.open_interceptor({"capture": {"ports": ["8080"]}, "routing": {"table": int(sys.argv[1])}}, own_namespace=True):
            print("open", flush=True)
            await trio.to_thread.run_sync(sys.stdin.read)
    except tproxyd.KernelError as error:
        print("refused:", error, flush=True)

trio.run(main)
"""


async def test_62_two_interceptors_in_one_process_do_not_notice_each_other(
    open_lab: OpenLab, nursery: trio.Nursery
) -> None:
    """Other configurations, other names, other policies; the end of one, in order or not, is nothing to the other."""
    records: dict[str, list[Record]] = {"tproxyd": [], "mesh": []}
    async with open_pods(open_lab, 2) as (one, other):
        for pod in (one, other):
            for port in (8080, 8081):
                await nursery.start(serve_identity, pod.node, port)
        mesh: dict[str, Any] = {
            "capture": {"ports": ["8081"]},
            "relay": {"workers": 1},
            "routing": {"table": 200, "priority": 6000},
        }
        async with open_interceptor(CONFIG, on_record=records["tproxyd"].append) as first:
            await first.add_workload("web", netns=one.netns)
            held = await one.node.dump()
            with pytest.raises(ExceptionGroup) as raised:
                async with open_interceptor(mesh, name="mesh", on_record=records["mesh"].append) as second:
                    await second.add_workload("web", netns=other.netns)
                    assert sorted(other.node.call(partial(kernel.observe, name="mesh")).tables) == ["mesh"]
                    assert await one.node.dump() == held
                    for pod, port, intercepted in (
                        (one, 8080, True),
                        (one, 8081, False),
                        (other, 8080, False),
                        (other, 8081, True),
                    ):
                        own, seen, _ = await ask(pod, port)
                        assert (own != seen) == intercepted, (pod.name, port)
                    with pytest.raises(KernelError, match="this very process"):
                        await second.add_workload("too", netns=one.netns)
                    assert [set(await each.stats()) for each in (first, second)] == [{"web"}, {"web"}]
                    raise RuntimeError("this program's own mistake")
            assert raised.value.subgroup(RuntimeError) is not None
            await served_right(one)
            assert await one.node.dump() == held
    assert {record.original_destination for record in records["mesh"]} == {"192.0.2.1:8081"}
    assert {record.original_destination for record in records["tproxyd"]} == {"192.0.2.1:8080", "[2001:db8:1::1]:8080"}


@SIDECAR_V4
async def test_20_the_own_namespace_has_one_interceptor_and_no_daemon_beside_it(way: Way) -> None:
    """Whoever comes second is refused, and told who is there; when that has ended, it may come."""
    node = way.proxy
    before = await node.dump()
    async with embeds(node, 133) as first:
        await first.wait_for_output("open")
        held = await node.dump()
        async with embeds(node, 200) as second:
            refused = await second.wait_for_output("refused")
            assert "an embedding program, " in refused
            assert f"(pid {first.pid}), keeps this network namespace" in refused
            assert await second.wait() == 0
        done = await node.run(*TPROXYD, "run", "--port", "8081", check=False)
        assert (done.returncode, f"(pid {first.pid})" in done.stderr) == (71, True), done.stderr
        assert await node.dump() == held
        await end(first)
    assert await node.dump() == before
    async with embeds(node, 133) as third:
        await third.wait_for_output("open")
        await end(third)
    assert await node.dump() == before


@SIDECAR_V4
async def test_20_an_interceptor_is_refused_where_a_daemon_serves(way: Way) -> None:
    async with open_daemon(way.proxy, '[capture]\nports = ["8080"]\n') as daemon:
        async with embeds(way.proxy, 200) as program:
            assert f"(pid {daemon.process.pid}) serves this network namespace" in await program.wait_for_output(
                "refused"
            )
        assert await daemon.stop() == 0


def embeds(node: Node, table: int) -> AbstractAsyncContextManager[LabProcess]:
    return node.process(sys.executable, "-c", EMBEDS, str(table), collect=True, stdin=subprocess.PIPE)


async def end(program: LabProcess) -> None:
    assert program.stdin is not None
    await program.stdin.aclose()
    assert await program.wait() == 0, program.stderr_text


async def test_an_interceptor_of_the_own_namespace_leaves_its_lock(open_lab: OpenLab) -> None:
    """Also within one process; what it has taken is free after it."""
    own: dict[str, Any] = {"capture": {"ports": ["8080"]}, "relay": {"workers": 0}}
    for _ in range(2):
        async with open_interceptor(own, own_namespace=True) as interceptor:
            assert interceptor.capturing
            with pytest.raises(KernelError, match=rf"\(pid {os.getpid()}, this very process\)"):
                async with open_interceptor(own, name="mesh", own_namespace=True):
                    pass
            assert interceptor.capturing
            assert await interceptor.own.differences() == []


# Sockets of the program.

LISTENS = """
import json, sys, trio, tproxyd
from tproxyd.net.sockets import open_listener

port, workers, own = map(int, sys.argv[1:])
listeners = [open_listener(address, port, backlog=16) for address in ("127.0.0.1", "::1")]
config = {"capture": {"ports": ["8080"]}, "upstream": {"source": "auto" if own else "proxy"}, "relay": {"workers": workers}}

def on_record(record):
    print(record.workload, record.original_destination, record.outcome, flush=True)

async def main():
    async with tproxyd.open_interceptor(config, listeners=listeners, own_namespace=bool(own), on_record=on_record) as interceptor:
        print("open", interceptor.listen, interceptor.workloads, flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        print("counted", {name: counters.accepted for name, counters in (await interceptor.stats()).items()}, flush=True)

trio.run(main)
print("listening", [listener.getsockopt(1, 30) for listener in listeners], [listener.getsockname()[1] for listener in listeners])
"""

BRINGS = """
table inet program {
  chain capture {
    type filter hook prerouting priority mangle
    iifname eth0 meta nfproto ipv4 tcp dport 8080 tproxy ip to 127.0.0.1:15900 accept
    iifname eth0 meta nfproto ipv6 tcp dport 8080 tproxy ip6 to [::1]:15900 accept
  }
}
"""


@pytest.mark.parametrize("number", [0, 2], ids=["thread", "processes"])
@pytest.mark.parametrize("own", [False, True], ids=["brought", "captured"])
async def test_listeners_of_the_program_are_served_as_they_are(
    open_lab: OpenLab, nursery: trio.Nursery, number: int, own: bool
) -> None:
    """Brought there by a rule of the program's: then tproxyd changes nothing in the kernel. Or captured by tproxyd. Either way they stay the
    program's, and listen when all is over."""
    port = 15006 if own else 15900
    async with open_pods(open_lab, 1) as (pod,):
        await nursery.start(serve_identity, pod.node, 8080)
        if not own:
            await pod.node.run("nft", "-f", "-", input=BRINGS)
        before = await pod.node.dump()
        words = (sys.executable, "-c", LISTENS, str(port), str(number), str(int(own)))
        async with pod.node.process(*words, collect=True, stdin=subprocess.PIPE) as program:
            listen = f"(('127.0.0.1', {port}), ('::1', {port}))" if own else "()"
            assert await program.wait_for_output("open") == f"open {listen} ()"
            assert (await pod.node.dump() == before) != own
            for family in ("v4", "v6"):
                client, seen, local = await ask(pod, family=family)
                destination = format_address((getattr(pod.node, family), 8080))
                assert (seen != client, seen[0] == client[0], local) == (True, own, destination)
                record = await program.wait_for_output(f"host {destination} ")
                assert record == f"host {destination} closed"
            await end(program)
        assert "counted {'host': 2}" in program.stdout_text
        assert f"listening [1, 1] [{port}, {port}]" in program.stdout_text
        assert await pod.node.dump() == before
        if not own:
            await pod.node.run("nft", "delete", "table", "inet", "program")


async def test_listeners_that_do_not_listen_are_refused() -> None:
    with socket.socket() as sock, pytest.raises(ConfigError, match=r"does not listen; call its listen\(\) before"):
        async with open_interceptor(CONFIG, listeners=[sock]):
            pass


# The program itself.


def surroundings() -> dict[str, Any]:
    """What a library has to leave alone."""
    loggers = {name: logging.getLogger(name) for name in list(logging.root.manager.loggerDict)}
    return {
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "wakeup": _wakeup_fd(),
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "handlers": (list(logging.root.handlers), logging.root.level),
        "loggers": {
            name: (list(logger.handlers), logger.level, logger.propagate, logger.disabled)
            for name, logger in loggers.items()
            if name.startswith("tproxyd")
        },
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "umask": _umask(),
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook),
        "timeout": socket.getdefaulttimeout(),
        "namespace": os.readlink("/proc/self/ns/net"),
        "thread's namespace": os.readlink("/proc/thread-self/ns/net"),
        "threads": {thread.name for thread in threading.enumerate() if not thread.name.startswith("Trio thread")},
    }


def _wakeup_fd() -> int:
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    return fd


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("number", [0, 1], ids=["thread", "process"])
async def test_a_program_is_as_it_was_while_an_interceptor_is_open_and_after_it(
    open_lab: OpenLab, nursery: trio.Nursery, number: int
) -> None:
    """Signals, logging, environment, directory, hooks, its own namespace; threads meanwhile are the relay loop's alone."""
    config = CONFIG | {"relay": {"workers": number}}
    async with open_pods(open_lab, 1) as (pod,):
        await nursery.start(serve_echo, pod.node, 8080)
        before = surroundings()
        async with open_interceptor(config) as interceptor:
            await interceptor.add_workload(pod.name, netns=pod.netns)
            async with await pod.connect() as stream:
                await works(stream)
                meanwhile = surroundings()
                threads = meanwhile.pop("threads") - before["threads"]
                assert threads == (set() if number else {"tproxyd relay"})
                assert meanwhile == {key: value for key, value in before.items() if key != "threads"}
        assert surroundings() == before


async def test_what_is_told_of_the_own_namespace_is_refused_in_a_sentence_where_that_is_not_captured() -> None:
    async with open_interceptor(CONFIG) as interceptor:
        for name in ("own", "repairs", "trouble", "capturing", "others", "families", "marks"):
            with pytest.raises(RuntimeError, match="open it with own_namespace=True"):
                getattr(interceptor, name)
        for ask in (interceptor.differences, interceptor.revert):
            with pytest.raises(RuntimeError, match="open it with own_namespace=True"):
                await ask()
        await interceptor.stop_capture()
        assert interceptor.troubles == {}
