"""Checks of the contract suite on how a backend is called: at the same time, interrupted, taken up again."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from backends.base import NOT_SUBMITTED, WAITING, Backend
from backends.contract.answers import differences
from backends.contract.subject import (
    Call,
    ContractBreach,
    Problems,
    Subject,
    check,
    in_time,
    planned,
    restricted,
    scored,
)
from kl.records import Prompt, Score, ScoreFailure, Turn

Results = list[Score | ScoreFailure]
_LOOK_AGAIN_S = 0.2
_CANCELLED_AFTER_S = (0.0, 0.1, 0.5)
_INTERRUPTED_S = 2.0  # what a stopped run leaves a backend


@check()
def nothing_asked_is_nothing_answered(subject: Subject) -> Problems:
    """score() without requests, or with a request without positions, yields nothing."""
    bare = subject.bare_request(subject.cases[0])
    for what, requests in (("no requests", ()), ("a request without positions", (bare,))):
        results = subject.results(Call(requests, {}))
        if results:
            yield f"{what}: {len(results)} results."


@check()
def the_report_is_json(subject: Subject) -> Problems:
    """report() says what the record of a run keeps of the backend's work, as a dict of JSON types."""
    call = planned([restricted(subject.request(subject.cases[0]), lambda position, _: position == 0)])

    async def work(backend: Backend) -> object:
        await subject.collect(backend, call)
        return backend.report()

    report = subject.use(work)
    try:
        json.dumps(report, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ContractBreach(f"{report!r} is not JSON: {error}") from error
    if not isinstance(report, dict):
        yield f"it is a {type(report).__name__}; return a dict."


@check()
def calls_at_the_same_time_keep_apart(subject: Subject) -> Problems:
    """Several calls of score() on one backend at once each yield their own keys, with the same scores as alone."""
    calls = [planned([subject.request(case)]) for case in subject.cases]

    async def work(backend: Backend) -> list[Results]:
        return await asyncio.gather(*(subject.collect(backend, call) for call in calls))

    for call, results in zip(calls, subject.use(work), strict=True):
        foreign = [result.key for result in results if result.key not in call.places]
        if foreign:
            yield f"{call.requests[0].name!r}: {len(foreign)} results belong to another call."
        yield from differences(scored(call, results), subject.answers, subject.noise_nats)


@check()
def closing_the_results_early_leaves_the_backend_usable(subject: Subject) -> Problems:
    """Who takes one result and closes the iterator is not kept waiting, and may ask again."""
    call = planned(subject.request(case) for case in subject.cases)
    again = planned([subject.request(subject.cases[0])])

    async def work(backend: Backend) -> Results:
        results = backend.score(call.requests)
        await in_time(anext(results), "the first result", subject.deadline_s)
        if isinstance(results, AsyncGenerator):  # other iterators have no close
            await in_time(results.aclose(), "closing the results", subject.close_s)
        return await subject.collect(backend, again)

    yield from differences(scored(again, subject.use(work)), subject.answers, subject.noise_nats)


@check()
def a_cancelled_call_ends_and_can_be_taken_up_again(subject: Subject) -> Problems:
    """Cancelling ends a call soon; a later run asks what in_flight() names, job by job, and gets every result."""
    call = planned(subject.request(case) for case in subject.cases)
    with tempfile.TemporaryDirectory(prefix="tokenkl-contract-") as folder:
        for wait_s in _CANCELLED_AFTER_S:
            yield from subject.use(lambda backend, wait_s=wait_s: _cancel(subject, backend, call, wait_s), Path(folder))
        results = subject.use(lambda backend: _take_up(subject, backend, call), Path(folder))
    yield from differences(scored(call, results), subject.answers, subject.noise_nats)


@check(lambda subject: subject.backend.capabilities.deferred)
def what_is_submitted_is_collected_later(subject: Subject) -> Problems:
    """submit() waits for nothing; collect() looks once, makes no first job, and finds the scores in the end."""
    case = subject.cases[0]
    turn = Turn("user", f"Submission {uuid.uuid4()}")  # asked by nobody before
    call = planned([subject.request(replace(case, name="submitted", prompt=Prompt((turn,))))])
    with tempfile.TemporaryDirectory(prefix="tokenkl-contract-") as folder:
        state = Path(folder)

        def results(method: Callable[[Backend], AsyncIterator[Score | ScoreFailure]]) -> Results:
            return subject.use(lambda backend: _drained(subject, method(backend), call), state)

        yield from _not_all(
            NOT_SUBMITTED, results(lambda backend: backend.collect(call.requests)), "collect() at first"
        )
        for _ in range(2):
            yield from _not_all(WAITING, results(lambda backend: backend.submit(call.requests)), "submit()")
        until = time.monotonic() + subject.deadline_s
        while True:
            found = results(lambda backend: backend.collect(call.requests))
            waiting = any(isinstance(result, ScoreFailure) and result.reason == WAITING for result in found)
            if not waiting or time.monotonic() > until:
                break
            time.sleep(_LOOK_AGAIN_S)
        expected = subject.use(lambda backend: subject.collect(backend, call), state)
    yield from differences(scored(call, found), scored(call, expected), subject.noise_nats)


async def _drained(subject: Subject, results: AsyncIterator[Score | ScoreFailure], call: Call) -> Results:
    async def work() -> Results:
        return [result async for result in results]

    found = await in_time(work(), "submit() or collect()", subject.deadline_s)
    if sorted(result.key for result in found) != sorted(call.places):
        raise ContractBreach(f"{len(found)} results for {len(call.places)} keys of submit() or collect().")
    return found


def _not_all(reason: str, results: Results, what: str) -> Problems:
    for result in results:
        seen = result.reason if isinstance(result, ScoreFailure) else "a score"
        if seen != reason:
            yield f"{what}: {seen} for a key where {reason!r} is due."
            return


async def _cancel(subject: Subject, backend: Backend, call: Call, wait_s: float) -> list[str]:
    task = asyncio.create_task(subject.collect(backend, call))
    await asyncio.sleep(wait_s)
    if not task.cancel():
        task.result()
        return []  # done before it could be cancelled
    done, _ = await asyncio.wait({task}, timeout=subject.close_s)
    if not done:
        return [f"a call that was cancelled after {wait_s:g} s went on for more than {subject.close_s:g} s."]
    if not task.cancelled():
        return [f"a call that was cancelled after {wait_s:g} s went on to its end."]
    line = cast(object, await in_time(backend.interrupted(), "interrupted()", _INTERRUPTED_S))
    is_line = line is None or (isinstance(line, str) and "\n" not in line)
    return [] if is_line else [f"interrupted() returned {line!r}; return one line or None."]


async def _take_up(subject: Subject, backend: Backend, call: Call) -> Results:
    in_flight = backend.in_flight()
    foreign = in_flight.keys() - call.places.keys()
    if foreign:
        raise ContractBreach(f"in_flight() names {len(foreign)} keys that nobody has asked for.")
    groups = [_of_job(call, in_flight, job) for job in sorted({in_flight.get(key, "") for key in call.places})]
    found = await asyncio.gather(*(subject.collect(backend, group) for group in groups))
    results = [result for group in found for result in group]
    if sorted(result.key for result in results) != sorted(call.places):
        raise ContractBreach(f"{len(results)} results for {len(call.places)} keys after a call was cancelled.")
    return results


def _of_job(call: Call, in_flight: Mapping[str, str], job: str) -> Call:
    return planned(restricted(request, lambda _, key: in_flight.get(key, "") == job) for request in call.requests)
