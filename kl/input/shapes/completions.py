"""Answers of the completions route and of servers of their own: columns, echoed prompts, scored prompts, llama.cpp."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from kl.input.problems import Notes, as_list, as_plain, number, show
from kl.input.shapes.requests import Object
from kl.pieces import REPLACEMENT

_WORDS = re.compile(r"\S\s+\S")  # more than one token has
_STOP_TYPES = {"eos": "stop", "word": "stop", "limit": "length"}


class Asked(NamedTuple):
    """What an answer with tokens of the prompt needs, to say where the response begins.

    ``prompt`` is the one that the response answers; ``whole`` what the model was given (a text, or ids), which may hold
    the response too; ``text`` the response, where it is known. ``scored``: it was given as the last message of a chat.
    ``echo``: whether the prompt was to be given back, None where no request says it.
    """

    prompt: object = None
    whole: object = None
    text: str | None = None
    scored: bool = False
    echo: bool | None = None


class Shown(NamedTuple):
    """A choice with the positions of its response; none where a defect was noted."""

    choice: Object
    rows: list[object]


def legacy_rows(holder: Object, notes: Notes) -> list[object]:
    """``tokens``, ``token_logprobs`` and ``top_logprobs`` side by side, as rows; those of an echoed prompt too."""
    names = ("tokens", "token_logprobs", "top_logprobs")
    columns = [as_list(holder.get(name)) for name in names]
    lengths = [f"{0 if column is None else len(column)} {name}" for name, column in zip(names, columns, strict=True)]
    whole = [column for column in columns if column is not None]
    if len(whole) < len(columns) or len({len(column) for column in whole}) > 1:
        notes.defect("no-logprobs", f"`logprobs` of the completions format with {', '.join(lengths)}")
        return []
    return [{"token": token, "logprob": value, "top_logprobs": top} for token, value, top in zip(*whole, strict=True)]


def without_echo(raw: Object, rows: list[object], asked: Asked, notes: Notes) -> Shown:
    """A choice of the completions format without the prompt, if that is echoed: mostly the first token has no value."""
    name = "an answer of completions that echoes its prompt"
    first = as_plain(rows[0]) if rows else None
    text = raw.get("text")
    if not asked.echo and (first is None or first.get("logprob") is not None or first.get("top_logprobs")):
        prompt = asked.prompt if asked.echo is None and asked.text is None else None
        if isinstance(prompt, str) and isinstance(text, str) and prompt and text != prompt and text.startswith(prompt):
            notes.defect("no-boundary", f"{name}, or a response that begins with the same text")
            return Shown(raw, [])
        return Shown(raw, rows)
    tokens = [str((as_plain(row) or {}).get("token")) for row in rows]
    ids = as_list(asked.whole)
    if ids is not None and asked.text is None and _are_the_prompt(tokens[: len(ids)], asked.prompt):
        start, whole = len(ids), "".join(tokens[len(ids) :])
    else:
        whole = _response_in(text if isinstance(text, str) else "".join(tokens), asked)
        start = None if whole is None else _start_of(tokens, whole)
    return _cut_at(raw, rows, start, whole, name, notes)


def scored_prompt(raw: Object, asked: Asked, notes: Notes) -> Shown:
    """A response that vLLM was given to score: the end of its prompt, with the lists of `prompt_logprobs`."""
    name = "an answer of vLLM with `prompt_logprobs`"
    items = as_list(raw.get("prompt_logprobs")) or []
    ids = as_list(raw.get("prompt_token_ids"))
    if ids is not None and len(ids) != len(items):
        notes.defect("no-logprobs", f"{name}: {len(items)} entries for {len(ids)} tokens, some were left out")
        return Shown(raw, [])
    rows = [_scored_row(item, None if ids is None else ids[at]) for at, item in enumerate(items)][1:]
    tokens = [str(row["token"]) for row in rows]
    given = asked.whole if isinstance(asked.whole, str) else "".join(tokens)
    whole = _response_in(given, asked)
    if isinstance(asked.whole, str) and _is_cut(asked.whole, "".join(tokens)):
        notes.defect("no-boundary", f"{name} of other tokens than the request's `prompt` has: it was cut, or changed")
        return Shown(raw, [])
    start = None if whole is None else _start_of(tokens, whole)
    # What the one generated token ended with says nothing of the response.
    scored = {name: value for name, value in raw.items() if name != "finish_reason"}
    if all(map(_is_ranked, items[1:])):  # a token beside the best is no entry then: all lists are whole
        scored["top_logprobs"] = max((len(as_list(row.get("top_logprobs")) or ()) for row in rows), default=0)
    cut = _cut_at(scored, [*rows], start, whole, name, notes)
    return cut._replace(rows=_without_context_texts(cut.rows))


def native_answer(raw: Object) -> Shown:
    """An answer of llama.cpp's own route in the form of a choice."""
    reason = _STOP_TYPES.get(str(raw.get("stop_type")))
    ended = {} if reason is None else {"finish_reason": reason}
    return Shown({"text": raw.get("content"), **ended}, as_list(raw.get("completion_probabilities")) or [])


