"""The two logs: what the daemon has to say on stderr, and one line a connection on stdout.

Neither ever holds the data path up: lines go through a bounded queue to a thread that writes. When whoever reads stops reading,
lines are dropped and counted, whole lines only.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import msgspec

from tproxyd.config import Config
from tproxyd.datapath import Record

__all__ = ["LineWriter", "access_format", "set_up_logging"]

T = TypeVar("T")

_QUEUE = 8192  # lines; at 300 bytes a line some 2 MiB, and a second of full load
# Bytes a write: a pipe takes up to PIPE_BUF (linux/limits.h) in one piece or not at all, so no line of that length is ever cut.
_BATCH = 4096
_TURN = 256  # lines taken from the queue at once: fewer system calls under load, none late when there is little
_FLUSH = 1.0  # seconds given to the last lines at the end of the process


class LineWriter(Generic[T]):
    """Writes lines to a file descriptor from a thread of its own; `encode` makes the line of what is given to `write`.

    Close it to have the last lines written. `dropped` counts the lines that were not written, and is final after that.
    """

    def __init__(self, fd: int, encode: Callable[[T], bytes]) -> None:
        self._fd = fd
        self._encode = encode
        self._lines: queue.Queue[T | None] = queue.Queue(_QUEUE)
        self._taken = self._written = 0
        self._torn = self._closed = False
        self.dropped = 0
        # A daemon thread: a reader that never reads again must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=f"lines to {fd}", daemon=True)
        self._thread.start()

    def write(self, line: T) -> None:
        """Queues one line. Never blocks: with a full queue it is dropped and counted."""
        try:
            self._lines.put_nowait(line)
            self._taken += 1
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Waits up to two seconds for the queued lines; what nobody took by then counts as dropped, and is not written any more (but
        for the few lines of a write that is under way)."""
        try:
            self._lines.put(None, timeout=_FLUSH)
            self._thread.join(_FLUSH)
        except queue.Full:
            pass  # not even the word of the end fits in: the thread is blocked, and reads the flag if it ever goes on
        self._closed = True
        self.dropped += self._taken - self._written

    def _run(self) -> None:
        running = True
        while running:
            lines = [self._lines.get()]
            while len(lines) < _TURN and not self._lines.empty():
                lines.append(self._lines.get_nowait())
            running = None not in lines and not self._closed
            for batch in _batches([self._encoded(line) for line in lines if line is not None]):
                if not self._closed and self._write_whole(b"".join(batch)):
                    self._written += len(batch)

    def _encoded(self, line: T) -> bytes:
        try:
            return self._encode(line)
        except Exception as error:  # whatever is wrong with one line, the thread must live on for the others
            return f"a line that cannot be written: {error!r}\n".encode(errors="backslashreplace")

    def _write_whole(self, data: bytes) -> bool:
        # After a disk was full in the middle of a line, the next one begins on a line of its own.
        view = memoryview(b"\n" + data if self._torn else data)
        whole = len(view)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                # Somebody else has made the open file non-blocking (a shared terminal or pipe): wait as a blocking write would.
                select.select([], [self._fd], [], 1.0)
            except OSError:
                self._torn = self._torn or len(view) < whole
                return False  # a full disk, or the reader is gone: there is no place for these lines
        self._torn = False
        return True


def _batches(lines: list[bytes]) -> Iterator[list[bytes]]:
    """The same lines in the same order, as many at a time as may be written at once."""
    batch: list[bytes] = []
    size = 0
    for line in lines:
        if batch and size + len(line) > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(line)
        size += len(line)
    if batch:
        yield batch


def access_format(config: Config, fd: int) -> Callable[[Record], bytes]:
    """How a record becomes a line of the access log that goes to `fd`, by `log.format`."""
    text = os.isatty(fd) if config.log.format == "auto" else config.log.format == "text"
    return _text_line if text else _json_line


def set_up_logging(config: Config, stderr: LineWriter[str]) -> None:
    """Sends the daemon's own messages to stderr, as `tproxyd: level: message`."""
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        logging.addLevelName(level, logging.getLevelName(level).lower())
    handler = _Handler(stderr)
    handler.setFormatter(logging.Formatter("tproxyd: %(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=config.log.level.upper(), force=True)


class _Handler(logging.Handler):
    def __init__(self, stderr: LineWriter[str]) -> None:
        super().__init__()
        self._stderr = stderr

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._stderr.write(self.format(record))
        except Exception:  # as every handler of the standard library: a wrong argument is told, and hurts nobody
            self.handleError(record)


def _json_line(record: Record) -> bytes:
    return msgspec.json.encode(record) + b"\n"


def _text_line(record: Record) -> bytes:
    r = record
    return (
        f"{r.ts} {r.id} {r.workload} {r.direction} {r.protocol} {r.source or '-'} -> {r.original_destination or '-'}"
        f" upstream {r.upstream or '-'} as {r.upstream_source or '-'} rule {r.rule or '-'}"
        f" sent {r.bytes_from_client} received {r.bytes_from_upstream} in {r.duration_ms:.1f} ms: {r.outcome}\n"
    ).encode()
