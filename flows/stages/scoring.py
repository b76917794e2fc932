"""From a group of contexts to scores on disk, as they arrive."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from backends.base import WAITING, ScoreRequest
from backends.errors import BackendError, ModelNotUsableError
from backends.scores.rows import storable
from backends.scores.store import ScoreJournal
from flows.folder.layout import Stores
from flows.folder.room import disk_refused
from kl.output.room import refusal_of
from kl.records import Score, ScoreFailure

logger = logging.getLogger(__name__)

OnResult = Callable[[str, Score | ScoreFailure], None]

# Each group of responses waits for its own.
_writers = ThreadPoolExecutor(16, thread_name_prefix="score-writer")

# How many answers wait in a journal before they become a part of the table, and how many bytes of full vocabularies.
_PART_ROWS = 2000
_PART_BYTES = 32_000_000


@dataclass(frozen=True, slots=True)
class GroupOutcome:
    """How many contexts of a group have a score, and how many failed, by reason."""

    n_scored: int
    failures: dict[str, int]
    versions: tuple[str, ...]
    tokens: dict[str, tuple[int, int]]  # model → input and output tokens, as the service counted them
    n_final: int = 0  # of the failures, those that are kept: asking again cannot help


@dataclass(slots=True)
class _Incoming:
    """Results that are not in the table yet, and what is still expected.

    When the disk refuses one, ``on_refused`` is called, once, and says whether what is in flight will still come; then
    it is all taken in before the refusal is raised.
    """

    stores: Stores
    where: dict[str, tuple[str, str]]  # key → prompt id, model
    journal: ScoreJournal
    on_refused: Callable[[OSError], bool]
    refusal: OSError | None = None
    n_in_memory: int = 0  # answers that are in no file
    waiting: list[Score | ScoreFailure] = field(default_factory=list[Score | ScoreFailure])
    n_bytes: int = 0
    n_scored: int = 0
    failures: dict[str, int] = field(default_factory=dict[str, int])
    n_final: int = 0
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
        result = storable(result)
        self.waiting.append(result)  # first: what the journal refuses may still become a part
        try:
            self.journal.add(prompt_id, model, result)
        except OSError as error:
            self.n_in_memory += 1
            self.refused(error)
        if isinstance(result, ScoreFailure):
            self.failures[result.reason] = self.failures.get(result.reason, 0) + 1
            self.n_final += result.final
            return
        self.n_scored += 1
        self.n_bytes += result.full_logprobs.nbytes if result.full_logprobs is not None else 0
        if result.model_version is not None:
            self.versions.add(result.model_version)
        sums = self.tokens.get(model, (0, 0))
        self.tokens[model] = (sums[0] + (result.input_tokens or 0), sums[1] + (result.output_tokens or 0))

    def model_of(self, result: Score | ScoreFailure) -> str:
        """The model that was asked."""
        return self.where[result.key][1]

    @property
    def outcome(self) -> GroupOutcome:
        return GroupOutcome(self.n_scored, self.failures, tuple(sorted(self.versions)), self.tokens, self.n_final)

    @property
    def full(self) -> bool:
        return self.n_bytes > _PART_BYTES or len(self.waiting) >= _PART_ROWS

    def refused(self, error: OSError) -> None:
        """Note a disk's refusal; any other error, and one for which nothing is waited, is raised."""
        if refusal_of(error) is None:
            raise error
        if self.refusal is None:
            self.refusal = error
            if not self.on_refused(error):
                raise error

    def write(self) -> None:
        """Make a part of what waits; tried again where room was kept for that."""
        try:
            self._write()
        except OSError as error:
            self.refused(error)
            self._write()

    def check(self) -> None:
        """Raise what the disk refused, if it did, with how many answers are nowhere."""
        if self.refusal is not None:
            raise disk_refused(self.refusal, self.n_in_memory if self.waiting else 0)

    def _write(self) -> None:
        by_place: dict[tuple[str, str], list[Score | ScoreFailure]] = {}
        for result in self.waiting:
            by_place.setdefault(self.where[result.key], []).append(result)
        for (prompt_id, model), batch in by_place.items():
            self.stores.scores.append(prompt_id, model, batch)
            if self.refusal is None:  # else they are of no use, and there is no room
                failed = [result for result in batch if isinstance(result, ScoreFailure)]
                self.stores.failures.append(prompt_id, model, failed)
        # Only now: if the disk refused a part, the answers must stay in the journal.
        self.waiting, self.n_bytes, self.n_in_memory = [], 0, 0
        self.journal.clear()


