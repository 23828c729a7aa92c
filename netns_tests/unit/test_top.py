"""`tproxyd top` without a terminal: answers and keys make a state, a state makes lines. golden_top/WIDTHxHEIGHT.txt is what two of them look like."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from tproxyd.daemon.status import Counted, Serving
from tproxyd.daemon.top import read_keys
from tproxyd.daemon.top_screen import LEAST, frame, rows_shown
from tproxyd.daemon.top_state import Close, Quit, State, close_ended, hear_list, hear_status, miss, press, visible
from tproxyd.datapath.listing import LivingConnection
from tproxyd.kernel import Change

GOLDEN = Path(__file__).parent / "golden_top"


def serving(seconds: float, **more: Any) -> Serving:
    """What a daemon tells after so many seconds: it takes two connections in each, and gets 1 KiB from clients and 1 MiB from upstreams."""
    count = int(seconds)
    told: dict[str, Any] = {
        "pid": 4711,
        "version": "0.1.0",
        "uptime_s": 8000 + seconds,
        "listen": ["127.0.0.1:15006", "[::1]:15006"],
        "marks": {},
        "capturing": True,
        "connections": 48,
        "counters": Counted(
            accepted=1000 + 2 * count,
            outcomes={"closed": 900 + count, "client_reset": 30, "upstream_refused": 22 + count // 10},
            bytes_from_client=count << 10,
            bytes_from_upstream=count << 20,
        ),
        "repairs": {},
        "trouble": "",
        "differences": [],
    }
    return Serving(**(told | more))


def living(number: int, seconds: float, **more: Any) -> LivingConnection:
    """The nth connection: it sends n bytes a second, and gets n KiB."""
    told: dict[str, Any] = {
        "id": f"{0x11E4F1FC97076000 + number:016x}",
        "workload": "host" if number % 3 else "web",
        "state": "relaying" if number != 7 else "dialling",
        "age_s": seconds + 100 - number,
        "source": f"198.51.100.{number}:4{number:04}" if number % 5 else f"[2001:db8:5::{number:x}]:4{number:04}",
        "original_destination": "203.0.113.9:8080" if number % 5 else "[2001:db8:f::9]:8443",
        "upstream": "203.0.113.9:8080" if number % 5 else "[2001:db8:f::9]:8443",
        "bytes_from_client": int(number * seconds),
        "bytes_from_upstream": int(number * seconds) << 10,
    }
    return LivingConnection(**(told | more))


def watched(*, seconds: int = 90, connections: int = 48, **more: Any) -> State:
    """After so many seconds in front of it."""
    state = State()
    for at in range(seconds + 1):
        state = hear_status(state, float(at), serving(at, **more))
        state = hear_list(state, float(at), [living(n, at) for n in range(1, connections + 1)], more=False)
    return state


def text(state: State, width: int = 120, height: int = 40, *, keys: bool = True) -> str:
    return "".join(f"{line.plain.rstrip()}\n" for line in frame(state, width, height, keys=keys))


def typed(state: State, *keys: str, page: int = 10) -> State:
    for key in keys:
        state, wish = press(state, key, page)
        assert wish is None
    return state


def ids(state: State) -> list[int]:
    return [int(row.connection.id, 16) - 0x11E4F1FC97076000 for row in visible(state)]


@pytest.mark.parametrize("size", ["80x24", "120x40"])
def test_golden(size: str) -> None:
    width, height = map(int, size.split("x"))
    state = typed(watched(), "down", "down")
    if size == "80x24":
        state = typed(
            watched(trouble="a firewall of this host drops what is captured: chain inet filter input"), "f", *"8080"
        )
    assert text(state, width, height) == (GOLDEN / f"{size}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [*range(60, 130), 200, 400])
@pytest.mark.parametrize("height", [15, 24, 60])
def test_a_frame_fits_its_terminal(width: int, height: int) -> None:
    wide = living(
        99,
        90,
        source=f"[{'2001:db8:' + ':'.join(['ffff'] * 6)}]:65535",
        original_destination=f"[{'2001:db8:' + ':'.join(['ffff'] * 6)}]:65534",
        upstream="unix:/run/" + "x" * 80,
        rule="規則" * 30,
        sni="a" * 200,
        workload="w" * 100,
    )
    state = watched(seconds=3, trouble="no " * 200, last_reload_error="never " * 100)
    state = hear_list(state, 4.0, [wide, *(row.connection for row in state.rows)], more=True)
    for shown in (
        state,
        typed(state, "end"),
        typed(state, "down", "k"),
        typed(state, "f", *"x" * 60),
        miss(state, "gone " * 99),
    ):
        lines = frame(shown, width, height)
        assert len(lines) == height
        assert max(cell_len(line.plain) for line in lines) <= width
    assert ":65535" in text(state, width, height)
    assert ":65534" in text(state, width, height)


def test_a_terminal_that_is_too_small_says_so() -> None:
    width, height = LEAST
    assert text(State(), width - 1, height) == "60x15 are needed, this is 59x15\n"
    assert text(State(), 10, 3) == "60x15 are…\n"


def test_nothing_that_a_terminal_would_obey_is_shown() -> None:
    evil = "\x1b[2J\x07\x9b31m\u202e\udc80[red]x[/red]\r\n"
    state = watched(seconds=2, trouble=evil, last_reload_error=evil, version=evil, differences=[Change("rule", evil)])
    state = hear_list(
        state,
        3.0,
        [living(1, 3, workload=evil, rule=evil, sni=evil, source=evil, original_destination=evil)],
        more=False,
    )
    for shown in (
        state,
        typed(state, "down", "k"),
        miss(state, evil),
        close_ended(state, "x", evil),
        typed(state, "f", *evil),
    ):
        for line in frame(shown, 400, 40):
            assert line.plain.isprintable()
    assert "[red]" in text(state, 400)


def test_rates_are_those_between_the_last_two_answers() -> None:
    state = watched(seconds=5)
    shown = text(state)
    assert "new connections      2.0/s" in shown
    assert "from clients       1.0KB/s" in shown
    assert "from upstreams     1.0MB/s" in shown
    (row,) = [row for row in state.rows if row.connection.id.endswith("02a")]
    assert (row.from_client, row.from_upstream) == (42.0, 42 * 1024.0)
    late = hear_list(state, 9.0, [living(42, 9), living(60, 9, age_s=2.0)], more=False)
    assert [row.from_client for row in late.rows] == [42.0, 9 * 60 / 2]


def test_what_has_ended_lately_is_told_beside_the_whole() -> None:
    assert "ended (+ in the last 5 s)  closed 905 +5  client_reset 30  upstream_refused 22\n" in text(
        watched(seconds=5)
    )
    assert "ended (+ in the last minute)  closed 990 +60  upstream_refused 31 +6  client_reset 30\n" in text(watched())


def test_of_another_daemon_nothing_is_compared_with_the_one_before() -> None:
    state = hear_status(watched(), 91.0, serving(0, pid=4712, uptime_s=0.5))
    assert (len(state.moments), state.rows) == (1, ())
    assert "pid 4712  ready for 0 s" in text(state)
    assert "no connection lives" in text(state)
    assert len(hear_status(watched(), 91.0, serving(0, uptime_s=0.5)).moments) == 1


def test_a_daemon_that_is_not_heard_is_told_and_the_last_answer_stays() -> None:
    state = miss(watched(), "no daemon is asked at /run/x. Trying again")
    shown = text(state)
    assert "no daemon is asked at /run/x. Trying again\n" in shown
    assert "198.51.100.48:40048" in shown
    assert "Trying again" not in text(hear_status(state, 91.0, serving(91)))


def test_trouble_capture_and_differences_are_in_the_head() -> None:
    change = Change("rule", "an ip rule is missing")
    shown = text(watched(seconds=1, capturing=False, differences=[change, change], last_reload_error="ports: no port"))
    assert "capture off" in shown
    assert (
        "the kernel does not hold what is planned: an ip rule is missing, and 1 more; see `tproxyd plan --diff`"
        in shown
    )
    assert "the last reload failed, an older configuration is in force: ports: no port" in shown


def test_connections_are_sorted_by_rate_bytes_and_age() -> None:
    state = hear_list(
        watched(), 91.0, [living(n, 91, bytes_from_client=n if n < 10 else 0) for n in range(1, 49)], more=False
    )
    assert ids(watched())[:3] == [48, 47, 46]
    state = typed(state, "s")
    assert (state.sort, ids(state)[:3]) == ("bytes", [48, 47, 46])
    state = typed(state, "s")
    assert (state.sort, ids(state)[:3]) == ("age", [1, 2, 3])
    assert typed(state, "s").sort == "rate"
    assert "age▼" in text(state, *LEAST), "a column by which is sorted is not left out"


def test_a_filter_is_typed_kept_and_cleared() -> None:
    state = typed(watched(), "f", *"2001:DB8:5::A", "backspace", "a")
    assert state.typing
    assert ids(state) == [10]
    state = typed(state, "enter", "s")
    assert (state.typing, state.sort) == (False, "bytes"), "an s of the filter is none of the keys"
    assert ids(state) == [10]
    assert "filter: 2001:DB8:5::a" in text(state)
    assert len(ids(typed(state, "escape"))) == 48
    assert len(ids(typed(state, "f", "escape"))) == 48
    assert "none of 48 connections has 'nowhere'" in text(typed(watched(), "f", *"nowhere"))


def test_the_selected_connection_stays_selected_while_others_pass_it() -> None:
    state = typed(watched(), "down", "down", "down")
    assert state.selected.endswith("02e"), "the third: 46"
    moved = hear_list(
        state, 91.0, [living(n, 91, bytes_from_upstream=n << 40 if n == 1 else 0) for n in range(1, 49)], more=False
    )
    assert moved.selected == state.selected
    gone = hear_list(state, 91.0, [living(n, 91) for n in range(1, 46)], more=False)
    assert gone.selected.endswith("02b"), "the third of those that are left: 43"
    assert hear_list(gone, 92.0, [], more=False).selected == ""


@pytest.mark.parametrize(
    ("keys", "first"),
    [
        ((), "1-10"),
        (("down",), "1-10"),
        (("page down",), "11-20"),
        (("end",), "41-48"),
        (("end", "page up"), "31-40"),
        (("end", "home"), "1-10"),
    ],
)
def test_the_screen_follows_the_selected_connection(keys: tuple[str, ...], first: str) -> None:
    assert rows_shown(watched(), 100, 18) == 10
    assert f"{first} of 48\n" in text(typed(watched(), *keys), 100, 18)


def test_a_connection_is_closed_after_a_question() -> None:
    state = typed(watched(), "k")
    assert "choose a connection first" in text(state)
    asked = typed(state, "down", "k")
    assert " y closes 198.51.100.48:40048 to 203.0.113.9:8080, with a reset on both sides" in text(asked)
    state, wish = press(asked, "y", 10)
    assert wish == Close(living(48, 0).id)
    assert len(close_ended(state, living(48, 0).id).rows) == 47
    assert "members of group" in text(close_ended(state, living(48, 0).id, "members of group tproxyd may look"))
    for key in ("n", "escape", "q", "enter", "k"):
        after, nothing = press(asked, key, 10)
        assert (after.closing, nothing, "not closed" in text(after)) == ("", None, True)
    ended = hear_list(asked, 91.0, [living(1, 91)], more=False)
    assert "it has ended by itself" in text(ended)
    again = close_ended(asked, asked.closing)
    assert (again.closing, "closed" in text(again)) == ("", True), "asked for twice, and gone after the first"
    assert press(ended, "y", 10)[1] is None


def test_a_message_goes_after_some_seconds_or_with_the_next_key() -> None:
    state = typed(watched(), "k")
    assert "choose a connection" in text(hear_status(state, 93.0, serving(93)))
    assert "choose a connection" not in text(hear_status(state, 95.0, serving(95)))
    assert "choose a connection" not in text(typed(state, "s"))


def test_q_is_the_end_but_not_in_a_filter() -> None:
    assert press(watched(), "q", 10)[1] == Quit()
    assert press(typed(watched(), "f"), "q", 10)[1] is None


def test_a_pause_is_shown() -> None:
    assert "capture on   paused\n" in text(typed(watched(), "p"))
    assert replace(typed(watched(), "p", "p"), message="") == watched()


def test_one_frame_as_text_has_no_keys_in_it() -> None:
    shown = text(watched(), keys=False)
    assert "quit" not in shown
    assert shown.count("\n") == 40


@pytest.mark.parametrize(
    ("data", "keys", "rest"),
    [
        (b"q", ["q"], b""),
        (b"\x1b[A\x1bOBx", ["up", "down", "x"], b""),
        (b"\x1b[5~\x1b[6~\x1b[H\x1b[F", ["page up", "page down", "home", "end"], b""),
        (b"\r\x7f\x08\t\x00", ["enter", "backspace", "backspace"], b""),
        (b"\x1b", [], b"\x1b"),
        (b"a\x1b[", ["a"], b"\x1b["),
        (b"\x1b[1;5A\x1b[200~z", ["z"], b""),
        (b"\x1bx", ["escape", "x"], b""),
        ("ä規".encode(), ["ä", "規"], b""),
        ("ä".encode()[:1], [], "ä".encode()[:1]),
        (b"\xff\x80z", [], b"\xff\x80z"),
    ],
)
def test_keys_are_read_as_a_terminal_sends_them(data: bytes, keys: list[str], rest: bytes) -> None:
    assert read_keys(data) == (keys, rest)
    whole, nothing = read_keys(data, whole=True)
    assert whole[: len(keys)] == keys
    assert nothing == b""


def test_esc_alone_is_a_key_when_nothing_follows() -> None:
    assert read_keys(b"\x1b", whole=True) == (["escape"], b"")


def test_without_rich_there_is_one_sentence() -> None:
    code = "import sys; sys.modules['rich'] = None; from tproxyd.daemon.cli import main; sys.exit(main(['top']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (69, "")
    assert line.startswith("tproxyd: `tproxyd top` needs the Python package rich, which is not there; install it")
