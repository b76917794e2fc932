"""Reads files of P's responses; ``schema.json`` beside this file and docs/input-format.md say what they may hold.

Nothing that is wrong with a file or a response raises or stops the others: it is an `InputProblem`, and the response is
among the ``unreadable`` ones with its reason.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kl.columns import NO_ID, Entries, Positions
from kl.input.appended import stated_k, without_added
from kl.input.contents import Columns
from kl.input.documents import load_documents
from kl.input.logprobs import read_positions
from kl.input.problems import InputProblem, Notes, as_list, as_plain, encodable, is_encodable, show
from kl.input.prompts import read_prompt, read_sampling
from kl.input.shapes.answers import as_response
from kl.input.shapes.requests import RENDERED, TOOLS
from kl.input.shapes.rows import ids_beside
from kl.input.sources import read_document
from kl.input.texts import Settled, settle_text
from kl.records import Candidate, Prompt, Response, Sampling

__all__ = [
    "RENDERED",
    "InputProblem",
    "ResponseFile",
    "UnreadableResponse",
    "check_pattern",
    "list_files",
    "parse_responses",
    "read_responses",
]


class UnreadableResponse(NamedTuple):
    """A response that was skipped, with what its place in the output needs.

    ``text`` is None where there is none; half surrogate pairs in it are written as U+FFFD.
    """

    response_idx: int
    text: str | None
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class ResponseFile:
    """What one file holds.

    ``responses`` are the usable ones, ``unreadable`` the others, each with its index in the file; together they are
    ``n_responses``. ``prompt`` and ``model`` are None where they are not known.
    """

    source_file: str
    prompt: Prompt | None
    model: str | None
    n_responses: int
    responses: tuple[Response, ...]
    unreadable: tuple[UnreadableResponse, ...]
    problems: tuple[InputProblem, ...]


class _FileFacts(NamedTuple):
    """What a response takes from its file."""

    source_file: str
    prompt: Prompt
    model: str | None
    model_version: str | None
    sampling: Sampling
    rendered: str | None
    k: int | None


def prompt_sha256(text: str) -> str:
    """The hash under which a written prompt is on record."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def list_files(input_dir: Path, pattern: str, max_files: int | None) -> list[Path]:
    """The files below ``input_dir`` that match ``pattern`` (``**/*.json`` is recursive), sorted by path.

    Raises
    ------
    NotADirectoryError
        If ``input_dir`` is no directory.
    ValueError
        If the pattern is empty, absolute or leads out of the directory, or ``max_files`` is negative.
    """
    if not input_dir.is_dir():
        raise NotADirectoryError(f"the input directory {str(input_dir)!r} does not exist or is no directory.")
    check_pattern(pattern)
    if max_files is not None and max_files < 0:
        raise ValueError(f"max_files={max_files} must be at least 0.")
    try:
        found = {path for path in input_dir.glob(pattern) if _is_file(path)}
    except ValueError as error:
        raise ValueError(f"pattern {pattern!r} cannot be used: {error}. Try '*.json' or '**/*.json'.") from error
    return sorted(found, key=lambda path: path.relative_to(input_dir).as_posix())[:max_files]


def check_pattern(pattern: str) -> None:
    """Refuse a pattern of files that leads out of the input directory.

    Raises
    ------
    ValueError
        With the pattern.
    """
    if not pattern or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise ValueError(
            f"pattern {pattern!r} must be relative to the input directory, such as '*.json' or '**/*.json'."
        )


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True  # a broken link or a locked folder: reading it says what is wrong


def read_responses(path: Path, source_file: str | None = None) -> ResponseFile:
    """Read one file; ``source_file`` is what it is called in outputs (its path below the input directory, or its name).

    Never raises for what a file holds, or for one that cannot be read.
    """
    source_file = path.name if source_file is None else source_file
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        notes = Notes(source_file)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        notes.defect("unreadable-file", f"the file cannot be read: {reason}")
        return _nothing(notes)
    return parse_responses(data, source_file)


