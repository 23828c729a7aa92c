"""Plan, kernel and data path put together for the caller's own network namespace.

The order is the whole point: listeners first, then the kernel's state with capture last; at the end capture first, then the
connections, then everything else. Cancelled or broken anywhere, the kernel is left as if this had never run.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from tproxyd import kernel
from tproxyd.config import Config
from tproxyd.datapath import Record
from tproxyd.errors import ConfigError, KernelError
from tproxyd.net.capabilities import require_capabilities
from tproxyd.net.locality import Locality
from tproxyd.net.ports import port_holder
from tproxyd.net.sockets import format_address, open_listener
from tproxyd.plan import Plan, make_plan
from tproxyd.proxy import Service, serve_listener

__all__ = ["Interceptor", "open_interceptor"]

_log = logging.getLogger(__name__)


class Interceptor:
    """What `open_interceptor` gives. `listen` has the listeners' addresses, `connections` how many live right now."""

    def __init__(self, plan: Plan, service: Service, serving: trio.CancelScope) -> None:
        self._plan = plan
        self._service = service
        self._serving = serving
        self._capturing = True

    @property
    def listen(self) -> tuple[tuple[str, int], ...]:
        return self._plan.listen

    @property
    def connections(self) -> int:
        return self._service.active

    async def drain(self) -> None:
        """Takes no new connection from now on, and returns when the last one has ended. The caller sets the deadline.

        New clients get what `capture.when_down` says. Those whose handshake is under way are still served.
        """
        if self._capturing:
            self._capturing = False
            await trio.to_thread.run_sync(kernel.stop_capture, self._plan)
        # One turn for what waits in the accept queue: accept, start its task, let it count itself.
        for _ in range(3):
            await trio.sleep(0.01)
        await self._service.wait_idle()


@asynccontextmanager
async def open_interceptor(config: Config, *, on_record: Callable[[Record], None]) -> AsyncIterator[Interceptor]:
    """Captures in the own network namespace, and serves until the block ends; then nothing of ours is left in the kernel.

    `on_record` gets each connection's Record at its end; it must not block. On entry capture is on and checked: the kernel
    holds what was planned. On exit, living connections are reset; call `drain` before to let them end.

    Raises ConfigError (nothing to capture), CapabilityError, MissingError, and KernelError (a port in use, a step that the
    kernel refused); then nothing was changed.
    """
    if not config.captures:
        raise ConfigError(
            'nothing to capture: `capture.ports` is empty or `capture.mode` is "off"; name ports, e.g. ports = ["8080"]'
        )
    require_capabilities("capturing connections", ("CAP_NET_ADMIN", "CAP_NET_RAW"))
    plan = make_plan(config, families=kernel.usable_families())
    if len(plan.listen) < 2:
        _log.warning(
            "IPv6 is switched off on lo: only IPv4 is captured (net.ipv6.conf.lo.disable_ipv6=0 switches it on)"
        )

    async with AsyncExitStack() as stack:
        listeners = [
            stack.enter_context(_listen(address, port, config.listen.backlog)) for address, port in plan.listen
        ]
        service = Service(config, listen=plan.listen, locality=stack.enter_context(Locality()), on_record=on_record)
        try:
            # The thread is not abandoned on cancellation: half of a change would be left.
            applied = await trio.to_thread.run_sync(kernel.apply, plan)
            for change in applied.changes:
                _log.info("%s", change)
            await trio.to_thread.run_sync(_verify, plan, applied)
            async with trio.open_nursery() as nursery:
                for listener in listeners:
                    nursery.start_soon(serve_listener, service, listener, nursery)
                yield Interceptor(plan, service, nursery.cancel_scope)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                for change in await trio.to_thread.run_sync(kernel.revert):
                    _log.info("%s", change)


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


def _verify(plan: Plan, applied: kernel.Applied) -> None:
    wrong = kernel.differences(plan, kernel.observe(), spelling=applied.spelling)
    if wrong:
        raise KernelError(
            f"the kernel does not hold what was just put there ({'; '.join(wrong)}): another program changes the same state; "
            "find it with `nft monitor` and `ip monitor`"
        )
