"""Where a relay loop lives: in a process of its own, or in a thread of this one. Either is started with its end of the channel and ends
when it is told to, or when the other end is gone.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import trio

from tproxyd.datapath import worker
from tproxyd.datapath.loop import serve_loop
from tproxyd.errors import KernelError
from tproxyd.net.scheduling import background, came_back

__all__ = ["ProcessHome", "ThreadHome"]

_STOP = 3.0  # seconds for a process to end when it has been told to; then it is killed


class ProcessHome:
    """A loop in a process of its own, which keeps these capabilities of what this one has."""

    def __init__(self, keeps: Sequence[str]) -> None:
        self._keeps = keeps
        self._process: trio.Process | None = None

    async def start(self, channel: socket.socket) -> None:
        fd = channel.fileno()
        # -I -S: no environment and no search for site-packages; it gets the path that this process has. Shielded, because a process
        # that is being started when this is cancelled would be nobody's.
        options = ["-I", "-S", *_bytecode_options()]
        program = [sys.executable, *options, str(Path(worker.__file__))]
        how = background.get()
        # Should this thread step back just when the other one starts.
        policy = "" if how is None else str(how.usual)
        command = [*program, ":".join(sys.path), str(fd), ",".join(self._keeps), policy]
        try:
            with trio.CancelScope(shield=True), came_back():  # its first steps, too, are urgent
                self._process = await trio.lowlevel.open_process(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[fd]
                )
        except OSError as error:
            raise KernelError(f"cannot start a relay process ({sys.executable}): {error.strerror}") from error
        await trio.lowlevel.checkpoint_if_cancelled()

    async def ended(self) -> str:
        assert self._process is not None
        code = await self._process.wait()
        what = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"pid {self._process.pid}, {what}"

    async def end(self) -> None:
        if self._process is not None:
            with trio.move_on_after(_STOP):
                await self._process.wait()
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()


def _bytecode_options() -> list[str]:
    """Where this process may not leave compiled files, or leaves them elsewhere, so does the other one, which -I keeps from learning it."""
    options = ["-B"] if sys.dont_write_bytecode else []
    return options if sys.pycache_prefix is None else [*options, "-X", f"pycache_prefix={sys.pycache_prefix}"]


class ThreadHome:
    """A loop in a thread of this process."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._reason = "returned"

    async def start(self, channel: socket.socket) -> None:
        own = channel.dup()

        def run() -> None:
            try:
                serve_loop(own)
            except BaseException as error:
                self._reason = repr(error)

        self._thread = threading.Thread(target=run, name="tproxyd relay")
        self._thread.start()

    async def ended(self) -> str:
        await self.end()
        return self._reason

    async def end(self) -> None:
        if self._thread is not None:
            # It has been told to stop, or that its owner is gone: it ends within one turn of its loop.
            await trio.to_thread.run_sync(self._thread.join)
