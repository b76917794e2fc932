"""What a sampling would ask: the files, the responses that are missing, what they may cost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from backends.base import Backend, BackendOptions, SampleRequest, WorkEstimate
from backends.errors import ConfigError
from backends.service.counting import TextSample, TokenCounts, count_texts, worth_counting
from backends.session import BackendSession
from backends.storage import as_location
from flows.config.backend import resolve_backend
from flows.config.sampling import SampleConfig
from flows.config.templates import RunValues, fill
from flows.sampling.files import SAMPLED_BY, Target, targets_of
from flows.sampling.prompts import Prompts, check_source, find_prompts
from flows.sampling.state import SamplingState
from flows.watch.spending import counted_text
from kl.records import ScoreFailure
from kl.text_tokens import prompt_tokens_of

_FORMAT = "tokenkl-sample-1"
_KEY_HEX_DIGITS = 32


@dataclass
class SamplePlan:
    """Everything there is to do, and what stands of it.

    ``places`` says of each key which file and which response it is; ``requests`` are the responses that nobody has
    bought, ``failures`` those that an earlier run was refused for good.
    """

    config: SampleConfig
    backend: type[Backend]
    options: BackendOptions
    prompts: Prompts
    targets: list[Target]
    state: SamplingState
    places: dict[str, tuple[Target, int]]
    notes: list[str]
    requests: list[SampleRequest] = field(default_factory=list[SampleRequest])
    failures: dict[str, ScoreFailure] = field(default_factory=dict[str, ScoreFailure])
    n_left_alone: int = 0
    n_recorded: int = 0
    counts: TokenCounts = field(default_factory=TokenCounts)

    def build_backend(self) -> Backend:
        """The backend with its records in the state folder."""
        return self.backend(self.options, state_dir=self.state.folder)

    def state_identities(self, digests: Mapping[str, str]) -> None:
        """Have new files say who wrote their responses."""
        for target in self.targets:
            if target.model in digests and not target.is_there:
                target.head[SAMPLED_BY] = digests[target.model]

    def to_buy(self) -> list[SampleRequest]:
        """The requests that are not in a remote job already."""
        in_flight = self.build_backend().in_flight() if self.state.identity(make=False) else {}
        return [request for request in self.requests if request.key not in in_flight]

    def estimate(self, requests: list[SampleRequest]) -> WorkEstimate:
        """What some of the requests come to at most."""
        return sum(map(self._estimate, requests), WorkEstimate())

    def _estimate(self, request: SampleRequest) -> WorkEstimate:
        work = self.backend.estimate_sample(self.options, request)
        script = prompt_tokens_of(request.prompt, self.backend.template_tokens).script
        return self.counts.corrected(work, request.model, script, self.backend, self.options)

    def texts(self) -> TextSample:
        """Prompts that may be counted, those of responses that are there among them: a later run draws the same."""
        texts, around = TextSample(), self.backend.template_tokens
        for target in self.targets:
            texts.note_prompt(target.model, target.asked.prompt, target.n_wanted, around)
        return texts


def with_folder(config: SampleConfig, values: RunValues) -> SampleConfig:
    """The same with the fields in its output folder filled in."""
    return config.model_copy(update={"output_dir": as_location(fill(str(config.output_dir), values))})


def resolve_sampling(config: SampleConfig) -> tuple[type[Backend], BackendOptions, list[str]]:
    """The backend, its options and notes on settings that are not used.

    Raises
    ------
    ConfigError
        If the backend writes no responses, or no lists of that length.
    """
    backend, options, notes = resolve_backend(config)
    can = backend.capabilities
    if not can.samples:
        raise ConfigError(
            f"the backend {config.backend.name} does not write responses; python -m flows.backends lists those that do."
        )
    if config.sampling.top_logprobs > can.max_top_logprobs:
        raise ConfigError(
            f"sampling.top_logprobs is {config.sampling.top_logprobs}, but the backend {config.backend.name} reports "
            f"at most {can.max_top_logprobs}."
        )
    return backend, _with_retries(config, options), notes


def check_sampling(config: SampleConfig) -> None:
    """Refuse what can be known to be wrong before anything is made or started; nothing is called.

    Raises
    ------
    ConfigError
        In one line.
    """
    assert config.output_dir is not None, "checked with the settings"
    backend, options, _ = resolve_sampling(config)
    built = backend(options, state_dir=SamplingState(config.output_dir).folder)
    for model in config.models:
        built.check(model)
    check_source(config)


def _with_retries(config: SampleConfig, options: BackendOptions) -> BackendOptions:
    """A backend whose jobs are followed up counts the tries itself; it is told how many."""
    sampling, name = config.sampling, "max_attempts"
    if name not in type(options).model_fields or "max_retries" not in sampling.model_fields_set:
        return options
    tries = 1 + sampling.max_retries
    if config.backend.options.get(name, tries) != tries:
        raise ConfigError(
            f"sampling.max_retries is {sampling.max_retries}, hence {tries} tries, but backend.{name} is "
            f"{config.backend.options[name]}; set one of them."
        )
    return options.model_copy(update={name: tries})


def plan_sampling(config: SampleConfig, *, make_identity: bool) -> SamplePlan:
    """The plan, from files alone.

    Parameters
    ----------
    make_identity : bool
        Whether a sampling that has no identity yet gets one, on disk: not in a dry run.

    Raises
    ------
    ConfigError
        If the settings, the prompts or files that are there do not allow it.
    """
    assert config.output_dir is not None, "checked with the settings"
    backend, options, notes = resolve_sampling(config)
    prompts = find_prompts(config, options.system)
    targets = targets_of(config, prompts.asked, states_top_k=not backend.capabilities.remote)
    state = SamplingState(config.output_dir)
    plan = SamplePlan(config, backend, options, prompts, targets, state, {}, notes)
    plan.n_left_alone = sum(not target.missing for target in targets)
    if plan.n_left_alone == len(targets):
        return plan
    identity = state.identity(make=make_identity)
    wanted = {_key(identity, config, target, index): (target, index) for target in targets for index in target.missing}
    for entry in state.recorded() if identity else ():
        _take(plan, entry, wanted)
    plan.places = wanted
    plan.state_identities({model: digest(known) for model, known in state.identities().items()})
    for key, (target, index) in wanted.items():
        if index not in target.entries and key not in plan.failures:
            plan.requests.append(target.request(config, index, key))
    return plan


def _take(plan: SamplePlan, entry: dict[str, Any], wanted: dict[str, tuple[Target, int]]) -> None:
    """Take in what an earlier run put on disk."""
    place = wanted.get(entry["key"])
    if place is None:
        return
    target, index = place
    if "response" in entry:
        plan.n_recorded += index not in target.entries
        target.put(index, entry["response"])
        plan.failures.pop(entry["key"], None)
    elif index not in target.entries:
        plan.failures[entry["key"]] = ScoreFailure(entry["key"], entry["reason"], entry["message"], final=True)


def _key(identity: str, config: SampleConfig, target: Target, index: int) -> str:
    """The name of a response: a hash of all that decides it and of this sampling, whichever backend is asked."""
    asked, settings = target.asked, config.sampling.settings.model_dump()
    parts = [_FORMAT, identity, target.model, asked.prompt.canonical(), settings, index, asked.prefix, asked.prefix_ids]
    if asked.continues is not None:
        parts.append(dict(asked.continues))
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:_KEY_HEX_DIGITS]


def digest(identity: Mapping[str, Any]) -> str:
    """The hash by which a file names who wrote its responses."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode("ascii")).hexdigest()


