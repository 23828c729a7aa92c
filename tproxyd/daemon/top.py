"""`tproxyd top`: a live screen of a running daemon. Knows the terminal and the socket; what is kept and what is shown is `top_state`'s and `top_screen`'s.

The daemon is asked in a thread, so that keys are obeyed while it is slow, or stopped. No signal ends this by itself: each one is a byte on the socket that
the loop waits for, so that whatever happens comes between two screens, and the terminal is put back.
"""

from __future__ import annotations

import os
import queue
import select
import shutil
import signal
import socket
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import msgspec
from rich.console import Console
from rich.text import Text

from tproxyd.daemon.client import Listed, ask, socket_path
from tproxyd.daemon.status import Serving
from tproxyd.daemon.top_screen import frame, rows_shown
from tproxyd.daemon.top_state import Close, Quit, State, close_ended, hear_list, hear_status, miss, press
from tproxyd.errors import KernelError, TproxydError

__all__ = ["look", "read_keys", "top"]

_PERIOD = 1.0  # seconds between two questions
_SHARE = 4  # of the time that a list took, until the next one: with many thousands they come more seldom
_MOST = 10_000  # connections of a list: 3.5 MB
_PATIENCE = 5.0  # seconds for each piece of an answer
_REST_OF_KEY = 0.05  # seconds for the rest of what a key sends: Esc alone is one, too
_PLAIN = (120, 40)  # columns and lines where there is no terminal

_ENDING = (signal.SIGTERM, signal.SIGHUP)
_HEARD = (signal.SIGINT, signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT, *_ENDING)
_ANSWER = 0  # on the socket of wakings, beside the numbers of signals

_KEYS = {
    b"\x1b[A": "up",
    b"\x1bOA": "up",
    b"\x1b[B": "down",
    b"\x1bOB": "down",
    b"\x1b[5~": "page up",
    b"\x1b[6~": "page down",
    b"\x1b[H": "home",
    b"\x1bOH": "home",
    b"\x1b[1~": "home",
    b"\x1b[F": "end",
    b"\x1bOF": "end",
    b"\x1b[4~": "end",
    b"\r": "enter",
    b"\n": "enter",
    b"\x7f": "backspace",
    b"\x08": "backspace",
}


class _Heard(NamedTuple):
    """What the daemon answered to a look; no list where it was not asked for one."""

    at: float
    serving: Serving
    listed: Listed | None


class _Failed(NamedTuple):
    error: TproxydError


class _Closed(NamedTuple):
    id: str
    problem: str


class _Broken(NamedTuple):
    """A mistake of ours, in the thread that asks."""

    error: Exception


_News = _Heard | _Failed | _Closed | _Broken


def top(file: Path | None, *, once: bool) -> int:
    """Shows it until q is pressed; with `once`, or where this is no terminal, what two looks tell. Raises TproxydError if the daemon cannot be asked at
    the first look."""
    path, named = socket_path(file), file is not None
    # Whatever the locale is: a bar that it has no character for is no reason to end.
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, TextIOWrapper):
            output.reconfigure(errors="replace")
    state = look(State(), path, named=named)
    console = Console(highlight=False)
    if once or not (sys.stdin.isatty() and sys.stdout.isatty()) or console.is_dumb_terminal:
        time.sleep(_PERIOD)  # rates are of the time between two looks
        state = look(state, path, named=named)
        size = shutil.get_terminal_size(_PLAIN)
        for line in frame(state, size.columns, size.lines - sys.stdout.isatty(), keys=False):
            line.rstrip()
            console.print(line, soft_wrap=True)
        return os.EX_OK
    return _Top(state, console, path).run()


def look(state: State, path: str, *, named: bool = True) -> State:
    """Asks the daemon at the socket, and waits for it. Raises TproxydError."""
    heard = _look(path, listing=True, named=named)
    assert heard.listed is not None
    state = hear_status(state, heard.at, heard.serving)
    return hear_list(state, heard.at, heard.listed.connections, more=heard.listed.more)


