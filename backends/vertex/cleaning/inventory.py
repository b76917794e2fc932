"""What lies in the bucket and what is to become of it: plain data, no service."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum

PREFIXES = ("batch_input/", "batch_output/")

_JOB_KEY = r"[A-Za-z0-9._-]+_(tokenkl-[0-9a-f]{40})"
_INPUT_NAME = re.compile(rf"batch_input/{_JOB_KEY}\.jsonl")
_OUTPUT_NAME = re.compile(rf"batch_output/{_JOB_KEY}/prediction-[^/]+/.+")


@dataclass(frozen=True, slots=True)
class BucketFile:
    """An object as a listing shows it; ``generation`` changes when it is replaced."""

    name: str
    size: int
    created: datetime
    generation: int

    @property
    def job_key(self) -> str | None:
        """The key of the job that it belongs to; None if its name is not one of ours."""
        match = _INPUT_NAME.fullmatch(self.name) or _OUTPUT_NAME.fullmatch(self.name)
        return match[1] if match else None

    @property
    def is_folder_mark(self) -> bool:
        """Whether it is the empty object by which the console shows a folder."""
        return self.size == 0 and self.name.endswith("/")


@dataclass(slots=True)
class Totals:
    """How many files, how many bytes, when the oldest and the newest were made."""

    files: int = 0
    size: int = 0
    oldest: datetime | None = None
    newest: datetime | None = None

    def add(self, file: BucketFile) -> None:
        """Count one file."""
        self.add_all(Totals(1, file.size, file.created, file.created))

    def add_all(self, other: Totals) -> None:
        """Count what another total counted."""
        self.files += other.files
        self.size += other.size
        if other.oldest is not None and other.newest is not None:
            self.oldest = min(self.oldest or other.oldest, other.oldest)
            self.newest = max(self.newest or other.newest, other.newest)


class Action(Enum):
    """What becomes of a job's files."""

    DELETE = "to delete"
    KEEP = "kept"
    UNDECIDED = "kept, undecided"


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a job's files, and why."""

    action: Action
    reason: str


@dataclass(slots=True)
class Judged:
    """The files of all jobs with one decision; ``example`` is one of the job keys."""

    example: str
    totals: Totals = field(default_factory=Totals)


@dataclass(slots=True)
class Inventory:
    """Everything below the two prefixes at one moment. Files made after ``cutoff`` are never deleted."""

    cutoff: datetime
    by_prefix: dict[str, Totals] = field(default_factory=lambda: {prefix: Totals() for prefix in PREFIXES})
    jobs: dict[str, Totals] = field(default_factory=dict[str, Totals])
    decisions: dict[str, Decision] = field(default_factory=dict[str, Decision])
    foreign: Totals = field(default_factory=Totals)
    foreign_example: str | None = None

    def add(self, prefix: str, file: BucketFile) -> None:
        """Count one file."""
        self.by_prefix[prefix].add(file)
        key = file.job_key
        if key is not None:
            self.jobs.setdefault(key, Totals()).add(file)
        elif not file.is_folder_mark:
            self.foreign.add(file)
            self.foreign_example = self.foreign_example or file.name

    def deletes(self, file: BucketFile) -> bool:
        """Whether the decision is to delete this file."""
        decision = self.decisions.get(file.job_key or "")
        return decision is not None and decision.action is Action.DELETE and file.created <= self.cutoff

    def judged(self) -> dict[Decision, Judged]:
        """The files by decision."""
        found: dict[Decision, Judged] = {}
        for key, decision in self.decisions.items():
            found.setdefault(decision, Judged(key)).totals.add_all(self.jobs[key])
        return found

    def total(self, action: Action) -> Totals:
        """All files of one action."""
        total = Totals()
        for decision, judged in self.judged().items():
            if decision.action is action:
                total.add_all(judged.totals)
        return total


@dataclass(slots=True)
class Deletion:
    """What a deletion did: files gone, files that were replaced meanwhile and stay, failures."""

    deleted: Totals = field(default_factory=Totals)
    replaced: int = 0
    failed: int = 0
    last_failure: str | None = None
