"""Plan, kernel and data path put together for the caller's own network namespace.

The order is the whole point: listeners first, then the kernel's state with capture last; at the end capture first, then the
connections, then everything else. Cancelled or broken anywhere, the kernel is left as if this had never run.
"""

from __future__ import annotations

import errno
import logging
import resource
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from functools import partial
from typing import TypeVar

import trio

from tproxyd import kernel
from tproxyd.config import Config
from tproxyd.datapath import Record
from tproxyd.errors import KernelError, TproxydError
from tproxyd.net.capabilities import require_capabilities
from tproxyd.net.locality import Locality
from tproxyd.net.proc_net import Connections, closing_connections, half_open_connections, open_file_count, port_holder
from tproxyd.net.sockets import format_address, open_listener
from tproxyd.plan import Plan, Surroundings, make_plan
from tproxyd.proxy import ResetWatch, Service, serve_listener

__all__ = ["Interceptor", "open_interceptor"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

# Files that connections leave to the rest of the process: two listeners, a child's pipes, netlink, and some of the program around.
_RESERVED_FILES = 32
_STUCK = 3.0  # seconds without progress: a packet and its retransmissions after one and two more
_POLL = 0.02  # seconds; the kernel has no event for either of what is waited for


class Interceptor:
    """What `open_interceptor` gives. `listen` has the listeners' addresses, `connections` how many live right now."""

    def __init__(self, plan: Plan, service: Service) -> None:
        self._plan = plan
        self._service = service
        self._capturing = True

    @property
    def listen(self) -> tuple[tuple[str, int], ...]:
        return self._plan.listen

    @property
    def connections(self) -> int:
        return self._service.active

    async def stop_capture(self) -> None:
        """Takes no new connection from now on: new clients get what `capture.when_down` says. Harmless when repeated.

        If the kernel refuses, that is logged, and connections go on being taken.
        """
        if self._capturing:
            try:
                await _in_thread(partial(kernel.stop_capture, self._plan))
            except TproxydError as error:
                _log.error("capture cannot be switched off: %s", error)
            else:
                self._capturing = False

    async def drain(self) -> None:
        """Stops capture, and returns when the last connection has ended. The caller sets the deadline.

        A handshake that is under way is waited for, and its connection is served. A connection has ended when its last bytes have
        reached the peer, because without our rules they could not. Either is given up when nothing has come of it for three
        seconds.
        """
        await self.stop_capture()
        captured = self._service.config.capture.takes_port
        await _until_gone(half_open_connections, captured)
        await trio.sleep(_POLL)  # the listeners' turn to accept what is ready now
        await self._service.wait_idle()
        stuck = await _until_gone(closing_connections, captured)
        if stuck:
            _log.warning("the last bytes of %d closed connections were not taken by their peers", stuck)


@asynccontextmanager
async def open_interceptor(config: Config, *, on_record: Callable[[Record], None]) -> AsyncIterator[Interceptor]:
    """Captures in the own network namespace, and serves until the block ends; then nothing of ours is left in the kernel, unless
    `tproxyd apply` had put it there: then its place is taken, and kept.

    `on_record` gets each connection's Record at its end; it must not block. On entry capture is on and checked: the kernel
    holds what was planned. On exit, living connections are reset; call `drain` before to let them end.

    Raises ConfigError (nothing to capture), CapabilityError, MissingError, and KernelError (a port in use, too few files, a
    step that the kernel refused); then nothing was changed. What the block itself raises arrives in an ExceptionGroup, as from
    a nursery.
    """
    config.require_captures()
    require_capabilities("capturing connections", ("CAP_NET_ADMIN", "CAP_NET_RAW"))
    surroundings = kernel.look_around()
    _warn(surroundings)
    stays = await _in_thread(kernel.is_applied)
    plan = make_plan(config, surroundings=surroundings, stays=stays)
    limit = _connection_limit()

    async with AsyncExitStack() as stack:
        listeners = [
            stack.enter_context(_listen(address, port, config.listen.backlog)) for address, port in plan.listen
        ]
        service = Service(
            config,
            listen=plan.listen,
            limit=limit,
            locality=stack.enter_context(Locality()),
            watch=stack.enter_context(closing(ResetWatch())),
            on_record=on_record,
        )
        # Before the try: what fails here has taken itself back, and a guard from before, that refuses, goes on doing so.
        # The thread is not abandoned on cancellation: half of a change would be left.
        changes = await _in_thread(partial(kernel.apply, plan))
        try:
            if stays:
                _log.info("the kernel state of `tproxyd apply` is taken over, and stays at the end")
            for change in changes:
                _log.info("%s", change)
            interceptor = Interceptor(plan, service)
            # Shielded, and ended by nothing but the line below. Made here: with a cancellation pending, `nursery.start` would begin
            # the task and never give its scope away.
            serving = trio.CancelScope(shield=True)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_serve, service, listeners, serving)
                try:
                    yield interceptor
                finally:
                    # However it ends, clients must not be steered to listeners that nobody serves.
                    try:
                        with trio.CancelScope(shield=True):
                            await interceptor.stop_capture()
                    finally:
                        serving.cancel()
        finally:
            for listener in listeners:
                listener.close()  # before the state of `tproxyd apply` steers to them again
            with trio.CancelScope(shield=True):
                await _in_thread(partial(_leave, plan, stays=stays))


