"""What a run would ask and cost, without a call."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from backends.errors import ConfigError
from backends.service.counting import count_texts, counts_here
from backends.session import BackendSession
from backends.vertex.prices import PRICES_AS_OF
from flows.config.comparison import Comparison
from flows.config.models import RunConfig
from flows.folder.finished import load_run
from flows.folder.members import check_store
from flows.folder.refusals import refused_models
from flows.stages.inputs import find_inputs
from flows.stages.plan import Plan, make_plan
from flows.stages.reuse import check_raw
from flows.watch.spending import counted_text
from kl.statistics.position_sampling import Variation, expected_width_text, variation_of_pilot

logger = logging.getLogger("flows.run")

Rows = list[tuple[str, str]]


def plan_without_calls(comparison: Comparison) -> Plan:
    """The plan of a run, from files alone; a backend is entered only if what it is asked stays on this machine."""
    if comparison.config.reuse_raw is not None:
        check_raw(comparison.config.reuse_raw)
    check_store(comparison.folder)
    comparison = discovered(without_refused(comparison), call=False)
    scores = comparison.folder.stores().scores
    scores.prefetch()
    built = comparison.build_backend()
    plan = make_plan(find_inputs(comparison.config), comparison, scores, built.in_flight(), built.parallel_groups())
    if not (plan.n_to_ask and counts_here(comparison.backend)):
        return plan
    with BackendSession(built) as session:
        return plan.counted(session.run(count_texts(built, plan.texts)), comparison)


def without_refused(comparison: Comparison) -> Comparison:
    """The same without the models that are on record as not to be asked again, which one line in the log says."""
    if comparison.config.noise_floor is None:
        return comparison
    folder = comparison.folder
    refused = refused_models(folder, comparison.place)
    if refused:
        logger.warning(
            "noise floor: %s cannot be asked again by the record in %s, so that Q is asked twice; remove the file to "
            "try again", ", ".join(sorted(refused)), folder.refusals,
        )  # fmt: skip
    return comparison.without(refused)


def discovered(comparison: Comparison, *, call: bool) -> Comparison:
    """The same with complete options, which decide under which keys answers are kept.

    Parameters
    ----------
    call : bool
        Whether the service may be asked; otherwise only what is on record serves.

    Raises
    ------
    ModelNotUsableError
        If nothing is on record and the service does not say it.
    """
    if not comparison.backend.capabilities.discovers:
        return comparison
    built, model = comparison.build_backend(), comparison.config.model2
    if not call:
        return replace(comparison, options=asyncio.run(built.discover(model, call=False)))
    with BackendSession(built) as session:
        return replace(comparison, options=session.run(built.discover(model)))


def check_readable(plan: Plan, input_dir: Path) -> None:
    """Refuse an input of which nothing can be read, with the one reason, or the most frequent and an example of it.

    Responses without a token are no mistake of the input: they are a result of which nothing is measured.

    Raises
    ------
    ConfigError
        Before anything is asked.
    """
    refused = {(item.source_file, item.response_idx): item for item in reversed(plan.problems) if not item.repaired}
    kinds = Counter(item.kind for item in refused.values() if item.kind != "empty-response")
    if plan.n_responses or not kinds:
        return
    ((kind, n),) = kinds.most_common(1)
    example = next(item.message for item in plan.problems if item.kind == kind and not item.repaired)
    often = "" if len(refused) == 1 else f" ({n:,} of {len(refused):,} files and responses are refused so)"
    raise ConfigError(f"nothing in {input_dir} can be used, and nothing was asked: {example}{often}")


def check_cost(plan: Plan, max_cost_usd: float | None) -> None:
    """Refuse to start above the limit, or where no price is known to hold against it.

    Raises
    ------
    ConfigError
        With the estimate.
    """
    cost = plan.estimate.cost_usd
    if max_cost_usd is None or not plan.n_to_ask:
        return
    left = ""
    if plan.n_in_flight:
        left = (
            f" {plan.n_in_flight} contexts are in jobs of an earlier run, which are charged whatever this one does: "
            "--stage collect takes in what they answer."
        )
    if cost is None:
        raise ConfigError(f"max_cost_usd is {max_cost_usd:g}, but {_unpriced_text(plan)}.{left}")
    if cost > max_cost_usd:
        raise ConfigError(
            f"the estimated cost of {cost:.4f} USD is above max_cost_usd = {max_cost_usd:g}. Raise it, or measure less "
            f"(--max-files). Its input tokens: {counted_text(plan.counts)}.{left}"
        )


def _unpriced_text(plan: Plan) -> str:
    """Of which models no price is known, and what to do."""
    models = sorted(plan.unpriced | plan.again.unpriced)
    prices = ", ".join(f"{model}: {{input: USD, output: USD}}" for model in models)
    text = f"no price is known of {', '.join(models)}. Set --set 'backend.prices={{{prices}}}' (per million tokens)"
    if only_again := sorted(plan.again.unpriced - plan.unpriced):
        text += f", or drop noise_floor, for which alone {', '.join(only_again)} would be asked"
    return text


def plan_rows(plan: Plan, comparison: Comparison) -> Rows:
    """(label, text) of a dry run."""
    work, config = plan.estimate, comparison.config
    problems = Counter(problem.kind for problem in plan.problems if not problem.repaired)
    settings = config.model_dump(mode="json", exclude={"backend"}) | {
        "backend": {"name": config.backend.name} | comparison.options.model_dump(mode="json")
    }
    rows: Rows = [
        *_settings_rows("", settings),
        *(("note", note) for note in comparison.notes),
        *_reuse_rows(config),
        ("files", f"{len(plan.files):,}"),
        ("responses", f"{plan.n_responses:,} readable, {plan.n_unreadable:,} skipped"),
        ("positions", f"{plan.n_positions:,}, of which {plan.n_selected:,} are measured"),
        ("distinct contexts", f"{plan.n_contexts:,}"),
        ("on disk already", f"{plan.n_stored:,}"),
        *_damaged_rows(plan),
        ("in jobs of earlier runs", f"{plan.n_in_flight:,}"),
        ("requests", f"{plan.n_to_ask:,} in {_groups_text(plan, comparison)}"),
        ("request bytes", f"{work.request_bytes:,}"),
        ("input tokens, estimated", f"{work.input_tokens:,}"),
        *_counted_rows(plan),
        ("output tokens, estimated", f"{work.output_tokens:,}"),
        ("cost, estimated", _cost_text(work.cost_usd, plan)),
        *_again_rows(plan),
        ("interval, expected", expected_width_text(plan.n_prompts, plan.n_selected, pilot=_pilot(comparison))),
    ]
    return rows + [(f"skipped: {kind}", f"{count:,}") for kind, count in sorted(problems.items())]


def _damaged_rows(plan: Plan) -> Rows:
    if not plan.n_damaged and not plan.n_broken:
        return []
    found = f"scores: {plan.n_damaged:,}, whole files: {plan.n_broken:,}"
    return [("damaged on disk", f"{found}; named in the log, a run sets them aside and asks again")]


def _counted_rows(plan: Plan) -> Rows:
    return [("prompts counted", counted_text(plan.counts))] if plan.counts.n_prompts else []


def _again_rows(plan: Plan) -> Rows:
    again, work = plan.again, plan.estimate_again
    if not again.n_drawn:
        return []
    models = ", ".join(f"{model} at {count:,} positions" for model, count in sorted(again.n_drawn.items()))
    asked = f"{work.requests:,} of the requests, {_cost_text(work.cost_usd, plan)}"
    return [("noise floor", f"asks again {models}: {asked}")]


def _groups_text(plan: Plan, comparison: Comparison) -> str:
    """How many groups there are, and of what size: each is a task, and of some backends a job."""
    what = "batch jobs" if comparison.backend.capabilities.deferred else "groups"
    if not plan.groups:
        return f"0 {what}"
    sizes = [group.n_responses for group in plan.groups]
    size = f"{min(sizes):,} to {max(sizes):,}" if min(sizes) < max(sizes) else f"{max(sizes):,}"
    most = max(group.n_positions for group in plan.groups)
    return f"{len(plan.groups):,} {what} of {size} responses, {most:,} contexts in the largest"


def _reuse_rows(config: RunConfig) -> Rows:
    if config.reuse_raw is None:
        return []
    return [("note", f"what the rows in {config.reuse_raw} answer is still counted below; it will not be asked")]


def _pilot(comparison: Comparison) -> Variation | None:
    """How the KL varied in an earlier run in this output folder; None if there is none."""
    try:
        return variation_of_pilot(load_run(comparison.folder.path).summary.kl_per_token.estimate)
    except ConfigError:
        return None


def _settings_rows(path: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _settings_rows(f"{path}{name}.", value)
        else:
            yield f"{path}{name}", json.dumps(value, ensure_ascii=False)


def _cost_text(cost: float | None, plan: Plan) -> str:
    if cost is None:
        return _unpriced_text(plan)
    if cost == 0:
        return "0 USD"
    return f"{cost:.4f} USD (list prices of {PRICES_AS_OF}, or those of the configuration)"
