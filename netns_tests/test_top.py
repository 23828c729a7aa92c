"""`tproxyd top` on a terminal, in front of a daemon that serves: what it shows, its keys, its ends, and that the terminal is as before after each."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from netns_tests.watch import all_cpu_seconds, many, resets_within, until, works
from netns_tests.way import GATEWAY_V4, Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import LabProcess, Node, serve_echo
from tproxyd.testing.daemon import TPROXYD, cpu_seconds, open_daemon

CONFIG = '[capture]\nports = ["8080"]\n'
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
ENTERED, LEFT = b"\x1b[?1049h", b"\x1b[?1049l"
CTRL_C, CTRL_Z = b"\x03", b"\x1a"
DOWN = b"\x1b[B"


class Terminal:
    """A pseudo-terminal with `tproxyd top` on it. `output`: all that came so far."""

    def __init__(self, master: int, slave: int) -> None:
        self.output = bytearray()
        self.process: LabProcess
        self.before = termios.tcgetattr(slave)
        self._master, self._slave = master, slave

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    async def read(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._master)
            self.output += os.read(self._master, 65536)

    @property
    def lines(self) -> list[str]:
        """Of the frame that was drawn last; it begins in the corner."""
        frame = self.output.rpartition(b"\x1b[H")[2].decode(errors="replace")
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame).split("\r\n")

    async def shows(self, pattern: str, *, within: float = 5.0) -> re.Match[str]:
        """Waits for it."""
        try:
            await until(lambda: re.search(pattern, "\n".join(self.lines)), within=within)
        except trio.TooSlowError:
            raise AssertionError("\n".join([f"no {pattern!r} in", *self.lines])) from None
        found = re.search(pattern, "\n".join(self.lines))
        assert found
        return found

    async def ends(self) -> int:
        """Its exit code; by then the terminal is as it was before."""
        with trio.fail_after(5):
            code = await self.process.wait()
        assert termios.tcgetattr(self._slave) == self.before
        await until(lambda: self.output.endswith(b"\x1b[?25h" + LEFT))
        return code

    @property
    def settings(self) -> object:
        return termios.tcgetattr(self._slave)


@asynccontextmanager
async def open_top(node: Node, *arguments: str, width: int = 120, height: int = 40) -> AsyncIterator[Terminal]:
    master, slave = pty.openpty()
    try:
        terminal = Terminal(master, slave)
        terminal.resize(width, height)
        # Of a session of its own, so that keys and sizes are signals as they are for who sits there.
        command = ("setsid", "--ctty", *TPROXYD, "top", *arguments)
        environment = {"TERM": "xterm-256color"}
        async with (
            node.process(*command, stdin=slave, stdout=slave, stderr=slave, env=environment) as terminal.process,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(terminal.read)
            yield terminal
            nursery.cancel_scope.cancel()
    finally:
        os.close(master)
        os.close(slave)


@GATEWAY_V4
async def test_connections_are_seen_chosen_and_closed(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with (
        open_daemon(way.proxy, CONFIG) as daemon,
        many(way.client, way.address, 30) as streams,
        open_top(way.proxy) as top,
    ):
        await top.shows(f"pid {daemon.process.pid}  ready for .* capture on")
        await top.shows("30 living, 30 accepted")
        own = [format_address(stream.socket.getsockname()) for stream in streams]
        for address in own:
            await top.shows(re.escape(address))
        victim = streams[17]
        top.press(b"f" + own[17].encode() + b"\r")
        await top.shows("1-1 of 1$")
        top.press(DOWN + b"k")
        await top.shows(f" y closes {re.escape(own[17])} to {re.escape(way.address)}:8080, with a reset on both sides")
        top.press(b"n")
        await top.shows("not closed")
        await works(victim)
        top.press(b"ky")
        assert await resets_within(victim, 2)
        await top.shows("closed")
        top.press(b"\x1b")  # alone: no other key follows, so it is Esc
        await top.shows("1-29 of 29$")
        await top.shows(r"29 living, 30 accepted(.*\n)+ended.*drained 1 \+1")
        assert own[17] not in "\n".join(top.lines)
        for stream in (*streams[:17], *streams[18:]):
            await works(stream)
        await top.shows(r"from clients +[1-9][0-9]*B/s")

        top.resize(60, 15)
        await until(lambda: len(top.lines) == 15)
        await top.shows("q quit .* of 29$")
        assert max(map(len, top.lines)) == 60
        top.resize(40, 10)
        await top.shows("60x15 are needed, this is 40x10")
        top.resize(200, 50)
        await until(lambda: len(top.lines) == 50)
        top.press(b"q")
        assert await top.ends() == 0
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGINT", "SIGTERM", "SIGHUP"])
@GATEWAY_V4
async def test_the_terminal_is_as_before_after_each_end(way: Way, how: str) -> None:
    async with open_daemon(way.proxy, CONFIG), open_top(way.proxy) as top:
        await top.shows("no connection lives")
        assert top.settings != top.before
        if how == "Ctrl-C":
            top.press(CTRL_C)
        else:
            top.process.send_signal(signal.Signals[how])
        assert await top.ends() == (-signal.Signals[how] if how in ("SIGTERM", "SIGHUP") else 0)


@GATEWAY_V4
async def test_ctrl_z_leaves_the_terminal_to_others_until_it_goes_on(way: Way) -> None:
    async with open_daemon(way.proxy, CONFIG), open_top(way.proxy) as top:
        await top.shows("no connection lives")
        stat = Path(f"/proc/{top.process.pid}/stat")
        top.press(CTRL_Z)
        await until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
        assert top.settings == top.before
        await until(lambda: top.output.endswith(LEFT))
        top.process.send_signal(signal.SIGCONT)
        await until(lambda: top.output.rfind(ENTERED) > top.output.rfind(LEFT))
        await top.shows("no connection lives")
        top.press(b"q")
        assert await top.ends() == 0


@GATEWAY_V4
async def test_a_daemon_that_has_gone_is_told_and_its_successor_is_seen(way: Way) -> None:
    async with open_daemon(way.proxy, CONFIG) as daemon, open_top(way.proxy) as top:
        await top.shows(f"pid {daemon.process.pid} ")
        assert await daemon.stop() == 0
        await top.shows("no daemon is asked at /run/tproxyd/netns-")
        await top.shows("Trying again")
        async with open_daemon(way.proxy, CONFIG) as successor:
            await top.shows(f"pid {successor.process.pid} ")
            assert "Trying again" not in "\n".join(top.lines)
            successor.process.send_signal(signal.SIGSTOP)
            await top.shows("does not answer within 5 s", within=10)
            top.press(b"q")  # while it waits
            assert await top.ends() == 0
            successor.process.send_signal(signal.SIGCONT)


@GATEWAY_V4
async def test_where_there_is_no_terminal_it_is_printed_once(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    done = await way.proxy.run(*TPROXYD, "top", check=False)
    assert (done.returncode, done.stdout) == (69, "")
    assert "cannot look: no daemon is asked at /run/tproxyd/netns-" in done.stderr
    async with open_daemon(way.proxy, CONFIG) as daemon, many(way.client, way.address, 2) as (stream, _):
        done = await way.proxy.run(*TPROXYD, "top")
        assert f"pid {daemon.process.pid} " in done.stdout
        assert format_address(stream.socket.getsockname()) in done.stdout
        assert "\x1b" not in done.stdout
        assert "quit" not in done.stdout
        assert done.stderr == ""
        narrow = await way.proxy.run(*TPROXYD, "top", "--once", env={"COLUMNS": "60", "LINES": "15"})
        assert max(map(len, narrow.stdout.splitlines())) <= 60
        async with open_top(way.proxy, "--once") as top:
            with trio.fail_after(5):
                assert await top.process.wait() == 0
            await until(lambda: b"2 living, 2 accepted" in top.output)
            assert ENTERED not in top.output
        done = await way.proxy.run(*NOBODY, *TPROXYD, "top", check=False)
        assert done.returncode == 77
        assert "is for root" in done.stderr
        nursery.cancel_scope.cancel()


@pytest.mark.timed
@GATEWAY_V4
async def test_a_thousand_connections_cost_little_to_look_at(way: Way, nursery: trio.Nursery) -> None:
    """Less than a twentieth of a core for `top`, and as little more for the daemon."""
    await nursery.start(serve_echo, way.app, 8080)
    async with (
        open_daemon(way.proxy, CONFIG) as daemon,
        many(way.client, way.address, 1000) as streams,
        open_top(way.proxy) as top,
    ):
        await top.shows("1-31 of 1000$")
        await works(streams[-1])
        began, here, there = trio.current_time(), cpu_seconds(top.process.pid), all_cpu_seconds(daemon)
        frames = top.output.count(b"\x1b[H")
        await until(lambda: top.output.count(b"\x1b[H") >= frames + 8, within=20)
        seconds = trio.current_time() - began
        here, there = cpu_seconds(top.process.pid) - here, all_cpu_seconds(daemon) - there
        print(f"in {seconds:.1f} s: top {here:.2f} s of CPU, the daemon {there:.2f} s")
        assert here < 0.05 * seconds
        assert there < 0.05 * seconds
        top.press(b"q")
        assert await top.ends() == 0
        nursery.cancel_scope.cancel()
