"""From lists in Parquet to the renormalised estimate and the certified lower bounds, against the usual method.

    python benchmarks/list_bounds.py                         # 8,192 positions of either kind
    python benchmarks/list_bounds.py --positions 200 --repeats 1

The lists of P and Q lie in two files with the columns of the score store. Reading, matching and measuring them are
timed one after the other, in chunks as in a run; the baseline (`benchmarks/baseline.py`) takes its turn with them, and
has its lists in memory. Figures are positions a second of the processor time of this process, and how many times the
baseline that is; medians of the repeats. The table is Markdown.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import polars as pl

if __name__ == "__main__":  # started as a file, the project itself is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backends.scores.rows import frame_of, results_of, row_of
from benchmarks import baseline
from benchmarks.token_rows import CHUNK, Lists, drawn_lists
from kl.columns import TopLists
from kl.estimators.align import align
from kl.estimators.bounds import cells, lower_bounds
from kl.estimators.divergence import floor
from kl.records import Score

COLUMNS = (
    "key", "model_version", "finish_reason", "input_tokens", "output_tokens", "n_dropped", "tokens", "logprobs",
    "token_ids", "token_bytes", "sampled_token", "sampled_logprob", "sampled_id", "reason", "error",
)  # fmt: skip
STAGES = ("read", "match", "floor and lower bounds")
Times = dict[str, float]


def write_lists(lists: Lists, path: Path) -> None:
    """As the score store keeps them."""
    frame_of([row_of("q", Score(f"{number:016x}", top)) for number, top in enumerate(lists)]).write_parquet(path)


def measure(path_p: Path, path_q: Path) -> Times:
    """Processor time of each stage over all positions of two files."""
    spent = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        began = time.process_time()
        yield
        spent[stage] += time.process_time() - began

    with timed("read"):
        tops_p, tops_q = map(read_lists, (path_p, path_q))
    for start in range(0, len(tops_p), CHUNK):
        stop = min(start + CHUNK, len(tops_p))
        with timed("match"):
            aligned = align(tops_p.part(start, stop), tops_q.part(start, stop))
        with timed("floor and lower bounds"):
            floor(aligned)
            lower_bounds(cells(aligned))
    return spent


def read_lists(path: Path) -> TopLists:
    """The lists of a file."""
    return results_of(pl.read_parquet(path, columns=COLUMNS)).table.tops


def rates(n: int, repeats: int, *, peaked: bool) -> dict[str, tuple[float, float]]:
    """Positions a second of each stage, of all of them and of the baseline, and how many times the baseline."""
    lists = drawn_lists(n, peaked=peaked)
    plain = [baseline.plain(side) for side in lists]
    found: list[Times] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{side}.parquet") for side in "pq"]
        for side, path in zip(lists, paths, strict=True):
            write_lists(side, path)
        for _ in range(repeats):
            spent = measure(*paths)
            found.append({**spent, "all": sum(spent.values()), "baseline": baseline.seconds(*plain)})
    return {
        stage: (n / median(times[stage] for times in found), median(one["baseline"] / one[stage] for one in found))
        for stage in found[0]
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=2 * CHUNK)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args(arguments)
    kinds = [rates(given.positions, given.repeats, peaked=peaked) for peaked in (False, True)]
    lines = ["| positions/s (× baseline) | flat | peaked |", "|---|---|---|"]
    for stage in kinds[0]:
        cells_ = (f"{rate:,.0f} ({ratio:.1f})" for rate, ratio in (kind[stage] for kind in kinds))
        lines.append(f"| {stage} | {' | '.join(cells_)} |")
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()
