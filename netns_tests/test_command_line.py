"""The command as a user types it: exit codes, one sentence an error, what is loaded, the two logs."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from netns_tests.way import BOTH_LAYOUTS, GATEWAY_V4, SIDECAR_V4, Way, median_ms
from tproxyd.net.sockets import format_address
from tproxyd.testing import Finished, Lab, LabError, Node, serve_echo, serve_identity
from tproxyd.testing.daemon import TPROXYD, open_daemon

TWO_LINES = '[capture]\nports = ["8080", "9000-9099"]\n'
INSTALLED = str(Path(__file__).parents[1] / "packaging/tproxyd.toml")
FIVE_MISTAKES = """
[capture]
prots = ["8080"]
ports = ["9099-9000"]
when_down = "reject"
[routing]
mark = "0x4000000/0x3000000"
[upstrem]
target = "original"
"""


def one_sentence(done: Finished, code: int) -> str:
    """What it said on stderr: one line, no traceback, nothing on stdout."""
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert re.fullmatch(r"tproxyd: [^\n]+\n", done.stderr), done.stderr
    return done.stderr


@pytest.mark.timed
async def test_check_reports_five_mistakes_at_once_within_150_ms(sidecar_lab: Lab, tmp_path: Path) -> None:
    file = tmp_path / "five.toml"
    file.write_text(FIVE_MISTAKES)
    took = []
    for _ in range(5):
        began = time.perf_counter()
        done = await sidecar_lab["host"].run(*TPROXYD, "check", "-c", str(file), check=False)
        took.append(time.perf_counter() - began)
    assert done.returncode == 78
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"tproxyd: {file}: `capture.prots` is not a key of the configuration; did you mean `capture.ports`?",
        f'tproxyd: {file}: `capture.ports[0]` = "9099-9000" is an inverted range; write "9000-9099"',
        f'tproxyd: {file}: `capture.when_down` = "reject" is none of its values; use "bypass" or "refuse"',
        f'tproxyd: {file}: `routing.mark` = "0x4000000/0x3000000" has bits outside its mask (0x4000000); '
        "widen the mask or drop them",
        f"tproxyd: {file}: `upstrem` is not a key of the configuration; did you mean `upstream`?",
    ]
    assert median_ms("check", took) < 150


@pytest.mark.timed
@pytest.mark.parametrize("arguments", ["--help", "check", "plan"])
def test_what_needs_no_root_answers_within_150_ms(tmp_path: Path, arguments: str) -> None:
    file = tmp_path / "two.toml"
    file.write_text(TWO_LINES)
    options = [] if arguments.startswith("-") else ["-c", str(file)]
    took = []
    for _ in range(7):
        began = time.perf_counter()
        subprocess.run([*TPROXYD, arguments, *options], check=True, stdout=subprocess.DEVNULL)
        took.append(time.perf_counter() - began)
    assert median_ms(arguments, took) < 150


@pytest.mark.parametrize("verb", ["check", "plan"])
def test_check_and_plan_load_neither_trio_nor_pyroute2(tmp_path: Path, verb: str) -> None:
    file = tmp_path / "good.toml"
    file.write_text(TWO_LINES)
    code = (
        "import sys\nfrom tproxyd.daemon.cli import main\n"
        f"assert main([{verb!r}, '-c', {str(file)!r}]) == 0\n"
        "print('loaded:', sorted({name.partition('.')[0] for name in sys.modules} & {'trio', 'pyroute2', 'asyncio'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((), 64, "required: VERB"),
        (("frobnicate",), 64, "invalid choice: 'frobnicate'"),
        (("plan", "--diff", "--format", "json"), 64, "leave --format out"),
        (("connections", "--close", "0", "--json"), 64, "leave --json out"),
        (("connections", "--limit", "0"), 64, "'0' is not a number of connections"),
        (("connections", "--source", "here"), 64, "--source 'here' is no address, network or port"),
        (("connections",), 69, "is one running in this network namespace?"),
        (("drain", "-c", "/no/such/file"), 78, "/no/such/file: there is no such file"),
        (("plan", "-c", "EMPTY", "--against", "/no/such/file"), 78, "/no/such/file: there is no such file"),
        (("apply", "--confirm", "0"), 64, "'0' is not a whole number of seconds from 1 to 86400"),
        (("apply", "--confirm=1e3"), 64, "'1e3' is not a whole number"),
        (("revert", "--after-exit", "--name", "x"), 64, "leave --name out"),
        (("plan", "--format", "yaml"), 64, "invalid choice: 'yaml'"),
        (("run", "--port", "70000"), 64, "--port 70000 is out of range"),
        (("run", "--port", "9-8"), 64, '--port 9-8 is an inverted range; write "8-9"'),
        (("run", "--port", "80", "--port", "80-90"), 64, 'overlaps "80"'),
        (("run", "-c", "/no/such/file"), 78, "/no/such/file: there is no such file"),
        (("check", "-c", "/"), 78, "/: is a directory"),
        (("plan", "-c", "/dev/null"), 78, "/dev/null: is no regular file"),
        (("run", "-c", "EMPTY"), 78, "nothing to capture"),
        (("apply", "-c", "EMPTY"), 78, "nothing to capture"),
        (("run", "-c", INSTALLED), 78, "nothing to capture"),
    ],
)
async def test_a_mistake_on_the_command_line_is_one_sentence(
    sidecar_lab: Lab, tmp_path: Path, arguments: tuple[str, ...], code: int, sentence: str
) -> None:
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    before = await sidecar_lab["host"].dump()
    words = [str(empty) if word == "EMPTY" else word for word in arguments]
    done = await sidecar_lab["host"].run(*TPROXYD, *words, check=False)
    assert sentence in one_sentence(done, code)
    assert await sidecar_lab["host"].dump() == before


async def test_help_shows_what_is_built_and_nothing_else(sidecar_lab: Lab) -> None:
    done = await sidecar_lab["host"].run(*TPROXYD, "--help")
    assert re.findall(r"^    ([a-z]+)(?: |$)", done.stdout, re.MULTILINE) == [
        "run",
        "check",
        "plan",
        "apply",
        "confirm",
        "status",
        "revert",
        "handover",
        "explain",
        "doctor",
        "connections",
        "top",
        "reload",
        "drain",
    ]
    version = (await sidecar_lab["host"].run(*TPROXYD, "--version")).stdout
    assert re.fullmatch(
        rf"tproxyd [0-9.]+, Linux {re.escape(os.uname().release)}, nftables v[^,]+, Python [0-9.]+\n", version
    )


async def without(node: Node, capability: str, *arguments: str) -> Finished:
    """Runs tproxyd as root without one capability."""
    return await node.run(
        "setpriv", "--bounding-set", f"-{capability}", "--inh-caps", f"-{capability}", *TPROXYD, *arguments, check=False
    )


@SIDECAR_V4
@pytest.mark.parametrize(
    ("capability", "verb"),
    [
        ("net_admin", "run"),
        ("net_raw", "run"),
        ("net_admin", "apply"),
        ("net_admin", "revert"),
        ("net_admin", "status"),
        ("net_admin", "plan --diff"),
    ],
)
async def test_55_without_a_capability_it_is_named_with_the_line_of_the_unit(
    way: Way, capability: str, verb: str
) -> None:
    await way.proxy.run("nft", "add table inet foreign")
    before = await way.proxy.dump()
    file = () if verb == "revert" else ("-c", str(way.file(TWO_LINES)))
    sentence = one_sentence(await without(way.proxy, capability, *verb.split(), *file), 77)
    name = f"CAP_{capability.upper()}"
    assert f"needs {name}" in sentence
    assert re.search(rf"AmbientCapabilities=.*\b{name}\b", sentence)
    assert await way.proxy.dump() == before


@SIDECAR_V4
@pytest.mark.parametrize("verb", ["run", "apply", "revert"])
async def test_54_without_nft_the_package_is_named(way: Way, verb: str) -> None:
    """What has nothing to remove does without."""
    if verb == "revert":
        await way.proxy.run("nft", "add table inet tproxyd_guard")
    before = await way.proxy.dump()
    nft = (await way.proxy.run("sh", "-c", "command -v nft")).stdout.strip()
    # In a mount namespace of its own, where the program is not one.
    hide = f"mount --bind /dev/null {nft} && exec {' '.join(TPROXYD)} {verb}"
    if verb != "revert":
        hide += f" -c {way.file(TWO_LINES)}"
    sentence = one_sentence(await way.proxy.run("unshare", "--mount", "sh", "-c", hide, check=False), 69)
    assert "nft is missing" in sentence
    assert "apt-get install nftables" in sentence
    assert await way.proxy.dump() == before


@BOTH_LAYOUTS
async def test_zero_config_captures_the_ports_and_says_ready_at_any_level(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_identity, way.app, 9001)
    async with way.proxy.process(*TPROXYD, "run", "--port", "8080", "--port", "9000-9001", collect=True) as daemon:
        ready = await daemon.wait_for_output("ready")
        assert ready == f"tproxyd: ready pid={daemon.pid} listen=127.0.0.1:15006,[::1]:15006"
        async with await way.client.connect(way.address, 9001) as stream:
            own = format_address(stream.socket.getsockname())
            await stream.receive_some()
        assert '"outcome":' in await daemon.wait_for_output(own)
        daemon.send_signal(signal.SIGTERM)
        assert await daemon.wait() == 0
    config = TWO_LINES + '[log]\nlevel = "error"\n[listen]\nport = 15999\n'
    async with open_daemon(way.proxy, config) as silent:
        assert silent.ready.endswith("listen=127.0.0.1:15999,[::1]:15999")
        assert await silent.stop() == 0
        assert silent.process.stderr_text == silent.ready + "\n"


KEYS = [
    "ts",
    "id",
    "workload",
    "direction",
    "protocol",
    "source",
    "original_destination",
    "upstream",
    "upstream_source",
    "rule",
    "sni",
    "alpn",
    "bytes_from_client",
    "bytes_from_upstream",
    "duration_ms",
    "outcome",
]


async def one_echo(way: Way, text: bytes) -> str:
    async with await way.client.connect(way.address, 8080) as stream:
        own = format_address(stream.socket.getsockname())
        await stream.send_all(text)
        await stream.send_eof()
        assert await stream.receive_some() == text
        assert await stream.receive_some() == b""
    return own


async def test_the_access_log_has_the_contracts_fields(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, TWO_LINES) as daemon:
        record = await daemon.record(await one_echo(way, b"hello"))
        assert list(record) == KEYS
        assert re.fullmatch(r"2\d{3}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["ts"])
        assert (record["rule"], record["sni"], record["alpn"]) == (None, None, None)
        assert (record["bytes_from_client"], record["bytes_from_upstream"]) == (5, 5)
        ids = {(await daemon.record(await one_echo(way, b"x")))["id"] for _ in range(3)} | {record["id"]}
        assert len(ids) == 4
        assert await daemon.stop() == 0
    # Nothing but records on stdout, nothing of a record on stderr.
    assert [list(json.loads(line)) for line in daemon.process.stdout_text.splitlines()] == [KEYS] * 4
    assert "hello" not in daemon.process.stderr_text
    assert '"outcome"' not in daemon.process.stderr_text


@BOTH_LAYOUTS
async def test_the_access_log_as_text_and_switched_off(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    async with open_daemon(way.proxy, TWO_LINES + '[log]\nformat = "text"\n') as daemon:
        own = await one_echo(way, b"hello")
        line = await daemon.process.wait_for_output(own)
        assert f" inbound tcp {own} -> {format_address((way.address, 8080))} upstream " in line
        assert re.search(r" rule - sent 5 received 5 in [0-9.]+ ms: closed$", line)
        assert await daemon.stop() == 0
    async with open_daemon(way.proxy, TWO_LINES + "[log]\naccess = false\n") as daemon:
        await one_echo(way, b"hello")
        assert await daemon.stop() == 0
        assert daemon.process.stdout_text == ""


@GATEWAY_V4
async def test_57_a_blocked_access_log_holds_no_connection_up_and_drops_are_counted(
    way: Way, nursery: trio.Nursery
) -> None:
    """Nobody reads stdout: first the pipe fills, then the queue; every connection is served all the same."""
    await nursery.start(serve_echo, way.app, 8080)
    async with way.proxy.process(
        *TPROXYD, "run", "--port", "8080", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as daemon:
        assert daemon.stderr is not None
        said = b""
        while b"ready" not in said:
            said += await daemon.stderr.receive_some()
        # The pipe as small as it gets, so that a few lines fill it.
        read_end = daemon.stdout
        assert read_end is not None
        fcntl.fcntl(read_end.fileno(), fcntl.F_SETPIPE_SZ, 4096)
        for _ in range(60):
            with trio.fail_after(2):
                await one_echo(way, b"x")
        daemon.send_signal(signal.SIGTERM)
        with trio.fail_after(5):
            assert await daemon.wait() == 0
        while chunk := await daemon.stderr.receive_some():
            said += chunk
        (dropped,) = re.findall(
            rb"lines of the access log that were dropped because stdout did not take them: (\d+)", said
        )
        lines = b""
        while chunk := await read_end.receive_some():
            lines += chunk
        # Whole lines only, and none unaccounted for.
        assert lines.endswith(b"\n")
        assert lines.count(b"\n") + int(dropped) == 60


@GATEWAY_V4
async def test_59_a_full_disk_under_the_access_log_holds_no_connection_up(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        async with way.proxy.process(*TPROXYD, "run", "--port", "8080", stdout=full, stderr=subprocess.PIPE) as daemon:
            assert daemon.stderr is not None
            said = b""
            while b"ready" not in said:
                said += await daemon.stderr.receive_some()
            for _ in range(5):
                await one_echo(way, b"x")
            daemon.send_signal(signal.SIGTERM)
            assert await daemon.wait() == 0
            while chunk := await daemon.stderr.receive_some():
                said += chunk
    finally:
        os.close(full)
    assert b"because stdout did not take them: 5" in said


@SIDECAR_V4
async def test_22_a_limit_of_files_that_leaves_no_room_is_refused_at_the_start(way: Way) -> None:
    before = await way.proxy.dump()
    limited = ("prlimit", "--nofile=30:30", *TPROXYD, "run", "-c", str(way.file(TWO_LINES)))
    sentence = one_sentence(await way.proxy.run(*limited, check=False), 71)
    assert "the limit of 30 open files leaves no room" in sentence
    assert "LimitNOFILE" in sentence
    assert await way.proxy.dump() == before


async def test_closed_standard_files_are_put_up_with(sidecar_lab: Lab, tmp_path: Path) -> None:
    file = tmp_path / "tproxyd.toml"
    file.write_text(TWO_LINES)
    command = f"{' '.join(TPROXYD)} run -c {file}"
    for closed in ("<&-", ">&-", "<&- >&-"):
        async with sidecar_lab["host"].process("sh", "-c", f"exec {command} {closed}", collect=True) as daemon:
            await daemon.wait_for_output("ready")
            daemon.send_signal(signal.SIGTERM)
            assert await daemon.wait() == 0
            assert "Traceback" not in daemon.stderr_text
    mistake = f"{' '.join(TPROXYD)} check -c /no/such/file 2>&-"
    assert (await sidecar_lab["host"].run("sh", "-c", mistake, check=False)).returncode == 78


@GATEWAY_V4
async def test_57_a_blocked_stderr_holds_nothing_up(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    file = way.file(TWO_LINES)
    async with way.proxy.process(
        *TPROXYD, "run", "-c", str(file), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as daemon:
        assert daemon.stderr is not None
        said = b""
        while b"ready" not in said:
            said += await daemon.stderr.receive_some()
        fcntl.fcntl(daemon.stderr.fileno(), fcntl.F_SETPIPE_SZ, 4096)
        file.write_text("[capture\n")
        for _ in range(200):  # reloads are refused, in a line of some 200 bytes each
            daemon.send_signal(signal.SIGHUP)
            await trio.sleep(0.002)
        with trio.fail_after(2):
            await one_echo(way, b"x")
        daemon.send_signal(signal.SIGTERM)
        with trio.fail_after(5):
            assert await daemon.wait() == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "verb", ["check -c FILE", "plan -c FILE", "plan -c FILE --against FILE", "apply -c FILE", "revert", "--version"]
)
async def test_output_that_cannot_be_written_is_one_sentence(
    sidecar_lab: Lab, tmp_path: Path, verb: str, unbuffered: str
) -> None:
    file = tmp_path / "tproxyd.toml"
    file.write_text(TWO_LINES)
    command = f"{' '.join(TPROXYD)} {verb.replace('FILE', str(file))}"
    env = {"PYTHONUNBUFFERED": unbuffered}
    full = await sidecar_lab["host"].run("sh", "-c", f"{command} >/dev/full", check=False, env=env)
    assert "No space left on device" in one_sentence(full, 74)
    # Its reader has left: nothing to complain of.
    left = await sidecar_lab["host"].run("bash", "-c", f"set -o pipefail; {command} | true", check=False, env=env)
    assert (left.returncode, left.stderr) == (0, "")


async def test_a_daemon_that_does_not_start_shows_its_own_words(sidecar_lab: Lab) -> None:
    with pytest.raises(LabError, match=r"(?s)ended with 78.*`capture\.prots`"):
        async with open_daemon(sidecar_lab["host"], FIVE_MISTAKES):
            pass


async def test_check_warns_where_a_host_forwards_and_no_destination_is_named(gateway_lab: Lab, tmp_path: Path) -> None:
    """A container host's own outbound traffic would be captured."""
    gateway, file = gateway_lab["gateway"], tmp_path / "tproxyd.toml"
    for text, forwards, warns in (
        (TWO_LINES, 1, True),
        (TWO_LINES, 0, False),
        (TWO_LINES + 'destinations = ["local"]\n', 1, False),
        ("[capture]\nports = []\n", 1, False),
    ):
        file.write_text(text, encoding="utf-8")
        gateway.set_sysctl("net.ipv4.ip_forward", forwards)
        gateway.set_sysctl("net.ipv6.conf.all.forwarding", forwards)
        done = await gateway.run(*TPROXYD, "check", "-c", str(file))
        assert ("capture.destinations is empty" in done.stderr) == warns
        assert done.stdout.startswith("the configuration is good")
