"""Texts with the number of tokens that they are in the vocabulary of Gemma 3 and 4, counted with the published file.

They are not among those that `kl.text_tokens` was fitted to.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from tests import ROOT


class CountedText(NamedTuple):
    """A text, of which kind it is, and its tokens."""

    kind: str
    name: str
    text: str
    tokens: int


COUNTED = [CountedText(**item) for item in json.loads((ROOT / "tests/kl/counted_texts.json").read_text("utf-8"))]
FIVE_SCRIPTS = [item for item in COUNTED if item.name in {"English", "Russian", "Chinese", "Arabic", "Hindi"}]