def is_scored(raw: Object, asked: Asked) -> bool:
    """Whether the response is in the prompt that was scored, and what was generated after it is no part of it."""
    if asked.scored or "message" in raw:
        return asked.scored
    rows = [_scored_row(item, None) for item in as_list(raw.get("prompt_logprobs")) or []]
    tokens = [str(row["token"]) for row in rows]
    given = [asked.whole] if isinstance(asked.whole, str) else ["".join(tokens), "".join(tokens[1:])]
    if asked.text is not None:
        return given[-1].endswith(asked.text) or not str(raw.get("text")).endswith(asked.text)
    prompt = asked.prompt
    return isinstance(prompt, str) and any(text.startswith(prompt) and text != prompt for text in given)


def _is_cut(whole: str, shown: str) -> bool:
    """Whether a prompt has more before the tokens that are shown than the text of one, which is not."""
    if REPLACEMENT in shown:
        return False
    return not whole.endswith(shown) or _WORDS.search(whole[: len(whole) - len(shown)]) is not None


def _are_the_prompt(tokens: Sequence[str], prompt: object) -> bool:
    """Whether tokens that were given may be the prompt and no more: one of turns is written in a way unknown here."""
    return not isinstance(prompt, str) or "".join(tokens) == prompt


def _response_in(given: str, asked: Asked) -> str | None:
    """The response at the end of what a model was given, or gave back."""
    if asked.text is not None:
        return asked.text if given.endswith(asked.text) else None
    return given[len(asked.prompt) :] if isinstance(asked.prompt, str) and given.startswith(asked.prompt) else None


def _start_of(tokens: Sequence[str], response: str) -> int | None:
    """Which token is the first of the response; None where none begins it, or several may.

    Tokens that show no text are parts of the character that the next one shows, if that has more than one byte.
    """
    left, found = len(response), list[int]()
    for at in range(len(tokens) - 1, -1, -1):
        left -= len(tokens[at])
        if left < 0:
            break
        if left == 0:
            found.append(at)
    if not found or "".join(tokens[found[0] :]) != response:
        return None
    return found[-1] if len(found) == 1 or not response[0].isascii() else None


def _cut_at(raw: Object, rows: list[object], start: int | None, text: str | None, name: str, notes: Notes) -> Shown:
    if text == "" or (start is not None and start >= len(rows)):
        notes.defect("no-boundary", f"{name}, and nothing follows the prompt: the response is not marked off")
    elif start is None or text is None:
        what = "where its response begins is not known: " + (
            "no token begins the text that is to be the response"
            if text is not None
            else "the prompt that is stated is not how its text begins, nor is a response stated that ends it"
        )
        notes.defect("no-boundary", f"{name}, and {what}")
    else:
        return Shown({**raw, "text": text}, rows[start:])
    return Shown(raw, [])


def _scored_row(item: object, own_id: object) -> Object:
    """One item of `prompt_logprobs`: an object by token id, the prompt's own token first."""
    entries = as_plain(item)
    if entries is None:  # of the first token, which nothing was before
        return {"token": "" if item is None else show(item), "logprob": None, "top_logprobs": None}
    own = str(own_id) if own_id is not None else next(iter(entries), "")
    listed = [_scored_entry(key, entries[key]) for key in entries if key != own or not _is_beyond(entries, key)]
    return {**_scored_entry(own, entries.get(own)), "top_logprobs": sorted(listed, key=_falling)}


def _scored_entry(key: str, value: object) -> Object:
    entry = as_plain(value) or {}
    token = entry.get("decoded_token")
    token_id = int(key) if key.isdecimal() else key
    return {"token": "" if token is None else token, "logprob": entry.get("logprob"), "token_id": token_id}


def _is_ranked(item: object) -> bool:
    return all(number((as_plain(entry) or {}).get("rank")) is not None for entry in (as_plain(item) or {}).values())


def _is_beyond(entries: Object, key: str) -> bool:
    """Whether a token stands beside the most probable ones and is not one of them."""
    rank = number((as_plain(entries[key]) or {}).get("rank"))
    return rank is not None and rank > len(entries)


def _falling(entry: Object) -> float:
    value = number(entry.get("logprob"))
    return 0.0 if value is None else -value


def _without_context_texts(rows: Sequence[object]) -> list[object]:
    """Lists inside a character by ids alone: what is shown there is the character, with bytes of tokens before."""
    found: list[object] = []
    inside = False
    for item in rows:
        row = as_plain(item) or {}
        if inside:
            top = [{**entry, "token": ""} for raw in as_list(row.get("top_logprobs")) or [] if (entry := as_plain(raw))]
            row = {**row, "top_logprobs": top}
        inside = row.get("token") == ""
        found.append(row)
    return found
