"""What the page's script reads: the table of responses, the shown texts with their measures, both lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import polars as pl

from kl.output.atomic import json_bytes
from kl.output.report.selection import Selection
from kl.output.report.visible import visible
from kl.tables.totals import IS_INFINITE, MEASURED, RESPONSE_KEYS

ENTRIES_SHOWN = 40  # of both lists of a position
_PROMPT_LETTERS = 2_000
_DIGITS = 4
# In the script's words; docs of the columns: kl.tables.schemas.
_MEASURES = {
    "kl": "kl_estimate",
    "lower": "kl_lower",
    "upper": "kl_upper_plausible",
    "exact": "kl_exact",
    "hp": "entropy_p",
    "hq": "entropy_q",
    "lp": "logprob_p",
    "lq": "logprob_q",
    "dp": "delta_p",
    "rp": "rest_mass_p",
    "rq": "rest_mass_q",
}


def table_of(selection: Selection) -> dict[str, Any]:
    """Columns of the table of responses; ``shown`` is the number of a response's text on the page, or null."""
    windows = selection.windows.select(*RESPONSE_KEYS).with_row_index("shown")
    rows = selection.table.join(windows, on=RESPONSE_KEYS, how="left", maintain_order="left")
    # Of positions that were drawn the sum is an estimate, so that nothing is certain.
    whole = (pl.col("n_measured") == pl.col("n_positions")) & (pl.col("n_positions") > 0)
    columns = rows.select(
        file="source_file",
        index="response_idx",
        shown=pl.col("shown").cast(pl.Int64),
        n="n_positions",
        measured="n_measured",
        missing="n_missing",
        infinite="n_infinite",
        kl="kl_mean_per_token",
        lower=pl.when(whole).then(_rounded_down(pl.col("kl_lower_sum") / pl.col("n_positions"))),
        same="same_top_rate",
        max="max_kl",
        at="max_kl_position",
        finish="finish_reason",
        reason="reason",
    )
    return {"rows": selection.table.height} | {column.name: _plain(column) for column in columns}


def texts_of(selection: Selection, prompts: Mapping[str, str]) -> str:
    """The shown responses, in the order of their numbers, each with columns over its shown positions; JSON.

    ``state`` has a letter for each: ``m`` measured, ``b`` bounds only, ``i`` infinite, ``x`` missing, ``s`` left out by
    position sampling; ``reasons`` the number of what is to be said of it in the list of that name, or null. ``lq`` is
    the limit of log q where ``atMost`` says so. Of a response that lacks a measure everywhere it is left out.
    """
    tokens = selection.tokens.with_columns(_state(), at_most=pl.col("k1_censored").fill_null(value=False)).with_columns(
        # Where Q does not list the token, log p/q is at least logratio_k1.
        logprob_q=pl.when("at_most").then(pl.col("logprob_p") - pl.col("logratio_k1")).otherwise("logprob_q")
    )
    why = pl.concat_str([pl.col("reason"), pl.col("error")], separator=": ", ignore_nulls=True)
    tokens = tokens.with_columns(_rounded_down(pl.col("kl_lower")), why=pl.when(why != "").then(why))
    reasons = cast(list[str], tokens["why"].drop_nulls().unique(maintain_order=True).to_list())
    groups = _columns(tokens, reasons)
    windows = selection.windows.join(selection.table, on=RESPONSE_KEYS, how="left", maintain_order="left")
    shown = windows.join(groups, on=RESPONSE_KEYS, how="left", maintain_order="left").to_dicts()
    wanted = {row["source_file"] for row in shown}
    told = {name: visible(text, longest=_PROMPT_LETTERS) for name, text in prompts.items() if name in wanted}
    rest = {"reasons": [visible(reason, longest=1_000) for reason in reasons], "prompts": told}
    return f'{{"shown":[{",".join(map(_response, shown))}],{json_bytes(rest).decode()[1:]}'


def _columns(tokens: pl.DataFrame, reasons: Sequence[str]) -> pl.DataFrame:
    """A row for each response: what is said of its tokens, as JSON (``json.`` and the name on the page)."""
    token = pl.col("token").fill_null("")
    texts = tokens.select(token.unique()).to_series()
    numbered = pl.col("why").replace_strict(reasons, range(len(reasons)), default=None, return_dtype=pl.Int64)
    rounded = pl.col(*_MEASURES.values()).round_sig_figs(_DIGITS)
    told = tokens.with_columns(
        rounded, why=numbered, token=token.replace_strict(texts, [visible(text) for text in texts])
    )
    at_most, is_stop = pl.when("at_most").then(pl.lit("1")).otherwise(pl.lit("0")), pl.col("is_stop").fill_null(False)
    lists = {
        "text": _quoted("token").str.join(","),
        "ids": _whole(pl.col("token_id")).str.join(","),
        "stop": _whole(is_stop.arg_true()).str.join(","),
        "reasons": _whole(pl.col("why")).str.join(","),
        "flags": _quoted("flags").str.join(","),
    }
    measures = {
        name: pl.when(pl.col(column).is_not_null().any()).then(
            pl.col(column).cast(pl.String).fill_null("null").str.join(",")
        )
        for name, column in _MEASURES.items()
    }
    words = {"state": pl.col("state").str.join(""), "atMost": at_most.str.join("")}
    return told.group_by(RESPONSE_KEYS, maintain_order=True).agg(
        *(pl.format('"{}"', text).alias(f"json.{name}") for name, text in words.items()),
        *(pl.format("[{}]", text).alias(f"json.{name}") for name, text in (lists | measures).items()),
    )


