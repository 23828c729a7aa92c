"""What the tests here share: the way that a test's traffic takes (the fixture `way` gives all four), and how times are told."""

from __future__ import annotations

import statistics
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tproxyd.testing import GATEWAY, SIDECAR, Lab
from tproxyd.testing.plugin import OpenLab

__all__ = [
    "AT_ONCE",
    "BOTH_LAYOUTS",
    "CLOSED",
    "GATEWAY_V4",
    "OPEN",
    "SIDECAR_V4",
    "WHEN_DOWN",
    "Way",
    "median_ms",
    "open_way",
]

GATEWAY_V4 = pytest.mark.parametrize("way", ["gateway v4"], indirect=True)
SIDECAR_V4 = pytest.mark.parametrize("way", ["sidecar v4"], indirect=True)
BOTH_LAYOUTS = pytest.mark.parametrize("way", ["gateway v4", "sidecar v6"], indirect=True)
"""Each layout and each family once: enough where a layout and a family cannot make a difference together."""

OPEN = '[capture]\nports = ["8080"]\nwhen_down = "bypass"\n'
CLOSED = '[capture]\nports = ["8080"]\nwhen_down = "refuse"\n'
WHEN_DOWN = pytest.mark.parametrize("config", [OPEN, CLOSED], ids=["open", "closed"])
"""Configurations with each of what new clients meet without a daemon: the app itself, or a refusal."""

AT_ONCE = 20.0
"""Milliseconds from the daemon's learning that the upstream cannot be had to the client's reset, as the contract says."""

_FOREIGN = {"v4": "203.0.113.9", "v6": "2001:db8:f::9"}  # which no interface has


class Way:
    """The way of a test's traffic: where the client is, where the daemon runs, where the app lives, and its address.

    `bind` is where the app should listen, `in_url` the address as URLs spell it, `file(text)` writes a configuration file. Behind the gateway
    the app is a foreign destination.
    """

    def __init__(self, layout: str, family: str, lab: Lab, directory: Path) -> None:
        self.name = f"{layout} {family}"
        self.client, self.proxy = lab["client"], lab["gateway" if layout == "gateway" else "host"]
        self.app = lab["server"] if layout == "gateway" else self.proxy
        self.address: str = _FOREIGN[family] if layout == "gateway" else getattr(self.app, family)
        self.in_url = f"[{self.address}]" if ":" in self.address else self.address
        self.bind = "::" if ":" in self.address else "0.0.0.0"
        self._layout, self._lab, self._directory = layout, lab, directory

    def __str__(self) -> str:
        return self.name

    def in_family(self, family: str) -> Way:
        """The same one in "v4" or "v6"."""
        return Way(self._layout, family, self._lab, self._directory)

    def file(self, text: str) -> Path:
        path = self._directory / "tproxyd.toml"
        path.write_text(text, encoding="utf-8")
        return path


@asynccontextmanager
async def open_way(name: str, open_lab: OpenLab, directory: Path) -> AsyncIterator[Way]:
    """By layout and family, as in "gateway v4", in a lab of its own. Configuration files go into the directory."""
    layout, family = name.split()
    async with open_lab(GATEWAY if layout == "gateway" else SIDECAR) as lab:
        yield Way(layout, family, lab, directory)


def median_ms(what: str, seconds: Sequence[float]) -> float:
    """Prints all values, and gives their median in milliseconds."""
    median = statistics.median(seconds) * 1000
    print(f"{what}: median {median:.1f} ms of {[f'{value * 1000:.1f}' for value in seconds]}")
    return median
