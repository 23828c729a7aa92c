"""What an embedding program opens and holds: relay loops, the own namespace's interception if that is wanted, and workloads.

How one interception is put together and taken apart is `capture`; how workloads come and go, `workloads`.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import trio

from tproxyd import kernel
from tproxyd.config import Config, config_from_mapping, load_config
from tproxyd.datapath import Counters, LivingConnection, Record, WorkloadSetup, splice_error
from tproxyd.datapath.listing import Filter, read_end
from tproxyd.errors import ConfigError, MissingError
from tproxyd.interceptor.capture import Capture
from tproxyd.interceptor.changes import make_changes, require_changeable
from tproxyd.interceptor.heritage import Heritage
from tproxyd.interceptor.keeper import Keeper
from tproxyd.interceptor.listeners import Listeners, open_listeners
from tproxyd.interceptor.privileges import require_needs, tell_lacking
from tproxyd.interceptor.relays import Relays
from tproxyd.interceptor.room import Engine, Room, make_room, with_engine
from tproxyd.interceptor.succession import Predecessor, distinct, take_listeners
from tproxyd.interceptor.tally import OnLines
from tproxyd.interceptor.threads import in_thread
from tproxyd.interceptor.workloads import Event, Workload, Workloads
from tproxyd.net.namespaces import NamespaceLike, call_in_namespace, open_namespace
from tproxyd.net.ownership import hold_namespace
from tproxyd.plan import DEFAULT_NAME, Family, Marks, Plan, Surroundings, ssh_remarks, table_names
from tproxyd.proxy import Policy

__all__ = ["Interceptor", "open_interceptor"]

_log = logging.getLogger(__name__)

OWN = "host"
"""What the own namespace is called as a workload."""


class Interceptor:
    """What `open_interceptor` gives. `listen` has the addresses of the own namespace's listeners, if that is captured."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        room: Room,
        relays: Relays,
        workloads: Workloads,
        own: Capture | _Given | None,
    ) -> None:
        self._config = config
        self._engine = engine
        self._room = room
        self._relays = relays
        self._workloads = workloads
        self._own = own if isinstance(own, Capture) else None
        self._served = own
        self._reloading = trio.Lock()
        self._reloaded = True  # and not cancelled half-way

    @property
    def listen(self) -> tuple[tuple[str, int], ...]:
        return self._own.keeper.plan().listen if self._own is not None else ()

    # Workloads: other network namespaces.

    async def add_workload(
        self,
        name: str,
        *,
        netns: NamespaceLike,
        overrides: Mapping[str, Any] | None = None,
        dial: Literal["workload", "agent"] = "workload",
    ) -> None:
        """Captures in another network namespace: a path, a process id, or a file descriptor. On return capture is on there.

        `overrides` are tables as in the configuration file ([capture], [listen], [routing], [upstream], [policy]) that are otherwise than the
        interceptor's. Connections to upstreams are made in the workload's namespace, or with `dial` "agent" in the program's own, as
        the program itself.

        The same again is harmless. The same name with another namespace (by device and inode), overrides or `dial` replaces what was there; its
        connections are reset. It ends when it is removed, when its namespace is gone (the path leads elsewhere, the process
        has ended; of a descriptor that cannot be seen), or with the interceptor.

        Raises ConfigError, MissingError (there is no such namespace), CapabilityError, and KernelError (somebody else captures there, a port in use, ...);
        then it is not there, and nothing of it is left. The same holds when this is cancelled before capture is on.
        """
        await self._workloads.add(name, Workload(netns=netns, overrides=overrides, dial=dial))

    async def remove_workload(self, name: str, *, drain: float = 0.0) -> None:
        """Takes a workload's interception away: capture first. Its connections are reset, or have `drain` seconds to end. Harmless where there is
        none of this name. Cancelled, it drains no more, and the rest goes on by itself: another call with this name waits for its end."""
        await self._workloads.remove(name, drain=drain)

    async def sync_workloads(self, workloads: Mapping[str, NamespaceLike | Workload]) -> None:
        """Makes these the workloads: what is missing is added, what is otherwise replaced, all others are removed. Returns when each has been tried once.

        One that cannot be captured is none of the others' trouble: it is told as an event and in the log, and tried again after one second, two, and so on
        up to a minute, until it is wanted no more. So is a path at which there is no namespace yet, which somebody may mount there a moment later. Not tried again is
        a process that is not there, or a path of /proc, whose number may be another's by then; nor what has vanished after it was captured: who knows
        that it is there again says so with the next snapshot. Raises ConfigError for bad names, overrides or `dial`, before anything is done.
        """
        await self._workloads.sync(workloads)

    @property
    def workloads(self) -> tuple[str, ...]:
        """The names of those that are captured, or are to be."""
        return tuple(self._workloads)

    def events(self) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """What happens to workloads, from now on: `async with interceptor.events() as events: async for event in events: ...`. There may be several
        listeners. Whoever takes none keeps nobody waiting: of more than 1,024 the oldest are dropped, and counted in the next."""
        return self._workloads.events()

    def plan(self, workload: str = OWN) -> Plan:
        """What the kernel is to hold for a workload, or for the own namespace. Raises KeyError if there is none of this name, and KernelError while
        it cannot be captured."""
        if workload == OWN and self._own is not None:
            return self.own.plan()
        return self._workloads.plan(workload)

    async def connect(self, workload: str, host: str, port: int) -> trio.SocketStream:
        """A TCP connection to an IP address that is made in a workload's network namespace ("host": the program's own), as by any program there: for
        handlers, which run in the program. The caller closes it. Raises KeyError if there is no workload of this name, KernelError while
        its namespace is not there, and OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        if workload == OWN:
            sock = socket.socket(family, socket.SOCK_STREAM)
        else:
            sock = call_in_namespace(self._workloads.namespace(workload), socket.socket, family, socket.SOCK_STREAM)
        connection = trio.socket.from_stdlib_socket(sock)
        try:
            await connection.connect((host, port))
            return trio.SocketStream(connection)
        except BaseException:
            connection.close()
            raise

    async def stats(self) -> dict[str, Counters]:
        """By workload, what has been counted since it was added, living connections included; "host" is the own namespace."""
        return await self._relays.count()

    @property
    def troubles(self) -> dict[str, str]:
        """By workload, what is wrong with it at the moment, as far as something is."""
        own = {OWN: self.trouble} if self._own is not None and self.trouble else {}
        return own | self._workloads.troubles()

    # All of it.

    @property
    def connections(self) -> int:
        """How many live, as told some hundredths of a second ago."""
        return self._relays.active

    async def list_connections(
        self,
        *,
        workload: str | None = None,
        source: str | None = None,
        destination: str | None = None,
    ) -> AsyncGenerator[LivingConnection, None]:
        """Those that live: `async for connection in interceptor.list_connections(source="192.0.2.0/24"): ...`. Those of a workload, of a client, to an
        original destination: an address, a network, either with a port, or a port (":80").

        They come a page at a time, between which the relay loops serve connections for nine tenths of the time: what ends meanwhile may be among
        them, and what begins may not. Raises UsageError for what is no address, and KernelError when a loop does not answer.
        """
        which = Filter(
            workload,
            read_end(source, "the source") if source is not None else None,
            read_end(destination, "the destination") if destination is not None else None,
        )
        async with aclosing(self._relays.pages(which)) as pages:
            async for page in pages:
                for connection in page:
                    yield connection

    async def close_connection(self, identity: str) -> bool:
        """Resets a connection on both sides, outcome `drained`; whether there was one of this `id`. One that the program has is cancelled there. Raises
        KernelError when a relay loop does not answer."""
        return await self._relays.close(identity)

    @property
    def records_dropped(self) -> int:
        """Lines of the access log that were dropped because nobody took them in time."""
        return self._relays.records_dropped

    async def drain(self) -> None:
        """Stops capture everywhere, and returns when the last connection has ended. The caller sets the deadline. Workloads that could not be
        captured yet are removed, and none can be added meanwhile (KernelError).

        A handshake that is under way is waited for, and its connection is served. A connection has ended when its last bytes have
        reached the peer, because without our rules they could not. Either is given up when nothing has come of it for three
        seconds.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._workloads.drain)
            if self._own is not None:
                nursery.start_soon(self._own.drain)

    async def reload(self, config: Config | Mapping[str, Any] | Path) -> list[str]:
        """Goes over to another configuration, which workloads have, too, but for their overrides. What was changed, a line a key; none if that is
        nothing.

        Connections that live go on under the one to which they came, but for limits and time-outs, which hold for all at once. Those that would not
        be captured any more, by their addresses, have `drain.timeout` to end, and are reset then. Who connects meanwhile is refused nothing: with
        another `listen.port` the new listeners serve before the old ones close.

        Raises ConfigError, which names every key that cannot change in place (`capture.mode`, [routing], `relay.engine`, `relay.workers`, [admin]), and
        KernelError; then the old configuration is in force. A workload that cannot go over is captured anew, and tried again as by `sync_workloads`.
        One call at a time; others wait. Cancelled before the kernel has been changed, nothing is changed, and behind that another call does what is left.
        """
        async with self._reloading:
            config = _config_of(config)
            require_changeable(self._config, config)
            changes = make_changes(self._config, config)
            if not changes and self._reloaded:
                return []
            if self._own is not None:
                config.require_captures()
            setups = self._room.make_setups(config, self._engine)
            self._workloads.check(config)
            effective = with_engine(config, self._engine)
            served = self._served
            if served is not None:
                try:
                    await served.reload(effective)
                except BaseException:
                    if served.config is effective:  # cancelled behind the point of no return
                        self._config, self._reloaded = config, False
                    raise
            self._config, self._reloaded = config, False
            if self._own is not None:
                _tell_ssh(effective, self._own.keeper.surroundings)
            await self._relays.tune(setups)
            await self._workloads.reload(effective)
            self._reloaded = True
            return changes

    # The own namespace, where that is captured.

    @property
    def own(self) -> Keeper:
        """What keeps the own namespace's kernel state. Raises RuntimeError without `own_namespace`, as all do that tell of it."""
        if self._own is None:
            raise RuntimeError(
                "this interceptor does not capture its program's own namespace, so there is no kernel state of it: open it with own_namespace=True, or "
                "ask for a workload (plan, troubles, stats, events)"
            )
        return self._own.keeper

    async def stop_capture(self) -> None:
        """Takes no new connection in the own namespace from now on: new clients get what `capture.when_down` says. Harmless when repeated.

        If the kernel refuses, that is logged, and connections go on being taken.
        """
        if self._own is not None:
            await self._own.stop()

    async def wait_old(self) -> None:
        """Returns when the connections of the own namespace that live now have ended; new ones are taken meanwhile."""
        await self._relays.wait_old(OWN)

    async def pause(self) -> None:
        """Takes no new connection in the own namespace from now on, although capture stays on: clients wait in the listeners' queues for who has
        these next (`leave_to_successor`). Returns when the last connection there has ended."""
        if self._own is not None:
            await self._own.pause()

    def leave_to_successor(self, keep: Callable[[Sequence[Sequence[socket.socket]]], bool]) -> None:
        """Lets the own namespace be steered to the listeners also when the interceptor has ended, for the moment until another one of the same configuration
        begins with them (`inherited`). `keep` is given them at the end, of each loop its own, and says whether they outlive the process now; if not, all
        is taken away as ever. `left` says afterwards what has become of it."""
        if self._own is not None:
            self._own.leave_to_successor(keep)

    @property
    def left(self) -> bool:
        """Whether the kernel's state of the own namespace has been left to a successor."""
        return self._own is not None and self._own.left

    async def until_answered(self) -> None:
        """Returns when every relay loop has answered a question that is asked now."""
        await self._relays.answer()

    async def counters(self) -> Counters:
        """What has been counted in the own namespace since the start, living connections included."""
        counted = await self._relays.count()
        return counted.get(OWN, Counters())

    @property
    def repairs(self) -> Mapping[str, int]:
        """How often the kernel's state was put right there after somebody else had changed it, by kind."""
        return self.own.repairs

    @property
    def trouble(self) -> str:
        """What is wrong with the kernel's state there and cannot be put right at the moment; empty if nothing is."""
        return self.own.trouble

    @property
    def capturing(self) -> bool:
        """Whether new connections are taken there: not after `stop_capture`, `drain` or `revert`."""
        return self.own.capturing

    @property
    def others(self) -> trio.Event:
        """Set when somebody else's nft rules there have changed since it was asked for."""
        return self.own.others

    @property
    def families(self) -> tuple[Family, ...]:
        """Those that are captured there at the moment."""
        return self.own.surroundings.families

    @property
    def marks(self) -> Marks:
        return self.own.marks

    async def differences(self) -> list[kernel.Change]:
        """What would have to change in the kernel there, now; after `revert`, all that has been taken away. Raises TproxydError."""
        return await self.own.differences()

    async def revert(self) -> list[kernel.Change]:
        """Takes all kernel state there away, for good: what `tproxyd revert` asks for. Connections to foreign addresses, and in redirect mode all, do not
        survive that."""
        return await self.own.revert()

    # Hand-over, for the daemon alone.

    def heritage(self) -> tuple[Heritage, list[socket.socket]]:
        """What a successor has to be given: in words, and the listeners. Raises KernelError where there can be none."""
        assert self._own is not None
        return self._own.keeper.heritage, distinct(self._own.listeners)

    def keeping_still(self) -> AbstractAsyncContextManager[None]:
        """The block in which a successor puts its state into the kernel: nothing is repaired."""
        return self.own.keeping_still()

    def settle(self) -> None:
        """The predecessor will not go on any more: all that is left of its kernel state goes with this one."""
        self.own.settle()

    async def retire(self) -> None:
        """A successor serves: the listeners are closed here, nothing is captured or repaired any more, and at the end the own steering table alone goes.
        What lives goes on: `drain` waits for it."""
        assert self._own is not None
        await self._own.retire()


