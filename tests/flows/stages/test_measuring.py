"""What the two passes know of Q's counts: positions that are not measured have no part in the prior."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flows.config.comparison import Comparison
from flows.config.models import RunConfig
from flows.config.reading import validate
from flows.config.templates import RunValues
from flows.folder.refusals import Refusal
from flows.stages import passes
from flows.stages.inputs import find_inputs, read_input
from flows.stages.measuring import Measured
from flows.stages.passes import measure_files
from kl.records import Candidate, Score, ScoreFailure
from tests.flows.parts import joined
from tests.vertex_world.language_model import SyntheticModel
from tests.vertex_world.world import VertexWorld

P, N = "gemini-2.5-flash-lite", 30
WRONG = range(12, N)  # of the second file: another context, and lists that are far off


@pytest.fixture
def measured(tmp_path: Path) -> Callable[..., Measured]:
    with VertexWorld(language_model=SyntheticModel()) as world:
        world.write_responses(tmp_path / "in", P, [f"Prompt {i}" for i in range(4)], n=1, max_tokens=N, seed=4)

    def measure(name: str, counts: Callable[[int, int], int | None], *, failed: bool = False) -> Measured:
        """With the counts of file and position; lists of the wrong positions failed, if asked."""
        values = {"input_dir": tmp_path / "in", "output_dir": tmp_path / name, "model2": "gemini-2.5-flash"}
        settings = {"backend": "vertex_online", "project_id": "p", "force": True, "noise_floor": {"fraction": 0.5}}
        config = validate(RunConfig, values | settings)
        comparison = Comparison.of(config, RunValues.of_a_dry_run()).without({P: Refusal("refused")})
        stores, files, noise = comparison.folder.stores(), find_inputs(config), np.random.default_rng(0)
        for number, file in enumerate(files):
            for response in read_input(file).responses:
                for side in comparison.sides():
                    request = comparison.request(response, side)
                    assert request is not None
                    answers: list[Score | ScoreFailure] = []
                    for t, key in zip(request.positions, request.keys, strict=True):
                        wrong = number == 1 and t in WRONG
                        shift = noise.normal(0.0, 2.0 if wrong else 0.1, 20)
                        top = tuple(
                            item._replace(logprob=(item.logprob or 0.0) - 2.0 + float(x), token_id=None)
                            for item, x in zip(response.positions[t].top, shift, strict=False)
                        )
                        top = tuple(sorted(top, key=lambda item: -(item.logprob or 0.0)))
                        lost = wrong and failed
                        answers.append(
                            ScoreFailure(key, "retokenised", "other.", final=True)
                            if lost else Score(key, top, Candidate(top[0].token, top[0].logprob),
                                               input_tokens=counts(number, t))
                        )  # fmt: skip
                    stores.scores.append(response.prompt.prompt_id, request.model, answers)
        return measure_files(files, comparison, stores, tmp_path / name / "parts")

    return measure


def jumps(number: int, t: int) -> int:
    """Tokens but for one text that is cut otherwise."""
    return 9 + t - (number == 1 and t in WRONG)


def mostly_others(number: int, t: int) -> int:
    """Tokens in the second file, but for that text; two for each of P's elsewhere."""
    return jumps(number, t) if number == 1 else 9 + 2 * t


def test_the_prior_is_of_the_positions_that_are_measured(measured) -> None:
    found, expected = measured("counted", jumps), measured("failed", lambda number, t: None, failed=True)
    whole = measured("whole", lambda number, t: None)
    assert found.priors.counts.usable
    for prior in ("q", "twice"):
        of_all, of_found = getattr(whole.priors, prior).variance, getattr(found.priors, prior).variance
        assert of_found == pytest.approx(getattr(expected.priors, prior).variance, rel=1e-12)
        assert of_all > 1.2 * of_found
    assert found.diagnostic == whole.diagnostic != expected.diagnostic


def test_counts_that_the_data_set_refutes_take_nothing_from_the_prior_either(measured) -> None:
    found, whole = measured("counted", mostly_others), measured("whole", lambda number, t: None)
    assert not found.priors.counts.usable
    assert found.n_odd_counts == 0
    assert found.priors.q.variance == pytest.approx(whole.priors.q.variance, rel=1e-12)
    assert found.priors.twice.variance == pytest.approx(whole.priors.twice.variance, rel=1e-12)


@pytest.mark.parametrize("counts", [jumps, mostly_others])
def test_the_size_of_the_parts_changes_no_bit_of_it(counts, measured, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured("whole", counts)
    monkeypatch.setattr(passes, "PART_FILES", 1)
    divided = measured("divided", counts)
    assert (divided.priors, divided.diagnostic) == (whole.priors, whole.diagnostic)
    assert len(divided.parts) > len(whole.parts)
    assert joined(divided.parts) == joined(whole.parts)
