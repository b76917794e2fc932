"""A collect takes the oldest submission that was not measured, whatever the day."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from flows.config.comparison import Comparison
from flows.config.models import RunConfig
from flows.config.reading import validate
from flows.config.submitted import forget_submission, note_submission, put_last
from flows.config.templates import RunValues


def day(number: int) -> RunValues:
    return RunValues(datetime(2026, 6, number, 23, 50, tzinfo=UTC))


def test_a_collect_after_midnight_takes_the_oldest_submission_and_then_the_next(tmp_path: Path) -> None:
    values = {"input_dir": f"{tmp_path}/in/{{date}}", "output_dir": f"{tmp_path}/out/{{date}}", "model2": "q"}
    backend = {"backend": "vertex_batch", "project_id": "p"}
    submit, collect = (validate(RunConfig, values | backend | {"stage": stage}) for stage in ("submit", "collect"))

    def folder() -> str:
        return Comparison.of(collect, day(30)).config.output_dir.name

    assert folder() == "2026-06-30"
    for number in (29, 28, 28):
        note_submission(submit, Comparison.of(submit, day(number)).config.output_dir, day(number))
    assert folder() == "2026-06-28"
    assert Comparison.of(collect, day(30)).config.input_dir.name == "2026-06-28"
    put_last(collect, tmp_path / "out" / "2026-06-28")
    assert folder() == "2026-06-29"
    forget_submission(collect, tmp_path / "out" / "2026-06-29")
    assert folder() == "2026-06-28"
    forget_submission(collect, tmp_path / "out" / "2026-06-28")
    assert folder() == "2026-06-30"
