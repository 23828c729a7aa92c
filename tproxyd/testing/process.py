"""Real programs inside a node: started there, watched, never left behind.

Knows that a child inherits the namespace of the *thread* that starts it, so a program is started with plain Popen from a
throwaway thread inside the node. That needs no preexec_fn (which runs Python between fork and exec, in a process that has
threads) and no wrapper such as nsenter. Refuses to know what the programs are.

trio.open_process cannot do it: it starts from a cached thread, which must never enter a namespace. The pieces that it
gives are few, and here: pidfd for the end, FdStream for the pipes.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import IO

import trio

from tproxyd.net.namespaces import call_in_namespace
from tproxyd.testing.build import LabError

__all__ = ["Finished", "LabProcess", "open_process", "run_program"]

Finished = subprocess.CompletedProcess[str]
"""args, returncode, stdout, stderr; text is UTF-8 with what is not replaced."""

_ADMIN_DIRECTORIES = (
    "/usr/local/sbin:/usr/sbin:/sbin"  # nft and ip; not in the PATH of a Debian user, nor of every sudo
)
_KILL_SECONDS = 5.0  # SIGKILL acts in ms unless the process hangs in the kernel
_CHUNK = 65536


class LabProcess:
    """One running program. Made by `open_process`, which also ends it.

    `stdin`, `stdout`, `stderr` are trio streams where PIPE was asked for, else None. With `collect`, both outputs are read
    in the background instead: `stdout_text` and `stderr_text` have what came so far.
    """

    def __init__(self, popen: subprocess.Popen[bytes], *, collect: bool) -> None:
        self.args = popen.args
        self.pid = popen.pid
        self._popen = popen
        self._pidfd = os.pidfd_open(popen.pid)  # the process is our unreaped child, so the number is still its own
        self._waiting = trio.Lock()  # trio lets only one task wait for a descriptor
        self.stdin = _take_over(popen.stdin)
        self.stdout = _take_over(popen.stdout)
        self.stderr = _take_over(popen.stderr)
        self._outputs: list[_Collector] = []
        if collect:
            assert self.stdout is not None
            assert self.stderr is not None
            self._outputs = [_Collector(self.stdout), _Collector(self.stderr)]
            self.stdout = self.stderr = None

    @property
    def returncode(self) -> int | None:
        """None while it runs; -N if signal N ended it."""
        return self._popen.poll()

    @property
    def stdout_text(self) -> str:
        return self._outputs[0].text() if self._outputs else ""

    @property
    def stderr_text(self) -> str:
        return self._outputs[1].text() if self._outputs else ""

    def send_signal(self, number: int) -> None:
        """Nothing happens if it has ended."""
        if self.returncode is None:
            signal.pidfd_send_signal(self._pidfd, number)

    async def wait(self) -> int:
        """Until it has ended; its return code. With `collect`, the outputs are complete then (unless a child of it, still
        running, holds them open)."""
        async with self._waiting:
            if self.returncode is None:
                await trio.lowlevel.wait_readable(self._pidfd)
                self._popen.wait()
        with trio.move_on_after(1):
            for output in self._outputs:
                await output.ended.wait()
        assert self._popen.returncode is not None
        return self._popen.returncode

    async def wait_for_output(self, text: str, *, timeout: float = 10.0) -> str:
        """Needs `collect`: until `text` was printed, to whichever output; the line with it. LabError if it never comes."""
        assert self._outputs, "wait_for_output needs process(..., collect=True)"
        with trio.move_on_after(timeout):
            while True:
                changed = [output.changed for output in self._outputs]
                for output in self._outputs:
                    # A line counts once it is whole, so that the caller can read all of it.
                    for line in output.text().splitlines(keepends=True):
                        if text in line and (line.endswith("\n") or output.ended.is_set()):
                            return line.rstrip("\n")
                if all(output.ended.is_set() for output in self._outputs):
                    await self.wait()  # so that its code can be told; it closes its outputs a moment before it ends
                    break
                await _wait_for_any(changed)
        state = f"runs (pid {self.pid})" if self.returncode is None else f"ended with {self.returncode}"
        raise LabError(
            f"{self.args!r} did not print {text!r} within {timeout:g} s; it {state}\n"
            f"--- stdout\n{self.stdout_text}--- stderr\n{self.stderr_text}"
        )

    async def aclose(self) -> None:
        """Kills it if it still runs, and closes what belongs to it; also when cancelled."""
        try:
            self.send_signal(signal.SIGKILL)
            with trio.move_on_after(_KILL_SECONDS, shield=True) as scope:
                async with self._waiting:
                    if self.returncode is None:
                        await trio.lowlevel.wait_readable(self._pidfd)
                        self._popen.wait()
            if scope.cancelled_caught:
                raise LabError(f"{self.args!r} (pid {self.pid}) survived SIGKILL for {_KILL_SECONDS:g} s")
        finally:
            for output in self._outputs:
                output.close()
            for stream in (self.stdin, self.stdout, self.stderr):
                if stream is not None:
                    stream.close()
            os.close(self._pidfd)


class _Collector:
    # Reads a pipe from a system task: a nursery inside an asynccontextmanager would wrap every exception of the caller's
    # block in a group. The task touches nothing but its stream, and ends when that is closed.
    def __init__(self, stream: trio.lowlevel.FdStream) -> None:
        self.ended = trio.Event()
        self.changed = trio.Event()  # replaced by a new one at each change
        self._stream = stream
        self._data = bytearray()
        trio.lowlevel.spawn_system_task(self._read)

    def text(self) -> str:
        return self._data.decode("utf-8", errors="replace")

    def close(self) -> None:
        self._stream.close()

    async def _read(self) -> None:
        try:
            while chunk := await self._stream.receive_some(_CHUNK):
                self._data += chunk
                self._tell()
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            pass
        finally:
            self.ended.set()
            self._tell()

    def _tell(self) -> None:
        changed, self.changed = self.changed, trio.Event()
        changed.set()


async def _wait_for_any(events: Sequence[trio.Event]) -> None:
    async def wait(event: trio.Event) -> None:
        await event.wait()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for event in events:
            nursery.start_soon(wait, event)


def _take_over(pipe: IO[bytes] | None) -> trio.lowlevel.FdStream | None:
    if pipe is None:
        return None
    fd = os.dup(pipe.fileno())
    pipe.close()
    return trio.lowlevel.FdStream(fd)


def environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    """This process's, with the administrator's directories in PATH, and `extra` on top."""
    path = os.environ.get("PATH", "/usr/bin:/bin")
    return {**os.environ, "PATH": f"{path}:{_ADMIN_DIRECTORIES}", **(extra or {})}


@asynccontextmanager
async def open_process(
    netns: int,
    argv: Sequence[str],
    *,
    stdin: int | None = subprocess.DEVNULL,
    stdout: int | None = None,
    stderr: int | None = None,
    collect: bool = False,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    pass_fds: Sequence[int] = (),
) -> AsyncIterator[LabProcess]:
    """A program that is killed when the block ends, however it ends. Its outputs go where the test's go, unless told."""
    if collect:
        stdout = stderr = subprocess.PIPE

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            list(argv),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=environment(env),
            cwd=cwd,
            pass_fds=tuple(pass_fds),
        )

    try:
        popen = call_in_namespace(netns, start)
    except FileNotFoundError as error:
        raise LabError(
            f"there is no program {error.filename!r} on this machine (looked in PATH and /usr/sbin)"
        ) from error
    process = LabProcess(popen, collect=collect)
    try:
        await trio.lowlevel.checkpoint()
        yield process
    finally:
        await process.aclose()


