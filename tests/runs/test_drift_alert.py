"""Drift end to end: runs of one schedule against the stand-in, their history, and what Prefect's server is told."""

from __future__ import annotations

import html
import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from backends.errors import ConfigError
from flows.analyze import main as analyze
from flows.config.alert import AlertConfig
from flows.config.models import RunConfig
from flows.watch.events import DRIFT, VERSION_CHANGED
from flows.watch.history import read_history
from flows.watch.reference import load_baseline
from tests import ROOT
from tests.programs import Done, Run, clean_environment
from tests.vertex_world.fixtures import make_vertex_world, vertex_world
from tests.vertex_world.world import VertexWorld

__all__ = ["make_vertex_world", "vertex_world"]

P, Q = "gemini-2.5-flash-lite", "gemini-2.5-flash"
PROMPTS = [f"What is known of the number {number}?" for number in range(8)]
PREVIOUS = ("--set", "alert.kl_per_token=0", "--set", "alert.compared_with=previous")


def write_responses(world: VertexWorld, folder: Path, seed: int, version: str | None = None) -> Path:
    """Fresh responses of P to the same prompts."""
    for path in world.write_responses(folder, P, PROMPTS, n=1, max_tokens=25, seed=seed):
        if version is not None:
            document = json.loads(path.read_text()) | {"model_version": version}
            path.write_text(json.dumps(document))
    return folder


