"""What `packaging/deb-test` runs as the first process of a fresh Debian: the package's life from installation to purge; and with `booted`
as a service of that Debian, once systemd is its first process.

Standard library only. Prints a line a step; the first thing that is not as it should be ends it, with what was seen.
"""

from __future__ import annotations

import http.client
import http.server
import json
import os
import pty
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CONFIG = Path("/etc/tproxyd/tproxyd.toml")
DROP_IN = Path("/etc/tproxyd/conf.d/mine.toml")
CHANGING = (
    "/proc",
    "/sys",
    "/dev",
    "/run",
    "/tmp",
    "/packages",
    "/var/lib/dpkg",
    "/var/log",
    "/var/cache",
    "/var/tmp",
    "/var/lib/systemd/timers",
)
LONGEST = 0.150  # seconds, of the commands that an editor or a script waits for
CLIENT, HERE = "192.0.2.2", "192.0.2.1"


def run(*command: str, code: int = 0) -> str:
    """What it printed, on both. Any other exit code ends the test."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    printed = done.stdout + done.stderr
    if done.returncode != code:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode} and not {code}\n{printed}")
    return printed


def expect(is_so: object, what: str, seen: object = "") -> None:
    if not is_so:
        sys.exit(f"NOT SO: {what}\n{seen}")
    print(f"   {what}")


def files() -> set[str]:
    """Every path of this system that a package might leave, and its users."""
    found = set()
    for folder, inner, names in os.walk("/"):
        inner[:] = [name for name in inner if os.path.join(folder, name) not in CHANGING]
        found |= {os.path.join(folder, name) for name in (*inner, *names)}
    found |= {f"/run: {name}" for name in os.listdir("/run") if "tproxyd" in name}
    found |= {f"user: {line}" for line in Path("/etc/passwd").read_text(encoding="utf-8").splitlines()}
    # Old copies that the system's own tools keep of these files.
    return {path for path in found if path not in ("/etc/passwd-", "/etc/shadow-", "/etc/group-", "/etc/gshadow-")}


def kernel_state() -> str:
    return (
        run("nft", "list", "ruleset")
        + run("ip", "rule")
        + run("ip", "-6", "rule")
        + run("ip", "route", "show", "table", "all", "proto", "133")
    )


@contextmanager
def lab() -> Iterator[int]:
    """A client in a namespace of its own on a cable, and a server here. Gives the client's process."""
    run("ip", "link", "set", "lo", "up")
    client = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    here = os.readlink("/proc/self/ns/net")
    while os.readlink(f"/proc/{client.pid}/ns/net") == here:
        time.sleep(0.01)
    inside = ("nsenter", "-t", str(client.pid), "-n")
    run("ip", "link", "add", "cable", "type", "veth", "peer", "name", "other")
    run("ip", "link", "set", "other", "netns", str(client.pid))
    for prefix, name, address in (((), "cable", HERE), (inside, "other", CLIENT)):
        run(*prefix, "ip", "address", "add", f"{address}/24", "dev", name)
        run(*prefix, "ip", "link", "set", name, "up")
    server = http.server.ThreadingHTTPServer((HERE, 8080), Greeting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield client.pid
    finally:
        server.shutdown()
        server.server_close()
        client.kill()
        client.wait()


@contextmanager
def living_connection(client: int) -> Iterator[Callable[[], str]]:
    """From that process's namespace to the server. What it gives asks once more on it, and returns the answer; empty where it has ended."""
    asking = subprocess.Popen(
        ["nsenter", "-t", str(client), "-n", "python3", "-uc", ASKING, HERE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with asking:
        assert asking.stdin is not None
        assert asking.stdout is not None
        sent, heard = asking.stdin, asking.stdout

        def ask() -> str:
            sent.write("\n")
            sent.flush()
            return heard.readline().strip()

        yield ask
        sent.close()  # the end of it


ASKING = """
import http.client, sys
connection = http.client.HTTPConnection(sys.argv[1], 8080)
connection.connect()
connection.auto_open = 0
for _ in sys.stdin:
    connection.request("GET", "/")
    print(connection.getresponse().read().decode())
"""


def on_terminal(*command: str, until: str, key: str) -> None:
    """On a terminal of its own it has to write that; then the key is pressed, and it has to end well."""
    terminal, its_end = pty.openpty()
    shown = subprocess.Popen(
        command,
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
        start_new_session=True,
    )
    os.close(its_end)
    written, pressed = "", False
    with suppress(OSError):  # EIO: it has ended
        while True:
            written += os.read(terminal, 4096).decode(errors="replace")
            if not pressed and until in written:
                os.write(terminal, key.encode())
                pressed = True
    os.close(terminal)
    expect(shown.wait() == 0 and pressed, f"{' '.join(command)}, on a terminal, up to the key {key}", written)


class Greeting(http.server.BaseHTTPRequestHandler):
    """Answers with the address that it sees. A connection may ask more than once."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.client_address[0].encode()
        self.send_response(http.client.OK)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_installation() -> None:
    run("dpkg", "-i", "/packages/first.deb")
    expect("tproxyd 0" in run("tproxyd", "--version"), "tproxyd --version", run("tproxyd", "--version"))
    expect("captures nothing" in run("tproxyd", "check"), "check takes the installed configuration")
    expect("nothing to capture" in run("tproxyd", "run", code=os.EX_CONFIG), "run has nothing to capture: 78")
    run("dpkg", "--verify", "tproxyd")
    # Where Debian's python3 looks for what an administrator has installed with pip.
    shadow = Path(f"/usr/local/lib/python3.{sys.version_info.minor}/dist-packages/tproxyd")
    os.environ["PYTHONPATH"] = "/packages/evil"
    for folder in (Path("/packages/evil/msgspec"), shadow):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("raise SystemExit('loaded')\n", encoding="utf-8")
    run("tproxyd", "check")
    del os.environ["PYTHONPATH"]
    run("rm", "-r", "/packages/evil", str(shadow))
    expect(True, "neither PYTHONPATH nor /usr/local comes before what is in the package")


def test_speed() -> None:
    for arguments in (["--help"], ["check", "--port", "8080"], ["plan", "--port", "8080"]):
        times, costs = [], []
        for _ in range(11):
            began, used = time.perf_counter(), processor_time()
            run("tproxyd", *arguments)
            times.append(time.perf_counter() - began)
            costs.append(processor_time() - used)
        # Judged by the processor's time of the quickest: a machine that does other things meanwhile makes the rest of it longer.
        told = f"median of 11 {statistics.median(times) * 1000:.0f} ms, quickest {min(times) * 1000:.0f} ms, of the processor {min(costs) * 1000:.0f} ms"
        expect(min(costs) < LONGEST, f"tproxyd {arguments[0]}: {told}")


def processor_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_capture() -> None:
    with lab() as client:
        before = kernel_state()
        DROP_IN.write_text('[capture]\nports = ["8080"]\n', encoding="utf-8")
        daemon = subprocess.Popen(["tproxyd", "run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert daemon.stdout is not None
        assert daemon.stderr is not None
        said = [*iter_until("tproxyd: ready", daemon.stderr)]
        expect(said and "tproxyd: ready" in said[-1], "the daemon is ready", said)
        code = f"import urllib.request; print(urllib.request.urlopen('http://{HERE}:8080/').read().decode())"
        with living_connection(client) as ask:
            ask()
            shown = run("tproxyd", "top", "--once")
            expect(CLIENT in shown, "tproxyd top --once shows the connection", shown)
            on_terminal("tproxyd", "top", until=CLIENT, key="q")
        daemon.stdout.readline()
        answer = run("nsenter", "-t", str(client), "-n", "python3", "-c", code).strip()
        expect(answer == CLIENT, f"the server sees its client, {answer}")
        record = json.loads(daemon.stdout.readline())
        expect(
            record["outcome"] == "closed", f"captured: {record['source']} to {record['original_destination']}", record
        )
        daemon.send_signal(signal.SIGTERM)
        expect(daemon.wait() == 0, "a clean stop")
        expect(kernel_state() == before, "the kernel holds what it held before")


def iter_until(word: str, lines: Iterable[str]) -> Iterator[str]:
    """Lines up to the first that has the word, that one too; all there are if none has."""
    for line in lines:
        yield line
        if word in line:
            return


def test_upgrade() -> None:
    CONFIG.write_text(CONFIG.read_text(encoding="utf-8") + "# mine\n", encoding="utf-8")
    run("dpkg", "-i", "/packages/next.deb")
    expect("+next" in run("dpkg-query", "-W", "tproxyd"), "upgraded")
    expect(
        "# mine" in CONFIG.read_text(encoding="utf-8") and DROP_IN.exists(), "the configuration is the administrator's"
    )
    run("dpkg", "--verify", "--verify-format", "rpm", "tproxyd")


def test_removal(before: set[str]) -> None:
    bare = kernel_state()
    run("tproxyd", "apply")
    expect(kernel_state() != bare, "tproxyd apply")
    listed = run("dpkg", "-L", "tproxyd").splitlines()
    run("dpkg", "-r", "tproxyd")
    expect(kernel_state() == bare, "removed: the kernel holds nothing of it")
    expect(CONFIG.exists() and DROP_IN.exists(), "the configuration stays")
    left = [
        path for path in listed if path not in before and os.path.lexists(path) and not path.startswith(("/etc", "/."))
    ]
    expect(not left, "none of its files is left", left)
    run("dpkg", "-P", "tproxyd")
    expect(files() == before, "purged: no file, no user", files() ^ before)


def test_make_install(before: set[str]) -> None:
    run("cp", "-a", "/packages/installed/.", "/")
    program = "/usr/local/sbin/tproxyd"
    expect("captures nothing" in run(program, "check"), "check takes the installed configuration")
    bare = kernel_state()
    run(program, "apply", "--port", "8080")
    said = run("/packages/install", "--remove")
    expect("/etc/tproxyd stays" in said and CONFIG.exists(), "uninstalled; the configuration stays", said)
    expect(kernel_state() == bare, "the kernel holds nothing of it")
    run("rm", "-r", "/etc/tproxyd")
    left = {path for path in files() - before if not os.path.isdir(path)}
    expect(not left, "no other file is left", left)


def test_service() -> None:
    run("ip", "link", "set", "lo", "up")
    before, bare = files(), kernel_state()
    run("dpkg", "-i", "/packages/first.deb")
    expect("disabled" in run("systemctl", "is-enabled", "tproxyd", code=1), "installed: the service is disabled")
    DROP_IN.write_text('[capture]\nports = ["8080"]\n', encoding="utf-8")
    run("systemctl", "enable", "--now", "tproxyd")
    first = serving()
    expect(first, f"enabled and started: process {first} captures", run("systemctl", "status", "tproxyd", code=0))
    with lab() as client:
        with living_connection(client) as ask:
            expect(ask() == CLIENT, "a connection lives")
            run("dpkg", "-i", "/packages/next.deb")
            second = serving()
            expect(second not in ("0", first), f"upgraded: process {second} is the service")
            expect(os.path.exists(f"/proc/{first}"), f"process {first} serves what lives")
            expect(ask() == CLIENT, "the connection lives on")
            with living_connection(client) as ask_anew:
                expect(ask_anew() == CLIENT, "a new one is served")
                member = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--groups=tproxyd")
                shown = run(*member, "tproxyd", "connections")
                expect(CLIENT in shown, "a member of the group tproxyd may look", shown)
            said = run("tproxyd", "status")
            expect(f"pid {second}," in said and f"pid {first}," in said, "tproxyd status names both", said)
        wait_until(lambda: not os.path.exists(f"/proc/{first}"), f"process {first} has ended with its last connection")
        # A daemon that cannot hand over, as one of a version that had it not yet.
        old_one = Path("/packages/old/tproxyd")
        old_one.parent.mkdir()
        old_one.write_text('#!/bin/sh\n[ "$1" != handover ] || exit 1\nexec /usr/sbin/tproxyd "$@"\n', encoding="utf-8")
        old_one.chmod(0o755)
        path = os.environ["PATH"]
        os.environ["PATH"] = f"{old_one.parent}:{path}"
        run("dpkg", "-i", "/packages/first.deb")
        os.environ["PATH"] = path
        third = serving()
        expect(third not in ("0", first, second), f"without a hand-over: restarted, as process {third}")
        with living_connection(client) as ask:
            expect(ask() == CLIENT, "and captures")
    run("dpkg", "-r", "tproxyd")
    expect(kernel_state() == bare, "removed: the service has stopped, the kernel holds nothing of it")
    run("dpkg", "-P", "tproxyd")
    expect(files() == before, "purged: no file, no user, no link to a unit", files() ^ before)


def serving() -> str:
    """The service's main process once the kernel holds what it has put there."""
    wait_until(lambda: "table inet tproxyd" in run("nft", "list", "tables"), "captures")
    return run("systemctl", "show", "-P", "MainPID", "tproxyd").strip()


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        if time.monotonic() > deadline:
            status = subprocess.run(["systemctl", "status", "tproxyd"], capture_output=True, text=True, check=False)
            sys.exit(f"NOT SO: {what}\n{status.stdout}")
        time.sleep(0.05)


def main() -> None:
    if sys.argv[1:] == ["booted"]:
        test_service()
        return
    before = files()
    print("-- installed")
    test_installation()
    print("-- speed")
    test_speed()
    print("-- one connection")
    test_capture()
    print("-- upgraded")
    test_upgrade()
    print("-- removed and purged")
    test_removal(before)
    print("-- make install, make uninstall")
    test_make_install(before)


main()
