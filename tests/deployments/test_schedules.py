"""docs/deploying.md, followed: server, worker, a schedule that fires, alerts, and a run whose processes are killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from flows.watch.events import DRIFT
from tests import ROOT
from tests.deployments.prefect_files import prefect_settings
from tests.documents import code_blocks
from tests.programs import SessionServer, clean_environment, free_port, wait_until_healthy

DOCUMENT = ROOT / "docs" / "deploying.md"
# In this order under the first heading; what follows there is for a reader with more time.
INSTALL, SERVER, DEPLOY, WORKER = code_blocks(DOCUMENT, "sh")[:4]
PARTS = ("flows", "backends", "kl", "examples", "automations", "prefect.yaml", "pyproject.toml")
EVERY_S = 20
PATIENCE_S = 240


@dataclass(frozen=True)
class World:
    """A checkout that is deployed to a server; ``api`` is its address."""

    api: str
    tree: Path
    environment: dict[str, str]

    def send(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """The server's answer; while its database is busy, which it says with 503, it is asked again."""
        until = time.monotonic() + PATIENCE_S
        while True:
            answer = httpx.request(method, f"{self.api}/{path}", json=body, timeout=60)
            if answer.status_code != 503 or time.monotonic() > until:
                return answer
            time.sleep(1)

    def ask(self, path: str, **body: Any) -> Any:
        answer = self.send("POST", path, body).raise_for_status()
        return answer.json() if answer.content else None

    def deployment(self, name: str) -> dict[str, Any]:
        return self.send("GET", f"deployments/name/{name}").raise_for_status().json()

    def runs(self, name: str) -> list[dict[str, Any]]:
        of_deployment = {"id": {"any_": [self.deployment(name)["id"]]}}
        begun = {"state": {"type": {"not_any_": ["SCHEDULED"]}}}
        return self.ask("flow_runs/filter", deployments=of_deployment, flow_runs=begun, sort="EXPECTED_START_TIME_ASC")

    def state(self, run_id: str) -> dict[str, Any]:
        return self.send("GET", f"flow_runs/{run_id}").raise_for_status().json()["state"]

    def start(self, name: str, config: dict[str, Any]) -> str:
        path = f"deployments/{self.deployment(name)['id']}/create_flow_run"
        return self.ask(path, parameters={"config": config}, state={"type": "SCHEDULED"})["id"]

    def artifacts(self, run_id: str) -> dict[str, dict[str, Any]]:
        found = self.ask("artifacts/filter", artifacts={"flow_run_id": {"any_": [run_id]}})
        return {artifact["key"]: artifact for artifact in found}

    def log(self, run_id: str) -> str:
        found = self.ask("logs/filter", logs={"flow_run_id": {"any_": [run_id]}}, limit=200)
        return "\n".join(line["message"] for line in found)

    @contextmanager
    def running(self, commands: str, name: str) -> Iterator[subprocess.Popen[bytes]]:
        """Commands of the document, in a shell in the checkout, until they are killed with all that they started."""
        with (self.tree.parent / f"{name}.log").open("wb") as log:
            program = subprocess.Popen(
                ["bash", "-ec", commands], cwd=self.tree, env=self.environment, stdout=log, stderr=log
            )
            try:
                yield program
            finally:
                kill_tree(program)


