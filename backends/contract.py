"""The contract suite: what every backend must keep, as checks that run against a real one.

In a plugin's own tests::

    import pytest
    from backends.contract import Check, Subject, checks_for
    from my_package import MyBackend

    SUBJECT = Subject(MyBackend, model="a-model", unknown_model="no-such-model")

    @pytest.mark.parametrize("check", checks_for(SUBJECT), ids=str)
    def test_contract(check: Check) -> None:
        check.run(SUBJECT)

A check that fails raises `ContractBreach`, which says what was seen and what the contract asks for. The suite needs no
test framework; it asks the model some 200 contexts of a few tokens, which a service may charge for.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import pickle
import re
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from backends.base import Backend, BackendOptions, Capabilities, WorkEstimate
from backends.contract_subject import (
    CASES,
    Ask,
    Case,
    ContractBreach,
    Place,
    Subject,
    joined,
    planned,
    restricted,
    scored,
)
from backends.errors import ModelNotUsableError
from backends.score_store import ScoreStore
from kl.keys import UNKNOWN_LOGPROB
from kl.records import Candidate, Prompt, Score, ScoreFailure

__all__ = ["CASES", "CHECKS", "Case", "Check", "ContractBreach", "Subject", "checks_for"]

CLOSE_S = 30.0  # a run that was interrupted must not keep its user waiting
_LARGEST_LOGPROB = 1e-5  # float32 rounding of a certain token
_MASS_ROUNDING = 1e-3
_REASON = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")

Problems = Iterator[str]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that the contract asks for.

    Attributes
    ----------
    name : str
        In words; also ``str(check)``.
    rule : str
        What is asked for, in a sentence.
    """

    name: str
    rule: str
    find_problems: Callable[[Subject], Problems]
    applies: Callable[[Subject], bool]

    def __str__(self) -> str:
        return self.name

    def run(self, subject: Subject) -> None:
        """Examine a backend.

        Raises
        ------
        ContractBreach
            If it does not keep this part of the contract. What the backend itself raises comes through.
        """
        try:
            problems = list(self.find_problems(subject))
        except ContractBreach as error:
            problems = [str(error)]
        if problems:
            raise ContractBreach(f"{subject.backend.__name__}: {self.rule}\n{joined(problems)}")


CHECKS: list[Check] = []
"""All checks, those that need no call first."""


def checks_for(subject: Subject) -> list[Check]:
    """The checks that apply: those of capabilities that the backend does not claim are left out."""
    return [check for check in CHECKS if check.applies(subject)]


def _check(
    applies: Callable[[Subject], bool] = lambda subject: True,
) -> Callable[[Callable[[Subject], Problems]], Callable[[Subject], Problems]]:
    """Add a function to `CHECKS`; its name and its docstring are the check's."""

    def add(function: Callable[[Subject], Problems]) -> Callable[[Subject], Problems]:
        name = function.__name__.replace("_", " ").strip()
        CHECKS.append(Check(name, " ".join((function.__doc__ or "").split()), function, applies))
        return function

    return add


# What needs no call.


@_check()
def _options_are_frozen_and_refuse_unknown_settings(subject: Subject) -> Problems:
    """Options is a subclass of BackendOptions, frozen, with extra="forbid", and can be written as JSON."""
    options = subject.new_options()
    if not isinstance(options, BackendOptions):
        yield f"Options is {type(options).__name__}, which is no subclass of backends.base.BackendOptions."
    try:
        options.system = "changed"  # pyright: ignore[reportAttributeAccessIssue]
        yield "an option could be set after validation."
    except ValidationError:
        pass
    try:
        subject.new_options(no_such_setting=1)
        yield "the setting 'no_such_setting' was accepted; a misspelt one would be ignored."
    except ValidationError:
        pass
    json.dumps(options.model_dump(mode="json"))


@_check()
def _capabilities_are_declared(subject: Subject) -> Problems:
    """Capabilities are data of the class, and say what the class does."""
    can: object = getattr(subject.backend, "capabilities", None)
    if not isinstance(can, Capabilities):
        raise ContractBreach(f"capabilities is {can!r}; set it to a backends.base.Capabilities on the class.")
    if type(can.max_top_logprobs) is not int or can.max_top_logprobs < 1:
        yield f"max_top_logprobs is {can.max_top_logprobs!r}; it is a whole number of at least 1."
    for name, value in can._asdict().items():
        if name != "max_top_logprobs" and type(value) is not bool:
            yield f"{name} is {value!r}; it is True or False."
    if can.samples != (subject.backend.sample is not Backend.sample):
        yield f"samples is {can.samples}, but sample() is {'not ' if can.samples else ''}written."
    if inspect.isabstract(subject.backend):
        yield f"abstract: {', '.join(sorted(subject.backend.__abstractmethods__))} not written."


