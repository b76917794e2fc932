"""What an output folder holds of the models' answers to one input file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from backends.scores.rows import SCORES, results_of
from flows.config.comparison import Comparison, Side
from flows.folder.layout import Stores
from kl.input.hidden import PARTIAL, UNKNOWN
from kl.input.responses import ResponseFile
from kl.records import Response, Score, ScoreFailure
from kl.scores import Scores
from kl.statistics.noise_floor import AskedAgain
from kl.statistics.position_sampling import Drawn
from kl.tables.context_counts import CountEvidence, without_retokenised
from kl.tables.repeats import first_answers, where_both

_GAPS = {
    PARTIAL: "the text before this position ends inside a character, which no request by text can say; a backend that "
    "feeds token ids can measure it.",
    UNKNOWN: "a token before this position does not say its text, so that no request by text can say what Q should "
    "continue; sample with token ids or bytes, and use a backend that feeds ids.",
}


_NONE = pl.DataFrame(schema=SCORES)


class TwoAnswers(NamedTuple):
    """What one model said twice of some positions of a response, the first time in the place of P's lists (``first``).

    ``of`` says which of the two it is. ``drawn`` are the positions that were asked a second time.
    """

    of: AskedAgain
    model: str
    first: Response
    second: Scores
    drawn: Drawn


class StoredAnswers:
    """What is on disk of the answers to the contexts of some files, read once: scores, else this run's failures.

    Parameters
    ----------
    files : sequence of ResponseFile
    comparison : Comparison
    stores : Stores
    sides : sequence of Side
        Whose answers are read.
    """

    def __init__(
        self, files: Sequence[ResponseFile], comparison: Comparison, stores: Stores, sides: Sequence[Side]
    ) -> None:
        self.comparison = comparison
        self.requests = {
            (item.name, side): comparison.request(item, side)
            for parsed in files
            for item in parsed.responses
            for side in sides
        }
        keys: dict[str, set[str]] = {}
        for parsed in files:
            for item in parsed.responses:
                asked = (self.requests[item.name, side] for side in sides)
                of_prompt = keys.setdefault(item.prompt.prompt_id, set())
                of_prompt.update(key for request in asked if request is not None for key in request.keys)
        frames = [
            store.rows(prompt_id, wanted, wanted=comparison.config.wanted_tokens)
            for store in (stores.scores, stores.failures)
            for prompt_id, wanted in keys.items()
        ]
        rows = pl.concat(frames) if frames else _NONE
        if rows["key"].is_duplicated().any():
            rows = rows.unique("key", keep="first", maintain_order=True)
        stored = results_of(rows)
        self.table = stored.table
        self.failures = stored.failures
        self.row = {key: row for row, key in enumerate(stored.table.keys)}

    def get(self, key: str) -> Score | ScoreFailure | None:
        """The answer to a context as it came."""
        if key in self.failures:
            return self.failures[key]
        return Scores(self.table, np.array([self.row.get(key, -1)]))[0]

    def scores(self, keys: Sequence[str | None]) -> Scores:
        """The answers to some contexts; nothing where there is no key."""
        rows = np.array([-1 if key is None else self.row.get(key, -1) for key in keys], dtype=np.int64)
        failures = (
            {t: self.failures[key] for t, key in enumerate(keys) if key in self.failures} if self.failures else {}
        )
        return Scores(self.table, rows, failures)


class FileAnswers:
    """The answers to all contexts of a file.

    Scores of contexts that the model saw otherwise than P wrote them are failures here (`without_retokenised`), if the
    counts of the data set are used.

    Parameters
    ----------
    parsed : ResponseFile
        One of those that ``stored`` was made for.
    stored : StoredAnswers
    use_counts : bool
        Whether the service's counts of the prompt's tokens can be used.

    Attributes
    ----------
    n_odd : int
        How many of the results that were asked for have a count that says nothing.
    """

    def __init__(self, parsed: ResponseFile, stored: StoredAnswers, use_counts: bool) -> None:
        self._parsed, self._stored, self._comparison = parsed, stored, stored.comparison
        self._came: dict[tuple[Side, int], tuple[str, Scores]] = {}
        self._results: dict[Side, dict[int, Scores]] = {}
        self.n_odd = 0
        self._use_counts = use_counts

    def count_evidence(self) -> CountEvidence:
        """What Q's answers to this file say of its service's counts."""
        responses = self._parsed.responses
        return CountEvidence.of(responses, [self._of(item, "q")[1] for item in responses])

    def as_they_came(self) -> FileAnswers:
        """The same answers, whatever their counts say."""
        same = copy.copy(self)
        same.n_odd, same._use_counts, same._results = 0, False, {}
        return same

    def results(self, response: Response, side: Side = "q") -> Scores:
        """The answer at every position of a response; None where there is none."""
        if side not in self._results:
            self._results[side] = self._checked(side)
        return self._results[side][response.response_idx]

    def same_again(self, response: Response) -> bool:
        """Whether the second answers are what came, whatever their counts say."""
        return self.results(response, "again") is self._of(response, "again")[1]

    def twice(self, response: Response) -> TwoAnswers | None:
        """What one model said twice of some positions of a response; None if none is asked a second time."""
        drawn = self._comparison.drawn_again(response)
        if drawn is None:
            return None
        of, again = self._comparison.asked_again(response), self.results(response, "again")
        if of == "p" and response.model is not None:
            return TwoAnswers(of, response.model, response, again, drawn)
        once = self.results(response)
        first, second = first_answers(response, once), where_both(once, again)
        return TwoAnswers(of, self._comparison.config.model2, first, second, drawn)

    def _checked(self, side: Side) -> dict[int, Scores]:
        by_model: dict[str, dict[int, Scores]] = {}
        for response in self._parsed.responses:
            model, results = self._of(response, side)
            by_model.setdefault(model, {})[response.response_idx] = results
        if not self._use_counts:
            return {index: results for found in by_model.values() for index, results in found.items()}
        checked: dict[int, Scores] = {}
        for found in by_model.values():
            responses = [response for response in self._parsed.responses if response.response_idx in found]
            results, n_odd = without_retokenised(responses, list(found.values()))
            checked |= dict(zip(found, results, strict=True))
            self.n_odd += n_odd
        return checked

    def _of(self, response: Response, side: Side) -> tuple[str, Scores]:
        """The model that was asked, and what it said."""
        place = side, response.response_idx
        if place not in self._came:
            self._came[place] = self._joined(response, side)
        return self._came[place]

    def _joined(self, response: Response, side: Side) -> tuple[str, Scores]:
        request = self._stored.requests[response.name, side]
        assert request is not None, "Q always has a name"
        keys: list[str | None] = [None] * len(response.positions)
        for position, key in zip(request.positions, request.keys, strict=True):
            keys[position] = key
        asked = set(request.positions)
        gaps = {t: ScoreFailure("", reason, _GAPS[reason]) for t, reason in response.gaps if t not in asked}
        return request.model, self._stored.scores(keys).without(gaps)
