"""Local ports of connections whose port is chosen here and not by the kernel: which may be taken."""

from __future__ import annotations

from pathlib import Path
from random import Random

__all__ = ["PortChoice", "read_port_choice"]

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")  # IPv6 has no range of its own
_RESERVED = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")


class PortChoice:
    """Gives ports of a range at random, but for the reserved ones.

    Linux takes ports of the first one's parity for connect() as long as there are any (net/ipv4/inet_hashtables.c,
    __inet_hash_connect), so with the usual ranges clients have even ones. `other` gives those of the other parity, which they leave alone.
    """

    def __init__(self, first: int, last: int, reserved: frozenset[int] = frozenset()) -> None:
        self._first, self._count, self._others = first, last - first + 1, (last - first + 1) // 2
        self._reserved = reserved
        self._random = Random().random  # noqa: S311  # no secret: a client may know its own connection's port

    def any(self) -> int:
        """One of the range."""
        for _ in range(64):
            port = self._first + int(self._random() * self._count)
            if port not in self._reserved:
                break
        return port

    def other(self) -> int:
        """One of the parity that connect() does not begin with."""
        if not self._others:
            return self.any()
        for _ in range(64):
            port = self._first + 1 + 2 * int(self._random() * self._others)
            if port not in self._reserved:
                break
        return port


def read_port_choice(*without: int) -> PortChoice:
    """That of the calling thread's network namespace, `without` these ports. Raises OSError."""
    first, last = map(int, _RANGE.read_text(encoding="ascii").split())
    reserved = set(without)
    for part in _RESERVED.read_text(encoding="ascii").strip().split(","):
        if part:
            begin, _, end = part.partition("-")
            reserved.update(range(int(begin), int(end or begin) + 1))
    return PortChoice(first, last, frozenset(reserved))
