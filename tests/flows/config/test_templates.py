"""Folders with fields: what they become, and what is refused before anything starts."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from backends.errors import ConfigError
from flows.config.alert import AlertConfig, Baseline
from flows.config.folders import folder_record, pinning_flags, resolve_folders
from flows.config.models import RunConfig
from flows.config.reading import validate
from flows.config.templates import RunValues, differs_between_runs, double_brace_warning, fill

NEW_YEAR = RunValues(
    datetime(2027, 1, 1, 3, 5, tzinfo=UTC),
    flow_run_id="6b1c7c3e-0000-4000-8000-000000000001",
    flow_run_name="calm-otter",
    deployment_name="nightly/eu",
)


def configured(**settings: object) -> RunConfig:
    return validate(RunConfig, {"input_dir": "in", "output_dir": "out", "model2": "q"} | settings)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("results/{date}", "results/2027-01-01"),
        ("results/{date:%Y/%m}", "results/2027/01"),
        ("{yesterday}", "2026-12-31"),
        ("{yesterday:%d.%m.%y}", "31.12.26"),
        ("{year}-{month}-{day}T{hour}", "2027-01-01T03"),
        ("{week}", "2026-W53"),  # the ISO year of that week, so that 2027 has its own
        ("{flow_run_name}/{flow_run_id}", "calm-otter/6b1c7c3e-0000-4000-8000-000000000001"),
        ("{flow_run.name}/{flow_run.id}", "calm-otter/6b1c7c3e-0000-4000-8000-000000000001"),
        ("{flow_run.scheduled_start_time:%Y-%m-%d}", "2027-01-01"),
        ("{flow_run.scheduled_start_time}", "2027-01-01T03-05-00Z"),
        ("{flow.name}/{deployment.name}", "kl-divergence/nightly-eu"),
        ("gs://bucket/{deployment_name}/{date}", "gs://bucket/nightly-eu/2027-01-01"),
        ("{{date}}/{ date }", "{date}/2027-01-01"),
        ("100%/plain", "100%/plain"),
    ],
)
def test_a_field_is_filled_in(template: str, expected: str):
    assert fill(template, NEW_YEAR) == expected
    assert str(configured(output_dir=template).output_dir) == template


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a/{dat}", "unknown field {dat}. Did you mean 'date'? Known: {date}, "),
        ("a/{flow_run}", "unknown field {flow_run}. Did you mean 'flow_run"),
        ("a/{}", "unknown field {}. Known: "),
        ("a/{0}", "unknown field {0}. Known: "),
        ("a/{date", "expected '}'"),
        ("a/date}", "Single '}' encountered"),
        ("a/{date!r}", "write {date}"),
        ("a/{date:YYYY-MM-DD}", "holds no part of a date; write for example {date:%Y/%m/%d}"),
        ("a/{date:%Q}", "%Q is not known"),
        ("a/{date:%x}", "%x is not known"),
        ("a/{date:../../%Y}", "is no part of a path"),
        ("a/{date:%Y/}", "is no part of a path"),
        ("a/{year:%m}", "{year} takes no format"),
        ("a/{flow_run_name:>9}", "{flow_run_name} takes no format"),
    ],
)
@pytest.mark.parametrize("setting", ["output_dir", "input_dir"])
def test_what_cannot_be_filled_in_is_refused_at_once(setting: str, template: str, message: str):
    with pytest.raises(ConfigError) as refused:
        configured(**{setting: template})
    assert str(refused.value).startswith(f"{setting}: ")
    assert message in str(refused.value)


@pytest.mark.parametrize("name", ["../../etc", "/etc/passwd", "..", "a\\..\\b", "x\ny", ".hidden", "a//b", "{date}"])
def test_a_name_never_leaves_its_folder(name: str):
    path = Path(fill("results/{flow_run_name}/x", RunValues(NEW_YEAR.scheduled_for, "id", name)))
    assert len(path.parts) == 3
    assert path.parts[0] == "results"
    assert not {"..", "."} & set(path.parts)
    assert path.resolve().is_relative_to(Path("results").resolve())
    assert "{" not in str(path)


def test_a_deployment_that_is_missing_is_named_and_a_run_that_is_not_there_yet_stays_open():
    values = RunValues(NEW_YEAR.scheduled_for)
    with pytest.raises(ConfigError, match="needs the name of a deployment, and this run belongs to none"):
        fill("results/{deployment_name}", values)
    assert fill("results/{flow_run_name}/{date}", values) == "results/{flow_run_name}/2027-01-01"


@pytest.mark.parametrize(
    ("output_dir", "history"),
    [
        ("results/nightly/{date}", "results/nightly/history.parquet"),
        ("results/nightly/run-{date}/x", "results/nightly/history.parquet"),
        ("{date}", "history.parquet"),
        ("results/plain", "results/plain/history.parquet"),
        ("gs://bucket/{date}", "gs://bucket/history.parquet"),
        ("gs://bucket/a/b", "gs://bucket/a/b/history.parquet"),
    ],
)
def test_the_history_is_beside_the_folders_of_the_runs(output_dir: str, history: str):
    assert str(resolve_folders(configured(output_dir=output_dir), NEW_YEAR).history) == history


def test_a_history_is_for_many_runs():
    assert str(resolve_folders(configured(history="h/{deployment_name}.parquet"), NEW_YEAR).history) == (
        "h/nightly-eu.parquet"
    )
    with pytest.raises(ConfigError, match=r"history: .* a history is of many runs, and {date} differs between them"):
        configured(history="h/{date}.parquet")


def test_some_fields_are_the_same_for_all_runs_of_a_deployment():
    assert not differs_between_runs("results/{deployment_name}/{flow.name}")
    assert differs_between_runs("results/{deployment_name}/{date}")


def test_all_folders_are_resolved_and_both_forms_are_recorded():
    written = configured(
        input_dir="responses/{date}",
        output_dir="results/{date:%Y/%m/%d}",
        alert={"kl_per_token": 0, "compared_with": "baseline: results/{yesterday:%Y/%m/%d}"},
    )
    filled = resolve_folders(written, NEW_YEAR)
    assert folder_record(written, filled) == {
        "input_dir": {"template": "responses/{date}", "resolved": "responses/2027-01-01"},
        "output_dir": {"template": "results/{date:%Y/%m/%d}", "resolved": "results/2027/01/01"},
        "history": {"template": None, "resolved": "results/history.parquet"},
        "alert.compared_with.baseline": {
            "template": "results/{yesterday:%Y/%m/%d}",
            "resolved": "results/2026/12/31",
        },
    }
    assert RunConfig.model_validate_json(written.model_dump_json()) == written


def test_input_and_output_must_differ_once_they_are_filled_in():
    with pytest.raises(ConfigError, match="output_dir is the input_dir"):
        resolve_folders(configured(input_dir="x/{date}", output_dir="x/2027-01-01"), NEW_YEAR)


def test_an_interrupted_run_is_gone_on_with_in_its_own_folders():
    written = configured(output_dir="r/{flow_run_name}/{{x}}")
    flags = pinning_flags(written, resolve_folders(written, NEW_YEAR))
    pinned = dict(zip(flags[::2], flags[1::2], strict=True))
    assert fill(pinned["--output-dir"], NEW_YEAR) == "r/calm-otter/{x}"
    assert pinned["--history"] == "r/history.parquet"
    assert pinning_flags(configured(), resolve_folders(configured(), NEW_YEAR)) == []


def test_double_braces_around_a_field_are_doubtful():
    assert "{{ date:%Y }} is a name with braces in it" in str(double_brace_warning("a/{{ date:%Y }}"))
    assert double_brace_warning("a/{date}/{{x}}") is None


def alert(**settings: object) -> AlertConfig:
    config = configured(alert=settings).alert
    assert config is not None
    return config


def test_an_alert_is_written_in_several_ways():
    assert alert(kl_per_token=0).compared_with is None
    assert alert(kl_per_token=0, compared_with="previous").compared_with == "previous"
    expected = Baseline(baseline=Path("a/b"))
    for form in ("baseline: a/b", {"baseline": "a/b"}, "baseline:a/b"):
        assert alert(kl_per_token=0.5, compared_with=form).compared_with == expected
    assert str(alert(kl_per_token=0.5, compared_with="baseline: gs://b/x").baseline) == "gs://b/x"
    assert alert(kl_per_token="0.5").level == 0.99


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"alert.kl_per_token is not set \(--set alert.kl_per_token=…\)"),
        ({"kl_per_token": -0.1}, "alert.kl_per_token: Input should be greater than or equal to 0, got -0.1"),
        ({"kl_per_token": True}, "alert.kl_per_token: a yes or no"),
        ({"kl_per_token": 0, "compared_with": "yesterday"}, "alert.compared_with: write previous, or {baseline: "),
        ({"kl_per_token": 0, "compared_with": {"base": "x"}}, "alert.compared_with: write previous, or {baseline: "),
        ({"kl_per_token": 0, "compared_with": "baseline:"}, "folder of the baseline is empty"),
        ({"kl_per_token": 0, "compared_with": {"baseline": "{dat}"}}, "Did you mean 'date'"),
        ({"kl_per_token": 0, "level": 99}, "alert.level: Input should be less than 1"),
        ({"kl_per_token": 0, "test": "point"}, "alert.test: Input should be 'interval'"),
        ({"kl_per_tokn": 0}, "Did you mean 'kl_per_token'"),
    ],
)
def test_an_alert_that_is_not_one_is_refused(settings: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        alert(**settings)


def test_failing_on_drift_needs_to_know_what_drift_is():
    with pytest.raises(ConfigError, match=r"fail_on_drift needs alert\.kl_per_token"):
        configured(fail_on_drift=True)
