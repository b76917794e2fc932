"""From scores on disk to one table of tokens per input file, some files at a time.

Two passes, because the estimate of a position uses what the whole data set says about the spread of log p/q: the first
surveys, the second measures (`flows.stages.passes` joins them). Each holds one file at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from backends.scores.store import ScoreStore
from flows.config.comparison import Comparison, Side
from flows.folder.answers import FileAnswers
from flows.folder.layout import Stores
from flows.folder.vocabularies import Exact, exact_divergences
from flows.stages.inputs import InputFile, file_defect, read_ahead, read_input
from kl.estimators.censored import SpreadPrior
from kl.estimators.diagnostic import AlignmentDiagnostic
from kl.output.files import write_part
from kl.records import Response, Sampling, Score
from kl.statistics.noise_floor import AskedTwice
from kl.tables.context_counts import CountEvidence
from kl.tables.responses import ResponseInfo
from kl.tables.spreads import Answered, Spreads
from kl.tables.tokens import measure_response, response_diagnostic

logger = logging.getLogger(__name__)


class Priors(NamedTuple):
    """What variance of log p/q to expect of a position, None where none shows one: of Q, and of one model twice.

    ``counts`` say whether Q's counts of the prompt's tokens can be used.
    """

    q: SpreadPrior | None = None
    twice: SpreadPrior | None = None
    counts: CountEvidence = CountEvidence()


class NoExact(NamedTuple):
    """How many positions have no exact KL for one reason, and which is the first."""

    n: int
    first: str


@dataclass(slots=True)
class Measured:
    """The parts of the token table, and what the input says beside it.

    ``no_exact`` has, by reason, the positions without an exact KL.
    ``twice`` is what one model said twice; ``n_odd_counts`` is at how many positions the count of the prompt's tokens
    says nothing.
    """

    files: list[InputFile]
    priors: Priors
    diagnostic: AlignmentDiagnostic
    parts: list[Path] = field(default_factory=list[Path])
    responses: list[ResponseInfo] = field(default_factory=list[ResponseInfo])
    samplings: set[Sampling] = field(default_factory=set[Sampling])
    models_p: set[str] = field(default_factory=set[str])
    versions_p: set[str] = field(default_factory=set[str])
    versions_q: set[str] = field(default_factory=set[str])
    no_exact: dict[str, NoExact] = field(default_factory=dict[str, NoExact])
    repaired: dict[str, int] = field(default_factory=dict[str, int])
    twice: AskedTwice = field(default_factory=AskedTwice)
    n_odd_counts: int = 0

    def add(self, other: Measured) -> None:
        """Take in what the next files gave."""
        self.parts += other.parts
        self.responses += other.responses
        self.samplings |= other.samplings
        self.models_p |= other.models_p
        self.versions_p |= other.versions_p
        self.versions_q |= other.versions_q
        for why, positions in other.no_exact.items():
            self._note(why, positions)
        for kind, count in other.repaired.items():
            self.repaired[kind] = self.repaired.get(kind, 0) + count
        self.twice.add(other.twice)
        self.n_odd_counts += other.n_odd_counts

    def note_no_exact(self, response: Response, positions: Sequence[int], why: str) -> None:
        """Note why positions have no exact KL."""
        if positions:
            self._note(why, NoExact(len(positions), f"{response.name} position {positions[0]}"))

    def _note(self, why: str, positions: NoExact) -> None:
        before = self.no_exact.get(why, NoExact(0, positions.first))
        self.no_exact[why] = NoExact(before.n + positions.n, before.first)


@dataclass(frozen=True, slots=True)
class Survey:
    """What some files say of the whole data set.

    ``masses``, shape (responses, 3), has the diagnostic's sums of masses one by one, so that adding up the surveys of
    all files rounds the same way however the files were divided; in ``counts`` they are 0.
    """

    spread: Spreads
    twice: Spreads
    counts: AlignmentDiagnostic
    masses: NDArray[np.float64]
    prompt_counts: CountEvidence

    @classmethod
    def of(
        cls,
        spread: Sequence[Spreads],
        twice: Sequence[Spreads],
        diagnostics: Sequence[AlignmentDiagnostic],
        prompt_counts: Sequence[CountEvidence],
    ) -> Survey:
        """From those of the responses, in their order."""
        masses = [(item.shared_mass_p, item.ambiguous_mass_p, item.ambiguous_mass_q) for item in diagnostics]
        counts = replace(
            AlignmentDiagnostic.total(diagnostics), shared_mass_p=0.0, ambiguous_mass_p=0.0, ambiguous_mass_q=0.0
        )
        table = np.array(masses, dtype=np.float64).reshape(-1, 3)
        of_all = CountEvidence.total(prompt_counts)
        return cls(Spreads.total(spread), Spreads.total(twice), counts, table, of_all)

    @classmethod
    def total(cls, parts: Sequence[Survey]) -> Survey:
        """Of all files, in the order of the parts."""
        return cls(
            Spreads.total([part.spread for part in parts]),
            Spreads.total([part.twice for part in parts]),
            AlignmentDiagnostic.total([part.counts for part in parts]),
            np.concatenate([np.zeros((0, 3)), *(part.masses for part in parts)]),
            CountEvidence.total(part.prompt_counts for part in parts),
        )

    def priors(self) -> Priors:
        """What the data set lets expect of a position."""
        use = self.prompt_counts.usable
        return Priors(self.spread.prior(use), self.twice.prior(use), self.prompt_counts)

    def diagnostic(self) -> AlignmentDiagnostic:
        """The counts with the masses, added one after the other."""
        start = np.zeros((1, 3))
        shared, ambiguous_p, ambiguous_q = np.add.accumulate(np.concatenate([start, self.masses]))[-1].tolist()
        return replace(self.counts, shared_mass_p=shared, ambiguous_mass_p=ambiguous_p, ambiguous_mass_q=ambiguous_q)


def survey_files(
    files: Sequence[InputFile], comparison: Comparison, stores: Stores, on_file: Callable[[], None]
) -> Survey:
    """The first pass over some files."""
    spread: list[Spreads] = []
    twice: list[Spreads] = []
    diagnostics: list[AlignmentDiagnostic] = []
    prompt_counts: list[CountEvidence] = []
    sides: Sequence[Side] = [side for side in comparison.sides() if side != "p"]
    for file in read_ahead(files):
        parsed = read_input(file)
        found = FileAnswers(parsed, comparison, stores, sides, use_counts=True)
        came = found.as_they_came()
        prompt_counts.append(found.count_evidence())
        of_file: list[AlignmentDiagnostic] = []
        for response in parsed.responses:
            checked, unchecked = found.results(response), came.results(response)
            spread.append(Spreads.of(Answered(response, checked), Answered(response, unchecked)))
            of_file.append(response_diagnostic(response, unchecked))
            pair, before = found.twice(response), came.twice(response)
            if pair is not None and before is not None:
                twice.append(Spreads.of(Answered(pair.first, pair.second), Answered(before.first, before.second)))
        diagnostics += _with_joint_keys(of_file)
        on_file()
    return Survey.of(spread, twice, diagnostics, prompt_counts)


def _with_joint_keys(diagnostics: list[AlignmentDiagnostic]) -> list[AlignmentDiagnostic]:
    """The same, the keys of all with the first: each response has its own copy, which would be held for many files."""
    if not diagnostics:
        return []
    bare = [replace(item, keys_p=frozenset(), keys_q=frozenset()) for item in diagnostics]
    joint = AlignmentDiagnostic.total(diagnostics)
    return [replace(bare[0], keys_p=joint.keys_p, keys_q=joint.keys_q), *bare[1:]]


def measure_part(
    files: Sequence[InputFile],
    start: int,
    folder: Path,
    priors: Priors,
    comparison: Comparison,
    stores: Stores,
    on_file: Callable[[], None],
) -> Measured:
    """The second pass over some files, the first of which is number ``start`` of the data set.

    The table of each goes to ``folder``, on this machine's disk, under the file's number; unreadable responses are
    noted with their reason.
    """
    measured = Measured([], priors, AlignmentDiagnostic())
    for index, file in enumerate(read_ahead(files), start):
        _measure_file(file, folder / f"{index:08d}.parquet", comparison, stores, measured)
        on_file()
    return measured


def _measure_file(file: InputFile, part: Path, comparison: Comparison, stores: Stores, measured: Measured) -> None:
    parsed = read_input(file)
    for problem in parsed.problems:
        if problem.repaired:
            measured.repaired[problem.kind] = measured.repaired.get(problem.kind, 0) + problem.count
    found = FileAnswers(parsed, comparison, stores, comparison.sides(), use_counts=measured.priors.counts.usable)
    frames = [_measure_response(response, comparison, found, stores.scores, measured) for response in parsed.responses]
    again = [_measure_again(response, comparison.config.estimator, found, measured) for response in parsed.responses]
    measured.twice.take([table for table in again if table is not None])
    measured.n_odd_counts += found.n_odd
    measured.responses += [
        ResponseInfo(file.source_file, item.response_idx, parsed.prompt.prompt_id if parsed.prompt else None,
                     parsed.model, None, item.kind, item.message)
        for item in parsed.unreadable
    ]  # fmt: skip
    defect = file_defect(parsed)
    if defect is not None and not parsed.n_responses:
        measured.responses.append(ResponseInfo(file.source_file, None, reason=defect.kind, error=defect.message))
    if frames:
        write_part(pl.concat(frames), part)
        measured.parts.append(part)


def _measure_response(
    response: Response, comparison: Comparison, found: FileAnswers, scores: ScoreStore, measured: Measured
) -> pl.DataFrame:
    results = found.results(response)
    answers = [result for result in results if isinstance(result, Score)]
    measured.samplings.add(response.sampling)
    measured.versions_q.update(score.model_version for score in answers if score.model_version is not None)
    if response.model is not None:
        measured.models_p.add(response.model)
    if response.model_version is not None:
        measured.versions_p.add(response.model_version)
    place = (response.source_file, response.response_idx, response.prompt.prompt_id)
    measured.responses.append(ResponseInfo(*place, response.model, response.finish_reason))
    whole = comparison.config.full_vocabulary
    exact = exact_divergences(response, found, scores, measured.note_no_exact) if whole else Exact(None, None)
    drawn = comparison.drawn(response)
    return measure_response(
        response,
        results,
        estimator=comparison.config.estimator,
        prior=measured.priors.q,
        exact_kl=None if exact.divergences is None else exact.divergences.kl,
        selected=None if drawn is None else drawn.selected,
        pi=None if drawn is None else drawn.pi,
        vocabulary=exact.vocabulary,
    )


def _measure_again(response: Response, estimator: str, found: FileAnswers, measured: Measured) -> pl.DataFrame | None:
    """The tokens of a response between the two answers of one model; None if nothing is asked again."""
    pair = found.twice(response)
    if pair is None:
        return None
    measured.twice.note(pair.of, pair.model, pair.second)
    prior = measured.priors.twice
    return measure_response(
        pair.first, pair.second, estimator=estimator, prior=prior, selected=pair.drawn.selected, pi=pair.drawn.pi
    )
