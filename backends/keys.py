"""The key of a score: a hash of everything that decides the answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl

from kl.columns import TopLists
from kl.records import Prompt

KEY_HEX_DIGITS = 32
_SHORT_BYTES = 8
_FORMAT = "tokenkl-score-1"
_WANTED_FORMAT = "tokenkl-wanted-1"


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


def short_key(key: str) -> int:
    """The first 64 bits of a key, by which many are told apart in little memory."""
    return int(key[: 2 * _SHORT_BYTES], 16)


def wanted_keys(keys: Sequence[str], wanted: TopLists) -> list[str]:
    """The keys of contexts in which some tokens are asked for by name: hashes of their keys and of the tokens.

    Order and repetition of the tokens do not matter. A context of which none is asked keeps its key.

    Parameters
    ----------
    keys : sequence of str
        From `context_keys`.
    wanted : TopLists
        One list for each key.
    """
    entries = wanted.entries
    stated = pl.Series([None] * len(entries), dtype=pl.Binary) if entries.stated is None else entries.stated
    # Neither number nor hexadecimal digits hold the blank that ends them, so that no two tokens are written alike.
    written = pl.DataFrame(
        {"list": wanted.rows, "id": entries.ids, "bytes": stated.bin.encode("hex"), "text": entries.tokens}
    ).select(
        "list", token=pl.concat_str("id", pl.col("bytes").fill_null("-"), pl.col("text").cast(pl.String), separator=" ")
    )
    tokens = written.group_by("list", maintain_order=True).agg(pl.col("token").unique().sort())
    found = list(keys)
    for number, of_list in zip(tokens["list"].to_list(), tokens["token"].to_list(), strict=True):
        content = json.dumps([_WANTED_FORMAT, keys[number], of_list], ensure_ascii=True)
        found[number] = hashlib.sha256(content.encode("ascii")).hexdigest()[:KEY_HEX_DIGITS]
    return found
