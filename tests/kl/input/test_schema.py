"""The schema of the input format and the reader, held against each other."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from kl.input.responses import parse_responses
from tests import ROOT
from tests.documents import code_blocks

SCHEMA = json.loads(files("kl.input").joinpath("schema.json").read_text(encoding="utf-8"))
VALIDATOR = Draft202012Validator(SCHEMA)
DOCUMENT = ROOT / "docs/input-format.md"

# What no schema can say: how the parts of a file belong together, and which numbers are right.
OF_VALUES = {
    "prompt-end", "empty-prompt", "text-mismatch", "empty-response", "end-token", "sampled-disagrees",
    "sampled-above-list",
    "repeated-token-id", "duplicate-candidate", "mass-above-one", "unsorted-list", "unknown-logprob", "null-logprob",
    "bad-logprob", "masked-candidate", "infinite-logprob", "unusable-list", "overwritten-entries", "sampled-appended",
    "cut-text", "stripped-text", "tokens-as-bytes", "text-from-bytes",
}  # fmt: skip


def entry(token: str, logprob: float, token_id: int) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "token_id": token_id, "bytes": list(token.encode())}


def position(token: str, token_id: int) -> dict[str, Any]:
    return {**entry(token, -0.5, token_id), "top_logprobs": [entry(token, -0.5, token_id), entry("!", -2.0, 4)]}


FULL: dict[str, Any] = {
    "prompt": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": [{"type": "text", "text": "Hi"}, {"text": "."}]},
        {"role": "user", "content": "Why?"},
    ],
    "system": "Be brief.",
    "model": "p",
    "model_version": "p-001",
    "sampling": {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": {},
    },
    "responses": [
        {
            "text": " So.",
            "finish_reason": "stop",
            "model": "p",
            "model_version": "p-001",
            "temperature": 1.0,
            "logprobs": {"content": [position(" So", 12), position(".", 3) | {"may_lack": False, "unusable": None}]},
        }
    ],
}  # fmt: skip


def noted(document: Any) -> set[str]:
    """The kinds of what the reader says of a file: nothing where it is in the form."""
    return {problem.kind for problem in parse_responses(json.dumps(document).encode(), "f.json").problems}


def accepted(document: Any) -> bool:
    return VALIDATOR.is_valid(document)


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


def test_a_file_with_everything_and_one_with_the_least_are_read() -> None:
    bare = {"token": "So", "logprob": -0.5, "top_logprobs": [{"token": "So", "logprob": -0.5}]}
    least = {"prompt": "Why?", "responses": [{"text": "So", "logprobs": {"content": [bare]}}]}
    for document in (FULL, least):
        assert list(VALIDATOR.iter_errors(document)) == []
        assert noted(document) == set()


def test_what_the_program_writes_is_in_the_form() -> None:
    written = json.loads((ROOT / "examples/responses/000_why-is-the-sky-blue.json").read_text(encoding="utf-8"))
    assert list(VALIDATOR.iter_errors(written)) == []


def test_the_examples_of_the_document_are_in_the_form_and_are_read() -> None:
    examples = [json.loads(text) for text in code_blocks(DOCUMENT, "json")]
    assert len(examples) >= 2
    for example in examples:
        assert list(VALIDATOR.iter_errors(example)) == []
        assert noted(example) <= OF_VALUES


def test_every_key_of_the_schema_is_in_the_document() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    keys = {key for place in _objects(SCHEMA) for key in place.get("properties", {})}
    assert {key for key in keys if f"`{key}`" not in text} == set()


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(inner)


# A thing at a time is changed, everywhere.

OTHERS = (None, True, 0, -1, 300, 0.5, -3.5, "", "x", [], [1], {}, {"text": 1})
GONE = object()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


def changed(path: tuple[Any, ...], value: Any) -> Any:
    document = copy.deepcopy(FULL)
    at: Any = document
    for key in path[:-1]:
        at = at[key]
    if value is GONE:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return document


def test_what_the_reader_finds_wrong_with_the_shape_the_schema_refuses_and_the_other_way_round() -> None:
    wrong: list[tuple[object, ...]] = []
    n = 0
    for path in places(FULL):
        for value in (*OTHERS, GONE):
            document = changed(path, value)
            kinds, is_accepted = noted(document), accepted(document)
            n += 1
            if is_accepted and not kinds <= OF_VALUES:
                wrong.append(("the schema accepts", path, value, kinds))
            if not is_accepted and not kinds:
                wrong.append(("the reader accepts", path, value))
    assert wrong == []
    assert n > 700


ASK = {"role": "user", "content": "Why?"}


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param({"tools": [{"name": "search"}]}, id="tools"),
        pytest.param({"functions": [{"name": "search"}]}, id="functions"),
        pytest.param({"continues": {"file": "high.json"}}, id="goes on from a prefix"),
        pytest.param({"prompt": [{"role": "system", "content": "A"}, ASK]}, id="two systems"),
        pytest.param({"prompt": [ASK, {"role": "system", "content": "B"}]}, id="late system"),
        pytest.param({"top_k": 1.5}, id="setting beside"),
        pytest.param({"rendered_prompt_sha256": 7}, id="hash"),
    ],
)  # fmt: skip
def test_is_refused_or_left_out_by_both(extra: dict[str, Any]) -> None:
    document = {**FULL, **extra}
    assert not accepted(document)
    assert noted(document)


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param({"anything": {"else": 1}}, id="other keys"),
        pytest.param({"tools": []}, id="no tools"),
        pytest.param({"system": [{"type": "text", "text": "Be brief."}]}, id="system in parts"),
        pytest.param({"prompt": [{"role": "system", "content": ""}, ASK], "system": None}, id="system turn"),
        pytest.param({"top_logprobs": 2}, id="k"),
    ],
)  # fmt: skip
def test_is_accepted_by_both(extra: dict[str, Any]) -> None:
    document = {**FULL, **extra}
    assert list(VALIDATOR.iter_errors(document)) == []
    assert noted(document) == set()