async def run_program(
    netns: int,
    argv: Sequence[str],
    *,
    input: str | bytes | None,  # noqa: A002  # the name that subprocess.run and trio.run_process use
    check: bool,
    timeout: float,
    env: Mapping[str, str] | None,
    cwd: str | None,
) -> Finished:
    """To its end. LabError with what it printed if it fails and `check`, or takes longer than `timeout` seconds."""
    stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
    async with open_process(netns, argv, stdin=stdin, collect=True, env=env, cwd=cwd) as process:

        async def feed() -> None:
            assert process.stdin is not None
            assert input is not None
            # It may not want to read all of it; its return code tells whether that is an error.
            with suppress(trio.BrokenResourceError):
                await process.stdin.send_all(input.encode() if isinstance(input, str) else input)
            await process.stdin.aclose()

        with trio.move_on_after(timeout) as scope:
            async with trio.open_nursery() as nursery:
                if input is not None:
                    nursery.start_soon(feed)
                await process.wait()
                nursery.cancel_scope.cancel()
        outputs = f"--- stdout\n{process.stdout_text}--- stderr\n{process.stderr_text}"
        if scope.cancelled_caught:
            raise LabError(f"{list(argv)!r} did not end within {timeout:g} s\n{outputs}")
        if check and process.returncode != 0:
            raise LabError(f"{list(argv)!r} ended with {process.returncode}\n{outputs}")
        assert process.returncode is not None
        return Finished(list(argv), process.returncode, process.stdout_text, process.stderr_text)
