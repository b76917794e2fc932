"""Token tables for the tests of what is computed from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import polars as pl
import pytest

from kl.tables.schemas import TOKENS


class Answer(NamedTuple):
    """A response as the tests write it down: its token KL values, ``None`` where nothing was measured."""

    source_file: str
    prompt_id: str
    response_idx: int
    kl: Sequence[float | None]


def build_tokens(answers: Sequence[Answer]) -> pl.DataFrame:
    """A table with lower = KL/2, plausible upper = 2 KL, floor = KL/4, bucket = KL/2 and plain values elsewhere."""
    rows = [
        {
            "source_file": answer.source_file,
            "prompt_id": answer.prompt_id,
            "response_idx": answer.response_idx,
            "position": position,
            "token": f"t{position}",
            "token_id": position,
            "kl_estimate": value,
        }
        for answer in answers
        for position, value in enumerate(answer.kl)
    ]
    schema = {name: TOKENS[name] for name in rows[0]} if rows else {}
    frame = pl.DataFrame(rows, schema=schema) if rows else pl.DataFrame(schema=TOKENS)
    return _filled(frame) if rows else frame


def _filled(frame: pl.DataFrame) -> pl.DataFrame:
    kl = pl.col("kl_estimate")
    known = kl.is_not_null()
    missing = pl.when(~known)
    filled = frame.with_columns(
        selected=pl.lit(True),
        pi=pl.lit(1.0),
        kl_lower=kl / 2,
        kl_upper_plausible=kl * 2,
        kl_floor=kl / 4,
        kl_bucket=kl / 2,
        kl_censored=kl,
        reverse_kl_estimate=kl * 3,
        js_estimate=kl / 8,
        same_top_token=pl.when(known).then(kl < 1),
        rest_mass_p=pl.lit(0.25),
        rest_mass_q=pl.when(known).then(0.125),
        logratio_k1=kl,
        k1_censored=pl.when(known).then(False),
        k3=kl,
        logprob_p=pl.lit(-1.0),
        logprob_q=pl.when(known).then(-2.0),
        delta_p=pl.when(known).then(-0.5),
        reason=missing.then(pl.lit("blocked")),
        error=missing.then(pl.lit("the service blocked this prefix")),
    )
    absent = [pl.lit(None, dtype=kind).alias(name) for name, kind in TOKENS.items() if name not in filled.columns]
    return filled.with_columns(absent).select(pl.col(name).cast(kind) for name, kind in TOKENS.items())


@pytest.fixture
def token_table() -> Callable[[Sequence[tuple[str, str, int, Sequence[float | None]]]], pl.DataFrame]:
    """Build a token table from (file, prompt, response index, token KL values)."""
    return lambda answers: build_tokens([Answer(*answer) for answer in answers])
