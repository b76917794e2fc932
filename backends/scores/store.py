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

What is damaged is no score: its context is asked again. It was paid for, so that it is kept, by whoever may change the
store, in a place of its own; a fault of the disk or the network is no damage, and raised::

    scores/set_aside/<prompt_id>/<part>.parquet
    scores/set_aside/journals/<name>.jsonl
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from backends.errors import ConfigError
from backends.scores.aside import JOURNALS, SET_ASIDE, harm_of, keep_journaled, keep_lines, put_right
from backends.scores.damage import parted
from backends.scores.index import MOST_KEYS, PromptIndex, UsedLast, first_scored
from backends.scores.journal import SUFFIX, BrokenLine, ScoreJournal, recorded
from backends.scores.parts import Part, packed
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

logger = logging.getLogger(__name__)

__all__ = ["SCORES", "Alone", "ScoreJournal", "ScoreStore"]

_NO_PROMPTS = (JOURNALS, SET_ASIDE)  # folders of a store
_PARTS_WORTH_MERGING = 4
_MERGED_ROWS, _MERGED_BYTES = 50_000, 5_000_000  # of a part that is large enough
# Bytes on disk: where there are more in all, and for each key that is asked for, most rows are not wanted.
_INDEXED, _INDEXED_PER_KEY = 1_000_000, 1_000
_MOST_INDEXED = 64_000_000  # bytes of indexes that are kept
_TIMES = 3  # that the parts of a prompt may be replaced while they are looked up
_JOURNALS_AT_ONCE = 500  # objects of a second each
_LIGHT = [name for name in SCORES.names() if name != "full_logprobs" and name not in ADDED]

