"""`tproxyd handover`: a new generation of the daemon beside the old one, which then serves no more than what lives.

The old one starts the new one by its own command line, so whatever program and configuration are on disk now are what is run, and gives it over a socket
pair that which must not be lost for a moment: the listeners, the lock of the namespace, where metrics and the administrator are answered. What is said there:

    old ▶ new    heritage, with the lock and those two; listeners, some at a time; then, once it has stopped answering orders: serve
    new ▶ old    ready, or refused (why); later, when the state is to go that the old one's connections need: end

The end of the socket is the end of the other side, however that came about. Up to `ready` the old one serves, and the end of the new one is only a
reason that is told; from there on it is the new one that serves, and the end of either changes nothing for the other.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial

import msgspec
import trio

from tproxyd.daemon.lock import KeptError, StrangerError, UnknownOrderError, find_holder, send_order
from tproxyd.daemon.service import Stop
from tproxyd.daemon.systemd import Manager
from tproxyd.errors import KernelError, MissingError, TproxydError
from tproxyd.interceptor import Heritage, Interceptor, Predecessor
from tproxyd.interceptor.threads import in_thread
from tproxyd.net.capabilities import require_capabilities

__all__ = ["CHANNEL", "Generations", "Old", "handover", "take_over", "tell_refusal"]

_log = logging.getLogger(__name__)

CHANNEL = "TPROXYD_HANDOVER"
"""The environment variable in which a new generation finds the number of its end of the socket pair."""

# What systemd says to one process alone: inherited files, and whose watchdog it is.
_OF_ONE_PROCESS = frozenset({"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID"})

_START = 10.0  # seconds for a new generation to be ready; it takes half of one
_END = 5.0  # seconds for an old one to end when it is told to; then it is killed
_MESSAGE = 1 << 17  # bytes; there are two numbers and two addresses an ip rule in the largest one
_FILES = 200  # descriptors in one message; the kernel takes 253 (SCM_MAX_FD)


class _Heritage(msgspec.Struct, frozen=True, tag="heritage"):
    pid: int
    heritage: Heritage
    listeners: int
    services: tuple[str, ...]


class _Listeners(msgspec.Struct, frozen=True, tag="listeners"):
    """Some of them, with this."""


class _Serve(msgspec.Struct, frozen=True, tag="serve"):
    """Nobody else answers orders any more."""


class _Ready(msgspec.Struct, frozen=True, tag="ready"):
    pid: int


class _Refused(msgspec.Struct, frozen=True, tag="refused"):
    why: str


class _End(msgspec.Struct, frozen=True, tag="end"):
    """What the connections need that still live is about to go."""


_Said = _Heritage | _Listeners | _Serve | _Ready | _Refused | _End


def _send(channel: socket.socket, said: _Said, fds: list[int] | None = None) -> None:
    """Raises OSError where the other side has gone."""
    socket.send_fds(channel, [msgspec.json.encode(said)], fds or [])


async def _hear(channel: trio.socket.SocketType) -> bytes:
    """The next message; empty when the other side has gone."""
    for _ in range(2):
        # Who goes with something unread makes an error of it, before what it said itself.
        with suppress(OSError):
            return await channel.recv(_MESSAGE)
    return b""


# The new generation's side.


class Old:
    """The generation before this one. `lock` is the caller's to close; `close` closes the rest of what came from it."""

    def __init__(self, channel: socket.socket, told: _Heritage, files: list[socket.socket]) -> None:
        self.pid = told.pid
        self.lock = files[0]
        self._services = dict(zip(told.services, files[1:], strict=False))
        self.predecessor = Predecessor(told.heritage, tuple(files[1 + len(told.services) :]))
        self.may_serve, self.gone = trio.Event(), trio.Event()
        self._channel = channel
        self._files = files[1:]
        self._ready = False

    def service(self, name: str) -> socket.socket | None:
        """A copy of its listener for that, if it has one. The caller closes it."""
        found = self._services.get(name)
        if found is None:
            return None
        copy = found.dup()
        copy.setblocking(False)
        return copy

    def place(self, name: str) -> str | None:
        """The path of its listener for that, if it has one."""
        found = self._services.get(name)
        return str(found.getsockname()) if found is not None else None

    def close_files(self) -> None:
        """What is wanted of them has been copied by now. A listener that stays open is one to which clients may be brought that nobody serves."""
        for file in self._files:
            file.close()

    def close(self) -> None:
        """Harmless when repeated."""
        self.close_files()
        self._channel.close()

    def say_ready(self) -> None:
        """From now on this one serves, also if the old one has died meanwhile."""
        self._ready = True
        with suppress(OSError):
            _send(self._channel, _Ready(os.getpid()))

    def refuse(self, error: Exception) -> None:
        """Why there will be no new generation; the old one goes on."""
        if not self._ready:
            with suppress(OSError):
                _send(self._channel, _Refused(_sentence(error)))

    async def listen(self) -> None:
        """Returns when the old one has ended; sets `may_serve` and `gone`."""
        self._channel.setblocking(False)
        channel = trio.socket.from_stdlib_socket(self._channel)
        while True:
            said = await _hear(channel)
            self.may_serve.set()
            if not said:
                self.gone.set()
                self._channel.close()
                return

    async def end(self) -> None:
        """Ends it, and with it its connections; it is given a moment to say of each that it has ended."""
        if self.gone.is_set():
            return
        with suppress(OSError):
            _send(self._channel, _End())
        with trio.move_on_after(_END):
            await self.gone.wait()
            return
        _log.error("pid %d, the generation before this one, does not end, and is killed", self.pid)
        with suppress(ProcessLookupError):  # its end of the socket is open, so it is still the one that has this number
            os.kill(self.pid, signal.SIGKILL)
        with trio.move_on_after(_END):
            await self.gone.wait()