def read_keys(data: bytes, *, whole: bool = False) -> tuple[list[str], bytes]:
    """The keys that a terminal sent, by name or as characters, and what may be the beginning of another one; if `whole`, there comes no more of it."""
    keys: list[str] = []
    while data:
        if data[0] == 0x1B:
            length = _sequence(data) or (len(data) if whole else 0)
            if not length:
                return keys, data
            name = "escape" if length == 1 else _KEYS.get(data[:length], "")
        elif data[:1] in _KEYS:
            length, name = 1, _KEYS[data[:1]]
        else:
            length = 1 if data[0] < 0xC0 else 2 if data[0] < 0xE0 else 3 if data[0] < 0xF0 else 4
            if len(data) < length and not whole:
                return keys, data
            character = data[:length].decode(errors="replace")
            name = character if len(character) == 1 and character.isprintable() else ""
        if name:
            keys.append(name)
        data = data[length:]
    return keys, b""


def _sequence(data: bytes) -> int:
    """The length of what begins with ESC; 0: its end is not there yet."""
    if len(data) == 1:
        return 0
    if data[1:2] == b"O":
        return 3 if len(data) > 2 else 0
    if data[1:2] != b"[":
        return 1
    return next((at + 1 for at in range(2, len(data)) if 0x40 <= data[at] <= 0x7E), 0)


def _look(path: str, *, listing: bool, named: bool = True) -> _Heard:
    told = ask(path, "GET", "/v1/status", "look", patience=_PATIENCE, named=named)
    connections = None
    if listing:
        connections = ask(path, "GET", f"/v1/connections?limit={_MOST}", "look", patience=_PATIENCE, named=named)
    try:
        serving = msgspec.json.decode(told, type=Serving)
        listed = msgspec.json.decode(connections, type=Listed) if connections is not None else None
    except msgspec.MsgspecError as error:
        raise KernelError(
            f"the daemon at {path} answers in another way than expected ({error}): is it of another version?"
        ) from error
    return _Heard(time.monotonic(), serving, listed)


class _Asker:
    """Asks the daemon in a thread of its own, one question at a time; `wake` gets a byte when `news` has an answer. `busy`: a look is not answered yet."""

    def __init__(self, path: str, wake: socket.socket) -> None:
        self.news: queue.SimpleQueue[_News] = queue.SimpleQueue()
        self.busy = False
        self._path, self._wake = path, wake
        self._closings: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._work = threading.Semaphore(0)
        self._list_due = 0.0
        # Not waited for at the end: it may be waiting for a daemon that is stopped.
        threading.Thread(target=self._run, daemon=True).start()

    def look(self) -> None:
        if not self.busy:
            self.busy = True
            self._work.release()

    def close(self, identity: str) -> None:
        self._closings.put(identity)
        self._work.release()

    def _run(self) -> None:
        while True:
            self._work.acquire()
            try:
                closing = None if self._closings.empty() else self._closings.get()
                news: _News = self._listen() if closing is None else self._close(closing)
            except Exception as error:  # told by the thread that has the terminal
                news = _Broken(error)
            self.news.put(news)
            with suppress(OSError):
                self._wake.send(bytes([_ANSWER]))

    def _listen(self) -> _News:
        began = time.monotonic()
        try:
            heard = _look(self._path, listing=began >= self._list_due)
        except TproxydError as error:
            self._list_due = 0.0
            return _Failed(error)
        if heard.listed is not None:
            # Less than the period, so that a list that is made at once comes with every status.
            self._list_due = heard.at + _SHARE * (heard.at - began) - _PERIOD / 2
        return heard

    def _close(self, identity: str) -> _Closed:
        try:
            ask(self._path, "DELETE", f"/v1/connections/{quote(identity, safe='')}", "close it", patience=_PATIENCE)
        except TproxydError as error:
            return _Closed(identity, str(error))
        return _Closed(identity, "")


