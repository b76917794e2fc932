"""Checks of the contract suite on what a backend answers."""

from __future__ import annotations

import math
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import polars as pl

from backends.base import Backend, Sample, SampleRequest, SampleSettings
from backends.contract.subject import (
    Case,
    ContractBreach,
    Place,
    Problems,
    Subject,
    check,
    in_time,
    planned,
    restricted,
    shown,
)
from backends.scores.store import ScoreStore
from kl.columns import TopLists
from kl.pieces import is_whole
from kl.records import UNKNOWN_LOGPROB, Candidate, Prompt, Response, Score, ScoreFailure

_LARGEST_LOGPROB = 1e-5  # of a certain token, in float32 arithmetic
_MASS_ROUNDING = 1e-3
_SAME_VALUE = 1e-5  # a float32 beside the same number as float64
_REASON = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_SAMPLED_TOKENS = 6


@check()
def every_key_gets_exactly_one_result(subject: Subject) -> Problems:
    """score() yields one Score or ScoreFailure for each key asked, and nothing else."""
    call, results = subject.first_call
    seen: set[str] = set()
    for result in cast("list[object]", results):
        if not isinstance(result, Score | ScoreFailure):
            yield f"{result!r} is neither a Score nor a ScoreFailure."
        elif result.key not in call.places:
            yield f"the key {result.key!r} was not asked."
        elif result.key in seen:
            yield f"{shown(call.places[result.key])}: answered twice."
        else:
            seen.add(result.key)
            yield from _unclear(result) if isinstance(result, ScoreFailure) else ()
    for key in call.places.keys() - seen:
        yield f"{shown(call.places[key])}: no result."


def _unclear(failure: ScoreFailure) -> Problems:
    if not _REASON.fullmatch(failure.reason):
        yield f"the reason {failure.reason!r} is no short code such as 'prompt-refused'."
    if not failure.message or "\n" in failure.message:
        yield f"the message {failure.message!r} is not one line."


@check()
def every_context_gets_a_score(subject: Subject) -> Problems:
    """No context fails: not the empty prefix, emoji, names of control tokens, empty tokens, system text or history."""
    yield from () if subject.answers else ("the subject has no cases.",)


@check()
def lists_are_log_probabilities(subject: Subject) -> Problems:
    """A list is as the model has it: falling natural log-probabilities, no sentinel, mass of at most 1, never empty."""
    for place, score in subject.answers.items():
        for problem in _list_problems(score.top, subject.top_logprobs):
            yield f"{shown(place)}: {problem}"
        if score.full_logprobs is not None:
            yield f"{shown(place)}: full_logprobs came unasked."


def _list_problems(top: tuple[Candidate, ...], longest: int) -> Problems:
    if not 0 < len(top) <= longest:
        yield f"{len(top)} candidates; at least 1 and at most {longest} were asked."
    for candidate in top:
        token, token_id, token_bytes = (cast(object, item) for item in (candidate.token, *candidate[2:]))
        if not isinstance(token, str) or type(token_id) not in (int, type(None)):
            yield f"the token {token!r} with the id {token_id!r} is no text with a whole number or None."
        if not isinstance(token_bytes, bytes | None):
            yield f"the token {token!r} has the token_bytes {token_bytes!r}; they are bytes or None."
    logprobs = [candidate.logprob for candidate in top]
    known = [value for value in logprobs if isinstance(value, float) and math.isfinite(value)]
    if len(known) < len(logprobs):
        odd = next(value for value in logprobs if not isinstance(value, float) or not math.isfinite(value))
        yield f"the log-probability {odd!r} ({type(odd).__name__}) is no finite float; drop it, count it in n_dropped."
    if known != sorted(known, reverse=True):
        yield "the list does not fall."
    if known and min(known) <= UNKNOWN_LOGPROB:
        yield f"{min(known):g} is the mark of a masked token and no log-probability; drop it, count it in n_dropped."
    if known and max(known) > _LARGEST_LOGPROB:
        yield f"the log-probability {max(known):g} is above 0."
    mass = math.fsum(math.exp(min(value, 1.0)) for value in known)
    if mass > 1 + _MASS_ROUNDING:
        yield f"the probabilities add up to {mass:.6g}; are these natural logarithms of one softmax?"
    ids = [candidate.token_id for candidate in top if candidate.token_id is not None]
    if len(set(ids)) < len(ids):
        yield "one token_id stands in the list twice."