def take_over() -> Old | None:
    """What a predecessor gives, if one has started this process; waits for it. Raises KernelError if it does not come whole."""
    number = os.environ.pop(CHANNEL, None)
    if number is None:
        return None
    channel = _channel(number)
    channel.settimeout(_START)
    files: list[socket.socket] = []
    try:
        told, fds = _receive(channel)
        files += fds
        if not isinstance(told, _Heritage):
            raise KernelError(f"the generation before this one says {type(told).__name__} first; restart the daemon")
        while len(files) < 1 + len(told.services) + told.listeners:
            said, fds = _receive(channel)
            files += fds
            if not (isinstance(said, _Listeners) and fds):
                raise KernelError("the generation before this one has not handed its listeners over; try again")
        return Old(channel, told, files)
    except BaseException as error:
        if isinstance(error, TproxydError):
            with suppress(OSError):
                _send(channel, _Refused(_sentence(error)))
        for file in files:
            file.close()
        channel.close()
        raise


def _channel(number: str) -> socket.socket:
    """Raises KernelError for what no predecessor can have said."""
    try:
        channel = socket.socket(fileno=int(number))
        if channel.family != socket.AF_UNIX or channel.type != socket.SOCK_SEQPACKET:
            channel.detach()  # not ours to close
            raise ValueError
    except (OSError, ValueError):
        raise KernelError(
            f"{CHANNEL}={number!r} is in the environment, which only a daemon sets that hands over: unset it"
        ) from None
    channel.set_inheritable(False)
    return channel


