"""Which remote jobs answer which keys, on disk before a job is made.

A run that is killed leaves its jobs running; the next run reads here what is under way and waits for that instead of
buying it again, also when responses are grouped otherwise or files have other names. A ledger is read when it is made
and written by one process at a time: whoever makes jobs holds the lock of the output folder.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from backends.errors import ConfigError
from backends.storage import files_in, local_copies, write_bytes_atomic

_PREFIX, _SUFFIX = "tokenkl-", ".json"


@dataclass(frozen=True, slots=True)
class JobEntry:
    """A batch job: its own key (also its display name), where it runs and the score keys it answers.

    ``sequence`` orders the entries of one folder. ``ended`` means that the job was seen in a terminal state and all its
    rows were read: what is still missing of it needs another job. ``flow_run_id`` is the run that made the job, or
    waits for it now. Without a ``job_name`` it is not known whether the job was made, unless it was ``refused``.
    """

    job_key: str
    sequence: int
    backend_place: str  # project, location, bucket
    input_path: str
    output_prefix: str
    keys: tuple[str, ...]
    recorded_at: str
    job_name: str | None = None
    state: str | None = None
    ended: bool = False
    flow_run_id: str | None = None
    refused: bool = False

    @property
    def age_s(self) -> float:
        """Seconds since the job was recorded."""
        return (datetime.now(UTC) - datetime.fromisoformat(self.recorded_at)).total_seconds()


_NAMES = frozenset(field.name for field in fields(JobEntry))


class JobLedger:
    """The job entries below a folder, one small JSON file each; usable from several threads.

    Parameters
    ----------
    folder : Path
        Local or in a bucket; made when the first job is recorded.

    Raises
    ------
    ConfigError
        If an entry cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.flow_run_id: str | None = None
        self._mutex = threading.Lock()
        self._entries: dict[str, JobEntry] = {}
        self._latest: dict[str, dict[str, str]] = {}  # place → score key → newest job
        self._tries: dict[str, Counter[str]] = {}  # place → score key → jobs that have ended
        self._last = 0
        paths = (path for path in files_in(folder, _SUFFIX) if path.name.startswith(_PREFIX))
        for path, copy in local_copies(paths):
            self._take(_read(path, copy))

    def entries(self) -> list[JobEntry]:
        """All entries, oldest first."""
        with self._mutex:
            return sorted(self._entries.values(), key=lambda entry: entry.sequence)

    def get(self, job_key: str) -> JobEntry | None:
        """The entry of a job."""
        return self._entries.get(job_key)

    def in_flight(self, place: str) -> dict[str, str]:
        """Score key → key of the newest job at ``place`` that was to answer it and was not refused."""
        with self._mutex:
            latest = self._latest.get(place, {})
            return {key: job_key for key, job_key in latest.items() if not self._entries[job_key].refused}

    def left_elsewhere(self, place: str, keys: Iterable[str]) -> list[JobEntry]:
        """The jobs at other places that were to answer some of the keys and were not read to their end."""
        others = [
            entry for entry in self.entries() if entry.backend_place != place and not entry.ended and not entry.refused
        ]
        asked = set(keys) if others else set[str]()
        return [entry for entry in others if not asked.isdisjoint(entry.keys)]

    def newest(self, place: str, key: str) -> JobEntry | None:
        """The newest job at ``place`` that was to answer a score key."""
        job_key = self._latest.get(place, {}).get(key)
        return None if job_key is None else self._entries[job_key]

    def to_read(self, place: str, keys: Iterable[str], read: Container[str]) -> JobEntry | None:
        """The newest job that is to answer one of the keys, of those that were not read to their end (``read``)."""
        newest = (self.newest(place, key) for key in keys)
        left = [entry for entry in newest if entry is not None and not (entry.ended and entry.job_key in read)]
        return max(left, key=lambda entry: entry.sequence, default=None)

    def tries(self, place: str, key: str) -> int:
        """How many jobs that were to answer a score key have ended."""
        return self._tries.get(place, Counter())[key]

    def job_key(self, place: str, keys: Iterable[str]) -> str:
        """The identity of a job over ``keys``: equal work, equal name, until a job of that name has ended.

        The name is a pure function of content and of how many earlier jobs over the same rows have ended, so that a run
        without this folder still finds the remote job.
        """
        content = hashlib.sha256("\n".join([place, *sorted(keys)]).encode("utf-8"))
        generation = 0
        while True:
            digest = content.copy()
            digest.update(b"\n%d" % generation)
            name = f"{_PREFIX}{digest.hexdigest()[:40]}"
            entry = self._entries.get(name)
            if entry is None or not entry.ended:
                return name
            generation += 1

    def next_entry(self, place: str, keys: Sequence[str], name: str) -> JobEntry:
        """The job over these keys that is to be made now, known here at once; `update` puts it on disk.

        Parameters
        ----------
        place : str
            Project, location and bucket.
        keys : sequence of str
        name : str
            What its files are called, before its key.
        """
        job_key = self.job_key(place, keys)
        entry = self._entry(job_key, place, *job_paths(name, job_key), keys)
        with self._mutex:
            known = self._entries.get(job_key)
            if known is not None:
                entry = replace(
                    known,
                    sequence=entry.sequence,
                    recorded_at=entry.recorded_at,
                    flow_run_id=entry.flow_run_id,
                    refused=False,
                )
            self._take(entry)
        return entry

    def record(self, job_key: str, place: str, input_path: str, output_prefix: str, keys: Sequence[str]) -> JobEntry:
        """Put a job on disk; one that is there stays as it is."""
        return self.get(job_key) or self.update(self._entry(job_key, place, input_path, output_prefix, keys))

    def update(self, entry: JobEntry) -> JobEntry:
        """Keep a job, new or changed, known to all callers at once and then on disk; one that has ended stays so."""
        with self._mutex:
            before = self._entries.get(entry.job_key)
            if before is not None and before.ended:
                entry = replace(entry, ended=True)
            self._take(entry)
        # Also where nothing changed: an earlier attempt to write it may have failed.
        write_bytes_atomic(self.folder / f"{entry.job_key}{_SUFFIX}", json.dumps(asdict(entry)).encode("utf-8"))
        return entry

    def _entry(self, job_key: str, place: str, input_path: str, output_prefix: str, keys: Sequence[str]) -> JobEntry:
        with self._mutex:
            self._last += 1
            sequence = self._last
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return JobEntry(
            job_key, sequence, place, input_path, output_prefix, tuple(keys), now, flow_run_id=self.flow_run_id
        )

    def _take(self, entry: JobEntry) -> None:
        """Index an entry, new or changed."""
        before = self._entries.get(entry.job_key)
        self._entries[entry.job_key] = entry
        self._last = max(self._last, entry.sequence)
        if entry.ended and not (before is not None and before.ended):
            self._tries.setdefault(entry.backend_place, Counter()).update(entry.keys)
        latest = self._latest.setdefault(entry.backend_place, {})
        for key in entry.keys:
            known = latest.get(key)
            if known is None or self._entries[known].sequence <= entry.sequence:
                latest[key] = entry.job_key


def job_paths(name: str, job_key: str) -> tuple[str, str]:
    """The input file of a job and the folder of its output, in the bucket."""
    return f"batch_input/{name}_{job_key}.jsonl", f"batch_output/{name}_{job_key}"


def _read(path: Path, copy: Path) -> JobEntry:
    try:
        values = json.loads(copy.read_text(encoding="utf-8"))
        # Other versions have other fields beside these.
        known: dict[str, Any] = {name: values[name] for name in values if name in _NAMES}
        known["keys"] = tuple(values["keys"])
        return JobEntry(**known)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"the job record {path} cannot be read ({error}). Restore it; without it the rows of a job "
            "that still runs may be bought twice."
        ) from error
