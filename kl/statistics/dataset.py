"""From the token table to the summary of the data set.

Every mean is Horvitz-Thompson over the positions that were measured; intervals are clustered by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import polars as pl

from kl.estimators.divergence import MIN_LISTED
from kl.input.texts import was_cut
from kl.records import Sampling
from kl.statistics.alarms import alarms
from kl.statistics.breakdowns import (
    Row,
    bounds_only_by_reason,
    by_prompt,
    by_token_and_position,
    flagged,
    kl_distribution,
    missing_by_reason,
    outlying,
    stops,
)
from kl.statistics.clusters import per_response, per_token, prompts_needed
from kl.statistics.figures import logprob_difference, perplexity, top_token
from kl.statistics.noise_floor import AskedTwice, noise_floor
from kl.statistics.summary import (
    FORMAT,
    Counts,
    DeltaP,
    Divergence,
    Identification,
    RunFacts,
    SampledToken,
    Summary,
)
from kl.tables.context_counts import RETOKENISED
from kl.tables.responses import ResponseInfo, info_frame, response_rows
from kl.tables.totals import response_totals

AMBIGUOUS_MASS_WARNING = 0.01
_LARGE_KL = 1e-3  # nats; where two models are alike, some position always holds most of the noise
_NAMED = 10  # positions that a warning names
_NEUTRAL = {"min_p": 0, "typical_p": 1, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}


def summarise_dataset(
    tokens: pl.LazyFrame,
    responses: Iterable[ResponseInfo],
    facts: RunFacts,
    twice: AskedTwice | None = None,
    *,
    totals: pl.DataFrame | None = None,
) -> Summary:
    """Summary of a data set: means with intervals clustered by prompt, bounds, percentiles, counts and warnings.

    ``twice`` is what one model was asked twice, for the noise floor; ``totals`` are the `response_totals` where they
    are known already. Reads the token table a few times in batches; holds a row per response and three numbers per
    position.

    Raises
    ------
    TokenTableError
        If the token table contradicts itself.
    """
    totals = response_totals(tokens) if totals is None else totals
    rows = response_rows(totals, info_frame(responses))
    counts = _counts(tokens, rows)
    distribution, share = kl_distribution(tokens)
    token_rows, position_rows = by_token_and_position(tokens)
    stand_out = outlying(tokens, totals)
    summary = Summary(
        format=FORMAT,
        model_p=facts.model_p,
        model_q=facts.model_q,
        estimator=facts.estimator,
        top_logprobs=facts.top_logprobs,
        wanted_tokens=facts.wanted_tokens,
        prior_var=facts.prior_var,
        sampling=[_stated(sampling) for sampling in facts.samplings],
        alignment=None if facts.alignment is None else dict(facts.alignment),
        counts=counts,
        warnings=[],
        kl_per_token=_per_token_divergence(totals),
        kl_per_response=_per_response_divergence(totals),
        identification=_identification(totals),
        token_kl=distribution,
        kl_share_of_top_1_percent=share,
        reverse_kl_per_token=per_token(totals, "reverse_kl_estimate"),
        reverse_kl_lower_per_token=per_token(totals, "reverse_kl_lower"),
        js_per_token=per_token(totals, "js_estimate"),
        js_lower_per_token=per_token(totals, "js_lower"),
        tv_lower_per_token=per_token(totals, "tv_lower"),
        same_top_p=per_token(totals, "same_top_token"),
        delta_p=_delta_p(totals),
        sampled_token=_sampled_token(totals, _sampling_obstacle(facts.samplings, counts)),
        mean_rest_mass_p=_mean(totals, "rest_mass_p"),
        mean_rest_mass_q=_mean(totals, "rest_mass_q"),
        mean_p_mass_missing_in_q=_mean(totals, "p_mass_missing_in_q"),
        mean_q_mass_missing_in_p=_mean(totals, "q_mass_missing_in_p"),
        mean_ambiguous_mass_p=_mean(totals, "ambiguous_mass_p"),
        mean_ambiguous_mass_q=_mean(totals, "ambiguous_mass_q"),
        mean_entropy_p=_mean(totals, "entropy_p"),
        mean_entropy_q=_mean(totals, "entropy_q"),
        prompts_for_10_percent=prompts_needed(totals, 0.10),
        prompts_for_5_percent=prompts_needed(totals, 0.05),
        by_token=token_rows,
        by_position=position_rows,
        by_prompt=by_prompt(totals),
        perplexity=perplexity(totals),
        logprob_difference=logprob_difference(tokens, totals),
        top_token=top_token(totals),
        largest_position=stand_out.largest,
        outliers=stand_out.rows,
        noise_floor=None if twice is None else noise_floor(twice, rows, facts.prior_var_again),
    )
    summary.alarms.extend(alarms(counts))
    summary.warnings.extend((*summary.alarms, *_warnings(summary, facts)))
    return summary


def _stated(sampling: Sampling) -> dict[str, Any]:
    always = ("temperature", "top_p", "top_k")
    return {name: value for name, value in asdict(sampling).items() if name in always or value is not None}


def _per_token_divergence(totals: pl.DataFrame) -> Divergence:
    names = ("kl_estimate", "kl_lower", "kl_upper_plausible", "kl_exact", "kl_floor", "kl_bucket", "kl_censored")
    return Divergence(*(per_token(totals, name) for name in names))


def _per_response_divergence(totals: pl.DataFrame) -> Divergence:
    return Divergence(
        per_response(totals, "kl_estimate"),
        per_response(totals, "kl_lower", extrapolate=False),
        *(
            per_response(totals, name)
            for name in ("kl_upper_plausible", "kl_exact", "kl_floor", "kl_bucket", "kl_censored")
        ),
    )


def _mean(totals: pl.DataFrame, metric: str) -> float | None:
    return per_token(totals, metric).value


def _identification(totals: pl.DataFrame) -> Identification:
    upper = per_token(totals, "identified_upper")
    lower, estimate = _mean(totals, "identified_lower"), _mean(totals, "identified_estimate")
    share = None
    if upper.value is not None and lower is not None:
        # 1 - (U - L)/U = L/U; where even the upper limit is 0 nothing is left open.
        share = lower / upper.value if upper.value > 0 else 1.0
    return Identification(share, upper.n, upper.n_unknown, estimate, lower, upper.value)


def _delta_p(totals: pl.DataFrame) -> DeltaP:
    square = _mean(totals, "delta_p_squared")
    return DeltaP(per_token(totals, "delta_p"), None if square is None else math.sqrt(square))


def _sampled_token(totals: pl.DataFrame, obstacle: str | None) -> SampledToken:
    measured, censored = int(totals["n_measured"].sum()), int(totals["n_k1_censored"].sum())
    share = censored / measured if measured else None
    if obstacle is not None:
        return SampledToken(None, None, None, None, False, censored, share, obstacle)
    return SampledToken(
        per_token(totals, "logratio_k1"),
        per_response(totals, "logratio_k1"),
        per_token(totals, "k3"),
        per_response(totals, "k3"),
        censored > 0,
        censored,
        share,
        None,
    )


def _sampling_obstacle(samplings: Sequence[Sampling], counts: Counts) -> str | None:
    """Why k1 and k3 would be biased: P's tokens were not drawn from the law that its log-probabilities state."""
    if counts.flagged.get("truncated-p"):
        return "P's lists are of a truncated law"
    for sampling in samplings or (Sampling(),):
        if sampling.temperature is None or sampling.top_p is None:
            return "the temperature and top_p with which the responses were sampled are not all stated"
        if sampling.temperature != 1:
            return f"the responses were sampled at temperature {sampling.temperature:g}, not 1"
        if sampling.top_p != 1:
            return f"the responses were sampled with top_p {sampling.top_p:g}, not 1"
        if sampling.top_k is not None and sampling.top_k > 0:
            return f"the responses were sampled with top_k {sampling.top_k}, not without it"
        for name, neutral in _NEUTRAL.items():
            value = getattr(sampling, name)
            if value is not None and value != neutral:
                return f"the responses were sampled with {name} {value:g}, not {neutral:g}"
        if sampling.logit_bias:
            return "the responses were sampled with a logit_bias"
    return None


