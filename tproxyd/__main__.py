"""The command `tproxyd`, and `python -m tproxyd`, which is the same."""

import signal
from typing import NoReturn

__all__ = ["entry"]


def entry() -> NoReturn:
    """The console script. Ctrl-C ends the process at once, until a verb that has something to put right takes it over: as an exception
    it could come in the middle of an import, and leave half a module behind."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from tproxyd.daemon.cli import entry  # late: what it loads takes most of the time

    entry()


if __name__ == "__main__":
    entry()
