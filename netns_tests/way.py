"""One way that a test's traffic takes; the fixture `way` gives all four of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tproxyd.testing import Node

__all__ = ["Way"]


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