def count_prompts(plan: SamplePlan) -> None:
    """Have the backend's own tokenizer correct the estimate, where something would be spent."""
    requests = plan.to_buy()
    if not worth_counting(plan.backend, plan.estimate(requests), plan.config.max_cost_usd):
        return
    with BackendSession(plan.build_backend()) as session:
        plan.counts = session.run(count_texts(session.backend, plan.texts()))


def check_cost(plan: SamplePlan) -> None:
    """Refuse to start above the limit, or where no price is known to hold against it.

    Raises
    ------
    ConfigError
        With the estimate.
    """
    limit = plan.config.max_cost_usd
    requests = plan.to_buy() if limit is not None else []
    if limit is None or not requests:
        return
    cost = plan.estimate(requests).cost_usd
    if cost is None:
        raise ConfigError(
            f"max_cost_usd is {limit:g}, but no price is known of {' or '.join(plan.config.models)} at the backend "
            f"{plan.config.backend.name}. Leave the limit out, or give its prices if it has such an option."
        )
    if cost > limit:
        raise ConfigError(
            f"this may cost up to {cost:.4f} USD, above max_cost_usd = {limit:g}. Raise it, or ask for less. "
            f"Its input tokens: {counted_text(plan.counts)}."
        )


def _tries_text(plan: SamplePlan) -> str:
    retries = plan.config.sampling.max_retries
    if plan.backend.capabilities.deferred:
        return "the cost is of one each; rows without an answer go into follow-up jobs, which max_cost_usd leaves out"
    return f"the cost is of one each; up to {retries:,} more where a response fails, as far as max_cost_usd allows"


def plan_rows(plan: SamplePlan) -> list[tuple[str, str]]:
    """(label, text) of a dry run."""
    config, requests = plan.config, plan.to_buy()
    work = plan.estimate(requests)
    cost = "not known" if work.cost_usd is None else f"{work.cost_usd:.4f} USD"
    return [
        ("backend", config.backend.name),
        *(("note", note) for note in plan.notes),
        ("models", ", ".join(config.models)),
        ("output_dir", str(config.output_dir)),
        ("sampling", json.dumps(config.sampling.settings.model_dump())),
        ("prompts", f"{len(plan.prompts.asked):,}, {plan.prompts.n_unusable:,} unusable"),
        ("responses", f"{sum(target.n_wanted for target in plan.targets):,} in {len(plan.targets):,} files"),
        ("files left alone", f"{plan.n_left_alone:,}"),
        ("responses on disk already", f"{plan.n_recorded:,}"),
        ("refused before for good", f"{len(plan.failures):,}"),
        ("in jobs of earlier runs", f"{len(plan.requests) - len(requests):,}"),
        ("requests", f"{len(requests):,}"),
        ("input tokens, estimated", f"{work.input_tokens:,}"),
        ("output tokens, at most", f"{work.output_tokens:,}"),
        ("cost, at most", cost),
        ("tries", _tries_text(plan)),
    ]
