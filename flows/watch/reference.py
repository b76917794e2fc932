"""The earlier run that a run is compared with: its response table, and what it was."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import polars as pl

from backends.errors import ConfigError
from backends.storage import as_location
from flows.config.models import RunConfig
from flows.folder.finished import ResponseTableFile, q_lists, read_documents, read_response_table
from flows.folder.layout import OutputFolder
from flows.watch.history import Row


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


def load_baseline(folder: Path, config: RunConfig) -> Reference:
    """The run in ``folder``, if it is finished and its figures mean the same as those of ``config``.

    Raises
    ------
    ConfigError
        With what is wrong.
    """
    name = f"alert.compared_with: the baseline {folder}"
    try:
        summary, run = read_documents(folder)
        table = read_response_table(folder).table
        if config.watches_q:
            q_lists(folder, name)
        same = {"estimator": config.estimator, "top_logprobs": config.k, "wanted_tokens": config.wanted_tokens}
        same["positions.first"] = config.first_repeats is not None
        positions: dict[str, Any] = run["config"].get("positions") or {}
        # What a document of an earlier version does not say.
        measured = {"wanted_tokens": False, **summary, "positions.first": positions.get("first", False)}
        for setting, value in same.items():
            if measured[setting] != value:
                raise ConfigError(
                    f"it was measured with {setting} = {measured[setting]!r}, this run with {value!r}: the difference "
                    "would be of methods, not of models. Use the same setting, or another baseline."
                )
        if config.watches_q and run["model2"] != config.model2:
            raise ConfigError(
                f"its Q was {run['model2']!r} and is {config.model2!r} in this run; alert.of: q compares a "
                "model with itself. Use another baseline; python -m flows.analyze --compare shows the KL of two models."
            )
        about = {key: run[key] for key in ("model1", "model2", "model2_versions", "finished_at")}
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    except KeyError as error:
        raise ConfigError(f"{name} cannot be read: it says nothing of {error}.") from error
    return Reference("baseline", str(folder), table, about)


def load_previous(row: Row, output_dir: Path, standing: ResponseTableFile | None) -> Reference:
    """The run of a history row. Its table must still be the one that it wrote.

    Parameters
    ----------
    standing : ResponseTableFile, optional
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
        raise ConfigError(f"{name} cannot be compared with: {OutputFolder(folder).responses} is not there any more.")
    if found.sha256 != row["responses_sha256"]:
        raise ConfigError(f"{name} cannot be compared with: {OutputFolder(folder).responses} was overwritten since.")
    about = {key: row[key] for key in ("model1", "model2", "model1_versions", "model2_versions", "flow_run_name")}
    return Reference("previous", str(folder), found.table, about | {"finished_at": row["finished_at"].isoformat()})
