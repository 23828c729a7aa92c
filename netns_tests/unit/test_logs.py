"""The log writer: nothing blocks it for good, nothing is cut, nothing is lost uncounted."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator

import pytest

from tproxyd.config import Config
from tproxyd.daemon.logs import LineWriter, encode_line, set_up_logging


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def read_all(fd: int) -> bytes:
    os.set_blocking(fd, False)
    data = b""
    while True:
        try:
            chunk = os.read(fd, 65536)
        except BlockingIOError:
            return data
        if not chunk:
            return data
        data += chunk


def test_lines_come_whole_and_in_order(pipe: tuple[int, int]) -> None:
    writer = LineWriter(pipe[1])
    for number in range(0, 3000, 3):  # several at a time, as they come from the relay loops
        writer.write(b"".join(encode_line(f"line {number + more}") for more in range(3)))
    writer.close()
    assert read_all(pipe[0]).decode().splitlines() == [f"line {number}" for number in range(3000)]
    assert writer.dropped == 0


def test_lines_that_cannot_be_converted_cost_no_others(pipe: tuple[int, int]) -> None:
    def convert(lines: bytes) -> bytes:
        return lines.decode("ascii").upper().encode()

    writer = LineWriter(pipe[1], convert)
    for line in ("before", "\xe4", "after"):
        writer.write(encode_line(line))
    writer.close()
    before, bad, after = read_all(pipe[0]).decode().splitlines()
    assert (before, after) == ("BEFORE", "AFTER")
    assert bad.startswith("lines that cannot be written: UnicodeDecodeError(")
    assert writer.dropped == 0  # each is told


def test_a_reader_that_stops_costs_lines_and_never_time(pipe: tuple[int, int]) -> None:
    writer = LineWriter(pipe[1])
    for number in range(30_000):
        writer.write(encode_line(f"{number:0100}"))
    writer.close()
    read = b""
    # To the end of the blocked thread, which must be gone before the pipe is: its number will be another file's.
    for thread in threading.enumerate():
        while thread.name == f"lines to {pipe[1]}" and thread.is_alive():
            read += read_all(pipe[0])
    lines = (read + read_all(pipe[0])).splitlines(keepends=True)
    assert {len(line) for line in lines} == {101}
    assert writer.dropped > 20_000
    # None is lost uncounted; those of the write that was under way at the end count as dropped.
    assert 30_000 <= len(lines) + writer.dropped <= 30_000 + 4096 // 101


def test_a_reader_that_has_left_costs_all_lines() -> None:
    read, write = os.pipe()
    os.close(read)
    writer = LineWriter(write)
    for _ in range(10):
        writer.write(b"x\n")
    writer.close()
    os.close(write)
    assert writer.dropped == 10


def test_a_disk_that_was_full_in_the_middle_of_a_line_does_not_glue_the_next_one_to_it(pipe: tuple[int, int]) -> None:
    """The pipe stands in for the disk: it is non-blocking and full but for some bytes, which a large write takes."""

    class Disk(LineWriter):
        full = True

        def _write_whole(self, data: bytes) -> bool:
            if self.full:
                os.write(pipe[1], data[:3])
                self._torn = True
                return False
            return super()._write_whole(data)

    disk = Disk(pipe[1])
    disk.write(b"first\n")
    while b"fir" not in (read := read_all(pipe[0])):
        threading.Event().wait(0.001)
    disk.full = False
    disk.write(b"second\n")
    disk.close()
    assert read + read_all(pipe[0]) == b"fir\nsecond\n"
    assert disk.dropped == 1


def test_messages_say_who_speaks_and_how_grave_it_is(pipe: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    writer = LineWriter(pipe[1])
    try:
        set_up_logging(Config(), writer)
        logging.getLogger("tproxyd.x").warning("%d things", 3)
        logging.getLogger("tproxyd.x").debug("not at this level")
    finally:
        writer.close()
        root.handlers[:], root.level = before
    assert read_all(pipe[0]) == b"tproxyd: warning: 3 things\n"


def test_a_message_is_one_line_whatever_is_in_it(pipe: tuple[int, int]) -> None:
    """A name with an end of line in it would forge the next one, "ready" for instance; a traceback has lines of its own."""
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    writer = LineWriter(pipe[1])
    try:
        set_up_logging(Config(), writer)
        logging.getLogger("tproxyd").warning("interface %s: Grüße", "\x1b[2J\ntproxyd: ready")
        try:
            raise ValueError("\x1b[2J")
        except ValueError:
            logging.getLogger("tproxyd").exception("failed")
    finally:
        writer.close()
        root.handlers[:], root.level = before
    first, second, *trace = read_all(pipe[0]).decode().splitlines()
    assert first == r"tproxyd: warning: interface \x1b[2J\ntproxyd: ready: Grüße"
    assert second == "tproxyd: error: failed"
    assert trace[0].startswith("Traceback")
    assert trace[-1] == r"ValueError: \x1b[2J"


def test_in_the_journal_each_line_has_its_priority(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback's, too, because each is an entry of its own."""
    status = os.fstat(pipe[1])
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    writer = LineWriter(pipe[1])
    try:
        set_up_logging(Config(), writer)
        logging.getLogger("tproxyd").warning("%d things", 3)
        logging.getLogger("tproxyd").info("<1>forged\n<1>forged")
        try:
            raise ValueError("x")
        except ValueError:
            logging.getLogger("tproxyd").exception("failed")
    finally:
        writer.close()
        root.handlers[:], root.level = before
    first, second, third, *trace = read_all(pipe[0]).decode().splitlines()
    assert first == "<4>tproxyd: warning: 3 things"
    assert second == r"<6>tproxyd: info: <1>forged\n<1>forged"
    assert third == "<3>tproxyd: error: failed"
    assert len(trace) > 2
    assert all(line.startswith("<3>") for line in trace)


@pytest.mark.parametrize("stream", ["", "0:0", "nothing"])
def test_output_that_goes_elsewhere_has_no_priorities(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch, stream: str
) -> None:
    """A service that redirects its stderr hands $JOURNAL_STREAM down all the same."""
    monkeypatch.setenv("JOURNAL_STREAM", stream)
    writer = LineWriter(pipe[1])
    writer.close()
    assert not writer.is_journal
