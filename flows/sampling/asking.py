"""Asking models for responses: each is on disk when it comes, and in its file when the file's others are there too."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from heapq import nlargest
from typing import Any

from backends.base import Backend, Sample, SampleRequest
from backends.service.breaker import NOT_ASKED
from backends.session import BackendSession, SessionClosedError
from flows.config.sampling import SampleConfig
from flows.folder.room import Reserve, disk_refused
from flows.runtime.interrupts import InterruptedRunError, stop_on_signal
from flows.runtime.progress import ProgressReporter
from flows.sampling.files import Target
from flows.sampling.identity import check_identities
from flows.sampling.plan import SamplePlan
from flows.stages.prompts import prompt_hashes
from flows.watch.spending import Spending, compared_text, details_of
from kl.input.responses import RENDERED
from kl.input.writer import response_entry
from kl.output.room import refusal_of
from kl.records import ScoreFailure

logger = logging.getLogger("flows.sample")

# Reasons of failures that another request would meet at once.
_NOT_AGAIN = frozenset({"daily-quota", "refused", "deadline", NOT_ASKED})


@dataclass(frozen=True, slots=True)
class SampleReport:
    """How a sampling ended: ``missing`` counts responses by reason, ``unreadable`` those that a run would skip.

    ``paths`` are the files that are there, in their order.
    """

    paths: list[str]
    n_responses: int
    n_left_alone: int
    n_unusable_prompts: int = 0
    missing: dict[str, int] = field(default_factory=dict[str, int])
    unreadable: int = 0

    @property
    def complete(self) -> bool:
        """Whether every response is there and can be read."""
        return not (self.missing or self.unreadable or self.n_unusable_prompts)


class Sampler:
    """One sampling under way, which takes results in as they come.

    Parameters
    ----------
    plan : SamplePlan
    """

    def __init__(self, plan: SamplePlan) -> None:
        self.plan = plan
        self.failures = dict(plan.failures)
        self._unwritten: set[Target] = set()
        self._unreadable: Counter[str] = Counter()
        self._reserve = Reserve(plan.state.folder, _entries_in_flight(plan))
        self._refusal: OSError | None = None
        self._n_lost = 0
        self._counted: dict[str, int] = {}  # input tokens by the service, of each answer that says them

    def run(self) -> SampleReport:
        """Ask for what is missing; gives what is there at the end.

        Raises
        ------
        InterruptedRunError
            If the user stopped it.
        TokenKLError, OSError
            If nothing more can be asked, or written; what came before is on disk.
        """
        self._unwritten = {target for target, _ in self.plan.places.values() if target.entries}
        for target in self.plan.targets:
            if target in self._unwritten and not target.missing:
                self._write(target)
        if self.plan.requests:
            self._ask()
        for target in self.plan.targets:
            if target in self._unwritten:
                self._write(target)
        return self._report()

    def _ask(self) -> None:
        config, session = self.plan.config, BackendSession(self.plan.build_backend())
        with session:
            with self._reserve.kept(), stop_on_signal(session) as stopped:
                try:
                    session.run(self._rounds(session.backend))
                except SessionClosedError:
                    if not stopped.is_set():
                        raise
            self._log_counted()
            if stopped.is_set():
                line = session.interrupt() or "nothing goes on elsewhere."
                raise InterruptedRunError(line, config)

    def _log_counted(self) -> None:
        """How far the estimate was right."""
        counted, plan = self._counted, self.plan
        estimated = plan.estimate([request for request in plan.requests if request.key in counted]).input_tokens
        n = len(counted)
        if plan.backend.capabilities.remote and (line := compared_text(estimated, n, sum(counted.values()), n)):
            logger.info("%s", line)

    async def _rounds(self, backend: Backend) -> None:
        """Ask, and ask again for what came without what it must have."""
        config, left = self.plan.config, self.plan.requests
        await check_identities(self.plan, backend)
        if config.preflight:
            await _preflight(backend, config, left)
        await self._note_prompts(backend)
        spending = Spending(type(backend), backend.options, self.plan.estimate(left).cost_usd, is_limit=True)
        with ProgressReporter("responses sampled", len(left), details_of(backend, spending)) as progress:
            # A backend with jobs follows them up itself.
            retries = 0 if backend.capabilities.deferred else config.sampling.max_retries
            spent = self.plan.estimate(left).cost_usd or 0.0  # at most; where a limit is set, the price is known
            for number in range(1 + retries):
                if number:
                    logger.info(
                        "%d responses are asked again (%d of %d)", len(left), number, config.sampling.max_retries
                    )
                async for result in backend.sample(left):
                    spending.note(self.plan.places[result.key][0].model, result)
                    if isinstance(result, Sample) and result.input_tokens:
                        self._counted[result.key] = result.input_tokens
                    await self._store(result, backend)
                    progress.advance(int(isinstance(result, Sample)))
                if self._refusal is not None:
                    raise disk_refused(self._refusal, self._n_lost)
                left = [request for request in left if self._may_ask_again(request)]
                limit = config.max_cost_usd
                spent += self.plan.estimate(left).cost_usd or 0.0
                if not left or number == retries:
                    return
                if limit is not None and spent > limit:
                    logger.warning(
                        "%d responses are not asked again: with them this may cost up to %.4f USD, above "
                        "max_cost_usd = %g",
                        len(left),
                        spent,
                        limit,
                    )
                    return

    async def _store(self, result: Sample | ScoreFailure, backend: Backend) -> None:
        """Put a result on disk, and in its file with the last of the file; where that is refused, no more is asked.

        What is in flight then is stored in the room that was kept for it, and counted where even that is too small. A
        line that is refused is written with the next one that is not.
        """
        stored = False
        try:
            target = await asyncio.to_thread(self._take, result)
            stored = True
            if self._refusal is None and target is not None and not target.missing:
                await asyncio.to_thread(self._write, target)
        except OSError as error:
            if refusal_of(error) is None:
                raise
            if self._refusal is not None:
                self._n_lost += 1
                return
            self._refusal = error
            self._reserve.give_up()
            waits = backend.stop_asking(f"the disk takes no more: {error}")
            if not stored:
                await self._store(result, backend)
            if not waits:
                raise disk_refused(error, self._n_lost) from error
            logger.error("%s: no more is asked; responses in flight are waited for", error)

    def _may_ask_again(self, request: SampleRequest) -> bool:
        failure = self.failures.get(request.key)
        return failure is not None and not failure.final and failure.reason not in _NOT_AGAIN

    async def _note_prompts(self, backend: Backend) -> None:
        """Have new files say how their model was given the prompt, where that is known: another's template may differ.

        It is asked before the asking begins, so that what was bought never waits for it.
        """
        unknown = list({target: None for target, _ in self.plan.places.values() if RENDERED not in target.head})
        hashes = await prompt_hashes(backend, [(target.model, target.asked.prompt) for target in unknown])
        for target, sha256 in zip(unknown, hashes, strict=True):
            if sha256 is not None:
                target.head[RENDERED] = sha256

    def _take(self, result: Sample | ScoreFailure) -> Target | None:
        """Put a result on disk; gives the file that a response belongs to."""
        target, index = self.plan.places[result.key]
        if isinstance(result, ScoreFailure):
            self._note(result)
            return None
        entry = _entry(result, self.plan.config, index)
        try:
            self._add({"key": result.key, "response": entry})  # before anything else: it is paid for
        except ValueError as error:  # a NaN, which no file can have
            self._note(ScoreFailure(result.key, "no-number", f"the response cannot be written: {error}."))
            return None
        self.failures.pop(result.key, None)
        target.put(index, entry)
        self._unwritten.add(target)
        return target

    def _note(self, failure: ScoreFailure) -> None:
        self.failures[failure.key] = failure
        if failure.final:
            self._add({"key": failure.key, "reason": failure.reason, "message": failure.message})

    def _add(self, entry: dict[str, Any]) -> None:
        self.plan.state.add(entry)
        self._n_lost = 0  # those that were refused stand before it

    def _write(self, target: Target) -> None:
        if not target.entries:
            return
        for line in target.write():
            logger.warning("%s", line)
            self._unreadable[str(target.path)] += 1
        self._unwritten.discard(target)
        target.let_go()

    def _report(self) -> SampleReport:
        targets, missing = self.plan.targets, Counter[str]()
        lacking: dict[Target, list[ScoreFailure]] = {}
        for key, (target, index) in self.plan.places.items():
            if index not in target.entries:
                lacking.setdefault(target, []).append(self.failures.get(key) or _no_result(key))
        for target, failures in lacking.items():
            missing.update(failure.reason for failure in failures)
            logger.warning(
                "%s, %s: %d of %d responses are missing (%s): %s",
                target.path.name, target.model, len(failures), target.n_wanted,
                ", ".join(sorted({failure.reason for failure in failures})), failures[0].message,
            )  # fmt: skip
        return SampleReport(
            [str(target.path) for target in targets if target.is_there],
            sum(target.n_there for target in targets),
            self.plan.n_left_alone,
            self.plan.prompts.n_unusable,
            dict(sorted(missing.items())),
            sum(self._unreadable.values()),
        )


async def _preflight(backend: Backend, config: SampleConfig, requests: Sequence[SampleRequest]) -> None:
    """Prove that each model can be used, once, before anything is bought.

    Raises
    ------
    ModelNotUsableError
        If one cannot.
    """
    for model in dict.fromkeys(request.model for request in requests):
        if any(request.prefix for request in requests):
            version = await backend.preflight(model)
        else:
            version = await backend.preflight_sampling(model, config.sampling.settings)
        logger.info("%s can be sampled%s", model, f" ({version})" if version else "")


def _entries_in_flight(plan: SamplePlan) -> int:
    """How many candidates the responses may have that are in flight at once; jobs keep what they answered."""
    if plan.backend.capabilities.deferred:
        return 0
    longest = (item.settings.max_tokens * (1 + item.settings.top_logprobs) for item in plan.requests)
    return sum(nlargest(getattr(plan.options, "max_concurrent", 1), longest))


def _no_result(key: str) -> ScoreFailure:
    return ScoreFailure(key, "no-result", "the backend gave neither a response nor a reason. Run again to ask it.")


def _entry(sample: Sample, config: SampleConfig, index: int) -> dict[str, Any]:
    """A response as it stands in its file."""
    counts = {"prompt_tokens": sample.input_tokens, "completion_tokens": sample.output_tokens}
    known = [value for value in counts.values() if value is not None]
    usage: dict[str, Any] = {**counts, "total_tokens": sum(known) if len(known) == len(counts) else None}
    about: dict[str, Any] = {"sample": index, "seed": config.sampling.seed + index, "usage": usage}
    top_k = sample.response.sampling.top_k
    about |= {} if top_k is None else {"top_k": top_k}  # the backend set it itself
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return response_entry(sample.response) | about | {"sampled_at": now}
