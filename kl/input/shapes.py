"""Other people's formats of responses with log-probabilities, turned into the form that the readers check.

Nothing is made up: what a format lacks is noted in one line that names it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence

from kl.input.problems import Notes, Overwritten, as_list, as_plain, number
from kl.pieces import is_whole

Object = dict[str, object]
_SETTINGS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "logit_bias", "presence_penalty",
             "frequency_penalty", "repetition_penalty")  # fmt: skip
_SECOND_OBJECT = re.compile(rb"\s*\{")
_ABOUT = ("model", "model_version", *_SETTINGS)


def json_lines(data: bytes, load: Callable[[Sequence[bytes]], Sequence[object]], notes: Notes) -> object:
    """The document of a file with one JSON object a line (JSONL); None if it is none, or a defect was noted.

    Its responses are those of all lines, which must answer one prompt, as a file does. What else a line states is of
    its own responses alone.
    """
    body = data.strip()
    breaks = [at for end in (b"\n", b"\r") if (at := body.find(end)) >= 0]
    if not breaks or not _SECOND_OBJECT.match(body, min(breaks)):
        return None  # most files, at no cost
    lines = [line for line in data.splitlines() if line.strip()]
    if len(lines) < 2 or not all(line.lstrip().startswith(b"{") for line in lines):
        return None
    try:
        documents = [as_plain(value) for value in load(lines)]
    except (ValueError, RecursionError):
        return None
    whole = [as_document(document) for document in documents if document is not None]
    if len(whole) < len(lines):
        return None
    prompts = {json.dumps([item.get("prompt"), item.get("system")], sort_keys=True, default=str) for item in whole}
    if len(prompts) > 1:
        return notes.defect("several-prompts", f"the file is JSONL, one object a line, for {len(prompts)} prompts")
    notes.repair("json-lines", f"the file is JSONL, {len(lines)} objects for one prompt; read as one")
    responses: list[object] = []
    for document in whole:
        for item in as_list(document.get("responses")) or []:
            response = as_plain(item)
            responses.append(item if response is None else _with_line(response, document))
    models = {json.dumps(item.get("model"), default=str) for item in whole}
    shared = ("prompt", "system", "model") if len(models) == 1 else ("prompt", "system")
    return {**{name: whole[0][name] for name in shared if name in whole[0]}, "responses": responses}


def _with_line(response: Object, line: Object) -> Object:
    """A response with what its line states, unless it states the same thing itself, in whichever place."""
    nested, of_line = as_plain(response.get("sampling")) or {}, as_plain(line.get("sampling")) or {}
    said = {name for place in (nested, response) for name, value in place.items() if value is not None}
    own = {name: line[name] for name in ("sampling", *_ABOUT) if name in line and name not in said}
    both = {name: value for name, value in of_line.items() if name not in said} | nested
    is_readable = response.get("sampling") in (None, nested)
    return response | own | ({"sampling": both} if both and is_readable else {})


def as_document(document: Object) -> Object:
    """A file's object with its responses under ``responses``, if it is a raw answer of a service or one response.

    The prompt may stand beside a raw answer, or in the request of a batch row.
    """
    if "responses" in document:
        return document
    answer = as_plain(document.get("response")) or document
    answer = as_plain(answer.get("body")) or answer
    items = as_list(answer.get("choices")) or as_list(answer.get("candidates"))
    if items is None:
        return {**document, "responses": [document]} if "text" in document and "logprobs" in document else document
    request = as_plain(document.get("request")) or {}
    asked = as_plain(request.get("body")) or request
    places = (document, answer, asked)
    about = {name: place[name] for name in _ABOUT for place in reversed(places) if name in place}
    about |= {name: document[name] for name in ("system", "sampling") if name in document}
    return {**about, **_prompt(document, asked), "responses": items}


def _prompt(document: Object, asked: Object) -> Object:
    for place in (document, asked):
        for name in ("prompt", "messages"):
            if name in place:
                return {"prompt": place[name]}
    contents = as_list(asked.get("contents"))
    if contents is None:
        return {}
    turns = [as_plain(turn) or {} for turn in contents]
    found: Object = {"prompt": [{"role": turn.get("role", "user"), "content": _parts(turn)} for turn in turns]}
    system = as_plain(asked.get("systemInstruction"))
    return found if system is None else {**found, "system": _parts(system)}


def lacks_prompt(document: Mapping[str, object]) -> str | None:
    """What a raw answer that stands alone is called, to say that its prompt is missing."""
    if "prompt" in document:
        return None
    items = as_list(document.get("responses"))
    first = as_plain(items[0]) if items else None
    return None if first is None else _name_of(first)


def _name_of(item: Object) -> str | None:
    if "message" in item:
        return "a raw answer of chat completions"
    if as_plain(item.get("content")) is not None or "candidates" in item:
        return "a raw answer of Gemini"
    return "a raw answer of completions" if "index" in item and "text" in item else None


def as_response(item: object, notes: Notes) -> object:
    """A response, choice or candidate in the documented form; as it stands if it is in none of the known ones."""
    raw = as_plain(item)
    inner = None if raw is None else as_list(raw.get("choices")) or as_list(raw.get("candidates"))
    if raw is not None and inner is not None and len(inner) == 1:
        raw = as_plain(inner[0])
    if raw is None:
        return item
    content = as_plain(raw.get("content"))
    if content is not None and "text" not in raw:
        return _gemini(raw, content, notes)
    message = as_plain(raw.get("message"))
    if message is not None and "text" not in raw:
        raw = {**raw, "text": message.get("content")}
    holder = as_plain(raw.get("logprobs"))
    if holder is not None and as_list(holder.get("tokens")) is not None:
        return {**raw, "logprobs": {"content": _legacy(holder, notes)}}
    rows = None if holder is None else as_list(holder.get("content"))
    return raw if rows is None else {**raw, "logprobs": {"content": _with_lists(rows)}}


def _gemini(raw: Object, content: Object, notes: Notes) -> Object:
    result = as_plain(raw.get("logprobsResult")) or {}
    chosen, tops = as_list(result.get("chosenCandidates")) or [], as_list(result.get("topCandidates")) or []
    if not chosen or len(tops) != len(chosen):
        what = f"{len(chosen)} chosenCandidates and {len(tops)} topCandidates in its logprobsResult"
        notes.defect("no-logprobs", f"a raw answer of Gemini with {what}")
    rows = [
        {
            **_gemini_token(item),
            "top_logprobs": [_gemini_token(entry) for entry in as_list(top.get("candidates")) or []],
        }
        for item, top in zip(chosen, (as_plain(top) or {} for top in tops), strict=False)
    ]
    reason = {"finish_reason": raw["finishReason"]} if "finishReason" in raw else {}
    return {"text": _parts(content), **reason, "logprobs": {"content": rows}}


def _gemini_token(item: object) -> Object:
    raw = as_plain(item) or {}
    token: Object = {"token": raw.get("token", ""), "logprob": raw.get("logProbability")}
    return token | ({"token_id": raw["tokenId"]} if "tokenId" in raw else {})


def _parts(content: Object) -> str | None:
    texts = [(as_plain(part) or {}).get("text") for part in as_list(content.get("parts")) or []]
    return "".join(text for text in texts if isinstance(text, str)) if texts else None


def _legacy(holder: Object, notes: Notes) -> list[object]:
    """``tokens``, ``token_logprobs`` and ``top_logprobs`` side by side, as rows."""
    columns = [as_list(holder.get(name)) for name in ("tokens", "token_logprobs", "top_logprobs")]
    names = ("tokens", "token_logprobs", "top_logprobs")
    lengths = [f"{0 if column is None else len(column)} {name}" for name, column in zip(names, columns, strict=True)]
    whole = [column for column in columns if column is not None]
    if len(whole) < len(columns) or len({len(column) for column in whole}) > 1:
        notes.defect("no-logprobs", f"`logprobs` of the completions format with {', '.join(lengths)}")
        return []
    rows = [{"token": token, "logprob": value, "top_logprobs": top} for token, value, top in zip(*whole, strict=True)]
    return _with_lists(rows)


def _with_lists(rows: Sequence[object]) -> list[object]:
    """Positions whose lists may be objects of texts and values, with lists of entries.

    In an object, tokens of one text overwrite each other: one may be missing where a key is no token's own, where the
    values do not fall, or where there are fewer than elsewhere. A sampled token that is none of the k best may be added
    to them, and may stand before them.
    """
    raw = {at: row for at, item in enumerate(rows) if (row := as_plain(item)) is not None}
    tops = {at: top for at, row in raw.items() if (top := as_plain(row.get("top_logprobs"))) is not None}
    may_be_added = {at: _least(top) == raw[at].get("token") for at, top in tops.items()}
    k = max((len(top) for at, top in tops.items() if not may_be_added[at]), default=0)
    longest = max(map(len, tops.values()), default=0)
    found = list(rows)
    for at, top in tops.items():
        is_short = len(top) < (longest if may_be_added[at] else k)
        is_first = next(iter(top), None) == raw[at].get("token") and not (may_be_added[at] and len(top) <= k)
        values = [_value(value) for value in top.values()][1 if is_first else 0 :]
        lacks = is_short or not all(map(is_whole, top)) or values != sorted(values, reverse=True)
        entries = [{"token": token, "logprob": value} for token, value in top.items()]
        found[at] = {**raw[at], "top_logprobs": Overwritten(entries) if lacks else entries}
    return found


def _least(top: Object) -> str | None:
    return min(top, key=lambda token: _value(top[token]), default=None)


def _value(value: object) -> float:
    read = number(value)
    return -math.inf if read is None else read
