"""From scores on disk to one table of tokens per input file, some files at a time.

Two passes, because the estimate of a position uses what the whole data set says about the spread of log p/q: the first
surveys, the second measures (`flows.stages.passes` joins them). Each holds one file at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from backends.base import ScoreRequest
from backends.scores.store import ScoreStore
from flows.config.comparison import Comparison, Side
from flows.folder.answers import FileAnswers
from flows.folder.layout import Stores
from flows.stages.inputs import InputFile, file_defect, read_ahead, read_input
from kl.estimators.align import align
from kl.estimators.censored import SpreadEvidence, SpreadPrior, pooled_prior
from kl.estimators.diagnostic import AlignmentDiagnostic
from kl.estimators.divergence import PADDING_MASS, exact_kl_of_padded
from kl.estimators.token_keys import listed
from kl.output.files import write_part
from kl.records import Candidate, Response, Sampling, Score, ScoreFailure
from kl.statistics.noise_floor import AskedTwice
from kl.tables.context_counts import CountEvidence
from kl.tables.responses import ResponseInfo
from kl.tables.tokens import measure_response, response_diagnostic, response_spread

logger = logging.getLogger(__name__)

# Full vocabularies are compared so many positions at a time: two float32 arrays of this many rows are in memory.
_FULL_CHUNK = 64
# How far a value that P gives now may be from the one on record before another model must have written it.
_SAME_MODEL_NATS = 0.01


Answer = Score | ScoreFailure | None


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

    spread: SpreadEvidence
    twice: SpreadEvidence
    counts: AlignmentDiagnostic
    masses: NDArray[np.float64]
    prompt_counts: CountEvidence

    @classmethod
    def of(
        cls,
        spread: Sequence[SpreadEvidence],
        twice: Sequence[SpreadEvidence],
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
        return cls(SpreadEvidence.total(spread), SpreadEvidence.total(twice), counts, table, of_all)

    @classmethod
    def total(cls, parts: Sequence[Survey]) -> Survey:
        """Of all files, in the order of the parts."""
        return cls(
            SpreadEvidence.total([part.spread for part in parts]),
            SpreadEvidence.total([part.twice for part in parts]),
            AlignmentDiagnostic.total([part.counts for part in parts]),
            np.concatenate([np.zeros((0, 3)), *(part.masses for part in parts)]),
            CountEvidence.total(part.prompt_counts for part in parts),
        )

    def priors(self) -> Priors:
        """What the data set lets expect of a position."""
        return Priors(pooled_prior(self.spread), pooled_prior(self.twice), self.prompt_counts)

    def diagnostic(self) -> AlignmentDiagnostic:
        """The counts with the masses, added one after the other."""
        start = np.zeros((1, 3))
        shared, ambiguous_p, ambiguous_q = np.add.accumulate(np.concatenate([start, self.masses]))[-1].tolist()
        return replace(self.counts, shared_mass_p=shared, ambiguous_mass_p=ambiguous_p, ambiguous_mass_q=ambiguous_q)


def survey_files(
    files: Sequence[InputFile], comparison: Comparison, stores: Stores, on_file: Callable[[], None]
) -> Survey:
    """The first pass over some files."""
    spread: list[SpreadEvidence] = []
    twice: list[SpreadEvidence] = []
    diagnostics: list[AlignmentDiagnostic] = []
    prompt_counts: list[CountEvidence] = []
    sides: Sequence[Side] = [side for side in comparison.sides() if side != "p"]
    for file in read_ahead(files):
        parsed = read_input(file)
        found = FileAnswers(parsed, comparison, stores, sides)
        prompt_counts.append(found.counts)
        of_file: list[AlignmentDiagnostic] = []
        for response in parsed.responses:
            results = found.results(response)
            spread.append(response_spread(response, results))
            of_file.append(response_diagnostic(response, results))
            pair = found.twice(response)
            if pair is not None:
                twice.append(response_spread(pair.first, pair.second))
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
    found = FileAnswers(parsed, comparison, stores, comparison.sides(), measured.priors.counts)
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
    exact = _exact_kl(response, comparison, found, scores, measured) if whole else _Exact(None, None)
    drawn = comparison.drawn(response)
    return measure_response(
        response,
        results,
        estimator=comparison.config.estimator,
        prior=measured.priors.q,
        exact_kl=exact.kl,
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


class _Exact(NamedTuple):
    """Exact KL per position, shape (T,), NaN where it is not known; how many tokens P has, if they were all seen."""

    kl: NDArray[np.float64] | None
    vocabulary: int | None


def _exact_kl(
    response: Response, comparison: Comparison, found: FileAnswers, scores: ScoreStore, measured: Measured
) -> _Exact:
    """What full vocabularies say; where they say nothing of a position that Q has answered, ``measured`` has why."""
    values = np.full(len(response.positions), np.nan)
    vocabulary = None
    request_p, request_q = comparison.request(response, "p"), comparison.request(response, "q")
    assert request_q is not None, "Q always has a name"
    keys_q = dict(zip(request_q.positions, request_q.keys, strict=True))
    answered = [position for position in keys_q if isinstance(found.get(keys_q[position]), Score)]
    if request_p is None or not _wrote_it(response, request_p, found):
        why = (
            "the file names no model that this backend has"
            if request_p is None
            else f"{request_p.model} gives other values than those on record"
        )
        measured.note_no_exact(response, answered, why)
        return _Exact(values, None)
    keys_p = dict(zip(request_p.positions, request_p.keys, strict=True))
    numbering = _numbering([(found.get(keys_p.get(t, "")), found.get(keys_q[t])) for t in answered])
    prompt_id = response.prompt.prompt_id
    for start in range(0, len(answered), _FULL_CHUNK):
        chunk = answered[start : start + _FULL_CHUNK]
        full_p = scores.load_full(prompt_id, [keys_p[position] for position in chunk if position in keys_p])
        full_q = scores.load_full(prompt_id, [keys_q[position] for position in chunk])
        for position in chunk:
            row_p, row_q = full_p.get(keys_p.get(position, "")), full_q.get(keys_q[position])
            why = _no_exact_value(row_p, row_q, numbering)
            if why is None and row_p is not None and row_q is not None:
                vocabulary = len(row_p)
                values[position] = exact_kl_of_padded(row_p[None, :], row_q[None, :])[0]
                why = _OTHER_VOCABULARY.format(len(row_p), len(row_q)) if np.isnan(values[position]) else None
            if why is not None:
                measured.note_no_exact(response, [position], why)
    return _Exact(values, vocabulary)


_OTHER_VOCABULARY = (
    f"P has {{}} tokens and Q {{}}, and those that one has alone hold more than {PADDING_MASS:g} of its probability"
)


def _no_exact_value(
    row_p: NDArray[np.float32] | None, row_q: NDArray[np.float32] | None, numbering: Literal["one", "two"] | None
) -> str | None:
    """Why two vocabularies of a position are not compared, if they are not."""
    if row_p is None or row_q is None:
        return f"the whole vocabulary of {'P' if row_p is None else 'Q'} is not there"
    if numbering == "two":
        return "the ids of the two vocabularies name different tokens"
    if row_p.shape != row_q.shape and numbering is None:
        return f"P has {len(row_p)} tokens and Q {len(row_q)}, and no ids show that their first ones are the same"
    return None


def _numbering(answers: Sequence[tuple[Answer, Answer]]) -> Literal["one", "two"] | None:
    """Whether P's and Q's ids number one vocabulary; None where their lists do not show it."""
    pairs = [(listed(p.top).candidates, listed(q.top).candidates) for p, q in answers
             if isinstance(p, Score) and isinstance(q, Score)]  # fmt: skip
    usable = [(top_p, top_q) for top_p, top_q in pairs if top_p and top_q]
    if not usable:
        return None
    choice = align([top_p for top_p, _ in usable], [top_q for _, top_q in usable]).choice
    if choice.key == "id":
        return "one"
    return "two" if choice.n_mismatches else None


def _wrote_it(response: Response, request: ScoreRequest, found: FileAnswers) -> bool:
    """Whether the model that the file names gives the log-probabilities on record."""
    for position, key in zip(request.positions, request.keys, strict=True):
        score = found.get(key)
        if not isinstance(score, Score):
            continue
        now = {_token(candidate): candidate.logprob for candidate in score.top}
        for candidate in response.positions[position].top[:3]:
            then, again = candidate.logprob, now.get(_token(candidate))
            if then is not None and (again is None or abs(then - again) > _SAME_MODEL_NATS):
                return False
    return True


def _token(candidate: Candidate) -> int | str:
    return candidate.token if candidate.token_id is None else candidate.token_id
