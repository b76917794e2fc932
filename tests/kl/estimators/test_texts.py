"""What texts show is known by their numbers, and stays so whoever asks."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kl.columns import Entries, IntArray
from kl.estimators.matching import texts
from kl.estimators.matching.texts import Texts, TextSigns
from kl.pieces import byte_level, is_whole

ODD = [
    "",
    " ",
    "  ",
    "\ufffd",
    "a\ufffd",
    "\\xe2",
    "\\xe2\\x8",
    "token_id:7",
    "token_id:٣",
    "<0xE2>",
    "bytes:\\xe2",
    "\n",
]
TEXT = st.text(st.sampled_from(" a1é的▁Ġ\n\x1c\\x<>"), max_size=4)
TOKENS = st.lists(st.none() | st.sampled_from(ODD) | TEXT, max_size=30)


def entries_of(tokens: list[str | None]) -> Entries:
    return Entries.from_lists(tokens, [None] * len(tokens))


def expected(token: str | None) -> int:
    """By the rules of `kl.estimators.token_bytes`, in Python."""
    if token is None:
        return texts.EMPTY
    is_control = len(token) > 2 and token[0] == "<" and token[-1] == ">"
    is_piece = is_whole(token) and not is_control
    found = {
        texts.EMPTY: token == "",
        texts.LOSSY: token != "" and not is_whole(token),
        texts.HEX: re.fullmatch(r"(?:\\x[0-9A-Fa-f]{2})+", token),
        texts.NUMBER: re.fullmatch(r"token_id:\d+", token),
        texts.ESCAPED: token.startswith(("<0x", "bytes:")),
        texts.BLANK: token.strip(" ") == "",
        texts.WORD: token[:1] == " " and not token.isspace(),
        texts.OTHER: is_piece and token.strip(" ") and byte_level(token) is None,
        texts.RAW_BYTES: is_piece and token[:1] in "ĠĊ",
        texts.RAW_PIECE: is_piece and token[:1] == "▁",
        texts.UNSURE: not is_control and not token.isascii() and ("▁" in token or byte_level(token) is not None),
    }
    return sum(sign for sign, is_so in found.items() if is_so)


def shown(signs: TextSigns) -> list[int]:
    return [int(sign) & 0x7FF for sign in signs]


@given(st.lists(TOKENS, max_size=4))
def test_signs_are_those_of_the_text_whatever_was_met_before(batches: list[list[str | None]]) -> None:
    known = Texts()
    for tokens in batches:
        entries = entries_of(tokens)
        assert shown(known.signs(entries.tokens, entries.codes())) == [expected(token) for token in tokens]
        there: IntArray = entries.codes()[entries.codes() >= 0]
        assert known.bytes_of(there) == [token.encode() for token in tokens if token is not None]


def test_threads_find_the_same() -> None:
    known = Texts()
    batches = [
        [f" {chr(97 + number % 7)}{number}" for number in range(first, first + 500)] for first in range(0, 4000, 50)
    ]
    columns = [entries_of([*tokens]) for tokens in batches]

    def look(entries: Entries) -> list[int]:
        return shown(known.signs(entries.tokens, entries.codes()))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(look, columns)) == [[texts.WORD | texts.OTHER] * 500 for _ in batches]


def test_a_number_lasts_when_no_list_is_left() -> None:
    tokens = [f"only here {number}" for number in range(5)]
    first = entries_of([*tokens]).codes()
    assert np.array_equal(entries_of([*reversed(tokens)]).codes(), first[::-1])