@_check()
def _identity_is_json_and_the_same_for_every_response(subject: Subject) -> Problems:
    """identity() gives JSON types that depend on options, model and list length, not on the response that is asked."""
    asked = replace(subject.request(subject.cases[0]), positions=(), keys=())
    identity = subject.backend.identity(subject.new_options(), asked)
    if not isinstance(cast(object, identity), dict):
        raise ContractBreach(f"it is a {type(identity).__name__}; return a dict.")
    try:
        same = json.loads(json.dumps(identity, allow_nan=False)) == identity
    except (TypeError, ValueError) as error:
        raise ContractBreach(f"{identity!r} is not JSON: {error}") from error
    if not same:
        yield f"{identity!r} comes back from JSON changed; use lists for tuples and texts as keys."
    other = replace(asked, name="other", text="Other.", prefix_ends=(0, 5), positions=(1,), keys=("k",))
    for what, request in (("the same request", asked), ("another response", other)):
        again = subject.backend.identity(subject.new_options(), request)
        if again != identity:
            yield f"for {what} it is {again!r} in place of {identity!r}; equal prefixes would be bought twice."


@_check()
def _identity_changes_with_what_changes_the_answer(subject: Subject) -> Problems:
    """identity() is another one for another list length, a full vocabulary, and options that change the answer."""
    can, backend = subject.backend.capabilities, subject.backend
    asked = replace(subject.request(subject.cases[0]), top_logprobs=1)
    identity = backend.identity(subject.new_options(), asked)
    others: list[tuple[str, dict[str, Any]]] = []
    if can.max_top_logprobs > 1:
        longer = replace(asked, top_logprobs=can.max_top_logprobs)
        others.append(("top_logprobs", backend.identity(subject.new_options(), longer)))
    if can.full_vocabulary:
        others.append(("full_vocabulary", backend.identity(subject.new_options(), replace(asked, full_vocabulary=True))))
    for changes in subject.changed_options:
        others.append((f"the options {dict(changes)}", backend.identity(subject.new_options(**changes), asked)))
    for what, other in others:
        if other == identity:
            yield f"with {what} changed it is still {identity!r}; a score of the other setting would be used."


@_check()
def _an_estimate_needs_no_call(subject: Subject) -> Problems:
    """estimate() counts one request a position, and cost_usd() is finite, None where unknown, 0 where nothing is sent."""
    asked, options = subject.request(subject.cases[0]), subject.new_options()
    work = subject.backend.estimate(options, asked)
    if work.requests != len(asked.positions):
        yield f"{work.requests} requests for {len(asked.positions)} positions."
    if min(work.request_bytes, work.input_tokens, work.output_tokens) <= 0:
        yield f"{work} has a count that is not above 0."
    if work.cost_usd is not None and not (math.isfinite(work.cost_usd) and work.cost_usd >= 0):
        yield f"the cost is {work.cost_usd!r} USD."
    if not subject.backend.capabilities.remote and work.cost_usd != 0:
        yield f"the cost is {work.cost_usd!r} USD, but nothing leaves the machine (capabilities.remote is False)."
    nothing = subject.backend.estimate(options, replace(asked, positions=(), keys=()))
    if nothing != WorkEstimate():
        yield f"no position comes to {nothing}."


@_check()
def _a_backend_can_be_built_without_being_entered(subject: Subject) -> Problems:
    """A dry run builds the backend, asks in_flight() and parallel_groups(), and never enters it."""
    with tempfile.TemporaryDirectory(prefix="tokenkl-contract-") as folder:
        backend = subject.backend(subject.new_options(), state_dir=Path(folder))
        in_flight = cast(object, backend.in_flight())
        if not isinstance(in_flight, Mapping) or in_flight:
            yield f"in_flight() is {in_flight!r} with a new state_dir; it is an empty mapping there."
        groups = cast(object, backend.parallel_groups())
        if type(groups) is not int or groups < 1:
            yield f"parallel_groups() is {groups!r}; it is a whole number of at least 1."


# Entering, preflight, leaving.


@_check()
def _preflight_accepts_the_model(subject: Subject) -> Problems:
    """preflight() of a usable model returns the version that the service reports, or None."""
    version = cast(object, subject.use(lambda backend: subject.in_time(backend.preflight(subject.model), "preflight()")))
    if version is not None and not isinstance(version, str):
        yield f"it returned {version!r}."


