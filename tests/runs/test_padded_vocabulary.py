"""Exact KL where Q's model has rows that are no tokens: a backend that pads it, through the real command line."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from tests import ROOT
from tests.documents import install_plugin
from tests.programs import Run

N_POSITIONS = 4
PLUGIN = '''
"""The local models, Q's vocabulary longer by 64 rows that share the probability `mass`; or its ids moved by one."""

import math
from dataclasses import replace

import numpy as np
from pydantic import Field

from backends.base import BackendOptions
from backends.hookspecs import hookimpl
from backends.local.backend import LocalBackend
from kl.records import Score


class PaddedOptions(BackendOptions):
    mass: float = Field(default=0.0)
    without_p: bool = Field(default=False)


class PaddedBackend(LocalBackend):
    Options = PaddedOptions
    name = "padded"

    @classmethod
    def identity(cls, options, request):
        return super().identity(options, request) | {"padding": [options.mass, options.without_p]}

    async def score(self, requests):
        of_q = {key for request in requests if "@" in request.model for key in request.keys}
        async for result in super().score(requests):
            if isinstance(result, Score) and result.key in of_q:
                result = replace(result, full_logprobs=self._padded(result.full_logprobs))
            elif isinstance(result, Score) and self.options.without_p:
                result = replace(result, full_logprobs=None)
            yield result

    def _padded(self, logs):
        mass = self.options.mass
        rows = np.full(64, math.log(mass / 64) if mass else -np.inf, dtype=np.float32)
        return np.concatenate([logs + np.float32(math.log1p(-mass)), rows])


@hookimpl
def register_backends(register):
    register("padded", "padded_backend:PaddedBackend")
'''


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugins")
    install_plugin(folder, "padded_backend", PLUGIN)
    return folder


@pytest.fixture(scope="module")
def a_few_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("responses")
    document = json.loads((ROOT / "examples/responses/000_why-is-the-sky-blue.json").read_text(encoding="utf-8"))
    response = document["responses"][0]
    content = response["logprobs"]["content"][:N_POSITIONS]
    text = "".join(entry["token"] for entry in content)
    response |= {"logprobs": {"content": content}, "text": text, "finish_reason": "MAX_TOKENS"}
    (folder / "a.json").write_text(json.dumps(document | {"responses": [response]}), encoding="utf-8")
    return folder


def run(run_process: Run, plugins: Path, responses: Path, output: Path, backend: str, *settings: str) -> pl.DataFrame:
    arguments = ("--input-dir", responses, "--output-dir", output, "--backend", backend, "--top-logprobs", "full")
    changes = [argument for setting in settings for argument in ("--set", setting)]
    done = run_process(
        "flows.run", *arguments, "--model2", "smollm2-135m@int8", *changes, env={"PYTHONPATH": str(plugins)}
    )
    assert done.code == 0, done.err
    return pl.read_parquet(output / "tokens.parquet")


def test_rows_without_mass_change_nothing(run_process: Run, plugins: Path, a_few_tokens: Path, tmp_path: Path) -> None:
    plain = run(run_process, plugins, a_few_tokens, tmp_path / "plain", "local")
    padded = run(run_process, plugins, a_few_tokens, tmp_path / "padded", "padded")
    assert padded["kl_exact"].null_count() == 0
    assert padded["kl_exact"].to_list() == pytest.approx(plain["kl_exact"].to_list(), abs=1e-9)
    assert json.loads((tmp_path / "padded" / "run.json").read_text())["no_exact_kl"] == {}


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("backend.mass=0.01", "P has 49152 tokens and Q 49216, and those that one has alone hold more than 1e-05"),
        ("backend.without_p=true", "the whole vocabulary of P is not there"),
    ],
    ids=["rows with mass", "no vocabulary of P"],
)
def test_where_there_is_no_exact_value_one_line_says_why(
    run_process: Run, plugins: Path, a_few_tokens: Path, tmp_path: Path, setting: str, why: str
) -> None:
    tokens = run(run_process, plugins, a_few_tokens, tmp_path / "out", "padded", setting)
    assert tokens["kl_exact"].null_count() == N_POSITIONS
    assert tokens["kl_estimate"].null_count() == 0
    (found,) = json.loads((tmp_path / "out" / "run.json").read_text())["no_exact_kl"].items()
    assert found[0].startswith(why)
    assert found[1] == {"n": N_POSITIONS, "first": "a.json#0 position 0"}