@asynccontextmanager
async def open_interceptor(
    config: Config | Mapping[str, Any] | Path,
    *,
    name: str = DEFAULT_NAME,
    policy: Policy | None = None,
    policy_timeout: float = 1.0,
    on_record: Callable[[Record], None] | None = None,
    on_lines: OnLines | None = None,
    listeners: Sequence[socket.socket] = (),
    own_namespace: bool = False,
    ssh_ports: Sequence[int] = (),
    namespace_held: bool = False,
    inherited: Sequence[socket.socket] = (),
    predecessor: Predecessor | None = None,
) -> AsyncIterator[Interceptor]:
    """Serves until the block ends: workloads (`Interceptor.add_workload`), each in a network namespace of its own, and with `own_namespace` the one that the
    calling thread is in. Then nothing of ours is left in any kernel state, unless `tproxyd apply` had put it there: then its place is taken,
    and kept.

    `config` is what all of them have, but for a workload's overrides: a Config, a mapping as TOML would give, or a file. `name` is that of the
    nft tables. `policy` is asked about every connection that the configuration does not refuse: Forward relays it, Refuse resets it, Handle gives a stream
    to a handler of the program, and HandOff gives the socket to another process. It has `policy_timeout` seconds; if it fails, that connection is refused.
    Without it no connection costs a task.

    `on_record` gets each connection's Record at its end, or some hundredths of a second later; `on_lines` gets the same as it
    stands in the access log: whole lines of JSON, several at a time. Neither may block.

    `listeners` are listening TCP sockets of the program that are served as they are, as workload "host": with `own_namespace` they take the place of
    those that would be opened, and have to be where the plan says. They stay the program's. `ssh_ports`: at which this host's administrator
    comes in, besides those at which an SSH server is seen to listen; they are captured only if they are named singly. `namespace_held`: the caller
    has taken the own namespace already (net/ownership.py), as the daemon has. `inherited` are sockets of a dead predecessor's or of systemd's: taken
    as the own namespace's listeners where they are as those would be, closed otherwise. `predecessor` is the daemon's, too: the generation whose place
    this takes while it lives.

    On entry capture in the own namespace is on and checked, and the relay loops have answered. On exit, living connections are reset; call
    `drain` before to let them end. Cancelled anywhere, all is taken away before Cancelled leaves.

    Raises ConfigError (nothing to capture, too many connections), CapabilityError, MissingError, and KernelError (another interceptor or daemon
    has the own namespace, another program's marks, routes or rules in the way, a port in use, too few files, a step that the kernel refused); then nothing was changed. What the block itself raises arrives in an
    ExceptionGroup, as from a nursery.
    """
    config = _config_of(config)
    table_names(name)  # raises ConfigError
    if own_namespace:
        config.require_captures()
    require_needs(config)
    tell_lacking(config)
    given, config = config, _with_working_engine(config)
    async with AsyncExitStack() as stack:
        keeper = None
        if own_namespace:
            if not namespace_held:
                stack.callback(hold_namespace("capture here").close)
            keeper = await in_thread(
                partial(Keeper, config, name=name, ssh_ports=ssh_ports, before=predecessor and predecessor.heritage)
            )
            stack.callback(keeper.close)
            _tell_ssh(config, keeper.surroundings)
        room = make_room(config, asks=policy is not None)
        setups = room.make_setups(config, config.relay.engine)
        if listeners:
            served = _copies(stack, listeners, len(setups))
        else:
            listen = keeper.plan().listen if keeper is not None else ()
            if predecessor is not None:
                served = stack.enter_context(take_listeners(config, listen, len(setups), predecessor.listeners))
            else:
                served = stack.enter_context(open_listeners(config, listen, len(setups), inherited=inherited))
        netns = open_namespace("/proc/thread-self/ns/net")
        stack.callback(os.close, netns)
        relays = Relays(setups, _lines_to(on_record, on_lines), policy=policy, policy_timeout=policy_timeout)
        workloads = Workloads(config, relays, len(setups), name)
        stack.callback(workloads.close)
        # Shielded, and ended by nothing but the line below: however this ends, clients must not be steered to listeners that
        # nobody serves. An event and not `nursery.start`, which with a cancellation pending would never give control back.
        serving, ready = trio.CancelScope(shield=True), trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve, relays, serving, ready)
            try:
                # The loops start meanwhile. Threads are not abandoned on cancellation: half of a change would be left.
                await ready.wait()
                async with AsyncExitStack() as inner:
                    own: Capture | _Given | None = None
                    if keeper is not None:
                        own = Capture(
                            OWN,
                            config,
                            keeper=keeper,
                            relays=relays,
                            netns=netns,
                            another=False,
                            given=bool(listeners),
                        )
                        await inner.enter_async_context(own.open(served))
                    elif listeners:
                        own = _Given(relays, listeners, served, netns)
                        await inner.enter_async_context(own.open(config))
                    others = await inner.enter_async_context(trio.open_nursery())
                    await others.start(workloads.serve)
                    try:
                        yield Interceptor(given, config.relay.engine, room, relays, workloads, own)
                    finally:
                        others.cancel_scope.cancel()
            finally:
                serving.cancel()


