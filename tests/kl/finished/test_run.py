"""A finished run read back: its lists side by side, its face, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from kl import FinishedRunError, Run, load_run
from kl.columns import Positions
from kl.finished.lists import both_lists
from kl.output.atomic import write_json_atomic
from kl.output.files import (
    write_candidate_part,
    write_candidates,
    write_part,
    write_responses,
    write_summary,
    write_tokens,
)
from kl.records import Candidate, Position, Prompt, Response, Sampling, Score, Turn
from kl.statistics.dataset import summarise_dataset
from kl.statistics.summary import RunFacts
from kl.tables.candidates import candidate_table
from kl.tables.outliers import without_outliers
from kl.tables.pairs import pair_up
from kl.tables.responses import ResponseInfo, summarise_responses
from kl.tables.tokens import Asked, identity, measure_paired
from tests.kl.pairs import gaussian_pair, top_lists

Tops = Sequence[tuple[Candidate, ...]]
HOSTILE = "<script>alert(1)</script>"


def tables_of(
    tops_p: Tops, tops_q: Tops, *, wanted: Sequence[Sequence[Candidate]] = (), has_stop: bool = False
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The tokens and the candidates of one response, whose sampled tokens are P's first."""
    positions = Positions.of([Position(top[0], top) for top in tops_p])
    text = "".join(top[0].token for top in tops_p)
    response = Response("a.json", 0, Prompt((Turn("user", "hi"),)), "p", text, positions, has_stop=has_stop)
    beside = wanted or [()] * len(tops_q)
    asked = Asked(response, [Score(f"k{t}", top, wanted=tuple(beside[t])) for t, top in enumerate(tops_q)])
    trusted = without_outliers(pair_up([asked.answered], keep_lists=True), None)
    identified = identity([asked])
    return measure_paired(identified, trusted, estimator="censored", prior=None), candidate_table(identified, trusted)


def texts(tops: Tops) -> list[tuple[Candidate, ...]]:
    """The same without ids; some are a part of a character, and two have one text."""
    names = {3: "�", 4: "�", 5: "", 6: " the", 7: " the"}
    return [
        tuple(one._replace(token=names.get(one.token_id or 0, one.token), token_id=None) for one in top) for top in tops
    ]


def with_bytes(tops: Tops) -> list[tuple[Candidate, ...]]:
    """The same with bytes in the place of ids."""
    return [tuple(one._replace(token_id=None, token_bytes=one.token.encode()) for one in top) for top in tops]


def ending(tops: Tops, name: str) -> list[tuple[Candidate, ...]]:
    """The same, at the last position with an end of the turn above all others."""
    lower = [one._replace(logprob=(one.logprob or 0.0) - 2.0, token_id=None) for one in tops[-1]]
    return [*tops[:-1], (Candidate(name, -0.4), *lower)]


def not_listed(tops_p: Tops, tops_q: Tops, logq: np.ndarray) -> list[list[Candidate]]:
    """Q's values of what P lists and Q does not."""
    return [
        [
            one._replace(logprob=float(row[one.token_id or 0]))
            for one in p
            if one.token_id not in {other.token_id for other in q}
        ]
        for p, q, row in zip(tops_p, tops_q, logq, strict=True)
    ]


def cases() -> list[Any]:
    logs = gaussian_pair(11, 30, 60, 0.8)
    p, q = (top_lists(side, 12) for side in logs)
    plain = [tuple(one._replace(token_id=None) for one in top) for top in p]
    ends = ending(plain, "<|im_end|>"), ending(texts(q), "</s>")
    return [
        pytest.param(p, q, {}, "id", id="ids"),
        pytest.param(texts(p), texts(q), {}, "text", id="texts of several tokens and parts of characters"),
        pytest.param(plain, with_bytes(q), {}, "text", id="bytes of one side"),
        pytest.param(with_bytes(p), with_bytes(q), {}, "bytes", id="bytes of both"),
        pytest.param(p, q, {"wanted": not_listed(p, q, logs[1])}, "id", id="tokens asked for by name"),
        pytest.param(*ends, {"has_stop": True}, "text", id="ends of turns under two names"),
    ]


