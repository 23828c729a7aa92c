"""Reads files, merges them, and turns the result into a Config: all of it or one ConfigError with every problem.

Every key remembers the file that it came from, so that a problem names the file to edit. A file that cannot be read does
not keep the problems of the others back; only what holds between keys waits until all of them are known and good.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import msgspec

from tproxyd.config.rules import MOST_RULES
from tproxyd.config.schema import LATER, Capture, Config, keys_of
from tproxyd.config.values import ALL_PORTS, Endpoint, InvalidError, Mark, PortRange, UnixPath, wildcard_over
from tproxyd.config.values import ports as read_ports
from tproxyd.config.wording import printable, short, shown, toml_kind
from tproxyd.errors import ConfigError, UsageError

__all__ = ["DEFAULT_FILE", "config_from_mapping", "load_config", "override"]

DEFAULT_FILE = Path("/etc/tproxyd/tproxyd.toml")
"""Read without -c, then conf.d/*.toml beside it."""

_LARGEST = 8 * 1024 * 1024  # bytes; 10,000 networks take a few hundred kilobytes

_APPENDED = (("policy", "rule"),)
"""Arrays of tables: what a file has in one comes behind what those before it had."""

_Keys = tuple[Any, ...]
"""Where something stands: (table,), (table, key), or (table, key, index) in an array of tables. No dotted text, because a
key may have dots of its own."""

_Say = Callable[..., None]
"""Takes a sentence and the places that it is about."""


def load_config(path: Path | None = None, *, ports: Sequence[str] = (), default: Path = DEFAULT_FILE) -> Config:
    """The configuration as the command line asks for it.

    With `path`, that file alone; without it `default` and conf.d/*.toml beside it in byte order; with `ports` ("8080",
    "9000-9099") and no path, no file. Ports are added to those of the file. Raises ConfigError, and UsageError for a port.
    """
    added = _read_ports(ports)
    unread: list[str] = []
    files = [] if ports else [default]
    if path is not None:
        files = [path]
    elif files:
        try:
            files += _drop_ins(default.parent / "conf.d")
        except ConfigError as error:
            unread += error.problems
    tree = _Tree(origin=str(files[0]) if files else "command line")
    for file in files:
        try:
            tree.merge(_read(file), origin=str(file))
        except ConfigError as error:
            unread += error.problems
    return _make(tree, added=added, unread=unread)


def config_from_mapping(mapping: Mapping[str, Any], *, origin: str = "config") -> Config:
    """A Config from what TOML would give. `origin` names it in messages. Raises ConfigError with every problem."""
    return _make(_Tree(mapping, origin=origin))


def override(config: Config, overrides: Mapping[str, Any], *, origin: str = "overrides") -> Config:
    """The Config with some keys of some tables otherwise, given as TOML would: tables merge by key, lists replace, rules too. What concerns the
    whole program ([relay], [limits], [drain], [admin], [log]) cannot be otherwise. `origin` as above. Raises ConfigError with every problem."""
    whole = [name for name in overrides if name in keys_of(Config) and name not in _OVERRIDDEN]
    if whole:
        raise ConfigError(*(f"{origin}: `{name}` is the same for all workloads; remove it there" for name in whole))
    return _make(_Tree(overrides, origin=origin), base=config)


_OVERRIDDEN = ("capture", "listen", "routing", "upstream", "policy")


def _drop_ins(directory: Path) -> list[Path]:
    """Its *.toml in byte order; as with a shell's asterisk, not those with a dot in front (an editor's locks)."""
    try:
        # Not Path.glob: it passes over a directory that it must not read, and the daemon would run on half a config.
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ConfigError(f"{printable(str(directory))}: {_unreadable(error)}") from None
    names = [name for name in names if name.endswith(".toml") and not name.startswith(".")]
    return [directory / name for name in sorted(names, key=os.fsencode)]


def _read(path: Path) -> dict[str, Any]:
    def refuse(cause: str) -> ConfigError:
        return ConfigError(f"{printable(str(path))}: {cause}")

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
    except (OSError, ValueError) as error:
        raise refuse(_unreadable(error)) from None
    if len(data) > _LARGEST:
        raise refuse(f"is larger than {_LARGEST // 1024 // 1024} MiB; is this the right file?")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise refuse(f"is not UTF-8 (byte {error.start}, line {line}); save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise refuse(f"is not TOML: {printable(str(error)[:200])}; mend that place") from None
    except RecursionError:
        raise refuse("is not usable TOML: nested too deeply; simplify it") from None
    except ValueError:  # of int() alone, and its words are for a Python programmer
        raise refuse("is not usable TOML: it has a number of thousands of digits; shorten it") from None


def _unreadable(error: OSError | ValueError) -> str:
    if isinstance(error, PermissionError):
        return "cannot be read by this user; run as its owner or change its mode"
    # A ValueError means a NUL in the name; Python's words for it change with its version.
    cause = error.strerror if isinstance(error, OSError) else "no file's name has a NUL character"
    return f"cannot be read: {cause}; name another with -c"


class _Tree:
    """Tables of one origin, or of several files merged, and where each key was written."""

    def __init__(self, tables: Mapping[Any, Any] | None = None, *, origin: str) -> None:
        self.tables: dict[Any, Any] = dict(tables or {})
        self._origin = origin
        self._origins: dict[_Keys, str] = {}
        self._offsets: dict[_Keys, int] = {}

    def merge(self, new: Mapping[str, Any], *, origin: str) -> None:
        """Tables merge by key, lists replace, rules are added. What is no table where one belongs stays, so that it is told."""
        for name, content in new.items():
            before = self.tables.get(name, {})
            if not isinstance(before, dict):
                continue
            self._origins[name,] = origin
            if not isinstance(content, dict):
                self.tables[name] = content
                continue
            added = {
                key: self._append((name, key), before.get(key, []), value, origin)
                for key, value in content.items()
                if (name, key) in _APPENDED
            }
            self.tables[name] = before | content | added
            self._origins.update({(name, key): origin for key in content if key not in added})

    def _append(self, place: _Keys, before: Any, new: Any, origin: str) -> Any:
        if not isinstance(before, list):
            return before
        self._origins[place] = origin
        if not isinstance(new, list):
            return new
        for index in range(len(before), len(before) + len(new)):
            self._origins[*place, index] = origin
            self._offsets[*place, index] = len(before)
        return before + new

    def path(self, array: _Keys, index: int) -> str:
        """A table of an array as it is counted in its own file."""
        return f"{'.'.join(array)}[{index - self._offsets.get((*array, index), 0)}]"

    def origin(self, places: Sequence[_Keys]) -> str:
        """The printable name of where the last of these was written; a default was written nowhere."""
        written = [self._origins[keys] for keys in places if keys in self._origins]
        return printable(written[-1] if written else self._origin)


def _make(
    tree: _Tree, *, added: tuple[PortRange, ...] = (), unread: Sequence[str] = (), base: Config | None = None
) -> Config:
    base = base or Config()
    problems = list(unread)
    bad: set[_Keys] = set()

    def say(sentence: str, *places: _Keys) -> None:
        problems.append(f"{tree.origin(places)}: {sentence}")
        bad.update(place[:2] for place in places)  # a bad rule is missing among the others

    def good(places: Sequence[_Keys]) -> bool:
        return not unread and not any(keys in bad or keys[:1] in bad for keys in places)

    tables: dict[str, Any] = {}
    kinds = keys_of(Config)
    for name, content in tree.tables.items():
        if name in LATER and LATER[name] is None:
            say(f"`{name}` is not in this version of tproxyd; remove it", (name,))
        elif name not in kinds:
            say(_unknown(name), (name,))
        elif not isinstance(content, Mapping):
            say(f"`{name}` is {toml_kind(content)}; it is a table: write [{name}] on a line of its own", (name,))
        else:
            fields = _read_keys(tree, (name,), name, kinds[name], content, say)
            tables[name] = msgspec.structs.replace(getattr(base, name), **fields)
    config = msgspec.structs.replace(
        base, **tables
    )  # where a key is bad, its default stands in; nothing below looks at those
    if added and good(_PORTS):
        config = msgspec.structs.replace(config, capture=_with_ports(config.capture, added))
        for sentence in _check_added(config.capture, added):
            say(sentence, ("capture", "exclude_ports"))
    if good((_RULES, _LISTEN_PORT, _MODE)):
        for index, sentence in _check_targets(config):
            say(f"`{tree.path(_RULES, index)}.action.forward` {sentence}", (*_RULES, index))
    # All chosen before the first has found something: a key of two checks would hide the other's problem.
    for places, check in [one for one in _TOGETHER if good(one[0])]:
        for sentence in check(*(getattr(getattr(config, table), key) for table, key in places)):
            say(sentence, *places)
    if problems:
        raise ConfigError(*problems)
    return config


def _read_keys(
    tree: _Tree, place: _Keys, path: str, kind: type[msgspec.Struct], content: Mapping[Any, Any], say: _Say
) -> dict[str, Any]:
    """The good values of a table, or of one table of an array. `path` is how its place is told."""
    readers = keys_of(kind)
    table = ".".join(place[:2])
    named = content.get("name") if len(place) > 1 else None
    fields: dict[str, Any] = {}
    for key, value in content.items():
        where = place if len(place) > 1 else (*place, key)
        of = f" (rule {shown(named)})" if isinstance(named, str) and key != "name" else ""
        if key in (LATER.get(table) or ()):
            say(f"`{path}.{key}`{of} is not in this version of tproxyd; remove it", where)
        elif key not in readers:
            say(_unknown(key, table=path, kind=kind, of=of), where)
        elif isinstance(readers[key], type):
            fields[key] = _make_tables(tree, where, readers[key], value, say)
        else:
            try:
                fields[key] = readers[key](value)
            except InvalidError as invalid:
                for sentence in invalid.sentences(f"{path}.{key}", value, of=of):
                    say(sentence, where)
    return fields


def _make_tables(
    tree: _Tree, place: _Keys, kind: type[msgspec.Struct], value: Any, say: _Say
) -> tuple[msgspec.Struct, ...]:
    """An array of tables, each with a name of its own."""
    name = ".".join(place)
    if not isinstance(value, list | tuple):
        say(f"`{name}` = {shown(value)} is {toml_kind(value)}; write [[{name}]], in double brackets, above each", place)
        return ()
    if len(value) > MOST_RULES:
        say(
            f"`{name}` has {len(value)} tables, {MOST_RULES} at most; put what has the same action into lists of one",
            place,
        )
        return ()
    made: list[msgspec.Struct] = []
    first: dict[str, int] = {}
    required = [field.name for field in msgspec.structs.fields(kind) if field.required]
    for index, content in enumerate(value):
        where = (*place, index)
        path = tree.path(place, index)
        if not isinstance(content, Mapping):
            say(f"`{path}` = {shown(content)} is {toml_kind(content)}; write [[{name}]] and its keys below", where)
            continue
        fields = _read_keys(tree, where, path, kind, content, say)
        missing = [key for key in required if key not in content]
        if missing:
            of = f" (rule {shown(fields['name'])})" if "name" in fields else ""
            say(f"`{path}`{of} has no {_and(missing)}; write {_and(required)} into every one", where)
        if "name" in fields and first.setdefault(fields["name"], index) != index:
            before = first[fields["name"]]
            file = tree.origin([(*place, before)])
            say(
                f"`{path}.name` = {shown(fields['name'])} is the name of `{tree.path(place, before)}`"
                f"{f' in {file}' if file != tree.origin([where]) else ''}, too; give each its own, for the access log",
                where,
            )
        if all(key in fields for key in required):
            made.append(kind(**fields))
    return tuple(made)


def _check_targets(config: Config) -> Iterator[tuple[int, str]]:
    for index, rule in enumerate(config.policy.rule):
        if _is_listener(rule.action, config.listen.port, config.capture.mode):
            yield index, f"(rule {shown(rule.name)}) = {shown(str(rule.action))} {_CALLS_ITSELF}"


_CALLS_ITSELF = "is tproxyd's own listener (`listen.port`), which would call itself; name another"


def _is_listener(target: object, port: int, mode: str) -> bool:
    # In redirect mode it is on every address. Which those of this host are is not known here, but for loopback.
    if not isinstance(target, Endpoint) or target.port != port:
        return False
    return target.host in ("127.0.0.1", "::1") or (mode == "redirect" and ip_address(target.host).is_loopback)


def _check_target(target: object, port: int, mode: str) -> Iterator[str]:
    if _is_listener(target, port, mode):
        yield f"`upstream.target` = {shown(str(target))} {_CALLS_ITSELF}"


def _check_loopback(
    target: object, port: int, mode: str, ports: tuple[PortRange, ...], exclude_ports: tuple[PortRange, ...]
) -> Iterator[str]:
    # Beside other ports, that of the listener may be within a range or "all"; such a connection is refused when it comes.
    if target != "loopback" or mode == "off":
        return
    if Capture(ports=ports, exclude_ports=exclude_ports).taken_ports == [(port, port)]:
        yield (
            f'`upstream.target` = "loopback" and `capture.ports`, which has {port} alone, lead every connection to tproxyd\'s own '
            "listener (`listen.port`), which would call itself; choose another listen.port"
        )


def _check_source(source: str | Sequence[str], target: object, mode: str) -> Iterator[str]:
    if isinstance(target, UnixPath) and (source == "client" or not isinstance(source, str)):
        yield (
            f"`upstream.source` = {shown(source)} does not go with `upstream.target` = {shown(str(target))}: a Unix socket has no "
            'source address; use "auto", and upstream.proxy_protocol = "v2" to tell the app who its client is'
        )
    elif source == "client" and mode == "redirect":
        yield (
            '`upstream.source` = "client" is impossible with `capture.mode` = "redirect": the answers to the client\'s address would '
            'not come back here; use "auto", or mode = "tproxy"'
        )


def _check_marks(mark: Mark | str, upstream_mark: Mark | str) -> Iterator[str]:
    if not (isinstance(mark, Mark) and isinstance(upstream_mark, Mark)):
        return
    if mark == upstream_mark:
        yield (
            f"`routing.upstream_mark` = {upstream_mark} equals `routing.mark`; they tell packets apart: make them differ"
        )
    elif not mark.fits(upstream_mark):
        yield (
            f"`routing.upstream_mark` = {upstream_mark} overlaps the mask of `routing.mark` = {mark}, so setting one would "
            "change the other; use two values of one mask, or masks without a common bit"
        )


def _check_ports(mode: str, ports: Sequence[PortRange], exclude_ports: Sequence[PortRange]) -> Iterator[str]:
    if mode != "off" and ports and _all_in(ports, exclude_ports):
        yield (
            f"{_excluded(exclude_ports)} excludes every port of `capture.ports`: nothing would be captured; "
            "set exclude_ports to those that you mean, or to []"
        )


def _check_interfaces(interfaces: Sequence[str], exclude_interfaces: Sequence[str]) -> Iterator[str]:
    # An exclusion inside an included wildcard takes something away from it; the other way round nothing is left.
    excluded = dict.fromkeys(exclude_interfaces)
    for name in interfaces:
        wildcard = wildcard_over(name, excluded)
        if name in excluded:
            yield f"`capture.exclude_interfaces` has {shown(name)}, which is in `capture.interfaces` too; remove it from one"
        elif wildcard is not None:
            yield (
                f"`capture.exclude_interfaces` has {shown(wildcard)}, which takes in {shown(name)} of `capture.interfaces`: "
                "nothing would be captured there; narrow the one or remove the other"
            )


def _check_metrics(metrics: Endpoint | None, port: int, mode: str) -> Iterator[str]:
    # A port of every address or of a loopback address would be bound twice: by the listeners, too; and by those of redirect mode any.
    taken = ("127.0.0.1", "::1", "0.0.0.0", "::")  # noqa: S104  # compared with, not bound to
    if metrics is not None and metrics.port == port and (mode == "redirect" or metrics.host in taken):
        yield f"`admin.metrics` = {shown(str(metrics))} has the port of `listen.port`, where clients arrive; choose another"


_LISTEN_PORT = ("listen", "port")
_MODE = ("capture", "mode")
_RULES = ("policy", "rule")
_SOURCE = ("upstream", "source")
_TARGET = ("upstream", "target")
_PORTS = (_MODE, ("capture", "ports"), ("capture", "exclude_ports"))


def _check_shares(workers: int | str, most: int | str) -> Iterator[str]:
    if isinstance(workers, int) and isinstance(most, int) and most < workers:
        yield (
            f"`limits.max_connections` = {most} is less than one for each of `relay.workers` = {workers}; raise the one or lower "
            "the other"
        )


_TOGETHER: tuple[tuple[Sequence[tuple[str, str]], Callable[..., Iterator[str]]], ...] = (
    ((("routing", "mark"), ("routing", "upstream_mark")), _check_marks),
    (_PORTS, _check_ports),
    ((("admin", "metrics"), _LISTEN_PORT, _MODE), _check_metrics),
    ((_TARGET, _LISTEN_PORT, _MODE), _check_target),
    ((_TARGET, _LISTEN_PORT, *_PORTS), _check_loopback),
    ((_SOURCE, _TARGET, _MODE), _check_source),
    ((("relay", "workers"), ("limits", "max_connections")), _check_shares),
    ((("capture", "interfaces"), ("capture", "exclude_interfaces")), _check_interfaces),
)
"""What must fit together: keys, and what finds the problems of their values."""


def _all_in(some: Sequence[PortRange], others: Sequence[PortRange]) -> bool:
    numbers = {port for one in others for port in range(one.first, one.last + 1)}
    return all(numbers.issuperset(range(one.first, one.last + 1)) for one in some)


def _excluded(ports: Sequence[PortRange]) -> str:
    """The key and its value, and that it is the default: who wrote none does not know of it."""
    default = " (the default)" if ports == Capture().exclude_ports else ""
    return f"`capture.exclude_ports` = {shown('all' if ports == ALL_PORTS else [str(one) for one in ports])}{default}"


def _unknown(key: Any, *, table: str = "", kind: type[msgspec.Struct] = Config, of: str = "") -> str:
    """`kind` is that of the table `table`. At the top level and in its tables the key of another table may be meant, too."""
    import difflib  # only for a message; costs a few milliseconds

    def nearest(word: str, words: Mapping[str, str], cutoff: float) -> str | None:
        return next((words[match] for match in difflib.get_close_matches(word, words, 1, cutoff)), None)

    key = key if isinstance(key, str) else shown(key)
    name, key = short(f"{table}.{key}" if table else key), short(key)
    whole = kind in (Config, *keys_of(Config).values())
    if whole:
        known = list(keys_of(Config))
        known += [f"{outer}.{inner}" for outer, keys in keys_of(Config).items() for inner in keys_of(keys)]
    else:
        known = [f"{table}.{inner}" for inner in keys_of(kind)]
    by_name = {one: one for one in known if whole}  # all names of one rule begin alike, which is no likeness
    by_key = {one.rpartition(".")[2]: one for one in reversed(known)}  # of two tables with such a key, the first
    # The nearest full name, then the nearest key of another table, as `ports` at the top level; then with less likeness.
    near = nearest(name, by_name, 0.75) or nearest(key, by_key, 0.75) or nearest(name, by_name, 0.5)
    near = near or nearest(key, by_key, 0.6)
    return f"`{name}`{of} is not a key of the configuration; " + (f"did you mean `{near}`?" if near else "remove it")


def _and(keys: Sequence[str]) -> str:
    return " and ".join(f"`{key}`" for key in keys)


def _read_ports(values: Sequence[str]) -> tuple[PortRange, ...]:
    try:
        return read_ports(list(values))
    except InvalidError as invalid:
        problems = [f"--port {short(values[index])} {cause}" for index, cause in invalid.items.items()]
        raise UsageError("\n".join(problems)) from None


def _with_ports(capture: Capture, added: tuple[PortRange, ...]) -> Capture:
    both = (*capture.ports, *added)
    try:
        read_ports([str(one) for one in both])
    except InvalidError as invalid:
        index, cause = next(iter(invalid.items.items()))
        raise UsageError(f"--port and `capture.ports` together: {both[index]} {cause}") from None
    return msgspec.structs.replace(capture, ports=both)


def _check_added(capture: Capture, added: Sequence[PortRange]) -> Iterator[str]:
    # In a list of a file an excluded port among others may be meant: another file excludes it on this host. Nobody types
    # one on the command line for that.
    for one in added:
        if capture.mode != "off" and _all_in([one], capture.exclude_ports):
            yield (
                f"--port {one} would capture nothing, because of {_excluded(capture.exclude_ports)}; "
                "leave it out, or name with -c a file whose [capture] says exclude_ports = []"
            )
