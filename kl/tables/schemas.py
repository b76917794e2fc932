"""Columns of the frames that are stored.

null = not known, NaN = a bug. All divergences, entropies and log-probabilities are in nats.
"""

import polars as pl

# Columns that tables of earlier versions lack; read as null.
ADDED = ("is_stop", "flags", "kl_set_aside")

TOKENS = pl.Schema(
    {
        "source_file": pl.String,  # path below the input directory
        "prompt_id": pl.String,  # content hash of the prompt: the cluster of the statistics
        "response_idx": pl.Int32,
        "position": pl.Int32,  # counts from 0
        "token": pl.String,  # the sampled token's text
        "token_id": pl.Int64,
        "is_stop": pl.Boolean,  # the end of the turn: the token is no part of the response's text
        "selected": pl.Boolean,  # false: left out by position sampling, nothing was asked
        "pi": pl.Float64,  # inclusion probability of the position (1 without sampling)
        "k_p": pl.Int32,  # listed tokens of each side, after merging
        "k_q": pl.Int32,
        "kl_estimate": pl.Float64,  # what the chosen estimator says
        "kl_lower": pl.Float64,  # certified: no completion of the two lists has a smaller KL
        "kl_upper_plausible": pl.Float64,  # model-based; null = not identified
        "kl_floor": pl.Float64,
        "kl_bucket": pl.Float64,
        "kl_censored": pl.Float64,
        "kl_exact": pl.Float64,  # full vocabulary only
        "reverse_kl_estimate": pl.Float64,
        "reverse_kl_lower": pl.Float64,
        "js_estimate": pl.Float64,
        "js_lower": pl.Float64,
        "tv_lower": pl.Float64,
        "logprob_p": pl.Float64,  # of the sampled token
        "logprob_q": pl.Float64,  # null = outside Q's list
        "coverage_p": pl.Float64,  # listed mass
        "coverage_q": pl.Float64,
        "rest_mass_p": pl.Float64,  # 1 - coverage, at least 0
        "rest_mass_q": pl.Float64,
        "p_mass_missing_in_q": pl.Float64,  # P's mass on its listed tokens that Q does not list
        "q_mass_missing_in_p": pl.Float64,
        "overlap": pl.Int32,  # listed tokens that both sides list
        "same_top_token": pl.Boolean,
        "logratio_k1": pl.Float64,  # log p/q of the sampled token; if censored, the lower bound log p - log cap
        "k1_censored": pl.Boolean,
        "k3": pl.Float64,
        "delta_p": pl.Float64,  # q - p of the sampled token, null if either is unknown
        "entropy_p": pl.Float64,  # of the listed tokens plus one rest cell
        "entropy_q": pl.Float64,
        "entropy_p_lower": pl.Float64,
        "entropy_p_upper": pl.Float64,
        "logratio_sd": pl.Float64,  # s of the censored model
        "n_duplicate_keys": pl.Int32,
        "ambiguous_mass_p": pl.Float64,
        "ambiguous_mass_q": pl.Float64,
        "n_dropped": pl.Int32,  # sentinels removed from Q's list
        "align_key": pl.String,  # id | bytes | text
        "flags": pl.String,  # sorted codes of what to know of the lists, joined by ","; null where there is none
        "kl_set_aside": pl.Float64,  # what a position with the reason `outlier` would have counted; nothing counts it
        "reason": pl.String,  # short code of what is missing
        "error": pl.String,  # the same in words; null where measured
    }
)