def kill_tree(program: subprocess.Popen[bytes]) -> None:
    """Kill -9 a process and all below it; nothing of them has a chance to say goodbye."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(pid): int(parent) for pid, parent in (line.split() for line in listing.splitlines())}
    doomed = [program.pid]
    for pid in doomed:
        doomed += [child for child, parent in parents.items() if parent == pid]
    for pid in doomed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    program.wait()


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    until = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < until, what
        time.sleep(0.3)
    return found


def edited(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text, f"{path.name} has no {old!r}"
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A copy of the checkout, quicker than the shipped one, deployed by the document's commands."""
    home = tmp_path_factory.mktemp("deployed")
    tree = home / "tree"
    tree.mkdir()
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree)
    for path in sorted((tree / "examples" / "responses").glob("*.json"))[1:]:
        path.unlink()
    edited(tree / "prefect.yaml", ("interval: 600", f"interval: {EVERY_S}"), ('FREQUENCY: "60"', 'FREQUENCY: "30"'))
    edited(tree / "automations" / "zombie-runs.yaml", ("within: 1200", "within: 50"))
    port = free_port()
    environment = clean_environment(
        home / "prefect",
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        PREFECT_SERVER_API_PORT=str(port),
        PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS="5",
        PREFECT_WORKER_QUERY_SECONDS="2",
        PREFECT_API_URL=f"http://127.0.0.1:{port}/api",
        DO_NOT_TRACK="1",
    )
    SessionServer().copy_new_database(home / "prefect")
    world = World(f"http://127.0.0.1:{port}/api", tree, environment)
    with world.running(SERVER, "server") as server:
        wait_until_healthy(world.api, server, home / "server.log")
        done = subprocess.run(
            ["bash", "-ec", DEPLOY], cwd=tree, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == 0, done.stdout + done.stderr
        yield world


@pytest.fixture(scope="module")
def killed_run(world: World) -> str:
    """A run that was at work when its process and its worker were killed."""
    # A run that is killed while it waits for its process would keep the only place of its deployment for five minutes.
    quickstart = world.deployment("kl-divergence/quickstart-local")["id"]
    prompts = [f"Tell me about the number {number}." for number in range(500)]
    config = {"backend": {"name": "local"}, "model1": "smollm2-135m", "output_dir": "long", "prompts": prompts}
    config["sampling"] = {"max_tokens": 4}
    world.ask(f"deployments/{quickstart}/pause_deployment")
    with world.running(WORKER, "worker-1"):
        run_id = world.start("sample-responses/sample-responses", config)
        wait_for(lambda: list((world.tree / "long").glob("*.json")), "the long run has not begun")
    assert world.state(run_id)["name"] == "Running"
    world.ask(f"deployments/{quickstart}/resume_deployment")
    return run_id


@pytest.fixture(scope="module")
def worker(world: World, killed_run: str) -> Iterator[subprocess.Popen[bytes]]:
    """The worker that is started after the first one was killed."""
    with world.running(WORKER, "worker-2") as worker:
        yield worker


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_a_dry_run_puts_the_plan_before_the_user_and_asks_nothing(world: World) -> None:
    config = {"backend": {"name": "local"}, "input_dir": "examples/responses", "output_dir": "results/dry-{date}"}
    world.ask("variables/", name="model_q", value="smollm2-135m")
    model = {"__prefect_kind": "workspace_variable", "variable_name": "model_q"}
    run_id = world.start("kl-divergence/online-hourly", {**config, "model2": model, "dry_run": True})
    wait_for(lambda: world.state(run_id)["type"] in ("COMPLETED", "FAILED", "CRASHED"), "the dry run has not ended")
    assert world.state(run_id)["message"] == "dry run: nothing was asked"
    (artifact,) = world.artifacts(run_id).values()
    assert artifact["key"] == "online-hourly-plan"
    rows = {row["figure"]: row["value"] for row in json.loads(artifact["data"])}
    assert rows["requests"].startswith("6 in 1")
    wait_for(lambda: "requests: 6 in 1" in world.log(run_id), "the plan is not in the log")
    assert not list((world.tree / "results").glob("dry-*"))


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_a_run_that_fails_for_a_reason_that_it_can_name_says_it_in_one_line(world: World) -> None:
    config = {
        "backend": {"name": "local"},
        "input_dir": "nowhere",
        "output_dir": "results/none",
        "model2": "smollm2-135m",
    }
    run_id = world.start("kl-divergence/nightly-submit", config)
    wait_for(lambda: "Finished in state Failed" in world.log(run_id), "the run has not failed")
    assert world.state(run_id)["message"].endswith("'nowhere' does not exist or is no directory.")
    wait_for(lambda: "Hook 'settle_jobs' finished" in world.log(run_id), "the end of the log is missing")
    assert "Traceback" not in world.log(run_id)


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_a_drift_event_starts_the_alert_once_with_its_figures(world: World) -> None:
    figures = {"message": "KL per token rose", "kl_per_token": 0.123456, "results": "gs://b/2026-11-23", "prompts": 12}
    emit(world, DRIFT, figures)
    run = wait_for(lambda: world.runs("drift-alert/drift-alert"), "no alert run was made")[0]
    wait_for(lambda: world.state(run["id"])["type"] == "COMPLETED", "the alert run has not completed")
    assert run["parameters"] == {"event": DRIFT, "payload": figures}
    wait_for(lambda: "kl_per_token = 0.123456" in world.log(run["id"]), "the figures are not in the log")
    assert "kl_per_token = 0.123456" in world.state(run["id"])["message"]
    (artifact,) = world.artifacts(run["id"]).values()
    assert artifact["key"] == "tokenkl-drift-detected"
    assert "| kl_per_token | 0.123456 |" in artifact["data"]
    assert len(world.runs("drift-alert/drift-alert")) == 1


@pytest.mark.slow
def test_a_drift_event_sends_the_message_with_its_figures(world: World) -> None:
    with received_messages() as (address, messages):
        block = notification_block(world, address)
        file = world.tree / "automations" / "drift-notification.yaml"
        edited(file, ("00000000-0000-0000-0000-000000000000", block))
        apply = ["prefect", "automation", "create", "--from-file", "automations/drift-notification.yaml"]
        subprocess.run(apply, cwd=world.tree, env=world.environment, check=True, capture_output=True, timeout=60)
        emit(world, "tokenkl.model-version.changed", {"message": "Q is now v2; it was v1", "results": "gs://b/c"})
        sent = wait_for(lambda: messages, "no message came")
    assert "Q is now v2; it was v1" in sent[0]
    assert "Results: gs://b/c" in sent[0]
    assert "tokenkl.model-version.changed" in sent[0]


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_the_quickstart_fires_by_itself_and_shows_what_it_found(world: World) -> None:
    def completed() -> list[dict[str, Any]]:
        runs = [run for run in world.runs("kl-divergence/quickstart-local") if run["auto_scheduled"]]
        assert not [run for run in runs if run["state_type"] in ("FAILED", "CRASHED")], runs
        found = [run for run in runs if run["state_type"] == "COMPLETED"]
        return found if len(found) >= 2 else []

    first, second = wait_for(completed, "the schedule has not fired twice")[:2]
    keys = {"quickstart-local-summary", "quickstart-local-report"}
    for run in (first, second):
        artifacts = world.artifacts(run["id"])
        assert keys <= artifacts.keys() <= keys | {"quickstart-local-progress", "quickstart-local-work"}
        rows = {row["figure"]: row for row in json.loads(artifacts["quickstart-local-summary"]["data"])}
        row = rows["KL(P‖Q), nats per token"]
        figure = f"{row['estimate']} nats/token"  # of one prompt, which gives no interval
        measured = rows["positions measured"]["estimate"]
        line = f"{figure}, certainly > {row['certainly at least']}, {measured}"
        assert artifacts["quickstart-local-summary"]["description"].startswith(line)
        assert world.state(run["id"])["message"] == line
        assert [found["name"] for found in world.ask("flow_runs/filter") if found["id"] == run["id"]] == [
            f"smollm2-135m ‖ smollm2-135m@int4 in results/quickstart: {figure}"
        ]
        assert len(artifacts["quickstart-local-summary"]["data"]) < 8000
        page = artifacts["quickstart-local-report"]["data"]
        assert "## Largest positions" in page
        assert "data:image/svg+xml" in page
        assert "results/quickstart/summary.json" in page
        assert len(page) < 8000
    assert world.artifacts(first["id"])["quickstart-local-progress"]["data"] == 100
    work = json.loads(world.artifacts(first["id"])["quickstart-local-work"]["data"])
    assert work[0]["figure"] == "contexts scored"
    assert re.fullmatch(r"(\d+) of \1", work[0]["value"])
    tasks = world.ask("task_runs/filter", flow_runs={"id": {"any_": [first["id"]]}})
    (measure,) = (task for task in tasks if task["name"].startswith("measure"))
    groups = {task["id"] for task in tasks if ".json#" in task["name"]}
    assert groups
    assert {task["id"] for task in measure["task_inputs"]["wait_for"]} == groups
    wait_for(lambda: ", 0 of them on disk" in world.log(first["id"]), "the first run found nothing")
    wait_for(lambda: ", 0 to ask" in world.log(second["id"]), "the second run asked nothing")
    assert (world.tree / "results" / "quickstart" / "summary.json").is_file()
    # Every further run would only take the processor from the tests beside this one.
    world.ask(f"deployments/{world.deployment('kl-divergence/quickstart-local')['id']}/pause_deployment")


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_a_run_whose_processes_were_killed_ends_and_the_others_stay_as_they_were(world: World, killed_run: str) -> None:
    wait_for(lambda: world.state(killed_run)["type"] == "CRASHED", "the killed run still counts as running")
    assert "No heartbeat" in world.state(killed_run)["message"]
    others = [run for run in world.ask("flow_runs/filter") if run["id"] != killed_run]
    assert not [run for run in others if run["state_type"] == "CRASHED"]


@pytest.mark.slow
def test_the_form_of_a_deployment_has_descriptions_and_bounds(world: World) -> None:
    schema = world.deployment("kl-divergence/nightly-vertex-batch")["parameter_openapi_schema"]
    assert schema["properties"]["config"]["$ref"].endswith("/RunConfig")
    fields = schema["definitions"]["RunConfig"]["properties"]
    assert [name for name, field in fields.items() if not field.get("description")] == []
    assert fields["max_concurrent"]["minimum"] == 1
    assert fields["max_concurrent"]["maximum"] == 1000
    assert {"type": "integer", "minimum": 1, "maximum": 1_000_000} in fields["top_logprobs"]["anyOf"]
    for name in ("input_dir", "output_dir"):
        assert fields[name]["type"] == "string"
    choices = {choice["title"]: choice["properties"] for choice in fields["backend"]["anyOf"]}
    assert {"vertex_batch", "vertex_online", "local", "files", "openai_compatible", "transformers"} < choices.keys()
    assert "poll_interval_s" in choices["vertex_batch"]
    assert list(fields)[:3] == ["input_dir", "model2", "backend"]
    plain = [name for name, field in fields.items() if "type" in field]
    assert all(fields[name]["title"] for name in plain)


@pytest.mark.slow
def test_a_setting_that_does_not_exist_is_refused_before_a_run_is_made(world: World) -> None:
    path = f"deployments/{world.deployment('kl-divergence/quickstart-local')['id']}/create_flow_run"
    config = {"input_dir": "a", "output_dir": "b", "modle2": "c"}
    answer = world.send("POST", path, {"parameters": {"config": config}})
    assert answer.status_code == 409
    assert "modle2" in answer.text


def test_the_document_names_what_exists() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert set(re.findall(r"\bPREFECT_(?!HOME\b)\w+", text)) <= prefect_settings()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(re.findall(r"--extra (\w+)", text)) <= extras.keys()
    for folder in ("automations", "tests/deployments"):
        for name in re.findall(rf"{folder}/([\w.-]+\.\w+)", text):
            assert (ROOT / folder / name).is_file(), name
    for link in re.findall(r"\]\(([\w/.-]+\.md)\)", text):
        assert (DOCUMENT.parent / link).is_file(), link
    shipped = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    names = [deployment["name"] for deployment in shipped["deployments"]]

    assert re.findall(r"^\| `([\w-]+)` \|", text.split("## The deployments")[1].split("## ")[0], re.MULTILINE) == names


def emit(world: World, name: str, payload: dict[str, Any]) -> None:
    event = {
        "occurred": datetime.now(UTC).isoformat(),
        "event": name,
        "resource": {"prefect.resource.id": "tokenkl.comparison.test", "prefect.resource.name": "KL(P‖Q)"},
        "payload": payload,
        "id": str(uuid.uuid4()),
    }
    world.send("POST", "events", [event]).raise_for_status()


def notification_block(world: World, address: str) -> str:
    """A block that posts what it is told to an address; its id."""
    program = (
        "from prefect.blocks.notifications import CustomWebhookNotificationBlock as Block\n"
        "data = {'subject': '{{subject}}', 'body': '{{body}}'}\n"
        f"block = Block(name='test', url={address!r}, json_data=data)\n"
        "print(block.save('messages'))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=world.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


@contextmanager
def received_messages() -> Iterator[tuple[str, list[str]]]:
    """An address on this machine, and what is posted to it."""
    messages: list[str] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", messages
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
