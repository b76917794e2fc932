"""From the settings to the backend that is asked: its class, its options, and whether it can do what is wanted."""

from __future__ import annotations

import os
from typing import Any

from backends.base import Backend, BackendOptions
from backends.errors import ConfigError
from backends.registry import deferred_backends, load_backend, parse_options
from flows.config.models import CommonConfig, RunConfig


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
    if config.stage != "run" and not can.deferred:
        raise ConfigError(
            f"stage is {config.stage!r}, but the backend {config.backend.name} has no jobs that outlive the process. "
            f"Leave the stage out, or set a backend that has: {', '.join(deferred_backends()) or 'none is installed'}."
        )
    if config.noise_floor is not None and can.recorded:
        raise ConfigError(
            f"noise_floor asks contexts a second time, and the backend {config.backend.name} has one answer to each on "
            "record: leave it out, and compare two logs of one model instead."
        )
    if config.first_repeats is not None and config.first_repeats > 1 and can.recorded:
        raise ConfigError(
            f"positions.repeats asks contexts more than once, and the backend {config.backend.name} has one answer to "
            "each on record: leave it out."
        )
    if config.full_vocabulary and not can.full_vocabulary:
        raise ConfigError(
            f"top_logprobs is 'full', but the backend {config.backend.name} reports at most {can.max_top_logprobs} "
            f"candidates per position. Set top_logprobs to {can.max_top_logprobs} or less."
        )
    if config.wanted_tokens and not can.wanted_tokens:
        raise ConfigError(
            f"wanted_tokens is on, but the backend {config.backend.name} cannot be asked for tokens by name. "
            "Leave it out."
        )
    if config.k > can.max_top_logprobs:
        raise ConfigError(
            f"top_logprobs is {config.k}, but the backend {config.backend.name} reports at most {can.max_top_logprobs}."
        )
