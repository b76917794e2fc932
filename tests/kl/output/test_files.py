"""Tables: names, and bytes that depend on the rows alone."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from kl.estimators.divergence import ESTIMATOR_VERSION
from kl.output.files import (
    METADATA_KEY,
    RUN_KEY,
    result_paths,
    write_candidates,
    write_part,
    write_responses,
    write_tokens,
)
from kl.statistics.summary import RunFacts
from kl.tables.responses import RESPONSES, summarise_responses
from kl.tables.schemas import CANDIDATES, TOKENS
from kl.tables.totals import TokenTableError

Build = Callable[..., pl.DataFrame]


@pytest.mark.parametrize(
    ("sources", "targets"),
    [
        pytest.param(["a.json"], ["a_kl.json"], id="stem"),
        pytest.param(["x/a.json", "y/a.json"], ["x/a_kl.json", "y/a_kl.json"], id="folders are mirrored"),
        pytest.param(["a.json", "a.jsonl"], ["a.json_kl.json", "a.jsonl_kl.json"], id="two endings of one stem"),
        pytest.param(
            ["a.json", "a.jsonl", "a.json.json"],
            ["a.json_kl.json", "a.jsonl_kl.json", "a.json.json_kl.json"],
            id="a whole name that meets a stem",
        ),
        pytest.param(["noending"], ["noending_kl.json"], id="no ending"),
    ],
)
def test_every_input_file_has_its_own_result_path(sources: list[str], targets: list[str]):
    assert result_paths(sources) == dict(zip(sources, targets, strict=True))


@pytest.mark.parametrize("source", ["/etc/a.json", "../a.json", "x/../../a.json", ""])
def test_paths_outside_the_input_directory_are_refused(source: str):
    with pytest.raises(ValueError, match="not a path below the input directory"):
        result_paths([source])


def test_a_file_named_twice_is_refused():
    with pytest.raises(ValueError, match="named 2 times"):
        result_paths(["a.json", "a.json"])


def write_parts(token_table: Build, folder: Path, sizes: list[int]) -> list[Path]:
    rng = np.random.default_rng(8)
    paths = [folder / f"{i:06}.parquet" for i in range(len(sizes))]
    for i, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        answers = [(f"f{i}", f"p{i}", 0, rng.gamma(1.0, 1.0, size).tolist())] if size else []
        write_part(token_table(answers), path)
    return paths


def test_parts_are_joined_in_their_order(token_table: Build, tmp_path: Path):
    parts = write_parts(token_table, tmp_path / ".parts", [5, 0, 3, 7])
    write_tokens(parts, tmp_path / "tokens.parquet")
    joined = pl.read_parquet(tmp_path / "tokens.parquet")
    assert joined.schema == TOKENS
    assert joined.equals(pl.concat([pl.read_parquet(part) for part in parts]))


def test_same_parts_give_the_same_bytes(token_table: Build, tmp_path: Path):
    parts = write_parts(token_table, tmp_path / ".parts", [30_000, 1, 90_000, 0, 20_000, 45_000])
    digests = set()
    for _ in range(6):
        write_tokens(parts, tmp_path / "tokens.parquet")
        digests.add(hashlib.sha256((tmp_path / "tokens.parquet").read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("n_parts", [pytest.param(0, id="no part"), pytest.param(2, id="empty parts")])
def test_empty_data_set_is_a_table_with_its_columns(token_table: Build, tmp_path: Path, n_parts: int):
    write_tokens(write_parts(token_table, tmp_path, [0] * n_parts), tmp_path / "tokens.parquet")
    frame = pl.read_parquet(tmp_path / "tokens.parquet")
    assert (frame.height, frame.schema) == (0, TOKENS)


@pytest.mark.parametrize("name", ["run[1]", "model=x", "what?*"])
def test_folder_names_are_neither_patterns_nor_partitions(token_table: Build, tmp_path: Path, name: str):
    parts = write_parts(token_table, tmp_path / name, [2])
    write_tokens(parts, tmp_path / name / "tokens.parquet")
    assert pl.read_parquet(tmp_path / name / "tokens.parquet", glob=False, hive_partitioning=False).height == 2


def test_a_part_with_other_columns_is_refused_and_leaves_nothing(token_table: Build, tmp_path: Path):
    part = tmp_path / "000000.parquet"
    token_table([("a", "p", 0, [1.0])]).drop("pi").write_parquet(part)
    with pytest.raises(pl.exceptions.PolarsError):
        write_tokens([part], tmp_path / "tokens.parquet")
    assert os.listdir(tmp_path) == ["000000.parquet"]


def test_a_part_with_nan_is_refused(token_table: Build, tmp_path: Path):
    tokens = token_table([("a", "p", 0, [1.0])]).with_columns(kl_floor=pl.lit(math.nan))
    with pytest.raises(TokenTableError, match="kl_floor"):
        write_part(tokens, tmp_path / "000000.parquet")
    assert os.listdir(tmp_path) == []


def test_response_table_is_written(token_table: Build, tmp_path: Path):
    rows = summarise_responses(token_table([("a", "p", 0, [1.0])]).lazy())
    write_responses(rows, tmp_path / "responses.parquet")
    assert pl.read_parquet(tmp_path / "responses.parquet").equals(rows)


def test_every_column_of_the_tables_is_described_in_the_file(token_table: Build, tmp_path: Path):
    tokens = token_table([("a", "p", 0, [1.0])])
    write_part(tokens, tmp_path / "part.parquet")
    write_tokens([tmp_path / "part.parquet"], tmp_path / "tokens.parquet")
    write_responses(summarise_responses(tokens.lazy()), tmp_path / "responses.parquet")
    for name, schema in (("tokens.parquet", TOKENS), ("responses.parquet", RESPONSES)):
        told = json.loads(pl.read_parquet_metadata(tmp_path / name)[METADATA_KEY])
        assert list(told) == list(schema)
        assert all(column["about"] for column in told.values())
    assert told["kl_mean_per_token"]["unit"] == "nats/token"
    assert "unit" not in told["model"]


def test_a_table_says_what_was_compared_and_how(token_table: Build, tmp_path: Path):
    tokens = token_table([("a", "p", 0, [1.0])])
    write_part(tokens, tmp_path / "part.parquet")
    facts = RunFacts("p-model", "q-model", "censored", 20, 0.2, [], None)
    write_tokens([tmp_path / "part.parquet"], tmp_path / "tokens.parquet", facts)
    write_candidates([], tmp_path / "candidates.parquet", facts)
    write_responses(summarise_responses(tokens.lazy()), tmp_path / "responses.parquet", facts)
    for name, columns in (("tokens", TOKENS), ("candidates", CANDIDATES), ("responses", RESPONSES)):
        metadata = pl.read_parquet_metadata(tmp_path / f"{name}.parquet")
        assert list(json.loads(metadata[METADATA_KEY])) == list(columns)
        assert json.loads(metadata[RUN_KEY]) == {
            "model_p": "p-model",
            "model_q": "q-model",
            "estimator": "censored",
            "estimator_version": ESTIMATOR_VERSION,
            "top_logprobs": 20,
            "wanted_tokens": False,
        }
