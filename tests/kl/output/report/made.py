"""Runs for the tests of the report: generated tables of any size, with what a page must survive."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from kl.finished.run import Run
from kl.output.report.page import write_report
from kl.statistics.dataset import summarise_dataset
from kl.statistics.summary import RunFacts, Summary
from kl.tables.responses import ResponseInfo, summarise_responses
from kl.tables.schemas import TOKENS

WORDS = [" the", " a", " sea", "\n", " 17", "é", " ", "ing", " שלום", "<b>", "</script>", " plus", ".", " copper", " 0"]
K = 6


@dataclass
class MadeRun:
    """The tables of a run that nobody measured."""

    tokens: pl.DataFrame
    candidates: pl.DataFrame | None
    info: tuple[ResponseInfo, ...] = ()
    facts: RunFacts = field(default_factory=lambda: RunFacts("model-p", "model-q", "censored", K, 1.0, (), None))

    @property
    def summary(self) -> Summary:
        return summarise_dataset(self.tokens.lazy(), self.info, self.facts)

    def write(self, target: Path, record: dict[str, Any] | None = None, **others: Any) -> Path:
        """The page, in which everything that is not given is as the tables say."""
        responses = summarise_responses(self.tokens.lazy(), self.info).lazy()
        candidates = None if self.candidates is None else self.candidates.lazy()
        run = Run(target.parent, self.summary, self.tokens.lazy(), responses, candidates, record or {})
        write_report(run, target, **others)
        return target


def made_run(n_responses: int, n_tokens: int, *, seed: int = 0, spread: float = 1.0, lists: bool = True) -> MadeRun:
    """Responses of ``n_tokens`` tokens, one to a prompt; ``spread`` 0 makes Q equal to P."""
    random = np.random.default_rng(seed)
    n = n_responses * n_tokens
    logits = random.normal(0, 2, (n, K)).astype(np.float64)
    shift = random.normal(0, 1, (n, K)) * random.lognormal(-1, 1, (n, 1)) * spread
    p, q = (_normalised(values) for values in (logits, logits + shift))
    kl = (np.exp(p) * (p - q)).sum(1).clip(0)
    picked = random.integers(0, len(WORDS), (n, K))
    drawn = np.argmax(p + random.gumbel(size=(n, K)), axis=1)
    chosen = (np.arange(n), drawn)
    entropy_p, entropy_q = (-(np.exp(side) * side).sum(1) for side in (p, q))
    words = np.array(WORDS, dtype=object)
    frame = pl.DataFrame(
        {
            "source_file": np.repeat([f"a b/réponse {i:05}.json" for i in range(n_responses)], n_tokens),
            "prompt_id": np.repeat([f"p{i}" for i in range(n_responses)], n_tokens),
            "response_idx": 0,
            "position": np.tile(np.arange(n_tokens), n_responses),
            "token": words[picked[chosen]],
            "token_id": picked[chosen] * 100 + drawn,
            "is_stop": False,
            "selected": True,
            "pi": 1.0,
            "kl_estimate": kl,
            "kl_lower": kl * 0.7,
            "kl_upper_plausible": kl * 1.4,
            "kl_censored": kl,
            "kl_floor": kl,
            "kl_bucket": kl,
            "logprob_p": p[chosen],
            "logprob_q": q[chosen],
            "logratio_k1": (p - q)[chosen],
            "k1_censored": False,
            "k3": 0.0,
            "delta_p": np.exp(q[chosen]) - np.exp(p[chosen]),
            "entropy_p": entropy_p,
            "entropy_q": entropy_q,
            "rest_mass_p": 0.0,
            "rest_mass_q": 0.0,
            "same_top_token": p.argmax(1) == q.argmax(1),
            "align_key": "id",
        }
    )
    absent = [pl.lit(None, dtype=kind).alias(name) for name, kind in TOKENS.items() if name not in frame.columns]
    tokens = frame.with_columns(absent).select(pl.col(name).cast(kind) for name, kind in TOKENS.items())
    return MadeRun(tokens, _lists(tokens, picked, p, q) if lists else None)


def _normalised(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def _lists(tokens: pl.DataFrame, picked: np.ndarray, p: np.ndarray, q: np.ndarray) -> pl.DataFrame:
    """Both lists by falling log-probability, Q's without its last entry."""
    words, ids = np.array(WORDS, dtype=object), picked * 100 + np.arange(K)
    columns: dict[str, pl.Series] = {}
    for side, logprobs, k in (("p", p, K), ("q", q, K - 1)):
        order = np.argsort(-logprobs, axis=1)[:, :k]
        texts = pl.Series(np.take_along_axis(words[picked], order, 1).ravel(), dtype=pl.String).reshape((-1, k))
        columns[f"{side}_tokens"] = texts.cast(pl.List(pl.String))
        columns[f"{side}_token_ids"] = pl.Series(np.take_along_axis(ids, order, 1)).cast(pl.List(pl.Int64))
        columns[f"{side}_logprobs"] = pl.Series(np.take_along_axis(logprobs, order, 1)).cast(pl.List(pl.Float64))
        nothing = pl.Series([None], dtype=pl.Binary).new_from_index(0, k * len(p)).reshape((-1, k))
        columns[f"{side}_bytes"] = nothing.cast(pl.List(pl.Binary))
    return tokens.select("source_file", "response_idx", "position").with_columns(
        *(series.alias(name) for name, series in columns.items()), n_wanted_q=pl.lit(0, dtype=pl.Int32)
    )
