"""The KL between what two runs had from their models at the same contexts: Q then against Q now, or one Q and another.

Both runs kept Q's lists, so that nothing is asked. The lists of the first run stand in P's place and are compared
exactly as P's and Q's are: the same checks, estimators and bounds, with a spread of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from kl.columns import NO_ID, BoolArray, Entries, Positions, TopLists
from kl.estimators.censored import SpreadEvidence, SpreadPrior, pooled_prior
from kl.estimators.outliers import spread_evidence
from kl.finished.worst import PLACE
from kl.records import Defect, Prompt, Response, ScoreFailure
from kl.scores import FACTS, Scores, ScoreTable
from kl.statistics.breakdowns import missing_by_reason
from kl.statistics.clusters import per_response, per_token
from kl.statistics.intervals import Estimate
from kl.tables.outliers import without_outliers
from kl.tables.pairs import Answered, Paired, pair_up
from kl.tables.responses import info_frame, response_rows
from kl.tables.schemas import TOKENS
from kl.tables.tokens import measure_paired
from kl.tables.totals import RESPONSE_KEYS, TokenTableError, batch_totals, merge_totals

_BATCH_ROWS = 16_384  # positions of both runs that are in memory with their lists
_OF_TOKENS = ("prompt_id", "token", "token_id", "is_stop", "selected", "pi", "n_dropped", "align_key")
_OF_LISTS = ("q_tokens", "q_token_ids", "q_logprobs", "q_bytes", "n_wanted_q")
_NO_CONTEXT = Defect("no-same-context", "The other run has no such context at this place.")
_NO_LIST = "not-in-both-runs"  # the reason of a context of both runs that one of them has no list of Q for


class QLists(NamedTuple):
    """The tables of a run that hold Q's lists, row for row (`kl.tables.schemas`), and what it is called in errors."""

    name: str
    tokens: pl.LazyFrame
    candidates: pl.LazyFrame


@dataclass(frozen=True, slots=True)
class Between:
    """KL(first‖second) in nats, over the contexts that both runs have a list of Q for.

    The intervals are clustered by prompt. ``n_contexts`` are the same in both runs, ``n_measured`` of them have two
    lists that can be compared; ``missing`` says by reason why others have not. ``n_only_first`` and ``n_only_second``
    positions have no context in the other run and take no part, and ``example`` is one of them. ``responses`` is the
    response table (`kl.tables.responses.RESPONSES`), by which prompts are paired; ``not_whole`` names (columns
    `RESPONSE_KEYS`) those with positions of the second run that the first has no such context of.
    """

    per_token: Estimate
    per_response: Estimate
    lower: Estimate
    plausible_upper: Estimate
    same_top_token: Estimate
    n_contexts: int
    n_measured: int
    n_only_first: int
    n_only_second: int
    example: str | None
    missing: dict[str, int]
    responses: pl.DataFrame = field(repr=False)
    not_whole: pl.DataFrame = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """The figures and counts as plain values."""
        return {name: value for name, value in asdict(self).items() if name not in ("responses", "not_whole")}


def kl_between(first: QLists, second: QLists, estimator: str = "censored") -> Between:
    """KL of the first run's Q from the second's, from the lists that they keep.

    A context is the same if file, response and position are, and the prompt with every token before the position. The
    files are read twice, some positions at a time: memory does not grow with the tables. Where one run sampled
    positions, those that it took are weighted by its π; a response of which both took other ones takes no part.

    Parameters
    ----------
    first, second : QLists
        The first stands in P's place: what it lists gives the expectation.
    estimator : str
        One of `kl.estimators.divergence.ESTIMATORS`.

    Raises
    ------
    TokenTableError
        If the two tables of a run do not belong together.
    """
    ranges = list(_file_ranges(first, second))
    evidence = [
        SpreadEvidence.none() if paired.aligned is None else spread_evidence(paired.aligned)
        for _, paired in _paired_parts(first, second, ranges)
    ]
    prior = pooled_prior(SpreadEvidence.total(evidence))
    totals: list[pl.DataFrame] = []
    apart = [pl.DataFrame(schema={name: TOKENS[name] for name in RESPONSE_KEYS})]
    missing: dict[str, int] = {}
    n_contexts = n_only_first = n_only_second = 0
    example: str | None = None
    for part, paired in _paired_parts(first, second, ranges):
        rows = _measured(part, paired, estimator, prior)
        totals.append(batch_totals(rows))
        for reason, count in missing_by_reason(rows.lazy()).items():
            missing[reason] = missing.get(reason, 0) + count
        n_contexts += int(part.same.sum())
        n_only_first += part.n_only_first
        n_only_second += int((~part.same).sum())
        apart.append(part.rows.filter(~pl.col("same")).select(RESPONSE_KEYS).unique())
        example = example or part.example
    missing.pop(_NO_CONTEXT.reason, None)
    merged = merge_totals(totals) if totals else batch_totals(pl.DataFrame(schema=TOKENS))
    return Between(
        per_token(merged, "kl_estimate"),
        per_response(merged, "kl_estimate"),
        per_token(merged, "kl_lower"),
        per_token(merged, "kl_upper_plausible"),
        per_token(merged, "same_top_token"),
        n_contexts,
        int(merged["n_measured"].sum()),
        n_only_first,
        n_only_second,
        example,
        missing,
        response_rows(merged, info_frame(())),
        pl.concat(apart),
    )


