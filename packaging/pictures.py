"""`make pictures`: docs/demo.svg and docs/top.svg, from what really comes out. Needs root; both happen in throwaway network namespaces.

demo.svg is what `make demo` writes to a terminal. top.svg is a screen of `tproxyd top` after most of a minute in front of a daemon that has some dozens of
connections: its own code has asked that daemon and made the lines, only without a terminal around them.
"""

from __future__ import annotations

import io
import os
import pty
import random
import re
import socket
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import trio
from rich.console import Console
from rich.text import Text

from tproxyd.daemon.top import look
from tproxyd.daemon.top_screen import frame
from tproxyd.daemon.top_state import State, press
from tproxyd.net.capabilities import missing_capabilities
from tproxyd.testing.daemon import open_daemon
from tproxyd.testing.isolation import LAB_CAPABILITIES, isolate_this_process
from tproxyd.testing.lab import open_lab
from tproxyd.testing.node import Node
from tproxyd.testing.topology import GATEWAY

DOCS = Path(__file__).parents[1] / "docs"
WIDTH, HEIGHT = 120, 34
SECONDS = 50  # in front of the screen: its graphs go that far back

CONFIG = """\
[capture]
ports = ["8080", "8443", "9000"]
[[policy.rule]]
name = "no-printers"
destinations = ["203.0.113.66"]
action = "refuse"
[[policy.rule]]
name = "canary"
destinations = ["203.0.113.80"]
action = { forward = "203.0.113.25:8080" }
"""
CLIENTS = [f"192.0.2.{number}" for number in (10, 11, 17, 23, 42, 61, 105)] + [
    f"2001:db8:1::{number:x}" for number in (0x10, 0x2A, 0x6F)
]
SERVERS_V4, SERVERS_V6 = ("203.0.113.10", "203.0.113.25", "203.0.113.80"), ("2001:db8:f::10", "2001:db8:f::80")
NETWORK = replace(
    GATEWAY,
    addresses=tuple(("client:eth0", f"{address}/{64 if ':' in address else 24}") for address in CLIENTS),
)


def draw(name: str, title: str, text: Text) -> None:
    """Writes docs/NAME.svg."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(text, soft_wrap=True)
    svg = console.export_svg(title=title, unique_id=name)
    # Whoever looks at it fetches no fonts from anywhere.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S)
    svg = re.sub(r'(<text [^>]*)x="([0-9.]+)" y="([0-9.]+)" textLength="([0-9.]+)"([^>]*)>(.*?)</text>', part, svg)
    (DOCS / f"{name}.svg").write_text("".join(f"{line.rstrip()}\n" for line in svg.splitlines()), encoding="utf-8")
    print(f"docs/{name}.svg")


def part(match: re.Match[str]) -> str:
    """Text in pieces without wide gaps, each where it belongs: not all that show SVG begin with blanks, and their fonts have widths of their own."""
    start, x, y, length, end, content = match.groups()
    characters = re.findall(r"&[^;]+;|.", content)
    width = float(length) / len(characters)
    pieces = re.finditer(r"(?:[^ ]| (?=[^ ]))+", "".join(" " if one == "&#160;" else "x" for one in characters))
    return "".join(
        f'{start}x="{float(x) + (at := piece.start() + len(piece[0]) - len(piece[0].lstrip())) * width:g}" y="{y}" '
        f'textLength="{(piece.end() - at) * width:g}"{end}>{"".join(characters[at : piece.end()])}</text>'
        for piece in pieces
    )


def run_demo() -> Text:
    """What the demo writes to a terminal of our width."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (HEIGHT, WIDTH))
    process = subprocess.Popen([sys.executable, "-m", "tproxyd.testing.demo"], stdout=slave)
    os.close(slave)
    output = bytearray()
    with suppress(OSError):  # what the end of a terminal is to its reader
        while data := os.read(master, 65536):
            output += data
    os.close(master)
    if process.wait():
        sys.exit(f"the demo has failed:\n{output.decode()}")
    return Text.from_ansi(f"$ sudo make demo\n{output.decode()}".replace("\r\n", "\n").rstrip())


