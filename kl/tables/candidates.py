"""Both lists of every position, as they were compared: the rows of the candidate table."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl

from kl.columns import NO_ID, Entries, IntArray, TopLists
from kl.pieces import REPLACEMENT
from kl.tables.pairs import Paired, Unpaired
from kl.tables.schemas import CANDIDATES


def candidate_table(identified: pl.DataFrame, paired: Paired) -> pl.DataFrame:
    """Both lists of N positions.

    Parameters
    ----------
    identified : pl.DataFrame
        From `kl.tables.tokens.identity` of the same positions.
    paired : Paired
        From `kl.tables.outliers.without_outliers`; the lists of the positions that are not measured were kept.

    Returns
    -------
    pl.DataFrame
        Schema `kl.tables.schemas.CANDIDATES`, one row per position.
    """
    assert paired.unpaired_p is not None, "the lists were kept"
    assert paired.unpaired_q is not None, "the lists were kept"
    pairs, n = paired.pairs, identified.height
    p = _Side.of(Unpaired(pairs.place, pairs.p.lists), paired.unpaired_p)
    q = _Side.of(Unpaired(pairs.place, pairs.q.lists, pairs.wanted_q), paired.unpaired_q)
    columns = {**_columns(p, "p", n), **_columns(q, "q", n)}
    n_wanted = np.full(n, -1, dtype=np.int64)
    n_wanted[q.place] = q.n_wanted
    columns["n_wanted_q"] = pl.Series(n_wanted).replace(-1, None)
    named = {name: identified[name] for name in identified.columns if name in CANDIDATES}
    return pl.DataFrame(named | columns).select(pl.col(name).cast(kind) for name, kind in CANDIDATES.items())


class _Side(NamedTuple):
    """One side's lists by place, shape (M,); the last ``n_wanted`` entries of each were asked for by name."""

    place: IntArray
    lists: TopLists
    n_wanted: IntArray

    @classmethod
    def of(cls, paired: Unpaired, others: Unpaired) -> _Side:
        whole = others.with_others(*paired) if len(others.place) else paired
        lists, n_wanted = whole.lists, np.zeros(len(whole.place), dtype=np.int64)
        if whole.wanted is not None:
            lists, n_wanted = lists.followed_by(whole.wanted), whole.wanted.lengths
        if not len(others.place):
            return cls(whole.place, lists, n_wanted)
        order = np.argsort(whole.place)
        return cls(whole.place[order], lists.take(order), n_wanted[order])


def _columns(side: _Side, name: str, n: int) -> dict[str, pl.Series]:
    """The columns of N positions of which some have a list."""
    flat = _flat(side.lists.entries)
    # Sorted, so that the lists are cut out of the columns as they are.
    row = pl.Series("row", side.place[side.lists.rows]).set_sorted()
    lists = flat.with_columns(row).group_by("row", maintain_order=True).agg(pl.all())
    place = np.full(n, -1, dtype=np.int64)
    place[lists["row"].to_numpy()] = np.arange(lists.height)
    if len(lists) < len(side.place):
        empty = side.place[side.lists.lengths == 0]
        nothing = pl.DataFrame([pl.Series(item, [[]], dtype=kind) for item, kind in lists.drop("row").schema.items()])
        lists = pl.concat([lists.drop("row"), nothing])
        place[empty] = lists.height - 1
    if np.array_equal(place, np.arange(lists.height)):
        return {f"{name}_{item}": lists[item] for item in flat.columns}
    at = pl.Series(place, dtype=pl.Int64).replace(-1, None)
    return {f"{name}_{item}": lists[item].gather(at) for item in flat.columns}


def _flat(entries: Entries) -> pl.DataFrame:
    """The entries' columns, shape (E,)."""
    tokens, ids = entries.tokens.cast(pl.String), pl.Series(entries.ids)
    if entries.stated is None:
        stated = pl.Series([None], dtype=pl.Binary).new_from_index(0, len(entries))
    else:
        # A text that shows U+FFFD may stand for other bytes: what is stated of it says more.
        own = (entries.stated == tokens.cast(pl.Binary)) & ~tokens.str.contains(REPLACEMENT, literal=True)
        stated = entries.stated.set(own.fill_null(False), None)
    return pl.DataFrame(
        {
            "tokens": tokens,
            "token_ids": ids.set(ids == NO_ID, None),
            "logprobs": pl.Series(entries.logprobs),
            "bytes": stated,
        }
    )
