"""Progress on a real terminal, in a pipe, and what is said of money that was spent."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from backends.local.backend import LocalBackend
from backends.vertex.batch import VertexBatchBackend, VertexBatchOptions
from flows.runtime import progress as module
from flows.runtime.progress import ProgressReporter
from flows.watch.spending import Spending, jobs_text
from kl.records import Score, ScoreFailure
from tests import ROOT
from tests.programs import clean_environment

PROGRAM = """
import logging, sys, time
from flows.commands.arguments import take_level
from flows.runtime.environment import prepare_environment
prepare_environment()
take_level(LEVEL)
from flows.runtime.progress import ProgressReporter
logger = logging.getLogger("flows.run")
details = lambda: ["12 jobs: 3 running, 9 succeeded", "0.0123 of about 0.0456 [USD] spent"]
with ProgressReporter("contexts scored", 1200, details) as progress:
    progress.advance(300)
    time.sleep(0.3)
    logger.info("wave 1 is there: [red]no markup[/red]")
    logger.debug("a detail")
    logger.warning("something is odd")
    progress.advance(900)
    time.sleep(0.3)
print("the result")
"""


def on_a_terminal(level: str | None, home: Path) -> str:
    """What a terminal of 100 columns is sent, results beside progress."""
    ours, theirs = pty.openpty()
    environment = clean_environment(home) | {"TERM": "xterm", "COLUMNS": "100", "LINES": "24"}
    command = [sys.executable, "-c", PROGRAM.replace("LEVEL", repr(level))]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment, cwd=ROOT)
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += part
    os.close(ours)
    assert process.wait(60) == 0, said
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())


def test_a_terminal_has_a_panel_and_log_lines_pass_it_whole(tmp_path: Path) -> None:
    said = on_a_terminal(None, tmp_path)
    assert re.search(r"contexts scored .* 300/1200 .*0:00:0", said)
    assert "12 jobs: 3 running, 9 succeeded; 0.0123 of about 0.0456 [USD] spent" in said
    assert re.search(r"\r\d\d:\d\d:\d\d INFO wave 1 is there: \[red\]no markup\[/red\]\r\n", said)
    assert "a detail" not in said
    assert said.rstrip().endswith("the result")


def test_quiet_has_warnings_and_the_result_alone(tmp_path: Path) -> None:
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING something is odd\r\nthe result\r\n", on_a_terminal("-q", tmp_path))


def test_verbose_shows_details(tmp_path: Path) -> None:
    assert "DEBUG a detail" in on_a_terminal("-v", tmp_path)


def test_a_pipe_gets_a_line_for_each_tenth_at_most(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LINES", 0.0)
    with (
        caplog.at_level(logging.INFO),
        ProgressReporter("contexts scored", 1000, lambda: ["2 jobs: 2 running"]) as work,
    ):
        for _ in range(100):
            work.advance(10)
        assert work.rows()[0] == ("contexts scored", "1,000 of 1,000")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 10
    assert re.fullmatch(
        r"contexts scored: 100 of 1,000; [\d,.e+]+ a second, about 0 s left; 2 jobs: 2 running", lines[0]
    )
    assert lines[-1] == "contexts scored: 1,000 of 1,000; 2 jobs: 2 running"


# What was spent.


def score(**tokens: int | None) -> Score:
    return Score("key", (), **tokens)  # pyright: ignore[reportArgumentType]


def spending(model: str, estimate: float | None = 0.5) -> Spending:
    made = Spending(VertexBatchBackend, VertexBatchOptions(project_id="p"), estimate)
    made.note(model, score(input_tokens=1_000_000, output_tokens=10_000))
    return made


def test_what_was_spent_is_what_the_service_counted_at_its_prices() -> None:
    # Half of 0.30 USD a million tokens in and 2.50 out.
    assert spending("gemini-2.5-flash").text() == "0.1625 of about 0.5000 USD spent"


@pytest.mark.parametrize(
    "result",
    [ScoreFailure("key", "blocked", "refused"), score(input_tokens=None, output_tokens=3)],
    ids=["failed", "not counted"],
)
def test_what_is_not_known_makes_it_a_lower_limit(result: Score | ScoreFailure) -> None:
    found = spending("gemini-2.5-flash")
    found.note("gemini-2.5-flash", ScoreFailure("key", "waiting", "in a job"))
    assert not found.text().startswith("at least")
    found.note("gemini-2.5-flash", result)
    assert found.text().startswith("at least 0.1625 of about 0.5000 USD")


def test_a_model_without_a_price_is_told_in_tokens() -> None:
    found = spending("a-model-of-tomorrow", None)
    assert found.text() == "1,000,000 + 10,000 tokens spent, price not known"
    found.note("gemini-2.5-flash", score(input_tokens=1_000_000, output_tokens=0))
    assert found.text() == "at least 0.1500 USD spent"


def test_what_is_computed_here_costs_nothing_and_says_nothing() -> None:
    assert Spending(LocalBackend, LocalBackend.Options(), 0.0).text() == ""


def test_jobs_are_counted_by_state() -> None:
    jobs = [{"state": state} for state in ("RUNNING", "SUCCEEDED", "SUCCEEDED", "PARTIALLY_SUCCEEDED")]
    assert jobs_text({"jobs": jobs}) == "4 jobs: 1 partially succeeded, 1 running, 2 succeeded"
    assert jobs_text({"calls": {"200": 3}}) == ""
