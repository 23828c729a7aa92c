"""The verbs that ask a running daemon over its administrator's socket: `connections`, `reload`, `drain`. Standard library and msgspec, no trio."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote, urlencode

import msgspec

from tproxyd.config import DEFAULT_FILE, load_config
from tproxyd.config.wording import printable
from tproxyd.daemon.admin_socket import GROUP, admin_path
from tproxyd.datapath.listing import LivingConnection, read_end
from tproxyd.errors import CapabilityError, ConfigError, KernelError, MissingError

__all__ = [
    "Listed",
    "ask",
    "close_connection",
    "drain",
    "list_connections",
    "reload",
    "short_age",
    "short_size",
    "socket_path",
]

_PATIENCE = 30.0  # seconds for each piece of an answer
_RELOAD = 150.0  # seconds for a reload, more than the daemon gives it

_COLUMNS = ("id", "age", "state", "workload", "client", "destination", "upstream", "rule", "sent", "received")


class Listed(msgspec.Struct):
    """The answer of /v1/connections; `more`: there are others than these."""

    connections: list[LivingConnection]
    more: bool


class _Problem(msgspec.Struct):
    problems: list[str]


class _Changed(msgspec.Struct):
    changes: list[str]


class _Draining(msgspec.Struct):
    connections: int


def list_connections(
    config: Path | None,
    *,
    workload: str | None,
    source: str | None,
    destination: str | None,
    limit: int | None,
    as_json: bool,
) -> int:
    """Prints the living connections. Raises TproxydError."""
    for end, what in ((source, "--source"), (destination, "--destination")):
        if end is not None:
            read_end(end, what)  # raises UsageError
    asked = {"workload": workload, "source": source, "destination": destination, "limit": limit}
    query = urlencode({name: value for name, value in asked.items() if value is not None})
    content = _ask(config, "GET", f"/v1/connections?{query}", "list connections")
    if as_json:
        sys.stdout.write(content.decode())
        return os.EX_OK
    listed = msgspec.json.decode(content, type=Listed)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in _table([_COLUMNS, *map(_row, listed.connections)], width):
        print(line)
    if listed.more:
        print(f"and more than these {len(listed.connections)}")
    return os.EX_OK


def close_connection(config: Path | None, identity: str) -> int:
    """Has one connection reset on both sides. Raises TproxydError."""
    _ask(config, "DELETE", f"/v1/connections/{quote(identity, safe='')}", "close a connection")
    print(f"connection {printable(identity)} is reset on both sides")
    return os.EX_OK


def reload(config: Path | None) -> int:
    """Has the daemon read its configuration again, and prints what has changed. Raises TproxydError.

    A bad file does not say where its daemon is asked; the one of this namespace is, which then knows, and tells in its status and metrics."""
    try:
        path = socket_path(config)
    except ConfigError as error:
        usual = admin_path("auto")
        if usual is None or not os.path.exists(usual):
            raise
        try:
            content = ask(usual, "POST", "/v1/reload", "reload", patience=_RELOAD)
        except MissingError:
            raise error from None
    else:
        content = ask(path, "POST", "/v1/reload", "reload", patience=_RELOAD, named=config is not None)
    for line in msgspec.json.decode(content, type=_Changed).changes:
        print(printable(line))
    return os.EX_OK


def drain(config: Path | None) -> int:
    """Has the daemon stop as SIGTERM does: no new connections, an end when the last one has ended. Raises TproxydError."""
    content = _ask(config, "POST", "/v1/drain", "drain")
    count = msgspec.json.decode(content, type=_Draining).connections
    print(
        f"draining: no new connections are taken, and the daemon ends with the last of {count} (drain.timeout at the latest)"
    )
    return os.EX_OK


def _ask(file: Path | None, method: str, target: str, purpose: str, *, patience: float = _PATIENCE) -> bytes:
    return ask(socket_path(file), method, target, purpose, patience=patience, named=file is not None)


def ask(path: str, method: str, target: str, purpose: str, *, patience: float = _PATIENCE, named: bool = True) -> bytes:
    """The body of a good answer of the daemon at a socket; without `named`, the socket is where a daemon is asked by default. Raises MissingError if nobody is
    there, CapabilityError if this is not for us, and an error with exit code 1 and the daemon's reasons if it refuses."""
    connection = _Connection(path, patience)
    try:
        connection.request(method, target)
        answer = connection.getresponse()
        content = answer.read()
    except (FileNotFoundError, ConnectionRefusedError) as error:
        hint = "" if named else "; if its configuration names another admin.socket, give that with -c FILE"
        raise MissingError(
            f"cannot {purpose}: no daemon is asked at {path} ({error.strerror}); is one running in this network namespace?{hint}"
        ) from error
    except PermissionError as error:
        raise CapabilityError(
            f"cannot {purpose}: {path} is for root, and for members of group {GROUP} if there is one; use sudo"
        ) from error
    except TimeoutError as error:
        raise KernelError(
            f"cannot {purpose}: the daemon at {path} does not answer within {patience:g} s: is it stopped (SIGSTOP)?"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise KernelError(
            f"cannot {purpose}: the daemon at {path} did not answer to the end ({type(error).__name__}); has it just ended, or is it "
            "busy? Try again"
        ) from error
    finally:
        connection.close()
    if answer.status < 300:
        return content
    try:
        problems = msgspec.json.decode(content, type=_Problem).problems
    except msgspec.MsgspecError:
        problems = [content.decode(errors="replace").strip() or f"HTTP status {answer.status}"]
    if answer.status == 403:
        raise CapabilityError(f"cannot {purpose}: {problems[0]}")
    refused = ConfigError(*(f"cannot {purpose}: {problem}" for problem in problems))
    refused.exit_code = 1
    raise refused


def socket_path(file: Path | None) -> str:
    """Of the daemon of a configuration file; without one, of the usual file if that can be read, and else where a daemon of this namespace is asked.

    Raises TproxydError."""
    setting: str | None = "auto"
    try:
        setting = load_config(file).admin.socket
    except ConfigError:
        if file is not None:
            raise
    path = admin_path(setting)
    if path is None:
        raise MissingError(
            f'admin.socket is "" in {file or DEFAULT_FILE}, so its daemon cannot be asked; remove that line and restart it'
        )
    return path


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, patience: float) -> None:
        super().__init__("localhost")
        self._path, self._patience = path, patience

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # By the kernel's clock: with one of Python's a full queue is an error at once, and not waited for.
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(self._patience), 0))
        try:
            self.sock.connect(self._path)
        except BlockingIOError:
            raise TimeoutError from None
        self.sock.settimeout(self._patience)


