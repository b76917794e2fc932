"""How often an alert is raised about a Q that is the same as before, and how often about one that changed.

    python benchmarks/drift_alarms.py                       # 1,000 pairs of runs of each kind of noise
    python benchmarks/drift_alarms.py --real                # and the box's model against its int8 weights
    python benchmarks/drift_alarms.py --pairs 20 --prompts 8 --tokens 4

Every pair of runs asks Q about other prompts, some positions of each. Q's noise is a normal number on every logit of
every answer, or one whose size differs between prompts; P is another model. ``of: pq`` is the alert for a rise of
KL(P‖Q), ``of: q`` that for KL(Q then‖Q now) above Q's noise floor, which is measured at 30 % of the positions; both
with ``kl_per_token: 0``. Lists have 20 tokens. A change is rounding of the weights to eight bits, a scale for each row.
The table is Markdown; behind each share stands its standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from scipy.special import logsumexp

if __name__ == "__main__":  # started as a file, the project itself is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flows.config.alert import AlertConfig
from flows.watch.reference import Reference
from flows.watch.verdict import decide, decide_q
from kl.finished.between import QLists, kl_between
from kl.statistics.intervals import FloatArray
from kl.tables.schemas import CANDIDATES, TOKENS

K, FLOOR_SHARE = 20, 0.3
HIDDEN, VOCABULARY, SPREAD = 64, 400, 2.5  # of a made-up model; spread of its logits
P_NOISE = 0.5
KEPT = 1_000  # tokens of a real model's vocabulary, the most probable ones of either

PQ = AlertConfig(kl_per_token=0.0, compared_with="previous")
OF_Q = PQ.model_copy(update={"of": "q"})


class Models(NamedTuple):
    """Logits at all positions: of P, of Q then and now without noise, float64, shape (prompts, tokens, V)."""

    p: FloatArray
    then: FloatArray
    now: FloatArray


Draw = Callable[[np.random.Generator], Models]


class Noise(NamedTuple):
    """Standard deviation of a logit, and the spread of its logarithm over prompts."""

    size: float
    spread: float = 0.0


def made_up(n_prompts: int, n_tokens: int, *, rounded: bool) -> Draw:
    """A linear model with a new matrix each time; Q now has its rows rounded to eight bits if ``rounded``."""

    def draw(rng: np.random.Generator) -> Models:
        weights = rng.standard_normal((HIDDEN, VOCABULARY)) * SPREAD / np.sqrt(HIDDEN)
        hidden = rng.standard_normal((n_prompts, n_tokens, HIDDEN)) * rng.uniform(0.7, 1.3, (n_prompts, 1, 1))
        scale = np.abs(weights).max(axis=0) / 127
        now = np.round(weights / scale) * scale if rounded else weights
        then = hidden @ weights
        p = then + P_NOISE * rng.standard_normal((n_prompts, 1, 1)) * rng.standard_normal(then.shape)
        return Models(p, then, hidden @ now)

    return draw


def answered(rng: np.random.Generator, logits: FloatArray, noise: Noise) -> FloatArray:
    """What a model says when it is asked: log-probabilities with the noise of this answer."""
    sizes = noise.size * np.exp(noise.spread * rng.standard_normal((len(logits), 1, 1)))
    noisy = logits + sizes * rng.standard_normal(logits.shape)
    return noisy - logsumexp(noisy, axis=-1, keepdims=True)


def listed(law: FloatArray, share: float = 1.0, rng: np.random.Generator | None = None) -> QLists:
    """A run's tables with the k best tokens; of a ``share`` of the positions of each prompt, drawn at random."""
    n_prompts, n_tokens, vocabulary = law.shape
    flat = law.reshape(-1, vocabulary)
    best = np.argpartition(flat, -K, axis=1)[:, -K:]
    best = np.take_along_axis(best, np.argsort(-np.take_along_axis(flat, best, 1), axis=1), 1)
    values = np.take_along_axis(flat, best, 1)
    selected = np.ones((n_prompts, n_tokens), dtype=np.bool_)
    if rng is not None:
        drawn = max(1, round(share * n_tokens))
        selected = rng.permuted(np.broadcast_to(np.arange(n_tokens), selected.shape), axis=1) < drawn
        share = drawn / n_tokens
    n = n_prompts * n_tokens
    files = np.repeat([f"{prompt:04}" for prompt in range(n_prompts)], n_tokens)
    frame = pl.DataFrame(
        {
            "source_file": files,
            "prompt_id": files,
            "response_idx": np.zeros(n, dtype=np.int64),
            "position": np.tile(np.arange(n_tokens), n_prompts),
            "token": ["x"] * n,
            "is_stop": [False] * n,
            "selected": selected.ravel(),
            "pi": [share] * n,
            "n_dropped": [0] * n,
            "align_key": ["id"] * n,
            "n_wanted_q": [0] * n,
            "q_tokens": np.char.add(" t", best.astype(np.str_)).tolist(),  # as text is written, seen at a glance
            "q_token_ids": best,
            "q_logprobs": values,
            "q_bytes": [[None] * K] * n,
        }
    )
    asked = pl.when(pl.col("selected"))
    frame = frame.with_columns(asked.then(pl.col("^q_.*$")))
    tables = (
        pl.DataFrame(
            {name: frame[name].cast(kind) if name in frame.columns else pl.Series([None] * n, dtype=kind)
             for name, kind in table.items()}
        )
        for table in (TOKENS, CANDIDATES)
    )  # fmt: skip
    return QLists("a run", *(table.lazy() for table in tables))


