"""What Q said at first positions, each time that it was asked: a table of its own, for the runs that come after."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import polars as pl

from flows.config.comparison import Comparison
from flows.stages.inputs import InputFile, read_ahead, read_input
from kl.tables.first_lists import FIRST_LISTS


def write_first_lists(files: Iterable[InputFile], comparison: Comparison, path: Path) -> None:
    """Write the answers on disk, schema `kl.tables.first_lists.FIRST_LISTS`, each context once."""
    scores = comparison.folder.stores().scores
    rows = [pl.DataFrame(schema={"key": pl.String, "asked": pl.Int32, "answer": pl.String})]
    lists: list[pl.DataFrame] = []
    for file in read_ahead(files):
        for response in read_input(file).responses:
            asked = {1: comparison.request(response, "q")}
            asked |= {time: comparison.request(response, time) for time in comparison.repeats()}
            keys = {time: request.keys[0] for time, request in asked.items() if request is not None and request.keys}
            if not keys:
                continue
            names = {"key": keys[1], "asked": [*keys], "answer": [*keys.values()]}
            rows.append(pl.DataFrame(names, schema=rows[0].schema))
            lists.append(scores.rows(response.prompt.prompt_id, keys.values()))
    columns = [name for name in FIRST_LISTS if name not in ("key", "asked")]
    none = pl.DataFrame(schema={"answer": pl.String} | {name: FIRST_LISTS[name] for name in columns})
    answers = pl.concat([none, *(part.select(pl.col("key").alias("answer"), *columns) for part in lists)])
    table = pl.concat(rows).unique("answer", maintain_order=True).join(
        answers.drop_nulls("logprobs").unique("answer"), on="answer", maintain_order="left"
    )  # fmt: skip
    table.select(*FIRST_LISTS).write_parquet(path)
