"""How far a model is from itself when it is asked again: below that, a KL is the service's own unrest.

Some positions are asked a second time: of P, whose first answer is on record, or where P cannot be asked, of Q. The two
answers to one context are compared exactly as P's and Q's are, with a spread of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import polars as pl

from kl.statistics.breakdowns import missing_by_reason
from kl.statistics.clusters import per_token
from kl.statistics.drift import Change, change
from kl.statistics.intervals import CONFIDENCE, Estimate
from kl.tables.responses import info_frame, response_rows
from kl.tables.totals import batch_totals, merge_totals

AskedAgain = Literal["p", "q"]


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """KL of a model from itself asked again, per token, in nats.

    ``of`` says whose: P's lists on record against P asked again (``p``), Q's against Q asked again (``q``), or either,
    by response (``both``); ``models`` and ``versions`` are those that answered. ``n_drawn`` positions were asked again,
    ``n_measured`` of them have both lists; the estimates are weighted by their inclusion probabilities. ``ratio`` is
    the floor divided by the KL of Q; ``difference`` is the KL of Q less the floor, paired by prompt, and ``above``
    whether all of its interval is above 0. ``None``: not known.
    """

    of: Literal["p", "q", "both"]
    models: list[str]
    versions: list[str]
    n_drawn: int
    n_measured: int
    missing_by_reason: dict[str, int]
    prior_var: float | None
    kl_per_token: Estimate
    lower: Estimate
    plausible_upper: Estimate
    ratio: float | None
    difference: Estimate
    above: bool | None


@dataclass(slots=True)
class AskedTwice:
    """Positions that were asked twice: their sums per response, why some are missing, and who answered."""

    totals: list[pl.DataFrame] = field(default_factory=list[pl.DataFrame])
    missing: Counter[str] = field(default_factory=Counter[str])
    of: set[AskedAgain] = field(default_factory=set[AskedAgain])
    models: set[str] = field(default_factory=set[str])
    versions: set[str] = field(default_factory=set[str])

    def note(self, of: AskedAgain, model: str) -> None:
        """Say who was asked again about a response."""
        self.of.add(of)
        self.models.add(model)

    def take(self, tables: Sequence[pl.DataFrame]) -> None:
        """Add token tables (`kl.tables.schemas.TOKENS`) that were measured between the two answers."""
        if tables:
            rows = pl.concat(tables)
            self.totals.append(batch_totals(rows))
            self.missing.update(missing_by_reason(rows.lazy()))

    def rows(self) -> pl.DataFrame | None:
        """The response table (`kl.tables.responses.RESPONSES`) of the two answers; None if none was to be asked."""
        return response_rows(merge_totals(self.totals), info_frame(())) if self.totals else None

    def add(self, other: AskedTwice) -> None:
        """Take in what the next responses gave."""
        self.totals += other.totals
        self.missing.update(other.missing)
        self.of |= other.of
        self.models |= other.models
        self.versions |= other.versions


def noise_floor(twice: AskedTwice, rows_q: pl.DataFrame, prior_var: float | None = None) -> NoiseFloor | None:
    """The floor, beside the KL of Q; ``None`` if nothing was to be asked again.

    The interval of the difference is that of `kl.statistics.drift.change`: what makes a prompt unquiet for both
    cancels. Where Q is P on servers as unquiet, it holds 0 as often as its confidence says.

    Parameters
    ----------
    rows_q : pl.DataFrame
        The response table (`kl.tables.responses.RESPONSES`) of P against Q.
    """
    if not twice.totals:
        return None
    totals = merge_totals(twice.totals)
    floor = per_token(totals, "kl_estimate")
    found = change(rows_q, twice.rows(), CONFIDENCE)
    return NoiseFloor(
        of="both" if len(twice.of) > 1 else "q" if "q" in twice.of else "p",
        models=sorted(twice.models),
        versions=sorted(twice.versions),
        n_drawn=int(totals["n_selected"].sum()),
        n_measured=int(totals["n_measured"].sum()),
        missing_by_reason=dict(twice.missing.most_common()),
        prior_var=prior_var,
        kl_per_token=floor,
        lower=per_token(totals, "kl_lower"),
        plausible_upper=per_token(totals, "kl_upper_plausible"),
        ratio=floor.value / found.run if floor.value is not None and found.run else None,
        difference=_difference(found, floor.n),
        above=None if found.low is None else found.low > 0,
    )


def _difference(found: Change, n: int) -> Estimate:
    n_prompts = found.n_shared + found.n_only_run + found.n_only_reference
    why = found.no_interval
    if found.value is None and why is None:
        why = "nothing was measured"
    return Estimate(found.value, found.se, found.low, found.high, n, 0, n_prompts, None, why)
