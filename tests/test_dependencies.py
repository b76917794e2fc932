"""What the program imports is what it asks to be installed, and what is tested is what is pinned."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import distribution, packages_distributions
from typing import Any

import pytest

from tests import ROOT

ROOMS = ("flows", "backends", "kl")
_FILE = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, UV = _FILE["project"], _FILE["tool"]["uv"]
# Imported by others: what opens gs://, what runs Dask, and what transformers imports for device_map.
NOT_IMPORTED = {"distributed", "gcsfs", "accelerate"}


def names(requirements: list[str]) -> set[str]:
    """The distributions of some requirements."""
    found = (re.match(r"[A-Za-z0-9._-]+", line) for line in requirements)
    return {normalised(match[0]) for match in found if match}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


CORE = names(PROJECT["dependencies"])
EXTRAS = names([line for lines in PROJECT["optional-dependencies"].values() for line in lines])


def imports(*, lazy: bool) -> Iterator[tuple[str, str]]:
    """(module, file) of each import of another project's: in functions, or where a module is loaded."""
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            inside = {id(node) for item in ast.walk(tree) if _is_function(item) for node in ast.walk(item)}
            for node in ast.walk(tree):
                if (id(node) in inside) is lazy:
                    yield from ((module, str(path.relative_to(ROOT))) for module in _modules(node))


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def _modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        found = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        found = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        found = []
    return [name for name in found if name.split(".")[0] not in {*sys.stdlib_module_names, *ROOMS}]


@cache
def distribution_of(module: str) -> str:
    """Who brings a module; several may share the beginning of its name, such as ``google``."""
    parts = module.split(".")
    candidates = set(brought().get(parts[0], ()))
    if len(candidates) == 1:
        return normalised(candidates.pop())
    for depth in range(len(parts), 0, -1):
        start = "/".join(parts[:depth])
        found = [name for name in candidates if _has(name, start)]
        if len(found) == 1:
            return normalised(found[0])
    raise AssertionError(f"nobody, or several, bring {module}: {candidates}")


@cache
def brought() -> Mapping[str, list[str]]:
    """First part of a module's name → distributions."""
    return packages_distributions()


@cache
def _files(name: str) -> tuple[str, ...]:
    return tuple(str(path) for path in distribution(name).files or ())


def _has(name: str, start: str) -> bool:
    return any(path == f"{start}.py" or path.startswith(f"{start}/") for path in _files(name))


@pytest.mark.parametrize(("lazy", "declared"), [(False, CORE), (True, CORE | EXTRAS)], ids=["loaded", "in functions"])
def test_what_is_imported_is_declared(lazy: bool, declared: set[str]) -> None:
    undeclared = {
        f"{module} ({distribution_of(module)}) in {path}"
        for module, path in imports(lazy=lazy)
        if distribution_of(module) not in declared
    }
    assert not undeclared


def test_what_is_declared_is_imported() -> None:
    used = {distribution_of(module) for lazy in (True, False) for module, _ in imports(lazy=lazy)}
    assert used | NOT_IMPORTED >= CORE | EXTRAS


def test_what_is_declared_has_a_version_among_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9][A-Za-z0-9.+]*", line) for line in lines)
    assert names(lines) >= CORE | EXTRAS


def test_only_those_who_test_install_what_tests_need() -> None:
    assert UV["default-groups"] == ["weights"]
    text = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "docs/deploying.md").read_text(encoding="utf-8")
    commands = re.findall(r"uv run [^`\n]*?(?:pytest|ruff|pyright)\b", text)
    assert len(commands) > 4
    assert [command for command in commands if "--group dev" not in command] == []


# What uv leaves out in this checkout, every other installer brings (tool.uv.override-dependencies).


@pytest.fixture(scope="module")
def locked() -> dict[str, list[dict[str, Any]]]:
    """What uv resolved here, before its overrides: name → the package in each version of it."""
    file = ROOT / "uv.lock"
    if not file.is_file():
        pytest.skip("uv has not resolved this checkout")
    found: dict[str, list[dict[str, Any]]] = {}
    for package in tomllib.loads(file.read_text(encoding="utf-8"))["package"]:
        found.setdefault(package["name"], []).append(package)
    return found


@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"]))
def test_an_extra_brings_no_source_build_and_nothing_that_uv_alone_leaves_out(
    extra: str, locked: dict[str, list[dict[str, Any]]]
) -> None:
    (project,) = locked["tokenkl"]
    wanted = [line["name"] for line in (*project["dependencies"], *project["optional-dependencies"][extra])]
    seen: set[str] = set()
    overridden = {normalised(line.split(";")[0].strip()) for line in UV["override-dependencies"]} - {"torch"}
    while wanted:
        name = wanted.pop()
        if name in seen or name == "torch":  # whose index has wheels alone; which one is right depends on the machine
            continue
        seen.add(name)
        assert name not in overridden, f"only uv leaves {name} out, and only in a checkout"
        for package in locked[name]:
            assert package.get("wheels"), f"{name} {package['version']} has no wheel"
            wanted += [line["name"] for line in package.get("dependencies", [])]
