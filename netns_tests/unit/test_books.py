"""What the books of a relay loop say to its owner, and what they keep of it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

import msgspec
import pytest

from tproxyd.datapath import books as room
from tproxyd.datapath import report
from tproxyd.datapath.books import Books


class Clock:
    now = 1000.0


class Told:
    """Books, and what their owner hears."""

    def __init__(self, owner: socket.socket, channel: socket.socket) -> None:
        self.clock = Clock()
        self.books = Books(self.clock, channel, per_source=0)
        self._owner = owner

    def lines(self) -> list[str]:
        assert self.books.report()
        lines: list[str] = []
        while True:
            try:
                message = self._owner.recv(1 << 16)
            except BlockingIOError:
                return lines
            assert message[:1] == report.LOG
            lines.append(msgspec.msgpack.decode(message[1:], type=report.LogLine).text)


@pytest.fixture
def told() -> Iterator[Told]:
    owner, channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with owner, channel:
        owner.setblocking(False)
        channel.setblocking(False)
        yield Told(owner, channel)


def test_the_same_and_another_of_its_kind_are_said_once_in_five_seconds(told: Told) -> None:
    for text in ("one", "one", "two"):
        told.books.remark(text)
        told.books.remark(f"{text} of a kind", kind="kind")
    assert told.lines() == ["one", "one of a kind", "two"]
    told.clock.now += 4.9
    told.books.remark("two of a kind", kind="kind")
    assert told.lines() == []
    told.clock.now += 0.1
    told.books.remark("two of a kind", kind="kind")
    assert told.lines() == ["two of a kind"]


def test_errors_of_one_number_are_one_kind_whatever_the_connection(told: Told) -> None:
    for number in (errno.EIO, errno.EIO, errno.ENOMEM):
        for connection in ("first", "second"):
            told.books.complain(OSError(number, os.strerror(number)), "connection %s failed", connection)
    assert [line.partition(" failed")[0] for line in told.lines()] == ["connection first"] * 2


def test_what_has_been_said_is_not_kept_for_ever(told: Told) -> None:
    """Texts with addresses in them are as many as there are clients."""
    for number in range(3 * room._MOST_SAID):
        told.books.remark(f"from {number}")
        told.clock.now += 0.1
        assert told.lines() == [f"from {number}"]
        assert len(told.books._said) <= room._MOST_SAID


def test_more_kinds_than_can_be_meant_are_not_said_within_five_seconds(told: Told) -> None:
    lines = []
    for number in range(3 * room._MOST_SAID):
        told.books.remark(f"from {number}")
        lines += told.lines()
    assert lines == [f"from {number}" for number in range(room._MOST_SAID)]
    told.clock.now += 5
    told.books.remark("from 0")
    told.books.remark("from nobody yet")
    assert told.lines() == ["from 0", "from nobody yet"]
    assert len(told.books._said) == room._MOST_SAID
