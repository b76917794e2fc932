"""Both lists of positions as one table: read from ``candidates.parquet`` in batches, matched token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from kl.columns import IntArray
from kl.estimators.token_bytes import BytesOf, byte_functions
from kl.output.report.movers import Movers
from kl.output.report.visible import LONGEST, visible
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
_BY_ID = (pl.col("by") == "id") & pl.col("id").is_not_null()
# What tells a token from others at its position: an entry of P or Q is one of its own.
_P, _Q, _ID, _BYTES, _END, _KINDS = range(6)


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
    known = candidates.with_columns(keys.alias("by"), at=pl.int_range(pl.len()))
    caps = known.select("row", cap_p=pl.col("p_logprobs").list.min(), cap_q=_best_of_q().list.min())
    entries = [_entries(known, side) for side in "pq"]
    readers = byte_functions(*([_candidates(side.filter(pl.col("by") != "id"))] for side in entries))
    numbers = {end: number for number, end in enumerate(_ENDS)}
    keyed = [_keyed(side, read, numbers, own) for side, read, own in zip(entries, readers, (_P, _Q), strict=True)]
    found = _merged(pl.concat(_with_roles(*keyed)))
    limited = pl.concat([found, caps[found["at"]]], how="horizontal")
    return limited.select(pl.col(name).cast(kind) for name, kind in _SCHEMA.items())


def _best_of_q() -> pl.Expr:
    """Q's k best log-probabilities: what was asked for by name says nothing of what is not listed."""
    lists = pl.col("q_logprobs")
    return lists.list.head(lists.list.len().cast(pl.Int64) - pl.col("n_wanted_q").fill_null(0))


def _entries(candidates: pl.DataFrame, side: str) -> pl.DataFrame:
    """``at, by, token, id, logprob, stated`` of each entry; ``is_best``: not asked for by name."""
    lists = [f"{side}_{name}" for name in ("tokens", "token_ids", "logprobs", "bytes")]
    n_best = pl.col(lists[0]).list.len().cast(pl.Int64) - (pl.col("n_wanted_q").fill_null(0) if side == "q" else 0)
    place = pl.int_ranges(pl.col(lists[0]).list.len().cast(pl.Int64))
    rows = candidates.filter(pl.col(lists[0]).list.len() > 0).select("at", "by", *lists, n_best=n_best, place=place)
    flat = rows.explode(*lists, "place")
    names = dict(zip(("token", "id", "logprob", "stated"), lists, strict=True))
    stated = pl.when(pl.col("by") == "bytes").then(pl.coalesce(lists[3], pl.col(lists[0]).cast(pl.Binary)))
    named = flat.select("at", "by", **{name: pl.col(column) for name, column in names.items()}, other=stated,
                        is_best=pl.col("place") < pl.col("n_best"))  # fmt: skip
    return named.with_columns(stated=pl.coalesce("other", "stated")).drop("other")


def _candidates(entries: pl.DataFrame) -> list[Candidate]:
    return [Candidate(token, None, None, stated) for token, stated in _distinct(entries).iter_rows()]


def _distinct(entries: pl.DataFrame) -> pl.DataFrame:
    return entries.select("token", "stated").unique(maintain_order=True)


def _keyed(entries: pl.DataFrame, read: BytesOf, numbers: dict[bytes, int], side: int) -> pl.DataFrame:
    """The same with the ``side`` and what tells the token from others at its position: ``key`` of a ``kind``.

    That is its id, or the number of its bytes in ``numbers``, to which both sides add; of an entry that does not say
    which token it is, which entry of its side.
    """
    distinct = _distinct(entries.filter(~_BY_ID))
    own = [read(Candidate(token, None, None, stated)) for token, stated in distinct.iter_rows()]
    known = [None if token is None else numbers.setdefault(token, len(numbers)) for token in own]
    joined = _with(entries, distinct, pl.Series("own", known, dtype=pl.Int64))
    is_known = pl.col("own").is_not_null()
    return joined.with_columns(
        side=pl.lit(side),
        kind=pl.when(_BY_ID).then(_ID).when(is_known).then(_BYTES).otherwise(side),
        key=pl.when(_BY_ID).then("id").when(is_known).then("own").otherwise(pl.int_range(pl.len())),
    )


def _with(entries: pl.DataFrame, distinct: pl.DataFrame, told: pl.Series) -> pl.DataFrame:
    """The entries with what is ``told`` of some ``distinct`` ones, null of all others."""
    if not distinct.height:
        return entries.with_columns(pl.lit(None, dtype=told.dtype).alias(told.name))
    known = distinct.with_columns(told)
    return entries.join(known, on=["token", "stated"], how="left", nulls_equal=True, maintain_order="left")


