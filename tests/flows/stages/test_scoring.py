"""Answers on their way to disk."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backends.base import Backend, BackendOptions, Capabilities, ScoreRequest
from backends.session import BackendSession
from flows.folder.layout import OutputFolder
from flows.folder.room import DiskRefusedError, Reserve
from flows.stages.plan import Group
from flows.stages.scorers import StoringScorer
from flows.stages.scoring import store_answers
from kl.records import Candidate, Prompt, Score, ScoreFailure, Turn
from tests.disks import files_of_at_most

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


def test_a_group_that_ends_with_what_its_backend_could_not_keep_stops_the_asking(tmp_path: Path) -> None:
    stores = OutputFolder(tmp_path).stores()
    keys = ("a" * 32, "b" * 32)
    request = ScoreRequest("r", "q", Prompt((Turn("user", "Hi"),)), "ab", (0, 1), None, (0, 1), keys, 1)
    refusals: list[OSError] = []

    async def ending() -> AsyncIterator[Score | ScoreFailure]:
        async for result in answers(request):
            yield result
        raise OSError(errno.ENOSPC, "No space left on device", "/raw/rows")

    def stop(error: OSError) -> bool:
        refusals.append(error)
        return True

    with pytest.raises(DiskRefusedError, match="/raw/rows"):
        asyncio.run(store_answers(ending(), [("prompt", request)], stores, lambda *_: None, on_refused=stop))
    assert len(refusals) == 1
    assert stores.scores.known_keys("prompt") == set(keys)


class CutShort(Backend):
    """Gives one answer, and is then cut short by something else."""

    name = "cut-short"
    capabilities = Capabilities(20)
    session: BackendSession

    async def preflight(self, model: str) -> str | None:
        return None

    def stop_asking(self, why: str) -> bool:
        return True

    async def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        async for result in answers(requests[0]):
            yield result
            self.session.cancel()
            await asyncio.sleep(60)


def test_a_group_that_is_cut_short_after_the_disk_refused_it_has_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ScoreRequest("r", "q", Prompt((Turn("user", "Hi"),)), "ab", (0, 1), None, (0, 1), ("a" * 32, "b" * 32), 1)
    monkeypatch.setattr("flows.stages.scorers.requests_of", lambda *_: iter([("prompt", request)]))
    comparison: Any = SimpleNamespace(config=SimpleNamespace(stage="run"))
    group: Any = Group
    backend = CutShort(BackendOptions())
    with BackendSession(backend) as session, files_of_at_most(10):
        backend.session = session
        scorer = StoringScorer(comparison, OutputFolder(tmp_path).stores(), session, lambda *_: None, Reserve(tmp_path))
        ended: Any = [scorer.score(group), scorer.score(group)]
    assert [type(state.data) for state in ended] == [DiskRefusedError, DiskRefusedError]
    assert "journals" in ended[1].data.filename
