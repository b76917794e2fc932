"""How fast two matched lists become the numbers of a row of the token table, on one core.

    python benchmarks/token_rows.py                      # 8,192 positions of either kind, half a minute
    python benchmarks/token_rows.py --positions 200 --repeats 1

Lists of the 20 best of 2,000 tokens, of which P and Q share about 15. *Flat*: a tenth of the mass is not listed.
*Peaked*: less than a ten-thousandth. The numbers of a row are computed from matched lists; the rows of the token table
from a response and its scores, lists not yet matched: with its text, its checks and all of its columns. The table is
Markdown: positions a second, medians of the repeats, and in brackets how many times as long it takes as copying the
arrays, in the same run. The clock is that of the process: threads of NumPy, if there are any, count.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

if __name__ == "__main__":  # started as a file, the project itself is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kl.columns import Entries, Positions, TopLists
from kl.estimators.align import Aligned, align
from kl.estimators.bounds import cells, lower_bounds
from kl.estimators.censored import SpreadPrior, pooled_prior
from kl.estimators.divergence import floor, measure, sampled_token
from kl.estimators.entropy import entropies
from kl.estimators.outliers import find_outliers, spread_evidence
from kl.records import Candidate, Prompt, Response, Score, Turn
from kl.scores import Scores, ScoreTable
from kl.tables.tokens import Asked, measure_responses

FloatArray = NDArray[np.float64]
Lists = list[tuple[Candidate, ...]]

VOCABULARY, K, AT_ONCE = 2000, 20, 256
LARGEST_REST = 1e-4  # of a peaked position
CHUNK = 4096  # positions that are measured together, as in a run
TOKENS = 64  # of a response


def drawn(random: np.random.Generator, *, peaked: bool) -> tuple[FloatArray, FloatArray]:
    """Log-probabilities of P and of Q, whose logits differ by normal noise."""
    logits = -1.6 * np.log(np.arange(1, VOCABULARY + 1)) + random.normal(0, 1.9, (AT_ONCE, VOCABULARY))
    if peaked:
        logits[np.arange(AT_ONCE), random.integers(0, VOCABULARY, AT_ONCE)] = random.uniform(8, 20, AT_ONCE)
    others = logits + random.normal(0, 0.8, logits.shape) * (logits < 6)
    return log_softmax(logits), log_softmax(others)


def log_softmax(logits: FloatArray) -> FloatArray:
    """Normalised, shape (n, V)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def best(logs: FloatArray) -> tuple[Lists, FloatArray]:
    """The K most probable tokens of each row, and the mass of the others."""
    order = np.argsort(-logs, axis=1)[:, :K]
    values = np.take_along_axis(logs, order, axis=1)
    rows = zip(order.tolist(), values.tolist(), strict=True)
    lists = [tuple(Candidate(f" t{i}", logp, i) for i, logp in zip(*row, strict=True)) for row in rows]
    return lists, 1.0 - np.exp(values).sum(axis=1)


def drawn_lists(n: int, *, peaked: bool) -> tuple[Lists, Lists]:
    """The lists of P and of Q at ``n`` positions."""
    random, lists_p, lists_q = np.random.default_rng(7), Lists(), Lists()
    while len(lists_p) < n:
        (top_p, rest_p), (top_q, rest_q) = map(best, drawn(random, peaked=peaked))
        kept = np.maximum(rest_p, rest_q) < LARGEST_REST if peaked else np.ones(AT_ONCE, dtype=np.bool_)
        lists_p += [top for top, is_kept in zip(top_p, kept, strict=True) if is_kept]
        lists_q += [top for top, is_kept in zip(top_q, kept, strict=True) if is_kept]
    return lists_p[:n], lists_q[:n]


class Chunk(NamedTuple):
    """Positions that are measured together: their matched lists, and the responses and scores they are of."""

    aligned: Aligned
    asked: list[Asked]

    def fresh(self) -> Chunk:
        """The same with nothing known from before."""
        return Chunk(replace(self.aligned), self.asked)


def chunks_of(n: int, *, peaked: bool) -> list[Chunk]:
    """N positions in chunks."""
    lists_p, lists_q = drawn_lists(n, peaked=peaked)
    parts = [slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)]
    return [chunk(lists_p[part], lists_q[part]) for part in parts]


