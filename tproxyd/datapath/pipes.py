"""The pipes that bulk data is spliced through: as many as the budget allows, kept for the next one when a transfer pauses.

A pipe costs two files, so a direction of a connection holds one only while much is moving in it. Who gets none copies instead.
"""

from __future__ import annotations

import fcntl
import os
from typing import NamedTuple

__all__ = ["PIPE_BYTES", "Pipe", "PipePool"]

# What one splice moves at most. Unprivileged users may have pipes of up to 1 MiB (fs.pipe-max-size).
PIPE_BYTES = 256 * 1024
_SMALL = 64 * 1024
_SPARE = 64  # empty pipes that are kept open


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
        try:
            fcntl.fcntl(pipe.write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            # Beyond this user's share of pipe memory (fs.pipe-user-pages-soft) a pipe comes with one page: copying is faster.
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
