"""`tproxyd run`: start, say ready, serve, drain, stop. Everything that belongs to the process and not to the interception."""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from functools import partial
from itertools import chain
from typing import NamedTuple

import msgspec
import trio

from tproxyd import __version__
from tproxyd.config import Config
from tproxyd.daemon import successor
from tproxyd.daemon.admin_socket import AdminSocket, open_admin_socket, take_place
from tproxyd.daemon.handover import Generations, Old, take_over
from tproxyd.daemon.lock import Orders, namespace_lock, reverted, serve_orders
from tproxyd.daemon.logs import AccessLog, LineWriter, encode_line, set_up_logging
from tproxyd.daemon.pressure import Pressure
from tproxyd.daemon.privileges import give_up_privileges
from tproxyd.daemon.reload import Reloads
from tproxyd.daemon.service import Service, Stop
from tproxyd.daemon.status import tell_serving
from tproxyd.daemon.systemd import Manager, find_manager
from tproxyd.errors import TproxydError
from tproxyd.interceptor import open_interceptor
from tproxyd.interceptor.threads import in_thread
from tproxyd.kernel import packet_counts
from tproxyd.net.scheduling import find_background
from tproxyd.net.sockets import format_address

__all__ = ["run"]

_log = logging.getLogger(__name__)

_ADMIN, _METRICS = "admin", "metrics"  # what else is handed over, by these names

_STOP = (signal.SIGTERM, signal.SIGINT)
_RESTART = signal.SIGUSR1
"""RestartKillSignal= of the unit: SIGTERM in a restart, so whoever gets it knows that a successor comes. Without systemd it is SIGTERM."""

_LAST_STEPS = 20.0  # seconds that a stop may take besides the drain; it takes some tenths


class _Start(NamedTuple):
    """What a daemon begins with. `load` reads the configuration again; None where it came from the command line alone. `held` is the lock of the
    namespace."""

    config: Config
    load: Callable[[], Config] | None
    stderr: LineWriter
    access_log: AccessLog
    held: socket.socket
    ssh_ports: Collection[int]
    manager: Manager
    old: Old | None
    pressure: Pressure


def run(config: Config, load: Callable[[], Config] | None = None) -> int:
    """Serves until SIGTERM or SIGINT and drains; a second one ends it at once. SIGUSR1 says, under systemd, that a successor comes. 0 after a clean
    stop. Raises TproxydError.

    `load` reads the configuration again at SIGHUP; None where it came from the command line alone. Takes the place of a generation that has started it for
    that (handover.py)."""
    manager = find_manager()  # before any other program is started, which would inherit what it takes
    old = take_over()
    try:
        return _run(config, load, manager, old)
    except TproxydError as error:
        if old is not None:
            old.refuse(error)
        raise
    finally:
        if old is not None:
            old.close()


def _run(config: Config, load: Callable[[], Config] | None, manager: Manager, old: Old | None) -> int:
    _allow_all_files()
    # Not where a thread relays: it waits for the others of its process (GIL), also for one that waits for the CPU.
    background = find_background() if config.relay.workers != 0 else None
    # Before there is another thread.
    inherited = manager.passed if old is None else old.predecessor.listeners
    also = background.needs if background is not None else ()
    seen = give_up_privileges(config, inherited, alone=old is None, also=also)
    stderr = LineWriter(sys.stderr.fileno())
    set_up_logging(config, stderr)
    for warning in seen.warnings:
        _log.warning("%s", warning)
    access_log = AccessLog(config, sys.stdout.fileno())
    try:
        with namespace_lock("start") if old is None else old.lock as held:
            pressure = Pressure(background)
            trio.run(_serve, _Start(config, load, stderr, access_log, held, seen.ssh_ports, manager, old, pressure))
    except BaseExceptionGroup as group:
        error = _only(group)
        if error is None:
            raise
        raise error from group
    finally:
        access_log.close()
        if access_log.dropped:
            _log.warning(
                "lines of the access log that were dropped because stdout did not take them: %d", access_log.dropped
            )
        stderr.close()
    return os.EX_OK


