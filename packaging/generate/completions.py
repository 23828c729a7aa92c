"""Completions for bash, zsh and fish. They are tables made once, so a Tab starts no Python."""

from __future__ import annotations

from collections.abc import Callable

from generate.command import Argument, Command, read_command

__all__ = ["SHELLS", "completion"]

_INTERFACES = "IFACE"  # what an option calls its value where that is a network interface


def completion(shell: str) -> str:
    """The whole file for one of SHELLS."""
    return SHELLS[shell][1](read_command())


def _bash(command: Command) -> str:
    # Without the functions of bash-completion, so that it works where the file is sourced by hand, too.
    lines = [
        "# Completion of tproxyd for bash; made from its command line.",
        "_tproxyd() {",
        "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} verb= word",
        "    # --option=VALUE comes as three words.",
        "    [[ $prev == = ]] && prev=${COMP_WORDS[COMP_CWORD-2]}",
        "    [[ $cur == = ]] && cur=",
        '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
        "        [[ $word == -* ]] || { verb=$word; break; }",
        "    done",
        "    COMPREPLY=()",
        "    case $verb in",
        *_bash_verb('""', command, [verb.name for verb in command.verbs]),
    ]
    for verb in command.verbs:
        lines += _bash_verb(verb.name, verb, [])
    return "\n".join([*lines, "    esac", "}", "complete -F _tproxyd tproxyd", ""])


def _bash_verb(pattern: str, command: Command, words: list[str]) -> list[str]:
    lines = [f"        {pattern})", "            case $prev in"]
    for option in command.options:
        if option.value is not None:
            lines.append(f"                {'|'.join(option.names)}) {_bash_value(option)}return ;;")
    names = " ".join([*words, *(name for option in command.options for name in option.names)])
    if len(lines) == 2:
        lines.pop()
    else:
        lines.append("            esac")
    return [*lines, f"            COMPREPLY=($(compgen -W '{names}' -- \"$cur\")) ;;"]


def _bash_value(option: Argument) -> str:
    if option.is_file:
        return 'compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -f -- "$cur")); '
    if option.choices:
        return f"COMPREPLY=($(compgen -W '{' '.join(option.choices)}' -- \"$cur\")); "
    if option.value == _INTERFACES:
        return 'COMPREPLY=($(cd /sys/class/net && compgen -f -- "$cur")); '
    return ""


def _zsh(command: Command) -> str:
    verbs = [f"                {_zsh_quoted(f'{verb.name}:{verb.what}')}" for verb in command.verbs]
    lines = [
        "#compdef tproxyd",
        "# Completion of tproxyd for zsh; made from its command line.",
        "_tproxyd() {",
        "    local context state state_descr line",
        "    typeset -A opt_args",
        "    _arguments -C \\",
        *(f"        {_zsh_option(option)} \\" for option in command.options),
        "        '1:command:->verb' '*::argument:->rest'",
        "    case $state in",
        "        verb)",
        "            local -a verbs=(",
        *verbs,
        "            )",
        "            _describe command verbs ;;",
        "        rest)",
        "            case $words[1] in",
    ]
    for verb in command.verbs:
        specs = [_zsh_option(option) for option in verb.options]
        specs += [_zsh_quoted(f":{_zsh_escaped(place.value or '')}:{_zsh_value(place)}") for place in verb.places]
        body = " \\\n".join(f"                        {spec}" for spec in specs)
        lines += [f"                {verb.name})", f"                    _arguments \\\n{body} ;;"]
    return "\n".join([*lines, "            esac ;;", "    esac", "}", '_tproxyd "$@"', ""])


def _zsh_option(option: Argument) -> str:
    value = f":{_zsh_escaped(option.value)}:{_zsh_value(option)}" if option.value is not None else ""
    once = f"({' '.join(option.names)})" if len(option.names) > 1 else ""
    before = "*" if option.is_repeated else once
    specs = []
    for name in option.names:
        joined = "=" if value and name.startswith("--") else ""  # --option VALUE and --option=VALUE
        specs.append(_zsh_quoted(f"{before}{name}{joined}[{_zsh_escaped(option.what)}]{value}"))
    return " ".join(specs)


def _zsh_value(option: Argument) -> str:
    if option.is_file:
        return "_files"
    if option.value == _INTERFACES:
        return "_net_interfaces"
    return f"({' '.join(option.choices)})" if option.choices else " "


def _zsh_escaped(text: str) -> str:
    for special in "\\[]:":
        text = text.replace(special, f"\\{special}")
    return text


def _zsh_quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _fish(command: Command) -> str:
    lines = ["# Completion of tproxyd for fish; made from its command line.", "complete -c tproxyd -f"]
    lines += [_fish_option(option, "__fish_use_subcommand") for option in command.options]
    lines += [
        f"complete -c tproxyd -n __fish_use_subcommand -a {verb.name} -d {_fish_quoted(verb.what)}"
        for verb in command.verbs
    ]
    for verb in command.verbs:
        lines += [_fish_option(option, f"__fish_seen_subcommand_from {verb.name}") for option in verb.options]
    return "\n".join([*lines, ""])


def _fish_option(option: Argument, condition: str) -> str:
    parts = ["complete -c tproxyd", f"-n {_fish_quoted(condition)}"]
    parts += [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names]
    if option.is_file:
        parts.append("-rF")
    elif option.choices:
        parts.append(f"-xa {_fish_quoted(' '.join(option.choices))}")
    elif option.value == _INTERFACES:
        parts.append("-xa '(command ls /sys/class/net)'")
    elif option.value is not None:
        parts.append("-x")
    return " ".join([*parts, f"-d {_fish_quoted(option.what)}"])


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS: dict[str, tuple[str, Callable[[Command], str]]] = {
    "bash": ("share/bash-completion/completions/tproxyd", _bash),
    "zsh": ("share/zsh/vendor-completions/_tproxyd", _zsh),
    "fish": ("share/fish/vendor_completions.d/tproxyd.fish", _fish),
}
"""Where each shell looks below a prefix, and what makes the file. zsh looks there on Debian, below /usr alone."""
