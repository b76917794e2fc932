"""What the alert of a canary makes of the history and of the lists in its folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from flows.config.models import RunConfig
from flows.watch.canary import decide_first
from flows.watch.history import HISTORY, Row
from flows.watch.verdict import Verdict
from kl.tables.first_lists import FIRST_LISTS

ALERT = {"of": "q", "test": "permutation", "compared_with": "previous", "kl_per_token": 0}
COMMON = {"model1": "p", "model2": "q", "estimator": "censored", "top_logprobs": 20, "wanted_tokens": False}
MEASURED = {"measured": 30, "missing": 0, "kl_per_token": 0.1, "first_repeats": 2}


class Days:
    """Runs of a schedule, each with its lists on disk and its row."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows, self.rng = folder, list[Row](), np.random.default_rng(5)
        self.models = np.log(self.rng.dirichlet(np.ones(6), 30))

    def add(self, change: float = 0.0, **row: object) -> Row:
        place = self.folder / str(len(self.rows))
        place.mkdir()
        said = self.models[:, None] + change * self.rng.standard_normal((30, 1, 6))
        said = said + 0.03 * self.rng.standard_normal((30, 2, 6))
        tokens, nothing = list("abcdef"), [None] * 6
        lists = [
            (f"context {context}", asked + 1, tokens, nothing, nothing, said[context, asked].tolist())
            for context in range(30)
            for asked in range(2)
        ]
        pl.DataFrame(lists, schema=FIRST_LISTS, orient="row").write_parquet(place / "first_lists.parquet")
        self.rows.append({"run_id": place.name, "output_dir": str(place)} | COMMON | MEASURED | row)
        return self.rows[-1]

    def verdict(self, change: float = 0.0) -> Verdict:
        """Of one more day, which is not kept."""
        row, before = self.add(change), pl.DataFrame(self.rows[:-1], schema=HISTORY)
        self.rows.pop()
        values = {"input_dir": "in", "output_dir": row["output_dir"], "history": "h.parquet", "model2": "q"}
        config = RunConfig.model_validate(values | {"alert": ALERT, "positions": {"first": True, "repeats": 2}})
        assert config.alert is not None
        found = decide_first(config, config.alert, row, before)
        Path(row["output_dir"], "first_lists.parquet").unlink()
        Path(row["output_dir"]).rmdir()
        return found


@pytest.fixture
def days(tmp_path: Path) -> Days:
    made = Days(tmp_path)
    for _ in range(7):
        made.add()
    return made


def test_a_changed_model_is_drift_and_the_same_is_none(days: Days):
    still, changed = days.verdict(), days.verdict(0.3)
    assert (still.decision, changed.decision) == ("no drift", "drift")
    assert "Q's lists at 30 first positions are " in changed.message
    assert "from the mean of 7 earlier runs" in changed.message
    found = changed.to_json()
    assert found["first_positions"]["p_value"] == 0.0001
    assert found["difference"] == pytest.approx(0.3**2 / 2, rel=0.4)


def test_fewer_than_five_runs_of_this_kind_are_undecided(days: Days):
    for row, other in zip(days.rows, ({"first_repeats": None}, {"first_repeats": 4}, {"model2": "r"}), strict=False):
        row.update(other)
    found = days.verdict()
    assert found.message.startswith("undecided: 4 earlier runs of these first positions since the last drift")
    assert found.warnings == []


def test_after_a_drift_the_runs_before_it_do_not_count(days: Days):
    days.add(0.3, drift="drift")
    assert days.verdict(0.3).message.startswith("undecided: 1 earlier runs")


def test_a_folder_that_is_gone_is_left_out_and_named(days: Days):
    Path(days.rows[3]["output_dir"], "first_lists.parquet").unlink()
    found = days.verdict()
    assert found.decision == "no drift"
    assert "drift: 1 earlier runs cannot be read and take no part, such as " in found.warnings[0]
    assert days.rows[3]["output_dir"] in found.warnings[0]
