"""`make demo`: the main job at work. Two throwaway networks, the real daemon in each, real clients, a table at the end.

Shows nothing that it did not see: what the client dialled is what it was told to dial, what the app saw comes from the app, and
whether a connection was intercepted from the daemon's access log. Ends with 1 if anything is not as it should be.
"""

from __future__ import annotations

import os
import signal
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import trio

from tproxyd.net.capabilities import missing_capabilities
from tproxyd.net.sockets import format_address
from tproxyd.testing.build import LabError
from tproxyd.testing.daemon import LabDaemon, open_daemon
from tproxyd.testing.isolation import LAB_CAPABILITIES, isolate_this_process
from tproxyd.testing.lab import Lab, open_lab
from tproxyd.testing.node import Node
from tproxyd.testing.state import activate_conntrack, conntrack_count
from tproxyd.testing.topology import GATEWAY, SIDECAR

__all__ = ["main"]

CONFIG = """\
[capture]
ports = ["8080", "8443", "9000-9099"]
exclude_ports = ["9050"]
when_down = "bypass"
"""
PICTURE = """\
  gateway   client 192.0.2.2 ──── gateway + tproxyd ──── server, which answers for 203.0.113.0/24 and 2001:db8:f::/48
  sidecar   client 192.0.2.2 ──── host + tproxyd + app
"""
TITLES = {
    "gateway": "the destinations are foreign; the server sees the client's own address and port",
    "sidecar": "the destinations are this host's; the app sees the client's own address, from another port",
}
HEADINGS = ("client", "dialled", "client's own address", "the app saw", "intercepted, outcome", "for the client")
HTTP, TLS, NOBODY, EXCLUDED = 8080, 8443, 9000, 9050
CURL_RESET = (7, 56)  # curl's exit codes for a connection that was reset while it was made, and after


Paint = Callable[[str, str], str]
"""Gives a text in the style of a terminal's escape sequence, such as BOLD, or as it is."""

BOLD, GREEN, YELLOW, RED = "1", "32", "33", "1;31"


class Row(NamedTuple):
    """One line of a layout's table, or a fact, and whether it is what it should be."""

    cells: tuple[str, ...]
    good: bool
    layout: str = ""


class App:
    """An HTTP app, plain or behind TLS, that answers whom it sees. `seen` maps what it was asked for to its client."""

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}

    async def answer(self, context: ssl.SSLContext | None, stream: trio.SocketStream) -> None:
        """Serves one connection."""
        peer = format_address(stream.socket.getpeername())
        talk = stream if context is None else trio.SSLStream(stream, context, server_side=True)
        try:
            request = b""
            while not request.endswith(b"\r\n\r\n"):
                chunk = await talk.receive_some(4096)
                if not chunk:
                    return
                request += chunk
            self.seen[request.split()[1].decode()] = peer
            await talk.send_all(f"HTTP/1.0 200 OK\r\n\r\nhello, {peer}\n".encode())
            if isinstance(talk, trio.SSLStream):
                await talk.unwrap()
            await stream.send_eof()
            # Closed with the client's last words unread, it would be a reset.
            while await stream.receive_some(4096):
                pass
        except (trio.BrokenResourceError, OSError):
            pass  # the client went away; the table says what it got


