"""What a run is told: the models behind `--config` files, flags and Prefect parameters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from backends.storage import Location, is_within, resolved
from flows.config.alert import AlertConfig
from flows.config.groups import in_groups
from flows.config.runner import TaskRunnerConfig
from flows.config.templates import check_history_template, check_template

if TYPE_CHECKING:
    from kl.statistics.position_sampling import PositionSample

Estimator = Literal["censored", "floor", "lower", "bucket"]
Stage = Literal["run", "submit", "collect"]

_LONGEST_LIST = 1_000_000  # the backend has the bound that counts; no vocabulary is longer


class BackendChoice(BaseModel):
    """Which backend is asked, and its own options."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(default="vertex_batch", min_length=1, description="Name of a registered backend.")

    @property
    def options(self) -> dict[str, Any]:
        """The options of the backend, not yet validated against it."""
        return dict(self.model_extra or {})


class _ChoiceInTheForm:
    """Prefect's form shows a choice with the options of each, not a mapping to write."""

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        from flows.config.form import backend_schema  # late: it loads the options, a command's help needs none

        return backend_schema(handler)


class CommonConfig(BaseModel):
    """What every flow that calls a backend is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: Annotated[BackendChoice, _ChoiceInTheForm()] = Field(
        default=BackendChoice(),
        description="Where log-probabilities come from: vertex_batch, vertex_online, local, files, or the name of an "
        "installed plugin; in a file also a mapping with 'name' and the backend's options.",
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

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("a yes or no is not allowed here")
        return value

    @field_validator("input_dir", "output_dir", "scores_dir", "reuse_raw", "history", mode="before", check_fields=False)
    @classmethod
    def _path(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.strip():
            raise ValueError("the path is empty")
        # A path in a YAML file or after "=" has not been through a shell.
        return os.path.expanduser(value) if isinstance(value, str) and "://" not in value else value

    @field_validator("input_dir", "output_dir", mode="after", check_fields=False)
    @classmethod
    def _fields_of_folder(cls, value: Any) -> Any:
        if not isinstance(value, tuple):  # what is cleaned are folders that exist
            check_template(str(value))
        return value

    @field_validator("backend", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class PositionsConfig(BaseModel):
    """A part of each response's positions, for a cheaper run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fraction: float | None = Field(default=None, gt=0, le=1, description="Share of the positions, above 0, up to 1.")
    per_response: int | None = Field(default=None, ge=1, description="Positions of each response, at least 1.")
    seed: int = Field(default=0, ge=0, description="Seed of the sample; another seed asks for other positions.")
    first: bool = Field(default=False, description="The first position of each response alone: a canary.")
    repeats: int = Field(
        default=1, ge=1, le=100, description="With first: how many times Q is asked about each position, 1 to 100."
    )

    @model_validator(mode="after")
    def _one_rule(self) -> PositionsConfig:
        if (self.fraction is not None) + (self.per_response is not None) + self.first != 1:
            raise ValueError("set one of fraction (0.2) and per_response (8), or first (true)")
        if self.repeats > 1 and not self.first:
            raise ValueError("repeats is for first positions: set first: true, or leave repeats out")
        return self

    @property
    def sample(self) -> PositionSample:
        """The rule as `kl.statistics.position_sampling` takes it."""
        from kl.statistics.position_sampling import PositionSample  # late: it loads SciPy, a command's help needs none

        return PositionSample(self.fraction, self.per_response, self.seed)