Alone = Callable[[], AbstractContextManager[None]]


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
    alone : callable, optional
        Enters a context in which nobody else changes the store. With it, what is damaged is set aside where it is
        decided what is asked; without, it is only left out.

    Attributes
    ----------
    n_damaged, n_broken : int
        Rows that could not be used, and parts that could not be read, of all that was read through this object.
    """

    def __init__(
        self,
        root: Path,
        *,
        every_failure: bool = False,
        journals: Path | None = None,
        alone: Alone | None = None,
    ) -> None:
        self.root = root
        self.n_damaged = self.n_broken = 0
        self._alone = alone
        self._named: set[str] = set()
        self._journals = root / JOURNALS if journals is None else journals
        self._every_failure = every_failure
        self._listing = RemoteListing(root, ".parquet") if is_remote(root) else None
        self._indexes = UsedLast[tuple[str, ...], PromptIndex](_MOST_INDEXED, lambda index: index.n_bytes)

    def prefetch(self) -> None:
        """Copy all parts of a remote store to the local disk, many at once, if there is room for them."""
        if self._listing is not None:
            COPIES.fetch(self._listing.files())

    def known_keys(self, prompt_id: str) -> set[str]:
        """Keys that need not be asked again: scores, and failures that are final."""
        return {key for _, part in self._each(prompt_id, tidy=True) for key in part.rows(["key"])["key"]}

    def keys_in_turn(self) -> Callable[[str], set[str]]:
        """`known_keys` for one look through all files: those of the prompts that were used last are read once."""
        kept = UsedLast[str, set[str]](MOST_KEYS, len)
        return lambda prompt_id: kept.of(prompt_id, partial(self.known_keys, prompt_id))

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
        asked = pl.Series("key", [*keys], dtype=pl.String).unique()
        columns = [*_LIGHT, *WANTED] if wanted else _LIGHT
        none = pl.DataFrame(schema={name: SCORES[name] for name in columns})
        found = pl.concat([none, *(_among(rows, asked) for rows in self._candidates(prompt_id, asked, columns))])
        return first_scored(found)

    def _candidates(self, prompt_id: str, asked: pl.Series, columns: Sequence[str]) -> list[pl.DataFrame]:
        """Tables with all rows of some keys, and with others."""
        if self._size(prompt_id) <= max(_INDEXED, _INDEXED_PER_KEY * len(asked)):
            return [part.rows(columns) for _, part in self._each(prompt_id)]
        for left in reversed(range(_TIMES)):
            names = prompt_id, *(file.path.name for file in self._parts(prompt_id))
            try:
                index = self._indexes.of(names, lambda: PromptIndex(self._each(prompt_id)))
                return list(index.rows(asked, columns))
            except (OSError, pl.exceptions.PolarsError) as error:
                if not (left and isinstance(error, FileNotFoundError)):
                    raise _unreadable(self.root / prompt_id, error) from error
                self._indexes.forget(names)  # another run has replaced a part
                self._note_change(prompt_id)
        raise AssertionError("the last time raises")

    def _size(self, prompt_id: str) -> int:
        """Bytes of the parts of a prompt."""
        return sum(file.size for file in self._parts(prompt_id))

    def load_full(self, prompt_id: str, keys: Sequence[str]) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
        """The full-vocabulary log-probabilities stored under ``keys``: float32, shape (V,), by token id."""
        found: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
        for _, part in self._each(prompt_id):
            missing = [key for key in keys if key not in found]
            if not missing:
                break
            frame = part.rows(["key", "full_logprobs"]).filter(pl.col("key").is_in(missing))
            for key, values in zip(frame["key"], frame["full_logprobs"], strict=True):
                if values is not None:
                    found[key] = values.to_numpy()
        return found

    def load_exact(self, prompt_id: str, keys: Iterable[str]) -> dict[tuple[str, str], ExactPair]:
        """What was found of whole vocabularies, by the key of the score and that of the other model's."""
        wanted = list(keys)
        frames = (part.rows(["key", *EXACT]).filter(pl.col("key").is_in(wanted)) for _, part in self._each(prompt_id))
        rows = (row for frame in frames for row in frame.drop_nulls("exact_versus").iter_rows(named=True))
        return {(row["key"], row["exact_versus"]): exact_of(row) for row in rows}

    def compared(self, prompt_id: str) -> Compared:
        """What is on disk of whole vocabularies; a part has either pairs or vocabularies."""
        pairs: set[frozenset[str]] = set()
        whole: set[str] = set()
        failed: set[str] = set()
        for _, part in self._each(prompt_id, tidy=True):
            rows = part.rows(["key", "reason", "exact_versus"])
            failed.update(rows.drop_nulls("reason")["key"])
            rows = rows.drop_nulls("exact_versus")
            pairs.update(map(frozenset, zip(rows["key"], rows["exact_versus"], strict=True)))
            if rows.is_empty():
                whole.update(part.rows(["key", "full_logprobs"]).drop_nulls("full_logprobs")["key"])
        return Compared(frozenset(pairs), frozenset(whole), frozenset(failed))

    def append(self, prompt_id: str, model: str, results: Sequence[Score | ScoreFailure]) -> None:
        """Write scores and final failures as one part."""
        self.write_rows(prompt_id, [row_of(model, result) for result in results if self._keeps(result)])

    def _keeps(self, result: Score | ScoreFailure) -> bool:
        return isinstance(result, Score) or result.final or self._every_failure

    def write_rows(self, prompt_id: str, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows of the schema `SCORES` as one part."""
        if rows:
            self._write(frame_of(rows), prompt_id)

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
            broken: list[BrokenLine] = []
            for prompt_id, rows in recorded(some, broken.append).items():
                count += self._take_in(prompt_id, frame_of(rows))
            keep_lines(self.root, broken)
            in_parallel(remove, some)
        return count

    def _take_in(self, prompt_id: str, frame: pl.DataFrame) -> int:
        sound, damaged = parted(frame)
        if not damaged.is_empty():
            keep_journaled(self.root, prompt_id, damaged)
        if not sound.is_empty():
            self._write(sound, prompt_id)
        return sound.height

    def compact_all(self) -> None:
        """Merge small parts, prompt by prompt. No other run may be using the folder."""
        for name in self._prompts():
            self.compact(name)

    def _prompts(self) -> list[str]:
        if self._listing is not None:
            return [name for name in self._listing.subfolders() if name not in _NO_PROMPTS]
        folders = sorted(self.root.iterdir()) if self.root.is_dir() else []
        return [folder.name for folder in folders if folder.is_dir() and folder.name not in _NO_PROMPTS]

    def compact(self, prompt_id: str) -> None:
        """Merge the many small parts of a prompt into larger ones, in the order in which they were scored.

        What was scored together is asked for together later, and is then read without the rest.
        """
        small = {file.path for file in self._parts(prompt_id) if file.size < _MERGED_BYTES}
        if len(small) < _PARTS_WORTH_MERGING:
            return
        frames: list[pl.DataFrame] = []
        paths: list[Path] = []
        for file, part in self._each(prompt_id, tidy=True):
            if file.path not in small:
                continue
            frame = part.rows(SCORES.names())
            if part.is_harmed or frame["full_logprobs"].null_count() < frame.height:
                return
            if frame.height >= _MERGED_ROWS:
                continue
            frames.append(frame)
            paths.append(file.path)
            if sum(frame.height for frame in frames) >= _MERGED_ROWS:
                self._merge(prompt_id, frames, paths)
                frames, paths = [], []
        self._merge(prompt_id, frames, paths)

    def _merge(self, prompt_id: str, frames: Sequence[pl.DataFrame], paths: Sequence[Path]) -> None:
        if len(frames) < 2:
            return
        in_order = pl.concat(frames).sort("scored_at", maintain_order=True)
        once = in_order.unique(["key", "exact_versus"], keep="first", maintain_order=True)
        target = self._write(once, prompt_id)
        in_parallel(remove, [path for path in paths if path != target])
        self._note_change(prompt_id)

    def _parts(self, prompt_id: str) -> list[StoredFile]:
        if self._listing is not None:
            return self._listing.files_of(prompt_id)
        found = sorted(map(_on_disk, files_in(self.root / prompt_id, ".parquet")), key=itemgetter(0))
        return [file for _, file in found]  # what was written together is asked for together

    def _each(self, prompt_id: str, *, tidy: bool = False) -> Iterator[tuple[StoredFile, Part]]:
        """The parts of a prompt, without what is damaged; with ``tidy`` that is set aside where this run may do so.

        What another run puts in the place of a part is given, too.
        """
        seen: set[str] = set()
        gone: set[str] = set()
        while True:
            for file in self._parts(prompt_id):
                if file.path.name in seen:
                    continue
                try:
                    part = self._opened(file, tidy=tidy)
                except FileNotFoundError as error:  # another run has replaced it since it was listed
                    if file.path.name in gone:
                        raise _unreadable(file.path, error) from error
                    gone.add(file.path.name)
                    break
                seen.add(file.path.name)
                if part is None:
                    break
                self._name(file, part)
                yield file, part
            else:
                return
            self._note_change(prompt_id)

    def _opened(self, file: StoredFile, *, tidy: bool) -> Part | None:
        """A part; None if another, or none, is in its place now."""
        part = Part(file.path.name, _content(file))
        if part.changed:
            raise ConfigError(
                f"{file.path} is not as it was written (its checksum is another), though it can be read. If you "
                "changed it, give it another name: its scores count then. If not, move it away: they are asked for, "
                "and paid for, again."
            )
        if not tidy or self._alone is None:
            return part
        if part.is_harmed:
            self._count(part)
            with self._alone():
                return put_right(self.root, file.path.parent.name, file.path)
        if not is_remote(file.path) and (name := part.name_to_prove()) is not None:
            with self._alone():
                os.replace(file.path, file.path.with_name(name))  # so that it need not be checked each time
            return None
        return part

    def _name(self, file: StoredFile, part: Part) -> None:
        """Say what is damaged, once, where it stays."""
        if not part.is_harmed or str(file.path) in self._named:
            return
        self._named.add(str(file.path))
        self._count(part)
        logger.warning(
            "%s %s: not used; a run sets it aside in %s, and asks again",
            file.path, harm_of(part), self.root / SET_ASIDE,
        )  # fmt: skip

    def _count(self, part: Part) -> None:
        self.n_damaged += part.damaged.height
        self.n_broken += part.broken is not None

    def _write(self, frame: pl.DataFrame, prompt_id: str) -> Path:
        name, content = packed(frame)
        target = self.root / prompt_id / name
        write_bytes_atomic(target, content)
        self._note_change(prompt_id)
        return target

    def _note_change(self, prompt_id: str) -> None:
        if self._listing is not None:
            self._listing.note_change(prompt_id)


def _content(file: StoredFile) -> bytes:
    """The bytes of a part.

    Raises
    ------
    FileNotFoundError
        If it is gone.
    ConfigError
        If the storage does not give it, which says nothing of what it holds.
    """
    try:
        with COPIES.open(file) as path:
            content = path.read_bytes()
        if is_remote(file.path) and len(content) != file.size:
            raise OSError(f"{len(content):,} of {file.size:,} bytes came")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unreadable(file.path, error) from error
    return content


def _among(rows: pl.DataFrame, keys: pl.Series) -> pl.DataFrame:
    is_asked = rows["key"].is_in(keys.implode())
    return rows if is_asked.all() else rows.filter(is_asked)


def _on_disk(path: Path) -> tuple[int, StoredFile]:
    """When a file was written, and the file."""
    try:
        stat = path.stat()
    except FileNotFoundError:  # another run has replaced it, which shows when it is opened
        return 0, StoredFile(path, 0, "")
    return stat.st_mtime_ns, StoredFile(path, stat.st_size, "")


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"the stored scores in {path} cannot be read ({error}). They are not taken for lost, and nothing is asked "
        "in their place: run again when the storage gives them."
    )
