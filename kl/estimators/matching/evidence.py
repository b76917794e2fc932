"""What the tokens of each response are matched by, where the ids of P and Q may come from one tokenizer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kl.columns import NO_ID, BoolArray, IntArray, TopLists
from kl.estimators.matching.codes import NO_KEY, Codes, KeyCodes, Sides
from kl.estimators.matching.places import LARGEST_OF_TABLE, distinct, places_in, repeats
from kl.estimators.rows import row_counts
from kl.estimators.token_keys import MAX_ID_MISMATCH, KeyChoice, choose_key, paired_texts


class Evidence(NamedTuple):
    """What each response is matched by, and its rows whose ids need a look by all the rules, shape (T,).

    Of all rows, if the ids of any response count: where a list has an id ``twice``, shape (T,), and the ``places`` of
    P's ids in Q's lists, shape (T, K).
    """

    choices: tuple[KeyChoice, ...]
    doubtful: BoolArray
    twice: BoolArray | None = None
    places: IntArray | None = None


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
    twice = places = None
    if has_ids.any():
        twice = repeats(sides.lists_p.padded(ids_p, -1)) | repeats(sides.lists_q.padded(ids_q, -1))
        doubtful = (twice | _contradicted(sides, codes, ids_p, ids_q)) & has_ids[sides.response]
        places = places_in(sides.lists_p.padded(ids_p, -2), sides.lists_q.padded(ids_q, -3))
        paired = places >= 0
        if codes.p.min() < 0 or codes.q.min() < 0:
            # An id that both list has one key here, if both sides know it.
            has_key_q = np.take_along_axis(sides.lists_q.padded(codes.q, NO_KEY) >= 0, np.maximum(places, 0), axis=1)
            paired &= (sides.lists_p.padded(codes.p, NO_KEY) >= 0) & has_key_q
        at_ease = has_ids[sides.response] & ~doubtful
        n_pairs += np.bincount(sides.response[at_ease], row_counts(paired)[at_ease], n).astype(np.int64)
        rows = np.flatnonzero(doubtful)
        tops = zip(sides.lists_p.take(rows), sides.lists_q.take(rows), strict=True)
        for row, (top_p, top_q) in zip(rows.tolist(), tops, strict=True):
            response = int(sides.response[row])
            found = paired_texts(top_p, top_q, *codes.readers[response])
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
    return Evidence(tuple(choices), doubtful, twice, places)


def _without_bytes(sides: Sides, lists: TopLists) -> BoolArray:
    stated = lists.entries.stated
    lacks = np.ones(len(lists.entries), dtype=np.bool_) if stated is None else stated.is_null().to_numpy()
    return sides.responses_with(lacks, lists)


def _contradicted(sides: Sides, codes: KeyCodes, ids_p: Codes, ids_q: Codes) -> BoolArray:
    """Rows with an id that stands for two bytes somewhere here, or bytes with two ids."""
    found = np.zeros(len(sides.response), dtype=np.bool_)
    if _is_one_naming((ids_p, codes.p), (ids_q, codes.q)):
        return found
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
    found[rows[named[wrong]]] = True
    return found


def _is_one_naming(*sides: tuple[Codes, Codes]) -> bool:
    """Whether each id has one key on all sides, or none, and no two have the same; from ids and keys of each side."""
    largest = max(int(ids.max(initial=-1)) for ids, _ in sides)
    if largest >= LARGEST_OF_TABLE or min(int(ids.min(initial=0)) for ids, _ in sides) < 0:
        return False
    key_of = np.full(largest + 1, NO_KEY, dtype=np.int32)
    for ids, keys in sides:
        key_of[ids] = keys
    known = key_of[key_of >= 0]
    return len(distinct(known)) == len(known) and all(bool((key_of[ids] == keys).all()) for ids, keys in sides)


def _compact(numbers: Codes) -> IntArray:
    if numbers.max(initial=0) < LARGEST_OF_TABLE:
        return numbers.astype(np.int64)
    return np.unique(numbers, return_inverse=True)[1]
