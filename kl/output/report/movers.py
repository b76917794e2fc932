"""The tokens that Q promotes and those that it demotes, from both lists of positions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, cast

import polars as pl

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

    def add(self, lists: pl.DataFrame) -> None:
        """Take in rows of `kl.output.report.lists.both_lists`, each with the ``weight`` 1/π of its position."""
        known = lists.drop_nulls(["cap_p", "cap_q"])
        self.n_positions += known["row"].n_unique()
        self._sums.append(_sums_of(known))

    def ranked(self) -> tuple[list[Mover], list[Mover]]:
        """Those promoted and those demoted most, by the sum of mass · Δ, at most `SHOWN` each."""
        if not self._sums:
            return [], []
        grouped = pl.concat(self._sums).group_by("shown", maintain_order=True)
        sums = grouped.agg(
            pl.col("n", "n_bound", "shift", "mass", "p", "q", "weight").sum(), pl.col("examples").explode()
        )
        up = sums.filter(pl.col("shift") > 0).sort(["shift", "shown"], descending=[True, False])
        down = sums.filter(pl.col("shift") < 0).sort(["shift", "shown"])
        return _movers(up.head(SHOWN)), _movers(down.head(SHOWN))


def _sums_of(known: pl.DataFrame) -> pl.DataFrame:
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
    large = shifts.filter(pl.col("mass") >= _LEAST_MASS)
    shift = pl.col("weight") * pl.col("mass") * pl.col("delta")
    by = (pl.col("mass") * pl.col("delta")).abs()
    return (
        large.with_columns(by=by)
        .sort("by", descending=True, maintain_order=True)
        .group_by("shown", maintain_order=True)
        .agg(
            n=pl.len().cast(pl.Int64),
            n_bound=pl.col("is_bound").sum().cast(pl.Int64),
            shift=shift.sum(),
            mass=(pl.col("weight") * pl.col("mass")).sum(),
            p=(pl.col("weight") * pl.col("p")).sum(),
            q=(pl.col("weight") * pl.col("q")).sum(),
            weight=pl.col("weight").sum(),
            examples=pl.struct("row", "p", "q", "by").head(_EXAMPLES),
        )
    )


def _movers(rows: pl.DataFrame) -> list[Mover]:
    found: list[Mover] = []
    for row in rows.iter_rows(named=True):
        weight = cast(float, row["weight"])
        ranked = sorted(row["examples"], key=lambda item: (-item["by"], item["row"]))[:_EXAMPLES]
        examples = [Example(item["row"], item["p"], item["q"]) for item in ranked]
        delta = row["shift"] / row["mass"]
        found.append(
            Mover(row["shown"], row["n"], row["n_bound"], delta, row["p"] / weight, row["q"] / weight, examples)
        )
    return found