def _row(one: LivingConnection) -> tuple[str, ...]:
    elsewhere = one.upstream if one.upstream != one.original_destination else None
    return (
        one.id,
        short_age(one.age_s),
        one.state,
        one.workload,
        one.source,
        one.original_destination or "-",
        elsewhere or ("-" if one.upstream is None else "="),
        one.rule or "-",
        short_size(one.bytes_from_client),
        short_size(one.bytes_from_upstream),
    )


def _table(rows: Sequence[Sequence[str]], width: int | None) -> Iterator[str]:
    """Columns as wide as they have to be; on a terminal some are left out where there is no room, and lines are cut."""
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[at]) for row in shown) for at in range(len(shown[0]))]
    columns = list(range(len(widths)))
    for name in ("workload", "rule", "upstream", "state", "age"):  # in the order in which they can be done without
        if width is None or sum(widths[at] + 2 for at in columns) - 2 <= width:
            break
        columns.remove(_COLUMNS.index(name))
    for row in shown:
        line = "  ".join(f"{row[at]:{widths[at]}}" for at in columns).rstrip()
        yield line if width is None else line[:width]


def short_age(seconds: float) -> str:
    """For a column: "3.2s", "4m07s", "5h12m"."""
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{left:02}s" if minutes else f"{seconds:.1f}s"


def short_size(count: float) -> str:
    """For a column: "512", "4.2K", "12M"; in powers of 1024."""
    size = float(count)
    for unit in ("", "K", "M", "G"):
        if size < 1024:
            return f"{size:.0f}{unit}" if size >= 10 or not unit else f"{size:.1f}{unit}"
        size /= 1024
    return f"{size:.1f}T"
