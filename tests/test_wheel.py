"""What is installed from the wheel runs by itself, with every package folder in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import polars as pl
import pytest

from tests import ROOT
from tests.documents import WRITING_A_BACKEND, code_blocks, write_example
from tests.programs import clean_environment

ROOMS = ("flows", "backends", "kl")
STARTER = ("examples", "automations")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(command: list[str], cwd: Path, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def uv(*arguments: object, cwd: Path) -> None:
    """The installer that the README names; what building needs is in its cache since the environment was made."""
    program = os.environ.get("UV") or shutil.which("uv")
    assert program, "uv is not on the PATH"
    run([program, *map(str, arguments), "--offline", "--quiet"], cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: building leaves folders behind, and takes up what an earlier build left."""
    source = tmp_path_factory.mktemp("source")
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "prefect.yaml"):
        shutil.copy(ROOT / name, source)
    for name in STARTER:
        shutil.copytree(ROOT / name, source / name)
    uv("build", "--wheel", "--out-dir", source / "dist", cwd=source)
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


def test_every_module_of_the_checkout_is_in_the_wheel_and_nothing_else(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = (path for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file())
    expected = {path.relative_to(ROOT).as_posix() for path in modules if "__pycache__" not in path.parts}
    assert packed == expected | {f"flows/starter/{name}" for name in starter()}
    assert {f"{room}/py.typed" for room in ROOMS} <= packed


def starter() -> dict[str, bytes]:
    """What ``tokenkl init`` writes."""
    files = [path for name in STARTER for path in (ROOT / name).rglob("*") if path.is_file()]
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in (*files, ROOT / "prefect.yaml")}


@pytest.fixture
def python(wheel: Path, tmp_path: Path) -> Path:
    """The program of a fresh environment in which the wheel is installed."""
    uv("venv", "--python", sys.executable, tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    uv("pip", "install", "--python", python, "--no-deps", wheel, cwd=tmp_path)
    # The dependencies are those of this environment. A folder that is named so is searched, but its own .pth files, by
    # which the checkout is importable here, are not read.
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """What a newcomer's programs see."""
    found = clean_environment(tmp_path / "home")
    found.pop("PYTHONPATH", None)
    return found


def test_a_wheel_is_enough_for_the_quickstart_also_beside_flows_of_somebody_else(
    python: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    tokenkl, project = str(python.with_name("tokenkl")), tmp_path / "a project"
    (project / "flows").mkdir(parents=True)
    (project / "flows" / "__init__.py").write_text("raise AssertionError('the flows of somebody else')")
    wrote = run([tokenkl, "init", "."], project, environment)
    assert wrote.startswith(f".: {len(starter())} files written. To begin:\n")
    assert {name: (project / name).read_bytes() for name in starter()} == starter()
    command = [tokenkl, "run", "--config", "examples/quickstart.yaml", "--dry-run"]
    assert "\nrequests " in run(command, project, environment)
    assert run([tokenkl, "--version"], project, environment) == f"tokenkl {PROJECT['version']}\n"

    (project / "prefect.yaml").write_text("name: mine\n")
    again = subprocess.run([tokenkl, "init", "."], cwd=project, env=environment, capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (3, "prefect.yaml holds something else and is left alone\n")
    assert (project / "prefect.yaml").read_text() == "name: mine\n"


def test_what_is_imported_is_what_the_wheel_installed(
    python: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    show = "import flows, backends, kl; print(flows.__file__, backends.__file__, kl.__file__)"
    found = run([str(python), "-c", show], tmp_path, environment)
    assert [Path(file).parent.parent for file in found.split()] == [site] * len(ROOMS)


@pytest.mark.slow
def test_a_backend_of_the_document_is_installed_and_runs_by_configuration_alone(
    python: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    write_example(project)
    uv("pip", "install", "--python", python, "--no-deps", project, cwd=tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "bigram.yaml").write_text(code_blocks(WRITING_A_BACKEND, "yaml")[0])

    (listed,) = json.loads(run([str(python), "-m", "flows.backends", "bigram", "--json"], tmp_path, environment))
    assert (listed["origin"], listed["roles"], listed["problem"]) == ("tokenkl-bigram 0.1.0", "Q", None)
    command = [str(python), "-m", "flows.run", "--config", "bigram.yaml"]
    smoothing = "backend.smoothing  (number, above 0; default 0.1)"
    assert smoothing in run([*command, "--help"], tmp_path, environment)

    run(command, tmp_path, environment)
    output = tmp_path / "results" / "bigram"
    tokens = pl.read_parquet(output / "tokens.parquet")
    assert tokens["error"].null_count() == tokens.height > 0
    assert tokens["kl_lower"].min() > 0
    record = json.loads((output / "run.json").read_text())
    assert record["config"]["backend"] == {"name": "bigram", "smoothing": 0.5}
    assert record["model_versions_now"] == ["bigram 1"]

    asked = re.compile(r"^requests +([\d,]+) in", re.MULTILINE)
    again = asked.search(run([*command, "--dry-run"], tmp_path, environment))
    other = asked.search(run([*command, "--dry-run", "--set", "backend.smoothing=2"], tmp_path, environment))
    assert again is not None
    assert other is not None
    assert (int(again[1]), int(other[1].replace(",", ""))) == (0, record["contexts_asked"])
