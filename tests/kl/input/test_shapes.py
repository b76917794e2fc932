"""Other people's formats: read as the same answer in the documented form, or named with what they lack."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from kl.input.responses import ResponseFile, parse_responses
from kl.records import Sampling
from tests import ROOT

GOOD = json.loads((ROOT / "examples/responses/000_why-is-the-sky-blue.json").read_text())
RESPONSE = GOOD["responses"][0]
CONTENT = RESPONSE["logprobs"]["content"]
PROMPT = GOOD["prompt"]
MESSAGES = [{"role": "user", "content": PROMPT}]
HEAD = {name: value for name, value in GOOD.items() if name != "responses"}


def read(*documents: Any) -> ResponseFile:
    return parse_responses("\n".join(map(json.dumps, documents)).encode(), "a.json")


def expected(**changes: Any) -> Any:
    return replace(read(GOOD).responses[0], **changes)


def legacy(**changes: Any) -> dict[str, Any]:
    columns = {
        "tokens": [row["token"] for row in CONTENT],
        "token_logprobs": [row["logprob"] for row in CONTENT],
        "top_logprobs": [{entry["token"]: entry["logprob"] for entry in row["top_logprobs"]} for row in CONTENT],
        "text_offset": [0] * len(CONTENT),
    }
    return {**columns, **changes}


def without_ids(file: ResponseFile) -> list[Any]:
    def bare(candidate: Any) -> tuple[Any, ...]:
        return candidate.token, candidate.logprob

    return [
        (bare(position.sampled), [bare(entry) for entry in position.top])
        for response in file.responses
        for position in response.positions
    ]


def chat(**changes: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": RESPONSE["text"]}}
    answer = {
        "id": "c-1",
        "object": "chat.completion",
        "model": "m",
        "choices": [choice | {"logprobs": {"content": CONTENT}}],
    }
    return answer | changes


def gemini_token(entry: dict[str, Any]) -> dict[str, Any]:
    return {"token": entry["token"], "tokenId": entry["token_id"], "logProbability": entry["logprob"]}


GEMINI = {
    "content": {"role": "model", "parts": [{"text": RESPONSE["text"]}]},
    "finishReason": "STOP",
    "logprobsResult": {
        "chosenCandidates": [gemini_token(row) for row in CONTENT],
        "topCandidates": [{"candidates": [gemini_token(entry) for entry in row["top_logprobs"]]} for row in CONTENT],
    },
}
GEMINI_REQUEST = {"contents": [{"role": "user", "parts": [{"text": PROMPT}]}]}


def test_an_object_a_line_for_one_prompt_is_one_file() -> None:
    file = read(GOOD, GOOD)
    assert [problem.kind for problem in file.problems] == ["json-lines"]
    assert list(file.responses) == [expected(), expected(response_idx=1)]


def test_lines_may_be_responses_with_the_prompt_beside_them() -> None:
    file = read(*[{**HEAD, **RESPONSE, "temperature": 1.0}] * 3)
    assert [response.text for response in file.responses] == [RESPONSE["text"]] * 3
    assert file.responses[2].sampling == Sampling(1.0, 1.0, 0)


def test_the_completions_format_has_its_columns_side_by_side() -> None:
    file = read({**HEAD, "responses": [RESPONSE | {"logprobs": legacy()}]})
    assert file.problems == ()
    assert without_ids(file) == without_ids(read(GOOD))


def test_a_list_may_be_an_object_of_texts_and_values() -> None:
    rows = [row | {"top_logprobs": {e["token"]: e["logprob"] for e in row["top_logprobs"]}} for row in CONTENT]
    file = read({**HEAD, "responses": [RESPONSE | {"logprobs": {"content": rows}}]})
    assert file.problems == ()
    assert without_ids(file) == without_ids(read(GOOD))


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(chat(prompt=PROMPT), id="prompt beside it"),
        pytest.param(chat(messages=MESSAGES), id="messages beside it"),
        pytest.param(chat(request={"messages": MESSAGES, "temperature": 0.5}), id="in its request"),
        pytest.param({"request": {"body": {"messages": MESSAGES}}, "response": {"body": chat()}}, id="batch row"),
        pytest.param({"prompt": PROMPT, "model": "m", "responses": chat()["choices"]}, id="choices as responses"),
        pytest.param({"prompt": PROMPT, "model": "m", "responses": [chat()]}, id="answers as responses"),
        pytest.param({"prompt": PROMPT, "responses": [{"candidates": [GEMINI]}]}, id="Gemini answers as responses"),
        pytest.param({"prompt": PROMPT, "candidates": [GEMINI]}, id="Gemini, prompt beside it"),
        pytest.param({"request": GEMINI_REQUEST, "response": {"candidates": [GEMINI]}}, id="Gemini batch row"),
    ],
)  # fmt: skip
def test_a_raw_answer_is_read_with_the_prompt_beside_it_or_in_its_request(document: dict[str, Any]) -> None:
    file = read(document)
    assert file.problems == ()
    (response,) = file.responses
    good = expected()
    assert (response.prompt, response.text, response.positions) == (good.prompt, good.text, good.positions)
    assert response.sampling.temperature == document.get("request", {}).get("temperature")


@pytest.mark.parametrize(
    ("document", "kind", "shown"),
    [
        pytest.param(chat(), "no-prompt", "a raw answer of chat completions, and `prompt` is missing", id="chat"),
        pytest.param({"candidates": [GEMINI]}, "no-prompt", "a raw answer of Gemini, and `prompt`", id="Gemini"),
        pytest.param(
            {"prompt": PROMPT, "responses": [{"candidates": [GEMINI | {"logprobsResult": {"chosenCandidates": []}}]}]},
            "no-logprobs", "a raw answer of Gemini with 0 chosenCandidates and 0 topCandidates", id="Gemini, no lists",
        ),
        pytest.param(
            {**HEAD, "responses": [RESPONSE | {"logprobs": legacy(top_logprobs=None)}]}, "no-logprobs",
            "of the completions format with 6 tokens, 6 token_logprobs, 0 top_logprobs", id="completions without lists",
        ),
    ],
)  # fmt: skip
def test_what_a_format_lacks_is_said_in_a_line_that_names_it(document: dict[str, Any], kind: str, shown: str) -> None:
    file = read(document)
    assert file.responses == ()
    assert file.unreadable[0].kind == kind
    assert shown in file.unreadable[0].message
    assert "\n" not in file.unreadable[0].message
