"""Code that stands in a document, taken out and installed as its reader would."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from backends.registry import ENTRY_POINT_GROUP
from tests import ROOT

WRITING_A_BACKEND = ROOT / "docs" / "writing-a-backend.md"


def code_blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found, f"{document.name} has no {language} block"
    return found


def write_example(folder: Path) -> None:
    """The document's distribution as its reader writes it down."""
    (project,) = code_blocks(WRITING_A_BACKEND, "toml")
    (folder / "pyproject.toml").write_text(project, encoding="utf-8")
    (module,) = _entries(tomllib.loads(project)).values()
    (folder / f"{module}.py").write_text(code_blocks(WRITING_A_BACKEND, "python")[0], encoding="utf-8")


def install_example(folder: Path) -> None:
    """The document's distribution as an installer leaves it: its module, and metadata with its entry points."""
    (project,) = (tomllib.loads(block) for block in code_blocks(WRITING_A_BACKEND, "toml"))
    (module,) = _entries(project).values()
    (folder / f"{module}.py").write_text(code_blocks(WRITING_A_BACKEND, "python")[0], encoding="utf-8")
    name, version = project["project"]["name"], project["project"]["version"]
    _write_metadata(folder, name, version, project["project"]["entry-points"])


def _entries(project: dict[str, Any]) -> dict[str, str]:
    """What a distribution announces to us: entry → module."""
    return project["project"]["entry-points"][ENTRY_POINT_GROUP]


def install_plugin(folder: Path, module: str, code: str) -> None:
    """A module with backends as an installer leaves it, found by its entry point."""
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    _write_metadata(folder, module, "1", {ENTRY_POINT_GROUP: {module: module}})


def _write_metadata(folder: Path, name: str, version: str, entry_points: dict[str, dict[str, str]]) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    lines: list[str] = []
    for group, entries in entry_points.items():
        lines += [f"[{group}]", *(f"{entry} = {value}" for entry, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
