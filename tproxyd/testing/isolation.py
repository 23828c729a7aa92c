"""Keeps a test run away from the machine it runs on, and notices what a test leaves behind.

Knows the test process itself: its capabilities, namespace, descriptors, threads and children. Standard library only, for the
pytest plugin loads it; refuses to know pytest and the lab.
"""

from __future__ import annotations

import fcntl
import gc
import os
import socket
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tproxyd.net.namespaces import unshare_network

__all__ = ["LAB_CAPABILITIES", "Holdings", "isolate_this_process"]

LAB_CAPABILITIES = ("CAP_NET_ADMIN", "CAP_SYS_ADMIN")
"""What a lab needs: to make namespaces, and everything in them."""

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1  # linux/sockios.h, linux/if.h
_IFREQ = "16sH22x"

_CACHED_THREADS = ("Trio thread",)
"""trio keeps idle worker threads for ten seconds under this name, to use them again; they are not a test's."""


def isolate_this_process(*, other_threads_are: bool = False) -> None:
    """Moves the process for good into a network namespace that has nothing but loopback.

    Only while it has a single thread, because a namespace belongs to a thread: RuntimeError else. Unless the caller knows
    that its other threads are away from the host's network, as in a child of a process that is.
    """
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1 and not other_threads_are:
        raise RuntimeError(f"the test process has {threads} threads already, so some would stay in the host's network")
    unshare_network()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack(_IFREQ, b"lo", 0))
        flags = struct.unpack(_IFREQ, answer)[1]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack(_IFREQ, b"lo", flags | _IFF_UP))


@dataclass(frozen=True)
class Holdings:
    """What the process holds at one moment."""

    descriptors: frozenset[tuple[int, str]]
    threads: frozenset[threading.Thread]
    children: frozenset[int]

    @classmethod
    def now(cls) -> Holdings:
        return cls(
            frozenset(_descriptors()),
            frozenset(thread for thread in threading.enumerate() if not thread.name.startswith(_CACHED_THREADS)),
            frozenset(_children()),
        )

    def left_since(self, *, seconds: float) -> list[str]:
        """What is held now and was not then, in words. A thread has `seconds` to end; the rest must be gone already."""
        deadline = time.monotonic() + seconds
        now = Holdings.now()
        for thread in now.threads - self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if now != self:
            gc.collect()  # an object in a reference cycle is late, not lost; its ResourceWarning says what it was
            now = Holdings.now()
        return [
            *(f"descriptor {fd} -> {target}" for fd, target in sorted(now.descriptors - self.descriptors)),
            *(f"thread {thread.name}" for thread in sorted(now.threads - self.threads, key=lambda one: one.name)),
            *(f"process {_describe(pid)}" for pid in sorted(now.children - self.children)),
        ]


def _descriptors() -> list[tuple[int, str]]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append((int(name), os.readlink(f"/proc/self/fd/{name}")))
        except FileNotFoundError:
            continue  # the descriptor of this very listing
    return found


def _children() -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                # The command stands in parentheses and may contain any character, so what counts comes after the last one.
                parent = Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()[1]
            except OSError:
                continue
            if int(parent) == os.getpid():
                found.append(int(name))
    return found


def _describe(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        command = "gone now"
    return f"{pid} ({command or 'a zombie: nobody waited for it'})"