def _config_of(config: Config | Mapping[str, Any] | Path) -> Config:
    if isinstance(config, Config):
        return config
    return load_config(config) if isinstance(config, Path) else config_from_mapping(config)


def _copies(stack: AsyncExitStack, listeners: Sequence[socket.socket], loops: int) -> Listeners:
    """Of sockets that stay the program's, for each loop."""
    for listener in listeners:
        if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ConfigError(f"listeners: {listener!r} does not listen; call its listen() before")
        listener.setblocking(False)
    return [[stack.enter_context(listener.dup()) for listener in listeners] for _ in range(loops)]


class _Given:
    """Sockets of the program's, to which it brings connections itself."""

    def __init__(self, relays: Relays, listeners: Sequence[socket.socket], copies: Listeners, netns: int) -> None:
        self._relays, self._copies, self._netns = relays, copies, netns
        self._listen = tuple(listener.getsockname()[:2] for listener in listeners)
        self._generation = 0
        self.config: Config

    @asynccontextmanager
    async def open(self, config: Config) -> AsyncIterator[None]:
        """Serves them for the length of the block."""
        self.config = config
        await self._relays.add(self._make_setup(config), self._copies, self._netns)
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await self._relays.remove(OWN)

    async def reload(self, config: Config) -> None:
        """See Capture.reload."""
        try:
            await self._relays.replace(self._make_setup(config), self._copies, self._netns)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._relays.put_back(self._make_setup(self.config), self._copies, self._netns)
            raise
        self.config = config
        await self._relays.let_go(OWN, config.drain.timeout)

    def _make_setup(self, config: Config) -> WorkloadSetup:
        self._generation += 1
        return WorkloadSetup(name=OWN, config=config, listen=self._listen, generation=self._generation)


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


def _with_working_engine(config: Config) -> Config:
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
    return with_engine(config, "copy")


def _tell_ssh(config: Config, surroundings: Surroundings) -> None:
    spared, taken = ssh_remarks(config, surroundings)
    if spared:
        _log.info("%s", spared)
    if taken:
        _log.warning("%s", taken)
