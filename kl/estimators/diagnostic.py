"""Do the lists of P and Q speak of the same tokens? A verdict over a data set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from kl.estimators.align import Aligned, FloatArray
from kl.estimators.rows import row_sums
from kl.estimators.token_keys import MAX_ID_MISMATCH, Key

WARN_OVERLAP = 0.5
REFUSE_OVERLAP = 0.2
WARN_TOP_ABSENT = 0.05
WARN_AMBIGUOUS_MASS = 0.01


class AlignmentVerdict(NamedTuple):
    """``ok``, ``warn`` or ``refuse``, with one line per reason."""

    level: Literal["ok", "warn", "refuse"]
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AlignmentDiagnostic:
    """Counts over aligned positions. Add two of them to join their positions; `AlignmentDiagnostic()` has none.

    They are of the k best of either side: tokens that Q was asked for by name would be shared in any context.

    Attributes
    ----------
    n_positions : int
    n_shared, n_listed : int
        Tokens that both sides list, and tokens of the shorter list of each position.
    shared_mass_p, ambiguous_mass_p, ambiguous_mass_q : float
        Sums over positions: P's mass on shared tokens, mass on keys that several tokens have.
    n_top_absent : int
        Positions whose most probable token under P is not listed by Q.
    n_pairs, n_mismatches : int
        Tokens of one text that both sides list with an id, and those of them whose ids differ.
    n_by_key : tuple of three int
        Positions matched by id, by bytes, by text.
    keys_p, keys_q : frozenset
        Every key listed by a side; bounded by the vocabulary.
    """

    n_positions: int = 0
    n_shared: int = 0
    n_listed: int = 0
    shared_mass_p: float = 0.0
    ambiguous_mass_p: float = 0.0
    ambiguous_mass_q: float = 0.0
    n_top_absent: int = 0
    n_pairs: int = 0
    n_mismatches: int = 0
    n_by_key: tuple[int, int, int] = (0, 0, 0)
    keys_p: frozenset[Key] = frozenset()
    keys_q: frozenset[Key] = frozenset()

    def __add__(self, other: AlignmentDiagnostic) -> AlignmentDiagnostic:
        return AlignmentDiagnostic.total((self, other))

    @classmethod
    def total(cls, parts: Iterable[AlignmentDiagnostic]) -> AlignmentDiagnostic:
        """The sum of many, each let go when the next comes: what grows is the one set of keys of either side."""
        counted = ("n_positions", "n_shared", "n_listed", "shared_mass_p", "ambiguous_mass_p", "ambiguous_mass_q")
        counted += ("n_top_absent", "n_pairs", "n_mismatches")
        sums: dict[str, Any] = dict.fromkeys(counted, 0)
        by_key = [0, 0, 0]
        keys_p, keys_q = set[Key](), set[Key]()
        for part in parts:
            for name in counted:
                sums[name] += getattr(part, name)
            by_key = [one + other for one, other in zip(by_key, part.n_by_key, strict=True)]
            keys_p |= part.keys_p
            keys_q |= part.keys_q
        by_id, by_bytes, by_text = by_key
        return cls(
            **sums, n_by_key=(by_id, by_bytes, by_text), keys_p=frozenset[Key](keys_p), keys_q=frozenset[Key](keys_q)
        )

    @property
    def overlap(self) -> float | None:
        """Share of the listed tokens that both sides list; ``None`` without positions, as all shares here."""
        return _share(self.n_shared, self.n_listed)

    @property
    def mean_shared_mass_p(self) -> float | None:
        """P's mean mass on shared tokens."""
        return _share(self.shared_mass_p, self.n_positions)

    @property
    def top_absent(self) -> float | None:
        """Share of positions whose most probable token under P is not listed by Q."""
        return _share(self.n_top_absent, self.n_positions)

    @property
    def id_mismatch(self) -> float | None:
        """Share of equal texts whose ids differ."""
        return _share(self.n_mismatches, self.n_pairs)

    @property
    def ambiguous_mass(self) -> float | None:
        """Mean mass, of the worse side, that cannot be matched."""
        return _share(max(self.ambiguous_mass_p, self.ambiguous_mass_q), self.n_positions)

    @property
    def unseen_q(self) -> float | None:
        """Share of Q's distinct tokens that P never lists; high also where the data set is small."""
        return _share(len(self.keys_q - self.keys_p), len(self.keys_q))

    def verdict(self) -> AlignmentVerdict:
        """Whether per-token divergences of these positions mean something.

        Next-token distributions of different tokenizers are not comparable beyond the first token.
        """
        refusals, warnings = self._refusals(), self._warnings()
        if refusals:
            return AlignmentVerdict("refuse", refusals + warnings)
        return AlignmentVerdict("warn", warnings) if warnings else AlignmentVerdict("ok", ())

    def _refusals(self) -> tuple[str, ...]:
        if self.overlap is None or self.overlap >= REFUSE_OVERLAP:
            return ()
        return (
            f"only {self.overlap:.1%} of the listed tokens are listed by both models "
            f"(refused below {REFUSE_OVERLAP:.0%}): "
            "they have different tokenizers, or Q was asked about other contexts. Check model 2 and the prompts.",
        )

    def _warnings(self) -> tuple[str, ...]:
        found: list[str] = []
        if self.overlap is not None and REFUSE_OVERLAP <= self.overlap < WARN_OVERLAP:
            found.append(
                f"{self.overlap:.1%} of the listed tokens are listed by both models (warned below {WARN_OVERLAP:.0%}): "
                "read the bounds beside the estimates."
            )
        if self.top_absent is not None and self.top_absent > WARN_TOP_ABSENT:
            found.append(
                f"P's most probable token is not listed by Q at {self.top_absent:.1%} of the positions "
                f"(warned above {WARN_TOP_ABSENT:.0%})."
            )
        if self.id_mismatch is not None and self.id_mismatch > MAX_ID_MISMATCH:
            found.append(
                f"{self.id_mismatch:.1%} of the tokens of equal text have different ids: the models have different "
                "tokenizers. Their tokens were matched by bytes or text; compare only if the overlap is high."
            )
        if self.ambiguous_mass is not None and self.ambiguous_mass > WARN_AMBIGUOUS_MASS:
            found.append(
                f"{self.ambiguous_mass:.1%} of the probability is on tokens that their text does not identify "
                f"(warned above {WARN_AMBIGUOUS_MASS:.0%}); the bounds stay valid and get wider. Record token ids."
            )
        return tuple(found)