@_check(lambda subject: subject.unknown_model is not None)
def _preflight_refuses_an_unknown_model(subject: Subject) -> Problems:
    """preflight() of a model that cannot be used raises ModelNotUsableError, one line that names it."""
    model = subject.unknown_model
    assert model is not None, "the check applies only with a name"
    error = _refusal(subject, model)
    if error is None:
        raise ContractBreach(f"{model!r} was accepted; everything would be uploaded, and paid, before it is found out.")
    if model not in str(error) or "\n" in str(error):
        yield f"the message is {str(error)!r}; write one line, with the model and what to do."


def _refusal(subject: Subject, model: str) -> ModelNotUsableError | None:
    async def work(backend: Backend) -> ModelNotUsableError | None:
        try:
            await subject.in_time(backend.preflight(model), "preflight()")
        except ModelNotUsableError as error:
            return error
        return None

    return subject.use(work)


@_check(lambda subject: subject.unknown_model is not None)
def _errors_travel_between_processes(subject: Subject) -> Problems:
    """Errors are pickled when tasks run in other processes, and arrive with message and attributes."""
    error = _refusal(subject, subject.unknown_model or "")
    if error is None:
        raise ContractBreach(f"no error to try with: {subject.unknown_model!r} was accepted.")
    arrived = pickle.loads(pickle.dumps(error))
    if (type(arrived), str(arrived), vars(arrived)) != (type(error), str(error), vars(error)):
        yield f"{error!r} with {vars(error)} arrived as {arrived!r} with {vars(arrived)}; subclass BackendError."


@_check()
def _closing_twice_is_harmless(subject: Subject) -> Problems:
    """A backend that was left may be left again."""

    async def work(backend: Backend) -> None:
        await subject.in_time(backend.__aexit__(None, None, None), "leaving the backend", CLOSE_S)

    subject.use(work)  # and a second time on the way out
    yield from ()


# Answers.


@_check()
def _every_key_gets_exactly_one_result(subject: Subject) -> Problems:
    """score() yields one Score or ScoreFailure for each key asked, and nothing else."""
    ask = planned(subject.request(case) for case in subject.cases)
    results = cast("list[object]", subject.ask(ask))
    seen: set[str] = set()
    for result in results:
        if not isinstance(result, Score | ScoreFailure):
            yield f"{result!r} is neither a Score nor a ScoreFailure."
        elif result.key not in ask.places:
            yield f"the key {result.key!r} was not asked."
        elif result.key in seen:
            yield f"{_where(ask.places[result.key])}: answered twice."
        else:
            seen.add(result.key)
            if isinstance(result, ScoreFailure):
                yield from _unclear(result)
    for key in ask.places.keys() - seen:
        yield f"{_where(ask.places[key])}: no result."


def _unclear(failure: ScoreFailure) -> Problems:
    if not _REASON.fullmatch(failure.reason):
        yield f"the reason {failure.reason!r} is no short code such as 'prompt-refused'."
    if not failure.message or "\n" in failure.message:
        yield f"the message {failure.message!r} is not one line."


def _where(place: Place) -> str:
    return f"{place[0]!r}, position {place[1]}"


@_check()
def _every_context_gets_a_score(subject: Subject) -> Problems:
    """No context fails: not the empty prefix, emoji, names of control tokens, empty tokens, system text or history."""
    yield from () if subject.answers else ("the subject has no cases.",)


@_check()
def _nothing_asked_is_nothing_answered(subject: Subject) -> Problems:
    """score() without requests, or with requests without positions, yields nothing."""
    bare = restricted(subject.request(subject.cases[0]), lambda position: False)
    for what, requests in (("no requests", ()), ("a request without positions", (bare,))):
        results = subject.ask(Ask(requests, {}))
        if results:
            yield f"{what}: {len(results)} results."


@_check()
def _lists_are_log_probabilities(subject: Subject) -> Problems:
    """A list is as the model has it: falling natural log-probabilities, no sentinel, a mass of at most 1, never empty."""
    for place, score in subject.answers.items():
        for problem in _list_problems(score.top, subject.top_logprobs):
            yield f"{_where(place)}: {problem}"
        if score.full_logprobs is not None:
            yield f"{_where(place)}: full_logprobs came unasked."


