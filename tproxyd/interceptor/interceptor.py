"""Plan, kernel and data path put together for the caller's own network namespace.

The order is the whole point: listeners first, then the kernel's state with capture last; at the end capture first, then the
connections, then everything else. Cancelled or broken anywhere, the kernel is left as if this had never run.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import msgspec
import trio

from tproxyd import kernel
from tproxyd.config import Config
from tproxyd.datapath import Counters, Record, Setup, WorkloadSetup, splice_error
from tproxyd.errors import ConfigError, KernelError, MissingError, TproxydError
from tproxyd.interceptor.keeper import Keeper
from tproxyd.interceptor.relays import OnLines, Relays
from tproxyd.interceptor.threads import in_thread
from tproxyd.net.capabilities import require_capabilities
from tproxyd.net.namespaces import open_namespace
from tproxyd.net.proc_net import Connections, closing_connections, half_open_connections, open_file_count, port_holder
from tproxyd.net.sockets import format_address, open_listener, spread_by_source
from tproxyd.plan import Family, Marks, Surroundings, make_plan, ssh_remarks
from tproxyd.proxy import Policy

__all__ = ["Interceptor", "open_interceptor"]

_log = logging.getLogger(__name__)

_OWN = "host"  # what the own namespace is called as a workload

# Files that connections leave to the rest of the process: listeners, a child's pipes, netlink, and some of the program around.
_RESERVED_FILES = 32
_MOST_PIPES = 1024  # of a loop
_FILES_A_PIPE = (
    40  # of all files, one in twenty for pipes, which take two each: a thousand pipes beside nine thousand connections
)
_STUCK = 3.0  # seconds without progress: a packet and its retransmissions after one and two more
_POLL = 0.02  # seconds; the kernel has no event for either of what is waited for


class Interceptor:
    """What `open_interceptor` gives. `listen` has the listeners' addresses; `connections` is how many live, as told some hundredths of
    a second ago."""

    def __init__(self, config: Config, listen: tuple[tuple[str, int], ...], keeper: Keeper, relays: Relays) -> None:
        self.listen = listen
        self._config = config
        self._keeper = keeper
        self._relays = relays

    @property
    def repairs(self) -> Mapping[str, int]:
        """How often the kernel's state was put right after somebody else had changed it, by kind."""
        return self._keeper.repairs

    @property
    def trouble(self) -> str:
        """What is wrong with the kernel's state and cannot be put right at the moment; empty if nothing is."""
        return self._keeper.trouble

    @property
    def capturing(self) -> bool:
        """Whether new connections are taken: not after `stop_capture`, `drain` or `revert`."""
        return self._keeper.capturing

    @property
    def others(self) -> trio.Event:
        """Set when somebody else's nft rules have changed since it was asked for."""
        return self._keeper.others

    @property
    def families(self) -> tuple[Family, ...]:
        """Those that are captured at the moment."""
        return self._keeper.surroundings.families

    @property
    def marks(self) -> Marks:
        return self._keeper.marks

    async def differences(self) -> list[kernel.Change]:
        """What would have to change in the kernel, now; after `revert`, all that has been taken away. Raises TproxydError."""
        return await self._keeper.differences()

    @property
    def connections(self) -> int:
        return self._relays.active

    async def stop_capture(self) -> None:
        """Takes no new connection from now on: new clients get what `capture.when_down` says. Harmless when repeated.

        If the kernel refuses, that is logged, and connections go on being taken.
        """
        try:
            await self._keeper.stop_capture()
        except TproxydError as error:
            _log.error("capture cannot be switched off: %s", error)

    async def revert(self) -> list[kernel.Change]:
        """Takes all kernel state away, for good: what `tproxyd revert` asks for. Connections to foreign addresses, and in redirect mode all, do not
        survive that."""
        return await self._keeper.revert()

    async def counters(self) -> Counters:
        """What has been counted since the start, living connections included."""
        counted = await self._relays.count()
        return counted.get(_OWN, Counters())

    @property
    def records_dropped(self) -> int:
        """Lines of the access log that were dropped because nobody took them in time."""
        return self._relays.records_dropped

    async def drain(self) -> None:
        """Stops capture, and returns when the last connection has ended. The caller sets the deadline.

        A handshake that is under way is waited for, and its connection is served. A connection has ended when its last bytes have
        reached the peer, because without our rules they could not. Either is given up when nothing has come of it for three
        seconds.
        """
        await self.stop_capture()
        config = self._config
        await _until_gone(half_open_connections, config.arrives_at_port)
        await self._relays.wait_idle(_OWN)
        stuck = await _until_gone(
            closing_connections, lambda port: config.arrives_at_port(port) or config.relays_port(port)
        )
        if stuck:
            _log.warning("the last bytes of %d closed connections were not taken by their peers", stuck)