@pytest.mark.parametrize(("tops_p", "tops_q", "more", "key"), cases())
def test_lists_are_matched_as_they_were_measured(tops_p: Tops, tops_q: Tops, more: dict, key: str) -> None:
    tokens, candidates = tables_of(tops_p, tops_q, **more)
    assert set(tokens["align_key"]) == {key}
    n_unclear = 0
    for row in tokens.to_dicts():
        both = both_lists(tokens.lazy(), candidates.lazy(), "a.json", 0, row["position"])
        shared = both.drop_nulls(["logprob_p", "logprob_q"])
        assert shared.height == row["overlap"], row["position"]
        only_p = both.filter(pl.col("logprob_q").is_null() & ~pl.col("unclear"))["prob_p"].sum()
        assert only_p == pytest.approx(row["p_mass_missing_in_q"], abs=1e-9)
        assert both["rank_p"].drop_nulls().is_sorted()
        assert both["rank_q"].max() <= len(tops_q[row["position"]])  # of what was asked for by name it is not known
        n_unclear += int(both["unclear"].sum())
    assert (n_unclear > 0) == ("�" in {one.token for top in (*tops_p, *tops_q) for one in top})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose texts and names are hostile."""
    folder = tmp_path_factory.mktemp("run")
    logs = gaussian_pair(2, 12, 300, 0.5)
    tops_p, tops_q = ([(top[0]._replace(token=HOSTILE), *top[1:]) for top in top_lists(side, 10)] for side in logs)
    tokens, candidates = tables_of(tops_p, tops_q)
    tokens = tokens.with_columns(source_file=pl.lit(f"{HOSTILE}.json"))
    candidates = candidates.with_columns(source_file=pl.lit(f"{HOSTILE}.json"))
    write_part(tokens, folder / "part")
    write_candidate_part(candidates, folder / "lists")
    write_tokens([folder / "part"], folder / "tokens.parquet")
    write_candidates([folder / "lists"], folder / "candidates.parquet")
    infos = [ResponseInfo(f"{HOSTILE}.json", 0, tokens["prompt_id"][0], "p", "stop")]
    write_responses(summarise_responses(tokens.lazy(), infos), folder / "responses.parquet")
    facts = RunFacts(f"p {HOSTILE}", f"q {HOSTILE}", "censored", 10, 0.2, [Sampling(1.0, 1.0, 0)], None)
    write_summary(summarise_dataset(tokens.lazy(), infos, facts), folder / "summary.json")
    write_json_atomic(folder / "run.json", {"model2": "q"})
    return folder


def test_a_run_is_its_figures_and_its_tables(finished: Path) -> None:
    run = load_run(str(finished))
    assert isinstance(run, Run)
    assert run.folder == finished
    assert run.record == {"model2": "q"}
    assert run.candidates is not None
    assert run.tokens.collect().height == run.candidates.collect().height == run.summary.counts.positions == 12
    assert run.worst_positions(3)["kl_estimate"].is_sorted(descending=True)
    assert run.worst_responses(3).height == 1
    labelled = run.tokens_labelled.select("p", "q", "run").unique().collect().rows()
    assert labelled == [(f"p {HOSTILE}", f"q {HOSTILE}", str(finished))]


def test_texts_are_shown_and_do_nothing(finished: Path) -> None:
    run = load_run(finished)
    shown = run._repr_html_()
    assert HOSTILE not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert run.summary.warnings
    assert f"{len(run.summary.warnings)} warning" in repr(run)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        pytest.param((f"{HOSTILE}.jsn", 0, 0), "has no file '<script>.*Did you mean '<script>", id="file"),
        pytest.param((f"{HOSTILE}.json", 3, 0), "has the responses 0, not 3", id="response"),
        pytest.param((f"{HOSTILE}.json", 0, 12), "has the positions 0 to 11, not 12", id="position"),
        pytest.param((f"{HOSTILE}.json", 0, -1), "has the positions 0 to 11, not -1", id="no position from the end"),
    ],
)
def test_a_place_that_is_not_there_is_named(finished: Path, place: tuple[str, int, int], message: str) -> None:
    with pytest.raises(LookupError, match=message):
        load_run(finished).lists(*place)


def test_an_earlier_run_has_no_candidates_and_null_columns(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "earlier")
    (folder / "candidates.parquet").unlink()
    fewer = pl.read_parquet(folder / "tokens.parquet").drop("tv_exact", "flags")
    fewer.write_parquet(folder / "tokens.parquet")
    run = load_run(folder)
    assert run.candidates is None
    assert run.tokens.collect()["tv_exact"].null_count() == 12
    with pytest.raises(LookupError, match=r"has no candidates\.parquet: run the same command again"):
        run.lists(f"{HOSTILE}.json", 0, 0)


def test_what_is_no_finished_run_is_refused_in_one_line(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(FinishedRunError, match="not a folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(FinishedRunError, match="gs://b/o is not on a disk"):
        load_run("gs://b/o")
    lists = pl.read_parquet(folder / "candidates.parquet")
    lists.head(5).write_parquet(folder / "candidates.parquet")
    with pytest.raises(FinishedRunError, match=r"12 positions, candidates\.parquet holds 5"):
        load_run(folder)
    lists.drop("q_bytes").write_parquet(folder / "candidates.parquet")
    with pytest.raises(FinishedRunError, match="columns q_bytes are absent"):
        load_run(folder)
    (folder / "candidates.parquet").write_bytes(b"PAR1")
    with pytest.raises(FinishedRunError, match=r"candidates\.parquet cannot be read") as raised:
        load_run(folder)
    assert "\n" not in str(raised.value)
    (folder / "candidates.parquet").unlink()
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    write_json_atomic(folder / "summary.json", summary | {"format": 99})
    with pytest.raises(FinishedRunError, match=r"summary\.json was written by another version"):
        load_run(folder)
    (folder / ".parts").mkdir()
    with pytest.raises(FinishedRunError, match="is not finished"):
        load_run(folder)


def test_no_list_is_null_and_a_list_alone_is_shown(finished: Path) -> None:
    tops = top_lists(gaussian_pair(3, 2, 50, 0.1)[0], 4)
    tokens, candidates = tables_of(tops, tops)
    alone = candidates.with_columns(
        pl.when(pl.col("position") == 0).then(None).otherwise(pl.col(name)).alias(name)
        for name in ("q_tokens", "q_token_ids", "q_logprobs", "q_bytes")
    )
    both = both_lists(tokens.lazy(), alone.lazy(), "a.json", 0, 0)
    assert both["logprob_q"].to_list() == [None] * 4
    assert both["logprob_p"].to_list() == [one.logprob for one in tops[0]]
    assert np.isclose(both["prob_p"].sum(), tokens["coverage_p"][0])