def diagnose(aligned: Aligned) -> AlignmentDiagnostic:
    """The counts of aligned positions; masses are added up response by response."""
    n_positions = len(aligned.logp)
    masses = response_masses(aligned)
    keys = [aligned.choices[number].key for number in map(int, aligned.response)]
    return AlignmentDiagnostic(
        n_positions=n_positions,
        n_shared=int(np.count_nonzero(aligned.shared_best)),
        n_listed=int(np.minimum(aligned.n_listed_p, aligned.n_listed_q - aligned.n_wanted_q).sum()),
        shared_mass_p=float(masses.shared_p.sum()),
        ambiguous_mass_p=float(masses.ambiguous_p.sum()),
        ambiguous_mass_q=float(masses.ambiguous_q.sum()),
        n_top_absent=int(np.count_nonzero(~aligned.shared_best[:, 0] & ~aligned.top_open)),
        n_pairs=sum(choice.n_pairs for choice in aligned.choices),
        n_mismatches=sum(choice.n_mismatches for choice in aligned.choices),
        n_by_key=(keys.count("id"), keys.count("bytes"), keys.count("text")),
        keys_p=aligned.keys_p,
        keys_q=aligned.keys_q,
    )


class Masses(NamedTuple):
    """Sums over the positions of each of R responses, shape (R,)."""

    shared_p: FloatArray
    ambiguous_p: FloatArray
    ambiguous_q: FloatArray


def response_masses(aligned: Aligned) -> Masses:
    """P's mass on shared tokens, and mass on keys that several tokens have; 0 for a response without a position."""
    shared = row_sums(np.exp(np.where(aligned.shared_best, aligned.logp, -np.inf)))
    sums = (np.bincount(aligned.response, values) for values in (shared, aligned.open_p, aligned.open_q))
    return Masses(*(values.astype(np.float64) for values in sums))


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
