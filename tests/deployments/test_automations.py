"""automations/*.yaml: what Prefect would accept and never fire."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from prefect.server.events.ordering import PRECEDING_EVENT_LOOKBACK

from tests import ROOT
from tests.deployments.prefect_files import keys_by_place, misspelt, problems_of_automation, seconds_of

FILES = sorted((ROOT / "automations").glob("*.yaml"))
DOCUMENTS: dict[str, Any] = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in FILES}
ZOMBIES = "zombie-runs.yaml"
# The labels of a resource are free.
FREE_BELOW = {"match", "match_related"}


def copy_of(name: str) -> Any:
    return json.loads(json.dumps(DOCUMENTS[name]))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_an_automation_is_right(name: str) -> None:
    assert problems_of_automation(copy_of(name), name) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_misspelt_key_is_named_wherever_it_stands(name: str) -> None:
    for path in itertools.chain.from_iterable(keys_by_place(DOCUMENTS[name]).values()):
        if FREE_BELOW & set(path[:-1]):
            continue
        problems = problems_of_automation(misspelt(DOCUMENTS[name], path), name)
        shown = (f"{path[-1]}x", f"did you mean {path[-1]!r}")
        assert any(all(words in problem for words in shown) for problem in problems), problems
        assert all(problem.startswith(f"{name}: ") for problem in problems)


def changed(*path: Any, to: Any) -> Callable[[], Any]:
    def document() -> Any:
        copy = copy_of(ZOMBIES)
        place = copy
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = to
        return copy

    return document


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (
            changed("trigger", "after", to=["prefect.flow-run.heartbeet"]),
            ["trigger.after", "'prefect.flow-run.heartbeat'"],
        ),
        (changed("trigger", "expect", to=["tokenkl.drift.detection"]), ["trigger.expect", "'tokenkl.drift.detected'"]),
        (changed("trigger", "expect", to=[]), ["expects no event"]),
        (changed("trigger", "posture", to="Proactiv"), ["posture", "'Proactiv'"]),
        (changed("trigger", "within", to=5), ["trigger", "10 seconds"]),
        (changed("actions", 0, "type", to="change-flow-state"), ["actions[0]", "'change-flow-run-state'"]),
        (changed("actions", 0, "state", to="DEAD"), ["actions[0]", "state", "'DEAD'"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_wrong_value_is_named_with_its_place(document: Callable[[], Any], words: list[str]) -> None:
    problems = problems_of_automation(document(), ZOMBIES)
    assert any(all(word in problem for word in words) for problem in problems), problems


def test_a_run_is_taken_for_dead_only_after_several_heartbeats() -> None:
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    trigger = DOCUMENTS[ZOMBIES]["trigger"]
    for deployment in deployments:
        heartbeat = float(deployment["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
        assert 30 <= heartbeat <= seconds_of(trigger["within"]) / 3  # Prefect takes anything shorter for 30
        assert trigger["match_related"]["prefect.resource.id"] == f"prefect.tag.{deployment['tags'][0]}"
    # Or a scheduled run's end is not seen in time, and a run that never came to its first heartbeat never.
    assert seconds_of(trigger["within"]) >= PRECEDING_EVENT_LOOKBACK.total_seconds() + 60
    assert not any(action.get("force") for action in DOCUMENTS[ZOMBIES]["actions"])  # an ended run stays as it is


def test_each_file_says_how_it_is_applied() -> None:
    for path in FILES:
        command = f"prefect automation create --from-file automations/{path.name}"
        assert command in path.read_text(encoding="utf-8")
