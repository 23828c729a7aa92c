"""What the tests here share: the way that a test's traffic takes (the fixture `way` gives all four), and how times are told."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from tproxyd.testing import Node

__all__ = ["Way", "median_ms"]


class Way:
    """The way of a test's traffic: where the client is, where the daemon runs, where the app lives, and its address.

    `bind` is where the app should listen, `in_url` the address as URLs spell it, `file(text)` writes a configuration file.
    """

    def __init__(
        self, name: str, client: Node, proxy: Node, app: Node, address: str, file: Callable[[str], Path]
    ) -> None:
        self.name, self.client, self.proxy, self.app, self.address, self.file = name, client, proxy, app, address, file
        self.in_url = f"[{address}]" if ":" in address else address
        self.bind = "::" if ":" in address else "0.0.0.0"

    def __str__(self) -> str:
        return self.name


def median_ms(what: str, seconds: Sequence[float]) -> float:
    """Prints all values, and gives their median in milliseconds."""
    median = statistics.median(seconds) * 1000
    print(f"{what}: median {median:.1f} ms of {[f'{value * 1000:.1f}' for value in seconds]}")
    return median
