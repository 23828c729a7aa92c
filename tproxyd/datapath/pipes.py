"""The pipes that bulk data is spliced through: as many as the budget allows, kept for the next one when a transfer pauses.

A pipe costs two files, so a direction of a connection holds one only while much is moving in it. Who gets none copies instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from typing import NamedTuple

__all__ = ["PIPE_BYTES", "Pipe", "PipePool", "splice_error"]

PIPE_BYTES = 1024 * 1024
"""Bytes that one splice moves at most: what fs.pipe-max-size allows by default. Each splice costs some 8 us beside the bytes (the
interpreter starts cold after a turn through the network stack): 0.30 CPU seconds per GB with 1 MiB, 0.31 with 512 KiB, 0.36 with 256, 0.45 with
128, 0.55 with 64 (interleaved, six rounds)."""

# Pipes of these sizes are tried, as a user may have only so much pipe memory without a capability (fs.pipe-user-pages-soft); a user
# who has it all in use gets one page, with which copying is faster.
_SIZES = (PIPE_BYTES, 256 * 1024)
_SMALL = 64 * 1024
_SPARE = 64  # empty pipes that are kept open


def splice_error() -> OSError | None:
    """Tries splice(2) as it will be used; what is wrong with it, if anything (a seccomp filter refuses it, or there are no pipes)."""
    try:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            read, write = os.pipe2(os.O_CLOEXEC)
            try:
                ours.send(b"x")
                os.splice(theirs.fileno(), write, 1, flags=os.SPLICE_F_NONBLOCK)
                os.splice(read, theirs.fileno(), 1, flags=os.SPLICE_F_NONBLOCK)
            finally:
                os.close(read)
                os.close(write)
    except OSError as error:
        return error
    return None


class Pipe(NamedTuple):
    """The two ends, as file descriptors."""

    read: int
    write: int


class PipePool:
    """At most `budget` pipes. Close it to have all of them closed that are not in use."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._spare: list[Pipe] = []
        self.open = 0
        """Pipes that exist, in use or not."""

    def take(self) -> Pipe | None:
        """An empty pipe, or None where there is none to be had. Give it back with `put`, or end it with `discard`."""
        if self._spare:
            return self._spare.pop()
        if self.open >= self._budget:
            return None
        try:
            pipe = Pipe(*os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError:
            return None  # no file left: connections come first
        self.open += 1
        for size in _SIZES:
            with contextlib.suppress(OSError):
                fcntl.fcntl(pipe.write, fcntl.F_SETPIPE_SZ, size)
                return pipe
        if fcntl.fcntl(pipe.write, fcntl.F_GETPIPE_SZ) < _SMALL:
            self.discard(pipe)
            return None
        return pipe

    def put(self, pipe: Pipe) -> None:
        """Takes an empty pipe back."""
        if len(self._spare) < _SPARE:
            self._spare.append(pipe)
        else:
            self.discard(pipe)

    def discard(self, pipe: Pipe) -> None:
        """Closes a pipe, whatever is in it."""
        os.close(pipe.read)
        os.close(pipe.write)
        self.open -= 1

    def close(self) -> None:
        """Closes those that nobody uses."""
        while self._spare:
            self.discard(self._spare.pop())
