"""What cannot be seen in a text, or acts on whoever shows it, as signs: on a page, in a terminal, in a log."""

from __future__ import annotations

import unicodedata

_NAMED = {"\t": "⇥", "\r": "␍"}
_UNSEEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}


def sign(letter: str) -> str:
    """A letter; one that cannot be seen by its code, ``⟨U+202E⟩``: controls, formats, all blanks but the usual one."""
    if letter.isprintable() or unicodedata.category(letter) not in _UNSEEN:
        return letter
    return _NAMED.get(letter) or f"⟨U+{ord(letter):04X}⟩"


def on_a_line(text: str) -> str:
    """A text for a terminal or a log, where it is a line and nothing else: a new line in it is ``⏎``."""
    if text.isprintable():
        return text
    return "".join("⏎" if letter == "\n" else sign(letter) for letter in text)
