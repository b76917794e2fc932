"""From a group of contexts to scores on disk, as they arrive."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from backends.base import WAITING, Backend, ScoreRequest
from backends.errors import BackendError, ModelNotUsableError
from backends.scores.store import ScoreJournal, ScoreStore
from backends.session import BackendSession
from backends.storage.files import is_remote
from flows.config.models import RunConfig, Stage, resolve_backend
from kl.records import Score, ScoreFailure

logger = logging.getLogger(__name__)

# For remote storage; each group of responses waits for its own.
_writers = ThreadPoolExecutor(16, thread_name_prefix="score-writer")

# How many answers wait in a journal before they become a part of the table, and how many bytes of full vocabularies.
_PART_ROWS = 2000
_PART_BYTES = 32_000_000


@dataclass(frozen=True, slots=True)
class Stores:
    """Where results go: scores and final failures for good, everything that failed for this run's report."""

    scores: ScoreStore
    failures: ScoreStore

    @classmethod
    def of(cls, output_dir: Path) -> Stores:
        """The stores of an output directory."""
        return cls(
            ScoreStore(output_dir / "scores"),
            ScoreStore(output_dir / ".parts" / "failures", every_failure=True),
        )


@dataclass(frozen=True, slots=True)
class GroupOutcome:
    """How many contexts of a group have a score, and how many failed, by reason."""

    n_scored: int
    failures: dict[str, int]
    versions: tuple[str, ...]
    tokens: dict[str, tuple[int, int]]  # model → input and output tokens, as the service counted them

    def __add__(self, other: GroupOutcome) -> GroupOutcome:
        tokens = dict(self.tokens)
        for model, (n_in, n_out) in other.tokens.items():
            before = tokens.get(model, (0, 0))
            tokens[model] = (before[0] + n_in, before[1] + n_out)
        return GroupOutcome(
            self.n_scored + other.n_scored,
            dict(Counter(self.failures) + Counter(other.failures)),
            tuple(sorted({*self.versions, *other.versions})),
            tokens,
        )


def outcome_of_stored(results: Iterable[Score | ScoreFailure], models: Mapping[str, str]) -> GroupOutcome:
    """The outcome that answers in the store had when they came; ``models`` says who was asked, by key."""
    total = GroupOutcome(0, {}, (), {})
    for result in results:
        if isinstance(result, ScoreFailure):
            total += GroupOutcome(0, {result.reason: 1}, (), {})
            continue
        versions = () if result.model_version is None else (result.model_version,)
        tokens = (result.input_tokens or 0, result.output_tokens or 0)
        total += GroupOutcome(1, {}, versions, {models[result.key]: tokens})
    return total


@dataclass(slots=True)
class _Arrivals:
    """Results that are not in the table yet, and what is still expected."""

    stores: Stores
    where: dict[str, tuple[str, str]]  # key → prompt id, model
    journal: ScoreJournal
    waiting: list[Score | ScoreFailure] = field(default_factory=list[Score | ScoreFailure])
    n_bytes: int = 0
    n_scored: int = 0
    failures: dict[str, int] = field(default_factory=dict[str, int])
    versions: set[str] = field(default_factory=set[str])
    tokens: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    open_keys: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.open_keys = set(self.where)

    def add(self, result: Score | ScoreFailure) -> None:
        if result.key not in self.open_keys:
            raise BackendError(f"the backend answered {result.key}, which was not asked or was answered before.")
        self.open_keys.discard(result.key)
        prompt_id, model = self.where[result.key]
        self.waiting.append(result)  # first: what the journal refuses may still become a part
        self.journal.add(prompt_id, model, result)
        if isinstance(result, ScoreFailure):
            self.failures[result.reason] = self.failures.get(result.reason, 0) + 1
            return
        self.n_scored += 1
        self.n_bytes += result.full_logprobs.nbytes if result.full_logprobs is not None else 0
        if result.model_version is not None:
            self.versions.add(result.model_version)
        sums = self.tokens.get(model, (0, 0))
        self.tokens[model] = (sums[0] + (result.input_tokens or 0), sums[1] + (result.output_tokens or 0))

    @property
    def full(self) -> bool:
        return self.n_bytes > _PART_BYTES or len(self.waiting) >= _PART_ROWS

    def write(self) -> None:
        by_place: dict[tuple[str, str], list[Score | ScoreFailure]] = {}
        for result in self.waiting:
            by_place.setdefault(self.where[result.key], []).append(result)
        for (prompt_id, model), batch in by_place.items():
            self.stores.scores.append(prompt_id, model, batch)
            failed = [result for result in batch if isinstance(result, ScoreFailure)]
            self.stores.failures.append(prompt_id, model, failed)
        # Only now: if the disk refused a part, the answers must stay in the journal.
        self.waiting, self.n_bytes = [], 0
        self.journal.clear()


