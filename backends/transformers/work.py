"""From prepared requests to scores: sequences through the bodies, their rows through heads and reduction."""

# pyright: reportMissingImports=false
# torch is in no installation that uv makes by itself.

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from backends.local.contexts import Asked
from backends.local.jobs import Jobs
from backends.local.units import Prepared, Side, Unit, units_of
from backends.transformers.loading import LoadedModel, Tensor
from backends.transformers.passes import Compared, Fed, Passes, Reduced, Rows
from kl.records import Candidate, ExactPair, Score, ScoreFailure

_PASSES_PER_STEP = 4  # so that sequences of like length are found to share a pass


class _Row(NamedTuple):
    """A context, or two that are compared: where their rows are, and for which requests."""

    unit: int
    sides: tuple[Side[LoadedModel], ...]
    asked: tuple[Asked, ...]
    places: tuple[int, ...]
    pair: bool

    @property
    def kind(self) -> tuple[tuple[int, ...], tuple[bool, ...], bool]:
        """Rows of one kind are reduced together: lengths of the lists, which vocabularies are kept, whether a pair."""
        requests = [side.request for side in self.sides]
        kept = tuple(request.full_vocabulary and not request.counterparts for request in requests)
        return tuple(request.top_logprobs for request in requests), kept, self.pair


class Scorer:
    """Scores of all requests under way, which go through the models together."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._jobs: Jobs[LoadedModel] = Jobs(self._compute, size=_tokens, room=self._room)

    def steps(
        self, groups: Sequence[Sequence[Prepared[LoadedModel]]]
    ) -> Iterator[Iterator[list[Score | ScoreFailure]]]:
        """For each group of requests that are compared with each other the results, step by step."""
        yield from self._jobs.steps(*(units_of(prepared, lambda asked: 0) for prepared in groups))

    def _room(self, unit: Unit[LoadedModel]) -> int:
        return _PASSES_PER_STEP * min(self._passes.tokens(model) for model in unit.models)

    def _compute(self, units: Sequence[Unit[LoadedModel]]) -> list[list[Score | ScoreFailure]]:
        """The results of units that are for the same models, unit by unit."""
        models = units[0].models
        hidden: list[Tensor] = []
        places: list[dict[tuple[int, int], int]] = []
        for at, model in enumerate(models):
            rows, where = self._body(model, [unit.sides[at] for unit in units])
            hidden.append(rows)
            places.append(where)
        found: list[list[Score | ScoreFailure]] = [[] for _ in units]
        for kind, alike in groupby(sorted(_rows(units, places), key=_kind), key=_kind):
            for row, results in self._reduced(list(alike), kind, models, hidden):
                found[row.unit] += results
        return found

    def _body(
        self, model: LoadedModel, sides: Sequence[Side[LoadedModel]]
    ) -> tuple[Tensor, dict[tuple[int, int], int]]:
        """What the head is given for all contexts, and the place of each by its list and length."""
        import torch

        lists = {id(asked.ids): asked.ids for side in sides for asked in side.asked}
        lengths: dict[int, set[int]] = {each: set() for each in lists}
        for side in sides:
            for asked in side.asked:
                lengths[id(asked.ids)].add(asked.length)
        fed = [
            Fed(ids[: max(lengths[each])], [length - 1 for length in sorted(lengths[each])])
            for each, ids in lists.items()
        ]
        order = [(each, length) for each in lists for length in sorted(lengths[each])]
        return torch.cat(self._passes.hidden(model, fed)), {place: at for at, place in enumerate(order)}

    def _reduced(
        self, rows: Sequence[_Row], kind: Any, models: tuple[LoadedModel, ...], hidden: Sequence[Tensor]
    ) -> Iterator[tuple[_Row, list[Score | ScoreFailure]]]:
        import torch

        lengths, kept, pair = kind
        sides = [
            Rows(
                model,
                each[torch.tensor([row.places[at] for row in rows], device=each.device)],
                lengths[at],
                kept[at],
                [row.asked[at].wanted for row in rows],
            )
            for at, (model, each) in enumerate(zip(models, hidden, strict=True))
        ]
        for some, compared in self._passes.reduced(sides, pair=pair):
            for number, row in enumerate(rows[some]):
                yield row, _results(row, compared, number)


def _tokens(unit: Unit[LoadedModel]) -> int:
    return max(asked.length for side in unit.sides for asked in side.asked)


def _kind(row: _Row) -> Any:
    return row.kind


def _rows(units: Sequence[Unit[LoadedModel]], places: Sequence[dict[tuple[int, int], int]]) -> Iterator[_Row]:
    for number, unit in enumerate(units):
        for asked in zip(*(side.asked for side in unit.sides), strict=True):
            at = tuple(where[id(one.ids), one.length] for where, one in zip(places, asked, strict=True))
            yield _Row(number, unit.sides, asked, at, len(asked) == 2 or unit.of_itself)


def _results(row: _Row, compared: Compared, number: int) -> list[Score | ScoreFailure]:
    if not all(side.finite[number] for side in compared.sides):
        message = "the weights give logits that are no finite numbers here; try another dtype."
        return [ScoreFailure(asked.key, "not-finite", message) for asked in row.asked]
    exact: list[ExactPair | None] = [None] * len(row.asked)
    if compared.figures is not None:
        sizes = row.sides[0].model.n_vocabulary, row.sides[-1].model.n_vocabulary
        kl, reverse_kl, js, tv = map(float, compared.figures[:, number])
        figures = ExactPair(row.asked[-1].key, kl, reverse_kl, js, tv, *sizes)
        exact = [figures] if len(row.asked) == 1 else [figures, figures.turned(row.asked[0].key)]
    sides = zip(row.sides, row.asked, compared.sides, exact, strict=True)
    return [_score(side.model, asked, reduced, number, figures) for side, asked, reduced, figures in sides]


def _score(model: LoadedModel, asked: Asked, reduced: Reduced, number: int, exact: ExactPair | None) -> Score:
    top = candidates(model, reduced.ids[number].tolist(), reduced.logprobs[number].tolist())
    listed = {candidate.token_id for candidate in top}
    wanted = dict(zip(asked.wanted, reduced.wanted[number], strict=True))
    beside = sorted((index for index in wanted if index not in listed), key=lambda index: (-wanted[index], index))
    return Score(
        key=asked.key,
        top=top,
        model_version=model.checkpoint.version,
        input_tokens=asked.length,
        output_tokens=1,
        n_dropped=len(reduced.ids[number]) - len(top),
        full_logprobs=None if reduced.full is None else reduced.full[number],
        exact=exact,
        wanted=candidates(model, beside, [wanted[index] for index in beside]),
    )


def candidates(model: LoadedModel, ids: Sequence[int], logprobs: Sequence[float]) -> tuple[Candidate, ...]:
    """Some ids with their log-probabilities; tokens that the model excludes are left out."""
    return tuple(
        candidate(model, index, logprob) for index, logprob in zip(ids, logprobs, strict=True) if math.isfinite(logprob)
    )


def candidate(model: LoadedModel, index: int, logprob: float, text: str | None = None) -> Candidate:
    """A token as a list has it, under ``text`` where its bytes alone are no text; a value above 0 is rounding."""
    shown, exact = model.token(index)
    return Candidate(shown if text is None else text, min(logprob, 0.0), index, exact)
