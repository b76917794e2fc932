"""Checks of the contract suite before anything is scored: the class, its options, and whether a model can be used."""

from __future__ import annotations

import inspect
import json
import math
import pickle
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from backends.base import Backend, BackendOptions, Capabilities, WorkEstimate
from backends.contract.subject import ContractBreach, Problems, Subject, check, in_time
from backends.errors import ModelNotUsableError

# What users write is looked at as plain objects: the checks are for what the annotations cannot promise.


@check()
def options_are_frozen_and_refuse_unknown_settings(subject: Subject) -> Problems:
    """Options is a subclass of BackendOptions, frozen, with extra="forbid", and can be written as JSON."""
    options = cast(object, subject.new_options())
    if not isinstance(options, BackendOptions):
        raise ContractBreach(f"Options is {type(options).__name__}, no subclass of backends.base.BackendOptions.")
    try:
        options.system = "changed"
        yield "an option could be set after validation."
    except ValidationError:
        pass
    try:
        subject.new_options(no_such_setting=1)
        yield "the setting 'no_such_setting' was accepted; a misspelt one would be ignored."
    except ValidationError:
        pass
    json.dumps(options.model_dump(mode="json"))


@check()
def capabilities_are_declared(subject: Subject) -> Problems:
    """Capabilities are data of the class, and say what the class does."""
    can: object = getattr(subject.backend, "capabilities", None)
    if not isinstance(can, Capabilities):
        raise ContractBreach(f"capabilities is {can!r}; set it to a backends.base.Capabilities on the class.")
    longest = cast(object, can.max_top_logprobs)
    if type(longest) is not int or longest < 1:
        yield f"max_top_logprobs is {longest!r}; it is a whole number of at least 1."
    for name, value in can._asdict().items():
        if name != "max_top_logprobs" and type(value) is not bool:
            yield f"{name} is {value!r}; it is True or False."
    if can.samples != (subject.backend.sample is not Backend.sample):
        yield f"samples is {can.samples}, but sample() is {'not ' if can.samples else ''}written."
    written = (subject.backend.submit is not Backend.submit, subject.backend.collect is not Backend.collect)
    if written != (can.deferred, can.deferred):
        both = "not both " if can.deferred else ""
        yield f"deferred is {can.deferred}, but submit() and collect() are {both}written."
    if inspect.isabstract(subject.backend):
        yield f"not written: {', '.join(sorted(subject.backend.__abstractmethods__))}."


@check()
def identity_is_json_and_the_same_for_every_response(subject: Subject) -> Problems:
    """identity() gives JSON types that depend on options, model and list length, not on the response that is asked."""
    asked = subject.bare_request(subject.cases[0])
    identity = cast(object, subject.backend.identity(subject.new_options(), asked))
    if not isinstance(identity, dict):
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


@check()
def identity_changes_with_what_changes_the_answer(subject: Subject) -> Problems:
    """identity() is another one for another list length, a full vocabulary, and options that change the answer."""
    can, backend = subject.backend.capabilities, subject.backend
    asked = subject.bare_request(subject.cases[0], top_logprobs=1)
    identity = backend.identity(subject.new_options(), asked)
    others: list[tuple[str, dict[str, Any]]] = []
    if can.max_top_logprobs > 1:
        longer = replace(asked, top_logprobs=can.max_top_logprobs)
        others.append(("top_logprobs", backend.identity(subject.new_options(), longer)))
    if can.full_vocabulary:
        full = replace(asked, full_vocabulary=True)
        others.append(("full_vocabulary", backend.identity(subject.new_options(), full)))
    for changes in subject.changed_options:
        others.append((f"the options {dict(changes)}", backend.identity(subject.new_options(**changes), asked)))
    for what, other in others:
        if other == identity:
            yield f"with {what} changed it is still {identity!r}; a score of the other setting would be used."


@check()
def an_estimate_needs_no_call(subject: Subject) -> Problems:
    """estimate() counts a request a position; the cost is finite, None where unknown, 0 where nothing is sent."""
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


@check()
def a_backend_can_be_built_without_being_entered(subject: Subject) -> Problems:
    """A dry run builds the backend, asks in_flight(), and never enters it."""
    with tempfile.TemporaryDirectory(prefix="tokenkl-contract-") as folder:
        backend = subject.backend(subject.new_options(), state_dir=Path(folder))
        in_flight = cast(object, backend.in_flight())
        if not isinstance(in_flight, Mapping) or in_flight:
            yield f"in_flight() is {in_flight!r} with a new state_dir; it is an empty mapping there."
        groups = cast(object, backend.parallel_groups())
        if type(groups) is not int or groups < 1:
            yield f"parallel_groups() is {groups!r}; it is a whole number of at least 1."


@check()
def preflight_accepts_the_model(subject: Subject) -> Problems:
    """preflight() of a usable model returns the version that the service reports, or None."""
    version = cast(object, subject.use(lambda backend: _preflight(subject, backend, subject.model)))
    if version is not None and not isinstance(version, str):
        yield f"it returned {version!r}."


@check(lambda subject: subject.unknown_model is not None)
def preflight_refuses_an_unknown_model(subject: Subject) -> Problems:
    """preflight() of a model that cannot be used raises ModelNotUsableError: one line that names it."""
    message = str(_refusal(subject))
    if str(subject.unknown_model) not in message or "\n" in message:
        yield f"the message is {message!r}; write one line, with the model and what to do."


@check(lambda subject: subject.unknown_model is not None)
def errors_travel_between_processes(subject: Subject) -> Problems:
    """Errors are pickled when tasks run in other processes, and arrive with message and attributes."""
    error = _refusal(subject)
    arrived = pickle.loads(pickle.dumps(error))
    if (type(arrived), str(arrived), vars(arrived)) != (type(error), str(error), vars(error)):
        yield f"{error!r} with {vars(error)} arrived as {arrived!r} with {vars(arrived)}."


def _refusal(subject: Subject) -> ModelNotUsableError:
    model = subject.unknown_model
    assert model is not None, "the checks apply only with a name"

    async def work(backend: Backend) -> ModelNotUsableError:
        try:
            await _preflight(subject, backend, model)
        except ModelNotUsableError as error:
            return error
        raise ContractBreach(f"{model!r} was accepted; a whole run would be sent before that is found out.")

    return subject.use(work)


async def _preflight(subject: Subject, backend: Backend, model: str) -> str | None:
    return await in_time(backend.preflight(model), "preflight()", subject.deadline_s)


@check()
def closing_twice_is_harmless(subject: Subject) -> Problems:
    """A backend that was left may be left again."""

    async def work(backend: Backend) -> None:
        await in_time(backend.__aexit__(None, None, None), "leaving the backend", subject.close_s)

    subject.use(work)  # leaves it a second time
    yield from ()
