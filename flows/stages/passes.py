"""The two passes of `flows.stages.measuring` over a whole data set, in this process or on a cluster.

The files are divided the same way whatever works on them, and what each part gives is joined in their order: the
results are the same bit for bit. A part is a pure task: what it is given comes by value or by path, and its tables come
back to this process, which alone writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from prefect import task
from prefect.cache_policies import NO_CACHE

from backends.errors import ConfigError
from backends.storage import scratch_folder
from flows.cluster.runners import LazyCluster
from flows.config.comparison import Comparison, absolute
from flows.folder.layout import Stores
from flows.runtime.terminal import ProgressReporter
from flows.stages.inputs import InputFile
from flows.stages.measuring import Measured, Priors, Survey, measure_part, survey_files

FILES_PER_PART = 32


class Part(NamedTuple):
    """Some files in a row, and the number of the first among all."""

    start: int
    files: Sequence[InputFile]


def measure_files(
    files: Sequence[InputFile],
    comparison: Comparison,
    stores: Stores,
    folder: Path,
    cluster: LazyCluster | None = None,
) -> Measured:
    """Measure every response of every file; unreadable ones are noted with their reason.

    Parameters
    ----------
    folder : Path
        For the parts of the token table, on this machine's disk.
    cluster : LazyCluster, optional
        What works on the parts if there are several; default this process.
    """
    parts = [Part(start, files[start : start + FILES_PER_PART]) for start in range(0, len(files), FILES_PER_PART)]
    passes = _passes(parts, comparison, stores, folder, cluster)
    with ProgressReporter("files surveyed", len(files)) as progress:
        survey = Survey.total(list(passes.surveys(progress)))
    diagnostic = survey.diagnostic()
    verdict = diagnostic.verdict()
    if verdict.level == "refuse" and not comparison.config.force:
        raise ConfigError(
            f"the models cannot be compared token by token: {verdict.reasons[0]} What was bought is kept; --force "
            "measures all the same, and only the bounds then mean something."
        )
    measured = Measured(list(files), survey.priors(), diagnostic)
    with ProgressReporter("files measured", len(files)) as progress:
        for part in passes.measured(measured.priors, progress):
            measured.add(part)
    return measured


def _passes(
    parts: Sequence[Part], comparison: Comparison, stores: Stores, folder: Path, cluster: LazyCluster | None
) -> _InProcess | _OnCluster:
    folder.mkdir(parents=True, exist_ok=True)
    if cluster is None or len(parts) < 2:
        return _InProcess(parts, comparison, stores, folder)
    return _OnCluster(parts, comparison, folder, cluster)


class _InProcess:
    """One part after the other, here."""

    def __init__(self, parts: Sequence[Part], comparison: Comparison, stores: Stores, folder: Path) -> None:
        self._parts, self._comparison, self._stores, self._folder = parts, comparison, stores, folder

    def surveys(self, progress: ProgressReporter) -> Iterator[Survey]:
        for part in self._parts:
            yield survey_files(part.files, self._comparison, self._stores, partial(progress.advance, 1))

    def measured(self, priors: Priors, progress: ProgressReporter) -> Iterator[Measured]:
        done = partial(progress.advance, 1)
        for part in self._parts:
            yield measure_part(part.files, part.start, self._folder, priors, self._comparison, self._stores, done)


class _OnCluster:
    """Parts on the workers, some at a time."""

    def __init__(self, parts: Sequence[Part], comparison: Comparison, folder: Path, cluster: LazyCluster) -> None:
        self._parts = [Part(part.start, [_absolute(file) for file in part.files]) for part in parts]
        self._comparison, self._folder, self._cluster = comparison.made_absolute(), folder, cluster.get()

    def surveys(self, progress: ProgressReporter) -> Iterator[Survey]:
        values = [{"part": part, "comparison": self._comparison} for part in self._parts]
        for part, found in zip(self._parts, self._cluster.map_in_order(survey_on_worker, values), strict=True):
            progress.advance(len(part.files))
            yield found

    def measured(self, priors: Priors, progress: ProgressReporter) -> Iterator[Measured]:
        values = [{"part": part, "priors": priors, "comparison": self._comparison} for part in self._parts]
        for part, found in zip(self._parts, self._cluster.map_in_order(measure_on_worker, values), strict=True):
            progress.advance(len(part.files))
            for name, table in found.tables.items():
                (self._folder / name).write_bytes(table)
            found.measured.parts = [self._folder / name for name in found.tables]
            yield found.measured


class Tables(NamedTuple):
    """What a worker measured: its files' tables by name, as Parquet, and what the input says beside them."""

    measured: Measured
    tables: dict[str, bytes]


@task(name="survey", cache_policy=NO_CACHE, persist_result=False)
def survey_on_worker(part: Part, comparison: Comparison) -> Survey:
    """The first pass over some files."""
    return survey_files(part.files, comparison, comparison.folder.stores(), _nothing)


@task(name="measure", cache_policy=NO_CACHE, persist_result=False)
def measure_on_worker(part: Part, priors: Priors, comparison: Comparison) -> Tables:
    """The second pass over some files."""
    with scratch_folder() as scratch:
        stores = comparison.folder.stores()
        measured = measure_part(part.files, part.start, scratch, priors, comparison, stores, _nothing)
        return Tables(measured, {path.name: path.read_bytes() for path in measured.parts})


def _nothing() -> None:
    """Progress is counted where the results arrive."""


def _absolute(file: InputFile) -> InputFile:
    return replace(file, path=absolute(file.path))
