"""How fast the results of measured positions are written: `*_kl.json`, `tokens.parquet`, and the summary of all.

    python benchmarks/writing.py                                # 50,000 positions, 5 times
    python benchmarks/writing.py --positions 1000 --repeats 1

The token table is drawn; its columns are as full as those of a real run. Figures are processor time of this process,
medians over the repeats: positions a second, megabytes of the file a second, and the ratio of that to Python's own
``json.dumps`` of the same rows. The last line copies as much memory as the JSON has. The table is Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # started as a file, the project itself is not on the path
    sys.path.insert(0, str(ROOT))

from kl.output.atomic import write_many_atomic  # noqa: E402
from kl.output.files import write_part, write_responses, write_tokens  # noqa: E402
from kl.output.kl_json import ResponseText, scored_responses, write_kl_json  # noqa: E402
from kl.statistics.dataset import summarise_dataset  # noqa: E402
from kl.statistics.summary import RunFacts  # noqa: E402
from kl.tables.responses import ResponseInfo, summarise_responses  # noqa: E402
from kl.tables.schemas import TOKENS  # noqa: E402
from kl.tables.totals import token_batches  # noqa: E402

RESPONSES_PER_FILE = 4
MISSING = 0.02
ROWS_OF_A_PART = 8192
WORDS = (" the", " of", "ing", "é", "\n", ' "', "🌊", "�")
FACTS = RunFacts("p", "q", "censored", 20, None, [], None)


class Written(NamedTuple):
    """What a stage took, and how much it wrote."""

    seconds: float
    n_bytes: int


def token_table(positions: int, length: int) -> pl.DataFrame:
    """``positions`` rows of responses of ``length`` tokens, four in a file."""
    rng = np.random.default_rng(0)
    response = np.arange(positions) // length
    columns: dict[str, pl.Series] = {}
    for name, kind in TOKENS.items():
        if kind == pl.Float64:
            columns[name] = pl.Series(rng.gamma(0.5, 1.0, positions))
        elif kind.is_integer():
            columns[name] = pl.Series(rng.integers(0, 50_000, positions))
        elif kind == pl.Boolean:
            columns[name] = pl.Series(rng.random(positions) < 0.5)
        else:
            columns[name] = pl.repeat(None, positions, dtype=pl.String, eager=True)
    numbers = pl.DataFrame(columns).with_columns(
        source_file=pl.Series(response // RESPONSES_PER_FILE).cast(pl.String).str.zfill(8) + ".json",
        prompt_id=pl.Series(response // RESPONSES_PER_FILE).cast(pl.String),
        response_idx=pl.Series(response % RESPONSES_PER_FILE),
        position=pl.Series(np.arange(positions) % length),
        token=pl.Series([WORDS[index] for index in rng.integers(0, len(WORDS), positions)]),
        selected=True,
        pi=1.0,
        align_key=pl.lit("bytes"),
        error=pl.when(pl.Series(rng.random(positions) < MISSING)).then(pl.lit("the service blocked this prefix")),
    )
    missing = pl.col("error").is_not_null()
    unknown = [pl.when(~missing).then(name).alias(name) for name in ("kl_estimate", "kl_lower", "logprob_q")]
    full = numbers.with_columns(*unknown, reason=pl.when(missing).then(pl.lit("blocked")))
    return full.select(pl.col(name).cast(kind) for name, kind in TOKENS.items())


def timed(work: Callable[[], int]) -> Written:
    """Processor time of this process."""
    began = time.process_time()
    n_bytes = work()
    return Written(max(time.process_time() - began, 1e-9), n_bytes)


def write_json_files(tokens: pl.DataFrame, folder: Path) -> Written:
    """The `*_kl.json` of each input file, from the tables."""
    rows = summarise_responses(tokens.lazy())
    texts = [ResponseText(index, "x" * 400) for index in range(RESPONSES_PER_FILE)]
    write = partial(write_kl_json, prompt=None, model_p="p", model_q="q", responses=texts)

    def work() -> int:
        scored = scored_responses(token_batches(tokens.lazy(), TOKENS.names()), rows)
        files = (
            (folder / f"{name}_kl.json", partial(write, scored=of_file))
            for name, of_file in groupby(scored, key=lambda response: response.source_file)
        )
        return sum(path.stat().st_size for path in write_many_atomic(files))

    return timed(work)


def dump_rows(tokens: pl.DataFrame, folder: Path) -> Written:
    """The rows by Python's own encoder."""
    path = folder / "rows.json"
    return timed(lambda: path.write_bytes(json.dumps(tokens.to_dicts(), ensure_ascii=False).encode()))


def write_parquet_files(tokens: pl.DataFrame, folder: Path) -> Written:
    """The parts of the token table, and the table joined from them."""

    def work() -> int:
        parts: list[Path] = []
        for rows in tokens.iter_slices(ROWS_OF_A_PART):
            parts.append(folder / f"{len(parts):08d}.parquet")
            write_part(rows, parts[-1])
        write_tokens(parts, folder / "tokens.parquet")
        return (folder / "tokens.parquet").stat().st_size

    return timed(work)


def summarise(tokens: pl.DataFrame, folder: Path) -> Written:
    """The response table and the summary of the data set."""
    path = folder / "tokens.parquet"
    tokens.write_parquet(path)
    named = tokens.select("source_file", "response_idx").unique(maintain_order=True)
    responses = [ResponseInfo(*row) for row in named.iter_rows()]

    def work() -> int:
        write_responses(summarise_responses(pl.scan_parquet(path), responses), folder / "responses.parquet")
        summarise_dataset(pl.scan_parquet(path), responses, FACTS)
        return path.stat().st_size

    return timed(work)


PLAIN = "json.dumps of the rows"
STAGES: dict[str, Callable[[pl.DataFrame, Path], Written]] = {
    PLAIN: dump_rows,
    "*_kl.json": write_json_files,
    "tokens.parquet, by parts": write_parquet_files,
    "responses.parquet and summary": summarise,
}


def figures(tokens: pl.DataFrame, repeats: int) -> dict[str, Written]:
    """Medians of each stage; they take turns, so that a busy machine disturbs all."""
    found: dict[str, list[Written]] = {name: [] for name in (*STAGES, "copy of the JSON in memory")}
    for _ in range(repeats):
        for name, stage in STAGES.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(stage(tokens, Path(folder)))
        source = np.ones(found["*_kl.json"][-1].n_bytes, dtype=np.uint8)
        found["copy of the JSON in memory"].append(timed(lambda source=source: source.copy().nbytes))
    return {name: Written(median(one.seconds for one in all_), all_[0].n_bytes) for name, all_ in found.items()}


def table(found: dict[str, Written], positions: int) -> str:
    """Markdown."""
    plain = found[PLAIN].seconds
    lines = ["| what | positions/s | MB/s | times json.dumps |", "|---|---|---|---|"]
    for name, (seconds, n_bytes) in found.items():
        rates = f"{positions / seconds:,.0f} | {n_bytes / seconds / 1e6:,.0f} | {plain / seconds:.2f}"
        lines.append(f"| {name} | {rates} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=50_000)
    parser.add_argument("--length", type=int, default=100, help="tokens of a response")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args(arguments)
    tokens = token_table(given.positions, given.length)
    print(table(figures(tokens, given.repeats), given.positions))  # noqa: T201


if __name__ == "__main__":
    main()