class Layout:
    """One of the two networks with its daemon; makes connections and tells what became of them."""

    def __init__(self, name: str, lab: Lab, proxy: Node, destinations: Sequence[str], app: App) -> None:
        self.name, self.lab, self.proxy, self.destinations, self.app = name, lab, proxy, destinations, app
        self.daemon: LabDaemon | None = None
        self._requests = 0
        self._ports = iter(range(40001, 50000))

    async def connection(self, client: str, destination: str, port: int, *, why_not: str = "not intercepted") -> Row:
        """Dials as `client` (curl, curl https, openssl) from a port chosen here, and gives the row of the table. `why_not` is the reason where the connection
        is not to be intercepted."""
        self._requests += 1
        path, source_port = f"/{self.name}/{self._requests}", next(self._ports)
        where = format_address((destination, port))
        node = self.lab["client"]
        own = format_address((node.v6 if ":" in destination else node.v4, source_port))
        if client == "openssl":
            argv = ["openssl", "s_client", "-quiet", "-connect", where, "-bind", own]
        else:
            scheme = "https" if client == "curl https" else "http"
            argv = ["curl", "-sSk", "--max-time", "10", "--local-port", str(source_port), f"{scheme}://{where}{path}"]
        request = f"GET {path} HTTP/1.0\r\n\r\n" if client == "openssl" else None
        done = await node.run(*argv, input=request, check=False)
        answer = next((line for line in done.stdout.splitlines() if line.startswith("hello, ")), "")
        seen = self.app.seen.get(path, "-")
        outcome = await self._outcome(own)
        expected = "upstream_refused" if port == NOBODY else "closed"
        captured = self.daemon is not None and port != EXCLUDED
        kept = seen == own
        good = (outcome == expected) if captured else (outcome is None and kept)
        if port == NOBODY:
            good = good and done.returncode in CURL_RESET
        else:
            good = good and answer == f"hello, {seen}" and (kept or self.name == "sidecar")
        came = "answered" if answer else "reset at once" if done.returncode in CURL_RESET else "no answer"
        intercepted = f"yes, {outcome}" if outcome else f"no, {why_not}"
        cells = (client, where, own, "the same" if kept else seen, intercepted, came)
        return Row(cells, good, self.name)

    async def _outcome(self, own: str) -> str | None:
        """From the access log; None if the connection was not intercepted. The log is a moment late, never silent."""
        if self.daemon is None:
            return None
        try:
            with trio.fail_after(0.5):
                return str((await self.daemon.record(own))["outcome"])
        except trio.TooSlowError:
            return None


@asynccontextmanager
async def open_layouts(tls: ssl.SSLContext) -> AsyncIterator[tuple[Layout, Layout]]:
    """Both networks, with the app on its ports and conntrack active where the daemons will run."""
    async with open_lab(GATEWAY) as gateway, open_lab(SIDECAR) as sidecar, trio.open_nursery() as nursery:
        app = App()
        layouts = (
            Layout("gateway", gateway, gateway["gateway"], ("203.0.113.10", "2001:db8:f::10"), app),
            Layout("sidecar", sidecar, sidecar["host"], (sidecar["host"].v4, sidecar["host"].v6), app),
        )
        for layout, node in zip(layouts, (gateway["server"], sidecar["host"]), strict=True):
            for port, context in ((HTTP, None), (TLS, tls), (EXCLUDED, None)):
                listeners = [node.listen("0.0.0.0", port), node.listen("::", port)]  # noqa: S104  # a throwaway node
                nursery.start_soon(trio.serve_listeners, partial(app.answer, context), listeners)
            layout.proxy.call(activate_conntrack)
        yield layouts
        nursery.cancel_scope.cancel()


