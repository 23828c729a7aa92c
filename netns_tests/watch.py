"""What tests look at in a running daemon: its processes, their files, memory and time, its metrics; and what a client meets."""

from __future__ import annotations

import array
import fcntl
import os
import re
import socket
import struct
import termios
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import trio

from netns_tests.way import Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import Node
from tproxyd.testing.daemon import LabDaemon, cpu_seconds

__all__ = [
    "METRICS",
    "Http",
    "alive",
    "all_cpu_seconds",
    "another_works",
    "attempt",
    "dial",
    "ends_in_order",
    "ends_within",
    "files_of",
    "full_pipes",
    "get",
    "many",
    "memory_kib",
    "metrics",
    "outcomes",
    "peers_of",
    "processes",
    "pss_kib",
    "relay_processes",
    "reset",
    "resets_within",
    "until",
    "workers",
    "works",
]

METRICS = '[admin]\nmetrics = "127.0.0.1:9101"\n'


def workers(daemon: LabDaemon) -> list[int]:
    """The relay processes, in the order in which they were started. Not what else the daemon starts, such as nft."""
    return relay_processes(daemon.process.pid)


def relay_processes(pid: int) -> list[int]:
    """The same of any process that has an interceptor."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
            children += map(int, (task / "children").read_text().split())
    return sorted(pid for pid in children if "/worker.py" in _command(pid))


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def processes(daemon: LabDaemon) -> list[int]:
    """The daemon and its relay processes."""
    return [daemon.process.pid, *workers(daemon)]


def alive(pid: int) -> bool:
    """Not even a zombie of a dead daemon's counts."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def files_of(pid: int) -> Counter[str]:
    """Open files of a process beyond its standard streams, by kind: pipe, socket, anon_inode:[eventpoll], and paths as they are."""
    found: Counter[str] = Counter()
    for name in os.listdir(f"/proc/{pid}/fd"):
        if int(name) > 2:
            with suppress(FileNotFoundError):
                found[os.readlink(f"/proc/{pid}/fd/{name}").partition(":[")[0]] += 1
    return found


def full_pipes(pid: int) -> list[str]:
    """Those from which the process could still read something that it wrote itself."""
    ends: dict[str, dict[int, str]] = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        with suppress(FileNotFoundError):
            target = os.readlink(path)
            if target.startswith("pipe:"):
                ends.setdefault(target, {})[os.stat(path, follow_symlinks=False).st_mode & 0o700] = path
    found = []
    for target, paths in ends.items():
        if len(paths) < 2:
            continue  # the other end is somebody else's: its output
        waiting = array.array("i", [0])
        fd = os.open(next(iter(paths.values())), os.O_RDONLY | os.O_NONBLOCK)
        try:
            fcntl.ioctl(fd, termios.FIONREAD, waiting)
        finally:
            os.close(fd)
        if waiting[0]:
            found.append(f"{pid}: {target} holds {waiting[0]} bytes")
    return found


def memory_kib(daemon: LabDaemon, *, anonymous: bool = False) -> int:
    """Proportional set size of all processes together: pages that they share count once.

    With `anonymous` without the pages of files, whose shares change when somebody else's Python begins or ends.
    """
    return pss_kib(processes(daemon), anonymous=anonymous)


def pss_kib(pids: Iterable[int], *, anonymous: bool = False) -> int:
    """The same of any processes."""
    key = "Pss_Anon" if anonymous else "Pss"
    total = 0
    for pid in pids:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += int(re.search(rf"^{key}:\s+(\d+) kB", rollup, re.M)[1])  # type: ignore[index]  # every process has it
    return total


def all_cpu_seconds(daemon: LabDaemon) -> float:
    """User and system time of all processes together."""
    return sum(map(cpu_seconds, processes(daemon)))


