"""Whether Q's first tokens are unlike those of the earlier runs: what the alert of a canary decides."""

from __future__ import annotations

import io

import polars as pl

from backends.errors import ConfigError
from backends.storage import as_location, read_bytes
from flows.config.alert import AlertConfig
from flows.config.models import RunConfig
from flows.folder.layout import OutputFolder
from flows.watch.history import Row, earlier_runs
from flows.watch.verdict import Verdict, undecided
from kl.statistics.canary import FEWEST_EARLIER, canary_test
from kl.statistics.intervals import MIN_CLUSTERS
from kl.tables.first_lists import FIRST_LISTS, mean_logprobs

_MOST_EARLIER = 24


def decide_first(config: RunConfig, alert: AlertConfig, row: Row, before: pl.DataFrame) -> Verdict:
    """The verdict over what Q listed at first positions, beside the last runs since the last drift.

    Parameters
    ----------
    before : pl.DataFrame
        From `flows.watch.history.record_row`.
    """
    earlier: list[pl.DataFrame] = []
    gone: list[str] = []
    for run in earlier_runs(before, row, _MOST_EARLIER):
        try:
            earlier.append(_first_lists(run["output_dir"]))
        except (ConfigError, OSError, pl.exceptions.PolarsError) as error:
            gone.append(f"{run['output_dir']} ({' '.join(str(error).split())})")
    if len(earlier) < FEWEST_EARLIER:
        lost = f"; {len(gone):,} more cannot be read, such as {gone[0]}" if gone else ""
        reason = (
            f"{len(earlier)} earlier runs of these first positions since the last drift, with the same models and "
            f"repeats, in {config.history}; {FEWEST_EARLIER} are needed{lost}"
        )
        return undecided(alert, reason, warn=bool(gone))
    logprobs = mean_logprobs([*earlier, _first_lists(str(config.output_dir))])
    if logprobs.shape[1] < MIN_CLUSTERS:
        reason = (
            f"{logprobs.shape[1]} contexts have a list of Q in this run and in each of {len(earlier)} earlier ones; "
            f"{MIN_CLUSTERS} are needed: ask about the same responses each time"
        )
        return undecided(alert, reason)
    warnings = [f"drift: {len(gone):,} earlier runs cannot be read and take no part, such as {gone[0]}"] if gone else []
    return Verdict(alert, None, None, None, warnings, canary=canary_test(logprobs, alert.level))


def _first_lists(folder: str) -> pl.DataFrame:
    data = read_bytes(OutputFolder(as_location(folder)).first_lists)
    return pl.read_parquet(io.BytesIO(data)).select(pl.col(name).cast(kind) for name, kind in FIRST_LISTS.items())
