"""Who runs while tests run in several processes: many side by side, or one alone.

Knows the two locks that the processes of one run share; refuses to know why a test wants to be alone (marker `timed`).
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["turn"]


@contextmanager
def turn(directory: Path, *, alone: bool) -> Iterator[None]:
    """The time of one test: together with others that are not `alone`, or with nobody.

    Who waits for its turn keeps the door shut meanwhile, else those who run together would never let anybody be alone.
    """
    with (directory / "door").open("w") as door, (directory / "room").open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        try:
            yield
        finally:
            # Not left to close(): a process that the test forked and left behind would hold the lock, too.
            fcntl.flock(room, fcntl.LOCK_UN)
