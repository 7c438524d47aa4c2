"""Who may import whom. The table is the house plan's; a new room is added to it on purpose or not at all."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio.paths import REPOSITORY

# Room -> shelf, counted from the bottom. A room may import rooms of lower shelves, and its neighbours without a cycle.
SHELVES = [
    {"errors", "faults", "paths", "processes"},
    {
        "config",
        "store",
        "data",
        "models",
        "model_shapes",
        "model_code",
        "machine",
        "estimate",
        "loads",
        "probes",
        "scores",
        "report",
        "overfit",
        "recommend",
        "harness_tasks",
        "checkpoint_files",
        "conversions",
        "weight_folders",
        "foreign",
        "request_log",
        "server_key",
    },
    {
        "agent",
        "built_in",
        "bundles",
        "exports",
        "forecast",
        "jobs",
        "projects",
        "datasets",
        "caches",
        "dataset_checks",
        "other_servers",
        "row_life",
        "row_place",
        "runs",
        "comparison",
        "harness",
        "suites",
        "chat_client",
        "chats",
        "chat_export",
        "kept_answers",
        "votes",
        "charts",
        "run_report",
        "svg",
        "work_folder",
    },
    {"ui", "cli"},
    {"pages", "app"},
]
SHELF_OF = {room: number for number, rooms in enumerate(SHELVES) for room in rooms}
ENGINE_MAY_IMPORT = SHELVES[0] | SHELVES[1] | {"engine"}
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "bitsandbytes",
    "datasets",
    "flash_attn",
    "liger_kernel",
}
LIGHT_BELOW_UI = {"streamlit", "typer", "rich"}


def sources() -> list[Path]:
    found = [REPOSITORY / "app.py", *(REPOSITORY / "pages").glob("*.py"), *(REPOSITORY / "studio").rglob("*.py")]
    return sorted(path for path in found if path.is_file())


def room_of(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return parts[0] if parts[0] != "studio" else parts[1] if len(parts) > 1 else "studio"


def imported(path: Path, only_at_the_top: bool = False) -> Iterator[str]:
    """Full names of imported modules; for `from a import b`, both a and a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if only_at_the_top else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} line {node.lineno}: write imports in full"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    parts = [name.split(".") for name in imported(path)]
    return {part[1] for part in parts if part[0] == "studio" and len(part) > 1} | {
        part[0] for part in parts if part[0] in ("pages", "app")
    }


def ids(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("path", sources(), ids=ids)
def test_imports_go_down_the_shelves(path: Path) -> None:
    room = room_of(path)
    if room in ("studio", "__init__"):
        assert not rooms_imported(path)
        return
    others = rooms_imported(path) - {room}
    if room == "engine":
        assert others <= ENGINE_MAY_IMPORT, f"the engine must not import {sorted(others - ENGINE_MAY_IMPORT)}"
        return
    assert room in SHELF_OF, f"{room} has no place on the shelves yet"
    assert "engine" not in others, "the engine is started through studio.jobs, never imported"
    above = {other for other in others if SHELF_OF.get(other, 99) > SHELF_OF[room]}
    assert not above, f"{room} reaches up to {sorted(above)}"


@pytest.mark.parametrize("path", [path for path in sources() if room_of(path) != "engine"], ids=ids)
def test_heavy_libraries_stay_in_the_engine(path: Path) -> None:
    heavy = {name.split(".")[0] for name in imported(path)} & HEAVY
    assert not heavy, f"not even inside a function: {sorted(heavy)}"


@pytest.mark.parametrize("path", sources(), ids=ids)
def test_only_ui_and_shell_know_how_they_are_shown(path: Path) -> None:
    if room_of(path) not in ("ui", "cli", "pages", "app"):
        shown = {name.split(".")[0] for name in imported(path)} & LIGHT_BELOW_UI
        assert not shown, sorted(shown)


def test_modules_do_not_import_in_a_circle() -> None:
    names = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sources()
    }
    graph = {
        name: {one for one in imported(path, True) if one in names and one != name} for name, path in names.items()
    }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_package_files_are_empty() -> None:
    """An `__init__` with content is imported by whoever wants any part of the package."""
    with_content = [ids(path) for path in sources() if path.name == "__init__.py" and path.read_text().strip()]
    assert set(with_content) <= {
        "studio/store/__init__.py", "studio/config/catalog/__init__.py", "studio/cli/__init__.py",
    }  # fmt: skip


def test_the_app_side_never_loads_torch() -> None:
    """All of it at once, in a fresh process: what the table cannot see, such as a library that imports torch."""
    modules = [
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        for path in sources()
        if room_of(path) not in ("engine", "pages", "app") and path.stem not in ("__init__", "__main__")
    ]
    code = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += f"print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
