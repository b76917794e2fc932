"""Which remote jobs answer which keys, on disk before a job is made.

A run that is killed leaves its jobs running; the next run reads here what is under way and waits for that instead of
buying it again, also when responses are grouped otherwise or files have other names. Several processes may share the
folder: what one has recorded the others see at `JobLedger.refresh`, and of those that want the same row one makes the
job.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from backends.errors import ConfigError
from backends.storage import is_remote, list_remote, local_copies, write_bytes_atomic
from backends.vertex.jobs.claims import Claims

_PREFIX, _SUFFIX = "tokenkl-", ".json"


@dataclass(frozen=True, slots=True)
class JobEntry:
    """A batch job: its own key (also its display name), where it runs and the score keys it answers.

    ``sequence`` orders the entries of one folder. ``ended`` means that the job was seen in a terminal state and all its
    rows were read: what is still missing of it needs another job. ``flow_run_id`` is the run that made the job, or
    waits for it now; ``maker`` the process that is making it at this moment.
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
    maker: str | None = None

    @property
    def age_s(self) -> float:
        """Seconds since the job was recorded."""
        return (datetime.now(UTC) - datetime.fromisoformat(self.recorded_at)).total_seconds()


class JobLedger:
    """The job entries below a folder, one small JSON file each; usable from several threads.

    Parameters
    ----------
    folder : Path
        Local or in a bucket; made when the first job is recorded.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.flow_run_id: str | None = None
        self._claims = Claims(folder / "locks")
        self._mutex = threading.RLock()
        self._versions: dict[str, str] = {}  # file name → what changes with its content
        self._entries: dict[str, JobEntry] = {}
        self._latest: dict[str, dict[str, str]] = {}  # place → score key → newest job
        self._tries: dict[str, Counter[str]] = {}  # place → score key → jobs that have ended
        self.refresh()

    def refresh(self) -> None:
        """Take in what other processes have recorded since.

        Raises
        ------
        ConfigError
            If an entry cannot be read.
        """
        with self._mutex:
            changed = {path: version for path, version in self._files() if self._versions.get(path.name) != version}
            for path, copy in local_copies(sorted(changed)):
                self._take(_read(path, copy))
                self._versions[path.name] = changed[path]

    def close(self) -> None:
        """Say that no more jobs are made in this process."""
        self._claims.close()

    def entries(self) -> list[JobEntry]:
        """All entries, oldest first."""
        with self._mutex:
            return sorted(self._entries.values(), key=lambda entry: entry.sequence)

    def get(self, job_key: str) -> JobEntry | None:
        """The entry of a job."""
        return self._entries.get(job_key)

    def in_flight(self, place: str) -> dict[str, str]:
        """Score key → key of the newest job at ``place`` that was to answer it."""
        with self._mutex:
            return dict(self._latest.get(place, {}))

    def newest(self, place: str, key: str) -> JobEntry | None:
        """The newest job at ``place`` that was to answer a score key."""
        job_key = self._latest.get(place, {}).get(key)
        return None if job_key is None else self._entries[job_key]

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

    def claim(self, place: str, keys: Sequence[str], name: str, read: Collection[str] = ()) -> tuple[JobEntry, bool]:
        """The job that is to answer these keys, and whether it is for this process to make it.

        If a job is to answer one of the keys, and has not ended and been read here, it is that job; another process may
        just be making it. Else a new one over all of them is recorded. What is for this process to make is its own
        until `release`.

        Parameters
        ----------
        place : str
            Project, location and bucket.
        keys : sequence of str
        name : str
            What the files of a new job are called, before its key.
        read : collection of str
            Jobs that have ended, and of which it is known that they left these keys out.
        """
        with self._claims.writing(), self._mutex:
            self.refresh()
            newest = [entry for key in keys if (entry := self.newest(place, key)) is not None]
            newest = [entry for entry in newest if not entry.ended or entry.job_key not in read]
            if not newest:
                return self._record(place, keys, name), True
            entry = max(newest, key=lambda entry: entry.sequence)
            if entry.ended or entry.job_name is not None or self._claims.lives(entry.maker):
                return entry, False
            return self._save(replace(entry, maker=self._claims.token, flow_run_id=self.flow_run_id)), True

    def replaced(self, entry: JobEntry, keys: Sequence[str], name: str) -> JobEntry:
        """A new job in place of a claimed one that was never made, where other keys are wanted now."""
        with self._claims.writing(), self._mutex:
            self.refresh()
            new = self._record(entry.backend_place, keys, name)
            self.release(entry)
            return new

    def release(self, entry: JobEntry) -> None:
        """Leave a job that was claimed and could not be made to whoever wants it."""
        with self._mutex:
            now = self._entries[entry.job_key]
            if now.job_name is None and now.maker is not None:
                self._save(replace(now, maker=None))

    def record(self, job_key: str, place: str, input_path: str, output_prefix: str, keys: Sequence[str]) -> JobEntry:
        """Put a job on disk that nobody here is making."""
        with self._claims.writing(), self._mutex:
            self.refresh()
            known = self._entries.get(job_key)
            return known or self._save(self._entry(job_key, place, input_path, output_prefix, keys))

    def update(self, entry: JobEntry) -> JobEntry:
        """Keep the changed state of a job; one that has ended stays so."""
        with self._mutex:
            before = self._entries.get(entry.job_key)
            if before is not None and before.ended:
                entry = replace(entry, ended=True)
            return entry if entry == before else self._save(entry)

    def _record(self, place: str, keys: Sequence[str], name: str) -> JobEntry:
        """A job over these keys that this process is making; one of this name that was never made is taken up."""
        job_key = self.job_key(place, keys)
        known = self._entries.get(job_key)
        paths = (known.input_path, known.output_prefix) if known else job_paths(name, job_key)
        entry = self._entry(job_key, place, *paths, keys)
        return self._save(replace(entry, job_name=known.job_name if known else None, maker=self._claims.token))

    def _entry(self, job_key: str, place: str, input_path: str, output_prefix: str, keys: Sequence[str]) -> JobEntry:
        sequence = 1 + max((entry.sequence for entry in self._entries.values()), default=0)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return JobEntry(
            job_key, sequence, place, input_path, output_prefix, tuple(keys), now, flow_run_id=self.flow_run_id
        )

    def _take(self, entry: JobEntry) -> None:
        """Index an entry, new or changed."""
        before = self._entries.get(entry.job_key)
        self._entries[entry.job_key] = entry
        if entry.ended and not (before is not None and before.ended):
            self._tries.setdefault(entry.backend_place, Counter()).update(entry.keys)
        latest = self._latest.setdefault(entry.backend_place, {})
        for key in entry.keys:
            known = latest.get(key)
            if known is None or self._entries[known].sequence <= entry.sequence:
                latest[key] = entry.job_key

    def _save(self, entry: JobEntry) -> JobEntry:
        write_bytes_atomic(self.folder / f"{entry.job_key}{_SUFFIX}", json.dumps(asdict(entry)).encode("utf-8"))
        self._take(entry)
        return entry

    def _files(self) -> list[tuple[Path, str]]:
        """The files of all entries, each with what changes when it is written."""
        if is_remote(self.folder):
            files = [(file.path, file.version) for file in list_remote(self.folder, recursive=False)]
        else:
            files = [(path, _version(path)) for path in self.folder.glob(f"{_PREFIX}*{_SUFFIX}")]
        return [item for item in files if item[0].name.startswith(_PREFIX) and item[0].name.endswith(_SUFFIX)]


def job_paths(name: str, job_key: str) -> tuple[str, str]:
    """The input file of a job and the folder of its output, in the bucket."""
    return f"batch_input/{name}_{job_key}.jsonl", f"batch_output/{name}_{job_key}"


def _version(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_mtime_ns}/{stat.st_size}/{stat.st_ino}"


def _read(path: Path, copy: Path) -> JobEntry:
    try:
        values = json.loads(copy.read_text(encoding="utf-8"))
        return JobEntry(**(values | {"keys": tuple(values["keys"])}))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"the job record {path} cannot be read ({error}). Restore it; without it the rows of a job "
            "that still runs may be bought twice."
        ) from error
