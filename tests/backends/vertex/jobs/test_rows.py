"""Output rows and the requests that they answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.base import ScoreRequest
from backends.vertex import wire
from backends.vertex.jobs.rows import OutputReader, RowSet, score_rows, split_rows
from kl.records import Prompt, Score, ScoreFailure, Turn

TEXT = "Größe «x»\u2028🙂 end"
Line = Callable[[dict[str, Any]], dict[str, Any]]


def request(text: str = TEXT, question: str = "Question?", model: str = "gemini-2.5-flash") -> ScoreRequest:
    """Every prefix of a text, one character at a time; equal questions and prefixes have equal keys."""
    ends = tuple(range(len(text)))
    keys = tuple(hashlib.sha256(f"{question}|{text[:end]}|{model}".encode()).hexdigest() for end in ends)
    prompt = Prompt((Turn("user", question),), system="Be brief")
    return ScoreRequest("name", model, prompt, text, ends, None, tuple(range(len(text))), keys, 20)


def answer(number: int) -> dict[str, Any]:
    candidates = [{"token": str(number), "logProbability": -0.5, "tokenId": number}]
    return {
        "candidates": [
            {"finishReason": "MAX_TOKENS", "logprobsResult": {"topCandidates": [{"candidates": candidates}]}}
        ]
    }


def output(rows: RowSet[Score], change: Line) -> list[dict[str, Any]]:
    """One answered line for each row; the token names the row."""
    lines = [json.loads(line) for line in rows]
    return [change({**line, "status": "", "response": answer(index)}) for index, line in enumerate(lines)]


def read(rows: RowSet[Score], lines: list[Any], folder: Path) -> list[Score | ScoreFailure]:
    path = folder / "predictions.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return list(OutputReader(rows).read(path))


def without_key(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "key"}


CHANGES: dict[str, Line] = {
    "as sent": lambda row: row,
    "no key": without_key,
    "a key of another kind": lambda row: row | {"key": 17},
    "a key that was changed": lambda row: row | {"key": row["key"].upper() + "-0"},
    "a list for a key": lambda row: row | {"key": [row["key"]]},
    "custom_id": lambda row: without_key(row) | {"custom_id": row["key"]},
    "an empty key beside custom_id": lambda row: row | {"key": "", "custom_id": row["key"]},
    "the line as instance": lambda row: {
        "instance": {"key": row["key"], "request": row["request"]}, "status": "", "response": row["response"]
    },
    "the request in its envelope": lambda row: without_key(row) | {"request": {"request": row["request"]}},
    "the key in the echo": lambda row: without_key(row) | {"request": {"key": row["key"], "request": row["request"]}},
    "an echo with nulls, in another order": lambda row: without_key(row)
    | {"request": dict(reversed((row["request"] | {"tools": None, "labels": {}}).items()))},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_row_finds_its_context_in_any_order(change: Line, tmp_path: Path) -> None:
    rows = score_rows([request(), request(question="Another?")])
    results = read(rows, list(reversed(output(rows, change))), tmp_path)
    assert {result.key: result.top[0].token for result in results if isinstance(result, Score)} == {
        key: str(index) for index, key in enumerate(rows.keys)
    }


def test_foreign_doubled_and_unreadable_lines_answer_nothing(tmp_path: Path) -> None:
    rows = score_rows([request(text="abc")])
    other = output(score_rows([request(text="xyz", question="Other?")]), without_key)
    own = output(rows, lambda row: row)
    lines = ['{"key": "cut', "\n", "[1, 2]\n", "null\n", *other, own[0], own[0], {"key": own[1]["key"]}, own[1]]
    results = read(rows, lines, tmp_path)
    assert [type(result) for result in results] == [Score, ScoreFailure, Score]
    assert [result.key for result in results] == [rows.keys[0], rows.keys[1], rows.keys[1]]


def test_equal_contexts_are_one_row_and_models_do_not_share_a_file() -> None:
    rows = score_rows([request(), request(), request(model="gemini-2.5-flash-lite")])
    assert len(rows.keys) == 2 * len(TEXT)
    parts = list(split_rows(rows, 1000, 10**9))
    assert [part.model for part in parts] == ["gemini-2.5-flash", "gemini-2.5-flash-lite"]
    assert sum((part.keys for part in parts), ()) == rows.keys


def test_rows_are_found_by_what_is_said_of_their_keys() -> None:
    rows = score_rows([request(), request(question="Another?")])
    number = {key: index for index, key in enumerate(rows.keys)}
    parts = rows.by(lambda key: number[key] % 3 == 0)
    assert {name: part.keys for name, part in parts.items()} == {
        name: tuple(key for key in rows.keys if (number[key] % 3 == 0) is name) for name in (True, False)
    }
    assert rows.without(parts[True].keys).keys == parts[False].keys
    assert rows.only(parts[True].keys).keys == parts[True].keys


@pytest.mark.parametrize(("max_rows", "max_bytes"), [(3, 10**9), (1000, 900), (1, 1)])
def test_files_stay_within_both_limits(max_rows: int, max_bytes: int) -> None:
    rows = score_rows([request(), request(question="Another, somewhat longer question?")])
    parts = list(split_rows(rows, max_rows, max_bytes))
    assert sum((part.keys for part in parts), ()) == rows.keys
    assert all(len(part.keys) <= max_rows for part in parts)
    assert all(len(part.keys) == 1 or sum(map(len, part)) <= max_bytes for part in parts)


def test_lengths_are_known_without_making_the_lines() -> None:
    asked = replace(
        request(), positions=(0, 3, 9), keys=request().keys[:1] + request().keys[3:4] + request().keys[9:10]
    )
    rows = wire.RequestBodies(asked)
    assert [len(line) for line in rows.lines()] == list(rows.line_lengths())
