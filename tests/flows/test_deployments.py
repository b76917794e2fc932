"""prefect.yaml: Prefect ignores what it does not know, so this checks what it would not."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint

from flows.config import RunConfig, SampleConfig, resolve_backend, validate
from tests.flows.conftest import ROOT

DOCUMENT: dict[str, Any] = yaml.safe_load((ROOT / "prefect.yaml").read_text())
KNOWN_KEYS = {
    "name", "description", "entrypoint", "tags", "enforce_parameter_schema", "concurrency_limit", "parameters",
    "schedules", "work_pool", "triggers", "version",
}  # fmt: skip
CONFIGS = {"kl-divergence": RunConfig, "sample-responses": SampleConfig}


@pytest.mark.parametrize("deployment", DOCUMENT["deployments"], ids=lambda deployment: deployment["name"])
def test_a_deployment_has_known_keys_and_valid_parameters(
    deployment: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert deployment.keys() <= KNOWN_KEYS
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "some-project")
    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    config = validate(CONFIGS[flow.name], deployment["parameters"]["config"])
    resolve_backend(config)
    flow.validate_parameters(deployment["parameters"])


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_an_example_is_a_valid_configuration(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = yaml.safe_load(path.read_text())
    model = SampleConfig if "prompts" in values else RunConfig
    resolve_backend(validate(model, values))