@check(lambda subject: subject.backend.capabilities.max_top_logprobs > 1)
def a_shorter_list_is_the_beginning_of_the_longer_one(subject: Subject) -> Problems:
    """Lists are not made to add up to 1: the first token has one log-probability, however many are listed."""
    for place, score in subject.scores(planned([subject.request(subject.cases[0], top_logprobs=1)])).items():
        for problem in _list_problems(score.top, 1):
            yield f"{shown(place)}: {problem}"
        alone, first = _falling(score)[:1], _falling(subject.answers[place])[:1]
        if not np.allclose(alone, first, rtol=0, atol=subject.noise_nats):
            yield f"{shown(place)}: the first has {alone} in a list of 1, {first} in a list of {subject.top_logprobs}."


def _falling(score: Score) -> list[float]:
    return [_value(candidate) for candidate in score.top]


def _value(candidate: Candidate) -> float:
    return -math.inf if candidate.logprob is None else candidate.logprob


@check()
def equal_requests_get_equal_scores(subject: Subject) -> Problems:
    """Asking the same again gives the same, within noise_nats."""
    found = subject.scores(planned([subject.request(subject.cases[0])]))
    yield from differences(found, subject.answers, subject.noise_nats)


@check()
def positions_may_be_asked_apart(subject: Subject) -> Problems:
    """A context has one answer, whichever others are asked with it and in whichever order."""
    answers = subject.answers
    # Positions that an empty token makes equal are one context, asked under the first of them.
    asked = {place for place in answers if place[1] % 2 == 0}
    apart = [
        restricted(subject.request(case), lambda position, _, case=case: (case.name, position) in asked)
        for case in subject.cases
    ]
    yield from differences(subject.scores(planned(reversed(apart))), answers, subject.noise_nats)


def differences(found: Mapping[Place, Score], expected: Mapping[Place, Score], noise_nats: float) -> Problems:
    """Places at which two answers are further apart than the noise; ties at the end of a list may fall either way."""
    for place, score in found.items():
        now, before = _by_token(score), _by_token(expected[place])
        apart = [abs(now[token] - before[token]) for token in now.keys() & before.keys()]
        for here, there in ((now, before), (before, now)):
            smallest = min(there.values(), default=-math.inf)
            apart += [here[token] - smallest for token in here.keys() - there.keys()]
        if apart and max(apart) > noise_nats:
            yield f"{shown(place)}: {max(apart):.3g} nats apart where {noise_nats:g} is allowed (noise_nats)."


def _by_token(score: Score) -> dict[tuple[str, int | None, bytes | None], float]:
    return {_named(item): _value(item) for item in score.top}


def _named(item: Candidate) -> tuple[str, int | None, bytes | None]:
    return item.token, item.token_id, item.token_bytes


@check()
def the_whole_context_is_read(subject: Subject) -> Problems:
    """Prefix, prompt, earlier turns and system text all reach the model."""
    answers = subject.answers
    less = [item for case in subject.cases for item in _with_less_context(case)]
    if less:
        requests = [restricted(subject.request(case), lambda position, _: position == 0) for _, _, case in less]
        found = subject.scores(planned(requests))
        for what, whole, case in less:
            if found[case.name, 0].top == answers[whole.name, 0].top:
                yield f"{whole.name!r}: the answer is the same without {what}, so it did not reach the model."
    for case in subject.cases:
        if _all_equal([score for (name, _), score in answers.items() if name == case.name]):
            yield f"{case.name!r}: all positions have one answer, so the prefix did not reach the model."
    if _all_equal([answers[case.name, 0] for case in subject.cases]):
        yield "all prompts have one answer, so the prompt did not reach the model."


def _with_less_context(case: Case) -> Iterator[tuple[str, Case, Case]]:
    if case.prompt.system:
        prompt = replace(case.prompt, system=None)
        yield "the system text", case, replace(case, name=f"{case.name}, without it", prompt=prompt)
    if len(case.prompt.turns) > 1:
        prompt = Prompt(case.prompt.turns[-1:], case.prompt.system)
        yield "the earlier turns", case, replace(case, name=f"{case.name}, only the last", prompt=prompt)


def _all_equal(scores: list[Score]) -> bool:
    return len(scores) > 1 and all(score.top == scores[0].top for score in scores)


