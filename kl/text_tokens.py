"""About how many tokens a text is, without a tokenizer: by its words, marks, digits and blanks, script by script."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from math import ceil
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kl.records import Prompt

OTHER = "marks, digits and signs"

# Tokens of the first character of a run of one kind, and of each further one: least squares against the vocabulary of
# Gemma 3 and 4 (262,144 tokens), over prose and messages of programs in 45 languages, code in five, Markdown and tables
# of numbers. A blank before a word is in the word's token, and a run of blanks or of new lines is one.
# (script, ranges of code points, first, further)
_LATIN = "Latin"
_KINDS: tuple[tuple[str, tuple[tuple[int, int], ...], float, float], ...] = (
    (OTHER, (), 1.7, 1.0),  # emoji, symbols, and scripts that have no line here
    (OTHER, ((0x20, 0x20),), 0.0, 0.0),  # a blank: see `_blank_tokens`
    (OTHER, ((0x09, 0x0D), (0x85, 0x85)), 1.0, 0.0),  # new lines and tabs
    (OTHER, ((0x30, 0x39),), 1.0, 1.0),  # digits
    (OTHER, ((0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E)), 1.0, 0.11),  # marks of ASCII
    (OTHER, ((0xA1, 0xBF), (0x2000, 0x206F)), 1.0, 1.0),  # further marks
    (_LATIN, ((0x41, 0x5A),), 0.62, 0.14),  # capitals, each run of which begins a word
    (_LATIN, ((0x61, 0x7A),), 0.48, 0.17),
    (_LATIN, ((0xC0, 0xFF),), 0.45, 0.70),
    (_LATIN, ((0x100, 0x24F),), 0.45, 1.58),
    (_LATIN, ((0x1E00, 0x1EFF),), 0.45, 0.05),  # Vietnamese
    ("Greek", ((0x370, 0x3FF), (0x1F00, 0x1FFF)), 0.59, 0.40),
    ("Cyrillic", ((0x400, 0x52F),), 1.29, 0.06),
    ("Armenian", ((0x530, 0x58F),), 0.98, 0.53),
    ("Hebrew", ((0x590, 0x5FF),), 0.11, 0.68),
    ("Arabic", ((0x600, 0x77F), (0xFB50, 0xFDFF), (0xFE70, 0xFEFE)), 0.63, 0.31),
    ("Devanagari", ((0x900, 0x97F),), 0.16, 0.35),
    ("Bengali", ((0x980, 0x9FF),), 0.88, 0.16),
    ("Gurmukhi", ((0xA00, 0xA7F),), 0.98, 0.57),
    ("Gujarati", ((0xA80, 0xB7F),), 0.86, 0.36),
    ("Tamil", ((0xB80, 0xBFF),), 0.08, 0.26),
    ("Telugu", ((0xC00, 0xC7F),), 0.90, 0.36),
    ("Kannada", ((0xC80, 0xCFF),), 0.92, 0.34),
    ("Malayalam", ((0xD00, 0xD7F),), 0.87, 0.25),
    ("Sinhala", ((0xD80, 0xDFF),), 0.88, 0.41),
    ("Thai", ((0xE00, 0xEFF),), 0.13, 0.35),
    ("Burmese", ((0x1000, 0x109F),), 0.93, 0.42),
    ("Georgian", ((0x10A0, 0x10FF),), 0.92, 0.37),
    ("Khmer", ((0x1780, 0x17FF),), 0.92, 0.32),
    ("Kana", ((0x3040, 0x309F),), 0.81, 0.26),
    ("Kana", ((0x30A0, 0x30FF),), 0.56, 0.22),
    ("Han", ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)), 0.75, 0.61),
    ("Hangul", ((0x1100, 0x11FF), (0xAC00, 0xD7AF)), 0.56, 0.74),
    (OTHER, ((0x3000, 0x303F), (0xFF00, 0xFFEF)), 0.75, 0.27),  # marks of East Asia
)
_BLANK, _DIGIT, _CAPITAL, _NOTHING = 1, 3, 6, 255
_SCRIPTS = [script for script, *_ in _KINDS]
_FIRST = np.array([first for *_, first, _ in _KINDS])
_FURTHER = np.array([further for *_, further in _KINDS])
_IS_LATIN = np.array([script == _LATIN for script in _SCRIPTS])
_LAST = 0xFFFF  # what lies beyond is of the first kind


class TextTokens(NamedTuple):
    """About how many tokens a text is, and the script that most of them are of."""

    tokens: float
    script: str


class PromptTokens(NamedTuple):
    """The same of a prompt, in whole tokens."""

    tokens: int
    script: str


def text_tokens(text: str) -> TextTokens:
    """About how many tokens a text is in a large vocabulary of today.

    For prose within 15 % of Gemma's, code and tables of numbers within 10 % of it (``docs/cost.md`` has the table); of
    some languages that such a vocabulary knows less, up to 40 % too few. It takes 60 µs, and 40 µs a 1,000 characters.

    >>> text_tokens("The water in the lake froze early.").tokens
    7.9
    """
    if not text:
        return TextTokens(0.0, OTHER)
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    kinds = _kind_of_points()[np.minimum(points, _LAST)]
    before = np.empty_like(kinds)
    before[0], before[1:] = kinds[0], kinds[:-1]
    goes_on = (kinds == before) | (_IS_LATIN[kinds] & _IS_LATIN[before] & (kinds != _CAPITAL))
    goes_on[0] = False
    costs = np.bincount(kinds, np.where(goes_on, _FURTHER[kinds], _FIRST[kinds]), minlength=len(_KINDS))
    by_script: dict[str, float] = {}
    for index in np.flatnonzero(costs):
        by_script[_SCRIPTS[index]] = by_script.get(_SCRIPTS[index], 0.0) + float(costs[index])
    total = sum(by_script.values()) + _blank_tokens(kinds)
    script = max(by_script, key=lambda name: by_script[name], default=OTHER)
    return TextTokens(round(total, 2), script)


@lru_cache(64)  # the responses to a prompt come one after the other
def prompt_tokens_of(prompt: Prompt, template_tokens: int = 0) -> PromptTokens:
    """About how many tokens a prompt is, system text included.

    Parameters
    ----------
    template_tokens : int
        What a chat template writes around each turn, and before the answer.
    """
    texts = [turn.content for turn in prompt.turns] + ([prompt.system] if prompt.system else [])
    parts = [text_tokens(text) for text in texts]
    by_script = Counter[str]()
    for part in parts:
        by_script[part.script] += ceil(part.tokens)
    count = ceil(sum(part.tokens for part in parts)) + template_tokens * (len(parts) + 1)
    return PromptTokens(count, max(by_script, key=lambda name: by_script[name], default=OTHER))


def _blank_tokens(kinds: NDArray[np.uint8]) -> int:
    """Each run of two blanks or more is a token, and so is a blank before a digit."""
    blank = np.concatenate(([False], kinds == _BLANK, [False]))
    after_blank = blank[:-2] & blank[1:-1]
    runs = blank[1:-1] & blank[2:] & ~blank[:-2]
    single = blank[1:-1] & ~blank[2:] & ~after_blank
    return int(runs.sum()) + int((single[:-1] & (kinds[1:] == _DIGIT)).sum())


@lru_cache(1)
def _kind_of_points() -> NDArray[np.uint8]:
    """The kind of each code point up to the last that has one."""
    table = np.zeros(_LAST + 1, dtype=np.uint8)
    for kind, (_, ranges, *_) in enumerate(_KINDS):
        for low, high in ranges:
            table[low : high + 1] = kind
    return table
