"""Matching one position after the other by all the rules: what `kl.align` must give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kl.estimators.list_checks import rounding_step
from kl.estimators.matching.rows import (
    MatchedRow,
    Sample,
    indices,
    keyed,
    keys_of_several,
    match_row,
    namesakes,
    with_one_stop,
)
from kl.estimators.token_bytes import Candidates, byte_functions
from kl.estimators.token_keys import Key, KeyChoice, choose_key, contradicted_ids, id_key
from kl.records import Candidate


class SlowMatch:
    """The rows of one response, and what they were matched by."""

    def __init__(
        self,
        lists_p: Sequence[Candidates],
        lists_q: Sequence[Candidates],
        sampled_p: Sequence[Candidate | None],
        sampled_q: Sequence[Candidate | None],
        stops: Sequence[bool],
    ) -> None:
        bytes_p, bytes_q = byte_functions(lists_p, lists_q)
        self.choice: KeyChoice = choose_key(lists_p, lists_q, bytes_p, bytes_q)
        by_id = self.choice.key == "id"
        key_p, key_q = (id_key, id_key) if by_id else (bytes_p, bytes_q)
        sides = [(keyed(p, key_p), keyed(q, key_q)) for p, q in zip(lists_p, lists_q, strict=True)]
        several = frozenset[Key | None]().union(*(keys_of_several(side) for pair in sides for side in pair))
        for (p, _), one in zip(sides, sampled_p, strict=True):
            several |= namesakes(p, Sample(one, key_p)) if not by_id else frozenset()
        self.rows: list[MatchedRow] = []
        for (p, q), one, two, stop in zip(sides, sampled_p, sampled_q, stops, strict=True):
            unclear = several | contradicted_ids(p.candidates, q.candidates, bytes_p, bytes_q) if by_id else several
            samples = Sample(one, key_p), Sample(two, key_q)
            if stop and not by_id:
                p, q, samples = with_one_stop(p, q, samples)
            self.rows.append(match_row(p, q, *samples, unclear, by_role=self.choice.key == "text"))
        self.steps = rounding_step(lists_p), rounding_step(lists_q)

    def columns(self) -> dict[str, list[Any]]:
        """By the names of `Aligned`, without padding."""
        return {
            "logp": [row.p.logs for row in self.rows],
            "logq": [row.q.logs for row in self.rows],
            "index_q": [indices(row.p.keys, row.q.keys) for row in self.rows],
            "index_p": [indices(row.q.keys, row.p.keys) for row in self.rows],
            "log_open_p": [row.p.open_logs for row in self.rows],
            "log_open_q": [row.q.open_logs for row in self.rows],
            "n_listed_p": [row.p.n_listed for row in self.rows],
            "n_listed_q": [row.q.n_listed for row in self.rows],
            "top_open": [row.p.top_open or row.q.top_open for row in self.rows],
            "n_duplicate_keys": [row.p.n_repeats + row.q.n_repeats for row in self.rows],
            "sampled_clear": [row.sampled[2] for row in self.rows],
        }

    def floats(self) -> dict[str, np.ndarray[Any, Any]]:
        """Sums, which may differ by their order, and values that may be unknown."""
        return {
            "open_p": np.array([row.p.open_mass for row in self.rows]),
            "open_q": np.array([row.q.open_mass for row in self.rows]),
            "logp_sampled": np.array([row.sampled[0] for row in self.rows]),
            "logq_sampled": np.array([row.sampled[1] for row in self.rows]),
        }

    def keys(self) -> tuple[frozenset[Key], frozenset[Key]]:
        """All that P and Q name."""
        named = [(row.p.keys, row.q.keys) for row in self.rows]
        return frozenset(key for keys, _ in named for key in keys), frozenset(key for _, keys in named for key in keys)
