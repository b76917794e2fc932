"""What a finished run is for those who go on from it: its figures, its tables, and the questions asked most."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from kl.finished import worst
from kl.finished.lists import both_lists
from kl.finished.names import CANDIDATES
from kl.finished.shown import html_of, text_of
from kl.statistics.summary import Summary

_SHOWN_POSITIONS = 5


@dataclass(frozen=True, slots=True, repr=False)
class Run:
    """A finished run.

    Attributes
    ----------
    folder : Path
    summary : Summary
        The figures of the data set.
    tokens, responses : pl.LazyFrame
        Schemas `kl.tables.schemas.TOKENS` and `kl.tables.responses.RESPONSES`; columns that an earlier version did not
        write are null.
    candidates : pl.LazyFrame or None
        Both lists of every position (`kl.tables.schemas.CANDIDATES`), row for row beside ``tokens``; None where the run
        kept none, as those of earlier versions.
    record : dict
        What ``run.json`` says: settings, versions, times.

    Examples
    --------
    ``run = load_run("results/quickstart")``, then ``run.worst_positions(5)`` and, of one of them, ``run.lists("a.json",
    0, 17)``: what did Q say instead?
    """

    folder: Path
    summary: Summary
    tokens: pl.LazyFrame
    responses: pl.LazyFrame
    candidates: pl.LazyFrame | None
    record: dict[str, Any]

    def lists(self, source_file: str, response_idx: int, position: int) -> pl.DataFrame:
        """Both lists of a position side by side: what Q said instead.

        Returns
        -------
        pl.DataFrame
            ``token, token_id_p, token_id_q, logprob_p, logprob_q, prob_p, prob_q, rank_p, rank_q, unclear``: P's list
            in its order, then what only Q lists; null is what a side does not list. Tokens are matched as the run
            matched them; an entry that does not say which token it is (``unclear``) stands alone.

        Raises
        ------
        LookupError
            If the run kept no lists, or has no such position.
        """
        if self.candidates is None:
            raise LookupError(
                f"{self.folder} has no {CANDIDATES}: run the same command again with the setting candidates: true; "
                "scores are kept."
            )
        return both_lists(self.tokens, self.candidates, source_file, response_idx, position)

    def worst_positions(self, top: int = 10) -> pl.DataFrame:
        """The measured positions with the largest KL, infinite ones first, each with the text ``before`` it.

        ``kl_estimate`` is null where the KL is infinite (``reason`` is ``infinite``).
        """
        return worst.worst_positions(self.tokens, top)

    def worst_responses(self, top: int = 10) -> pl.DataFrame:
        """The responses with the largest mean KL per token, those with an infinite one first."""
        return worst.worst_responses(self.responses, top)

    @property
    def tokens_labelled(self) -> pl.LazyFrame:
        """``tokens`` with the columns ``p``, ``q`` and ``run`` (its folder): those of several runs fit in one frame."""
        labels = {"p": self.summary.model_p, "q": self.summary.model_q, "run": str(self.folder)}
        return self.tokens.with_columns(pl.lit(text, dtype=pl.String).alias(name) for name, text in labels.items())

    def __repr__(self) -> str:
        """Where it is, between which models, and the KL per token."""
        return text_of(self.folder, self.summary)

    def _repr_html_(self) -> str:
        """For a notebook: the verdict, the first figures, warnings and the worst positions."""
        return html_of(self.folder, self.summary, self.worst_positions(_SHOWN_POSITIONS))
