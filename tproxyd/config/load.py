"""Reads files, merges them, and turns the result into a Config: all of it or one ConfigError with every problem."""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tproxyd.config.schema import LATER, Config, keys_of
from tproxyd.config.values import InvalidError, Mark, PortRange, port_range, ports, shown, toml_kind
from tproxyd.errors import ConfigError, UsageError

__all__ = ["DEFAULT_FILE", "config_from_mapping", "load_config"]

DEFAULT_FILE = Path("/etc/tproxyd/tproxyd.toml")
"""Read without -c, then conf.d/*.toml beside it."""

_LARGEST = 8 * 1024 * 1024  # bytes; 10,000 networks take a few hundred kilobytes


def load_config(path: Path | None = None, *, ports: Sequence[str] = (), default: Path = DEFAULT_FILE) -> Config:
    """The configuration as the command line asks for it.

    With `path`, that file alone; without it `default` and conf.d/*.toml beside it in byte order; with `ports` ("8080",
    "9000-9099") and no path, no file. Ports are added to those of the file. Raises ConfigError, and UsageError for a port.
    """
    added = _read_ports(ports)
    if path is not None:
        files = [path]
    elif ports:
        files = []
    else:
        files = [default, *sorted((default.parent / "conf.d").glob("*.toml"), key=lambda file: os.fsencode(file.name))]
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    problems: list[str] = []
    for file in files:
        try:
            _merge(merged, origins, _read(file), str(file))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    config = _make(merged, origins, str(files[0]) if files else "command line")
    return _with_ports(config, added) if added else config


def config_from_mapping(mapping: Mapping[str, Any], *, origin: str = "config") -> Config:
    """A Config from what TOML would give. `origin` names it in messages. Raises ConfigError with every problem."""
    return _make(mapping, {}, origin)


