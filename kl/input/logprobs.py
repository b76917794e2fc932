"""Reads and checks the log-probabilities of one response.

What is wrong is noted by position. A repair is made only where it is certain. A token that is not known makes the whole
response unusable, because every later position depends on the tokens before it; numbers that cannot be right make the
position unusable, and the response where they are many.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple, cast

from kl.input.problems import Notes, as_list, as_plain, encodable, is_encodable, number, show
from kl.pieces import is_whole, own_bytes
from kl.records import LARGEST_MASS, UNKNOWN_LOGPROB, Candidate, Defect, Position

FLOAT_NOISE = 1e-5  # a logprob above 0 by at most this is a rounding error of a float32 log-softmax
SAMPLED_TOLERANCE = 6e-3  # nats, between a token's own logprob and its entry in the list: one may have two decimals
_ID_END = 2**63
# So many positions, and this share of all, may have numbers that do not belong to their token by chance; where there
# are more, lists and tokens have lost each other, and the other positions cannot be trusted either.
_FEW_POSITIONS, _FEW_SHARE = 3, 0.1
_LARGEST_SHARE = 0.125  # of a response's positions that may be unusable for whatever reason
_LONGEST_REASON = 300  # characters of a text in a file
_MARKS = {"may_lack": bool, "unusable": str}  # of a position
_MIXED_UP = frozenset({"sampled-disagrees", "sampled-above-list"})


UNSORTED = "`top_logprobs` does not fall; sorted"


def unknown_sampled(value: object) -> str:
    """What is said of a sampled token whose log-probability is not known."""
    return f"the sampled token's logprob is {show(value)}, not reported; taken from its list, or as not known"


def null_entry(rank: int) -> str:
    """What is said of an entry without log-probability at the end of a list."""
    what = f"the `logprob` of entry {rank} of top_logprobs, which ends the list, is null"
    return f"{what}; taken as minus infinity and out of the list"


def masked(token: str, logprob: float) -> str:
    """What is said of an entry whose log-probability is a mark."""
    return f"{show(token)} is listed with logprob {logprob!r}, a mark for a masked token; taken out of the list"


def added(token: str) -> str:
    """What is said of a sampled token that is not one of the most probable ones of its list."""
    what = f"the sampled token {show(token)} ends the list, seemingly added to the most probable ones"
    return f"{what}; taken out of the list"


def read_positions(content: list[object], notes: Notes) -> list[Position] | None:
    """The positions of a response, in order; None where it cannot be used. All defects are noted.

    A position whose numbers cannot be right has no list, and says why. The last one may lack its list, which is no
    defect if it is the end of the turn.
    """
    last = len(content) - 1
    hides = any(map(_hides_text, content))
    positions = [
        _read_position(raw, index, notes, needs_list=index < last, hides=hides) for index, raw in enumerate(content)
    ]
    whole = [position for position in positions if position is not None]
    _refuse_many(len(positions), notes)
    if notes.first_defect is not None or len(whole) < len(positions):
        return None
    return _without_appended(whole, notes)


def _refuse_many(n_positions: int, notes: Notes) -> None:
    """Refuse a response of which over an eighth cannot be used, or whose tokens and lists are mixed up."""
    unusable = [*notes.unusable.values()]
    mixed = [problem for problem in unusable if problem.kind in _MIXED_UP]
    if len(unusable) > _LARGEST_SHARE * n_positions:
        notes.refuse_for(unusable[0])
    elif len(mixed) > max(_FEW_POSITIONS, _FEW_SHARE * n_positions):
        notes.refuse_for(mixed[0])


def _hides_text(raw: object) -> bool:
    """Whether a position has a token, sampled or listed, whose text its source does not show."""
    entry = as_plain(raw) or {}
    items = [entry, *(as_list(entry.get("top_logprobs")) or [])]
    tokens = [(as_plain(item) or {}).get("token") for item in items]
    return any(isinstance(token, str) and not is_whole(token) for token in tokens)


def _read_position(raw: object, index: int, notes: Notes, *, needs_list: bool, hides: bool) -> Position | None:
    entry = notes.as_object(raw, "bad-position", "the entry", index)
    if entry is None:
        return None
    sampled = _read_sampled(entry, index, notes)
    listed = _read_top(entry.get("top_logprobs"), index, notes)
    if sampled is None:
        return None
    for name, kind in _MARKS.items():
        if (mark := entry.get(name)) is not None and not isinstance(mark, kind):
            notes.defect_at(index, "bad-mark", f"`{name}` is {show(mark)}")
    if isinstance(reason := entry.get("unusable"), str):
        notes.defect_at(index, "unusable-list", " ".join(reason.split())[:_LONGEST_REASON])
    if listed is None or index in notes.unusable:
        return _unusable(sampled, index, notes)
    if not listed.top:
        if not needs_list:
            return Position(sampled, (), listed.n_masked)
        _no_list(entry, index, notes)
        return _unusable(sampled, index, notes)
    top, was_sorted = _sorted(listed.top, index, notes)
    may_lack = entry.get("may_lack") is True
    if may_lack:
        what = "tokens of one text overwrote each other in `top_logprobs`, which may lack some"
        notes.repair("overwritten-entries", f"{what}; its smallest value is not taken as a limit for these", index)
    sampled = _agreed(sampled, top, index, notes, hides=hides or may_lack)
    if index in notes.unusable:
        return _unusable(sampled, index, notes)
    if not was_sorted and len(top) > 1 and is_same_token(sampled, top[-1]):
        # Some servers write the sampled token first, however improbable, and then the most probable ones.
        top = _drop_last(top, index, notes)
    return Position(sampled, tuple(top), listed.n_masked, may_lack=may_lack)


def _unusable(sampled: Candidate, position: int, notes: Notes) -> Position:
    problem = notes.unusable[position]
    return Position(sampled._replace(logprob=None), (), defect=Defect(problem.kind, problem.message))


def _no_list(entry: dict[str, object], position: int, notes: Notes) -> None:
    raw = entry.get("top_logprobs")
    what = "no `top_logprobs`" if raw is None else f"`top_logprobs` is {show(raw)}"
    if raw:
        what = "`top_logprobs` holds no probabilities, only marks for masked tokens"
    notes.defect_at(position, "no-top-logprobs", what)


def _read_sampled(entry: dict[str, object], position: int, notes: Notes) -> Candidate | None:
    name = "the sampled token"
    sampled = _read_token(entry, name, position, notes, partial(_refuse_response, notes, position))
    if sampled is None:
        return None
    is_null = "logprob" in entry and entry["logprob"] is None
    logprob = None if is_null else _read_logprob(entry, name, position, notes)
    if position in notes.unusable or (logprob is not None and logprob > UNKNOWN_LOGPROB):
        return sampled._replace(logprob=logprob)
    if logprob is not None and math.isinf(logprob):
        notes.defect_at(position, "infinite-logprob", f"the sampled token's logprob is {show(entry['logprob'])}")
    else:
        notes.repair("unknown-logprob", unknown_sampled(entry["logprob"]), position)
    return sampled


def _refuse_response(notes: Notes, position: int, kind: str, what: str) -> None:
    notes.defect(kind, what, position)


def _read_listed(raw: dict[str, object], name: str, position: int, notes: Notes) -> Candidate | None:
    listed = _read_token(raw, name, position, notes, partial(notes.defect_at, position))
    logprob = None if listed is None else _read_logprob(raw, name, position, notes)
    return None if listed is None or logprob is None else listed._replace(logprob=logprob)


def _read_token(
    raw: dict[str, object], name: str, position: int, notes: Notes, refuse: Callable[[str, str], None]
) -> Candidate | None:
    """What says which token it is, without its log-probability."""
    token = raw.get("token")
    if not isinstance(token, str):
        shown = show(token) if "token" in raw else "missing"
        return refuse("bad-token", f"the `token` of {name} is {shown}")
    token_id = raw.get("token_id")
    if type(token_id) is float and token_id.is_integer():
        notes.repair("float-id", f"the `token_id` of {name} is {show(token_id)}; taken as {int(token_id)}", position)
        token_id = int(token_id)
    if token_id is not None and not (type(token_id) is int and 0 <= token_id < _ID_END):
        return refuse("bad-token-id", f"the `token_id` of {name} is {show(token_id)}")
    token_bytes = raw.get("bytes")
    if token_bytes is None:
        return Candidate(token, None, token_id)
    items = as_list(token_bytes)
    if items is None or not all(type(item) is int and 0 <= item < 256 for item in items):
        return refuse("bad-bytes", f"the `bytes` of {name} are {show(token_bytes)}, not of 0 to 255")
    return Candidate(token, None, token_id, bytes(cast("list[int]", items)))


def _read_logprob(raw: dict[str, object], name: str, position: int, notes: Notes) -> float | None:
    value = raw.get("logprob")
    read = number(value)
    if read is not None and read <= 0:
        return read
    if read is None:
        kind = "bad-logprob" if "logprob" in raw else "missing-logprob"
        return notes.defect_at(
            position, kind, f"the `logprob` of {name} is {show(value) if 'logprob' in raw else 'missing'}"
        )
    what = f"the `logprob` of {name} is {show(value)}"
    if math.isnan(read):
        return notes.defect_at(position, "nan-logprob", what)
    if math.isinf(read):
        return notes.defect_at(position, "infinite-logprob", what)
    if read > FLOAT_NOISE:
        return notes.defect_at(position, "positive-logprob", what)
    notes.repair("positive-logprob", f"{what}, above 0 by rounding; taken as 0", position)
    return 0.0


class _Listed(NamedTuple):
    """The list of one position as it stands there, less ``n_masked`` entries that are no probabilities."""

    top: list[Candidate]
    n_masked: int


def _read_top(raw: object, position: int, notes: Notes) -> _Listed | None:
    """The list of one position, less masked and duplicate entries; empty if there is none."""
    items = as_list(raw)
    if raw is not None and items is None:
        return notes.defect_at(position, "bad-top-logprobs", f"`top_logprobs` is {show(raw)}")
    whole = _without_null_tail(items or [], position, notes)
    listed: list[Candidate] = []
    for rank, item in enumerate(whole):
        name = f"entry {rank} of top_logprobs"
        entry = notes.as_entry(item, name, position)
        candidate = None if entry is None else _read_listed(entry, name, position, notes)
        if candidate is not None:
            listed.append(candidate)
    if len(listed) < len(whole):
        return None
    likely = _without_masked(listed, position, notes)
    distinct = _without_duplicates(likely, position, notes)
    if distinct is None:
        return None
    mass = math.fsum(math.exp(_value(candidate)) for candidate in distinct)
    if mass > LARGEST_MASS:
        return notes.defect_at(position, "mass-above-one", f"the listed probabilities add up to {mass:.6g}")
    return _Listed(distinct, len(items or ()) - len(likely))


def _without_null_tail(items: list[object], position: int, notes: Notes) -> list[object]:
    """The entries before those at the end whose logprob is null: minus infinity, which JSON has no number for."""
    n = len(items)
    while n and _is_null(items[n - 1]):
        n -= 1
    for rank in range(n, len(items)):
        notes.repair("null-logprob", null_entry(rank), position)
    return items[:n]


def _is_null(item: object) -> bool:
    entry = as_plain(item) or {}
    return "logprob" in entry and entry["logprob"] is None


def _without_duplicates(listed: list[Candidate], position: int, notes: Notes) -> list[Candidate] | None:
    """One entry per token id. Without ids, equal texts may be different tokens: all are kept."""
    by_id: dict[int, Candidate] = {}
    distinct: list[Candidate] = []
    for candidate in listed:
        first = candidate if candidate.token_id is None else by_id.setdefault(candidate.token_id, candidate)
        if first is candidate:
            distinct.append(candidate)
        elif first == candidate:
            notes.repair("duplicate-candidate", f"token id {candidate.token_id} is listed twice; kept once", position)
        else:
            both = f"{show(first.token)} {first.logprob!r} and {show(candidate.token)} {candidate.logprob!r}"
            return notes.defect_at(position, "repeated-token-id", f"token id {candidate.token_id} is listed as {both}")
    return distinct


def _without_masked(listed: list[Candidate], position: int, notes: Notes) -> list[Candidate]:
    kept: list[Candidate] = []
    for candidate in listed:
        if _value(candidate) <= UNKNOWN_LOGPROB:
            notes.repair("masked-candidate", masked(candidate.token, _value(candidate)), position)
            continue
        if not is_encodable(candidate.token):
            shown = f"the listed token {show(candidate.token)} holds half a character"
            notes.repair("lone-surrogate", f"{shown}; that is taken as U+FFFD", position)
            candidate = candidate._replace(token=encodable(candidate.token))
        kept.append(candidate)
    return kept


def _sorted(top: list[Candidate], position: int, notes: Notes) -> tuple[list[Candidate], bool]:
    if all(_value(left) >= _value(right) for left, right in pairwise(top)):
        return top, True
    notes.repair("unsorted-list", UNSORTED, position)
    return sorted(top, key=_value, reverse=True), False


def _agreed(sampled: Candidate, top: list[Candidate], position: int, notes: Notes, *, hides: bool) -> Candidate:
    """The sampled token, after a check against the list that it came from.

    A token that has one value of its own and another in its list, or that is more probable than the least of a list in
    which it is missing, means that tokens and lists do not belong together; no number of theirs can then be trusted.
    A source that ``hides`` texts may show a token that is a part of a character without that part, or with the whole of
    it, just as another token: only ids say which is which.
    """
    if hides and any(candidate.token_id is None for candidate in (sampled, *top)):
        return sampled
    entries = [candidate for candidate in top if is_same_token(sampled, candidate)]
    if sampled.logprob is None:
        return sampled._replace(logprob=entries[0].logprob) if len(entries) == 1 else sampled
    own, least = sampled.logprob, top[-1].logprob
    if entries and all(abs(_value(entry) - own) > SAMPLED_TOLERANCE for entry in entries):
        what = f"the sampled token {show(sampled.token)} has logprob {own!r}, its list {entries[0].logprob!r}"
        notes.defect_at(position, "sampled-disagrees", what)
    elif not entries and own > _value(top[-1]) + SAMPLED_TOLERANCE and _would_be_found(sampled, top):
        what = f"the sampled token {show(sampled.token)} has logprob {own!r} but is not in its list down to {least!r}"
        notes.defect_at(position, "sampled-above-list", what)
    return sampled


def is_same_token(one: Candidate, other: Candidate) -> bool:
    """Whether two entries are one token for certain: by id, else by bytes, else by a text that is whole."""
    if one.token_id is not None and other.token_id is not None:
        return one.token_id == other.token_id
    known, others = own_bytes(one.token, one.token_bytes), own_bytes(other.token, other.token_bytes)
    if one.token_bytes and other.token_bytes:
        return known is not None and known == others
    return one.token == other.token and _is_whole(one.token)


def _is_whole(token: str) -> bool:
    return is_whole(token) and is_encodable(token)


def _would_be_found(sampled: Candidate, top: list[Candidate]) -> bool:
    by_id = sampled.token_id is not None and all(candidate.token_id is not None for candidate in top)
    return by_id or _is_whole(sampled.token)


def _without_appended(positions: list[Position], notes: Notes) -> list[Position]:
    """Take the sampled token out of lists in which it was appended to the k most probable ones.

    Such a list is one longer than the others and ends with the sampled token. Left in, it would pass for the least of
    the k best, and every bound on what is not listed would be too tight.
    """
    ends_sampled = [bool(position.top) and _ends_with_sampled(position) for position in positions]
    k = usual_length([len(position.top) for position in positions], ends_sampled)
    if k is None:
        return positions
    return [
        replace(position, top=tuple(_drop_last(list(position.top), index, notes)))
        if last and len(position.top) == k + 1
        else position
        for index, (position, last) in enumerate(zip(positions, ends_sampled, strict=True))
    ]


def usual_length(lengths: Sequence[int], ends_sampled: Sequence[bool]) -> int | None:
    """How long most lists are that do not end with the sampled token; None if all do."""
    others = Counter(n for n, last in zip(lengths, ends_sampled, strict=True) if n and not last)
    return others.most_common(1)[0][0] if others else None


def _ends_with_sampled(position: Position) -> bool:
    sampled, last = position.sampled, position.top[-1]
    alike = sampled.token == last.token and sampled.logprob == last.logprob  # neither need say which token it is
    return is_same_token(sampled, last) or (alike and sampled.token_id == last.token_id)


def _drop_last(top: list[Candidate], position: int, notes: Notes) -> list[Candidate]:
    notes.repair("sampled-appended", added(top[-1].token), position)
    return top[:-1]


def _value(candidate: Candidate) -> float:
    # Every listed candidate has a number: _read_logprob refuses all else.
    return cast("float", candidate.logprob)
