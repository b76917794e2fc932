"""What can be known without a call is said before Prefect's server starts, in one line, and leaves nothing behind."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from backends.errors import ConfigError
from flows.config.comparison import Comparison
from flows.config.models import RunConfig
from flows.config.reading import build_config
from flows.config.sampling import SampleConfig
from flows.config.templates import RunValues
from flows.sampling.plan import check_sampling
from tests.programs import Start, finish, only_environment

Check = Callable[..., str]


def check_settings(command: str, model: str, given: dict[str, object]) -> None:
    if command == "sample":
        check_sampling(build_config(SampleConfig, None, given | {"models": [model], "prompts": ["hi"]}))
        return
    config = build_config(RunConfig, None, given | {"input_dir": "examples", "model2": model})
    Comparison.of(config, RunValues.of_a_dry_run()).check()


@pytest.fixture(params=["run", "sample"])
def refused(request: pytest.FixtureRequest, tmp_path: Path) -> Check:
    """The line by which settings are refused, of a run and of a sampling; in an environment of their own."""

    def check(model: str = "gemini-2.5-flash", environment: dict[str, str] | None = None, **settings: object) -> str:
        given = {"output_dir": str(tmp_path / "out"), "project_id": "p-x", **settings}
        with only_environment({"HOME": str(tmp_path), **(environment or {})}):
            with pytest.raises(ConfigError) as raised:
                check_settings(request.param, model, given)
        assert not (tmp_path / "out").exists()
        line = str(raised.value)
        assert "\n" not in line
        return line

    return check


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"type": "service_acc', "is broken: File .*not a valid json file"),
        ("[]", "is broken: "),
        ('{"type": "x"}', "is broken: .*does not have a valid type"),
        ('{"type": "service_account"}', "is broken: .*missing fields .*client_email"),
        (None, "does not exist"),
    ],
)
def test_credentials_that_are_broken_are_named_as_such_with_their_path(
    content: str | None, reason: str, refused: Check, tmp_path: Path
) -> None:
    file = tmp_path / "key.json"
    if content is not None:
        file.write_text(content)
    line = refused(environment={"GOOGLE_APPLICATION_CREDENTIALS": str(file)})
    assert str(file) in line
    assert re.search(reason, line), line


def test_a_broken_file_of_gcloud_is_named_too(refused: Check, tmp_path: Path) -> None:
    file = tmp_path / "application_default_credentials.json"
    file.write_text("{")
    assert f"{file}, is broken" in refused(environment={"CLOUDSDK_CONFIG": str(tmp_path)})


def test_without_credentials_or_project_a_backend_that_needs_none_is_named(refused: Check) -> None:
    nowhere = {"NO_GCE_CHECK": "true"}
    missing = refused(environment=nowhere)
    assert "no Google credentials were found" in missing
    assert "--backend local" in missing
    assert "--backend local" in refused(environment=nowhere, project_id=None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bucket_name": "Upper"}, "'Upper' cannot be the name of a bucket"),
        ({"location": "us/central"}, "location 'us/central'"),
        ({"model": "gemini 2"}, "'gemini 2' cannot be the name of a Vertex AI model"),
        ({"model": "gemini-2.5-pro"}, "always thinks"),
        ({"model": "smollm", "backend": "local"}, "unknown model 'smollm'. Did you mean 'smollm2-135m'?"),
        ({"backend": {"name": "openai_compatible", "base_url": "http://h/v1", "api_key_env": "NONE"}}, "variable NONE"),
    ],
)
def test_names_and_addresses_are_checked(settings: dict[str, str], words: str, refused: Check) -> None:
    assert words in refused(**settings)


def test_a_missing_package_is_known_before_it_is_imported(refused: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    assert "needs 'threadpoolctl': " in refused("smollm2-135m", backend="local")


@pytest.mark.parametrize("setting", ["continue_from", "dataset"])
def test_a_file_with_prompts_that_is_not_there_is_named(setting: str, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.json")
    source = {"continue_from": absent} if setting == "continue_from" else {"dataset": {"json": absent}}
    settings = {"output_dir": str(tmp_path / "out"), "models": ["smollm2-135m"], "backend": "local", **source}
    with pytest.raises(ConfigError, match=rf"{setting}: .*absent\.json does not exist"):
        check_sampling(build_config(SampleConfig, None, settings))


def test_no_server_is_started_and_no_folder_made_for_a_mistake(start_program: Start, tmp_path: Path) -> None:
    (tmp_path / "key.json").write_text("{")
    flags = ("--input-dir", "examples/responses", "--output-dir", tmp_path / "out", "--model2", "gemini-2.5-flash")
    environment = {"GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "key.json"), "GOOGLE_CLOUD_PROJECT": "p-x"}
    done = finish(start_program("flows.run", *flags, env=environment, server=False))
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1), done.err
    assert "key.json, is broken" in done.err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == ["key.json"]
    assert not list((tmp_path / "home").glob("*.db*"))
