"""The lock of a namespace and the orders at it, among others on the machine who forge, squat, flood, or stand still."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path

import pytest
import trio

from netns_tests.way import SIDECAR_V4, Way
from tproxyd.daemon.lock import LOCK_PORT
from tproxyd.testing import Finished, Lab, Node
from tproxyd.testing.daemon import TPROXYD, open_daemon

CONFIG = '[capture]\nports = ["8080"]\nwhen_down = "refuse"\n'

# Whom a program runs as that has no capability: another container of the pod, whose root is root, or any user.
CAPLESS = ("setpriv", "--bounding-set", "-all", "--inh-caps", "-all")
NOBODY = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
STRANGERS = pytest.mark.parametrize("stranger", [CAPLESS, NOBODY], ids=["root without capabilities", "nobody"])

# Sends an order by all ways that there are or were, and says what became of it.
ORDERER = f"""
import socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    try:
        sock.connect("\\0tproxyd")
        sock.sendall(sys.argv[1].encode() + b"\\n")
        print(sock.recv(10))
    except OSError as error:
        print(error.strerror)
with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as sock:
    try:
        sock.sendto(sys.argv[1].encode() + b"\\n", ({LOCK_PORT}, 0))
        print(sock.recv(10))
    except OSError as error:
        print(error.strerror)
"""

SQUATTER = f"""
import socket, time
port = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
port.bind(({LOCK_PORT}, 0))
print("up", flush=True)
time.sleep(60)
"""

# Sockets that looked like the lock as long as that was looked up in /proc/net/unix.
FORGER = """
import os, socket, sys, time
os.chdir(sys.argv[1])
kept = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(3)]
kept[0].bind("\\0tproxyd")
kept[1].bind("@tproxyd")
inode = os.fstat(kept[1].fileno()).st_ino
kept[2].bind(f"\\0x\\n0000000000000000: 00000002 00000000 00010000 0001 01 {inode} @tproxyd")
print("up", flush=True)
time.sleep(60)
"""

SERVER = """
import errno, os, sys, trio
from tproxyd.daemon.lock import KernelError, namespace_lock, send_order, serve_orders

async def fails():
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

async def errs():
    raise ZeroDivisionError("a mistake")

async def long():
    return "x" * 1_000_000

async def main():
    with namespace_lock("try") as held:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_orders, held, {"fails": fails, "errs": errs, "long": long})
            for order in ("fails", "errs", "nonsense", "long"):
                try:
                    print(order, len(await trio.to_thread.run_sync(send_order, order)))
                except KernelError as error:
                    print(error)
            nursery.cancel_scope.cancel()

