"""How often the canary raises an alarm about nothing, and how often about a change: simulated runs of first positions.

    python benchmarks/canary.py                               # 2,000 runs of each kind
    python benchmarks/canary.py --runs 20 --contexts 10

Each run asks 20 candidates of every context some times. Its noise is a part within the day, one of the day in a context
alone, and one of the day that all contexts share; standard deviations of log-probabilities. A change moves every
log-probability by a normal number. The table is Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

if __name__ == "__main__":  # started as a file, the project itself is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kl.statistics.canary import FEWEST_EARLIER, canary_test
from kl.statistics.intervals import FloatArray

TOKENS = 20


class Noise(NamedTuple):
    """Standard deviations of a log-probability: of each answer, of a day in one context, of a day in all."""

    answer: float
    day_in_context: float
    day: float


NOISES = {
    "of each answer": Noise(0.05, 0.0, 0.0),
    "of the day, each context alone": Noise(0.05, 0.05, 0.0),
    "of the day, in part common to all": Noise(0.05, 0.05, 0.02),
    "of the day, common to all": Noise(0.01, 0.0, 0.05),
}
CHANGES = (0.0, 0.05, 0.1, 0.2)


def drawn_runs(
    rng: np.random.Generator, n_earlier: int, n_contexts: int, repeats: int, noise: Noise, change: float
) -> FloatArray:
    """Mean log-probabilities of the runs, today last, shape (n_earlier + 1, n_contexts, 20)."""
    places = n_contexts, TOKENS
    models = np.log(rng.dirichlet(np.full(TOKENS, 0.3), n_contexts) + 1e-5)
    runs = models + noise.answer / np.sqrt(repeats) * rng.standard_normal((n_earlier + 1, *places))
    runs += noise.day_in_context * rng.standard_normal((n_earlier + 1, *places))
    # One direction for all, such as a temperature: other machines lean the same way in each context.
    runs += noise.day * rng.standard_normal((n_earlier + 1, 1, 1)) * rng.standard_normal(places)
    runs[-1] += change * rng.standard_normal(places)
    return runs


def rate(
    noise: Noise,
    change: float,
    *,
    runs: int = 2_000,
    n_earlier: int = FEWEST_EARLIER,
    n_contexts: int = 40,
    repeats: int = 4,
    draws: int = 999,
    seed: int = 0,
) -> float:
    """The share of runs that raise an alarm."""
    rng = np.random.default_rng(seed)
    found = (drawn_runs(rng, n_earlier, n_contexts, repeats, noise, change) for _ in range(runs))
    return float(np.mean([canary_test(one, draws=draws, seed=number).changed() for number, one in enumerate(found)]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2_000)
    parser.add_argument("--contexts", type=int, default=40)
    given = parser.parse_args(arguments)
    heads = ["noise", "earlier runs", "unchanged", *(f"changed by {change:g}" for change in CHANGES[1:])]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, noise in NOISES.items():
        for n_earlier in (FEWEST_EARLIER, 24):
            rates = [
                rate(noise, change, runs=given.runs, n_contexts=given.contexts, n_earlier=n_earlier)
                for change in CHANGES
            ]
            lines.append(f"| {name} | {n_earlier} | {' | '.join(f'{100 * one:.2f} %' for one in rates)} |")
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()
