"""Lists with a value that is off, as after an error on the way."""

from __future__ import annotations


def with_wrong(lists, row, entry, by):
    """``lists`` with one log-probability off by ``by`` nats, its list in order again."""
    wrong = list(lists[row])
    wrong[entry] = wrong[entry]._replace(logprob=wrong[entry].logprob + by)
    changed = list(lists)
    changed[row] = tuple(sorted(wrong, key=lambda candidate: -candidate.logprob))
    return changed
