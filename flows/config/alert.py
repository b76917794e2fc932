"""When a run counts as drifted: the settings of ``alert``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from backends.storage import Location, as_location
from flows.config.templates import check_template

_NAME_IT = "write previous, or {baseline: FOLDER} with the output folder of an earlier run"
_WRITE = f"{_NAME_IT}, or leave it out"


class Baseline(BaseModel):
    """An earlier run, by its output folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    baseline: Location = Field(description="Output folder of an earlier run; may have fields such as {yesterday}.")


# In a deployment's parameters the short form must pass Prefect's own check of the schema, which is made before ours.
ComparedWith = Annotated[
    Literal["previous"] | Baseline | None,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "description": "previous, or baseline: FOLDER"},
                {"type": "object", "properties": {"baseline": {"type": "string"}}, "required": ["baseline"]},
                {"type": "null"},
            ]
        }
    ),
]


class AlertConfig(BaseModel):
    """Whether the KL per token is too large, or has risen, or Q has changed: decided on the interval, not the point."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kl_per_token: float = Field(
        ge=0,
        allow_inf_nan=False,
        description="Nats, at least 0. With compared_with: drift is a rise by more than this, 0 for any rise. Without: "
        "a KL per token above this. With of: q: a KL of Q then from Q now above this, less the noise floor.",
    )
    of: Literal["pq", "q"] = Field(
        default="pq",
        description="What is watched: pq, the KL of P from Q; or q, the KL of Q in the run of compared_with from Q "
        "now, over the contexts that both runs asked.",
    )
    compared_with: ComparedWith = Field(
        default=None,
        description="The run to compare with: previous (the last one in the history with the same models, estimator "
        "and top_logprobs), or {baseline: FOLDER}. Default: none.",
    )
    test: Literal["interval", "permutation"] = Field(
        default="interval",
        description="What decides: interval, whose lower end must be above kl_per_token; or permutation, for first "
        "positions (of: q, compared_with: previous): whether Q's lists are unlike those of the last runs.",
    )
    level: float = Field(
        default=0.99,
        gt=0.5,
        lt=1,
        description="Confidence that its lower end is not too high, above 0.5, below 1: of pairs of runs of unchanged "
        "models, a share of 1 - level raises an alert.",
    )

    @field_validator("kl_per_token", "level", mode="before")
    @classmethod
    def _no_boolean_as_number(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("a yes or no is not allowed here")
        return value

    @field_validator("compared_with", mode="before")
    @classmethod
    def _compared_with(cls, value: Any) -> Any:
        if value is None or isinstance(value, Baseline):
            return value
        if isinstance(value, str):
            if value.strip() == "previous":
                return "previous"
            name, colon, path = value.partition(":")
            value = {name.strip(): path.strip()} if colon else value
        if not isinstance(value, Mapping) or list(cast(Mapping[str, Any], value)) != ["baseline"]:
            raise ValueError(_WRITE)
        return Baseline(baseline=_folder(cast(Mapping[str, Any], value)["baseline"]))

    @model_validator(mode="after")
    def _then_is_known(self) -> AlertConfig:
        if self.of == "q" and self.compared_with is None:
            raise ValueError(f"of: q compares Q now with Q in an earlier run, which compared_with names; {_NAME_IT}")
        if self.test == "permutation" and (self.of != "q" or self.compared_with != "previous"):
            raise ValueError(
                "test: permutation compares Q's lists with those of the last runs of the history: set of: q and "
                "compared_with: previous"
            )
        return self

    @property
    def baseline(self) -> Path | None:
        """The earlier run's folder, if one is named."""
        return self.compared_with.baseline if isinstance(self.compared_with, Baseline) else None

    def with_folder(self, filled: Callable[[Path], Path]) -> AlertConfig:
        """The same with its folder, if it names one, as ``filled`` gives it."""
        if self.baseline is None:
            return self
        found = Baseline.model_construct(baseline=filled(self.baseline))
        return self.model_copy(update={"compared_with": found})


def _folder(value: Any) -> Path:
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"the folder of the baseline is empty; {_WRITE}")
    if isinstance(value, str) and "://" not in value:
        value = os.path.expanduser(value)
    if not isinstance(value, str | Path) and not hasattr(value, "storage_options"):
        raise ValueError(_WRITE)
    check_template(str(value))
    return as_location(value)