def _counts(tokens: pl.LazyFrame, rows: pl.DataFrame) -> Counts:
    responses = rows.filter(pl.col("response_idx").is_not_null())
    left_out = (pl.col("n_positions") > 0) & (pl.col("n_selected") == 0)
    measured = pl.col("n_measured").fill_null(0)
    scored = responses.filter((measured > 0) | left_out.fill_null(False))
    not_scored = responses.filter((measured == 0) & ~left_out.fill_null(False))
    reasons = not_scored.group_by(pl.col("reason").fill_null("no-positions")).len()
    ended = responses.join(stops(tokens), on=["source_file", "response_idx"])
    return Counts(
        files=rows["source_file"].n_unique(),
        files_unreadable=rows.height - responses.height,
        prompts=responses["prompt_id"].drop_nulls().n_unique(),
        responses=responses.height,
        responses_complete=scored.filter(pl.col("n_missing") == 0).height,
        responses_partial=scored.filter(pl.col("n_missing") > 0).height,
        responses_not_scored=not_scored.height,
        responses_not_scored_by_reason=dict(reasons.sort(["len", "reason"], descending=[True, False]).iter_rows()),
        positions=int(rows["n_positions"].sum()),
        selected=int(rows["n_selected"].sum()),
        measured=int(rows["n_measured"].sum()),
        missing=int(rows["n_missing"].sum()),
        missing_by_reason=missing_by_reason(tokens),
        bounds_only=int((rows["n_measured"] - rows["n_estimated"]).sum()),
        bounds_only_by_reason=bounds_only_by_reason(tokens),
        flagged=flagged(tokens),
        responses_with_stop=int(ended["has_stop"].sum()),
        responses_without_stop=sum(map(_ended_unseen, ended["has_stop"], ended["finish_reason"])),
    )


