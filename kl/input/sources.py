"""Files with several JSON objects, one a line (JSONL) or in a list: where each is, and which answer one prompt.

A file's responses answer one prompt. One with answers to several is read in parts, each as a file of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import NamedTuple

import msgspec

from kl.input.problems import Notes, as_list, as_plain
from kl.input.prompts import read_prompt
from kl.input.shapes.answers import as_document, note_request
from kl.input.shapes.requests import ABOUT, Object, foreign_part, prompt_of
from kl.records import Prompt

Buffer = bytes | mmap
Load = Callable[[Sequence[bytes]], Sequence[object]]
SEVERAL_PROMPTS = "several-prompts"  # the kind of the problem of a file that is to be read in parts
LARGE = 32_000_000  # bytes
_SPACE = re.compile(rb"[ \t\r\n]*")
_TO_NEXT = re.compile(rb"\s*")
_LINE = re.compile(rb"[^\r\n]+")
_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"
_ON_ONE_LINE = bytes.maketrans(b"\r\n", b"  ")  # JSON has line breaks between its values only


@contextmanager
def mapped(path: Path) -> Generator[Buffer]:
    """The bytes of a file; of a large one, memory holds what is looked at.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    if path.stat().st_size <= LARGE:
        yield path.read_bytes()
        return
    with path.open("rb") as stream, mmap(stream.fileno(), 0, access=ACCESS_READ) as data:
        yield data


class Piece(NamedTuple):
    """Where one object stands in the bytes of a file."""

    start: int
    stop: int


class Part(NamedTuple):
    """The objects of a file that answer one prompt; ``number`` counts the prompts of the file from 0."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(piece.stop - piece.start for piece in self.pieces)

    def text(self, read: Callable[[int, int], bytes]) -> bytes:
        """The part as a file of its own; ``read(start, size)`` gives bytes of the whole one."""
        return b"\n".join(read(piece.start, piece.stop - piece.start).translate(_ON_ONE_LINE) for piece in self.pieces)


def parts_of(data: Buffer) -> list[Part]:
    """The parts of a file with several objects, in the order in which their prompts come; none of any other file."""
    groups: dict[str, list[Piece]] = {}
    for piece in _pieces_of(data):
        groups.setdefault(_question(data[piece.start : piece.stop]), []).append(piece)
    return [Part(number, tuple(pieces)) for number, pieces in enumerate(groups.values())]


def prompts_of(data: Buffer) -> list[tuple[Part | None, Prompt]]:
    """The usable prompts of a file, each with its part of it: None where that is the whole file."""
    parts: Sequence[Part | None] = parts_of(data) or [None]
    found: list[tuple[Part | None, Prompt]] = []
    for part in parts:
        text = data[:] if part is None else data[part.pieces[0].start : part.pieces[0].stop]
        document = _question_of(text.removeprefix(_BOM))
        prompt = None if document is None else read_prompt(prompt_of(document), Notes(""))
        if prompt is not None:
            found.append((part, prompt))
    return found


def objects_of(data: Buffer) -> Sequence[Piece]:
    """Where the objects of a file are: its only one, or those of a file with several."""
    pieces = _pieces_of(data)
    if pieces:
        return pieces
    whole = data[:]
    bare = whole.removeprefix(_BOM).strip(_BLANK)
    return [Piece(whole.index(bare), whole.index(bare) + len(bare))] if bare.startswith(b"{") else []


def read_document(data: bytes, load: Load, notes: Notes) -> Object | None:
    """The file's object in the documented form; None where it has none."""
    document = _several_objects(data, load, notes)
    if document is not None or notes.first_defect:
        return document
    parsed = _load_json(data, load, notes)
    document = None if notes.first_defect else notes.as_object(parsed, "not-an-object", "the file")
    if document is None:
        return None
    shaped = as_document(document)
    note_request(document, shaped, notes)
    return shaped


def _load_json(data: bytes, load: Load, notes: Notes) -> object:
    encoding = json.detect_encoding(data)
    if not encoding.startswith("utf-8"):
        return notes.defect("not-utf8", f"the file is written in {encoding.upper()}")
    try:
        return load([data])[0]
    except UnicodeDecodeError as error:
        return notes.defect("not-utf8", f"byte {error.start} of the file (0x{data[error.start]:02x}) is not UTF-8")
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        return notes.defect(
            "not-json", "the file is empty" if not data.strip() else f"not JSON: {error.msg} at {where}"
        )
    except RecursionError:
        return notes.defect("nested-too-deeply", "lists or objects of the file are nested too deeply to be read")


def _several_objects(data: bytes, load: Load, notes: Notes) -> Object | None:
    """The document of a file with several objects; None if it is none, or a defect was noted.

    Its responses are those of all objects, which must answer one prompt. What else an object states is of its own
    responses alone.
    """
    parts = parts_of(data)
    if len(parts) > 1:
        n = sum(len(part.pieces) for part in parts)
        what = f"the file holds {n} objects (JSONL, one a line, or a list), for {len(parts)} prompts"
        return notes.defect(SEVERAL_PROMPTS, what)
    if not parts:
        return None
    try:
        values = load([data[piece.start : piece.stop] for piece in parts[0].pieces])
    except (ValueError, RecursionError):
        return None
    documents = [notes.as_object(value, "not-an-object", f"object {at} of the file") for at, value in enumerate(values)]
    whole = [document for document in documents if document is not None]
    if len(whole) < len(values):
        return None
    if len(whole) > 1:
        notes.repair("json-lines", f"the file holds {len(whole)} objects for one prompt; read as one")
    return _joined(whole, notes)