trio.run(main)
"""


async def tproxyd(node: Node, *arguments: str, code: int) -> Finished:
    done = await node.run(*TPROXYD, *arguments, check=False)
    assert done.returncode == code, (arguments, done)
    return done


@SIDECAR_V4
@STRANGERS
async def test_orders_are_taken_from_nobody_without_cap_net_admin(way: Way, stranger: tuple[str, ...]) -> None:
    async with open_daemon(way.proxy, CONFIG) as daemon:
        served = await way.proxy.dump()
        for order in ("revert", "status", "confirm", "handover"):
            tried = await way.proxy.run(*stranger, sys.executable, "-c", ORDERER, order)
            assert tried.stdout == "Connection refused\nOperation not permitted\n"
        assert await way.proxy.dump() == served
        assert await daemon.stop() == 0


@SIDECAR_V4
@STRANGERS
async def test_20_a_stranger_at_the_lock_is_named_and_keeps_nothing_from_being_removed(
    way: Way, stranger: tuple[str, ...]
) -> None:
    """What a daemon left that was killed; the stranger may have waited for that."""
    before = await way.proxy.dump()
    async with open_daemon(way.proxy, CONFIG) as daemon:
        daemon.process.send_signal(signal.SIGKILL)
        await daemon.process.wait()
    async with way.proxy.process(*stranger, sys.executable, "-c", SQUATTER, collect=True) as squatter:
        await squatter.wait_for_output("up")
        named = f"(pid {squatter.pid}) holds the lock of this network namespace"
        told = await tproxyd(way.proxy, "status", code=3)
        assert told.stdout.startswith("daemon   none\n")
        assert named in told.stderr
        assert named in (await tproxyd(way.proxy, "confirm", code=71)).stderr
        assert named in (await tproxyd(way.proxy, "run", "--port", "8080", code=71)).stderr
        done = await tproxyd(way.proxy, "revert", code=0)
        assert "delete table inet tproxyd_guard" in done.stdout
        assert named in done.stderr
        assert await way.proxy.dump() == before
        assert named in (await tproxyd(way.proxy, "status", code=69)).stderr


@SIDECAR_V4
async def test_a_full_queue_is_an_error_and_not_the_absence_of_a_daemon(way: Way) -> None:
    async with open_daemon(way.proxy, CONFIG) as daemon:
        served = await way.proxy.dump()
        daemon.process.send_signal(signal.SIGSTOP)
        with way.proxy.open_socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
            sock.setblocking(False)
            sent = 0
            with pytest.raises(BlockingIOError):
                while sent < 100_000:
                    sock.sendto(b"status\n", (LOCK_PORT, 0))
                    sent += 1
            for verb in ("revert", "status", "confirm"):
                refused = await tproxyd(way.proxy, verb, code=71)
                assert f"(pid {daemon.process.pid}) to {verb}" in refused.stderr
                assert "is it busy?" in refused.stderr
        daemon.process.send_signal(signal.SIGCONT)
        assert await way.proxy.dump() == served
        await tproxyd(way.proxy, "status", code=0)


@SIDECAR_V4
async def test_the_end_of_a_stopped_daemon_is_seen_by_who_waits_for_its_answer(way: Way) -> None:
    before = await way.proxy.dump()
    async with open_daemon(way.proxy, CONFIG) as daemon:
        daemon.process.send_signal(signal.SIGSTOP)
        async with way.proxy.process(*TPROXYD, "revert", collect=True) as revert:
            with trio.fail_after(10):
                while not await waits(way.proxy):
                    await trio.sleep(0.02)
            daemon.process.send_signal(signal.SIGKILL)
            await daemon.process.wait()
            assert await revert.wait() == 0
            assert "delete table inet tproxyd_guard" in revert.stdout_text
    assert await way.proxy.dump() == before


async def waits(node: Node) -> bool:
    """Whether an order waits to be read."""
    rows = (await node.run("cat", "/proc/self/net/netlink")).stdout.splitlines()
    (row,) = [row.split() for row in rows if str(LOCK_PORT) in row.split()]
    return row[4] != "0"


async def test_a_socket_that_only_looks_like_the_lock_is_nobody(sidecar_lab: Lab, tmp_path: Path) -> None:
    host = sidecar_lab["host"]
    async with host.process(sys.executable, "-c", FORGER, str(tmp_path), collect=True) as forger:
        await forger.wait_for_output("up")
        assert (await tproxyd(host, "status", code=69)).stderr == ""
        assert "pid" not in (await tproxyd(host, "confirm", code=69)).stderr
        assert (await tproxyd(host, "revert", code=0)).stdout == "nothing to remove\n"


async def test_an_order_that_fails_is_answered_and_is_not_the_last(sidecar_lab: Lab) -> None:
    done = await sidecar_lab["host"].run(sys.executable, "-c", SERVER)
    lines = done.stdout.splitlines()
    assert [line.partition(") ")[2] or line for line in lines] == [
        "refuses: OSError: [Errno 24] Too many open files",
        "refuses: ZeroDivisionError: a mistake",
        "cannot nonsense",
        "long 1000000",
    ]
    assert done.stderr.count("Traceback") == 2
