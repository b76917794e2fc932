"""Both lists of every position as they were compared, by position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from kl.output.files import CANDIDATE_GROUP_ROWS, write_candidate_part, write_candidates
from kl.records import Candidate, Position, Prompt, Response, Score, ScoreFailure, Turn
from kl.tables.candidates import candidate_table
from kl.tables.outliers import without_outliers
from kl.tables.pairs import Answered, pair_up
from kl.tables.schemas import CANDIDATES
from kl.tables.tokens import Asked, identity, measure_paired
from tests.kl.pairs import gaussian_pair, top_lists

Result = Score | ScoreFailure | None
SIDES = ("tokens", "token_ids", "logprobs", "bytes")


def response_of(positions: Sequence[Position]) -> Response:
    text = "".join(position.sampled.token for position in positions)
    return Response("a.json", 0, Prompt((Turn("user", "hi"),)), "p-model", text, tuple(positions))


def table_of(response: Response, scores: Sequence[Result], drawn: np.ndarray | None = None) -> pl.DataFrame:
    asked = Asked(response, scores, drawn, None if drawn is None else np.full(len(drawn), 0.5))
    trusted = without_outliers(pair_up([asked.answered], keep_lists=True), None)
    return candidate_table(identity([asked]), trusted)


def entries(row: dict, side: str) -> list[tuple] | None:
    columns = [row[f"{side}_{name}"] for name in SIDES]
    if columns[0] is None:
        assert columns == [None] * 4
        return None
    return list(zip(*columns, strict=True))


P = (Candidate("a", -0.2, 1), Candidate("b", -2.5, 2), Candidate("c", -3.0, 3))
Q = (Candidate("b", -0.6, 2), Candidate("a", -1.1, 1), Candidate("d", -3.0, 4))


def plain(top: Sequence[Candidate]) -> list[tuple]:
    return [(one.token, one.token_id, one.logprob, one.token_bytes) for one in top]


def test_lists_are_those_that_were_compared_by_position() -> None:
    """Sorted, without what has no probability; and there, too, where the other side has none or nothing is measured."""
    mixed = (Candidate("b", -2.5, 2), Candidate("a", -0.2, 1), Candidate("x", -9999.0, 9), Candidate("y", None, 8))
    above = (Candidate("a", -0.1, 1), Candidate("b", -0.2, 2))
    positions = [Position(P[0], P)] * 3 + [Position(P[0], mixed), Position(P[0], above), Position(P[0], ())]
    response = response_of([*positions, Position(P[0], P), Position(P[0], P)])
    nothing = (Candidate("a", None, 1),)
    found = [Score(f"k{t}", Q) for t in range(6)]
    scores: list[Result] = [*found, Score("k6", nothing), ScoreFailure("k7", "refused", "no")]
    scores[1] = None
    table = table_of(response, scores)
    assert table.schema == CANDIDATES
    assert table["position"].to_list() == list(range(8))
    rows = table.to_dicts()
    assert [entries(row, "p") for row in rows] == [plain(P)] * 3 + [
        plain((mixed[1], mixed[0])), plain(above), [], plain(P), plain(P),
    ]  # fmt: skip
    assert [entries(row, "q") for row in rows] == [plain(Q), None, *[plain(Q)] * 4, [], None]
    assert table["n_wanted_q"].to_list() == [0, None, 0, 0, 0, 0, 0, None]


def test_a_defective_list_of_p_and_a_position_that_was_not_drawn() -> None:
    response = response_of([Position(P[0], P)] * 2 + [Position(P[0], P, defect=("no-list", "it is not there"))])
    table = table_of(response, [Score("k0", Q), None, Score("k2", Q)], np.array([True, False, True]))
    assert [entries(row, "p") for row in table.to_dicts()] == [plain(P), plain(P), None]
    assert [entries(row, "q") for row in table.to_dicts()] == [plain(Q), None, plain(Q)]


def test_bytes_are_told_where_the_text_does_not_say_them() -> None:
    half = "�"
    stated = (Candidate("a", -0.2, None, b"a"), Candidate(half, -2.0, None, b"\xf0\x9f"), Candidate("é", -3.0, 7))
    signs = (Candidate(half, -0.4, None, half.encode()), Candidate("a", -1.5), Candidate("Ġa", -3.5, None, b" a"))
    (row,) = table_of(response_of([Position(stated[0], stated)]), [Score("k", signs)]).to_dicts()
    assert [entry[3] for entry in entries(row, "p") or ()] == [None, b"\xf0\x9f", None]
    assert [entry[3] for entry in entries(row, "q") or ()] == [half.encode(), None, b" a"]
    assert row["p_token_ids"] == [None, None, 7]


def test_what_was_asked_for_by_name_stands_behind_the_k_best() -> None:
    wanted = (Candidate("c", -7.5, 3),)
    table = table_of(response_of([Position(P[0], P)] * 2), [Score("k0", Q, wanted=wanted), Score("k1", Q)])
    assert [entries(row, "q") for row in table.to_dicts()] == [plain((*Q, *wanted)), plain(Q)]
    assert table["n_wanted_q"].to_list() == [1, 0]


def test_a_position_that_is_set_aside_keeps_its_lists() -> None:
    logp, logq = gaussian_pair(5, 40, 400, 0.05)
    tops_p, tops_q = top_lists(logp, 20), top_lists(logq, 20)
    broken = list(tops_q[7])
    broken[-1] = broken[-1]._replace(logprob=-60.0)
    tops_q[7] = tuple(broken)
    moved = [tops_p[3][0], *(one._replace(logprob=one.logprob - 12.0) for one in tops_p[3][1:2]), *tops_p[3][2:]]
    tops_p[3] = tuple(sorted(moved, key=lambda one: -one.logprob))
    response = response_of([Position(top[0], top) for top in tops_p])
    scores = [Score(f"k{t}", top) for t, top in enumerate(tops_q)]
    asked = Asked(response, scores)
    trusted = without_outliers(pair_up([asked.answered], keep_lists=True), None)
    table = candidate_table(identity([asked]), trusted)
    tokens = measure_paired(identity([asked]), trusted, estimator="censored", prior=None)
    aside = tokens.filter(reason="outlier")["position"].to_list()
    assert aside, "a value that its list contradicts is found"
    rows = table.to_dicts()
    assert [entries(rows[t], "p") for t in aside] == [plain(tops_p[t]) for t in aside]
    measured = tokens.filter(pl.col("error").is_null()).join(table, on=["source_file", "response_idx", "position"])
    assert measured["k_p"].to_list() == measured["p_tokens"].list.len().to_list()
    assert measured["k_q"].to_list() == measured["q_tokens"].list.len().to_list()


def test_bytes_of_the_file_do_not_depend_on_how_the_rows_were_divided(tmp_path: Path) -> None:
    logp, logq = gaussian_pair(6, 50, 300, 0.3)
    response = response_of([Position(top[0], top) for top in top_lists(logp, 8)])
    table = table_of(response, [Score(f"k{t}", top) for t, top in enumerate(top_lists(logq, 8))])
    rows = pl.concat([table] * (CANDIDATE_GROUP_ROWS // 50 + 40))
    written = []
    for cuts in ([0, rows.height], [0, 1, 5_000, 16_385, rows.height], [*range(0, rows.height, 777), rows.height]):
        parts = [tmp_path / f"{len(written)}-{start}.arrow" for start in cuts[:-1]]
        for path, start, stop in zip(parts, cuts[:-1], cuts[1:], strict=True):
            write_candidate_part(rows[start:stop], path)
        write_candidates(parts, tmp_path / "candidates.parquet")
        written.append((tmp_path / "candidates.parquet").read_bytes())
    assert len(set(written)) == 1
    assert pl.read_parquet(tmp_path / "candidates.parquet").equals(rows)


def test_no_part_is_a_table_with_its_columns(tmp_path: Path) -> None:
    write_candidates([], tmp_path / "candidates.parquet")
    assert pl.read_parquet(tmp_path / "candidates.parquet").schema == CANDIDATES


def test_without_the_lists_of_others_nothing_else_changes() -> None:
    response, scores = response_of([Position(P[0], P)] * 3), [Score("k0", Q), None, Score("k2", Q)]
    kept, plainly = (pair_up([Answered(response, scores)], keep_lists=keep) for keep in (True, False))
    assert (kept.missing, len(kept.pairs)) == (plainly.missing, len(plainly.pairs))
    assert plainly.unpaired_p is None
