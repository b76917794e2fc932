"""What Prefect's user interface is given: short, safe to show, and never worth a run."""

from __future__ import annotations

import logging

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.config.models import RunConfig
from flows.config.reading import validate
from flows.runtime.progress import ProgressReporter
from flows.watch.artifacts import (
    _table,
    artifact_key,
    progress_artifacts,
    show_report,
    summary_table,
)
from flows.watch.naming import run_name
from flows.watch.page import console_link, markdown_of, page_link
from flows.watch.report import EXIT_COMPLETE, EXIT_DRIFT, EXIT_INCOMPLETE, Excerpt, RunReport
from kl.output.glance import Figure
from tests.programs import free_port


def config_of(**values: object) -> RunConfig:
    return validate(RunConfig, {"backend": "local", "input_dir": "in", "output_dir": "out", "model2": "q"} | values)


def report_of(**values: object) -> RunReport:
    report = {
        "n_positions": 10, "n_measured": 8, "missing": {"blocked": 2}, "skipped": {}, "repaired": {},
        "headline": [("KL(P‖Q) per token", "0.5 nats")], "warnings": [], "paths": ["out/summary.json"],
        "line": "0.5 nats/token (0.4 to 0.6), certainly > 0.3, 8 of 10",
        "figures": [Figure("KL(P‖Q), nats per token", "0.5", "0.4", "0.6", "0.3")],
    }  # fmt: skip
    return RunReport(**{**report, **values})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ("smollm2-135m@int4", "smollm2-135m-int4-summary"),
        ("Publishers/Google/Gemini_2.5", "publishers-google-gemini-2-5-summary"),
        ("模型", "summary"),
        ("x" * 500, "x" * 192 + "-summary"),
    ],
)
def test_a_key_has_the_letters_that_prefect_allows(model: str, key: str) -> None:
    assert artifact_key(config_of(model2=model), "summary") == key


@pytest.mark.parametrize(
    ("address", "link"),
    [
        ("gs://b/results/2026-11-23", "https://console.cloud.google.com/storage/browser/b/results/2026-11-23"),
        ("gs://b/a b#c?d", "https://console.cloud.google.com/storage/browser/b/a%20b%23c%3Fd"),
        ("results/nightly", None),
        ("s3://b/c", None),
    ],
)
def test_a_bucket_has_a_link_for_the_browser(address: str, link: str | None) -> None:
    assert console_link(address) == link


@pytest.mark.parametrize(
    ("address", "link"),
    [
        ("gs://b/a b/report.html", "https://storage.cloud.google.com/b/a%20b/report.html"),
        ("gs://b/a/summary.json", None),
        ("results/report.html", None),
    ],
)
def test_a_page_in_a_bucket_has_a_link_for_the_browser(address: str, link: str | None) -> None:
    assert page_link(address) == link


def test_cells_of_a_table_are_text_as_prefect_shows_them() -> None:
    (row,) = _table([("a|b", "[x](http://evil)\n<b>")])
    assert row == {"figure": r"a\|b", "value": r"\[x\](http://evil) \<b\>"}


def test_the_page_says_what_was_found_what_is_missing_and_where() -> None:
    place = {"source_file": "a.json", "response_idx": 0, "position": 3, "logprob_p": -0.1, "logprob_q": None}
    position = place | {"kl_estimate": 2.5, "before": "the sky is", "token": " blue|"}
    token = {"token": " blue|", "n_measured": 4, "kl_mean": 1.25, "kl_share": 0.5}
    excerpt = Excerpt([token], [position], "<svg/>")
    page = markdown_of(report_of(warnings=["no interval: 2 prompts"], excerpt=excerpt), config_of())
    assert r"0.5 nats/token (0.4 to 0.6), certainly \> 0.3, 8 of 10" in page
    assert r"| 2.5 | the sky is | blue\| | -0.10 | not listed | a.json\#0, 3 |" in page
    assert r"| blue\| | 4 | 1.25 | 50.0% |" in page
    assert "](data:image/svg+xml;base64,PHN2Zy8+)" in page
    assert "docs/reading-the-numbers.md" in page
    assert "## Warnings\n- no interval: 2 prompts" in page
    assert "## Positions not measured\n- 2: blocked" in page
    assert "## Results\n- out/summary.json" in page
    assert "skipped" not in page


def test_the_summary_has_the_figures_in_columns_and_what_is_said_in_words_below() -> None:
    rows = summary_table(report_of(alarms=["no price"], verdict=[("Drift", "none")]), {})
    heads = ["figure", "estimate", "95 % low", "95 % high", "certainly at least"]
    assert [list(row) for row in rows] == [heads] * 4
    assert [list(row.values())[:2] for row in rows[1:]] == [
        ["read first", "no price"],
        ["positions measured", "8 of 10"],
        ["Drift", "none"],
    ]
    assert list(rows[0].values()) == ["KL(P‖Q), nats per token", "0.5", "0.4", "0.6", "0.3"]


def test_a_run_is_named_by_models_folder_and_figure() -> None:
    assert run_name({"p"}, "q", "results/a") == "p ‖ q in results/a"
    assert run_name({"b", "a"}, "q", "r", "0.5 nats/token") == "a, b ‖ q in r: 0.5 nats/token"


def test_text_from_outside_stays_text_and_short() -> None:
    hostile = "a|b\n<script>alert(1)</script> [x](http://evil) `c`"
    page = markdown_of(report_of(warnings=[hostile] + ["w" * 5000] * 1000), config_of(model2="<b>|q"))
    assert r"a\|b \<script\>alert(1)\</script\> \[x\](http://evil) \`c\`" in page
    assert page.startswith("# KL(P‖Q), Q = \\<b\\>\\|q\n")
    assert "… and 981 more" in page
    assert len(page) < 10_000


@pytest.mark.filterwarnings("ignore:Artifact creation outside of a flow")
def test_a_server_that_is_away_costs_an_error_in_the_log_and_not_the_run(caplog: pytest.LogCaptureFixture) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}/api"
    with (
        temporary_settings({PREFECT_API_URL: nowhere, PREFECT_CLIENT_MAX_RETRIES: 0}),
        caplog.at_level(logging.ERROR, "flows.watch.artifacts"),
    ):
        with ProgressReporter("contexts scored", 5) as progress, progress_artifacts(config_of(), progress):
            progress.advance(5)
        show_report(report_of(), config_of(), {})
    shown = [record.getMessage() for record in caplog.records if record.name == "flows.watch.artifacts"]
    assert shown == [
        "the progress is not shown in Prefect; the run goes on",
        "the artifact q-summary is not shown in Prefect; the run goes on",
    ]


def test_without_a_server_nothing_is_made(caplog: pytest.LogCaptureFixture) -> None:
    with temporary_settings(restore_defaults={PREFECT_API_URL}), caplog.at_level(logging.DEBUG):
        with ProgressReporter("contexts scored", 5) as progress, progress_artifacts(config_of(), progress):
            progress.advance(5)
        show_report(report_of(), config_of(), {})
    assert [record.getMessage() for record in caplog.records] == ["contexts scored: 5 of 5"]


def test_how_a_program_ends_that_has_only_the_report() -> None:
    assert report_of(missing={}).exit_code == EXIT_COMPLETE
    assert report_of().exit_code == EXIT_INCOMPLETE
    assert report_of(failed_on_drift=True).exit_code == EXIT_DRIFT
