"""Counting tokens without a tokenizer, against what a real vocabulary of 262,144 tokens makes of the same texts."""

from __future__ import annotations

from collections import defaultdict

import pytest

from kl.records import Prompt, Turn
from kl.text_tokens import OTHER, prompt_tokens_of, text_tokens
from tests.counted_texts import COUNTED, CountedText


@pytest.mark.parametrize("item", COUNTED, ids=lambda item: item.name)
def test_a_text_is_counted_to_15_percent_and_code_to_25(item: CountedText) -> None:
    assert text_tokens(item.text).tokens == pytest.approx(item.tokens, rel=0.25 if item.kind == "code" else 0.15)


def test_over_all_of_a_kind_it_is_right_to_5_percent() -> None:
    sums = defaultdict[str, list[float]](lambda: [0.0, 0.0])
    for item in COUNTED:
        sums[item.kind][0] += text_tokens(item.text).tokens
        sums[item.kind][1] += item.tokens
    assert {kind: ours / real for kind, (ours, real) in sums.items()} == pytest.approx(dict.fromkeys(sums, 1), rel=0.05)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        (" ", 0),
        ("    ", 1),
        ("\n\n\n", 1),
        ("2026", 4),
        ("\ud800", 1.7),  # half of a character
        ("🎉", 1.7),
    ],
)
def test_what_is_no_word(text: str, count: float) -> None:
    assert text_tokens(text) == (count, OTHER)


def test_a_blank_before_a_digit_is_a_token_and_before_a_word_it_is_none() -> None:
    assert text_tokens("a 1").tokens == pytest.approx(text_tokens("a1").tokens + 1)
    assert text_tokens("a b").tokens == pytest.approx(2 * text_tokens("a").tokens)


def test_a_capital_begins_a_word() -> None:
    assert text_tokens("camelCase").tokens > text_tokens("camelcase").tokens


def test_a_prompt_is_its_turns_its_system_text_and_what_the_template_writes() -> None:
    turns = (Turn("user", "Why is the sky blue?"), Turn("model", "Because of the air."), Turn("user", "Explain."))
    bare, system = Prompt(turns), Prompt(turns, "You are a helpful assistant.")
    texts = sum(text_tokens(turn.content).tokens for turn in turns)
    assert prompt_tokens_of(bare).tokens == pytest.approx(texts, abs=1)
    assert prompt_tokens_of(bare, 5).tokens == prompt_tokens_of(bare).tokens + 5 * 4
    assert prompt_tokens_of(system, 5).tokens > prompt_tokens_of(bare, 5).tokens + 5
    assert prompt_tokens_of(bare).script == "Latin"
    assert prompt_tokens_of(Prompt(())).tokens == 0
