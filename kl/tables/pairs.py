"""Which positions of some responses have two lists to compare, and why the others have not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kl.columns import BoolArray, Entries, FloatArray, IntArray, Positions, TopLists
from kl.estimators.align import Aligned, align_columns, with_hidden
from kl.estimators.list_checks import masses
from kl.estimators.matching.trust import TrustedLists, trusted_wanted
from kl.records import LARGEST_MASS, Response, Score, ScoreFailure
from kl.scores import Scores

LONE_VALUE = "lone-value"  # the flag of a position where one token is far off all others, and may be right
# What to know of a position's lists, one bit each.
FLAGS = (
    "clipped-p",
    "clipped-q",
    "truncated-p",
    "truncated-q",
    LONE_VALUE,
    "mass-above-1-p",
    "mass-above-1-q",
    "rounded-p",
    "rounded-q",
)
Flags = NDArray[np.uint16]

Results = Sequence[Score | ScoreFailure | None]


class Missing(NamedTuple):
    """Why a position is not measured, or has no estimate: a short code and one line.

    ``kl`` is what the position would have counted, nats, where it was set aside.
    """

    reason: str
    error: str
    kl: float | None = None


class Answered(NamedTuple):
    """A response, what was said at its positions, and which of them were drawn; default all."""

    response: Response
    scores: Results
    drawn: BoolArray | None = None


@dataclass(frozen=True, slots=True)
class Pairs:
    """Positions with a usable list on both sides, N of them; arrays of shape (N,).

    ``place`` counts the positions of all responses. ``n_dropped`` of Q's entries were not probabilities. ``wanted_q``
    is what Q was asked for by name beside its lists; None if nothing was.
    """

    place: IntArray
    response: IntArray
    p: TrustedLists
    q: TrustedLists
    sampled_p: Entries
    sampled_q: Entries
    n_dropped: IntArray
    is_stop: BoolArray
    flags: Flags
    wanted_q: TopLists | None = None

    def __len__(self) -> int:
        return len(self.place)

    def take(self, rows: IntArray) -> Pairs:
        """Some of them, by number."""
        return Pairs(
            self.place[rows],
            self.response[rows],
            self.p.take(rows),
            self.q.take(rows),
            self.sampled_p.take(rows),
            self.sampled_q.take(rows),
            self.n_dropped[rows],
            self.is_stop[rows],
            self.flags[rows],
            None if self.wanted_q is None else self.wanted_q.take(rows),
        )

    def flagged(self, name: str, rows: BoolArray) -> Pairs:
        """The same with a flag where it is so."""
        return replace(self, flags=self.flags | flag(name, rows))

    def aligned(self) -> Aligned:
        """Their matched lists."""
        matched = align_columns(
            self.p.lists,
            self.q.lists,
            self.sampled_p,
            self.sampled_q,
            self.is_stop,
            self.response,
            TopLists.empty(len(self)) if self.wanted_q is None else self.wanted_q,
        )
        return with_hidden(matched, self.p.largest_hidden, self.q.largest_hidden)


class Unpaired(NamedTuple):
    """The lists of one side at positions that are not among the pairs, M of them, by place; shape (M,).

    ``wanted`` is what Q was asked for by name beside them; None if nothing was.
    """

    place: IntArray
    lists: TopLists
    wanted: TopLists | None = None

    @classmethod
    def of(cls, place: IntArray, lists: TopLists, wanted: TopLists | None, paired: IntArray) -> Unpaired:
        """Those of the places that are not paired."""
        rows = np.flatnonzero(~np.isin(place, paired))
        return cls(place[rows], lists.take(rows), None if wanted is None else wanted.take(rows))

    def with_others(self, place: IntArray, lists: TopLists, wanted: TopLists | None) -> Unpaired:
        """The same and those of further places."""
        both = None if self.wanted is None or wanted is None else TopLists.joined([self.wanted, wanted])
        return Unpaired(np.concatenate([self.place, place]), TopLists.joined([self.lists, lists]), both)


class Paired(NamedTuple):
    """The positions that can be measured, their matched lists (``None`` of none), and the other ones by place.

    ``unpaired_p`` and ``unpaired_q`` have the lists of the others, where they are kept.
    """

    pairs: Pairs
    aligned: Aligned | None
    missing: dict[int, Missing]
    unpaired_p: Unpaired | None = None
    unpaired_q: Unpaired | None = None


def flag(name: str, rows: BoolArray) -> Flags:
    """One bit where it is so, shape (N,)."""
    return rows.astype(np.uint16) * np.uint16(1 << FLAGS.index(name))


def names_of(flags: Flags) -> list[tuple[str, ...]]:
    """The flags of each position."""
    known = {value: tuple(name for bit, name in enumerate(FLAGS) if value >> bit & 1) for value in set(flags.tolist())}
    return [known[value] for value in flags.tolist()]


def pair_up(answered: Sequence[Answered], *, keep_lists: bool = False) -> Paired:
    """Match the lists of P and Q at the positions that were drawn; of the other positions, keep the lists if told to.

    Raises
    ------
    ValueError
        If a response has not one result for each of its positions.
    """
    for item in answered:
        check_lengths(item.response, scores=len(item.scores))
    positions = [Positions.of(item.response.positions) for item in answered]
    scores = Scores.joined([Scores.of(item.scores) for item in answered])
    lengths = np.array([len(item) for item in positions], dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    response = np.repeat(np.arange(len(answered)), lengths)
    drawn = np.concatenate([_NONE, *(_drawn(item, len(of)) for item, of in zip(answered, positions, strict=True))])
    has_p = np.ones(len(response), dtype=np.bool_)
    has_p[[start + t for start, item in zip(starts, positions, strict=False) for t in item.defects]] = False
    has_q = scores.is_score
    p = _trusted([item.tops for item in positions], [item.n_dropped for item in positions], has_p, response)
    q = TrustedLists.of(scores.table.tops.take(scores.rows[has_q]), scores.n_dropped[has_q], response[has_q])
    wanted = _wanted(scores, q, has_q, response)
    place_p, place_q = np.cumsum(has_p) - 1, np.cumsum(has_q) - 1  # of each position among the lists of its side
    missing = dict(_unscored(answered, drawn & ~(has_p & has_q), response, starts))
    both = np.flatnonzero(drawn & has_p & has_q)
    refused = _above_1(q, wanted, place_q[both]) | _refused(p, q, place_p[both], place_q[both])
    missing |= {int(both[row]): why for row, why in refused.items()}
    usable = np.ones(len(both), dtype=np.bool_)
    usable[[*refused]] = False
    place = both[usable]
    may_lack = np.concatenate([_NONE, *(item.may_lack for item in positions)])[place]
    is_stop = np.zeros(len(response), dtype=np.bool_)
    is_stop[[end - 1 for end, item in zip(starts[1:], answered, strict=True) if item.response.has_stop]] = True
    used_p, used_q = p.take(place_p[place]), q.take(place_q[place])
    pairs = Pairs(
        place=place,
        response=response[place],
        p=used_p.unlimited(may_lack),
        q=used_q,
        sampled_p=above(Entries.joined([item.sampled for item in positions]).take(place), used_p.floor),
        sampled_q=scores.table.sampled.or_none(scores.rows[place]),
        n_dropped=used_q.n_dropped + used_q.n_clipped + wanted.n_dropped[place_q[place]],
        is_stop=is_stop[place],
        flags=flag("clipped-p", used_p.n_clipped > 0)
        | flag("clipped-q", used_q.n_clipped > 0)
        | flag("truncated-p", used_p.is_truncated)
        | flag("truncated-q", used_q.is_truncated),
        wanted_q=None if wanted.lists is None else wanted.lists.take(place_q[place]),
    )
    missing = dict(sorted(missing.items()))
    aligned = pairs.aligned() if len(pairs) else None
    if not keep_lists:
        return Paired(pairs, aligned, missing)
    unpaired_p = Unpaired.of(np.flatnonzero(has_p), p.lists, None, place)
    return Paired(pairs, aligned, missing, unpaired_p, Unpaired.of(np.flatnonzero(has_q), q.lists, wanted.lists, place))


_NONE = np.zeros(0, dtype=np.bool_)


def _drawn(item: Answered, n: int) -> BoolArray:
    return np.ones(n, dtype=np.bool_) if item.drawn is None else item.drawn


def check_lengths(response: Response, **lengths: int) -> None:
    """Refuse anything that has not one entry per position of the response."""
    for name, length in lengths.items():
        if length != len(response.positions):
            raise ValueError(
                f"{response.name} has {len(response.positions)} positions, {name} has {length}; give one for each."
            )


def _trusted(
    tops: Sequence[TopLists], n_dropped: Sequence[IntArray], has: BoolArray, response: IntArray
) -> TrustedLists:
    """The lists of one side where it has them."""
    places = np.flatnonzero(has)
    dropped = np.concatenate([np.zeros(0, dtype=np.int64), *n_dropped])
    return TrustedLists.of(TopLists.joined(tops).take(places), dropped[places], response[places])


class _Wanted(NamedTuple):
    """What N scores say beside their lists, None if nothing, and how many entries were no probabilities."""

    lists: TopLists | None
    n_dropped: IntArray


def _wanted(scores: Scores, q: TrustedLists, has: BoolArray, response: IntArray) -> _Wanted:
    nothing = np.zeros(len(q), dtype=np.int64)
    asked = scores.wanted
    if asked is None:
        return _Wanted(None, nothing)
    asked = asked.take(np.flatnonzero(has))
    lists = trusted_wanted(asked, q, response[has])
    return _Wanted(lists, asked.lengths - lists.lengths)


def _above_1(q: TrustedLists, wanted: _Wanted, rows: IntArray) -> dict[int, Missing]:
    """The lists of Q that are no distribution with what it was asked for, by their number among the rows."""
    if wanted.lists is None:
        return {}
    mass = (q.mass + masses(wanted.lists))[rows]
    return {
        row: Missing(
            "mass-above-1-q",
            f"Q's listed probabilities and those of the tokens that it was asked for add up to {mass[row]:.4f}; they "
            f"are not one distribution. {_ADVICE_Q[1]}",
        )
        for row in np.flatnonzero(mass > LARGEST_MASS).tolist()
    }


def _unscored(
    answered: Sequence[Answered], lacking: BoolArray, response: IntArray, starts: IntArray
) -> Iterator[tuple[int, Missing]]:
    for place in map(int, np.flatnonzero(lacking)):
        item = answered[int(response[place])]
        t = place - int(starts[response[place]])
        defect = Positions.of(item.response.positions).defects.get(t)
        yield place, Missing(*defect) if defect is not None else _not_scored(item.scores[t])


def _not_scored(score: Score | ScoreFailure | None) -> Missing:
    if isinstance(score, ScoreFailure):
        return Missing(score.reason, score.message)
    return Missing("not-scored", "Q has not been asked about this position, or its answer is not there; run again.")


_ADVICE_P = ("Sample the responses again with logprobs.", "Check the response file.")
_ADVICE_Q = ("Score the position again.", "Check the backend's settings.")


def _refused(p: TrustedLists, q: TrustedLists, rows_p: IntArray, rows_q: IntArray) -> dict[int, Missing]:
    """Why two lists cannot be compared, of those that cannot, by their number among the rows."""
    found: dict[int, Missing] = {}
    for side, lists, rows, advice in (("Q", q, rows_q, _ADVICE_Q), ("P", p, rows_p, _ADVICE_P)):
        wrong = (lists.n_listed == 0) | (lists.mass > LARGEST_MASS) | lists.is_degenerate
        found |= {
            int(row): _problem(side, lists, int(rows[row]), *advice) for row in np.flatnonzero(wrong[rows])
        }  # P's reason stands before Q's
    return found


def _problem(side: str, lists: TrustedLists, row: int, again: str, check: str) -> Missing:
    code, n_entries = side.lower(), int(lists.n_entries[row])
    if not lists.n_listed[row]:
        what = f"{side}'s list has no usable log-probability ({n_entries} entries)"
        return Missing(f"empty-list-{code}", f"{what}. {again}")
    if lists.mass[row] > LARGEST_MASS:
        what = f"{side}'s listed probabilities add up to {lists.mass[row]:.4f}; they are not one distribution"
        return Missing(f"mass-above-1-{code}", f"{what}. {check}")
    what = f"{side}'s list gives one token everything and the other {n_entries - 1} a mark or one floor"
    return Missing(f"degenerate-{code}", f"{what}; it is not a distribution. {check}")


def above(sampled: Entries, floor: FloatArray) -> Entries:
    """The sampled tokens, without values that are no probabilities."""
    return sampled.with_logprobs(np.where(sampled.logprobs <= floor, np.nan, sampled.logprobs))