def _list_problems(top: tuple[Candidate, ...], longest: int) -> Problems:
    if not 0 < len(top) <= longest:
        yield f"{len(top)} candidates; at least 1 and at most {longest} were asked."
    logprobs = [candidate.logprob for candidate in top]
    known = [value for value in logprobs if isinstance(value, float) and math.isfinite(value)]
    if len(known) < len(logprobs):
        odd = next(value for value in logprobs if value not in known)
        yield f"the log-probability {odd!r} ({type(odd).__name__}) is no finite float; drop it and count it in n_dropped."
        return
    if known != sorted(known, reverse=True):
        yield "the list does not fall."
    if known and min(known) <= UNKNOWN_LOGPROB:
        yield f"{min(known):g} stands for a masked token and is no log-probability; drop it and count it in n_dropped."
    if known and max(known) > _LARGEST_LOGPROB:
        yield f"the log-probability {max(known):g} is above 0."
    mass = math.fsum(math.exp(min(value, 1.0)) for value in known)
    if mass > 1 + _MASS_ROUNDING:
        yield f"the probabilities add up to {mass:.6g}; are these natural logarithms of one softmax?"
    ids = [candidate.token_id for candidate in top if candidate.token_id is not None]
    if len(set(ids)) < len(ids):
        yield "one token_id stands in the list twice."


@_check(lambda subject: subject.backend.capabilities.max_top_logprobs > 1)
def _a_shorter_list_is_the_beginning_of_the_longer_one(subject: Subject) -> Problems:
    """A list is not made to add up to 1: the first token has one log-probability, however many are listed."""
    ask = planned([subject.request(subject.cases[0], top_logprobs=1)])
    for place, score in scored(ask, subject.ask(ask)).items():
        for problem in _list_problems(score.top, 1):
            yield f"{_where(place)}: {problem}"
        alone, first = score.top[0], subject.answers[place].top[0]
        if abs(_value(alone) - _value(first)) > subject.noise_nats:
            yield f"{_where(place)}: the first of 1 has {alone.logprob}, the first of {subject.top_logprobs} {first.logprob}."


def _value(candidate: Candidate) -> float:
    return -math.inf if candidate.logprob is None else candidate.logprob


@_check()
def _equal_requests_get_equal_scores(subject: Subject) -> Problems:
    """Asking the same again gives the same, within noise_nats."""
    ask = planned([subject.request(subject.cases[0])])
    yield from _differences(scored(ask, subject.ask(ask)), subject)


@_check()
def _positions_may_be_asked_apart(subject: Subject) -> Problems:
    """A context has one answer, whichever others are asked with it and in whichever order."""
    apart = [restricted(subject.request(case), lambda position: position % 2 == 1) for case in subject.cases]
    ask = planned(reversed(apart))
    yield from _differences(scored(ask, subject.ask(ask)), subject)


def _differences(found: Mapping[Place, Score], subject: Subject) -> Problems:
    """Places at which scores are not those of `Subject.answers`; ties at the end of a list may fall either way."""
    for place, score in found.items():
        now, before = _by_token(score), _by_token(subject.answers[place])
        apart = [abs(now[token] - before[token]) for token in now.keys() & before.keys()]
        for here, there in ((now, before), (before, now)):
            smallest = min(there.values())
            apart += [here[token] - smallest for token in here.keys() - there.keys()]
        if apart and max(apart) > subject.noise_nats:
            yield f"{_where(place)}: {max(apart):.3g} nats apart; noise_nats is {subject.noise_nats:g}."


def _by_token(score: Score) -> dict[tuple[str, int | None, bytes | None], float]:
    return {(item.token, item.token_id, item.token_bytes): _value(item) for item in score.top}


@_check()
def _the_whole_context_is_read(subject: Subject) -> Problems:
    """Prefix, prompt, earlier turns and system text all reach the model."""
    changed = [changed for case in subject.cases for changed in _context_changes(case)]
    first = {case.name: restricted(subject.request(case), lambda position: position == 0) for _, case in changed}
    found: dict[Place, Score] = {}
    if first:
        ask = planned(first.values())
        found = scored(ask, subject.ask(ask))
    for what, case in changed:
        if found[case.name, 0].top == subject.answers[case.name.split(" without ")[0], 0].top:
            yield f"{case.name!r}: the answer is the same, so {what} did not reach the model."
    answers = subject.answers
    for case in subject.cases:
        lists = [score.top for (name, _), score in answers.items() if name == case.name]
        if len(lists) > 1 and all(top == lists[0] for top in lists):
            yield f"{case.name!r}: all positions have one answer, so the prefix did not reach the model."
    starts = [answers[case.name, 0].top for case in subject.cases]
    if len(starts) > 1 and all(top == starts[0] for top in starts):
        yield "all prompts have one answer, so the prompt did not reach the model."