def _ended_unseen(has_stop: bool, finish_reason: str | None) -> bool:
    return not has_stop and not was_cut(finish_reason)


def _warnings(summary: Summary, facts: RunFacts) -> Iterator[str]:
    yield from _missing_warnings(summary.counts)
    yield from _outlier_warnings(summary)
    yield from _sampling_warnings(facts.samplings, summary.counts)
    estimate = summary.kl_per_token.estimate
    if estimate.no_interval is not None:
        yield f"KL per token: no interval: {estimate.no_interval}."
    counts = summary.counts
    if counts.bounds_only:
        yield (
            f"{counts.bounds_only:,} of {counts.measured:,} measured positions have bounds and no point estimate "
            f"({_listed(counts.bounds_only_by_reason)}); estimates are over the others, the certified lower bound is "
            "over all."
        )
    yield from _noise_warnings(summary)
    unidentified = summary.identification.n_unidentified
    if unidentified:
        yield (
            f"{unidentified:,} measured positions have no plausible upper limit (too few shared tokens); "
            "the upper limit of the data set is not known, `identification` is over the other positions."
        )
    if counts.responses_without_stop:
        ended = counts.responses_with_stop + counts.responses_without_stop
        yield (
            f"the stop is not in the KL of {counts.responses_without_stop:,} of {ended:,} responses, those cut by "
            "length aside: their files have no list for the token that ends the turn, so that what the two models say "
            "of going on is left out."
        )
    if facts.top_logprobs < MIN_LISTED:
        yield f"top_logprobs = {facts.top_logprobs}: lists that short say nothing of the tail; use the bounds."
    for side, mass in (("P", summary.mean_ambiguous_mass_p), ("Q", summary.mean_ambiguous_mass_q)):
        if mass is not None and mass > AMBIGUOUS_MASS_WARNING:
            yield f"{mass:.1%} of {side}'s mass is on entries that do not say which token they are; bounds stay valid."
    for side in ("P", "Q"):
        yield from _inexact_warnings(side, counts)


