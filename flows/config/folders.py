"""The folders of a run: their fields filled in, and what is recorded and printed of that."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backends.errors import ConfigError
from backends.storage import as_location, resolved
from flows.config.models import RunConfig
from flows.config.templates import RunValues, escaped, fill, fixed_part, has_fields
from flows.folder.layout import HISTORY_FILE

SETTINGS = ("input_dir", "output_dir", "history")


def resolve_folders(config: RunConfig, values: RunValues) -> RunConfig:
    """The configuration with every folder filled in, and the place of its history.

    Raises
    ------
    ConfigError
        As `fill`; or if input and output become one folder, or the history has no place.
    """
    template = str(config.output_dir)
    output_dir = as_location(fill(template, values))
    input_dir = as_location(fill(str(config.input_dir), values))
    if resolved(input_dir) == resolved(output_dir):
        raise ConfigError(f"output_dir is the input_dir ({input_dir}); results would be read as responses.")
    history = default_history(template) if config.history is None else fill(str(config.history), values)
    changes: dict[str, Any] = {"input_dir": input_dir, "output_dir": output_dir, "history": as_location(history)}
    if config.alert is not None:
        changes["alert"] = config.alert.with_folder(lambda path: as_location(fill(str(path), values)))
    return config.model_copy(update=changes)


def pinning_flags(config: RunConfig, filled: RunConfig) -> list[str]:
    """Flags by which another run, on whatever day, uses the folders of this one; none if no folder has fields."""
    if not any(has_fields(str(getattr(config, name))) for name in ("input_dir", "output_dir")):
        return []
    return [text for name in SETTINGS for text in (f"--{name.replace('_', '-')}", escaped(str(getattr(filled, name))))]


def default_history(template: str) -> str:
    """``history.parquet`` in the part of an output folder's name before its first field.

    Raises
    ------
    ConfigError
        If that part is not even a bucket.
    """
    fixed = fixed_part(template)
    if not has_fields(template):
        return f"{fixed.rstrip('/')}/{HISTORY_FILE}"
    folder = fixed[: max(fixed.rfind("/"), fixed.rfind(os.sep)) + 1]
    if folder.endswith("://"):
        raise ConfigError(f"output_dir = {template!r} starts with a field; set history to a path for the history file.")
    return folder + HISTORY_FILE


def folder_record(config: RunConfig, filled: RunConfig) -> Mapping[str, Mapping[str, str | None]]:
    """What was written and what it stands for, of every folder with a setting, for ``run.json``."""
    pairs: dict[str, tuple[Path | None, Path | None]] = {
        name: (getattr(config, name), getattr(filled, name)) for name in SETTINGS
    }
    if config.alert is not None and filled.alert is not None:
        pairs["alert.compared_with.baseline"] = (config.alert.baseline, filled.alert.baseline)
    return {
        name: {"template": None if template is None else str(template), "resolved": str(path)}
        for name, (template, path) in pairs.items()
        if path is not None
    }
