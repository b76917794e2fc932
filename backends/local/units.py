"""What is computed together: contexts of one model, or with those of another model that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from backends.base import ScoreRequest
from backends.local.contexts import Asked

M = TypeVar("M")
"""A model in memory."""


class Prepared(NamedTuple, Generic[M]):
    """A request with what is computed for it: contexts of which one list's stand together."""

    request: ScoreRequest
    model: M
    asked: Sequence[Asked]


class Side(NamedTuple, Generic[M]):
    """Contexts of one list of ids that one model is asked about."""

    request: ScoreRequest
    model: M
    asked: tuple[Asked, ...]


class Unit(NamedTuple, Generic[M]):
    """One side, or two that are compared context by context.

    With ``of_itself`` a model is compared with itself: the two contexts, and their keys, are one. ``size`` is what it
    takes of the room for what is computed together, where whoever computes it says so.
    """

    sides: tuple[Side[M], ...]
    of_itself: bool = False
    size: int = 0

    @property
    def models(self) -> tuple[M, ...]:
        """The models, in the order of the sides."""
        return tuple(side.model for side in self.sides)


def units_of(prepared: Sequence[Prepared[M]], place_in_list: Callable[[Asked], int]) -> list[Unit[M]]:
    """The work for some requests in order; contexts that are compared with each other are in one unit.

    Those of one list are in one unit if they have one ``place_in_list``.
    """
    by_key = {asked.key: (number, asked) for number, each in enumerate(prepared) for asked in each.asked}
    of_itself = [each.request.counterparts == each.request.keys for each in prepared]
    units: dict[tuple[tuple[int, int, int], ...], list[tuple[Asked, ...]]] = {}
    for each in prepared:
        other_of = dict(zip(each.request.keys, each.request.counterparts, strict=False))
        for asked in each.asked:
            if asked.key not in by_key:
                continue  # beside its counterpart
            pair = [by_key.pop(key) for key in (asked.key, other_of.get(asked.key, "")) if key in by_key]
            place = tuple((number, id(one.ids), place_in_list(one)) for number, one in pair)
            units.setdefault(place, []).append(tuple(one for _, one in pair))
    return [
        Unit(
            tuple(
                Side(prepared[number].request, prepared[number].model, asked)
                for (number, _, _), asked in zip(place, zip(*pairs, strict=True), strict=True)
            ),
            of_itself=of_itself[place[0][0]],
        )
        for place, pairs in units.items()
    ]
