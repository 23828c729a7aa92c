"""One namespace's interception: listeners, kernel state and a place in the relay loops, put together and taken apart in the right order.

Listeners first, then the loops that serve them, then the kernel's state with capture last; at the end capture first, then the connections,
then everything else. Cancelled or broken anywhere, the kernel is left as if this had never run.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Literal, TypeVar

import trio

from tproxyd.config import Config
from tproxyd.datapath import WorkloadSetup
from tproxyd.errors import KernelError, TproxydError
from tproxyd.interceptor.keeper import Keeper
from tproxyd.interceptor.relays import Relays
from tproxyd.interceptor.threads import in_thread
from tproxyd.net.namespaces import call_in_namespace
from tproxyd.net.proc_net import Connections, closing_connections, half_open_connections, port_holder
from tproxyd.net.sockets import equip_listener, format_address, listening_address, open_listener, spread_by_source

__all__ = ["Capture", "Listeners", "open_listeners", "require_free_port"]

_log = logging.getLogger(__name__)

_STUCK = 3.0  # seconds without progress: a packet and its retransmissions after one and two more
_POLL, _POLL_SELDOM = (
    0.02,
    0.3,
)  # seconds, twice as many each time nothing has moved; the kernel has no event for either of what is waited for

T = TypeVar("T")
Listeners = list[list[socket.socket]]
"""Of each loop its own."""


class Capture:
    """What `open` needs, ready: `config` of the namespace that `netns` is a descriptor of, and what keeps its kernel state. `another`: it is not
    the program's own. `threads`: in how many of them the kernel is asked at a time. The caller closes keeper, listeners and descriptor, after `open`."""

    def __init__(
        self,
        name: str,
        config: Config,
        *,
        keeper: Keeper,
        relays: Relays,
        netns: int,
        another: bool,
        dial: Literal["workload", "agent"] = "workload",
        threads: trio.CapacityLimiter | None = None,
    ) -> None:
        self.name, self.config, self.keeper = name, config, keeper
        self._relays = relays
        self._netns = netns
        self._another = another
        self._dial: Literal["workload", "agent"] = dial
        self._threads = threads
        self._drains: set[trio.CancelScope] = set()
        self._drained = trio.lowlevel.ParkingLot()  # where the end of one of them is waited for
        self._ended = False
        self._keep: Callable[[Sequence[Sequence[socket.socket]]], bool] | None = None
        self.left = False
        """Whether it was left to a successor."""

    @asynccontextmanager
    async def open(self, listeners: Listeners) -> AsyncIterator[None]:
        """Captures for the length of the block. On entry the kernel holds what was planned, and the loops have answered."""
        listen = self.keeper.plan().listen
        setup = WorkloadSetup(name=self.name, config=self.config, listen=listen, dial=self._dial)
        try:
            # A state that steers may be there, of `tproxyd apply` or of a predecessor, and clients that wait. They go on waiting until ours has taken
            # its place: what that one remembers of connections is not in ours, and to local apps they would hang.
            await self._relays.add(setup, listeners, self._netns, paused=True)
            # What fails here has taken itself back, and a guard from before, that refuses, goes on doing so.
            await self.keeper.put()
            await self._relays.resume(self.name)
            async with trio.open_nursery() as watching:
                try:
                    await watching.start(self.keeper.watch)
                    yield
                finally:
                    with trio.CancelScope(shield=True):
                        if not await self._hand_on(listeners):
                            await self.stop()
                    watching.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._end_drains()
                await self._relays.remove(self.name)
                for listener in [one for group in listeners for one in group]:
                    listener.close()  # before the state of `tproxyd apply` steers to them again
                await self.keeper.leave()

    async def stop(self) -> None:
        """Takes no new connection from now on. If the kernel refuses, that is logged, and connections go on being taken."""
        try:
            await self.keeper.stop_capture()
        except TproxydError as error:
            _log.error("capture cannot be switched off: %s", error)

    async def drain(self) -> None:
        """Stops capture, and returns when the last connection has ended: see Interceptor.drain. So it has when `open` ends."""
        if self._ended:
            return
        with trio.CancelScope() as scope:
            self._drains.add(scope)
            try:
                await self._drain()
            finally:
                self._drains.discard(scope)
                self._drained.unpark_all()

    async def _drain(self) -> None:
        await self.stop()
        config = self.config
        await self._until_gone(half_open_connections, config.arrives_at_port)
        await self._relays.wait_idle(self.name)
        stuck = await self._until_gone(
            closing_connections, lambda port: config.arrives_at_port(port) or config.relays_port(port)
        )
        if stuck:
            _log.warning("the last bytes of %d closed connections were not taken by their peers", stuck)

    async def _end_drains(self) -> None:
        """Nobody looks at the namespace any more: its descriptor is closed next, and the number may be another one's then."""
        self._ended = True
        for scope in self._drains:
            scope.cancel()
        while self._drains:
            await self._drained.park()

    async def pause(self) -> None:
        """Accepts no more, with capture on: clients wait in the listeners' queues. Returns when the last connection has ended."""
        await self._relays.pause(self.name)
        await self._relays.wait_idle(self.name)

    def leave_to_successor(self, keep: Callable[[Sequence[Sequence[socket.socket]]], bool]) -> None:
        """At the end of `open`, clients go on being steered to the listeners, if `keep`, which is given them, says that they outlive this process."""
        self._keep = keep

    async def _hand_on(self, listeners: Listeners) -> bool:
        if self._keep is None or not self.keeper.capturing or not self._keep(listeners):
            return False
        try:
            await self.keeper.leave_to_successor()
        except TproxydError as error:
            _log.error("capture cannot be left to a successor: %s", error)
        else:
            self.left = True
        return self.left

    async def _until_gone(
        self, look: Callable[[Callable[[int], bool]], Connections], captured: Callable[[int], bool]
    ) -> int:
        """Waits until none of the connections that `look` finds now is found again (later ones are not ours: capture is off), or
        nothing about them has changed for `_STUCK` seconds; how many are left then."""

        def here() -> Connections:
            return call_in_namespace(self._netns, look, captured) if self._another else look(captured)

        try:
            left = await in_thread(here, limiter=self._threads)
            changed, pause = trio.current_time(), _POLL
            while left and trio.current_time() - changed < _STUCK:
                await trio.sleep(pause)
                pause = min(2 * pause, _POLL_SELDOM)
                now = await in_thread(here, limiter=self._threads)
                now = {key: queued for key, queued in now.items() if key in left}
                if now != left:
                    left, changed, pause = now, trio.current_time(), _POLL
        except (OSError, TproxydError) as error:  # no file left to look with: better not to wait than not to drain
            _log.warning("cannot look for connections that are beginning or ending: %s", error)
            return 0
        return len(left)


