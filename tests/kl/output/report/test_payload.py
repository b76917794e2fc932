"""What the page's script reads is what the tables say, row by row."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kl.output.report import payload
from kl.output.report.lists import read_lists
from kl.output.report.movers import Movers
from kl.output.report.payload import lists_of, texts_of
from kl.output.report.selection import Selection, select
from kl.output.report.visible import visible
from kl.tables.responses import summarise_responses
from tests.kl.output.report.made import made_run

TEXTS = ['"\\', "</script>", "\n", "\u2028", "", None, "é", "⟨E2⟩"]
REASONS = [("short", "too <few>"), ("infinite", None), ("http", 'said "no"'), (None, None)]


def holed(tokens: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The same with what a table may lack, and texts that JSON and HTML must not take for their own."""
    random, n = np.random.default_rng(seed), tokens.height
    reasons = [REASONS[at] for at in random.integers(0, len(REASONS), n)]
    unknown = {name: pl.when(pl.Series(random.random(n) < random.random())).then(name) for name in _measures()}
    return tokens.with_columns(
        **unknown,
        token=pl.Series([TEXTS[at] for at in random.integers(0, len(TEXTS), n)], dtype=pl.String),
        token_id=pl.when(pl.Series(random.random(n) < 0.7)).then("token_id"),
        flags=pl.Series([[None, "a,b", "<"][at] for at in random.integers(0, 3, n)], dtype=pl.String),
        is_stop=pl.Series([[None, True, False][at] for at in random.integers(0, 3, n)], dtype=pl.Boolean),
        k1_censored=pl.Series([[None, True, False][at] for at in random.integers(0, 3, n)], dtype=pl.Boolean),
        reason=pl.Series([reason for reason, _ in reasons], dtype=pl.String),
        error=pl.Series([error for _, error in reasons], dtype=pl.String),
    )


def _measures() -> list[str]:
    return ["kl_estimate", "kl_lower", "kl_exact", "entropy_p", "entropy_q", "logprob_p", "delta_p", "rest_mass_q"]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_texts_are_the_rows_of_the_token_table(seed: int):
    run = made_run(4, 7, seed=seed % 1000, lists=False)
    rows = summarise_responses(run.tokens.lazy()).lazy()
    chosen = select(run.tokens.lazy(), rows, 2)
    shown = chosen._replace(tokens=holed(chosen.tokens, seed))
    found = json.loads(texts_of(shown, {"x": "not shown"}))
    assert found["prompts"] == {}
    assert len(found["shown"]) == 4
    for window, response in zip(chosen.windows.to_dicts(), found["shown"], strict=True):
        own = shown.tokens.filter(source_file=window["source_file"]).to_dicts()
        assert (response["file"], response["first"], response["why"]) == (window["source_file"], 0, window["why"])
        assert response["text"] == [visible(row["token"] or "") for row in own]
        assert response["ids"] == [row["token_id"] for row in own]
        assert response["flags"] == [row["flags"] for row in own]
        assert response["stop"] == [at for at, row in enumerate(own) if row["is_stop"]]
        assert response["atMost"] == "".join("1" if row["k1_censored"] else "0" for row in own)
        assert len(response["state"]) == 7
        said = [None if at is None else found["reasons"][at] for at in response["reasons"]]
        assert said == [": ".join(filter(None, (row["reason"], row["error"]))) or None for row in own]
        for name, column in {"kl": "kl_estimate", "hp": "entropy_p", "dp": "delta_p", "exact": "kl_exact"}.items():
            known = [row[column] for row in own]
            assert response.get(name, [None] * 7) == [value and pytest.approx(value, rel=1e-3) for value in known]
            assert (name in response) == any(value is not None for value in known)


@pytest.mark.parametrize("most", [3, 40])
@pytest.mark.parametrize("seed", range(4))
def test_lists_are_the_rows_of_both_lists(seed: int, most: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(payload, "ENTRIES_SHOWN", most)
    run = made_run(3, 9, seed=seed)
    assert run.candidates is not None
    chosen = select(run.tokens.lazy(), summarise_responses(run.tokens.lazy()).lazy(), 2)
    wanted = cast(list[int], chosen.tokens.filter("listed")["row"].to_list())
    lists = read_lists(run.tokens.lazy(), run.candidates.lazy(), wanted, Movers())
    unknown = lists.with_columns(cap_q=pl.when(pl.col("row") % 2 == 0).then("cap_q"))
    found = json.loads(lists_of(chosen, unknown))
    told = {
        place: [
            values[:2],
            *([found["vocabulary"][values[at]], *values[at + 1 : at + 3]] for at in range(2, len(values), 3)),
        ]
        for place, values in found["places"].items()
    }
    assert (told, found["more"]) == slowly(chosen, unknown, most)


def slowly(chosen: Selection, lists: pl.DataFrame, most: int) -> tuple[dict[str, list[Any]], dict[str, int]]:
    """The limits and the entries of each place, and how many others it has."""
    files = chosen.windows["source_file"].to_list()
    places: dict[str, list[Any]] = {}
    more: dict[str, int] = {}
    for (row,), entries in lists.partition_by("row", as_dict=True, maintain_order=True).items():
        at = chosen.tokens.filter(row=row).to_dicts()[0]
        place = f"{files.index(at['source_file'])}/{at['position']}"
        tokens = entries.to_dicts()
        best = sorted((max(_known(token)) for token in tokens), reverse=True)[:most]
        places[place] = [[_nats(tokens[0][f"cap_{side}"], np.floor) for side in "pq"]]
        for token in tokens:
            ids = dict.fromkeys(one for one in (token["id_p"], token["id_q"]) if one is not None)
            values = [_nats(token[f"logprob_{side}"], np.round) for side in "pq"]
            places[place] += [[[token["shown"], *ids], *values]] if max(_known(token)) in best else []
        more |= {place: len(tokens) - most} if len(tokens) > most else {}
    return places, more


def _known(token: dict[str, Any]) -> list[float]:
    return [token[name] for name in ("logprob_p", "logprob_q") if token[name] is not None]


def _nats(value: float | None, whole: Callable[[float], float]) -> int | None:
    return None if value is None else int(whole(-1000 * value))