def _outlier_warnings(summary: Summary) -> Iterator[str]:
    set_aside = [row for row in summary.outliers if row["kind"] == "set-aside"][:_NAMED]
    if n := summary.counts.missing_by_reason.get("outlier"):
        named = ", ".join(f"{_place(row)} ({row['kl']:.3g} nats)" for row in set_aside)
        more = f" and {n - len(set_aside):,} more" if n > len(set_aside) else ""
        yield (
            f"{n:,} positions are set aside, as their own lists contradict a value; in brackets what each would have "
            f"counted: {named}{more}. `outliers` and the column `error` say which value."
        )
    for row in summary.outliers:
        if row["kind"] == "large" and row["share"] is not None and row["kl"] >= _LARGE_KL:
            yield f"{_place(row)} alone holds {row['share']:.1%} of all KL ({row['kl']:.3g} nats)."


def _place(row: Row) -> str:
    return f"{row['source_file']}#{row['response_idx']} position {row['position']} {row['token']!r}"


def _inexact_warnings(side: str, counts: Counts) -> Iterator[str]:
    if n := counts.flagged.get(f"mass-above-1-{side.lower()}"):
        yield (
            f"{side}'s listed probabilities add up to more than 1 at {n:,} of {counts.measured:,} positions: its "
            "log-probabilities are too large, as a rule by one constant. Those lists are scaled to 1; differences as "
            "small as the excess are not measured."
        )
    if counts.flagged.get(f"rounded-{side.lower()}"):
        yield f"{side}'s log-probabilities are rounded to a few decimals; differences below the step are not measured."


def _noise_warnings(summary: Summary) -> Iterator[str]:
    floor = summary.noise_floor
    if floor is None:
        return
    if floor.n_measured < floor.n_drawn:
        yield (
            f"noise floor: {floor.n_drawn - floor.n_measured:,} of {floor.n_drawn:,} positions have no second answer "
            f"to compare ({_listed(floor.missing_by_reason)})."
        )
    if floor.above is False:
        yield "the KL of Q is not above the noise floor: what Q differs by may be the service's own unrest."


def _missing_warnings(counts: Counts) -> Iterator[str]:
    if counts.files_unreadable:
        yield f"{counts.files_unreadable:,} of {counts.files:,} files could not be read and take no part."
    if counts.responses_not_scored:
        reasons = _listed(counts.responses_not_scored_by_reason)
        yield f"{counts.responses_not_scored:,} of {counts.responses:,} responses could not be scored ({reasons})."
    if retokenised := counts.missing_by_reason.get(RETOKENISED):
        yield (
            f"{retokenised:,} of {counts.selected:,} positions were asked about another context than P's: model 2's "
            "service trimmed the prefix or tokenised it otherwise, by its counts of tokens (retokenised). They are not "
            "measured. A backend that feeds token ids measures them; if they are most, model 2 has another tokenizer."
        )
    if counts.missing:
        yield (
            f"{counts.missing:,} of {counts.selected:,} positions asked were not measured "
            f"({_listed(counts.missing_by_reason)}); means are over the measured ones, and sums per response are "
            "extrapolated over them, except the certified lower bound."
        )


def _sampling_warnings(samplings: Sequence[Sampling], counts: Counts) -> Iterator[str]:
    obstacle = _sampling_obstacle(samplings, counts)
    if obstacle is not None:
        yield (
            f"k1 and k3 are not computed: {obstacle}. The KL is the mean over the prefixes that P visited, which for "
            "other settings than temperature 1, top_p 1 is not the KL of the two models' laws of whole responses."
        )
    elif any(sampling.top_k is None for sampling in samplings):
        yield "top_k is not stated for the responses; k1 and k3 assume that it was off."


def _listed(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {n:,}" for reason, n in reasons.items())