@asynccontextmanager
async def open_interceptor(
    config: Config,
    *,
    policy: Policy | None = None,
    policy_timeout: float = 1.0,
    on_record: Callable[[Record], None] | None = None,
    on_lines: OnLines | None = None,
    ssh_ports: Sequence[int] = (),
) -> AsyncIterator[Interceptor]:
    """Captures in the own network namespace, and serves until the block ends; then nothing of ours is left in the kernel, unless
    `tproxyd apply` had put it there: then its place is taken, and kept.

    `policy` is asked about every connection that the configuration does not refuse: Forward relays it, Refuse resets it, and
    Handle gives a stream to a handler of the program. It has `policy_timeout` seconds; if it fails, that connection is refused. Without
    it no connection costs a task.

    `on_record` gets each connection's Record at its end, or some hundredths of a second later; `on_lines` gets the same as it
    stands in the access log: whole lines of JSON, several at a time. Neither may block. `ssh_ports`: at which this host's administrator comes in, besides
    those at which an SSH server is seen to listen; they are captured only if they are named singly. On entry capture is on and checked: the
    kernel holds what was planned, and the relay loops have answered. On exit, living connections are reset; call `drain` before
    to let them end.

    Raises ConfigError (nothing to capture, too many connections), CapabilityError, MissingError, and KernelError (another program's
    marks, routes or rules in the way, a port in use, too few files, a step that the kernel refused); then nothing was changed. What the block itself raises arrives in an
    ExceptionGroup, as from a nursery.
    """
    config.require_captures()
    require_capabilities("capturing connections", ("CAP_NET_ADMIN", "CAP_NET_RAW"))
    config = _with_engine(config)
    async with AsyncExitStack() as stack:
        keeper = await in_thread(partial(Keeper, config, ssh_ports=ssh_ports))
        stack.callback(keeper.close)
        _tell_ssh(config, keeper.surroundings)
        listen = make_plan(config, surroundings=keeper.surroundings).listen
        setups = _make_setups(config, asks=policy is not None)
        listeners = [
            [stack.enter_context(_listen(config, address, port, shared=len(setups) > 1)) for address, port in listen]
            for _ in setups
        ]
        if len(setups) > 1 and config.limits.max_connections_per_source:
            for listener in listeners[0]:
                # What one client has is counted where all of it arrives.
                spread_by_source(listener, len(setups))
        netns = open_namespace("/proc/thread-self/ns/net")
        stack.callback(os.close, netns)
        relays = Relays(setups, _lines_to(on_record, on_lines), policy=policy, policy_timeout=policy_timeout)
        # Shielded, and ended by nothing but the line below: however this ends, clients must not be steered to listeners that
        # nobody serves. An event and not `nursery.start`, which with a cancellation pending would never give control back.
        serving, ready = trio.CancelScope(shield=True), trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve, relays, serving, ready)
            try:
                # The loops start meanwhile. Threads are not abandoned on cancellation: half of a change would be left.
                await ready.wait()
                await relays.add(WorkloadSetup(name=_OWN, config=config, listen=listen), listeners, netns)
                # Before the try: what fails here has taken itself back, and a guard from before, that refuses, goes on doing so.
                await keeper.put()
                try:
                    interceptor = Interceptor(config, listen, keeper, relays)
                    async with trio.open_nursery() as watching:
                        await watching.start(keeper.watch)
                        try:
                            yield interceptor
                        finally:
                            with trio.CancelScope(shield=True):
                                await interceptor.stop_capture()
                            watching.cancel_scope.cancel()
                finally:
                    serving.cancel()
                    for listener in [one for group in listeners for one in group]:
                        listener.close()  # before the state of `tproxyd apply` steers to them again
                    with trio.CancelScope(shield=True):
                        await relays.ended()
                        await keeper.leave()
            finally:
                serving.cancel()


async def _serve(relays: Relays, scope: trio.CancelScope, ready: trio.Event) -> None:
    """Runs the relay loops until the scope is cancelled."""
    with scope:
        async with trio.open_nursery() as nursery:
            await nursery.start(relays.serve)
            ready.set()