def _shown(entries: pl.DataFrame) -> pl.Series:
    """The text of each as `visible` gives it, which is, as a rule, the token."""
    is_plain = ~pl.col("token").str.contains(r"[^ -~]") & pl.col("token").str.len_bytes().is_between(1, LONGEST)
    distinct = _distinct(entries.filter(~is_plain))
    texts = pl.Series("shown", [visible(*entry) for entry in distinct.iter_rows()], dtype=pl.String)
    return _with(entries, distinct, texts).select(pl.coalesce("shown", "token").alias("shown")).to_series()


def _with_roles(of_p: pl.DataFrame, of_q: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The same with one key for the end tokens of positions where, by text, each side has its own."""
    is_end = (pl.col("by") == "text") & (pl.col("kind") == _BYTES) & (pl.col("key") < len(_ENDS))
    ends_p, ends_q = of_p.filter(is_end), of_q.filter(is_end & pl.col("is_best"))
    if not (ends_p.height and ends_q.height):
        return of_p, of_q
    both = ends_p.select("at").unique().join(ends_q.select("at").unique(), on="at")
    rows = both.join(ends_p.join(ends_q, on=["at", "key"], how="semi"), on="at", how="anti")["at"].implode()
    kind = pl.when(is_end & pl.col("at").is_in(rows)).then(_END).otherwise("kind")
    key = pl.when(is_end & pl.col("at").is_in(rows)).then(0).otherwise("key")
    return of_p.with_columns(kind=kind, key=key), of_q.with_columns(kind=kind, key=key)


def _sorted(major: IntArray, minor: IntArray) -> IntArray:
    """What sorts by both; ``major`` is at least 0. Equals stay in their order."""
    least, most = int(minor.min()), int(minor.max())
    if (int(major.max()) + 1) * (most - least + 1) >= 2**63:
        return np.lexsort((minor, major))
    # As one number, which is nearly in order: the list of a position stands together.
    return np.argsort(major * (most - least + 1) + (minor - least), kind="stable")


class _Runs(NamedTuple):
    """Entries that are one token of one position, those of each side behind one another.

    ``order`` sorts the entries; ``starts`` are the runs of one side, by their places in it, ``numbers`` their tokens.
    """

    order: IntArray
    starts: IntArray
    numbers: IntArray

    @classmethod
    def of(cls, entries: pl.DataFrame) -> _Runs:
        """Of those of P, then those of Q, each side in the order of its lists."""
        at, kind, key, side = (entries[name].to_numpy() for name in ("at", "kind", "key", "side"))
        place = at * _KINDS + kind
        order = _sorted(place, key)
        differs = np.concatenate([[True], (np.diff(place[order]) != 0) | (np.diff(key[order]) != 0)])
        other_side = np.concatenate([[True], np.diff(side[order]) != 0])
        starts = np.flatnonzero(differs | other_side)
        return cls(order, starts, np.cumsum(differs)[starts] - 1)


def _merged(entries: pl.DataFrame) -> pl.DataFrame:
    """``at, shown, id_p, id_q, logprob_p, logprob_q`` of each token, as `both_lists` orders them."""
    if not entries.height:
        return pl.DataFrame(schema={"at": pl.Int64} | _SCHEMA).drop("row", "cap_p", "cap_q")
    runs = _Runs.of(entries)
    if len(runs.starts) < entries.height:
        known = pl.col("id").is_not_null()
        again = known & ~pl.struct("side", "at", "kind", "key", "id", "logprob").is_first_distinct()
        entries = entries.filter(~again)
        runs = _Runs.of(entries)
    order, starts, number = runs
    firsts: IntArray = np.full((2, int(number[-1]) + 1), -1)
    masses = np.full(firsts.shape, np.nan)
    side, at = entries["side"].to_numpy()[order[starts]], entries["at"].to_numpy()
    firsts[side, number] = order[starts]
    masses[side, number] = np.logaddexp.reduceat(entries["logprob"].to_numpy()[order], starts)
    first: IntArray = np.maximum(firsts[_P], np.where(firsts[_P] < 0, firsts[_Q], -1))
    shown_as = _sorted(at[first], first)
    ids = (entries["id"].gather(pl.Series(of_side[shown_as]).replace(-1, None)) for of_side in firsts)
    logprobs = (pl.Series(of_side[shown_as]).fill_nan(None) for of_side in masses)
    named = entries.select("at", "token", "stated")[first[shown_as]]
    return named.with_columns(
        _shown(named),
        *(series.alias(f"id_{name}") for name, series in zip("pq", ids, strict=True)),
        *(series.alias(f"logprob_{name}") for name, series in zip("pq", logprobs, strict=True)),
    )