async def score_and_store(
    backend: Backend,
    asks: Sequence[tuple[str, ScoreRequest]],
    stores: Stores,
    on_results: Callable[[int], None],
    stage: Stage = "run",
) -> GroupOutcome:
    """Ask a backend for contexts and put each answer on disk the moment it arrives.

    Parameters
    ----------
    asks : sequence of (prompt id, ScoreRequest)
    on_results : callable
        Told how many further contexts are settled.
    stage : {"run", "submit", "collect"}
        Whether jobs are waited for, made only, or looked at once.
    """
    where = {key: (prompt_id, request.model) for prompt_id, request in asks for key in request.keys}
    arrivals = _Arrivals(stores, where, stores.scores.journal(uuid.uuid4().hex))
    try:
        ask = {"run": backend.score, "submit": backend.submit, "collect": backend.collect}[stage]
        async with _closing(ask([request for _, request in asks])) as results:
            async for result in results:
                arrivals.add(result)
                on_results(1)
                if arrivals.full:
                    await _write(arrivals)
        await _write(arrivals)
    except BackendError as error:
        logger.warning("%s", error)
        # Looking failed, not the jobs: a collect must not publish their rows as missing.
        looked = stage == "collect" and not isinstance(error, ModelNotUsableError)
        _fail_rest(arrivals, WAITING if looked else _reason(error), str(error), on_results)
    finally:
        arrivals.write()
    if arrivals.open_keys:
        message = f"the backend gave no result for {len(arrivals.open_keys)} of {len(where)} contexts."
        logger.error("%s", message)
        _fail_rest(arrivals, "no-result", message, on_results)
        arrivals.write()
    versions = tuple(sorted(arrivals.versions))
    return GroupOutcome(arrivals.n_scored, arrivals.failures, versions, arrivals.tokens)


async def _write(arrivals: _Arrivals) -> None:
    """Write a part to its end, whatever is cancelled meanwhile; the loop does not wait for remote storage."""
    if not is_remote(arrivals.stores.scores.root):
        arrivals.write()  # quicker than a thread
        return
    work = _writers.submit(arrivals.write)
    try:
        await asyncio.shield(asyncio.wrap_future(work))
    except asyncio.CancelledError:
        work.result()  # a cancel must not overtake it
        raise


@asynccontextmanager
async def _closing(results: AsyncIterator[Score | ScoreFailure]) -> AsyncIterator[AsyncIterator[Score | ScoreFailure]]:
    # A plugin may return any async iterator; only generators need, and have, a close.
    try:
        yield results
    finally:
        if isinstance(results, AsyncGenerator):
            await results.aclose()


def _reason(error: BackendError) -> str:
    """``ModelNotUsableError`` → ``model-not-usable``: the code that reports count by."""
    words = re.findall(r"[A-Z][a-z]*", type(error).__name__.removesuffix("Error"))
    return "-".join(words).lower()


def _fail_rest(arrivals: _Arrivals, reason: str, message: str, on_results: Callable[[int], None]) -> None:
    for key in sorted(arrivals.open_keys):
        arrivals.add(ScoreFailure(key, reason, message))
        on_results(1)


_sessions: dict[str, BackendSession] = {}
_sessions_lock = threading.Lock()


def session_for(config: RunConfig) -> BackendSession:
    """The one session of this process for a run's backend; opened at the first call.

    Raises
    ------
    ConfigError
        If the backend cannot be built or entered.
    """
    name = _session_name(config)
    with _sessions_lock:
        if name not in _sessions:
            # Imported late: a program prepares Prefect's settings before anything loads it.
            from prefect.runtime import flow_run

            backend, options, _ = resolve_backend(config)
            built = backend(options, state_dir=config.output_dir / "scores")
            built.run_id = flow_run.id
            _sessions[name] = BackendSession(built).__enter__()
        return _sessions[name]


def stop_session(config: RunConfig) -> None:
    """Cancel all that the run's backend does, and refuse more; callable from any thread."""
    session = _sessions.get(_session_name(config))
    if session is not None:
        session.cancel()


def close_session(config: RunConfig) -> None:
    """Leave the run's backend; work that is still under way is cancelled."""
    with _sessions_lock:
        session = _sessions.pop(_session_name(config), None)
    if session is not None:
        session.__exit__(None, None, None)


def _session_name(config: RunConfig) -> str:
    return config.model_dump_json()