def _context_changes(case: Case) -> Iterator[tuple[str, Case]]:
    if case.prompt.system is not None:
        prompt = replace(case.prompt, system=None)
        yield "the system text", replace(case, name=f"{case.name} without system text", prompt=prompt)
    if len(case.prompt.turns) > 1:
        prompt = Prompt(case.prompt.turns[-1:], case.prompt.system)
        yield "the earlier turns", replace(case, name=f"{case.name} without history", prompt=prompt)


@_check()
def _results_survive_being_stored(subject: Subject) -> Problems:
    """A score is the same after it was written to disk and read back: plain str, float, int and bytes."""
    scores = {score.key: score for score in subject.answers.values()}
    with tempfile.TemporaryDirectory(prefix="tokenkl-contract-") as folder:
        store = ScoreStore(Path(folder))
        store.append("prompt", subject.model, list(scores.values()))
        read = store.load("prompt", scores)
    for place, score in subject.answers.items():
        sampled = score.sampled._replace(token_bytes=None) if score.sampled else None  # is not stored
        if read.get(score.key) != replace(score, sampled=sampled):
            yield f"{_where(place)}: written {score}, read {read.get(score.key)}."


@_check()
def _calls_at_the_same_time_keep_apart(subject: Subject) -> Problems:
    """Several calls of score() on one backend at once each yield their own keys, with the same scores as alone."""
    asks = [planned([subject.request(case)]) for case in subject.cases]

    async def work(backend: Backend) -> list[list[Score | ScoreFailure]]:
        return await asyncio.gather(*(subject.collect(backend, ask) for ask in asks))

    for ask, results in zip(asks, subject.use(work), strict=True):
        foreign = [result.key for result in results if result.key not in ask.places]
        if foreign:
            yield f"{ask.requests[0].name!r}: got {len(foreign)} results of another call."
        yield from _differences(scored(ask, results), subject)


@_check()
def _closing_the_results_early_leaves_the_backend_usable(subject: Subject) -> Problems:
    """Who takes one result and closes the iterator is not kept waiting, and may ask again."""
    ask = planned(subject.request(case) for case in subject.cases)
    again = planned([subject.request(subject.cases[0])])

    async def work(backend: Backend) -> list[Score | ScoreFailure]:
        results = backend.score(ask.requests)
        await subject.in_time(_first(results), "the first result")
        if isinstance(results, AsyncGenerator):
            await subject.in_time(_close(results), "closing the results", CLOSE_S)
        return await subject.collect(backend, again)

    yield from _differences(scored(again, subject.use(work)), subject)


async def _first(results: AsyncIterator[Score | ScoreFailure]) -> Score | ScoreFailure:
    return await anext(results)


async def _close(results: AsyncGenerator[Score | ScoreFailure]) -> None:
    await results.aclose()


@_check()
def _a_cancelled_call_ends_and_can_be_taken_up_again(subject: Subject) -> Problems:
    """Cancelling ends a call soon; the next run asks what in_flight() names job by job and gets every result."""
    ask = planned(subject.request(case) for case in subject.cases)
    with tempfile.TemporaryDirectory(prefix="tokenkl-contract-") as folder:
        for wait_s in (0.0, 0.1, 0.5):
            yield from subject.use(lambda backend, wait_s=wait_s: _cancel(subject, backend, ask, wait_s), Path(folder))
        results = subject.use(lambda backend: _take_up(subject, backend, ask), Path(folder))
    yield from _differences(scored(ask, results), subject)


async def _cancel(subject: Subject, backend: Backend, ask: Ask, wait_s: float) -> list[str]:
    task = asyncio.create_task(subject.collect(backend, ask))
    await asyncio.sleep(wait_s)
    if not task.cancel():
        return []  # it was done before
    done, _ = await asyncio.wait({task}, timeout=CLOSE_S)
    if not done:
        return [f"a call that was cancelled after {wait_s:g} s went on for {CLOSE_S:g} s."]
    return [] if task.cancelled() else [f"a call that was cancelled after {wait_s:g} s went on as if it was not."]


async def _take_up(subject: Subject, backend: Backend, ask: Ask) -> list[Score | ScoreFailure]:
    in_flight = backend.in_flight()
    foreign = in_flight.keys() - ask.places.keys()
    if foreign:
        raise ContractBreach(f"in_flight() names {len(foreign)} keys that nobody asked for.")
    jobs = {in_flight.get(key, "") for key in ask.places}
    groups = [planned(_of_job(request, in_flight, job) for request in ask.requests) for job in sorted(jobs)]
    found = await asyncio.gather(*(subject.collect(backend, group) for group in groups))
    results = [result for group in found for result in group]
    if sorted(result.key for result in results) != sorted(ask.places):
        raise ContractBreach(f"{len(results)} results for {len(ask.places)} keys after a call was cancelled.")
    return results
