"""The positions of a finished run at which two models differ most, with all that is needed to go on from there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import polars as pl

from backends.errors import ConfigError
from flows.config.comparison import Comparison
from flows.config.models import RunConfig
from flows.config.reading import validate
from flows.config.templates import RunValues, escaped
from flows.folder.finished import Rows
from flows.stages.dry_run import discovered
from flows.stages.inputs import find_inputs, read_inputs
from kl.columns import NO_ID, Positions
from kl.finished.run import Run
from kl.input.writer import candidate_entry, prompt_fields
from kl.records import Candidate, Response, Score
from kl.tables.schemas import TOKENS
from kl.tables.totals import IS_INFINITE, MEASURED

ScoreName = Literal["kl", "lower", "normalized"]

_PLACE = ("source_file", "response_idx", "position")
_FIGURES = (
    *("kl_estimate", "kl_lower", "kl_upper_plausible", "kl_exact", "reverse_kl_estimate"),
    *("logprob_p", "logprob_q", "entropy_p", "entropy_q"),
)


def high_positions(run: Run, threshold: float, score: ScoreName) -> Rows:
    """The measured positions whose score is at least the threshold, the highest first.

    Parameters
    ----------
    run : Run
    threshold : float
        In nats; of ``normalized`` without unit.
    score : {"kl", "lower", "normalized"}
        The estimate, the certified lower bound, or the estimate by the sum of both models' entropies. An infinite KL
        is above every threshold.

    Returns
    -------
    list of dict
        Rows of the token table with ``score``, which is infinite where the KL is.
    """
    infinite = pl.lit(float("inf"))
    total = pl.col("entropy_p") + pl.col("entropy_q")
    plain = {
        "kl": pl.col("kl_estimate"),
        "lower": pl.col("kl_lower"),
        "normalized": pl.when(total > 0).then(pl.col("kl_estimate") / total).otherwise(0.0),
    }[score]
    value = plain if score == "lower" else pl.when(IS_INFINITE).then(infinite).otherwise(plain)
    chosen = run.tokens.filter(MEASURED).with_columns(score=value).filter(pl.col("score") >= threshold)
    order = ["score", *_PLACE]
    return chosen.sort(order, descending=[True, False, False, False]).collect().to_dicts()


def continuations(run: Run, rows: Rows) -> Rows:
    """Records of such positions, for ``flows.sample`` to go on from: prompt, prefix, token, scores, both lists.

    The lists are those of the candidate table; of a run without one, P's from its responses and Q's from the scores.

    Raises
    ------
    ConfigError
        If P's responses are not there any more, or without a candidate table the backend of the run.
    """
    if not rows:
        return []
    config = _config_of(run)
    lists_of = _StoredLists(config).of if run.candidates is None else _KeptLists(run.candidates, rows).of
    wanted: dict[tuple[str, int], list[int]] = {}
    for number, row in enumerate(rows):
        wanted.setdefault((row["source_file"], row["response_idx"]), []).append(number)
    found: dict[int, dict[str, Any]] = {}
    for response in _responses(config, {place[0] for place in wanted}):
        numbers = wanted.pop((response.source_file, response.response_idx), [])
        if numbers:
            chosen = [rows[number] for number in numbers]
            records = _records(config, response, chosen, lists_of(response, [row["position"] for row in chosen]))
            found |= zip(numbers, records, strict=True)
    if wanted:
        missing = next(iter(wanted))
        raise ConfigError(
            f"the response {missing[0]}#{missing[1]} of the run in {run.folder} is not in "
            f"{config.input_dir} any more; bring the input back to its place."
        )
    return [found[number] for number in range(len(rows))]


def _config_of(run: Run) -> RunConfig:
    """How the run was set, with its folder where it is now."""
    config = dict(run.record["config"])
    here = {"output_dir": escaped(str(run.folder)), "input_dir": escaped(str(config["input_dir"])), "history": None}
    return validate(RunConfig, {name: item for name, item in (config | here).items() if name in RunConfig.model_fields})


def _responses(config: RunConfig, sources: set[str]) -> Iterator[Response]:
    names = {source.rpartition("#")[0] or source for source in sources} | sources
    files = [file for file in find_inputs(config) if file.source_file in names]
    for _, parsed in read_inputs(files):
        yield from parsed.responses


class _Lists(NamedTuple):
    """What both models list at a position; None where Q has no answer."""

    p: Sequence[Candidate]
    q: Sequence[Candidate] | None


class _KeptLists:
    """Lists from the candidate table."""

    def __init__(self, candidates: pl.LazyFrame, rows: Rows) -> None:
        places = pl.DataFrame([{name: row[name] for name in _PLACE} for row in rows], schema_overrides=TOKENS)
        chosen = candidates.join(places.lazy(), on=_PLACE, how="semi").collect(engine="streaming")
        self._rows = {tuple(row[name] for name in _PLACE): row for row in chosen.iter_rows(named=True)}

    def of(self, response: Response, positions: Sequence[int]) -> Iterator[_Lists]:
        """The lists at some positions of a response."""
        for position in positions:
            row = self._rows[response.source_file, response.response_idx, position]
            q = _entries(row, "q")
            n_best = len(q or ()) - (row["n_wanted_q"] or 0)  # what was asked for by name is in no list of the k best
            yield _Lists(_entries(row, "p") or (), None if q is None else q[:n_best])


def _entries(row: Mapping[str, Any], side: str) -> list[Candidate] | None:
    if row[f"{side}_tokens"] is None:
        return None
    columns = (row[f"{side}_{name}"] for name in ("tokens", "logprobs", "token_ids", "bytes"))
    return [Candidate(*entry) for entry in zip(*columns, strict=True)]


class _StoredLists:
    """P's lists from its responses, Q's from the score store: of runs that kept no candidate table."""

    def __init__(self, config: RunConfig) -> None:
        self._comparison = discovered(Comparison.of(config, RunValues.of_a_dry_run()), call=False)
        self._scores = self._comparison.folder.stores().scores

    def of(self, response: Response, positions: Sequence[int]) -> Iterator[_Lists]:
        """The lists at some positions of a response."""
        request = self._comparison.request(response, "q")
        assert request is not None, "Q always has a name"
        keys = dict(zip(request.positions, request.keys, strict=True))
        stored = self._scores.load(response.prompt.prompt_id, [keys[position] for position in positions])
        for position in positions:
            answer = stored.get(keys[position])
            yield _Lists(response.positions[position].top, answer.top if isinstance(answer, Score) else None)


def _records(config: RunConfig, response: Response, rows: Rows, lists: Iterable[_Lists]) -> Rows:
    ends, ids = response.prefix_ends(), Positions.of(response.positions).sampled.ids.tolist()
    unknown = dict(response.gaps)
    records: Rows = []
    for row, listed in zip(rows, lists, strict=True):
        position = row["position"]
        before = ids[:position]
        records.append(
            {
                **prompt_fields(response.prompt),
                "prefix": None if position in unknown else response.text[: ends[position]],
                **({} if NO_ID in before else {"prefix_token_ids": before}),
                "token": row["token"],
                "token_id": row["token_id"],
                "source": {"file": row["source_file"], "response_idx": row["response_idx"], "position": position},
                "score": None if row["score"] == float("inf") else row["score"],
                "is_infinite": row["score"] == float("inf"),
                "scores": {name: row[name] for name in _FIGURES},
                "model1": response.model,
                "model2": config.model2,
                "lists": {
                    "p": [candidate_entry(candidate) for candidate in listed.p],
                    "q": None if listed.q is None else [candidate_entry(candidate) for candidate in listed.q],
                },
            }
        )
    return records
