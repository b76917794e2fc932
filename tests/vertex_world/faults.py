"""What can go wrong, as one dataclass of switches that a test may change while the world runs."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from tests.vertex_world.wire import MESSAGE, ApiError, quota_details

HttpFault = Literal["401", "403", "404", "429", "429+retry-after", "500", "503", "reset", "slow", "lost", "lost-503"]
"""One fault of an HTTP call.

``reset`` closes the connection before anything is done; ``lost`` does what was asked and then closes it, and
``lost-503`` does what was asked and then answers 503; ``slow`` answers after `Faults.slow_s`.
"""

JobOutcome = str | tuple[str, float] | None
"""How a job ends, and the fraction of its rows that finish first.

``SUCCEEDED``, ``FAILED``, ``EXPIRED``, ``CANCELLED``, ``PARTIALLY_SUCCEEDED``, ``PAUSED``,
``SUCCEEDED_ALL_ROWS_FAILED``, ``NEVER`` (stays RUNNING), ``NEVER_STARTS`` (stays PENDING), or any state of your own
such as ``JOB_STATE_FROBNICATED``.
"""

ENDPOINTS = ("token", "create", "get", "list", "cancel", "delete", "online", "count", "storage")
STORAGE_ENDPOINTS = ("storage.upload", "storage.download", "storage.list", "storage.other")


@dataclass
class Faults:
    """Everything that can be switched on. All rates are probabilities; all are 0 at the start.

    A fault of a row is *permanent* when it depends on the content of the request alone, and *transient* when it also
    depends on how often that request was seen, so that asking again may succeed. Draws are hashes of ``seed``: they
    do not depend on the order of threads.
    """

    seed: int = 0

    # HTTP, by endpoint kind (`ENDPOINTS`, or the finer `STORAGE_ENDPOINTS`)
    http: dict[str, dict[HttpFault, float]] = field(default_factory=dict)
    http_script: dict[str, list[HttpFault | None]] = field(default_factory=dict)  # the next calls, used up in turn
    retry_after_s: float = 1.0
    slow_s: float = 0.5
    latency_s: float = 0.0  # of every online call
    names: str = ""  # of the caller's project or bucket: all errors quote it, 429 also in its details

    # Jobs
    job_outcomes: list[JobOutcome] = field(default_factory=list)  # by order of creation; beyond its end all succeed
    job_error_details: bool = False  # error.details holds objects, as google.rpc does
    output_delay_s: float = 0.0  # the state is terminal before the files are there
    ignore_cancel: bool = False  # a cancel is accepted, and the job succeeds all the same
    provision_first_job: bool = False  # every row of job 0: service agents are being provisioned

    # Rows
    row_error_rate: float = 0.0  # transient: 429 in `status`
    failing_rate: float = 0.0  # permanent: 400 in `status`, and 400 online
    blocked_rate: float = 0.0  # permanent: promptFeedback.blockReason without candidates
    missing_rate: float = 0.0  # transient: no line in the output
    failed_response: Literal["absent", "null", "empty"] = "absent"

    # Output files
    shuffle_rows: bool = False
    duplicate_rate: float = 0.0
    shards: int = 0  # 0: one file predictions.jsonl
    shard_name: str = "predictions-{index:05d}-of-{count:05d}.jsonl"
    incremental_siblings: bool = False  # files of wrong data that are to be ignored
    drop_keys: bool = False  # top-level keys beside `request` do not come back
    mangle_echo: bool = False  # the echoed request has nulls injected and keys reordered
    truncate_last_line: bool = False

    # Answers
    chosen_absent_rate: float = 0.0  # permanent: the sampled token is not in the list
    sentinel_rate: float = 0.0  # permanent: the list ends with entries of -2**100
    no_logprobs_rate: float = 0.0  # transient: an answer without logprobsResult
    extra_fields: bool = False  # fields that no client knows
    # The list of the end of a turn: where the first token is it, never, or after every turn.
    eos_logprobs: Literal["listed", "absent", "always"] = "listed"
    thoughts_rate: float = 0.0  # permanent: the model thinks although it was told not to
    short_lists_rate: float = 0.0  # permanent: the last token of a longer answer has no list
    logprobs_daily_quota: int | dict[str, int] | None = None  # of each model, answers with logprobs until 429
    quota_sentence: str | None = None  # in the place of the message and the details of that 429
    padded_lists: bool = False  # lists end with entries that are no tokens

    # What becomes of a prefill, and how it is counted
    trims_prefill: bool = False  # white space at its end
    refuses_white_space: bool = False  # 400 where it ends so
    merges: tuple[str, ...] = ()  # texts that are one token: from the first of them on another context
    turn_header: int = 0  # tokens of a model turn beside its text
    counts: Literal["tokens", "constant", "uncached", "absent"] = "tokens"
    model_version_change_after: int | None = None  # answers until modelVersion changes

    def __post_init__(self) -> None:
        self.injected: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        self._lock = threading.Lock()

    def error(self, code: int, message: str | None = None, limit: str = "RequestsPerMinutePerProject") -> ApiError:
        """An error of the service. One that quotes names says which limit was met; so does one of a daily limit."""
        words, daily = message or MESSAGE[code], "PerDay" in limit
        if self.names:
            words = f"{words} (projects/{self.names}, gs://{self.names})"
        unit = "1/d/{project}" if daily else "1/min/{project}"
        details = (
            quota_details(limit, unit, self.names or "stand-in") if code == 429 and (daily or self.names) else None
        )
        return ApiError(code, words, details=details)

    def count(self, name: str) -> None:
        """Note that a fault was injected."""
        with self._lock:
            self.injected[name] += 1

    def draw(self, *parts: object) -> float:
        """A number in [0, 1) that depends on the seed and ``parts`` alone."""
        text = "\x1f".join(map(str, (self.seed, *parts)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest()) / 2**56

    def hits(self, rate: float, name: str, *parts: object) -> bool:
        """Whether the fault ``name`` strikes here; counted if so."""
        if rate <= 0 or self.draw(name, *parts) >= rate:
            return False
        self.count(name)
        return True

    def next_http(self, kind: str) -> HttpFault | None:
        """The fault of the next call to an endpoint kind: the script first, then the rates."""
        group = kind.partition(".")[0]
        with self._lock:
            fault = self._scripted(kind, group) or self._drawn(kind, group)
            if fault is not None:
                self.injected[f"{kind}:{fault}"] += 1
        return fault

    def _scripted(self, kind: str, group: str) -> HttpFault | None:
        script = self.http_script.get(kind) or self.http_script.get(group)
        return script.pop(0) if script else None

    def _drawn(self, kind: str, group: str) -> HttpFault | None:
        self._calls[kind] += 1
        draw = self.draw("http", kind, self._calls[kind])
        for fault, rate in (self.http.get(kind) or self.http.get(group) or {}).items():
            if draw < rate:
                return fault
            draw -= rate
        return None

    def outcome(self, index: int) -> tuple[str, float]:
        """How job number ``index`` ends, and the fraction of its rows that finish."""
        scripted = self.job_outcomes[index] if index < len(self.job_outcomes) else None
        if scripted is None:
            return "SUCCEEDED", 1.0
        state, fraction = scripted if isinstance(scripted, tuple) else (scripted, _USUAL_FRACTION.get(scripted, 0.0))
        if state != "SUCCEEDED":
            self.count(f"job:{state}")
        return state, fraction


_USUAL_FRACTION = {"SUCCEEDED": 1.0, "SUCCEEDED_ALL_ROWS_FAILED": 1.0, "PARTIALLY_SUCCEEDED": 0.5}
