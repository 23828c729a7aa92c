"""nft in a namespace where one only passes: opened when there is something to be said, closed at the end of the step.

libnftables can be used by a process with many files only as long as its socket has a low number (`nft._open_context`), and a program that
keeps hundreds of namespaces or thousands of connections has none free by chance. So some are kept for it.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from tproxyd.errors import KernelError, MissingError
from tproxyd.kernel.nft import Library, Nft, Program

__all__ = ["LowFiles", "Passing"]

_LOW = 1024  # FD_SETSIZE


class LowFiles:
    """Keeps so many numbers of files for libnftables; that many contexts may be open at a time, and who is one too many waits. Close it."""

    def __init__(self, count: int) -> None:
        self._turns = threading.Semaphore(count)
        self._kept: deque[int] = deque()
        for _ in range(count):
            self._keep_one()

    def _keep_one(self) -> None:
        """Where there is none at the moment, there is one less: the next turn tries again."""
        with suppress(OSError):
            fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)  # the lowest number that is free
            if fd < _LOW:
                self._kept.append(fd)
            else:
                os.close(fd)

    @contextmanager
    def turn(self) -> Iterator[Nft]:
        """The library for the length of the block; the program where there is no library, or no number for it."""
        with self._turns:
            if not self._kept:
                self._keep_one()
            fd = self._kept.popleft() if self._kept else None
            try:
                library = Library(give_up=fd, passing=True)
            except (KernelError, MissingError) as error:
                if isinstance(error, MissingError) and fd is not None:
                    self._kept.append(fd)  # it was not come to that
                else:
                    self._keep_one()
                yield Program()
                return
            try:
                with library:
                    yield library
            finally:
                self._keep_one()

    def close(self) -> None:
        """Harmless when repeated."""
        while self._kept:
            os.close(self._kept.popleft())


class Passing:
    """Speaks to the kernel in the namespace of the calling thread, for the length of a step; a context manager. Owns no tables.

    `spellings` are shared with others, `listed` is what was listed in this namespace the last time.
    """

    def __init__(
        self, files: LowFiles, spellings: dict[str, str], listed: tuple[int, dict[str, str]] | None = None
    ) -> None:
        self.spellings = spellings
        self.listed = listed
        self._files = files
        self._stack = ExitStack()
        self._nft: Nft | None = None

    def __enter__(self) -> Passing:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, text: str) -> str:
        return self._speaker().run(text)

    def check(self, text: str) -> None:
        self._speaker().check(text)

    @contextmanager
    def fresh(self) -> Iterator[Nft]:
        yield Program()  # a second turn within the first could wait for itself

    def _speaker(self) -> Nft:
        if self._nft is None:
            self._nft = self._stack.enter_context(self._files.turn())
        return self._nft
