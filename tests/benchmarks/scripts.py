"""What the scripts of the benchmarks print."""

from __future__ import annotations

import io
import os
import runpy
import sys
from contextlib import chdir, redirect_stdout

import pytest

from tests import ROOT
from tests.programs import only_environment


def printed(script: str, *options: str) -> list[str]:
    """The lines of a script of the folder, run to its end as a program; here, where its libraries are loaded."""
    path = ROOT / "benchmarks" / f"{script}.py"
    with (
        only_environment(dict(os.environ)),
        pytest.MonkeyPatch.context() as patch,
        chdir(ROOT),
        redirect_stdout(io.StringIO()) as out,
    ):
        patch.setattr(sys, "argv", [str(path), *options])
        patch.setattr(sys, "path", [*sys.path])
        runpy.run_path(str(path), run_name="__main__")
    return out.getvalue().splitlines()