def _lines_to(on_record: Callable[[Record], None] | None, on_lines: OnLines | None) -> OnLines:
    """What the relay loops call, and what becomes of a record from there."""
    decoder = msgspec.json.Decoder(Record)

    def take(lines: bytes) -> None:
        if on_lines is not None:
            try:
                on_lines(lines)
            except Exception:  # the embedding program's, whatever it is; it costs nobody else
                _log.exception("on_lines failed")
        if on_record is not None:
            for line in lines.splitlines():
                record = decoder.decode(line)
                try:
                    on_record(record)
                except Exception:  # the embedding program's, whatever it is; it costs nobody else
                    _log.exception("on_record failed for connection %s", record.id)

    return take


async def _until_gone(look: Callable[[Callable[[int], bool]], Connections], captured: Callable[[int], bool]) -> int:
    """Waits until none of the connections that `look` finds now is found again (later ones are not ours: capture is off), or
    nothing about them has changed for `_STUCK` seconds; how many are left then."""
    try:
        left = await in_thread(partial(look, captured))
        changed = trio.current_time()
        while left and trio.current_time() - changed < _STUCK:
            await trio.sleep(_POLL)
            now = await in_thread(partial(look, captured))
            now = {key: queued for key, queued in now.items() if key in left}
            if now != left:
                left, changed = now, trio.current_time()
    except OSError as error:  # no file left to look with: better not to wait than not to drain
        _log.warning("cannot look for connections that are beginning or ending: %s", error)
        return 0
    return len(left)


def _with_engine(config: Config) -> Config:
    """The config, with an engine that works here. Raises MissingError where that is not the one that is asked for."""
    error = splice_error() if config.relay.engine != "copy" else None
    if error is None:
        return config
    if config.relay.engine == "splice":
        raise MissingError(
            f'`relay.engine` = "splice", but splice(2) does not work here: {error.strerror}; allow it (in a systemd unit: '
            'SystemCallFilter=splice), or set engine = "copy"'
        )
    _log.warning("splice(2) does not work here (%s): bulk data is copied, which costs more CPU", error.strerror)
    return msgspec.structs.replace(config, relay=msgspec.structs.replace(config.relay, engine="copy"))


def _make_setups(config: Config, *, asks: bool) -> list[Setup]:
    """What each relay loop is told: one in this process, or as many as there are to be processes."""
    workers = config.relay.workers
    if workers == "auto":
        workers = len(os.sched_getaffinity(0))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = _RESERVED_FILES + (0 if workers else open_file_count())
    pipes = min(_MOST_PIPES, files // _FILES_A_PIPE)
    loops = max(workers, 1)
    room = (files - used - 2 * pipes) // 2
    if asks:  # every connection may be with the program, and has a file here then
        room = min(room, (files - open_file_count() - _RESERVED_FILES) // loops)
    if room < 1:
        raise KernelError(
            f"the limit of {files} open files leaves no room for connections; raise it (LimitNOFILE, ulimit -n)"
        )
    most = config.limits.max_connections
    if most == "auto":
        most = room * loops
    elif most > room * loops:
        need = used + 2 * -(-most // loops)
        # And what the pipes take of the higher limit.
        enough = min(need * _FILES_A_PIPE // (_FILES_A_PIPE - 2) + 2, need + 2 * _MOST_PIPES)
        raise ConfigError(
            f"`limits.max_connections` = {most} does not fit: {files} open files leave room for {room * loops} connections; "
            f"raise the limit of open files (LimitNOFILE, ulimit -n) to {enough} or more, "
            "or lower the number"
        )
    elif most < loops:
        raise ConfigError(
            f"`limits.max_connections` = {most} is less than one for each of `relay.workers` = {loops}; raise the one or lower the other"
        )
    # Shares that add up to the number exactly: it is never exceeded, whichever loop a connection comes to.
    return [
        Setup(
            config=config,
            limit=most // loops + (index < most % loops),
            pipes=pipes,
            alone=workers > 0,
            asks=asks,
        )
        for index in range(loops)
    ]


def _tell_ssh(config: Config, surroundings: Surroundings) -> None:
    spared, taken = ssh_remarks(config, surroundings)
    if spared:
        _log.info("%s", spared)
    if taken:
        _log.warning("%s", taken)


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
