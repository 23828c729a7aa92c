"""What holds for every test here: away from the host's network, and nothing left behind.

Tests under unit/ are pure and need no root. Every other test runs in a process that has moved into an empty network
namespace before anything else happened, so not even a mistake in a test can reach the host's network.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tproxyd.net.capabilities import missing_capabilities
from tproxyd.testing.isolation import LAB_CAPABILITIES, isolate_this_process
from tproxyd.testing.plugin import DEFAULT_COUNT_DIVISOR

if TYPE_CHECKING:
    from netns_tests.way import Way
    from tproxyd.testing import Lab

pytest_plugins = [
    "tproxyd.testing.plugin"
]  # where tproxyd is not installed; else its entry point came first, which is fine

_UNIT = Path(__file__).parent / "unit"
_NEEDS_ROOT = "make nstest needs root: type `sudo make nstest`"


def pytest_configure(config: pytest.Config) -> None:
    if config.option.count_divisor is None:
        config.option.count_divisor = DEFAULT_COUNT_DIVISOR
    if not missing_capabilities(LAB_CAPABILITIES) and not all(
        _is_unit(Path(argument.partition("::")[0])) for argument in config.args
    ):
        isolate_this_process()


def pytest_collection_finish(session: pytest.Session) -> None:
    needs_root = any(not _is_unit(item.path) for item in session.items)
    if needs_root and not session.config.option.collectonly and missing_capabilities(LAB_CAPABILITIES):
        pytest.exit(_NEEDS_ROOT, returncode=pytest.ExitCode.TESTS_FAILED)


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(request: pytest.FixtureRequest) -> None:
    if not _is_unit(request.node.path):
        request.getfixturevalue("no_leaks")


@pytest.fixture
def make_way(gateway_lab: Lab, sidecar_lab: Lab, tmp_path: Path) -> Callable[[str], Way]:
    """`make_way("gateway v4")` and the like. Behind the gateway the app is a foreign destination, which no interface has."""

    def file(text: str) -> Path:
        path = tmp_path / "tproxyd.toml"
        path.write_text(text, encoding="utf-8")
        return path

    from netns_tests.way import Way  # late: the unit tests need no lab, and no trio

    def make(name: str) -> Way:
        layout, family = name.split()
        if layout == "gateway":
            address = "203.0.113.9" if family == "v4" else "2001:db8:f::9"
            return Way(name, gateway_lab["client"], gateway_lab["gateway"], gateway_lab["server"], address, file)
        host = sidecar_lab["host"]
        return Way(name, sidecar_lab["client"], host, host, getattr(host, family), file)

    return make


@pytest.fixture(params=["gateway v4", "gateway v6", "sidecar v4", "sidecar v6"])
def way(request: pytest.FixtureRequest, make_way: Callable[[str], Way]) -> Way:
    """Both layouts in both families."""
    return make_way(request.param)


def _is_unit(path: Path) -> bool:
    return path.resolve().is_relative_to(_UNIT)
