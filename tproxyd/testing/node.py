"""One machine of a lab: its addresses, programs, sockets and sysctls.

Knows one network namespace by its descriptor. Refuses to know the other nodes. Blocking work that takes well below a
millisecond (a socket, a sysctl) is done on the spot; whatever runs longer is awaited.
"""

from __future__ import annotations

import ipaddress
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, TypeVar

import trio

from tproxyd.net.namespaces import call_in_namespace, namespace_inode
from tproxyd.testing.build import read_sysctl, write_sysctl
from tproxyd.testing.process import Finished, LabProcess, open_process, run_program
from tproxyd.testing.state import KernelState, read_state

__all__ = ["Node"]

T = TypeVar("T")


class Node:
    """Made by `open_lab`; of no use after the lab has closed."""

    def __init__(self, name: str, netns: int, addresses: Sequence[tuple[str, str]]) -> None:
        self.name = name
        self.netns = netns
        """File descriptor of the namespace; the lab closes it."""
        self.inode = namespace_inode(netns)
        interfaces = [(interface, ipaddress.ip_interface(address)) for interface, address in addresses]
        # The first address counts, so a later one of the same interface must not replace it: hence reversed.
        self.v4_on: Mapping[str, str] = {name: str(at.ip) for name, at in reversed(interfaces) if at.version == 4}
        """First IPv4 address by interface."""
        self.v6_on: Mapping[str, str] = {name: str(at.ip) for name, at in reversed(interfaces) if at.version == 6}
        """First IPv6 address by interface."""
        self.v4 = next((str(at.ip) for _, at in interfaces if at.version == 4), "")
        """First IPv4 address in the topology's order, or ""."""
        self.v6 = next((str(at.ip) for _, at in interfaces if at.version == 6), "")
        """First IPv6 address in the topology's order, or ""."""

    def __repr__(self) -> str:
        return f"<node {self.name} net:[{self.inode}] {self.v4} {self.v6}>"

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Runs a blocking function in a throwaway thread inside the node, and blocks until it has returned."""
        return call_in_namespace(self.netns, function, *args)

    async def call_async(self, function: Callable[..., T], *args: Any) -> T:
        """Like `call`, while the event loop goes on; cancellation waits for the function to return."""
        return await trio.to_thread.run_sync(partial(call_in_namespace, self.netns, function, *args))

    async def run(
        self,
        *argv: str,
        input: str | bytes | None = None,  # noqa: A002  # the name that subprocess.run and trio.run_process use
        check: bool = True,
        timeout: float = 20.0,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
    ) -> Finished:
        """Runs a program to its end; `stdout` and `stderr` of the result are text.

        `env` is added to this process's environment. LabError with all that was printed if it fails (and `check`) or takes
        longer than `timeout` seconds; it is killed then, as on cancellation.
        """
        return await run_program(self.netns, argv, input=input, check=check, timeout=timeout, env=env, cwd=cwd)

    def process(
        self,
        *argv: str,
        stdin: int | None = subprocess.DEVNULL,
        stdout: int | None = None,
        stderr: int | None = None,
        collect: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        pass_fds: Sequence[int] = (),
    ) -> AbstractAsyncContextManager[LabProcess]:
        """`async with node.process("tproxyd", "run", collect=True) as daemon:` kills it at the end of the block.

        Outputs go where the test's own go (pytest shows them), or to a trio stream with PIPE, or with `collect` into
        `stdout_text` / `stderr_text`, for `wait_for_output`. An unread PIPE blocks the program once it is full.
        """
        return open_process(
            self.netns,
            argv,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            collect=collect,
            env=env,
            cwd=cwd,
            pass_fds=pass_fds,
        )

    def open_socket(self, family: int, kind: int = socket.SOCK_STREAM, proto: int = 0) -> socket.socket:
        """A plain socket that belongs to the node, from wherever it is used then. The caller closes it."""
        return self.call(socket.socket, family, kind, proto)

    def listen(self, address: str, port: int = 0, *, backlog: int = 128) -> trio.SocketListener:
        """A TCP listener. IPv6 listeners take IPv6 only, so "0.0.0.0" and "::" can share a port. The caller closes it."""
        sock = self._bound(address, port)
        try:
            sock.listen(backlog)
            return trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        except BaseException:
            sock.close()
            raise

    async def connect(
        self, address: str, port: int, *, source: str | None = None, source_port: int = 0, timeout: float = 5.0
    ) -> trio.SocketStream:
        """A TCP connection from the node. The caller closes it.

        `source` must be an address of the node (an anyip network counts). OSError as the kernel says it; trio.TooSlowError
        if nothing was heard for `timeout` seconds.
        """
        if source is None and source_port:
            source = "::" if ":" in address else "0.0.0.0"  # noqa: S104  # the kernel chooses when it connects
        sock = self._bound(source, source_port) if source is not None else self.open_socket(_family(address))
        connection = trio.socket.from_stdlib_socket(sock)
        try:
            with trio.fail_after(timeout):
                await connection.connect((address, port))
            return trio.SocketStream(connection)
        except BaseException:
            connection.close()
            raise

    def sysctl(self, name: str) -> str:
        """`node.sysctl("net.ipv4.ip_forward")`; write it with slashes where an interface's name has a dot."""
        return self.call(read_sysctl, name)

    def set_sysctl(self, name: str, value: str | int) -> None:
        self.call(write_sysctl, name, str(value))

    async def dump(self) -> KernelState:
        """What the kernel holds for this node, comparable: see KernelState."""
        return await self.call_async(read_state)

    def _bound(self, address: str, port: int) -> socket.socket:
        family = _family(address)
        sock = self.open_socket(family)
        try:
            # A test may take a port again while connections of the one before it are in TIME_WAIT.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address, port))
        except BaseException:
            sock.close()
            raise
        return sock


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
