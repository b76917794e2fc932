"""prefect.yaml: Prefect ignores what it does not know, so this checks what it would not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from backends.errors import ConfigError
from flows.checkout import enter_checkout
from flows.config.backend import resolve_backend
from flows.config.models import RunConfig
from flows.config.reading import validate
from flows.config.sampling import SampleConfig
from tests import ROOT
from tests.deployments.prefect_files import events_of_the_code, keys_by_place, misspelt, problems_of_deployments

# Without the sharing of anchors, so that a change in one place is a change in one place.
DOCUMENT: dict[str, Any] = json.loads(json.dumps(yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))))
DEPLOYMENTS = {deployment["name"]: deployment for deployment in DOCUMENT["deployments"]}
# Below these, names are free: other programs' variables.
FREE = {"DO_NOT_TRACK"}


@pytest.fixture(autouse=True)
def _a_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "some-project")


def test_the_deployments_are_right() -> None:
    assert problems_of_deployments(DOCUMENT) == []
    assert {"nightly-vertex-batch", "online-hourly", "quickstart-local", "sample-responses"} <= DEPLOYMENTS.keys()


def test_nothing_that_costs_money_starts_by_itself() -> None:
    for name, deployment in DEPLOYMENTS.items():
        config = deployment.get("parameters", {}).get("config", {"backend": {"name": "local"}})
        if config["backend"]["name"] != "local":
            assert config["max_cost_usd"] > 0, name
            assert not any(schedule["active"] for schedule in deployment["schedules"]), name


KEYS = keys_by_place(DOCUMENT)


@pytest.mark.parametrize("place", KEYS)
def test_a_misspelt_key_is_named_wherever_it_stands(place: str) -> None:
    for path in KEYS[place]:
        if path[-1] in FREE:
            continue
        problems = problems_of_deployments(misspelt(DOCUMENT, path))
        # With the right one beside it; that a step does not exist is all that can be said.
        right = f"{path[-1]!r}" if "." not in path[-1] else "no such step"
        assert any(f"{path[-1]}x" in problem and right in problem for problem in problems), problems
        assert all(problem.startswith("prefect.yaml: ") for problem in problems)


def changed(*path: Any, to: Any) -> Callable[[], Any]:
    def document() -> Any:
        copy = json.loads(json.dumps(DOCUMENT))
        place = next(item for item in copy["deployments"] if item["name"] == path[0])
        for part in path[1:-1]:
            place = place[part]
        place[path[-1]] = to
        return copy

    return document


@pytest.mark.parametrize(
    ("document", "words"),
    [
        pytest.param(
            changed("quickstart-local", "parameters", "config", "modle2", to="m"),
            ["deployments[quickstart-local].parameters", "'modle2'", "'model2'"],
            id="a setting of the run",
        ),
        pytest.param(
            changed("nightly-vertex-batch", "parameters", "config", "backend", "poll_intervall_s", to=9),
            ["deployments[nightly-vertex-batch].parameters", "poll_intervall_s", "poll_interval_s"],
            id="an option of the backend",
        ),
        pytest.param(
            changed("quickstart-local", "parameters", "config", "top_logprobs", to=0),
            ["top_logprobs", "1 or more", "0"],
            id="a value out of bounds",
        ),
        pytest.param(
            changed("quickstart-local", "parameters", "config", "backend", to="local"),
            ["deployments[quickstart-local].parameters", "{name: NAME}"],
            id="a backend that Prefect's form would refuse",
        ),
        pytest.param(
            changed("quickstart-local", "entrypoint", to="flows.run.kl_divergance"),
            ["deployments[quickstart-local].entrypoint", "kl_divergance"],
            id="an entrypoint",
        ),
        pytest.param(
            changed("quickstart-local", "concurrency_limit", "collision_strategy", to="CANCEL"),
            ["deployments[quickstart-local].concurrency_limit", "collision_strategy", "'CANCEL'"],
            id="a collision strategy",
        ),
        pytest.param(
            changed("quickstart-local", "schedules", 0, "interval", to="often"),
            ["deployments[quickstart-local].schedules[every-ten-minutes]", "interval", "'often'"],
            id="an interval",
        ),
        pytest.param(
            changed("quickstart-local", "work_pool", "job_variables", "env", "PREFECT_LOGGING_LEVL", to="INFO"),
            ["work_pool.job_variables.env", "PREFECT_LOGGING_LEVL", "'PREFECT_LOGGING_LEVEL'"],
            id="a Prefect setting",
        ),
        pytest.param(
            changed("quickstart-local", "work_pool", "job_variables", "image", to="python"),
            ["work_pool.job_variables", "'image'"],
            id="a variable of another kind of pool",
        ),
        pytest.param(
            changed("drift-alert", "triggers", 0, "expect", to=["tokenkl.drift.detect"]),
            ["deployments[drift-alert].triggers[", "'tokenkl.drift.detect'", "'tokenkl.drift.detected'"],
            id="an event that nothing emits",
        ),
        pytest.param(
            changed("drift-alert", "triggers", 0, "parameters", to={}),
            ["deployments[drift-alert].triggers[", "the flow needs event, payload"],
            id="a parameter that the flow needs",
        ),
        pytest.param(
            changed("quickstart-local", "name", to="drift-alert"),
            ["two have the name 'drift-alert'"],
            id="a name twice",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_place_and_what_is_right(document: Callable[[], Any], words: list[str]) -> None:
    problems = problems_of_deployments(document())
    assert any(all(word in problem for word in words) for problem in problems), problems


def test_the_events_that_start_a_deployment_are_emitted_somewhere() -> None:
    assert "tokenkl.drift.detected" in events_of_the_code()


def test_a_run_works_in_the_folder_that_was_deployed_from_or_where_its_worker_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # and back at the end
    monkeypatch.delenv("TOKENKL_HOME", raising=False)
    assert enter_checkout(str(ROOT)) == {"directory": str(ROOT)}
    assert Path.cwd() == ROOT
    with pytest.raises(
        ConfigError, match=r"/no/such \(the folder that was deployed from\) has no prefect\.yaml .* TOKENKL_HOME"
    ):
        enter_checkout("/no/such")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENKL_HOME", str(ROOT))
    enter_checkout("/no/such")
    assert Path.cwd() == ROOT
    monkeypatch.setenv("TOKENKL_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"\(TOKENKL_HOME of the worker\)"):
        enter_checkout(str(ROOT))


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_an_example_is_a_valid_configuration(path: Path) -> None:
    written = yaml.safe_load(path.read_text())
    for values in [written] if "backend" in written else [written["sample"], written["run"]]:
        model = RunConfig if "model2" in values else SampleConfig
        resolve_backend(validate(model, values))