async def show(say: Callable[[str], None], paint: Paint) -> bool:
    """Runs the whole demo; whether everything was as it should be."""
    say("Two throwaway networks, the real daemon in each. Nothing of this machine's own network is read or changed.\n")
    say(PICTURE)
    say("configuration:  " + CONFIG.replace("\n", "\n                ").rstrip() + "\n")
    rows: list[Row] = []
    facts: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="tproxyd-demo-") as directory:
        tls = await make_tls(Path(directory))
        async with open_layouts(tls) as layouts:
            before = [await layout.proxy.dump() for layout in layouts]
            async with AsyncExitStack() as stack:
                for layout in layouts:
                    layout.daemon = await stack.enter_async_context(open_daemon(layout.proxy, CONFIG))
                    say(f"{paint(layout.name, BOLD)}: {paint(layout.daemon.ready, GREEN)}")
                say("connecting ...\n")
                for layout in layouts:
                    for destination in layout.destinations:
                        rows += [
                            await layout.connection("curl", destination, HTTP),
                            await layout.connection("curl https", destination, TLS),
                            await layout.connection("openssl", destination, TLS),
                            await layout.connection("curl", destination, NOBODY),
                            await layout.connection("curl", destination, EXCLUDED, why_not="excluded port"),
                        ]
                for layout in layouts:
                    tracked = layout.proxy.call(conntrack_count)
                    # The connections to the excluded port are tracked, as they would be without tproxyd.
                    direct = len(layout.destinations)
                    facts.append(
                        Row(
                            (f"{layout.name}: conntrack entries of intercepted connections", str(tracked - direct)),
                            tracked <= direct,
                        )
                    )
                gateway = layouts[0]
                assert gateway.daemon is not None
                gateway.daemon.process.send_signal(signal.SIGKILL)
                await gateway.daemon.process.wait()
                gateway.daemon = None
                rows.append(await gateway.connection("curl", gateway.destinations[0], HTTP, why_not="daemon killed"))
                sidecar = layouts[1]
                assert sidecar.daemon is not None
                facts.append(
                    Row(("sidecar: exit code after SIGTERM", str(code := await sidecar.daemon.stop())), code == 0)
                )
            await gateway.proxy.run(sys.executable, "-m", "tproxyd", "revert")
            for layout, state, how in zip(layouts, before, ("SIGKILL and `tproxyd revert`", "SIGTERM"), strict=True):
                same = await layout.proxy.dump() == state
                words = "as before" if same else "CHANGED"
                facts.append(Row((f"{layout.name}: rules, routes, ruleset, sysctls after {how}", words), same))
    wrong = {row.cells for row in rows if not row.good}

    def show_cell(row: Sequence[str], cell: str) -> str:
        if row is HEADINGS:
            return paint(cell, BOLD)
        if row in wrong:
            return paint(cell, RED)
        return paint(cell, GREEN if cell.startswith("yes,") else YELLOW if cell.startswith("no,") else "")

    for name, title in TITLES.items():
        say(f"{paint(name, BOLD)}: {title}\n")
        say(table(HEADINGS, [row.cells for row in rows if row.layout == name], show_cell))
    for fact in facts:
        say(f"{fact.cells[0]}: {paint(fact.cells[1], GREEN if fact.good else RED)}")
    bad = [row for row in (*rows, *facts) if not row.good]
    for row in bad:
        say(paint(f"NOT AS IT SHOULD BE: {' | '.join([row.layout, *row.cells] if row.layout else row.cells)}", RED))
    return not bad


async def make_tls(directory: Path) -> ssl.SSLContext:
    """The app's certificate, made on the spot by openssl."""
    key, certificate = str(directory / "key.pem"), str(directory / "certificate.pem")
    argv = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    await trio.run_process(
        [*argv, "-subj", "/CN=app.example", "-keyout", key, "-out", certificate], capture_stderr=True
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    show_cell: Callable[[Sequence[str], str], str] = lambda _, cell: cell,
) -> str:
    """Left-aligned columns under their headings. `show_cell` makes of a row and one of its cells what is written in that place."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = (show_cell(row, cell) + " " * (width - len(cell)) for cell, width in zip(row, widths, strict=True))
        return "  ".join(cells).rstrip()

    return "\n".join([line(headings), "  ".join("─" * width for width in widths), *map(line, rows), ""])


def in_colour(text: str, style: str) -> str:
    """For a terminal."""
    return f"\x1b[{style}m{text}\x1b[0m" if style else text


def as_it_is(text: str, _: str) -> str:
    """For anything else."""
    return text


def main() -> int:
    """0 if everything was as it should be, 1 if not, 77 without root."""
    if missing := missing_capabilities(LAB_CAPABILITIES):
        print(f"tproxyd: the demo needs root ({' and '.join(missing)}): type `sudo make demo`", file=sys.stderr)
        return os.EX_NOPERM
    isolate_this_process()
    good = False
    try:
        # https://no-color.org
        coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        good = trio.run(show, partial(print, flush=True), in_colour if coloured else as_it_is)
    except* LabError as errors:
        for error in errors.exceptions:
            print(f"tproxyd: {error}", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
