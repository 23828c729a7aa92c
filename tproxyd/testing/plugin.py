"""pytest plugin: labs as fixtures, counted runs, and a check that a test leaves nothing behind.

Knows pytest. It is loaded in every pytest run of everybody who has tproxyd installed, so it imports nothing heavy (no trio, no
pyroute2; those come with the first lab) and does nothing in tests that do not ask for its fixtures.

The fixtures: `gateway_lab` and `sidecar_lab` (async: they need pytest-trio), `open_lab` (`async with open_lab(TOPOLOGY) as lab`),
`no_leaks`, `counted`. A lab needs root, and a missing privilege is a failure in one sentence, never a skip: a network test
that quietly does not run is worth less than none.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import pytest

from tproxyd.net.capabilities import missing_capabilities
from tproxyd.testing.isolation import LAB_CAPABILITIES, Holdings

if TYPE_CHECKING:
    from tproxyd.testing.lab import Lab
    from tproxyd.testing.topology import Topology

__all__ = ["DEFAULT_COUNT_DIVISOR", "OpenLab"]

OpenLab = Callable[["Topology"], AbstractAsyncContextManager["Lab"]]

DEFAULT_COUNT_DIVISOR = 10
_NAMES = ("tproxyd", "tproxyd.testing.plugin")  # the entry point's, and the one that -p and pytest_plugins use
_THREAD_SECONDS = 2.0


def pytest_plugin_registered(plugin: object, plugin_name: str, manager: pytest.PytestPluginManager) -> None:
    """Once loaded under one of its names, never again under the other, which pluggy would answer with a ValueError."""
    if plugin_name in _NAMES and getattr(plugin, "__name__", "") == __name__:
        for other in _NAMES:
            if other != plugin_name and not manager.is_blocked(other):
                manager.set_blocked(other)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("tproxyd").addoption(
        "--count-divisor",
        type=_positive,
        default=None,
        metavar="N",
        help=f"divide the counts of counted runs by N; 1: full counts (default: {DEFAULT_COUNT_DIVISOR})",
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    """Only where somebody chose a divisor (our own conftest does): most runs that load the plugin count nothing."""
    divisor = config.getoption("count_divisor")
    if divisor is None:
        return None
    return "counted runs: full counts (divisor 1)" if divisor == 1 else f"counted runs: counts divided by {divisor}"


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """`assert await node.dump() == before` shows the lines that changed, not two dumps of two thousand lines."""
    if op == "==" and type(left).__name__ == type(right).__name__ == "KernelState":
        from tproxyd.testing.state import KernelState

        if isinstance(left, KernelState) and isinstance(right, KernelState):
            return ["the kernel's state differs (- right side, + left side):", *right.diff(left).splitlines()]
    return None


@pytest.fixture
def counted(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """`counted(1000)` is how often to do what the full run does 1000 times: at least once."""
    divisor = request.config.getoption("count_divisor") or DEFAULT_COUNT_DIVISOR
    return lambda count: max(1, count // divisor)


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fails the test if a descriptor, thread or child process of it is left."""
    before = Holdings.now()
    yield
    left = before.left_since(seconds=_THREAD_SECONDS)
    if left:
        pytest.fail(f"the test left behind: {'; '.join(left)}", pytrace=False)


@pytest.fixture
def open_lab(no_leaks: None) -> OpenLab:
    """`tproxyd.testing.open_lab` for a topology of the test's own; checks afterwards that nothing is left."""
    missing = missing_capabilities(LAB_CAPABILITIES)
    if missing:
        pytest.fail(
            f"a lab needs root: this process lacks {' and '.join(missing)}; run pytest with sudo", pytrace=False
        )
    from tproxyd.testing.lab import open_lab as open_real_lab

    return open_real_lab


@pytest.fixture
async def gateway_lab(open_lab: OpenLab) -> AsyncIterator[Lab]:
    """client - gateway - server."""
    from tproxyd.testing.topology import GATEWAY

    async with open_lab(GATEWAY) as lab:
        yield lab


@pytest.fixture
async def sidecar_lab(open_lab: OpenLab) -> AsyncIterator[Lab]:
    """client - host."""
    from tproxyd.testing.topology import SIDECAR

    async with open_lab(SIDECAR) as lab:
        yield lab


def _positive(text: str) -> Any:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
