"""A strict reading of ``prefect.yaml`` and ``automations/*.yaml``: Prefect itself passes over what it does not know.

Every problem is a line with the file, the place, the wrong word, and the nearest right one.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import chdir
from datetime import timedelta
from functools import cache
from typing import Any

import yaml
from prefect.cli.deploy._models import DeploymentConfig, PrefectYamlModel, RawScheduleConfig, WorkPoolConfig
from prefect.client.schemas.objects import ConcurrencyLimitConfig, StateType
from prefect.deployments.steps.core import RESERVED_KEYWORDS
from prefect.events import DeploymentEventTrigger
from prefect.events.actions import ActionTypes
from prefect.events.schemas.automations import AutomationCore, EventTrigger
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.settings import Settings
from prefect.settings.legacy import _get_settings_fields
from prefect.utilities.importtools import import_object
from prefect.workers.process import ProcessVariables
from pydantic import BaseModel, ValidationError

from backends.errors import ConfigError
from flows.config.backend import resolve_backend
from flows.config.models import CommonConfig, RunConfig
from flows.config.reading import validate
from flows.config.sampling import SampleConfig
from tests import ROOT

_PLACEHOLDER = re.compile(r"{{\s*([^}\s]+)\s*}}")
_ACTIONS: dict[str, type[BaseModel]] = {kind.model_fields["type"].default: kind for kind in ActionTypes.__args__}
_TEMPLATE_KINDS = {"jinja": {"template"}, "json": {"value"}, "workspace_variable": {"variable_name"}}


class Problems:
    """The problems of one file, in the order in which they stand."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: list[str] = []

    def add(self, place: str, text: str) -> None:
        self.lines.append(f"{self.file}: {place or 'top level'}: {text}")

    def known(self, place: str, what: str, words: Iterable[str], known: Iterable[str]) -> None:
        """Each of ``words`` must be one of ``known``."""
        choices = sorted(known)
        for word in words:
            if word not in choices:
                near = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                self.add(place, f"unknown {what} {word!r}{hint} Known: {', '.join(choices)}")

    def model(self, place: str, kind: type[BaseModel], data: Any) -> bool:
        """``data`` must be a ``kind``, without a key that it does not have. Whether the keys are right."""
        if not isinstance(data, dict):
            self.add(place, f"should be a mapping, is {data!r}")
            return False
        names = {field.alias or name for name, field in kind.model_fields.items()}
        self.known(place, "key", data, names)
        if not data.keys() <= names:
            return False
        try:
            kind.model_validate(data)
        except ValidationError as error:
            for item in error.errors():
                where = ".".join(str(part) for part in item["loc"])
                self.add(place, f"{where}: {item['msg']}, got {item['input']!r}")
            return False
        return True


