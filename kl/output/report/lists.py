"""Both lists of positions as one table: read from ``candidates.parquet`` in batches, matched token by token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from kl.estimators.token_bytes import BytesOf, byte_functions
from kl.output.report.movers import Movers
from kl.output.report.visible import visible
from kl.records import END_TOKENS, Candidate
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
    "cap_p": pl.Float64,
    "cap_q": pl.Float64,
}
_ENDS = [token.encode() for token in sorted(END_TOKENS)]


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
    ``align_key``), or else the bytes that they stand for, and what ends a turn by its role; an entry that does not say
    which token it is, is no token of the other side.

    Parameters
    ----------
    candidates : pl.DataFrame
        Rows of ``candidates.parquet`` with a column ``row`` that numbers them.
    keys : pl.Series of String
        ``id``, ``bytes`` or ``text``, one for each row.

    Returns
    -------
    pl.DataFrame
        ``row, shown, id_p, id_q, logprob_p, logprob_q, cap_p, cap_q``; of each row P's list in its order, then what
        only Q lists. ``shown`` is the text as `visible` gives it; null is what a side does not list, where its
        log-probability is at most ``cap``, the smallest of its k best, or not known at all where that is null. Entries
        of a side that repeat a token are one, with the sum of their masses; one that is listed twice counts once.
    """
    by = pl.DataFrame({"row": candidates["row"], "by": keys})
    caps = candidates.select("row", cap_p=pl.col("p_logprobs").list.min(), cap_q=_best_of_q().list.min())
    entries = [_entries(candidates.join(by, on="row"), side) for side in "pq"]
    readers = byte_functions(*([_candidates(side.filter(pl.col("by") != "id"))] for side in entries))
    keyed = [_keyed(side, read, name) for side, read, name in zip(entries, readers, "pq", strict=True)]
    of_p, of_q = (_merged(side, name) for side, name in zip(_with_roles(*keyed), "pq", strict=True))
    merged = of_p.join(of_q, on=["row", "key"], how="full", coalesce=True, maintain_order="left_right")
    named = merged.with_columns(shown=pl.coalesce("shown", "shown_right"))
    known = named.join(caps, on="row", how="left", maintain_order="left")
    return known.sort("row", maintain_order=True).select(pl.col(name).cast(kind) for name, kind in _SCHEMA.items())


def _best_of_q() -> pl.Expr:
    """Q's k best log-probabilities: what was asked for by name says nothing of what is not listed."""
    lists = pl.col("q_logprobs")
    return lists.list.head(lists.list.len().cast(pl.Int64) - pl.col("n_wanted_q").fill_null(0))


def _entries(candidates: pl.DataFrame, side: str) -> pl.DataFrame:
    """``row, by, token, id, logprob, stated`` of each entry; ``is_best``: not asked for by name."""
    lists = [f"{side}_{name}" for name in ("tokens", "token_ids", "logprobs", "bytes")]
    n_best = pl.col(lists[0]).list.len().cast(pl.Int64) - (pl.col("n_wanted_q").fill_null(0) if side == "q" else 0)
    place = pl.int_ranges(pl.col(lists[0]).list.len().cast(pl.Int64))
    rows = candidates.filter(pl.col(lists[0]).list.len() > 0).select("row", "by", *lists, n_best=n_best, place=place)
    flat = rows.explode(*lists, "place")
    names = dict(zip(("token", "id", "logprob", "stated"), lists, strict=True))
    stated = pl.when(pl.col("by") == "bytes").then(pl.coalesce(lists[3], pl.col(lists[0]).cast(pl.Binary)))
    named = flat.select("row", "by", **{name: pl.col(column) for name, column in names.items()}, other=stated,
                        is_best=pl.col("place") < pl.col("n_best"))  # fmt: skip
    return named.with_columns(stated=pl.coalesce("other", "stated")).drop("other")


def _candidates(entries: pl.DataFrame) -> list[Candidate]:
    distinct = entries.select("token", "stated").unique(maintain_order=True)
    return [Candidate(token, None, None, stated) for token, stated in distinct.iter_rows()]


def _keyed(entries: pl.DataFrame, read: BytesOf, side: str) -> pl.DataFrame:
    """The same with ``shown`` and the ``key`` of the token; one that does not say which it is has its own."""
    distinct = entries.select("token", "stated").unique(maintain_order=True)
    texts = [
        (visible(token, stated), read(Candidate(token, None, None, stated))) for token, stated in distinct.iter_rows()
    ]
    told = pl.DataFrame(texts, schema={"shown": pl.String, "own": pl.Binary}, orient="row")
    known = entries.join(
        pl.concat([distinct, told], how="horizontal"),
        on=["token", "stated"], how="left", nulls_equal=True, maintain_order="left",
    )  # fmt: skip
    key = (
        pl.when((pl.col("by") == "id") & pl.col("id").is_not_null()).then(pl.format("#{}", "id"))
        .when(pl.col("own").is_not_null()).then(pl.format("={}", pl.col("own").bin.encode("hex")))
        .otherwise(pl.format("?{}{}", pl.lit(side), pl.int_range(pl.len())))
    )  # fmt: skip
    return known.with_columns(key=key)


def _with_roles(of_p: pl.DataFrame, of_q: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The same with one key for the end tokens of positions where, by text, each side has its own."""
    is_end = (pl.col("by") == "text") & pl.col("own").is_in(_ENDS)
    ends_p, ends_q = of_p.filter(is_end), of_q.filter(is_end & pl.col("is_best"))
    if not (ends_p.height and ends_q.height):
        return of_p, of_q
    both = ends_p.select("row").unique().join(ends_q.select("row").unique(), on="row")
    rows = both.join(ends_p.join(ends_q, on=["row", "key"], how="semi"), on="row", how="anti")["row"].implode()
    key = pl.when(is_end & pl.col("row").is_in(rows)).then(pl.lit("end")).otherwise("key")
    return of_p.with_columns(key=key), of_q.with_columns(key=key)


def _merged(entries: pl.DataFrame, side: str) -> pl.DataFrame:
    again = pl.col("id").is_not_null() & ~pl.struct("row", "key", "id", "logprob").is_first_distinct()
    one = entries.filter(~again).group_by("row", "key", maintain_order=True)
    return one.agg(
        pl.col("shown").first(),
        pl.col("id").first().alias(f"id_{side}"),
        pl.col("logprob").exp().sum().log().alias(f"logprob_{side}"),
    )