def post(api: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(f"{api}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def events(api: str, name: str, history: Path, at_least: int) -> list[dict[str, Any]]:
    """The events of one history, once there are enough: the server takes them in after the run has ended."""
    deadline = time.monotonic() + 120
    while True:
        found = post(api, "/events/filter", {"filter": {"event": {"name": [name]}}, "limit": 50})["events"]
        ours = [event for event in found if event["payload"]["history"] == str(history)]
        if len(ours) >= at_least or time.monotonic() > deadline:
            return ours
        time.sleep(0.5)


def state_of(api: str, run_name: str) -> tuple[str, str]:
    found = post(api, "/flow_runs/filter", {"flow_runs": {"name": {"any_": [run_name]}}})
    return found[0]["state"]["type"], found[0]["state"]["name"]


@pytest.fixture
def run(run_program: Run, vertex_world: VertexWorld, tmp_path: Path):
    """One run of the schedule: fresh responses, a folder of its own (the runs of this test are of one day)."""

    def go(seed: int, *arguments: object, version: str | None = None) -> tuple[Done, dict[str, Any]]:
        folder = write_responses(vertex_world, tmp_path / f"in{seed}", seed * 1000, version)
        flags = ("--input-dir", folder, "--output-dir", tmp_path / "results/{flow_run_name}", "--model2", Q)
        done = run_program(
            "flows.run", *flags, "--backend", "vertex_online", *arguments, env=vertex_world.environment()
        )
        assert "Traceback" not in done.err, done.err
        return done, read_history(tmp_path / "results/history.parquet").row(-1, named=True)

    return go


def test_a_noisier_model_is_one_event_and_the_same_model_none(
    run, run_program: Run, vertex_world: VertexWorld, prefect_api: str, tmp_path: Path
):
    history = tmp_path / "results/history.parquet"
    done, first = run(1, *PREVIOUS)
    assert (done.code, first["drift"]) == (0, "undecided"), done.err
    assert f"{history} has no earlier run to compare with" in done.out
    for seed in (2, 3):
        done, row = run(seed, *PREVIOUS, version="p-001")
        assert (done.code, row["drift"], row["events"]) == (0, "no drift", []), done.out
    vertex_world.language_model.noise[Q] = 0.9
    done, drifted = run(4, *PREVIOUS, "--fail-on-drift", version="p-001")
    assert done.code == 4, done.err
    assert "KL(P‖Q) per token" in done.out
    assert "drift: KL per token rose by " in done.out
    assert (drifted["drift"], drifted["exit_status"], drifted["events"]) == ("drift", 4, [DRIFT])
    assert drifted["drift_reference"] == row["output_dir"]
    assert 0 < drifted["drift_low"] < drifted["drift_difference"] < drifted["drift_high"]
    assert state_of(prefect_api, drifted["flow_run_name"]) == ("FAILED", "Drifted")
    for name in ("summary.json", "run.json"):
        assert json.loads(Path(drifted["output_dir"], name).read_text())["drift"]["decision"] == "drift"
    assert Path(drifted["output_dir"]).name == drifted["flow_run_name"]
    folders = json.loads(Path(drifted["output_dir"], "run.json").read_text())["folders"]
    assert folders["output_dir"]["template"].endswith("results/{flow_run_name}")

    # As noisy as before, but against the first run; and both models have a new version.
    vertex_world.faults.model_version_change_after = 0
    baseline = json.dumps({"baseline": first["output_dir"]})
    settings = ("--set", "alert.kl_per_token=0.01", "--set", f"alert.compared_with={baseline}")
    done, last = run(5, *settings, version="p-002")
    assert (done.code, last["drift"], last["exit_status"]) == (0, "drift", 0), done.err
    assert state_of(prefect_api, last["flow_run_name"]) == ("COMPLETED", "Drifted")

    found = events(prefect_api, DRIFT, history, 2)
    by_run = {event["payload"]["flow_run_id"]: event for event in found}
    assert len(found) == 2
    assert by_run.keys() == {drifted["run_id"], last["run_id"]}
    assert len({event["resource"]["prefect.resource.id"] for event in found}) == 1
    event = by_run[drifted["run_id"]]
    assert f"prefect.flow-run.{drifted['run_id']}" in [item["prefect.resource.id"] for item in event["related"]]
    payload = event["payload"]
    assert payload["difference_low"] == drifted["drift_low"]
    assert payload["difference"] == pytest.approx(drifted["kl_per_token"] - row["kl_per_token"])
    assert (payload["results"], payload["threshold"], payload["level"]) == (drifted["output_dir"], 0, 0.99)
    assert payload["reference"]["folder"] == row["output_dir"]
    changes = {
        event["payload"]["which"]: event["payload"] for event in events(prefect_api, VERSION_CHANGED, history, 2)
    }
    assert (changes["model1"]["from"], changes["model1"]["to"]) == (["p-001"], ["p-002"])
    assert (changes["model2"]["from"], changes["model2"]["to"]) == ([Q], [f"{Q}-002"])

    shown = run_program("flows.analyze", "--history", tmp_path / "results")
    assert shown.code == 0
    assert [line.split()[2] for line in shown.out.splitlines() if Q in line] == [Q] * 5
    assert shown.out.splitlines()[-1].rstrip().endswith(last["output_dir"])


_RETRIED = """
import json, sys
from pathlib import Path
from flows.runtime.environment import prepare_environment
prepare_environment()
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.states import AwaitingRetry
from flows.config.models import RunConfig
from flows.watch.history import read_history, record_row
from flows.watch.report import RunReport
from flows.run import kl_divergence
config = RunConfig(input_dir=sys.argv[1], output_dir=sys.argv[2], model2=sys.argv[3], fail_on_drift=True,
                   backend={"name": "vertex_online"}, alert={"kl_per_token": 0.001})
flow = kl_divergence.with_options(retries=1)  # which Prefect takes in this process
state = flow(config, return_state=True)
assert state.name == "Drifted", state
history = Path(sys.argv[2]) / "history.parquet"
# Killed between the event and its note in the history: the server knows it by its id.
record_row(history, read_history(history).row(0, named=True) | {"events": []})
with get_client(sync_client=True) as client:  # the button "Retry" of the run's page, and what a worker then does
    run_id = state.state_details.flow_run_id
    client.set_flow_run_state(run_id, AwaitingRetry(), force=True)
    again = client.read_flow_run(run_id)
state = run_flow(flow, flow_run=again, parameters={"config": config}, return_type="state")
report = state.result(raise_on_failure=False)
print(json.dumps([state.type.value, state.name, state.message, isinstance(report, RunReport)]))
"""


def test_a_run_that_is_retried_emits_one_event_and_has_one_row(
    vertex_world: VertexWorld, prefect_api: str, tmp_path: Path
):
    folder = write_responses(vertex_world, tmp_path / "in", 7)
    environment = clean_environment(tmp_path / "home", PREFECT_API_URL=prefect_api) | vertex_world.environment()
    command = [sys.executable, "-c", _RETRIED, str(folder), str(tmp_path / "out"), Q]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    kind, name, message, has_report = json.loads(done.stdout.splitlines()[-1])
    assert (kind, name, has_report) == ("FAILED", "Drifted", True), done.stderr
    assert message.startswith("drift: KL per token is ")
    history = tmp_path / "out/history.parquet"
    row = read_history(history).row(0, named=True)
    assert read_history(history).height == 1
    runs = post(prefect_api, "/flow_runs/filter", {"flow_runs": {"id": {"any_": [row["run_id"]]}}})
    assert runs[0]["run_count"] == 3
    assert row["contexts_asked"] == 0, "the later tries found every answer on disk"
    assert len(events(prefect_api, DRIFT, history, 1)) == 1


_WATCHED = """
import sys
from pathlib import Path
from flows.runtime.environment import prepare_environment
prepare_environment()
from flows.config.models import RunConfig
from flows.run import kl_divergence
results = Path(sys.argv[2])
for name in ("one", "two", "three"):
    input()
    config = RunConfig(input_dir=sys.argv[1], output_dir=results / name, history=results / "history.parquet",
                       model2=sys.argv[3], backend={"name": "vertex_online"},
                       alert={"of": "q", "kl_per_token": 0.0, "compared_with": "previous"})
    print("state:", kl_divergence(config, return_state=True).name, flush=True)
"""


def test_a_model_that_moves_around_p_is_seen_against_itself(
    vertex_world: VertexWorld, prefect_api: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Three days over the same responses: alone, unchanged, changed."""
    folder, results = write_responses(vertex_world, tmp_path / "in", 7), tmp_path / "results"
    environment = clean_environment(tmp_path / "home", PREFECT_API_URL=prefect_api) | vertex_world.environment()
    command = [sys.executable, "-c", _WATCHED, str(folder), str(results), Q]
    states: list[str] = []
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT
        ) as days,
    ):
        assert days.stdin is not None
        assert days.stdout is not None
        for noise in (0.0, 0.0, 0.9):
            vertex_world.language_model.noise[Q] = noise
            print(file=days.stdin, flush=True)
            states.append(next((line.split()[1] for line in days.stdout if line.startswith("state:")), "none"))
    assert states == ["Completed", "Completed", "Drifted"], (tmp_path / "log").read_text()
    history = results / "history.parquet"
    alone, same, moved = read_history(history).rows(named=True)
    assert (alone["drift"], alone["then_now"]) == ("undecided", None)
    assert (same["drift"], same["then_now"], same["then_now_certified_lower"]) == ("no drift", 0, 0)
    assert (moved["drift"], moved["drift_of"], moved["events"]) == ("drift", "q", [DRIFT])
    assert 0 < moved["then_now_certified_lower"] < moved["then_now"]
    assert moved["then_now_low"] < moved["then_now"] < moved["then_now_high"]
    assert moved["then_now_contexts"] == moved["measured"]

    (event,) = events(prefect_api, DRIFT, history, 1)
    decided = json.loads((results / "three" / "summary.json").read_text())["drift"]
    found = decided["then_against_now"]
    assert event["payload"]["then_against_now"] == found
    assert found["per_token"]["value"] == moved["then_now"]
    assert decided["message"].startswith("drift: KL(Q then‖Q now) is ")
    page = (results / "three" / "report.html").read_text()
    assert html.escape(decided["message"], quote=False) in page
    assert "has no earlier run to compare with" in (results / "one" / "report.html").read_text()

    assert analyze(["--compare", str(results / "two"), str(results / "three"), "--json", "-"]) == 0
    compared = json.loads(capsys.readouterr().out)["a_against_b"]
    assert compared["per_token"] == found["per_token"]
    assert analyze(["--history", str(results)]) == 0
    assert "Q then‖now" in capsys.readouterr().out

    alert = AlertConfig(kl_per_token=0.0, of="q", compared_with={"baseline": str(results / "one")})
    other = RunConfig(input_dir=folder, output_dir=tmp_path / "out", model2=P, alert=alert)
    with pytest.raises(ConfigError, match=f"its Q was '{Q}' and is '{P}' in this run"):
        load_baseline(results / "one", other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output-dir", "out/{deployment_name}"], "this run belongs to none"),
        (["--set", "alert.compared_with=baseline: {folder}/nowhere"], "nowhere is not a folder"),
        (["--set", "alert.compared_with=baseline: {folder}/in"], "holds no finished run"),
        (["--history", "{folder}/broken.parquet"], "broken.parquet is no history of runs"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_bought(
    arguments: list[str], message: str, run_program: Run, vertex_world: VertexWorld, tmp_path: Path
):
    write_responses(vertex_world, tmp_path / "in", 1)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    flags = ["--input-dir", tmp_path / "in", "--output-dir", tmp_path / "out", "--model2", Q]
    named = [argument.replace("{folder}", str(tmp_path)) for argument in arguments]
    alert = ["--set", "alert.kl_per_token=0.1"]
    done = run_program(
        "flows.run", *flags, "--backend", "vertex_online", *alert, *named, env=vertex_world.environment()
    )
    assert done.code == 2, done.err
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not vertex_world.rows_bought
    assert (tmp_path / "broken.parquet").read_bytes() == b"PAR1 but not really"


def test_a_fixed_folder_is_compared_with_what_it_held(run_program: Run, vertex_world: VertexWorld, tmp_path: Path):
    """The run overwrites the table of the run that it is compared with; and with nothing asked nothing can drift."""
    write_responses(vertex_world, tmp_path / "in", 1)
    flags = ["--input-dir", tmp_path / "in", "--output-dir", tmp_path / "out", "--model2", Q]

    def go() -> tuple[Done, dict[str, Any]]:
        done = run_program("flows.run", *flags, "--backend", "vertex_online", *PREVIOUS, env=vertex_world.environment())
        assert done.code == 0, done.err
        return done, read_history(tmp_path / "out/history.parquet").row(-1, named=True)

    go()
    done, row = go()
    assert (row["drift"], row["drift_difference"], row["contexts_asked"]) == ("no drift", 0, 0)
    assert "nothing was asked in this run" in done.out
    vertex_world.language_model.noise[Q] = 1.5
    write_responses(vertex_world, tmp_path / "in", 200)
    done, row = go()
    assert row["drift"] == "drift", done.out
    assert row["drift_reference"] == str(tmp_path / "out")
    assert pl.read_parquet(tmp_path / "out/responses.parquet").height == 8


def test_an_alert_by_hand_says_what_the_event_reports(run_program: Run) -> None:
    done = run_program("flows.notify", "tokenkl.drift.detected", "kl_per_token=0.62", "results=results/a=b")
    assert done.code == 0, done.err
    assert done.out == "tokenkl.drift.detected: kl_per_token = 0.62, results = results/a=b\n"
