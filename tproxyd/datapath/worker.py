"""A relay process: one loop and nothing else. Started by its owner as a program, with the channel as an inherited descriptor:

    python -I -S worker.py SYS_PATH CHANNEL CAPABILITIES POLICY

SYS_PATH is the owner's, separated by colons: without site-packages being searched a process starts in half the time. Of what the owner may do, it
keeps the CAPABILITIES, separated by commas, as far as they are there. POLICY is the scheduling policy that it takes, empty for the one that it has. It ends with its owner: at once, on the end of the channel. Signals are for the owner, which says here what is to be done about them.
"""

from __future__ import annotations

import os
import signal
import sys

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """Serves until the owner ends it, and exits with 0 then; 70 when the loop failed, after the owner has been told why."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A terminal sends them to the whole group, and systemd to the whole unit.
        signal.signal(number, signal.SIG_IGN)
    if arguments[3]:
        os.sched_setscheduler(0, int(arguments[3]), os.sched_param(0))
    sys.path[:] = arguments[0].split(":")

    import gc
    import socket

    from tproxyd.datapath.loop import serve_loop
    from tproxyd.net.capabilities import keep_capabilities, to_read_code

    keep_capabilities([*filter(None, arguments[2].split(",")), *to_read_code()], pass_on=False)

    # What has been loaded stays, and connections leave nothing to collect: they refer in no circle when they have ended. With Python's
    # own thresholds looking for it took 2 us a connection of 28 (nine interleaved rounds).
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    channel = socket.socket(fileno=int(arguments[1]))
    channel.set_inheritable(False)
    try:
        serve_loop(channel)
    except Exception:  # the owner has been told, with the traceback
        sys.exit(os.EX_SOFTWARE)


if __name__ == "__main__":
    main(sys.argv[1:])
