"""Which responses and positions a page shows: the worst ones and an even sample of the others, within a budget."""

from __future__ import annotations

from typing import Any, NamedTuple

import polars as pl

from kl.tables.totals import BATCH_ROWS, IS_INFINITE, MEASURED, RESPONSE_KEYS

TOKENS_SHOWN = 40_000  # some 80 bytes each
LONGEST_SHOWN = 4_000  # of one response
LISTS_SHOWN = 8_000  # positions with both lists, some 500 bytes each
TABLE_ROWS = 10_000

_INFINITY = pl.lit(float("inf"))
_PLACE = (*RESPONSE_KEYS, "position")
_ORDER = ("selected", "reason", "error", "kl_estimate", "kl_lower")
_SHOWN = (
    *(*_PLACE, "token", "token_id", "is_stop", *_ORDER, "kl_upper_plausible", "kl_exact", "entropy_p", "entropy_q"),
    *("logprob_p", "logprob_q", "logratio_k1", "k1_censored", "delta_p", "rest_mass_p", "rest_mass_q", "flags"),
)


class Selection(NamedTuple):
    """What is shown.

    Attributes
    ----------
    table : pl.DataFrame
        Rows of the response table, by falling KL per token; all of them, or the worst and a sample of `TABLE_ROWS`.
    windows : pl.DataFrame
        ``source_file, response_idx, first, end, why``: the positions ``first`` to ``end - 1`` of each response that is
        shown, ``why`` one of ``worst response``, ``worst position`` and ``sample``.
    tokens : pl.DataFrame
        Their rows of the token table, each with its number (``row``) and whether its lists are shown (``listed``).
    worst : pl.DataFrame
        ``row``, place, ``token, kl_estimate, kl_lower`` of the positions with the largest KL; infinite ones first.
    """

    table: pl.DataFrame
    windows: pl.DataFrame
    tokens: pl.DataFrame
    worst: pl.DataFrame


def select(tokens: pl.LazyFrame, responses: pl.LazyFrame, top: int) -> Selection:
    """The ``top`` worst responses and positions, and an even sample; reads the token table twice, in batches."""
    infinite = pl.col("n_infinite") > 0
    order = pl.when(infinite).then(_INFINITY).otherwise("kl_mean_per_token").alias("order")
    rows = responses.with_columns(order).collect().sort(
        ["order", *RESPONSE_KEYS], descending=[True, False, False], nulls_last=True
    )  # fmt: skip
    worst = _worst_positions(tokens, top)
    windows = _windows(rows.filter(pl.col("n_positions") > 0), worst, top)
    return Selection(_table(rows), windows, _shown_tokens(tokens, windows), worst)


def _table(rows: pl.DataFrame) -> pl.DataFrame:
    if rows.height <= TABLE_ROWS:
        return rows
    half = TABLE_ROWS // 2
    rest = rows.slice(half)
    return pl.concat([rows.head(half), rest.gather_every(-(-rest.height // half))])


def _worst_positions(tokens: pl.LazyFrame, top: int) -> pl.DataFrame:
    size = pl.when(IS_INFINITE).then(_INFINITY).otherwise("kl_estimate").alias("size")
    wanted = tokens.select(*_PLACE, "token", *_ORDER).with_row_index("row")
    n_rows = int(tokens.select(pl.len()).collect().item())
    found = wanted.head(0).with_columns(size).collect()
    for first in range(0, n_rows, BATCH_ROWS):
        batch = wanted.slice(first, BATCH_ROWS).filter(MEASURED | IS_INFINITE).with_columns(size)
        found = pl.concat([found, batch.drop_nulls("size").top_k(top, by="size").collect()])
        found = found.sort(["size", "row"], descending=[True, False]).head(top)
    return found


def _windows(rows: pl.DataFrame, worst: pl.DataFrame, top: int) -> pl.DataFrame:
    longest = min(TOKENS_SHOWN // max(1, min(2 * top, rows.height)), LONGEST_SHOWN)
    places = worst.select(*RESPONSE_KEYS, at="position").unique(RESPONSE_KEYS, keep="first", maintain_order=True)
    named = rows.join(places, on=RESPONSE_KEYS, how="left", maintain_order="left").with_row_index("rank")
    why = pl.when(pl.col("rank") < top).then(pl.lit("worst response"))
    why = why.when(pl.col("at").is_not_null()).then(pl.lit("worst position")).otherwise(pl.lit("sample"))
    # Where a response is too long to be shown whole, what is around its worst position is.
    middle = pl.coalesce("at", "max_kl_position", pl.lit(0)).cast(pl.Int64)
    first = (middle - longest // 2).clip(0).clip(upper_bound=(pl.col("n_positions") - longest).clip(0))
    cut = named.with_columns(first=first, why=why).with_columns(
        end=pl.min_horizontal(pl.col("first") + longest, "n_positions")
    )
    chosen = cut.filter(pl.col("why") != "sample")
    rest = cut.filter(pl.col("why") == "sample").sort(RESPONSE_KEYS)
    room = TOKENS_SHOWN - int((chosen["end"] - chosen["first"]).sum())
    sizes = rest["end"] - rest["first"]
    fits = int(room / max(float(sizes.sum()) / max(rest.height, 1), 1.0))
    sample = rest.gather_every(max(1, -(-rest.height // max(fits, 1))))
    sample = sample.filter((pl.col("end") - pl.col("first")).cum_sum() <= room)
    return pl.concat([chosen, sample]).sort("rank").select(*RESPONSE_KEYS, "first", "end", "why")


def _shown_tokens(tokens: pl.LazyFrame, windows: pl.DataFrame) -> pl.DataFrame:
    numbered = tokens.select(*_SHOWN).with_row_index("row")
    n_rows = int(tokens.select(pl.len()).collect().item())
    parts = [numbered.head(0).collect()]
    places = windows.select(*RESPONSE_KEYS, "first", "end").lazy()
    inside = pl.col("position").is_between(pl.col("first"), pl.col("end"), closed="left")
    for start in range(0, n_rows, BATCH_ROWS):
        batch = numbered.slice(start, BATCH_ROWS).join(places, on=RESPONSE_KEYS, how="inner", maintain_order="left")
        parts.append(batch.filter(inside).drop("first", "end").collect())
    shown = pl.concat(parts)
    if shown.height <= LISTS_SHOWN:
        return shown.with_columns(listed=pl.lit(value=True))
    size = pl.when(IS_INFINITE).then(_INFINITY).otherwise("kl_estimate").fill_null(-1.0)
    largest = size.rank("ordinal", descending=True) <= LISTS_SHOWN // 2
    step = -(-shown.height // (LISTS_SHOWN // 2))
    return shown.with_columns(listed=largest | (pl.int_range(pl.len()) % step == 0))


def texts_before(selection: Selection, n: int) -> dict[int, list[dict[str, Any]]]:
    """Up to ``n`` tokens before each of the worst positions, by its row."""
    near = selection.worst.select("row", *RESPONSE_KEYS, at="position")
    pairs = selection.tokens.select(*_PLACE, "token").join(near, on=RESPONSE_KEYS, how="inner")
    close = pairs.filter(pl.col("position").is_between(pl.col("at") - n, pl.col("at") - 1)).sort("row", "position")
    return {int(row): group.to_dicts() for (row,), group in close.group_by(["row"], maintain_order=True)}  # pyright: ignore[reportArgumentType]