async def store_answers(
    results: AsyncIterator[Score | ScoreFailure],
    asked: Sequence[tuple[str, ScoreRequest]],
    stores: Stores,
    on_result: OnResult,
    *,
    only_looks: bool = False,
    on_refused: Callable[[OSError], bool] = lambda _: False,
) -> GroupOutcome:
    """Put each answer on disk the moment it arrives, and a failure for each context that gets none.

    Parameters
    ----------
    results : asynchronous iterator
        What the backend says, in any order.
    asked : sequence of (prompt id, ScoreRequest)
        What it was asked.
    on_result : callable
        Told each context that is settled: the model that was asked, and what came of it.
    only_looks : bool
        That nothing was to be waited for: where the look fails, the jobs may still have the answers.
    on_refused : callable
        Told once that the disk takes no more, perhaps in another thread: it stops the asking and makes what room it
        can. Says whether the iterator will end by itself, with what is in flight; default: it will not.

    Raises
    ------
    DiskRefusedError
        At the end, if the disk refused something.
    """
    where = {key: (prompt_id, request.model) for prompt_id, request in asked for key in request.keys}
    incoming = _Incoming(stores, where, stores.scores.journal(uuid.uuid4().hex), on_refused)
    try:
        async with _closing(results):
            async for result in results:
                incoming.add(result)
                on_result(incoming.model_of(result), result)
                if incoming.full:
                    await _write(incoming)
        await _write(incoming)
    except OSError as error:
        incoming.refused(error)  # what a backend could not keep ends it after its last answer
    except BackendError as error:
        logger.warning("%s", error)
        # A collect must not publish the rows of jobs that it could not look at as missing.
        waits = only_looks and not isinstance(error, ModelNotUsableError)
        _fail_rest(incoming, WAITING if waits else _reason(error), str(error), on_result)
    finally:
        try:
            incoming.write()
        finally:
            incoming.check()
    if incoming.open_keys:
        message = f"the backend gave no result for {len(incoming.open_keys)} of {len(where)} contexts."
        logger.error("%s", message)
        _fail_rest(incoming, "no-result", message, on_result)
        incoming.write()
    return incoming.outcome


async def _write(incoming: _Incoming) -> None:
    """Write a part to its end, whatever is cancelled meanwhile.

    Not in the loop: a local part takes milliseconds, most of them in the system, in which calls would wait.
    """
    work = _writers.submit(incoming.write)
    try:
        await asyncio.shield(asyncio.wrap_future(work))
    except asyncio.CancelledError:
        work.result()  # a cancel must not overtake it
        raise


@asynccontextmanager
async def _closing(results: AsyncIterator[Score | ScoreFailure]) -> AsyncGenerator[None]:
    # A plugin may return any async iterator; only generators need, and have, a close.
    try:
        yield
    finally:
        if isinstance(results, AsyncGenerator):
            await results.aclose()


def _reason(error: BackendError) -> str:
    """``ModelNotUsableError`` → ``model-not-usable``: the code that reports count by."""
    words = re.findall(r"[A-Z][a-z]*", type(error).__name__.removesuffix("Error"))
    return "-".join(words).lower()


def _fail_rest(incoming: _Incoming, reason: str, message: str, on_result: OnResult) -> None:
    for key in sorted(incoming.open_keys):
        failure = ScoreFailure(key, reason, message)
        incoming.add(failure)
        on_result(incoming.model_of(failure), failure)
