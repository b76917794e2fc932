"""Answers on their way to disk."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from backends.base import ScoreRequest
from flows.folder.layout import OutputFolder
from flows.folder.room import DiskRefusedError
from flows.stages.scoring import store_answers
from kl.records import Candidate, Prompt, Score, ScoreFailure, Turn

N_POSITIONS = 2100  # more than one part of the table


async def answers(request: ScoreRequest) -> AsyncIterator[Score | ScoreFailure]:
    for key in request.keys:
        yield Score(key, (Candidate("a", -0.1),))


def test_answers_that_the_disk_refused_as_a_part_stay_in_the_journal(tmp_path: Path) -> None:
    stores = OutputFolder(tmp_path).stores()
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "prompt").write_text("in the way")
    keys = tuple(f"{index:032x}" for index in range(N_POSITIONS))
    request = ScoreRequest(
        "r", "q", Prompt((Turn("user", "Hi"),)), "a" * N_POSITIONS, tuple(range(N_POSITIONS)), None,
        tuple(range(N_POSITIONS)), keys, 1,
    )  # fmt: skip
    with pytest.raises(OSError, match="prompt"):
        asyncio.run(store_answers(answers(request), [("prompt", request)], stores, lambda *_: None))
    (tmp_path / "scores" / "prompt").unlink()
    assert stores.scores.recover() == 2000
    assert stores.scores.known_keys("prompt") == set(keys[:2000])


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_came_after_the_disk_refused_the_first_answer_is_stored_too(tmp_path: Path) -> None:
    stores = OutputFolder(tmp_path).stores()
    keys = tuple(f"{index:032x}" for index in range(300))
    request = ScoreRequest(
        "r", "q", Prompt((Turn("user", "Hi"),)), "a" * 300, tuple(range(300)), None, tuple(range(300)), keys, 1
    )
    refusals: list[OSError] = []

    def stop(error: OSError) -> bool:
        refusals.append(error)
        return True

    asked = [("prompt", request)]
    with files_of_at_most(40_000), pytest.raises(DiskRefusedError, match=r"File too large.*journals") as ended:
        asyncio.run(store_answers(answers(request), asked, stores, lambda *_: None, on_refused=stop))
    assert len(refusals) == 1
    assert ended.value.n_lost == 0
    assert stores.scores.known_keys("prompt") == set(keys)
    assert stores.scores.recover() == 0, "the journal is not needed any more"


def test_answers_that_can_be_stored_nowhere_are_counted(tmp_path: Path) -> None:
    stores = OutputFolder(tmp_path).stores()
    keys = tuple(f"{index:032x}" for index in range(300))
    request = ScoreRequest(
        "r", "q", Prompt((Turn("user", "Hi"),)), "a" * 300, tuple(range(300)), None, tuple(range(300)), keys, 1
    )
    asked = [("prompt", request)]
    with files_of_at_most(3_000), pytest.raises(DiskRefusedError) as ended:
        asyncio.run(store_answers(answers(request), asked, stores, lambda *_: None, on_refused=lambda _: True))
    assert ended.value.n_lost + stores.scores.recover() == 300
    assert ended.value.n_lost < 300
