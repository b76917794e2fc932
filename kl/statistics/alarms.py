"""What must be read before any number: lists that are no distributions, or those of another law."""

from __future__ import annotations

from collections.abc import Iterator

from kl.statistics.summary import Counts

_REFUSED = {
    "degenerate-p": "P's lists give one token everything and the others a mark: they are no distributions, and are "
    "refused. Sample P's responses again from a service that reports probabilities.",
    "degenerate-q": "Q's lists give one token everything and the others a mark: they are no distributions, and are "
    "refused. Use a backend that reports probabilities.",
}
_FLAGGED = {
    "clipped-p": "P's lists end with a floor in place of probabilities (several entries at one value, or one that the "
    "mass left over contradicts); these entries are left out.",
    "clipped-q": "Q's lists end with a floor in place of probabilities (several entries at one value, or one that the "
    "mass left over contradicts); these entries are left out.",
    "truncated-p": "P's lists are of a truncated law: they add up to 1 where other tokens must be possible, as after "
    "top-p, top-k or min-p. The KL is that of the truncated law; report P's log-probabilities before sampling.",
    "truncated-q": "Q's lists are of a truncated law: they add up to 1 where other tokens must be possible, as after "
    "top-p, top-k or min-p. Q's zeros are then real, and the KL may be infinite; have Q report raw values.",
}


def alarms(counts: Counts) -> Iterator[str]:
    """A line for each kind, with the number of positions."""
    for code, what in _REFUSED.items():
        if n := counts.missing_by_reason.get(code):
            yield f"at {n:,} of {counts.selected:,} positions {what}"
    for code, what in _FLAGGED.items():
        if n := counts.flagged.get(code):
            yield f"at {n:,} of {counts.measured:,} positions {what}"
