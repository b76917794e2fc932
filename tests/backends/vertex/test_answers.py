"""Both ways of reading an answer give the same: straight into fields, and as plain JSON."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.errors import BackendError
from backends.vertex import answers
from kl.records import Score, ScoreFailure

LOGPROBS = st.one_of(
    st.floats(-1e3, 0),
    st.integers(-5, 0),
    st.sampled_from([0, -0.0, -1.2676506e30, 1e-7, float("-inf"), None, True, "x"]),
)
TOKENS = st.fixed_dictionaries(
    {"logProbability": LOGPROBS},
    optional={
        "token": st.one_of(st.text(max_size=3), st.none()),
        "tokenId": st.one_of(st.integers(-1, 2**70), st.sampled_from([9.0, 9.5, True, None, "9"])),
        "extra": st.just({"deep": [1]}),
    },
)
USUAL_TOKENS = st.fixed_dictionaries(
    {"logProbability": st.floats(-1e3, 0)}, optional={"token": st.text(max_size=3), "tokenId": st.integers(0, 2**40)}
)


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """Batch rows, most of them of the usual shape."""
    tokens = draw(st.lists(draw(st.sampled_from([USUAL_TOKENS, USUAL_TOKENS, TOKENS])), max_size=5))
    logprobs = {"topCandidates": [{"candidates": tokens}] * draw(st.sampled_from([1, 1, 1, 0, 2]))}
    if draw(st.booleans()):
        logprobs["chosenCandidates"] = draw(st.lists(st.one_of(USUAL_TOKENS, TOKENS), max_size=2))
    candidate: dict[str, Any] = {"logprobsResult": logprobs, "finishReason": draw(st.sampled_from(["STOP", None, 3]))}
    response: dict[str, Any] = {
        "candidates": [candidate] * draw(st.sampled_from([1, 1, 1, 0, 2])),
        "modelVersion": draw(st.sampled_from(["v", "v", None])),
    }
    if draw(st.booleans()):
        response["usageMetadata"] = draw(
            st.sampled_from([{"promptTokenCount": 7}, {}, None, {"promptTokenCount": "7"}])
        )
    if draw(st.integers(0, 9)) == 0:
        response["promptFeedback"] = draw(st.sampled_from([{}, {"blockReason": "SAFETY"}, None]))
    return {"key": "k", "status": draw(st.sampled_from(["", "", None, "429 busy", {}])), "response": response}


@settings(deadline=None)
@given(rows())
def test_a_row_that_the_quick_way_reads_is_read_the_same_by_the_other(row: dict[str, Any]) -> None:
    line = json.dumps(row).encode()
    quick = answers.usual_row(line)
    assert quick is None or quick == answers.read_row("k", json.loads(line))


@settings(deadline=None)
@given(rows())
def test_the_answer_to_a_call_is_that_of_its_plain_json(row: dict[str, Any]) -> None:
    content = json.dumps(row["response"]).encode()
    assert answers.read_answer("k", content) == answers.read_row("k", {"response": json.loads(content)})


USUAL: dict[str, Any] = {
    "key": "k",
    "status": "",
    "request": {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}]},
    "response": {
        "candidates": [
            {
                "finishReason": "MAX_TOKENS",
                "logprobsResult": {
                    "topCandidates": [{"candidates": [{"token": "a", "logProbability": -0.5, "tokenId": 3}] * 20}],
                    "chosenCandidates": [{"token": "a", "logProbability": -0.5, "tokenId": 3}],
                },
            }
        ],
        "modelVersion": "v-1",
        "usageMetadata": {"promptTokenCount": 12, "candidatesTokenCount": 1},
    },
}


def test_the_usual_row_is_read_the_quick_way() -> None:
    found = answers.usual_row(json.dumps(USUAL).encode())
    assert isinstance(found, Score)
    assert (found.key, len(found.top), found.model_version, found.input_tokens) == ("k", 20, "v-1", 12)
    assert found == answers.read_row("k", USUAL)


@pytest.mark.parametrize(
    "line", [b"", b"{", b"null", b"[1]", b'{"key": "k"}', b'{"key": "k", "response": {}}', b'\xff{"key": 1}']
)
def test_a_row_of_another_shape_is_left_to_the_other_way(line: bytes) -> None:
    assert answers.usual_row(line) is None


def test_what_is_wrong_is_named_in_full() -> None:
    row = copy.deepcopy(USUAL)
    row["response"]["candidates"][0]["logprobsResult"]["topCandidates"] *= 2
    found = answers.read_answer("k", json.dumps(row["response"]).encode())
    assert isinstance(found, ScoreFailure)
    assert found.message == "the answer has 2 steps of log-probabilities where one was asked."


def test_an_answer_that_is_no_object_is_an_error() -> None:
    with pytest.raises(BackendError, match="list instead of an object"):
        answers.read_answer("k", b"[]")
    with pytest.raises(json.JSONDecodeError):
        answers.read_answer("k", b"<html>\xff")
    assert answers.read_answer("k", b"") == answers.read_row("k", {"response": {}})
