"""The contexts at which some responses have lists, found by the tokens that stand before them.

A context is a prompt and the tokens so far. Two are the same if their tokens have the same texts, and the same ids
where both sides state ids of one vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from backends.base import ScoreRequest
from kl.columns import NO_ID, Positions
from kl.pieces import is_whole
from kl.records import Position, Response

_DIGEST_BYTES = 16
ANY_MODEL = "any"


def cut_digests(tokens: Sequence[str]) -> Iterator[bytes]:
    """The hash of the tokens before each of T positions; a token without text is in no text, and counts for nothing."""
    running = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for token in tokens:
        yield running.copy().digest()
        if token:
            data = token.encode("utf-8", "surrogatepass")
            running.update(b"%d:" % len(data) + data)


def id_digests(ids: Sequence[int]) -> Iterator[bytes]:
    """The hash of the ids before each of T positions, as long as all of them are known."""
    running = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for number in ids:
        yield running.copy().digest()
        if number == NO_ID:
            return
        running.update(b"%d," % number)


@dataclass(frozen=True, slots=True)
class Logged:
    """A response of Q with the hashes of its contexts.

    ``by_id`` may be shorter than ``by_cut``: from there on ids are not known.
    """

    response: Response
    by_cut: tuple[bytes, ...]
    by_id: tuple[bytes, ...]

    @classmethod
    def of(cls, response: Response) -> Logged:
        """Of a response."""
        sampled = Positions.of(response.positions).sampled
        return cls(response, tuple(cut_digests(sampled.texts())), tuple(id_digests(sampled.ids.tolist())))

    def is_of(self, model: str) -> bool:
        """Whether a model of that name wrote it, or its lists."""
        return model == ANY_MODEL or model in (self.response.model, self.response.model_version)


class Asked(NamedTuple):
    """The contexts of a request: hashes of the tokens' texts, and of the ids; none where ids are not known."""

    by_cut: tuple[bytes, ...]
    by_id: tuple[bytes, ...]
    ids: Mapping[int, str]

    @classmethod
    def of(cls, request: ScoreRequest) -> Asked:
        """Of all positions of a response."""
        ends = [*request.prefix_ends, len(request.text)]
        tokens = [request.text[start:end] for start, end in pairwise(ends)]
        ids = request.token_ids or ()
        return cls(tuple(cut_digests(tokens)), tuple(id_digests(ids)), _texts_of(ids, tokens))


class Found(NamedTuple):
    """A position of a logged response."""

    logged: Logged
    position: int


@dataclass(slots=True)
class Contexts:
    """All contexts that the responses to one prompt have."""

    logged: list[Logged]
    models: set[str] = field(default_factory=set[str])
    _by_cut: dict[bytes, list[Found]] = field(default_factory=dict[bytes, list[Found]])
    _by_id: dict[bytes, list[Found]] = field(default_factory=dict[bytes, list[Found]])
    _by_text: dict[str, list[Logged]] = field(default_factory=dict[str, list[Logged]])
    _prefixes: set[bytes] = field(default_factory=set[bytes])
    _ids: dict[str, dict[int, str]] = field(default_factory=dict[str, dict[int, str]])

    @classmethod
    def of(cls, responses: Sequence[Response]) -> Contexts:
        """Of responses, of whichever models."""
        contexts = cls([Logged.of(response) for response in responses])
        for logged in contexts.logged:
            contexts._add(logged)
        return contexts

    def _add(self, logged: Logged) -> None:
        response = logged.response
        self._by_text.setdefault(response.text, []).append(logged)
        gaps = {position for position, _ in response.gaps}
        for position, digest in enumerate(logged.by_cut):
            if position not in gaps:
                self._by_cut.setdefault(digest, []).append(Found(logged, position))
        for position, digest in enumerate(logged.by_id):
            self._by_id.setdefault(digest, []).append(Found(logged, position))
        self._prefixes.update(_text_digests(response.text, response.prefix_ends().tolist()))

    def shares_vocabulary(self, asked: Asked, model: str) -> bool:
        """Whether ids of the request are ids here: some stand for the same text, and none for another."""
        if model not in self._ids:
            self._ids[model] = {}
            for logged in self.logged:
                if logged.is_of(model):
                    sampled = Positions.of(logged.response.positions).sampled
                    self._ids[model] |= _texts_of(sampled.ids.tolist(), sampled.texts())
        known = self._ids[model]
        agree = [known[number] == text for number, text in asked.ids.items() if number in known]
        return bool(agree) and all(agree)

    def find(self, request: ScoreRequest, asked: Asked, position: int, *, by_ids: bool) -> Iterator[Found]:
        """Positions with the context of one that is asked, the most fitting first.

        Parameters
        ----------
        by_ids : bool
            Whether ids say which tokens are the same, where both sides have them (`shares_vocabulary`).
        """
        same_id = asked.by_id[position] if by_ids and position < len(asked.by_id) else None
        is_gap = any(position == gap for gap, _ in request.gaps)
        for found in self._candidates(request, asked, position, same_id, is_gap):
            if not found.logged.is_of(request.model):
                continue
            own = found.logged.by_id[found.position] if found.position < len(found.logged.by_id) else None
            if same_id is None or own is None or own == same_id:
                yield found

    def _candidates(
        self, request: ScoreRequest, asked: Asked, position: int, same_id: bytes | None, is_gap: bool
    ) -> Iterator[Found]:
        if is_gap:  # the text does not say what stands before; ids do
            yield from self._by_id.get(same_id, ()) if same_id is not None else ()
            return
        digest = asked.by_cut[position]
        for logged in self._by_text.get(request.text, ()):
            gaps = {gap for gap, _ in logged.response.gaps}
            if position < len(logged.by_cut) and logged.by_cut[position] == digest and position not in gaps:
                yield Found(logged, position)
        yield from self._by_cut.get(digest, ())

    def is_cut_otherwise(self, request: ScoreRequest, position: int) -> bool:
        """Whether the text before a position is there, in other tokens."""
        return next(_text_digests(request.text, [request.prefix_ends[position]])) in self._prefixes


def _text_digests(text: str, ends: Sequence[int]) -> Iterator[bytes]:
    running, start = hashlib.blake2b(digest_size=_DIGEST_BYTES), 0
    for end in ends:
        running.update(text[start:end].encode("utf-8", "surrogatepass"))
        start = end
        yield running.copy().digest()


def _texts_of(ids: Sequence[int], tokens: Sequence[str]) -> dict[int, str]:
    """What ids stand for, of tokens whose texts are their own."""
    pairs = zip(ids, tokens, strict=False)
    return {number: token for number, token in pairs if number != NO_ID and is_whole(token)}


def usable(position: Position) -> str | None:
    """Why the list of a position cannot be Q's; None if it can."""
    if position.defect is not None:
        return position.defect.reason
    if position.may_lack:
        return "overwritten-entries"
    return None if position.top else "no-top-logprobs"
