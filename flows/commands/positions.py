"""The positions of a finished run at which two models differ most, with all that is needed to go on from there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import polars as pl

from backends.errors import ConfigError
from flows.config.comparison import Comparison
from flows.config.models import RunConfig
from flows.config.reading import validate
from flows.config.templates import RunValues, escaped
from flows.folder.finished import Rows, read_documents
from flows.stages.dry_run import discovered
from flows.stages.inputs import find_inputs, read_inputs
from kl.columns import NO_ID, Positions
from kl.finished.run import Run
from kl.input.writer import candidate_entry, prompt_fields
from kl.records import Candidate, Response, Score
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

    Raises
    ------
    ConfigError
        If P's responses, or the backend of the run, are not there any more.
    """
    if not rows:
        return []
    comparison = _comparison_of(run)
    wanted: dict[tuple[str, int], list[int]] = {}
    for number, row in enumerate(rows):
        wanted.setdefault((row["source_file"], row["response_idx"]), []).append(number)
    found: dict[int, dict[str, Any]] = {}
    for response in _responses(comparison, {place[0] for place in wanted}):
        numbers = wanted.pop((response.source_file, response.response_idx), [])
        if numbers:
            found |= zip(numbers, _records(comparison, response, [rows[number] for number in numbers]), strict=True)
    if wanted:
        missing = next(iter(wanted))
        raise ConfigError(
            f"the response {missing[0]}#{missing[1]} of the run in {run.folder} is not in "
            f"{comparison.config.input_dir} any more; bring the input back to its place."
        )
    return [found[number] for number in range(len(rows))]


def _comparison_of(run: Run) -> Comparison:
    """What the run was about, with its folder where it is now."""
    config = dict(read_documents(run.folder).run["config"])
    here = {"output_dir": escaped(str(run.folder)), "input_dir": escaped(str(config["input_dir"])), "history": None}
    known = {name: value for name, value in (config | here).items() if name in RunConfig.model_fields}
    return discovered(Comparison.of(validate(RunConfig, known), RunValues.of_a_dry_run()), call=False)


def _responses(comparison: Comparison, sources: set[str]) -> Iterator[Response]:
    names = {source.rpartition("#")[0] or source for source in sources} | sources
    files = [file for file in find_inputs(comparison.config) if file.source_file in names]
    for _, parsed in read_inputs(files):
        yield from parsed.responses


def _records(comparison: Comparison, response: Response, rows: Rows) -> Rows:
    request = comparison.request(response, "q")
    assert request is not None, "Q always has a name"
    keys = dict(zip(request.positions, request.keys, strict=True))
    stored = comparison.folder.stores().scores.load(response.prompt.prompt_id, [keys[row["position"]] for row in rows])
    ends, ids = response.prefix_ends(), Positions.of(response.positions).sampled.ids.tolist()
    unknown = dict(response.gaps)
    records: Rows = []
    for row in rows:
        position = row["position"]
        answer = stored.get(keys[position])
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
                "model2": comparison.config.model2,
                "lists": {
                    "p": _list(response.positions[position].top),
                    "q": _list(answer.top) if isinstance(answer, Score) else None,
                },
            }
        )
    return records


def _list(top: Sequence[Candidate]) -> Rows:
    return [candidate_entry(candidate) for candidate in top]
