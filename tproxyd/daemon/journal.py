"""What systemd's journal wants of a program whose output goes there: each line of a message begins with its priority, `<4>` (sd-daemon(3)), which the
journal takes off again. So `journalctl -p warning -u tproxyd` shows what it says. Standard library only, and little of it: every verb may complain.

The journal's own protocol would make fields of each connection's record, for five times the CPU of its line of JSON: docs/architecture.md.
"""

from __future__ import annotations

import logging
import os

__all__ = ["is_journal", "with_priority"]

# syslog(3): debug, info, warning, err, crit
_PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}


def is_journal(fd: int) -> bool:
    """Whether this file is the one that systemd has connected to the journal: its device and inode are in $JOURNAL_STREAM. Output that has been
    redirected since is another file."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def with_priority(text: str, level: int) -> str:
    """Text of one or more lines, each of which is an entry of the journal's own."""
    prefix = f"<{_PRIORITIES.get(level, 6)}>"
    return "\n".join(prefix + line for line in text.split("\n"))
