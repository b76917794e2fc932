"""The tokens of a list, from the log-probabilities of a whole vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from backends.local.gguf import FloatArray
from backends.local.tokenizer import Tokenizer
from kl.records import Candidate

_GROUPS = 512  # of the tokens of a vocabulary


def top_candidates(logprobs: FloatArray, k: int, tokenizer: Tokenizer) -> tuple[Candidate, ...]:
    """The ``k`` most probable tokens, by falling log-probability, equals by rising id."""
    k = min(k, len(logprobs))
    # The k-th largest of the maxima of k or more groups is no larger than the k-th largest of all.
    n_groups = max(k, min(_GROUPS, len(logprobs)))
    whole = len(logprobs) // n_groups * n_groups
    maxima = logprobs[:whole].reshape(-1, n_groups).max(axis=0)
    rest = logprobs[whole:]
    np.maximum(maxima[: len(rest)], rest, out=maxima[: len(rest)])
    smallest = np.partition(maxima, n_groups - k)[n_groups - k]
    listed = np.flatnonzero(logprobs >= smallest)
    order = np.lexsort((listed, -logprobs[listed]))[:k]
    return tuple(candidate(int(index), logprobs, tokenizer) for index in listed[order])


def candidate(index: int, logprobs: FloatArray, tokenizer: Tokenizer, text: str | None = None) -> Candidate:
    """A token of the vocabulary as a list has it, under ``text`` where its bytes alone are no text."""
    shown, exact = tokenizer.token(index)
    return Candidate(shown if text is None else text, float(logprobs[index]), index, exact)


def candidates_of(
    ids: Sequence[int], top: Sequence[Candidate], logprobs: FloatArray, tokenizer: Tokenizer
) -> tuple[Candidate, ...]:
    """Some tokens, by falling log-probability, without those that ``top`` lists."""
    if not ids:
        return ()
    others = np.array([*{*ids}.difference(item.token_id for item in top)], dtype=np.int64)
    order = np.lexsort((others, -logprobs[others]))
    return tuple(candidate(int(index), logprobs, tokenizer) for index in others[order])
