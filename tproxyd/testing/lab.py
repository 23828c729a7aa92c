"""A throwaway network of unnamed namespaces that nothing outlives.

Knows how a lab begins and ends. Its namespaces have no names, only descriptors, so nothing is written to /run/netns, the
host's own network is neither read nor changed, and the kernel takes everything back with the last descriptor, also after
SIGKILL of the test run. Processes would keep a namespace alive: the reaper (`reaper`) ends them in both cases. Refuses to
know pytest (`plugin`) and what is tested.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import trio

from tproxyd.daemon.admin_socket import path_in
from tproxyd.errors import CapabilityError
from tproxyd.net.namespaces import new_namespace
from tproxyd.testing import reaper
from tproxyd.testing.build import LabError, build
from tproxyd.testing.node import Node
from tproxyd.testing.topology import Topology

__all__ = ["Lab", "open_lab"]

_REAPER_SECONDS = 10.0  # it ends in some ms; more means that a process of the lab hangs in the kernel


class Lab:
    """The nodes of an open lab, by name: `lab["client"]`."""

    def __init__(self, topology: Topology, nodes: dict[str, Node]) -> None:
        self.topology = topology
        self.nodes = nodes

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())


@asynccontextmanager
async def open_lab(topology: Topology) -> AsyncIterator[Lab]:
    """A running lab; every node reaches every other one when the block begins. Needs root, else LabError in one sentence.

    At the end of the block, or when it is cancelled, every process in the lab is killed and the namespaces go.
    """
    with _reaper() as connection:
        netns: dict[str, int] = {}
        try:
            try:
                for name in topology.node_names():
                    netns[name] = new_namespace()
                    reaper.tell(connection, netns[name])
                # In a worker thread: the first one imports pyroute2, and a lab may be opened while another one is busy.
                await trio.to_thread.run_sync(build, topology, netns)
            except CapabilityError as error:
                raise LabError(f"a lab needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN): {error}") from error
            yield Lab(
                topology, {name: Node(name, fd, tuple(topology.addresses_of(name))) for name, fd in netns.items()}
            )
        finally:
            try:
                _kill_all(netns)
            finally:
                for fd in netns.values():
                    with suppress(OSError):  # of a daemon that was killed there
                        os.unlink(path_in(os.fstat(fd).st_ino))
                    os.close(fd)


def _kill_all(netns: dict[str, int]) -> None:
    # Blocks the loop for the some ms that this takes, which spares a shield and a thread in an ending that may be cancelled.
    survivors = reaper.kill_everything_in({reaper.identity(fd) for fd in netns.values()})
    if survivors:
        raise LabError(
            f"processes {survivors} of the lab survived SIGKILL; they hang in the kernel (see /proc/PID/stack)"
        )


@contextmanager
def _reaper() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            # -I -S: no site-packages, no environment, so it starts in a few ms. It must not hold the run's own outputs open:
            # a pipe behind pytest would not see its end before the reaper's.
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(reaper.__file__)), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                cwd="/",
            )
        try:
            yield ours
        finally:
            # Not only close(): a child that a test forked without exec has a copy of our end, and the reaper waits for the last.
            ours.shutdown(socket.SHUT_RDWR)
            ours.close()
            try:
                process.wait(_REAPER_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise LabError("the lab's reaper did not end, so a process of the lab is left; look at ps") from None