def parse_responses(data: bytes, source_file: str, *, in_columns: bool = True) -> ResponseFile:
    """As `read_responses`, from the bytes of a file (for one that is not on a local disk).

    What is read is the same whether lists of positions may be read ``in_columns``, or are read entry by entry.
    """
    notes = Notes(source_file)
    load = partial(load_documents, in_columns=in_columns)
    document = read_document(data, load, notes)
    if document is None:
        return _nothing(notes)
    prompt = None if notes.first_defect else read_prompt(document, notes)
    if as_plain(document.get("continues")) is not None:
        notes.defect("continues-prefix", "the responses go on from a prefix, which is not part of them (`continues`)")
    foreign = next((name for name in TOOLS if document.get(name)), None)
    if foreign is not None:
        notes.defect("foreign-prompt-part", f"the file has `{foreign}`, which the model was given beside the prompt")
    items = _read_list(document, notes)
    model = _read_name(document, "model", None, notes)
    version = _read_name(document, "model_version", None, notes)
    sampling = read_sampling(document, Sampling(), notes)
    if prompt is None or notes.first_defect:
        return _nothing(notes, prompt, model, items)
    rendered = _read_name(document, RENDERED, None, notes)
    facts = _FileFacts(source_file, prompt, model, version, sampling, rendered, stated_k(document))
    responses: list[Response] = []
    unreadable: list[UnreadableResponse] = []
    problems = [*notes.problems()]
    for index, item in enumerate(items):
        noted = Notes(source_file, index)
        shaped = as_response(item, noted)
        response = None if noted.first_defect else _read_response(shaped, facts, noted)
        if response is not None:
            responses.append(response)
        else:
            unreadable.append(_unreadable(index, item, noted))
        problems += noted.problems()
    return ResponseFile(source_file, prompt, model, len(items), tuple(responses), tuple(unreadable), tuple(problems))


def _nothing(
    notes: Notes, prompt: Prompt | None = None, model: str | None = None, items: list[object] | None = None
) -> ResponseFile:
    """A file without a usable response; each keeps its place, with the file's defect as its reason."""
    places = tuple(_unreadable(index, item, notes) for index, item in enumerate(items or []))
    return ResponseFile(notes.source_file, prompt, model, len(places), (), places, notes.problems())


def _unreadable(index: int, item: object, notes: Notes) -> UnreadableResponse:
    defect = notes.first_defect
    assert defect is not None, "a response is skipped for a noted defect only"
    text = (as_plain(item) or {}).get("text")
    return UnreadableResponse(index, encodable(text) if isinstance(text, str) else None, defect.kind, defect.message)


def _read_list(document: dict[str, object], notes: Notes) -> list[object]:
    raw = document.get("responses")
    items = as_list(raw)
    if raw is not None and items is None:
        notes.defect("bad-responses", f"`responses` is {show(raw)}")
    elif not items:
        notes.defect("no-responses", f"`responses` is {show(raw) if 'responses' in document else 'missing'}")
    return items or []


def _read_name(raw: dict[str, object], key: str, inherited: str | None, notes: Notes) -> str | None:
    """A label that no number depends on: one that is no text is noted and left out."""
    value = raw.get(key)
    if value is None:
        return inherited
    if isinstance(value, str) and is_encodable(value):
        return value
    return notes.repair(f"bad-{key.replace('_', '-')}", f"`{key}` is {show(value)}, not a text; taken as not stated")


def _read_response(item: object, facts: _FileFacts, notes: Notes) -> Response | None:
    raw = notes.as_object(item, "bad-response", "the response")
    if raw is None:
        return None
    model = _read_name(raw, "model", facts.model, notes)
    finish_reason = _read_name(raw, "finish_reason", None, notes)
    version = _read_name(raw, "model_version", facts.model_version, notes)
    sampling = read_sampling(raw, facts.sampling, notes)
    text = _read_text(raw, notes)
    content = None if text is None else _read_content(raw, text, notes)
    read = None if content is None else _read_positions(content, raw, notes)
    if read is not None and not notes.first_defect:
        k = stated_k(raw)
        read = read._replace(positions=without_added(read.positions, facts.k if k is None else k, notes))
    if text is None or read is None or notes.first_defect:
        return None
    settled = settle_text(text, read.sampled, finish_reason, notes)
    kept = None if settled is None else _kept(read, settled, notes)
    if settled is None or kept is None:
        return None
    index = notes.response_idx
    assert index is not None, "the notes of a response carry its index"
    has_stop = settled.has_stop and len(kept) == len(settled.tokens)
    gaps = tuple(gap for gap in settled.gaps if gap[0] < len(kept))
    place = (facts.source_file, index)
    rendered = _read_name(raw, RENDERED, facts.rendered, notes)
    about = (finish_reason, sampling, version, has_stop, gaps, rendered)
    return Response(*place, facts.prompt, model, settled.text, kept, *about)


