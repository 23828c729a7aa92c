"""The network, the server in it, and what makes a measurement one: proof that the proxy was in the path.

Knows client - gateway - server of the lab, the clients and server of `load.c`, and how one cell is measured. Refuses to know which cells there are
(`cells`) and what their figures mean.

The proof, cell by cell:
- before a peer starts nobody listens on its port; after that, nobody but it and its children;
- the counter of the rule that steers (nft table `inet tproxyd`, chain `take`) has grown by as many SYNs as the client has opened connections.
  The rule counts only what a listener took. Without a proxy it must not have grown at all;
- the proxy's processes have used CPU time;
- the server has seen the client's own address in every connection, and its port unless the peer is known not to keep it.

A cell that lacks one of these is an error and has no figures.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import PIPE
from typing import Any

import trio

from bench.peers import CAPTURE, LISTEN_PORT, Peer, Place
from bench.usage import cpu_seconds, machine_seconds, own_seconds, pss_kib, tree
from tproxyd.testing import GATEWAY, Lab, LabError, LabProcess, Node, open_lab
from tproxyd.testing.daemon import TPROXYD

__all__ = ["Cell", "Rig", "UnprovenError", "Visit", "apply_config", "as_row", "open_rig"]

# Every visit has addresses of its own on both sides, because sockets in TIME_WAIT outlive the proxy that had them by a minute. A SYN for
# such a connection is delivered to it instead of going on to the server (seen: 574 of 11,000 connections without a proxy); hence the
# destinations. Envoy and nginx, which bind without SO_REUSEADDR, leave ports behind that nobody can bind to (seen: 186 of 4,972 connections
# of the next peer failed); hence the sources.
_DESTINATION = "203.0.113.{}"
_DESTINATIONS = range(9, 255)
_SOURCE = "192.0.2.{}"
_BLOCK = 16
"""So many addresses a visit's clients have: one half for the load, so that 64,512 ports are no limit, the other for idle connections. Had these
the same, nginx could not bind to some of the load's ports."""
_SOURCES = range(2, 2 + 15 * _BLOCK)  # the gateway has the first of the /24
"""Then the first block is used again; in a run of all peers that is more than a minute later."""

_PATIENCE = 40.0  # seconds that a client may take: 8,000 slow connections one after the other are the longest
_READY_SECONDS = 10.0  # until a peer listens; Envoy takes about one
_LOST_SHARE = 0.001  # so many of the connections may fail; more is an error and no measurement


class UnprovenError(Exception):
    """The proxy was not in the path, or not alone, or something failed: there is no figure."""


@dataclass(frozen=True)
class Cell:
    """What one measurement gave: the client's numbers and the proxy's cost."""

    client: dict[str, float]
    server: dict[str, int]
    cpu: float
    """Seconds of all the proxy's processes."""
    cpu_by_process: dict[int, float]
    steered: int
    others: float
    """Share of the machine's cores that was used by programs which have nothing to do with the benchmark, from 0 to 1."""


@dataclass(frozen=True)
class _Before:
    """What a cell is measured against."""

    steered: int
    cpu: dict[int, float]
    ours: float
    machine: float
    time: float


