"""Both lists of a position side by side, matched as the run matched them."""

from __future__ import annotations

import difflib
import math
from typing import Any, NamedTuple

import polars as pl

from kl.estimators.matching.rows import KeyedList, Sample, clear_sides, keyed, keys_of_several, namesakes, with_one_stop
from kl.estimators.token_bytes import BytesOf, byte_functions
from kl.estimators.token_keys import Key, choose_key, contradicted_ids, id_key, logprob_of
from kl.records import Candidate
from kl.tables.totals import RESPONSE_KEYS

BOTH_LISTS = pl.Schema(
    {
        "token": pl.String,
        "token_id_p": pl.Int64,
        "token_id_q": pl.Int64,
        "logprob_p": pl.Float64,
        "logprob_q": pl.Float64,
        "prob_p": pl.Float64,
        "prob_q": pl.Float64,
        "rank_p": pl.Int32,
        "rank_q": pl.Int32,
        "unclear": pl.Boolean,
    }
)
Lists = tuple[tuple[Candidate, ...], tuple[Candidate, ...]]


class NoSuchPositionError(LookupError):
    """There is no such file, response or position in a run."""


def both_lists(
    tokens: pl.LazyFrame, candidates: pl.LazyFrame, source_file: str, response_idx: int, position: int
) -> pl.DataFrame:
    """What P and Q list at a position, a row for each token: P's list in its order, then what only Q lists.

    Tokens are matched by what the run matched them by (``align_key`` of the token table), in the light of all lists of
    the response. An entry that does not say which token it is stands alone and is ``unclear``.

    Returns
    -------
    pl.DataFrame
        Schema `BOTH_LISTS`. Null is what a side does not list; ranks count from 1, null of what Q was asked for
        by name; log-probabilities in nats.

    Raises
    ------
    NoSuchPositionError
        If the run has no such position.
    """
    here = (pl.col("source_file") == source_file) & (pl.col("response_idx") == response_idx)
    known = tokens.filter(here).select("position", "token", "token_id", "logprob_p", "is_stop", "align_key", "k_p")
    rows = known.collect()
    if not 0 <= position < rows.height:
        raise NoSuchPositionError(_not_there(tokens, source_file, response_idx, position, rows.height))
    lists = candidates.filter(here).collect().join(rows, on="position", how="left", maintain_order="left").to_dicts()
    stated = next((row["align_key"] for row in lists if row["align_key"] is not None), None)
    pairs = [_lists(row, stated == "bytes") for row in lists]
    own = pairs[position]
    if not (own[0] and own[1]):
        return _frame(_unmatched(own[0]), _unmatched(own[1]))
    # What the run decided by: the positions that were measured, and this one.
    places = [place for place, row in enumerate(lists) if row["k_p"] is not None] or [position]
    used, sampled = [pairs[place] for place in places], [_sampled(lists[place]) for place in places]
    of_p, of_q = [pair[0] for pair in used], [pair[1] for pair in used]
    readers = byte_functions(of_p, of_q)
    matching = _Matching(stated or choose_key(of_p, of_q, *readers).key, readers, used, sampled)
    return _frame(*matching.sides(lists[position], own))


