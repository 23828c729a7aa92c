"""One namespace's interception: listeners, kernel state and a place in the relay loops, put together and taken apart in the right order.

Listeners first, then the loops that serve them, then the kernel's state with capture last; at the end capture first, then the connections,
then everything else. Cancelled or broken anywhere, the kernel is left as if this had never run.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import Literal, TypeVar

import msgspec
import trio

from tproxyd.config import Config
from tproxyd.datapath import WorkloadSetup
from tproxyd.errors import ConfigError, KernelError, TproxydError
from tproxyd.interceptor.changes import same_interception
from tproxyd.interceptor.keeper import Keeper
from tproxyd.interceptor.listeners import Listeners, open_listeners
from tproxyd.interceptor.relays import Relays
from tproxyd.interceptor.threads import in_thread
from tproxyd.net.namespaces import call_in_namespace
from tproxyd.net.proc_net import Connections, closing_connections, half_open_connections
from tproxyd.net.sockets import spread_by_source

__all__ = ["Capture"]

_log = logging.getLogger(__name__)

_STUCK = 3.0  # seconds without progress: a packet and its retransmissions after one and two more
_SHED = 10.0  # seconds for those who wait at old listeners to be accepted
_LATE = 0.5  # seconds for a loop that has much to do to reset what it was to reset
_PUT_BACK = 3.0  # seconds to tell the loops that they go on as before
# Seconds, twice as many each time nothing has moved; the kernel has no event for either of what is waited for.
_POLL, _POLL_SELDOM = 0.02, 0.3

T = TypeVar("T")


class Capture:
    """What `open` needs, ready: `config` of the namespace that `netns` is a descriptor of, and what keeps its kernel state. `another`: it is not
    the program's own. `threads`: in how many of them the kernel is asked at a time; `given`: the listeners are the program's. The caller closes keeper,
    listeners and descriptor, after `open`."""

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
        given: bool = False,
    ) -> None:
        self.name, self.config, self.keeper = name, config, keeper
        self._given = given
        self._generation = 0
        self._living: dict[int, Config] = {}  # under which connections live that came before a reload
        self._over = False
        self._letting_go = 0  # reloads that have left connections some time
        self._changing = trio.Lock()
        self._opened = ExitStack()  # listeners that a reload has brought
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
        self._retired = False

    listeners: Listeners
    """While `open`."""

    @asynccontextmanager
    async def open(self, listeners: Listeners) -> AsyncIterator[None]:
        """Captures for the length of the block. On entry the kernel holds what was planned, and the loops have answered."""
        self.listeners = listeners
        try:
            # A state that steers may be there, of `tproxyd apply` or of a predecessor, and clients that wait. They go on waiting until ours has taken
            # its place: what that one remembers of connections is not in ours, and to local apps they would hang.
            setup = self._make_setup(self.config, self.keeper.plan().listen)
            await self._relays.add(setup, listeners, self._netns, paused=True)
            # What fails here has taken itself back, and a guard from before, that refuses, goes on doing so.
            await self.keeper.put()
            await self._relays.resume(self.name)
            async with trio.open_nursery() as watching:
                self._watching = watching
                try:
                    await watching.start(self.keeper.watch)
                    yield
                finally:
                    self._over = True  # a reload may be under way
                    with trio.CancelScope(shield=True):
                        if not await self._hand_on(listeners):
                            await self.stop()
                    watching.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._end_drains()
                await self._relays.remove(self.name)
                _close(listeners)  # before the state of `tproxyd apply` steers to them again
                self._opened.close()
                await self.keeper.leave()

    def _make_setup(
        self, config: Config, listen: Sequence[tuple[str, int]], *, closing: tuple[int, ...] = ()
    ) -> WorkloadSetup:
        return WorkloadSetup(
            name=self.name,
            config=config,
            listen=tuple(listen),
            dial=self._dial,
            generation=self._generation,
            closing=closing,
        )

    async def reload(self, config: Config) -> None:
        """Goes over to another config with the same mode, marks and routing: connections that live go on under the old one, and those that the new one
        would not capture have `drain.timeout` to end. Raises TproxydError, with the old config in force. To be called once at a time."""
        before = self.config
        if same_interception(before, config):
            self.config = config
            self._share_by_source(self.listeners, config)
            return
        moves = config.listen.port != before.listen.port
        if moves and self._given:
            raise ConfigError(
                "`listen.port` cannot change at a reload, as the listeners are the program's: open the interceptor anew"
            )
        await self.keeper.check(config)
        with ExitStack() as stack:
            listeners = old = self.listeners
            if moves:
                families = [host for host, _ in self.keeper.plan().listen]
                opening = open_listeners(
                    config,
                    [(host, config.listen.port) for host in families],
                    len(old),
                    self._netns if self._another else None,
                )
                listeners = await in_thread(partial(stack.enter_context, opening))
            async with self._changing:
                await self._change(before, config, listeners)
            self._require_lasting()
            # Nothing can fail from here on.
            self.config = config
            if moves:
                opened, self._opened = self._opened, stack.pop_all()
                try:
                    await self._leave_listeners(before, old, listeners)
                finally:
                    opened.close()
        if self._over:
            return
        self._share_by_source(listeners, config)
        if not self._given and config.listen.backlog != before.listen.backlog:
            for listener in [one for group in listeners for one in group]:
                listener.listen(config.listen.backlog)
        await self._relays.let_go(self.name, config.drain.timeout)
        if not self._over:
            self._letting_go += 1
            self._watching.start_soon(self._trim, config.drain.timeout + _LATE)

    def _require_lasting(self) -> None:
        if self._over:
            raise KernelError(f"workload {self.name!r} is being taken away")

    async def _change(self, before: Config, config: Config, listeners: Listeners) -> None:
        """First what connections under the new config will need, then the loops, which may have some at once, then capture."""
        old, generation = self.listeners, self._generation
        living = [*self._living.values()]
        fresh = listeners if listeners is old else [[*new, *left] for new, left in zip(listeners, old, strict=True)]
        addresses = _addresses(old)
        try:
            await self.keeper.change(before, [config, *living])
            self._generation += 1
            closing = () if listeners is old else (before.listen.port,)
            setup = self._make_setup(config, _addresses(fresh), closing=closing)
            await self._relays.replace(setup, fresh, self._netns)
            self._require_lasting()
            await self.keeper.change(config, [before, *living])
        except BaseException:
            with trio.CancelScope(shield=True):
                if self._generation != generation:
                    # Who came meanwhile came under the new one, and is delivered until that is forgotten.
                    self._forget_later(self._generation, config)
                    self._generation += 1
                    with trio.move_on_after(_PUT_BACK):
                        await self._relays.put_back(self._make_setup(before, addresses), old, self._netns)
                await self._narrow(before)
            raise
        self._forget_later(generation, before)

    async def _leave_listeners(self, before: Config, old: Listeners, listeners: Listeners) -> None:
        """Nobody is sent to the old ones any more. Whose handshake has begun there is served, and whoever waits."""
        addresses = _addresses(listeners)
        setup = self._make_setup(self.config, addresses)
        try:
            with trio.move_on_after(_SHED) as scope:
                await self._until_gone(half_open_connections, before.arrives_at_port)
                await self._relays.shed(setup, listeners)
            if scope.cancelled_caught:
                _log.warning("whoever waited at the old listen.port for more than %g s is reset", _SHED)
        finally:
            self.listeners = listeners
            with trio.CancelScope(shield=True), trio.move_on_after(_PUT_BACK):
                # Without the old port, at which from now on whoever likes may listen.
                generation, self._generation = self._generation, self._generation + 1
                setup = self._make_setup(self.config, addresses)
                await self._relays.put_back(setup, listeners, self._netns)
                self._forget_later(generation, self.config)
            _close(old)

    def _forget_later(self, generation: int, config: Config) -> None:
        if not self._over:
            self._living[generation] = config
            self._watching.start_soon(self._forget, generation)

    async def _forget(self, generation: int) -> None:
        """What connections of an older config need stays in the kernel until the last one has ended."""
        await self._relays.wait_retired(self.name, generation)
        await self._until_delivered({key: one for key, one in self._living.items() if key != generation})
        async with self._changing:
            del self._living[generation]
            await self._narrow(self.config)

    async def _trim(self, seconds: float) -> None:
        """Who still lives by then of those who came before is captured by the present config, too, and needs no other port for its own."""
        await trio.sleep(seconds)
        await self._until_delivered(self._trimmed())
        async with self._changing:
            self._letting_go -= 1
            if not self._letting_go:  # else some of them have a longer time from a reload before this one
                self._living.update(self._trimmed())
                await self._narrow(self.config)

    def _trimmed(self) -> dict[int, Config]:
        capture = self.config.capture
        return {key: msgspec.structs.replace(one, capture=capture) for key, one in self._living.items()}

    async def _until_delivered(self, left: Mapping[int, Config]) -> None:
        """For connections that have ended the kernel may still have last bytes to deliver, which needs the same."""
        if self.keeper.plans_otherwise(self.config, [*left.values()]):
            await self._until_gone(closing_connections, _is_port_of([*self._living.values()]))

    async def _narrow(self, config: Config) -> None:
        try:
            await self.keeper.change(config, [*self._living.values()])
        except TproxydError as error:  # then there is more than has to be, which hurts nobody
            _log.info("what connections of an older configuration needed stays in the kernel for now: %s", error)

    def _share_by_source(self, listeners: Listeners, config: Config) -> None:
        if config.limits.max_connections_per_source and len(listeners) > 1 and not self._given:
            for listener in listeners[0]:
                spread_by_source(listener, len(listeners))

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
        _close(self.listeners)

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
        if self._retired:
            # Handshakes are the successor's, and what it has in the kernel delivers last bytes, too.
            await self._relays.wait_idle(self.name)
            return
        configs = [self.config, *self._living.values()]
        await self._until_gone(half_open_connections, self.config.arrives_at_port)
        await self._relays.wait_idle(self.name)
        stuck = await self._until_gone(closing_connections, _is_port_of(configs))
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


def _is_port_of(configs: Sequence[Config]) -> Callable[[int], bool]:
    """Whether connections under these have such a port, here or at the other end."""
    return lambda port: any(one.arrives_at_port(port) or one.relays_port(port) for one in configs)


def _addresses(listeners: Listeners) -> list[tuple[str, int]]:
    return [listener.getsockname()[:2] for listener in listeners[0]]


def _close(listeners: Listeners) -> None:
    for listener in [one for group in listeners for one in group]:
        listener.close()
