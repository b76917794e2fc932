"""The two passes of `flows.stages.measuring` over a whole data set, in this process or on a cluster.

The files are divided the same way whatever works on them, and what each part gives is joined in their order: the
results are the same bit for bit. A part is a pure task: what it is given comes by value or by path, and its tables come
back to this process, which alone writes.
"""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE

from backends.errors import ConfigError
from backends.storage import scratch_folder
from flows.cluster.runners import LazyCluster
from flows.config.comparison import Comparison, absolute
from flows.folder.layout import Stores
from flows.runtime.progress import ProgressReporter
from flows.stages.inputs import InputFile, forget_parsed_files
from flows.stages.measuring import Measured, MeasuredPart, Priors, Survey, Surveyed, measure_part, survey_part
from kl.estimators.diagnostic import AlignmentDiagnostic

PART_BYTES, PART_FILES = 6_000_000, 256  # of input that is worked on at once: some thousand positions
_AT_ONCE = min(4, os.cpu_count() or 1)
CLUSTER_PART_FILES = 32  # so that there is work for all
FEWEST_JUDGED = 20  # positions of which the overlap of their lists says something
_MOST_IN_MEMORY = 150_000  # positions of what the first pass leaves, about two kilobytes each


_In, _Out = TypeVar("_In"), TypeVar("_Out")


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
    parts = list(_parts(files, PART_FILES if cluster is None else CLUSTER_PART_FILES))
    passes = _passes(parts, comparison, stores, folder, cluster)
    with ProgressReporter("files surveyed", len(files)) as progress:
        survey = Survey.total(passes.surveys(progress))
    if comparison.config.first_repeats is None:  # those are read once more, when results are written
        forget_parsed_files()
    diagnostic = survey.diagnostic()
    _check_alignment(diagnostic, comparison, "measures all the same")
    measured = Measured(list(files), survey.priors(), diagnostic)
    with ProgressReporter("files measured", len(files)) as progress:
        for part in passes.measured(measured.priors, progress):
            measured.add(part)
    return measured


def first_to_judge(n_positions: Iterable[int]) -> int:
    """How many groups of so many contexts have enough to be judged: one, if responses are not tiny; 0 if none."""
    asked = accumulate(n_positions)
    return next((number for number, n in enumerate(asked, start=1) if n >= FEWEST_JUDGED), 0)


def check_first_answers(files: Sequence[InputFile], comparison: Comparison, stores: Stores) -> None:
    """Judge the rest by what is answered of some files, before it is bought; too few answers say nothing.

    Raises
    ------
    ConfigError
        If their lists say that the models cannot be compared.
    """
    survey, _ = survey_part(files, comparison, stores, _nothing)
    diagnostic = survey.diagnostic()
    if diagnostic.n_positions >= FEWEST_JUDGED:
        asked = f"asks for the rest, too (these are {diagnostic.n_positions} positions, the first that were asked)"
        _check_alignment(diagnostic, comparison, asked)


def _check_alignment(diagnostic: AlignmentDiagnostic, comparison: Comparison, forced: str) -> None:
    verdict = diagnostic.verdict()
    if verdict.level == "refuse" and not comparison.config.force:
        raise ConfigError(
            f"the models cannot be compared token by token: {verdict.reasons[0]} What was bought is kept; --force "
            f"{forced}, and only the bounds then mean something."
        )


