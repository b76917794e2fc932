"""What a verdict says of the noise floor; what it decides is tested with `kl.statistics.drift`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from flows.config.alert import AlertConfig
from flows.watch.reference import Reference
from flows.watch.verdict import decide, decide_q, undecided
from kl.finished.between import Between, QLists, kl_between
from kl.statistics.intervals import Estimate
from kl.tables.responses import summarise_responses
from kl.tables.totals import RESPONSE_KEYS
from tests.kl.conftest import Answer, build_tokens
from tests.kl.finished.test_between import lists

ALERT = AlertConfig(kl_per_token=0.0)


def responses(kl: float) -> pl.DataFrame:
    answers = [Answer(f"f{index}", f"p{index}", 0, [kl, kl + 0.001 * index]) for index in range(6)]
    return summarise_responses(build_tokens(answers).lazy())


@pytest.mark.parametrize(
    ("floor", "below", "text"),
    [
        pytest.param(None, None, "the alert is for a rise above 0", id="none"),
        pytest.param(0.02, True, "; below the noise floor of 0.02, the service's own unrest", id="above the rise"),
        pytest.param(0.004, False, "; above the noise floor of 0.004", id="below the rise"),
    ],
)
def test_a_rise_stands_beside_the_noise_floor(floor: float | None, below: bool | None, text: str) -> None:
    reference = Reference("baseline", "earlier", responses(0.1))
    found = replace(decide(ALERT, responses(0.11), reference), noise_floor=floor)
    assert found.decision == "drift", "the floor says how to take it, and decides nothing"
    assert found.message.endswith(text)
    assert (found.to_json()["noise_floor"], found.to_json()["below_noise_floor"]) == (floor, below)


def test_a_fall_is_measured_by_its_size() -> None:
    found = decide(ALERT, responses(0.1), Reference("baseline", "earlier", responses(0.11)))
    assert replace(found, noise_floor=0.02).below_noise_floor
    assert not replace(found, noise_floor=0.004).below_noise_floor


def test_without_a_run_to_compare_with_nothing_is_below() -> None:
    found = replace(undecided(ALERT, "no earlier run"), noise_floor=0.02)
    assert (found.below_noise_floor, found.message) == (None, "undecided: no earlier run")


def between(kl: float, *, n_only_second: int = 0) -> Between:
    rows = responses(kl)
    known = Estimate(kl, 0.001, kl - 0.002, kl + 0.002, 12, 0, 6, None, None)
    return Between(
        known,
        known,
        known,
        known,
        known,
        12,
        12,
        0,
        n_only_second,
        "f#0 position 3",
        {},
        rows,
        rows.select(RESPONSE_KEYS).clear(),
    )


OF_Q = AlertConfig(kl_per_token=0.0, of="q", compared_with="previous")


@pytest.mark.parametrize(("floor", "decision"), [(0.02, "drift"), (0.05, "no drift"), (0.06, "no drift")])
def test_q_then_against_now_counts_above_what_q_is_from_itself(floor: float, decision: str) -> None:
    found = decide_q(OF_Q, between(0.05), responses(floor), Reference("previous", "earlier", responses(0.1)))
    assert (found.decision, found.warnings) == (decision, [])
    assert f"Q's noise floor of {floor + 0.00125:g}" in found.message
    assert "certainly 0.05 or more from the previous run in earlier" in found.message
    written = found.to_json()
    assert (written["of"], written["then_against_now"]["per_token"]["value"]) == ("q", 0.05)
    assert [label for label, _ in found.rows] == ["KL(Q then‖Q now) per token", "Drift"]


def test_without_a_floor_and_with_other_contexts_the_verdict_says_so() -> None:
    found = decide_q(OF_Q, between(0.05, n_only_second=7), None, Reference("baseline", "earlier", responses(0.1)))
    assert found.decision == "drift"
    assert "no noise floor of Q was measured" in found.message
    unrest, alone = found.warnings
    assert "noise_floor" in unrest
    assert "12 contexts were asked in both runs; 7 positions of this run and 0 of the other" in alone
    assert "f#0 position 3" in alone


def unquiet(rng: np.random.Generator, spread: tuple[float, float], word: str = "", n_same: int = 0) -> QLists:
    """An unchanged Q at 30 prompts of two positions, as unquiet as ``spread`` says; ``word`` makes responses fresh."""
    return lists(
        *(
            (
                f"f{i:02}",
                f"p{i}",
                f"{'' if i < n_same else word}t{t}",
                float(1 / (1 + np.exp(-rng.normal(0, spread[t])))),
            )
            for i in range(30)
            for t in range(2)
        )
    )


@pytest.mark.parametrize("spread", [(0.5, 0.02), (0.02, 0.5)], ids=["first position unquiet", "the others unquiet"])
def test_q_is_compared_with_its_floor_over_the_same_responses(spread: tuple[float, float]) -> None:
    """Of fresh responses only the first position is the same, and the floor of all positions is another floor."""
    rng = np.random.default_rng(3)
    then, now, again = unquiet(rng, spread, "then"), unquiet(rng, spread, "now"), unquiet(rng, spread, "now")
    floor = kl_between(now, again).responses
    found = decide_q(OF_Q, kl_between(then, now), floor, Reference("previous", "earlier", floor))
    assert (found.decision, found.change) == ("undecided", None)
    assert "0 of 30 responses are the same as a whole in both runs" in found.message
    assert found.warnings == [f"drift is {found.message}"]
    assert found.between is not None, "what was found stays in the files"
    # Where some are fresh, the others decide, and none of the fresh ones' noise is in it.
    then, now = unquiet(rng, spread, "then", n_same=20), unquiet(rng, spread, "now", n_same=20)
    partly = decide_q(OF_Q, kl_between(then, now), floor, Reference("previous", "earlier", floor))
    assert partly.change is not None
    assert (partly.change.n_shared, partly.change.n_only_run, partly.change.n_only_reference) == (20, 0, 0)
    assert "20 of 30 responses are the same as a whole" in partly.warnings[0]


@pytest.mark.parametrize("level", [0.99, 0.95])
def test_the_level_is_that_of_the_lower_end_alone(level: float) -> None:
    alert, other = OF_Q.model_copy(update={"level": level}), Reference("previous", "earlier", responses(0.1))
    for found in (decide(alert, responses(0.11), other), decide_q(alert, between(0.05), None, other)):
        assert found.change is not None
        assert found.change.level == pytest.approx(2 * level - 1)
        assert found.to_json()["level"] == level
        assert found.to_json()["interval_level"] == pytest.approx(2 * level - 1)