async def watch_top() -> Text:
    """The screen of `tproxyd top` over a gateway with traffic."""
    chance = random.Random(7)  # noqa: S311  # sizes for a picture  # a picture's
    async with open_lab(NETWORK) as lab, trio.open_nursery() as nursery:
        client, server, gateway = lab["client"], lab["server"], lab["gateway"]
        for port in (8080, 8443):
            listeners = [server.listen("0.0.0.0", port), server.listen("::", port)]  # noqa: S104  # a throwaway node
            nursery.start_soon(trio.serve_listeners, serve, listeners)
        async with open_daemon(gateway, CONFIG):
            for number in range(43):
                nursery.start_soon(live, client, random.Random(number))  # noqa: S311
            nursery.start_soon(come_and_go, nursery, client, chance)
            path, state = f"/run/tproxyd/netns-{gateway.inode}.sock", State()
            for _ in range(SECONDS):
                await trio.sleep(1)
                state = await trio.to_thread.run_sync(look, state, path)
            for _ in range(4):
                state, _ = press(state, "down", HEIGHT)
            nursery.cancel_scope.cancel()
    return Text("\n").join(frame(state, WIDTH, HEIGHT))


async def serve(stream: trio.SocketStream) -> None:
    """Each request is the lengths of itself and of its answer, and then so many bytes."""
    with suppress(trio.BrokenResourceError):
        rest = b""
        while data := await stream.receive_some(65536):
            rest += data
            while len(rest) >= 8 and len(rest) >= (lengths := struct.unpack("!II", rest[:8]))[0]:
                rest = rest[lengths[0] :]
                await stream.send_all(bytes(lengths[1]))


async def ask(stream: trio.SocketStream, sent: int, wanted: int) -> None:
    """A request of so many bytes, and its answer of so many."""
    await stream.send_all(struct.pack("!II", max(sent, 8), wanted) + bytes(max(sent, 8) - 8))
    while wanted > 0 and (data := await stream.receive_some(65536)):
        wanted -= len(data)


async def dial(client: Node, chance: random.Random, *, port: int = 0) -> trio.SocketStream:
    source = chance.choice(CLIENTS)
    destination = chance.choice(SERVERS_V6 if ":" in source else SERVERS_V4)
    return await client.connect(destination, port or chance.choice((8080, 8080, 8443)), source=source)


async def live(client: Node, chance: random.Random) -> None:
    """A client that stays: some fetch much, some send much, most ask for a little now and then, some say nothing any more."""
    await trio.sleep(chance.uniform(0, 20))
    sent, wanted, pause = chance.choice(
        [(300, 90_000, 0.1), (40_000, 200, 0.2), *[(400, 3_000, 0.3)] * 4, *[(200, 900, 1.5)] * 3, (500, 2_000, 1e9)]
    )
    async with await dial(client, chance) as stream:
        await ask(stream, 700, 5_000)
        while True:
            await ask(stream, int(sent * chance.uniform(0.5, 2)), int(wanted * chance.uniform(0.2, 2)))
            await trio.sleep(pause * chance.uniform(0.5, 1.5))


async def come_and_go(nursery: trio.Nursery, client: Node, chance: random.Random) -> None:
    """Clients of a moment; some find nobody, some are not let in, some break off."""

    async def one(kind: float) -> None:
        with suppress(OSError, trio.BrokenResourceError):
            if kind < 0.03:
                stream = await client.connect("203.0.113.66", 8080, source=CLIENTS[0])
            else:
                stream = await dial(client, chance, port=9000 if kind < 0.08 else 0)
            async with stream:
                await ask(stream, 400, int(20_000 * kind))
                if kind > 0.95:
                    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    while True:
        for _ in range(chance.choice((0, 0, 1, 1, 2, 3, 9))):
            nursery.start_soon(one, chance.random())
        await trio.sleep(chance.uniform(0.1, 0.6))


def main() -> int:
    """77 without root."""
    if missing := missing_capabilities(LAB_CAPABILITIES):
        print(f"tproxyd: the pictures need root ({' and '.join(missing)}): type `sudo make pictures`", file=sys.stderr)
        return os.EX_NOPERM
    isolate_this_process()
    draw("demo", "sudo make demo", run_demo())
    draw("top", "sudo tproxyd top", trio.run(watch_top))
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
