"""Tests that run side by side, and those that run alone."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from netns_tests.turns import turn


def until_somebody_waits(file: Path) -> None:
    """/proc/locks has an arrow before who waits for a lock."""
    inode, deadline = file.stat().st_ino, time.monotonic() + 5
    while not any("->" in line and f":{inode} " in line for line in Path("/proc/locks").read_text().splitlines()):
        assert time.monotonic() < deadline, f"nobody waits for {file.name}"
        time.sleep(0.001)


def test_who_is_alone_waits_for_the_others_and_keeps_new_ones_waiting(tmp_path: Path) -> None:
    order: list[str] = []

    def start(name: str, *, alone: bool) -> threading.Thread:
        def take() -> None:
            with turn(tmp_path, alone=alone):
                order.append(name)

        thread = threading.Thread(target=take)
        thread.start()
        return thread

    with turn(tmp_path, alone=False):
        start("beside", alone=False).join(5)
        assert order == ["beside"]
        alone = start("alone", alone=True)
        until_somebody_waits(tmp_path / "room")
        late = start("late", alone=False)
        until_somebody_waits(tmp_path / "door")
        assert order == ["beside"]
    alone.join(5)
    late.join(5)
    assert sorted(order) == ["alone", "beside", "late"]
    with turn(tmp_path, alone=True):
        later = start("later", alone=False)
        until_somebody_waits(tmp_path / "room")
        assert "later" not in order
    later.join(5)
    assert order[-1] == "later"
