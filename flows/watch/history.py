"""`history.parquet`: one row for each finished run, appended safely by runs that end at the same time."""

from __future__ import annotations

import io
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl

from backends.errors import ConfigError
from backends.storage import as_location, read_bytes, write_bytes_atomic
from flows.folder.layout import HISTORY_FILE
from flows.folder.lock import exclusive

VERSION = 5
_TIME = pl.Datetime("us", "UTC")
_DIVERGENCES = ("kl_per_token", "kl_per_response")
# A run that lacks much more of what it asked than the one that is compared with it is no reference for it.
_VERSIONS = ("model1_versions", "model2_versions")
_SHARE_TOLERANCE = 0.05

# null = not known. A column is only ever added, with a higher VERSION: older rows then hold null there.
HISTORY = pl.Schema(
    {
        "history_version": pl.Int32,
        "run_id": pl.String,  # of the flow run; its retry replaces the row
        "flow_run_name": pl.String,
        "deployment": pl.String,
        "started_at": _TIME,
        "finished_at": _TIME,
        "scheduled_for": _TIME,
        "output_dir": pl.String,  # fields filled in
        "model1": pl.String,  # P; several names are joined with ", "
        "model2": pl.String,  # Q
        "model1_versions": pl.List(pl.String),
        "model2_versions": pl.List(pl.String),
        "estimator": pl.String,
        "top_logprobs": pl.Int64,
        "positions_sampled": pl.Boolean,
        "prompts": pl.Int64,  # the clusters of the intervals
        "responses": pl.Int64,
        "positions": pl.Int64,
        "measured": pl.Int64,
        "missing": pl.Int64,  # asked and not measured
        # Nats; the interval is that of summary.json (95 %).
        **{
            f"{name}{suffix}": pl.Float64
            for name in _DIVERGENCES
            for suffix in ("", "_low", "_high", "_certified_lower", "_plausible_upper")
        },
        "reverse_kl_per_token": pl.Float64,
        "js_per_token": pl.Float64,
        "same_top_rate": pl.Float64,
        "contexts": pl.Int64,  # distinct ones
        "contexts_on_disk": pl.Int64,
        "contexts_asked": pl.Int64,
        "input_tokens": pl.Int64,  # by the service's own counts, in this run
        "output_tokens": pl.Int64,
        "cost_usd": pl.Float64,  # null if no price is known
        "drift": pl.String,  # drift, no drift, undecided; null without an alert
        "drift_difference": pl.Float64,  # nats per token, less the reference if there is one
        "drift_low": pl.Float64,
        "drift_high": pl.Float64,
        "drift_level": pl.Float64,
        "drift_threshold": pl.Float64,
        "drift_reference": pl.String,  # folder of the run compared with
        "events": pl.List(pl.String),  # names of the events that the run emitted
        "exit_status": pl.Int32,
        # Nats per token, of a model against itself asked again, with the interval of summary.json.
        "noise_floor": pl.Float64,
        "noise_floor_low": pl.Float64,
        "noise_floor_high": pl.Float64,
        "noise_floor_of": pl.String,  # p, q, both
        "above_noise_floor": pl.Boolean,  # whether all of the interval of the KL of Q less the floor is above 0
        "responses_sha256": pl.String,  # of responses.parquet, by which a later run knows that it is still this one
        "wanted_tokens": pl.Boolean,  # whether Q was asked for its value of every token that P lists; null: no
        "drift_of": pl.String,  # what the alert watches: pq, q; null without an alert, or before version 4: pq
        # KL(Q then‖Q now) in nats per token, with the 95 % interval, over so many contexts of both runs; alert of q.
        **{f"then_now{suffix}": pl.Float64 for suffix in ("", "_low", "_high", "_certified_lower")},
        "then_now_contexts": pl.Int64,
        "first_repeats": pl.Int32,  # times that Q was asked about each first position; null: others were measured too
        # Of test: permutation: distance of Q's lists from those of the earlier runs beyond noise is drift_difference.
        "canary_distance": pl.Float64,  # nats per first position, with the noise
        "canary_limit": pl.Float64,
        "canary_p": pl.Float64,
    }
)

Row = dict[str, Any]


