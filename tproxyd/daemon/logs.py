"""The two logs: what the daemon has to say on stderr, and one line a connection on stdout.

Neither ever holds the data path up: lines go through a bounded queue to a thread that writes. When whoever reads stops reading,
lines are dropped and counted, whole lines only.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import stat
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from tproxyd.config import Config
from tproxyd.config.wording import printable
from tproxyd.daemon.journal import is_journal, with_priority
from tproxyd.datapath import Record

__all__ = ["AccessLog", "LineWriter", "access_format", "encode_line", "set_log_level", "set_up_logging"]

_QUEUE = 8192  # lines; at 300 bytes a line some 2 MiB, and a second of full load
_BATCH = 65536  # bytes a write
_PIPE_BATCH = 4096  # PIPE_BUF (linux/limits.h): a pipe takes that in one piece or not at all, so no line of that length is ever cut
_FLUSH = 1.0  # seconds given to the last lines at the end of the process


class LineWriter:
    """Writes lines to a file descriptor from a thread of its own; `convert` makes of the lines given what is written.

    Close it to have the last lines written. `dropped` counts the lines that were not written, and is final after that.
    """

    def __init__(self, fd: int, convert: Callable[[bytes], bytes] | None = None) -> None:
        self._fd = fd
        self.is_journal = is_journal(fd)
        # Into a pipe or a socket (the journal's), into which others may write, too, another generation at least, no more at a time than it
        # takes in one piece.
        mode = os.fstat(fd).st_mode
        self._batch = _PIPE_BATCH if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) else _BATCH
        self.convert = convert
        self._chunks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._taken = self._done = 0
        self._failed = 0
        self._torn = self._closed = False
        self.dropped = 0
        # A daemon thread: a reader that never reads again must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=f"lines to {fd}", daemon=True)
        self._thread.start()

    def write(self, lines: bytes) -> None:
        """Queues whole lines, one or more. Never blocks: when too many wait, they are dropped and counted."""
        count = lines.count(b"\n")
        if self._taken - self._done + count > _QUEUE:
            self.dropped += count
        else:
            self._taken += count
            self._chunks.put(lines)

    def close(self) -> None:
        """Waits up to a second for the queued lines; what nobody took by then counts as dropped, and is not written any more (but
        for the few lines of a write that is under way)."""
        self._chunks.put(None)
        self._thread.join(_FLUSH)
        self._closed = True
        self.dropped += self._taken - self._done + self._failed

    def _run(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            for batch in _batches(self._converted(chunk), self._batch):
                if self._closed:
                    return
                count = batch.count(b"\n")
                if not self._write_whole(batch):
                    self._failed += count
                self._done += count

    def _converted(self, chunk: bytes) -> bytes:
        convert = self.convert
        if convert is None:
            return chunk
        try:
            return convert(chunk)
        except Exception as error:  # whatever is wrong with one line, the thread must live on for the others
            return f"lines that cannot be written: {error!r}\n".encode(errors="backslashreplace")

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


class AccessLog:
    """The access log on a file descriptor, as [log] says it, which may change meanwhile. Close it."""

    def __init__(self, config: Config, fd: int) -> None:
        self._fd = fd
        self._writer: LineWriter | None = None
        self._on = False
        self.set_up(config)

    def set_up(self, config: Config) -> None:
        """Goes over to another configuration; lines that wait already are written, too."""
        self._on = config.log.access
        if self._on and self._writer is None:
            self._writer = LineWriter(self._fd)
        if self._writer is not None:
            self._writer.convert = access_format(config, self._fd)

    def write(self, lines: bytes) -> None:
        """Queues whole lines of JSON, as LineWriter does; takes no notice of them while the log is off."""
        if self._on and self._writer is not None:
            self._writer.write(lines)

    @property
    def dropped(self) -> int:
        return self._writer.dropped if self._writer is not None else 0

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _batches(lines: bytes, size: int) -> Iterator[bytes]:
    """Whole lines, as many at a time as fit in `size` bytes; a longer one comes alone."""
    begin = 0
    while begin < len(lines):
        end = len(lines)
        if end - begin > size:
            end = (lines.rfind(b"\n", begin, begin + size) + 1) or (lines.find(b"\n", begin) + 1) or end
        yield lines[begin:end]
        begin = end


def access_format(config: Config, fd: int) -> Callable[[bytes], bytes] | None:
    """How records in JSON become lines of the access log that goes to `fd`, by `log.format`. None: as they are."""
    text = os.isatty(fd) if config.log.format == "auto" else config.log.format == "text"
    return _text_lines if text else None


def set_up_logging(config: Config, stderr: LineWriter) -> None:
    """Sends the daemon's own messages to stderr, as `tproxyd: level: message`; where that is the journal, with their priority."""
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        logging.addLevelName(level, logging.getLevelName(level).lower())
    handler = _Handler(stderr)
    handler.setFormatter(_Formatter("tproxyd: %(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=config.log.level.upper(), force=True)


def set_log_level(config: Config) -> None:
    """Changes what is worth a line of the daemon's own messages."""
    logging.getLogger().setLevel(config.log.level.upper())


class _Formatter(logging.Formatter):
    """Others' names stand in messages: none makes a line of its own, or does anything to a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the standard library's name
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802  # as above
        return printable(super().formatException(ei), keep="\n")


class _Handler(logging.Handler):
    def __init__(self, stderr: LineWriter) -> None:
        super().__init__()
        self._stderr = stderr

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if self._stderr.is_journal:
                text = with_priority(text, record.levelno)
            self._stderr.write(encode_line(text))
        except Exception:  # as every handler of the standard library: a wrong argument is told, and hurts nobody
            self.handleError(record)


def encode_line(text: str) -> bytes:
    """A line of text as bytes, its end included, whatever is in it."""
    return f"{text}\n".encode(errors="backslashreplace")


def _text_lines(lines: bytes) -> bytes:
    return b"".join(_text_line(msgspec.json.decode(line, type=Record)) for line in lines.splitlines())


def _text_line(record: Record) -> bytes:
    r = record
    return (
        f"{r.ts} {r.id} {r.workload} {r.direction} {r.protocol} {r.source or '-'} -> {r.original_destination or '-'}"
        f" upstream {r.upstream or '-'} as {r.upstream_source or '-'} rule {r.rule or '-'}"
        f" sent {r.bytes_from_client} received {r.bytes_from_upstream} in {r.duration_ms:.1f} ms: {r.outcome}\n"
    ).encode()
