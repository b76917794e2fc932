"""Both lists of positions as one table: read from ``candidates.parquet`` in batches, matched token by token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from kl.output.report.movers import Movers
from kl.output.report.visible import visible
from kl.tables.totals import WEIGHT

POSITIONS_READ = 20_000  # for what Q promotes and demotes: an even sample of more than these
_ROWS_AT_ONCE = 16_384
_SCHEMA = {
    "row": pl.UInt32,
    "shown": pl.String,
    "id_p": pl.Int64,
    "id_q": pl.Int64,
    "logprob_p": pl.Float64,
    "logprob_q": pl.Float64,
}


def read_lists(tokens: pl.LazyFrame, candidates: pl.LazyFrame, wanted: Sequence[int], movers: Movers) -> pl.DataFrame:
    """The lists of the rows ``wanted`` (sorted), as `both_lists` gives them; an even sample of all goes to ``movers``.

    Reads both tables once, some thousand rows at a time.

    Raises
    ------
    ValueError
        If the two tables are not of one run.
    """
    n_rows, n_lists = (int(frame.select(pl.len()).collect().item()) for frame in (tokens, candidates))
    if n_rows != n_lists:
        raise ValueError(
            f"tokens.parquet has {n_rows:,} rows, candidates.parquet {n_lists:,}: they are not of one run."
        )
    step = max(1, -(-n_rows // POSITIONS_READ))
    numbers = np.asarray(wanted, dtype=np.uint32)
    keys = tokens.select(by=pl.col("align_key").fill_null("text"), weight=WEIGHT)
    parts = [pl.DataFrame(schema=_SCHEMA)]
    for first in range(0, n_rows, _ROWS_AT_ONCE):
        end = min(first + _ROWS_AT_ONCE, n_rows)
        shown = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, end)]
        sample = np.arange(-(-first // step) * step, end, step, dtype=np.uint32)
        rows = pl.Series("row", np.union1d(shown, sample), dtype=pl.UInt32)
        at = [int(row) - first for row in rows]
        lists, how = (frame.slice(first, end - first).collect()[at] for frame in (candidates, keys))
        merged = both_lists(lists.with_columns(rows), how["by"])
        parts.append(merged.filter(pl.col("row").is_in(shown.tolist())))
        movers.add(merged.filter(pl.col("row") % step == 0).join(how.select(rows, "weight"), on="row"))
    return pl.concat(parts)


def both_lists(candidates: pl.DataFrame, keys: pl.Series) -> pl.DataFrame:
    """The two lists of some positions as one table: a row for each token of either.

    Tokens are the same if their ids are, where the position was matched by id (``keys``, the token table's
    ``align_key``), or else their texts (bytes where a text is a part of a character); an entry that does not say which
    token it is, is no token of the other side.

    Parameters
    ----------
    candidates : pl.DataFrame
        Rows of ``candidates.parquet`` with a column ``row`` that numbers them.
    keys : pl.Series of String
        ``id``, ``bytes`` or ``text``, one for each row.

    Returns
    -------
    pl.DataFrame
        ``row, shown, id_p, id_q, logprob_p, logprob_q``; of each row P's list in its order, then what only Q lists.
        ``shown`` is the text as `visible` gives it; null is what a side does not list. Entries of a side that repeat a
        token are one, with the sum of their masses.
    """
    by = pl.DataFrame({"row": candidates["row"], "by": keys})
    of_p, of_q = (_side(candidates.join(by, on="row"), side) for side in ("p", "q"))
    merged = of_p.join(of_q, on=["row", "key"], how="full", coalesce=True, maintain_order="left_right")
    named = merged.with_columns(shown=pl.coalesce("shown", "shown_right"))
    return named.sort("row", maintain_order=True).select(pl.col(name).cast(kind) for name, kind in _SCHEMA.items())


def _side(candidates: pl.DataFrame, side: str) -> pl.DataFrame:
    lists = [f"{side}_{name}" for name in ("tokens", "token_ids", "logprobs", "bytes")]
    rows = candidates.select("row", "by", *lists).filter(pl.col(lists[0]).list.len() > 0).explode(lists)
    names = rows.select("row", "by", token=lists[0], id=lists[1], logprob=lists[2], stated=lists[3])
    distinct = names.select("token", "stated").unique(maintain_order=True)
    shown = pl.Series("shown", [visible(token, stated) for token, stated in distinct.iter_rows()], dtype=pl.String)
    known = names.join(
        distinct.with_columns(shown), on=["token", "stated"], how="left", nulls_equal=True, maintain_order="left"
    )
    unsaid = ((pl.col("token") == "") | pl.col("token").str.contains("\ufffd")) & pl.col("stated").is_null()
    key = (
        pl.when((pl.col("by") == "id") & pl.col("id").is_not_null()).then(pl.format("#{}", "id"))
        .when(unsaid).then(pl.format("?{}{}", pl.lit(side), pl.int_range(pl.len())))
        .otherwise(pl.format("={}", "shown"))
    )  # fmt: skip
    one = known.with_columns(key=key).group_by("row", "key", maintain_order=True)
    return one.agg(
        pl.col("shown").first(),
        pl.col("id").first().alias(f"id_{side}"),
        pl.col("logprob").exp().sum().log().alias(f"logprob_{side}"),
    )