def _not_there(tokens: pl.LazyFrame, source_file: str, response_idx: int, position: int, n: int) -> str:
    if n:
        return f"{source_file}#{response_idx} has the positions 0 to {n - 1:,}, not {position}."
    found = tokens.select(RESPONSE_KEYS).unique().collect()
    numbers = sorted(found.filter(source_file=source_file)["response_idx"].to_list())
    if numbers:
        return f"{source_file} has the responses {', '.join(map(str, numbers))}, not {response_idx}."
    near = difflib.get_close_matches(source_file, found["source_file"].unique().to_list(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"the run has no file {source_file!r} with a position.{hint}"


def _lists(row: dict[str, Any], states_all: bool) -> Lists:
    """Both lists of a row of the candidate table; with ``states_all`` every entry's bytes had been stated."""
    return _list(row, "p", states_all), _list(row, "q", states_all)


def _list(row: dict[str, Any], side: str, states_all: bool) -> tuple[Candidate, ...]:
    columns = [row[f"{side}_{name}"] or () for name in ("tokens", "logprobs", "token_ids", "bytes")]
    return tuple(
        Candidate(token, logprob, number, token.encode() if stated is None and states_all else stated)
        for token, logprob, number, stated in zip(*columns, strict=True)
    )


def _sampled(row: dict[str, Any]) -> Candidate:
    return Candidate(row["token"], row["logprob_p"], row["token_id"])


def _unmatched(candidates: tuple[Candidate, ...]) -> KeyedList:
    """Each entry as a token of its own."""
    return KeyedList([*range(len(candidates))], [*map(logprob_of, candidates)], candidates, len(candidates))


class _Matching(NamedTuple):
    """How the tokens of a response are matched: by what, who reads bytes, its lists, and what P sampled at each."""

    by: str
    readers: tuple[BytesOf, BytesOf]
    used: list[Lists]
    sampled: list[Candidate]

    def sides(self, row: dict[str, Any], own: Lists) -> tuple[KeyedList, KeyedList]:
        """The lists of a position with the keys that tell which entries are one token, None for an open one."""
        key_p, key_q = (id_key, id_key) if self.by == "id" else self.readers
        n_best = len(own[1]) - (row["n_wanted_q"] or 0)
        side_p, side_q = keyed(own[0], key_p), keyed(own[1], key_q, n_best)
        unclear = frozenset(
            key
            for of_p, of_q in self.used
            for found in (keys_of_several(keyed(of_p, key_p)), keys_of_several(keyed(of_q, key_q)))
            for key in found
        )
        if self.by == "id":
            unclear |= contradicted_ids(*own, *self.readers)
        else:
            pairs = zip(self.used, self.sampled, strict=True)
            unclear = unclear.union(*(namesakes(keyed(lists[0], key_p), Sample(one, key_p)) for lists, one in pairs))
            if row["is_stop"]:
                samples = Sample(_sampled(row), key_p), Sample(None, key_q)
                side_p, side_q, _ = with_one_stop(side_p, side_q, samples)
        return clear_sides(side_p, side_q, unclear, by_role=self.by == "text")


def _frame(side_p: KeyedList, side_q: KeyedList) -> pl.DataFrame:
    place_q = {key: place for place, key in reversed([*enumerate(side_q.keys)]) if key is not None}
    rows: list[dict[str, Any]] = []
    taken: set[int] = set()
    named: set[Key] = set()
    for place, (key, one) in enumerate(zip(side_p.keys, side_p.candidates, strict=True)):
        if key is not None and key in named:
            continue  # one token that the source lists twice
        named |= set() if key is None else {key}
        at = None if key is None else place_q.get(key)
        taken |= set() if at is None else {at}
        rows.append(_row(one, None if at is None else side_q.candidates[at], place, at, key is None))
    for place, (key, one) in enumerate(zip(side_q.keys, side_q.candidates, strict=True)):
        if place not in taken and (key is None or (key not in named and place_q[key] == place)):
            rows.append(_row(None, one, None, place, key is None))
    found = pl.DataFrame(rows, schema=BOTH_LISTS)
    # What Q was asked for by name stands behind its k best, at a place that nobody knows.
    return found.with_columns(rank_q=pl.when(pl.col("rank_q") <= side_q.n_best).then("rank_q"))


def _row(
    of_p: Candidate | None, of_q: Candidate | None, place_p: int | None, place_q: int | None, unclear: bool
) -> dict[str, Any]:
    named = of_p or of_q
    assert named is not None, "one of the two lists the token"
    logp, logq = (None if one is None else one.logprob for one in (of_p, of_q))
    return {
        "token": named.token,
        "token_id_p": None if of_p is None else of_p.token_id,
        "token_id_q": None if of_q is None else of_q.token_id,
        "logprob_p": logp,
        "logprob_q": logq,
        "prob_p": None if logp is None else math.exp(logp),
        "prob_q": None if logq is None else math.exp(logq),
        "rank_p": None if place_p is None else place_p + 1,
        "rank_q": None if place_q is None else place_q + 1,
        "unclear": unclear,
    }
