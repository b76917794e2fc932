"""The two passes of `flows.stages.measuring` over a whole data set, in this process or on a cluster.

The files are divided the same way whatever works on them, and what each part gives is joined in their order: the
results are the same bit for bit.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prefect import Task

from backends.errors import ConfigError
from backends.storage.files import remove_folder
from flows.cluster.mapping import map_on_cluster
from flows.cluster.runners import Cluster, LazyCluster
from flows.cluster.tasks import measure_on_worker, survey_on_worker
from flows.cluster.ticket import absolute, absolute_file
from flows.progress import ProgressReporter
from flows.stages.inputs import InputFile
from flows.stages.measuring import Measured, Survey, measure_part, survey_files
from flows.stages.plan import Asker
from flows.stages.scoring import Stores
from kl.estimators.censored import SpreadPrior, pooled_prior

Part = tuple[int, Sequence[InputFile]]  # the number of the first file, and the files

FILES_PER_PART = 32
_PARTS_PER_WORKER = 2  # one at work, one that waits


def parts_folder(output_dir: Path) -> Path:
    """Where the parts of the token table are put together; removed when the table is written."""
    return output_dir / ".parts" / "tokens"


def measure_files(
    files: Sequence[InputFile], asker: Asker, stores: Stores, cluster: LazyCluster | None = None
) -> Measured:
    """Measure every response of every file; unreadable ones are noted with their reason.

    Parameters
    ----------
    cluster : LazyCluster, optional
        What works on the parts if there are several; default this process.
    """
    remove_folder(parts_folder(asker.config.output_dir))
    # Workers of a run that was killed may still write: into another folder than this run's.
    folder = parts_folder(asker.config.output_dir) / uuid.uuid4().hex[:8]
    numbered = range(0, len(files), FILES_PER_PART)
    work: _InProcess | _OnCluster
    if cluster is None or len(numbered) < 2:
        work = _InProcess(asker, stores, folder)
    else:
        work = _OnCluster(asker, cluster.get(), folder)
    parts = [(start, files[start : start + FILES_PER_PART]) for start in numbered]
    survey = Survey.total(list(work.surveys(parts)))
    diagnostic = survey.diagnostic()
    verdict = diagnostic.verdict()
    if verdict.level == "refuse" and not asker.config.force:
        raise ConfigError(
            f"the models cannot be compared token by token: {verdict.reasons[0]} What was bought is kept; --force "
            "measures all the same, and only the bounds then mean something."
        )
    measured = Measured(list(files), pooled_prior(survey.spread), diagnostic)
    for part in work.measured(parts, measured.prior):
        measured.add(part)
    return measured


class _InProcess:
    """One part after the other, here."""

    def __init__(self, asker: Asker, stores: Stores, folder: Path) -> None:
        self._asker, self._stores, self._folder = asker, stores, folder

    def surveys(self, parts: Sequence[Part]) -> Iterator[Survey]:
        with ProgressReporter("files surveyed", _n_files(parts)) as progress:
            for _, files in parts:
                yield survey_files(files, self._asker, self._stores, partial(progress.advance, 1))

    def measured(self, parts: Sequence[Part], prior: SpreadPrior | None) -> Iterator[Measured]:
        with ProgressReporter("files measured", _n_files(parts)) as progress:
            for start, files in parts:
                done = partial(progress.advance, 1)
                yield measure_part(files, start, self._folder, prior, self._asker, self._stores, done)


class _OnCluster:
    """Parts on the workers, some at a time."""

    def __init__(self, asker: Asker, cluster: Cluster, folder: Path) -> None:
        self._config = asker.config.model_copy(update={"output_dir": absolute(asker.config.output_dir)})
        self._cluster, self._folder = cluster, absolute(folder)

    def surveys(self, parts: Sequence[Part]) -> Iterator[Survey]:
        values = [{"files": _absolute(files)} for _, files in parts]
        return self._map(survey_on_worker, "files surveyed", parts, values)

    def measured(self, parts: Sequence[Part], prior: SpreadPrior | None) -> Iterator[Measured]:
        values = [
            {"files": _absolute(files), "start": start, "folder": self._folder, "prior": prior}
            for start, files in parts
        ]
        return self._map(measure_on_worker, "files measured", parts, values)

    def _map(
        self, task: Task[..., Any], what: str, parts: Sequence[Part], values: Sequence[Mapping[str, Any]]
    ) -> Iterator[Any]:
        """What the task returns for each part, in their order."""
        results: dict[int, Any] = {}
        with ProgressReporter(what, _n_files(parts)) as progress:

            def keep(number: int, result: Any) -> None:
                results[number] = result
                progress.advance(len(parts[number][1]))

            map_on_cluster(
                self._cluster,
                task,
                [{**own, "config": self._config} for own in values],
                window=lambda: _PARTS_PER_WORKER * len(self._cluster.threads()),
                stopped=lambda: any(isinstance(result, Exception) for result in results.values()),
                on_result=keep,
            )
        for number in sorted(results, key=lambda number: (not isinstance(results[number], Exception), number)):
            if isinstance(results[number], Exception):
                raise results[number]
            yield results[number]


def _absolute(files: Sequence[InputFile]) -> list[InputFile]:
    return [absolute_file(file) for file in files]


def _n_files(parts: Sequence[Part]) -> int:
    return sum(len(files) for _, files in parts)