@check()
def results_survive_being_stored(subject: Subject) -> Problems:
    """A score is the same after it was written to disk and read back: plain str, float, int and bytes."""
    scores = {score.key: score for score in subject.answers.values()}
    with tempfile.TemporaryDirectory(prefix="tokenkl-contract-") as folder:
        store = ScoreStore(Path(folder))
        try:
            store.append("prompt", subject.model, list(scores.values()))
        except (pl.exceptions.PolarsError, TypeError) as error:
            reason = next(iter(str(error).splitlines()), "")
            raise ContractBreach(f"the scores cannot be written: {type(error).__name__}: {reason}") from error
        read = store.load("prompt", scores)
    for place, score in subject.answers.items():
        # Neither of the two is read back with the list.
        sampled = score.sampled._replace(token_bytes=None) if score.sampled else None
        written = replace(score, sampled=sampled, full_logprobs=None)
        if read.get(score.key) != written:
            yield f"{shown(place)}: written as {written}, read as {read.get(score.key)}."


# What only some backends can do.


@check(lambda subject: subject.backend.capabilities.full_vocabulary)
def a_full_vocabulary_is_whole_and_agrees_with_the_list(subject: Subject) -> Problems:
    """With full_vocabulary a score also has every token's log-probability by token id: float32, one shape, mass 1."""
    found = subject.scores(planned([subject.request(subject.cases[0], full_vocabulary=True)]))
    for place, score in found.items():
        for problem in _vocabulary_problems(score):
            yield f"{shown(place)}: {problem}"
    shapes = {score.full_logprobs.shape for score in found.values() if score.full_logprobs is not None}
    if len(shapes) > 1:
        yield f"the shapes {sorted(shapes)} come from one model."
    yield from differences(found, subject.answers, subject.noise_nats)


def _vocabulary_problems(score: Score) -> Problems:
    full = score.full_logprobs
    if full is None:
        raise ContractBreach("full_logprobs is None.")
    if full.ndim != 1 or full.dtype != np.float32:
        raise ContractBreach(f"full_logprobs is {full.dtype} of shape {full.shape}; it is float32 of shape (V,).")
    mass = float(np.exp(full.astype(np.float64)).sum())
    if not abs(mass - 1) <= _MASS_ROUNDING:
        yield f"the whole vocabulary adds up to {mass:.6g}."
    best = np.sort(full)[::-1][: len(score.top)]
    if not np.allclose(_falling(score), best, rtol=0, atol=_SAME_VALUE):
        yield "the list does not hold the largest values of full_logprobs."
    for candidate in score.top:
        index = candidate.token_id
        if index is None or not 0 <= index < len(full) or abs(full[index] - _value(candidate)) > _SAME_VALUE:
            yield f"the token with id {index} has {candidate.logprob} in the list, which full_logprobs does not say."
            return


@check(lambda subject: subject.backend.capabilities.token_ids)
def token_ids_of_another_model_are_not_fed(subject: Subject) -> Problems:
    """P's token ids count only where they are the model's own; with others the answer is that of the text."""
    case = subject.cases[0]
    for first in (0, 2**31):
        ids = tuple(range(first, first + len(case.tokens)))
        found = subject.scores(planned([subject.request(case, token_ids=ids)]))
        for problem in differences(found, subject.answers, subject.noise_nats):
            yield f"with ids from {first}, {problem}"


