"""Scores from the raw rows of an earlier run, without a call."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from backends.errors import ConfigError
from backends.scores.raw_log import holds_raw, read_raw
from backends.scores.store import ScoreStore
from flows.config.comparison import Comparison
from flows.folder.layout import OutputFolder
from flows.folder.members import store_of
from flows.stages.inputs import InputFile, read_inputs
from kl.records import Score, ScoreFailure

logger = logging.getLogger(__name__)

_PART_ROWS = 2000


def check_raw(source: Path) -> Path:
    """The folder with the raw rows of an earlier run.

    Raises
    ------
    ConfigError
        If it holds none.
    """
    folder = OutputFolder(source, store_of(source)).raw
    if not holds_raw(folder):
        raise ConfigError(f"{source} holds no raw rows ({folder}/*.jsonl.gz); they are kept with keep_raw: true.")
    return folder


def reuse_raw(source: Path, files: list[InputFile], comparison: Comparison, store: ScoreStore) -> int:
    """Read the rows that an earlier run kept, and store a score for each context that is wanted and not there yet.

    Returns how many were taken.

    Raises
    ------
    ConfigError
        If the folder holds no raw rows.
    """
    folder = check_raw(source)
    wanted = dict(_wanted(files, comparison, store))
    waiting: dict[tuple[str, str], list[Score | ScoreFailure]] = {}
    taken = 0
    for key, row in read_raw(folder):
        place = wanted.get(key)
        result = comparison.backend.parse_raw(key, row) if place is not None else None
        if place is None or result is None or (isinstance(result, ScoreFailure) and not result.final):
            continue
        del wanted[key]
        taken += 1
        results = waiting.setdefault(place, [])
        results.append(result)
        if len(results) >= _PART_ROWS:
            store.append(*place, results)
            results.clear()
    for place, results in waiting.items():
        store.append(*place, results)
    logger.info("%d scores were read from the raw rows in %s", taken, folder)
    return taken


def _wanted(files: list[InputFile], comparison: Comparison, store: ScoreStore) -> Iterator[tuple[str, tuple[str, str]]]:
    known_keys = store.keys_in_turn()
    for _, parsed in read_inputs(files):
        if parsed.prompt is None:
            continue
        prompt_id = parsed.prompt.prompt_id
        known = known_keys(prompt_id)
        for response in parsed.responses:
            for side in comparison.sides():
                request = comparison.request(response, side)
                for key in request.keys if request is not None else ():
                    if key not in known:
                        yield key, (prompt_id, request.model)
