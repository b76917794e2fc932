"""What a run is told: the models behind `--config` files, flags and Prefect parameters.

Flags win over the file, the file over the environment, the environment over the defaults.
"""

from __future__ import annotations

import difflib
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from backends.base import Backend, BackendOptions, SampleSettings
from backends.errors import ConfigError
from backends.registry import load_backend, parse_options
from kl.position_sampling import PositionSample

Estimator = Literal["censored", "floor", "lower", "bucket"]


class BackendChoice(BaseModel):
    """Which backend is asked, and its own options."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(default="vertex_batch", min_length=1, description="Name of a registered backend.")

    @property
    def options(self) -> dict[str, Any]:
        """The options of the backend, not yet validated against it."""
        return dict(self.model_extra or {})


class CommonConfig(BaseModel):
    """What every flow that calls a backend is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: BackendChoice = Field(
        default=BackendChoice(),
        description="Where log-probabilities come from: a name, or a mapping with 'name' and the backend's options.",
    )
    project_id: str | None = Field(
        default=None, min_length=1, description="Google Cloud project. Default: GOOGLE_CLOUD_PROJECT."
    )
    location: str | None = Field(
        default=None, min_length=1, description="Vertex AI location. Default: GOOGLE_CLOUD_LOCATION, else us-central1."
    )
    bucket_name: str | None = Field(
        default=None,
        min_length=3,
        max_length=222,
        description="Bucket for batch files, 3 to 222 characters; made when absent. Default: {project_id}-kl-batch.",
    )
    max_concurrent: int = Field(
        default=10,
        ge=1,
        le=1000,
        description="Calls in flight (online), or groups of responses at work (batch), 1 to 1000.",
    )

    @field_validator("backend", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class PositionsConfig(BaseModel):
    """A sample of each response's positions, for a cheaper run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fraction: float | None = Field(default=None, gt=0, le=1, description="Share of the positions, above 0, up to 1.")
    per_response: int | None = Field(default=None, ge=1, description="Positions of each response, at least 1.")
    seed: int = Field(default=0, ge=0, description="Seed of the sample; another seed asks for other positions.")

    @model_validator(mode="after")
    def _one_rule(self) -> PositionsConfig:
        if (self.fraction is None) == (self.per_response is None):
            raise ValueError("set one of fraction (0.2) and per_response (8)")
        return self

    @property
    def sample(self) -> PositionSample:
        """The rule as `kl.position_sampling` takes it."""
        return PositionSample(self.fraction, self.per_response, self.seed)


class RunConfig(CommonConfig):
    """One comparison: the responses of model P on disk against model Q."""

    input_dir: Path = Field(description="Folder with P's responses, one JSON file per prompt.")
    output_dir: Path = Field(description="Folder for results; scores that were bought are kept in it.")
    model2: str = Field(min_length=1, description="Model Q, as its backend names it.")
    top_logprobs: int | Literal["full"] = Field(
        default=20,
        description="Candidates asked per position, 1 to 20; 'full' adds every token's log-probability of both models, "
        "hence the exact KL (backends with a full vocabulary only).",
    )
    pattern: str = Field(default="*.json", min_length=1, description="Which files of the input folder are read (glob).")
    max_files: int | None = Field(default=None, ge=1, description="Read at most this many files, at least 1.")
    responses_per_job: int = Field(
        default=1, ge=1, le=100_000, description="Responses per group: one task and one batch job, 1 to 100000."
    )
    estimator: Estimator = Field(
        default="censored", description="What is reported as the estimate: censored, floor, lower or bucket."
    )
    positions: PositionsConfig | None = Field(
        default=None,
        description="Ask a sample of the positions only: {fraction: 0.2} or {per_response: 8}, "
        "by file or --set positions.fraction=0.2. Default: all.",
    )
    force: bool = Field(
        default=False, description="Go on although the two models' tokens do not match (other tokenizers)."
    )
    max_cost_usd: float | None = Field(
        default=None, ge=0, description="Refuse to start if the estimated cost in USD is above this."
    )
    preflight: bool = Field(
        default=True, description="Prove with one tiny request that the model can be used before anything is bought."
    )
    keep_raw: bool = Field(
        default=False, description="Keep the service's own rows, compressed, in OUTPUT_DIR/scores/raw."
    )
    reuse_raw: Path | None = Field(
        default=None, description="Output folder of a run with keep_raw: its rows are read again, without a call."
    )
    dry_run: bool = Field(default=False, description="Say what would be asked and what it costs; call nothing.")

    @field_validator("top_logprobs")
    @classmethod
    def _top_logprobs_range(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 1 <= value <= 20:
            raise ValueError("must be from 1 to 20 candidates per position, or 'full'")
        return value

    @field_validator("top_logprobs", mode="before")
    @classmethod
    def _no_boolean(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("must be from 1 to 20 candidates per position, or 'full'")
        return value

    @model_validator(mode="after")
    def _separate_folders(self) -> RunConfig:
        if self.input_dir.resolve() == self.output_dir.resolve():
            raise ValueError(f"output_dir is the input_dir ({self.input_dir}); results would be read as responses")
        return self

    @property
    def k(self) -> int:
        """Candidates asked per position."""
        return 20 if self.top_logprobs == "full" else self.top_logprobs

    @property
    def full_vocabulary(self) -> bool:
        """Whether every token's log-probability is asked, of both models."""
        return self.top_logprobs == "full"


class SampleConfig(CommonConfig):
    """Responses that model P is to write."""

    model1: str = Field(min_length=1, description="Model P, as its backend names it.")
    output_dir: Path = Field(description="Folder for the response files, one JSON file per prompt.")
    prompts: tuple[str, ...] = Field(min_length=1, description="The prompts, at least 1.")
    system: str | None = Field(default=None, description="System text that P is given; kept in the response files.")
    num_responses: int = Field(default=1, ge=1, le=10_000, description="Responses per prompt, 1 to 10000.")
    sampling: SampleSettings = Field(default=SampleSettings(), description="How responses are sampled.")


ConfigT = TypeVar("ConfigT", bound=CommonConfig)


def build_config(
    model: type[ConfigT],
    config_file: Path | None,
    flags: Mapping[str, Any],
    sets: Sequence[str] = (),
) -> ConfigT:
    """The configuration from a YAML file, flags and ``--set`` pairs, in rising order of precedence.

    Raises
    ------
    ConfigError
        One line that names the setting, the value and what is allowed.
    """
    values = _read_yaml(config_file) if config_file else {}
    _merge(values, {name: value for name, value in flags.items() if value is not None})
    for pair in sets:
        _merge(values, _parse_set(pair))
    return validate(model, values)


def validate(model: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Validate settings that come as plain values.

    Raises
    ------
    ConfigError
        One line with every problem.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("; ".join(dict.fromkeys(_problem(model, item) for item in error.errors()))) from error


def _problem(model: type[BaseModel], item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    field = model.model_fields.get(location[0]) if location else None
    if item["type"] == "missing":
        flag = "--" + location[0].replace("_", "-")
        return f"{'.'.join(location)} is not set ({flag}): {_description(field)}"
    if item["type"] == "extra_forbidden":
        known = _fields_beside(model, location)
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"unknown setting {'.'.join(location)!r}.{hint} Known: {', '.join(sorted(known))}."
    message = item["msg"].removeprefix("Value error, ")
    if not location:
        return message
    return f"{'.'.join(location)}: {message.rstrip('.')}, got {item['input']!r}. {_description(field)}"


def _fields_beside(model: type[BaseModel], location: list[str]) -> list[str]:
    """The settings that exist where an unknown one was written."""
    for name in location[:-1]:
        field = model.model_fields[name]
        kinds = [field.annotation, *typing.get_args(field.annotation)]
        model = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(model.model_fields)


def _description(field: Any) -> str:
    return field.description or "" if field is not None else ""


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key written twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is set twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        # The loader only adds a check to SafeLoader.
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506
    except OSError as error:
        raise ConfigError(f"the configuration file {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"the configuration file {path} is not valid YAML: {detail}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"the configuration file {path} must be a mapping of settings, such as 'model2: NAME'.")
    if isinstance(values.get("backend"), str):
        values["backend"] = {"name": values["backend"]}
    return values


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, Mapping) and isinstance(values.get(name), dict):
            _merge(values[name], value)
        else:
            values[name] = dict(value) if isinstance(value, Mapping) else value


def _parse_set(pair: str) -> dict[str, Any]:
    path, equals, text = pair.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"--set {pair!r} is not KEY=VALUE; write for example --set backend.poll_interval_s=30.")
    try:
        value: Any = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        value = text  # such as "*.json", which YAML takes for an alias; the field decides whether a text will do
    for name in reversed(names):
        value = {name: value}
    return value


def resolve_backend(config: CommonConfig) -> tuple[type[Backend], BackendOptions, list[str]]:
    """The backend's class, its validated options, and notes on settings that it has no use for.

    Settings of the run that a backend knows under the same name (project, location, bucket, concurrency) become its
    options; an option given to the backend itself must not contradict them.

    Raises
    ------
    ConfigError
        If the backend or an option is unknown, or an option has a value that is not allowed.
    """
    backend = load_backend(config.backend.name)
    values = config.backend.options
    notes: list[str] = []
    for name, value in _shared_settings(config).items():
        if name not in backend.Options.model_fields:
            if name in config.model_fields_set and name != "max_concurrent":
                notes.append(f"{name} = {value!r} is not used: the backend {config.backend.name} has no such setting")
        elif name not in values:
            values[name] = value
        elif name in config.model_fields_set and values[name] != value:
            raise ConfigError(f"{name} is {value!r}, but backend.{name} is {values[name]!r}; set one of them.")
    return backend, parse_options(config.backend.name, backend, values), notes


def _shared_settings(config: CommonConfig) -> dict[str, Any]:
    settings = {
        "project_id": config.project_id or os.environ.get("GOOGLE_CLOUD_PROJECT"),
        "location": config.location or os.environ.get("GOOGLE_CLOUD_LOCATION") or "us-central1",
        "bucket_name": config.bucket_name,
        "max_concurrent": config.max_concurrent,
        "keep_raw": (config.keep_raw or None) if isinstance(config, RunConfig) else None,
    }
    return {name: value for name, value in settings.items() if value is not None}


def check_capabilities(config: RunConfig, backend: type[Backend]) -> None:
    """Refuse what the backend cannot do, before anything is asked.

    Raises
    ------
    ConfigError
        With what was asked and what the backend can do.
    """
    can = backend.capabilities
    if config.full_vocabulary and not can.full_vocabulary:
        raise ConfigError(
            f"top_logprobs is 'full', but the backend {config.backend.name} reports at most {can.max_top_logprobs} "
            f"candidates per position. Set top_logprobs to {can.max_top_logprobs} or less."
        )
    if config.k > can.max_top_logprobs:
        raise ConfigError(
            f"top_logprobs is {config.k}, but the backend {config.backend.name} reports at most {can.max_top_logprobs}."
        )
