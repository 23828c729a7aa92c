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
HEADINGS = (
    "layout",
    "client",
    "dialled",
    "intercepted",
    "client's own address",
    "the app saw",
    "outcome in the log",
    "for the client",
)
HTTP, TLS, NOBODY, EXCLUDED = 8080, 8443, 9000, 9050
CURL_RESET = (7, 56)  # curl's exit codes for a connection that was reset while it was made, and after


class Row(NamedTuple):
    """One line of the table, and whether it is what it should be."""

    cells: tuple[str, ...]
    good: bool


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

    async def connection(self, client: str, destination: str, port: int, *, note: str = "") -> Row:
        """Dials as `client` (curl, curl https, openssl) from a port chosen here, and gives the row of the table."""
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
        intercepted = "yes" if outcome else "no"
        cells = (self.name, client, where, intercepted, own, "the same" if kept else seen, outcome or "-", came + note)
        return Row(cells, good)

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


async def show(say: Callable[[str], None]) -> bool:
    """Runs the whole demo; whether everything was as it should be."""
    say("Two throwaway networks, the real daemon in each. Nothing of this machine's own network is read or changed.\n")
    say(PICTURE)
    say("configuration:  " + CONFIG.replace("\n", "\n                ").rstrip())
    rows: list[Row] = []
    facts: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="tproxyd-demo-") as directory:
        tls = await make_tls(Path(directory))
        async with open_layouts(tls) as layouts:
            before = [await layout.proxy.dump() for layout in layouts]
            async with AsyncExitStack() as stack:
                for layout in layouts:
                    layout.daemon = await stack.enter_async_context(open_daemon(layout.proxy, CONFIG))
                    say(f"{layout.name}: {layout.daemon.ready}")
                say("connecting ...\n")
                for layout in layouts:
                    for destination in layout.destinations:
                        rows += [
                            await layout.connection("curl", destination, HTTP),
                            await layout.connection("curl https", destination, TLS),
                            await layout.connection("openssl", destination, TLS),
                            await layout.connection("curl", destination, NOBODY),
                            await layout.connection("curl", destination, EXCLUDED, note=", directly (excluded port)"),
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
                rows.append(
                    await gateway.connection(
                        "curl", gateway.destinations[0], HTTP, note=", directly (the daemon was killed)"
                    )
                )
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
    say(table(HEADINGS, [row.cells for row in rows]))
    for fact in facts:
        say(f"{fact.cells[0]}: {fact.cells[1]}")
    bad = [row for row in (*rows, *facts) if not row.good]
    for row in bad:
        say(f"NOT AS IT SHOULD BE: {' | '.join(row.cells)}")
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


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns under their headings."""
    widths = [max(len(cell) for cell in column) for column in zip(headings, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    return "\n".join([line(headings), "  ".join("─" * width for width in widths), *(line(row) for row in rows), ""])


def main() -> int:
    """0 if everything was as it should be, 1 if not, 77 without root."""
    if missing := missing_capabilities(LAB_CAPABILITIES):
        print(f"tproxyd: the demo needs root ({' and '.join(missing)}): type `sudo make demo`", file=sys.stderr)
        return os.EX_NOPERM
    isolate_this_process()
    good = False
    try:
        good = trio.run(show, partial(print, flush=True))
    except* LabError as errors:
        for error in errors.exceptions:
            print(f"tproxyd: {error}", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
