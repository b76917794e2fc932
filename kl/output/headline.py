"""The rows of the terminal table and of the report's head: a label and a text, honest about what is missing."""

from __future__ import annotations

from kl.output.digits import at_least, at_most, rounded
from kl.statistics.intervals import CONFIDENCE, Estimate
from kl.statistics.summary import Counts, Divergence, Summary

Rows = list[tuple[str, str]]

ANSWER = "KL(P‖Q) per token"  # the label of the first row


def headline(summary: Summary) -> Rows:
    """(label, text) of the numbers to read first, in that order."""
    return [
        (ANSWER, _divergence_text(summary.kl_per_token)),
        ("KL(P‖Q) per response", _divergence_text(summary.kl_per_response)),
        *_noise_rows(summary),
        *_estimator_rows(summary),
        *_token_rows(summary),
        ("Reverse KL(Q‖P) per token", _estimate_text(summary.reverse_kl_per_token)),
        ("Jensen-Shannon per token", _estimate_text(summary.js_per_token)),
        ("Same top p", _percent_text(summary.same_top_p, "the top tokens")),
        *_top_token_rows(summary),
        *_delta_rows(summary),
        *_perplexity_rows(summary),
        *_logprob_rows(summary),
        *_sampled_token_rows(summary),
        *_amount_rows(summary),
    ]


def _divergence_text(divergence: Divergence) -> str:
    return bounded_text(divergence.estimate, divergence.lower, divergence.plausible_upper)


def bounded_text(estimate: Estimate, least: Estimate, most: Estimate) -> str:
    """An estimate with its interval, and what truncated lists leave certain and plausible."""
    text = _estimate_text(estimate)
    if estimate.value is None and least.value is None:
        return text
    lower, upper = least.value, most.value
    low = "not known" if lower is None else at_least(lower)
    high = "not identified" if upper is None else at_most(upper)
    return f"{text}; truncation: lower {low}, plausible upper {high}"


def _estimate_text(estimate: Estimate) -> str:
    if estimate.value is None:
        return f"not known: {estimate.no_interval}"
    partly = f"; {estimate.n_unknown:,} positions without an estimate are left out" if estimate.n_unknown else ""
    return f"{rounded(estimate.value, estimate.se)} nats ({_interval_text(estimate, 1.0)}){partly}"


def _interval_text(estimate: Estimate, scale: float) -> str:
    if estimate.ci_low is None or estimate.ci_high is None:
        return f"no interval: {estimate.no_interval}"
    se = None if estimate.se is None else scale * estimate.se
    low, high = rounded(scale * estimate.ci_low, se), rounded(scale * estimate.ci_high, se)
    return f"{100 * CONFIDENCE:.0f} % CI {low} to {high}, {estimate.n_clusters:,} prompts"


def _percent_text(estimate: Estimate, unit: str) -> str:
    if estimate.value is None:
        return f"not known: {estimate.no_interval}"
    text = rounded(100 * estimate.value, None if estimate.se is None else 100 * estimate.se)
    partly = f"; {unit} of {estimate.n_unknown:,} positions are not known" if estimate.n_unknown else ""
    return f"{text} % ({_interval_text(estimate, 100.0)}){partly}"


def _noise_rows(summary: Summary) -> Rows:
    floor = summary.noise_floor
    if floor is None:
        return []
    whose = {"p": "KL(P‖P again)", "q": "KL(Q‖Q again)", "both": "one model asked twice"}[floor.of]
    text = f"{_estimate_text(floor.kl_per_token)}; {whose} at {floor.n_measured:,} positions"
    above = floor.difference
    if above.value is not None:
        stands = {True: "above it", False: "not above it", None: "not known to be above it"}[floor.above]
        text += (
            f"; KL(P‖Q) is {stands}: less this it is {rounded(above.value, above.se)} ({_interval_text(above, 1.0)})"
        )
    return [("Noise floor per token", text)]


def _estimator_rows(summary: Summary) -> Rows:
    rows = [
        ("  exact (full vocabulary)", summary.kl_per_token.exact.value),
        ("  floor, for comparison", summary.kl_per_token.floor.value),
        ("  bucket, for comparison", summary.kl_per_token.bucket.value),
    ]
    known = [(label, f"{rounded(value)} nats per token") for label, value in rows if value is not None]
    share = summary.identification
    if share.value is None:
        return known
    partly = f", over {share.n_positions:,} positions; {share.n_unidentified:,} are without an upper limit"
    text = f"{share.value:.1%} of the plausible upper limit is certain{partly if share.n_unidentified else ''}"
    return [*known, ("Identified", text)]


def _token_rows(summary: Summary) -> Rows:
    rows = [(name, summary.token_kl[name]) for name in ("Median KLD", "99.0% KLD", "99.9% KLD", "Maximum KLD")]
    shown = [(name, f"{rounded(value)} nats") for name, value in rows if value is not None]
    largest, share = summary.largest_position, summary.kl_share_of_top_1_percent
    if share is not None:
        shown.append(("Top 1 % of positions", f"{share:.1%} of the KL"))
    if largest is not None and largest["share"] is not None:
        place = f"{largest['source_file']}#{largest['response_idx']} position {largest['position']}"
        shown.append(("Largest position", f"{largest['share']:.1%} of the KL ({place})"))
    return shown


