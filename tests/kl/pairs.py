"""Pairs of whole distributions with known divergences, and the top-k lists that a service would report of them."""

from __future__ import annotations

import numpy as np

from kl.records import Candidate


def log_softmax(logits):
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def gaussian_pair(seed, n, vocabulary, noise, *, zipf=1.6, spread=1.5):
    """Log-probabilities of P, shape (n, V), and of the same logits with independent normal noise."""
    rng = np.random.default_rng(seed)
    logits = -zipf * np.log(np.arange(1, vocabulary + 1)) + rng.normal(0, spread, (n, vocabulary))
    return log_softmax(logits), log_softmax(logits + rng.normal(0, noise, logits.shape))


def top_lists(logs, k):
    """The k most probable tokens of each row as candidates with ids and the text ``t<id>``."""
    order = np.argsort(-logs, axis=1, kind="stable")[:, :k]
    return [tuple(Candidate(f"t{i}", float(row[i]), int(i)) for i in ids) for ids, row in zip(order, logs, strict=True)]


def candidates(**logprobs):
    return tuple(Candidate(token, logprob) for token, logprob in logprobs.items())


def true_divergences(logp, logq):
    """KL, reverse KL, JS and total variation of whole distributions, each by its definition."""
    p, q = np.exp(logp), np.exp(logq)
    middle = np.log((p + q) / 2)
    js = 0.5 * (p * (logp - middle)).sum(axis=1) + 0.5 * (q * (logq - middle)).sum(axis=1)
    return (
        (p * (logp - logq)).sum(axis=1),
        (q * (logq - logp)).sum(axis=1),
        js,
        0.5 * np.abs(p - q).sum(axis=1),
    )
