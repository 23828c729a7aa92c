"""What others have named is shown, and obeyed by nobody: no terminal, no shell, no nft."""

from __future__ import annotations

import subprocess

import pytest

from tproxyd.config.wording import printable
from tproxyd.daemon.cli import main
from tproxyd.daemon.doctor.checks_others import _delete, _insert
from tproxyd.daemon.doctor.model import quoted, setting
from tproxyd.kernel import ChainRule, ForeignChain
from tproxyd.kernel.nft import is_ours

NAMES = ["eth0", "a$(id)", "a;b&c|d", "a'b", 'a"b', "`id`", "#", "~", "*", "ä", "a\\b"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Grüße, 世界 😀", "Grüße, 世界 😀"),
        ("\x1b]0;x\x07\x1b[2J", r"\x1b]0;x\x07\x1b[2J"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("\x7f\x9b\u202e\u2028", r"\x7f\x9b\u202e\u2028"),
        ("\udcff", r"\udcff"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(f"{text}\n\t", keep="\n\t").endswith("\n\t")


@pytest.mark.parametrize("name", NAMES)
def test_a_shell_takes_a_name_as_it_is(name: str) -> None:
    def taken(command: str) -> list[str]:
        script = f'sysctl() {{ printf \'%s\\n\' "$@"; }}; ip() {{ sysctl "$@"; }}; {command}'
        return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()

    assert taken(f"ip link set dev {quoted(name)} up") == ["link", "set", "dev", name, "up"]
    assert taken(setting(f"net/ipv4/conf/{name}/rp_filter", 2)) == ["-w", f"net.ipv4.conf.{name}.rp_filter=2"]
    assert taken(setting("net/ipv4/ip_local_port_range", "1024 65535"))[1:] == [
        "net.ipv4.ip_local_port_range=1024 65535"
    ]


def test_a_name_that_cannot_be_shown_is_none_in_a_remedy() -> None:
    assert quoted("dev a\nreboot") == r"dev 'a\nreboot'"


@pytest.mark.parametrize(
    ("table", "named"), [("filter", True), ("a-b/c.d_1", True), ("x;include", False), ("a b", False), ("$(id)", False)]
)
def test_nft_is_given_names_alone(table: str, named: bool) -> None:
    chain = ForeignChain(
        family="ip", table=table, name="c", hook=None, kind=None, priority=0, policy="accept", rules=[]
    )
    for remedy in (_delete(chain, ChainRule([], "", 7)), _insert(chain, "tcp dport 1", "")):
        commands = [line for line in remedy.split("\n") if not line.startswith("#")]
        assert (table in commands[0]) == named
        assert len(commands) == 1


def test_a_table_is_ours_by_a_name_and_nothing_more() -> None:
    assert is_ours("inet", "tproxyd")
    assert is_ours("inet", "tproxyd_guard")
    assert not is_ours("inet", 'tproxyd_;include"/etc/shadow"')
    assert not is_ours("inet", "tproxyd_$(id)")


def test_an_error_is_one_line_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--\x1b[2J\nforged"]) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert r"--\x1b[2J\nforged" in line
