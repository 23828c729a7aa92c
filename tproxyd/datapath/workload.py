"""What a relay loop knows of one namespace that it serves: its listeners, and what its configuration says about their connections.

A loop serves any number of them. Sockets belong to the namespace in which they are made, and are served from wherever the loop's thread
is: so before it makes one for an upstream, the thread goes there (`enter`), and stays until it has to be elsewhere. There is no way
back that could fail: whatever the thread makes belongs to a workload, and every one begins with going there.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, cast

from tproxyd.config import Config, Endpoint
from tproxyd.datapath.dial import Dialler
from tproxyd.datapath.opening import compile_networks
from tproxyd.datapath.report import Counters, WorkloadSetup
from tproxyd.net.locality import Locality
from tproxyd.net.namespaces import enter_namespace
from tproxyd.net.sockets import Address, original_destination, redirected_destination
from tproxyd.policy import compile_policy, compile_source

if TYPE_CHECKING:
    from tproxyd.datapath.connection import Connection
    from tproxyd.datapath.timers import Wheel

__all__ = ["Place", "Workload"]


class Place:
    """Where the loop's thread is, and where it came from: `home` is a descriptor of that namespace. Close it."""

    def __init__(self) -> None:
        self.home = self._here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Closes the descriptor; the thread stays where it is."""
        os.close(self.home)

    def enter(self, netns: int) -> None:
        """Goes there, if the thread is not there already. Raises TproxydError."""
        if netns != self._here:
            enter_namespace(netns)
            self._here = netns

    def forget(self, netns: int) -> None:
        """This descriptor will be closed, and may be another namespace's then."""
        if netns == self._here:
            self._here = -1


