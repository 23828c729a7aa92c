"""The command line as data, read from the parser that reads it: what manual pages and completions are made from.

argparse has no public way to ask a parser what it takes; what is used of its insides has not changed since Python 2.7.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from tproxyd.daemon.cli import _make_parser

__all__ = ["Argument", "Command", "read_command"]


class Argument(NamedTuple):
    """An option, or with no `names` an argument. `value` is how its value is called, None for a flag; `choices` are all there are."""

    names: tuple[str, ...]
    value: str | None
    choices: tuple[str, ...]
    is_file: bool
    is_repeated: bool
    what: str


class Command(NamedTuple):
    """The program itself, or one of its verbs."""

    name: str
    what: str
    arguments: tuple[Argument, ...]
    verbs: tuple[Command, ...]

    @property
    def options(self) -> tuple[Argument, ...]:
        return tuple(one for one in self.arguments if one.names)

    @property
    def places(self) -> tuple[Argument, ...]:
        """What stands there without a name."""
        return tuple(one for one in self.arguments if not one.names)


def read_command() -> Command:
    """`tproxyd` with everything that this version takes."""
    return _read(_make_parser(), "tproxyd", "")


def _read(parser: argparse.ArgumentParser, name: str, what: str) -> Command:
    verbs: list[Command] = []
    arguments: list[Argument] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            # Hidden verbs have no help; those of `choices` that are aliases have no entry of their own.
            helps = {one.dest: one.help for one in action._choices_actions}
            verbs += [_read(action.choices[verb], verb, text or "") for verb, text in helps.items()]
        elif action.help != argparse.SUPPRESS:
            arguments.append(_argument(parser, action))
    return Command(name, what, tuple(arguments), tuple(verbs))


def _argument(parser: argparse.ArgumentParser, action: argparse.Action) -> Argument:
    choices = tuple(str(one) for one in action.choices or ())
    takes_value = not action.option_strings or action.nargs != 0
    named: Any = action.metavar or ("|".join(choices) if choices else action.dest.upper())
    what = parser._get_formatter()._expand_help(action) if action.help else ""
    return Argument(
        tuple(action.option_strings),
        str(named) if takes_value else None,
        choices,
        action.type is Path,
        isinstance(action, argparse._AppendAction) or action.nargs in ("*", "+"),
        what,
    )
