"""The floors of backends: a room imports from those before it, and no file imports in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests import ROOT

ORDER = (
    "hookspecs", "builtin", "errors", "keys", "base",
    "storage", "scores",
    "registry", "session",
    "local",
    "vertex.merging", "vertex.wire", "vertex.prices", "vertex.options",
    "vertex.service", "vertex.jobs",
    "vertex.gemini", "vertex.online", "vertex.batch",
    "vertex.cleaning",
    "contract",
)  # fmt: skip

FILES = {
    ".".join(path.relative_to(ROOT / "backends").with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted((ROOT / "backends").rglob("*.py"))
}


def imported(path: Path) -> set[str]:
    """What a file imports of backends, lazily too; a face counts where a name comes from it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("backends.") in FILES else str(node.module) for name in full]
        else:
            names = []
        found |= {name.removeprefix("backends.") for name in names if name.startswith("backends.")}
    return found


def floor(module: str) -> int:
    (found,) = (number for number, room in enumerate(ORDER) if f"{module}.".startswith(f"{room}."))
    return found


ROOMED = [name for name in FILES if name not in ("", "vertex")]


@pytest.mark.parametrize("module", ROOMED)
def test_imports_go_down(module: str) -> None:
    above = {name for name in imported(FILES[module]) if floor(name) > floor(module)}
    assert not above


def test_no_file_imports_in_a_circle() -> None:
    graph = {name: imported(path) for name, path in FILES.items()}
    TopologicalSorter(graph).prepare()


def test_each_folder_is_seen_at_a_glance() -> None:
    for folder in {path.parent for path in FILES.values()}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        folders = [path for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"]
        assert len(files) <= 8, folder
        assert len(folders) <= 7, folder
