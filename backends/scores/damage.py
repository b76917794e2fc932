"""What is wrong with stored scores that no run of this program wrote so: on a failing disk, by another program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from backends.scores.rows import ADDED, LARGEST_LOGPROB, LISTS, SCORES, WANTED

KEPT = [name for name in SCORES.names() if name not in ADDED]  # in parts of every version


def misfit(schema: Mapping[str, pl.DataType]) -> str | None:
    """Why a table with these columns is none of scores; None if it is one, whatever else it holds."""
    if lacking := [name for name in KEPT if name not in schema]:
        return f"it has no {', '.join(lacking[:3])}"
    odd = (name for name, dtype in SCORES.items() if name in schema and not _fits(schema[name], dtype))
    return next((f"{name} is {schema[name]}, not {SCORES[name]}" for name in odd), None)


def _fits(found: pl.DataType, wanted: pl.DataType) -> bool:
    """Whether values of one type may be taken for those of another: numbers of other sizes, and nothing but nulls."""
    if isinstance(found, pl.List) and isinstance(wanted, pl.List):
        return _fits(pl.List(found.inner).inner, wanted.inner)  # type: ignore[arg-type]
    same_kind = (found.is_integer() and wanted.is_integer()) or (found.is_float() and wanted.is_float())
    return found == wanted or found == pl.Null or same_kind or (found.is_temporal() and wanted.is_temporal())


def damage(frame: pl.DataFrame) -> pl.Series:
    """What is wrong with each row of a table of scores (`SCORES`); null where nothing is."""
    if not frame.select(pl.any_horizontal(wrong for wrong, _ in _FAULTS).any()).item():
        return pl.repeat(None, frame.height, dtype=pl.String, eager=True)
    return frame.select(pl.coalesce(pl.when(wrong).then(pl.lit(why)) for wrong, why in _FAULTS)).to_series()


def parted(frame: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The sound rows of a table of scores, and the damaged ones with ``why``."""
    judged = frame.with_columns(damage(frame).alias("why"))
    return judged.filter(pl.col("why").is_null()).drop("why"), judged.filter(pl.col("why").is_not_null())


def _is_odd(name: str) -> tuple[pl.Expr, str]:
    values = pl.col(name)
    # `max` passes over what is not a number, the sum does not.
    odd = values.list.contains(None) | values.list.sum().is_nan() | (values.list.max() > LARGEST_LOGPROB)
    return odd, f"{name} with a null, a NaN or a value above 0"


def _unequal(names: Sequence[str]) -> tuple[pl.Expr, str]:
    first, *others = (pl.col(name).list.len().fill_null(0) for name in names)
    return pl.any_horizontal(first != other for other in others), f"lists of unequal lengths ({', '.join(names)})"


_IS_SCORE = pl.col("reason").is_null()
_FAULTS: list[tuple[pl.Expr, str]] = [
    (pl.col("key").is_null() | (pl.col("key") == ""), "no key"),
    (~_IS_SCORE & pl.col("error").is_null(), "a failure without its message"),
    (_IS_SCORE & pl.col("tokens").is_null(), "neither a list nor a failure"),
    (_IS_SCORE & pl.col("n_dropped").is_null(), "no n_dropped"),
    _unequal(LISTS),
    (pl.col("tokens").list.contains(None), "a null among the tokens"),
    _is_odd("logprobs"),
    _unequal(WANTED),
    (pl.col("wanted_tokens").list.contains(None), "a null among the wanted_tokens"),
    _is_odd("wanted_logprobs"),
    _is_odd("full_logprobs"),
    (
        pl.col("exact_versus").is_not_null() & pl.any_horizontal(pl.col("vocabulary", "vocabulary_versus").is_null()),
        "figures of a pair without the sizes of its vocabularies",
    ),
]
