"""Configuration files: what cannot be read, conf.d and how it merges, which file a problem names, --port.

The property test at the end: whatever a mapping holds, the answer is a Config or problems that a user can read.
"""

from __future__ import annotations

import datetime
import os
import signal
import socket
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Network
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tproxyd.config import Config, PortRange, config_from_mapping, load_config
from tproxyd.config.schema import LATER, keys_of
from tproxyd.errors import ConfigError, UsageError

NOBODY = 65534  # the user who owns nothing, on every distribution
LARGEST = 8 * 1024 * 1024


def problems_of(read: Callable[[], Config]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read()
    for problem in caught.value.problems:
        assert problem.isprintable()
        assert "; " in problem, "no way out"
    return caught.value.problems


def table(rows: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """Rows of (name, ...) as arguments of parametrize; the name becomes the id."""
    return {"argvalues": [row[1:] if row[2:] else row[1] for row in rows], "ids": [row[0] for row in rows]}


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """TimeoutError in whatever blocks for longer."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"blocked for {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def without_privileges() -> Iterator[None]:
    """As a user whom file modes concern; root becomes nobody for the block."""
    uid = os.geteuid()
    if uid == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(uid)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory that every user may enter; its files are named without a path."""
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# One file


CONTENTS = [
    ("not UTF-8", b'[capture]\nports = ["\xff"]\n', "is not UTF-8 (byte 20, line 2); save it as UTF-8"),
    ("UTF-16", "[log]\n".encode("utf-16"), "is not UTF-8 (byte 0, line 1); save it as UTF-8"),
    ("cut within a character", b"\n\n# \xe2\x82", "is not UTF-8 (byte 4, line 3); save it as UTF-8"),
    ("no TOML", b"[capture\n", "is not TOML: "),
    ("position", b"[log]\nlevel = oops\n", "line 2"),
    ("key twice", b"[log]\naccess = true\naccess = true\n", "is not TOML: Cannot overwrite a value"),
    ("raw control character", b'[log]\nlevel = "\x1b[2J"\n', "is not TOML: "),
    ("raw control character in a key", b'"\x07" = 1\n', "is not TOML: "),
    ("no date", b"log.level = 2024-13-01\n", "is not TOML: "),
    ("NUL bytes", bytes(64), "is not TOML: "),
    ("byte order mark", b"\xef\xbb\xbf[log]\n", "is not TOML: "),
    ("nested too deeply", b"capture = " + b"[" * 100_000, "is not usable TOML: nested too deeply; simplify it"),
    (
        "tables nested too deeply",
        b"capture = " + b"{a=" * 100_000,
        "is not usable TOML: nested too deeply; simplify it",
    ),
    ("endless integer", b"listen.port = " + b"9" * 5000, "is not usable TOML: "),
    ("larger than 8 MiB", b"#" * (LARGEST + 1), "is larger than 8 MiB; is this the right file?"),
]


@pytest.mark.parametrize(("content", "expected"), **table(CONTENTS))
def test_content_that_is_no_configuration(here: Path, content: bytes, expected: str) -> None:
    (here / "x.toml").write_bytes(content)
    (problem,) = problems_of(lambda: load_config(Path("x.toml")))
    assert problem.startswith("x.toml: ")
    assert expected in problem
    assert "sys." not in problem, "advice for a Python programmer"


@pytest.mark.parametrize("content", [b"", b"\n", b"# nothing\r\n", b"#" * LARGEST], ids=len)
def test_a_file_without_a_key_gives_the_defaults(here: Path, content: bytes) -> None:
    (here / "x.toml").write_bytes(content)
    assert load_config(Path("x.toml")) == Config()


def test_all_problems_of_a_file_come_at_once_each_with_its_name(here: Path) -> None:
    (here / "x.toml").write_text('prots = 1\n[capture]\nports = ["0", "x"]\n[log]\nlevel = 1\n', encoding="utf-8")
    problems = problems_of(lambda: load_config(Path("x.toml")))
    assert [problem.partition(" ")[0] for problem in problems] == ["x.toml:"] * 4


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path.name)


FILES: list[tuple[str, Callable[[Path], Any], str, str]] = [
    (
        "missing",
        lambda _: None,
        "x.toml",
        "there is no such file; name another with -c, or capture ports without a file",
    ),
    ("dangling link", lambda path: path.symlink_to("nowhere"), "x.toml", "there is no such file; name another with -c"),
    (
        "link to itself",
        lambda path: path.symlink_to(path),
        "x.toml",
        "cannot be read: Too many levels of symbolic links;",
    ),
    ("directory", lambda path: path.mkdir(), "x.toml", "is a directory; name a TOML file"),
    ("FIFO without a writer", make_fifo, "x.toml", "is no regular file; name a TOML file"),
    ("socket", make_socket, "x.toml", "cannot be read: No such device or address; name another with -c"),
    ("endless device", lambda _: None, "/dev/zero", "is no regular file; name a TOML file"),
    (
        "file for a directory",
        lambda path: path.touch(),
        "x.toml/y",
        "cannot be read: Not a directory; name another with",
    ),
    ("NUL in the name", lambda _: None, "x\0.toml", "cannot be read: no file's name has a NUL character; name another"),
    ("endless name", lambda _: None, "x" * 300, "cannot be read: File name too long; name another with -c"),
    ("newline in the name", lambda _: None, "x\n.toml", "there is no such file; name another with -c"),
    ("no name", lambda _: None, "", "is a directory; name a TOML file"),
]


@pytest.mark.parametrize(("make", "name", "expected"), **table(FILES))
def test_what_is_no_readable_file(here: Path, make: Callable[[Path], Any], name: str, expected: str) -> None:
    make(here / "x.toml")
    with within(5):
        (problem,) = problems_of(lambda: load_config(Path(name)))
    assert expected in problem


@pytest.mark.parametrize(("make", "name", "_"), **table(FILES))
def test_what_is_no_readable_file_leaves_no_descriptor(
    here: Path, make: Callable[[Path], Any], name: str, _: str
) -> None:
    make(here / "x.toml")
    before = os.listdir("/proc/self/fd")
    with within(5), pytest.raises(ConfigError):
        load_config(Path(name))
    assert os.listdir("/proc/self/fd") == before


def test_a_file_of_somebody_else_is_refused(here: Path) -> None:
    file = here / "x.toml"
    file.write_text("[listen]\nport = 80\n", encoding="utf-8")
    with without_privileges():
        assert load_config(Path("x.toml")).listen.port == 80
    file.chmod(0)
    with without_privileges():
        problems = problems_of(lambda: load_config(Path("x.toml")))
    assert problems == ("x.toml: cannot be read by this user; run as its owner or change its mode",)


def test_a_conf_d_of_somebody_else_is_refused(here: Path) -> None:
    """Not passed over: `check` would call a configuration good of which it has seen a part."""
    write(here, {"tproxyd.toml": "", "conf.d/10.toml": "[listen]\nport = 0\n"})
    (here / "conf.d").chmod(0)
    try:
        with without_privileges():
            problems = problems_of(lambda: load_config(default=Path("tproxyd.toml")))
    finally:
        (here / "conf.d").chmod(0o755)
    assert problems == ("conf.d: cannot be read by this user; run as its owner or change its mode",)


def test_a_conf_d_that_is_a_file_is_refused(here: Path) -> None:
    write(here, {"tproxyd.toml": "", "conf.d": ""})
    problems = problems_of(lambda: load_config(default=Path("tproxyd.toml")))
    assert problems == ("conf.d: cannot be read: Not a directory; name another with -c",)


@pytest.mark.parametrize("content", ["[listen]\nport = 0\n", "[listen\n"], ids=["bad value", "no TOML"])
@pytest.mark.parametrize("name", ["d" * 80 + ".toml", "x\n\x1b.toml"], ids=["long", "control characters"])
def test_a_problem_names_its_file_whole_and_in_one_line(here: Path, name: str, content: str) -> None:
    (here / name).write_text(content, encoding="utf-8")
    (problem,) = problems_of(lambda: load_config(Path(name)))
    if name.isprintable():
        assert problem.startswith(f"{name}: ")


# conf.d


def write(directory: Path, files: Mapping[str, str]) -> None:
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(content, encoding="utf-8")


MERGED = [
    ("one file", {"tproxyd.toml": "[listen]\nport = 80\n"}, "listen.port = 80"),
    (
        "tables merge by key",
        {"tproxyd.toml": "[listen]\nport = 80\nbacklog = 1\n", "conf.d/1.toml": "[listen]\nport = 81\n"},
        "listen.port = 81\nlisten.backlog = 1",
    ),
    (
        "tables of several files",
        {"tproxyd.toml": '[log]\nlevel = "debug"\n', "conf.d/1.toml": "log.access = false\n[listen]\nport = 1\n"},
        'log.level = "debug"\nlog.access = false\nlisten.port = 1',
    ),
    (
        "lists replace",
        {
            "tproxyd.toml": 'capture.ports = ["1", "2"]\ncapture.exclude_ports = ["3", "4"]\n',
            "conf.d/1.toml": 'capture.ports = ["2-9"]\ncapture.exclude_ports = []\n',
        },
        'capture.ports = ["2-9"]\ncapture.exclude_ports = []',
    ),
    ("the last in byte order wins", {}, "listen.port = 5"),
    (
        "only names that end with .toml",
        {
            "tproxyd.toml": "listen.port = 7",
            **{
                f"conf.d/{name}": "no TOML"
                for name in ("1.toml~", "2.toml.bak", "3.TOML", "4", "toml", ".#5.toml", ".toml")
            },
        },
        "listen.port = 7",
    ),
]
BYTE_ORDER = ("10.toml", "9.toml", "A.toml", "a.toml", "é.toml")


@pytest.mark.parametrize(("files", "expected"), **table(MERGED))
@pytest.mark.parametrize("reverse", [False, True], ids=["", "files made in reverse"])
def test_conf_d_merges(here: Path, files: dict[str, str], expected: str, reverse: bool) -> None:
    if not files:
        files = {"tproxyd.toml": ""}
        files |= {f"conf.d/{name}": f"listen.port = {index}" for index, name in enumerate(BYTE_ORDER, 1)}
    write(here, dict(sorted(files.items(), reverse=reverse)))
    assert load_config(default=Path("tproxyd.toml")) == config_from_mapping(tomllib.loads(expected))


def test_a_named_file_stands_alone(here: Path) -> None:
    write(here, {"tproxyd.toml": "listen.port = 1", "conf.d/1.toml": "listen.port = 2"})
    assert load_config(Path("tproxyd.toml"), default=Path("tproxyd.toml")).listen.port == 1


ORIGINS = [
    ("unknown key", {"tproxyd.toml": "[log]\n", "conf.d/1.toml": "[log]\nx = 1\n"}, ["conf.d/1.toml"]),
    ("unknown key, table there again", {"tproxyd.toml": "log.x = 1", "conf.d/1.toml": "[log]"}, ["tproxyd.toml"]),
    ("unknown table", {"tproxyd.toml": "", "conf.d/1.toml": "[x]", "conf.d/2.toml": ""}, ["conf.d/1.toml"]),
    ("a later table", {"tproxyd.toml": "", "conf.d/1.toml": "[outbound]"}, ["conf.d/1.toml"]),
    ("a later key", {"tproxyd.toml": "admin.socket = 1", "conf.d/1.toml": "[admin]"}, ["tproxyd.toml"]),
    ("no table", {"tproxyd.toml": "", "conf.d/1.toml": "capture = 1", "conf.d/2.toml": "[log]"}, ["conf.d/1.toml"]),
    (
        "no table, which a later file would hide",
        {"tproxyd.toml": "listen = 1", "conf.d/1.toml": "[listen]", "conf.d/2.toml": "listen = 2"},
        ["tproxyd.toml"],
    ),
    ("bad value", {"tproxyd.toml": "listen.port = 0", "conf.d/1.toml": "listen.backlog = 1"}, ["tproxyd.toml"]),
    ("worse value", {"tproxyd.toml": "listen.port = 0", "conf.d/1.toml": "listen.port = -1"}, ["conf.d/1.toml"]),
    ("item of a list", {"tproxyd.toml": "[capture]", "conf.d/1.toml": "capture.ports = [1, 0]"}, ["conf.d/1.toml"]),
    (
        "one problem each",
        {"tproxyd.toml": "listen.port = 0", "conf.d/1.toml": "listen.backlog = 0", "conf.d/2.toml": "listen.x = 0"},
        ["tproxyd.toml", "conf.d/1.toml", "conf.d/2.toml"],
    ),
    (
        "none of them can be read",
        {"conf.d/1.toml": "[x", "conf.d/2.toml": "x]"},
        ["tproxyd.toml", "conf.d/1.toml", "conf.d/2.toml"],
    ),
    (
        "one cannot be read, one has a bad value, and what it may say of marks is not known",
        {
            "tproxyd.toml": 'listen.port = 0\nrouting.mark = "0x1/0x1"\nrouting.upstream_mark = "0x1/0x1"',
            "conf.d/1.toml": "[x",
        },
        ["conf.d/1.toml", "tproxyd.toml"],
    ),
    (
        "interface excluded elsewhere",
        {"tproxyd.toml": 'capture.interfaces = ["a"]', "conf.d/1.toml": 'capture.exclude_interfaces = ["a"]'},
        ["conf.d/1.toml"],
    ),
    (
        "interface included elsewhere",
        {"tproxyd.toml": 'capture.exclude_interfaces = ["a"]', "conf.d/1.toml": 'capture.interfaces = ["a"]'},
        ["tproxyd.toml"],
    ),
    ("dots in an unknown key", {"tproxyd.toml": "", "conf.d/1.toml": '"a.b.c" = 1'}, ["conf.d/1.toml"]),
    ("bracket in an unknown key", {"tproxyd.toml": "", "conf.d/1.toml": '"a[b" = 1'}, ["conf.d/1.toml"]),
    ("dots in a table", {"tproxyd.toml": 'log."a.b" = 1', "conf.d/1.toml": "[log]"}, ["tproxyd.toml"]),
    (
        "excluded by default, another key of the table elsewhere",
        {"tproxyd.toml": "capture.ports = [22]", "conf.d/1.toml": "capture.sources = []"},
        ["tproxyd.toml"],
    ),
    (
        "excluded elsewhere",
        {"tproxyd.toml": "capture.ports = [80]", "conf.d/1.toml": 'capture.exclude_ports = "all"'},
        ["conf.d/1.toml"],
    ),
]


@pytest.mark.parametrize(("files", "expected"), **table(ORIGINS))
def test_a_problem_names_the_file_that_it_is_in(here: Path, files: dict[str, str], expected: list[str]) -> None:
    write(here, files)
    with pytest.raises(ConfigError) as caught:
        load_config(default=Path("tproxyd.toml"))
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == expected


RULES = """
[[policy.rule]]
name = "{}"
action = "refuse"
[[policy.rule]]
name = "{}"
action = "forward"
"""


def test_rules_are_added_to_those_of_the_files_before(here: Path) -> None:
    write(
        here,
        {
            "tproxyd.toml": '[policy]\ndefault = "refuse"\n' + RULES.format("a", "b"),
            "conf.d/1.toml": "[policy]\nallow_special = []\nrule = []\n",
            "conf.d/2.toml": RULES.format("A", "c"),
        },
    )
    policy = load_config(default=Path("tproxyd.toml")).policy
    assert [rule.name for rule in policy.rule] == ["a", "b", "A", "c"]
    assert policy.default == "refuse"


def test_a_bad_rule_is_counted_in_its_own_file(here: Path) -> None:
    bad = '\n[[policy.rule]]\nname = "d"\naction = "drop"\n'
    write(here, {"tproxyd.toml": RULES.format("a", "b"), "conf.d/1.toml": RULES.format("b", "c") + bad})
    problems = problems_of(lambda: load_config(default=Path("tproxyd.toml")))
    assert problems == (
        'conf.d/1.toml: `policy.rule[0].name` = "b" is the name of `policy.rule[1]` in tproxyd.toml, too; '
        "give each its own, for the access log",
        'conf.d/1.toml: `policy.rule[2].action` (rule "d") = "drop" is no action; '
        'write "forward", "refuse" or { forward = "192.0.2.1:80" }',
    )


@pytest.mark.parametrize("name", ["tproxyd.toml", "conf.d/1.toml", "conf.d/2.toml"])
@pytest.mark.parametrize("bad", ["policy.rule = 1", "policy = 1"])
def test_what_is_no_list_of_rules_is_not_hidden_by_other_files(here: Path, name: str, bad: str) -> None:
    files = {file: RULES.format(file, file[::-1]) for file in ("tproxyd.toml", "conf.d/1.toml", "conf.d/2.toml")}
    write(here, files | {name: bad})
    (problem,) = problems_of(lambda: load_config(default=Path("tproxyd.toml")))
    assert problem.startswith(f"{name}: `policy")


def test_a_rule_that_calls_the_listener_is_named_with_its_file(here: Path) -> None:
    bad = '[[policy.rule]]\nname = "loop"\naction = { forward = "127.0.0.1:77" }\n'
    files = {"tproxyd.toml": RULES.format("a", "b"), "conf.d/1.toml": bad, "conf.d/2.toml": RULES.format("c", "d")}
    write(here, files | {"conf.d/3.toml": "listen.port = 77"})
    (problem,) = problems_of(lambda: load_config(default=Path("tproxyd.toml")))
    assert problem.startswith(
        'conf.d/1.toml: `policy.rule[0].action.forward` (rule "loop") = "127.0.0.1:77" is tproxyd'
    )


# --port


def ports_of(config: Config) -> list[str]:
    return [str(port) for port in config.capture.ports]


def test_ports_of_the_command_line_need_no_file(here: Path) -> None:
    write(here, {"tproxyd.toml": "no TOML", "conf.d/1.toml": "no TOML"})
    assert ports_of(load_config(ports=["8080", "9000-9099"], default=Path("tproxyd.toml"))) == ["8080", "9000-9099"]


def test_ports_of_the_command_line_are_added_to_those_of_a_named_file(here: Path) -> None:
    write(here, {"x.toml": 'capture.ports = ["8080"]\nlisten.port = 80'})
    config = load_config(Path("x.toml"), ports=["8079", "8081-8083"])
    assert ports_of(config) == ["8080", "8079", "8081-8083"]
    assert config.listen.port == 80


BAD_PORTS = [
    ("zero", ["0"], "--port 0 is out of range; ports are 1 to 65535"),
    ("beyond the end", ["1-65536"], "--port 1-65536 is out of range;"),
    ("text", ["80", "http"], '--port http is no port or range; write "8080" or "9000-9099"'),
    ("every port", ["all"], "--port all is no port or range;"),
    ("empty", [""], "--port  is no port or range;"),
    ("inverted", ["9-1"], '--port 9-1 is an inverted range; write "1-9"'),
    ("twice", ["80", "80"], '--port 80 overlaps "80" in the same list; merge the two'),
    ("overlap", ["80-90", "85"], '--port 85 overlaps "80-90"'),
    ("control characters", ["80\x1b\n"], "--port 80\\x1b\\n is no port or range;"),
    (
        "excluded by default",
        ["22"],
        '--port 22 would capture nothing, because of `capture.exclude_ports` = ["22"] (the',
    ),
    ("excluded, beside another", ["80", "22"], "--port 22 would capture nothing"),
]


@pytest.mark.parametrize(("ports", "expected"), **table(BAD_PORTS))
def test_bad_port_of_the_command_line(ports: list[str], expected: str) -> None:
    with pytest.raises((UsageError, ConfigError)) as caught:
        load_config(ports=ports)
    assert expected in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_port_that_the_file_has_already_is_named(here: Path) -> None:
    write(here, {"x.toml": 'capture.ports = ["8080-8090"]'})
    with pytest.raises(UsageError, match=r"^--port and `capture.ports` together: .*8085.* overlaps .*; merge the two$"):
        load_config(Path("x.toml"), ports=["8085"])


def test_bad_ports_of_the_command_line_are_said_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        load_config(ports=["0", "80", "x"])
    assert [line.partition(" is ")[0] for line in str(caught.value).splitlines()] == ["--port 0", "--port x"]


def test_an_excluded_port_of_the_command_line_is_nothing_to_capture(here: Path) -> None:
    write(here, {"x.toml": "capture.exclude_ports = [23]\nlisten.port = 0", "y.toml": "capture.exclude_ports = []"})
    (problem,) = problems_of(lambda: load_config(ports=["80", "22"]))
    assert problem.startswith("command line: --port 22 would capture nothing")
    problems = problems_of(lambda: load_config(Path("x.toml"), ports=["22", "23"]))
    assert [problem[:25] for problem in problems] == ["x.toml: `listen.port` = 0", "x.toml: --port 23 would c"]
    assert ports_of(load_config(Path("y.toml"), ports=["22"])) == ["22"]
    assert ports_of(load_config(ports=["20-23"])) == ["20-23"]


def test_a_bad_port_is_said_before_any_file_is_read() -> None:
    with pytest.raises(UsageError, match="--port x is no port or range"):
        load_config(Path("nowhere.toml"), ports=["x"])


# Whatever a mapping holds


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


NO_TOML = [
    ("nothing", None),
    ("an endless integer", 10**5000),
    ("an endless integer below zero", -(10**5000)),
    ("an endless integer in a list", [10**5000]),
    ("not a number", float("nan")),
    ("bytes", b"x"),
    ("a set", {1}),
    ("a network", IPv4Network("192.0.2.0/24")),
    ("a lone surrogate", "\udc80"),
    ("keys that are no strings", {1: 2}),
    ("a thousand lists", nested(1000)),
    ("a hundred thousand lists", nested(100_000)),
]


@pytest.mark.parametrize("value", **table(NO_TOML))
@pytest.mark.parametrize(
    "key", ["level", 7, "\udc80\n", 10**5000, None], ids=["level", "7", "unprintable", "endless", "None"]
)
def test_what_only_a_mapping_can_hold(key: Any, value: Any) -> None:
    (problem,) = problems_of(lambda: config_from_mapping({"log": {key: value}}))
    assert problem.startswith("config: `log.")
    assert "a date or time" not in problem


def test_a_path_that_cannot_be_written_in_toml() -> None:
    (problem,) = problems_of(lambda: config_from_mapping({"upstream": {"target": "unix:/run/\ud800"}}))
    assert problem.startswith('config: `upstream.target` = "unix:/run/\\ud800" has a character that no path can have; ')


def test_a_tuple_is_a_list_and_any_mapping_a_table() -> None:
    mapping = MappingProxyType({"capture": MappingProxyType({"ports": (80, "90-91"), "destinations": ("local",)})})
    assert config_from_mapping(mapping).capture.ports == (PortRange(80, 80), PortRange(90, 91))
    assert config_from_mapping({"upstream": {"source": ("127.0.0.6",)}}).upstream.source == ("127.0.0.6",)


TEXTS = (
    st.text()
    | st.text(st.characters(codec=None))
    | st.sampled_from(
        [
            "all",
            "local",
            "auto",
            "80",
            "9-8",
            "eth*",
            "lo",
            "*",
            "1s",
            "0x1/0x3",
            "[::1]:80",
            "forward",
            "127.0.0.6",
            "192.0.2.1:80",
            "unix:/run/app.sock",
            "::1%lo",
            "::ffff:1.2.3.4",
            "10.0.0.1/8",
        ]
    )
)
NUMBERS = st.booleans() | st.integers() | st.floats() | st.sampled_from([10**100, -(2**64), 65536, 0])
LEAVES = st.none() | NUMBERS | TEXTS | st.just(datetime.time(12)) | st.binary(max_size=3)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=12
)
NAMES = {name: [*keys_of(kind), *(LATER.get(name) or ())] for name, kind in keys_of(Config).items()}
TABLES = st.one_of(
    [
        st.tuples(st.just(name), st.dictionaries(st.sampled_from(keys) | TEXTS, VALUES, max_size=6))
        for name, keys in NAMES.items()
    ]
)
MAPPINGS = st.builds(
    lambda known, other: dict(known) | other, st.lists(TABLES, max_size=4), st.dictionaries(TEXTS, VALUES, max_size=2)
)


@settings(max_examples=200)
@given(MAPPINGS)
def test_any_mapping_gives_a_config_or_readable_problems(mapping: dict[str, Any]) -> None:
    for problem in problems_in(mapping):
        assert problem.isprintable()
        assert problem.startswith("config: ")


def problems_in(mapping: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        config_from_mapping(mapping)
    except ConfigError as error:
        return error.problems
    return ()