class Workload:
    """Made by the loop, with everything that it was given; `close` closes all of that. The sockets that it asks the kernel by are of its
    namespace.

    `wheel` gives the loop's wheel of a kind and a time-out, and `settling` is after how many seconds a connection
    is one that stays. Raises OSError or TproxydError, with everything closed.

    `before` is the one whose place this takes, under another configuration: it has the same counters, connections and sockets to ask by, and it is this one
    that will close them. A connection stays with the one to which it came (`living` counts them), and so everything about it is as was said then.
    """

    def __init__(
        self,
        setup: WorkloadSetup,
        listeners: Sequence[socket.socket],
        netns: int,
        place: Place,
        wheel: Callable[[str, float], Wheel[Connection]],
        *,
        settling: float,
        before: Workload | None = None,
    ) -> None:
        config = setup.config
        self.name = setup.name
        self.generation = setup.generation
        self.capture = config.capture
        self.listeners = list(listeners)
        self.counters: Counters = Counters() if before is None else before.counters
        self.connections: set[Connection] = set() if before is None else before.connections
        self.living = 0
        self.retired = False  # another one has taken its place
        self.waiting: dict[Connection, None] = {}  # for room in the queue of the Unix socket, in the order of arrival
        self.tells_idle = False
        self.paused = setup.paused
        # A connection stays where it waited for its upstream, and what it waits for now is asked when that time is up: most have
        # ended by then, and have entered one wheel instead of three.
        self._connect_timeout = config.upstream.connect_timeout
        self.settle_after(settling)
        self._place = place
        self._given = netns
        # The loop's own needs no privilege to be entered.
        self.netns = place.home if os.path.sameopenfile(netns, place.home) else netns
        self._dials_at = place.home if setup.dial == "agent" else self.netns
        self.dials_elsewhere = self._dials_at != self.netns
        self._takes_port = config.capture.takes_port
        self._listen_ports = frozenset((config.listen.port, *setup.closing))
        self._listen_hosts = frozenset(host for host, _ in setup.listen)

        self.choose_source = compile_source(config)
        self.target_of = _target_of(config)
        self.original_destination = redirected_destination if config.redirects else original_destination
        self.decide = compile_policy(config.policy)
        self.dialling = wheel("dial", config.upstream.connect_timeout)
        # PROXY headers, and the ClientHello that goes into one: None where there are none, which is all that others pay for them.
        version = config.upstream.proxy_protocol
        self.header_version = version if version != "off" else None
        sniffs = version == "v2" and config.policy.sniff_timeout > 0
        self.sniffing = wheel("open", config.policy.sniff_timeout) if sniffs else None
        trusted = config.listen.proxy_protocol_from
        self.begins_with_header = compile_networks(trusted) if trusted else None
        # What `socket.accept` is made of, without the second object and its getsockname.
        self.accepts: dict[socket.socket, tuple[int, Callable[[], tuple[int, Address]]]] = {
            listener: (listener.family, cast(Any, listener)._accept) for listener in listeners
        }
        self.localities: list[Locality] = []
        self.dialler: Dialler | None = None
        if before is not None:
            self._take_over(before, config.listen.port)
        else:
            try:
                place.enter(self.netns)
                self.localities.append(Locality())
                place.enter(self._dials_at)
                if self.dials_elsewhere:
                    self.localities.append(Locality())
                self.dialler = Dialler(config)
            except BaseException:
                self.close()
                raise
        self.is_local = self.localities[0].is_local
        self.is_local_target = self.localities[-1].is_local

    def _take_over(self, before: Workload, listen_port: int) -> None:
        os.close(self._given)
        self._given, before._given = before._given, -1
        self.netns, self._dials_at, self.dials_elsewhere = before.netns, before._dials_at, before.dials_elsewhere
        self.localities, self.dialler = before.localities, before.dialler
        before.retired = True
        if self.dialler is not None:
            self.dialler.spare(listen_port)

    def settle_after(self, seconds: float) -> None:
        """From now on a connection is one that stays after so many."""
        self.lazy = self._connect_timeout <= seconds

    def close(self) -> None:
        """Closes the listeners first, then what it asks with, and its namespace. Harmless when repeated."""
        self.close_listeners()
        for locality in self.localities:
            locality.close()
        if self.dialler is not None:
            self.dialler.close()
        if self._given >= 0:
            self._place.forget(self._given)
            os.close(self._given)
            self._given = -1

    def close_listeners(self) -> None:
        """Nothing is accepted any more, however much room there is."""
        for listener in self.listeners:
            listener.close()
        self.listeners = []

    def enter(self) -> Dialler:
        """What opens upstream sockets, where they belong. Raises TproxydError if there is no way into the namespace."""
        assert self.dialler is not None
        self._place.enter(self._dials_at)
        return self.dialler

    def is_listener(self, address: Address | tuple[str, int], *, local: bool) -> bool:
        """Whether nobody but us can be meant: a listener's own address, or its port at another address of this host."""
        return address[1] in self._listen_ports and (local or address[0] in self._listen_hosts)

    def is_nobody(self, host: str) -> bool:
        """Whether no connection can come from there: it is no address at all, or that of many. Only a header can tell of one, and to a socket that
        is bound to it the kernel gives an address of this host."""
        if host in ("::", "255.255.255.255") or ip_address(host).is_multicast:
            return True
        return self.localities[0].look_up(host).kind == "broadcast"

    def comes_back(self, target: Address | str) -> bool:
        """Where upstreams are dialled elsewhere: whether this one is the workload itself, at a port that it captures. Then the connection arrives at
        the listener again, as a new one of the program's, and so on without an end."""
        if isinstance(target, str) or not self._takes_port(target[1]):
            return False
        return self.is_local(target[0]) and not self.is_local_target(target[0])


def _target_of(config: Config) -> Callable[[Address], Address | str]:
    """From what a client has dialled to what is dialled then, where no policy rule says it: `upstream.target`."""
    target = config.upstream.target
    if target == "original":
        return lambda destination: destination
    if target == "loopback":
        return lambda destination: ("::1" if ":" in destination[0] else "127.0.0.1", destination[1])
    fixed = (target.host, target.port) if isinstance(target, Endpoint) else target.path
    return lambda destination: fixed
