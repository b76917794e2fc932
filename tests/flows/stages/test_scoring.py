"""Answers on their way to disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from backends.base import Backend, BackendOptions, Capabilities, ScoreRequest
from flows.stages.scoring import Stores, score_and_store
from kl.records import Candidate, Prompt, Score, ScoreFailure, Turn

N_POSITIONS = 2100  # more than one part of the table


class Instant(Backend):
    """Answers everything at once."""

    capabilities = Capabilities(max_top_logprobs=1)

    async def preflight(self, model: str) -> str | None:
        return None

    async def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        for request in requests:
            for key in request.keys:
                yield Score(key, (Candidate("a", -0.1),))


def test_answers_that_the_disk_refused_as_a_part_stay_in_the_journal(tmp_path: Path) -> None:
    stores = Stores.of(tmp_path)
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "prompt").write_text("in the way")
    keys = tuple(f"{index:032x}" for index in range(N_POSITIONS))
    request = ScoreRequest(
        "r", "q", Prompt((Turn("user", "Hi"),)), "a" * N_POSITIONS, tuple(range(N_POSITIONS)), None,
        tuple(range(N_POSITIONS)), keys, 1,
    )  # fmt: skip
    with pytest.raises(OSError, match="prompt"):
        asyncio.run(score_and_store(Instant(BackendOptions()), [("prompt", request)], stores, lambda n: None))
    (tmp_path / "scores" / "prompt").unlink()
    assert stores.scores.recover() == 2000
    assert stores.scores.known_keys("prompt") == set(keys[:2000])
