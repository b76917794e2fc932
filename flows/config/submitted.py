"""Submissions to folders whose names have fields: what the fields stood for, for the collects of other days.

A folder with ``{date}`` in its name is another one tomorrow, when the jobs that were made for it today may have ended.
So a submission is on record, a file each, beside the folders, until what it bought was measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from backends.errors import ConfigError
from backends.storage import as_location, files_in, read_bytes, remove, resolved, write_bytes_atomic
from flows.config.folders import default_history
from flows.config.models import RunConfig
from flows.config.templates import RunValues, fill, has_fields

_SUFFIX = ".json"


def values_for(written: RunConfig, values: RunValues) -> RunValues:
    """What the fields of folders stand for in a run: for a collect, in the oldest submission that was not measured.

    Raises
    ------
    ConfigError
        If the record of a submission cannot be read.
    """
    if written.stage != "collect":
        return values
    return next((found for _, found in _submissions(written)), values)


def note_submission(written: RunConfig, output_dir: Path, values: RunValues) -> None:
    """Put a submission on record, before its first job is made; once for each folder."""
    if has_fields(str(written.output_dir)) and not list(_of(written, output_dir)):
        _write(written, values, values.scheduled_for)


def forget_submission(written: RunConfig, output_dir: Path) -> None:
    """What was submitted to a folder was measured."""
    for path, _ in _of(written, output_dir):
        remove(path)


def put_last(written: RunConfig, output_dir: Path) -> None:
    """Look at the other submissions first: nothing comes of this one by waiting."""
    for path, values in list(_of(written, output_dir)):
        _write(written, values, datetime.now(UTC))
        remove(path)


def _of(written: RunConfig, output_dir: Path) -> Iterator[tuple[Path, RunValues]]:
    for path, values in _submissions(written):
        if resolved(as_location(fill(str(written.output_dir), values))) == resolved(output_dir):
            yield path, values


def _submissions(written: RunConfig) -> Iterator[tuple[Path, RunValues]]:
    if not has_fields(str(written.output_dir)):
        return
    folder, name = _place(written)
    for path in files_in(folder, _SUFFIX):
        if path.name.startswith(name):
            yield path, _read(path)


def _place(written: RunConfig) -> tuple[Path, str]:
    """The folder of the records, and how the names of those begin that are of one template."""
    template = str(written.output_dir)
    folder = as_location(default_history(template)).parent / ".submitted"
    return folder, hashlib.sha256(template.encode("utf-8")).hexdigest()[:16]


def _write(written: RunConfig, values: RunValues, turn: datetime) -> None:
    folder, name = _place(written)
    record = asdict(values) | {"scheduled_for": values.scheduled_for.isoformat()}
    path = folder / f"{name}-{turn:%Y%m%dT%H%M%S%f}{_SUFFIX}"
    write_bytes_atomic(path, json.dumps(record).encode("utf-8"))


def _read(path: Path) -> RunValues:
    try:
        record = json.loads(read_bytes(path))
        return RunValues(**record | {"scheduled_for": datetime.fromisoformat(record["scheduled_for"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"the record of a submission {path} cannot be read ({error}). Remove it, and collect that day by hand: "
            "--output-dir FOLDER --stage collect."
        ) from error
