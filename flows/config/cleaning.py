"""What cleaning is told."""

from __future__ import annotations

import logging
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from backends.storage import Location
from flows.config.models import CommonConfig, RunConfig
from flows.config.sampling import SampleConfig

logger = logging.getLogger("flows.clean")

_DEFAULT_LIFECYCLE_DAYS = 7
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_LONGEST = timedelta(days=36_500)


class CleanConfig(CommonConfig):
    """What is cleaned. The configuration file of a run will do: what concerns the run alone is left aside."""

    location: str | None = Field(
        default=None,
        min_length=1,
        description="Vertex AI location in which the jobs ran. Default: GOOGLE_CLOUD_LOCATION, else us-central1.",
    )
    bucket_name: str | None = Field(
        default=None,
        min_length=3,
        max_length=222,
        description="Bucket of the batch files, 3 to 222 characters. Default: {project_id}-kl-batch.",
    )
    older_than: str = Field(
        default="7d",
        description="Age from which files may go: a number and s, m, h, d or w, such as 30m, 12h, 7d, 2w.",
    )
    output_dir: tuple[Location, ...] = Field(
        default=(), description="Output folder of a run whose unread batch output must stay; may be repeated."
    )
    scores_dir: tuple[Location, ...] = Field(
        default=(),
        description="Store that runs share, whose unread batch output must stay, whichever of them it is for; may be "
        "repeated. That of an --output-dir is known.",
    )
    set_lifecycle: bool = Field(
        default=False,
        description="Also give the bucket a lifecycle rule that deletes everything below the two prefixes after "
        "--lifecycle-days; rules of others stay. The rule knows nothing of jobs and runs.",
    )
    lifecycle_days: int | None = Field(
        default=None,
        ge=1,
        le=36_500,
        description="Days of the lifecycle rule, 1 to 36500; implies --set-lifecycle, which alone means "
        f"{_DEFAULT_LIFECYCLE_DAYS}.",
    )
    yes: bool = Field(default=False, description="Do it. Without this, nothing is changed.")

    @model_validator(mode="before")
    @classmethod
    def _without_settings_of_runs(cls, values: Any) -> Any:
        known = set(RunConfig.model_fields) | set(SampleConfig.model_fields)
        unused = sorted((set(values) & known) - set(cls.model_fields) | (set(values) & {"max_concurrent"}))
        if unused:
            logger.info("settings of a run, of no use here: %s", ", ".join(unused))
        return {name: value for name, value in values.items() if name not in unused}

    @field_validator("output_dir", "scores_dir", mode="before")
    @classmethod
    def _one_folder(cls, value: Any) -> Any:
        return () if value is None else (value,) if isinstance(value, str | Path) else value

    @field_validator("older_than")
    @classmethod
    def _duration(cls, value: str) -> str:
        parse_duration(value)
        return value

    @property
    def rule_days(self) -> int | None:
        """The days of the lifecycle rule; None if no rule is asked for."""
        if self.lifecycle_days is None and not self.set_lifecycle:
            return None
        return self.lifecycle_days or _DEFAULT_LIFECYCLE_DAYS


def parse_duration(text: str) -> timedelta:
    """The time that ``30m``, ``12h``, ``7d`` or ``2w`` means.

    Raises
    ------
    ValueError
        If it is not a whole number with a unit, or longer than a century.
    """
    match = re.fullmatch(r"([0-9]{1,8})([smhdw])", text.strip())
    duration = timedelta(**{_UNITS[match[2]]: int(match[1])}) if match else None
    if duration is None or duration > _LONGEST:
        raise ValueError("must be a whole number with a unit, at most 36500d")
    return duration
