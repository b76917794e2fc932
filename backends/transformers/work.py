"""From prepared requests to scores: sequences through the bodies, their rows through heads and reduction."""

# pyright: reportMissingImports=false
# torch is in no installation that uv makes by itself.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from backends.local.contexts import Asked
from backends.local.jobs import Jobs
from backends.local.units import Prepared, Side, Unit, units_of
from backends.transformers.loading import LoadedModel, Tensor
from backends.transformers.passes import Fed, Passes, Reduced
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

    def steps(self, prepared: Sequence[Prepared[LoadedModel]]) -> Iterator[list[Score | ScoreFailure]]:
        """The results for some requests, step by step."""
        yield from self._jobs.steps(units_of(prepared, lambda asked: 0))

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
        chosen = [
            each[torch.tensor([row.places[at] for row in rows], device=each.device)] for at, each in enumerate(hidden)
        ]
        for some, reduced in self._passes.reduced(models, chosen, lengths, kept, pair=pair):
            for number, row in enumerate(rows[some]):
                yield row, _results(row, reduced, number)


def _tokens(unit: Unit[LoadedModel]) -> int:
    return max(asked.length for side in unit.sides for asked in side.asked)


def _kind(row: _Row) -> Any:
    return row.kind


def _rows(units: Sequence[Unit[LoadedModel]], places: Sequence[dict[tuple[int, int], int]]) -> Iterator[_Row]:
    for number, unit in enumerate(units):
        for asked in zip(*(side.asked for side in unit.sides), strict=True):
            at = tuple(where[id(one.ids), one.length] for where, one in zip(places, asked, strict=True))
            yield _Row(number, unit.sides, asked, at, len(asked) == 2 or unit.of_itself)


def _results(row: _Row, reduced: Reduced, number: int) -> list[Score | ScoreFailure]:
    if not reduced.finite[number]:
        message = "the weights give logits that are no finite numbers here; try another dtype."
        return [ScoreFailure(asked.key, "not-finite", message) for asked in row.asked]
    exact: list[ExactPair | None] = [None] * len(row.asked)
    if row.pair and reduced.figures is not None:
        sizes = row.sides[0].model.n_vocabulary, row.sides[-1].model.n_vocabulary
        kl, reverse_kl, js, tv = map(float, reduced.figures[:, number])
        figures = ExactPair(row.asked[-1].key, kl, reverse_kl, js, tv, *sizes)
        exact = [figures] if len(row.asked) == 1 else [figures, figures.turned(row.asked[0].key)]
    return [
        _score(
            side,
            asked,
            reduced.lists[at],
            None if (full := reduced.full[at]) is None else full[number],
            exact[at],
            number,
        )
        for at, (side, asked) in enumerate(zip(row.sides, row.asked, strict=True))
    ]


def _score(
    side: Side[LoadedModel],
    asked: Asked,
    listed: tuple[Any, Any],
    full: Any | None,
    exact: ExactPair | None,
    number: int,
) -> Score:
    top = candidates(side.model, listed[0][number], listed[1][number])
    return Score(
        key=asked.key,
        top=top,
        model_version=side.model.checkpoint.version,
        input_tokens=asked.length,
        output_tokens=1,
        n_dropped=len(listed[0][number]) - len(top),
        full_logprobs=full,
        exact=exact,
    )


def candidates(model: LoadedModel, ids: Any, logprobs: Any) -> tuple[Candidate, ...]:
    """A list of ids with their log-probabilities; tokens that the model excludes are in none."""
    possible = np.isfinite(logprobs)
    return tuple(
        Candidate(*_as_listed(model.token(index), logprob, index))
        for index, logprob in zip(ids[possible].tolist(), logprobs[possible].tolist(), strict=True)
    )


def _as_listed(token: tuple[str, bytes], logprob: float, index: int) -> tuple[str, float, int, bytes]:
    return token[0], min(logprob, 0.0), index, token[1]