def _file_ranges(first: QLists, second: QLists) -> Iterator[tuple[str, str]]:
    """First and last file of runs of files that hold about a batch of rows."""
    names = pl.concat([lists.tokens.select("source_file") for lists in (first, second)])
    sizes = names.group_by("source_file").len().collect().sort("source_file")
    batch = (sizes["len"].cum_sum() - sizes["len"]) // _BATCH_ROWS
    grouped = sizes.group_by(batch.alias("batch"), maintain_order=True)
    ends = grouped.agg(pl.col("source_file").first().alias("first"), pl.col("source_file").last().alias("last"))
    yield from zip(ends["first"], ends["last"], strict=True)


class _Part(NamedTuple):
    """The N positions of some files of the second run, beside those of the first (columns that end with ``_first``).

    ``same`` says which contexts are the same in both, shape (N,).
    """

    rows: pl.DataFrame
    same: BoolArray
    n_only_first: int
    example: str | None


def _paired_parts(first: QLists, second: QLists, ranges: list[tuple[str, str]]) -> Iterator[tuple[_Part, Paired]]:
    for names in ranges:
        part = _part(_rows(first, names), _rows(second, names))
        if part.rows.height or part.n_only_first:
            yield part, _pair(part)


def _rows(lists: QLists, names: tuple[str, str]) -> pl.DataFrame:
    inside = pl.col("source_file").is_between(pl.lit(names[0]), pl.lit(names[1]))
    tokens = lists.tokens.filter(inside).select(*PLACE, *_OF_TOKENS).collect()
    candidates = lists.candidates.filter(inside).select(*PLACE, *_OF_LISTS).collect()
    if not tokens.select(PLACE).equals(candidates.select(PLACE)):
        raise TokenTableError(f"the token table and the candidate table of {lists.name} are not of one run.")
    return pl.concat([tokens, candidates.drop(PLACE)], how="horizontal")


def _part(first: pl.DataFrame, second: pl.DataFrame) -> _Part:
    rows = second.join(first, on=PLACE, how="left", suffix="_first", maintain_order="left")
    own = (pl.col("prompt_id") == pl.col("prompt_id_first")).fill_null(False)
    agrees = pl.col("token").eq_missing(pl.col("token_first")).cast(pl.UInt8)
    before = agrees.shift(1, fill_value=1).cum_min().over(RESPONSE_KEYS) == 1
    # One model's sample of positions depends on the whole response: where that differs, so do the samples.
    both_sampled = (pl.col("pi") < 1) & (pl.col("pi_first") < 1)
    apart = both_sampled & ((pl.col("pi") != pl.col("pi_first")) | (pl.col("selected") != pl.col("selected_first")))
    rows = rows.with_columns(same=own & before & ~apart.any().over(RESPONSE_KEYS).fill_null(False))
    known = rows.filter("same").select(PLACE)
    only_first = first.join(known, on=PLACE, how="anti", maintain_order="left").select(PLACE)
    odd = pl.concat([rows.filter(~pl.col("same")).select(PLACE), only_first]).head(1)
    example = next((f"{file}#{index} position {position}" for file, index, position in odd.iter_rows()), None)
    rows = rows.with_columns(
        selected=pl.when("same").then(pl.col("selected") & pl.col("selected_first")).otherwise("selected"),
        pi=pl.when("same").then(pl.min_horizontal("pi", "pi_first")).otherwise("pi"),
    )
    return _Part(rows, rows["same"].to_numpy(), only_first.height, example)


