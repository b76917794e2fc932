"""How good the estimators are: top-k lists of a real model against its exact full-vocabulary KL.

    python benchmarks/estimator_table.py                      # 12 prompts x 48 tokens, a few minutes on one core
    python benchmarks/estimator_table.py --prompts 24 --tokens 96 --k 5 10 20 50
    python benchmarks/estimator_table.py --prompts 24 --tokens 96 --k 20 --wanted    # Q asked about P's tokens

P = smollm2-135m writes responses at temperature 1 from a fixed seed. Each Q is P with changed weights or another
system prompt, so that the exact KL of every position is known. Every estimator then sees the k best tokens of either
side and nothing else. The tables are Markdown; they hold no timings, and say how many positions they rest on.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

if __name__ == "__main__":  # started as a file, the project itself is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backends.base import BackendOptions, Sample, SampleRequest, SampleSettings, ScoreRequest
from backends.local.backend import LocalBackend
from kl.estimators.align import Aligned, align
from kl.estimators.censored import SpreadEvidence, pooled_prior
from kl.estimators.divergence import ListMeasures, exact_kl, measure
from kl.estimators.outliers import find_outliers
from kl.estimators.token_keys import logprob_of
from kl.records import Candidate, Prompt, Response, Score, Turn
from kl.statistics.intervals import Estimate, ratio_estimate
from kl.statistics.position_sampling import variation_of_pilot

FloatArray = NDArray[np.float64]
Lists = list[tuple[Candidate, ...]]

MODEL_P = "smollm2-135m"
SYSTEM_Q = "You are a pirate. Answer like one, in short sentences."
ESTIMATORS = ("floor", "bucket", "lower", "censored")
LOWER_TOLERANCE = 1e-6  # nats; the exact values come from float32 log-probabilities
TOLERANCE = 0.1
SMALLEST_COMPARED = 1e-3  # nats; below, a factor of two means nothing
PROMPTS = (
    "Why is the sky blue?",
    "Write a haiku about the sea.",
    "List three uses of copper.",
    "Explain to a child what a computer program is.",
    "What is the capital of Australia, and what is it known for?",
    "Write a Python function that reverses a string.",
    "Give me a recipe for pancakes.",
    "Summarise the story of Romeo and Juliet in two sentences.",
    "Write a polite email that declines an invitation to a meeting.",
    "What is the difference between a virus and a bacterium?",
    "Tell me a short joke about cats.",
    "How do I learn to play the guitar?",
    "Translate into French: where is the train station?",
    "What is 17 plus 25? Explain your steps.",
    "Describe a rainy day in an old town.",
    "Give three arguments for and against working from home.",
    "Write the first lines of a detective novel.",
    "How does a refrigerator work?",
    "Name five European rivers and the seas that they flow into.",
    "Write a SQL query that counts the orders of each customer.",
    "What should I pack for a week in the mountains?",
    "Explain the rules of chess to a beginner.",
    "Invent a name and a slogan for a bakery.",
    "Why do leaves change their colour in autumn?",
)


class CandidateQ(NamedTuple):
    """A model that stands for Q: its name in the table, the model, and the system text it is given instead."""

    label: str
    model: str
    system: str | None = None


CANDIDATES = (
    CandidateQ("int8", f"{MODEL_P}@int8"),
    CandidateQ("other system prompt", MODEL_P, SYSTEM_Q),
    CandidateQ("int4", f"{MODEL_P}@int4"),
    CandidateQ("int3", f"{MODEL_P}@int3"),
)


@dataclass(frozen=True, slots=True)
class Pairs:
    """N positions of P against one Q: both sides' longest lists, the exact KL in nats, and the prompt of each.

    ``of_p`` are Q's values of the tokens of P's lists in their order, and behind them of the one that P sampled.
    """

    label: str
    top_p: Lists
    top_q: Lists
    of_p: Lists
    exact: FloatArray
    prompt: NDArray[np.int64]

    def at(self, k: int) -> ListMeasures:
        """What the estimators say when either side reports ``k`` tokens."""
        return _measured(self.aligned(k, k, wanted=False))

    def aligned(self, k_p: int, k_q: int, *, wanted: bool) -> Aligned:
        """The matched lists when P reports ``k_p`` tokens and Q ``k_q``, with those of P if it is asked for them."""
        lists_q = [top[:k_q] for top in self.top_q]
        asked = [
            _falling((*tokens[:k_p], tokens[-1]), {item.token_id for item in top})
            for tokens, top in zip(self.of_p, lists_q, strict=True)
        ]
        return align([top[:k_p] for top in self.top_p], lists_q, wanted_q=asked if wanted else None)

    def per_token(self) -> Estimate:
        """Mean exact KL with its interval, clustered by prompt."""
        sums = np.bincount(self.prompt, self.exact)
        sizes = np.bincount(self.prompt)
        n = len(self.exact)
        return ratio_estimate(sums, sizes, n=n, iid_variance=float(self.exact.var(ddof=1)) / n)


def _measured(aligned: Aligned) -> ListMeasures:
    return measure(aligned, pooled_prior(SpreadEvidence.of(aligned)))


def _falling(tokens: Sequence[Candidate], listed: set[int | None]) -> tuple[Candidate, ...]:
    """The tokens that are not listed, each once, by falling value."""
    others = {token.token_id: token for token in reversed(tokens) if token.token_id not in listed}
    return tuple(sorted(others.values(), key=lambda token: -logprob_of(token)))


class Accuracy(NamedTuple):
    """An estimator against the exact KL; ``rmse`` is divided by the mean exact KL, shares are in [0, 1].

    ``off_by_2`` is the share of positions with an exact KL above 0.001 nats where the estimate is more than twice or
    less than half of it.
    """

    bias: float
    rmse: float
    spearman: float
    off_by_2: float


def accuracy(estimate: FloatArray, truth: FloatArray) -> Accuracy:
    """Compare estimates with exact values, float64, shape (N,), nats."""
    mean = truth.mean()
    large = truth > SMALLEST_COMPARED
    ratio = estimate[large] / truth[large]
    return Accuracy(
        float(estimate.mean() / mean - 1.0),
        float(np.sqrt(np.mean((estimate - truth) ** 2)) / mean),
        float(np.corrcoef(rankdata(estimate), rankdata(truth))[0, 1]),  # Spearman's
        float(np.mean((ratio > 2.0) | (ratio < 0.5))),
    )


def collect(candidates: Sequence[CandidateQ], n_prompts: int, n_tokens: int, seed: int, k: int) -> Iterator[Pairs]:
    """Sample and score P once, then the pairs of P with each candidate, one candidate at a time.

    Holds P's log-probabilities of the full vocabulary at every position, 200 kB each.
    """
    prompts = [Prompt((Turn("user", text),)) for text in PROMPTS[:n_prompts]]
    responses = asyncio.run(_sample(prompts, n_tokens, seed, k))
    by_p = asyncio.run(_score_p(responses, k))
    for candidate in candidates:
        yield asyncio.run(_pairs(candidate, responses, by_p, k))


async def logits_of(texts: Sequence[str], n_tokens: int, models: tuple[str, str], kept: int) -> list[FloatArray]:
    """Log-probabilities by two models of the tokens that either finds most probable, float64, shape (R, n_tokens, V).

    The first model writes the responses; those that end before ``n_tokens`` are left out, so that R may be less than
    the number of texts. V is ``kept``.
    """
    written = await _sample([Prompt((Turn("user", text),)) for text in texts], n_tokens, 1, 1)
    responses = [response for response in written if len(response.positions) == n_tokens]
    found: list[list[FloatArray]] = [[], []]
    async with LocalBackend(BackendOptions()) as backend:
        for response in responses:
            both = [(await _scored(backend, CandidateQ(name, name), response, 1)).full for name in models]
            best = np.argpartition(np.maximum(*both), -kept, axis=1)[:, -kept:]
            for values, full in zip(found, both, strict=True):
                values.append(np.take_along_axis(full, best, 1).astype(np.float64))
    return [np.stack(values) for values in found]


async def _sample(prompts: Sequence[Prompt], n_tokens: int, seed: int, k: int) -> list[Response]:
    found: list[Response] = []
    async with LocalBackend(BackendOptions()) as backend:
        for index, prompt in enumerate(prompts):
            settings = SampleSettings(max_tokens=n_tokens, top_logprobs=k, seed=seed + index)
            request = SampleRequest("", "", MODEL_P, prompt, settings)
            found += [item.response async for item in backend.sample([request]) if isinstance(item, Sample)]
    return [response for response in found if response.positions]


class Scored(NamedTuple):
    """One response by one model: the longest lists, and every token's log-probability, shape (T, V)."""

    top: Lists
    full: NDArray[np.float32]


