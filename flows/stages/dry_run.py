"""What a run would ask and cost, without a call."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from backends.errors import ConfigError
from backends.vertex.prices import PRICES_AS_OF
from flows.config.comparison import Comparison
from flows.config.models import RunConfig
from flows.folder.finished import load_run
from flows.folder.refusals import refused_models
from flows.stages.inputs import find_inputs
from flows.stages.plan import Plan, make_plan
from flows.stages.reuse import check_raw
from kl.statistics.position_sampling import Variation, expected_width_text, variation_of_pilot

Rows = list[tuple[str, str]]


def plan_without_calls(comparison: Comparison) -> Plan:
    """The plan of a run, from files alone; the backend is built and never entered."""
    if comparison.config.reuse_raw is not None:
        check_raw(comparison.config.reuse_raw)
    if comparison.config.noise_floor is not None:
        comparison = comparison.without(refused_models(comparison.folder))
    scores = comparison.folder.stores().scores
    scores.prefetch()
    built = comparison.build_backend()
    return make_plan(find_inputs(comparison.config), comparison, scores, built.in_flight(), built.parallel_groups())


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
    if cost is None:
        raise ConfigError(
            f"max_cost_usd is {max_cost_usd:g}, but no price of this model is known. Set it with "
            "--set 'backend.prices={MODEL: {input: USD, output: USD}}' (per million tokens)."
        )
    if cost > max_cost_usd:
        raise ConfigError(
            f"the estimated cost of {cost:.4f} USD is above max_cost_usd = {max_cost_usd:g}. Raise it, or measure less "
            "(--max-files)."
        )


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
        ("in jobs of earlier runs", f"{plan.n_in_flight:,}"),
        ("requests", f"{plan.n_to_ask:,} in {_groups_text(plan, comparison)}"),
        ("request bytes", f"{work.request_bytes:,}"),
        ("input tokens, estimated", f"{work.input_tokens:,}"),
        ("output tokens, estimated", f"{work.output_tokens:,}"),
        ("cost, estimated", _cost_text(work.cost_usd)),
        *_again_rows(plan),
        ("interval, expected", expected_width_text(plan.n_prompts, plan.n_selected, pilot=_pilot(comparison))),
    ]
    return rows + [(f"skipped: {kind}", f"{count:,}") for kind, count in sorted(problems.items())]


def _again_rows(plan: Plan) -> Rows:
    again = plan.again
    if not again.n_drawn:
        return []
    models = ", ".join(f"{model} at {count:,} positions" for model, count in sorted(again.n_drawn.items()))
    asked = f"{again.estimate.requests:,} of the requests, {_cost_text(again.estimate.cost_usd)}"
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


def _cost_text(cost: float | None) -> str:
    if cost is None:
        return "no price is known for this model; set backend.prices"
    if cost == 0:
        return "0 USD"
    return f"{cost:.4f} USD (list prices of {PRICES_AS_OF}, or those of the configuration)"
