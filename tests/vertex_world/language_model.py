"""A language model whose full distribution is known in closed form, so that the exact divergence is too."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Contents = Sequence[tuple[str, str]]
"""Turns before the answer: (role, text)."""

EOS_ID = 1
_CERTAIN = 100.0  # nats above the rest: 1 - p is below the rounding of float64


class Distribution(NamedTuple):
    """Natural log-probabilities (float64, shape (V,)) over tokens with these texts and ids."""

    texts: Sequence[str]
    ids: Sequence[int]
    logprobs: FloatArray
    eos: int | None  # index of the token that ends the turn


class LanguageModel(Protocol):
    """What answers. Equal arguments must give equal distributions, unless a service is to be unquiet."""

    def distribution(self, model: str, contents: Contents, system: str | None, prefix: str) -> Distribution:
        """The next token after ``prefix``, the text the model has already written."""
        ...

    def count_tokens(self, text: str) -> int:
        """How many tokens a text is."""
        ...


_SPECIAL = [
    "<ctrl63>", "<ctrl95>", " ", "  ", "    ", "\n", "\n\n", "\t", ".", ",", "!", "?", ":", ";", "'", '"', "\\", "/",
    "{", "}", "<", ">", "&", "$", "%", "é", "e\u0301", "ß", "İ", "\u200b", "\u2028", "\u00a0", "\ufeff", "🙂",
    "👩\u200d🚀", "🇩🇪", "日本", "語", "中", "文字", " Привет", "мир", "العربية", "हिन्दी", "ไทย", "한국어", "שלום",
    "Ω", "∑", "½", "\x85", "\x7f",
]  # fmt: skip
_SYLLABLES = [
    "ka", "lo", "mi", "ren", "tas", "vel", "dor", "shi", "un",
    "ip", "gra", "bel", "tro", "qua", "fen", "ze", "wy", "ho",
]  # fmt: skip


def build_vocabulary(size: int, seed: int = 0) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Texts and ids of ``size`` tokens, the first of which is the empty text that ends a turn (id 1).

    There are control tokens, runs of blanks, new lines, line separators, emoji, non-Latin pieces, digits, and words
    with and without a blank before them. No two texts are equal; ids are neither dense nor sorted.
    """
    rng = np.random.default_rng(seed)
    texts = dict.fromkeys(["", *_SPECIAL, *(str(digit) for digit in range(10))])
    while len(texts) < size:
        word = "".join(rng.choice(_SYLLABLES, size=int(rng.integers(1, 5))))
        texts[" " + word if rng.random() < 0.8 else word] = None
    ids = rng.choice(np.arange(2, 262_144), size=size, replace=False)
    ids[0] = EOS_ID
    return tuple(texts)[:size], tuple(int(token_id) for token_id in ids)