class RunConfig(CommonConfig):
    """One comparison: the responses of model P on disk against model Q."""

    model_config = ConfigDict(json_schema_extra=in_groups)

    input_dir: Location = Field(
        description="Folder with P's responses, one JSON file per prompt; on a disk or in a bucket (gs://BUCKET/FOLDER)."
    )
    output_dir: Location = Field(
        description="Folder for results, on a disk or in a bucket; scores that were bought are kept in it. May have "
        "fields such as {date}, as input_dir may."
    )
    scores_dir: Location | None = Field(
        default=None,
        description="Store of what was bought that several runs share, also at the same moment: on a disk that all of "
        "them see, or in a bucket. Default: OUTPUT_DIR/scores, for this folder's runs alone.",
    )
    model2: str = Field(min_length=1, description="Model Q, as its backend names it.")
    top_logprobs: Annotated[int, Field(ge=1, le=_LONGEST_LIST)] | Literal["full"] = Field(
        default=20,
        description="Candidates asked per position, 1 to what the backend reports (Vertex AI: 20); 'full' adds every "
        "token's log-probability of both models, hence the exact KL (backends with a full vocabulary only).",
    )
    keep_vocabularies: bool = Field(
        default=False,
        description="With top_logprobs 'full', keep every token's log-probability of both models (4 bytes a token "
        "of the vocabulary, position and model) also where the backend reduces them to exact figures itself.",
    )
    wanted_tokens: bool = Field(
        default=False,
        description="Ask Q for its value of every token that P lists, beside its own list (backends that can only): "
        "then nothing that P lists is unknown. Such answers have keys of their own, so that contexts that were asked "
        "without are asked again.",
    )
    pattern: str = Field(default="*.json", min_length=1, description="Which files of the input folder are read (glob).")
    max_files: int | None = Field(default=None, ge=1, description="Read at most this many files, at least 1.")
    responses_per_job: Annotated[int, Field(ge=1, le=100_000)] | Literal["auto"] = Field(
        default="auto",
        description="Responses per group, which is one task and one batch job: 1 to 100000, or auto: one, or with more "
        "responses than jobs may be in flight equal parts, so that all jobs run at once.",
    )
    estimator: Estimator = Field(
        default="censored", description="What is reported as the estimate: censored, floor, lower or bucket."
    )
    positions: PositionsConfig | None = Field(
        default=None,
        description="Ask a sample of the positions only: a share of them, {fraction: 0.2}, so many of each response, "
        "{per_response: 8}, or the first alone, {first: true, repeats: 4}, each asked so many times. Default: all.",
    )
    noise_floor: PositionsConfig | None = Field(
        default=None,
        description="Ask P's own model again at a sample of the measured positions, such as {fraction: 0.05}, and "
        "report how far it is from itself; where P cannot be asked, or alert is of: q, Q is asked twice. Default: no.",
    )
    force: bool = Field(
        default=False, description="Go on although the two models' tokens do not match (other tokenizers)."
    )
    candidates: bool = Field(
        default=True,
        description="Keep both models' lists of every position, as they were compared, in candidates.parquet (about "
        "500 bytes a position with 20 candidates).",
    )
    max_cost_usd: float | None = Field(
        default=None, ge=0, description="Refuse to start if the estimated cost in USD is above this, at least 0."
    )
    preflight: bool = Field(
        default=True, description="Prove with two tiny requests that the model can be used before anything is bought."
    )
    keep_raw: bool = Field(
        default=False, description="Keep the service's own rows, compressed, in OUTPUT_DIR/scores/raw."
    )
    reuse_raw: Location | None = Field(
        default=None, description="Output folder of a run with keep_raw: its rows are read again, without a call."
    )
    history: Location | None = Field(
        default=None,
        description="File that gets a row for each finished run. Default: history.parquet in the part of output_dir "
        "before its first field.",
    )
    alert: AlertConfig | None = Field(
        default=None,
        description="When the run counts as drifted, such as {kl_per_token: 0.01, compared_with: previous}. Default: "
        "never.",
    )
    fail_on_drift: bool = Field(default=False, description="A run that drifted ends as failed, with exit code 4.")
    stage: Stage = Field(
        default="run",
        description="run: ask, wait and measure. submit: make the batch jobs and end. collect: take in what has ended, "
        "and measure when everything has; nothing waits in between.",
    )
    task_runner: TaskRunnerConfig = Field(
        default=TaskRunnerConfig(),
        description="What works on the tasks: threads of one process, dask or ray; in a file also a mapping with the "
        "address or size of a cluster, such as {kind: dask, address: 'tcp://host:8786'}. Default: threads.",
    )
    dry_run: bool = Field(default=False, description="Say what would be asked and what it costs; call nothing.")

    @field_validator("top_logprobs", mode="before")
    @classmethod
    def _top_logprobs_range(cls, value: Any) -> Any:
        if value == "full":
            return value
        return _whole_number(
            value,
            _LONGEST_LIST,
            "must be 1 or more candidates per position, as many as the backend reports, or 'full'",
        )

    @field_validator("responses_per_job", mode="before")
    @classmethod
    def _responses_per_job_range(cls, value: Any) -> Any:
        if value == "auto":
            return value
        return _whole_number(value, 100_000, "must be from 1 to 100000 responses, or 'auto'")

    @field_validator("history", mode="after")
    @classmethod
    def _fields_of_history(cls, value: Path | None) -> Path | None:
        if value is not None:
            check_history_template(str(value))
        return value

    @model_validator(mode="after")
    def _drift_is_defined(self) -> RunConfig:
        if self.fail_on_drift and self.alert is None:
            raise ValueError("fail_on_drift needs alert.kl_per_token, which says what drift is")
        if self.watches_q and not self.candidates:
            raise ValueError("alert.of: q compares the lists of two runs, which candidates: false does not keep")
        if self.watches_q and self.scores_dir is not None:
            raise ValueError(
                f"alert.of: q asks what Q says now, but scores_dir ({self.scores_dir}) gives this run the answers of "
                "earlier ones, so that no change could show; leave scores_dir out"
            )
        return self

    @model_validator(mode="after")
    def _first_positions_alone(self) -> RunConfig:
        if self.noise_floor is not None and self.noise_floor.first:
            raise ValueError("noise_floor asks again at a sample of positions: fraction or per_response, not first")
        if self.first_repeats is not None:
            beside = {
                "noise_floor": (self.noise_floor is not None, "repeats asks again"),
                "top_logprobs 'full'": (self.full_vocabulary, "lists are compared"),
                "wanted_tokens": (self.wanted_tokens, "Q's own lists are compared"),
            }
            for name, (is_set, why) in beside.items():
                if is_set:
                    raise ValueError(f"positions.first goes without {name}: {why}; leave one of the two out")
        elif self.alert is not None and self.alert.test == "permutation":
            raise ValueError("alert.test: permutation is for positions: {first: true}; set that, or test: interval")
        return self

    @model_validator(mode="after")
    def _wanted_beside_a_list(self) -> RunConfig:
        if self.wanted_tokens and self.full_vocabulary:
            raise ValueError("wanted_tokens adds nothing to top_logprobs 'full', which has every token; leave one out")
        return self

    @model_validator(mode="after")
    def _separate_folders(self) -> RunConfig:
        if resolved(self.input_dir) == resolved(self.output_dir):
            raise ValueError(f"output_dir is the input_dir ({self.input_dir}); results would be read as responses")
        if self.scores_dir is None:
            return self
        for name, folder in (("input_dir", self.input_dir), ("output_dir", self.output_dir)):
            if is_within(self.scores_dir, folder):
                raise ValueError(f"scores_dir is in the {name} ({folder}); a store that runs share has its own place")
        if {"{", "}"} & set(str(self.scores_dir)):
            raise ValueError(f"scores_dir has no fields such as {{date}}, but is {str(self.scores_dir)!r}")
        return self

    @property
    def k(self) -> int:
        """Candidates asked per position."""
        return 20 if self.top_logprobs == "full" else self.top_logprobs

    @property
    def first_repeats(self) -> int | None:
        """How many times Q is asked about each first position; None if others are measured too."""
        return self.positions.repeats if self.positions is not None and self.positions.first else None

    @property
    def watches_q(self) -> bool:
        """Whether Q is compared with what it said in an earlier run."""
        return self.alert is not None and self.alert.of == "q"

    @property
    def full_vocabulary(self) -> bool:
        """Whether every token's log-probability is asked, of both models."""
        return self.top_logprobs == "full"


def _whole_number(value: Any, most: int, rule: str) -> int:
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= most:
        raise ValueError(rule)
    return number