def _receive(channel: socket.socket) -> tuple[_Said, list[socket.socket]]:
    try:
        data, rights, _, _ = channel.recvmsg(_MESSAGE, socket.CMSG_SPACE(4 * _FILES), socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        raise KernelError(f"the generation before this one hands nothing over: {error.strerror or error}") from error
    numbers = [
        int.from_bytes(content[begin : begin + 4], sys.byteorder)
        for _, _, content in rights
        for begin in range(0, len(content), 4)
    ]
    files = [socket.socket(fileno=number) for number in numbers]
    for file in files:
        # As they are: but a Python socket takes itself for one that blocks, and would make its copies so, and with them the very
        # listener at which the old generation's loops accept.
        file.setblocking(False)
    try:
        if not data:
            raise KernelError("the generation before this one has ended before it has handed anything over")
        return msgspec.json.decode(data, type=_Said), files
    except (TproxydError, msgspec.MsgspecError) as error:
        for file in files:
            file.close()
        if isinstance(error, TproxydError):
            raise
        raise KernelError(
            f"the generation before this one speaks otherwise than expected ({error}): it is of a version that this one cannot follow; restart "
            "the daemon"
        ) from error


def tell_refusal(error: Exception) -> None:
    """For who ends before `take_over`, as for a configuration that is bad: tells the predecessor why, if there is one. Raises nothing."""
    number = os.environ.pop(CHANNEL, None)
    if number is not None:
        with suppress(TproxydError, OSError), _channel(number) as channel:
            _send(channel, _Refused(_sentence(error)))


def _sentence(error: Exception) -> str:
    return "; ".join(str(error).splitlines())


# The old generation's side, and what either of them has beside its Service.


class Generations:
    """The generations beside the one that this process is: `old` is the one before, while it lives.

    `serve` answers orders until a new generation does; `hand_over` is the order that brings that about, and then asks `stop` to drain. `services` are descriptors of listeners
    that are handed over, too, by name, and what runs under `while_serving` is cancelled then.
    """

    def __init__(
        self,
        interceptor: Interceptor,
        stop: Stop,
        lock: socket.socket,
        services: Mapping[str, int],
        manager: Manager,
        old: Old | None,
    ) -> None:
        self._serving: list[trio.CancelScope] = []
        self._interceptor = interceptor
        self._stop = stop
        self._services = services
        self._manager = manager
        self._lock = lock
        self._old = old
        self._answering = trio.CancelScope()
        self._new: _New | None = None

    @property
    def draining(self) -> int | None:
        """The pid of the generation before this one, while it lives."""
        return self._old.pid if self._old is not None and not self._old.gone.is_set() else None

    @property
    def handed_over(self) -> bool:
        """Whether a new generation has taken the place of this one."""
        return self._new is not None

    async def while_serving(self, task: Callable[[], Awaitable[None]]) -> None:
        """Runs a task until it ends, or a new generation serves."""
        with trio.CancelScope() as scope:
            self._serving.append(scope)
            await task()

    async def until_serving(self) -> None:
        """Returns when this one is the one that serves."""
        if self._old is not None:
            with trio.move_on_after(_END):
                await self._old.may_serve.wait()

    def begin(self) -> bool:
        """The interception stands. Whether this generation may serve: not if it has been asked to stop while it started; then the old one goes on, or
        has been asked, too."""
        if self._old is None:
            return True
        self._old.close_files()
        if self._stop.drain.is_set():
            self._old.refuse(KernelError("it was asked to stop while it started"))
            return False
        self._interceptor.settle()
        return True

    def say_ready(self) -> None:
        """The old generation need not go on any more."""
        if self._old is not None:
            self._old.say_ready()

    async def serve(self, answer: Callable[[], Awaitable[None]]) -> None:
        """Answers orders, which is what `answer` does until it is cancelled, once nobody else does, and until a new generation does. Then listens to that
        one until it has ended."""
        async with trio.open_nursery() as nursery:
            if self._old is not None:
                nursery.start_soon(self._old.listen)
                await self.until_serving()  # one that stands still would read no orders either
            with self._answering:
                await answer()
            if self._new is not None:
                self._lock.close()
                self._new.let_serve()
                self._stop.drain.set()
                await self._new.listen(self._stop.now)

    async def hand_over(self) -> str:
        """Starts a new generation, and leaves all but what lives to it. What is to be said of that. Raises TproxydError, with this one going on as if
        nothing had happened."""
        if self.draining is not None:
            raise KernelError(
                f"pid {self.draining} still drains since the last hand-over; try again when it has ended, or end it now with "
                f"`kill {self.draining}`"
            )
        if self._stop.drain.is_set():
            raise KernelError("it is stopping already; start it again")
        heritage, listeners = self._interceptor.heritage()
        async with self._interceptor.keeping_still():
            new = await in_thread(
                partial(_New, heritage, self._lock, self._services, listeners, self._manager.environment)
            )
            try:
                await self._until_ready(new)
            except BaseException:
                await in_thread(new.kill)
                raise
            # Nothing below can fail.
            self._new = new
            with trio.CancelScope(shield=True):
                await in_thread(new.let_go)
                self._manager.move_to(new.pid)
                await self._interceptor.retire()
        _log.info("pid %d serves from now on", new.pid)
        for scope in self._serving:
            scope.cancel()
        self._answering.cancel()  # takes effect when this has been answered
        return f"pid {new.pid} serves from now on; pid {os.getpid()} goes on with the connections that it has"

    async def _until_ready(self, new: _New) -> None:
        why: str | None = (
            f"the new generation was not ready within {_START:g} s, and is ended; is this machine overloaded?"
        )

        async def wait() -> None:
            nonlocal why
            why = await new.why_not_ready()
            nursery.cancel_scope.cancel()

        with trio.move_on_after(_START):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await self._stop.drain.wait()
                why = "it is stopping, so it has ended the new generation again"
                nursery.cancel_scope.cancel()
        if why is not None:
            raise KernelError(why)

    async def outlive(self, deadline: float) -> None:
        """At the end of this process: lets the generation before it drain until `deadline` (trio.current_time()), and ends it, because what its
        connections need goes now."""
        if self._old is None:
            return
        with trio.move_on_at(deadline):
            async with trio.open_nursery() as nursery:

                async def now() -> None:
                    await self._stop.now.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(now)
                await self._old.gone.wait()
                nursery.cancel_scope.cancel()
        await self._old.end()

    async def end_old(self) -> int | None:
        """Ends the generation before this one now. Its pid, if it lived."""
        pid = self.draining
        if self._old is not None:
            await self._old.end()
        return pid


# The new one's parent until it is ready, which then leaves it to systemd (or whoever else has orphans): of a main process that is not its child systemd does not
# wait for the end, and kills the service as soon as it has asked it to stop. It ends as the new one does, kills it when it reads something, and leaves it alone at
# the end of what there is to read. argv: the numbers of that pipe and of the new one's socket, and the command.
_PARENT = """
import os, select, signal, sys
control, channel, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
os.set_inheritable(control, False)
child = os.posix_spawn(command[0], command, os.environ, setsigdef=(signal.SIGPIPE, signal.SIGXFSZ))
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.close(channel)
ended = os.pidfd_open(child)
if ended not in select.select((control, ended), (), ())[0]:
    if not os.read(control, 1):
        os._exit(0)
    os.kill(child, signal.SIGKILL)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
if code < 0:
    os.kill(os.getpid(), -code)
os._exit(code)
"""


class _New:
    """A new generation, started; blocks for some milliseconds. What it inherits is in its socket from the first moment on, so whatever becomes of this one
    then, it can serve. `pid` is known when it is ready. Raises KernelError."""

    def __init__(
        self,
        heritage: Heritage,
        lock: socket.socket,
        services: Mapping[str, int],
        listeners: list[socket.socket],
        environment: Mapping[str, str],
    ) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel = ours
        self._channel.setblocking(False)  # all of it fits into the socket's buffer
        fds = [lock.fileno(), *services.values()]
        numbers = [listener.fileno() for listener in listeners]
        self.pid = 0
        try:
            control, self._control = os.pipe()
        except OSError as error:
            ours.close()
            theirs.close()
            raise KernelError(f"cannot start a new generation: {error.strerror}") from error
        try:
            with theirs:
                _send(ours, _Heritage(os.getpid(), heritage, len(numbers), tuple(services)), fds)
                for begin in range(0, len(numbers), _FILES):
                    _send(ours, _Listeners(), numbers[begin : begin + _FILES])
                # Whatever interpreter and options this one was started with; no session of its own, so Ctrl-C ends both.
                self._parent = subprocess.Popen(
                    [
                        *(sys.executable, "-ISc", _PARENT, str(control), str(theirs.fileno())),
                        *(sys.executable, *sys.orig_argv[1:]),
                    ],
                    env={name: value for name, value in os.environ.items() if name not in _OF_ONE_PROCESS}
                    | {**environment, CHANNEL: str(theirs.fileno())},
                    pass_fds=[control, theirs.fileno()],
                )
        except OSError as error:
            ours.close()
            os.close(self._control)
            raise KernelError(f"cannot start a new generation ({sys.executable}): {error.strerror or error}") from error
        finally:
            os.close(control)

    async def why_not_ready(self) -> str | None:
        """Waits until it is, which is None, or will not be."""
        channel = trio.socket.from_stdlib_socket(self._channel)
        data = await _hear(channel)
        if not data:
            code = await in_thread(self._code)
            return f"the new generation has ended before it was ready ({code}); the log says why"
        said = msgspec.json.decode(data, type=_Said)
        if isinstance(said, _Ready):
            self.pid = said.pid
            return None
        return f"the new generation cannot serve: {said.why if isinstance(said, _Refused) else said}"

    def let_go(self) -> None:
        """It is ready, and is systemd's child from now on. Blocks for a millisecond."""
        os.close(self._control)
        with suppress(subprocess.TimeoutExpired):
            self._parent.wait(_END)

    def let_serve(self) -> None:
        """It answers orders from now on."""
        with suppress(OSError):
            _send(self._channel, _Serve())

    async def listen(self, told_to_end: trio.Event) -> None:
        """Returns when it has ended; sets the event when it says that this one has to end."""
        channel = trio.socket.from_stdlib_socket(self._channel)
        while True:
            data = await _hear(channel)
            if not data:
                _log.warning(
                    "pid %d, which serves since the hand-over, has ended: nothing new is taken here, and what lives goes on",
                    self.pid,
                )
                return
            told_to_end.set()

    def kill(self) -> None:
        """It is not wanted any more, and everything that it was given is closed there."""
        with suppress(OSError):  # it has ended
            os.write(self._control, b"k")
        self._parent.wait()
        os.close(self._control)
        self._channel.close()

    def _code(self) -> str:
        try:
            code = self._parent.wait(_END)
        except subprocess.TimeoutExpired:
            return "it says no more"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


# The verb.


def handover() -> int:
    """Asks the daemon for it, and returns when the new generation serves. 1 if it refuses, MissingError without a daemon."""
    require_capabilities("handing over", ("CAP_NET_ADMIN",))
    try:
        answer = send_order("handover")
    except (KeptError, StrangerError):
        raise
    except UnknownOrderError as error:
        error.exit_code = 1
        holder = find_holder()
        raise _refused(
            f"{error}: is it of a version that cannot, or is it `tproxyd apply --confirm`, or has the daemon died while it handed over? "
            f"{holder or 'nobody'} has this network namespace now"
        ) from error
    except KernelError as error:
        error.exit_code = 1
        raise
    if answer is None:
        raise MissingError(
            "no daemon serves this network namespace, so nothing can be handed over; start one: `tproxyd run`"
        )
    print(answer)
    return os.EX_OK


def _refused(sentence: str) -> KernelError:
    error = KernelError(sentence)
    error.exit_code = 1
    return error
