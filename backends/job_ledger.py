"""Which remote jobs answer which keys, on disk before a job is made.

A run that is killed leaves its jobs running; the next run reads here what is under way and waits for that instead of
buying it again, also when responses are grouped otherwise or files have other names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from backends.errors import ConfigError


@dataclass(frozen=True, slots=True)
class JobEntry:
    """A batch job: its own key (also its display name), where it runs and the score keys it answers.

    ``sequence`` orders the entries of one folder. ``ended`` means that the job was seen in a terminal state and all its
    rows were read: what is still missing of it needs another job.
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


class JobLedger:
    """The job entries below a folder, one small JSON file each.

    Parameters
    ----------
    folder : Path
        Made when the first job is recorded.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries = {entry.job_key: entry for entry in self._load()}
        self._latest: dict[str, str] = {}
        self._last = max((entry.sequence for entry in self._entries.values()), default=0)
        for entry in sorted(self._entries.values(), key=lambda entry: entry.sequence):
            self._index(entry)

    def entries(self) -> list[JobEntry]:
        """All entries, oldest first."""
        return sorted(self._entries.values(), key=lambda entry: entry.sequence)

    def get(self, job_key: str) -> JobEntry | None:
        """The entry of a job."""
        return self._entries.get(job_key)

    def in_flight(self, place: str) -> dict[str, str]:
        """Score key → key of the newest job at ``place`` that was to answer it."""
        return {key: job for key, job in self._latest.items() if self._entries[job].backend_place == place}

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
            name = f"tokenkl-{digest.hexdigest()[:40]}"
            entry = self._entries.get(name)
            if entry is None or not entry.ended:
                return name
            generation += 1

    def record(self, job_key: str, place: str, input_path: str, output_prefix: str, keys: Sequence[str]) -> JobEntry:
        """Put a job on disk before it is made."""
        known = self._entries.get(job_key)
        if known is not None:
            return known
        self._last += 1
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entry = JobEntry(job_key, self._last, place, input_path, output_prefix, tuple(keys), now)
        self._save(entry)
        self._index(entry)
        return entry

    def update(self, entry: JobEntry) -> JobEntry:
        """Keep the changed state of a job."""
        self._save(entry)
        return entry

    def _index(self, entry: JobEntry) -> None:
        self._latest.update(dict.fromkeys(entry.keys, entry.job_key))

    def _save(self, entry: JobEntry) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"{entry.job_key}.json"
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(asdict(entry), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        self._entries[entry.job_key] = entry

    def _load(self) -> Iterable[JobEntry]:
        for path in sorted(self.folder.glob("tokenkl-*.json")):
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
                yield JobEntry(**(values | {"keys": tuple(values["keys"])}))
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise ConfigError(
                    f"the job record {path} cannot be read ({error}). Restore it; without it the rows of a job "
                    "that still runs may be bought twice."
                ) from error
