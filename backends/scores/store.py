"""Scores on disk: what was paid for, kept under the hash of its context.

One folder per prompt, so that reading what one prompt needs never touches the rest::

    scores/<prompt_id>/<part>.parquet

While a group of responses is at work its answers go, one by one as they arrive, to a journal; from time to time and at
the end they become a part and the journal goes away. A journal that a killed run left behind is taken in by the next::

    scores/journals/<name>.jsonl

All of it may be in a bucket: then the parts that are read are copied to the local disk first, each once while it stays
as it is.

A part is written whole or not at all. The same score may stand in two parts (a run was killed between writing a merged
part and removing its pieces); the answers are equal and the first one read counts. All parts are one plain table:
``polars.read_parquet("scores/*/*.parquet")``.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from backends.errors import ConfigError
from backends.scores.journal import SUFFIX, ScoreJournal, recorded
from backends.scores.rows import ADDED, EXACT, SCORES, WANTED, exact_of, frame_of, results_of, row_of
from backends.storage import (
    COPIES,
    RemoteListing,
    StoredFile,
    files_in,
    in_parallel,
    is_remote,
    remove,
    write_bytes_atomic,
)
from kl.records import ExactPair, Score, ScoreFailure
from kl.scores import Scores

__all__ = ["SCORES", "ScoreJournal", "ScoreStore"]

_JOURNALS = "journals"
_PARTS_WORTH_MERGING = 4
_JOURNALS_AT_ONCE = 500  # objects of a second each
_LIGHT = [name for name in SCORES.names() if name != "full_logprobs" and name not in ADDED]


class Compared(NamedTuple):
    """What is on disk of whole vocabularies: pairs of keys with figures, keys with a vocabulary, keys that failed."""

    pairs: frozenset[frozenset[str]]
    whole: frozenset[str]
    failed: frozenset[str]

    def has(self, key: str, other: str) -> bool:
        """Whether no more can be found out about a pair of keys."""
        pair = frozenset((key, other))
        return pair in self.pairs or pair <= self.whole or not pair.isdisjoint(self.failed)


class ScoreStore:
    """The scores below one folder.

    Parameters
    ----------
    root : Path
        The ``scores`` folder of an output directory, local or remote; made when the first score is written. A remote
        one is listed when it is read first: make another store to see what other processes wrote since.
    every_failure : bool
        Also keep failures that may pass: for the record of one run, never where it is decided what is bought.
    journals : Path, optional
        Where answers are kept at first; each of several runs that use one store has a place of its own.
    """

    def __init__(self, root: Path, *, every_failure: bool = False, journals: Path | None = None) -> None:
        self.root = root
        self._journals = root / _JOURNALS if journals is None else journals
        self._every_failure = every_failure
        self._listing = RemoteListing(root, ".parquet") if is_remote(root) else None

    def prefetch(self) -> None:
        """Copy all parts of a remote store to the local disk, many at once, if there is room for them."""
        if self._listing is not None:
            COPIES.fetch(self._listing.files())

    def known_keys(self, prompt_id: str) -> set[str]:
        """Keys that need not be asked again: scores, and failures that are final."""
        parts = self._parts(prompt_id)
        return {key for part in parts for key in self._read(part, ["key"])["key"]}

    def load(self, prompt_id: str, keys: Iterable[str]) -> dict[str, Score | ScoreFailure]:
        """The stored results among ``keys``, without full vocabularies."""
        rows = self.rows(prompt_id, keys, wanted=True)
        stored = results_of(rows)
        scores = Scores(stored.table, np.arange(len(stored.table)))
        found: dict[str, Score | ScoreFailure] = {score.key: score for score in scores if score is not None}
        found |= stored.failures
        return {key: found[key] for key in rows["key"]}

    def rows(self, prompt_id: str, keys: Iterable[str], *, wanted: bool = False) -> pl.DataFrame:
        """The rows of the stored results among ``keys``, each key once, without full vocabularies.

        Parameters
        ----------
        wanted : bool
            Also what was asked for by name.
        """
        asked = list(dict.fromkeys(keys))
        columns = [*_LIGHT, *WANTED] if wanted else _LIGHT
        none = pl.DataFrame(schema={name: SCORES[name] for name in columns})
        found = pl.concat([none, *(self._read(part, columns, asked) for part in self._parts(prompt_id))])
        return found.unique("key", keep="first", maintain_order=True)

    def load_full(self, prompt_id: str, keys: Sequence[str]) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
        """The full-vocabulary log-probabilities stored under ``keys``: float32, shape (V,), by token id."""
        found: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
        for part in self._parts(prompt_id):
            missing = [key for key in keys if key not in found]
            if not missing:
                break
            frame = self._read(part, ["key", "full_logprobs"], missing)
            for key, values in zip(frame["key"], frame["full_logprobs"], strict=True):
                if values is not None:
                    found[key] = values.to_numpy()
        return found

    def load_exact(self, prompt_id: str, keys: Iterable[str]) -> dict[tuple[str, str], ExactPair]:
        """What was found of whole vocabularies, by the key of the score and that of the other model's."""
        wanted = list(keys)
        rows = (row for part in self._parts(prompt_id) for row in self._exact_rows(part, wanted).iter_rows(named=True))
        return {(row["key"], row["exact_versus"]): exact_of(row) for row in rows}

    def _exact_rows(self, part: StoredFile, keys: list[str] | None) -> pl.DataFrame:
        return self._read(part, ["key", *EXACT], keys).filter(pl.col("exact_versus").is_not_null())

    def compared(self, prompt_id: str) -> Compared:
        """What is on disk of whole vocabularies; a part has either pairs or vocabularies."""
        pairs: set[frozenset[str]] = set()
        whole: set[str] = set()
        failed: set[str] = set()
        for part in self._parts(prompt_id):
            rows = self._exact_rows(part, None)
            pairs.update(map(frozenset, zip(rows["key"], rows["exact_versus"], strict=True)))
            failed.update(self._read(part, ["key", "reason"]).drop_nulls("reason")["key"])
            if rows.is_empty():
                whole |= self._whole_keys(part)
        return Compared(frozenset(pairs), frozenset(whole), frozenset(failed))

    def append(self, prompt_id: str, model: str, results: Sequence[Score | ScoreFailure]) -> None:
        """Write scores and final failures as one part."""
        self.write_rows(prompt_id, [row_of(model, result) for result in results if self._keeps(result)])

    def _keeps(self, result: Score | ScoreFailure) -> bool:
        return isinstance(result, Score) or result.final or self._every_failure

    def write_rows(self, prompt_id: str, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows of the schema `SCORES` as one part."""
        if rows:
            frame = frame_of(rows)
            self._write(frame, self.root / prompt_id / _part_name(frame))

    def journal(self, name: str) -> ScoreJournal:
        """A journal for the answers of one group; ``name`` must be free among those open."""
        return ScoreJournal(self._journals, name)

    def has_journals(self) -> bool:
        """Whether there is anything to `recover`."""
        return bool(files_in(self._journals, SUFFIX))

    def recover(self) -> int:
        """Take in what killed runs left in the journals; returns how many answers. No other run may be using them."""
        paths = files_in(self._journals, SUFFIX)
        at_once = _JOURNALS_AT_ONCE if is_remote(self.root) else 1
        count = 0
        for start in range(0, len(paths), at_once):
            some = paths[start : start + at_once]
            for prompt_id, rows in recorded(some).items():
                self.write_rows(prompt_id, rows)
                count += len(rows)
            in_parallel(remove, some)
        return count

    def compact_all(self) -> None:
        """Merge small parts, prompt by prompt. No other run may be using the folder."""
        for name in self._prompts():
            self.compact(name)

    def _prompts(self) -> list[str]:
        if self._listing is not None:
            return [name for name in self._listing.subfolders() if name != _JOURNALS]
        folders = sorted(self.root.iterdir()) if self.root.is_dir() else []
        return [folder.name for folder in folders if folder.is_dir() and folder.name != _JOURNALS]

    def compact(self, prompt_id: str) -> None:
        """Merge the many small parts of a prompt into one, sorted by key."""
        parts = self._parts(prompt_id)
        if len(parts) < _PARTS_WORTH_MERGING or any(self._whole_keys(part) for part in parts):
            return
        frame = pl.concat(self._read(part, SCORES.names()).select(SCORES.names()) for part in parts)
        frame = frame.unique(["key", "exact_versus"], keep="first").sort("key", "exact_versus")
        target = self.root / prompt_id / _part_name(frame)
        self._write(frame, target)
        in_parallel(remove, [part.path for part in parts if part.path != target])
        self._note_change(prompt_id)

    def _parts(self, prompt_id: str) -> list[StoredFile]:
        if self._listing is not None:
            return self._listing.files_of(prompt_id)
        return [StoredFile(path, 0, "") for path in files_in(self.root / prompt_id, ".parquet")]

    def _whole_keys(self, part: StoredFile) -> set[str]:
        """The keys that have a vocabulary in a part."""
        with COPIES.open(part) as path:
            frame = pl.scan_parquet(path, glob=False, hive_partitioning=False)
            return set(frame.filter(pl.col("full_logprobs").is_not_null()).select("key").collect()["key"])

    def _read(self, part: StoredFile, columns: list[str], keys: list[str] | None = None) -> pl.DataFrame:
        with COPIES.open(part) as path:
            try:
                added = ADDED.intersection(columns)  # parts of earlier versions lack them
                absent = added - set(pl.read_parquet_schema(path)) if added else added
                held = [name for name in columns if name not in absent]
                frame = pl.read_parquet(path, columns=held, glob=False, hive_partitioning=False)
            except (pl.exceptions.PolarsError, OSError) as error:
                raise ConfigError(
                    f"the stored scores in {part.path} cannot be read ({error}). Restore the file, or move it away: "
                    "its scores are then asked for, and paid for, again."
                ) from error
        frame = frame.with_columns(pl.lit(None, SCORES[name]).alias(name) for name in columns if name in absent)
        return frame if keys is None else frame.filter(pl.col("key").is_in(keys))

    def _write(self, frame: pl.DataFrame, target: Path) -> None:
        # Two tasks write a part of one name only with equal keys.
        packed = io.BytesIO()
        frame.write_parquet(packed, compression="zstd")
        write_bytes_atomic(target, packed.getvalue())
        self._note_change(target.parent.name)

    def _note_change(self, prompt_id: str) -> None:
        if self._listing is not None:
            self._listing.note_change(prompt_id)


def _part_name(frame: pl.DataFrame) -> str:
    """The same for the same keys and pairs."""
    content = "".join(frame["key"]) + "".join(frame["exact_versus"].drop_nulls())
    return f"{hashlib.sha256(content.encode('ascii')).hexdigest()[:16]}.parquet"