@dataclass
class SyntheticModel:
    """Zipf-like distributions over a permutation drawn from a hash of the context; other models are noisy copies.

    Parameters
    ----------
    vocabulary : int
        Tokens, a few hundred to a few thousand.
    noise : mapping of model name to float
        Standard deviation, in nats, of what is added to that model's logits. A model not named is the base itself, so
        two models without noise have KL 0 everywhere.
    unrest : mapping of model name to float
        Standard deviation, in nats, of what is added anew each time that a model is asked about a context.
    exponents : pair of float
        The Zipf exponent of a context is drawn between these: the smaller, the flatter.
    eos_probability : float
        Of ending the turn, in the base model, in every context.
    certain_rate : float
        Fraction of contexts in which one token has all the probability: its log-probability is exactly 0.
    token_counts : mapping of text to int
        How many tokens some texts are, in place of the longest pieces of the vocabulary: it has few of any language.
    """

    vocabulary: int = 1000
    seed: int = 0
    noise: Mapping[str, float] = field(default_factory=dict)
    unrest: Mapping[str, float] = field(default_factory=dict)
    exponents: tuple[float, float] = (1.2, 4.0)
    eos_probability: float = 0.01
    certain_rate: float = 0.0
    token_counts: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.texts, self.ids = build_vocabulary(self.vocabulary, self.seed)
        self._log_rank = np.log(np.arange(1, self.vocabulary, dtype=np.float64))
        self._pattern = re.compile(_longest_match(self.texts) + "|.", re.DOTALL)
        self.count_tokens = lru_cache(maxsize=4096)(self._count_tokens)
        self._times: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def distribution(self, model: str, contents: Contents, system: str | None, prefix: str) -> Distribution:
        """The exact next-token distribution; deterministic in its arguments and the seed, or with unrest in how often
        it was asked.
        """
        context = json.dumps([self.seed, system, [list(turn) for turn in contents], prefix])
        logits = self._base_logits(_generator("base", context))
        noise = self.noise.get(model, 0.0)
        if noise:
            logits += noise * _generator(model, context).standard_normal(self.vocabulary)
        unrest = self.unrest.get(model, 0.0)
        if unrest:
            logits += unrest * self._next_generator(model, context).standard_normal(self.vocabulary)
        logits -= _logsumexp(logits)
        return Distribution(self.texts, self.ids, logits, 0)

    def _next_generator(self, model: str, context: str) -> np.random.Generator:
        with self._lock:
            self._times[model, context] += 1
            return _generator("unrest", model, context, str(self._times[model, context]))

    def _base_logits(self, rng: np.random.Generator) -> FloatArray:
        low, high = self.exponents
        ranked = -(low + (high - low) * rng.random()) * self._log_rank
        ranked += np.log1p(-self.eos_probability) - _logsumexp(ranked)
        logits = np.empty(self.vocabulary)
        logits[0] = np.log(self.eos_probability) if self.eos_probability > 0 else -np.inf
        order = rng.permutation(self.vocabulary - 1)
        logits[1:][order] = ranked
        if rng.random() < self.certain_rate:
            logits[1 + order[0]] += _CERTAIN
        return logits

    def _count_tokens(self, text: str) -> int:
        return self.token_counts.get(text) or len(self._pattern.findall(text))


def exact_kl(
    language_model: LanguageModel,
    model_p: str,
    model_q: str,
    prompt: str | Sequence[Mapping[str, str]],
    prefix: str = "",
    *,
    system: str | None = None,
) -> float:
    """KL(P‖Q) at one context over the whole vocabulary, in nats: sum of p (log p - log q)."""
    contents = prompt_turns(prompt)
    logp = language_model.distribution(model_p, contents, system, prefix).logprobs
    logq = language_model.distribution(model_q, contents, system, prefix).logprobs
    possible = logp > -np.inf
    return float(np.sum(np.exp(logp[possible]) * (logp[possible] - logq[possible])))


def prompt_turns(prompt: str | Sequence[Mapping[str, str]]) -> tuple[tuple[str, str], ...]:
    """The turns of a prompt as response files write it: a text, or a list of ``{role, content}``."""
    if isinstance(prompt, str):
        return (("user", prompt),)
    return tuple((turn["role"], turn["content"]) for turn in prompt)


def _generator(*parts: str) -> np.random.Generator:
    digest = hashlib.blake2b("\x1f".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest)))


def _logsumexp(values: FloatArray) -> float:
    top = values.max()
    return float(top + np.log(np.exp(values - top).sum()))


def _longest_match(texts: Iterable[str]) -> str:
    """A pattern that finds the longest of ``texts``; as a trie, because a plain alternation of thousands is slow."""
    trie: dict[str, dict] = {}
    for text in filter(None, texts):
        node = trie
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}
    return _trie_pattern(trie)


def _trie_pattern(node: dict[str, dict]) -> str:
    branches = [re.escape(character) + _trie_pattern(child) for character, child in node.items() if character]
    if not branches:
        return ""
    group = f"(?:{'|'.join(branches)})"
    return group + "?" if "" in node else group
