"""Entropy of a distribution of which only the top-k list is known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import entr

from kl.estimators.rows import FloatArray, row_counts, row_sums

_LOG_TINY = -690.0  # exp of it is near the smallest normal float64


class Entropies(NamedTuple):
    """In nats, shape (T,).

    ``rest_cell`` takes the unlisted tokens as one. ``lower`` and ``upper`` are certified; ``upper`` is NaN where the
    size of the vocabulary is not given.
    """

    rest_cell: FloatArray
    lower: FloatArray
    upper: FloatArray


def entropies(
    logs: FloatArray, log_cap: FloatArray, coverage: FloatArray, vocabulary: FloatArray | int | None = None
) -> Entropies:
    """Entropy of T distributions from their lists.

    Parameters
    ----------
    logs : float64, shape (T, K)
        Listed log-probabilities, ``-inf`` where there is none.
    log_cap : float64, shape (T,)
        No unlisted token has more.
    coverage : float64, shape (T,)
        All listed mass, also of tokens without a key of their own, which ``logs`` leaves out and the rest takes in.
    vocabulary : int or float64 of shape (T,), optional
        Number of tokens; without it there is no upper limit.
    """
    listed, known = logs > -np.inf, np.maximum(logs, _LOG_TINY)
    probs = np.exp(known) * listed
    head = -row_sums(probs * known)
    rest = np.maximum(1.0 - row_sums(probs), 0.0)
    cap = np.exp(np.maximum(log_cap, _LOG_TINY))
    # Least entropy: the unlisted mass on as few tokens as the cap allows, the unmatched listed mass on one.
    unlisted = np.maximum(1.0 - coverage, 0.0)
    n_full = np.floor(unlisted / cap)
    part = np.maximum(unlisted - n_full * cap, 0.0)
    lower = head + n_full * entr(cap) + entr(part) + entr(np.clip(rest - unlisted, 0.0, 1.0))
    # Most entropy: the rest spread evenly over every token that is not listed by itself.
    n_left = np.nan if vocabulary is None else np.maximum(vocabulary - row_counts(listed), 1)
    upper = head + entr(rest) + rest * np.log(n_left)
    lower = np.maximum(lower, 0.0)  # a probability of 1 plus rounding has a negative term
    return Entropies(np.maximum(head + entr(rest), 0.0), lower, np.maximum(upper, lower))