def chunk(lists_p: Lists, lists_q: Lists) -> Chunk:
    """Some positions, whose first tokens P sampled."""
    sampled = [top[0] for top in lists_p]
    scores = ScoreTable.of([Score(f"{number:016x}", top) for number, top in enumerate(lists_q)])  # as of a store
    places = np.arange(len(lists_p), dtype=np.int64)
    asked = [
        Asked(
            response(start // TOKENS, lists_p[start : start + TOKENS]),
            Scores(scores, places[start : start + TOKENS]),
            vocabulary=VOCABULARY,
        )
        for start in range(0, len(lists_p), TOKENS)
    ]
    return Chunk(align(lists_p, lists_q, sampled), asked)


def response(number: int, lists: Lists) -> Response:
    """A response as the reader of files gives it: its positions are columns."""
    n = len(lists)
    positions = Positions(
        Entries.of([top[0] for top in lists]), TopLists.of(lists), np.zeros(n, dtype=np.int64), np.zeros(n, dtype=bool)
    )
    text = "".join(top[0].token for top in lists)
    return Response("p.json", number, Prompt((Turn("user", "What?"),)), "p", text, positions)


def copy(chunk: Chunk, prior: SpreadPrior | None) -> object:
    """The measure of the others: what memory allows."""
    arrays = (getattr(chunk.aligned, item.name) for item in fields(chunk.aligned))
    return [array.copy() for array in arrays if isinstance(array, np.ndarray)]


def bounds(chunk: Chunk, prior: SpreadPrior | None) -> object:
    """The certified lower bounds of all divergences and the renormalised estimate."""
    return lower_bounds(cells(chunk.aligned)), floor(chunk.aligned)


def spread(chunk: Chunk, prior: SpreadPrior | None) -> object:
    """The first pass over a data set."""
    return spread_evidence(chunk.aligned)


def everything(chunk: Chunk, prior: SpreadPrior | None) -> object:
    """All numbers of a row: wrong values, estimates, bounds, entropies, the sampled token."""
    aligned = chunk.aligned
    return (
        find_outliers(aligned, prior),
        measure(aligned, prior).estimate("censored"),
        sampled_token(aligned),
        entropies(aligned.logp, aligned.log_limit_p, aligned.coverage_p, VOCABULARY),
        entropies(aligned.logq, aligned.log_limit_q, aligned.coverage_q),
    )


def rows(chunk: Chunk, prior: SpreadPrior | None) -> object:
    """The rows of the token table, from lists that are not yet matched."""
    return measure_responses(chunk.asked, estimator="censored", prior=prior)


STAGES: dict[str, Callable[[Chunk, SpreadPrior | None], object]] = {
    "copy of the arrays": copy,
    "floor and lower bounds": bounds,
    "spread of log p/q": spread,
    "all numbers of a row": everything,
    "rows of the token table": rows,
}


def seconds(chunks: Sequence[Chunk], repeats: int) -> dict[str, float]:
    """What each stage takes; the stages take turns, so that a busy machine disturbs all."""
    prior = pooled_prior(spread_evidence(chunks[0].aligned))
    spent: dict[str, list[float]] = {name: [] for name in STAGES}
    for _ in range(repeats):
        for name, stage in STAGES.items():
            fresh = [chunk.fresh() for chunk in chunks]
            start = time.process_time()
            for chunk in fresh:
                stage(chunk, prior)
            spent[name].append(time.process_time() - start)
    return {name: median(times) for name, times in spent.items()}


def table(n: int, found: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    base = next(iter(STAGES))
    lines = [f"| positions a second, of {n:,} | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for stage in STAGES:
        shown = (f"{n / times[stage]:,.0f} ({times[stage] / times[base]:.0f})" for times in found.values())
        lines.append(f"| {stage} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=2 * CHUNK)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args(arguments)
    kinds = {"flat": False, "peaked": True}
    found = {name: seconds(chunks_of(given.positions, peaked=peaked), given.repeats) for name, peaked in kinds.items()}
    print(table(given.positions, found))  # noqa: T201


if __name__ == "__main__":
    main()
