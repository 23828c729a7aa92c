"""The command `tproxyd`: reads the command line, imports what the verb needs, turns errors into sentences and exit codes.

`check`, `plan` and `--help` import neither trio nor pyroute2; they answer in a fraction of the time that those take to load.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tproxyd.errors import ConfigError, MissingError, TproxydError, UsageError

if TYPE_CHECKING:
    from tproxyd.config import Config

__all__ = ["entry", "main"]

_DAY = 24 * 3600


def entry() -> NoReturn:
    """Runs `main` on the command line and ends the process with its code."""
    _open_standard_files()
    sys.exit(main(sys.argv[1:]))


def _open_standard_files() -> None:
    """Puts /dev/null where the caller has closed stdin, stdout or stderr (`>&-`): the next file opened would take that place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # The lowest free number: in this order, the very one that is missing.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def main(arguments: Sequence[str]) -> int:
    """Runs one command and gives its exit code (sysexits.h). Errors are one sentence each on stderr, never a traceback."""
    try:
        try:
            return _dispatch(_parse(arguments))
        finally:
            sys.stdout.flush()  # here, where what goes wrong with it can be told
    except TproxydError as error:
        for sentence in error.problems if isinstance(error, ConfigError) else [str(error)]:
            _complain(sentence)
        if "TPROXYD_HANDOVER" in os.environ:  # a daemon has started this one to take its place, and waits
            from tproxyd.daemon.handover import tell_refusal  # late: it brings trio

            tell_refusal(error)
        return error.exit_code
    except BrokenPipeError:
        _forget_output()  # its reader left (`tproxyd plan | head`), which is fine
        return os.EX_OK
    except OSError as error:
        _forget_output()
        _print(f"tproxyd: {error.strerror or error}; is there room for the output, and for a process?", logging.ERROR)
        return os.EX_IOERR
    except Exception as error:  # a mistake of tproxyd's; a traceback is for who looks for it
        _complain(f"this is a bug, please report it: {type(error).__name__}: {error}")
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            raise
        return os.EX_SOFTWARE


def _complain(sentence: str) -> None:
    """On one line: there may be names in it that others have chosen."""
    from tproxyd.config.wording import printable  # late: it brings msgspec

    _print(f"tproxyd: {printable(sentence)}", logging.ERROR)


def _print(text: str, level: int) -> None:
    from tproxyd.daemon.journal import is_journal, with_priority

    print(with_priority(text, level) if is_journal(2) else text, file=sys.stderr)


