"""Answers on their way to disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from backends.base import ScoreRequest
from flows.folder.layout import OutputFolder
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