def _parts(files: Sequence[InputFile], most_files: int) -> Iterator[Part]:
    """The files in a row, divided where enough of them are together."""
    start = size = 0
    for end, file in enumerate(files, start=1):
        size += file.size
        if size >= PART_BYTES or end - start >= most_files or end == len(files):
            yield Part(start, files[start:end])
            start, size = end, 0


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
        self._kept = _KeptSurveys(folder)

    def surveys(self, progress: ProgressReporter) -> Iterator[Survey]:
        done = partial(progress.advance, 1)
        for survey, surveyed in _side_by_side(
            lambda part: survey_part(part.files, self._comparison, self._stores, done), self._parts
        ):
            self._kept.add(surveyed)
            yield survey

    def measured(self, priors: Priors, progress: ProgressReporter) -> Iterator[Measured]:
        places = [part_files(self._folder, part, self._comparison) for part in self._parts]
        found = _side_by_side(
            lambda given: measure_part(given[0], given[1], priors, self._comparison, self._stores),
            zip(self._kept.taken(), places, strict=True),
        )
        for part, measured in zip(self._parts, found, strict=True):
            yield measured
            progress.advance(len(part.files))


def _side_by_side(work: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[_Out]:
    """What becomes of each item, in their order, some of them at a time: arrays are worked on outside the interpreter.

    No more are taken than are at work.
    """
    given = iter(items)
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="part") as pool:
        # In a copy of the context, by which log lines find their run.
        under_way = deque(pool.submit(copy_context().run, work, item) for item in islice(given, _AT_ONCE))
        try:
            while under_way:
                yield under_way.popleft().result()
                under_way.extend(pool.submit(copy_context().run, work, item) for item in islice(given, 1))
        finally:
            for future in under_way:
                future.cancel()


class _KeptSurveys:
    """Surveyed parts in their order, for the second pass: in memory, and in ``folder`` what is too much for it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: list[Surveyed | Path | None] = []
        self._n_positions = 0

    def add(self, surveyed: Surveyed) -> None:
        self._n_positions += surveyed.q.identified.height
        if self._n_positions <= _MOST_IN_MEMORY:
            self._kept.append(surveyed)
            return
        path = self._folder / f"{len(self._kept):08d}.surveyed"
        path.write_bytes(pickle.dumps(surveyed, protocol=5))
        self._kept.append(path)

    def taken(self) -> Iterator[Surveyed]:
        """The parts, each let go when it has been given."""
        for number, kept in enumerate(self._kept):
            self._kept[number] = None
            if isinstance(kept, Path):
                yield pickle.loads(kept.read_bytes())
                kept.unlink()
            elif kept is not None:
                yield kept


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
            (place,) = found.measured.parts
            here = part_files(self._folder, part, self._comparison)
            found.measured.parts = [here.without_tables() if place.tokens is None else here]
            yield found.measured


def part_files(folder: Path, part: Part, comparison: Comparison) -> MeasuredPart:
    """Where what is measured of a part goes."""
    name = f"{part.start:08d}"
    lists = folder / f"{name}.candidates.arrow" if comparison.config.candidates else None
    return MeasuredPart(folder / f"{name}.texts", folder / f"{name}.parquet", lists)


class Tables(NamedTuple):
    """What a worker measured: the files of its part by name, and what the input says beside them."""

    measured: Measured
    tables: dict[str, bytes]


@task(name="survey", cache_policy=NO_CACHE, persist_result=False)
def survey_on_worker(part: Part, comparison: Comparison) -> Survey:
    """The first pass over some files."""
    survey, _ = survey_part(part.files, comparison, comparison.folder.stores(), _nothing)
    return survey


@task(name="measure", cache_policy=NO_CACHE, persist_result=False)
def measure_on_worker(part: Part, priors: Priors, comparison: Comparison) -> Tables:
    """The second pass over some files, which are read again: what the first read may be on another worker."""
    with scratch_folder() as scratch:
        stores = comparison.folder.stores()
        _, surveyed = survey_part(part.files, comparison, stores, _nothing)
        measured = measure_part(surveyed, part_files(scratch, part, comparison), priors, comparison, stores)
        (place,) = measured.parts
        paths = [path for path in place if path is not None]
        return Tables(measured, {path.name: path.read_bytes() for path in paths})


def _nothing() -> None:
    """Progress is counted where the results arrive."""


def _absolute(file: InputFile) -> InputFile:
    return replace(file, path=absolute(file.path))