async def _score_p(responses: Sequence[Response], k: int) -> list[Scored]:
    async with LocalBackend(BackendOptions()) as backend:
        return [await _scored(backend, CandidateQ("P", MODEL_P), response, k) for response in responses]


async def _scored(backend: LocalBackend, model: CandidateQ, response: Response, k: int) -> Scored:
    prompt = replace(response.prompt, system=model.system) if model.system else response.prompt
    scores = await _scores(backend, response, model.model, prompt, k)
    return Scored([score.top for score in scores], _full(scores))


async def _pairs(candidate: CandidateQ, responses: Sequence[Response], by_p: Sequence[Scored], k: int) -> Pairs:
    top_q: Lists = []
    of_p: Lists = []
    exact: list[FloatArray] = []
    async with LocalBackend(BackendOptions()) as backend:
        for response, p in zip(responses, by_p, strict=True):
            q = await _scored(backend, candidate, response, k)
            top_q += q.top
            of_p += [
                tuple(item._replace(logprob=float(full[item.token_id])) for item in (*top, position.sampled))
                for top, position, full in zip(p.top, response.positions, q.full, strict=True)
            ]
            exact.append(exact_kl(p.full, q.full))
    top_p = [top for p in by_p for top in p.top]
    prompt = np.repeat(np.arange(len(by_p)), [len(values) for values in exact])
    return Pairs(candidate.label, top_p, top_q, of_p, np.concatenate(exact), prompt)


