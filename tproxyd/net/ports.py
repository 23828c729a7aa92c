"""Local ports of connections whose port is chosen here and not by the kernel: which may be taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

__all__ = ["PortChoice", "read_port_choice"]

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")  # IPv6 has no range of its own
_RESERVED = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")

_FEW = 64  # of a range that somebody has made small, each can be tried
_random = Random()  # noqa: S311  # no secret: a client may know its own connection's port


@dataclass(frozen=True)
class PortChoice:
    """Gives ports of a range at random, but for the reserved ones.

    Linux takes ports of the first one's parity for connect() as long as there are any (net/ipv4/inet_hashtables.c,
    __inet_hash_connect), so with the usual ranges clients have even ones. `others` gives those of the other parity, which they leave alone.
    """

    first: int
    last: int
    reserved: frozenset[int] = frozenset()

    def any(self, count: int) -> Iterator[int]:
        """So many of the range, or all of them where these are few."""
        return self._some(range(self.first, self.last + 1), count)

    def others(self, count: int) -> Iterator[int]:
        """The same of the parity that connect() does not begin with."""
        return self._some(range(self.first + 1, self.last + 1, 2), count)

    def _some(self, ports: range, count: int) -> Iterator[int]:
        if len(ports) <= _FEW:
            few = [port for port in ports if port not in self.reserved]
            _random.shuffle(few)
            yield from few
            return
        first, step, length, random = ports.start, ports.step, len(ports), _random.random
        for _ in range(count):
            for _ in range(64):
                port = first + step * int(random() * length)
                if port not in self.reserved:
                    yield port
                    break


def read_port_choice(*without: int) -> PortChoice:
    """That of the calling thread's network namespace, `without` these ports. Raises OSError."""
    first, last = map(int, _RANGE.read_text(encoding="ascii").split())
    reserved = set(without)
    for part in _RESERVED.read_text(encoding="ascii").strip().split(","):
        if part:
            begin, _, end = part.partition("-")
            reserved.update(range(int(begin), int(end or begin) + 1))
    return PortChoice(first, last, frozenset(reserved))
