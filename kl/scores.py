"""What Q says at many contexts as columns; the objects of the backends' contract are a view of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import overload

import numpy as np
import polars as pl

from kl.columns import BoolArray, Entries, IntArray, TopLists
from kl.records import Candidate, Score, ScoreFailure

NO_COUNT = -(1 << 62)
FACTS = pl.Schema(
    {
        "key": pl.String,
        "model_version": pl.String,
        "finish_reason": pl.String,
        "input_tokens": pl.Int64,
        "output_tokens": pl.Int64,
        "n_dropped": pl.Int64,
    }
)


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """N scores, without full vocabularies.

    Attributes
    ----------
    tops : TopLists, of N
    sampled : Entries, of N
        What Q reports beside its lists.
    facts : pl.DataFrame of N rows
        Schema `FACTS`.
    wanted : TopLists, of N, or None
        What Q was asked for by name and does not list; None where it was not asked.
    """

    tops: TopLists
    sampled: Entries
    facts: pl.DataFrame
    wanted: TopLists | None = None

    @classmethod
    def of(cls, scores: Sequence[Score]) -> ScoreTable:
        """Of objects."""
        facts = {name: [getattr(score, name) for score in scores] for name in FACTS}
        return cls(
            TopLists.of([score.top for score in scores]),
            Entries.of([score.sampled for score in scores]),
            pl.DataFrame(facts, schema=FACTS),
            TopLists.of([score.wanted for score in scores]) if any(score.wanted for score in scores) else None,
        )

    @classmethod
    def joined(cls, parts: Sequence[ScoreTable]) -> ScoreTable:
        """All scores of several, one after the other."""
        return cls(
            TopLists.joined([part.tops for part in parts]),
            Entries.joined([part.sampled for part in parts]),
            pl.concat([pl.DataFrame(schema=FACTS), *(part.facts for part in parts)]),
            _joined_wanted(parts),
        )

    def __len__(self) -> int:
        return self.facts.height

    @cached_property
    def keys(self) -> list[str]:
        """The hash of each context."""
        return self.facts["key"].to_list()

    @cached_property
    def versions(self) -> list[str | None]:
        """What the service called the model."""
        return self.facts["model_version"].to_list()

    @cached_property
    def named(self) -> set[str | None]:
        """The different ones of `versions`."""
        return set(self.facts["model_version"].unique())

    @cached_property
    def input_tokens(self) -> IntArray:
        """What the service counted before each position, shape (N,); `NO_COUNT` where it did not."""
        return self.facts["input_tokens"].fill_null(NO_COUNT).to_numpy()

    @cached_property
    def n_dropped(self) -> IntArray:
        """Candidates that were no probabilities, shape (N,)."""
        return self.facts["n_dropped"].to_numpy()


def _joined_wanted(parts: Sequence[ScoreTable]) -> TopLists | None:
    if all(part.wanted is None for part in parts):
        return None
    return TopLists.joined([TopLists.empty(len(part)) if part.wanted is None else part.wanted for part in parts])


@dataclass(frozen=True, eq=False)
class Scores(Sequence[Score | ScoreFailure | None]):
    """What was said at T contexts: scores of a table, failures, or nothing. As a sequence, the objects.

    Attributes
    ----------
    table : ScoreTable
    rows : int64, shape (T,)
        The number of each score in the table, -1 where there is none.
    failures : mapping
        Place → why there is none.
    """

    table: ScoreTable
    rows: IntArray
    failures: Mapping[int, ScoreFailure] = field(default_factory=dict[int, ScoreFailure])

    @classmethod
    def of(cls, results: Sequence[Score | ScoreFailure | None]) -> Scores:
        """Of objects, unless they are columns already."""
        if isinstance(results, Scores):
            return results
        is_score = np.array([isinstance(item, Score) for item in results], dtype=np.bool_)
        return cls(
            ScoreTable.of([item for item in results if isinstance(item, Score)]),
            np.where(is_score, np.cumsum(is_score) - 1, -1),
            {t: item for t, item in enumerate(results) if isinstance(item, ScoreFailure)},
        )

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """All results of several, one after the other."""
        tables = list({id(part.table): part.table for part in parts}.values())
        starts = np.cumsum([0, *(len(table) for table in tables)])
        first = {id(table): int(start) for table, start in zip(tables, starts, strict=False)}
        rows = [np.where(part.rows < 0, -1, part.rows + first[id(part.table)]) for part in parts]
        failures: dict[int, ScoreFailure] = {}
        n = 0
        for part in parts:
            failures |= {n + t: item for t, item in part.failures.items()}
            n += len(part)
        table = tables[0] if len(tables) == 1 else ScoreTable.joined(tables)
        return cls(table, np.concatenate([np.zeros(0, dtype=np.int64), *rows]), failures)

    @property
    def is_score(self) -> BoolArray:
        """Where there is a score, shape (T,)."""
        return self.rows >= 0

    @property
    def tops(self) -> TopLists:
        """The lists, empty where there is no score."""
        return self.table.tops.take(self.rows)

    @property
    def sampled(self) -> Entries:
        """What Q reports beside its lists."""
        return self.table.sampled.or_none(self.rows)

    @property
    def wanted(self) -> TopLists | None:
        """What Q was asked for by name and does not list; None where it was not asked."""
        return None if self.table.wanted is None else self.table.wanted.take(self.rows)

    @property
    def n_dropped(self) -> IntArray:
        """Candidates that were no probabilities, shape (T,); 0 where there is no score."""
        return self._gathered(self.table.n_dropped, 0)

    @property
    def input_tokens(self) -> IntArray:
        """What the service counted, shape (T,); `NO_COUNT` where there is no count."""
        return self._gathered(self.table.input_tokens, NO_COUNT)

    def _gathered(self, of_table: IntArray, none: int) -> IntArray:
        found = np.full(len(self.rows), none, dtype=np.int64)
        found[self.is_score] = of_table[self.rows[self.is_score]]
        return found

    def versions(self) -> set[str]:
        """What the service called the model."""
        rows = self.rows[self.is_score]
        if len(self.table.named) == 1:
            rows = rows[:1]
        named = (self.table.versions[row] for row in set(map(int, rows)))
        return {version for version in named if version is not None}

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, at: int) -> Score | ScoreFailure | None: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Score | ScoreFailure | None, ...]: ...
    def __getitem__(self, at: int | slice) -> Score | ScoreFailure | tuple[Score | ScoreFailure | None, ...] | None:
        if isinstance(at, slice):
            return tuple(self[t] for t in range(*at.indices(len(self))))
        t = range(len(self))[at]
        row = int(self.rows[t])
        if row < 0:
            return self.failures.get(t)
        (sampled,) = self.table.sampled.take(np.array([row])).candidates()
        wanted = () if self.table.wanted is None else self.table.wanted[row]
        facts = self.table.facts.row(row, named=True)
        return Score(top=self.table.tops[row], sampled=sampled, wanted=wanted, **facts)

    def __iter__(self) -> Iterator[Score | ScoreFailure | None]:
        tops, sampled = list(self.tops), self.sampled.candidates()  # all at once, which is quicker than one by one
        wanted = self.wanted
        beside: list[tuple[Candidate, ...]] = [()] * len(self) if wanted is None else list(wanted)
        facts = iter(self.table.facts[self.rows[self.is_score]].to_dicts())
        for t, row in enumerate(map(int, self.rows)):
            if row < 0:
                yield self.failures.get(t)
            else:
                yield Score(top=tops[t], sampled=sampled[t], wanted=beside[t], **next(facts))

    def without(self, failures: Mapping[int, ScoreFailure | None]) -> Scores:
        """The same with failures, or nothing, in the place of some."""
        if not failures:
            return self
        rows = self.rows.copy()
        rows[[*failures]] = -1
        others = {t: item for t, item in {**self.failures, **failures}.items() if item is not None}
        return Scores(self.table, rows, others)
