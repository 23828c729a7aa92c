"""What holds for every test here: away from the host's network, and nothing left behind.

Tests under unit/ are pure and need no root. Every other test runs in a process that has moved into an empty network
namespace before anything else happened, so not even a mistake in a test can reach the host's network.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest

from netns_tests.turns import turn
from tproxyd.net.capabilities import missing_capabilities
from tproxyd.testing.isolation import LAB_CAPABILITIES, isolate_this_process
from tproxyd.testing.plugin import DEFAULT_COUNT_DIVISOR

if TYPE_CHECKING:
    from netns_tests.both_ends import Bench
    from netns_tests.way import Way
    from tproxyd.testing.plugin import OpenLab

pytest_plugins = [
    "tproxyd.testing.plugin"
]  # where tproxyd is not installed; else its entry point came first, which is fine

_UNIT = Path(__file__).parent / "unit"
_NEEDS_ROOT = "make nstest needs root: type `sudo make nstest`"


_OF_THIS_RUN = pytest.StashKey[Path]()
"""A directory that all processes of a run share."""


def pytest_configure(config: pytest.Config) -> None:
    if config.option.count_divisor is None:
        config.option.count_divisor = DEFAULT_COUNT_DIVISOR
    if not missing_capabilities(LAB_CAPABILITIES) and not all(
        _is_unit(Path(argument.partition("::")[0])) for argument in config.args
    ):
        # xdist's workers (pytest -n) are born in the empty namespace of the process that hands out the tests, the thread
        # that talks with it included; each takes one of its own, because a namespace has one lock, one set of ports.
        isolate_this_process(other_threads_are=hasattr(config, "workerinput"))
    if hasattr(config, "workerinput"):
        config.stash[_OF_THIS_RUN] = Path(config.workerinput["of_this_run"])
    else:
        directory = TemporaryDirectory(prefix="tproxyd-tests-")
        config.add_cleanup(directory.cleanup)
        config.stash[_OF_THIS_RUN] = Path(directory.name)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """xdist asks it for each worker that it is about to start."""
    node.workerinput["of_this_run"] = str(node.config.stash[_OF_THIS_RUN])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that run alone come last: while one does, the other workers have nothing to do."""
    items.sort(key=_is_timed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with turn(item.config.stash[_OF_THIS_RUN], alone=_is_timed(item)):
        return (yield)


def pytest_collection_finish(session: pytest.Session) -> None:
    needs_root = any(not _is_unit(item.path) for item in session.items)
    if needs_root and not session.config.option.collectonly and missing_capabilities(LAB_CAPABILITIES):
        pytest.exit(_NEEDS_ROOT, returncode=pytest.ExitCode.TESTS_FAILED)


@pytest.fixture(scope="session", autouse=True)
def _bytecode(pytestconfig: pytest.Config) -> Iterator[None]:
    """What Python compiles of tproxyd is kept for this run alone: a checkout gets no file from it, and every daemon starts faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        patch.setenv("PYTHONPYCACHEPREFIX", str(pytestconfig.stash[_OF_THIS_RUN] / "bytecode"))
        yield


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(request: pytest.FixtureRequest) -> None:
    if not _is_unit(request.node.path):
        request.getfixturevalue("no_leaks")


@pytest.fixture(params=["gateway v4", "gateway v6", "sidecar v4", "sidecar v6"])
async def way(request: pytest.FixtureRequest, open_lab: OpenLab, tmp_path: Path) -> AsyncIterator[Way]:
    """Both layouts in both families."""
    from netns_tests.way import open_way  # late: the unit tests need no lab, and no trio

    async with open_way(request.param, open_lab, tmp_path) as opened:
        yield opened


@pytest.fixture(
    params=[
        *(f"{engine} {home} sidecar v4" for engine in ("auto", "copy", "splice") for home in ("thread", "process")),
        "auto process gateway v6",
        "auto process sidecar v4 loopback",
        "auto process sidecar v6 unix",
    ]
)
async def bench(request: pytest.FixtureRequest, open_lab: OpenLab) -> AsyncIterator[Bench]:
    """A daemon with each engine in each home, and both ends of every connection through it."""
    from netns_tests.both_ends import open_bench  # late, as above

    async with open_bench(request.param, open_lab) as opened:
        yield opened


def _is_timed(item: pytest.Item) -> bool:
    return item.get_closest_marker("timed") is not None


def _is_unit(path: Path) -> bool:
    return path.resolve().is_relative_to(_UNIT)


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program as a systemd of a test has it installed."""
    from netns_tests.systemd_lab import compile_program  # late: tests without it need none of the lab

    return compile_program(tmp_path_factory.mktemp("program"))