class _Read(NamedTuple):
    """Positions, and the texts and bytes of their sampled tokens as these stand in the file."""

    sampled: list[Candidate]
    positions: Positions


def _read_positions(content: list[object] | Columns, raw: dict[str, object], notes: Notes) -> _Read | None:
    if isinstance(content, Columns):
        notes.repair_many(content.repairs, content.counts)
        return _Read(content.sampled, _with_ids(content.positions, raw))
    positions = read_positions(content, notes)
    if positions is None:
        return None
    sampled = [position.sampled for position in positions]
    whole = [replace(p, sampled=p.sampled._replace(token=encodable(p.sampled.token))) for p in positions]
    return _Read(sampled, Positions.of(whole))


def _with_ids(positions: Positions, raw: dict[str, object]) -> Positions:
    """Columns that state no ids, with those of the sampled tokens that stand beside them."""
    ids = ids_beside(raw, len(positions)) if "token_ids" in raw else None
    stated = (positions.sampled.ids != NO_ID).any() or (positions.tops.entries.ids != NO_ID).any()
    if ids is None or stated:
        return positions
    return replace(positions, sampled=replace(positions.sampled, ids=np.array(ids, dtype=np.int64)))


def _kept(read: _Read, settled: Settled, notes: Notes) -> Positions | None:
    """The positions of the response with the tokens' texts; without its stop where that has no list."""
    n = len(settled.tokens)
    kept = read.positions.part(0, n) if n < len(read.positions) else read.positions
    if settled.pieces or settled.tokens != [candidate.token for candidate in read.sampled[:n]]:
        kept = replace(kept, sampled=_with_texts(kept.sampled, read.sampled[:n], settled))
    last = n - 1
    if not kept.tops.lengths[last] and (settled.has_stop or last not in kept.defects):
        if not settled.has_stop:
            return notes.defect("no-top-logprobs", "no `top_logprobs`", last)
        if last == 0:
            return notes.defect("empty-response", "the response has no token but the one that ends the turn")
        notes.repair("end-token", "the token ends the turn and has no list; position dropped", last)
        kept = kept.part(0, last)
    return kept


def _with_texts(numbers: Entries, sampled: list[Candidate], settled: Settled) -> Entries:
    pieces = settled.pieces or []
    stated = [*pieces, *(candidate.token_bytes for candidate in sampled[len(pieces) :])]
    written = Entries.from_lists(
        [encodable(token) for token in settled.tokens], numbers.logprobs.tolist(), None, stated
    )
    return replace(numbers, tokens=written.tokens, stated=written.stated)


def _read_text(raw: dict[str, object], notes: Notes) -> str | None:
    text = raw.get("text")
    if text is None:
        return notes.defect("no-text", f"`text` is {'null' if 'text' in raw else 'missing'}")
    if not isinstance(text, str):
        return notes.defect("bad-text", f"`text` is {show(text)}")
    if not is_encodable(text):
        at = next(i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff")
        return notes.defect("lone-surrogate", f"character {at} of `text` is {show(text[at])}")
    return text


def _read_content(raw: dict[str, object], text: str, notes: Notes) -> list[object] | Columns | None:
    logprobs = raw.get("logprobs")
    if logprobs is None:
        return notes.defect("no-logprobs", f"`logprobs` is {'null' if 'logprobs' in raw else 'missing'}")
    holder = notes.as_object(logprobs, "bad-logprobs", "`logprobs`")
    if holder is None:
        return None
    content = holder.get("content")
    if isinstance(content, Columns):
        return content
    items = as_list(content)
    if content is not None and items is None:
        return notes.defect("bad-logprobs", f"`logprobs.content` is {show(content)}")
    if not items and not text:
        return notes.defect("empty-response", "the response has neither text nor tokens")
    if not items:
        return notes.defect(
            "no-logprobs", f"`logprobs.content` is {show(content) if 'content' in holder else 'missing'}"
        )
    return items