def peers_of(pid: int) -> list[str]:
    """The peers' addresses of a process's TCP connections, in hexadecimal as /proc/net/tcp has them; listeners have none."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(fd)
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    peers = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] != "0A" and fields[9] in inodes:
                peers.append(fields[2].partition(":")[0])
    return peers


def outcomes(daemon: LabDaemon) -> Counter[str]:
    """How many connections ended in which way, by the access log so far."""
    return Counter(record["outcome"] for record in daemon.records())


async def until(condition: Callable[[], object], *, within: float = 5.0) -> None:
    """Looks again and again until it is so; TooSlowError if that takes longer."""
    with trio.fail_after(within):
        while not condition():
            await trio.sleep(0.01)


async def dial(node: Node, address: str, port: int = 8080, *, source: str | None = None) -> trio.SocketStream | None:
    """A connection; None when it was reset before connect() returned."""
    try:
        return await node.connect(address, port, source=source)
    except ConnectionResetError:
        return None


async def ends_within(stream: trio.SocketStream, seconds: float) -> bool:
    """Whether it ends in that time, in order or with a reset: sockets of a process that was killed are closed by the kernel,
    which resets only where there is something unread."""
    with trio.move_on_after(seconds):
        try:
            while await stream.receive_some(65536):
                pass
        except trio.BrokenResourceError:
            pass
        return True
    return False


async def resets_within(stream: trio.SocketStream | None, seconds: float) -> bool:
    """Whether the peer resets it in that time. Bytes that come before are read; an orderly end is none, and a failure."""
    if stream is None:
        return True
    with trio.move_on_after(seconds):
        try:
            while await stream.receive_some(65536):
                pass
        except trio.BrokenResourceError:
            return True
        raise AssertionError("an orderly end instead of a reset")
    return False


async def works(stream: trio.SocketStream) -> None:
    """It answers, as an echo does."""
    with trio.fail_after(5):
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"


async def ends_in_order(stream: trio.SocketStream) -> None:
    """The client has said all, and so has the app then."""
    await stream.send_eof()
    assert await stream.receive_some() == b""


async def another_works(way: Way) -> None:
    """Whoever connects now is served, by an echo."""
    async with await way.client.connect(way.address, 8080) as stream:
        await works(stream)


async def attempt(node: Node, address: str, port: int = 8080, *, source_port: int = 0) -> str:
    """A connection that has to be reset instead of served. Its client address; "" if connect() already failed and no port was given."""
    try:
        stream = await node.connect(address, port, source_port=source_port)
    except ConnectionResetError:
        return format_address((node.v6 if ":" in address else node.v4, source_port)) if source_port else ""
    async with stream:
        own = format_address(stream.socket.getsockname())
        assert await resets_within(stream, 3)
    return own


async def reset(stream: trio.SocketStream) -> None:
    """Closes with a reset instead of a FIN; what is unsent is dropped. Closed already is fine."""
    if stream.socket.fileno() >= 0:
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await stream.aclose()


class Http:
    """An answer over HTTP."""

    def __init__(self, data: bytes) -> None:
        head, _, self.body = data.partition(b"\r\n\r\n")
        self.head = head.decode()
        self.status = int(self.head.split()[1]) if head else 0


async def get(node: Node, path: str, *, port: int = 9101, method: str = "GET", within: float = 5.0) -> Http:
    """One request to 127.0.0.1 in the node, and its answer to the end."""
    with trio.fail_after(within):
        async with await node.connect("127.0.0.1", port) as stream:
            await stream.send_all(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            return Http(b"".join([chunk async for chunk in stream]))


async def metrics(node: Node) -> dict[str, float]:
    """The values of /metrics by name and labels, with the label of the workload left out."""
    answer = await get(node, "/metrics")
    assert answer.status == 200
    found = {}
    for line in answer.body.decode().splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = re.sub(r',?workload="host"', "", name).replace("{,", "{").replace("{}", "")
            found[name] = float(value)
    return found


@asynccontextmanager
async def many(
    node: Node, address: str, count: int, *, source: str | None = None
) -> AsyncIterator[list[trio.SocketStream]]:
    """So many connections to port 8080, which are closed at the end of the block."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(await node.connect(address, 8080, source=source)) for _ in range(count)]
