"""Sampled tokens that may have been added to the most probable ones of their lists, where no other list tells.

Left in, such a token passes for the least of the k best, and every bound on what is not listed is too tight. Without it
the list is still one of the most probable tokens, perhaps one short.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from kl.columns import NO_ID, BoolArray, IntArray, Positions
from kl.input.logprobs import SAMPLED_TOLERANCE
from kl.input.problems import Notes, as_plain, show
from kl.pieces import is_whole
from kl.records import LARGEST_MASS


def stated_k(*places: Mapping[str, object]) -> int | None:
    """How many entries were asked for a list, as the first place that says it has it; None if none does."""
    for place in places:
        for raw in (place, as_plain(place.get("sampling")) or {}):
            for name in ("logprobs", "top_logprobs"):
                value = raw.get(name)
                if type(value) is int and value >= 0:
                    return value
    return None


def without_added(positions: Positions, k: int | None, notes: Notes) -> Positions:
    """Lists without the sampled token at their end, where that is or may be none of the k best.

    With ``k`` known it is the one in place k + 1. Otherwise, or of a service that gives fewer, a list that ends so is
    whole for certain where another one is as long and does not, or where no token that is not listed can be more
    probable; any other is in doubt.
    """
    lengths = positions.tops.lengths
    longest = int((lengths + positions.n_dropped).max(initial=0))
    if k == 0 and longest == 1:
        notes.defect("no-top-logprobs", "0 entries were asked for a list: each has the sampled token alone")
    if longest < 2 or longest == k:
        return positions
    ends = _may_end_with_sampled(positions)
    if k is not None and longest == k + 1:
        added = ends & (lengths + positions.n_dropped == longest) & (lengths > 1)
        why = f"which is one longer than the {k} that were asked"
    else:
        whole = int(lengths[~ends].max(initial=1))
        added = ends & (lengths > whole)
        added[added] = _leaves_room(positions, np.flatnonzero(added))
        why = "and may have been added to the most probable ones (state `top_logprobs` if not)"
    if not added.any():
        return positions
    at = positions.tops.offsets[1:][added] - 1
    for position, candidate in zip(np.flatnonzero(added), positions.tops.entries.take(at).candidates(), strict=True):
        what = f"the sampled token {show(candidate and candidate.token)} ends the list, {why}; taken out of the list"
        notes.repair("sampled-appended", what, int(position))
    mask = np.ones(len(positions.tops.entries), dtype=np.bool_)
    mask[at] = False
    return replace(positions, tops=positions.tops.kept(mask))


def _may_end_with_sampled(positions: Positions) -> BoolArray:
    """Which of T lists may end with the sampled token; an unknown one may be any."""
    tops, sampled = positions.tops, positions.sampled
    ends: BoolArray = ~(np.abs(tops.last() - sampled.logprobs) > SAMPLED_TOLERANCE)  # NaN is any value
    near = np.flatnonzero(ends & (tops.lengths > 0))
    ends[:] = False
    last = tops.offsets[1:][near] - 1
    ids, own = tops.entries.ids[last], sampled.ids[near]
    ends[near] = (ids == own) & (own != NO_ID)
    by_text = np.flatnonzero((ids == NO_ID) | (own == NO_ID))
    if len(by_text):
        near, last = near[by_text], last[by_text]
        texts = sampled.take(near)
        same = tops.entries.take(last).codes() == texts.codes()
        ends[near] = same | [not is_whole(token) for token in texts.texts()]
    return ends


def _leaves_room(positions: Positions, at: IntArray) -> BoolArray:
    """Whether a token that is not listed could be more probable than the last one that is, of some lists."""
    tops = positions.tops.take(at)
    mass = np.bincount(tops.rows, weights=np.exp(tops.entries.logprobs), minlength=len(tops))
    room: BoolArray = 1.0 - mass / LARGEST_MASS > np.exp(tops.last())
    return room