class _Top:
    """The screen on a terminal, from the first frame to the last one."""

    def __init__(self, state: State, console: Console, path: str) -> None:
        self._state, self._console, self._path = state, console, path
        self._terminal = _Terminal(console)
        self._typed = b""  # the beginning of a key, perhaps

    def run(self) -> int:
        with _signals_as_bytes() as (wakings, wake):
            try:
                self._terminal.enter()
                ending = self._serve(wakings, _Asker(self._path, wake))
            finally:
                self._terminal.leave()
        if ending:
            os.kill(os.getpid(), ending)  # as whoever sent it expects, now that the terminal is as it was
        return os.EX_OK

    def _serve(self, wakings: socket.socket, asker: _Asker) -> int:
        """Until it is to end; the number of the signal that wants it, 0 for the user."""
        keyboard, due, changed = sys.stdin.fileno(), time.monotonic() + _PERIOD, True
        while True:
            if changed:
                self._draw()
            now = time.monotonic()
            if now >= due:
                due = max(due + _PERIOD, now)
                if not self._state.paused:
                    asker.look()
            wait = _REST_OF_KEY if self._typed else max(due - now, 0.0)
            readable, _, _ = select.select([wakings, keyboard], [], [], wait)
            changed = bool(readable or self._typed)
            if wakings in readable:
                for number in wakings.recv(4096):
                    if number == signal.SIGINT:
                        return 0
                    if number in _ENDING:
                        return number
                    if number == signal.SIGTSTP:  # Ctrl-Z: the shell's turn, on a terminal as it was
                        self._terminal.leave()
                        os.kill(os.getpid(), signal.SIGSTOP)
                    if number in (signal.SIGTSTP, signal.SIGCONT):
                        self._terminal.enter()
                while not asker.news.empty():
                    self._hear(asker, asker.news.get())
            if keyboard in readable:
                data = _typed(keyboard)
                keys, self._typed = read_keys(self._typed + data)
                if not data or self._obey(asker, keys):
                    return 0
            elif not readable and self._typed:
                keys, self._typed = read_keys(self._typed, whole=True)
                if self._obey(asker, keys):
                    return 0

    def _obey(self, asker: _Asker, keys: list[str]) -> bool:
        """Whether it is to end."""
        for key in keys:
            self._state, wish = press(self._state, key, rows_shown(self._state, *self._terminal.size()))
            if isinstance(wish, Quit):
                return True
            if isinstance(wish, Close):
                asker.close(wish.id)
        return False

    def _hear(self, asker: _Asker, news: _News) -> None:
        match news:
            case _Closed(identity, problem):
                self._state = close_ended(self._state, identity, problem)
                return
            case _Broken(mistake):
                raise mistake
            case _Failed(error):
                self._state = miss(self._state, f"{error}. Trying again")
            case _Heard(at, serving, listed) if not self._state.paused:
                self._state = hear_status(self._state, at, serving)
                if listed is not None:
                    self._state = hear_list(self._state, at, listed.connections, more=listed.more)
        asker.busy = False

    def _draw(self) -> None:
        """Over what is there, so that nothing flickers."""
        width, height = self._terminal.size()
        with self._console.capture() as drawn:
            self._console.print(Text("\n").join(frame(self._state, width, height)), soft_wrap=True, end="")
        # A line is erased before it is written: behind one that fills it, that would take its last character.
        lines = "\n".join(f"\x1b[2K{line}" for line in drawn.get().split("\n"))
        sys.stdout.write(f"\x1b[H{lines}")
        if lines.count("\n") < height - 1:
            sys.stdout.write("\x1b[J")
        sys.stdout.flush()


class _Terminal:
    """stdin and stdout as a screen of their own, without echo, keys at once; `leave` puts everything back."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._before = termios.tcgetattr(sys.stdin.fileno())

    def enter(self) -> None:
        """Again is fine: a shell may have taken it back while we were stopped."""
        tty.setcbreak(sys.stdin.fileno(), termios.TCSANOW)
        self._console.set_alt_screen(True)
        self._console.show_cursor(False)

    def leave(self) -> None:
        with suppress(OSError, termios.error):  # it has gone: nothing to put back
            self._console.show_cursor(True)
            self._console.set_alt_screen(False)
            sys.stdout.flush()
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, self._before)

    def size(self) -> tuple[int, int]:
        """Columns and lines, now. Not from COLUMNS and LINES, which do not change with the window."""
        size = os.get_terminal_size(sys.stdout.fileno())
        return (size.columns, size.lines) if size.columns and size.lines else (80, 24)


def _typed(keyboard: int) -> bytes:
    try:
        return os.read(keyboard, 4096)
    except OSError:
        return b""  # the terminal is gone


@contextmanager
def _signals_as_bytes() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A socket on which signals come as bytes, for the length of the block, and the one on which they are sent."""
    wakings, wake = socket.socketpair()
    with wakings, wake:
        wake.setblocking(False)
        before = {number: signal.signal(number, lambda *_: None) for number in _HEARD}
        woken = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        try:
            yield wakings, wake
        finally:
            signal.set_wakeup_fd(woken)
            for number, handler in before.items():
                signal.signal(number, handler)
