"""What anybody tries first, and what the documents say of its results."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from kl import headline, load_run
from tests import ROOT
from tests.documents import code_blocks
from tests.programs import Run

NOTEBOOK, READING = (ROOT / "docs" / name for name in ("notebook.md", "reading-the-numbers.md"))
SETTINGS = ("--config", ROOT / "examples/quickstart.yaml")
RESULTS = Path("results/quickstart")


@pytest.fixture(scope="module")
def folder(run_program: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the quickstart was run."""
    folder = tmp_path_factory.mktemp("first")
    done = run_program("flows.run", *SETTINGS, "--output-dir", folder / RESULTS)
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def test_the_quickstart_measures_everything_and_a_second_run_asks_nothing(
    run_process: Run, folder: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(folder / RESULTS, tmp_path / "quickstart")
    tokens = pl.read_parquet(output / "tokens.parquet")
    assert 0.1 < tokens["kl_exact"].mean() < 1.5  # type: ignore[operator]
    assert tokens["error"].null_count() == tokens.height
    assert (tokens["kl_lower"] <= tokens["kl_exact"] + 1e-6).all()
    assert (tokens["entropy_p"] < tokens["entropy_p_upper"]).all(ignore_nulls=False)
    first = {path.name: path.read_bytes() for path in output.glob("*") if path.is_file()}
    parts = sorted(output.glob("scores/*/*.parquet"))

    again = run_process("flows.run", *SETTINGS, "--output-dir", output)
    assert again.code == 0
    assert "0 to ask" in again.err
    assert sorted(output.glob("scores/*/*.parquet")) == parts
    second = {path.name: path.read_bytes() for path in output.glob("*") if path.is_file()}
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} <= {"run.json", "history.parquet", "report.html"}


def test_without_candidates_a_run_keeps_none_and_leaves_no_older_ones(
    run_program: Run, folder: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(folder / RESULTS, tmp_path / "quickstart")
    before = {name: (output / name).read_bytes() for name in ("tokens.parquet", "responses.parquet", "summary.json")}
    done = run_program("flows.run", *SETTINGS, "--output-dir", output, "--no-candidates")
    assert done.code == 0
    assert "0 to ask" in done.err
    assert {name: (output / name).read_bytes() for name in before} == before
    run = load_run(output)
    assert run.candidates is None
    with pytest.raises(LookupError, match=r"has no candidates\.parquet: run the same command again"):
        run.lists("000_why-is-the-sky-blue.json", 0, 0)


def test_every_list_is_matched_as_the_run_matched_it(folder: Path) -> None:
    run = load_run(folder / RESULTS)
    assert run.candidates is not None
    tokens, lists = run.tokens.collect(), run.candidates.collect()
    place = ["source_file", "response_idx", "position"]
    assert tokens.select(place).equals(lists.select(place))
    assert tokens["k_q"].to_list() == lists["q_tokens"].list.len().to_list()
    for row in tokens.sample(40, seed=1).iter_rows(named=True):
        both = run.lists(*(row[name] for name in place))
        shared = both.drop_nulls(["logprob_p", "logprob_q"])
        assert shared.height == row["overlap"]
        assert both.height == row["k_p"] + row["k_q"] - row["overlap"]
        alone = both.filter(pl.col("logprob_q").is_null())["prob_p"].sum()
        assert alone == pytest.approx(row["p_mass_missing_in_q"], abs=1e-9)


def test_a_run_shows_itself(folder: Path) -> None:
    run = load_run(folder / RESULTS)
    label, text = headline(run.summary)[0]
    assert f"{label}: {text}" in repr(run)
    assert len(repr(run).splitlines()) == 2
    shown = run._repr_html_()
    assert "Q differs from P by" in shown
    assert "<td><code>que</code></td>" in shown


@pytest.mark.usefixtures("here")
def test_the_notebook_prints_what_its_document_shows(capsys: pytest.CaptureFixture[str]) -> None:
    blocks, shown = code_blocks(NOTEBOOK, "python"), code_blocks(NOTEBOOK, "text")
    assert len(blocks) == len(shown) == 8
    names: dict[str, Any] = {}
    for block, text in zip(blocks, shown, strict=True):
        exec(compile(block, NOTEBOOK.name, "exec"), names)
        assert capsys.readouterr().out == text
    assert {chart.name for chart in names["charts"]} == {path.stem for path in Path().glob("*.svg")}
    assert all(path.read_text(encoding="utf-8").startswith("<svg") for path in Path().glob("*.svg"))


# Every figure that the summary has is a line over the tables.

# What the tables do not hold, as the document says; and what stands beside a mean, of which one has it all.
NOT_IN_THE_TABLES = ("format", "top_logprobs", "prior_var", "alignment", "sampling", "wanted_tokens", "noise_floor")
BESIDE_A_MEAN = ("se", "ci_low", "ci_high", "n", "n_unknown", "n_clusters", "design_effect", "no_interval")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a summary by their paths, without those that stand beside a mean, and tables."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not ("no_interval" in value and name in BESIDE_A_MEAN):
                yield from leaves(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def at(summary: Any, path: str) -> Any:
    """What stands at a path, whose names may hold dots."""
    while path:
        name = max((name for name in summary if path == name or path.startswith(f"{name}.")), key=len)
        summary, path = summary[name], path[len(name) + 1 :]
    return summary


@pytest.mark.usefixtures("here")
def test_every_figure_is_a_line_over_the_tables() -> None:
    (block,) = (block for block in code_blocks(READING, "python") if "figures = {" in block)
    names: dict[str, Any] = {}
    exec(compile(block, READING.name, "exec"), names)
    figures: dict[str, Any] = names["figures"]
    summary = json.loads((RESULTS / "summary.json").read_text(encoding="utf-8"))
    assert {path for path, _ in leaves(summary) if not path.startswith(NOT_IN_THE_TABLES)} <= figures.keys()
    for path, value in figures.items():
        expected = at(summary, path)
        if isinstance(value, pl.DataFrame):
            rows = [{name: row[name] for name in value.columns} for row in expected]
            assert value.to_dicts() == [pytest.approx(row, abs=1e-9) for row in rows], path
        else:
            assert value == (None if expected is None else pytest.approx(expected, abs=1e-9)), path
    assert len([value for value in figures.values() if value is not None]) > 80
    assert os.fspath(names["run"].folder) == os.fspath(RESULTS)
