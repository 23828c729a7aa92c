"""Giving up capabilities, in a process of its own: as root or not, nothing is left."""

from __future__ import annotations

import re
import subprocess
import sys

GIVE_UP = """
import sys, threading
from tproxyd.errors import KernelError
from tproxyd.net.capabilities import keep_capabilities

if sys.argv[1:] == ["thread"]:
    threading.Thread(target=threading.Event().wait, daemon=True).start()
try:
    keep_capabilities([], pass_on=True)
except KernelError as error:
    print(error)
print(open("/proc/self/status").read())
"""


def give_up(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", GIVE_UP, *arguments], capture_output=True, text=True, check=True
    ).stdout


def test_nothing_is_left_when_nothing_is_kept() -> None:
    said = give_up()
    for name in ("Inh", "Prm", "Eff", "Amb"):
        assert re.search(rf"^Cap{name}:\t0+$", said, re.M)
    assert re.search(r"^NoNewPrivs:\t1$", said, re.M)


def test_another_thread_would_keep_what_it_has() -> None:
    assert "another thread runs already" in give_up("thread").splitlines()[0]