def read_history(path: Path) -> pl.DataFrame:
    """All rows, those of the runs that ended last at the end; no rows if there is no file yet.

    Columns of a later version are kept, those that an earlier version lacks are null.

    Raises
    ------
    ConfigError
        If the file is no history. It is left as it is.
    """
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        return pl.DataFrame(schema=HISTORY)
    except OSError as error:
        raise ConfigError(f"the history {path} cannot be read: {error.strerror or error}.") from error
    try:
        frame = pl.read_parquet(io.BytesIO(data))
        if "run_id" not in frame.columns:
            raise ValueError("it has no column run_id")
        known = [pl.col(name).cast(HISTORY[name]) for name in frame.columns if name in HISTORY]
        return _joined(pl.DataFrame(schema=HISTORY), frame.with_columns(known))
    except (pl.exceptions.PolarsError, ValueError, OSError) as error:
        words = " ".join(str(error).split())
        raise ConfigError(
            f"{path} is no history of runs ({words}). Nothing was written to it; move it away, or set history to "
            "another file."
        ) from error


def _joined(first: pl.DataFrame, second: pl.DataFrame) -> pl.DataFrame:
    return pl.concat([first, second], how="diagonal")


def check_history(path: Path) -> pl.DataFrame:
    """Prove that a run will be able to add its row, before it buys anything; returns the rows that there are.

    Raises
    ------
    ConfigError
        If the file is no history, or its folder cannot be written to.
    """
    try:
        with exclusive(path):
            return read_history(path)
    except OSError as error:
        raise ConfigError(f"the history {path} cannot be written: {error.strerror or error}.") from error


def record_row(path: Path, row: Row) -> pl.DataFrame:
    """Add a run's row, or replace it if the run has one; nothing of other runs is lost, whoever writes at once.

    Returns
    -------
    pl.DataFrame
        The rows that were there before, in order.

    Raises
    ------
    ConfigError
        As `read_history`, or if others hold the file for too long.
    OSError
        If it cannot be written.
    """
    added = pl.DataFrame([row], schema=HISTORY)
    with exclusive(path):
        before = read_history(path)
        others = before.filter(pl.col("run_id").ne_missing(pl.lit(row["run_id"])))
        buffer = io.BytesIO()
        _joined(others, added).write_parquet(buffer)
        write_bytes_atomic(path, buffer.getvalue())
    return before


def row_of(summary: Mapping[str, Any], run: Mapping[str, Any]) -> Row:
    """A finished run's figures, from its ``summary.json`` and ``run.json``, without who ran it and without drift."""
    counts, config = summary["counts"], run["config"]
    divergences = {
        f"{name}{suffix}": value for name in _DIVERGENCES for suffix, value in _divergence_values(summary[name]).items()
    }
    proven = run.get("preflight_version")
    return divergences | {
        "history_version": VERSION,
        "started_at": _time(run["started_at"]),
        "finished_at": _time(run["finished_at"]),
        "output_dir": config["output_dir"],
        "model1": ", ".join(run["model1"]) or None,
        "model2": run["model2"],
        "model1_versions": run["model1_versions"],
        "model2_versions": sorted({*run["model2_versions"], *([proven] if proven else [])}),
        "estimator": summary["estimator"],
        "top_logprobs": summary["top_logprobs"],
        "positions_sampled": config["positions"] is not None,
        "first_repeats": _first_repeats(config["positions"]),
        "wanted_tokens": summary["wanted_tokens"],
        **{name: counts[name] for name in ("prompts", "responses", "positions", "measured", "missing")},
        "reverse_kl_per_token": summary["reverse_kl_per_token"]["value"],
        "js_per_token": summary["js_per_token"]["value"],
        "same_top_rate": summary["same_top_p"]["value"],
        **{name: run[name] for name in ("contexts", "contexts_on_disk", "contexts_asked")},
        **_spent(run["spent"]),
        **_noise_values(summary["noise_floor"]),
    }


def _first_repeats(positions: Mapping[str, Any] | None) -> int | None:
    return positions["repeats"] if positions is not None and positions["first"] else None


