"""The two logs: what the daemon has to say on stderr, and one line a connection on stdout.

The access log never holds a connection up: lines go through a bounded queue to a thread that writes. When whoever reads
stdout stops reading, lines are dropped and counted, whole lines only.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
from typing import Literal

import msgspec

from tproxyd.config import Config
from tproxyd.datapath import Record

__all__ = ["AccessLog", "set_up_logging"]

_QUEUE = 8192  # lines; at 300 bytes a line some 2 MiB, and a second of full load
_BATCH = 256  # lines a write: fewer system calls under load, none late when there is little
_FLUSH = 1.0  # seconds given to the last lines at the end of the process


def set_up_logging(config: Config) -> None:
    """Sends the daemon's own messages to stderr, as `tproxyd: level: message`."""
    logging.basicConfig(
        stream=sys.stderr,
        level=config.log.level.upper(),
        format="tproxyd: %(levelname)s: %(message)s",
        force=True,
    )
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        logging.addLevelName(level, logging.getLevelName(level).lower())


class AccessLog:
    """Writes records to a file descriptor from a thread of its own. Close it to have the last lines written."""

    def __init__(self, config: Config, *, fd: int) -> None:
        form: Literal["text", "json"] | str = config.log.format
        if form == "auto":
            form = "text" if os.isatty(fd) else "json"
        self._format = _text_line if form == "text" else _json_line
        self._fd = fd
        self._lines: queue.Queue[Record | None] = queue.Queue(_QUEUE)
        self.dropped = 0
        # A daemon thread: a reader that never reads again must not keep the process from ending.
        self._thread = threading.Thread(target=self._write, name="access-log", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        """Queues one record. Never blocks: with a full queue the record is dropped and counted."""
        try:
            self._lines.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Waits up to a second for the queued lines; counts those that nobody took as dropped."""
        try:
            self._lines.put(None, timeout=_FLUSH)
            self._thread.join(_FLUSH)
        except queue.Full:
            pass
        if self._thread.is_alive():
            self.dropped += self._lines.qsize()

    def _write(self) -> None:
        running = True
        while running:
            records = [self._lines.get()]
            while len(records) < _BATCH and not self._lines.empty():
                records.append(self._lines.get_nowait())
            running = None not in records
            lines = [self._format(record) for record in records if record is not None]
            if not self._write_all(b"".join(lines)):
                self.dropped += len(lines)

    def _write_all(self, data: bytes) -> bool:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                # Somebody else has made the open file non-blocking (a shared terminal or pipe): wait as a blocking write would.
                import select

                select.select([], [self._fd], [], 1.0)
            except OSError:
                return False  # the reader is gone: there is no place for these lines any more
        return True


def _json_line(record: Record) -> bytes:
    return msgspec.json.encode(record) + b"\n"


def _text_line(record: Record) -> bytes:
    r = record
    return (
        f"{r.ts} {r.id} {r.workload} {r.direction} {r.protocol} {r.source or '-'} -> {r.original_destination or '-'}"
        f" upstream {r.upstream or '-'} as {r.upstream_source or '-'} rule {r.rule or '-'}"
        f" sent {r.bytes_from_client} received {r.bytes_from_upstream} in {r.duration_ms:.1f} ms: {r.outcome}\n"
    ).encode()
