"""Messages stay short, however much there is to say."""

from __future__ import annotations

from tproxyd.config.wording import few
from tproxyd.interceptor.pace import FewLines


def test_of_many_things_the_first_are_named_and_the_others_counted() -> None:
    assert few([]) == ""
    assert few(["a", "b"]) == "a; b"
    assert few([*"abcdefghij"], ", ") == "a, b, c, d, e, f, g, h, i, j"
    assert few([*"abcdefghijkl"], ", ") == "a, b, c, d, e, f, g, h, i, j, and 2 more"


def test_lines_beyond_so_many_a_minute_are_counted_and_told_when_there_is_room() -> None:
    now = 0.0
    lines = FewLines(3, 60.0, lambda: now)
    assert [lines.admit() for _ in range(5)] == [True, True, True, False, False]
    now = 59.0
    assert (lines.admit(), lines.left_out()) == (False, 0)
    now = 60.0
    assert (lines.left_out(), lines.left_out()) == (3, 0)  # which is a line itself
    assert [lines.admit() for _ in range(3)] == [True, True, False]
    now = 200.0
    assert (lines.left_out(), lines.left_out()) == (1, 0)