def _leave(plan: Plan, *, stays: bool) -> None:
    """What is left in the kernel at the end: nothing, or what `tproxyd apply` is for, unless `tproxyd revert` came meanwhile."""
    if stays and not kernel.is_reverted():
        kernel.apply(plan)
    else:
        kernel.revert()


async def _in_thread(step: Callable[[], T]) -> T:
    """Runs a step that blocks, to its end whatever is cancelled. Where the system has no thread left, it blocks us instead: rules
    that stay behind would be worse."""
    try:
        return await trio.to_thread.run_sync(step)
    except RuntimeError:  # "can't start new thread"
        return step()


async def _serve(service: Service, listeners: Sequence[socket.socket], scope: trio.CancelScope) -> None:
    """Accepts and serves until the scope is cancelled."""
    with scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.watch.serve)
            for listener in listeners:
                nursery.start_soon(serve_listener, service, listener, nursery)


async def _until_gone(look: Callable[[Callable[[int], bool]], Connections], captured: Callable[[int], bool]) -> int:
    """Waits until none of the connections that `look` finds now is found again (later ones are not ours: capture is off), or
    nothing about them has changed for `_STUCK` seconds; how many are left then."""
    try:
        left = await _in_thread(partial(look, captured))
        changed = trio.current_time()
        while left and trio.current_time() - changed < _STUCK:
            await trio.sleep(_POLL)
            now = await _in_thread(partial(look, captured))
            now = {key: queued for key, queued in now.items() if key in left}
            if now != left:
                left, changed = now, trio.current_time()
    except OSError as error:  # no file left to look with: better not to wait than not to drain
        _log.warning("cannot look for connections that are beginning or ending: %s", error)
        return 0
    return len(left)


def _connection_limit() -> int:
    """How many connections, of two files each, this process has room for."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = (files - open_file_count() - _RESERVED_FILES) // 2
    if limit < 1:
        raise KernelError(
            f"the limit of {files} open files leaves no room for connections; raise it (LimitNOFILE, ulimit -n)"
        )
    return limit


def _warn(surroundings: Surroundings) -> None:
    if 6 not in surroundings.families:
        _log.warning(
            "IPv6 is switched off on lo: only IPv4 is captured (net.ipv6.conf.lo.disable_ipv6=0 switches it on)"
        )
    if surroundings.bridge_netfilter:
        _log.warning(
            "br_netfilter is on: what arrives on bridges is not captured (net.bridge.bridge-nf-call-iptables=0 and "
            "-ip6tables=0 switch it off)"
        )


def _listen(address: str, port: int, backlog: int) -> socket.socket:
    try:
        return open_listener(address, port, backlog=backlog)
    except OSError as error:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        holder = port_holder(port, family=family) if error.errno == errno.EADDRINUSE else None
        raise KernelError(
            f"cannot listen on {format_address((address, port))}: {error.strerror}{f', by {holder}' if holder else ''}; "
            "choose another listen.port or stop what uses it"
        ) from error
