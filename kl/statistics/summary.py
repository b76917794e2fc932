"""What is said of a data set: the fields of `summary.json`.

``None`` means not known. A mean says over how many positions it is, and how many measured ones it lacks; bounds are
given only where every measured position has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kl.records import Sampling
from kl.statistics.breakdowns import Row
from kl.statistics.figures import LogprobDifference, Perplexity, TopToken
from kl.statistics.intervals import Estimate
from kl.statistics.noise_floor import NoiseFloor

FORMAT = 1


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the summary repeats from the run; ``None`` means not known or not used.

    ``samplings`` are the different ways in which P's responses were sampled. ``alignment`` is the diagnostic of the
    two vocabularies, of plain JSON types. ``prior_var_again`` is the ``prior_var`` of one model's two answers. With
    ``wanted_tokens`` Q was asked for its value of every token that P lists.
    """

    model_p: str | None
    model_q: str
    estimator: str
    top_logprobs: int
    prior_var: float | None
    samplings: Sequence[Sampling]
    alignment: Mapping[str, Any] | None
    prior_var_again: float | None = None
    wanted_tokens: bool = False


@dataclass(frozen=True, slots=True)
class Counts:
    """How much there was and how much of it was measured.

    ``bounds_only`` of the ``measured`` positions have bounds and no point estimate, among them those whose exact KL is
    infinite (reason ``infinite``). ``flagged`` counts measured positions by what to know of their lists. The end of the
    turn is a position of the ``responses_with_stop``; ``responses_without_stop`` are those that have no list there, but
    for those that were cut by length.
    """

    files: int
    files_unreadable: int
    prompts: int
    responses: int
    responses_complete: int
    responses_partial: int
    responses_not_scored: int
    responses_not_scored_by_reason: dict[str, int]
    positions: int
    selected: int
    measured: int
    missing: int
    missing_by_reason: dict[str, int]
    bounds_only: int
    bounds_only_by_reason: dict[str, int]
    flagged: dict[str, int] = field(default_factory=dict[str, int])
    responses_with_stop: int = 0
    responses_without_stop: int = 0

    @property
    def complete(self) -> bool:
        """Whether every position that was selected is measured, of every response of every file."""
        return not (self.missing or self.responses_not_scored or self.files_unreadable)


@dataclass(frozen=True, slots=True)
class Divergence:
    """One divergence by every estimator, each with its own interval, in nats."""

    estimate: Estimate
    lower: Estimate
    plausible_upper: Estimate
    exact: Estimate
    floor: Estimate
    bucket: Estimate
    censored: Estimate


@dataclass(frozen=True, slots=True)
class Identification:
    """How far the two lists pin the KL down: ``1 - (U - L)/U`` over the positions that have a plausible upper limit."""

    value: float | None
    n_positions: int
    n_unidentified: int
    kl_estimate: float | None
    kl_lower: float | None
    kl_upper_plausible: float | None


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What the sampled tokens alone say: Schulman's k1 = log p/q and k3 = (q/p - 1) - log q/p.

    Where Q does not list the sampled token, k1 counts with its lower bound (``k1_is_lower_bound``) and k3 is unknown.
    ``not_computed`` says why there are no means: they are biased unless P's responses were sampled as they are scored.
    """

    k1_per_token: Estimate | None
    k1_per_response: Estimate | None
    k3_per_token: Estimate | None
    k3_per_response: Estimate | None
    k1_is_lower_bound: bool
    n_censored: int
    censored_share: float | None
    not_computed: str | None


@dataclass(frozen=True, slots=True)
class DeltaP:
    """q - p of the sampled token, where Q lists it (``n_unknown`` positions are left out)."""

    mean: Estimate
    rms: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """The data set: what `summary.json` holds. Divergences are in nats, shares and probabilities in [0, 1].

    ``alarms`` are the first of the ``warnings``, which must be read before any number.
    """

    format: int
    model_p: str | None
    model_q: str
    estimator: str
    top_logprobs: int
    prior_var: float | None
    sampling: list[dict[str, Any]]
    alignment: dict[str, Any] | None
    counts: Counts
    warnings: list[str]
    kl_per_token: Divergence
    kl_per_response: Divergence
    identification: Identification
    token_kl: dict[str, float | None]
    kl_share_of_top_1_percent: float | None
    reverse_kl_per_token: Estimate
    reverse_kl_lower_per_token: Estimate
    js_per_token: Estimate
    js_lower_per_token: Estimate
    tv_lower_per_token: Estimate
    same_top_p: Estimate
    delta_p: DeltaP
    sampled_token: SampledToken
    mean_rest_mass_p: float | None
    mean_rest_mass_q: float | None
    mean_p_mass_missing_in_q: float | None
    mean_q_mass_missing_in_p: float | None
    mean_ambiguous_mass_p: float | None
    mean_ambiguous_mass_q: float | None
    mean_entropy_p: float | None
    mean_entropy_q: float | None
    prompts_for_10_percent: int | None
    prompts_for_5_percent: int | None
    by_token: list[Row]
    by_position: list[Row]
    by_prompt: list[Row]
    # None in what an earlier version wrote.
    perplexity: Perplexity | None = None
    logprob_difference: LogprobDifference | None = None
    top_token: TopToken | None = None
    noise_floor: NoiseFloor | None = None
    alarms: list[str] = field(default_factory=list[str])
    largest_position: Row | None = None
    outliers: list[Row] = field(default_factory=list[Row])
    wanted_tokens: bool = False

    def to_json(self) -> dict[str, Any]:
        """The same as plain dicts, lists, numbers and texts."""
        return asdict(self)
