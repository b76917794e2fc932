"""The tokens of a list, from the log-probabilities of a whole vocabulary."""

from __future__ import annotations

import numpy as np

from backends.local.gguf import FloatArray
from backends.local.tokenizer import Tokenizer
from kl.records import Candidate


def top_candidates(logprobs: FloatArray, k: int, tokenizer: Tokenizer) -> tuple[Candidate, ...]:
    """The ``k`` most probable tokens, by falling log-probability, equals by rising id."""
    k = min(k, len(logprobs))
    smallest = np.partition(logprobs, len(logprobs) - k)[len(logprobs) - k]
    listed = np.flatnonzero(logprobs >= smallest)
    order = np.lexsort((listed, -logprobs[listed]))[:k]
    return tuple(candidate(int(index), logprobs, tokenizer) for index in listed[order])


def candidate(index: int, logprobs: FloatArray, tokenizer: Tokenizer, text: str | None = None) -> Candidate:
    """A token of the vocabulary as a list has it, under ``text`` where its bytes alone are no text."""
    exact = tokenizer.token_bytes(index)
    return Candidate(exact.decode("utf-8", "replace") if text is None else text, float(logprobs[index]), index, exact)
