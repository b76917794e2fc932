"""The earlier run that a run is compared with: its response table, and what it was."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import polars as pl

from backends.errors import ConfigError
from backends.storage.files import as_location, exists, read_bytes
from flows.config.models import RunConfig
from flows.watch.history import Row
from kl.statistics.drift import COLUMNS

_RESPONSES = "responses.parquet"
_UNFINISHED = ".parts"


class ResponseFile(NamedTuple):
    """A response table as it was read, with the hash of its file."""

    sha256: str
    table: pl.DataFrame


@dataclass(frozen=True, slots=True)
class Reference:
    """An earlier run; ``about`` says what is known of it, in JSON types."""

    kind: Literal["previous", "baseline"]
    folder: str
    responses: pl.DataFrame
    about: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def label(self) -> str:
        """How the run is called in a sentence."""
        when = str(self.about.get("finished_at") or "")[:10]
        of = f"the {self.kind} run" if self.kind == "previous" else "the baseline"
        return f"{of}{f' of {when}' if when else ''} in {self.folder}"


def read_response_table(folder: Path) -> ResponseFile:
    """The response table in an output folder, read whole.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ConfigError
        If it cannot be read, or lacks columns.
    """
    path = folder / _RESPONSES
    data = read_bytes(path)
    try:
        table = pl.read_parquet(io.BytesIO(data))
        lacking = [name for name in COLUMNS if name not in table.columns]
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if lacking:
        raise ConfigError(f"{path} was written by another version (no {', '.join(lacking)}).")
    return ResponseFile(hashlib.sha256(data).hexdigest(), table.select(COLUMNS))


def load_baseline(folder: Path, config: RunConfig) -> Reference:
    """The run in ``folder``, if it is finished and its figures mean the same as those of ``config``.

    Raises
    ------
    ConfigError
        With what is wrong.
    """
    name = f"alert.compared_with: the baseline {folder}"
    if exists(folder / _UNFINISHED):
        raise ConfigError(f"{name} is not finished: wait for that run to end.")
    try:
        table = read_response_table(folder).table
        summary: Any = json.loads(read_bytes(folder / "summary.json"))
        run: Any = json.loads(read_bytes(folder / "run.json"))
        same = {"estimator": config.estimator, "top_logprobs": config.k}
        for setting, value in same.items():
            if summary[setting] != value:
                raise ConfigError(
                    f"{name} was measured with {setting} = {summary[setting]!r}, this run with {value!r}: "
                    "the difference would be of methods, not of models. Use the same setting, or another baseline."
                )
        about = {key: run[key] for key in ("model1", "model2", "model2_versions", "finished_at")}
    except FileNotFoundError as error:
        needed = f"{_RESPONSES}, summary.json and run.json must be there"
        raise ConfigError(f"{name} holds no finished run: {needed}.") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name} cannot be read: {type(error).__name__}: {error}.") from error
    return Reference("baseline", str(folder), table, about)


def load_previous(row: Row, output_dir: Path, standing: ResponseFile | None) -> Reference:
    """The run of a history row. Its table must still be the one that it wrote.

    Parameters
    ----------
    standing : ResponseFile, optional
        What this run found in its own output folder before it wrote there.

    Raises
    ------
    ConfigError
        If the table is gone or was overwritten.
    """
    folder = as_location(row["output_dir"])
    name = f"the previous run {row['flow_run_name'] or row['run_id']}"
    if str(folder) == str(output_dir):
        found = standing
    else:
        try:
            found = read_response_table(folder)
        except FileNotFoundError:
            found = None
    if found is None:
        raise ConfigError(f"{name} cannot be compared with: {folder / _RESPONSES} is not there any more.")
    if found.sha256 != row["responses_sha256"]:
        raise ConfigError(f"{name} cannot be compared with: {folder / _RESPONSES} was overwritten since.")
    about = {key: row[key] for key in ("model1", "model2", "model1_versions", "model2_versions", "flow_run_name")}
    return Reference("previous", str(folder), found.table, about | {"finished_at": row["finished_at"].isoformat()})
