"""Other people's files in the form of the documentation, position by position as their source has them.

Values are not touched, so that what the readers say of a file they say of its conversion: only its form is another one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

from kl.columns import Positions
from kl.input.appended import stated_k
from kl.input.documents import load_documents
from kl.input.problems import Notes, as_list, as_plain
from kl.input.responses import ResponseFile, parse_responses
from kl.input.shapes.answers import as_response
from kl.input.shapes.requests import RENDERED, K, Object, prompt_of
from kl.input.sources import Buffer, objects_of, parts_of, read_document
from kl.input.writer import prompt_fields
from kl.records import Defect, Response, Sampling

_NAMES = ("custom_id", "key", "id")
_TOKEN = ("token", "token_id", "bytes")
_OF_THE_PROMPT = ("prompt", "messages", "system")


class Converted(NamedTuple):
    """One prompt of a file: what the readers say of it, and the document; None if no response can be read.

    ``number`` counts the prompts of a file with several; None in any other file.
    """

    number: int | None
    read: ResponseFile
    document: Object | None


def converted(data: Buffer, source_file: str) -> Iterator[Converted]:
    """The prompts of a file, each with its readable responses in the documented form."""
    parts = parts_of(data)
    if len(parts) < 2:
        yield _converted(data[:], source_file, None)
        return
    for part in parts:
        text = part.text(lambda start, size: data[start : start + size])
        yield _converted(text, f"{source_file}#{part.number}", part.number)


class UnclearRequestsError(ValueError):
    """A file of requests that does not say which is which."""


def read_requests(data: bytes) -> dict[str, Object]:
    """What was asked, by the name of the answer: of the rows of a batch's input, or ``{"custom_id": …, "prompt": …}``.

    Raises
    ------
    UnclearRequestsError
        If a row is no object, or has no name, or that of another one.
    """
    found: dict[str, Object] = {}
    for at, piece in enumerate(objects_of(data)):
        try:
            row = as_plain(json.loads(data[piece.start : piece.stop]))
        except ValueError as error:
            raise UnclearRequestsError(f"row {at} is no JSON: {error}") from error
        name = None if row is None else _name_of(row)
        if row is None or name is None:
            raise UnclearRequestsError(f"row {at} has none of {', '.join(_NAMES)}, by which answers are known")
        if found.setdefault(name, row) != row:
            raise UnclearRequestsError(f"two rows are called {name!r}, and differ")
    return found


def with_requests(data: Buffer, requests: Mapping[str, Object], names: Sequence[str]) -> bytes:
    """The objects of a file, one a line, with their requests beside those that have no prompt.

    Parameters
    ----------
    names : sequence of str
        By which the request of a file's only object may be known, too.
    """
    pieces = objects_of(data)
    lines = [
        _with_request(data[piece.start : piece.stop], requests, names if len(pieces) == 1 else ()) for piece in pieces
    ]
    return b"\n".join(lines) if lines else data[:]


def _with_request(text: bytes, requests: Mapping[str, Object], names: Sequence[str]) -> bytes:
    try:
        document = as_plain(json.loads(text))
    except (ValueError, RecursionError):
        return text
    if document is None or "responses" in document or prompt_of(document):
        return text
    known = [name for name in (_name_of(document), *names) if name in requests]
    if not known:
        return text
    row = requests[known[0] or ""]
    beside = {name: row[name] for name in _OF_THE_PROMPT if name in row}
    added = beside or {"request": as_plain(row.get("request")) or row}
    # In front of the object's own text, whose numbers stay as they are written.
    start = json.dumps(added, ensure_ascii=True)[:-1].encode()
    return start + (b"," if document else b"") + text[text.index(b"{") + 1 :]


def _name_of(row: Object) -> str | None:
    return next((str(row[name]) for name in _NAMES if row.get(name) is not None), None)


def _converted(data: bytes, source_file: str, number: int | None) -> Converted:
    read = parse_responses(data, source_file)
    if not read.responses or read.prompt is None:
        return Converted(number, read, None)
    document = read_document(data, lambda texts: load_documents(texts, in_columns=False), Notes(source_file))
    items = as_list((document or {}).get("responses")) or []
    head: Object = {**prompt_fields(read.prompt), **({} if read.model is None else {"model": read.model})}
    k = stated_k(document or {})
    responses = [_response(items[response.response_idx], response, read.model, k) for response in read.responses]
    return Converted(number, read, {**head, "responses": responses})


def _response(item: object, response: Response, model: str | None, k: int | None) -> Object:
    """The response as its source has it, with the settings and names that hold for it."""
    shaped = as_plain(as_response(item, Notes(response.source_file, response.response_idx))) or {}
    content = as_list((as_plain(shaped.get("logprobs")) or {}).get("content")) or []
    about = {
        "model": None if response.model == model else response.model,
        "model_version": response.model_version,
        RENDERED: response.rendered_prompt_sha256,
        "finish_reason": response.finish_reason,
        "sampling": _stated(response.sampling) or None,
        K: k if stated_k(shaped) is None else stated_k(shaped),
    }
    defects = Positions.of(response.positions).defects
    # What comes after the end of the turn is no position of the response, and may hold numbers that JSON has not.
    rows = [_row(row, defects.get(at), at < len(response.positions)) for at, row in enumerate(content)]
    stated = {name: value for name, value in about.items() if value is not None}
    return {**stated, "text": shaped.get("text"), "logprobs": {"content": rows}}


def _stated(sampling: Sampling) -> Object:
    return {name: value for name, value in asdict(sampling).items() if value is not None}


def _row(row: object, defect: Defect | None, is_position: bool) -> Object:
    """A position by what the documented form has; without its numbers where these cannot be right."""
    raw = as_plain(row) or {}
    token = _named(raw, _TOKEN)
    if defect is not None:
        stated = raw.get("unusable")
        reason = stated if isinstance(stated, str) else defect.message.partition(": ")[2]
        return {**token, "logprob": None, "top_logprobs": [], "unusable": reason}
    kept = _named(raw, (*_TOKEN, "logprob", "may_lack", "unusable"))
    top = as_list(raw.get("top_logprobs"))
    if top is not None:
        kept["top_logprobs"] = [_named(as_plain(entry) or {}, (*_TOKEN, "logprob")) for entry in top]
    if not is_position and not _is_json(kept):
        return {**token, "logprob": None, "top_logprobs": []}
    return kept


def _named(raw: Object, names: Sequence[str]) -> Object:
    return {name: raw[name] for name in names if name in raw}


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True
