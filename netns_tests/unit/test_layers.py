"""The house: imports point one way, and each room imports what it may."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tproxyd

PACKAGE = Path(tproxyd.__file__).parent
ROOMS = ["errors", "config", "policy", "plan", "net", "kernel", "datapath", "proxy", "interceptor", "daemon", "testing"]
"""A room may import itself and those before it."""

ONLY_THERE = {
    "pyroute2": {"kernel", "testing"},
    "trio": {"proxy", "interceptor", "daemon", "testing"},
    "h11": {"daemon"},
    "prometheus_client": {"daemon"},
    "rich": {"daemon"},
    "pytest": {"testing"},
    "asyncio": set(),
}

# What a room gets by on besides the standard library and earlier rooms.
LIBRARIES = {
    "errors": set(),
    "policy": set(),
    "net": set(),
    "config": {"msgspec"},
    "plan": {"msgspec"},
    "datapath": {"msgspec"},
}


def modules() -> Iterator[tuple[str, str, ast.Module]]:
    """(room, module, its tree); what stands at the top of the package belongs to no room."""
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        yield parts[0], ".".join(parts), ast.parse(file.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Everything imported anywhere in it, also within functions, but not for type checking alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module
            # `from tproxyd import kernel` imports the room, `from tproxyd import __version__` a name.
            yield from (
                f"{node.module}.{alias.name}" if node.module == "tproxyd" else node.module for alias in node.names
            )
        yield from imports(node)


def room_of(name: str) -> str | None:
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "tproxyd" and rest.partition(".")[0] in ROOMS else None


IMPORTS = sorted({(room, module, name) for room, module, tree in modules() for name in imports(tree)})


def test_every_room_is_known() -> None:
    top = {room for room, _, _ in modules()} - {"__init__", "__main__"}
    assert top == set(ROOMS)


def test_imports_point_one_way() -> None:
    wrong = [
        f"{module} imports {name}"
        for room, module, name in IMPORTS
        if room in ROOMS and (other := room_of(name)) and ROOMS.index(other) > ROOMS.index(room)
    ]
    assert wrong == []


def test_the_benchmark_is_for_the_checkout_alone() -> None:
    assert [module for _, module, name in IMPORTS if name.partition(".")[0] == "bench"] == []


def test_no_test_file_imports_another() -> None:
    wrong = [
        f"{file.name} imports {name}"
        for file in sorted(Path(__file__).parents[1].rglob("*.py"))
        for name in imports(ast.parse(file.read_text(encoding="utf-8")))
        if name.startswith("netns_tests.") and ".test_" in name
    ]
    assert wrong == []


@pytest.mark.parametrize("library", ONLY_THERE)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    rooms = {room for room, _, name in IMPORTS if name.partition(".")[0] == library}
    assert rooms <= ONLY_THERE[library]


@pytest.mark.parametrize("room", LIBRARIES)
def test_an_early_room_gets_by_on_little(room: str) -> None:
    used = {name.partition(".")[0] for where, _, name in IMPORTS if where == room}
    assert used - sys.stdlib_module_names - {"tproxyd", "__future__"} <= LIBRARIES[room]


@pytest.mark.parametrize(
    ("module", "free_of"),
    [
        ("tproxyd", ["trio", "pyroute2", "msgspec"]),
        ("tproxyd.daemon.cli", ["trio", "pyroute2", "msgspec"]),
        ("tproxyd.config", ["trio", "pyroute2", "tomllib"]),  # its types, as a relay process needs them
        ("tproxyd.policy", ["trio", "pyroute2", "msgspec"]),
        ("tproxyd.plan", ["trio", "pyroute2"]),
        ("tproxyd.daemon.client", ["trio", "pyroute2", "h11", "rich"]),  # what asks a daemon is typed by people
        ("tproxyd.kernel", ["trio", "pyroute2"]),
        (
            "tproxyd.daemon.run",
            ["pyroute2", "prometheus_client", "h11", "tproxyd.daemon.doctor"],
        ),  # a start takes what it must
        # A relay process stays small and starts fast.
        ("tproxyd.datapath.loop", ["trio", "pyroute2", "asyncio", "tomllib", "subprocess", "tproxyd.config.load"]),
        ("tproxyd.testing.plugin", ["trio", "pyroute2", "msgspec"]),  # in every pytest run of every user
    ],
)
def test_what_is_loaded_with_it(module: str, free_of: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {free_of} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
