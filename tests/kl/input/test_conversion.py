"""Spoiled files in other people's formats: never an error, the same both ways of reading, the same once converted."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from kl.input.conversion import converted
from kl.input.responses import parse_responses
from kl.input.sources import parts_of, prompts_of
from kl.output.atomic import json_bytes
from tests.kl.input import test_shapes as shapes

SOURCES = {
    "documented": shapes.GOOD,
    "chat": shapes.chat(prompt="x", usage={"completion_tokens": 6}),
    "Gemini": {"request": shapes.GEMINI_REQUEST, "response": {"candidates": [shapes.GEMINI]}},
    "llama.cpp": shapes.llama_answer(9, *shapes.PLAIN_ROWS),
    "scored": {"request": {"messages": shapes.MORE}, "response": {
        "choices": [{"index": 0}], "prompt_logprobs": shapes.SCORED, "prompt_token_ids": [1, 11, 20, 22, 24]}},
    "echo": {"request": {"prompt": "Hi"}, "response": {"choices": [shapes.ECHOED]}},
    "Responses route": {"request": {"input": shapes.INPUT}, "response": shapes.responses_route()},
    "refused": {"custom_id": "1", "status": "", "response": {"status_code": 400, "body": {"error": {"message": "x"}}}},
}  # fmt: skip
VALUES = [
    None,
    True,
    0,
    -1,
    1.5,
    "",
    "x",
    [],
    {},
    [1],
    {"a": 1},
    [{}],
    "token_id:5",
    float("inf"),
    float("nan"),
    "\ud800",
]
ROUNDS = 60


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for name, item in inner:
        yield from places(item, (*path, name))


def spoiled(document: Any, dice: random.Random) -> Any:
    document = copy.deepcopy(document)
    for _ in range(dice.choice([1, 1, 2])):
        *way, last = dice.choice(list(places(document)))
        place = document
        for name in way:
            place = place[name]
        if isinstance(place, dict) and dice.random() < 0.2:
            del place[last]
        else:
            place[last] = copy.deepcopy(dice.choice(VALUES))
        if not document:
            return document
    return document


@pytest.mark.parametrize("name", SOURCES)
def test_a_spoiled_file_is_read_one_way_and_its_conversion_says_the_same(name: str) -> None:
    dice = random.Random(name)
    n_converted = 0
    for _ in range(ROUNDS):
        documents = [spoiled(SOURCES[name], dice) for _ in range(dice.choice([1, 1, 2]))]
        data = "\n".join(map(json.dumps, documents)).encode()
        read, entry_by_entry = parse_responses(data, "a"), parse_responses(data, "a", in_columns=False)
        assert (read.problems, read.unreadable) == (entry_by_entry.problems, entry_by_entry.unreadable)
        assert len(prompts_of(data)) <= max(len(parts_of(data)), 1)
        for item in converted(data, "a"):
            assert (item.document is None) == (not item.read.responses)
            if item.document is None:
                continue
            n_converted += 1
            again = parse_responses(json_bytes(item.document), "a").responses
            for before, after in zip(item.read.responses, again, strict=True):
                assert replace(before, positions=(), source_file="", response_idx=0) == replace(
                    after, positions=(), source_file="", response_idx=0
                )
                for one, other in zip(before.positions, after.positions, strict=True):
                    assert replace(one, defect=None) == replace(other, defect=None)
                    assert (one.defect is None) == (other.defect is None)
    assert n_converted or name == "refused"
