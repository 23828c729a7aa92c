"""The upstream socket: bound as `policy.sources` has chosen, and connecting. Knows ports; refuses to know what the connection is for.

A port that is chosen here, towards an app of this host and in a client's name, must not be one that the client has itself to that app: our
SYN would reach the client's connection, and the answers end it. The kernel cannot tell (for it these are two different ends), so it is
asked whether there is such a connection. When the client chooses our port afterwards, its SYN is dropped by the ruleset, and it tries
again.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable

from tproxyd.config import Config
from tproxyd.net.ports import PortChoice, read_port_choice
from tproxyd.net.sock_diag import TIME_WAIT, TcpStates
from tproxyd.net.sockets import Address, can_share_ports, open_unix_upstream, open_upstream, source_towards
from tproxyd.policy import Choice, Way

__all__ = ["Dialled", "Dialler"]

Dialled = tuple[socket.SocketType | None, int]
"""A socket that is connecting (EINPROGRESS), or connected (0); or None, and the kernel's number for why not."""

_TAKEN = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
# Ports that are tried: of the parity that clients leave alone, and only free ones at first; then those in TIME_WAIT, too, which are from
# connections of ours to the app most likely; then any. With nine of ten ports in use the last one fails once in a thousand times.
_FREE, _OTHER, _ANY = 8, 24, 32
_CHOSEN: tuple[Way, ...] = ("chosen_port", "pool", "proxy")


class Dialler:
    """Opens upstream sockets, for one relay loop, in the namespace in which it was made. Close it."""

    def __init__(self, config: Config) -> None:
        self._transparent = not config.redirects
        self._listen_ports = {config.listen.port}
        self._ports = self._read_ports()
        self._states = TcpStates()
        self._shares = can_share_ports()
        self._next = 0
        self._ways: dict[Way, Callable[[Choice, Address, Address], Dialled]] = {
            "client": self._as_client,
            "client_ip": self._as_address,
            "chosen_port": self._with_chosen_port,
            "pool": self._from_pool,
            "proxy": self._as_ourselves,
        }

    def close(self) -> None:
        """Closes what it asks with; sockets that it has opened are their callers'."""
        self._states.close()
        self._ways.clear()  # methods of its own: in a relay process, which looks for garbage seldom, it would stay for long

    def spare(self, port: int) -> None:
        """A listener is at this port, too, from now on."""
        if port not in self._listen_ports:
            self._listen_ports.add(port)
            with contextlib.suppress(OSError):  # as below
                self._ports = self._read_ports()

    def dial(self, choice: Choice, client: Address, target: Address) -> tuple[socket.SocketType | None, int, Way]:
        """Tries the ways of the choice in their order, of which there is one; the next one where a port cannot be had. With the last one that
        was tried. The caller closes the socket."""
        for way in choice.ways:
            sock, number = self._ways[way](choice, client, target)
            if number in _TAKEN and way in _CHOSEN and self._has_other_ports():
                sock, number = self._ways[way](choice, client, target)
            if number not in _TAKEN:
                break
        return sock, number, way

    def dial_unix(self, path: str) -> Dialled:
        """To a Unix socket. EAGAIN: its queue is full at the moment."""
        sock = open_unix_upstream()
        try:
            number = sock.connect_ex(path)
        except BaseException:
            sock.close()
            raise
        if number:
            sock.close()
            return None, number
        return sock, 0

    def _read_ports(self) -> PortChoice:
        return read_port_choice(
            *self._listen_ports
        )  # at the listener's own, whoever looks at sockets takes it for that

    def _has_other_ports(self) -> bool:
        """Whether the range has been changed meanwhile, which is what somebody does who has none left."""
        before = self._ports
        with contextlib.suppress(OSError):  # no file to read with: it goes on with those that it knows
            self._ports = self._read_ports()
        return self._ports != before

    def _as_client(self, choice: Choice, client: Address, target: Address) -> Dialled:
        if "chosen_port" in choice.ways and self._states.state(target[:2], client[:2]) not in (None, TIME_WAIT):
            # The client itself is connected so, past us; or the app has not done with our last one.
            return None, errno.EADDRINUSE
        return self._try(client, target)

    def _as_address(self, _: Choice, client: Address, target: Address) -> Dialled:
        return self._try((client[0], 0, *client[2:]), target)  # an IPv6 one keeps its scope

    def _with_chosen_port(self, _: Choice, client: Address, target: Address) -> Dialled:
        host, rest = client[0], client[2:]
        sock, number = None, errno.EADDRNOTAVAIL
        ports = self._ports
        for some, used in ((ports.others(_FREE), False), (ports.others(_OTHER), True), (ports.any(_ANY), True)):
            for port in some:
                state = self._states.state(target[:2], (host, port))
                if state is None or (used and state == TIME_WAIT):
                    sock, number = self._try((host, port, *rest), target)
                    if number not in _TAKEN:
                        return sock, number
        return sock, number

    def _from_pool(self, choice: Choice, client: Address, target: Address) -> Dialled:
        """The addresses in turn."""
        sock, number = None, errno.EADDRNOTAVAIL
        for _ in choice.pool:
            self._next = (self._next + 1) % len(choice.pool)
            sock, number = self._try((choice.pool[self._next], 0), target)
            if number not in _TAKEN:
                return sock, number
        return self._with_used_port(choice.pool, target)

    def _as_ourselves(self, choice: Choice, client: Address, target: Address) -> Dialled:
        sock, number = self._try(None, target)
        if number in _TAKEN:
            with contextlib.suppress(OSError):  # there is no way to it any more
                return self._with_used_port((source_towards(target),), target)
        return sock, number

    def _with_used_port(self, hosts: tuple[str, ...], target: Address) -> Dialled:
        """The kernel has none to give: it spares what is in TIME_WAIT, each port for a minute, and what others are bound to. Whoever binds to
        a port gets it all the same."""
        sock, number = None, errno.EADDRNOTAVAIL
        for host in hosts:
            for port in self._ports.any(_ANY):
                sock, number = self._try((host, port), target)
                if number not in _TAKEN:
                    return sock, number
        return sock, number

    def _try(self, source: Address | None, target: Address) -> Dialled:
        ports = self._ports
        if source is not None and self._shares and ports.first <= source[1] <= ports.last:
            sock, number = self._open(source, target, shared=True)
            if (
                sock is not None and sock.getsockname()[1] != source[1]
            ):  # the range has been changed, and is not minded then
                sock.close()
            elif number != errno.EADDRNOTAVAIL:
                return sock, number
        return self._open(source, target)

    def _open(self, source: Address | None, target: Address, *, shared: bool = False) -> Dialled:
        family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        sock: socket.SocketType | None = None
        try:
            sock = open_upstream(family, source=source, transparent=self._transparent, shared=shared)
            number = sock.connect_ex(target)
        except OSError as error:
            number = error.errno or errno.EIO
            if number == errno.EACCES and sock is None:
                number = errno.EADDRINUSE  # a port below 1024, without CAP_NET_BIND_SERVICE
        if number in (errno.EINPROGRESS, 0):
            return sock, number
        if sock is not None:
            sock.close()
        return None, number