def _state() -> pl.Expr:
    return (
        pl.when(~pl.col("selected")).then(pl.lit("s"))
        .when(IS_INFINITE).then(pl.lit("i"))
        .when(~MEASURED).then(pl.lit("x"))
        .when(pl.col("kl_estimate").is_null()).then(pl.lit("b"))
        .otherwise(pl.lit("m"))
        .alias("state")
    )  # fmt: skip


def _response(row: Mapping[str, Any]) -> str:
    head = {
        "file": row["source_file"],
        "index": row["response_idx"],
        "n": row["n_positions"],
        "first": row["first"],
        "why": row["why"],
    }
    if row["json.state"] is None:  # the response table speaks of positions that the token table lacks
        raise ValueError(f"{row['source_file']}#{row['response_idx']} has no row in the token table.")
    columns = ((name.removeprefix("json."), value) for name, value in row.items() if name.startswith("json."))
    told = (f'"{name}":{value}' for name, value in columns if value is not None)
    return f"{json_bytes(head).decode()[:-1]},{','.join(told)}}}"


def lists_of(selection: Selection, lists: pl.DataFrame) -> str:
    """Both lists by ``number of the response/position``: the limits of what a side does not list, and its entries.

    JSON. The limits are −1000 log p and −1000 log q, null where nothing is known; then, repeated, vocabulary number,
    −1000 log p and −1000 log q, null where not listed. ``vocabulary`` has the text, P's id and, if it differs, Q's. At
    most `ENTRIES_SHOWN` of a position, the most probable ones; ``more`` says how many others there are.
    """
    numbers = selection.windows.select(*RESPONSE_KEYS).with_row_index("response")
    places = selection.tokens.join(numbers, on=RESPONSE_KEYS).select(
        "row", place=pl.format("{}/{}", "response", "position")
    )
    sizes = lists.group_by("row", maintain_order=True).len("n").join(places, on="row", maintain_order="left")
    longer = sizes.filter(pl.col("n") > ENTRIES_SHOWN)
    kept = _most_probable(lists) if longer.height else lists
    words = kept.select("shown", "id_p", "id_q").unique(maintain_order=True).with_row_index("word")
    coded = kept.join(words, on=["shown", "id_p", "id_q"], how="left", nulls_equal=True, maintain_order="left")
    # Texts, as there are too many numbers for Python's encoder.
    entries = _joined(pl.col("word"), *(_nats(f"logprob_{side}").round() for side in "pq"))
    flat = coded.select("row", "cap_p", "cap_q", entries=entries).group_by("row", maintain_order=True)
    of_rows = flat.agg(pl.col("cap_p", "cap_q").first(), pl.col("entries").str.join(","))
    limits = _joined(*(_nats(f"cap_{side}").floor() for side in "pq"))  # a limit is never written smaller
    named = pl.format('"{}":[{},{}]', "place", limits, "entries").str.join(",")
    found = of_rows.join(places, on="row", how="inner", maintain_order="left").select(named).item()
    other_id = pl.when(pl.col("id_p") != pl.col("id_q")).then(pl.format(",{}", "id_q")).fill_null("")
    word = pl.concat_str(pl.lit("["), _quoted("shown"), pl.lit(","), _whole(pl.coalesce("id_p", "id_q")), other_id)
    vocabulary = words.select((word + "]").str.join(",")).item()
    more = dict(longer.select("place", pl.col("n").cast(pl.Int64) - ENTRIES_SHOWN).iter_rows())
    return f'{{"vocabulary":[{vocabulary}],"places":{{{found}}},"more":{json_bytes(more).decode()}}}'


def _most_probable(lists: pl.DataFrame) -> pl.DataFrame:
    """`ENTRIES_SHOWN` of each row."""
    best = pl.max_horizontal("logprob_p", "logprob_q")
    return lists.filter(best.rank("ordinal", descending=True).over("row") <= ENTRIES_SHOWN)


def _joined(*numbers: pl.Expr) -> pl.Expr:
    return pl.concat_str(*map(_whole, numbers), separator=",")


def _whole(number: pl.Expr) -> pl.Expr:
    """Whole numbers as JSON."""
    return number.cast(pl.Int64).cast(pl.String).fill_null("null")


def _quoted(column: str) -> pl.Expr:
    """Texts as JSON."""
    return pl.struct(column).struct.json_encode().str.strip_prefix(f'{{"{column}":').str.strip_suffix("}")


def _rounded_down(bound: pl.Expr) -> pl.Expr:
    """A lower bound to the digits that are kept, never upwards."""
    digit = pl.lit(10.0).pow(bound.log10().floor() - (_DIGITS - 1))
    return pl.when(bound > 0).then((bound / digit + 1e-9).floor() * digit).otherwise(bound)


def _nats(column: str) -> pl.Expr:
    return -1000 * pl.col(column).clip(-9999, 0)


def _plain(column: pl.Series) -> Sequence[Any]:
    if column.dtype != pl.Float64:
        return column.to_list()
    return column.round_sig_figs(_DIGITS).to_list()
