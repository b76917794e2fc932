"""What sampling is told: the models that write, the prompts, how, and where to; in one form, or in short.

Things that have two names (``model1`` and ``models``, ``num_responses`` and ``sampling.num_samples_per_prompt``, …) may
be given under either; given under both, they must be the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from backends.settings import SampleSettings
from backends.storage import Location
from flows.config.models import CommonConfig

Source = Literal["file", "json", "jsonl", "huggingface"]
_SOURCES: tuple[Source, ...] = ("file", "json", "jsonl", "huggingface")
_WAYS = ("prompts", "dataset", "continue_from")


class DatasetConfig(BaseModel):
    """Where the prompts are, and which of them are taken."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Source = Field(
        default="file",
        description="file: a prompt a line; json: a list of texts or records; jsonl: a text or record a line; "
        "huggingface: a data set of the Hub, or a folder with one (extra hf-datasets). In short {json: PATH}.",
    )
    file_path: Location | None = Field(default=None, description="The file, on a disk or in a bucket.")
    dataset_name: str | None = Field(default=None, min_length=1, description="The data set of source huggingface.")
    split: str = Field(default="train", min_length=1, description="Its split.")
    prompt_field: str = Field(
        default="prompt",
        min_length=1,
        description="Field of a record with the prompt, a text or a list of {role, content} turns; a path such as "
        "conversation.0.content leads into it.",
    )
    use_wildchat_format: bool = Field(
        default=False, description="The prompt is the first turn of the record's 'conversation', as in WildChat."
    )
    language: str | None = Field(default=None, description="Take only records whose 'language' is this.")
    num_prompts: int | None = Field(default=None, ge=1, description="How many prompts, at least 1. Default: all.")
    sampling_mode: Literal["first", "random"] = Field(
        default="first", description="Which: the first ones, or random ones; more of them begin with the same."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the random order of the prompts.")
    min_length: int = Field(default=1, ge=1, description="Shortest prompt that is taken, characters.")
    max_length: int | None = Field(default=None, ge=1, description="Longest prompt that is taken, characters.")

    @model_validator(mode="before")
    @classmethod
    def _in_short(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        given = [name for name in _SOURCES if name in values]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given; prompts come from one place")
        for name in given:
            _put(values, "source", name, name)
            _put(values, "dataset_name" if name == "huggingface" else "file_path", values.pop(name), name)
        if "source" not in values and values.get("dataset_name") is not None:
            values["source"] = "huggingface"
        return values

    @model_validator(mode="after")
    def _has_a_place(self) -> DatasetConfig:
        wanted, other = ("dataset_name", "file_path") if self.source == "huggingface" else ("file_path", "dataset_name")
        if getattr(self, wanted) is None:
            raise ValueError(f"source is {self.source!r}, which needs {wanted}")
        if getattr(self, other) is not None:
            raise ValueError(f"{other} is given, but source is {self.source!r}")
        if self.source == "file":
            named = {"prompt_field", "use_wildchat_format", "language"} & self.model_fields_set
            if named:
                raise ValueError(f"a file with a prompt a line has no records, hence no {', '.join(sorted(named))}")
        if self.max_length is not None and self.max_length < self.min_length:
            raise ValueError(f"max_length {self.max_length} is below min_length {self.min_length}")
        return self


class SamplingConfig(SampleSettings):
    """How responses are drawn, how many, and how often one that failed is tried again."""

    num_samples_per_prompt: int | None = Field(default=None, description="Another name of num_responses.")
    logprobs: int | None = Field(default=None, description="Another name of top_logprobs.")
    response_logprobs: Literal[True] = Field(
        default=True, description="Responses always come with log-probabilities; only true is allowed."
    )
    max_retries: int = Field(
        default=2,
        ge=0,
        le=19,
        description="How often a response is asked again that came without what it must have, 0 to 19 (of "
        "vertex_batch: backend.max_attempts less one). Throttling and network faults are repeated by the backend.",
    )

    @property
    def settings(self) -> SampleSettings:
        """What a backend is told."""
        return SampleSettings(**{name: getattr(self, name) for name in SampleSettings.model_fields})


class OutputConfig(BaseModel):
    """Where the response files go."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_dir: str = Field(min_length=1, description="Folder of all experiments.")
    experiment_name: str | None = Field(default=None, min_length=1, description="Folder of this one, below base_dir.")


class SampleConfig(CommonConfig):
    """Responses that one or more models are to write."""

    model1: str | None = Field(default=None, min_length=1, description="Model P, as its backend names it.")
    models: tuple[str, ...] = Field(
        default=(), description="Models that write, a folder each if there are several; in place of model1."
    )
    output_dir: Location | None = Field(
        default=None,
        description="Folder for the response files, one JSON file per prompt; on a disk or in a bucket. May have "
        "fields such as {date}.",
    )
    output: OutputConfig | None = Field(default=None, description="The output_dir as base_dir and experiment_name.")
    prompts: tuple[str, ...] = Field(default=(), description="The prompts themselves.")
    dataset: DatasetConfig | None = Field(default=None, description="Where prompts are read from.")
    continue_from: Location | None = Field(
        default=None,
        description="File of flows.analyze --threshold: the models go on from each position in it.",
    )
    system: str | None = Field(
        default=None, description="System text for prompts that have none of their own; kept in the response files."
    )
    num_responses: int = Field(default=1, ge=1, le=10_000, description="Responses per prompt, 1 to 10000.")
    sampling: SamplingConfig = Field(default=SamplingConfig(), description="How responses are sampled.")
    api: dict[str, Any] | None = Field(
        default=None, description="project_id, location, and options of the backend; another name of these."
    )
    max_cost_usd: float | None = Field(
        default=None, ge=0, description="Refuse to start if it may cost more than this in USD, at least 0."
    )
    preflight: bool = Field(
        default=True, description="Prove with a tiny request that each model can be used before anything is bought."
    )
    dry_run: bool = Field(default=False, description="Say what would be asked and what it costs; call nothing.")

    @model_validator(mode="before")
    @classmethod
    def _one_name_each(cls, values: Any) -> Any:
        """Everything under the first of its names."""
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        if isinstance(backend := values.get("backend"), str):
            values["backend"] = {"name": backend}
        if (model := values.pop("model1", None)) is not None:
            _put(values, "models", [model], "model1")
        if isinstance(values.get("sampling"), Mapping):
            sampling = values["sampling"] = dict(values["sampling"])
            _put(
                values, "num_responses", sampling.pop("num_samples_per_prompt", None), "sampling.num_samples_per_prompt"
            )
            _put(sampling, "top_logprobs", sampling.pop("logprobs", None), "sampling.logprobs")
        if isinstance(output := values.get("output"), Mapping) and output.keys() <= OutputConfig.model_fields.keys():
            parts = [output.get("base_dir"), output.get("experiment_name")]
            if isinstance(parts[0], str) and isinstance(parts[1], str | None):
                del values["output"]
                _put(values, "output_dir", "/".join(filter(None, (parts[0].rstrip("/") or "/", parts[1]))), "output")
        if isinstance(values.get("api"), Mapping):
            _take_api(values, values.pop("api"))
        return values

    @model_validator(mode="after")
    def _is_whole(self) -> SampleConfig:
        if not self.models or not all(self.models):
            raise ValueError("no model is set (--model1 NAME, or models: [NAME, …]), which writes the responses")
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"models names one twice: {', '.join(self.models)}")
        if self.output_dir is None:
            raise ValueError(
                "output_dir is not set (--output-dir, or output: {base_dir: …, experiment_name: …}): folder for the "
                "response files"
            )
        ways = [name for name in _WAYS if getattr(self, name)]
        if len(ways) != 1:
            found = " and ".join(ways) or "none"
            raise ValueError(f"give one of prompts (a list), dataset (a file), continue_from; there is {found}")
        folders = {folder_name(model) for model in self.models}
        if len(folders) < len(self.models):
            raise ValueError(f"two of the models would share a folder: {', '.join(self.models)}; sample them apart")
        return self


def folder_name(model: str) -> str:
    """What the folder of a model is called, where there are several."""
    return re.sub(r"[^A-Za-z0-9._@+-]+", "_", str(PurePosixPath(model))).strip("._") or "model"


def _put(values: dict[str, Any], name: str, value: Any, given_as: str) -> None:
    """Set a value that was given under another name, unless it contradicts what is there."""
    if value is None:
        return
    there = values.get(name)
    if there not in (None, (), []) and _plain(there) != _plain(value):
        raise ValueError(f"{name} is {there!r}, but {given_as} is {value!r}; set one of them")
    values[name] = value


def _plain(value: Any) -> Any:
    return [str(item) for item in value] if isinstance(value, list | tuple) else str(value)


def _take_api(values: dict[str, Any], api: Mapping[str, Any]) -> None:
    """Each entry is a setting of all backends, or an option of the chosen one."""
    backend = dict(values.get("backend") or {})
    for name, value in api.items():
        place = values if name in CommonConfig.model_fields and name != "backend" else backend
        _put(place, name, value, f"api.{name}")
    if backend:
        values["backend"] = backend
