"""The log writer: nothing blocks it for good, nothing is cut, nothing is lost uncounted."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator

import pytest

from tproxyd.config import Config
from tproxyd.daemon.logs import LineWriter, set_up_logging


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def encode(line: str) -> bytes:
    return f"{line}\n".encode()


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
    writer = LineWriter(pipe[1], encode)
    for number in range(3000):
        writer.write(f"line {number}")
    writer.close()
    assert read_all(pipe[0]).decode().splitlines() == [f"line {number}" for number in range(3000)]
    assert writer.dropped == 0


def test_a_line_that_cannot_be_encoded_costs_no_other(pipe: tuple[int, int]) -> None:
    writer = LineWriter(pipe[1], encode)
    for line in ("before", "\udcff", "after"):
        writer.write(line)
    writer.close()
    before, bad, after = read_all(pipe[0]).decode().splitlines()
    assert (before, after) == ("before", "after")
    assert bad.startswith("a line that cannot be written: UnicodeEncodeError(")


def test_a_reader_that_stops_costs_lines_and_never_time(pipe: tuple[int, int]) -> None:
    writer = LineWriter(pipe[1], encode)
    for number in range(20_000):
        writer.write(f"{number:0100}")
    writer.close()
    read = b""
    # To the end of the blocked thread, which must be gone before the pipe is: its number will be another file's.
    for thread in threading.enumerate():
        while thread.name == f"lines to {pipe[1]}" and thread.is_alive():
            read += read_all(pipe[0])
    lines = (read + read_all(pipe[0])).splitlines(keepends=True)
    assert {len(line) for line in lines} == {101}
    assert writer.dropped > 10_000
    # None is lost uncounted; those of the write that was under way at the end count as dropped.
    assert 20_000 <= len(lines) + writer.dropped <= 20_000 + 4096 // 101


def test_a_reader_that_has_left_costs_all_lines() -> None:
    read, write = os.pipe()
    os.close(read)
    writer = LineWriter(write, encode)
    for _ in range(10):
        writer.write("x")
    writer.close()
    os.close(write)
    assert writer.dropped == 10


def test_a_disk_that_was_full_in_the_middle_of_a_line_does_not_glue_the_next_one_to_it(pipe: tuple[int, int]) -> None:
    """The pipe stands in for the disk: it is non-blocking and full but for some bytes, which a large write takes."""

    class Disk(LineWriter[str]):
        full = True

        def _write_whole(self, data: bytes) -> bool:
            if self.full:
                os.write(pipe[1], data[:3])
                self._torn = True
                return False
            return super()._write_whole(data)

    disk = Disk(pipe[1], encode)
    disk.write("first")
    while b"fir" not in (read := read_all(pipe[0])):
        threading.Event().wait(0.001)
    disk.full = False
    disk.write("second")
    disk.close()
    assert read + read_all(pipe[0]) == b"fir\nsecond\n"
    assert disk.dropped == 1


def test_messages_say_who_speaks_and_how_grave_it_is(pipe: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    writer: LineWriter[str] = LineWriter(pipe[1], encode)
    try:
        set_up_logging(Config(), writer)
        logging.getLogger("tproxyd.x").warning("%d things", 3)
        logging.getLogger("tproxyd.x").debug("not at this level")
    finally:
        writer.close()
        root.handlers[:], root.level = before
    assert read_all(pipe[0]) == b"tproxyd: warning: 3 things\n"
