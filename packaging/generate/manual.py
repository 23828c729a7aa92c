"""tproxyd(8) and tproxyd.toml(5): the hand-written text of packaging/man, with what the program knows better put in.

A line `@NAME@` of a template is replaced by what `_PARTS` makes for it. The pages are plain man(7), for groff and mandoc alike.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

from generate.command import Argument, Command, read_command
from generate.spelling import tables
from tproxyd import __version__

__all__ = ["PAGES", "page"]

_TEMPLATES = Path(__file__).parents[1] / "man"
PAGES = ("tproxyd.8", "tproxyd.toml.5")
_WIDTH = 78  # of a source line; mandoc remarks on longer ones than 80


def page(name: str, day: date) -> str:
    """A manual page, ready to be installed. `day` stands in its foot."""
    lines: list[str] = []
    for line in (_TEMPLATES / name).read_text(encoding="utf-8").splitlines():
        part = re.fullmatch("@([A-Z]+)@", line)
        lines += _PARTS[part[1]]() if part else [line.replace("@VERSION@", __version__).replace("@DATE@", f"{day}")]
    return "\n".join(lines) + "\n"


def _text(text: str) -> list[str]:
    """Running text: wrapped, and nothing in it is a request. What stands between backticks is bold."""
    # Wrapped before it is escaped: a font change may have a space in it, an escape never.
    return [
        _escape(line)
        for line in _balanced(textwrap.wrap(text, _WIDTH - 8, break_long_words=False, break_on_hyphens=False))
    ]


def _balanced(lines: list[str]) -> Iterator[str]:
    """Lines in which what is bold ends: one that is cut in the middle goes on in the next."""
    is_open = False
    for line in lines:
        line = f"`{line}" if is_open else line
        is_open = line.count("`") % 2 == 1
        yield f"{line}`" if is_open else line


def _escape(text: str) -> str:
    text = (
        text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq").replace("^", r"\(ha").replace("~", r"\(ti")
    )
    text = re.sub("`([^`]*)`", r"\\fB\1\\fR", text)
    return rf"\&{text}" if text.startswith(".") else text


def _named(argument: Argument) -> str:
    """An option as it is typed: names bold, its value in italics."""
    names = ", ".join(rf"\fB{_escape(name)}\fR" for name in argument.names)
    value = rf"\fI{_escape(argument.value)}\fR" if argument.value is not None else ""
    return " ".join(part for part in (names, value) if part)


def _usage(verb: Command) -> str:
    parts = [r"\fBtproxyd\fR", rf"\fB{verb.name}\fR"]
    for argument in verb.arguments:
        if argument.names and "--help" not in argument.names:
            shortest = argument._replace(names=argument.names[:1])
            whole = _named(shortest).replace(" ", r"\~")  # on one line
            parts.append(f"[{whole}]{'...' if argument.is_repeated else ''}")
        elif not argument.names:
            parts.append(_named(argument))
    return " ".join(parts)


def _synopsis() -> list[str]:
    lines: list[str] = []
    for verb in read_command().verbs:
        lines += [".ti -8n", *_folded(_usage(verb))]
    return [".in +8n", *lines, ".ti -8n", r"\fBtproxyd\fR {\fB\-\-version\fR | \fB\-\-help\fR}", ".in"]


def _folded(line: str) -> list[str]:
    return textwrap.wrap(line, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _shared() -> list[Argument]:
    """The options that some commands take alike; they are explained once."""
    verbs = read_command().verbs
    options = dict.fromkeys(option for verb in verbs for option in verb.options if "--help" not in option.names)
    return [option for option in options if sum(option in verb.options for verb in verbs) > 2]


def _options() -> list[str]:
    return [line for option in _shared() for line in _explained(option)]


def _commands() -> list[str]:
    lines: list[str] = []
    for verb in read_command().verbs:
        lines += [f".SS {verb.name}", *_text(_sentence(verb.what))]
        for argument in verb.arguments:
            if "--help" not in argument.names and argument not in _shared():
                lines += _explained(argument)
    return lines


def _explained(argument: Argument) -> list[str]:
    return [".TP", _named(argument), *_text(_sentence(argument.what))]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _keys() -> list[str]:
    lines: list[str] = []
    for table in tables():
        name = f"[[{table.name}]]" if table.is_array else f"[{table.name}]"
        lines += [f".SS {name}", *_text(table.doc)]
        for key in table.keys:
            default = "must be given" if key.default is None else f"default: {key.default}"
            lines += [".TP", rf"\fB{_escape(key.name)}\fR", *_text(key.doc), *_text(f"May be {key.kind}; {default}.")]
    return lines


_PARTS: dict[str, Callable[[], list[str]]] = {
    "SYNOPSIS": _synopsis,
    "OPTIONS": _options,
    "COMMANDS": _commands,
    "KEYS": _keys,
}
