"""Answers that are paid for and not read yet."""

from __future__ import annotations

import asyncio
from pathlib import Path

from backends.service.bought import BoughtAnswers
from tests.disks import files_of_at_most


def test_an_answer_that_the_disk_refuses_is_still_there_to_be_read(tmp_path: Path) -> None:
    bought = BoughtAnswers(tmp_path)
    with files_of_at_most(10):
        asyncio.run(bought.add("key", {"choices": ["a response of more than ten bytes"]}))
    assert bought.get("key") is not None
    asyncio.run(bought.drop("key"))
    assert bought.get("key") is None
    assert BoughtAnswers(tmp_path).recall() == {}
