"""A submission and the collects that follow: the files are those of one run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from backends.errors import ConfigError
from backends.registry import deferred_backends
from flows.commands.run import without_settings
from flows.config.backend import check_capabilities, resolve_backend
from flows.config.models import RunConfig
from flows.config.reading import validate
from flows.folder.layout import OutputFolder
from flows.folder.lock import run_lock
from flows.watch.report import PendingReport
from tests.process_worker import kill_group, wait_for
from tests.programs import Done, Run, Start
from tests.vertex_world.fixtures import make_vertex_world
from tests.vertex_world.world import VertexWorld

__all__ = ["make_vertex_world"]

P, Q = "gemini-2.5-flash-lite", "gemini-2.5-flash"
PROMPTS = [f"Prompt {number}" for number in range(4)]


def flags(folder: Path, out: str) -> list[str]:
    fast = ["--set", "backend.poll_interval_s=0.2", "--set", "backend.output_deadline_s=3"]
    return ["--input-dir", str(folder / "in"), "--output-dir", str(folder / out), "--model2", Q, *fast]


def assert_same_files(one: Path, other: Path) -> None:
    names = {path.name for path in one.iterdir() if path.is_file() and not path.name.startswith(".")}
    assert names == {path.name for path in other.iterdir() if path.is_file() and not path.name.startswith(".")}
    # Those that tell when, and in how many steps, it was done.
    for name in sorted(names - {"run.json", "history.parquet", "report.html"}):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert {"tokens.parquet", "responses.parquet", "summary.json", "prompt_000_kl.json"} <= names


@pytest.mark.slow
def test_a_killed_submission_another_and_collects_give_the_files_of_one_run(
    make_vertex_world: Callable[..., VertexWorld], run_program: Run, start_program: Start, tmp_path: Path
) -> None:
    whole, parted = make_vertex_world(), make_vertex_world(job_seconds=3600.0)
    whole.write_responses(tmp_path / "in", P, PROMPTS, n=1, max_tokens=12, seed=4)

    def run(world: VertexWorld, out: str, *arguments: str) -> Done:
        return run_program("flows.run", *flags(tmp_path, out), *arguments, env=world.environment())

    assert run(whole, "whole").code == 0

    parted.faults.job_outcomes = [("EXPIRED", 0.5)]
    one_by_one = ["--stage", "submit", "--responses-per-job", "1", "--set", "backend.max_jobs_in_flight=1"]
    killed = start_program("flows.run", *flags(tmp_path, "parted"), *one_by_one, env=parted.environment())
    wait_for(lambda: parted.jobs or killed.poll() is not None)
    kill_group(killed)

    submitted = run(parted, "parted", "--stage", "submit")
    assert submitted.code == 0, submitted.err
    assert f"contexts are in {len(PROMPTS)} batch jobs" in submitted.out
    assert f"Collect with: python -m flows.run --input-dir {tmp_path / 'in'}" in submitted.out
    assert "--stage collect" in submitted.out
    assert len(parted.jobs) == len(PROMPTS)
    assert not (tmp_path / "parted" / "tokens.parquet").exists()

    early = run(parted, "parted", "--stage", "collect")
    assert early.code == 5, early.err
    assert "contexts are in batch jobs that have not answered them yet" in early.out
    parted.hurry()
    parted.wait_for_jobs()
    later = run(parted, "parted", "--stage", "collect")
    assert later.code == 5, later.err  # what the expired job left out is in a follow-up job
    assert len(parted.jobs) == len(PROMPTS) + 1
    assert not (tmp_path / "parted" / "tokens.parquet").exists()
    assert not (tmp_path / "parted" / ".parts").exists()
    parted.wait_for_jobs()
    last = run(parted, "parted", "--stage", "collect")
    assert last.code == 0, last.err
    assert last.out.splitlines()[0].startswith("KL(P‖Q) per token")
    written, history = (tmp_path / "parted" / "run.json").read_bytes(), tmp_path / "parted" / "history.parquet"
    again = run(parted, "parted", "--stage", "collect")
    assert (again.code, again.out[:10]) == (0, "unchanged:"), again.err
    assert (tmp_path / "parted" / "run.json").read_bytes() == written
    assert pl.read_parquet(history).height == 1

    assert_same_files(tmp_path / "whole", tmp_path / "parted")
    assert set(parted.rows_bought.values()) <= {1, 2}  # the tiny request that each submission makes is the one repeated
    n_rows = pl.read_parquet(tmp_path / "parted" / "tokens.parquet").height
    probes = sum("Continue the row" in str(call.request) for call in parted.online_calls)
    assert sum(parted.rows_bought.values()) - probes <= n_rows
    assert len(parted.jobs) == len(PROMPTS) + 1


def test_a_collect_that_finds_the_folder_in_use_or_nothing_submitted_changes_nothing(
    make_vertex_world: Callable[..., VertexWorld], run_program: Run, tmp_path: Path
) -> None:
    world = make_vertex_world()
    world.write_responses(tmp_path / "in", P, PROMPTS[:1], n=1, max_tokens=5, seed=4)
    collect = [*flags(tmp_path, "out"), "--stage", "collect"]
    with run_lock(OutputFolder(tmp_path / "out")):
        skipped = run_program("flows.run", *collect, env=world.environment())
    assert skipped.code == 5, skipped.err
    assert "skipped: another run is using" in skipped.out
    limited = [*flags(tmp_path, "of-{date}"), "--stage", "submit", "--max-cost-usd", "0.0000001"]
    assert run_program("flows.run", *limited, env=world.environment()).code == 2
    assert not list(tmp_path.rglob(".submitted/*")), "what made no job is not waited for"
    nothing = run_program("flows.run", *collect, env=world.environment())
    assert nothing.code == 5, nothing.err
    assert "5 contexts are in no batch job: --stage submit, or a run without --stage, buys them." in nothing.out
    assert world.jobs == []
    assert world.online_calls == []
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {".lock", ".history.parquet.lock", "scores"}


@pytest.mark.parametrize("stage", ["submit", "collect"])
@pytest.mark.parametrize("backend", ["local", "vertex_online"])
def test_backends_without_jobs_refuse_with_one_line(backend: str, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "some-project")
    values: dict[str, Any] = {"input_dir": "in", "output_dir": "out", "model2": "m", "backend": backend, "stage": stage}
    config = validate(RunConfig, values)
    with pytest.raises(ConfigError) as raised:
        check_capabilities(config, resolve_backend(config)[0])
    assert str(raised.value) == (
        f"stage is '{stage}', but the backend {backend} has no jobs that outlive the process. Leave the stage out, or "
        "set a backend that has: vertex_batch."
    )
    assert deferred_backends() == ["vertex_batch"]


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stage: .*'run', 'submit' or 'collect', got 'later'"):
        validate(RunConfig, {"input_dir": "in", "output_dir": "out", "model2": "m", "stage": "later"})


def test_a_submission_that_failed_in_part_says_so_and_is_not_complete() -> None:
    report = PendingReport("Submitted", n_on_disk=3, n_waiting=40, n_jobs=2, failures={"refused": 7})
    assert not report.complete
    assert report.lines == [
        "submitted: 40 contexts are in 2 batch jobs; 3 are on disk. Nothing was measured.",
        "7 contexts could not be submitted (refused): submit again",
    ]


def test_the_command_to_collect_has_each_setting_once_also_where_it_was_set_by_set() -> None:
    given = ["--a", "1", "--stage", "submit", "--stage=submit", "--set", "stage=submit", "--set=output_dir=x", "--b"]
    assert without_settings(given, {"stage"}) == ["--a", "1", "--set=output_dir=x", "--b"]
    assert without_settings(given, {"stage", "output_dir"}) == ["--a", "1", "--b"]
    others = ["--set", "backend.max_attempts=2", "--output-dir=x", "--set", "positions={per_response: 8}"]
    assert without_settings(others, {"stage"}) == others