@contextmanager
def open_listeners(
    config: Config,
    listen: Sequence[tuple[str, int]],
    loops: int,
    netns: int | None = None,
    *,
    inherited: Sequence[socket.socket] = (),
) -> Iterator[Listeners]:
    """Listeners at these addresses for each of so many loops, in the calling thread's namespace or in another one; closed at the end of the block.
    `inherited` are taken where they fit, with what waits in their queues, and closed otherwise, with a word in the log. Raises KernelError that names who has the port."""
    with ExitStack() as stack:
        ready = _sort_inherited(config, listen, loops, inherited)
        for sock in (one for found in ready.values() for one in found):
            stack.enter_context(sock)

        def open_all() -> Listeners:
            return [
                [
                    ready[address, port][index]
                    if (address, port) in ready
                    else stack.enter_context(
                        _listen(config, address, port, backlog=config.listen.backlog, shared=loops > 1)
                    )
                    for address, port in listen
                ]
                for index in range(loops)
            ]

        opened = open_all() if netns is None else call_in_namespace(netns, open_all)
        if loops > 1 and config.limits.max_connections_per_source:
            for listener in opened[0]:
                if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT):
                    _log.warning(
                        "relay processes share a listener that systemd has passed: each counts max_connections_per_source for itself"
                    )
                    continue
                # What one client has is counted where all of it arrives.
                spread_by_source(listener, loops)
        yield opened


def require_free_port(config: Config, listen: Sequence[tuple[str, int]]) -> None:
    """Raises what `open_listeners` would raise in the calling thread's namespace. Accepts nothing."""
    for address, port in listen:
        _listen(config, address, port, backlog=None).close()


def _sort_inherited(
    config: Config, listen: Sequence[tuple[str, int]], loops: int, inherited: Sequence[socket.socket]
) -> dict[tuple[str, int], list[socket.socket]]:
    """Those that listen where the plan says, for each loop one. All others are closed."""
    found: dict[tuple[str, int], list[socket.socket]] = {}
    for sock in inherited:
        address = listening_address(sock)
        if address is None:
            _refuse(sock, listen, "does not listen for TCP")
        elif address[:2] not in listen:
            _refuse(sock, listen, f"listens on {format_address(address)}")
        elif address[0] == "::" and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            _refuse(sock, listen, "takes IPv4, too (BindIPv6Only=ipv6-only is missing)")
        else:
            try:
                equip_listener(sock, transparent=not config.redirects)
                sock.setblocking(False)
                sock.listen(config.listen.backlog)
            except OSError as error:
                _refuse(sock, listen, f"cannot be made transparent ({error.strerror})")
            else:
                found.setdefault(address[:2], []).append(sock)
    for name, socks in list(found.items()):
        if len(socks) == 1:  # of a socket unit, or of a daemon with one loop: the loops share it
            socks += [socks[0].dup() for _ in range(loops - 1)]
        elif len(socks) != loops:
            for sock in found.pop(name):
                _refuse(
                    sock, listen, f"is one of {len(socks)} on {format_address(name)}, and relay.workers is {loops} now"
                )
    return found


def _refuse(sock: socket.socket, listen: Sequence[tuple[str, int]], why: str) -> None:
    places = ", ".join(map(format_address, listen))
    _log.warning(
        "a socket that systemd has passed %s, and is closed: listeners of this configuration are %s", why, places
    )
    sock.close()


def _listen(config: Config, address: str, port: int, *, backlog: int | None, shared: bool = False) -> socket.socket:
    try:
        return open_listener(address, port, backlog=backlog, shared=shared, transparent=not config.redirects)
    except OSError as error:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        holder = port_holder(port, family=family) if error.errno == errno.EADDRINUSE else None
        raise KernelError(
            f"cannot listen on {format_address((address, port))}: {error.strerror}{f', by {holder}' if holder else ''}; "
            "choose another listen.port or stop what uses it"
        ) from error
