"""The key of a score: a hash of everything that decides the answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from kl.records import Prompt

KEY_HEX_DIGITS = 32
_FORMAT = "tokenkl-score-1"


def context_keys(
    model: str,
    prompt: Prompt,
    identity: dict[str, Any],
    tokens: Sequence[str],
    token_ids: Sequence[int] | None = None,
) -> Iterator[str]:
    """One key per position of a response: the hash of model, prompt, request settings and the tokens before it.

    Linear in the length of the response. Where the backend feeds token ids, the ids belong to the key; otherwise only
    the text does, so that a token with an empty text leaves the key as it was: the request would be the same.

    Parameters
    ----------
    identity : dict
        What `Backend.identity` returned, JSON types only.
    tokens : sequence of str
        The texts of the response's tokens.
    token_ids : sequence of int, optional
        Their ids, if they are fed to the model.
    """
    head = json.dumps(
        [_FORMAT, model, prompt.canonical(), identity, token_ids is not None], sort_keys=True, ensure_ascii=True
    )
    running = hashlib.sha256(head.encode("ascii"))
    for index, token in enumerate(tokens):
        yield running.copy().hexdigest()[:KEY_HEX_DIGITS]
        running.update(token.encode("utf-8"))
        if token_ids is not None:
            running.update(b"\x00%d\x00" % token_ids[index])
