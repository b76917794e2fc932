"""From scores on disk to tables of tokens, some files at a time.

Two passes, because the estimate of a position uses what the whole data set says about the spread of log p/q: the first
reads and surveys, the second measures what the first has left for it (`flows.stages.passes` joins them).
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from flows.config.comparison import Comparison, Side
from flows.folder.answers import FileAnswers, StoredAnswers
from flows.folder.layout import Stores
from flows.folder.vocabularies import exact_divergences
from flows.stages.inputs import InputFile, file_defect, read_ahead, read_input
from kl.estimators.censored import SpreadPrior
from kl.estimators.diagnostic import AlignmentDiagnostic, diagnose, response_masses
from kl.estimators.divergence import ExactDivergences
from kl.input.responses import ResponseFile
from kl.output.files import write_candidate_part, write_part
from kl.output.kl_json import ResponseText
from kl.records import Prompt, Response, Sampling
from kl.scores import Scores
from kl.statistics.noise_floor import AskedTwice
from kl.tables.candidates import candidate_table
from kl.tables.context_counts import CountEvidence
from kl.tables.outliers import without_outliers
from kl.tables.responses import ResponseInfo
from kl.tables.spreads import BothWays, Spreads
from kl.tables.tokens import Asked, identity, measure_paired

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


class MeasuredPart(NamedTuple):
    """Some files in a row: what they say (`FileTexts`, pickled), their token table and their candidate table.

    The tables are None if no file has a position, that of the candidates also if none is wanted.
    """

    texts: Path
    tokens: Path | None
    candidates: Path | None

    def without_tables(self) -> MeasuredPart:
        """The same of files without a position."""
        return self._replace(tokens=None, candidates=None)


class FileTexts(NamedTuple):
    """What the result of an input file says beside its tokens."""

    source_file: str
    prompt: Prompt | None
    model_p: str | None
    responses: list[ResponseText]
    error: str | None

    @classmethod
    def of(cls, parsed: ResponseFile) -> FileTexts:
        """Of a file, the responses in their order."""
        texts = [ResponseText(response.response_idx, response.text) for response in parsed.responses]
        texts += [ResponseText(item.response_idx, item.text, item.kind, item.message) for item in parsed.unreadable]
        models = {response.model for response in parsed.responses if response.model is not None}
        defect = file_defect(parsed)
        return cls(
            parsed.source_file,
            parsed.prompt,
            parsed.model or (models.pop() if len(models) == 1 else None),
            sorted(texts, key=lambda text: text.response_idx),
            None if defect is None else defect.message,
        )


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
    parts: list[MeasuredPart] = field(default_factory=list["MeasuredPart"])
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
    def of(cls, q: BothWays, twice: BothWays, prompt_counts: CountEvidence) -> Survey:
        """From the responses of some files, and what one model said twice of them."""
        aligned = q.came.aligned
        if aligned is None:
            counts, masses = AlignmentDiagnostic(), np.zeros((0, 3))
        else:
            counts, masses = diagnose(aligned), np.stack(response_masses(aligned), axis=1)
        bare = replace(counts, shared_mass_p=0.0, ambiguous_mass_p=0.0, ambiguous_mass_q=0.0)
        return cls(q.spreads(), twice.spreads(), bare, masses, prompt_counts)

    @classmethod
    def total(cls, parts: Iterable[Survey]) -> Survey:
        """Of all files, in the order of the parts; the keys that each part names are joined as it comes."""
        numbers: list[Survey] = []

        def counts() -> Iterator[AlignmentDiagnostic]:
            for part in parts:
                numbers.append(replace(part, counts=AlignmentDiagnostic()))
                yield part.counts

        total = AlignmentDiagnostic.total(counts())
        return cls(
            Spreads.total([part.spread for part in numbers]),
            Spreads.total([part.twice for part in numbers]),
            total,
            np.concatenate([np.zeros((0, 3)), *(part.masses for part in numbers)]),
            CountEvidence.total(part.prompt_counts for part in numbers),
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


class Ways(NamedTuple):
    """Responses between two models: which positions they have, what was answered, and which versions answered.

    ``versions`` and those ``checked``, without the answers that counts take away.
    """

    identified: pl.DataFrame
    both: BothWays
    versions: frozenset[str]
    checked: frozenset[str]

    @classmethod
    def of(cls, checked: Sequence[Asked], came: Sequence[Asked], keep_lists: bool) -> Ways:
        """Of the same responses with the answers as they are if counts are used, and as they came."""
        both = BothWays.of([item.answered for item in checked], [item.answered for item in came], keep_lists=keep_lists)
        versions = _versions(came)
        return cls(identity(checked), both, versions, versions if both.checked is None else _versions(checked))


def _versions(asked: Sequence[Asked]) -> frozenset[str]:
    return frozenset(Scores.joined([Scores.of(item.scores) for item in asked]).versions()) if asked else frozenset()


@dataclass(frozen=True, slots=True)
class Surveyed:
    """Some files as the first pass leaves them for the second, which reads neither the files nor the scores again.

    ``q`` is P against Q, ``twice`` one model against itself. ``n_odd`` results have a count that says nothing.
    ``noted`` is what the files say beside the numbers. ``files`` are kept for whole vocabularies alone.
    """

    q: Ways
    twice: Ways
    n_odd: int
    noted: Measured
    texts: list[FileTexts]
    files: Sequence[ResponseFile]


def survey_part(
    files: Sequence[InputFile], comparison: Comparison, stores: Stores, on_file: Callable[[], None]
) -> tuple[Survey, Surveyed]:
    """The first pass over some files: what they say of all, and what the second pass takes up."""
    sides: Sequence[Side] = [side for side in comparison.sides() if side in ("q", "again")]
    parsed_files: list[ResponseFile] = []
    for file in read_ahead(files):
        parsed_files.append(read_input(file))
        on_file()
    stored = StoredAnswers(parsed_files, comparison, stores, sides)
    noted = Measured([], Priors(), AlignmentDiagnostic())
    q: list[tuple[Asked, Asked]] = []
    twice: list[tuple[Asked, Asked]] = []
    prompt_counts: list[CountEvidence] = []
    n_odd = 0
    for parsed in parsed_files:
        found = FileAnswers(parsed, stored, use_counts=True)
        came = found.as_they_came()
        prompt_counts.append(found.count_evidence())
        for response in parsed.responses:
            sample = comparison.drawn(response)
            design = (None, None) if sample is None else sample
            checked, unchecked = found.results(response), came.results(response)
            q.append((Asked(response, checked, *design), Asked(response, unchecked, *design)))
            pair = found.twice(response)
            if pair is None:
                continue
            before = pair if checked is unchecked and found.same_again(response) else came.twice(response)
            assert before is not None, "whether a response is asked again does not depend on counts"
            noted.twice.note(pair.of, pair.model)
            again, first = Asked(pair.first, pair.second, *pair.drawn), Asked(before.first, before.second, *pair.drawn)
            twice.append((again, first))
        n_odd += found.n_odd
    _note_inputs(parsed_files, noted)
    of_q, of_twice = _both_ways(q, comparison.config.candidates), _both_ways(twice, keep_lists=False)
    survey = Survey.of(of_q.both, of_twice.both, CountEvidence.total(prompt_counts))
    whole = parsed_files if comparison.config.full_vocabulary else []
    return survey, Surveyed(of_q, of_twice, n_odd, noted, list(map(FileTexts.of, parsed_files)), whole)


def _both_ways(pairs: Sequence[tuple[Asked, Asked]], keep_lists: bool) -> Ways:
    return Ways.of([checked for checked, _ in pairs], [came for _, came in pairs], keep_lists)


def measure_part(
    surveyed: Surveyed, part: MeasuredPart, priors: Priors, comparison: Comparison, stores: Stores
) -> Measured:
    """The second pass over some files: their tables and their texts go to ``part``, on this machine's disk.

    Unreadable responses are noted with their reason.
    """
    measured, use = replace(surveyed.noted, priors=priors), priors.counts.usable
    estimator, ways = comparison.config.estimator, surveyed.q
    exact = _exact(surveyed, comparison, stores, measured)
    paired = without_outliers(ways.both.chosen(use), priors.q)
    table = measure_paired(
        ways.identified,
        paired,
        estimator=estimator,
        prior=priors.q,
        exact=exact.divergences,
        vocabulary=exact.vocabulary,
    )
    if table.height and part.tokens is not None:
        write_part(table, part.tokens)
    if table.height and part.candidates is not None:
        write_candidate_part(candidate_table(ways.identified, paired), part.candidates)
    part.texts.write_bytes(pickle.dumps(surveyed.texts))
    measured.parts.append(part if table.height else part.without_tables())
    again = surveyed.twice
    if again.identified.height:
        twice = without_outliers(again.both.chosen(use), priors.twice)
        measured.twice.take([measure_paired(again.identified, twice, estimator=estimator, prior=priors.twice)])
    measured.twice.versions |= again.checked if use else again.versions
    measured.versions_q |= ways.checked if use else ways.versions
    measured.n_odd_counts += surveyed.n_odd if use else 0
    return measured


class _ExactOfAll(NamedTuple):
    """By position of some files, shape (N,), None where no whole vocabulary is asked for."""

    divergences: ExactDivergences | None
    vocabulary: NDArray[np.float64] | None


def _exact(surveyed: Surveyed, comparison: Comparison, stores: Stores, measured: Measured) -> _ExactOfAll:
    if not comparison.config.full_vocabulary:
        return _ExactOfAll(None, None)
    values, vocabulary = [np.zeros((4, 0))], [np.zeros(0)]
    stored = StoredAnswers(surveyed.files, comparison, stores, comparison.sides())
    for response in chain.from_iterable(parsed.responses for parsed in surveyed.files):
        found = exact_divergences(response, stored, stores.scores, measured.note_no_exact)
        n = len(response.positions)
        values.append(np.full((4, n), np.nan) if found.divergences is None else np.stack(found.divergences))
        vocabulary.append(np.full(n, np.nan if found.vocabulary is None else float(found.vocabulary)))
    return _ExactOfAll(ExactDivergences(*np.concatenate(values, axis=1)), np.concatenate(vocabulary))


def _note_inputs(files: Sequence[ResponseFile], noted: Measured) -> None:
    """What the files say beside the numbers."""
    for parsed in files:
        for problem in parsed.problems:
            if problem.repaired:
                noted.repaired[problem.kind] = noted.repaired.get(problem.kind, 0) + problem.count
        for response in parsed.responses:
            noted.samplings.add(response.sampling)
            if response.model is not None:
                noted.models_p.add(response.model)
            if response.model_version is not None:
                noted.versions_p.add(response.model_version)
            place = (response.source_file, response.response_idx, response.prompt.prompt_id)
            noted.responses.append(ResponseInfo(*place, response.model, response.finish_reason))
        prompt_id = parsed.prompt.prompt_id if parsed.prompt else None
        noted.responses += [
            ResponseInfo(parsed.source_file, item.response_idx, prompt_id, parsed.model, None, item.kind, item.message)
            for item in parsed.unreadable
        ]
        defect = file_defect(parsed)
        if defect is not None and not parsed.n_responses:
            noted.responses.append(ResponseInfo(parsed.source_file, None, reason=defect.kind, error=defect.message))
