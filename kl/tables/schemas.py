"""Columns of the frames that are stored.

null = not known, NaN = a bug.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import polars as pl
from polars.datatypes import DataType, DataTypeClass

# Columns that tables of earlier versions lack; read as null.
ADDED = ("is_stop", "flags", "kl_set_aside", "reverse_kl_exact", "js_exact", "tv_exact")


class Column(NamedTuple):
    """What a column holds; ``unit`` is None where it has none."""

    kind: DataTypeClass | DataType
    about: str
    unit: str | None = None


def schema_of(columns: Mapping[str, Column]) -> pl.Schema:
    """The types of columns."""
    return pl.Schema({name: column.kind for name, column in columns.items()})


TOKEN_COLUMNS = {
    "source_file": Column(pl.String, "path below the input directory"),
    "prompt_id": Column(pl.String, "content hash of the prompt: the cluster of the statistics"),
    "response_idx": Column(pl.Int32, "which response of the file"),
    "position": Column(pl.Int32, "which token of the response, from 0", "tokens"),
    "token": Column(pl.String, "the sampled token's text"),
    "token_id": Column(pl.Int64, "the sampled token's number in P's vocabulary"),
    "is_stop": Column(pl.Boolean, "the end of the turn: the token is no part of the response's text"),
    "selected": Column(pl.Boolean, "false: left out by position sampling, nothing was asked"),
    "pi": Column(pl.Float64, "inclusion probability of the position (1 without sampling)", "probability"),
    "k_p": Column(pl.Int32, "listed tokens of P, after merging", "tokens"),
    "k_q": Column(pl.Int32, "listed tokens of Q, after merging", "tokens"),
    "kl_estimate": Column(pl.Float64, "what the chosen estimator says", "nats"),
    "kl_lower": Column(pl.Float64, "certified: no completion of the two lists has a smaller KL", "nats"),
    "kl_upper_plausible": Column(pl.Float64, "model-based; null: not identified", "nats"),
    "kl_floor": Column(pl.Float64, "over the tokens that both list; can be negative", "nats"),
    "kl_bucket": Column(pl.Float64, "with all unlisted tokens as one", "nats"),
    "kl_censored": Column(pl.Float64, "of the model that counts unlisted tokens as censored", "nats"),
    "kl_exact": Column(pl.Float64, "full vocabulary only", "nats"),
    "reverse_kl_estimate": Column(pl.Float64, "KL(Q‖P)", "nats"),
    "reverse_kl_lower": Column(pl.Float64, "KL(Q‖P), certified", "nats"),
    "js_estimate": Column(pl.Float64, "Jensen-Shannon divergence", "nats"),
    "js_lower": Column(pl.Float64, "Jensen-Shannon divergence, certified", "nats"),
    "tv_lower": Column(pl.Float64, "total variation distance, certified", "probability"),
    "reverse_kl_exact": Column(pl.Float64, "KL(Q‖P), full vocabulary only; null also where it is infinite", "nats"),
    "js_exact": Column(pl.Float64, "Jensen-Shannon divergence, full vocabulary only", "nats"),
    "tv_exact": Column(pl.Float64, "total variation distance, full vocabulary only", "probability"),
    "logprob_p": Column(pl.Float64, "of the sampled token", "nats"),
    "logprob_q": Column(pl.Float64, "of the sampled token; null: outside Q's list", "nats"),
    "coverage_p": Column(pl.Float64, "listed mass", "probability"),
    "coverage_q": Column(pl.Float64, "listed mass", "probability"),
    "rest_mass_p": Column(pl.Float64, "1 - coverage, at least 0", "probability"),
    "rest_mass_q": Column(pl.Float64, "1 - coverage, at least 0", "probability"),
    "p_mass_missing_in_q": Column(pl.Float64, "P's mass on its listed tokens that Q does not list", "probability"),
    "q_mass_missing_in_p": Column(pl.Float64, "Q's mass on its listed tokens that P does not list", "probability"),
    "overlap": Column(pl.Int32, "listed tokens that both sides list", "tokens"),
    "same_top_token": Column(pl.Boolean, "both have the same most probable token"),
    "logratio_k1": Column(
        pl.Float64, "log p/q of the sampled token; if censored, the lower bound log p - log cap", "nats"
    ),
    "k1_censored": Column(pl.Boolean, "Q does not list the sampled token"),
    "k3": Column(pl.Float64, "(q/p - 1) - log q/p of the sampled token", "nats"),
    "delta_p": Column(pl.Float64, "q - p of the sampled token, null if either is unknown", "probability"),
    "entropy_p": Column(pl.Float64, "of the listed tokens plus one rest cell", "nats"),
    "entropy_q": Column(pl.Float64, "of the listed tokens plus one rest cell", "nats"),
    "entropy_p_lower": Column(pl.Float64, "certified", "nats"),
    "entropy_p_upper": Column(pl.Float64, "certified; null unless the size of the vocabulary is known", "nats"),
    "logratio_sd": Column(pl.Float64, "s of the censored model: standard deviation of log p/q over tokens", "nats"),
    "n_duplicate_keys": Column(pl.Int32, "listed entries that repeat a token", "tokens"),
    "ambiguous_mass_p": Column(pl.Float64, "mass of entries whose token is not known for certain", "probability"),
    "ambiguous_mass_q": Column(pl.Float64, "mass of entries whose token is not known for certain", "probability"),
    "n_dropped": Column(pl.Int32, "sentinels removed from Q's list", "tokens"),
    "align_key": Column(pl.String, "what tokens were matched by: id | bytes | text"),
    "flags": Column(
        pl.String, 'sorted codes of what to know of the lists, joined by ","; null where there is none'
    ),
    "kl_set_aside": Column(
        pl.Float64, "what a position with the reason `outlier` would have counted; nothing counts it", "nats"
    ),
    "reason": Column(pl.String, "short code of what is missing"),
    "error": Column(pl.String, "the same in words; null where measured"),
}  # fmt: skip
TOKENS = schema_of(TOKEN_COLUMNS)

_LISTED = (
    "what {side} lists, most probable first, as it was compared: known log-probabilities only (an entry without one "
    "ends the list), without marks in place of probabilities (-1000 or less, a floor that many lists share) and "
    "without smallest values that the others contradict{more}. "
)
_WANTED = (
    "; behind the k best stand the `n_wanted_q` tokens of P's list that Q was asked for by name and does not list, by "
    "falling log-probability"
)
_NULL_P = "Null where the source has no list or a defective one, empty where nothing of it can be used"
_NULL_Q = "Null where Q was not asked or gave no answer, empty where nothing of it can be used"


def _side(side: str, more: str, null: str) -> dict[str, Column]:
    """The columns of one side's lists; those of a position are equally long."""
    name = side.lower()
    return {
        f"{name}_tokens": Column(pl.List(pl.String), _LISTED.format(side=side, more=more) + null),
        f"{name}_token_ids": Column(pl.List(pl.Int64), f"{side}'s token ids; null inside where not stated"),
        f"{name}_logprobs": Column(pl.List(pl.Float64), f"{side}'s log-probabilities, as stated", "nats"),
        f"{name}_bytes": Column(
            pl.List(pl.Binary),
            f"the bytes that {side} states of its tokens; null inside where they are the text's own in UTF-8 or none "
            "are stated",
        ),
    }


CANDIDATE_COLUMNS = {
    **{name: TOKEN_COLUMNS[name] for name in ("source_file", "response_idx", "position")},
    **_side("P", "", _NULL_P),
    **_side("Q", _WANTED, _NULL_Q),
    "n_wanted_q": Column(
        pl.Int32, "how many of the last entries of Q's list are not of its k best but were asked for by name", "tokens"
    ),
}
CANDIDATES = schema_of(CANDIDATE_COLUMNS)
