"""The Gemini wire: bodies as the service wants them, answers with all their traps."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.base import ScoreRequest
from backends.errors import ModelNotUsableError
from backends.vertex import answers, wire
from kl.records import Candidate, Prompt, Score, ScoreFailure, Turn

PROMPT = Prompt((Turn("user", "Hi"), Turn("model", "Hello"), Turn("user", 'Say "x"\n')), system="Be brief")


def request(tokens: list[str], prompt: Prompt = PROMPT, model: str = "gemini-2.5-flash") -> ScoreRequest:
    ends = [0]
    for token in tokens[:-1]:
        ends.append(ends[-1] + len(token))
    n = len(tokens)
    return ScoreRequest(
        "r", model, prompt, "".join(tokens), tuple(ends), None, tuple(range(n)), tuple(map(str, range(n))), 20
    )


def test_a_body_pins_the_sampling_and_switches_thinking_off() -> None:
    body = wire.request_body(PROMPT, "He", wire.generation_config("gemini-2.5-flash", 5))
    assert body == {
        "contents": [
            {"role": "user", "parts": [{"text": "Hi"}]},
            {"role": "model", "parts": [{"text": "Hello"}]},
            {"role": "user", "parts": [{"text": 'Say "x"\n'}]},
            {"role": "model", "parts": [{"text": "He"}]},
        ],
        "systemInstruction": {"parts": [{"text": "Be brief"}]},
        "generationConfig": {
            "temperature": 1.0,
            "topP": 1.0,
            "maxOutputTokens": 1,
            "responseLogprobs": True,
            "logprobs": 5,
            "thinkingConfig": {"thinkingBudget": 0},
        },
    }


@pytest.mark.parametrize("model", ["gemini-2.0-flash", "gemini-3.5-flash", "my-tuned-model"])
def test_models_without_a_budget_get_none(model: str) -> None:
    assert "thinkingConfig" not in wire.generation_config(model, 20)


@pytest.mark.parametrize("model", ["gemini-2.5-pro", "publishers/google/models/gemini-2.5-pro", "gemini-2.5-pro-002"])
def test_a_model_that_always_thinks_is_refused(model: str) -> None:
    with pytest.raises(ModelNotUsableError, match="always thinks"):
        wire.generation_config(model, 20)


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=4), min_size=1, max_size=12))
def test_lines_are_the_bodies_of_their_prefixes(tokens: list[str]) -> None:
    asked = request(tokens, Prompt((Turn("user", 'tricky "],"generationConfig":'),), '"],"generationConfig":{}'))
    rows = wire.RequestBodies(asked)
    lines = list(rows.lines())
    assert [len(line) for line in lines] == list(rows.line_lengths())
    config = wire.generation_config("gemini-2.5-flash", 20)
    bodies = dict(rows)
    for position, line in enumerate(lines):
        body = wire.request_body(asked.prompt, "".join(tokens[:position]), config)
        whole = json.dumps({"key": str(position), "request": body}, separators=(",", ":"))
        assert line == whole.encode("ascii") + b"\n"  # to the byte: an upload of an earlier version is recognised by it
        assert bodies[str(position)] == wire.as_json(body)


@dataclass(frozen=True)
class Echo:
    """A request as it may come back."""

    id: str
    body: dict[str, Any]


BODY = wire.request_body(PROMPT, "He", wire.generation_config("gemini-2.5-flash", 20))
ECHOES = [
    Echo("as sent", BODY),
    Echo("keys in another order", dict(reversed(BODY.items()))),
    Echo(
        "nulls",
        BODY
        | {
            "tools": None,
            "contents": [turn | {"parts": [turn["parts"][0] | {"fileData": None}]} for turn in BODY["contents"]],
        },
    ),
    Echo("integers", BODY | {"generationConfig": BODY["generationConfig"] | {"temperature": 1, "topP": 1}}),
    Echo(
        "snake case",
        {
            "contents": BODY["contents"],
            "system_instruction": BODY["systemInstruction"] | {"role": "user"},
            "generation_config": {
                "temperature": 1.0,
                "top_p": 1.0,
                "max_output_tokens": 1.0,
                "response_logprobs": True,
                "logprobs": 20,
                "thinking_config": {"thinking_budget": 0},
            },
        },
    ),
]


@pytest.mark.parametrize("echo", ECHOES, ids=lambda echo: echo.id)
def test_spellings_of_one_request_have_one_canonical_form(echo: Echo) -> None:
    assert wire.canonical_request(echo.body) == wire.canonical_request(BODY)


def test_other_requests_have_other_canonical_forms() -> None:
    config = wire.generation_config("gemini-2.5-flash", 20)
    others = [
        wire.request_body(PROMPT, "Hel", config),
        wire.request_body(PROMPT, "", config),
        wire.request_body(Prompt(PROMPT.turns), "He", config),
        wire.request_body(PROMPT, "He", config | {"logprobs": 19}),
    ]
    assert len({wire.canonical_request(body) for body in [BODY, *others]}) == 5


def answer(top: list[dict[str, Any]], **candidate: Any) -> dict[str, Any]:
    logprobs = {"topCandidates": [{"candidates": top}], "chosenCandidates": top[:1]}
    given = {"content": {"role": "model"}, "finishReason": "MAX_TOKENS", "logprobsResult": logprobs}
    return {
        "candidates": [given | candidate],
        "modelVersion": "gemini-2.5-flash-001",
        "usageMetadata": {"promptTokenCount": 7, "candidatesTokenCount": 1},
    }


def token(text: str | None, logprob: Any, token_id: int | None = 5) -> dict[str, Any]:
    entry = {"token": text, "logProbability": logprob, "tokenId": token_id}
    return {name: value for name, value in entry.items() if value is not None}


def test_a_plain_answer_is_read_whole() -> None:
    result = answers.parse_response("k", answer([token("a", -0.1, 3), token("b", -2.5, 4)]))
    assert result == Score(
        "k", (Candidate("a", -0.1, 3), Candidate("b", -2.5, 4)), Candidate("a", -0.1, 3), "gemini-2.5-flash-001",
        "MAX_TOKENS", 7, 1, 0,
    )  # fmt: skip


def test_an_integer_zero_is_a_certain_token_and_an_absent_text_the_empty_one() -> None:
    result = answers.parse_response("k", answer([token(None, 0, 9)]))
    assert isinstance(result, Score)
    assert result.top == (Candidate("", 0.0, 9),)  # which token it is, the id alone says
    assert isinstance(result.top[0].logprob, float)


@pytest.mark.parametrize(
    ("stated", "expected"), [(9, 9), (9.0, 9), (9.5, None), (True, None), (-1, None), ("9", None), (math.inf, None)]
)
def test_an_id_is_a_whole_number(stated: Any, expected: int | None) -> None:
    result = answers.parse_response("k", answer([{"logProbability": -0.1, "tokenId": stated}]))
    assert isinstance(result, Score)
    assert result.top == (Candidate("", -0.1, expected),)


def test_masked_and_unreported_candidates_are_dropped_and_counted() -> None:
    top = [token("a", -0.5), token("b", -1.2676506e30), token("c", None), token("d", True), token("e", -99.0)]
    result = answers.parse_response("k", answer(top))
    assert isinstance(result, Score)
    assert [item.token for item in result.top] == ["a", "e"]
    assert result.n_dropped == 3


def test_lists_are_sorted() -> None:
    result = answers.parse_response("k", answer([token("b", -2.0), token("a", -0.1), token("c", 0)]))
    assert isinstance(result, Score)
    assert [item.token for item in result.top] == ["c", "a", "b"]


FAILURES: list[tuple[str, Any, str, bool]] = [
    ("nothing", None, "empty-answer", False),
    ("an empty object", {}, "empty-answer", False),
    ("no candidates", {"modelVersion": "x"}, "empty-answer", False),
    ("a blocked prompt", {"promptFeedback": {"blockReason": "SAFETY"}}, "blocked", True),
    ("a blocked answer", {"candidates": [{"finishReason": "PROHIBITED_CONTENT"}]}, "blocked", True),
    ("no logprobs", {"candidates": [{"finishReason": "MAX_TOKENS"}]}, "no-logprobs", False),
    ("an empty list", answer([]), "no-logprobs", False),
    ("only masked tokens", answer([token("a", -1.2676506e30)]), "no-logprobs", False),
    (
        "two steps",
        {"candidates": [{"logprobsResult": {"topCandidates": [{"candidates": [token("a", -1)]}] * 2}}]},
        "unexpected-shape",
        False,
    ),
]


@pytest.mark.parametrize(("response", "reason", "final"), [case[1:] for case in FAILURES], ids=[c[0] for c in FAILURES])
def test_an_answer_without_a_list_is_a_failure_with_its_reason(response: Any, reason: str, final: bool) -> None:
    result = answers.parse_response("k", response)
    assert isinstance(result, ScoreFailure)
    assert (result.reason, result.final) == (reason, final)


def test_an_answer_that_stops_at_once_still_has_its_list() -> None:
    result = answers.parse_response("k", answer([token(None, -0.2, 1), token("a", -1.9, 2)], finishReason="STOP"))
    assert isinstance(result, Score)
    assert result.finish_reason == "STOP"


SHAPES: list[Any] = [
    None, {}, "text", [], [1], 3, True, {"candidates": "x"}, {"candidates": ["x"]}, {"candidates": {}},
    {"candidates": [None]}, {"promptFeedback": "x"}, {"candidates": [{"logprobsResult": "x"}]},
    {"candidates": [{"logprobsResult": {"topCandidates": "x"}}]},
    {"candidates": [{"logprobsResult": {"topCandidates": ["x"]}}]},
    {"candidates": [{"logprobsResult": {"topCandidates": [{"candidates": ["x"]}]}}]},
    {"candidates": [{"logprobsResult": {"topCandidates": [{"candidates": [{"token": "a"}]}]}}]},
]  # fmt: skip


@pytest.mark.parametrize("status", ["", None])
@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_an_answer_of_any_shape_is_a_failure_that_is_asked_again(shape: Any, status: Any) -> None:
    result = answers.read_row("key", {"status": status, "response": shape})
    assert isinstance(result, ScoreFailure)
    assert not result.final


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ('Bad Request: {"error":{"code":400,"message":"no","status":"FAILED_PRECONDITION"}}', "row-error"),
        ({"code": 8, "message": "RESOURCE_EXHAUSTED"}, "row-error"),
        ("429 RESOURCE_EXHAUSTED: the daily limit of logprobs requests", "row-error"),
    ],
)
def test_a_row_error_says_what_the_service_said(status: Any, reason: str) -> None:
    result = answers.read_row("key", {"status": status, "response": None})
    assert isinstance(result, ScoreFailure)
    assert (result.reason, result.final) == (reason, False)
