"""A collect that finds nothing new since an earlier one measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from flows.config.comparison import Comparison
from flows.config.models import RunConfig
from flows.config.reading import validate
from flows.config.templates import RunValues
from flows.stages.inputs import InputFile
from flows.stages.pending import unchanged_state
from flows.stages.plan import Group, Plan, Selection
from flows.stages.scoring import GroupOutcome


def test_a_collect_after_which_an_answer_is_still_missing_is_measured_once(tmp_path: Path) -> None:
    backend = {"backend": "vertex_batch", "project_id": "p", "model2": "q", "stage": "collect"}
    folders = {"input_dir": f"{tmp_path}/in", "output_dir": f"{tmp_path}/out"}
    comparison = Comparison.of(validate(RunConfig, backend | folders), RunValues.of_this_run())
    missing = Selection(InputFile(tmp_path / "in" / "a.json", "a.json"), 0, "q", np.array([3], np.int32))
    plan = Plan([], [Group("a", (missing,))], n_contexts=10, n_stored=9)
    still_missing = [GroupOutcome(0, {"no-answer": 1}, (), {})]

    def ended(contexts_asked_before: int, scored: int, refused: int, outcomes: list[GroupOutcome]) -> str | None:
        run = {
            "recorded": True, "contexts": 10, "contexts_on_disk": 10 - contexts_asked_before, "finished_at": "today",
            "contexts_scored_now": scored, "contexts_refused_now": refused,
            "config": json.loads(comparison.config.model_dump_json()),
        }  # fmt: skip
        comparison.folder.run.parent.mkdir(exist_ok=True)
        comparison.folder.run.write_text(json.dumps(run))
        state = unchanged_state(comparison, plan, outcomes)
        return None if state is None else state.message

    same = "unchanged: 9 contexts were measured by the run that ended today; 1 have no answer, as there."
    assert ended(3, 2, 0, still_missing) == same
    assert ended(3, 1, 1, still_missing) == same  # a final failure is on disk too
    assert ended(3, 1, 0, still_missing) is None  # measured with 8 of the 9
    assert ended(3, 2, 0, [GroupOutcome(1, {}, (), {})]) is None
    assert ended(3, 2, 0, [GroupOutcome(0, {"refused": 1}, (), {}, n_final=1)]) is None