async def _scores(backend: LocalBackend, response: Response, model: str, prompt: Prompt, k: int) -> list[Score]:
    """The scores of all positions, in order, with full vocabularies."""
    n = len(response.positions)
    keys = tuple(str(index) for index in range(n))
    ids = [position.sampled.token_id for position in response.positions]
    assert None not in ids, "the local model states every id"
    request = ScoreRequest(
        name=model, model=model, prompt=prompt, text=response.text, prefix_ends=tuple(response.prefix_ends().tolist()),
        token_ids=tuple(index for index in ids if index is not None), positions=tuple(range(n)), keys=keys,
        top_logprobs=k, full_vocabulary=True,
    )  # fmt: skip
    found: dict[str, Score] = {}
    async for result in backend.score([request]):
        if not isinstance(result, Score):
            raise RuntimeError(f"{model}: {result.message}")
        found[result.key] = result
    return [found[key] for key in keys]


def _full(scores: Sequence[Score]) -> NDArray[np.float32]:
    rows = [score.full_logprobs for score in scores if score.full_logprobs is not None]
    assert len(rows) == len(scores), "the full vocabulary was asked for"
    return np.stack(rows)


def accuracy_rows(pairs: Pairs, sizes: Sequence[int]) -> Iterator[str]:
    """Table rows of one Q: bias, RMSE, rank correlation and share off by more than 2x of each estimator."""
    for k in sizes:
        measured = pairs.at(k)
        known = ~np.isnan(measured.censored.kl)
        cells = [_accuracy_cell(measured.estimate(name).kl[known], pairs.exact[known]) for name in ESTIMATORS]
        cells += _shares(measured, pairs)
        yield f"| {pairs.label}, {pairs.exact.mean():.3g} | {k} | {' | '.join(cells)} |"


def _accuracy_cell(values: FloatArray, exact: FloatArray) -> str:
    found = accuracy(values, exact)
    return f"{100 * found.bias:+.0f} / {found.rmse:.2f} / {found.spearman:.2f} / {100 * found.off_by_2:.1f}"


def _shares(measured: ListMeasures, pairs: Pairs) -> tuple[str, str, str]:
    """How often the lower bound and the upper limit hold, and how often there is no limit, in %."""
    certified = np.mean(measured.lower.kl <= pairs.exact + LOWER_TOLERANCE)
    limited = ~np.isnan(measured.upper_plausible)
    covered = np.mean(pairs.exact[limited] <= measured.upper_plausible[limited] + LOWER_TOLERANCE)
    return _percent(certified), _percent(covered), _percent(np.mean(~limited))