def _divergence_values(divergence: Mapping[str, Any]) -> dict[str, float | None]:
    estimate = divergence["estimate"]
    return {
        "": estimate["value"],
        "_low": estimate["ci_low"],
        "_high": estimate["ci_high"],
        "_certified_lower": divergence["lower"]["value"],
        "_plausible_upper": divergence["plausible_upper"]["value"],
    }


def _noise_values(floor: Mapping[str, Any] | None) -> Row:
    if floor is None:
        return {"noise_floor": None}
    estimate = floor["kl_per_token"]
    return {
        "noise_floor": estimate["value"],
        "noise_floor_low": estimate["ci_low"],
        "noise_floor_high": estimate["ci_high"],
        "noise_floor_of": floor["of"],
        "above_noise_floor": floor["above"],
    }


def _spent(spent: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    costs = [counts["cost_usd"] for counts in spent.values()]
    return {
        "input_tokens": sum(counts["input_tokens"] for counts in spent.values()),
        "output_tokens": sum(counts["output_tokens"] for counts in spent.values()),
        "cost_usd": None if None in costs else float(sum(costs)),
    }


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def previous_run(before: pl.DataFrame, row: Row, *, other_folders_only: bool) -> Row | None:
    """The last run to compare one with: the same models, estimator and lists asked for, and about as complete.

    Parameters
    ----------
    before : pl.DataFrame
        From `record_row`.
    other_folders_only : bool
        Runs in the same output folder are the same measurement, gone on with; true where a folder is of one day.
    """
    found = _alike(before, row, other_folders_only)
    return found.row(-1, named=True) if found.height else None


def earlier_runs(before: pl.DataFrame, row: Row, most: int) -> list[Row]:
    """The last runs to compare one with, each of a folder of its own, from the last that drifted on."""
    found = _alike(before, row, other_folders_only=True).unique("output_dir", keep="last", maintain_order=True)
    since = found.filter((pl.col("drift") == "drift").fill_null(False).reverse().cum_sum().reverse() == 0)
    drifted = found.filter(pl.col("drift") == "drift").tail(1)
    return pl.concat([drifted, since]).tail(most).to_dicts()


def _alike(before: pl.DataFrame, row: Row, other_folders_only: bool) -> pl.DataFrame:
    share = pl.col("measured") / (pl.col("measured") + pl.col("missing"))
    asked = row["measured"] + row["missing"]
    alike = [pl.col(name).eq_missing(pl.lit(row[name])) for name in ("model1", "model2", "estimator", "top_logprobs")]
    return _others(before, row).filter(
        *alike,
        pl.col("first_repeats").eq_missing(pl.lit(row.get("first_repeats"), pl.Int32)),
        pl.col("wanted_tokens").fill_null(False) == bool(row["wanted_tokens"]),
        pl.col("kl_per_token").is_not_null(),
        share >= row["measured"] / asked - _SHARE_TOLERANCE if asked else pl.lit(True),
        pl.col("output_dir") != row["output_dir"] if other_folders_only else pl.lit(True),
    )


def previous_versions(before: pl.DataFrame, row: Row) -> Row | None:
    """The last run of the same two models, for what versions they had."""
    alike = [pl.col(name).eq_missing(pl.lit(row[name])) for name in ("model1", "model2")]
    found = _others(before, row).filter(*alike)
    if not found.height:
        return None
    # A run without an answer, or without a version in its input, says nothing of a change.
    last = {name: found.filter(pl.col(name).list.len() > 0)[name].to_list()[-1:] for name in _VERSIONS}
    return found.row(-1, named=True) | {name: values[0] for name, values in last.items() if values}


def _others(before: pl.DataFrame, row: Row) -> pl.DataFrame:
    return before.filter(pl.col("run_id").ne_missing(pl.lit(row["run_id"])))


def load_history(place: str) -> pl.DataFrame:
    """The rows of a history, by when the runs began; ``place`` is the file, or the folder that it is in.

    Raises
    ------
    ConfigError
        If it is no history, or has no row.
    """
    path = as_location(place)
    path = path if path.suffix == ".parquet" else path / HISTORY_FILE
    frame = read_history(path)
    if frame.height == 0:
        raise ConfigError(f"there is no history in {path}; it is made when a run ends.")
    return frame.sort("started_at", maintain_order=True)
