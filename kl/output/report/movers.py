"""The tokens that Q promotes and those that it demotes, from both lists of positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

SHOWN = 12
_EXAMPLES = 2
_LEAST_MASS = 1e-4  # of a token at a position; below, a ratio is of nothing that a reader would see


class Example(NamedTuple):
    """The place of a token: a row of the token table, with both probabilities; 0 is not listed."""

    row: int
    p: float
    q: float


class Mover(NamedTuple):
    """A token and how Q treats it, over the ``n`` positions where either side lists it.

    ``delta`` is its mean log q − log p in nats, weighted by the mass (p + q)/2 that the two give it (and by 1/π);
    ``p`` and ``q`` are its mean probabilities, what is not listed counting as 0. At ``n_bound`` positions one side does
    not list it: its shift is at least that to the side's smallest listed value, and counts as that.
    """

    token: str
    n: int
    n_bound: int
    delta: float
    p: float
    q: float
    examples: list[Example]


@dataclass(slots=True)
class Movers:
    """Sums by token over batches of positions; memory grows with the distinct tokens of a batch."""

    n_positions: int = 0
    _sums: list[pl.DataFrame] = field(default_factory=list[pl.DataFrame])
    _examples: list[pl.DataFrame] = field(default_factory=list[pl.DataFrame])

    def add(self, lists: pl.DataFrame) -> None:
        """Take in rows of `kl.output.report.lists.both_lists`, each with the ``weight`` 1/π of its position."""
        known = lists.drop_nulls(["cap_p", "cap_q"])
        self.n_positions += known["row"].n_unique()
        large = _shifts(known).filter(pl.col("mass") >= _LEAST_MASS)
        token = large["shown"].cast(pl.Categorical).to_physical().to_numpy()
        if len(token):
            self._sums.append(_sums_of(large, token))
            self._examples += _examples_of(large, token)

    def ranked(self) -> tuple[list[Mover], list[Mover]]:
        """Those promoted and those demoted most, by the sum of mass · Δ, at most `SHOWN` each."""
        if not self._sums:
            return [], []
        sums = pl.concat(self._sums).group_by("shown", maintain_order=True).agg(pl.exclude("shown").sum())
        up = sums.filter(pl.col("shift") > 0).sort(["shift", "shown"], descending=[True, False])
        down = sums.filter(pl.col("shift") < 0).sort(["shift", "shown"])
        return self._movers(up.head(SHOWN)), self._movers(down.head(SHOWN))

    def _movers(self, rows: pl.DataFrame) -> list[Mover]:
        named = pl.concat(self._examples).join(rows.select("shown"), on="shown", how="semi")
        ranked = named.sort(["by", "row"], descending=[True, False]).group_by("shown").head(_EXAMPLES)
        examples: dict[str, list[Example]] = {}
        for token, *example in ranked.select("shown", *Example._fields).iter_rows():
            examples.setdefault(token, []).append(Example(*example))
        return [
            Mover(
                row["shown"],
                row["n"],
                row["n_bound"],
                row["shift"] / row["mass"],
                row["p"] / row["weight"],
                row["q"] / row["weight"],
                examples[row["shown"]],
            )
            for row in rows.iter_rows(named=True)
        ]


def _shifts(known: pl.DataFrame) -> pl.DataFrame:
    """``row, shown, is_bound, p, q, mass, delta``, by how much a token moves (``by``), and its position's weight."""
    log_p, log_q = pl.col("logprob_p"), pl.col("logprob_q")
    # Where a side does not list it, the shift is at least that to its smallest value, and never the other way.
    delta = (
        pl.when(log_q.is_null()).then((pl.col("cap_q") - log_p).clip(upper_bound=0.0))
        .when(log_p.is_null()).then((log_q - pl.col("cap_p")).clip(lower_bound=0.0))
        .otherwise(log_q - log_p)
    )  # fmt: skip
    p, q = log_p.exp().fill_null(0.0), log_q.exp().fill_null(0.0)
    is_bound = (log_p.is_null() | log_q.is_null()).alias("is_bound")
    shifts = known.select("row", "shown", "weight", is_bound, p=p, q=q, mass=(p + q) / 2, delta=delta)
    return shifts.with_columns(by=(pl.col("mass") * pl.col("delta")).abs())


def _sums_of(shifts: pl.DataFrame, token: NDArray[np.uint32]) -> pl.DataFrame:
    """A row for each token, of which each row of ``shifts`` has the number."""
    weight, mass = shifts["weight"].to_numpy(), (shifts["weight"] * shifts["mass"]).to_numpy()
    n = np.bincount(token)
    first = np.zeros(len(n), dtype=np.int64)
    first[token[::-1]] = np.arange(len(token))[::-1]
    there = np.flatnonzero(n)
    summed = {
        "shift": mass * shifts["delta"].to_numpy(),
        "mass": mass,
        "p": weight * shifts["p"].to_numpy(),
        "q": weight * shifts["q"].to_numpy(),
        "weight": weight,
    }
    n_bound = np.bincount(token, shifts["is_bound"].to_numpy()).astype(np.int64)
    return shifts.select("shown")[first[there]].with_columns(
        n=pl.Series(n[there]),
        n_bound=pl.Series(n_bound[there]),
        **{name: pl.Series(np.bincount(token, values)[there]) for name, values in summed.items()},
    )


def _examples_of(shifts: pl.DataFrame, token: NDArray[np.uint32]) -> Iterator[pl.DataFrame]:
    """The rows that move each token most, `_EXAMPLES` at most: of all tokens the first, then the next."""
    by = shifts["by"].to_numpy(writable=True)
    for _ in range(_EXAMPLES):
        most = np.full(int(token.max()) + 1, -1.0)
        np.maximum.at(most, token, by)
        equal = np.flatnonzero((by == most[token]) & (by >= 0))[::-1]
        found = np.full(len(most), -1)
        found[token[equal]] = equal  # of equal ones the first, which is written last
        rows = found[found >= 0]
        yield shifts.select("shown", "row", "p", "q", "by")[rows]
        by[rows] = -1.0