async def _serve(start: _Start) -> None:
    config, manager, old = start.config, start.manager, start.old
    start.pressure.begin()
    stop, reloads = Stop(), Reloads()
    if old is None:
        manager.empty_store()
        try:
            successor.arrive()
        # Then a clean end of this one, too, will be taken for half of a restart, and leave what steers until the next start.
        except OSError as error:
            _log.error("cannot take back the announcement of a successor: %s", error)
    asked_at = old.place(_ADMIN) if old is not None else None
    with (
        trio.open_signal_receiver(*_STOP, _RESTART, signal.SIGHUP) as signals,
        open_admin_socket(config.admin.socket, old.service(_ADMIN) if old is not None else None) as admin,
    ):
        async with trio.open_nursery() as nursery, _metrics_listener(config, old) as metrics:
            can_restart = manager.listens and successor.can_be_announced()
            nursery.start_soon(partial(_listen_to_signals, signals, stop, reloads, can_restart=can_restart))
            # A signal that comes while this starts is answered as soon as it has: that takes a fraction of a second.
            async with open_interceptor(
                config,
                on_lines=start.access_log.write,
                own_namespace=True,
                ssh_ports=[*start.ssh_ports],
                namespace_held=True,
                inherited=manager.passed,
                predecessor=old.predecessor if old is not None else None,
            ) as interceptor:
                service = Service(
                    config,
                    interceptor,
                    stop,
                    start.access_log,
                    admin_socket=admin.path if admin is not None else None,
                    load=start.load,
                    reloads=reloads,
                    on_reload=lambda begins: _tell_reload(manager, service, begins=begins),
                )
                services = {_METRICS: metrics.socket.fileno()} if metrics is not None else {}
                if admin is not None:
                    services[_ADMIN] = admin.sock.fileno()
                generations = Generations(interceptor, stop, start.held, services, manager, old)
                if not generations.begin():
                    nursery.cancel_scope.cancel()
                    return
                take_place(admin, asked_at)
                orders: Orders = {
                    "revert": partial(_revert, service, generations),
                    "status": partial(_status, service, generations),
                    "reload": service.reload,
                    "handover": partial(service.change, generations.hand_over),
                }
                nursery.start_soon(generations.serve, partial(serve_orders, start.held, orders))
                if metrics is not None:
                    nursery.start_soon(
                        generations.while_serving, partial(_serve_metrics, metrics, service, start.pressure)
                    )
                if admin is not None:
                    nursery.start_soon(generations.while_serving, partial(_serve_admin, admin, service, start.pressure))
                nursery.start_soon(service.obstacles.watch)
                nursery.start_soon(service.serve_reloads)
                # At any log level, and on one line: others wait for it.
                listen = ",".join(format_address(address) for address in interceptor.listen)
                start.stderr.write(encode_line(f"tproxyd: ready pid={os.getpid()} listen={listen}"))
                generations.say_ready()
                nursery.start_soon(_tell_manager, manager, service, generations)
                await stop.drain.wait()
                start.pressure.stop()
                if generations.handed_over and admin is not None:
                    admin.leave()
                seconds = service.config.drain.timeout
                deadline = trio.current_time() + seconds
                manager.notify(STOPPING=1, EXTEND_TIMEOUT_USEC=int((seconds + _LAST_STEPS) * 1e6))
                if stop.restarts:
                    await service.hand_on(partial(generations.outlive, deadline))
                    interceptor.leave_to_successor(lambda groups: manager.store(chain.from_iterable(groups)))
                else:
                    await service.drain()
                await generations.outlive(deadline)
            if interceptor.left:
                try:
                    successor.announce()
                # Then all is removed before it comes, which harms it as little as a first start.
                except OSError as error:
                    _log.error("cannot announce a successor: %s", error)
            elif stop.restarts:
                manager.empty_store()
            nursery.cancel_scope.cancel()


async def _tell_manager(manager: Manager, service: Service, generations: Generations) -> None:
    """Feeds the watchdog and tells how things stand, once this is the process that systemd listens to."""
    await generations.until_serving()
    manager.notify(READY=1, STATUS=service.line)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.feed_watchdog, service.interceptor.until_answered)
        nursery.start_soon(manager.tell_status, lambda: service.line)


async def _revert(service: Service, generations: Generations) -> str:
    ended = await generations.end_old()  # its connections need what goes now
    return reverted(
        await service.revert(),
        "serves this network namespace and captures nothing from now on; restart or stop it"
        + (f" (pid {ended}, which still drained since a hand-over, has ended with its connections)" if ended else ""),
    )


async def _status(service: Service, generations: Generations) -> str:
    return tell_serving(msgspec.structs.replace(await service.status(), draining=generations.draining))


@asynccontextmanager
async def _metrics_listener(config: Config, old: Old | None) -> AsyncIterator[trio.SocketListener | None]:
    """Open before anything else: that its address is taken is to be known while nothing has been changed."""
    if config.admin.metrics is None:
        yield None
    else:
        from tproxyd.daemon.metrics import open_metrics_listener  # late: who has no metrics need not load it

        inherited = old.service(_METRICS) if old is not None else None
        async with open_metrics_listener(config.admin.metrics, inherited) as listener:
            yield listener


async def _serve_metrics(listener: trio.SocketListener, service: Service, pressure: Pressure) -> None:
    from tproxyd.daemon.metrics import serve_metrics

    await serve_metrics(
        listener,
        service.interceptor.counters,
        dropped=lambda: service.dropped,
        repairs=lambda: service.interceptor.repairs,
        unready=lambda: service.unready,
        reloaded=lambda: service.last_reload_ok,
        packets=lambda: in_thread(packet_counts),
        version=__version__,
        pressure=pressure,
    )


async def _serve_admin(admin: AdminSocket, service: Service, pressure: Pressure) -> None:
    async with trio.SocketListener(trio.socket.from_stdlib_socket(admin.sock)) as listener:
        await trio.lowlevel.wait_readable(admin.sock)  # as long as nobody asks, HTTP is not loaded
        from tproxyd.daemon.admin import serve_admin

        await serve_admin(listener, service, pressure)


def _tell_reload(manager: Manager, service: Service, *, begins: bool) -> None:
    if begins:
        manager.reloading()
    else:
        manager.notify(READY=1, STATUS=service.line)


async def _listen_to_signals(signals: AsyncIterator[int], stop: Stop, reloads: Reloads, *, can_restart: bool) -> None:
    async for number in signals:
        if number == signal.SIGHUP:
            reloads.ask()
        else:
            stop.ask(restart=number == _RESTART and can_restart)


def _allow_all_files() -> None:
    """Raises the soft limit of open files to the hard one: it is low for programs that use select(), and this one does not."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _only(group: BaseExceptionGroup[BaseException]) -> TproxydError | None:
    """The one error of ours in a group of trio's, if there is nothing else in it."""
    errors = group.exceptions
    if len(errors) != 1:
        return None
    if isinstance(errors[0], BaseExceptionGroup):
        return _only(errors[0])
    return errors[0] if isinstance(errors[0], TproxydError) else None