@cache
def events_of_the_code() -> set[str]:
    """The names of our own events that stand in the source, and those that Prefect emits for a flow run."""
    found = {f"prefect.flow-run.{kind.value.capitalize()}" for kind in StateType}
    found |= {"prefect.flow-run.heartbeat", "prefect.flow-run.*"}
    for path in [*(ROOT / "flows").rglob("*.py"), *(ROOT / "backends").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(re.findall(r"\Atokenkl(?:\.[a-z-]+){2,}\Z", node.value))
    return found


# prefect.yaml


def problems_of_deployments(document: Any, file: str = "prefect.yaml") -> list[str]:
    """What is wrong in a ``prefect.yaml`` that was read; nothing if the list is empty."""
    problems = Problems(file)
    if not problems.model("", PrefectYamlModel, _without_parts(document, "deployments", [])):
        return problems.lines
    outputs = _steps(problems, document)
    names = [deployment.get("name") for deployment in document["deployments"]]
    for name in {name for name in names if names.count(name) > 1}:
        problems.add("deployments", f"two have the name {name!r}")
    for deployment in document["deployments"]:
        _deployment(problems, deployment, outputs)
    return problems.lines


def _without_parts(data: Any, name: str, empty: Any) -> Any:
    return {**data, name: empty} if isinstance(data, dict) and name in data else data


def _steps(problems: Problems, document: Mapping[str, Any]) -> set[str]:
    """Check the steps; what their outputs are called."""
    outputs: set[str] = set()
    for section in ("build", "push", "pull"):
        for index, step in enumerate(document.get(section) or []):
            ((name, inputs),) = step.items()
            place = f"{section}[{index}].{name}"
            try:
                arguments = inspect.signature(import_object(name)).parameters
            except (ImportError, AttributeError) as error:
                problems.add(place, f"no such step: {error}")
                continue
            problems.known(place, "key", inputs, {*arguments, *RESERVED_KEYWORDS})
            _placeholders(problems, place, inputs, outputs)
            if "id" in inputs:
                outputs |= {f"{inputs['id']}.stdout", f"{inputs['id']}.stderr"}
    return outputs


def _placeholders(problems: Problems, place: str, value: Any, outputs: set[str]) -> None:
    used = _PLACEHOLDER.findall(yaml.safe_dump(value))
    ours = [name for name in used if not name.startswith(("$", "prefect.variables.", "prefect.blocks."))]
    problems.known(place, "placeholder", ours, outputs)
    for name in used:
        if name.startswith("$") and name[1:] not in os.environ:
            problems.add(place, f"{name} would be empty wherever it is not set; write the value, or leave it out")


def _deployment(problems: Problems, deployment: Any, outputs: set[str]) -> None:
    place = f"deployments[{deployment.get('name')}]"
    problems.known(place, "key", deployment, DeploymentConfig.model_fields)
    missing = [key for key in _REQUIRED if key not in deployment]
    if missing:
        problems.add(place, f"without {', '.join(missing)}")
        return
    plain = {key: value for key, value in deployment.items() if key not in ("schedules", "triggers", "work_pool")}
    if not problems.model(place, DeploymentConfig, plain):
        return
    if isinstance(deployment.get("concurrency_limit"), dict):
        problems.model(f"{place}.concurrency_limit", ConcurrencyLimitConfig, deployment["concurrency_limit"])
    _work_pool(problems, f"{place}.work_pool", deployment["work_pool"], outputs)
    flow = _flow(problems, place, deployment["entrypoint"])
    if flow is None:
        return
    given = deployment.get("parameters", {})
    _parameters(problems, f"{place}.parameters", flow, given)
    for schedule in deployment.get("schedules", []):
        where = f"{place}.schedules[{schedule.get('slug')}]"
        if problems.model(where, RawScheduleConfig, schedule) and "parameters" in schedule:
            _parameters(problems, f"{where}.parameters", flow, {**given, **schedule["parameters"]})
    for trigger in deployment.get("triggers", []):
        _deployment_trigger(problems, f"{place}.triggers[{trigger.get('name')}]", flow, trigger)


_REQUIRED = ("name", "description", "entrypoint", "enforce_parameter_schema", "work_pool", "tags")


def _flow(problems: Problems, place: str, entrypoint: str) -> Flow[..., Any] | None:
    try:
        return _loaded(entrypoint)
    except Exception as error:  # noqa: BLE001 whatever importing it raises is what is wrong with it
        problems.add(f"{place}.entrypoint", f"{entrypoint!r} cannot be loaded: {' '.join(str(error).split())}")
        return None


@cache
def _loaded(entrypoint: str) -> Flow[..., Any]:
    with chdir(ROOT):
        return load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)


def _work_pool(problems: Problems, place: str, pool: Any, outputs: set[str]) -> None:
    if not problems.model(place, WorkPoolConfig, pool):
        return
    variables = pool.get("job_variables", {})
    if not problems.model(f"{place}.job_variables", ProcessVariables, variables):
        return
    _placeholders(problems, f"{place}.job_variables", variables, outputs)
    env = variables.get("env", {})
    named = [name for name in env if name.startswith("PREFECT")]
    problems.known(f"{place}.job_variables.env", "setting", named, prefect_settings())


@cache
def prefect_settings() -> frozenset[str]:
    return frozenset(_get_settings_fields(Settings))


def _parameters(problems: Problems, place: str, flow: Flow[..., Any], given: Mapping[str, Any]) -> None:
    problems.known(place, "parameter", given, flow.parameters.properties)
    kind = {"kl-divergence": RunConfig, "sample-responses": SampleConfig}.get(flow.name)
    if kind is None or not given.keys() <= flow.parameters.properties.keys():
        return
    try:
        _settings(kind, given.get("config", {}))
    except ConfigError as error:
        problems.add(place, " ".join(str(error).split()))


