"""What an output folder holds of the models' answers to one input file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

from backends.base import ScoreRequest
from flows.config.comparison import Comparison, Side
from flows.folder.layout import Stores
from kl.input.hidden import PARTIAL, UNKNOWN
from kl.input.responses import ResponseFile
from kl.records import Response, Score, ScoreFailure
from kl.statistics.noise_floor import AskedAgain
from kl.statistics.position_sampling import Drawn
from kl.tables.context_counts import CountEvidence, Results, without_retokenised
from kl.tables.repeats import first_answers, where_both

_GAPS = {
    PARTIAL: "the text before this position ends inside a character, which no request by text can say; a backend that "
    "feeds token ids can measure it.",
    UNKNOWN: "a token before this position does not say its text, so that no request by text can say what Q should "
    "continue; sample with token ids or bytes, and use a backend that feeds ids.",
}


class TwoAnswers(NamedTuple):
    """What one model said twice of some positions of a response, the first time in the place of P's lists (``first``).

    ``of`` says which of the two it is. ``drawn`` are the positions that were asked a second time.
    """

    of: AskedAgain
    model: str
    first: Response
    second: Results
    drawn: Drawn


class FileAnswers:
    """The answers to all contexts of a file, read once: scores, else this run's failures.

    Scores of contexts that the model saw otherwise than P wrote them are failures here (`without_retokenised`), if the
    counts of the data set are used.

    Parameters
    ----------
    parsed : ResponseFile
    comparison : Comparison
    stores : Stores
    sides : sequence of Side
        Whose answers are read.
    use_counts : bool
        Whether the service's counts of the prompt's tokens can be used.

    Attributes
    ----------
    n_odd : int
        How many of the results that were asked for have a count that says nothing.
    """

    def __init__(
        self,
        parsed: ResponseFile,
        comparison: Comparison,
        stores: Stores,
        sides: Sequence[Side],
        use_counts: bool,
    ) -> None:
        self._parsed, self._comparison = parsed, comparison
        self._requests = {
            (side, item.response_idx): comparison.request(item, side) for item in parsed.responses for side in sides
        }
        self._answers: dict[str, Score | ScoreFailure] = {}
        if parsed.prompt is not None:
            keys = {key for request in self._requests.values() if request is not None for key in request.keys}
            prompt_id = parsed.prompt.prompt_id
            self._answers = stores.failures.load(prompt_id, keys) | stores.scores.load(prompt_id, keys)
        self._results: dict[Side, dict[int, Results]] = {}
        self.n_odd = 0
        self._use_counts = use_counts

    def request(self, response: Response, side: Side) -> ScoreRequest | None:
        """What a model was asked of a response; None if the file names no P that this backend has."""
        return self._requests[side, response.response_idx]

    def get(self, key: str) -> Score | ScoreFailure | None:
        """The answer to a context as it came."""
        return self._answers.get(key)

    def count_evidence(self) -> CountEvidence:
        """What Q's answers to this file say of its service's counts."""
        responses = self._parsed.responses
        return CountEvidence.of(responses, [self._of(item, "q")[1] for item in responses])

    def as_they_came(self) -> FileAnswers:
        """The same answers, whatever their counts say."""
        same = copy.copy(self)
        same.n_odd, same._use_counts, same._results = 0, False, {}
        return same

    def results(self, response: Response, side: Side = "q") -> Results:
        """The answer at every position of a response; None where there is none."""
        if side not in self._results:
            self._results[side] = self._checked(side)
        return self._results[side][response.response_idx]

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

    def _checked(self, side: Side) -> dict[int, Results]:
        by_model: dict[str, dict[int, Results]] = {}
        for response in self._parsed.responses:
            model, results = self._of(response, side)
            by_model.setdefault(model, {})[response.response_idx] = results
        if not self._use_counts:
            return {index: results for found in by_model.values() for index, results in found.items()}
        checked: dict[int, Results] = {}
        for found in by_model.values():
            responses = [response for response in self._parsed.responses if response.response_idx in found]
            results, n_odd = without_retokenised(responses, list(found.values()))
            checked |= dict(zip(found, results, strict=True))
            self.n_odd += n_odd
        return checked

    def _of(self, response: Response, side: Side) -> tuple[str, Results]:
        """The model that was asked, and what it said."""
        request = self.request(response, side)
        assert request is not None, "Q always has a name"
        results: Results = [None] * len(response.positions)
        for position, key in zip(request.positions, request.keys, strict=True):
            results[position] = self._answers.get(key)
        asked = set(request.positions)
        for position, reason in response.gaps:
            if position not in asked:
                results[position] = ScoreFailure("", reason, _GAPS[reason])
        return request.model, results
