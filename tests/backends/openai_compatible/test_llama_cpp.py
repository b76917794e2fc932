"""The real llama.cpp server with the box's model: runs, kills, the contract."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from backends.base import Sample, SampleRequest
from backends.contract import Check, Subject, checks_for
from backends.local.models import find_model
from backends.openai_compatible.backend import OpenAICompatibleBackend
from backends.openai_compatible.options import OpenAICompatibleOptions
from backends.settings import SampleSettings
from kl.records import Score
from tests import ROOT
from tests.openai_world.asking import BOX, PROMPT, asked, request_of
from tests.openai_world.llama_cpp import llama_cpp
from tests.openai_world.vllm import VllmShaped
from tests.process_worker import kill_group
from tests.programs import Run, Start, free_port

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples" / "responses"
SHORT = "000_why-is-the-sky-blue.json"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with llama_cpp(find_model(BOX).path, free_port()) as address:
        yield address


def folder_of(tmp_path: Path, **changes: Any) -> Path:
    """An input folder with one short response."""
    folder = tmp_path / "in"
    folder.mkdir()
    document = json.loads((EXAMPLES / SHORT).read_text(encoding="utf-8")) | changes
    (folder / SHORT).write_text(json.dumps(document), encoding="utf-8")
    return folder


def flags(address: str, folder: Path, output: Path, *more: object) -> tuple[object, ...]:
    return (
        "--input-dir", folder, "--output-dir", output, "--model2", "smol", "--backend", "openai_compatible",
        "--set", f"backend.base_url={address}", *more,
    )  # fmt: skip


def test_rounded_weights_are_within_the_bounds_of_the_exact_value(
    address: str, run_program: Run, tmp_path: Path
) -> None:
    """P is the model rounded to four bits, in this process; its exact distance to the original is computed beside."""
    sample = ("--set", "sampling.max_tokens=10", "--set", "sampling.top_logprobs=20")
    written = run_program(
        "flows.sample", "--backend", "local", "--model1", f"{BOX}@int4", "--output-dir", tmp_path / "in",
        "--set", 'prompts=["Name a colour."]', *sample,
    )  # fmt: skip
    assert written.code == 0, written.err
    done = run_program("flows.run", *flags(address, tmp_path / "in", tmp_path / "out", "--set", "preflight=false"))
    assert done.code == 0, done.err
    exact = run_program(
        "flows.run", "--input-dir", tmp_path / "in", "--output-dir", tmp_path / "exact", "--model2", BOX,
        "--backend", "local", "--top-logprobs", "full",
    )  # fmt: skip
    assert exact.code == 0, exact.err
    tokens = pl.read_parquet(tmp_path / "out" / "tokens.parquet")
    true = pl.read_parquet(tmp_path / "exact" / "tokens.parquet")["kl_exact"]
    assert tokens["kl_lower"].mean() - 0.02 <= true.mean() <= tokens["kl_upper_plausible"].mean() + 0.02


def test_the_model_against_itself_is_near_zero_and_a_killed_run_asks_nothing_twice(
    address: str, start_program: Start, run_program: Run, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(EXAMPLES / "004_what-is-17-plus-25-answer-in-one-sentenc.json", tmp_path / "in")
    arguments = flags(address, tmp_path / "in", tmp_path / "out", "--set", "noise_floor.fraction=0.2")
    process = start_program("flows.run", *arguments)
    until = time.monotonic() + 200
    while time.monotonic() < until and not _n_kept(tmp_path / "out"):
        time.sleep(0.1)
    kill_group(process)
    process.communicate()
    done = run_program("flows.run", *arguments, "--set", "preflight=false")  # it was proven a moment ago
    assert done.code == 0, done.err
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert 0 < run["contexts_on_disk"] == run["contexts"] - run["contexts_asked"]
    assert run["backend_report"]["calls"]["answered"] == run["contexts_asked"]
    server = run["backend_report"]["servers"]["smol"]
    assert (server["mode"], server["cache"]) == ("ids", "off")

    tokens = pl.read_parquet(tmp_path / "out" / "tokens.parquet")
    assert tokens["error"].null_count() == tokens.height
    assert "Noise floor per token" in done.out
    assert abs(tokens["kl_estimate"].mean()) < 0.02


def test_sampled_compared_and_analysed(address: str, run_program: Run, tmp_path: Path) -> None:
    fast = ("--set", "backend.cache=fast", "--set", "preflight=false")  # what they cost is waited for elsewhere
    server = ("--backend", "openai_compatible", "--set", f"backend.base_url={address}", *fast)
    written = run_program(
        "flows.sample", *server, "--model1", "smol", "--output-dir", tmp_path / "in",
        "--set", 'prompts=["Name a colour."]', "--set", "sampling.max_tokens=5",
    )  # fmt: skip
    assert written.code == 0, written.err
    (file,) = (tmp_path / "in").glob("*.json")
    (response,) = json.loads(file.read_text(encoding="utf-8"))["responses"]
    assert response["top_k"] == 0, "it was switched off in the request"
    done = run_program("flows.run", *flags(address, tmp_path / "in", tmp_path / "out", *fast))
    assert done.code == 0, done.err
    assert "top_k is not stated" not in done.out
    tokens = pl.read_parquet(tmp_path / "out" / "tokens.parquet")
    assert tokens["token"].to_list() == [item["token"] for item in response["logprobs"]["content"]]
    assert tokens["kl_estimate"].max() < 0.05
    shown = run_program("flows.analyze", "--result-dir", tmp_path / "out", "--top-k", "10")
    assert shown.code == 0, shown.err
    assert "Positions with the largest KL, nats" in shown.out


def _n_kept(output: Path) -> int:
    return sum(path.stat().st_size for path in output.glob("scores/journals/*") if path.is_file())


def test_a_list_that_the_server_would_hold_back_is_forced(address: str) -> None:
    """After these the model goes on with a part of an emoji, which llama.cpp answers without log-probabilities."""
    request = request_of("The ocean wave emoji: 🌊 The ocean wave emoji: 🌊 The ocean wave emoji: 🌊")
    results, report = asked({"base_url": address, "cache": "fast"}, [request])
    assert all(isinstance(result, Score) for result in results), results
    assert "0.0025 nats" in report["servers"]["smol"]["cache"]


def test_what_is_sampled_has_a_list_for_every_token_also_of_parts_of_characters(address: str) -> None:
    prefix = "🌊 🌊 🌊 🌊 🌊 🌊 🌊"
    settings = SampleSettings(max_tokens=12, top_logprobs=5, temperature=0)
    options = OpenAICompatibleOptions(base_url=address, cache="fast")

    async def work() -> list[Any]:
        async with OpenAICompatibleBackend(options) as backend:
            request = SampleRequest("k", "emoji", "smol", PROMPT, settings, prefix=prefix)
            return [item async for item in backend.sample([request])]

    (sample,) = asyncio.run(work())
    assert isinstance(sample, Sample), sample
    assert "🌊" in sample.response.text
    assert any(position.sampled.token == "" for position in sample.response.positions)
    for position in sample.response.positions:
        assert len(position.top) == 5
        assert position.top[0].token_id == position.sampled.token_id


LLAMA = Subject(
    OpenAICompatibleBackend,
    "smol",
    "no-such",
    changed_options=[{"cache": "off"}],
    without=frozenset({"wanted_tokens"}),
    noise_nats=0.8,
)


@pytest.mark.parametrize("check", checks_for(LLAMA), ids=str)
def test_contract_of_llama_cpp(check: Check, address: str) -> None:
    LLAMA.options = {"base_url": address, "cache": "fast"}  # uncached it evaluates three positions a second
    check.run(LLAMA)


# Tokens are asked for by name where P's ids are the server's, which those of the suite are not (tests/…/test_vllm.py).
VLLM = Subject(OpenAICompatibleBackend, "smol", "no-such", without=frozenset({"wanted_tokens"}), noise_nats=1e-4)


@pytest.fixture(scope="module")
def vllm_shaped() -> Iterator[VllmShaped]:
    with VllmShaped(longest=1000) as server:
        yield server


@pytest.mark.parametrize("check", checks_for(VLLM), ids=str)
def test_contract_of_vllm(check: Check, vllm_shaped: VllmShaped) -> None:
    VLLM.options = {"base_url": vllm_shaped.address}
    check.run(VLLM)