def _percent(share: np.floating | float) -> str:
    # Rounded down: 100 only where it is all of them.
    return "100" if share == 1 else f"{np.floor(1000 * share) / 10:.1f}"


WANTED_HEAD = (
    "| Q, exact mean KL | Q says | P's mass with a known q, % | censored | lower | lower ÷ exact, % | "
    "positions for ±10 % | lower ≤ exact, % | upper ≥ exact, % | contradicted |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def wanted_rows(pairs: Pairs, k: int) -> Iterator[str]:
    """Table rows of one Q: its k best alone, and shorter and shorter lists with the values of P's k tokens."""
    for k_q, wanted in ((k, False), (k, True), (5, True), (1, True)):
        aligned = pairs.aligned(k, k_q, wanted=wanted)
        measured, exact = _measured(aligned), pairs.exact
        known = np.exp(np.where(aligned.shared, aligned.logp, -np.inf)).sum(axis=1).mean()
        cells = [_accuracy_cell(measured.estimate(name).kl, exact) for name in ("censored", "lower")]
        cells.append(f"{100 * measured.lower.kl.mean() / exact.mean():.1f}")
        cells.append(_positions_needed(measured.censored.kl, exact))
        wrong = [item for item in find_outliers(aligned, pooled_prior(SpreadEvidence.of(aligned))) if item.certain]
        certified, covered, _ = _shares(measured, pairs)
        says = f"{k_q} best{f', P’s {k}' if wanted else ''}"
        row = [says, f"{100 * known:.1f}", *cells, certified, covered, str(len(wrong))]
        yield f"| {pairs.label}, {exact.mean():.3g} | {' | '.join(row)} |"


def _positions_needed(values: FloatArray, exact: FloatArray) -> str:
    """How many independent positions it takes that an estimate is within 10 % of the exact mean, 19 times of 20.

    What the bias leaves of the 10 % is there for the sampling error.
    """
    known = values[~np.isnan(values)]
    mean = exact.mean()
    left = TOLERANCE - abs(float(known.mean() / mean) - 1.0)
    return "none do" if left <= 0 else f"{(1.96 * known.std(ddof=1) / (left * mean)) ** 2:,.0f}"


def size_row(pairs: Pairs) -> str:
    """What the data are: positions, prompts, the exact mean with its interval, and how the token KL varies."""
    mean = pairs.per_token()
    interval = "no interval" if mean.ci_low is None else f"{mean.ci_low:.3g} to {mean.ci_high:.3g}"
    variation = variation_of_pilot(mean)
    varies = "- | -" if variation is None else f"{variation.cv_token:.2f} | {variation.icc:.3f}"
    return f"| {pairs.label} | {mean.n:,} | {mean.n_clusters} | {mean.value:.3g} | {interval} | {varies} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    options = _parser().parse_args(arguments)
    found = list(collect(CANDIDATES, options.prompts, options.tokens, options.seed, max(options.k)))
    if options.wanted:
        rows = itertools.chain.from_iterable(wanted_rows(pairs, max(options.k)) for pairs in found)
        print("\n".join([*WANTED_HEAD, *rows]))  # noqa: T201
        return 0
    lines = [
        "| Q | positions | prompts | exact KL per token | 95 % CI | CV of token KL | correlation within a prompt |",
        "|---|---|---|---|---|---|---|",
        *(size_row(pairs) for pairs in found),
        "",
        "Bias of the mean in % / RMSE ÷ mean exact KL / Spearman / % of positions off by more than 2x:",
        "",
        f"| Q, exact mean KL | k | {' | '.join(ESTIMATORS)} | lower ≤ exact, % | upper ≥ exact, % | no upper, % |",
        "|---|---|---|---|---|---|---|---|---|",
        *itertools.chain.from_iterable(accuracy_rows(pairs, options.k) for pairs in found),
    ]
    print("\n".join(lines))  # noqa: T201
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12, choices=range(2, len(PROMPTS) + 1), metavar="N",
                        help=f"Prompts, 2 to {len(PROMPTS)}. Default: 12.")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=48, metavar="N", help="Longest response, tokens. Default: 48.")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="Seed of the responses. Default: 1.")
    parser.add_argument("--k", type=int, nargs="+", default=[5, 10, 20, 50], metavar="K", help="List lengths.")
    parser.add_argument(
        "--wanted", action="store_true", help="What it buys to ask Q about the tokens of P's longest list."
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
