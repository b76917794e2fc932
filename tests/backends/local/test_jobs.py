"""Work that goes through a model together: how much at once, and what an error leaves of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from backends.local.blas import CHUNK
from backends.local.contexts import Asked
from backends.local.jobs import Jobs
from backends.local.units import Side, Unit
from backends.local.work import _sized
from kl.records import ScoreFailure


def test_what_an_error_leaves_of_a_job_is_not_computed_with_the_others() -> None:
    bad, good = [Unit((), size=number) for number in (1, 2, 3)], [Unit((), size=4)]
    computed: list[list[int]] = []

    def compute(units: Sequence[Unit[object]]) -> list[list[ScoreFailure]]:
        computed.append([unit.size for unit in units])
        if bad[0] in units:
            raise ArithmeticError("no number")
        return [[ScoreFailure(str(unit.size), "row-error", "")] for unit in units]

    steps = Jobs[object](compute, size=lambda unit: 1, room=lambda unit: 2).steps(bad, good)
    with pytest.raises(ArithmeticError):
        next(next(steps))
    assert [result.key for results in next(steps) for result in results] == ["4"]
    assert computed == [[1, 2], [4]]
    assert next(steps, None) is None


def test_a_unit_is_as_large_as_the_rows_that_are_computed_for_it() -> None:
    """A long prompt that is asked once is no small work, and a response is computed once however many its units."""
    long, short = list(range(3 * CHUNK)), list(range(CHUNK))

    def unit(ids: list[int], *lengths: int) -> Unit[object]:
        return Unit((Side(None, None, tuple(Asked(f"{length}", ids, length) for length in lengths)),))

    units = [unit(long, 5, 7), unit(short, 9), unit(long, 2 * CHUNK + 1, 2 * CHUNK + 4), unit(list(long), 3 * CHUNK)]
    assert [each.size for each in _sized(units)] == [7, 9, 2 * CHUNK - 3, 3 * CHUNK]