def _read(path: Path) -> dict[str, Any]:
    def refuse(cause: str) -> ConfigError:
        return ConfigError(f"{shown(str(path))[1:-1]}: {cause}")

    try:
        # Non-blocking, so that a FIFO without a writer is refused below instead of waited for.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            mode = os.fstat(fd).st_mode
            if not stat.S_ISREG(mode):
                kind = "a directory" if stat.S_ISDIR(mode) else "no regular file"
                raise refuse(f"is {kind}; name a TOML file")
            with open(fd, "rb", closefd=False) as file:
                data = file.read(_LARGEST + 1)
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise refuse(
            "there is no such file; name another with -c, or capture ports without a file: --port 8080"
        ) from None
    except PermissionError:
        raise refuse("cannot be read by this user; run as its owner or change its mode") from None
    except (OSError, ValueError) as error:
        raise refuse(f"cannot be read: {getattr(error, 'strerror', None) or error}; name another with -c") from None
    if len(data) > _LARGEST:
        raise refuse(f"is larger than {_LARGEST // 1024 // 1024} MiB; is this the right file?")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise refuse(f"is not UTF-8 (byte {error.start}, line {line}); save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise refuse(f"is not TOML: {_printable(str(error))}; mend that place") from None
    except (RecursionError, ValueError) as error:
        cause = "nested too deeply" if isinstance(error, RecursionError) else _printable(str(error))
        raise refuse(f"is not usable TOML: {cause}; simplify it") from None


def _merge(into: dict[str, Any], origins: dict[str, str], new: Mapping[str, Any], origin: str) -> None:
    """Tables merge by key, lists replace; remembers which file each key came from."""
    for key, value in new.items():
        origins[key] = origin
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            into[key] = into[key] | value
        else:
            into[key] = value
        if isinstance(value, dict):
            origins.update({f"{key}.{inner}": origin for inner in value})


def _make(mapping: Mapping[str, Any], origins: Mapping[str, str], origin: str) -> Config:
    problems: list[str] = []

    def say(path: str, sentence: str) -> None:
        table_and_key = ".".join(path.split("[")[0].split(".")[:2])
        problems.append(f"{origins.get(table_and_key, origins.get(path.split('.')[0], origin))}: {sentence}")

    tables: dict[str, Any] = {}
    kinds = keys_of(Config)
    for name, content in mapping.items():
        if name in LATER and LATER[name] is None:
            say(str(name), f"`{name}` is not in this version of tproxyd; remove it")
        elif name not in kinds:
            say(str(name), _unknown(str(name)))
        elif not isinstance(content, Mapping):
            say(name, f"`{name}` is {toml_kind(content)}; it is a table: write [{name}] on a line of its own")
        else:
            tables[name] = _make_table(name, kinds[name], content, say)
    if not problems:
        config = Config(**tables)
        for path, sentence in _check_together(config):
            say(path, sentence)
    if problems:
        raise ConfigError(*problems)
    return config


def _make_table(name: str, kind: type[msgspec.Struct], content: Mapping[str, Any], say: Any) -> msgspec.Struct:
    readers = keys_of(kind)
    fields: dict[str, Any] = {}
    for key, value in content.items():
        path = f"{name}.{key}"
        if key in (LATER.get(name) or ()):
            say(path, f"`{path}` is not in this version of tproxyd; remove it")
        elif key not in readers:
            say(path, _unknown(path))
        else:
            try:
                fields[key] = readers[key](value)
            except InvalidError as invalid:
                for where, inner, cause in invalid.problems:
                    say(path, f"`{path}{where}` = {shown(value if inner is ... else inner)} {cause}")
    return kind(**fields)


def _check_together(config: Config) -> list[tuple[str, str]]:
    problems: list[tuple[str, str]] = []
    capture, routing = config.capture, config.routing
    one, other = routing.mark, routing.upstream_mark
    if isinstance(one, Mark) and isinstance(other, Mark):
        if one == other:
            problems.append(
                (
                    "routing.upstream_mark",
                    f"`routing.upstream_mark` = {other} equals `routing.mark`; they tell packets apart: make them differ",
                )
            )
        elif one.mask & other.mask and one.mask != other.mask:
            problems.append(
                (
                    "routing.upstream_mark",
                    f"`routing.upstream_mark` = {other} overlaps the mask of `routing.mark` = {one}, so setting one would change the other; "
                    "use two values of one mask, or masks without a common bit",
                )
            )
    if config.captures and _covered(capture.ports, capture.exclude_ports):
        problems.append(
            (
                "capture.exclude_ports",
                "`capture.exclude_ports` excludes every port of `capture.ports`: nothing would be captured",
            )
        )
    problems += [
        (
            "capture.exclude_interfaces",
            f'`capture.exclude_interfaces` has "{name}", which is in `capture.interfaces` too; remove it from one',
        )
        for name in capture.exclude_interfaces
        if name in capture.interfaces
    ]
    return problems


def _covered(wanted: Sequence[PortRange], excluded: Sequence[PortRange]) -> bool:
    gone = {port for one in excluded for port in range(one.first, one.last + 1)}
    return all(port in gone for one in wanted for port in range(one.first, one.last + 1))


def _unknown(path: str) -> str:
    import difflib  # only for a message; costs a few milliseconds

    known = list(keys_of(Config))
    known += [f"{table}.{key}" for table, kind in keys_of(Config).items() for key in keys_of(kind)]
    key = path.rpartition(".")[2]
    # First the nearest full name, then a key that stands in another table, as `ports` at the top level.
    near = difflib.get_close_matches(path, known, 1, 0.75) or [name for name in known if name.rpartition(".")[2] == key]
    near = near or difflib.get_close_matches(path, known, 1, 0.5)
    if not near:
        by_key = {name.rpartition(".")[2]: name for name in known}
        near = [by_key[match] for match in difflib.get_close_matches(key, by_key, 1, 0.6)]
    name = shown(path)[1:-1]
    return f"`{name}` is not a key of the configuration; " + (f"did you mean `{near[0]}`?" if near else "remove it")


def _read_ports(values: Sequence[str]) -> tuple[PortRange, ...]:
    ranges: list[PortRange] = []
    for value in values:
        try:
            ranges.append(port_range(value))
            ports([str(one) for one in ranges])  # overlaps
        except InvalidError as invalid:
            raise UsageError(f"--port {shown(value)[1:-1]} {invalid.problems[0][2]}") from None
    return tuple(ranges)


def _with_ports(config: Config, added: tuple[PortRange, ...]) -> Config:
    both = (*config.capture.ports, *added)
    try:
        ports([str(one) for one in both])
    except InvalidError as invalid:
        _, value, cause = invalid.problems[0]
        raise UsageError(f"--port and `capture.ports` together: {shown(value)[1:-1]} {cause}") from None
    return msgspec.structs.replace(config, capture=msgspec.structs.replace(config.capture, ports=both))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:200])
