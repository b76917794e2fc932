"""What a run found, in a sentence for everybody: from the interval, the bounds and the noise floor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kl.output.digits import at_least, at_most, rounded
from kl.statistics.intervals import CONFIDENCE
from kl.statistics.noise_floor import NoiseFloor
from kl.statistics.summary import Summary
from kl.tables.totals import INFINITE

NOTHING = 1e-6  # nats; float32 log-probabilities of one model differ by as much
UNREST = 0.006  # nats; engines on the same weights were .001 to .006 apart (docs/reading-the-numbers.md)

_UNMEASURED_NOISE = (
    f"Engines that run the same weights differ by 0.001 to {UNREST:g} nats a token: this may be such noise, which this "
    "run did not measure (setting noise_floor)."
)

Level = Literal["differs", "same", "unclear", "unknown"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The ``sentence``, what belongs to it (``more``, a sentence each), and which of four things it says.

    ``differs``; ``same``: no difference was found; ``unclear``: it may be one of the service, or of the prompts;
    ``unknown``: nothing was measured, or what was measured cannot be compared.
    """

    level: Level
    sentence: str
    more: tuple[str, ...]


def verdict(summary: Summary) -> Verdict:
    """The verdict of a run."""
    counts, found = summary.counts, summary.kl_per_token
    value, lower = found.estimate.value, found.lower.value
    if not counts.measured:
        return Verdict("unknown", "Nothing was measured: this run does not say how far Q is from P.", ())
    more = tuple(_more(summary))
    if (summary.alignment or {}).get("verdict") == "refuse":
        sentence = (
            "The two models' lists hardly speak of the same tokens: the figures below are no comparison of P and Q."
        )
        return Verdict("unknown", sentence, more)
    if n := counts.bounds_only_by_reason.get(INFINITE):
        sentence = (
            f"Q differs from P without limit: at {n:,} of {counts.measured:,} positions P allows a token that Q "
            "excludes, so that the KL is infinite there and on average."
        )
        return Verdict("differs", sentence, (*_certainly(summary), *more))
    if value is None:
        return _without_estimate(summary, more)
    if value <= NOTHING and (lower or 0.0) <= NOTHING:
        return Verdict("same", f"No difference between Q and P was found, {_at_most(summary)}.", more)
    if summary.noise_floor is not None and summary.noise_floor.above is False:
        return Verdict("same", _within_noise(summary.noise_floor), (_measured(summary), *more))
    return _differs(summary, value, more)


def _without_estimate(summary: Summary, more: tuple[str, ...]) -> Verdict:
    lower = summary.kl_per_token.lower.value
    why = f"how far on average is not known: {summary.kl_per_token.estimate.no_interval}"
    if lower is None or lower <= NOTHING:
        return Verdict("unknown", f"Whether Q differs from P is not known; {why}.", more)
    least = f"about {rounded(lower)} or more" if _is_sample(summary) else f"certainly more than {at_least(lower)}"
    return Verdict("differs", f"Q differs from P by {least} nats a token; {why}.", more)


def _differs(summary: Summary, value: float, more: tuple[str, ...]) -> Verdict:
    estimate, noise = summary.kl_per_token.estimate, summary.noise_floor
    low = estimate.ci_low
    quiet = noise is not None and noise.above is True
    if not quiet and value <= UNREST:
        why = _UNMEASURED_NOISE if noise is None else "Whether it is more than the service's own noise is not known."
        return Verdict("unclear", f"{_measured(summary)} That is little.", (why, *_certainly(summary), *more))
    if low is not None and low <= 0:
        sentence = f"{_measured(summary)} Other prompts may show no difference."
        return Verdict("unclear", sentence, (*_certainly(summary), *more))
    return Verdict("differs", _measured(summary), (*_certainly(summary), *more))


def _measured(summary: Summary) -> str:
    estimate = summary.kl_per_token.estimate
    assert estimate.value is not None
    value = rounded(estimate.value, estimate.se)
    if estimate.ci_low is None or estimate.ci_high is None:
        return f"Q differs from P by {value} nats a token on these responses ({estimate.no_interval} for an interval)."
    low, high = rounded(estimate.ci_low, estimate.se), rounded(estimate.ci_high, estimate.se)
    interval = f"{100 * CONFIDENCE:.0f} % interval {low} to {high}, {estimate.n_clusters:,} prompts"
    return f"Q differs from P by {value} nats a token ({interval})."


def _is_sample(summary: Summary) -> bool:
    """Whether positions were drawn, so that means stand for the others too: a bound of such a mean is an estimate."""
    return summary.counts.selected < summary.counts.positions


def _where(summary: Summary) -> str:
    """What a mean without an interval speaks of."""
    return "at the positions measured" if _is_sample(summary) or summary.counts.missing else "on these responses"


def _certainly(summary: Summary) -> Iterator[str]:
    lower = summary.kl_per_token.lower.value
    if lower is None or lower <= NOTHING:
        return
    if _is_sample(summary):
        yield f"Whatever the lists hide, it is about {rounded(lower)} or more, by the positions that were drawn."
    else:
        yield f"Whatever the lists hide, it is certainly more than {at_least(lower)} {_where(summary)}."


def _at_most(summary: Summary) -> str:
    """The least limit that is known: the exact KL's, or that of the model of what the lists hide."""
    found = summary.kl_per_token
    for limit, how in ((found.exact, "exact"), (found.plausible_upper, "plausible limit, which is model-based")):
        if limit.value is None or limit.n_unknown:  # of some positions it limits nothing
            continue
        end = max(limit.value, limit.ci_high or limit.value)
        scope = f"{how}; {_where(summary) if limit.ci_high is None else 'with its interval'}"
        return f"and at most {at_most(end) if end > NOTHING else f'{NOTHING:f}'} nats a token ({scope})"
    return "and how much it may be at most is not known"


def _within_noise(noise: NoiseFloor) -> str:
    high = noise.difference.ci_high
    most = "" if high is None else f", and at most {at_most(max(high, NOTHING))} nats a token above it"
    return f"No difference between Q and P beyond the service's own noise was found{most}."


def _more(summary: Summary) -> Iterator[str]:
    noise, same = summary.noise_floor, summary.same_top_p
    if noise is not None and noise.kl_per_token.value is not None:
        stands = {True: "is above it", False: "is not above it", None: "is not known to be above it"}[noise.above]
        size = rounded(noise.kl_per_token.value, noise.kl_per_token.se)
        yield f"The service's own noise is {size} nats a token; the difference {stands}."
    if same.value is not None:
        yield f"Both find the same token most probable at {at_least(100 * same.value)} % of the positions."
    share = summary.kl_share_of_top_1_percent
    if share is not None and share >= 0.25:
        yield f"The worst hundredth of the positions holds {100 * share:.0f} % of the KL."
    counts = summary.counts
    if counts.missing:
        yield f"{counts.missing:,} of {counts.selected:,} positions could not be measured and are in no figure."