def _settings(kind: type[CommonConfig], values: Mapping[str, Any]) -> None:
    backend = values.get("backend", {"name": None})
    if not isinstance(backend, dict):
        raise ConfigError("backend: Prefect's form knows a mapping only: {name: NAME}")
    if "name" not in backend:
        raise ConfigError(f"backend: without 'name'; it has {', '.join(backend)}")
    resolve_backend(validate(kind, values))


def _deployment_trigger(problems: Problems, place: str, flow: Flow[..., Any], trigger: Any) -> None:
    if not problems.model(place, DeploymentEventTrigger, trigger):
        return
    _events(problems, place, trigger)
    given = trigger.get("parameters", {})
    problems.known(f"{place}.parameters", "parameter", given, flow.parameters.properties)
    missing = [name for name in flow.parameters.required if name not in given]
    if missing:
        problems.add(f"{place}.parameters", f"the flow needs {', '.join(missing)}")
    for name, value in given.items():
        _template(problems, f"{place}.parameters.{name}", value)


def _template(problems: Problems, place: str, value: Any) -> None:
    if not isinstance(value, dict):
        return
    if "__prefect_kind" not in value:
        problems.known(place, "key", value, {"__prefect_kind"})
        return
    kind = value["__prefect_kind"]
    problems.known(place, "kind", [kind], _TEMPLATE_KINDS)
    problems.known(place, "key", value.keys() - {"__prefect_kind"}, _TEMPLATE_KINDS.get(kind, set()))
    for inner in value.values():
        _template(problems, place, inner)


# automations/*.yaml


def problems_of_automation(document: Any, file: str) -> list[str]:
    """What is wrong in an automation that was read."""
    problems = Problems(file)
    plain = _without_parts(_without_parts(document, "trigger", {"type": "event"}), "actions", [])
    if not problems.model("", AutomationCore, plain):
        return problems.lines
    if problems.model("trigger", EventTrigger, document["trigger"]):
        _events(problems, "trigger", document["trigger"])
    for index, action in enumerate(document["actions"]):
        place = f"actions[{index}]"
        problems.known(place, "key", action, {name for kind in _ACTIONS.values() for name in kind.model_fields})
        if "type" not in action:
            problems.add(place, "without type")
        elif action["type"] not in _ACTIONS:
            problems.known(place, "action", [action["type"]], _ACTIONS)
        else:
            problems.model(place, _ACTIONS[action["type"]], action)
    return problems.lines


def _events(problems: Problems, place: str, trigger: Mapping[str, Any]) -> None:
    known = events_of_the_code()
    for name in ("expect", "after"):
        problems.known(f"{place}.{name}", "event", trigger.get(name, []), known)
    if not trigger.get("expect"):
        problems.add(place, "expects no event, and so any event would set it off")


def seconds_of(within: Any) -> float:
    """The ``within`` of a trigger, which may be written in several ways."""
    trigger = EventTrigger.model_validate({"type": "event", "posture": "Proactive", "within": within})
    return timedelta.total_seconds(trigger.within)


Path = tuple[Any, ...]


def keys_by_place(document: Any) -> dict[str, list[Path]]:
    """The path of each key, by its place: a key that has the same place in several items of a list stands once."""
    places: dict[str, dict[Any, Path]] = {}
    for path in _paths_of_keys(document):
        place = ".".join("*" if isinstance(part, int) else part for part in path[:-1]) or "top level"
        places.setdefault(place, {}).setdefault(path[-1], path)
    return {place: list(paths.values()) for place, paths in places.items()}


def _paths_of_keys(data: Any, place: Path = ()) -> Iterator[Path]:
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in pairs:
        if isinstance(data, dict):
            yield (*place, key)
        yield from _paths_of_keys(value, (*place, key))


def misspelt(document: Any, path: Path) -> Any:
    """A copy of a document in which one key has a letter too many."""
    copy = json.loads(json.dumps(document))
    parent = copy
    for part in path[:-1]:
        parent = parent[part]
    parent[f"{path[-1]}x"] = parent.pop(path[-1])
    return copy