def _forget_output() -> None:
    """Keeps Python from trying to write the rest of the output at its end, and from complaining that it cannot."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


class _Version(argparse.Action):
    def __call__(self, *_: object) -> NoReturn:
        from tproxyd import __version__
        from tproxyd.kernel import nft_version

        print(
            f"tproxyd {__version__}, Linux {platform.release()}, {nft_version() or 'no nft'}, Python {platform.python_version()}"
        )
        sys.exit(os.EX_OK)


def _warn_of_forwarding(config: Config) -> None:
    """On a host that forwards, the outbound connections of its containers and virtual machines are forwarded ones, too."""
    from tproxyd.kernel import is_forwarding

    if config.captures and not config.capture.destinations and is_forwarding():
        _print(
            "tproxyd: warning: forwarding is on in this network namespace and capture.destinations is empty: what its containers or "
            'virtual machines connect to is captured, too; destinations = ["local"] limits capture to this host\'s own addresses',
            logging.WARNING,
        )


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tproxyd",
        description="Takes inbound TCP connections away from their destination with nft TPROXY, without conntrack.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="versions of tproxyd, kernel, nft and Python")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def add(name: str, what: str, *, config: bool = True, ports: bool = True) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".", allow_abbrev=False)
        if config:
            verb.add_argument(
                "-c",
                "--config",
                type=Path,
                metavar="FILE",
                help="read this file alone (default: /etc/tproxyd/tproxyd.toml, then conf.d/*.toml beside it)",
            )
        if config and ports:
            verb.add_argument(
                "--port",
                action="append",
                default=[],
                metavar="N[-M]",
                help="capture this port or range (without -c: no file is read)",
            )
        return verb

    add("run", "intercept connections until SIGTERM")
    add("check", "validate the configuration; needs no root")
    plan = add("plan", "print everything that would be applied; needs no root")
    plan.add_argument(
        "--format", choices=("text", "nft", "shell", "json"), help="for whom it is printed (default: text)"
    )
    plan.add_argument(
        "--diff",
        action="store_true",
        help="print instead in what the kernel differs; exit code 3 when it does; needs CAP_NET_ADMIN",
    )
    plan.add_argument(
        "--against",
        type=Path,
        metavar="FILE",
        help="with --diff: compare with the plan of this configuration instead of the kernel; needs no root",
    )
    apply = add("apply", "put the kernel state there for any transparent listener on the port")
    apply.add_argument(
        "--confirm",
        type=_seconds,
        metavar="SECONDS",
        help="take it back unless `yes` is typed, or `tproxyd confirm` elsewhere, within so many seconds",
    )
    add("confirm", "confirm the change of an `apply --confirm` that waits", config=False)
    status = add("status", "compare what is planned with what the kernel holds; say who serves, and what lives")
    status.add_argument("--json", action="store_true", help="print it as JSON, for programs")
    revert = add("revert", "remove all kernel state that is tproxyd's, and nothing else", config=False)
    revert.add_argument(
        "--name",
        metavar="NAME",
        help="that of an embedding program that gave its tables this name and has died (default: tproxyd)",
    )
    revert.add_argument(
        "--after-exit",
        action="store_true",
        help='for ExecStopPost=: after a crash keep what refuses (when_down = "refuse"); nothing where a successor starts',
    )
    add("handover", "start a new generation of the daemon beside it, which takes its place", config=False)
    explain = add("explain", "say which rules decide about a connection, and what happens")
    explain.add_argument("source", metavar="SRC[:PORT]", help="the client; IPv6 with a port: [2001:db8::1]:40000")
    explain.add_argument("destination", metavar="DST:PORT", help="where it wants to go; IPv6: [2001:db8::7]:80")
    explain.add_argument("--proto", choices=("tcp", "udp"), default="tcp", help="the protocol (default: tcp)")
    explain.add_argument(
        "--in", dest="interface", metavar="IFACE", help="where it arrives (default: where the way back to SRC leaves)"
    )
    explain.add_argument("--json", action="store_true", help="print it as JSON, for programs")
    doctor = add("doctor", "look for every known cause of silent failure, and name its remedy")
    doctor.add_argument("--no-probe", action="store_true", help="make no live connection from a throwaway namespace")
    doctor.add_argument("--json", action="store_true", help="print it as JSON, for programs")
    connections = add("connections", "list living connections of the running daemon, or end one", ports=False)
    connections.add_argument("--workload", metavar="NAME", help="only those of this workload")
    connections.add_argument(
        "--source", metavar="ADDR", help="only those of clients there: an address, a network, either with :PORT"
    )
    connections.add_argument(
        "--destination", metavar="ADDR", help="only those that were dialled to there; :80 is a port"
    )
    connections.add_argument("--limit", type=_count, metavar="N", help="list so many at most")
    connections.add_argument("--close", metavar="ID", help="reset the connection of this id, on both sides")
    connections.add_argument("--json", action="store_true", help="print it as JSON, for programs")
    top = add("top", "show live connections and rates of the running daemon on a screen", ports=False)
    top.add_argument("--once", action="store_true", help="print it once and end, as where the output is no terminal")
    add("reload", "have the running daemon read its configuration again", ports=False)
    add("drain", "have the running daemon take no new connections, and end with the last one", ports=False)
    return parser


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of connections from 1 on")
    return int(text)


def _seconds(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= _DAY:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of seconds from 1 to {_DAY}")
    return int(text)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    options = _make_parser().parse_args(arguments)
    if options.verb == "connections" and options.close is not None:
        filters = [
            name for name in ("workload", "source", "destination", "limit") if getattr(options, name) is not None
        ]
        if filters or options.json:
            raise UsageError(f"--close ends one connection and prints no list; leave --{(filters or ['json'])[0]} out")
    if options.verb == "plan" and options.format and (options.diff or options.against):
        raise UsageError("--diff and --against print text that no --format changes; leave --format out")
    if options.verb == "revert" and options.after_exit and options.name is not None:
        raise UsageError("--after-exit is about a daemon's state, which has no name of its own; leave --name out")
    return options


def _dispatch(options: argparse.Namespace) -> int:
    if options.verb == "confirm":
        from tproxyd.daemon import confirm

        return confirm.confirm()
    if options.verb == "handover":
        from tproxyd.daemon import handover

        return handover.handover()
    if options.verb == "revert":
        if options.after_exit:
            from tproxyd.daemon import successor

            if successor.is_expected():
                print("nothing removed: a successor takes it over")
                return os.EX_OK
        from tproxyd.daemon import apply_revert

        if options.after_exit:
            return apply_revert.revert_after_exit(clean=successor.ended_well())
        return apply_revert.revert() if options.name is None else apply_revert.revert(options.name)

    if options.verb in ("connections", "reload", "drain", "top"):
        return _ask_daemon(options)

    from tproxyd.config import load_config

    if options.verb == "status":
        from tproxyd.daemon.status import status

        # Without a file named, what the daemon plans: what the usual file would plan may be another thing.
        named = options.config is not None or options.port
        config = load_config(options.config, ports=options.port) if named else None
        return status(config, options.config or Path("the command line"), as_json=options.json)
    config = load_config(options.config, ports=options.port)
    match options.verb:
        case "check":
            from tproxyd.plan import make_plan

            make_plan(config)  # whether the marks fit together is found out there
            _warn_of_forwarding(config)
            print("the configuration is good" if config.captures else "the configuration is good, but captures nothing")
        case "plan":
            from tproxyd.daemon import comparison
            from tproxyd.plan import make_plan, render

            if options.against is not None:
                return comparison.diff_against(config, load_config(options.against), options.against)
            if options.diff:
                return comparison.diff_kernel(config)
            plan = make_plan(config, surroundings=comparison.surroundings_here(config))
            sys.stdout.write(render(plan, options.format or "text"))
        case "apply":
            from tproxyd.daemon import apply_revert

            return apply_revert.apply(config, seconds=options.confirm)
        case "explain":
            from tproxyd.daemon import explain

            request = explain.read_request(
                options.source, options.destination, protocol=options.proto, interface=options.interface
            )
            return explain.show(config, request, as_json=options.json)
        case "doctor":
            from tproxyd.daemon import doctor

            file = str(options.config) if options.config is not None else None
            return doctor.doctor(config, file, probing=not options.no_probe, as_json=options.json)
        case "run":
            from tproxyd.daemon import run

            from_files = options.config is not None or not options.port
            load = partial(load_config, options.config, ports=options.port) if from_files else None
            return run.run(config, load)
    return os.EX_OK


def _ask_daemon(options: argparse.Namespace) -> int:
    if options.verb == "top":
        return _show_top(options)
    from tproxyd.daemon import client

    match options.verb:
        case "reload":
            return client.reload(options.config)
        case "drain":
            return client.drain(options.config)
    if options.close is not None:
        return client.close_connection(options.config, options.close)
    return client.list_connections(
        options.config,
        workload=options.workload,
        source=options.source,
        destination=options.destination,
        limit=options.limit,
        as_json=options.json,
    )


def _show_top(options: argparse.Namespace) -> int:
    try:
        from tproxyd.daemon.top import top
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        raise MissingError(
            "`tproxyd top` needs the Python package rich, which is not there; install it (Debian: apt-get install python3-rich; pip: tproxyd[top]), "
            "or use `tproxyd connections` and `tproxyd status`"
        ) from error
    return top(options.config, once=options.once)
