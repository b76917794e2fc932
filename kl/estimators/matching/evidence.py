"""What the tokens of each response are matched by, where the ids of P and Q may come from one tokenizer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kl.columns import NO_ID, BoolArray, IntArray, TopLists
from kl.estimators.matching.codes import NO_KEY, Codes, KeyCodes, Sides
from kl.estimators.matching.places import places_in, repeats
from kl.estimators.token_keys import MAX_ID_MISMATCH, KeyChoice, choose_key, paired_texts

_LARGEST_NUMBER = 1 << 24  # ids up to here are told apart by a table


class Evidence(NamedTuple):
    """What each response is matched by, and its rows whose ids need a look by all the rules, shape (T,)."""

    choices: tuple[KeyChoice, ...]
    doubtful: BoolArray


def evidence_of(sides: Sides, codes: KeyCodes, ids_p: Codes, ids_q: Codes) -> Evidence:
    """Choose for each response.

    Parameters
    ----------
    ids_p, ids_q : int32, shape (E,)
        Equal numbers for equal ids of either side.
    """
    n = sides.n_responses
    has_ids = ~(
        sides.responses_with(sides.lists_p.entries.ids == NO_ID, sides.lists_p)
        | sides.responses_with(sides.lists_q.entries.ids == NO_ID, sides.lists_q)
    )
    has_bytes = ~(_without_bytes(sides, sides.lists_p) | _without_bytes(sides, sides.lists_q))
    doubtful = np.zeros(len(sides.response), dtype=np.bool_)
    n_pairs, n_mismatches = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
    if has_ids.any():
        doubtful = _doubtful(sides, codes, ids_p, ids_q) & has_ids[sides.response]
        places = places_in(sides.lists_p.padded(ids_p, -2), sides.lists_q.padded(ids_q, -3))
        # An id that both list has one key here, if both sides know it.
        has_key_q = np.take_along_axis(sides.lists_q.padded(codes.q, NO_KEY) >= 0, np.maximum(places, 0), axis=1)
        paired = (places >= 0) & (sides.lists_p.padded(codes.p, NO_KEY) >= 0) & has_key_q
        at_ease = has_ids[sides.response] & ~doubtful
        n_pairs += np.bincount(sides.response[at_ease], paired[at_ease].sum(axis=1), n).astype(np.int64)
        for row in np.flatnonzero(doubtful).tolist():
            response = int(sides.response[row])
            found = paired_texts(sides.lists_p[row], sides.lists_q[row], *codes.readers[response])
            n_pairs[response] += found.n_pairs
            n_mismatches[response] += found.n_mismatches
    choices: list[KeyChoice] = []
    for response, (by_id, by_bytes) in enumerate(zip(has_ids.tolist(), has_bytes.tolist(), strict=True)):
        pairs, mismatches = int(n_pairs[response]), int(n_mismatches[response])
        if by_id and not pairs:
            rows = sides.slice_of(response)
            choices.append(choose_key(sides.lists_p[rows], sides.lists_q[rows], *codes.readers[response]))
        elif by_id and mismatches <= MAX_ID_MISMATCH * pairs:
            choices.append(KeyChoice("id", pairs, mismatches))
        else:
            choices.append(KeyChoice("bytes" if by_bytes else "text", pairs, mismatches))
    return Evidence(tuple(choices), doubtful)


def _without_bytes(sides: Sides, lists: TopLists) -> BoolArray:
    stated = lists.entries.stated
    lacks = np.ones(len(lists.entries), dtype=np.bool_) if stated is None else stated.is_null().to_numpy()
    return sides.responses_with(lacks, lists)


def _doubtful(sides: Sides, codes: KeyCodes, ids_p: Codes, ids_q: Codes) -> BoolArray:
    """Rows with an id that stands for two bytes somewhere here, or bytes with two ids, or with an id twice."""
    keys, ids = np.concatenate([codes.p, codes.q]), np.concatenate([ids_p, ids_q])
    rows = np.concatenate([sides.lists_p.rows, sides.lists_q.rows])
    named = np.flatnonzero((keys >= 0) & (ids >= 0))
    key, number = _compact(keys[named]), _compact(ids[named])
    id_of, key_of = (
        np.zeros(key.max(initial=-1) + 1, dtype=np.int64),
        np.zeros(number.max(initial=-1) + 1, dtype=np.int64),
    )
    id_of[key], key_of[number] = number, key
    # Of several ids of a key the last one stays: each pair that differs from it is seen.
    wrong = (id_of[key] != number) | (key_of[number] != key)
    found = np.zeros(len(sides.response), dtype=np.bool_)
    found[rows[named[wrong]]] = True
    return found | repeats(sides.lists_p.padded(ids_p, -1)) | repeats(sides.lists_q.padded(ids_q, -1))


def _compact(numbers: Codes) -> IntArray:
    if numbers.max(initial=0) < _LARGEST_NUMBER:
        return numbers.astype(np.int64)
    return np.unique(numbers, return_inverse=True)[1]