@check(lambda subject: subject.backend.capabilities.wanted_tokens and "wanted_tokens" not in subject.without)
def wanted_tokens_have_the_models_values(subject: Subject) -> Problems:
    """Asked for by name, a token that the list leaves out comes in wanted with its value; no other one does."""
    case, answers = subject.cases[0], subject.answers
    for place, score in answers.items():
        if score.wanted:
            yield f"{shown(place)}: {len(score.wanted)} wanted tokens came unasked."
    tops = [answers[case.name, position].top for position in range(len(case.tokens))]
    no_token = Candidate("no model has this as one token \u2042", None)
    asked = [(*(item._replace(logprob=None) for item in top), no_token) for top in tops]
    k = max(1, subject.top_logprobs // 4)
    found = subject.scores(planned([subject.request(case, top_logprobs=k, wanted=TopLists.of(asked))]))
    for place, score in found.items():
        yield from (f"{shown(place)}: {problem}" for problem in _wanted_problems(score, tops[place[1]], subject))


def _wanted_problems(score: Score, known: tuple[Candidate, ...], subject: Subject) -> Problems:
    """What is wrong with a score that was asked for the tokens of a longer list."""
    if not isinstance(cast(object, score.wanted), tuple):
        raise ContractBreach(f"wanted is {score.wanted!r}; it is a tuple of candidates.")
    yield from _list_problems(score.wanted, len(known)) if score.wanted else ()
    listed, beside = _by_token(score), {_named(item): _value(item) for item in score.wanted}
    if both := listed.keys() & beside.keys():
        yield f"{len(both)} tokens of the list stand in wanted, too."
    expected = {_named(item): item for item in known}
    if others := beside.keys() - expected.keys():
        yield f"{next(iter(others))[0]!r} is in wanted, and nobody asked for it."
    for token, item in expected.items():
        value = _value(item)
        if token not in beside and token not in listed and not _may_be_several(item):
            yield f"{item.token!r} was asked for, and is missing."
        elif abs(beside.get(token, value) - value) > subject.noise_nats + _SAME_VALUE:
            yield f"{item.token!r} has {beside[token]:.6g} in wanted, and {value:.6g} in a longer list."


def _may_be_several(item: Candidate) -> bool:
    """Whether several tokens may be written so: parts of characters, a byte beside a letter."""
    return not is_whole(item.token) or (item.token_bytes is not None and len(item.token_bytes) == 1)


@check(lambda subject: subject.backend.capabilities.samples)
def samples_are_what_score_would_say(subject: Subject) -> Problems:
    """sample() writes n responses whose texts add up, with the lists that score() gives for the same model."""
    responses = subject.use(lambda backend: _sample(subject, backend, n=2))
    if not any(response.positions for response in responses):
        yield "no response has a token."
    for index, response in enumerate(responses):
        where = f"response {index}"
        yield from (f"{where}: {problem}" for problem in _response_problems(response, index, subject))
        yield from (f"{where}: {problem}" for problem in _rescored(response, subject))


async def _sample(subject: Subject, backend: Backend, n: int) -> list[Response]:
    settings = SampleSettings(max_tokens=_SAMPLED_TOKENS, top_logprobs=subject.top_logprobs, seed=3)

    keys = {secrets.token_hex(8): index for index in range(n)}
    asked = [
        SampleRequest(key, f"sample {index}", subject.model, subject.cases[0].prompt, settings, index)
        for key, index in keys.items()
    ]

    async def work() -> list[Sample | ScoreFailure]:
        return [item async for item in backend.sample(asked)]

    found = await in_time(work(), "sample()", subject.deadline_s)
    if sorted(item.key for item in found) != sorted(keys):
        raise ContractBreach(f"sample() gave {len(found)} results for {n} requests; one for each key it is.")
    failed = [item for item in found if isinstance(item, ScoreFailure)]
    if failed:
        raise ContractBreach(f"sample() failed: {failed[0].reason}: {failed[0].message}")
    return [item.response for item in sorted(found, key=lambda item: keys[item.key]) if isinstance(item, Sample)]


def _response_problems(response: Response, index: int, subject: Subject) -> Problems:
    if (response.source_file, response.response_idx) != ("", index):
        yield f"source_file is {response.source_file!r} and response_idx {response.response_idx}; '' and {index} it is."
    said = response.positions[:-1] if response.has_stop else response.positions
    if "".join(position.sampled.token for position in said) != response.text:
        yield "the texts of its tokens do not add up to its text."
    if len(response.positions) > _SAMPLED_TOKENS:
        yield f"{len(response.positions)} tokens where max_tokens was {_SAMPLED_TOKENS}."
    for position in response.positions:
        yield from _list_problems(position.top, subject.top_logprobs)


def _rescored(response: Response, subject: Subject) -> Problems:
    ids = [position.sampled.token_id for position in response.positions]
    own = tuple(index for index in ids if index is not None)
    fed = own if subject.backend.capabilities.token_ids and len(own) == len(ids) else None
    tokens = tuple(position.sampled.token for position in response.positions)
    request = subject.request(Case("sampled", response.prompt, tokens), token_ids=fed)
    # By text, what follows the prompt may be read as other tokens than were sampled.
    call = planned([request if fed is not None else restricted(request, lambda position, _: position == 0)])
    expected = {("sampled", index): Score("", position.top) for index, position in enumerate(response.positions)}
    yield from differences(subject.scores(call), expected, subject.noise_nats)
