"""What the daemon says to systemd, and what it takes from it, with a socket in systemd's place."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tproxyd.daemon import successor
from tproxyd.daemon.systemd import Manager, find_manager


@contextmanager
def open_peer(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
        peer.bind("\0" + address[1:] if address.startswith("@") else address)
        peer.settimeout(5)
        yield peer


@pytest.mark.parametrize("abstract", [False, True])
def test_all_fields_are_one_datagram(tmp_path: Path, abstract: bool) -> None:
    address = f"@tproxyd-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with open_peer(address) as peer:
        assert Manager(address).notify(READY=1, STATUS="two\nlines", MAINPID=7)
        assert peer.recv(1000) == b"READY=1\nSTATUS=two lines\nMAINPID=7"
        Manager(address).reloading()
        first, second = peer.recv(1000).split(b"\n")
        assert first == b"RELOADING=1"
        assert second.startswith(b"MONOTONIC_USEC=")


def test_without_systemd_nothing_is_said() -> None:
    manager = find_manager({})
    assert not manager.listens
    assert not manager.notify(READY=1)
    assert not manager.store([])
    manager.empty_store()


def test_a_manager_that_is_gone_is_a_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not Manager(str(tmp_path / "notify")).notify(READY=1)
    assert caplog.messages == ["systemd does not take READY: No such file or directory"]


def test_the_environment_is_read_once_and_given_to_nobody() -> None:
    environment = {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "1", "PATH": "/bin"}
    assert find_manager(environment).listens
    assert environment == {"PATH": "/bin"}


def test_listeners_are_stored_once_each_and_forgotten_where_systemd_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tproxyd.daemon.systemd._BARRIER", 0.05)
    address = str(tmp_path / "notify")
    with open_peer(address) as peer, socket.create_server(("127.0.0.1", 0)) as listener, listener.dup() as copy:
        assert not Manager(address).store([listener, copy])
        said, fds, _, _ = socket.recv_fds(peer, 1000, 4)
        assert said == b"FDSTORE=1\nFDNAME=tproxyd-listener"
        with socket.socket(fileno=fds[0]) as stored:
            assert stored.getsockname() == listener.getsockname()
        said, fds, _, _ = socket.recv_fds(peer, 1000, 4)
        assert said == b"BARRIER=1"
        os.close(fds[0])
        assert peer.recv(1000) == b"FDSTOREREMOVE=1\nFDNAME=tproxyd-listener"


def test_what_systemd_passes_is_taken_or_closed(tmp_path: Path) -> None:
    """Descriptors begin at 3, so this is a program of its own."""
    script = (
        "import os, logging; logging.basicConfig()\n"
        "from tproxyd.daemon.systemd import find_manager\n"
        "manager = find_manager()\n"
        "print([sock.getsockname()[0] for sock in manager.passed], [os.get_inheritable(s.fileno()) for s in manager.passed])\n"
        "print(sorted(name for name in os.environ if name.startswith('LISTEN')))\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        shell = 'exec 3<&0 4</dev/null; LISTEN_PID=$$ LISTEN_FDS=3 LISTEN_FDNAMES=a:b exec "$0" -c "$1"'
        done = subprocess.run(
            ["sh", "-c", shell, sys.executable, script],
            stdin=listener.fileno(),
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": ":".join(sys.path)},  # pytest has put the checkout there
        )
    assert done.stdout.splitlines() == ["['127.0.0.1'] [False]", "[]"]
    assert "descriptor 4 (b), which is no socket" in done.stderr
    assert "descriptor 5 (unknown), which is no socket" in done.stderr


def test_a_successor_is_expected_after_an_orderly_end_that_has_announced_one(tmp_path: Path) -> None:
    unit = {"RUNTIME_DIRECTORY": str(tmp_path), "SERVICE_RESULT": "success"}
    assert not successor.is_expected(unit)
    successor.announce(unit)
    assert successor.is_expected(unit)
    assert not successor.is_expected({**unit, "SERVICE_RESULT": "watchdog"})
    assert not successor.is_expected({"RUNTIME_DIRECTORY": str(tmp_path)})
    assert not successor.can_be_announced({})
    successor.announce({})