class Rig:
    """An open lab with the server in it. Made by `open_rig`."""

    def __init__(self, lab: Lab, place: Place, server: LabProcess) -> None:
        self.lab, self.place, self.server = lab, place, server
        self.client, self.gateway = lab["client"], lab["gateway"]
        self.others: list[float] = []
        """By cell."""
        self.helpers: list[int] = []
        """Other processes that belong to what is measured at the moment: what they use is not others'."""
        self._unread = b""
        self._addresses = zip(itertools.cycle(_DESTINATIONS), itertools.cycle(_SOURCES[::_BLOCK]), strict=False)

    async def server_figures(self) -> dict[str, int]:
        """Since the last time."""
        assert self.server.stdin is not None
        await self.server.stdin.send_all(b"\n")
        figures: dict[str, int] = json.loads(await self._server_line())
        return figures

    async def _server_line(self) -> bytes:
        assert self.server.stdout is not None
        with trio.fail_after(10):
            while b"\n" not in self._unread:
                chunk = await self.server.stdout.receive_some(4096)
                if not chunk:
                    raise LabError("the benchmark's server has ended")
                self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def next_addresses(self) -> tuple[int, int]:
        """The last bytes of a visit's destination and of the first of its sources."""
        return next(self._addresses)

    async def steered(self) -> int:
        """SYNs that were given to a listener, since the table was loaded; 0 where it is not."""
        done = await self.gateway.run("nft", "-j", "list", "chain", "inet", "tproxyd", "take", check=False)
        if done.returncode != 0:
            return 0
        listing = json.loads(done.stdout)
        rules = [entry["rule"]["expr"] for entry in listing["nftables"] if "rule" in entry]
        return sum(expression["counter"]["packets"] for rule in rules for expression in rule if "counter" in expression)

    @asynccontextmanager
    async def visit(self, peer: Peer) -> AsyncIterator[Visit]:
        """Starts the peer, and ends it and all that it has started."""
        if holders := await self._listeners():
            raise UnprovenError(f"port {LISTEN_PORT} is taken before {peer.name} starts: {holders}")
        family: list[int] = []
        began = trio.current_time()
        try:
            async with peer.start(self.place) as process:
                try:
                    if process is not None:
                        await self._wait_until_it_listens(peer, process)
                    yield Visit(self, peer, process, trio.current_time() - began)
                finally:
                    family = tree(process.pid) if process is not None else []
        finally:
            for pid in family:
                _kill_if_in(self.gateway, pid)

    async def _listeners(self) -> list[str]:
        """Inodes of the sockets that listen on the port. By netlink: /proc/net/tcp has to walk past 100,000 in TIME_WAIT."""
        listing = (await self.gateway.run("ss", "-Hltne", f"sport = :{LISTEN_PORT}")).stdout
        return re.findall(r" ino:([0-9]+) ", listing)

    async def _wait_until_it_listens(self, peer: Peer, process: LabProcess) -> None:
        with trio.move_on_after(_READY_SECONDS):
            while process.returncode is None:
                inodes = await self._listeners()
                if inodes:
                    await trio.to_thread.run_sync(_require_alone, peer, inodes, tree(process.pid))
                    return
                await trio.sleep(0.01)
        raise UnprovenError(f"{peer.name} does not listen\n{process.stdout_text}{process.stderr_text}")


class Visit:
    """A peer's turn: it runs, and cells are measured one after the other."""

    def __init__(self, rig: Rig, peer: Peer, process: LabProcess | None, start_seconds: float) -> None:
        self.rig, self.peer, self.process, self.start_seconds = rig, peer, process, start_seconds
        self._destination, self._sources = rig.next_addresses()

    def pids(self) -> list[int]:
        return tree(self.process.pid) if self.process is not None else []

    def memory_kib(self) -> int:
        return pss_kib(self.pids())

    def _client(self, mode: str, *words: object) -> list[str]:
        """The command line of a client."""
        half = _BLOCK // 2
        to = _DESTINATION.format(self._destination)
        first = _SOURCE.format(self._sources + (half if mode == "idle" else 0))
        return [self.rig.place.programs["load"], mode, to, first, str(half), *map(str, words)]

    async def measure(self, mode: str, *words: object) -> Cell:
        """One client to its end, with proof. Raises UnprovenError."""
        before = await self._before()
        client = self._client(mode, *words)
        numbers = json.loads((await self.rig.client.run(*client, timeout=_PATIENCE)).stdout)
        cell = await self._proven(numbers, before)
        self.rig.others.append(cell.others)
        return cell

    @asynccontextmanager
    async def idle_connections(self, count: int) -> AsyncIterator[int]:
        """So many connections that have had one request each and are silent now. Gives how many there are."""
        before = await self._before()
        words = self._client("idle", count)
        async with self.rig.client.process(*words, stdin=PIPE, stdout=PIPE) as holder:
            assert holder.stdout is not None
            line = b""
            with trio.fail_after(_PATIENCE):
                while not line.endswith(b"\n"):
                    chunk = await holder.stdout.receive_some(4096)
                    if not chunk:
                        raise UnprovenError(f"{self.peer.name}: the client with the idle connections has ended")
                    line += chunk
            await self._proven(json.loads(line), before)
            yield count

    async def _before(self) -> _Before:
        await self.rig.server_figures()
        steered = await self.rig.steered()
        return _Before(steered, cpu_seconds(self.pids()), self._ours(), machine_seconds(), trio.current_time())

    def _ours(self) -> float:
        """CPU time of everything that runs because of the benchmark, as far as it can be told while it runs."""
        return own_seconds() + sum(cpu_seconds([self.rig.server.pid, *self.rig.helpers, *self.pids()]).values())

    async def _proven(self, numbers: dict[str, float], before: _Before) -> Cell:
        now, ours = cpu_seconds(self.pids()), self._ours() - before.ours
        available = (trio.current_time() - before.time) * (os.cpu_count() or 1)
        others = max(0.0, machine_seconds() - before.machine - ours) / available
        by_process = {pid: seconds - before.cpu.get(pid, 0.0) for pid, seconds in now.items()}
        steered = await self.rig.steered() - before.steered
        server = await self.rig.server_figures()
        cell = Cell(numbers, server, sum(by_process.values()), by_process, steered, others)
        _check(self.peer, self.process, cell)
        return cell


