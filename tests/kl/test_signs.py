"""Texts of others on a line of ours."""

import pytest

from kl.signs import on_a_line

TEXTS = {
    "plain é 漢 🙂": "plain é 漢 🙂",
    "a\x1b[31mb\x1b[0m\x07": "a⟨U+001B⟩[31mb⟨U+001B⟩[0m⟨U+0007⟩",
    "two\nlines\r\n": "two⏎lines␍⏎",
    "\u202egnp.exe\u2066": "⟨U+202E⟩gnp.exe⟨U+2066⟩",
    "\x9b2J\u2028\ud800": "⟨U+009B⟩2J⟨U+2028⟩⟨U+D800⟩",
}


@pytest.mark.parametrize(("text", "shown"), TEXTS.items())
def test_nothing_in_a_text_acts_on_who_shows_it(text: str, shown: str) -> None:
    assert on_a_line(text) == shown
    assert on_a_line(shown) == shown
