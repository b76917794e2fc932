"""Texts from outside in Markdown, which must neither format them nor obey them."""

from __future__ import annotations

import re


def one_line(text: str, longest: int) -> str:
    """A text on one line, cut where it is longer than that many characters."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def escaped(line: str) -> str:
    """A line that Markdown leaves as it is."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", line)
