"""Texts of tokens so that everything in them can be seen and nothing in them acts."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

from kl.pieces import REPLACEMENT
from kl.signs import sign

LONGEST = 200  # letters of a token that are shown


@lru_cache(maxsize=65_536)
def visible(token: str, stated: bytes | None = None, longest: int = LONGEST) -> str:
    """A token's text with what cannot be seen spelled out.

    Parts of characters are shown by their bytes where those are known, ``⟨E2 80⟩``; control and format characters (also
    those that turn the direction of a text) by their code, ``⟨U+202E⟩``; a mark without its letter on a dotted circle.
    New lines and blanks stay. Of a longer text the ``longest`` first letters are shown.
    """
    if stated is not None and (not token or REPLACEMENT in token):
        try:
            token = stated.decode()
        except UnicodeDecodeError:
            return f"⟨{stated.hex(' ').upper()}⟩"
    if not token:
        return "⟨empty⟩"
    if token.isascii() and token.isprintable() and len(token) <= longest:
        return token
    cut = token[:longest]
    if unicodedata.category(cut[0]).startswith("M"):
        cut = "◌" + cut
    return "".join(letter if letter == "\n" else sign(letter) for letter in cut) + ("…" if len(token) > longest else "")


def in_a_line(text: str) -> str:
    """What `visible` gives, with blanks and new lines as signs: for a list, where they would not be seen."""
    return text.replace(" ", "␣").replace("\n", "⏎")
