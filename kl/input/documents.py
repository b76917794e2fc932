"""From the bytes of a file to JSON values, with the lists of positions as columns where nothing is wrong with them.

Nearly all of a file are its lists of positions. They are cut out of it and read as a whole (`kl.input.contents`); the
rest, and whatever list that cannot be read so, is what the standard library makes of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

import msgspec
import numpy as np

from kl.input.contents import read_contents
from kl.input.problems import RepeatedKeys

_LONG_INT = 400  # digits; beyond the range of a float, and int() refuses 4,300
_MARK = b"NaN"  # stands for a list that was cut out: a file that has it elsewhere is not cut
_BOM = b"\xef\xbb\xbf"


class _Holder(msgspec.Struct):
    content: msgspec.Raw = msgspec.Raw()


class _Place(msgspec.Struct):
    """Where a file may have lists of positions, in the form of the documentation and in those of services."""

    logprobs: _Holder | None = None
    responses: list[_Place] | None = None
    choices: list[_Place] | None = None
    response: _Place | None = None
    body: _Place | None = None

    def contents(self) -> Iterator[msgspec.Raw]:
        if self.logprobs is not None:
            yield self.logprobs.content
        for place in (*(self.responses or ()), *(self.choices or ()), self.response, self.body):
            if place is not None:
                yield from place.contents()


_PLACES = msgspec.json.Decoder(_Place)


class _Skeleton(NamedTuple):
    """A JSON text, and the lists that were cut out of it, in order."""

    text: bytes
    contents: Sequence[memoryview] = ()


def load_documents(texts: Sequence[bytes], *, in_columns: bool = True) -> list[object]:
    """The values of JSON texts; a list of positions may be `Columns`, unless all are to be read as plain values.

    Raises
    ------
    UnicodeDecodeError, json.JSONDecodeError, RecursionError
        As of the standard library.
    """
    skeletons = [_cut(text) for text in texts] if in_columns else []
    if any(skeleton.contents for skeleton in skeletons):
        try:
            read = iter(read_contents([content for skeleton in skeletons for content in skeleton.contents], load))
            return [load(skeleton.text, list(islice(read, len(skeleton.contents)))) for skeleton in skeletons]
        except (ValueError, RecursionError):
            pass  # the whole text says what is wrong, and where
    return [load(text) for text in texts]


def load(text: bytes | memoryview, cut: Iterable[object] = ()) -> object:
    """The value of one JSON text, with what was cut out of it."""
    found = list(cut)
    marks = iter(found)
    return json.loads(
        str(text, "utf-8").removeprefix("\ufeff"),
        object_pairs_hook=_object,
        parse_int=_int,
        parse_constant=(lambda _: next(marks)) if found else None,
    )


def _cut(text: bytes) -> _Skeleton:
    text = text.removeprefix(_BOM)
    try:
        raws = [raw for raw in _PLACES.decode(text).contents() if bytes(memoryview(raw)[:1]) == b"["]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _Skeleton(text)
    begin = _address(text)
    contents = sorted((_address(raw) - begin, memoryview(raw)) for raw in raws)
    spans = [(0, 0), *((at, at + len(content)) for at, content in contents), (len(text), len(text))]
    kept = [memoryview(text)[end:start] for (_, end), (start, _) in pairwise(spans)]
    return _Skeleton(_MARK.join(kept), [content for _, content in contents])


def _address(data: bytes | msgspec.Raw) -> int:
    """Where bytes lie in memory: a raw part of a text is a view of it."""
    return np.frombuffer(data, dtype=np.uint8).ctypes.data


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    marked = RepeatedKeys(plain)
    seen: set[str] = set()
    marked.repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
    return marked


def _int(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONG_INT else float(digits)