def _delta_rows(summary: Summary) -> Rows:
    mean, rms = summary.delta_p.mean, summary.delta_p.rms
    if mean.value is None or rms is None:
        return [("RMS Δp", "not known: no position with a known Δp")]
    share = mean.n / (mean.n + mean.n_unknown)
    partly = f" (over the {share:.1%} of positions where Q lists the sampled token)" if mean.n_unknown else ""
    return [("Mean Δp", f"{100 * mean.value:.3f} %{partly}"), ("RMS Δp", f"{100 * rms:.3f} %{partly}")]


def _top_token_rows(summary: Summary) -> Rows:
    top = summary.top_token
    if top is None or top.flip_rate.value is None:
        return []
    first, never = top.first_flip, f"{top.n_never:,} of {top.first_flip.n:,} responses never"
    if not first.n:
        text = ""
    elif first.value is None:
        text = f"; {never}, the median response does not"
    else:
        low, high = first.ci_low, first.ci_high
        interval = "" if low is None or high is None else f", {100 * CONFIDENCE:.0f} % CI {low:g} to {high:g}"
        text = f"; first at position {first.value:g} (median{interval}), {never}"
    return [("Flip rate of the top token", _percent_text(top.flip_rate, "the top tokens") + text)]


def _perplexity_rows(summary: Summary) -> Rows:
    found = summary.perplexity
    if found is None or found.p.value is None or found.q.value is None or found.ratio.value is None:
        return []
    both = f"{rounded(found.p.value, found.p.se)} under P, {rounded(found.q.value, found.q.se)} under Q"
    log = found.log_ratio
    text = f"{both}; ln of the ratio {_signed(log)} ({_interval_text(log, 1.0)})"
    if not log.n_unknown:
        return [("Perplexity of the text", text)]
    text += f"; without {log.n_unknown:,} positions where log q is not known"
    least = found.log_ratio_lower
    whole = "" if least.value is None else f", with them the logarithm is at least {_signed(least)}"
    return [("Perplexity of the text", text + whole)]


def _signed(estimate: Estimate) -> str:
    return "not known" if estimate.value is None else rounded(estimate.value, estimate.se)


def _logprob_rows(summary: Summary) -> Rows:
    found = summary.logprob_difference
    if found is None or found.mean.value is None or found.percentile_95.value is None or found.largest is None:
        return []
    least = f"; at least, as {found.n_censored:,} tokens are outside Q's list" if found.n_censored else ""
    largest = f"95 % below {rounded(found.percentile_95.value)}, largest {rounded(found.largest)}"
    return [
        ("|Δ log p| of the sampled token", f"{_estimate_text(found.mean)}; {largest}{least}"),
        ("q/p outside 0.9 to 1.1", _percent_text(found.ratio_outside, "the ratios") + least),
    ]


def _sampled_token_rows(summary: Summary) -> Rows:
    sampled = summary.sampled_token
    if sampled.k1_per_token is None:
        return [("k1, k3", f"not computed: {sampled.not_computed}")]
    bound = ""
    if sampled.k1_is_lower_bound and sampled.censored_share is not None:
        bound = f"; a lower bound: {sampled.censored_share:.1%} of the sampled tokens are outside Q's list"
    rows = [("k1 per token (sampled tokens only)", _estimate_text(sampled.k1_per_token) + bound)]
    if sampled.k3_per_token is not None and sampled.k3_per_token.value is not None:
        rows.append(("k3 per token (sampled tokens only)", _estimate_text(sampled.k3_per_token)))
    return rows


def _amount_rows(summary: Summary) -> Rows:
    counts, rows = summary.counts, list[tuple[str, str]]()
    rows.append(("Positions measured", _positions_text(counts)))
    rows.append(("Responses", _responses_text(counts)))
    if counts.files_unreadable:
        rows.append(("Files", f"{counts.files:,}, {counts.files_unreadable:,} of them unreadable"))
    if summary.prompts_for_10_percent is not None and summary.prompts_for_5_percent is not None:
        few, many = summary.prompts_for_10_percent, summary.prompts_for_5_percent
        rows.append(("Prompts needed", f"about {few:,} like these for ±10 %, {many:,} for ±5 %"))
    return rows


def _positions_text(counts: Counts) -> str:
    sampled = f", a sample of {counts.positions:,}" if counts.selected < counts.positions else ""
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in counts.missing_by_reason.items())
    missing = f"; {counts.missing:,} missing: {reasons}" if counts.missing else ""
    bounds = ", ".join(f"{reason} {n:,}" for reason, n in counts.bounds_only_by_reason.items())
    only = f"; {counts.bounds_only:,} with bounds only: {bounds}" if counts.bounds_only else ""
    return f"{counts.measured:,} of {counts.selected:,}{sampled}{missing}{only}"


def _responses_text(counts: Counts) -> str:
    parts = [f"{counts.responses:,} ({counts.prompts:,} prompts): {counts.responses_complete:,} complete"]
    if counts.responses_partial:
        parts.append(f"{counts.responses_partial:,} in part")
    if counts.responses_not_scored:
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in counts.responses_not_scored_by_reason.items())
        parts.append(f"{counts.responses_not_scored:,} not scored ({reasons})")
    return ", ".join(parts)