def _pieces_of(data: Buffer) -> Sequence[Piece]:
    start = _SPACE.match(data, len(_BOM) if data[: len(_BOM)] == _BOM else 0)
    begin = start.end() if start else 0
    if data[begin : begin + 1] == b"[":
        return _items_of(data[:])
    if not _has_two_lines(data, begin):
        return []  # most files, at the cost of a look for the end of their first line
    lines = list(_lines_of(data, begin))
    begins = all(data[line.start : line.start + 1] == b"{" for line in lines)
    return lines if begins and len(lines) > 1 else []


def _has_two_lines(data: Buffer, begin: int) -> bool:
    """Whether two lines in a row begin as objects do; blank ones between them are none."""
    line_feed = data.find(b"\n", begin)
    carriage_return = data.find(b"\r", begin, line_feed if line_feed >= 0 else len(data))
    end = carriage_return if carriage_return >= 0 else line_feed
    following = _TO_NEXT.match(data, end) if end >= 0 else None
    return following is not None and data[begin : begin + 1] == data[following.end() : following.end() + 1] == b"{"


def _lines_of(data: Buffer, begin: int) -> Iterator[Piece]:
    """The lines that are not blank, without white space around them."""
    for found in _LINE.finditer(data, begin):
        line = found[0]
        bare = line.strip(_BLANK)
        if bare:
            start = found.start() + line.index(bare)
            yield Piece(start, start + len(bare))


def _items_of(data: bytes) -> list[Piece]:
    """The items of a JSON list whose first one is an object."""
    try:
        items = _LIST.decode(data.removeprefix(_BOM))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return []
    pieces: list[Piece] = []
    end = 0
    for item in items:
        text = bytes(item)
        start = data.index(text, end)
        end = start + len(text)
        pieces.append(Piece(start, end))
    return pieces if pieces and data[pieces[0].start : pieces[0].start + 1] == b"{" else []


class _Choice(msgspec.Struct):
    prompt_logprobs: msgspec.Raw = msgspec.Raw()


class _Question(msgspec.Struct):
    """What an object says of its prompt, of which its lists are no part."""

    prompt: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    system: msgspec.Raw = msgspec.Raw()
    request: msgspec.Raw = msgspec.Raw()
    object: msgspec.Raw = msgspec.Raw()
    instructions: msgspec.Raw = msgspec.Raw()
    prompt_logprobs: msgspec.Raw = msgspec.Raw()
    choices: list[_Choice] | None = None
    response: _Question | None = None
    body: _Question | None = None

    def plain(self) -> Object:
        """The same as the values of an object."""
        found: Object = {}
        for name in ("prompt", "messages", "system", "request", "object", "instructions"):
            raw = bytes(getattr(self, name))
            if raw:
                found[name] = json.loads(raw)
        for name, inner in (("response", self.response), ("body", self.body)):
            if inner is not None:
                found[name] = inner.plain()
        if self.choices is not None:
            found["choices"] = [{"prompt_logprobs": _is_list(choice.prompt_logprobs)} for choice in self.choices]
        return {**found, "prompt_logprobs": _is_list(self.prompt_logprobs)}


def _is_list(raw: msgspec.Raw) -> bool:
    return bytes(memoryview(raw)[:1]) == b"["


_LIST = msgspec.json.Decoder(list[msgspec.Raw])
_QUESTION = msgspec.json.Decoder(_Question)


def _question_of(text: bytes) -> Object | None:
    """What an object says of its prompt, as an object without its lists; None for what is no JSON object."""
    try:
        return _QUESTION.decode(text).plain()
    except (msgspec.MsgspecError, ValueError, RecursionError):
        pass
    try:
        return as_plain(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _question(text: bytes) -> str:
    """A text by which objects that answer one prompt are known; "" for one that is no JSON."""
    document = _question_of(text)
    if document is None:
        return ""
    prompt = prompt_of(document)
    asked = [prompt.get("prompt"), prompt.get("system"), foreign_part(document)]
    return json.dumps(asked, sort_keys=True, default=str)


def _joined(documents: Sequence[Object], notes: Notes) -> Object:
    """One document of several for one prompt."""
    whole: list[Object] = []
    for document in documents:
        shaped = as_document(document)
        note_request(document, shaped, notes)
        whole.append(shaped)
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
    own = {name: line[name] for name in ("sampling", *ABOUT) if name in line and name not in said}
    both = {name: value for name, value in of_line.items() if name not in said} | nested
    is_readable = response.get("sampling") in (None, nested)
    return response | own | ({"sampling": both} if both and is_readable else {})