def _pair(part: _Part) -> Paired:
    rows, n = part.rows, part.rows.height
    drawn = rows["selected"].to_numpy()
    has_first = part.same & rows["q_tokens_first"].is_not_null().to_numpy()
    has_second = rows["q_tokens"].is_not_null().to_numpy()
    absent = Defect(_NO_LIST, "The first run has no list of Q here.")
    sampled = Entries.from_lists(rows["token"].to_list(), [None] * n, rows["token_id"].to_list())
    tops, _ = _lists(rows, has_first, "_first")
    at = np.where(has_first, np.cumsum(has_first) - 1, -1)
    positions = Positions(
        sampled,
        tops.take(at),
        np.where(has_first, rows["n_dropped_first"].fill_null(0).to_numpy(), 0),
        np.zeros(n, dtype=np.bool_),
        {t: absent if part.same[t] else _NO_CONTEXT for t in np.flatnonzero(~has_first).tolist()},
    )
    scores = _scores(rows, has_second)
    lengths = rows.group_by(RESPONSE_KEYS, maintain_order=True).agg(pl.len(), pl.col("is_stop").last())
    answered: list[Answered] = []
    start = 0
    for file, index, length, has_stop in lengths.iter_rows():
        stop = start + length
        response = Response(
            file, index, Prompt(()), None, "", positions.part(start, stop), has_stop=bool(has_stop)
        )  # fmt: skip
        failures = {t - start: scores.failures[t] for t in range(start, stop) if t in scores.failures}
        said = Scores(scores.table, scores.rows[start:stop], failures)
        answered.append(Answered(response, said, drawn[start:stop]))
        start = stop
    return pair_up(answered)


def _scores(rows: pl.DataFrame, has: BoolArray) -> Scores:
    """What Q said in the second run, as it came from its backend."""
    tops, wanted = _lists(rows, has, "")
    n = len(tops)
    nothing = {name: pl.Series([None], dtype=kind).new_from_index(0, n) for name, kind in FACTS.items()}
    n_dropped = rows.filter(pl.Series(has))["n_dropped"].fill_null(0).cast(pl.Int64)
    facts = pl.DataFrame(nothing | {"key": pl.Series([""]).new_from_index(0, n), "n_dropped": n_dropped})
    table = ScoreTable(tops, Entries.of([None] * n), facts, wanted if wanted.lengths.any() else None)
    absent = ScoreFailure("", _NO_LIST, "The second run has no list of Q here.")
    return Scores(table, np.where(has, np.cumsum(has) - 1, -1), dict.fromkeys(np.flatnonzero(~has).tolist(), absent))


def _lists(rows: pl.DataFrame, has: BoolArray, suffix: str) -> tuple[TopLists, TopLists]:
    """Q's k best of the positions that have a list, and what it was asked for by name beside them."""
    names = [f"{name}{suffix}" for name in (*_OF_LISTS, "align_key")]
    found = rows.filter(pl.Series(has)).select(pl.col(names).name.map(lambda name: name.removesuffix(suffix)))
    lengths = found["q_tokens"].list.len().cast(pl.Int64).to_numpy()
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    flat = found.select(pl.col(name).list.explode(keep_nulls=False, empty_as_null=False) for name in _OF_LISTS[:4])
    tokens = flat["q_tokens"]
    stated = flat["q_bytes"]
    # Of a run that matched by bytes every entry states them; those that are the text's own are not written twice.
    by_bytes = pl.Series(np.repeat(found["align_key"].eq_missing("bytes").to_numpy(), lengths))
    stated = pl.select(pl.when(stated.is_null() & by_bytes).then(tokens.cast(pl.Binary)).otherwise(stated)).to_series()
    entries = Entries(
        tokens.cast(pl.Categorical),
        flat["q_logprobs"].to_numpy(),
        flat["q_token_ids"].fill_null(NO_ID).to_numpy(),
        stated if stated.is_not_null().any() else None,
    )
    lists = TopLists(entries, offsets)
    n_wanted = found["n_wanted_q"].fill_null(0).cast(pl.Int64).to_numpy()
    is_wanted = np.arange(len(entries)) >= np.repeat(offsets[1:] - n_wanted, lengths)
    return lists.kept(~is_wanted), lists.kept(is_wanted)


def _measured(part: _Part, paired: Paired, estimator: str, prior: SpreadPrior | None) -> pl.DataFrame:
    identified = part.rows.select(
        *RESPONSE_KEYS, "prompt_id", "position", "token", "token_id", "is_stop", "selected", "pi",
        logprob_p=pl.lit(None, dtype=pl.Float64),
    )  # fmt: skip
    trusted = without_outliers(paired, prior)
    return measure_paired(identified, trusted, estimator=estimator, prior=prior)
