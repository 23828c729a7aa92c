"""Plan, kernel and data path put together for the caller's own network namespace.

The order is the whole point: listeners first, then the kernel's state with capture last; at the end capture first, then the
connections, then everything else. Cancelled or broken anywhere, the kernel is left as if this had never run.
"""

from __future__ import annotations

import errno
import logging
import resource
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing

import trio

from tproxyd import kernel
from tproxyd.config import Config
from tproxyd.datapath import Record
from tproxyd.errors import ConfigError, KernelError, TproxydError
from tproxyd.net.capabilities import require_capabilities
from tproxyd.net.locality import Locality
from tproxyd.net.proc_net import closing_connections, half_open_connections, open_file_count, port_holder
from tproxyd.net.sockets import format_address, open_listener
from tproxyd.plan import Plan, Surroundings, make_plan
from tproxyd.proxy import ResetWatch, Service, serve_listener

__all__ = ["Interceptor", "open_interceptor"]

_log = logging.getLogger(__name__)

# Files that connections leave to the rest of the process: two listeners, a child's pipes, netlink, and some of the program around.
_RESERVED_FILES = 32
_HANDSHAKE = 3.0  # seconds: a SYN-ACK and its retransmissions after one and two more
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

    async def drain(self) -> None:
        """Takes no new connection from now on, and returns when the last one has ended. The caller sets the deadline.

        New clients get what `capture.when_down` says. A handshake that is under way is given three seconds, and its connection is
        served. A connection has ended when its last bytes have reached the peer: without our rules they could not.
        """
        if self._capturing:
            self._capturing = False
            try:
                await trio.to_thread.run_sync(kernel.stop_capture, self._plan)
            except TproxydError as error:
                _log.error("capture goes on while connections drain: %s", error)
        captured = self._service.config.capture.takes_port
        with trio.move_on_after(_HANDSHAKE):
            await _until_gone(half_open_connections, captured)
        await trio.sleep(_POLL)  # the listeners' turn to accept what is ready now
        await self._service.wait_idle()
        await _until_gone(closing_connections, captured)


@asynccontextmanager
async def open_interceptor(config: Config, *, on_record: Callable[[Record], None]) -> AsyncIterator[Interceptor]:
    """Captures in the own network namespace, and serves until the block ends; then nothing of ours is left in the kernel.

    `on_record` gets each connection's Record at its end; it must not block. On entry capture is on and checked: the kernel
    holds what was planned. On exit, living connections are reset; call `drain` before to let them end.

    Raises ConfigError (nothing to capture), CapabilityError, MissingError, and KernelError (a port in use, too few files, a
    step that the kernel refused); then nothing was changed.
    """
    if not config.captures:
        raise ConfigError(
            'nothing to capture: `capture.ports` is empty or `capture.mode` is "off"; name ports, e.g. ports = ["8080"]'
        )
    require_capabilities("capturing connections", ("CAP_NET_ADMIN", "CAP_NET_RAW"))
    surroundings = kernel.look_around()
    _warn(surroundings)
    plan = make_plan(config, surroundings=surroundings)
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
        applied = await trio.to_thread.run_sync(kernel.apply, plan)
        try:
            for change in applied.changes:
                _log.info("%s", change)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(service.watch.serve)
                for listener in listeners:
                    nursery.start_soon(serve_listener, service, listener, nursery)
                yield Interceptor(plan, service)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                for change in await trio.to_thread.run_sync(kernel.revert):
                    _log.info("%s", change)


async def _until_gone(
    look: Callable[[Callable[[int], bool]], frozenset[tuple[str, str]]], captured: Callable[[int], bool]
) -> None:
    """Waits until none of the connections that `look` finds now is found again. Later ones are not ours: capture is off."""
    waited_for = await trio.to_thread.run_sync(look, captured)
    while waited_for:
        await trio.sleep(_POLL)
        waited_for &= await trio.to_thread.run_sync(look, captured)


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