def alarms(models: Models, noise: Noise, rng: np.random.Generator) -> tuple[bool, bool]:
    """Whether the alerts of KL(P‖Q) and of Q are raised by one pair of runs."""
    p = listed(answered(rng, models.p, Noise(0.0)))
    then, now, again = (answered(rng, logits, noise) for logits in (models.then, models.now, models.now))
    lists_then, lists_now = listed(then), listed(now)
    before, after = (kl_between(p, lists).responses for lists in (lists_then, lists_now))
    reference = Reference("previous", "earlier", before)
    between = kl_between(lists_then, lists_now)
    floor = kl_between(lists_now, listed(again, FLOOR_SHARE, rng)).responses
    decided = decide(PQ, after, reference), decide_q(OF_Q, between, floor, reference)
    return decided[0].decision == "drift", decided[1].decision == "drift"


def rates(draw: Draw, noise: Noise, pairs: int, seed: int) -> FloatArray:
    """Shares of pairs that raise the two alerts, shape (2,)."""
    rng = np.random.default_rng(seed)
    return np.mean([alarms(draw(rng), noise, rng) for _ in range(pairs)], axis=0)


def real(n_prompts: int, n_tokens: int) -> Draw:
    """The box's model and its int8 weights: each pair of runs draws prompts from at most 72, three to a question.

    Raises
    ------
    ModelNotUsableError
        If the model's weights are not installed.
    """
    from benchmarks.estimator_table import MODEL_P, PROMPTS, logits_of

    texts = [text + more for text in PROMPTS for more in ("", " Answer in one sentence.", " Be brief.")]
    then, now = asyncio.run(logits_of(texts, n_tokens, (MODEL_P, f"{MODEL_P}@int8"), KEPT))

    def draw(rng: np.random.Generator) -> Models:
        chosen = rng.choice(len(then), n_prompts, replace=False)
        p = then[chosen] + P_NOISE * rng.standard_normal(then[chosen].shape)
        return Models(p, then[chosen], now[chosen])

    return draw


NOISES = {
    "0.02": Noise(0.02),
    "0.1": Noise(0.1),
    "0.1, prompts differ": Noise(0.1, 0.7),
}
CHANGED = {"0.005": Noise(0.005), "0.02": Noise(0.02), "0.05": Noise(0.05)}
HEAD = "| models, noise of a logit | pairs | prompts | alert of pq | alert of q |\n|---|---|---|---|---|"


def row(name: str, found: FloatArray, pairs: int, prompts: int) -> str:
    """A line of the table."""
    cells = [f"{100 * share:.1f} ± {100 * np.sqrt(share * (1 - share) / pairs):.1f} %" for share in found]
    return f"| {name} | {pairs:,} | {prompts} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=8, help="positions of each prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", action="store_true")
    options = parser.parse_args(arguments)
    n, sizes = options.pairs, (options.prompts, options.tokens)
    print(HEAD)  # noqa: T201
    for name, noise in NOISES.items():
        found = rates(made_up(*sizes, rounded=False), noise, n, options.seed)
        print(row(f"unchanged, {name}", found, n, options.prompts), flush=True)  # noqa: T201
    for name, noise in CHANGED.items():
        found = rates(made_up(*sizes, rounded=True), noise, max(1, n // 10), options.seed)
        print(row(f"int8, {name}", found, max(1, n // 10), options.prompts), flush=True)  # noqa: T201
    if options.real:
        drawn = real(*sizes)
        for name, noise in CHANGED.items():
            found = rates(drawn, noise, max(1, n // 10), options.seed)
            print(row(f"smollm2-135m, int8, {name}", found, max(1, n // 10), options.prompts), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
