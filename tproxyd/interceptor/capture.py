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
from tproxyd.net.sockets import format_address, open_listener, spread_by_source

__all__ = ["Capture", "Listeners", "open_listeners"]

_log = logging.getLogger(__name__)

_STUCK = 3.0  # seconds without progress: a packet and its retransmissions after one and two more
_POLL = 0.02  # seconds; the kernel has no event for either of what is waited for

T = TypeVar("T")
Listeners = list[list[socket.socket]]
"""Of each loop its own."""


class Capture:
    """What `open` needs, ready: `config` of the namespace that `netns` is a descriptor of, and what keeps its kernel state. `another`: it is not
    the program's own. The caller closes keeper, listeners and descriptor, after `open`."""

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
    ) -> None:
        self.name, self.config, self.keeper = name, config, keeper
        self._relays = relays
        self._netns = netns
        self._another = another
        self._dial: Literal["workload", "agent"] = dial
        self._retired = False

    listeners: Listeners
    """While `open`."""

    @asynccontextmanager
    async def open(self, listeners: Listeners) -> AsyncIterator[None]:
        """Captures for the length of the block. On entry the kernel holds what was planned, and the loops have answered."""
        self.listeners = listeners
        listen = self.keeper.plan().listen
        setup = WorkloadSetup(name=self.name, config=self.config, listen=listen, dial=self._dial)
        try:
            await self._relays.add(setup, listeners, self._netns)
            # What fails here has taken itself back, and a guard from before, that refuses, goes on doing so.
            await self.keeper.put()
            async with trio.open_nursery() as watching:
                try:
                    await watching.start(self.keeper.watch)
                    yield
                finally:
                    with trio.CancelScope(shield=True):
                        await self.stop()
                    watching.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
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

    async def retire(self) -> None:
        """Leaves everything to a successor that serves already, but for what lives: the listeners are closed here, and of the kernel's state the own
        steering table alone goes at the end."""
        self._retired = True
        await self.keeper.retire()
        await self._relays.retire(self.name)
        for listener in [one for group in self.listeners for one in group]:
            listener.close()

    async def drain(self) -> None:
        """Stops capture, and returns when the last connection has ended: see Interceptor.drain."""
        await self.stop()
        if self._retired:
            # Handshakes are the successor's, and what it has in the kernel delivers last bytes, too.
            await self._relays.wait_idle(self.name)
            return
        config = self.config
        await self._until_gone(half_open_connections, config.arrives_at_port)
        await self._relays.wait_idle(self.name)
        stuck = await self._until_gone(
            closing_connections, lambda port: config.arrives_at_port(port) or config.relays_port(port)
        )
        if stuck:
            _log.warning("the last bytes of %d closed connections were not taken by their peers", stuck)

    async def _until_gone(
        self, look: Callable[[Callable[[int], bool]], Connections], captured: Callable[[int], bool]
    ) -> int:
        """Waits until none of the connections that `look` finds now is found again (later ones are not ours: capture is off), or
        nothing about them has changed for `_STUCK` seconds; how many are left then."""

        def here() -> Connections:
            return call_in_namespace(self._netns, look, captured) if self._another else look(captured)

        try:
            left = await in_thread(here)
            changed = trio.current_time()
            while left and trio.current_time() - changed < _STUCK:
                await trio.sleep(_POLL)
                now = await in_thread(here)
                now = {key: queued for key, queued in now.items() if key in left}
                if now != left:
                    left, changed = now, trio.current_time()
        except (OSError, TproxydError) as error:  # no file left to look with: better not to wait than not to drain
            _log.warning("cannot look for connections that are beginning or ending: %s", error)
            return 0
        return len(left)


@contextmanager
def open_listeners(
    config: Config, listen: Sequence[tuple[str, int]], loops: int, netns: int | None = None
) -> Iterator[Listeners]:
    """Listeners at these addresses for each of so many loops, in the calling thread's namespace or in another one; closed at the end of the block.
    Raises KernelError that names who has the port."""
    with ExitStack() as stack:

        def open_all() -> Listeners:
            return [
                [stack.enter_context(_listen(config, address, port, shared=loops > 1)) for address, port in listen]
                for _ in range(loops)
            ]

        opened = open_all() if netns is None else call_in_namespace(netns, open_all)
        if loops > 1 and config.limits.max_connections_per_source:
            for listener in opened[0]:
                # What one client has is counted where all of it arrives.
                spread_by_source(listener, loops)
        yield opened


def _listen(config: Config, address: str, port: int, *, shared: bool) -> socket.socket:
    try:
        return open_listener(
            address, port, backlog=config.listen.backlog, shared=shared, transparent=not config.redirects
        )
    except OSError as error:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        holder = port_holder(port, family=family) if error.errno == errno.EADDRINUSE else None
        raise KernelError(
            f"cannot listen on {format_address((address, port))}: {error.strerror}{f', by {holder}' if holder else ''}; "
            "choose another listen.port or stop what uses it"
        ) from error