def _check(peer: Peer, process: LabProcess | None, cell: Cell) -> None:
    opened, failed = int(cell.client["opened"]), int(cell.client["failed"])
    wrong = []
    if process is not None and process.returncode is not None:
        wrong.append(f"it has ended with {process.returncode}: {process.stderr_text}")
    if failed > opened * _LOST_SHARE:
        wrong.append(f"{failed} of {opened} connections failed")
    if peer.proxied and cell.steered < opened - failed:
        wrong.append(f"only {cell.steered} of {opened} connections were steered")
    if not peer.proxied and cell.steered:
        wrong.append(f"{cell.steered} connections were steered, and there is no proxy")
    if peer.proxied and cell.cpu <= 0:
        wrong.append("it used no CPU time")
    if cell.server["accepted"] < opened - failed:
        wrong.append(f"the server saw {cell.server['accepted']} of {opened} connections")
    if cell.server["other_address"]:
        wrong.append(f"{cell.server['other_address']} connections came from another address than the client's")
    if peer.keeps_port and cell.server["same_port"] < cell.server["same_address"]:
        wrong.append(f"only {cell.server['same_port']} of {cell.server['same_address']} had the client's port")
    if wrong:
        raise UnprovenError(f"{peer.name}: {'; '.join(wrong)}")


@asynccontextmanager
async def open_rig(programs: dict[str, str], directory: Path, config: str = CAPTURE) -> AsyncIterator[Rig]:
    """Opens the lab, applies the capture in the gateway, starts the server."""
    extra = tuple(("client:eth0", f"{_SOURCE.format(number)}/24") for number in _SOURCES[1:])
    async with open_lab(replace(GATEWAY, addresses=extra)) as lab:
        lab["client"].set_sysctl("net.ipv4.ip_local_port_range", "1024 65535")
        lab["client"].set_sysctl("net.ipv4.tcp_tw_reuse", 1)
        # Envoy's own outgoing ports: the listener's must not be among them.
        lab["gateway"].set_sysctl("net.ipv4.ip_local_reserved_ports", LISTEN_PORT)
        for node in lab:
            node.set_sysctl("net.core.somaxconn", 4096)
        await apply_config(lab["gateway"], directory, config)
        async with lab["server"].process(programs["load"], "serve", "0.0.0.0", stdin=PIPE, stdout=PIPE) as server:  # noqa: S104  # a throwaway node
            rig = Rig(lab, Place(lab["gateway"], directory, programs), server)
            await rig._server_line()
            yield rig


async def apply_config(node: Node, directory: Path, config: str) -> None:
    """`tproxyd apply`: the state stays when a daemon that has found it ends."""
    file = directory / "tproxyd.toml"
    file.write_text(config, encoding="utf-8")
    await node.run(*TPROXYD, "apply", "-c", str(file))


def _require_alone(peer: Peer, inodes: list[str], family: list[int]) -> None:
    theirs: set[str] = set()
    for pid in family:
        with suppress(FileNotFoundError, ProcessLookupError):  # a child that has ended meanwhile, such as nft
            for name in os.listdir(f"/proc/{pid}/fd"):
                with suppress(FileNotFoundError):
                    theirs.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    if strangers := [inode for inode in inodes if f"socket:[{inode}]" not in theirs]:
        raise UnprovenError(f"{peer.name} is not alone on port {LISTEN_PORT}: sockets {strangers}")


def _kill_if_in(node: Node, pid: int) -> None:
    # By number, and only if it still is what it was: a process of this very namespace.
    try:
        if os.stat(f"/proc/{pid}/ns/net").st_ino == node.inode:
            os.kill(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        pass


def as_row(cell: Cell) -> dict[str, Any]:
    """For the raw data."""
    return {
        "client": cell.client,
        "server": cell.server,
        "cpu_s": round(cell.cpu, 6),
        "steered": cell.steered,
        "others": round(cell.others, 3),
    }
